//! Access rules that hold for every path, and the order of the checks, tested against the real server.
//!
//! Each refusal has its own status and code and the safe headers of every response, and sends nothing upstream.
//! Individual hosts, origins, paths and framings are tested in `policy`, and more spellings in the unit tests of
//! `proxy::guard`, `proxy::route` and `proxy::key`.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use connect_sidecar::instance::key::Key;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::support::http::{APP, Reply, Request, token_head};
use crate::support::tunnel::Run;
use crate::support::{SLACK, Scene, Stage, let_timers_pass, soon};

/// Paths of every kind: Connect's, the sidecar's own, and an unknown one.
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

/// Sends a request that must be refused with this code, without sending anything upstream.
async fn assert_refused(stage: &Stage, request: Request, status: u16, code: &str) -> Reply {
    let before = stage.emulator.received().len();
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    reply.assert_refused(status, code, &what);
    assert_eq!(stage.emulator.received().len(), before, "{what}");
    reply
}

async fn assert_ok(request: Request) -> Reply {
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    assert_eq!(reply.status, 200, "{what}: {}", reply.text());
    reply
}

#[tokio::test]
async fn the_checks_apply_to_every_path() {
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
            assert_refused(&stage, stage.request(method, path).header(name, value), status, code).await;
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
async fn the_status_page_may_read_the_status_with_the_key_but_not_tokens() {
    let stage = Scene::new().start().await;
    let from_our_page = |method, path| stage.request(method, path).header("sec-fetch-site", "same-origin");
    let status = from_our_page("GET", "/_sidecar/v1/status");
    assert_refused(&stage, status.clone(), 401, "key_required").await;
    assert_refused(&stage, status.clone().header("sidecar-key", "guessed"), 401, "key_required").await;
    assert_ok(status.header("sidecar-key", &stage.key())).await;
    let token = from_our_page("POST", SLACK).json(APP).header("sidecar-key", &stage.key());
    assert_refused(&stage, token, 403, "browser_request_refused").await;
}

#[tokio::test]
async fn a_required_key_is_needed_except_for_health_and_the_page() {
    let stage = Scene::new().toml("require_key = true").start().await;
    let key = stage.key();
    for (method, path) in PATHS {
        let request = stage.request(method, path).json(APP);
        if matches!(path, "/healthz" | "/readyz" | "/_sidecar/") {
            assert_ok(request).await;
            continue;
        }
        let wrong = [
            String::new(),
            "guessed".into(),
            key[1..].into(),
            format!("{key}0"),
            format!("{key}\r\nsidecar-key: {key}"),
            format!("{key}\r\nsidecar-key: x"),
            format!("{key}, {key}"),
        ];
        let wrong = wrong.iter().map(|key| request.clone().header("sidecar-key", key));
        for request in wrong.chain([request.clone()]) {
            assert_refused(&stage, request, 401, "key_required").await;
        }
        let reply = request.header("sidecar-key", &key).send().await;
        assert_ne!(reply.status, 401, "{method} {path}");
    }
    assert!(!stage.logs.lines().iter().any(|line| line.contains(&key)));
    let received = stage.emulator.received();
    assert!(!received.is_empty() && !format!("{received:?}").contains(&key), "the key is not sent upstream");
    let file = stage.dir().join(format!("state/connect-sidecar/{}.json", stage.addr.port()));
    let mode = std::fs::metadata(file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "the key is private to our user");
}

#[tokio::test]
async fn each_path_accepts_only_its_methods() {
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
                let reply =
                    assert_refused(&stage, stage.request(method, path).json("{}"), 405, "method_not_allowed").await;
                assert_eq!(reply.header("allow"), Some(allowed), "{method} {path}");
            }
        }
    }
    assert_eq!(stage.request("HEAD", SLACK).send().await.status, 405);
    assert_ok(stage.token(APP).header("x-http-method-override", "DELETE")).await;
    assert!(!stage.emulator.received()[0].headers.contains_key("x-http-method-override"));
}

#[tokio::test]
async fn the_rest_of_a_refused_body_is_read() {
    let stage = Scene::new().start().await;
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    let head = token_head("1.1", "Content-Length: 200000\r\n").replace("{P}", &stage.addr.port().to_string());
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    soon("the reply", stream.read_to_end(&mut reply)).await.expect("read");
    Reply::parse(&reply).assert_refused(413, "body_too_large", "announced");
    // If the socket were closed, the first write would cause a reset and the second would fail.
    for _ in 0..2 {
        stream.write_all(&[b' '; 100_000]).await.expect("the socket is still open");
    }
}

/// Sends `bytes`, closes the sending side while upstream is slow, and returns the responses.
async fn half_closed<S: AsyncRead + AsyncWrite + Unpin>(stage: &Stage, mut stream: S, bytes: &[u8]) -> Vec<Reply> {
    let hold = stage.emulator.hold_answers();
    let before = stage.emulator.received().len();
    stream.write_all(bytes).await.expect("written");
    stream.shutdown().await.expect("half closed");
    soon("the request upstream", stage.emulator.wait_for_requests(before + 1)).await;
    // Long enough for the server to check whether the client is still there.
    for _ in 0..3 {
        let_timers_pass(Duration::from_secs(1)).await;
        stage.caught_up().await;
    }
    hold.release();
    let mut replies = Vec::new();
    soon("the replies", stream.read_to_end(&mut replies)).await.expect("read");
    Reply::parse_all(&replies)
}

