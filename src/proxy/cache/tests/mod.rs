//! The rules of docs/http.md section 1, on a clock that stands still.

mod schedules;

use std::sync::atomic::{AtomicU32, Ordering};

use secrecy::SecretString;
use tokio::sync::oneshot;

use super::*;
use crate::credential::{Credential, TokenState as IdentityState};
use crate::os::safe_read::Defect;
use crate::proxy::key;

const NOW_MS: u64 = 1_900_000_000_000;

struct Bench {
    cache: Cache,
    clock: Clock,
    identity: watch::Sender<Arc<Identity>>,
    /// Requests that went upstream.
    upstream: Arc<AtomicU32>,
}

fn limits() -> Limits {
    Limits {
        max_entries: NonZeroUsize::new(8).expect("not zero"),
        buffer: Duration::from_secs(30),
        max_age: Duration::from_secs(24 * 3600),
    }
}

fn identity_of(name: &str, generation: u64) -> Identity {
    let credential = Credential::access_token(SecretString::from(name.to_owned()), None);
    Identity { generation, ..Identity::first(IdentityState::Loaded(Arc::new(credential))) }
}

/// A token answer: its connector has the uid and the id of its name.
fn token(text: &str, expires_in: u64) -> Answer {
    named_token(text, expires_in, "slack/acme", "scl_slack")
}

fn named_token(text: &str, expires_in: u64, uid: &str, id: &str) -> Answer {
    let body = format!(
        r#"{{"token":"{text}","expiresAt":{},"connector":{{"id":"{id}","uid":"{uid}"}}}}"#,
        NOW_MS + expires_in * 1000
    );
    answer(200, &body)
}

fn answer(status: u16, body: &str) -> Answer {
    Answer::new(StatusCode::from_u16(status).expect("a status"), &HeaderMap::new(), body.as_bytes())
}

fn rate_limited(retry_after: Option<&str>) -> Answer {
    let mut headers = HeaderMap::new();
    if let Some(value) = retry_after {
        headers.insert("retry-after", value.parse().expect("a value"));
    }
    Answer::new(StatusCode::TOO_MANY_REQUESTS, &headers, b"{}")
}

impl Bench {
    fn new(limits: Limits) -> Self {
        let clock = Clock::test(Timestamp::from_millis(NOW_MS));
        let (identity, published) = watch::channel(Arc::new(identity_of("ada", 1)));
        let cache = Cache::new(limits, published, clock.clone(), TaskTracker::new());
        Self { cache, clock, identity, upstream: Arc::default() }
    }

    fn publish(&self, identity: Identity) {
        self.identity.send_replace(Arc::new(identity));
    }

    fn principal(&self) -> Principal {
        self.identity.borrow().principal().expect("a principal").clone()
    }

    fn ask(&self, connector: &str, body: &str) -> CacheRequest {
        let request = key::parse(&self.principal(), connector, body.as_bytes()).expect("an object");
        CacheRequest { request, connector: connector.into(), forced: false, client: None }
    }

    fn plain(&self) -> CacheRequest {
        self.ask("slack/acme", "{}")
    }

    fn forced(&self) -> CacheRequest {
        CacheRequest { forced: true, ..self.plain() }
    }

    fn by(&self, client: &str) -> CacheRequest {
        CacheRequest { client: Some(self.cache.client(client.as_bytes())), ..self.plain() }
    }

    /// Asks, with this answer ready upstream.
    async fn get(&self, ask: CacheRequest, answer: Answer) -> Fetched {
        let (upstream, principal) = (self.upstream.clone(), self.principal());
        let fetched = self.cache.fetch(ask, &principal, || async move {
            upstream.fetch_add(1, Ordering::Relaxed);
            Ok(answer)
        });
        fetched.await
    }

    /// Asks with an answer that comes when told. Returns once the request waits.
    async fn held(&self, ask: CacheRequest) -> (oneshot::Sender<Answer>, tokio::task::JoinHandle<Fetched>) {
        let (tell, told) = oneshot::channel::<Answer>();
        let (cache, principal, upstream) = (self.cache.clone(), self.principal(), self.upstream.clone());
        let (request, was_asked) = oneshot::channel::<()>();
        let fetching = tokio::spawn(async move {
            let fetched = cache.fetch(ask, &principal, || {
                let _ = request.send(());
                async move {
                    upstream.fetch_add(1, Ordering::Relaxed);
                    Ok(told.await.expect("told"))
                }
            });
            fetched.await
        });
        // A request that joins drops its word unsent.
        let _ = was_asked.await;
        (tell, fetching)
    }

