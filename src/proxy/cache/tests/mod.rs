//! The rules of docs/http.md section 1, on a test clock.

mod schedules;

use std::sync::atomic::{AtomicU32, Ordering};

use http::StatusCode;
use secrecy::SecretString;
use tokio::sync::oneshot;

use super::*;
use crate::credential::{Credential, TokenState};
use crate::os::safe_read::Defect;
use crate::proxy::error::Code;
use crate::proxy::key::{self, Key};

const NOW_MS: u64 = 1_900_000_000_000;

struct Bench {
    cache: Cache,
    clock: Clock,
    identity: watch::Sender<Arc<Identity>>,
    /// Number of upstream requests.
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
    Identity { generation, ..Identity::first(TokenState::Loaded(Arc::new(credential))) }
}

/// A token answer for the connector slack/acme with the id scl_slack.
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

    fn request(&self, connector: &str, body: &str) -> CacheRequest {
        let token_request = key::parse(&self.principal(), connector, body.as_bytes()).expect("an object");
        CacheRequest { token_request, connector: connector.into(), forced: false, client: None }
    }

    fn plain(&self) -> CacheRequest {
        self.request("slack/acme", "{}")
    }

    fn forced(&self) -> CacheRequest {
        CacheRequest { forced: true, ..self.plain() }
    }

    fn client_request(&self, client: &str) -> CacheRequest {
        CacheRequest { client: Some(self.cache.client(client.as_bytes())), ..self.plain() }
    }

    /// Sends a request that upstream would answer with `answer`.
    async fn get(&self, request: CacheRequest, answer: Answer) -> Fetched {
        let (upstream, principal) = (self.upstream.clone(), self.principal());
        let fetched = self.cache.fetch(request, &principal, || async move {
            upstream.fetch_add(1, Ordering::Relaxed);
            Ok(answer)
        });
        fetched.await
    }

    /// Sends a request whose upstream answer is sent later. Returns once the request waits for it.
    async fn start(&self, request: CacheRequest) -> (oneshot::Sender<Answer>, tokio::task::JoinHandle<Fetched>) {
        let (sender, receiver) = oneshot::channel::<Answer>();
        let (cache, principal, upstream) = (self.cache.clone(), self.principal(), self.upstream.clone());
        let (started, has_started) = oneshot::channel::<()>();
        let fetching = tokio::spawn(async move {
            let fetched = cache.fetch(request, &principal, || {
                let _ = started.send(());
                async move {
                    upstream.fetch_add(1, Ordering::Relaxed);
                    Ok(receiver.await.expect("an answer"))
                }
            });
            fetched.await
        });
        // A request that joins a flight drops its sender.
        let _ = has_started.await;
        (sender, fetching)
    }

    fn requests(&self) -> u32 {
        self.upstream.load(Ordering::Relaxed)
    }

    fn advance(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }
}

/// How a request was answered, and with which token or error.
fn summary(fetched: Fetched) -> (String, String) {
    let text = |answer: &Answer| {
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        json["token"].as_str().unwrap_or("none").to_owned()
    };
    match fetched {
        Fetched::Found(Found::Hit { answer, headers, .. }) => {
            let status = headers["cache-status"].to_str().expect("text");
            (status.trim_start_matches("connect-sidecar; ").to_owned(), text(&answer))
        }
        Fetched::Found(Found::RateLimited { left, .. }) => {
            (format!("rate limited for {} s", left.as_secs()), "none".into())
        }
        Fetched::Upstream(kind, fetched) => {
            let stored =
                fetched.stored_for.map_or("not stored".to_owned(), |ttl| format!("stored for {} s", ttl.as_secs()));
            let text = fetched.result.map_or_else(|e| e.code.as_str().to_owned(), |answer| text(&answer));
            (format!("{kind:?}, {stored}"), text)
        }
    }
}

fn expected(how: &str, token: &str) -> (String, String) {
    (how.into(), token.into())
}

