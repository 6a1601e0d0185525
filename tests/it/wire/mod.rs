//! Replays captured requests of the real SDKs and the CLI: upstream gets their target and body byte for byte and
//! nothing else, and they get upstream's response byte for byte.
//!
//! `wire/captures.json` contains the headers of each client (`@vercel/connect` 2.3.2, `vercel-connect` 0.2.2, Vercel
//! CLI 64.0.2; `authorization` replaced), the requests with the expected status or error code, and the errors that the
//! SDKs were tested with. The harness sets `host`, `content-length` and `connection`.

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::world::{Connector, Installation};
use serde::Deserialize;

use crate::support::http::{Reply, Request};
use crate::support::{SLACK, Scene, Stage, let_upstream_recover};

#[derive(Deserialize)]
struct Captures {
    clients: std::collections::HashMap<String, Vec<(String, String)>>,
    requests: Vec<Captured>,
    error_shapes: Vec<String>,
    errors: Vec<(u16, String)>,
}

#[derive(Debug, Deserialize)]
struct Captured {
    client: String,
    method: String,
    path: String,
    body: Option<String>,
    answer: Due,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Due {
    Status(u16),
    Refusal(String),
}

impl Captures {
    fn read() -> Self {
        serde_json::from_str(include_str!("captures.json")).expect("the captures")
    }

