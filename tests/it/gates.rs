//! Who may ask, and how: the gates, the routes and the forms of a request, tried from outside on the real server.
//!
//! Whatever is refused gets its own code with its status, the safe headers of every reply, and nothing of it goes
//! upstream. The reasons are in trust-policy.md sections 4.2 to 4.6; the unit tests of `proxy::guard`, `proxy::route` and
//! `proxy::key` go through more spellings.

use std::os::unix::fs::PermissionsExt;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::http::{Reply, Request, raw};
use crate::support::{SLACK, Scene, Stage, soon};

const APP: &str = r#"{"subject":{"type":"app"}}"#;

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

/// Every reply that we build has these headers and none that would open it to web pages.
#[track_caller]
fn assert_safe(reply: &Reply) {
    for (name, value) in [
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("cross-origin-resource-policy", "same-origin"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"),
    ] {
        assert_eq!(reply.header(name), Some(value), "{name}: {reply:?}");
    }
    let opens =
        |name: &str| matches!(name, "server" | "set-cookie" | "location") || name.starts_with("access-control-");
    assert!(!reply.headers.iter().any(|(name, _)| opens(name)), "{reply:?}");
}

/// `reply` is this refusal of our own.
#[track_caller]
fn assert_refused(reply: &Reply, status: u16, code: &str, what: &str) {
    assert_eq!((reply.status, reply.code().as_str()), (status, code), "{what}: {}", reply.text());
    assert_eq!(reply.header("content-type"), Some("application/json"), "{what}");
    assert!(reply.json()["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{what}");
    assert_eq!(reply.header("allow").is_some(), status == 405, "{what}");
    assert_safe(reply);
}

/// Sends a request that is refused with this code before anything goes upstream.
async fn refused(stage: &Stage, request: Request, status: u16, code: &str) -> Reply {
    let before = stage.emulator.received().len();
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    assert_refused(&reply, status, code, &what);
    assert_eq!(stage.emulator.received().len(), before, "{what}");
    reply
}

async fn passes(request: Request) -> Reply {
    let what = String::from_utf8_lossy(&request.bytes()).into_owned();
    let reply = request.send().await;
    assert_eq!(reply.status, 200, "{what}: {}", reply.text());
    reply
}

/// Sends these bytes on one connection; `{P}` is the sidecar's port. All replies until it closes.
async fn exchange(stage: &Stage, bytes: &str) -> Vec<Reply> {
    Reply::parse_all(&raw(stage.addr, bytes.replace("{P}", &stage.addr.port().to_string()).as_bytes()).await)
}

/// The head of a token request as bytes, with these further header lines.
fn token_head(version: &str, lines: &str) -> String {
    format!("POST {SLACK} HTTP/{version}\r\nHost: 127.0.0.1:{{P}}\r\nContent-Type: application/json\r\n{lines}\r\n")
}

/// A whole token request as bytes.
fn token_request(version: &str, lines: &str) -> String {
    token_head(version, &format!("{lines}Content-Length: {}\r\n", APP.len())) + APP
}

fn codes(replies: &[Reply]) -> Vec<u16> {
    replies.iter().map(|reply| reply.status).collect()
}

#[tokio::test]
async fn only_the_address_it_listens_on_is_its_host() {
    let stage = Scene::new().start().await;
    let port = stage.addr.port();
    let with_host = |host: &str| stage.token(APP).header("host", &host.replace("{P}", &port.to_string()));
    for host in ["127.0.0.1:{P}", "localhost:{P}", "LOCALHOST:{P}", "[::1]:{P}"] {
        passes(with_host(host)).await;
    }
    let other_port = format!("127.0.0.1:{}", port.wrapping_add(1).max(1024));
    for host in [
        "evil.example:{P}",
        "localhost",
        "localhost:1",
        &other_port,
        "0.0.0.0:{P}",
        "[::]:{P}",
        "127.0.0.2:{P}",
        "a.localhost:{P}",
        "localhost6:{P}",
        "x.internal:{P}",
        "host.docker.internal:{P}",
        "127.0.0.1.nip.io:{P}",
        "localhost.evil.com:{P}",
        "api.vercel.com",
    ] {
        refused(&stage, with_host(host), 403, "host_not_allowed").await;
    }
    for host in ["", "localhost.:{P}", "user@localhost:{P}", "localhost:{P},localhost:{P}", "local%68ost:{P}"] {
        refused(&stage, with_host(host), 400, "bad_host").await;
    }
    for lines in ["", "Host: 127.0.0.1:{P}\r\nHost: 127.0.0.1:{P}\r\n", "Host: 127.0.0.1:{P}\r\nHost: evil.example\r\n"]
    {
        for version in ["1.1", "1.0"] {
            let request = format!("GET /healthz HTTP/{version}\r\n{lines}Connection: close\r\n\r\n");
            let replies = exchange(&stage, &request).await;
            assert_eq!(replies.len(), 1);
            assert_refused(&replies[0], 400, "bad_host", &request);
        }
    }
}

#[tokio::test]
async fn further_hosts_are_let_in_by_their_exact_name() {
    let stage = Scene::new().toml("allowed_hosts = [\"dev.test:4711\", \"any.test\"]").start().await;
    for host in ["dev.test:4711", "DEV.test:4711", "any.test", "any.test:1"] {
        passes(stage.token(APP).header("host", host)).await;
    }
    for host in ["dev.test", "dev.test:4712", "x.dev.test:4711", "any.test.evil.example"] {
        refused(&stage, stage.token(APP).header("host", host), 403, "host_not_allowed").await;
    }
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
        assert_safe(&stage.request(method, path).send().await);
    }
    for request in
        [stage.token(APP), stage.token(APP), stage.request("POST", "/v1/connect/token/slack%2Fnone").json("{}")]
    {
        assert_safe(&request.send().await);
    }
    let head = stage.request("HEAD", "/healthz").send().await;
    assert_eq!((head.status, head.text().as_str()), (200, ""));
    assert_safe(&head);
}

#[tokio::test]
async fn web_pages_are_refused_whatever_they_call_themselves() {
    let stage = Scene::new().start().await;
    let own = format!("http://127.0.0.1:{}", stage.addr.port());
    for origin in ["https://evil.example", "null", "", &own] {
        refused(&stage, stage.token(APP).header("origin", origin), 403, "browser_request_refused").await;
    }
    for site in ["cross-site", "same-site", "same-origin", "none"] {
        refused(&stage, stage.token(APP).header("sec-fetch-site", site), 403, "browser_request_refused").await;
    }
    for mode in ["navigate", "no-cors", "same-origin", "websocket"] {
        refused(&stage, stage.token(APP).header("sec-fetch-mode", mode), 403, "browser_request_refused").await;
    }
    let preflight = stage
        .request("OPTIONS", SLACK)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "content-type");
    refused(&stage, preflight.clone(), 403, "browser_request_refused").await;
    refused(&stage, preflight.header("origin", "https://evil.example"), 403, "browser_request_refused").await;
    // Without any sign of a page it is a method like others.
    let plain = refused(&stage, stage.request("OPTIONS", SLACK), 405, "method_not_allowed").await;
    assert_eq!(plain.header("allow"), Some("POST"));
    // A page whose name was bound to this address later: its own Host gives it away, with an Origin and without.
    let host = format!("evil.example:{}", stage.addr.port());
    let rebound = stage.token(APP).header("host", &host);
    refused(&stage, rebound.clone(), 403, "host_not_allowed").await;
    refused(&stage, rebound.header("origin", &format!("http://{host}")), 403, "host_not_allowed").await;
    // An image's source.
    refused(&stage, stage.request("GET", SLACK), 405, "method_not_allowed").await;
}