#[tokio::test]
async fn serves_a_token_until_its_buffer_begins() {
    let bench = Bench::new(limits());
    assert_eq!(summary(bench.get(bench.plain(), token("a", 3600)).await), expected("Miss, stored for 3570 s", "a"));
    bench.advance(3569);
    assert_eq!(summary(bench.get(bench.plain(), token("b", 9999)).await), expected("hit; ttl=1", "a"));
    bench.advance(1);
    assert_eq!(summary(bench.get(bench.plain(), token("b", 9999)).await), expected("Miss, stored for 6399 s", "b"));
    assert_eq!(bench.requests(), 2);
}

#[tokio::test]
async fn serves_a_token_no_longer_than_max_age() {
    let bench = Bench::new(Limits { max_age: Duration::from_secs(60), ..limits() });
    assert_eq!(summary(bench.get(bench.plain(), token("a", 999_999)).await), expected("Miss, stored for 60 s", "a"));
    bench.advance(59);
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await), expected("hit; ttl=1", "a"));
    bench.advance(1);
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).1, "b");
}

#[tokio::test]
async fn uses_the_requests_own_buffer_where_it_is_larger() {
    let bench = Bench::new(limits());
    let with_buffer = |ms: u64| bench.request("slack/acme", &format!(r#"{{"validityBufferMs":{ms}}}"#));
    bench.get(bench.plain(), token("a", 100)).await;
    assert_eq!(summary(bench.get(with_buffer(99_999), token("b", 100)).await).0, "hit; ttl=70", "one key for all");
    assert_eq!(summary(bench.get(with_buffer(100_000), token("b", 100)).await), expected("Miss, stored for 70 s", "b"));
    assert_eq!(summary(bench.get(bench.plain(), token("c", 100)).await), expected("hit; ttl=70", "b"));
}

#[tokio::test]
async fn stores_only_a_valid_token_answer() {
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
            assert!(summary(bench.get(bench.plain(), answer(200, body)).await).0.contains("not stored"), "{body}");
        }
        assert_eq!(bench.requests(), 2, "{body}");
    }
    let good = r#"{"token":"a","expiresAt":1900003600000.5,"connector":"odd"}"#;
    for (status, stored) in [(200, true), (201, false), (404, false), (500, false)] {
        let bench = Bench::new(limits());
        let how = summary(bench.get(bench.plain(), answer(status, good)).await).0;
        assert_eq!(how.contains("not stored"), !stored, "{status}");
    }
}

#[tokio::test]
async fn does_not_store_token_exchanges_or_large_answers() {
    let bench = Bench::new(limits());
    let exchange = bench.request("slack/acme", r#"{"subject":{"type":"token","token":"x"}}"#);
    assert_eq!(summary(bench.get(exchange, token("a", 3600)).await).0, "Miss, not stored");
    let empty = token("", 3600).body.len();
    for (body_length, how) in [(64 * 1024, "Miss, stored for 3570 s"), (64 * 1024 + 1, "Miss, not stored")] {
        let bench = Bench::new(limits());
        let long = token(&"x".repeat(body_length - empty), 3600);
        assert_eq!(summary(bench.get(bench.plain(), long).await).0, how);
    }
}

#[tokio::test]
async fn a_forced_request_replaces_what_is_stored() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    assert_eq!(summary(bench.get(bench.forced(), token("b", 3600)).await), expected("Forced, stored for 3570 s", "b"));
    assert_eq!(summary(bench.get(bench.plain(), token("c", 3600)).await).1, "b");
    bench.get(bench.forced(), answer(500, "{}")).await;
    assert_eq!(
        summary(bench.get(bench.plain(), token("c", 3600)).await).1,
        "c",
        "the old token is gone once a fresh one is requested"
    );
}

