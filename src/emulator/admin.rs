//! Routes that Connect does not have: the emulator's own, below `/_emulator/`. They need no credential: the
//! [gate](super::gate) keeps pages in a browser from them, which could get themselves a token.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::errors::{Kind, Refusal};
use super::exchange::{Asked, Given};
use super::fault::Script;
use super::flow::Decision;
use super::flows;
use super::oidc::Subject;
use super::{Received, Shared, openapi};

/// Answers a request for the emulator itself; `None` if it is for another.
pub(super) fn decide(shared: &Shared, asked: &Asked) -> Option<Given> {
    let (method, path) = asked.route();
    let ["_emulator", path @ ..] = path.as_slice() else { return None };
    if !openapi::has(asked) {
        return Some(text(
            StatusCode::NOT_FOUND,
            "the emulator has env.local, requests, faults, consents, openapi.json",
        ));
    }
    Some(match (method, path) {
        ("GET", ["openapi.json"]) => Given::of(StatusCode::OK, "application/json", openapi::DOCUMENT),
        ("GET", ["env.local"]) => env_file_as_asked(shared, asked),
        ("GET", ["requests"]) => {
            let received = shared.received.borrow();
            Given::ok(&json!({"requests": received.iter().map(shown).collect::<Vec<_>>()}))
        }
        ("POST", ["faults"]) => match asked.json::<Script>() {
            Ok(script) => match shared.script(&script) {
                Ok(()) => Given::no_content(),
                Err(wrong) => text(StatusCode::BAD_REQUEST, wrong),
            },
            Err(refusal) => refusal.into(),
        },
        ("DELETE", ["faults"]) => {
            shared.clear_faults();
            Given::no_content()
        }
        ("GET", ["consents"]) => shared.state.read(|kept| Given::ok(&json!({ "consents": kept.pending }))),
        ("POST", ["consents"]) => settle(shared, asked).map_or_else(Given::from, |status| Given::ok(&status)),
        _ => return None,
    })
}

fn text(status: StatusCode, text: impl Into<String>) -> Given {
    Given::of(status, "text/plain; charset=utf-8", text.into() + "\n")
}

/// `GET /_emulator/env.local?life=12h&age=8h&project=web&user=user_ada`: an env file with a token, as `vercel env pull` would
/// write it; of the first project and member, of the usual life and fresh, where nothing else is asked for.
fn env_file_as_asked(shared: &Shared, asked: &Asked) -> Given {
    let duration = |name| asked.query(name).map(humantime::parse_duration).transpose();
    let issued_at = |age: Option<Duration>| shared.now().checked_sub(age.unwrap_or_default());
    let (Ok(life), Some(issued_at)) = (duration("life"), duration("age").ok().and_then(issued_at)) else {
        return text(StatusCode::BAD_REQUEST, "`life` and `age` are durations, as 4m or 12h");
    };
    let life = life.unwrap_or_else(|| shared.state.read(|kept| kept.world.team.oidc_token_life));
    let subject = shared.state.read(|kept| {
        let world = &kept.world;
        let project = match asked.query("project") {
            None => world.projects.first(),
            Some(name) => Some(world.project(name)?),
        };
        let user = match asked.query("user") {
            None => world.members.first(),
            Some(id) => Some(world.member(id)?),
        };
        Some(Subject::of(world, project, user.map(|user| user.id.as_str())))
    });
    match subject {
        Some(subject) => {
            let file = env_file(&shared.issuer.issue(&subject, issued_at, life));
            Given::of(StatusCode::OK, "text/plain; charset=utf-8", file)
        }
        None => text(StatusCode::NOT_FOUND, "no such project or user"),
    }
}

/// An env file that holds `token`, in the CLI's form (docs/vercel.md section 6.1).
pub(super) fn env_file(token: &str) -> String {
    format!("# Created by Vercel CLI\nVERCEL_OIDC_TOKEN=\"{token}\"\n")
}

/// `POST /_emulator/consents`: decides a consent or an installation without a browser. `url` is the address that the CLI
/// printed or the SDK was given.
fn settle(shared: &Shared, asked: &Asked) -> Result<Value, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        url: String,
        #[serde(default)]
        deny: bool,
        user: Option<String>,
        tenant: Option<String>,
    }
    let body: Body = asked.json()?;
    let after_host = body.url.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]));
    let page = Asked::new(http::Method::GET, after_host.unwrap_or(&body.url), HeaderMap::new(), bytes::Bytes::new());
    let (decision, connector) = match page.route().1.as_slice() {
        ["api", "v1", "connect", name, connector] => (Decision::named(name), (*connector).to_owned()),
        _ => (None, String::new()),
    };
    let decision = decision.ok_or_else(|| Refusal::about(Kind::BadRequest, "`url` is not that of a consent"))?;
    let now = shared.now();
    shared.state.change(|kept| {
        let code = flows::open(kept, decision, &connector, page.query_pairs(), now)?.request_code.clone();
        let settled = match body.deny {
            true => flows::deny(kept, &code, now)?,
            false => flows::approve(kept, &code, body.user.as_deref(), body.tenant.as_deref(), now)?,
        };
        Ok(json!(settled.status))
    })
}

/// A request as it is shown: no secret of it, but what tells secrets apart.
fn shown(received: &Received) -> Value {
    let headers = received.headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes());
        let is_secret = name.as_str().ends_with("authorization") || name == "cookie" || is_secret(name.as_str());
        json!([name.as_str(), if is_secret { fingerprint(&value) } else { value.into_owned() }])
    });
    let mut body = serde_json::from_slice(&received.body).unwrap_or(Value::Null);
    hide(&mut body);
    json!({
        "method": received.method.as_str(),
        "target": received.target,
        "headers": headers.collect::<Vec<_>>(),
        "body": body,
        "answered": received.answered.map(|status| status.as_u16()),
    })
}

/// Whether what goes by this name is a secret.
fn is_secret(name: &str) -> bool {
    ["token", "secret", "key", "password"].iter().any(|end| name.ends_with(end))
}

/// Hides what is a secret by its key.
fn hide(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if is_secret(&key.to_lowercase()) => *text = fingerprint(text),
                    value => hide(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide),
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
    fn what_was_received_is_shown_without_its_secrets() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static("Bearer secret-bearer"));
        headers.insert("accept", HeaderValue::from_static("*/*"));
        let received = Received {
            number: 0,
            method: Method::POST,
            target: "/x".into(),
            headers,
            body: Bytes::from(
                r#"{"subject":{"type":"token","token":"secret-1"},"tokens":[{"accessToken":"secret-2"}]}"#,
            ),
            answered: Some(StatusCode::OK),
        };
        let shown = shown(&received);
        assert!(!shown.to_string().contains("secret-"), "{shown}");
        assert_eq!(shown["headers"][1], json!(["accept", "*/*"]));
        assert_eq!(shown["headers"][0], json!(["authorization", fingerprint("secret-bearer")]));
        assert_eq!(shown["body"]["subject"]["type"], "token");
    }
}