#[tokio::test]
async fn an_allowed_origin_asks_first_and_reads_the_reply() {
    const ORIGIN: &str = "https://app.example";
    let stage = Scene::new().toml(&format!("allowed_origins = [\"{ORIGIN}\"]")).start().await;
    let from = |request: Request| request.header("origin", ORIGIN).header("sec-fetch-site", "cross-site");
    let admits = |reply: &Reply| {
        assert_eq!(reply.header("access-control-allow-origin"), Some(ORIGIN), "{reply:?}");
        assert_eq!(reply.header("vary"), Some("Origin"));
        for name in ["credentials", "private-network", "local-network"] {
            assert_eq!(reply.header(&format!("access-control-allow-{name}")), None);
        }
    };
    let preflight = from(stage.request("OPTIONS", SLACK))
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "content-type")
        .send()
        .await;
    assert_eq!((preflight.status, preflight.text().as_str()), (204, ""));
    admits(&preflight);
    let headers = preflight.header("access-control-allow-headers").expect("headers");
    assert!(headers.contains("content-type") && !headers.contains('*'), "{headers}");

    admits(&passes(from(stage.token(APP))).await);
    let untyped = from(stage.request("POST", SLACK).body(APP)).send().await;
    assert_eq!((untyped.status, untyped.code().as_str()), (415, "json_required"));
    admits(&untyped);

    for origin in ["https://app.example:8443", "http://app.example", "https://app.example.evil.com", "null"] {
        refused(&stage, stage.token(APP).header("origin", origin), 403, "browser_request_refused").await;
    }
    refused(&stage, from(stage.token(APP)).header("host", "evil.example"), 403, "host_not_allowed").await;
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
async fn requests_that_another_proxy_passes_on_are_refused_unless_allowed_and_loops_always() {
    let (strict, lenient) = (Scene::new().start().await, Scene::new().toml("allow_forwarded = true").start().await);
    for (name, value) in [
        ("forwarded", "for=192.0.2.1"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-host", "app.example"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-port", "443"),
        ("x-real-ip", "192.0.2.1"),
        ("cf-connecting-ip", "192.0.2.1"),
        ("tailscale-user-login", "ada@example.com"),
        ("via", "1.1 proxy"),
    ] {
        refused(&strict, strict.token(APP).header(name, value), 403, "forwarded_request_refused").await;
        passes(lenient.token(APP).header(name, value)).await;
    }
    for (name, value) in [("cdn-loop", "connect-sidecar"), ("via", "1.1 proxy, 1.1 connect-sidecar")] {
        for stage in [&strict, &lenient] {
            refused(stage, stage.token(APP).header(name, value), 508, "loop_detected").await;
        }
    }
}