#[tokio::test]
async fn a_forced_request_that_was_not_sent_replaces_nothing() {
    for code in [Code::LocalRateLimit, Code::Overloaded] {
        let bench = Bench::new(limits());
        bench.get(bench.plain(), token("a", 3600)).await;
        let principal = bench.principal();
        let refused = bench.cache.fetch(bench.forced(), &principal, || async move {
            let mut error = RequestError::new(code, "");
            error.retry_after = Some(60.into());
            Err(error)
        });
        assert_eq!(summary(refused.await), expected("Forced, not stored", code.as_str()));
        assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).1, "a");
        let fetched = bench.get(bench.forced(), token("c", 3600)).await;
        assert_eq!(
            summary(fetched),
            expected("Forced, stored for 3570 s", "c"),
            "{code:?} is the sidecar's own and is not repeated"
        );
    }
}

#[tokio::test]
async fn a_forced_request_neither_joins_an_earlier_flight_nor_is_replaced_by_it() {
    let bench = Bench::new(limits());
    let (early_sender, early) = bench.start(bench.plain()).await;
    let (forced_sender, forced) = bench.start(bench.forced()).await;
    forced_sender.send(token("fresh", 3600)).expect("a waiting flight");
    assert_eq!(summary(forced.await.expect("no panic")), expected("Forced, stored for 3570 s", "fresh"));
    early_sender.send(token("stale", 3600)).expect("a waiting flight");
    assert_eq!(summary(early.await.expect("no panic")), expected("Miss, not stored", "stale"));
    assert_eq!(summary(bench.get(bench.plain(), token("x", 3600)).await).1, "fresh");
}

#[tokio::test]
async fn a_client_that_asks_again_for_a_valid_token_gets_a_fresh_one() {
    let bench = Bench::new(limits());
    bench.get(bench.client_request("one"), token("a", 3600)).await;
    assert_eq!(summary(bench.get(bench.client_request("two"), token("b", 3600)).await).1, "a", "another client");
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).1, "a", "a client without a name");
    assert_eq!(
        summary(bench.get(bench.client_request("one"), token("b", 3600)).await),
        expected("Forced, stored for 3570 s", "b")
    );
    assert_eq!(
        summary(bench.get(bench.client_request("two"), token("c", 3600)).await).1,
        "b",
        "it has not received this one"
    );
    assert_eq!(summary(bench.get(bench.client_request("two"), token("c", 3600)).await).1, "c");
    bench.advance(3600);
    assert_eq!(
        summary(bench.get(bench.client_request("two"), token("d", 9999)).await).0,
        "Miss, stored for 6369 s",
        "the old token has expired"
    );
}

#[tokio::test]
async fn clients_that_joined_a_flight_count_as_served() {
    let bench = Bench::new(limits());
    let (sender, leader) = bench.start(bench.client_request("one")).await;
    let (_, joined) = bench.start(bench.client_request("two")).await;
    sender.send(token("a", 3600)).expect("a waiting flight");
    assert_eq!(summary(leader.await.expect("no panic")).1, "a");
    assert_eq!(summary(joined.await.expect("no panic")), expected("Collapsed, stored for 3570 s", "a"));
    assert_eq!(summary(bench.get(bench.client_request("two"), token("b", 3600)).await).1, "b");
}

