//! 6.2: no web page, and nothing that another proxy or tunnel passes on.

use crate::clients::{Client, curl};
use crate::support::SLACK;
use crate::support::http::{APP, Reply, Request, exchange, token_request};

use super::contract::{Row, Sidecar, Start, row, start};

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

pub fn rows() -> Vec<Row> {
    vec![
        row("tO01", "a page of another origin is refused", async {
            let s = start().await;
            refuses_pages(&s, "origin", &["https://evil.example", ""]).await;
        }),
        row("tO02", "so is one whose origin is hidden", async {
            refuses_pages(&start().await, "origin", &["null"]).await;
        }),
        row("tO03", "so is one that claims our own origin", async {
            refuses_pages(&start().await, "origin", &["http://127.0.0.1:{P}"]).await;
        }),
        row("tO05", "so is whatever says where a fetch comes from", async {
            let s = start().await;
            refuses_pages(&s, "sec-fetch-site", &["cross-site", "same-site", "same-origin", "none"]).await;
            refuses_pages(&s, "sec-fetch-mode", &["navigate", "no-cors", "same-origin", "websocket"]).await;
        }),
        row("tO06", "what Node's own fetch sends is no sign of a page", async {
            let s = start().await;
            s.pass(s.req().header("sec-fetch-mode", "cors").header("accept-language", "*")).await;
        }),
        row("tO08", "curl, Node and Python get their token", async {
            let s = start().await;
            for client in Client::ALL {
                let answered = client.post(&format!("http://{}{SLACK}", s.addr), APP).await;
                assert_eq!(answered.status, 200, "{client:?}: {answered:?}");
            }
        }),
        row("tO09", "a preflight is refused and admits nobody", async {
            let s = start().await;
            for request in [preflight(&s), preflight(&s).header("origin", "https://evil.example")] {
                s.deny(request, 403, "browser_request_refused").await;
            }
        }),
        row("tO10", "without a sign of a page OPTIONS is a method like others", async {
            let s = start().await;
            let reply = s.deny(Request::new(s.addr, "OPTIONS", SLACK), 405, "method_not_allowed").await;
            assert_eq!(reply.header("allow"), Some("POST"));
        }),
        row("tO12", "JSON must be called JSON, and once", async {
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
        }),
        row("tO13", "curl's own form type is refused with what to add", async {
            let s = start().await;
            let refusal = curl(&["-d", "{}", &format!("http://{}{SLACK}", s.addr)]).await;
            let error = &refusal.json()["error"];
            assert_eq!((refusal.status, error["code"].as_str()), (415, Some("json_required")));
            assert!(error["message"].as_str().is_some_and(|m| m.contains("content-type: application/json")), "{error}");
            assert_eq!((error["hint"].as_str(), s.m.count()), (Some("-H 'content-type: application/json'"), 0));
        }),
        row("tO14", "the type is due without a body, too, on every POST, and on a DELETE with a body", async {
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
        }),
        row("tO16", "the type may be spelled in any case and have parameters", async {
            let s = start().await;
            for content_type in ["APPLICATION/JSON; charset=utf-8", "application/json;charset=utf-8"] {
                s.pass(s.req().header("content-type", content_type)).await;
            }
        }),
        row("tO17", "an allowed origin asks first and reads the reply; what looks like it does not", async {
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
        }),
        row("tO19", "no connection becomes a WebSocket or HTTP/2", async {
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
        }),
        row("tO20", "what another proxy passes on is refused unless that is allowed", async {
            let (strict, lenient) = (start().await, Start::new().await.args(&["--allow-forwarded"]).serve().await);
            for (name, value) in FORWARDED {
                strict.deny(strict.req().header(name, value), 403, "forwarded_request_refused").await;
                lenient.pass(lenient.req().header(name, value)).await;
            }
        }),
        row("tO22", "a loop is one even where forwarding is allowed", async {
            for s in [start().await, Start::new().await.args(&["--allow-forwarded"]).serve().await] {
                for (name, value) in [("cdn-loop", "connect-sidecar"), ("via", "1.1 p, 1.1 connect-sidecar")] {
                    s.deny(s.req().header(name, value), 508, "loop_detected").await;
                }
            }
        }),
        row("tO23", "a page whose name was bound to this address is told apart by its Host", async {
            let s = start().await;
            let evil = s.fill("evil.example:{P}");
            let rebound = s.req().header("host", &evil).header("origin", &format!("http://{evil}"));
            s.deny(rebound, 403, "host_not_allowed").await;
            s.deny(s.get("/_sidecar/v1/status").header("host", &evil), 403, "host_not_allowed").await;
        }),
        row("tO24", "an image's source gets nothing", async {
            let s = start().await;
            let reply = s.deny(s.get(SLACK), 405, "method_not_allowed").await;
            assert_eq!(reply.header("allow"), Some("POST"));
        }),
    ]
}