#[tokio::test]
async fn a_sidecar_whose_upstream_is_itself_says_so_instead_of_asking_for_ever() {
    let second = Scene::new().start().await;
    let first = Scene::new().env("CONNECT_SIDECAR_UPSTREAM", &format!("http://{}", second.addr)).start().await;
    let reply = first.token(APP).send().await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (508, Some("loop_detected")));
    assert!(second.emulator.received().is_empty());
}

#[tokio::test]
async fn with_a_key_required_only_health_is_open() {
    let stage = Scene::new().toml("require_key = true").start().await;
    let key = stage.key();
    for (method, path) in PATHS {
        let request = stage.request(method, path).json(APP);
        if matches!(path, "/healthz" | "/readyz") {
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
async fn no_path_can_be_read_as_another() {
    let stage = Scene::new().start().await;
    for path in [
        "/",
        "/v1/connect/token",
        "/v1/connect/token/",
        "/v1/connect/token/x/",
        "/v1/connect/token/x/import",
        "/v1/connect/token/slack%2Facme/import",
        "/v1/connect/token/../x",
        "/v1/connect/token/x/../y",
        "/V1/connect/token/x",
        "/v1/connect//token/x",
        "/v1%2Fconnect/token/x",
        "/v1/connect/tokens/x",
        "/v2/connect/token/x",
        "/v1/kms/issuers/x/sign/token",
        "/v1/projects/prj_web/token",
        "/healthz/",
        "/_sidecar/v1/status/",
        "/_sidecar/../v1/connect/token/x",
        "/_sidecar",
    ] {
        refused(&stage, stage.request("POST", path).json(APP), 404, "route_not_found").await;
    }
    for segment in [
        "..",
        "%2e%2e",
        ".",
        "a%2F..%2Fb",
        "%2Fa",
        "a%2F%2Fb",
        "a%2Fb%2Fc%2Fd",
        "a%252Fb",
        "%252e%252e",
        "a%5Cb",
        "a%00b",
        "a%0D%0Ab",
        "a%3Fb",
        "%FF",
        "%zz",
        "import",
        "slack%2Fimport",
    ] {
        let path = format!("/v1/connect/token/{segment}");
        refused(&stage, stage.request("POST", &path).json(APP), 400, "bad_connector").await;
    }
    for query in ["?", "?a=1", "?teamId=team_acme"] {
        refused(&stage, stage.request("POST", &format!("{SLACK}{query}")).json(APP), 400, "query_not_allowed").await;
        for path in ["/healthz", "/readyz", "/metrics", "/_sidecar/v1/status"] {
            refused(&stage, stage.request("GET", &format!("{path}{query}")), 400, "query_not_allowed").await;
        }
    }
    let slip = stage.request("POST", "/v1/connect/token/slack/acme-slack").json(APP);
    let reply = refused(&stage, slip, 404, "route_not_found").await;
    assert_eq!(reply.json()["error"]["hint"], SLACK, "it says how to write it");
}

#[tokio::test]
async fn a_target_that_is_no_plain_path_is_refused() {
    let stage = Scene::new().start().await;
    for (line, status, code) in [
        ("POST http://127.0.0.1:{P}/v1/connect/token/x", 400, "bad_target"),
        ("GET http://evil.example/", 400, "bad_target"),
        ("POST //evil.example/v1/connect/token/x", 400, "bad_target"),
        ("GET *", 400, "bad_target"),
        ("OPTIONS *", 400, "bad_target"),
        ("CONNECT api.vercel.com:443", 405, "method_not_allowed"),
        ("CONNECT 127.0.0.1:{P}", 405, "method_not_allowed"),
        ("TRACE /v1/connect/token/x", 405, "method_not_allowed"),
    ] {
        // What follows would be spoken through a tunnel.
        let bytes = format!(
            "{line} HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\nCookie: CANARY\r\nConnection: close\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\n\r\n"
        );
        let replies = exchange(&stage, &bytes).await;
        assert_eq!(replies.len(), 1, "{line}: {replies:?}");
        assert_refused(&replies[0], status, code, line);
        assert!(!replies[0].text().contains("CANARY"));
    }
    assert!(stage.emulator.received().is_empty());
}

#[tokio::test]
async fn no_connection_becomes_anything_but_plain_http() {
    let stage = Scene::new().start().await;
    for (method, path) in [("GET", "/"), ("GET", SLACK), ("GET", "/_sidecar/v1/status")] {
        for (upgrade, name, value) in [
            ("websocket", "sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("h2c", "http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
        ] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\nConnection: upgrade, close\r\nUpgrade: {upgrade}\r\n{name}: {value}\r\nsec-websocket-version: 13\r\n\r\n"
            );
            let replies = exchange(&stage, &request).await;
            assert!(codes(&replies).iter().all(|status| *status != 101) && replies.len() == 1, "{path}: {replies:?}");
            assert_safe(&replies[0]);
        }
    }
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let tls = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03CANARYCANARYCANARYCANARYCANARY\0\0\x02\x13\x01\x01\0";
    let noise: Vec<u8> = (0..2048_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for bytes in [&http2[..], tls, &noise, b"\r\n\r\n\0", b"GET\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n"] {
        let reply = raw(stage.addr, bytes).await;
        let text = String::from_utf8_lossy(&reply);
        assert!(reply.is_empty() || text.starts_with("HTTP/1.1 400 "), "{text}");
        assert!(!text.contains("CANARY"));
    }
    passes(stage.request("GET", "/healthz")).await;
    assert!(stage.emulator.received().is_empty());
}

#[tokio::test]
async fn a_request_with_two_readings_is_refused_and_ends_its_connection() {
    let stage = Scene::new().start().await;
    let smuggled = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{P}\r\nConnection: close\r\n\r\n";
    for lines in [
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, gzip\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Content-Length: 2\r\nContent-Length: 5\r\n",
        "Content-Length: 2, 2\r\n",
        "Content-Length: +2\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 5\r\nX-Folded: a\r\n b\r\n",
        "Content-Length: 5\r\nX-Nul: a\0b\r\n",
        "Content-Length: 5\r\nX-Cr: a\rb\r\n",
        "Content-Length: 5\r\nX Blank: a\r\n",
    ] {
        let replies = exchange(&stage, &(token_head("1.1", lines) + "0\r\n\r\n" + smuggled)).await;
        assert_eq!(codes(&replies), [400], "{lines:?}: {replies:?}");
        if replies[0].header("sidecar-error").is_some() {
            assert_refused(&replies[0], 400, "bad_framing", lines);
        }
    }
    assert!(stage.emulator.received().is_empty());
}

#[tokio::test]
async fn a_body_with_both_a_length_and_chunks_is_chunks_and_the_last_of_its_connection() {
    let stage = Scene::new().start().await;
    for lines in
        ["Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"]
    {
        let smuggled = "GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1:{P}\r\n\r\n";
        let bytes = token_head("1.1", lines) + "0\r\n\r\n" + smuggled;
        let replies = exchange(&stage, &bytes).await;
        assert_eq!(replies.len(), 1, "{replies:?}");
    }
    assert!(stage.emulator.received().iter().all(|request| request.target == SLACK && request.body.is_empty()));
}

#[tokio::test]
async fn chunks_reach_upstream_as_one_body_with_its_length() {
    let stage = Scene::new().start().await;
    let chunks = "b;name=value\r\n{\"subject\":\r\n5\r\n{\"typ\r\na\r\ne\":\"app\"}}\r\n0\r\nX-Trailer: 1\r\n\r\n";
    let bytes = token_head("1.1", "Transfer-Encoding: chunked\r\nConnection: close\r\n") + chunks;
    let replies = exchange(&stage, &bytes).await;
    assert_eq!(codes(&replies), [200], "{replies:?}");
    let received = &stage.emulator.received()[0];
    assert_eq!(received.body, APP);
    assert_eq!(received.headers["content-length"], APP.len().to_string());
    assert!(!received.headers.contains_key("transfer-encoding") && !received.headers.contains_key("x-trailer"));
}

#[tokio::test]
async fn a_body_needs_a_json_content_type_and_no_encoding() {
    let stage = Scene::new().start().await;
    for content_type in ["application/json", "APPLICATION/JSON; charset=utf-8", "application/json;charset=utf-8"] {
        passes(stage.token(APP).header("content-type", content_type)).await;
    }
    for content_type in [
        "text/plain",
        "text/plain; application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json, text/plain",
        "application/json+x",
        "",
    ] {
        let reply = refused(&stage, stage.token(APP).header("content-type", content_type), 415, "json_required").await;
        assert!(reply.text().contains("content-type: application/json"), "it says what to add");
    }
    for path in [SLACK, "/v1/connect/authorize/x", "/v1/connect/install/x"] {
        for request in
            [stage.request("POST", path), stage.request("POST", path).body(""), stage.request("POST", path).body("{}")]
        {
            refused(&stage, request, 415, "json_required").await;
        }
    }
    let revoke = stage.request("DELETE", "/v1/connect/connectors/x/tokens").body("{}");
    refused(&stage, revoke, 415, "json_required").await;
    let twice = token_request("1.1", "Content-Type: application/json\r\nConnection: close\r\n");
    assert_refused(&exchange(&stage, &twice).await[0], 415, "json_required", "two types");
    for encoding in ["gzip", "br", "deflate", "gzip, identity"] {
        let request = stage.token(APP).header("content-encoding", encoding);
        refused(&stage, request, 415, "encoding_not_supported").await;
    }
    passes(stage.token(APP).header("content-encoding", "identity")).await;
}

#[tokio::test]
async fn a_body_is_empty_or_one_json_object_with_one_reading() {
    let stage = Scene::new().start().await;
    let nested = |n: usize| format!("{}{}", r#"{"a":"#.repeat(n - 1) + "{}", "}".repeat(n - 1));
    for body in [
        &b"{"[..],
        b"[]",
        b"\"x\"",
        b"null",
        b"1",
        b" ",
        b"{\"a\":1}x",
        b"{\"a\":1}{}",
        b"\xEF\xBB\xBF{}",
        b"{\"a\":\"\xff\"}",
        b"{\"a\":\"\\ud800\"}",
        b"{a:1}",
        b"{'a':1}",
        b"{\"a\":1,}",
        b"{\"a\":NaN}",
        b"{\"a\":01}",
        b"{\"a\":\"\n\"}",
        b"{/**/}",
        b"{\"subject\":{\"type\":\"app\"},\"subject\":{\"type\":\"user\"}}",
        b"{\"subject\":{\"type\":\"app\",\"\\u0074ype\":\"user\"}}",
        b"{\"authorizationDetails\":[{\"type\":\"a\",\"type\":\"b\"}]}",
        nested(33).as_bytes(),
        nested(10_000).as_bytes(),
    ] {
        for (method, path) in [
            ("POST", SLACK),
            ("POST", "/v1/connect/authorize/x"),
            ("POST", "/v1/connect/install/x"),
            ("DELETE", "/v1/connect/connectors/x/tokens"),
        ] {
            let request = stage.request(method, path).header("content-type", "application/json").body(body);
            refused(&stage, request, 400, "bad_json").await;
        }
    }
    for body in ["", "{}", &nested(32), "\r\n{\t}\n", r#"{"a":1e30}"#] {
        passes(stage.token(body)).await;
    }
    assert_eq!(stage.emulator.received()[0].body, "");
}

#[tokio::test]
async fn a_body_over_its_limit_is_refused_before_it_is_read() {
    let stage = Scene::new().start().await;
    let body = |size: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(size - 8));
    passes(stage.token(&body(65_536))).await;
    refused(&stage, stage.token(&body(65_537)), 413, "body_too_large").await;
    // However much is on its way: the caller gets to read why.
    refused(&stage, stage.token(&body(250_000)), 413, "body_too_large").await;
    let announced = token_head("1.1", "Content-Length: 65537\r\n");
    assert_refused(&exchange(&stage, &announced).await[0], 413, "body_too_large", "announced");
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    let chunked = token_head("1.1", "Transfer-Encoding: chunked\r\n") + &chunk.repeat(17) + "0\r\n\r\n";
    assert_refused(&exchange(&stage, &chunked).await[0], 413, "body_too_large", "in chunks");
    assert_eq!(stage.emulator.received().len(), 1);
}

#[tokio::test]
async fn a_refused_caller_that_is_still_sending_is_heard_out() {
    let stage = Scene::new().start().await;
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    let head = token_head("1.1", "Content-Length: 200000\r\n").replace("{P}", &stage.addr.port().to_string());
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    soon("the reply", stream.read_to_end(&mut reply)).await.expect("read");
    assert_refused(&Reply::parse(&reply), 413, "body_too_large", "announced");
    // A socket that was closed answers the first of these with a reset, which fails the second.
    for _ in 0..2 {
        stream.write_all(&[b' '; 100_000]).await.expect("it still listens");
    }
}

#[tokio::test]
async fn a_head_over_its_limit_is_refused() {
    let stage = Scene::new().start().await;
    let many = (0..101).fold(stage.token(APP), |request, n| request.header(&format!("x-{n}"), "1"));
    assert_eq!(many.send().await.status, 431);
    assert_eq!(stage.token(APP).header("x-long", &"x".repeat(20 * 1024)).send().await.status, 431);
    let long = stage.request("GET", &format!("/{}", "x".repeat(20 * 1024))).send().await;
    assert!(matches!(long.status, 414 | 431), "{}", long.status);
    assert!(stage.emulator.received().is_empty());
    passes(stage.token(APP)).await;
}

#[tokio::test]
async fn a_caller_that_waits_is_told_to_go_on_only_if_its_head_is_good() {
    let stage = Scene::new().start().await;
    let port = stage.addr.port().to_string();
    let waiting = |lines: &str| {
        let request = token_request("1.1", &format!("Expect: 100-continue\r\nConnection: close\r\n{lines}"));
        request.replace("{P}", &port).replace(APP, "")
    };
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    stream.write_all(waiting("").as_bytes()).await.expect("written");
    let mut go_on = [0; 25];
    soon("the word to go on", stream.read_exact(&mut go_on)).await.expect("read");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(APP.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    soon("the reply", stream.read_to_end(&mut reply)).await.expect("read");
    assert_eq!(Reply::parse(&reply).status, 200);

    for (line, status, code) in [
        ("Origin: https://evil.example\r\n", 403, "browser_request_refused"),
        ("Via: 1.1 proxy\r\n", 403, "forwarded_request_refused"),
        ("Content-Encoding: gzip\r\n", 415, "encoding_not_supported"),
    ] {
        let replies = Reply::parse_all(&raw(stage.addr, waiting(line).as_bytes()).await);
        assert_eq!(replies.len(), 1, "no word to go on: {replies:?}");
        assert_refused(&replies[0], status, code, line);
    }
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_their_order() {
    let stage = Scene::new().start().await;
    let three = ["slack%2Facme-slack", "github%2Facme-github", "oauth%2Flinear"].map(|connector| {
        let close = if connector == "oauth%2Flinear" { "Connection: close\r\n" } else { "" };
        token_request("1.1", close).replace("slack%2Facme-slack", connector)
    });
    let replies = exchange(&stage, &three.concat()).await;
    let uids: Vec<_> = replies.iter().map(|reply| reply.json()["connector"]["uid"].clone()).collect();
    assert_eq!(uids, ["slack/acme-slack", "github/acme-github", "oauth/linear"]);
    assert_eq!(stage.emulator.received().len(), 3);

    // A refusal leaves the connection to the next request.
    let refusal = token_request("1.1", "Origin: null\r\n");
    let mended = token_request("1.1", "Connection: close\r\n");
    assert_eq!(codes(&exchange(&stage, &[refusal.as_str(), &mended].concat()).await), [403, 200]);
}

#[tokio::test]
async fn http_1_0_is_answered_and_kept_alive_if_asked_to() {
    let stage = Scene::new().start().await;
    let request = |lines: &str| token_request("1.0", lines);
    let closed = exchange(&stage, &[request(""), request("")].concat()).await;
    assert_eq!(codes(&closed), [200], "one request is all it takes");
    let kept = exchange(&stage, &[request("Connection: keep-alive\r\n"), request("")].concat()).await;
    assert_eq!(codes(&kept), [200, 200]);
    let bytes = raw(stage.addr, request("").replace("{P}", &stage.addr.port().to_string()).as_bytes()).await;
    assert!(bytes.starts_with(b"HTTP/1.0 200 OK\r\n"), "{}", String::from_utf8_lossy(&bytes));
    let chunked = request("Transfer-Encoding: chunked\r\n");
    assert_eq!(codes(&exchange(&stage, &chunked).await), [400]);
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