    fn requests(&self) -> u32 {
        self.upstream.load(Ordering::Relaxed)
    }

    fn pass(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }
}

/// How it was answered, and with what.
fn told(fetched: Fetched) -> (String, String) {
    let text = |answer: &Answer| {
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        json["token"].as_str().unwrap_or("none").to_owned()
    };
    match fetched {
        Fetched::Found(Found::Hit { answer, headers, .. }) => {
            let status = headers["cache-status"].to_str().expect("text");
            (status.trim_start_matches("connect-sidecar; ").to_owned(), text(&answer))
        }
        Fetched::Found(Found::Held { left, .. }) => (format!("held for {} s", left.as_secs()), "none".into()),
        Fetched::Flight(role, result) => {
            let stored = result.stored.map_or("not stored".to_owned(), |ttl| format!("stored for {} s", ttl.as_secs()));
            let text = result.outcome.map_or_else(|e| e.code.as_str().to_owned(), |answer| text(&answer));
            (format!("{role:?}, {stored}"), text)
        }
    }
}

fn said(how: &str, token: &str) -> (String, String) {
    (how.into(), token.into())
}

#[tokio::test]
async fn a_token_is_served_until_its_buffer_begins() {
    let bench = Bench::new(limits());
    assert_eq!(told(bench.get(bench.plain(), token("a", 3600)).await), said("Led, stored for 3570 s", "a"));
    bench.pass(3569);
    assert_eq!(told(bench.get(bench.plain(), token("b", 9999)).await), said("hit; ttl=1", "a"));
    bench.pass(1);
    assert_eq!(told(bench.get(bench.plain(), token("b", 9999)).await), said("Led, stored for 6399 s", "b"));
    assert_eq!(bench.requests(), 2);
}

#[tokio::test]
async fn a_token_is_served_no_longer_than_max_age() {
    let bench = Bench::new(Limits { max_age: Duration::from_secs(60), ..limits() });
    assert_eq!(told(bench.get(bench.plain(), token("a", 999_999)).await), said("Led, stored for 60 s", "a"));
    bench.pass(59);
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await), said("hit; ttl=1", "a"));
    bench.pass(1);
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).1, "b");
}

