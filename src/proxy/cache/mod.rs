//! Provider tokens in memory: served until shortly before they end, fetched once for any number of equal requests.
//!
//! All state is in one map behind one std lock, held for a few look-ups and never across an `.await`. Expiry is checked
//! against the wall clock on every use; where upstream's clock differs, against the later of the two. A fetch (a *flight*)
//! runs in a task of its own, so a client disconnect does not cancel it. Its answer is stored only if the flight is still
//! the one registered for its key when it ends: that is how a revocation, a change of principal or a forced refresh
//! discards answers in flight. Errors are shared with those already waiting and never stored, except a 429, which is
//! held for its `Retry-After`. Nothing is written to disk. Rules: docs/http.md section 1.

mod grant;

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::BuildHasher;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use lru::{DefaultHasher, LruCache};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use grant::{Grant, Names, could_be_among, hold_time};

use super::error::{Code, RequestError};
use super::key::{Key, Subject, TokenRequest};
use super::reply::{Answer, HitHeaders};
use crate::credential::{Identity, Principal};
use crate::os::clock::{Clock, Timestamp};

/// A larger answer is not stored, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// All stored answers together, in bytes.
const MAX_TOTAL_BYTES: usize = 4 * 1024 * 1024;
/// A longer body is parsed each time.
const MAX_INDEXED_BYTES: usize = 1024;
/// Processes remembered as having been given a token.
const MAX_CLIENTS: usize = 256;

/// What is stored and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most entries.
    pub max_entries: NonZeroUsize,
    /// A token this close to its end is not served.
    pub buffer: Duration,
    /// No token is served longer than this; zero turns the cache off, not single flight.
    pub max_age: Duration,
}

/// A token request with what else decides whether a stored token may answer it.
#[derive(Debug, Clone)]
pub struct CacheRequest {
    /// The token request.
    pub request: TokenRequest,
    /// Of which connector, decoded.
    pub connector: String,
    /// `Cache-Control: no-cache`.
    pub forced: bool,
    /// The process that asks, if it names itself.
    pub client: Option<Client>,
}

/// A process that named itself in `Sidecar-Client`; only a keyed hash of the name is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client(u64);

/// Answered without upstream.
#[derive(Debug)]
pub enum Found {
    /// A stored token.
    Hit {
        /// The reply.
        answer: Arc<Answer>,
        /// Its headers, which say how old it is and how long it will be served.
        headers: Arc<HeaderMap>,
        /// When it was judged.
        at: Timestamp,
    },
    /// Upstream's 429, held.
    Held {
        /// The reply, or our own error where upstream's was no proper answer.
        outcome: Outcome,
        /// Since it came.
        age: Duration,
        /// Until upstream is asked again.
        left: Duration,
    },
}

/// What is known of a request by its bytes, without parsing it.
#[derive(Debug)]
pub enum ByteLookup {
    /// Answered.
    Found(Found),
    /// Nothing to answer it with, but this is what it parses to.
    Known(TokenRequest),
    /// Never seen.
    Unknown,
}

/// How a request that was not answered at once got its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It sent the request, because nothing was stored.
    Led,
    /// It sent the request, because it was forced.
    Forced,
    /// It waited for the flight of an equal request (RFC 9211's `collapsed`).
    Collapsed,
}

/// Upstream's answer, or why there is none.
pub type Outcome = Result<Arc<Answer>, RequestError>;

/// The result of a flight, shared by all who waited for it.
#[derive(Debug, Clone)]
pub struct FetchResult {
    /// Upstream's answer, or why there is none.
    pub outcome: Outcome,
    /// If it was stored, for how long it will be served.
    pub stored: Option<Duration>,
}

/// The result of [`Cache::fetch`].
#[derive(Debug)]
pub enum Fetched {
    /// Answered without upstream after all.
    Found(Found),
    /// A flight fetched it.
    Flight(Role, FetchResult),
}

/// A stored token, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredToken {
    /// The connector's uid, or the name it was requested by.
    pub connector: String,
    /// The kind of subject.
    pub subject: Subject,
    /// When it came.
    pub stored_at: Timestamp,
    /// Upstream's `expiresAt`.
    pub expires_at: Timestamp,
    /// How often it was served from the cache.
    pub hits: u64,
}

/// The cache. Clones share one state.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Mutex<Inner>>,
    limits: Limits,
    clock: Clock,
    tasks: TaskTracker,
    hasher: DefaultHasher,
}

struct Inner {
    identity: watch::Receiver<Arc<Identity>>,
    /// Of the newest identity seen; what belongs to another principal is not stored.
    principal: Option<Principal>,
    entries: LruCache<Key, Entry>,
    /// Sum of the entries' body lengths.
    bytes: usize,
    /// Requests already parsed, by a keyed hash of their bytes, so that a hit needs no parsing.
    by_bytes: LruCache<u64, KnownBytes>,
    flights: HashMap<Key, Flight>,
    holds: HashMap<Key, Hold>,
    next_flight: u64,
}

