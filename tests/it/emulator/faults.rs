//! Faults from the seed and the admin API, and who may use the admin API.

use std::io::ErrorKind;
use std::time::Duration;

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{SLACK, admin, emulator, request};
use crate::support::http::{APP, Request, raw};
use crate::support::{let_timers_pass, soon};

fn ask(emulator: &Emulator) -> Request {
    request(emulator, &emulator.oidc_token(DEVELOPMENT_LIFE), "POST", SLACK).json(APP)
}

async fn inject(emulator: &Emulator, script: &str) {
    let reply = admin(emulator, "POST", "faults", script).await;
    assert_eq!(reply.status, 204, "{script}: {}", reply.text());
}

#[tokio::test]
async fn responses_are_replaced_as_often_as_requested() {
    let emulator = emulator("").await;
    for (script, status, code, retry_after) in [
        (r#"{"kind":"unauthorized","times":1}"#, 401, "unauthorized", None),
        (r#"{"kind":"rate_limited","times":1}"#, 429, "rate_limited", None),
        (r#"{"kind":"rate_limited","retry_after":"7","times":1}"#, 429, "rate_limited", Some("7")),
        (r#"{"kind":"revoked_grant","times":1}"#, 422, "no_token", None),
        (r#"{"kind":"status","status":503,"code":"unavailable","times":1}"#, 503, "unavailable", None),
    ] {
        inject(&emulator, script).await;
        let reply = ask(&emulator).send().await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (status, Some(code)), "{script}");
        assert_eq!(reply.header("retry-after"), retry_after, "{script}");
        assert_eq!(ask(&emulator).send().await.status, 200, "{script}: once");
    }
    inject(&emulator, r#"{"kind":"wrong_json"}"#).await;
    for _ in 0..2 {
        let reply = ask(&emulator).send().await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
        assert!(serde_json::from_slice::<serde_json::Value>(&reply.body).is_err(), "{}", reply.text());
    }
    assert_eq!(admin(&emulator, "DELETE", "faults", "").await.status, 204);
    assert_eq!(ask(&emulator).send().await.status, 200);
}

#[tokio::test]
async fn a_fault_in_the_seed_applies_only_to_matching_requests() {
    let emulator = emulator("[[faults]]\nkind = \"unauthorized\"\non = \"/connectors/\"\ntimes = 1").await;
    assert_eq!(ask(&emulator).send().await.status, 200);
    let metadata = || request(&emulator, super::OWNER, "GET", "/v1/connect/connectors/slack%2Facme-slack");
    assert_eq!((metadata().send().await.status, metadata().send().await.status), (401, 200));
}

#[tokio::test]
async fn a_response_can_be_delayed_or_withheld() {
    let emulator = emulator("").await;
    inject(&emulator, r#"{"kind":"latency","by":"5s","times":1}"#).await;
    let late = ask(&emulator).begin().await;
    soon("the request", emulator.wait_for_requests(1)).await;
    inject(&emulator, r#"{"kind":"hang","times":1}"#).await;
    let never = ask(&emulator).begin().await;
    soon("the request", emulator.wait_for_requests(2)).await;
    let never = tokio::spawn(never.reply_at_last());
    assert_eq!(ask(&emulator).send().await.status, 200, "others are not held up");
    assert_eq!(emulator.received()[0].answered, None);
    let_timers_pass(Duration::from_secs(5)).await;
    assert_eq!(late.reply().await.status, 200);
    let_timers_pass(Duration::from_secs(3600)).await;
    assert_eq!(ask(&emulator).send().await.status, 200);
    assert!(!never.is_finished());
}

#[tokio::test]
async fn a_connection_can_be_reset_or_cut_off() {
    let emulator = emulator("").await;
    inject(&emulator, r#"{"kind":"reset","times":1}"#).await;
    let mut stream = TcpStream::connect(emulator.addr()).await.expect("a connection");
    stream.write_all(&ask(&emulator).bytes()).await.expect("sent");
    let end = soon("the end", stream.read(&mut [0; 64])).await;
    assert_eq!(end.expect_err("a reset").kind(), ErrorKind::ConnectionReset);

    inject(&emulator, r#"{"kind":"cut","times":1}"#).await;
    let bytes = raw(emulator.addr(), &ask(&emulator).bytes()).await;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let length: usize = head
        .to_lowercase()
        .split("content-length: ")
        .nth(1)
        .and_then(|rest| rest.lines().next()?.parse().ok())
        .expect("a length");
    assert!(!body.is_empty() && body.len() < length, "{} of {length}", body.len());
}

#[tokio::test]
async fn the_clock_can_be_skewed() {
    let emulator = emulator("").await;
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let ask = || request(&emulator, &token, "POST", SLACK).json(APP);
    let date = async || {
        let reply = ask().send().await;
        (reply.status, httpdate::parse_http_date(reply.header("date").expect("a date")).expect("a date"))
    };
    let (status, before) = date().await;
    assert_eq!(status, 200);
    inject(&emulator, r#"{"kind":"clock_skew","by":"13h"}"#).await;
    let (status, ahead) = date().await;
    assert_eq!(status, 401, "the token is over by that clock");
    assert!(ahead.duration_since(before).expect("later") >= Duration::from_secs(13 * 3600));
    inject(&emulator, r#"{"kind":"clock_skew","by":"-1h"}"#).await;
    assert_eq!(date().await.0, 401, "it has not begun by that clock");
    admin(&emulator, "DELETE", "faults", "").await;
    assert_eq!(date().await.0, 200);
}

#[tokio::test]
async fn an_invalid_script_is_refused_with_advice() {
    let emulator = emulator("").await;
    for (script, says) in [
        (r#"{"kind":"latency"}"#, "this kind needs `by`"),
        (r#"{"kind":"late"}"#, "unknown variant `late`, expected one of `latency`"),
        (r#"{"kind":"hang","every":2}"#, "unknown field `every`"),
        ("hang", "expected value"),
    ] {
        let reply = admin(&emulator, "POST", "faults", script).await;
        assert!(reply.status == 400 && reply.text().contains(says), "{script}: {} {}", reply.status, reply.text());
    }
}

#[tokio::test]
async fn recorded_requests_are_shown_without_secrets() {
    let emulator = emulator("").await;
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    request(&emulator, &token, "POST", SLACK).json(APP).send().await;
    let reply = admin(&emulator, "GET", "requests", "").await;
    let shown = &reply.json()["requests"];
    assert_eq!(shown.as_array().map(Vec::len), Some(1), "the emulator's own are not among them");
    let (method, target, status) = (&shown[0]["method"], &shown[0]["target"], &shown[0]["answered"]);
    assert_eq!((method, target, status), (&"POST".into(), &SLACK.into(), &200.into()));
    assert_eq!(shown[0]["body"]["subject"]["type"], "app");
    assert!(!reply.text().contains(&token) && reply.text().contains("sha256:"));
}

#[tokio::test]
async fn web_pages_cannot_reach_the_admin_api() {
    let emulator = emulator("").await;
    let get = |path: &str| Request::new(emulator.addr(), "GET", &format!("/_emulator/{path}"));
    for route in ["env.local", "requests", "consents"] {
        assert_eq!(get(route).send().await.status, 200);
        for (name, value) in
            [("origin", "https://evil.example"), ("host", "evil.example"), ("sec-fetch-site", "cross-site")]
        {
            let reply = get(route).header(name, value).send().await;
            assert!(reply.status == 403 && !reply.text().contains("eyJ"), "{route} {name}: {}", reply.text());
        }
    }
    let fault = Request::new(emulator.addr(), "POST", "/_emulator/faults").json(r#"{"kind":"hang"}"#);
    assert_eq!(fault.header("origin", "null").send().await.status, 403);
    assert_eq!(ask(&emulator).send().await.status, 200, "nothing hangs");
}