#[tokio::test]
async fn a_requests_own_buffer_counts_where_it_is_larger() {
    let bench = Bench::new(limits());
    let with_buffer = |ms: u64| bench.ask("slack/acme", &format!(r#"{{"validityBufferMs":{ms}}}"#));
    bench.get(bench.plain(), token("a", 100)).await;
    assert_eq!(told(bench.get(with_buffer(99_999), token("b", 100)).await).0, "hit; ttl=70", "one key for all");
    assert_eq!(told(bench.get(with_buffer(100_000), token("b", 100)).await), said("Led, stored for 70 s", "b"));
    assert_eq!(told(bench.get(bench.plain(), token("c", 100)).await), said("hit; ttl=70", "b"));
}

#[tokio::test]
async fn only_a_proper_token_is_stored() {
    for body in [
        r#"{"token":"a"}"#,
        r#"{"token":"a","expiresAt":null}"#,
        r#"{"token":"a","expiresAt":"1900003600000"}"#,
        r#"{"token":"a","expiresAt":1900003600}"#,
        r#"{"token":"a","expiresAt":-1}"#,
        r#"{"token":"a","expiresAt":1e999}"#,
        r#"{"token":"a","expiresAt":1900000030000}"#,
        r#"{"token":"","expiresAt":1900003600000}"#,
        r#"{"token":7,"expiresAt":1900003600000}"#,
        r#"{"expiresAt":1900003600000}"#,
        "{}",
    ] {
        let bench = Bench::new(limits());
        for _ in 0..2 {
            assert!(told(bench.get(bench.plain(), answer(200, body)).await).0.contains("not stored"), "{body}");
        }
        assert_eq!(bench.requests(), 2, "{body}");
    }
    let good = r#"{"token":"a","expiresAt":1900003600000.5,"connector":"odd"}"#;
    for (status, stored) in [(200, true), (201, false), (404, false), (500, false)] {
        let bench = Bench::new(limits());
        let how = told(bench.get(bench.plain(), answer(status, good)).await).0;
        assert_eq!(how.contains("not stored"), !stored, "{status}");
    }
}

#[tokio::test]
async fn what_holds_a_third_partys_token_or_too_much_is_never_stored() {
    let bench = Bench::new(limits());
    let exchange = bench.ask("slack/acme", r#"{"subject":{"type":"token","token":"x"}}"#);
    assert_eq!(told(bench.get(exchange, token("a", 3600)).await).0, "Led, not stored");
    let empty = token("", 3600).body.len();
    for (body_length, how) in [(64 * 1024, "Led, stored for 3570 s"), (64 * 1024 + 1, "Led, not stored")] {
        let bench = Bench::new(limits());
        let long = token(&"x".repeat(body_length - empty), 3600);
        assert_eq!(told(bench.get(bench.plain(), long).await).0, how);
    }
}

#[tokio::test]
async fn a_forced_request_replaces_what_is_stored() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    assert_eq!(told(bench.get(bench.forced(), token("b", 3600)).await), said("Forced, stored for 3570 s", "b"));
    assert_eq!(told(bench.get(bench.plain(), token("c", 3600)).await).1, "b");
    bench.get(bench.forced(), answer(500, "{}")).await;
    assert_eq!(told(bench.get(bench.plain(), token("c", 3600)).await).1, "c", "the old one is gone once request anew");
}

#[tokio::test]
async fn a_forced_request_that_was_held_back_replaces_nothing() {
    for code in [Code::LocalRateLimit, Code::Overloaded] {
        let bench = Bench::new(limits());
        bench.get(bench.plain(), token("a", 3600)).await;
        let principal = bench.principal();
        let refused = bench.cache.fetch(bench.forced(), &principal, || async move {
            let mut error = RequestError::new(code, "");
            error.retry_after = Some(60.into());
            Err(error)
        });
        assert_eq!(told(refused.await), said("Forced, not stored", code.as_str()));
        assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).1, "a");
        let fetched = bench.get(bench.forced(), token("c", 3600)).await;
        assert_eq!(told(fetched), said("Forced, stored for 3570 s", "c"), "{code:?} is not upstream's, to be held");
    }
}

#[tokio::test]
async fn a_forced_request_neither_joins_an_earlier_flight_nor_is_replaced_by_it() {
    let bench = Bench::new(limits());
    let (tell_early, early) = bench.held(bench.plain()).await;
    let (tell_forced, forced) = bench.held(bench.forced()).await;
    tell_forced.send(token("fresh", 3600)).expect("it waits");
    assert_eq!(told(forced.await.expect("no panic")), said("Forced, stored for 3570 s", "fresh"));
    tell_early.send(token("stale", 3600)).expect("it waits");
    assert_eq!(told(early.await.expect("no panic")), said("Led, not stored", "stale"));
    assert_eq!(told(bench.get(bench.plain(), token("x", 3600)).await).1, "fresh");
}

#[tokio::test]
async fn a_process_that_asks_again_for_a_good_token_is_given_a_fresh_one() {
    let bench = Bench::new(limits());
    bench.get(bench.by("one"), token("a", 3600)).await;
    assert_eq!(told(bench.get(bench.by("two"), token("b", 3600)).await).1, "a", "another process");
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).1, "a", "one without a name");
    assert_eq!(told(bench.get(bench.by("one"), token("b", 3600)).await), said("Forced, stored for 3570 s", "b"));
    assert_eq!(told(bench.get(bench.by("two"), token("c", 3600)).await).1, "b", "it has not been given this one");
    assert_eq!(told(bench.get(bench.by("two"), token("c", 3600)).await).1, "c");
    bench.pass(3600);
    assert_eq!(told(bench.get(bench.by("two"), token("d", 9999)).await).0, "Led, stored for 6369 s", "it was over");
}

#[tokio::test]
async fn those_who_joined_were_given_the_token_too() {
    let bench = Bench::new(limits());
    let (tell, leader) = bench.held(bench.by("one")).await;
    let (_, joined) = bench.held(bench.by("two")).await;
    tell.send(token("a", 3600)).expect("it waits");
    assert_eq!(told(leader.await.expect("no panic")).1, "a");
    assert_eq!(told(joined.await.expect("no panic")), said("Collapsed, stored for 3570 s", "a"));
    assert_eq!(told(bench.get(bench.by("two"), token("b", 3600)).await).1, "b");
}