/// A request as it was written, with what it was parsed to. Many of them have one key.
struct KnownBytes {
    path: Box<str>,
    body: Box<[u8]>,
    request: TokenRequest,
}

struct Entry {
    answer: Arc<Answer>,
    headers: HitHeaders,
    stored_at: Timestamp,
    expires_at: Timestamp,
    names: Names,
    subject: Subject,
    hits: u64,
    /// Who was given this very token.
    given: VecDeque<Client>,
}

struct Flight {
    id: u64,
    connector: String,
    /// The flight's request wants a token that outlives this.
    buffer: Duration,
    result: watch::Receiver<Option<FetchResult>>,
    waiting: Vec<Client>,
}

struct Hold {
    outcome: Outcome,
    since: Timestamp,
    until: Timestamp,
}

/// Nothing may be served; `forced` if that is because a fresh token is wanted.
struct Miss {
    forced: bool,
}

impl Cache {
    /// An empty cache for the principal of `identity`, whose flights run in `tasks`. Once that changes, what belongs to
    /// the earlier principal is dropped before anything else is answered.
    pub fn new(limits: Limits, identity: watch::Receiver<Arc<Identity>>, clock: Clock, tasks: TaskTracker) -> Self {
        let mut inner = Inner {
            principal: None,
            identity,
            entries: LruCache::new(limits.max_entries),
            bytes: 0,
            by_bytes: LruCache::new(limits.max_entries.saturating_mul(NonZeroUsize::MIN.saturating_add(1))),
            flights: HashMap::new(),
            holds: HashMap::new(),
            next_flight: 0,
        };
        inner.follow_identity();
        Self { inner: Arc::new(Mutex::new(inner)), limits, clock, tasks, hasher: DefaultHasher::default() }
    }

    /// Whether anything is ever stored.
    pub fn is_on(&self) -> bool {
        !self.limits.max_age.is_zero()
    }

    /// The process that names itself so.
    pub fn client(&self, name: &[u8]) -> Client {
        Client(self.hasher.hash_one(name))
    }

