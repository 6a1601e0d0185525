//! Measures the pure functions of a cache hit: guard, route, cache key, cache lookup.
//!
//! `cargo bench --bench hot_path` measures each of them; `-- --test` runs each once. A hit does not parse the body:
//! only the first request with the same bytes computes `key`. Complete requests are measured by the bench `loopback`.

#![allow(missing_docs, clippy::unwrap_used, clippy::disallowed_methods)]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use connect_sidecar::credential::{Credential, Identity, TokenState};
use connect_sidecar::os::clock::Clock;
use connect_sidecar::proxy::cache::{ByteLookup, Cache, CacheRequest, Found, Limits};
use connect_sidecar::proxy::guard::{self, ListenerKind, Policy};
use connect_sidecar::proxy::reply::Answer;
use connect_sidecar::proxy::{key, route};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode};
use tokio_util::task::TaskTracker;

const PATH: &str = "/v1/connect/token/slack%2Facme-slack";
/// A body as the TypeScript SDK sends it.
const BODY: &[u8] = br#"{"subject":{"type":"user","id":"user_123"},"scopes":["chat:write","users:read"]}"#;

/// A request's head as Node's `fetch` sends it.
fn head() -> Parts {
    let request = Request::post(PATH)
        .header("host", "127.0.0.1:2774")
        .header("connection", "keep-alive")
        .header("accept", "application/json")
        .header("content-type", "application/json")
        .header("accept-language", "*")
        .header("sec-fetch-mode", "cors")
        .header("user-agent", "node")
        .header("accept-encoding", "gzip, deflate")
        .header("content-length", BODY.len());
    request.body(()).unwrap().into_parts().0
}

fn identity() -> Identity {
    let credential = Credential::access_token("token".to_owned().into(), None);
    Identity::first(TokenState::Loaded(Arc::new(credential)))
}

/// A cache with this many tokens, including the one for [`PATH`] and [`BODY`].
fn filled(identity: &Identity, entries: usize) -> Cache {
    let limits = Limits {
        max_entries: NonZeroUsize::new(1024).unwrap(),
        buffer: Duration::from_secs(30),
        max_age: Duration::from_secs(24 * 3600),
    };
    let clock = Clock::system();
    let cache = Cache::new(limits, watch::channel(Arc::new(identity.clone())).1, clock.clone(), TaskTracker::new());
    let principal = identity.principal().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for n in (0..entries).rev() {
        let (path, connector) = match n {
            0 => (PATH.to_owned(), "slack/acme-slack".to_owned()),
            n => (format!("/v1/connect/token/oauth%2Fc{n}"), format!("oauth/c{n}")),
        };
        let token_request = key::parse(principal, &connector, BODY).unwrap();
        let body = format!(
            r#"{{"token":"xoxb-{n:036}","expiresAt":{},"connector":{{"id":"scl_{n}","uid":"{connector}","type":"slack"}}}}"#,
            clock.now().plus(Duration::from_secs(3600)).as_millis()
        );
        let answer = Answer::new(StatusCode::OK, &HeaderMap::new(), body.as_bytes());
        let request = CacheRequest { token_request, connector, forced: false, client: None };
        runtime.block_on(cache.fetch(request.clone(), principal, || async { Ok(answer) }));
        cache.find(principal, &path, BODY, &request);
    }
    cache
}

fn hot_path(c: &mut Criterion) {
    let (head, policy, identity) = (head(), Policy::default(), identity());
    let listener = ListenerKind::Loopback(2774);
    let principal = identity.principal().unwrap();
    c.bench_function("guard", |b| b.iter(|| guard::check(black_box(&head), listener, &policy).unwrap()));
    c.bench_function("route", |b| b.iter(|| route::parse(&Method::POST, black_box(PATH), None).unwrap()));
    c.bench_function("key", |b| b.iter(|| key::parse(principal, "slack/acme-slack", black_box(BODY)).unwrap()));
    let mut group = c.benchmark_group("cache hit among");
    for entries in [1, 1000] {
        let cache = filled(&identity, entries);
        group.bench_with_input(BenchmarkId::from_parameter(entries), &cache, |b, cache| {
            b.iter(|| match cache.find_by_bytes(principal, black_box(PATH), black_box(BODY), false, None) {
                ByteLookup::Found(found @ Found::Hit { .. }) => found,
                other => panic!("{other:?}"),
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hot_path);
criterion_main!(benches);