#[tokio::test]
async fn a_thousand_equal_requests_at_once_share_one_and_its_error() {
    let bench = Bench::new(limits());
    let (tell, leader) = bench.held(bench.plain()).await;
    let mut joined = Vec::new();
    for _ in 0..999 {
        joined.push(bench.held(bench.ask("slack/acme", r#"{"validityBufferMs":1}"#)).await.1);
    }
    tell.send(answer(500, "{}")).expect("it waits");
    assert_eq!(told(leader.await.expect("no panic")).0, "Led, not stored");
    for one in joined {
        assert_eq!(told(one.await.expect("no panic")).0, "Collapsed, not stored");
    }
    assert_eq!(bench.requests(), 1);
    assert_eq!(told(bench.get(bench.plain(), token("a", 3600)).await).1, "a", "an error does not stick");
}

#[tokio::test]
async fn a_request_with_a_larger_buffer_does_not_join_one_with_a_smaller() {
    let bench = Bench::new(limits());
    let (tell_small, small) = bench.held(bench.plain()).await;
    let (tell_large, large) = bench.held(bench.ask("slack/acme", r#"{"validityBufferMs":600000}"#)).await;
    let (_, joins) = bench.held(bench.plain()).await;
    tell_small.send(token("short", 100)).expect("it waits");
    tell_large.send(token("long", 3600)).expect("it waits");
    assert_eq!(told(small.await.expect("no panic")).1, "short");
    assert_eq!(told(large.await.expect("no panic")).1, "long");
    assert_eq!(told(joins.await.expect("no panic")).1, "long");
    assert_eq!(told(bench.get(bench.plain(), token("x", 3600)).await).1, "long");
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_nothing() {
    let bench = Bench::new(limits());
    let (tell, leader) = bench.held(bench.plain()).await;
    leader.abort();
    let _ = leader.await;
    let (_, joined) = bench.held(bench.plain()).await;
    tell.send(token("a", 3600)).expect("the flight goes on");
    assert_eq!(told(joined.await.expect("no panic")), said("Collapsed, stored for 3570 s", "a"));
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn a_flight_that_panics_answers_and_does_not_block_its_key() {
    let bench = Bench::new(limits());
    let principal = bench.principal();
    let fetched = bench.cache.fetch(bench.plain(), &principal, || async { panic!("on purpose") });
    assert_eq!(told(fetched.await), said("Led, not stored", "upstream_invalid_response"));
    assert_eq!(told(bench.get(bench.plain(), token("a", 3600)).await).1, "a");
}

#[tokio::test]
async fn a_429_is_held_for_its_retry_after() {
    for (retry_after, seconds) in [
        (None, 1),
        (Some("2"), 2),
        (Some("0"), 0),
        (Some("3600"), 60),
        (Some("99999999999999999999"), 60),
        (Some("-5"), 1),
        (Some("soon"), 1),
        (Some(""), 1),
        (Some("Mon, 18 Mar 2030 12:00:05 GMT"), 0),
        (Some("Sun, 17 Mar 2030 17:46:50 GMT"), 10),
    ] {
        let bench = Bench::new(limits());
        bench.get(bench.plain(), rate_limited(retry_after)).await;
        if seconds > 0 {
            let how = told(bench.get(bench.forced(), token("a", 3600)).await).0;
            assert_eq!(how, format!("held for {seconds} s"), "{retry_after:?}, even if forced");
            assert_eq!(told(bench.get(bench.ask("other/one", "{}"), token("o", 3600)).await).1, "o");
        }
        bench.pass(seconds);
        let expected = if retry_after == Some("Mon, 18 Mar 2030 12:00:05 GMT") { "none" } else { "a" };
        assert_eq!(told(bench.get(bench.plain(), token("a", 3600)).await).1, expected, "{retry_after:?}");
    }
}

#[tokio::test]
async fn a_429_whose_body_is_not_passed_on_is_held_too() {
    let bench = Bench::new(limits());
    let principal = bench.principal();
    let refused = bench.cache.fetch(bench.plain(), &principal, || async {
        let mut error = RequestError::new(Code::UpstreamInvalidResponse, "");
        error.upstream_status = Some(StatusCode::TOO_MANY_REQUESTS);
        error.retry_after = Some(7.into());
        Err(error)
    });
    refused.await;
    assert_eq!(told(bench.get(bench.plain(), token("a", 3600)).await).0, "held for 7 s");
}

#[tokio::test]
async fn a_clock_that_jumps_a_day_or_over_a_sleep_is_followed_at_once() {
    const DAY: u64 = 24 * 3600;
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    bench.get(bench.ask("other/one", "{}"), rate_limited(Some("60"))).await;

    bench.clock.set(Timestamp::from_millis(NOW_MS - DAY * 1000));
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).1, "a", "it is still good");
    let other = bench.get(bench.ask("other/one", "{}"), token("o", 3600)).await;
    assert_eq!(told(other).1, "o", "a day more would be too long to hold a 429");
    assert_eq!(bench.cache.tokens().len(), 2);

    for (later, expires_in) in [(13 * 3600, 14 * 3600), (DAY, DAY + 7200)] {
        bench.clock.set(Timestamp::from_millis(NOW_MS + later * 1000));
        assert_eq!(bench.cache.tokens(), [], "after {later} s");
        let fresh = bench.get(bench.plain(), token("fresh", expires_in)).await;
        assert_eq!(told(fresh).1, "fresh", "after {later} s");
        bench.cache.clear();
        bench.clock.set(Timestamp::from_millis(NOW_MS));
        bench.get(bench.plain(), token("a", 3600)).await;
    }
}

#[tokio::test]
async fn the_least_recently_used_goes_first() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::new(2).expect("not zero"), ..limits() });
    let ask = |n: u32| bench.ask(&format!("c/{n}"), "{}");
    bench.get(ask(1), token("1", 3600)).await;
    bench.get(ask(2), token("2", 3600)).await;
    bench.get(ask(1), token("x", 3600)).await;
    bench.get(ask(3), token("3", 3600)).await;
    assert_eq!(told(bench.get(ask(1), token("x", 3600)).await).1, "1");
    assert_eq!(told(bench.get(ask(2), token("2 again", 3600)).await).1, "2 again");
    assert_eq!(bench.cache.tokens().len(), 2);
}

#[tokio::test]
async fn all_answers_together_are_bounded() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::new(1000).expect("not zero"), ..limits() });
    for n in 0..80 {
        bench.get(bench.ask(&format!("c/{n}"), "{}"), token(&"x".repeat(60_000), 3600)).await;
    }
    let counted = || {
        let inner = bench.cache.lock();
        let actual: usize = inner.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
        assert_eq!(inner.bytes, actual);
        actual
    };
    let full = counted();
    const MAX: usize = 4 * 1024 * 1024;
    assert!(full <= MAX && full > MAX - 70_000, "{full}");
    // What is replaced, evicted or dropped for want of entries is counted off.
    let forced = CacheRequest { forced: true, ..bench.ask("c/79", "{}") };
    bench.get(forced, token("short", 3600)).await;
    assert!(counted() < full - 50_000);
    assert!(bench.cache.evict("slack/acme") > 0);
    assert_eq!(counted(), 0);
}

