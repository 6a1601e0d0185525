//! Group K: one upstream request for any number of equal ones, and never a wrong answer.

use std::collections::BTreeSet;

use crate::support::SLACK;
use crate::support::scripted::{Says, Then};

use super::contract::{
    Start, at_a_rate_of, fresh_jwt, json_answer, jwt, ms, now_ms, start, token_answer, token_answer_until,
};

fn user(id: &str) -> String {
    format!(r#"{{"subject":{{"type":"user","id":"{id}"}}}}"#)
}

#[tokio::test]
async fn tK01_answers_the_second_of_two_equal_requests_from_the_cache() {
    let s = start().await;
    let request = s.req();
    let first = s.pass(request.clone()).await;
    assert!(first.cache_status().starts_with("connect-sidecar; fwd=uri-miss; stored; ttl=35"), "{first:?}");
    let second = request.send().await;
    assert!(second.cache_status().starts_with("connect-sidecar; hit; ttl=35"), "{}", second.cache_status());
    assert!(second.header("age").is_some());
    assert_eq!((second.body, s.m.count()), (first.body, 1));
}

#[tokio::test]
async fn tK02_keys_on_connector_body_and_subject() {
    let s = start().await;
    let plain = s.ask(&user("ada"));
    s.pass(plain.clone()).await;
    s.pass(plain.clone().target("/v1/connect/token/slack%2Fother")).await;
    s.pass(s.ask(r#"{"subject":{"type":"user","id":"ada"},"scopes":["read"]}"#)).await;
    s.pass(s.ask(r#"{"subject":{"type":"user","id":"ada"},"scopes":["*"]}"#)).await;
    s.pass(s.ask(&user("bob"))).await;
    // An equivalent body has the same key.
    let spelled = s.ask(r#" { "subject" : { "id" : "ad\u0061" , "type" : "user" } } "#).send().await;
    assert!(spelled.cache_status().contains("; hit"), "{}", spelled.cache_status());
}

#[tokio::test]
async fn tK03_does_not_store_a_token_close_to_its_expiry() {
    let s = start().await;
    s.m.otherwise(|_, n| token_answer_until(n, &(now_ms() + 30_000).to_string()).into());
    let request = s.req();
    for _ in 0..2 {
        assert_eq!(s.pass(request.clone()).await.cache_status(), "connect-sidecar; fwd=uri-miss");
    }
}

#[tokio::test]
async fn tK04_does_not_store_an_answer_without_a_valid_expiry() {
    let s = start().await;
    let seconds = (now_ms() / 1000 + 3600).to_string();
    let past = (now_ms() - 1).to_string();
    for odd in ["\"123\"", &seconds, &past, "-1", "1e400", "-1e400", "null", "[]", "true"] {
        let request = s.req();
        for n in 0..2 {
            s.m.will(token_answer_until(n, odd));
            s.pass(request.clone()).await;
        }
    }
    let request = s.req();
    for body in ["{\"token\":\"t\"}", "{\"token\":\"\",\"expiresAt\":4000000000000}", "{}"] {
        s.m.will(json_answer(200, "", body));
        assert_eq!(s.pass(request.clone()).await.text(), body);
    }
    s.alive().await;
}

#[tokio::test]
async fn tK07_no_cache_fetches_and_replaces() {
    let s = start().await;
    let request = s.req();
    let first = s.pass(request.clone()).await;
    let forced = s.pass(request.clone().header("cache-control", "no-cache")).await;
    assert_ne!(forced.body, first.body);
    assert!(forced.cache_status().starts_with("connect-sidecar; fwd=request; stored; ttl="));
    let third = request.send().await;
    assert!(third.cache_status().contains("; hit; "), "{}", third.cache_status());
    assert_eq!((third.body, s.m.count()), (forced.body, 2));
}

#[tokio::test]
async fn tK08_does_not_cache_errors() {
    let s = start().await;
    let request = s.req();
    s.m.will(json_answer(500, "", r#"{"error":{"code":"c","message":"m"}}"#));
    assert_eq!(request.clone().send().await.status, 500);
    s.pass(request).await;
    assert_eq!(s.m.count(), 2);
}

#[tokio::test]
async fn tK09_does_not_store_a_request_with_a_third_party_token() {
    const THEIRS: &str = "CANARYBODY-of-a-third-party";
    let s = start().await;
    let body = format!(r#"{{"subject":{{"type":"token","token":"{THEIRS}"}}}}"#);
    for _ in 0..2 {
        assert_eq!(s.pass(s.ask(&body)).await.cache_status(), "connect-sidecar; fwd=uri-miss");
    }
    s.leaks_nothing(&[THEIRS]).await;
}

#[tokio::test]
async fn tK10_sends_one_request_for_200_equal_ones() {
    let s = start().await;
    s.m.will(Says::from(token_answer(1)).after(ms(500)));
    let request = s.req();
    let asking: Vec<_> = (0..200).map(|_| tokio::spawn(request.clone().send())).collect();
    let mut bodies = BTreeSet::new();
    let mut led = 0;
    for asked in asking {
        let reply = asked.await.expect("no panic");
        assert_eq!(reply.status, 200);
        led += usize::from(reply.cache_status().contains("; stored; "));
        bodies.insert(reply.body);
    }
    assert_eq!((bodies.len(), led, s.m.count()), (1, 1, 1));
}

#[tokio::test]
async fn tK13_another_principal_empties_the_cache() {
    let mut s = start().await;
    let request = s.req();
    s.pass(request.clone()).await;
    let theirs = jwt(|claims| claims["project_id"] = "prj_2".into());
    s.write_env(&theirs);
    s.serving.wait_for_log("the token is now that of").await;
    s.j0 = theirs;
    s.pass(request).await;
    assert_eq!(s.m.count(), 2);
}

#[tokio::test]
async fn tK14_a_rotated_token_of_the_same_principal_keeps_the_cache() {
    let mut s = start().await;
    let request = s.req();
    s.pass(request.clone()).await;
    let fresh = fresh_jwt();
    s.write_env(&fresh);
    s.serving.wait_for_log("token refreshed").await;
    assert!(request.send().await.cache_status().contains("; hit; "));
    assert_eq!(s.m.count(), 1);
    s.assert_uses(&fresh).await;
}

pub async fn tK16_bounds_its_entries() {
    let s = Start::new().await.toml("[cache]\nmax_entries = 256").serve().await;
    let first = s.ask(&user("0"));
    at_a_rate_of(15, 300, async |n| {
        s.pass(s.ask(&user(&n.to_string()))).await;
    })
    .await;
    assert_eq!(s.status().await["cache"]["entries"], 256);
    let last = s.ask(&user("299")).send().await;
    assert!(last.cache_status().contains("; hit; "), "{}", last.cache_status());
    s.pass(first).await;
}

#[tokio::test]
async fn tK18_ignores_irrelevant_headers_in_the_key() {
    let s = start().await;
    let request = s.req();
    s.pass(request.clone().header("accept-language", "de").header("traceparent", "00-1-1-01")).await;
    let other = request.header("accept-language", "fr").header("traceparent", "00-2-2-01").send().await;
    assert!(other.cache_status().contains("; hit; "), "{}", other.cache_status());
    assert_eq!(s.m.received()[0].values("traceparent"), ["00-1-1-01"]);
}

#[tokio::test]
async fn tK19_can_be_turned_off_but_not_single_flight() {
    let s = Start::new().await.toml("[cache]\nmax_age = \"0s\"").serve().await;
    let request = s.req();
    for _ in 0..2 {
        assert_eq!(s.pass(request.clone()).await.cache_status(), "connect-sidecar; fwd=bypass");
    }
    s.m.will(Says::from(token_answer(1)).after(ms(500)).then(Then::Keep));
    let (first, second) = tokio::join!(request.clone().send(), request.send());
    assert_eq!((first.body, s.m.count()), (second.body, 3));
    assert!(s.m.received().iter().all(|seen| seen.line().contains(SLACK)));
}
