//! The emulator's OpenAPI 3.1 document. Requests for routes that it does not list get a 404, so it cannot be
//! incomplete; a test checks that each of its routes has a handler.

use std::sync::LazyLock;

use serde_json::Value;

use super::message::Request;

/// The document.
pub(super) const DOCUMENT: &str = include_str!("openapi.json");

/// Method and path segments; a segment such as `{name}` matches anything.
type Route = (String, Vec<String>);

static ROUTES: LazyLock<Vec<Route>> = LazyLock::new(routes);

/// Whether the document has a route for this request.
pub(super) fn has(request: &Request) -> bool {
    let (method, path) = request.route();
    ROUTES.iter().any(|(expected, template)| {
        expected == method
            && template.len() == path.len()
            && template.iter().zip(&path).all(|(part, segment)| part.starts_with('{') || part == segment)
    })
}

/// Parses the routes. A path item may be a `$ref` to another one.
fn routes() -> Vec<Route> {
    // Cannot fail: tests parse the document.
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        let target = item["$ref"].as_str().and_then(|to| document.pointer(to.trim_start_matches('#')));
        let segments: Vec<String> = path.trim_start_matches('/').split('/').map(str::to_owned).collect();
        let methods = target.unwrap_or(item).as_object().into_iter().flatten().map(|(key, _)| key);
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
    use crate::emulator::{Emulator, Options, admin_api};

    fn request(method: &str, path: &str) -> Request {
        let headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static("localhost"))]);
        Request::new(Method::from_bytes(method.as_bytes()).expect("a method"), path, headers, Bytes::new())
    }

    #[tokio::test]
    async fn each_route_of_the_document_has_a_handler() {
        let emulator = Emulator::start(Options::default()).await.expect("an emulator");
        assert!(ROUTES.len() > 50, "{}", ROUTES.len());
        for (method, path) in ROUTES.iter() {
            let request = request(method, &format!("/{}", path.join("/")));
            let is_handled = match path[0].as_str() {
                "_emulator" => admin_api::handle(&emulator.shared, &request).is_some(),
                _ => emulator.shared.dispatch(&request).await.is_some(),
            };
            assert!(is_handled, "{method} {path:?}");
        }
    }

    #[test]
    fn a_route_is_matched_by_its_method_and_all_its_segments() {
        for (method, path, is_route) in [
            ("POST", "/v1/connect/token/slack%2Facme-slack?teamId=team_acme", true),
            ("GET", "/v1/connect/token/slack%2Facme-slack", false),
            ("POST", "/v1/connect/token/slack/acme-slack", false),
            ("GET", "/v2/teams", true),
            ("PARAMETERS", "/v2/teams/acme", false),
            ("GET", "/", false),
        ] {
            assert_eq!(has(&request(method, path)), is_route, "{method} {path}");
        }
    }
}