#[tokio::test]
async fn what_is_dropped_for_want_of_entries_is_counted_off() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::MIN, ..limits() });
    for n in 0..3 {
        bench.get(bench.ask(&format!("c/{n}"), "{}"), token("same", 3600)).await;
    }
    let inner = bench.cache.lock();
    let actual: usize = inner.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
    assert_eq!((inner.entries.len(), inner.bytes), (1, actual));
}

#[tokio::test]
async fn a_body_that_holds_somebodys_token_or_is_long_is_not_kept() {
    let bench = Bench::new(limits());
    let path = "/v1/connect/token/slack%2Facme";
    let plain = |length: usize| format!(r#"{{"a":"{}"}}"#, "x".repeat(length - 8));
    for (body, is_kept) in [
        (r#"{"subject":{"type":"token","token":"x"}}"#.to_owned(), false),
        (plain(MAX_INDEXED_BYTES), true),
        (plain(MAX_INDEXED_BYTES + 1), false),
        (plain(MAX_INDEXED_BYTES + 2), false),
    ] {
        let principal = bench.principal();
        assert!(bench.cache.find(&principal, path, body.as_bytes(), &bench.ask("slack/acme", &body)).is_none());
        let found = bench.cache.find_by_bytes(&principal, path, body.as_bytes(), false, None);
        assert_eq!(matches!(found, ByteLookup::Known(_)), is_kept, "{} bytes", body.len());
    }
}

#[tokio::test]
async fn a_revocation_drops_a_connectors_tokens_by_any_of_its_names() {
    for name in ["slack/acme", "scl_slack"] {
        let bench = Bench::new(limits());
        let all = [
            (bench.ask("slack/acme", "{}"), true),
            (bench.ask("slack/acme", r#"{"scopes":["x"]}"#), true),
            (bench.ask("scl_slack", "{}"), true),
            (bench.ask("slack/other", "{}"), false),
        ];
        for (ask, doomed) in &all {
            let (uid, id) = if *doomed { ("slack/acme", "scl_slack") } else { ("slack/other", "scl_other") };
            bench.get(ask.clone(), named_token("old", 3600, uid, id)).await;
        }
        assert_eq!(bench.cache.evict(name), 3);
        for (ask, doomed) in all {
            let expected = if doomed { "new" } else { "old" };
            assert_eq!(told(bench.get(ask, token("new", 3600)).await).1, expected, "{name}");
        }
    }
}

#[tokio::test]
async fn an_answer_in_the_air_during_a_revocation_is_not_stored() {
    for (asked_by, revoked_by) in
        [("slack/acme", "slack/acme"), ("slack/acme", "scl_slack"), ("scl_slack", "slack/acme")]
    {
        let bench = Bench::new(limits());
        let (tell, flight) = bench.held(bench.ask(asked_by, "{}")).await;
        bench.cache.evict(revoked_by);
        assert_eq!(told(bench.get(bench.ask(asked_by, "{}"), token("new", 3600)).await).1, "new", "it does not join");
        tell.send(token("old", 3600)).expect("it waits");
        assert_eq!(told(flight.await.expect("no panic")), said("Led, not stored", "old"));
        assert_eq!(told(bench.get(bench.ask(asked_by, "{}"), token("x", 3600)).await).1, "new");
    }
}

#[tokio::test]
async fn a_revocation_leaves_flights_for_other_connectors_alone() {
    let bench = Bench::new(limits());
    bench.get(bench.ask("slack/acme", "{}"), token("a", 3600)).await;
    let (tell_uid, by_uid) = bench.held(bench.ask("slack/other", "{}")).await;
    let (tell_id, by_id) = bench.held(bench.ask("scl_other", "{}")).await;
    bench.cache.evict("slack/acme");
    tell_uid.send(named_token("u", 3600, "slack/other", "scl_other")).expect("it waits");
    tell_id.send(named_token("i", 3600, "slack/other", "scl_other")).expect("it waits");
    assert_eq!(told(by_uid.await.expect("no panic")).0, "Led, stored for 3570 s");
    assert_eq!(told(by_id.await.expect("no panic")).0, "Led, stored for 3570 s");
}

#[tokio::test]
async fn another_principal_finds_nothing_and_leaves_nothing_of_the_one_before() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("ada's", 3600)).await;
    let (tell, flight) = bench.held(bench.ask("other/one", "{}")).await;
    let (ada, of_ada) = (bench.principal(), bench.plain());

    bench.publish(identity_of("bob", 2));
    assert_eq!(told(bench.get(bench.plain(), token("bob's", 3600)).await).1, "bob's");
    tell.send(token("late", 3600)).expect("it waits");
    assert_eq!(told(flight.await.expect("no panic")), said("Led, not stored", "late"));
    assert_eq!(bench.cache.tokens().len(), 1);

    // A request that began before the change does not bring the old principal back.
    let stray = bench.cache.fetch(of_ada, &ada, || async { Ok(token("stray", 3600)) }).await;
    assert_eq!(told(stray), said("Led, not stored", "stray"));
    assert_eq!(told(bench.get(bench.plain(), token("x", 3600)).await).1, "bob's");
}

#[tokio::test]
async fn a_fresh_token_of_the_same_principal_keeps_the_cache() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    bench.publish(identity_of("ada", 2));
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).1, "a");
}