    /// Answers a request by its bytes, if it was [remembered](Cache::find) for this principal. The only look-up of a hit.
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
        let mut inner = self.lock();
        if inner.principal.as_ref() != Some(principal) {
            return ByteLookup::Unknown;
        }
        let request = match inner.by_bytes.get(&hash) {
            Some(known) if *known.path == *path && *known.body == *body => known.request,
            _ => return ByteLookup::Unknown,
        };
        match inner.judge(&request, forced, client, &self.limits, now) {
            Ok(found) => ByteLookup::Found(found),
            Err(_) => ByteLookup::Known(request),
        }
    }

    /// Answers from what is stored or held, if the rules allow it, and remembers what the bytes of this request were
    /// parsed to for `principal`; not those of a body that holds somebody's token.
    pub fn find(&self, principal: &Principal, path: &str, body: &[u8], request: &CacheRequest) -> Option<Found> {
        let hash = self.hasher.hash_one((path, body));
        let now = self.clock.latest();
        let is_kept = body.len() <= MAX_INDEXED_BYTES && request.request.subject != Subject::Token;
        let mut inner = self.lock();
        if is_kept && inner.principal.as_ref() == Some(principal) {
            let known = KnownBytes { path: path.into(), body: body.into(), request: request.request };
            inner.by_bytes.put(hash, known);
        }
        inner.judge(&request.request, request.forced, request.client, &self.limits, now).ok()
    }

    /// Answers from what is stored or held; else waits for the flight of its key, which is started with `upstream` if there
    /// is none. `principal` is whose credential `upstream` sends.
    pub async fn fetch<F>(&self, request: CacheRequest, principal: &Principal, upstream: impl FnOnce() -> F) -> Fetched
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let (role, mut flight) = match self.join_or_start(request, principal, upstream) {
            Ok(found) => return Fetched::Found(found),
            Err(flight) => flight,
        };
        let result = match flight.wait_for(Option::is_some).await {
            Ok(result) => result.clone(),
            Err(_) => None,
        };
        Fetched::Flight(role, result.unwrap_or_else(|| FetchResult { outcome: Err(broken_off()), stored: None }))
    }

    /// What answers at once; failing that, the flight to wait for. A request that joins one keeps nothing of `upstream`
    /// while it waits.
    fn join_or_start<F>(
        &self,
        request: CacheRequest,
        principal: &Principal,
        upstream: impl FnOnce() -> F,
    ) -> Result<Found, (Role, watch::Receiver<Option<FetchResult>>)>
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let CacheRequest { request: TokenRequest { key, validity_buffer, .. }, client, .. } = request;
        let buffer = self.limits.buffer.max(validity_buffer);
        let now = self.clock.latest();
        let mut inner = self.lock();
        let forced = match inner.judge(&request.request, request.forced, client, &self.limits, now) {
            Ok(found) => return Ok(found),
            Err(Miss { forced }) => forced,
        };
        if let Some(flight) = inner.flights.get_mut(&key)
            && !forced
            && flight.buffer >= buffer
        {
            flight.waiting.extend(client);
            return Err((Role::Collapsed, flight.result.clone()));
        }
        let replaced = if forced { inner.remove(&key) } else { None };
        let role = if forced { Role::Forced } else { Role::Led };
        inner.next_flight += 1;
        let id = inner.next_flight;
        let (sender, result) = watch::channel(None);
        if inner.principal.as_ref() == Some(principal) {
            let (connector, waiting) = (request.connector.clone(), client.into_iter().collect());
            // In the place of an earlier one, whose answer reaches its callers but not the cache.
            inner.flights.insert(key, Flight { id, connector, buffer, result: result.clone(), waiting });
        }
        let mut guard = FlightGuard { cache: self.clone(), id, request, replaced, sender };
        let upstream = upstream();
        self.tasks.spawn(async move {
            let outcome = upstream.await;
            guard.finish(outcome);
        });
        Err((role, result))
    }

    /// Drops all that is stored for a connector, whichever of its names is given, and discards answers in
    /// flight. Returns how many tokens were dropped.
    pub fn evict(&self, connector: &str) -> usize {
        let mut inner = self.lock();
        let mut aliases = HashSet::from([connector.to_owned()]);
        loop {
            let before = aliases.len();
            for (_, entry) in &inner.entries {
                if entry.names.0.iter().any(|name| aliases.contains(name)) {
                    aliases.extend(entry.names.0.iter().cloned());
                }
            }
            if aliases.len() == before {
                break;
            }
        }
        let doomed: Vec<Key> = inner
            .entries
            .iter()
            .filter(|(_, entry)| entry.names.0.iter().any(|name| aliases.contains(name)))
            .map(|(key, _)| *key)
            .collect();
        for key in &doomed {
            inner.remove(key);
        }
        inner.flights.retain(|_, flight| !could_be_among(&flight.connector, &aliases));
        doomed.len()
    }

    /// Drops everything and discards answers in flight. Returns how many tokens were dropped.
    pub fn clear(&self) -> usize {
        let mut inner = self.lock();
        let dropped = inner.entries.len();
        inner.clear();
        dropped
    }

    /// The tokens that would be served now, the most recently used first.
    pub fn tokens(&self) -> Vec<StoredToken> {
        let now = self.clock.latest();
        let inner = self.lock();
        let live = inner.entries.iter().filter(|(_, entry)| !entry.left(&self.limits, now).is_zero());
        live.map(|(_, entry)| StoredToken {
            connector: entry.names.shown().to_owned(),
            subject: entry.subject,
            stored_at: entry.stored_at,
            expires_at: entry.expires_at,
            hits: entry.hits,
        })
        .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic under the lock can leave no half-done change that matters: at worst a token is fetched again.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // An error says that no other identity will come.
        if inner.identity.has_changed().unwrap_or(true) {
            inner.follow_identity();
        }
        inner
    }
}

/// Ends a flight with its outcome, also when its task panics.
struct FlightGuard {
    cache: Cache,
    id: u64,
    request: CacheRequest,
    /// What was dropped for a forced request.
    replaced: Option<Entry>,
    sender: watch::Sender<Option<FetchResult>>,
}

impl FlightGuard {
    fn finish(&mut self, outcome: Result<Answer, RequestError>) {
        let outcome = outcome.map(Arc::new);
        let mut inner = self.cache.lock();
        let key = self.request.request.key;
        let is_registered = inner.flights.get(&key).is_some_and(|flight| flight.id == self.id);
        let mut stored = None;
        if is_registered && let Some(flight) = inner.flights.remove(&key) {
            let now = self.cache.clock.latest();
            if let Ok(answer) = &outcome {
                stored = inner.store(&self.request, answer, flight.waiting, &self.cache.limits, now);
            }
            inner.hold(key, &outcome, now);
            // What never went out replaces nothing.
            if outcome.as_ref().is_err_and(RequestError::is_unsent)
                && let Some(entry) = self.replaced.take()
            {
                inner.put(key, entry);
            }
        }
        // Sent under the lock: a later look-up finds either the flight or what it stored.
        self.sender.send_replace(Some(FetchResult { outcome, stored }));
    }
}

impl Drop for FlightGuard {
    fn drop(&mut self) {
        if self.sender.borrow().is_none() {
            self.finish(Err(broken_off()));
        }
    }
}

