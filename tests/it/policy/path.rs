//! Group P: methods, targets and connectors.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::SLACK;
use crate::support::http::{Reply, Request, exchange};

use super::contract::{Sidecar, Start, seconds, start, within};

const TOKEN: &str = "/v1/connect/token/";

/// Asserts that each of these connector segments is refused.
async fn refuses_connectors(segments: &[&str]) {
    let s = start().await;
    for segment in segments {
        s.deny(s.req().target(&format!("{TOKEN}{segment}")), 400, "bad_connector").await;
    }
}

/// Asserts that each of these requests, followed by one inside the tunnel, is refused and closes the connection.
async fn refuses_targets(s: &Sidecar, lines: &[&str], status: u16, code: &str) {
    for line in lines {
        let bytes = format!(
            "{line} HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\nCookie: CANARY\r\nConnection: close\r\n\r\n\
             GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\n\r\n"
        );
        let replies = exchange(s.addr, &s.fill(&bytes)).await;
        assert_eq!(replies.len(), 1, "{line}: {replies:?}");
        replies[0].assert_refused(status, code, line);
        assert!(!format!("{replies:?}").contains("CANARY"), "{line}");
    }
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tP01_forwards_the_target_byte_for_byte() {
    let s = start().await;
    s.pass(s.req()).await;
    assert_eq!(s.m.received()[0].line(), "POST /v1/connect/token/slack%2Facme-slack HTTP/1.1");
}

#[tokio::test]
async fn tP02_accepts_percent_encoding_in_either_case() {
    let s = start().await;
    s.pass(s.req().target("/v1/connect/token/slack%2facme-slack")).await;
    s.pass(s.req().target("/v1/connect/token/mcp.linear.app%2Fa%2Fb~_!$&'()*+,;=:@")).await;
}

#[tokio::test]
async fn tP03_the_token_route_takes_only_post() {
    let s = start().await;
    for method in ["GET", "PUT", "PATCH", "DELETE", "FOO"] {
        let reply = s.deny(Request::new(s.addr, method, SLACK), 405, "method_not_allowed").await;
        assert_eq!(reply.header("allow"), Some("POST"), "{method}");
    }
    let head = Request::new(s.addr, "HEAD", SLACK).send().await;
    assert_eq!((head.status, head.header("allow"), head.body.len()), (405, Some("POST"), 0));
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tP04_ignores_method_override_headers() {
    let s = start().await;
    s.pass(s.req().header("x-http-method-override", "DELETE")).await;
    assert!(s.m.received()[0].values("x-http-method-override").is_empty());
}

#[tokio::test]
async fn tP05_explains_an_unencoded_slash_in_a_connector() {
    let s = start().await;
    let reply = s.deny(s.req().target("/v1/connect/token/slack/acme-slack"), 404, "route_not_found").await;
    let error = &reply.json()["error"];
    assert!(error["message"].as_str().is_some_and(|message| message.contains("%2F")), "{error}");
    assert_eq!(error["hint"], SLACK);
}

#[tokio::test]
async fn tP06_refuses_paths_with_another_reading() {
    let s = start().await;
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
        s.deny(s.req().target(path), 404, "route_not_found").await;
    }
}

#[tokio::test]
async fn tP08_refuses_connectors_that_leave_their_segment() {
    refuses_connectors(&[
        "..",
        "%2e%2e",
        ".%2E",
        ".",
        "a%2F..%2Fb",
        "a%2F.%2Fb",
        "%2Fa",
        "a%2F",
        "a%2F%2Fb",
        "a%2Fb%2Fc%2Fd",
        "a%5Cb",
        "a%00b",
        "a%0D%0Ab",
        "a%3Fb",
        "a%23b",
        "%FF",
        "%zz",
        "%2",
    ])
    .await;
}

#[tokio::test]
async fn tP10_refuses_double_encoding() {
    refuses_connectors(&["a%252Fb", "%25", "%252e%252e", "a%255Cb"]).await;
}

#[tokio::test]
async fn tP12_refuses_connectors_that_name_a_subresource() {
    refuses_connectors(&["slack%2Fimport", "import", "x%2Ftokens"]).await;
}

#[tokio::test]
async fn tP13_refuses_any_query_string() {
    let s = start().await;
    for query in ["?", "?a=1", "?teamId=t"] {
        s.deny(s.req().target(&format!("{SLACK}{query}")), 400, "query_not_allowed").await;
        for path in ["/healthz", "/readyz", "/metrics", "/_sidecar/v1/status"] {
            s.deny(s.get(&format!("{path}{query}")), 400, "query_not_allowed").await;
        }
    }
}

#[tokio::test]
async fn tP15_refuses_connect() {
    let s = start().await;
    for target in ["127.0.0.1:{M}", "api.vercel.com:443", "127.0.0.1:{P}"] {
        let mut stream = s.connect().await;
        let connect = s.fill(&format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1:{{P}}\r\n\r\n"));
        stream.write_all(connect.as_bytes()).await.expect("written");
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"}}") {
            assert_ne!(stream.read_buf(&mut bytes).await.expect("read"), 0);
        }
        Reply::parse(&bytes).assert_refused(405, "method_not_allowed", target);
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let mut rest = Vec::new();
        let _ = within(seconds(1), "the connection's end", stream.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"", "{target}");
    }
    // One connection is opened in advance.
    assert!(s.m.connections() <= 1 && s.m.count() == 0);
}

#[tokio::test]
async fn tP16_requires_a_target_in_origin_form() {
    let s = start().await;
    let lines = ["OPTIONS *", "GET *", "POST //evil.example/v1/connect/token/x", "GET http://evil.example/"];
    refuses_targets(&s, &lines, 400, "bad_target").await;
}

#[tokio::test]
async fn tP18_refuses_trace() {
    let s = start().await;
    refuses_targets(&s, &["TRACE /v1/connect/token/x", "TRACE /"], 405, "method_not_allowed").await;
}

#[tokio::test]
async fn tP19_refuses_connectors_outside_the_allow_list() {
    let toml = "[connectors]\nallow = [\"slack/acme-slack\"]";
    let s = Start::new().await.toml(toml).serve().await;
    s.pass(s.req()).await;
    s.pass(s.req().target("/v1/connect/token/slack%2facme-slack")).await;
    for target in ["token/other", "token/slack%2Facme-slack2", "token/Slack%2Facme-slack", "authorize/other"] {
        s.deny(s.req().target(&format!("/v1/connect/{target}")), 403, "connector_not_allowed").await;
    }
    s.deny(s.get("/v1/connect/connectors/other"), 403, "connector_not_allowed").await;
}
