//! Group H: which `Host` is accepted.

use tokio::process::Command;

use crate::support::SLACK;
use crate::support::http::{APP, Request, exchange, raw, token_request};
use crate::support::process::run;

use super::contract::{Start, has_ipv6, reserve_port, start};

#[tokio::test]
async fn tH01_accepts_the_listening_address() {
    let s = start().await;
    s.pass(s.req()).await;
}

#[tokio::test]
async fn tH02_accepts_localhost_in_any_case() {
    let s = start().await;
    for host in ["localhost:{P}", "LocalHost:{P}"] {
        s.pass(s.req().header("host", &s.fill(host))).await;
    }
}

#[tokio::test]
async fn tH03_accepts_the_ipv6_loopback_address() {
    let s = start().await;
    s.pass(s.req().header("host", &s.fill("[::1]:{P}"))).await;
    if has_ipv6().await {
        let v6 = format!("[::1]:{}", s.addr.port()).parse().expect("an address");
        s.pass(Request::new(v6, "POST", SLACK).json(r#"{"scopes":["v6"]}"#)).await;
    }
}

#[tokio::test]
async fn tH05_refuses_other_names() {
    let s = start().await;
    for host in ["evil.example:{P}", "api.vercel.com"] {
        s.deny(s.req().header("host", &s.fill(host)), 403, "host_not_allowed").await;
    }
}

#[tokio::test]
async fn tH06_requires_one_well_formed_host() {
    let s = start().await;
    s.deny(s.req().without("host"), 400, "bad_host").await;
    for host in ["", "user@localhost:{P}", "localhost:{P},localhost:{P}", "local%68ost:{P}", "localhost:"] {
        s.deny(s.req().header("host", &s.fill(host)), 400, "bad_host").await;
    }
    let twice = "Host: 127.0.0.1:{P}\r\n";
    for lines in ["", &twice.repeat(2), &format!("{twice}Host: evil.example\r\n")] {
        for version in ["1.1", "1.0"] {
            let request = format!("GET /healthz HTTP/{version}\r\n{lines}Connection: close\r\n\r\n");
            let replies = exchange(s.addr, &request).await;
            assert_eq!(replies.len(), 1, "{request}");
            replies[0].assert_refused(400, "bad_host", &request);
        }
    }
}

#[tokio::test]
async fn tH08_requires_the_listening_port() {
    let s = start().await;
    let next = format!("127.0.0.1:{}", s.addr.port().wrapping_add(1).max(1024));
    for host in ["localhost", "127.0.0.1", "localhost:1", &next] {
        s.deny(s.req().header("host", host), 403, "host_not_allowed").await;
    }
}

#[tokio::test]
async fn tH09_refuses_names_that_only_resolve_to_this_machine() {
    let s = start().await;
    let mut uname = Command::new("uname");
    uname.arg("-n");
    let machine = run(uname).await.stdout;
    let machine = format!("{}:{{P}}", machine.trim());
    for (host, status, code) in [
        ("0.0.0.0:{P}", 403, "host_not_allowed"),
        ("[::]:{P}", 403, "host_not_allowed"),
        ("[::ffff:127.0.0.1]:{P}", 403, "host_not_allowed"),
        ("127.0.0.2:{P}", 403, "host_not_allowed"),
        ("2130706433:{P}", 403, "host_not_allowed"),
        ("localhost.:{P}", 400, "bad_host"),
        ("a.localhost:{P}", 403, "host_not_allowed"),
        ("localhost6:{P}", 403, "host_not_allowed"),
        ("x.local:{P}", 403, "host_not_allowed"),
        ("x.internal:{P}", 403, "host_not_allowed"),
        ("host.docker.internal:{P}", 403, "host_not_allowed"),
        (&machine, 403, "host_not_allowed"),
        ("127.0.0.1.nip.io:{P}", 403, "host_not_allowed"),
        ("localhost.evil.com:{P}", 403, "host_not_allowed"),
    ] {
        // If the machine is called localhost, its name is accepted.
        if s.fill(host) != s.fill("localhost:{P}") {
            s.deny(s.req().header("host", &s.fill(host)), status, code).await;
        }
    }
}

#[tokio::test]
async fn tH11_applies_to_the_health_endpoint() {
    let s = start().await;
    s.deny(s.get("/healthz").header("host", &s.fill("evil.example:{P}")), 403, "host_not_allowed").await;
}

#[tokio::test]
async fn tH13_accepts_allowed_hosts_by_exact_name() {
    let (_reserved, port) = reserve_port();
    let [exact, port] = [format!("--allowed-host=dev.test:{port}"), format!("--port={port}")];
    let s = Start::new().await.args(&[&exact, "--allowed-host", "any.test", &port]).serve().await;
    for host in ["dev.test:{P}", "DEV.test:{P}", "any.test", "any.test:1"] {
        s.pass(s.req().header("host", &s.fill(host))).await;
    }
    for host in ["x.dev.test:{P}", "dev.test", "dev.test:1", "any.test.evil.example"] {
        s.deny(s.req().header("host", &s.fill(host)), 403, "host_not_allowed").await;
    }
}

#[tokio::test]
async fn tH14_answers_http_1_0_and_keeps_it_alive_on_request() {
    let s = start().await;
    let request = |lines: &str| s.fill(&token_request("1.0", lines));
    let bytes = raw(s.addr, request("").repeat(2).as_bytes()).await;
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
    let replies = exchange(s.addr, &request("").repeat(2)).await;
    assert_eq!(replies.len(), 1, "one request is all it takes");
    s.assert_passed_on(&s.m.received()[0], "POST /v1/connect/token/slack%2Facme-slack HTTP/1.1", APP, &replies[0]);
    let kept = [request("Connection: keep-alive\r\n"), request("")].concat();
    assert_eq!(exchange(s.addr, &kept).await.len(), 2);
    s.deny(s.req().without("host"), 400, "bad_host").await;
    let chunked = exchange(s.addr, &request("Transfer-Encoding: chunked\r\n")).await;
    assert_eq!((chunked.len(), chunked[0].status), (1, 400));
}

#[tokio::test]
async fn tH15_refuses_an_absolute_target_despite_a_good_host() {
    let s = start().await;
    for target in ["http://127.0.0.1:{P}/v1/connect/token/x", "http://evil.example/v1/connect/token/x"] {
        s.deny(s.req().target(&s.fill(target)), 400, "bad_target").await;
    }
}