#[tokio::test]
async fn a_request_that_began_before_a_rotation_shares_and_is_stored_like_any_other() {
    let bench = Bench::new(limits());
    bench.publish(identity_of("ada", 2));
    let (tell, leader) = bench.held(bench.plain()).await;
    let (_, joined) = bench.held(bench.plain()).await;
    tell.send(token("a", 3600)).expect("it waits");
    assert_eq!(told(leader.await.expect("no panic")), said("Led, stored for 3570 s", "a"));
    assert_eq!(told(joined.await.expect("no panic")), said("Collapsed, stored for 3570 s", "a"));
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn an_unreadable_token_keeps_the_cache_and_a_missing_one_empties_it() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    let last = Some(bench.principal());
    let state = IdentityState::Invalid { reason: Defect::in_content("torn"), last };
    bench.publish(Identity { generation: 2, ..Identity::first(state) });
    assert_eq!(bench.cache.tokens().len(), 1);
    bench.publish(Identity { generation: 3, ..Identity::first(IdentityState::Missing) });
    assert_eq!(bench.cache.tokens().len(), 0);
}

#[tokio::test]
async fn single_flight_and_holding_work_with_the_cache_off() {
    let bench = Bench::new(Limits { max_age: Duration::ZERO, ..limits() });
    let (tell, leader) = bench.held(bench.plain()).await;
    let (_, joined) = bench.held(bench.plain()).await;
    tell.send(token("a", 3600)).expect("it waits");
    assert_eq!(told(leader.await.expect("no panic")), said("Led, not stored", "a"));
    assert_eq!(told(joined.await.expect("no panic")), said("Collapsed, not stored", "a"));
    assert_eq!(bench.requests(), 1);
    bench.get(bench.plain(), rate_limited(Some("5"))).await;
    assert_eq!(told(bench.get(bench.plain(), token("b", 3600)).await).0, "held for 5 s");
}

