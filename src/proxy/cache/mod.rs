//! Provider tokens in memory: served until shortly before they expire, fetched once for any number of equal requests.
//!
//! All state is in one map ([`store`]) behind one std mutex, held for a few look-ups and never across an `.await`.
//! Expiry is checked against the wall clock on every use; where upstream's clock differs, against the later of the two.
//! A fetch ([`flight`]) runs in a task of its own, so a client disconnect does not cancel it. Its answer is stored only
//! if the flight is still the one registered for its key when it ends; a revocation, a change of principal or a forced
//! refresh discards answers in flight that way. Errors are shared with the requests already waiting and never stored,
//! except a 429, which is repeated until its `Retry-After` has passed. Nothing is written to disk. Rules: docs/http.md
//! section 1.

mod flight;
mod grant;
mod store;

use std::future::Future;
use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use lru::DefaultHasher;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::error::RequestError;
use super::key::{Subject, TokenRequest};
use super::reply::Answer;
use super::stats::CacheUse;
use crate::credential::{Identity, Principal};
use crate::os::clock::{Clock, Timestamp};
pub use flight::interrupted;
use store::{ParsedRequest, Store};

/// Longer bodies are parsed every time, in bytes.
const MAX_INDEXED_BYTES: usize = 1024;

/// What is stored and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of entries.
    pub max_entries: NonZeroUsize,
    /// A token that expires within this time is not served.
    pub buffer: Duration,
    /// No token is served for longer than this. Zero turns the cache off, but not single flight.
    pub max_age: Duration,
}

/// A token request, and what else decides whether a stored token may answer it.
#[derive(Debug, Clone)]
pub struct CacheRequest {
    /// The parsed request.
    pub token_request: TokenRequest,
    /// Its connector, decoded.
    pub connector: String,
    /// `Cache-Control: no-cache`: fetch a fresh token.
    pub forced: bool,
    /// The client process, if it names itself.
    pub client: Option<Client>,
}

/// A process that named itself in `Sidecar-Client`. Only a keyed hash of the name is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client(u64);

/// An answer that needs no upstream request.
#[derive(Debug)]
pub enum Found {
    /// A stored token.
    Hit {
        /// The stored answer.
        answer: Arc<Answer>,
        /// The reply's headers, with `Age` and the remaining lifetime in the cache.
        headers: Arc<HeaderMap>,
        /// The time of the lookup.
        at: Timestamp,
    },
    /// Upstream's last 429, whose `Retry-After` has not passed yet.
    RateLimited {
        /// The 429, or the sidecar's own error if upstream's body cannot be passed on.
        result: UpstreamResult,
        /// Time since it was received.
        age: Duration,
        /// Time until upstream is asked again.
        left: Duration,
    },
}

/// The result of a lookup by the bytes of a request, without parsing it.
#[derive(Debug)]
pub enum ByteLookup {
    /// The answer.
    Found(Found),
    /// No answer, but the request was parsed before, to this.
    Parsed(TokenRequest),
    /// The bytes are not known.
    Unknown,
}

/// Upstream's answer, or the error that replaces it.
pub type UpstreamResult = Result<Arc<Answer>, RequestError>;

/// The result of a fetch, shared by all requests that waited for it.
#[derive(Debug, Clone)]
pub struct FetchResult {
    /// Upstream's answer, or the error that replaces it.
    pub result: UpstreamResult,
    /// For how long the answer will be served from the cache, if it was stored.
    pub stored_for: Option<Duration>,
}

/// The result of [`Cache::fetch`].
#[derive(Debug)]
pub enum Fetched {
    /// The cache had an answer after all.
    Found(Found),
    /// Upstream was asked, for this request or for an equal one.
    Upstream(CacheUse, FetchResult),
}

/// A stored token, for the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredToken {
    /// The connector's uid, or the name that it was requested by.
    pub connector: String,
    /// The kind of subject.
    pub subject: Subject,
    /// When it was stored.
    pub stored_at: Timestamp,
    /// Upstream's `expiresAt`.
    pub expires_at: Timestamp,
    /// Number of cache hits.
    pub hits: u64,
}

/// The cache. Clones share one state.
#[derive(Clone)]
pub struct Cache {
    store: Arc<Mutex<Store>>,
    limits: Limits,
    clock: Clock,
    tasks: TaskTracker,
    hasher: DefaultHasher,
}