    /// The request as its client sends it. Clients send a content type only with a body.
    fn replay(&self, stage: &Stage, captured: &Captured) -> Request {
        let headers = self.clients[&captured.client]
            .iter()
            .filter(|(name, _)| captured.body.is_some() || !name.eq_ignore_ascii_case("content-type"));
        let request = stage.request(&captured.method, &captured.path);
        let request = headers.fold(request, |request, (name, value)| request.header(name, value));
        match &captured.body {
            Some(body) => request.body(body.as_str()),
            None => request,
        }
    }
}

/// An upstream with all connectors and grants that the captures use.
fn scene() -> Scene {
    Scene::new().world(|world| {
        for uid in ["github/acme", "snowflake/dw"] {
            world.connectors.push(Connector::new(uid, &uid.replace('/', "_"), "prj_web"));
        }
        for connector in &mut world.connectors {
            connector.needs_installation = Some(false);
            connector.installations.push(Installation { id: "inst_abc".into(), tenant_id: "acme".into() });
            connector.granted_to.push("user_123".into());
        }
    })
}

async fn empty_the_cache(stage: &Stage) {
    let reply = stage.request("DELETE", "/_sidecar/v1/cache").header("sidecar-key", &stage.key()).send().await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[tokio::test]
async fn upstream_gets_only_target_and_body_of_the_captured_requests() {
    let (stage, captures) = (scene().start().await, Captures::read());
    let env_file = std::fs::read_to_string(stage.env_path()).expect("the env file");
    // Revocations come last, because they remove the grants.
    let (revocations, others): (Vec<_>, Vec<_>) = captures.requests.iter().partition(|c| c.method == "DELETE");
    for captured in others.into_iter().chain(revocations) {
        let before = stage.emulator.received().len();
        let reply = captures.replay(&stage, captured).send().await;
        let received = stage.emulator.received().split_off(before);
        let status = match &captured.answer {
            Due::Refusal(code) => {
                assert_eq!((&reply.code(), received.len()), (code, 0), "{captured:?}");
                continue;
            }
            Due::Status(status) => *status,
        };
        assert_eq!((reply.status, received.len()), (status, 1), "{captured:?}: {}", reply.text());
        let received = &received[0];
        assert_eq!(received.method, captured.method.as_str());
        assert_eq!(received.target, captured.path);
        assert_eq!(received.body, captured.body.as_deref().unwrap_or_default());

        let mut names: Vec<_> = received.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let of_the_body = if captured.body.is_some() { &["content-length", "content-type"][..] } else { &[] };
        let ours = ["accept", "accept-encoding", "authorization", "cdn-loop", "host", "user-agent", "via"];
        let mut due = [&ours[..], of_the_body].concat();
        due.sort_unstable();
        assert_eq!(names, due, "{captured:?}");
        let header = |name: &str| received.headers[name].to_str().expect("text");
        assert_eq!((header("accept"), header("accept-encoding")), ("application/json", "identity"));
        assert!(header("user-agent").starts_with("connect-sidecar/"));
        let bearer = header("authorization").strip_prefix("Bearer ").expect("a bearer");
        assert!(env_file.contains(&format!("\"{bearer}\"")), "the sidecar's own credential: {captured:?}");

        empty_the_cache(&stage).await;
    }
    assert_eq!(stage.logs.count("an app sends credentials of its own"), 1, "said once");
}

#[tokio::test]
async fn a_revocation_may_be_answered_with_no_content() {
    let (stage, captures) = (scene().start().await, Captures::read());
    for captured in captures.requests.iter().filter(|c| c.method == "DELETE" && matches!(c.answer, Due::Status(_))) {
        stage.emulator.inject(Fault::answer(204, "application/json", "").on("/tokens"));
        let reply = captures.replay(&stage, captured).send().await;
        assert_eq!((reply.status, reply.text().as_str()), (204, ""), "{captured:?}");
        assert_eq!(reply.header("content-type"), None);
    }
}

/// Sets upstream's next response.
fn answer(stage: &Stage, status: u16, content_type: &'static str, body: &str) {
    let headers = vec![("x-vercel-id", "iad1::abc".to_owned()), ("server", "Vercel".to_owned())];
    stage.emulator.inject(Fault::once(FaultKind::Answer { status, content_type, body: body.into(), headers }));
}

#[tokio::test]
async fn errors_that_the_sdks_distinguish_are_unchanged() {
    let (stage, captures) = (scene().start().await, Captures::read());
    for (n, (status, code)) in captures.errors.iter().enumerate() {
        let_upstream_recover().await;
        for (m, shape) in captures.error_shapes.iter().enumerate() {
            let body = shape.replace("CODE", code);
            answer(&stage, *status, "application/json; charset=utf-8", &body);
            // A 429 is repeated for its key, so each request has its own.
            let reply = stage.token(&format!(r#"{{"installationId":"{n}.{m}"}}"#)).send().await;
            assert_eq!((reply.status, reply.text()), (*status, body));
            assert_eq!(reply.header("x-vercel-id"), Some("iad1::abc"));
            assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"));
            assert_eq!((reply.header("sidecar-error"), reply.header("server")), (None, None));
        }
    }
    let tried = captures.errors.len() * captures.error_shapes.len();
    assert_eq!(stage.emulator.received().len(), tried, "one request each: none is tried again");
}

#[tokio::test]
async fn unusual_answers_pass_only_if_they_are_json() {
    let stage = scene().start().await;
    for (status, content_type, body, due) in [
        (302, "text/html", "", Err("upstream_redirect")),
        (502, "text/html", "<html>bad gateway</html>", Err("upstream_invalid_response")),
        (500, "application/json", "", Err("upstream_invalid_response")),
        (200, "application/json", "hi", Err("upstream_invalid_response")),
        (400, "application/json", "[1]", Ok(400)),
        (200, "application/json", "{}", Ok(200)),
    ] {
        answer(&stage, status, content_type, body);
        let reply = stage.token("{}").send().await;
        match due {
            Ok(status) => assert_eq!((reply.status, reply.text().as_str()), (status, body)),
            Err(code) => assert_eq!((reply.status, reply.code().as_str()), (502, code), "{status} {body}"),
        }
        assert_eq!(reply.header("x-vercel-id").is_some(), due.is_ok(), "an id names upstream's own answer");
    }
}

/// Sends both requests and returns the number of upstream requests.
async fn upstream_requests(first: impl FnOnce(&Stage) -> Request, second: impl FnOnce(&Stage) -> Request) -> usize {
    let stage = scene().start().await;
    for request in [first(&stage), second(&stage)] {
        let reply = request.send().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    stage.emulator.received().len()
}

#[tokio::test]
async fn equivalent_requests_of_different_sdks_share_an_entry() {
    const APP: &str = r#"{"subject":{"type":"app"},"scopes":["*"]}"#;
    let body = |body: &'static str| move |stage: &Stage| stage.token(body);
    for (first, second, requests) in [
        (APP, r#"{"scopes":["*"],"subject":{"type":"app"}}"#, 1),
        (r#"{"subject":{"type":"app"},"scopes":["a","b"]}"#, r#"{"subject":{"type":"app"},"scopes":["b","a","b"]}"#, 1),
        (APP, r#"{"subject":{"type":"app"},"scopes":["*"],"validityBufferMs":30000}"#, 1),
        // The SDKs for TypeScript and Python write a user's members in different orders.
        (
            r#"{"subject":{"type":"user","id":"user_123","issuer":"https://idp.example.com"}}"#,
            r#"{"subject":{"id":"user_123","issuer":"https://idp.example.com","type":"user"}}"#,
            1,
        ),
        // The TypeScript SDK adds `["*"]` and the Python SDK sends nothing, which may not be equivalent.
        (APP, r#"{"subject":{"type":"app"}}"#, 2),
        (APP, r#"{"subject":{"type":"app"},"scopes":[]}"#, 2),
        (APP, r#"{"subject":{"type":"app"},"scopes":["*"],"installationId":"*"}"#, 2),
    ] {
        assert_eq!(upstream_requests(body(first), body(second)).await, requests, "{first} {second}");
    }
    let lower_case = |stage: &Stage| stage.request("POST", &SLACK.replace("%2F", "%2f")).json(APP);
    assert_eq!(upstream_requests(body(APP), lower_case).await, 1);
    // A client's own credential is ignored: it neither has its own entry nor affects others.
    let bearer = |bearer: &'static str| move |stage: &Stage| stage.token(APP).header("authorization", bearer);
    assert_eq!(upstream_requests(bearer("Bearer one"), bearer("Bearer two")).await, 1);
}

#[tokio::test]
async fn ten_concurrent_calls_send_one_upstream_request() {
    let stage = scene().start().await;
    let hold = stage.emulator.hold_answers();
    let request = stage.token(r#"{"subject":{"type":"app"},"scopes":["*"]}"#);
    let calls = async {
        let replies = stage.at_once(10, request).await;
        let tokens: std::collections::BTreeSet<_> = replies.iter().map(Reply::text).collect();
        assert_eq!(tokens.len(), 1, "{tokens:?}");
    };
    let opening = async {
        stage.emulator.wait_for_requests(1).await;
        hold.release();
    };
    tokio::join!(calls, opening);
    assert_eq!(stage.emulator.received().len(), 1);
}