#[tokio::test]
async fn a_thousand_equal_requests_share_one_fetch_and_its_error() {
    let bench = Bench::new(limits());
    let (sender, leader) = bench.start(bench.plain()).await;
    let mut joined = Vec::new();
    for _ in 0..999 {
        joined.push(bench.start(bench.request("slack/acme", r#"{"validityBufferMs":1}"#)).await.1);
    }
    sender.send(answer(500, "{}")).expect("a waiting flight");
    assert_eq!(summary(leader.await.expect("no panic")).0, "Miss, not stored");
    for one in joined {
        assert_eq!(summary(one.await.expect("no panic")).0, "Collapsed, not stored");
    }
    assert_eq!(bench.requests(), 1);
    assert_eq!(summary(bench.get(bench.plain(), token("a", 3600)).await).1, "a", "an error does not stick");
}

#[tokio::test]
async fn a_request_with_a_larger_buffer_does_not_join_a_flight_with_a_smaller_one() {
    let bench = Bench::new(limits());
    let (small_sender, small) = bench.start(bench.plain()).await;
    let (large_sender, large) = bench.start(bench.request("slack/acme", r#"{"validityBufferMs":600000}"#)).await;
    let (_, joins) = bench.start(bench.plain()).await;
    small_sender.send(token("short", 100)).expect("a waiting flight");
    large_sender.send(token("long", 3600)).expect("a waiting flight");
    assert_eq!(summary(small.await.expect("no panic")).1, "short");
    assert_eq!(summary(large.await.expect("no panic")).1, "long");
    assert_eq!(summary(joins.await.expect("no panic")).1, "long");
    assert_eq!(summary(bench.get(bench.plain(), token("x", 3600)).await).1, "long");
}

#[tokio::test]
async fn a_client_disconnect_does_not_cancel_the_fetch() {
    let bench = Bench::new(limits());
    let (sender, leader) = bench.start(bench.plain()).await;
    leader.abort();
    let _ = leader.await;
    let (_, joined) = bench.start(bench.plain()).await;
    sender.send(token("a", 3600)).expect("a running flight");
    assert_eq!(summary(joined.await.expect("no panic")), expected("Collapsed, stored for 3570 s", "a"));
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn a_flight_that_panics_answers_and_does_not_block_its_key() {
    let bench = Bench::new(limits());
    let principal = bench.principal();
    let fetched = bench.cache.fetch(bench.plain(), &principal, || async { panic!("on purpose") });
    assert_eq!(summary(fetched.await), expected("Miss, not stored", "upstream_invalid_response"));
    assert_eq!(summary(bench.get(bench.plain(), token("a", 3600)).await).1, "a");
}

#[tokio::test]
async fn repeats_a_429_until_its_retry_after() {
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
            let how = summary(bench.get(bench.forced(), token("a", 3600)).await).0;
            assert_eq!(how, format!("rate limited for {seconds} s"), "{retry_after:?}, even if forced");
            assert_eq!(summary(bench.get(bench.request("other/one", "{}"), token("o", 3600)).await).1, "o");
        }
        bench.advance(seconds);
        let expected = if retry_after == Some("Mon, 18 Mar 2030 12:00:05 GMT") { "none" } else { "a" };
        assert_eq!(summary(bench.get(bench.plain(), token("a", 3600)).await).1, expected, "{retry_after:?}");
    }
}

#[tokio::test]
async fn repeats_a_429_whose_body_cannot_be_passed_on() {
    let bench = Bench::new(limits());
    let principal = bench.principal();
    let refused = bench.cache.fetch(bench.plain(), &principal, || async {
        let mut error = RequestError::new(Code::UpstreamInvalidResponse, "");
        error.upstream_status = Some(StatusCode::TOO_MANY_REQUESTS);
        error.retry_after = Some(7.into());
        Err(error)
    });
    refused.await;
    assert_eq!(summary(bench.get(bench.plain(), token("a", 3600)).await).0, "rate limited for 7 s");
}

#[tokio::test]
async fn follows_a_clock_that_jumps() {
    const DAY: u64 = 24 * 3600;
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    bench.get(bench.request("other/one", "{}"), rate_limited(Some("60"))).await;

    bench.clock.set(Timestamp::from_millis(NOW_MS - DAY * 1000));
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).1, "a", "it is still valid");
    let other = bench.get(bench.request("other/one", "{}"), token("o", 3600)).await;
    assert_eq!(summary(other).1, "o", "a rate limit does not last a day longer");
    assert_eq!(bench.cache.tokens().len(), 2);

    for (later, expires_in) in [(13 * 3600, 14 * 3600), (DAY, DAY + 7200)] {
        bench.clock.set(Timestamp::from_millis(NOW_MS + later * 1000));
        assert_eq!(bench.cache.tokens(), [], "after {later} s");
        let fresh = bench.get(bench.plain(), token("fresh", expires_in)).await;
        assert_eq!(summary(fresh).1, "fresh", "after {later} s");
        bench.cache.clear();
        bench.clock.set(Timestamp::from_millis(NOW_MS));
        bench.get(bench.plain(), token("a", 3600)).await;
    }
}

#[tokio::test]
async fn drops_the_least_recently_used_entry() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::new(2).expect("not zero"), ..limits() });
    let request = |n: u32| bench.request(&format!("c/{n}"), "{}");
    bench.get(request(1), token("1", 3600)).await;
    bench.get(request(2), token("2", 3600)).await;
    bench.get(request(1), token("x", 3600)).await;
    bench.get(request(3), token("3", 3600)).await;
    assert_eq!(summary(bench.get(request(1), token("x", 3600)).await).1, "1");
    assert_eq!(summary(bench.get(request(2), token("2 again", 3600)).await).1, "2 again");
    assert_eq!(bench.cache.tokens().len(), 2);
}

