//! The bytes of upstream's response, which may come from a proxy in between, a captive portal or a compromised host:
//! what is passed on, and what is stored for how long.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use bytes::Bytes;
use connect_sidecar::credential::{Credential, Identity, TokenState};
use connect_sidecar::os::clock::{Clock, Timestamp};
use connect_sidecar::proxy::cache::{Cache, CacheRequest, FetchResult, Fetched, Found, Limits};
use connect_sidecar::proxy::remediation::{self, UpstreamError};
use connect_sidecar::proxy::reply::Answer;
use connect_sidecar::proxy::route::Action;
use connect_sidecar::proxy::{key, upstream};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio_util::task::TaskTracker;

const NOW_MS: u64 = 1_900_000_000_000;
const LIMITS: Limits =
    Limits { max_entries: NonZeroUsize::MIN, buffer: Duration::from_secs(30), max_age: Duration::from_secs(24 * 3600) };

thread_local! {
    static RUNTIME: Runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
}

type Response = (StatusCode, HeaderMap, Bytes);

pub(crate) fn check(bytes: &[u8]) {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let Some(response) = read(bytes).await else { return };
            check_error(&response);
            for action in [Action::Token, Action::Authorize, Action::Install, Action::Metadata, Action::Revoke] {
                if check_answer(action, &response) && action == Action::Token {
                    check_cache(&response).await;
                }
            }
        });
    });
}

/// Reads a response like `pool` and `upstream`.
async fn read(bytes: &[u8]) -> Option<Response> {
    let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(32 * 1024)
        .handshake::<_, Full<Bytes>>(TokioIo::new(ours))
        .await
        .expect("a connection");
    let request = Request::post("/v1/connect/token/x").header("host", "upstream").body(Full::default()).expect("one");
    let answering = async {
        let _ = theirs.read(&mut [0; 1024]).await;
        let _ = theirs.write_all(bytes).await;
        drop(theirs);
    };
    let reading = async {
        let (head, body) = sender.send_request(request).await.ok()?.into_parts();
        let body = Limited::new(body, 1024 * 1024).collect().await.ok()?.to_bytes();
        drop(sender);
        Some((head.status, head.headers, body))
    };
    let (_, _, response) = tokio::join!(connection, answering, reading);
    response
}

/// Whether the response is passed on. Checks it if so.
fn check_answer(action: Action, (status, headers, body): &Response) -> bool {
    if upstream::flaw(action, *status, body).is_some() {
        return false;
    }
    let text = std::str::from_utf8(body).expect("JSON is UTF-8");
    match serde_json::from_str::<&RawValue>(text) {
        Ok(json) => assert!(action != Action::Token || !status.is_success() || json.get().starts_with('{'), "{text}"),
        Err(e) => assert!(*status == StatusCode::NO_CONTENT && action == Action::Revoke, "{e}: {text}"),
    }
    let reply = Answer::new(*status, headers, body).reply();
    assert_eq!(reply.status(), *status);
    for (name, value) in reply.headers() {
        match name.as_str() {
            "content-type" => {
                let text = value.to_str().expect("text").to_ascii_lowercase();
                assert!(text.trim().starts_with("application/json") && !text.contains(','), "{text}");
            }
            "retry-after" | "x-vercel-id" | "x-request-id" => assert_eq!(headers.get(name), Some(value)),
            "cache-control" | "cross-origin-resource-policy" | "x-content-type-options" => {}
            _ => panic!("{name} must not be passed on"),
        }
    }
    true
}

/// Checks that a stored answer is a token and is served no longer than `Cache-Status` says.
async fn check_cache(response: &Response) {
    let clock = Clock::test(Timestamp::from_millis(NOW_MS));
    let credential = Arc::new(Credential::access_token("p".to_owned().into(), None));
    let principal = credential.principal().clone();
    let token_request = key::parse(&principal, "slack/acme", b"{}").expect("an object");
    let identity = watch::channel(Arc::new(Identity::first(TokenState::Loaded(credential)))).1;
    let cache = Cache::new(LIMITS, identity, clock.clone(), TaskTracker::new());
    let fetch = || {
        let request = CacheRequest { token_request, connector: "slack/acme".into(), forced: false, client: None };
        let (status, headers, body) = response.clone();
        cache.fetch(request, &principal, move || async move { Ok(Answer::new(status, &headers, &body)) })
    };
    let Fetched::Upstream(_, FetchResult { result, stored_for }) = fetch().await else {
        panic!("a hit in an empty cache")
    };
    let first = result.expect("an answer");
    match (stored_for, fetch().await) {
        (Some(ttl), Fetched::Found(Found::Hit { answer, .. })) => {
            let json: Value = serde_json::from_slice(&first.body).expect("a token");
            assert_eq!(first.status, 200);
            assert!(!json["token"].as_str().expect("a string").is_empty());
            let left_ms = json["expiresAt"].as_f64().expect("a number") - NOW_MS as f64;
            assert!(ttl <= LIMITS.max_age && ttl.as_millis() as f64 <= left_ms - 30_000.0, "{ttl:?} of {left_ms} ms");
            assert_eq!(answer.body, first.body);
            clock.advance(ttl);
            assert!(matches!(fetch().await, Fetched::Upstream(..)), "served for longer than announced");
        }
        (None, Fetched::Found(Found::RateLimited { left, .. })) => {
            assert_eq!(first.status, 429);
            assert!(left <= Duration::from_secs(60), "{left:?}");
        }
        (None, Fetched::Upstream(_, again)) => assert_eq!(again.stored_for, None),
        other => panic!("{other:?}"),
    }
}

/// Checks that the log shows only well-formed codes and the sidecar's own remedies.
fn check_error((status, _, body): &Response) {
    let error = UpstreamError::read(body);
    if let Some(code) = error.shown_code() {
        assert!(code.len() <= 64 && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{code}");
    }
    if let Some(remedy) = remediation::remedy(*status, &error, "slack/acme", "development") {
        assert!(remedy.hint.len() < 200 && !remedy.hint.contains(char::is_control), "{remedy}");
    }
}
