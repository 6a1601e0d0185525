//! Groups O and C: web pages and forwarded requests are refused.

use crate::clients::{Client, curl};
use crate::support::SLACK;
use crate::support::http::{APP, Reply, Request, exchange, token_request};

use super::contract::{Sidecar, Start, start};

const FORWARDED: [(&str, &str); 9] = [
    ("x-forwarded-for", "1.2.3.4"),
    ("forwarded", "for=x"),
    ("x-forwarded-host", "y"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-port", "443"),
    ("x-real-ip", "z"),
    ("cf-connecting-ip", "192.0.2.1"),
    ("tailscale-user-login", "ada@example.com"),
    ("via", "1.1 p"),
];

fn preflight(s: &Sidecar) -> Request {
    Request::new(s.addr, "OPTIONS", SLACK)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "content-type")
}

async fn refuses_pages(s: &Sidecar, name: &str, values: &[&str]) {
    for value in values {
        s.deny(s.req().header(name, &s.fill(value)), 403, "browser_request_refused").await;
    }
}

#[tokio::test]
async fn tO01_refuses_a_web_page_of_another_origin() {
    let s = start().await;
    refuses_pages(&s, "origin", &["https://evil.example", ""]).await;
}

#[tokio::test]
async fn tO02_refuses_an_opaque_origin() {
    refuses_pages(&start().await, "origin", &["null"]).await;
}

#[tokio::test]
async fn tO03_refuses_a_web_page_that_claims_the_sidecars_own_origin() {
    refuses_pages(&start().await, "origin", &["http://127.0.0.1:{P}"]).await;
}

#[tokio::test]
async fn tO05_refuses_any_sec_fetch_site() {
    let s = start().await;
    refuses_pages(&s, "sec-fetch-site", &["cross-site", "same-site", "same-origin", "none"]).await;
    refuses_pages(&s, "sec-fetch-mode", &["navigate", "no-cors", "same-origin", "websocket"]).await;
}

#[tokio::test]
async fn tO06_accepts_the_headers_of_nodes_fetch() {
    let s = start().await;
    s.pass(s.req().header("sec-fetch-mode", "cors").header("accept-language", "*")).await;
}

#[tokio::test]
async fn tO08_curl_node_and_python_get_a_token() {
    let s = start().await;
    for client in Client::ALL {
        let answered = client.post(&format!("http://{}{SLACK}", s.addr), APP).await;
        assert_eq!(answered.status, 200, "{client:?}: {answered:?}");
    }
}

#[tokio::test]
async fn tO09_refuses_a_preflight_without_cors_headers() {
    let s = start().await;
    for request in [preflight(&s), preflight(&s).header("origin", "https://evil.example")] {
        s.deny(request, 403, "browser_request_refused").await;
    }
}

#[tokio::test]
async fn tO10_options_without_browser_headers_is_an_ordinary_method() {
    let s = start().await;
    let reply = s.deny(Request::new(s.addr, "OPTIONS", SLACK), 405, "method_not_allowed").await;
    assert_eq!(reply.header("allow"), Some("POST"));
}

#[tokio::test]
async fn tO12_requires_exactly_one_json_content_type() {
    let s = start().await;
    for content_type in [
        "text/plain",
        "text/plain; application/json",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json, text/plain",
        "application/json+x",
        "",
    ] {
        s.deny(s.req().header("content-type", content_type), 415, "json_required").await;
    }
    let twice = token_request("1.1", "Content-Type: application/json\r\nConnection: close\r\n");
    exchange(s.addr, &twice).await[0].assert_refused(415, "json_required", "two types");
}

#[tokio::test]
async fn tO13_refuses_curls_form_type_with_a_hint() {
    let s = start().await;
    let refusal = curl(&["-d", "{}", &format!("http://{}{SLACK}", s.addr)]).await;
    let error = &refusal.json()["error"];
    assert_eq!((refusal.status, error["code"].as_str()), (415, Some("json_required")));
    assert!(error["message"].as_str().is_some_and(|m| m.contains("content-type: application/json")), "{error}");
    assert_eq!((error["hint"].as_str(), s.m.count()), (Some("-H 'content-type: application/json'"), 0));
}

#[tokio::test]
async fn tO14_requires_a_content_type_on_every_post_and_on_a_delete_with_a_body() {
    let s = start().await;
    for path in [SLACK, "/v1/connect/authorize/x", "/v1/connect/install/x"] {
        let post = Request::new(s.addr, "POST", path);
        for request in [post.clone(), post.clone().body(""), post.body(APP)] {
            s.deny(request, 415, "json_required").await;
        }
    }
    let revoke = Request::new(s.addr, "DELETE", "/v1/connect/connectors/x/tokens").body("{}");
    s.deny(revoke, 415, "json_required").await;
    let refusal = curl(&["-X", "POST", &format!("http://{}{SLACK}", s.addr)]).await;
    assert_eq!((refusal.status, s.m.count()), (415, 0));
}

