//! What the emulator answers, as an OpenAPI 3.1 document. The document is also what decides which routes there are, so that
//! none can be left out of it; a test holds that each of its routes is answered.

use std::sync::LazyLock;

use serde_json::Value;

use super::exchange::Asked;

/// The document.
pub(super) const DOCUMENT: &str = include_str!("openapi.json");

/// Method, and path with `{names}` for segments that may be anything.
type Route = (String, Vec<String>);

static ROUTES: LazyLock<Vec<Route>> = LazyLock::new(routes);

/// Whether a request is for one of the document's routes.
pub(super) fn has(asked: &Asked) -> bool {
    let (method, path) = asked.route();
    ROUTES.iter().any(|(due, template)| {
        due == method
            && template.len() == path.len()
            && template.iter().zip(&path).all(|(due, segment)| due.starts_with('{') || due == segment)
    })
}

/// The document's routes. A path may refer to another that is just like it.
fn routes() -> Vec<Route> {
    // A test reads it whole.
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        let referred = item["$ref"].as_str().and_then(|to| document.pointer(to.trim_start_matches('#')));
        let segments: Vec<String> = path.trim_start_matches('/').split('/').map(str::to_owned).collect();
        let methods = referred.unwrap_or(item).as_object().into_iter().flatten().map(|(key, _)| key);
        let methods = methods.filter(|key| *key != "parameters").map(|key| key.to_uppercase());
        routes.extend(methods.map(|method| (method, segments.clone())));
    }
    routes
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::header::HOST;
    use http::{HeaderMap, HeaderValue, Method};

    use super::*;
    use crate::emulator::{Emulator, Options, admin};

    fn asked(method: &str, path: &str) -> Asked {
        let headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static("localhost"))]);
        Asked::new(Method::from_bytes(method.as_bytes()).expect("a method"), path, headers, Bytes::new())
    }

    #[tokio::test]
    async fn each_route_of_the_document_is_answered() {
        let emulator = Emulator::start(Options::default()).await.expect("an emulator");
        assert!(ROUTES.len() > 50, "{}", ROUTES.len());
        for (method, path) in ROUTES.iter() {
            let asked = asked(method, &format!("/{}", path.join("/")));
            let is_answered = match path[0].as_str() {
                "_emulator" => admin::decide(&emulator.shared, &asked).is_some(),
                _ => emulator.shared.dispatch(&asked).await.is_some(),
            };
            assert!(is_answered, "{method} {path:?}");
        }
    }

    #[test]
    fn a_route_is_told_by_its_method_and_all_its_segments() {
        for (method, path, is_route) in [
            ("POST", "/v1/connect/token/slack%2Facme-slack?teamId=team_acme", true),
            ("GET", "/v1/connect/token/slack%2Facme-slack", false),
            ("POST", "/v1/connect/token/slack/acme-slack", false),
            ("GET", "/v2/teams", true),
            ("PARAMETERS", "/v2/teams/acme", false),
            ("GET", "/", false),
        ] {
            assert_eq!(has(&asked(method, path)), is_route, "{method} {path}");
        }
    }
}