#[tokio::test]
async fn bounds_the_total_size() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::new(1000).expect("not zero"), ..limits() });
    for n in 0..80 {
        bench.get(bench.request(&format!("c/{n}"), "{}"), token(&"x".repeat(60_000), 3600)).await;
    }
    let counted = || {
        let store = bench.cache.lock();
        let actual: usize = store.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
        assert_eq!(store.bytes, actual);
        actual
    };
    let full = counted();
    const MAX: usize = 4 * 1024 * 1024;
    assert!(full <= MAX && full > MAX - 70_000, "{full}");
    // Replaced and evicted entries are subtracted.
    let forced = CacheRequest { forced: true, ..bench.request("c/79", "{}") };
    bench.get(forced, token("short", 3600)).await;
    assert!(counted() < full - 50_000);
    assert!(bench.cache.evict("slack/acme") > 0);
    assert_eq!(counted(), 0);
}

#[tokio::test]
async fn updates_the_total_size_when_an_entry_is_dropped() {
    let bench = Bench::new(Limits { max_entries: NonZeroUsize::MIN, ..limits() });
    for n in 0..3 {
        bench.get(bench.request(&format!("c/{n}"), "{}"), token("same", 3600)).await;
    }
    let store = bench.cache.lock();
    let actual: usize = store.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
    assert_eq!((store.entries.len(), store.bytes), (1, actual));
}

