//! The bytes of a connection from any program on this machine, handled by hyper and the real server.
//!
//! There is no credential, so an accepted request fails with `oidc_token_missing` and is never sent upstream. Accepted
//! requests are checked again, as hyper has parsed them and with an implementation that does not use the guard.

use std::cell::Cell;
use std::convert::Infallible;
use std::sync::Arc;

use connect_sidecar::config::Config;
use connect_sidecar::config::args::GlobalArgs;
use connect_sidecar::credential::placeholder;
use connect_sidecar::daemon::app::App;
use connect_sidecar::daemon::server::Server;
use connect_sidecar::os::clock::{Clock, Timestamp};
use connect_sidecar::proxy::hosts::Hosts;
use connect_sidecar::proxy::reply::SIDECAR_ERROR;
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, header, response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

const PORT: u16 = 2774;

/// A sidecar without connections.
struct Fixture {
    runtime: Runtime,
    server: Arc<Server>,
}

thread_local! {
    static FIXTURE: Fixture = Fixture::new();
}

impl Fixture {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let dir = tempfile::tempdir().expect("a directory");
        let args = GlobalArgs { project: Some(dir.path().into()), port: Some("0".into()), ..GlobalArgs::default() };
        let config = Config::load(&args, &|_| None, dir.path()).expect("a configuration");
        let clock = Clock::test(Timestamp::from_millis(1_900_000_000_000));
        let app = runtime.block_on(App::bind(config, clock)).expect("a sidecar");
        let server = app.server().clone();
        Self { runtime, server }
    }
}

pub(crate) fn check(bytes: &[u8]) {
    FIXTURE.with(|fixture| {
        let server = &*fixture.server;
        let is_last = Cell::new(false);
        let service = service_fn(|request: Request<Incoming>| {
            let is_last = &is_last;
            async move {
                let (head, body) = request.into_parts();
                let response = server.answer_alone(Request::from_parts(head.clone(), body), PORT).await;
                let (reply, body) = response.expect("not overloaded").into_parts();
                let body = body.collect().await.expect("a body").to_bytes();
                assert!(!is_last.get(), "a request is served after `Connection: close`: {head:?}");
                is_last.set(reply.headers.contains_key(header::CONNECTION));
                check_reply(&head, &reply, &body);
                Ok::<_, Infallible>(Response::from_parts(reply, Full::new(body)))
            }
        });
        let (ours, mut theirs) = tokio::io::duplex(1024 * 1024);
        let connection = http1::Builder::new()
            .header_read_timeout(None)
            .max_header_size(16 * 1024)
            .writev(false)
            .serve_connection(TokioIo::new(ours), service);
        let replies = fixture.runtime.block_on(async {
            theirs.write_all(bytes).await.expect("a large enough buffer");
            theirs.shutdown().await.expect("an open pipe");
            let mut replies = Vec::new();
            // The connection fails if the request is invalid.
            let (_, read) = tokio::join!(connection, theirs.read_to_end(&mut replies));
            read.expect("an open pipe");
            replies
        });
        assert!(replies.is_empty() || replies.starts_with(b"HTTP/1."), "{}", replies.escape_ascii());
    });
}

fn check_reply(head: &Parts, reply: &response::Parts, body: &[u8]) {
    for name in ["cache-control", "x-content-type-options", "cross-origin-resource-policy"] {
        assert!(reply.headers.contains_key(name), "{name} is missing: {reply:?}");
    }
    let is_forbidden =
        |name: &str| matches!(name, "server" | "set-cookie" | "vary") || name.starts_with("access-control-");
    assert!(!reply.headers.keys().any(|name| is_forbidden(name.as_str())), "{reply:?}");

    let path = head.uri.path();
    if reply.status.is_success() {
        let is_own = ["/healthz", "/metrics", "/_sidecar/", "/_sidecar/v1/status"].contains(&path);
        assert!(is_own && matches!(head.method, Method::GET | Method::HEAD), "{head:?}");
        assert_eq!(head.uri.query(), None, "{head:?}");
        return check_guard(head);
    }
    let json: serde_json::Value = serde_json::from_slice(body).expect("JSON");
    let code = reply.headers[SIDECAR_ERROR].to_str().expect("text");
    assert_eq!(
        (json["error"]["code"].as_str(), json["error"]["source"].as_str()),
        (Some(code), Some("connect-sidecar"))
    );
    let expected = ["oidc_token_missing", "loop_detected", "upgrade_not_supported"];
    assert!(reply.status.as_u16() < 500 || expected.contains(&code), "{json}");
    if code == "oidc_token_missing" && path != "/readyz" {
        check_guard(head);
        match path.strip_prefix("/_sidecar/v1/relay/") {
            Some(target) => check_relayed(head, target),
            None => check_route(head),
        }
    }
}