/// The error for a request whose task ended without an outcome.
pub fn broken_off() -> RequestError {
    RequestError::new(Code::UpstreamInvalidResponse, "The request to Connect broke off in the sidecar. Try again.")
}

impl Inner {
    fn follow_identity(&mut self) {
        let principal = self.identity.borrow_and_update().principal().cloned();
        if self.principal != principal {
            self.principal = principal;
            self.clear();
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
        self.flights.clear();
        self.holds.clear();
        self.by_bytes.clear();
    }

    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.pop(key)?;
        self.bytes -= entry.answer.body.len();
        Some(entry)
    }

    /// Stores an entry in the place of any other of its key, and drops what there is too much.
    fn put(&mut self, key: Key, entry: Entry) {
        self.remove(&key);
        self.bytes += entry.answer.body.len();
        if let Some((_, dropped)) = self.entries.push(key, entry) {
            self.bytes -= dropped.answer.body.len();
        }
        while self.bytes > MAX_TOTAL_BYTES
            && let Some((_, dropped)) = self.entries.pop_lru()
        {
            self.bytes -= dropped.answer.body.len();
        }
    }

    /// Finds what may be served.
    fn judge(
        &mut self,
        request: &TokenRequest,
        mut forced: bool,
        client: Option<Client>,
        limits: &Limits,
        now: Timestamp,
    ) -> Result<Found, Miss> {
        if !forced && let Some(entry) = self.entries.get_mut(&request.key) {
            let ttl = entry.left(limits, now);
            if ttl.is_zero() {
                self.remove(&request.key);
            } else if entry.expires_at.since(now) > request.validity_buffer {
                if client.is_some_and(|client| entry.given.contains(&client)) {
                    // It has this token and it is still good: its own cache would have answered, had it not been
                    // told to refresh.
                    forced = true;
                } else {
                    entry.give(client);
                    entry.hits += 1;
                    let headers = entry.headers.at(&entry.answer, ttl, now.since(entry.stored_at));
                    return Ok(Found::Hit { answer: entry.answer.clone(), headers, at: now });
                }
            }
        }
        match self.holds.get(&request.key) {
            Some(hold) if hold.holds_at(now) => Ok(Found::Held {
                outcome: hold.outcome.clone(),
                age: now.since(hold.since),
                left: hold.until.since(now),
            }),
            _ => Err(Miss { forced }),
        }
    }

    /// Stores the answer if it is a token that may be served again; returns for how long it will be.
    fn store(
        &mut self,
        request: &CacheRequest,
        answer: &Arc<Answer>,
        given: Vec<Client>,
        limits: &Limits,
        now: Timestamp,
    ) -> Option<Duration> {
        if request.request.subject == Subject::Token || answer.body.len() > MAX_ANSWER_BYTES {
            return None;
        }
        let grant = Grant::read(answer)?;
        let mut entry = Entry {
            answer: answer.clone(),
            headers: HitHeaders::default(),
            stored_at: now,
            expires_at: grant.expires_at,
            names: grant.names(&request.connector),
            subject: request.request.subject,
            hits: 0,
            given: VecDeque::new(),
        };
        for client in given {
            entry.give(Some(client));
        }
        let ttl = entry.left(limits, now);
        if ttl.is_zero() {
            return None;
        }
        self.put(request.request.key, entry);
        Some(ttl)
    }

    /// Holds the outcome if it is upstream's 429.
    fn hold(&mut self, key: Key, outcome: &Outcome, now: Timestamp) {
        self.holds.retain(|_, hold| hold.holds_at(now));
        let (status, retry_after) = match outcome {
            Ok(answer) => (Some(answer.status), answer.retry_after()),
            // Not its own status: the sidecar refuses with 429, too.
            Err(error) => (error.upstream_status, error.retry_after.as_ref().and_then(|value| value.to_str().ok())),
        };
        if status == Some(StatusCode::TOO_MANY_REQUESTS) {
            let until = now.plus(hold_time(retry_after, now));
            self.holds.insert(key, Hold { outcome: outcome.clone(), since: now, until });
        }
    }
}

impl Hold {
    /// A clock set back ends it, too.
    fn holds_at(&self, now: Timestamp) -> bool {
        self.since <= now && now < self.until
    }
}

impl Entry {
    /// What is left of its life in the cache; zero if it may not be served.
    fn left(&self, limits: &Limits, now: Timestamp) -> Duration {
        let end = self.expires_at.minus(limits.buffer).min(self.stored_at.plus(limits.max_age));
        end.since(now)
    }

    fn give(&mut self, client: Option<Client>) {
        if let Some(client) = client {
            if self.given.len() == MAX_CLIENTS {
                self.given.pop_front();
            }
            self.given.push_back(client);
        }
    }
}

#[cfg(test)]
mod tests;