#[tokio::test]
async fn does_not_remember_long_bodies_or_those_with_a_token() {
    let bench = Bench::new(limits());
    let path = "/v1/connect/token/slack%2Facme";
    let plain = |length: usize| format!(r#"{{"a":"{}"}}"#, "x".repeat(length - 8));
    for (body, is_remembered) in [
        (r#"{"subject":{"type":"token","token":"x"}}"#.to_owned(), false),
        (plain(MAX_INDEXED_BYTES), true),
        (plain(MAX_INDEXED_BYTES + 1), false),
        (plain(MAX_INDEXED_BYTES + 2), false),
    ] {
        let principal = bench.principal();
        assert!(bench.cache.find(&principal, path, body.as_bytes(), &bench.request("slack/acme", &body)).is_none());
        let found = bench.cache.find_by_bytes(&principal, path, body.as_bytes(), false, None);
        assert_eq!(matches!(found, ByteLookup::Parsed(_)), is_remembered, "{} bytes", body.len());
    }
}

#[tokio::test]
async fn a_revocation_drops_a_connectors_tokens_by_any_of_its_names() {
    for name in ["slack/acme", "scl_slack"] {
        let bench = Bench::new(limits());
        let all = [
            (bench.request("slack/acme", "{}"), true),
            (bench.request("slack/acme", r#"{"scopes":["x"]}"#), true),
            (bench.request("scl_slack", "{}"), true),
            (bench.request("slack/other", "{}"), false),
        ];
        for (request, evicted) in &all {
            let (uid, id) = if *evicted { ("slack/acme", "scl_slack") } else { ("slack/other", "scl_other") };
            bench.get(request.clone(), named_token("old", 3600, uid, id)).await;
        }
        assert_eq!(bench.cache.evict(name), 3);
        for (request, evicted) in all {
            let expected = if evicted { "new" } else { "old" };
            assert_eq!(summary(bench.get(request, token("new", 3600)).await).1, expected, "{name}");
        }
    }
}

#[tokio::test]
async fn does_not_store_an_answer_in_flight_during_a_revocation() {
    for (requested_by, revoked_by) in
        [("slack/acme", "slack/acme"), ("slack/acme", "scl_slack"), ("scl_slack", "slack/acme")]
    {
        let bench = Bench::new(limits());
        let (sender, flight) = bench.start(bench.request(requested_by, "{}")).await;
        bench.cache.evict(revoked_by);
        assert_eq!(
            summary(bench.get(bench.request(requested_by, "{}"), token("new", 3600)).await).1,
            "new",
            "it must not join the old flight"
        );
        sender.send(token("old", 3600)).expect("a waiting flight");
        assert_eq!(summary(flight.await.expect("no panic")), expected("Miss, not stored", "old"));
        assert_eq!(summary(bench.get(bench.request(requested_by, "{}"), token("x", 3600)).await).1, "new");
    }
}

#[tokio::test]
async fn a_revocation_leaves_flights_for_other_connectors_alone() {
    let bench = Bench::new(limits());
    bench.get(bench.request("slack/acme", "{}"), token("a", 3600)).await;
    let (uid_sender, by_uid) = bench.start(bench.request("slack/other", "{}")).await;
    let (id_sender, by_id) = bench.start(bench.request("scl_other", "{}")).await;
    bench.cache.evict("slack/acme");
    uid_sender.send(named_token("u", 3600, "slack/other", "scl_other")).expect("a waiting flight");
    id_sender.send(named_token("i", 3600, "slack/other", "scl_other")).expect("a waiting flight");
    assert_eq!(summary(by_uid.await.expect("no panic")).0, "Miss, stored for 3570 s");
    assert_eq!(summary(by_id.await.expect("no panic")).0, "Miss, stored for 3570 s");
}

#[tokio::test]
async fn a_change_of_principal_empties_the_cache() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("ada's", 3600)).await;
    let (sender, flight) = bench.start(bench.request("other/one", "{}")).await;
    let (ada, adas_request) = (bench.principal(), bench.plain());

    bench.publish(identity_of("bob", 2));
    assert_eq!(summary(bench.get(bench.plain(), token("bob's", 3600)).await).1, "bob's");
    sender.send(token("late", 3600)).expect("a waiting flight");
    assert_eq!(summary(flight.await.expect("no panic")), expected("Miss, not stored", "late"));
    assert_eq!(bench.cache.tokens().len(), 1);

    // A request from before the change does not bring the old principal back.
    let stray = bench.cache.fetch(adas_request, &ada, || async { Ok(token("stray", 3600)) }).await;
    assert_eq!(summary(stray), expected("Miss, not stored", "stray"));
    assert_eq!(summary(bench.get(bench.plain(), token("x", 3600)).await).1, "bob's");
}

#[tokio::test]
async fn a_fresh_token_of_the_same_principal_keeps_the_cache() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    bench.publish(identity_of("ada", 2));
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).1, "a");
}

#[tokio::test]
async fn a_rotation_does_not_affect_requests_in_flight() {
    let bench = Bench::new(limits());
    bench.publish(identity_of("ada", 2));
    let (sender, leader) = bench.start(bench.plain()).await;
    let (_, joined) = bench.start(bench.plain()).await;
    sender.send(token("a", 3600)).expect("a waiting flight");
    assert_eq!(summary(leader.await.expect("no panic")), expected("Miss, stored for 3570 s", "a"));
    assert_eq!(summary(joined.await.expect("no panic")), expected("Collapsed, stored for 3570 s", "a"));
    assert_eq!(bench.requests(), 1);
}