#[tokio::test]
async fn tO16_accepts_a_content_type_in_any_case_and_with_parameters() {
    let s = start().await;
    for content_type in ["APPLICATION/JSON; charset=utf-8", "application/json;charset=utf-8"] {
        s.pass(s.req().header("content-type", content_type)).await;
    }
}

#[tokio::test]
async fn tO17_an_allowed_origin_passes_the_preflight_and_reads_the_reply() {
    const ORIGIN: &str = "https://app.example";
    let s = Start::new().await.args(&["--allowed-origin", ORIGIN]).serve().await;
    let from = |request: Request| request.header("origin", ORIGIN).header("sec-fetch-site", "cross-site");
    let admits = |reply: &Reply| {
        assert_eq!(reply.header("access-control-allow-origin"), Some(ORIGIN), "{reply:?}");
        assert_eq!(reply.header("vary"), Some("Origin"));
        for name in ["credentials", "private-network", "local-network"] {
            assert_eq!(reply.header(&format!("access-control-allow-{name}")), None);
        }
    };
    let asked = from(preflight(&s)).send().await;
    assert_eq!((asked.status, asked.text().as_str()), (204, ""));
    admits(&asked);
    let headers = asked.header("access-control-allow-headers").expect("headers");
    assert!(headers.contains("content-type") && !headers.contains('*'), "{headers}");
    admits(&s.pass(from(s.req())).await);
    let untyped = from(s.req()).without("content-type").send().await;
    assert_eq!((untyped.status, untyped.code().as_str()), (415, "json_required"));
    admits(&untyped);
    for path in ["/_sidecar/v1/status", "/_sidecar/v1/events", "/metrics"] {
        s.deny(from(s.get(path)), 401, "key_required").await;
        let asked = from(s.get(path)).header("sidecar-key", &s.key()).begin().await.until("\r\n").await;
        assert!(asked.starts_with("HTTP/1.1 200 "), "{path}: {asked}");
    }
    for page in ["https://app.example:8443", "http://app.example", "https://app.example.evil.com", "null"] {
        s.deny(s.req().header("origin", page), 403, "browser_request_refused").await;
    }
    s.deny(from(s.req()).header("host", "evil.example"), 403, "host_not_allowed").await;
}

#[tokio::test]
async fn tO19_refuses_upgrades_to_websocket_and_http2() {
    let s = start().await;
    for path in ["/", SLACK, "/_sidecar/v1/status"] {
        for (upgrade, name, value) in [
            ("websocket", "sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("h2c", "http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
        ] {
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\nConnection: upgrade, close\r\nUpgrade: \
                 {upgrade}\r\n{name}: {value}\r\nsec-websocket-version: 13\r\n\r\n"
            );
            let replies = exchange(s.addr, &request).await;
            assert_eq!(replies.len(), 1, "{path}: {replies:?}");
            assert_ne!(replies[0].status, 101, "{path}");
            replies[0].assert_safe();
        }
    }
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tO20_refuses_forwarded_requests_unless_allowed() {
    let (strict, lenient) = (start().await, Start::new().await.args(&["--allow-forwarded"]).serve().await);
    for (name, value) in FORWARDED {
        strict.deny(strict.req().header(name, value), 403, "forwarded_request_refused").await;
        lenient.pass(lenient.req().header(name, value)).await;
    }
}

#[tokio::test]
async fn tO22_detects_a_loop_even_with_allow_forwarded() {
    for s in [start().await, Start::new().await.args(&["--allow-forwarded"]).serve().await] {
        for (name, value) in [("cdn-loop", "connect-sidecar"), ("via", "1.1 p, 1.1 connect-sidecar")] {
            s.deny(s.req().header(name, value), 508, "loop_detected").await;
        }
    }
}

#[tokio::test]
async fn tO23_refuses_a_rebound_name_by_its_host() {
    let s = start().await;
    let evil = s.fill("evil.example:{P}");
    let rebound = s.req().header("host", &evil).header("origin", &format!("http://{evil}"));
    s.deny(rebound, 403, "host_not_allowed").await;
    s.deny(s.get("/_sidecar/v1/status").header("host", &evil), 403, "host_not_allowed").await;
}

#[tokio::test]
async fn tO24_refuses_an_image_request() {
    let s = start().await;
    let reply = s.deny(s.get(SLACK), 405, "method_not_allowed").await;
    assert_eq!(reply.header("allow"), Some("POST"));
}
