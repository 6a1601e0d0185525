//! The emulator's own API below `/_emulator/`: recorded requests, faults, consents and env files. It needs no
//! credential; [`access`](super::access) keeps web pages out, which could otherwise get a token here.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::errors::{Kind, Refusal};
use super::fault::FaultScript;
use super::flow::Decision;
use super::flows;
use super::message::{Request, Response};
use super::oidc::Subject;
use super::{ReceivedRequest, Shared, openapi};

/// Handles the routes below `/_emulator/`; `None` for other routes.
pub(super) fn handle(shared: &Shared, request: &Request) -> Option<Response> {
    let (method, path) = request.route();
    let ["_emulator", path @ ..] = path.as_slice() else { return None };
    if !openapi::has(request) {
        return Some(text(
            StatusCode::NOT_FOUND,
            "the emulator has env.local, requests, faults, consents, openapi.json",
        ));
    }
    Some(match (method, path) {
        ("GET", ["openapi.json"]) => Response::new(StatusCode::OK, "application/json", openapi::DOCUMENT),
        ("GET", ["env.local"]) => requested_env_file(shared, request),
        ("GET", ["requests"]) => {
            let received = shared.received.borrow();
            Response::ok(&json!({"requests": received.iter().map(redacted).collect::<Vec<_>>()}))
        }
        ("POST", ["faults"]) => match request.json::<FaultScript>() {
            Ok(script) => match shared.apply_script(&script) {
                Ok(()) => Response::no_content(),
                Err(e) => text(StatusCode::BAD_REQUEST, &e.to_string()),
            },
            Err(refusal) => refusal.into(),
        },
        ("DELETE", ["faults"]) => {
            shared.clear_faults();
            Response::no_content()
        }
        ("GET", ["consents"]) => shared.store.read(|contents| Response::ok(&json!({ "consents": contents.pending }))),
        ("POST", ["consents"]) => {
            decide_consent(shared, request).map_or_else(Response::from, |status| Response::ok(&status))
        }
        _ => return None,
    })
}

fn text(status: StatusCode, line: &str) -> Response {
    Response::text(status, format!("{line}\n"))
}

/// `GET /_emulator/env.local?life=12h&age=8h&project=web&user=user_ada`: an env file as `vercel env pull` writes it. By
/// default the token is for the first project and member, has the team's usual lifetime, and is issued now.
fn requested_env_file(shared: &Shared, request: &Request) -> Response {
    let duration = |name| request.query(name).map(humantime::parse_duration).transpose();
    let issued_at = |age: Option<Duration>| shared.now().checked_sub(age.unwrap_or_default());
    let (Ok(life), Some(issued_at)) = (duration("life"), duration("age").ok().and_then(issued_at)) else {
        return text(StatusCode::BAD_REQUEST, "`life` and `age` are durations, as 4m or 12h");
    };
    let life = life.unwrap_or_else(|| shared.store.read(|contents| contents.world.team.oidc_token_life));
    let subject = shared.store.read(|contents| {
        let world = &contents.world;
        let project = match request.query("project") {
            None => world.projects.first(),
            Some(name) => Some(world.project(name)?),
        };
        let user = match request.query("user") {
            None => world.members.first(),
            Some(id) => Some(world.member(id)?),
        };
        Some(Subject::of(world, project, user.map(|user| user.id.as_str())))
    });
    match subject {
        Some(subject) => {
            let file = env_file(&shared.issuer.issue(&subject, issued_at, life));
            Response::text(StatusCode::OK, file)
        }
        None => text(StatusCode::NOT_FOUND, "no such project or user"),
    }
}

/// An env file with this token, in the CLI's format (docs/vercel.md section 6.1).
pub(super) fn env_file(token: &str) -> String {
    format!("# Created by Vercel CLI\nVERCEL_OIDC_TOKEN=\"{token}\"\n")
}

/// `POST /_emulator/consents`: decides a consent or an installation without a browser. `url` is the page's URL, as the
/// CLI prints it or the SDK returns it.
fn decide_consent(shared: &Shared, request: &Request) -> Result<Value, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct DecisionBody {
        url: String,
        #[serde(default)]
        deny: bool,
        user: Option<String>,
        tenant: Option<String>,
    }
    let body: DecisionBody = request.json()?;
    let after_host = body.url.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]));
    let page = Request::new(http::Method::GET, after_host.unwrap_or(&body.url), HeaderMap::new(), bytes::Bytes::new());
    let (decision, connector) = match page.route().1.as_slice() {
        ["api", "v1", "connect", name, connector] => (Decision::from_name(name), (*connector).to_owned()),
        _ => (None, String::new()),
    };
    let decision = decision.ok_or_else(|| Refusal::about(Kind::BadRequest, "`url` is not that of a consent"))?;
    let now = shared.now();
    shared.store.change(|contents| {
        let code = flows::open(contents, decision, &connector, page.query_pairs(), now)?.request_code.clone();
        let flow = match body.deny {
            true => flows::deny(contents, &code, now)?,
            false => flows::approve(contents, &code, body.user.as_deref(), body.tenant.as_deref(), now)?,
        };
        Ok(json!(flow.status))
    })
}

/// A recorded request as JSON, with each secret replaced by a fingerprint.
fn redacted(received: &ReceivedRequest) -> Value {
    let headers = received.headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes());
        let is_secret = name.as_str().ends_with("authorization") || name == "cookie" || is_secret(name.as_str());
        json!([name.as_str(), if is_secret { fingerprint(&value) } else { value.into_owned() }])
    });
    let mut body = serde_json::from_slice(&received.body).unwrap_or(Value::Null);
    redact(&mut body);
    json!({
        "method": received.method.as_str(),
        "target": received.target,
        "headers": headers.collect::<Vec<_>>(),
        "body": body,
        "answered": received.answered.map(|status| status.as_u16()),
    })
}

/// Whether a header or JSON key of this name holds a secret.
fn is_secret(name: &str) -> bool {
    ["token", "secret", "key", "password"].iter().any(|end| name.ends_with(end))
}

/// Replaces all secrets in a JSON value by fingerprints.
fn redact(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if is_secret(&key.to_lowercase()) => *text = fingerprint(text),
                    value => redact(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

fn fingerprint(secret: &str) -> String {
    let secret = secret.strip_prefix("Bearer ").unwrap_or(secret);
    let hash = digest(&SHA256, secret.as_bytes());
    let hex: String = hash.as_ref()[..4].iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderValue, Method};

    use super::*;

    #[test]
    fn a_recorded_request_is_shown_without_its_secrets() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static("Bearer secret-bearer"));
        headers.insert("accept", HeaderValue::from_static("*/*"));
        let received = ReceivedRequest {
            number: 0,
            method: Method::POST,
            target: "/x".into(),
            headers,
            body: Bytes::from(
                r#"{"subject":{"type":"token","token":"secret-1"},"tokens":[{"accessToken":"secret-2"}]}"#,
            ),
            answered: Some(StatusCode::OK),
        };
        let shown = redacted(&received);
        assert!(!shown.to_string().contains("secret-"), "{shown}");
        assert_eq!(shown["headers"][1], json!(["accept", "*/*"]));
        assert_eq!(shown["headers"][0], json!(["authorization", fingerprint("secret-bearer")]));
        assert_eq!(shown["body"]["subject"]["type"], "token");
    }
}
