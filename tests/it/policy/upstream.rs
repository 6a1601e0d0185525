//! Group U: faults of upstream, and what reaches the app.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::support::SLACK;
use crate::support::http::Request;
use crate::support::process::{proc_status, sockets_of};
use crate::support::scripted::{Says, Scripted, Then, answer};

use super::contract::{
    Sidecar, Start, has_ipv6, json_answer, mock, ms, reserve_port, seconds, start, stated, stated_since, token_answer,
    within,
};

const PAGE: &str = "<html><script>x</script></html>";

/// A TLS server with its own certificate authority.
struct Tls {
    ca_pem: String,
    url: String,
    /// Number of HTTP bytes received.
    decrypted: Arc<AtomicUsize>,
}

impl Tls {
    /// Listens on 127.0.0.1 with a certificate for this name that is valid until this year.
    async fn serve(name: &str, until: i32) -> Self {
        let ca_key = KeyPair::generate().expect("a key");
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).expect("a certificate").pem();
        let key = KeyPair::generate().expect("a key");
        let mut leaf = CertificateParams::new([name.to_owned()]).expect("a name");
        (leaf.not_before, leaf.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(until, 1, 1));
        let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).expect("a certificate");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)
            .expect("a configuration");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("https://{}", listener.local_addr().expect("an address"));
        let decrypted = Arc::new(AtomicUsize::new(0));
        let counter = decrypted.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, counter) = (acceptor.clone(), counter.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut bytes = Vec::new();
                    let _ = stream.read_buf(&mut bytes).await;
                    counter.fetch_add(bytes.len(), Ordering::Relaxed);
                });
            }
        });
        Self { ca_pem, url, decrypted }
    }
}

/// Number of token requests at M, without clock checks.
fn asked_for(s: &Sidecar, segment: &str) -> usize {
    s.m.received().iter().filter(|seen| seen.line().contains(segment)).count()
}

#[tokio::test]
async fn tU01_never_follows_a_redirect() {
    let (s, m2) = (start().await, mock().await);
    for to in [format!("{}/x", m2.url()), format!("{}{SLACK}", s.m.url()), SLACK.to_owned()] {
        for status in [300, 301, 302, 303, 304, 307, 308] {
            s.m.say(answer(status, &format!("Location: {to}\r\n"), if status == 304 { "" } else { "{}" }), Then::Keep);
            let reply = s.fails(s.req(), 502, "upstream_redirect").await;
            assert!(!reply.text().contains(&to), "{}", reply.text());
        }
    }
    assert_eq!(m2.connections(), 0);
    s.alive().await;
}

#[tokio::test]
async fn tU02_passes_upstreams_json_errors_through() {
    let s = start().await;
    let body = "{ \"error\" : {\"code\":\"c\",\"message\":\"m\"} }\n";
    for status in [400, 401, 403, 404, 409, 422, 500, 502, 503] {
        s.m.say(json_answer(status, "X-Vercel-Id: v\r\nX-Request-Id: r\r\n", body), Then::Keep);
        let reply = s.req().send().await;
        assert_eq!((reply.status, reply.text().as_str()), (status, body));
        assert_eq!((reply.header("x-vercel-id"), reply.header("x-request-id")), (Some("v"), Some("r")));
        assert_eq!(reply.header("sidecar-error"), None, "it is not ours");
        reply.assert_safe();
    }
    assert_eq!(s.m.count(), 9);
}

#[tokio::test]
async fn tU03_does_not_pass_an_html_error_on() {
    let s = start().await;
    for status in [400, 404, 500, 502] {
        s.m.say(answer(status, "Content-Type: text/html\r\n", PAGE), Then::Keep);
        let reply = s.fails(s.req(), 502, "upstream_invalid_response").await;
        assert!(!reply.text().contains("<script>") && reply.text().contains(&format!("(status {status})")));
    }
    for status in [429, 503] {
        s.m.say(answer(status, "Content-Type: text/html\r\nRetry-After: 7\r\n", PAGE), Then::Keep);
        let reply = s.fails(s.req(), status, "upstream_invalid_response").await;
        assert_eq!(reply.header("retry-after"), Some("7"));
    }
}