#[tokio::test]
async fn a_request_with_known_bytes_is_answered_without_parsing() {
    let bench = Bench::new(limits());
    let (path, body) = ("/v1/connect/token/slack%2Facme", b"{ }");
    let principal = bench.principal();
    let find = |path: &str, body: &[u8]| bench.cache.find_by_bytes(&principal, path, body, false, None);
    bench.get(bench.plain(), token("a", 3600)).await;
    assert!(matches!(find(path, body), ByteLookup::Unknown));
    assert!(bench.cache.find(&principal, path, body, &bench.plain()).is_some());
    assert!(matches!(find(path, body), ByteLookup::Found(_)));
    assert!(matches!(find(path, b"{}"), ByteLookup::Unknown), "other bytes");
    assert!(matches!(find("/v1/connect/token/x", body), ByteLookup::Unknown), "another connector");
    bench.pass(3600);
    assert!(matches!(find(path, body), ByteLookup::Known(_)));
}

#[tokio::test]
async fn what_is_known_by_its_bytes_does_not_outlive_its_principal() {
    let bench = Bench::new(limits());
    let (path, body) = ("/v1/connect/token/slack%2Facme", b"{}");
    let find = |principal: &Principal| bench.cache.find_by_bytes(principal, path, body, false, None);
    let (ada, of_ada) = (bench.principal(), bench.plain());
    bench.get(bench.plain(), token("a", 3600)).await;
    assert!(bench.cache.find(&ada, path, body, &of_ada).is_some());
    bench.publish(identity_of("bob", 2));
    let bob = bench.principal();
    assert!(matches!(find(&bob), ByteLookup::Unknown));
    // Nor does a request that began before the change bring it back.
    assert!(bench.cache.find(&ada, path, body, &of_ada).is_none());
    assert!(matches!(find(&bob), ByteLookup::Unknown));
    // And such a request is not answered with what came after the change.
    assert!(bench.cache.find(&bob, path, body, &bench.plain()).is_none());
    assert!(matches!(find(&bob), ByteLookup::Known(_)));
    assert!(matches!(find(&ada), ByteLookup::Unknown));
}

#[tokio::test]
async fn status_shows_live_tokens_by_uid_with_their_hits() {
    let bench = Bench::new(limits());
    bench.get(bench.ask("scl_slack", r#"{"subject":{"type":"app"}}"#), token("a", 3600)).await;
    bench.get(bench.ask("scl_slack", r#"{"subject":{"type":"app"}}"#), token("a", 3600)).await;
    let expected = StoredToken {
        connector: "slack/acme".into(),
        subject: Subject::App,
        stored_at: Timestamp::from_millis(NOW_MS),
        expires_at: Timestamp::from_millis(NOW_MS + 3_600_000),
        hits: 1,
    };
    assert_eq!(bench.cache.tokens(), [expected]);
    bench.pass(3600);
    assert_eq!(bench.cache.tokens(), []);
}