#[tokio::test]
async fn an_invalid_token_keeps_the_cache_and_a_missing_one_empties_it() {
    let bench = Bench::new(limits());
    bench.get(bench.plain(), token("a", 3600)).await;
    let last = Some(bench.principal());
    let state = TokenState::Invalid { reason: Defect::in_content("torn"), last };
    bench.publish(Identity { generation: 2, ..Identity::first(state) });
    assert_eq!(bench.cache.tokens().len(), 1);
    bench.publish(Identity { generation: 3, ..Identity::first(TokenState::Missing) });
    assert_eq!(bench.cache.tokens().len(), 0);
}

#[tokio::test]
async fn single_flight_and_rate_limits_work_with_the_cache_off() {
    let bench = Bench::new(Limits { max_age: Duration::ZERO, ..limits() });
    let (sender, leader) = bench.start(bench.plain()).await;
    let (_, joined) = bench.start(bench.plain()).await;
    sender.send(token("a", 3600)).expect("a waiting flight");
    assert_eq!(summary(leader.await.expect("no panic")), expected("Miss, not stored", "a"));
    assert_eq!(summary(joined.await.expect("no panic")), expected("Collapsed, not stored", "a"));
    assert_eq!(bench.requests(), 1);
    bench.get(bench.plain(), rate_limited(Some("5"))).await;
    assert_eq!(summary(bench.get(bench.plain(), token("b", 3600)).await).0, "rate limited for 5 s");
}

#[tokio::test]
async fn answers_known_bytes_without_parsing() {
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
    bench.advance(3600);
    assert!(matches!(find(path, body), ByteLookup::Parsed(_)));
}

#[tokio::test]
async fn parsed_requests_do_not_outlive_their_principal() {
    let bench = Bench::new(limits());
    let (path, body) = ("/v1/connect/token/slack%2Facme", b"{}");
    let find = |principal: &Principal| bench.cache.find_by_bytes(principal, path, body, false, None);
    let (ada, adas_request) = (bench.principal(), bench.plain());
    bench.get(bench.plain(), token("a", 3600)).await;
    assert!(bench.cache.find(&ada, path, body, &adas_request).is_some());
    bench.publish(identity_of("bob", 2));
    let bob = bench.principal();
    assert!(matches!(find(&bob), ByteLookup::Unknown));
    // A request from before the change does not bring it back.
    assert!(bench.cache.find(&ada, path, body, &adas_request).is_none());
    assert!(matches!(find(&bob), ByteLookup::Unknown));
    // It is not answered with what was stored after the change, either.
    assert!(bench.cache.find(&bob, path, body, &bench.plain()).is_none());
    assert!(matches!(find(&bob), ByteLookup::Parsed(_)));
    assert!(matches!(find(&ada), ByteLookup::Unknown));
}

#[tokio::test]
async fn status_shows_live_tokens_by_uid_with_their_hits() {
    let bench = Bench::new(limits());
    bench.get(bench.request("scl_slack", r#"{"subject":{"type":"app"}}"#), token("a", 3600)).await;
    bench.get(bench.request("scl_slack", r#"{"subject":{"type":"app"}}"#), token("a", 3600)).await;
    let expected = StoredToken {
        connector: "slack/acme".into(),
        subject: Subject::App,
        stored_at: Timestamp::from_millis(NOW_MS),
        expires_at: Timestamp::from_millis(NOW_MS + 3_600_000),
        hits: 1,
    };
    assert_eq!(bench.cache.tokens(), [expected]);
    bench.advance(3600);
    assert_eq!(bench.cache.tokens(), []);
}