#[tokio::test]
async fn tU04_does_not_take_an_html_page_for_a_token() {
    let s = start().await;
    for (content_type, body) in [
        ("text/html", PAGE),
        ("application/json", PAGE),
        ("application/json", ""),
        ("application/json", "[]"),
        ("application/json", "\u{feff}{}"),
    ] {
        s.m.say(answer(200, &format!("Content-Type: {content_type}\r\n"), body), Then::Keep);
        s.fails(s.req(), 502, "upstream_invalid_response").await;
    }
    s.m.say("HTTP/1.1 204 No Content\r\n\r\n", Then::Keep);
    s.fails(s.req(), 502, "upstream_invalid_response").await;
}

#[tokio::test]
async fn tU06_passes_on_only_listed_response_headers() {
    let s = start().await;
    let lines = "Set-Cookie: CANARY=1\r\nAccess-Control-Allow-Origin: *\r\nServer: CANARY\r\n\
         Strict-Transport-Security: max-age=1\r\nAlt-Svc: h3=\":443\"\r\nX-Evil: CANARY\r\n\
         Connection: X-Evil\r\nVia: CANARY\r\nLocation: CANARY\r\n";
    s.m.say(token_answer(1).replacen("\r\n", &format!("\r\n{lines}"), 1), Then::Keep);
    let reply = s.pass(s.req()).await;
    reply.assert_safe();
    let names: Vec<_> = reply.headers.iter().map(|(name, _)| name.as_str()).collect();
    for name in ["strict-transport-security", "alt-svc", "x-evil", "via"] {
        assert!(!names.contains(&name), "{names:?}");
    }
    assert!(!format!("{:?}", reply.headers).contains("CANARY"), "{:?}", reply.headers);
}

pub async fn tU07_gives_up_a_silent_upstream_after_20_s() {
    let s = start().await;
    s.m.say("", Then::Stall);
    let begun = Instant::now();
    let sent = s.req().begin().await;
    s.m.asked(1).await;
    within(seconds(1), "another answer", s.pass(s.req())).await;
    let reply = sent.reply_at_last().await;
    let after = begun.elapsed();
    reply.assert_refused(504, "upstream_timeout", "no answer");
    assert!((seconds(17)..seconds(24)).contains(&after), "after {after:?}");
}