#[tokio::test]
async fn a_half_closed_client_gets_its_responses() {
    let state = tempfile::tempdir().expect("a directory");
    let socket = state.path().join("run/s");
    let stage = Scene::new().toml(&format!("unix_socket = \"{}\"", socket.display())).start().await;
    let port = stage.addr.port().to_string();
    let body = |scope: &str| format!(r#"{{"scopes":["{scope}"]}}"#);
    let with_body = |version: &str, scope: &str| {
        let body = body(scope);
        let head = token_head(version, &format!("Content-Length: {}\r\n", body.len())).replace("{P}", &port);
        format!("{head}{body}")
    };
    let get = format!("GET /v1/connect/connectors/slack%2Facme-slack HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n");
    for (what, bytes, count) in [
        ("HTTP/1.0", with_body("1.0", "a"), 1),
        ("HTTP/1.1", with_body("1.1", "b"), 1),
        ("no body", get, 1),
        ("two at once", with_body("1.1", "c") + &with_body("1.1", "d"), 2),
    ] {
        let stream = TcpStream::connect(stage.addr).await.expect("a connection");
        let replies = half_closed(&stage, stream, bytes.as_bytes()).await;
        assert_eq!(replies.iter().map(|reply| reply.status).collect::<Vec<_>>(), vec![200; count], "{what}");
    }
    let stream = UnixStream::connect(&socket).await.expect("a connection");
    let bytes = with_body("1.1", "e").replace(&format!("127.0.0.1:{port}"), "localhost");
    assert_eq!(half_closed(&stage, stream, bytes.as_bytes()).await.len(), 1, "the unix socket");

    let opened = Run::of(&stage).await.open("api.vercel.com").await;
    let bytes = opened.request("POST", SLACK).json(&body("f")).kept_alive();
    assert_eq!(half_closed(&stage, opened.stream, &bytes).await.len(), 1, "an intercepted tunnel");
}

/// The number of connections, apart from the one that reads the metrics.
async fn connections(stage: &Stage) -> usize {
    let metrics = stage.request("GET", "/metrics").send().await.text();
    let line = metrics.lines().find_map(|line| line.strip_prefix("connect_sidecar_connections "));
    line.and_then(|count| count.parse::<usize>().ok()).expect("a number") - 1
}

#[tokio::test]
async fn a_half_closed_client_that_leaves_is_disconnected_and_its_token_cached() {
    let state = tempfile::tempdir().expect("a directory");
    let socket = state.path().join("run/s");
    let stage = Scene::new().toml(&format!("unix_socket = \"{}\"", socket.display())).start().await;
    let run = Run::of(&stage).await;
    for (number, way) in ["tcp", "reset", "unix", "tunnel"].into_iter().enumerate() {
        let hold = stage.emulator.hold_answers();
        let body = format!(r#"{{"scopes":["{way}"]}}"#);
        let request = stage.token(&body);
        let begun = soon("the request upstream", stage.emulator.wait_for_requests(number + 1));
        // The hold stays in place while the client half-closes, is found to be there, and leaves.
        match way {
            "unix" => {
                let mut stream = UnixStream::connect(&socket).await.expect("a connection");
                stream.write_all(&request.header("host", "localhost").kept_alive()).await.expect("written");
                half_close_and_drop(&stage, stream, begun).await;
            }
            "tunnel" => {
                let mut opened = run.open("api.vercel.com").await;
                let bytes = opened.request("POST", SLACK).json(&body).kept_alive();
                opened.stream.write_all(&bytes).await.expect("written");
                half_close_and_drop(&stage, opened.stream, begun).await;
            }
            _ => {
                let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
                stream.write_all(&request.kept_alive()).await.expect("written");
                if way == "reset" {
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
                }
                half_close_and_drop(&stage, stream, begun).await;
            }
        }
        hold.release();
        assert_eq!(assert_ok(stage.token(&body)).await.json()["connector"]["uid"], "slack/acme-slack", "{way}");
        assert_eq!(stage.emulator.received().len(), number + 1, "{way}: the token it requested is cached");
    }
}

/// Half-closes a client whose request is being answered, checks that it stays connected, and drops it.
async fn half_close_and_drop<S: AsyncRead + AsyncWrite + Unpin>(
    stage: &Stage,
    mut stream: S,
    begun: impl Future<Output = ()>,
) {
    begun.await;
    stream.shutdown().await.expect("half closed");
    let check = async || {
        let_timers_pass(Duration::from_secs(1)).await;
        stage.caught_up().await;
    };
    check().await;
    check().await;
    assert_eq!(connections(stage).await, 1, "it may still receive its response");
    drop(stream);
    let disconnected = async {
        while connections(stage).await > 0 {
            check().await;
        }
    };
    soon("the disconnect", disconnected).await;
}

#[tokio::test]
async fn the_first_failing_check_determines_the_error() {
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
    let correct_key = ("sidecar-key", key.as_str());
    let untyped = [wrong[4], correct_key];
    let json = [("content-type", "application/json"), correct_key];
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
        assert_refused(&stage, request, status, code).await;
    }
}

#[tokio::test]
async fn an_instance_proves_that_it_has_the_key_without_revealing_it() {
    let stage = Scene::new().env("CONNECT_SIDECAR_REQUIRE_KEY", "1").start().await;
    let (key, port) = (stage.key(), stage.addr.port());
    let nonce = "0123456789abcdef";
    let ask = |path: &str, nonce: &str| stage.request("GET", path).header("sidecar-nonce", nonce);
    let reply = ask("/healthz", nonce).send().await;
    let proof = reply.header("sidecar-proof").expect("a proof");
    assert!(Key::new(key.clone()).verify_proof(port, nonce.as_bytes(), proof.as_bytes()), "{reply:?}");
    assert!(!format!("{reply:?}").contains(&key));
    for (path, nonce) in [("/healthz", "short"), ("/healthz", &*nonce.repeat(5)), ("/readyz", nonce)] {
        assert_eq!(ask(path, nonce).send().await.header("sidecar-proof"), None, "{path} {nonce}");
    }
}