/// Checks a request that the guard must have accepted.
fn check_guard(head: &Parts) {
    assert!(matches!(all(&head.headers, "host")[..], [host] if is_loopback_host(host)), "{head:?}");
    for name in ["origin", "sec-fetch-site", "forwarded", "x-forwarded-for", "x-forwarded-host", "via", "x-real-ip"] {
        assert!(!head.headers.contains_key(name), "{head:?}");
    }
    assert!(all(&head.headers, "sec-fetch-mode").iter().all(|mode| *mode == b"cors"), "{head:?}");
    assert!(head.uri.scheme().is_none() && head.uri.authority().is_none(), "{head:?}");
    let encodings = all(&head.headers, "transfer-encoding");
    assert!(encodings.len() <= 1 && encodings.iter().all(|one| one.eq_ignore_ascii_case(b"chunked")), "{head:?}");
}

fn is_loopback_host(host: &[u8]) -> bool {
    ["127.0.0.1:2774", "localhost:2774", "[::1]:2774"].iter().any(|known| host.eq_ignore_ascii_case(known.as_bytes()))
}

fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a [u8]> {
    headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect()
}

/// Checks a relayed request: it is for a bearer host and has the placeholder.
fn check_relayed(head: &Parts, target: &str) {
    let (host, path) = target.split_at(target.find('/').unwrap_or(target.len()));
    assert!(Hosts::default().bearer(host, path).is_some(), "{head:?}");
    assert!(matches!(all(&head.headers, "authorization")[..], [_]), "{head:?}");
    assert!(placeholder::is_bearer(&head.headers[header::AUTHORIZATION]), "{head:?}");
}

/// Checks that a path is the same one of the five routes, for the same connector, however often it is decoded.
fn check_route(head: &Parts) {
    let path = head.uri.path();
    assert_eq!(head.uri.query(), None, "{head:?}");
    let kind = path.strip_prefix("/v1/connect/").and_then(|rest| rest.split('/').next()).expect("one of Connect's");
    let (method, suffix) = match kind {
        "token" | "authorize" | "install" => (Method::POST, ""),
        "connectors" if path.ends_with("/tokens") => (Method::DELETE, "/tokens"),
        "connectors" => (Method::GET, ""),
        _ => panic!("{head:?}"),
    };
    assert_eq!(head.method, method, "{head:?}");
    let prefix = format!("/v1/connect/{kind}/");
    let connector = |path: &str| {
        let inner = path.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(suffix));
        inner.unwrap_or_else(|| panic!("decodes to another route: {path:?}")).to_owned()
    };
    let once = decoded(path);
    let name = connector(&once);
    assert_eq!(decoded(&once), once, "it can be decoded twice: {path:?}");
    assert!(!connector(path).contains('/'), "more than one segment: {path:?}");
    let refused = ["", ".", "..", "import", "tokens", "projects", "contacts", "trigger-destinations"];
    assert!(!name.split('/').any(|part| refused.contains(&part)), "{path:?}");
    assert!(!name.contains(['\\', '?', '#']) && !name.contains(char::is_control), "{path:?}");
    if head.method == Method::POST {
        let types = all(&head.headers, "content-type");
        assert!(matches!(types[..], [one] if one.to_ascii_lowercase().trim_ascii().starts_with(b"application/json")));
    }
}

/// Percent-decoded once, as leniently as possible.
fn decoded(path: &str) -> String {
    let (mut decoded, mut rest) = (Vec::new(), path.as_bytes());
    while let [byte, after @ ..] = rest {
        let hex = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match hex {
            Some(hex) if *byte == b'%' => {
                decoded.push(hex);
                rest = &after[2..];
            }
            _ => {
                decoded.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8(decoded).expect("a connector is UTF-8")
}
