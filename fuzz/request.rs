//! The bytes of a connection, as they come from anybody on this machine, through hyper and the real server.
//!
//! There is no credential, so a request that passes every gate ends with `oidc_token_missing` and never goes upstream:
//! that is how it is known here as accepted. It is then judged again from what hyper read, by other means than those of
//! the gates.

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

/// A sidecar that nobody can connect to.
struct Scene {
    runtime: Runtime,
    server: Arc<Server>,
}

thread_local! {
    static SCENE: Scene = Scene::new();
}

impl Scene {
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
    SCENE.with(|scene| {
        let server = &*scene.server;
        let is_last = Cell::new(false);
        let service = service_fn(|request: Request<Incoming>| {
            let is_last = &is_last;
            async move {
                let (head, body) = request.into_parts();
                let answered = server.answer_alone(Request::from_parts(head.clone(), body), PORT).await;
                let (said, body) = answered.expect("there is room for one").into_parts();
                let body = body.collect().await.expect("a body").to_bytes();
                assert!(!is_last.get(), "a request is served after the connection was said to close: {head:?}");
                is_last.set(said.headers.contains_key(header::CONNECTION));
                judge(&head, &said, &body);
                Ok::<_, Infallible>(Response::from_parts(said, Full::new(body)))
            }
        });
        let (ours, mut theirs) = tokio::io::duplex(1024 * 1024);
        let connection = http1::Builder::new()
            .header_read_timeout(None)
            .max_header_size(16 * 1024)
            .writev(false)
            .serve_connection(TokioIo::new(ours), service);
        let replies = scene.runtime.block_on(async {
            theirs.write_all(bytes).await.expect("room for it");
            theirs.shutdown().await.expect("an open pipe");
            let mut replies = Vec::new();
            // It ends in an error where the request was one.
            let (_, read) = tokio::join!(connection, theirs.read_to_end(&mut replies));
            read.expect("an open pipe");
            replies
        });
        assert!(replies.is_empty() || replies.starts_with(b"HTTP/1."), "{}", replies.escape_ascii());
    });
}

fn judge(head: &Parts, said: &response::Parts, body: &[u8]) {
    for name in ["cache-control", "content-security-policy", "x-content-type-options", "x-frame-options"] {
        assert!(said.headers.contains_key(name), "{name} is missing: {said:?}");
    }
    let tells = |name: &str| matches!(name, "server" | "set-cookie" | "vary") || name.starts_with("access-control-");
    assert!(!said.headers.keys().any(|name| tells(name.as_str())), "{said:?}");

    let path = head.uri.path();
    if said.status.is_success() {
        let is_own = ["/healthz", "/metrics", "/_sidecar/", "/_sidecar/v1/status"].contains(&path);
        assert!(is_own && matches!(head.method, Method::GET | Method::HEAD), "{head:?}");
        assert_eq!(head.uri.query(), None, "{head:?}");
        return judge_gates(head);
    }
    let json: serde_json::Value = serde_json::from_slice(body).expect("an error of ours is JSON");
    let code = said.headers[SIDECAR_ERROR].to_str().expect("text");
    assert_eq!(
        (json["error"]["code"].as_str(), json["error"]["source"].as_str()),
        (Some(code), Some("connect-sidecar"))
    );
    let ours = ["oidc_token_missing", "loop_detected", "upgrade_not_supported"];
    assert!(said.status.as_u16() < 500 || ours.contains(&code), "{json}");
    if code == "oidc_token_missing" && path != "/readyz" {
        judge_gates(head);
        match path.strip_prefix("/_sidecar/v1/relay/") {
            Some(target) => judge_relayed(head, target),
            None => judge_route(head),
        }
    }
}

/// What no request may have that is answered with more than a refusal.
fn judge_gates(head: &Parts) {
    assert!(matches!(all(&head.headers, "host")[..], [host] if is_ours(host)), "{head:?}");
    for name in ["origin", "sec-fetch-site", "forwarded", "x-forwarded-for", "x-forwarded-host", "via", "x-real-ip"] {
        assert!(!head.headers.contains_key(name), "{head:?}");
    }
    assert!(all(&head.headers, "sec-fetch-mode").iter().all(|mode| *mode == b"cors"), "{head:?}");
    assert!(head.uri.scheme().is_none() && head.uri.authority().is_none(), "{head:?}");
    let encodings = all(&head.headers, "transfer-encoding");
    assert!(encodings.len() <= 1 && encodings.iter().all(|one| one.eq_ignore_ascii_case(b"chunked")), "{head:?}");
}

fn is_ours(host: &[u8]) -> bool {
    ["127.0.0.1:2774", "localhost:2774", "[::1]:2774"].iter().any(|ours| host.eq_ignore_ascii_case(ours.as_bytes()))
}

fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a [u8]> {
    headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect()
}

/// The token goes to a host that takes it, and only in the place of a placeholder.
fn judge_relayed(head: &Parts, target: &str) {
    let (host, path) = target.split_at(target.find('/').unwrap_or(target.len()));
    assert!(Hosts::default().bearer(host, path).is_some(), "{head:?}");
    assert!(matches!(all(&head.headers, "authorization")[..], [_]), "{head:?}");
    assert!(placeholder::is_bearer(&head.headers[header::AUTHORIZATION]), "{head:?}");
}

/// However often somebody decodes the path, it is one of the five routes, the same one and for the same connector.
fn judge_route(head: &Parts) {
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
        inner.unwrap_or_else(|| panic!("another route to who decodes it: {path:?}")).to_owned()
    };
    let once = decoded(path);
    let name = connector(&once);
    assert_eq!(decoded(&once), once, "it can be decoded twice: {path:?}");
    assert!(!connector(path).contains('/'), "more than one segment: {path:?}");
    let below = ["", ".", "..", "import", "tokens", "projects", "contacts", "trigger-destinations"];
    assert!(!name.split('/').any(|part| below.contains(&part)), "{path:?}");
    assert!(!name.contains(['\\', '?', '#']) && !name.contains(char::is_control), "{path:?}");
    if head.method == Method::POST {
        let types = all(&head.headers, "content-type");
        assert!(matches!(types[..], [one] if one.to_ascii_lowercase().trim_ascii().starts_with(b"application/json")));
    }
}

/// Percent-decoded once, as leniently as anybody might.
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