impl Cache {
    /// An empty cache for the principal of `identity`; fetches run in `tasks`. When the principal changes, everything
    /// of the previous one is dropped before the next lookup.
    pub fn new(limits: Limits, identity: watch::Receiver<Arc<Identity>>, clock: Clock, tasks: TaskTracker) -> Self {
        let store = Arc::new(Mutex::new(Store::new(limits, identity)));
        Self { store, limits, clock, tasks, hasher: DefaultHasher::default() }
    }

    /// Whether tokens are stored at all.
    pub fn is_on(&self) -> bool {
        !self.limits.max_age.is_zero()
    }

    /// The client of this name.
    pub fn client(&self, name: &[u8]) -> Client {
        Client(self.hasher.hash_one(name))
    }

    /// Answers a request by its bytes, if [`Cache::find`] has remembered them for this principal. A hit needs no other
    /// lookup.
    pub fn find_by_bytes(
        &self,
        principal: &Principal,
        path: &str,
        body: &[u8],
        forced: bool,
        client: Option<Client>,
    ) -> ByteLookup {
        let hash = self.hasher.hash_one((path, body));
        let now = self.clock.latest();
        let mut store = self.lock();
        if store.principal.as_ref() != Some(principal) {
            return ByteLookup::Unknown;
        }
        let token_request = match store.parsed.get(&hash) {
            Some(parsed) if *parsed.path == *path && *parsed.body == *body => parsed.token_request,
            _ => return ByteLookup::Unknown,
        };
        match store.lookup(&token_request, forced, client, now) {
            Ok(found) => ByteLookup::Found(found),
            Err(_) => ByteLookup::Parsed(token_request),
        }
    }

    /// Answers a request from the cache, if the rules allow it, and remembers for `principal` what its bytes were
    /// parsed to. A body with a third party's token is not remembered.
    pub fn find(&self, principal: &Principal, path: &str, body: &[u8], request: &CacheRequest) -> Option<Found> {
        let CacheRequest { token_request, forced, client, .. } = request;
        let hash = self.hasher.hash_one((path, body));
        let now = self.clock.latest();
        let may_remember = body.len() <= MAX_INDEXED_BYTES && token_request.subject != Subject::Token;
        let mut store = self.lock();
        if may_remember && store.principal.as_ref() == Some(principal) {
            let parsed = ParsedRequest { path: path.into(), body: body.into(), token_request: *token_request };
            store.parsed.put(hash, parsed);
        }
        store.lookup(token_request, *forced, *client, now).ok()
    }

    /// Answers from the cache; else waits for the fetch of the request's key, which is started with `upstream` if there
    /// is none. `principal` is the one whose credential `upstream` sends.
    pub async fn fetch<F>(&self, request: CacheRequest, principal: &Principal, upstream: impl FnOnce() -> F) -> Fetched
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let (cache_use, mut flight) = match self.join_or_start(request, principal, upstream) {
            Ok(found) => return Fetched::Found(found),
            Err(flight) => flight,
        };
        let result = match flight.wait_for(Option::is_some).await {
            Ok(result) => result.clone(),
            Err(_) => None,
        };
        Fetched::Upstream(
            cache_use,
            result.unwrap_or_else(|| FetchResult { result: Err(interrupted()), stored_for: None }),
        )
    }

    /// Drops all tokens of a connector, given by any of its names, and discards answers in flight. Returns the number
    /// of tokens dropped.
    pub fn evict(&self, connector: &str) -> usize {
        self.lock().evict(connector)
    }

    /// Drops everything and discards answers in flight. Returns the number of tokens dropped.
    pub fn clear(&self) -> usize {
        let mut store = self.lock();
        let dropped = store.entries.len();
        store.clear();
        dropped
    }

    /// The tokens that would be served now, most recently used first.
    pub fn tokens(&self) -> Vec<StoredToken> {
        let now = self.clock.latest();
        let store = self.lock();
        let live = store.entries.iter().filter(|(_, entry)| !entry.ttl(&self.limits, now).is_zero());
        live.map(|(_, entry)| StoredToken {
            connector: entry.names.display_name().to_owned(),
            subject: entry.subject,
            stored_at: entry.stored_at,
            expires_at: entry.expires_at,
            hits: entry.hits,
        })
        .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        // A panic under the lock leaves nothing worse behind than a token to be fetched again.
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.follow_identity();
        store
    }
}

#[cfg(test)]
mod tests;
