//! Group R: unambiguous heads and bodies, within limits of time and size.

use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::SLACK;
use crate::support::http::{APP, Reply, Request, exchange, raw, statuses, token_head, token_request};
use crate::support::scripted::Then;
use crate::support::soon;

use super::contract::{Sidecar, Start, json_answer, ms, seconds, start, stated, within};

/// A request that could be smuggled in the body of another.
const SMUGGLED: &str = "GET /smug HTTP/1.1\r\nHost: 127.0.0.1:{P}\r\nConnection: close\r\n\r\n";

fn nested(depth: usize) -> String {
    format!("{}{}", r#"{"a":"#.repeat(depth - 1) + "{}", "}".repeat(depth - 1))
}

/// A request with `Expect: 100-continue`, without its body.
fn waiting(s: &Sidecar, lines: &str) -> String {
    let request = token_request("1.1", &format!("Expect: 100-continue\r\nConnection: close\r\n{lines}"));
    s.fill(&request).replace(APP, "")
}

#[tokio::test]
async fn tR01_replaces_an_apps_own_credential() {
    let s = start().await;
    s.pass(s.req().header("authorization", "Bearer CLIENT")).await;
    assert!(!s.m.received()[0].head.contains("CLIENT"));
}

#[tokio::test]
async fn tR02_forwards_no_other_headers_of_the_app() {
    let s = start().await;
    let names = [
        "cookie",
        "x-vercel-id",
        "proxy-authorization",
        "x-custom",
        "referer",
        "range",
        "if-none-match",
        "accept-encoding",
        "user-agent",
        "accept",
        "te",
    ];
    let request = names.iter().fold(s.req(), |request, name| request.header(name, "FOREIGN"));
    s.pass(request).await;
    let seen = &s.m.received()[0];
    assert!(!seen.head.contains("FOREIGN"), "{}", seen.head);
    assert_eq!(seen.values("accept-encoding"), ["identity"]);
}

#[tokio::test]
async fn tR05_closes_the_connection_after_a_body_with_length_and_chunks() {
    let s = start().await;
    let [length, chunked] = ["Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"];
    for lines in [[length, chunked].concat(), [chunked, length].concat()] {
        let replies = exchange(s.addr, &(token_head("1.1", &lines) + "0\r\n\r\n" + SMUGGLED)).await;
        assert!(replies.len() <= 1, "{replies:?}");
    }
    let seen = s.m.received();
    assert!(seen.len() <= 1 && seen.iter().all(|seen| seen.body.is_empty() && !seen.head.contains("/smug")));
}

#[tokio::test]
async fn tR07_forwards_a_chunked_body_with_a_content_length() {
    let s = start().await;
    let chunks = "b;name=value\r\n{\"subject\":\r\n5\r\n{\"typ\r\na\r\ne\":\"app\"}}\r\n0\r\nX-T: 1\r\n\r\n";
    let head = token_head("1.1", "Transfer-Encoding: chunked\r\nConnection: close\r\n");
    let replies = exchange(s.addr, &(head + chunks)).await;
    assert_eq!(statuses(&replies), [200], "{replies:?}");
    let seen = &s.m.received()[0];
    s.assert_passed_on(seen, &format!("POST {SLACK} HTTP/1.1"), APP, &replies[0]);
    assert!(seen.values("x-t").is_empty() && seen.values("trailer").is_empty());
}

#[tokio::test]
async fn tR08_refuses_an_ambiguous_head_and_closes_the_connection() {
    let s = start().await;
    for lines in [
        "Content-Length: 5\r\nX-Folded: a\r\n b\r\n",
        "Content-Length: 5\r\nX-A : b\r\n",
        "Content-Length: 5\r\nX-Nul: a\0b\r\n",
        "Content-Length: 5\r\nX-Cr: a\rb\r\n",
        "Content-Length: 5\r\nX Blank: a\r\n",
        "Content-Length: 2, 2\r\n",
        "Content-Length: +26\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 2\r\nContent-Length: 5\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked, gzip\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding : chunked\r\n",
    ] {
        let replies = exchange(s.addr, &(token_head("1.1", lines) + "0\r\n\r\n" + SMUGGLED)).await;
        assert_eq!(statuses(&replies), [400], "{lines:?}: {replies:?}");
        if replies[0].header("sidecar-error").is_some() {
            replies[0].assert_refused(400, "bad_framing", lines);
        }
    }
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tR09_sends_100_continue_only_for_an_accepted_head() {
    let s = start().await;
    let mut stream = s.connect().await;
    stream.write_all(waiting(&s, "").as_bytes()).await.expect("written");
    let mut go_on = [0; 25];
    soon("the word to go on", stream.read_exact(&mut go_on)).await.expect("read");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stated(ms(300)).await;
    assert_eq!(s.m.count(), 0);
    stream.write_all(APP.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    soon("the reply", stream.read_to_end(&mut reply)).await.expect("read");
    s.assert_passed_on(&s.m.received()[0], &format!("POST {SLACK} HTTP/1.1"), APP, &Reply::parse(&reply));
    for (line, status, code) in [
        ("Origin: https://evil.example\r\n", 403, "browser_request_refused"),
        ("Via: 1.1 proxy\r\n", 403, "forwarded_request_refused"),
        ("Content-Encoding: gzip\r\n", 415, "encoding_not_supported"),
    ] {
        let replies = Reply::parse_all(&raw(s.addr, waiting(&s, line).as_bytes()).await);
        assert_eq!(replies.len(), 1, "no word to go on: {replies:?}");
        replies[0].assert_refused(status, code, line);
    }
    s.deny(s.req().header("expect", "200-foo"), 417, "expectation_failed").await;
    assert_eq!(s.m.count(), 1);
}

#[tokio::test]
async fn tR11_refuses_a_body_announced_as_too_large() {
    let s = start().await;
    let announced = token_head("1.1", "Content-Length: 65537\r\n");
    let replies = within(seconds(1), "the refusal", exchange(s.addr, &announced)).await;
    replies[0].assert_refused(413, "body_too_large", "announced");
    let body = |size: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(size - 8));
    s.pass(s.ask(&body(65_536))).await;
    // The client can read the refusal even if it is still sending.
    for size in [65_537, 250_000] {
        s.deny(s.ask(&body(size)), 413, "body_too_large").await;
    }
}

#[tokio::test]
async fn tR12_refuses_a_body_that_grows_too_large() {
    let s = start().await;
    let chunks = format!("1000\r\n{}\r\n", " ".repeat(0x1000)).repeat(18);
    let chunked = token_head("1.1", "Transfer-Encoding: chunked\r\n") + &chunks + "0\r\n\r\n";
    exchange(s.addr, &chunked).await[0].assert_refused(413, "body_too_large", "in chunks");
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tR14_requires_one_unambiguous_json_object() {
    let s = start().await;
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
            s.deny(Request::new(s.addr, method, path).json("").body(body), 400, "bad_json").await;
        }
    }
    for body in [&nested(32), "\r\n{\t}\n", r#"{"a":1e30}"#] {
        s.pass(s.ask(body)).await;
    }
}

#[tokio::test]
async fn tR16_accepts_an_empty_body() {
    let s = start().await;
    s.pass(s.ask("")).await;
}

#[tokio::test]
async fn tR17_refuses_a_compressed_body() {
    let s = start().await;
    for encoding in ["gzip", "br", "deflate", "gzip, identity"] {
        s.deny(s.req().header("content-encoding", encoding), 415, "encoding_not_supported").await;
    }
    s.pass(s.req().header("content-encoding", "identity")).await;
}

#[tokio::test]
async fn tR18_answers_pipelined_requests_in_order() {
    let s = start().await;
    s.m.otherwise(|seen, _| {
        let connector = seen.line().split(['/', ' ']).nth(5).expect("a connector");
        json_answer(200, "", &format!("{{\"of\":\"{connector}\"}}")).into()
    });
    let three = ["one", "two", "three"].map(|connector| {
        let close = if connector == "three" { "Connection: close\r\n" } else { "" };
        token_request("1.1", close).replace("slack%2Facme-slack", connector)
    });
    let replies = exchange(s.addr, &three.concat()).await;
    assert_eq!(statuses(&replies), [200, 200, 200]);
    let of: Vec<_> = replies.iter().map(|reply| reply.json()["of"].clone()).collect();
    assert_eq!((of, s.m.count()), (vec!["one".into(), "two".into(), "three".into()], 3));
    // The connection can be used after a refusal.
    let refused = token_request("1.1", "Origin: null\r\n");
    let mended = token_request("1.1", "Connection: close\r\n");
    assert_eq!(statuses(&exchange(s.addr, &[refused, mended].concat()).await), [403, 200]);
}

#[tokio::test]
async fn tR21_closes_connections_that_do_not_speak_http_1() {
    let s = start().await;
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let tls = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03CANARYCANARYCANARYCANARYCANARY\0\0\x02\x13\x01\x01\0";
    let noise: Vec<u8> = (0..2048_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for bytes in [&http2[..], tls, &noise, b"\r\n\r\n\0", b"GET\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n"] {
        let reply = raw(s.addr, bytes).await;
        let text = String::from_utf8_lossy(&reply);
        assert!(reply.is_empty() || text.starts_with("HTTP/1.1 400 "), "{text}");
        assert!(!text.contains("CANARY"));
    }
    s.alive().await;
}

#[tokio::test]
async fn tR22_refuses_a_head_over_its_limit() {
    let s = start().await;
    let many = (0..101).fold(s.req(), |request, n| request.header(&format!("x-{n}"), "1"));
    assert_eq!(many.send().await.status, 431);
    assert_eq!(s.req().header("x-long", &"x".repeat(20 * 1024)).send().await.status, 431);
    let long = s.get(&format!("/{}", "x".repeat(20 * 1024))).send().await;
    assert!(matches!(long.status, 414 | 431), "{}", long.status);
    assert_eq!(s.m.count(), 0);
    s.alive().await;
}

pub async fn tR23_closes_a_connection_whose_head_takes_20_s() {
    let s = start().await;
    let ends = async |drips: bool| {
        let (mut stream, begun) = (s.connect().await, Instant::now());
        let (mut reader, mut writer) = stream.split();
        let head = s.fill(&token_head("1.1", "Content-Length: 26\r\n"));
        let dripping = async {
            for byte in head.as_bytes().chunks(1).filter(|_| drips) {
                stated(seconds(1)).await;
                if writer.write_all(byte).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let mut reply = Vec::new();
        let closed = async {
            let _ = reader.read_to_end(&mut reply).await;
        };
        tokio::select! { () = dripping => {}, () = closed => {} }
        let after = begun.elapsed();
        assert!((seconds(17)..seconds(25)).contains(&after), "closed after {after:?}");
        assert_eq!(String::from_utf8_lossy(&reply), "", "silently");
    };
    tokio::join!(ends(false), ends(true));
}

pub async fn tR24_refuses_a_body_that_takes_10_s() {
    let s = start().await;
    let mut stream = s.connect().await;
    let begun = Instant::now();
    let request = s.fill(&token_head("1.1", "Content-Length: 26\r\n")) + "{\"sub";
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut reply = Vec::new();
    let _ = soon("the connection's end", stream.read_to_end(&mut reply)).await;
    let after = begun.elapsed();
    assert!((seconds(8)..seconds(14)).contains(&after), "closed after {after:?}");
    Reply::parse(&reply).assert_refused(408, "body_timeout", "half a body");
    assert_eq!(s.m.count(), 0);
}

#[tokio::test]
async fn tR25_answers_head_without_a_body() {
    let s = start().await;
    for path in ["/healthz", "/readyz"] {
        let reply = Request::new(s.addr, "HEAD", path).send().await;
        assert_eq!((reply.status, reply.text().as_str()), (200, ""));
        reply.assert_safe();
    }
}

#[tokio::test]
async fn tR26_sends_the_security_headers_with_every_reply() {
    let s = start().await;
    s.m.say("", Then::Close);
    let mut seen = Vec::new();
    for request in [
        s.req(),
        s.req(),
        s.req().target("/v1/connect/token/%25"),
        s.req().header("origin", "null"),
        s.get("/none"),
        s.get(SLACK),
        s.ask(&" ".repeat(70_000)),
        s.req().without("content-type"),
    ] {
        let reply = request.send().await;
        reply.assert_safe();
        seen.push(reply.status);
    }
    assert_eq!(seen, [502, 200, 400, 403, 404, 405, 413, 415]);
    let missing = Start::new().await.without_env_file().serve().await;
    missing.deny(missing.req(), 503, "oidc_token_missing").await;
}