#[tokio::test]
async fn tU09_a_truncated_answer_is_an_error_and_not_cached() {
    let s = start().await;
    let cut = |length: usize| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{{\"token\":\"CANARY\"");
    for then in [Then::Close, Then::Reset] {
        s.m.say(cut(100), then);
        let request = s.req();
        let reply = s.fails(request.clone(), 502, "upstream_invalid_response").await;
        assert!(!reply.text().contains("CANARY"));
        s.pass(request).await;
    }
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tU11_refuses_an_answer_over_1_mib() {
    let s = start().await;
    s.pass(s.req()).await;
    let before = proc_status(s.pid(), "VmRSS");
    s.m.say(json_answer(200, "", &format!("{{\"x\":\"{}\"}}", "x".repeat(2 << 20))), Then::Keep);
    s.fails(s.req(), 502, "upstream_invalid_response").await;
    let grown = proc_status(s.pid(), "VmRSS").saturating_sub(before);
    assert!(grown < 8 * 1024, "by {grown} KiB");
    s.alive().await;
}

#[tokio::test]
async fn tU12_reports_an_unreachable_upstream() {
    let (_reserved, port) = reserve_port();
    let s = Start::new().await.args(&[&format!("--upstream=http://127.0.0.1:{port}")]).serve().await;
    let reply = within(seconds(6), "the error", s.deny(s.req(), 502, "upstream_unreachable")).await;
    assert!(reply.json()["error"]["hint"].is_string());
}

#[tokio::test]
async fn tU13_sends_nothing_without_trusted_tls() {
    let (good, stranger) = (Tls::serve("127.0.0.1", 2040).await, Tls::serve("127.0.0.1", 2040).await);
    let (misnamed, expired) = (Tls::serve("api.vercel.com", 2040).await, Tls::serve("127.0.0.1", 2021).await);
    for (what, tls, ca) in [
        ("another name", &misnamed, Some(&misnamed)),
        ("expired", &expired, Some(&expired)),
        ("another authority", &stranger, Some(&good)),
        ("not known to the system", &stranger, None),
    ] {
        let mut prepared = Start::new().await.args(&["--upstream", &tls.url]);
        if let Some(ca) = ca {
            std::fs::write(prepared.project.join("ca.pem"), &ca.ca_pem).expect("written");
            prepared = prepared.args(&["--upstream-ca=ca.pem"]);
        }
        let s = prepared.serve().await;
        let reply = s.deny(s.req(), 502, "upstream_tls").await;
        assert_eq!(tls.decrypted.load(Ordering::Relaxed), 0, "{what}: {}", reply.text());
    }
    // The same with a valid certificate succeeds.
    let prepared = Start::new().await.args(&["--upstream", &good.url, "--upstream-ca=ca.pem"]);
    std::fs::write(prepared.project.join("ca.pem"), &good.ca_pem).expect("written");
    let s = prepared.serve().await;
    assert_eq!(s.req().send().await.code(), "upstream_invalid_response");
    assert_ne!(good.decrypted.load(Ordering::Relaxed), 0);
}

pub async fn tU14_answers_from_a_cached_429_until_retry_after() {
    let s = start().await;
    let body = r#"{"error":{"code":"rate_limited","message":"m"}}"#;
    s.m.say(json_answer(429, "Retry-After: 2\r\n", body), Then::Keep);
    let request = s.req();
    let limited = async |left: &[&str]| {
        let reply = request.clone().send().await;
        assert_eq!((reply.status, reply.text().as_str()), (429, body));
        assert!(reply.header("retry-after").is_some_and(|after| left.contains(&after)), "{reply:?}");
        assert_eq!(s.m.count(), 1);
    };
    limited(&["2"]).await;
    let begun = Instant::now();
    limited(&["1", "2"]).await;
    stated_since(begun, seconds(1)).await;
    limited(&["1"]).await;
    stated_since(begun, ms(2500)).await;
    assert_eq!((request.clone().send().await.status, s.m.count()), (200, 2));
}

#[tokio::test]
async fn tU16_never_resends_what_upstream_may_have_received() {
    let s = start().await;
    for kept in [false, true] {
        if kept {
            s.pass(s.req()).await;
        }
        for then in [Then::Reset, Then::Close] {
            s.m.say("", then);
            s.fails(s.req(), 502, "upstream_invalid_response").await;
        }
    }
}

pub async fn tU17_reconnects_when_upstream_has_closed_an_idle_connection() {
    let s = start().await;
    for n in 1..=50 {
        let segment = format!("c{n}.");
        s.m.will(Says::from(token_answer(n)).then(Then::Close));
        s.pass(s.req().target(&format!("/v1/connect/token/{segment}"))).await;
        stated(ms(100)).await;
        assert_eq!(asked_for(&s, &segment), 1);
    }
}

#[tokio::test]
async fn tU19_connects_to_upstream_over_ipv6() {
    if has_ipv6().await {
        let mut prepared = Start::new().await;
        prepared.m = Scripted::start_on("[::1]:0").await;
        prepared.m.otherwise(|_, n| token_answer(n).into());
        prepared.command.env("CONNECT_SIDECAR_UPSTREAM", prepared.m.url());
        let s = prepared.serve().await;
        s.pass(s.req()).await;
    }
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tU21_detects_itself_as_upstream_after_one_round() {
    let (_reserved, port) = reserve_port();
    let upstream = format!("--upstream=http://127.0.0.1:{port}");
    let s = Start::new().await.args(&[&upstream, &format!("--port={port}")]).serve().await;
    let ask = async || {
        let reply = within(seconds(2), "the error", s.req().send()).await;
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (508, &"loop_detected".into()));
    };
    ask().await;
    let before = sockets_of(port).len();
    for _ in 0..10 {
        ask().await;
    }
    s.healthy().await;
    let after = sockets_of(port).len();
    assert!(after <= before + 2, "{before} sockets, then {after}");
    let through = Request::new(s.addr, "POST", SLACK).json("{}").header("cdn-loop", "connect-sidecar");
    s.deny(through, 508, "loop_detected").await;
}
