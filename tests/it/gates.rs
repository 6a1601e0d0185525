//! Who may ask, and how: what holds for every path, and in which order it is checked, tried from outside on the real
//! server.
//!
//! Whatever is refused gets its own code with its status, the safe headers of every reply, and nothing of it goes
//! upstream. Hosts, origins, paths and framings one by one are in `policy`; the unit tests of `proxy::guard`,
//! `proxy::route` and `proxy::key` go through more spellings.

use std::os::unix::fs::PermissionsExt;

use connect_sidecar::instance_key::Key;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::http::{APP, Reply, Request, token_head, token_request};
use crate::support::{SLACK, Scene, Stage, soon};

/// Paths of every kind: Connect's, our own, and none.
const PATHS: [(&str, &str); 9] = [
    ("POST", SLACK),
    ("GET", "/v1/connect/connectors/slack%2Facme-slack"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/_sidecar/v1/status"),
    ("DELETE", "/_sidecar/v1/cache"),
    ("GET", "/_sidecar/"),
    ("GET", "/nowhere"),
];

/// Sends a request that is refused with this code before anything goes upstream.
async fn refused(stage: &Stage, request: Request, status: u16, code: &str) -> Reply {
    let before = stage.emulator.received().len();
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    reply.assert_refused(status, code, &what);
    assert_eq!(stage.emulator.received().len(), before, "{what}");
    reply
}

async fn passes(request: Request) -> Reply {
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    assert_eq!(reply.status, 200, "{what}: {}", reply.text());
    reply
}

#[tokio::test]
async fn the_gates_stand_before_every_path() {
    let stage = Scene::new().start().await;
    for (method, path) in PATHS {
        for (name, value, status, code) in [
            ("host", "evil.example", 403, "host_not_allowed"),
            ("origin", "https://evil.example", 403, "browser_request_refused"),
            ("sec-fetch-site", "cross-site", 403, "browser_request_refused"),
            ("sec-fetch-mode", "no-cors", 403, "browser_request_refused"),
            ("x-forwarded-for", "192.0.2.1", 403, "forwarded_request_refused"),
            ("cdn-loop", "connect-sidecar", 508, "loop_detected"),
            ("expect", "something", 417, "expectation_failed"),
        ] {
            refused(&stage, stage.request(method, path).header(name, value), status, code).await;
        }
    }
}

#[tokio::test]
async fn every_reply_has_the_safe_headers() {
    let stage = Scene::new().start().await;
    for (method, path) in PATHS {
        stage.request(method, path).send().await.assert_safe();
    }
    for request in
        [stage.token(APP), stage.token(APP), stage.request("POST", "/v1/connect/token/slack%2Fnone").json("{}")]
    {
        request.send().await.assert_safe();
    }
    let head = stage.request("HEAD", "/healthz").send().await;
    assert_eq!((head.status, head.text().as_str()), (200, ""));
    head.assert_safe();
}

#[tokio::test]
async fn our_own_page_reads_the_state_with_the_key_and_nothing_else() {
    let stage = Scene::new().start().await;
    let from_our_page = |method, path| stage.request(method, path).header("sec-fetch-site", "same-origin");
    let status = from_our_page("GET", "/_sidecar/v1/status");
    refused(&stage, status.clone(), 401, "key_required").await;
    refused(&stage, status.clone().header("sidecar-key", "guessed"), 401, "key_required").await;
    passes(status.header("sidecar-key", &stage.key())).await;
    let token = from_our_page("POST", SLACK).json(APP).header("sidecar-key", &stage.key());
    refused(&stage, token, 403, "browser_request_refused").await;
}

#[tokio::test]
async fn with_a_key_required_only_health_and_the_empty_page_are_open() {
    let stage = Scene::new().toml("require_key = true").start().await;
    let key = stage.key();
    for (method, path) in PATHS {
        let request = stage.request(method, path).json(APP);
        if matches!(path, "/healthz" | "/readyz" | "/_sidecar/") {
            passes(request).await;
            continue;
        }
        let wrong =
            ["", "guessed", &key[1..], &format!("{key}0")].map(|key| request.clone().header("sidecar-key", key));
        for request in wrong.into_iter().chain([request.clone()]) {
            refused(&stage, request, 401, "key_required").await;
        }
        let reply = request.header("sidecar-key", &key).send().await;
        assert_ne!(reply.status, 401, "{method} {path}");
    }
    assert!(!stage.logs.lines().iter().any(|line| line.contains(&key)));
    let received = stage.emulator.received();
    assert!(!received.is_empty() && !format!("{received:?}").contains(&key), "it goes no further");
    let file = stage.dir().join(format!("state/connect-sidecar/{}.json", stage.addr.port()));
    let mode = std::fs::metadata(file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "who has the key is us alone");
}

#[tokio::test]
async fn each_path_takes_its_methods_only() {
    let stage = Scene::new().start().await;
    for (path, allowed) in [
        (SLACK, "POST"),
        ("/v1/connect/authorize/x", "POST"),
        ("/v1/connect/install/x", "POST"),
        ("/v1/connect/connectors/x", "GET"),
        ("/v1/connect/connectors/x/tokens", "DELETE"),
        ("/healthz", "GET, HEAD"),
        ("/readyz", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
        ("/_sidecar/v1/status", "GET, HEAD"),
        ("/_sidecar/v1/cache", "DELETE"),
    ] {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "FOO"] {
            if !allowed.split(", ").any(|m| m == method) {
                let reply = refused(&stage, stage.request(method, path).json("{}"), 405, "method_not_allowed").await;
                assert_eq!(reply.header("allow"), Some(allowed), "{method} {path}");
            }
        }
    }
    assert_eq!(stage.request("HEAD", SLACK).send().await.status, 405);
    passes(stage.token(APP).header("x-http-method-override", "DELETE")).await;
    assert!(!stage.emulator.received()[0].headers.contains_key("x-http-method-override"));
}

#[tokio::test]
async fn a_refused_caller_that_is_still_sending_is_heard_out() {
    let stage = Scene::new().start().await;
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    let head = token_head("1.1", "Content-Length: 200000\r\n").replace("{P}", &stage.addr.port().to_string());
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    soon("the reply", stream.read_to_end(&mut reply)).await.expect("read");
    Reply::parse(&reply).assert_refused(413, "body_too_large", "announced");
    // A socket that was closed answers the first of these with a reset, which fails the second.
    for _ in 0..2 {
        stream.write_all(&[b' '; 100_000]).await.expect("it still listens");
    }
}

#[tokio::test]
async fn a_caller_that_closes_its_half_is_let_go_and_its_token_kept() {
    let stage = Scene::new().start().await;
    let gate = stage.emulator.gate();
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    let request = token_request("1.1", "").replace("{P}", &stage.addr.port().to_string());
    stream.write_all(request.as_bytes()).await.expect("written");
    soon("the request upstream", stage.emulator.wait_for_requests(1)).await;
    stream.shutdown().await.expect("half closed");
    let mut rest = Vec::new();
    soon("the connection's end", stream.read_to_end(&mut rest)).await.expect("closed");
    gate.open();
    let next = passes(stage.token(APP)).await;
    assert_eq!(next.json()["connector"]["uid"], "slack/acme-slack");
    assert_eq!(stage.emulator.received().len(), 1, "what the first had asked for");
}

#[tokio::test]
async fn the_first_check_that_fails_answers() {
    let scene = Scene::new().toml("require_key = true\nconnectors.allow = [\"slack/acme-slack\"]");
    let stage = scene.without_env_file().start().await;
    let key = stage.key();
    let wrong = [
        ("transfer-encoding", "gzip, chunked"),
        ("host", "evil.example"),
        ("origin", "null"),
        ("via", "1.1 proxy"),
        ("content-type", "text/plain"),
        ("sidecar-key", "wrong"),
    ];
    let mended = ("sidecar-key", key.as_str());
    let untyped = [wrong[4], mended];
    let json = [("content-type", "application/json"), mended];
    for (status, code, method, target, headers, body) in [
        (400, "bad_framing", "PUT", "//v1/connect/token/%25?q", &wrong[..], None),
        (403, "host_not_allowed", "PUT", "//v1/connect/token/%25?q", &wrong[1..], Some("[")),
        (400, "bad_target", "PUT", "//v1/connect/token/%25?q", &wrong[2..], Some("[")),
        (403, "browser_request_refused", "PUT", "/nowhere", &wrong[2..], Some("[")),
        (403, "forwarded_request_refused", "PUT", "/nowhere", &wrong[3..], Some("[")),
        (401, "key_required", "PUT", "/nowhere", &wrong[4..], Some("[")),
        (404, "route_not_found", "PUT", "/nowhere", &untyped, Some("[")),
        (405, "method_not_allowed", "PUT", "/v1/connect/token/%25?q", &untyped, Some("[")),
        (400, "bad_connector", "POST", "/v1/connect/token/%25?q", &untyped, Some("[")),
        (400, "query_not_allowed", "POST", "/v1/connect/token/other?q", &untyped, Some("[")),
        (403, "connector_not_allowed", "POST", "/v1/connect/token/other", &untyped, Some("[")),
        (415, "json_required", "POST", SLACK, &untyped, Some("[")),
        (400, "bad_json", "POST", SLACK, &json, Some("[")),
        (503, "oidc_token_missing", "POST", SLACK, &json, Some("{}")),
    ] {
        let request = stage.request(method, target);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(name, value));
        let request = match body {
            Some(body) => request.body(body),
            None => request,
        };
        refused(&stage, request, status, code).await;
    }
}

#[tokio::test]
async fn an_instance_proves_that_it_has_its_key_and_tells_nobody_what_it_is() {
    let stage = Scene::new().env("CONNECT_SIDECAR_REQUIRE_KEY", "1").start().await;
    let (key, port) = (stage.key(), stage.addr.port());
    let nonce = "0123456789abcdef";
    let ask = |path: &str, nonce: &str| stage.request("GET", path).header("sidecar-nonce", nonce);
    let reply = ask("/healthz", nonce).send().await;
    let proof = reply.header("sidecar-proof").expect("a proof");
    assert!(Key::new(key.clone()).is_proven_by(port, nonce.as_bytes(), proof.as_bytes()), "{reply:?}");
    assert!(!format!("{reply:?}").contains(&key));
    for (path, nonce) in [("/healthz", "short"), ("/healthz", &*nonce.repeat(5)), ("/readyz", nonce)] {
        assert_eq!(ask(path, nonce).send().await.header("sidecar-proof"), None, "{path} {nonce}");
    }
}
