//! Provider tokens in memory: served until shortly before they end, fetched once for any number of equal requests.
//!
//! All state is in one map behind one std lock, held for a few look-ups and never across an `.await`. Expiry is judged
//! by the wall clock at every use, and by the later one where upstream's differs. A fetch (a *flight*) runs in a task of its own, so a caller that goes away cancels
//! nothing; its answer is stored only if the flight is still the one registered for its key when it lands, which is how
//! a revocation, a change of principal or a forced refresh discards answers still in the air. Errors are shared with
//! those already waiting and never stored, save a 429, which is held for its `Retry-After`. Nothing goes to disk.
//! Rules: docs/http.md section 1.

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
use super::key::{Asked, Key, Subject};
use super::reply::{Answer, HitHeaders};
use crate::credential::{Identity, Principal};
use crate::os::clock::{Clock, Timestamp};

/// A larger answer is not stored, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// All stored answers together, in bytes.
const MAX_TOTAL_BYTES: usize = 4 * 1024 * 1024;
/// A longer body is parsed each time.
const MAX_SPELLING_BYTES: usize = 1024;
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

/// One token request, as the cache sees it.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What is asked for.
    pub asked: Asked,
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

/// What is known of a request by the bytes it is written in.
#[derive(Debug)]
pub enum Spelled {
    /// Answered.
    Found(Found),
    /// Nothing to answer it with, but this is what it asks for.
    Known(Asked),
    /// Never seen.
    Unknown,
}

/// How a request that was not [`Found`] got its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It sent the request, because nothing was stored.
    Led,
    /// It sent the request, because it was forced.
    Forced,
    /// It joined another caller's.
    Joined,
}

/// Upstream's answer, or why there is none.
pub type Outcome = Result<Arc<Answer>, RequestError>;

/// What a flight brought, shared by all who waited.
#[derive(Debug, Clone)]
pub struct Landed {
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
    /// A flight brought it.
    Landed(Role, Landed),
}

/// A stored token, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredToken {
    /// The connector's uid, or what it was asked for by.
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
    /// The newest identity seen; what belongs to another principal is not stored.
    generation: u64,
    principal: Option<Principal>,
    entries: LruCache<Key, Entry>,
    /// Sum of the entries' body lengths.
    bytes: usize,
    /// Requests already parsed, by a keyed hash of their bytes, so that a hit needs no parsing.
    spellings: LruCache<u64, Spelling>,
    flights: HashMap<Key, Flight>,
    holds: HashMap<Key, Hold>,
    next_flight: u64,
}

/// How a request was written and what it asks for: many spellings have one key.
struct Spelling {
    path: Box<str>,
    body: Box<[u8]>,
    asked: Asked,
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
    /// The leader asked for a token that outlives this.
    buffer: Duration,
    landing: watch::Receiver<Option<Landed>>,
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
    /// An empty cache whose flights run in `tasks`.
    pub fn new(limits: Limits, clock: Clock, tasks: TaskTracker) -> Self {
        let inner = Inner {
            generation: 0,
            principal: None,
            entries: LruCache::new(limits.max_entries),
            bytes: 0,
            spellings: LruCache::new(limits.max_entries.saturating_mul(NonZeroUsize::MIN.saturating_add(1))),
            flights: HashMap::new(),
            holds: HashMap::new(),
            next_flight: 0,
        };
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

    /// Forgets what belongs to another principal than `identity`'s. Snapshots older than the newest seen change nothing.
    pub fn follow(&self, identity: &Identity) {
        self.lock().follow(identity);
    }

    /// Answers a request written as one seen before, as [`Cache::find`] would. The one look-up of a hit.
    pub fn find_spelled(
        &self,
        identity: &Identity,
        path: &str,
        body: &[u8],
        forced: bool,
        client: Option<Client>,
    ) -> Spelled {
        let hash = self.hasher.hash_one((path, body));
        let now = self.clock.latest();
        let mut inner = self.lock();
        inner.follow(identity);
        // Spellings are the newest principal's: a request that began before it has none.
        if inner.generation != identity.generation {
            return Spelled::Unknown;
        }
        let asked = match inner.spellings.get(&hash) {
            Some(spelling) if *spelling.path == *path && *spelling.body == *body => spelling.asked,
            _ => return Spelled::Unknown,
        };
        match inner.judge(&asked, forced, client, &self.limits, now) {
            Ok(found) => Spelled::Found(found),
            Err(_) => Spelled::Known(asked),
        }
    }

    /// Remembers what a request for `identity` asks for. Bodies that hold somebody's token are not kept.
    pub fn remember(&self, identity: &Identity, path: &str, body: &[u8], asked: Asked) {
        if body.len() > MAX_SPELLING_BYTES || asked.subject == Subject::Token {
            return;
        }
        let hash = self.hasher.hash_one((path, body));
        let mut inner = self.lock();
        if inner.generation == identity.generation {
            inner.spellings.put(hash, Spelling { path: path.into(), body: body.into(), asked });
        }
    }

    /// Answers from what is stored or held, if the rules allow it.
    pub fn find(&self, ask: &Ask) -> Option<Found> {
        let now = self.clock.latest();
        self.lock().judge(&ask.asked, ask.forced, ask.client, &self.limits, now).ok()
    }

    /// As [`Cache::find`], else joins the flight for the same key, else starts one with `upstream`.
    /// `identity` is whose answer it will be.
    pub async fn fetch<F>(&self, ask: Ask, identity: &Identity, upstream: impl FnOnce() -> F) -> Fetched
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let (role, mut landing) = match self.board(ask, identity, upstream) {
            Ok(found) => return Fetched::Found(found),
            Err(boarded) => boarded,
        };
        let landed = match landing.wait_for(Option::is_some).await {
            Ok(landed) => landed.clone(),
            Err(_) => None,
        };
        Fetched::Landed(role, landed.unwrap_or_else(|| Landed { outcome: Err(broken_off()), stored: None }))
    }

    /// What answers at once; failing that, the flight to wait for, joined or started. Whoever joins keeps nothing of
    /// `upstream` while it waits.
    fn board<F>(
        &self,
        ask: Ask,
        identity: &Identity,
        upstream: impl FnOnce() -> F,
    ) -> Result<Found, (Role, watch::Receiver<Option<Landed>>)>
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let buffer = self.limits.buffer.max(ask.asked.validity_buffer);
        let now = self.clock.latest();
        let mut inner = self.lock();
        inner.follow(identity);
        let forced = match inner.judge(&ask.asked, ask.forced, ask.client, &self.limits, now) {
            Ok(found) => return Ok(found),
            Err(Miss { forced }) => forced,
        };
        if let Some(flight) = inner.flights.get_mut(&ask.asked.key)
            && !forced
            && flight.buffer >= buffer
        {
            flight.waiting.extend(ask.client);
            return Err((Role::Joined, flight.landing.clone()));
        }
        let replaced = if forced { inner.remove(&ask.asked.key) } else { None };
        let is_current = inner.principal.as_ref() == identity.principal();
        let role = if forced { Role::Forced } else { Role::Led };
        Err((role, self.take_off(&mut inner, ask, buffer, is_current, replaced, upstream())))
    }

    /// Starts a flight. It replaces an earlier one for its key, whose answer will reach its callers but not the cache.
    fn take_off<F>(
        &self,
        inner: &mut Inner,
        ask: Ask,
        buffer: Duration,
        is_current: bool,
        replaced: Option<Entry>,
        upstream: F,
    ) -> watch::Receiver<Option<Landed>>
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        inner.next_flight += 1;
        let id = inner.next_flight;
        let (landing, landed) = watch::channel(None);
        if is_current {
            let flight = Flight {
                id,
                connector: ask.connector.clone(),
                buffer,
                landing: landed.clone(),
                waiting: ask.client.into_iter().collect(),
            };
            inner.flights.insert(ask.asked.key, flight);
        }
        let mut runway = Runway { cache: self.clone(), id, ask, replaced, landing };
        self.tasks.spawn(async move {
            let outcome = upstream.await;
            runway.land(outcome);
        });
        landed
    }

    /// Drops all that is stored for a connector, whichever of its names is given, and discards answers still in the
    /// air. Returns how many tokens were dropped.
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

    /// Drops everything and discards answers still in the air. Returns how many tokens were dropped.
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
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a flight lands, also when its task panics.
struct Runway {
    cache: Cache,
    id: u64,
    ask: Ask,
    /// What was dropped for a forced request.
    replaced: Option<Entry>,
    landing: watch::Sender<Option<Landed>>,
}

impl Runway {
    fn land(&mut self, outcome: Result<Answer, RequestError>) {
        let outcome = outcome.map(Arc::new);
        let mut inner = self.cache.lock();
        let key = self.ask.asked.key;
        let is_registered = inner.flights.get(&key).is_some_and(|flight| flight.id == self.id);
        let mut stored = None;
        if is_registered && let Some(flight) = inner.flights.remove(&key) {
            let now = self.cache.clock.latest();
            if let Ok(answer) = &outcome {
                stored = inner.store(&self.ask, answer, flight.waiting, &self.cache.limits, now);
            }
            inner.hold(key, &outcome, now);
            // What never went out replaces nothing.
            if outcome.as_ref().is_err_and(RequestError::is_unsent)
                && let Some(entry) = self.replaced.take()
            {
                inner.put(key, entry);
            }
        }
        // Told under the lock: whoever looks afterwards finds either the flight or what it stored.
        self.landing.send_replace(Some(Landed { outcome, stored }));
    }
}

impl Drop for Runway {
    fn drop(&mut self) {
        if self.landing.borrow().is_none() {
            self.land(Err(broken_off()));
        }
    }
}

/// The error for a request whose task ended without an outcome.
pub fn broken_off() -> RequestError {
    RequestError::new(Code::UpstreamInvalidResponse, "The request to Connect broke off in the sidecar. Try again.")
}

impl Inner {
    fn follow(&mut self, identity: &Identity) {
        if identity.generation > self.generation {
            self.generation = identity.generation;
            if self.principal.as_ref() != identity.principal() {
                self.principal = identity.principal().cloned();
                self.clear();
            }
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
        self.flights.clear();
        self.holds.clear();
        self.spellings.clear();
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
        asked: &Asked,
        mut forced: bool,
        client: Option<Client>,
        limits: &Limits,
        now: Timestamp,
    ) -> Result<Found, Miss> {
        if !forced && let Some(entry) = self.entries.get_mut(&asked.key) {
            let ttl = entry.left(limits, now);
            if ttl.is_zero() {
                self.remove(&asked.key);
            } else if entry.expires_at.since(now) > asked.validity_buffer {
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
        match self.holds.get(&asked.key) {
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
        ask: &Ask,
        answer: &Arc<Answer>,
        given: Vec<Client>,
        limits: &Limits,
        now: Timestamp,
    ) -> Option<Duration> {
        if ask.asked.subject == Subject::Token || answer.body.len() > MAX_ANSWER_BYTES {
            return None;
        }
        let grant = Grant::read(answer)?;
        let mut entry = Entry {
            answer: answer.clone(),
            headers: HitHeaders::default(),
            stored_at: now,
            expires_at: grant.expires_at,
            names: grant.names(&ask.connector),
            subject: ask.asked.subject,
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
        self.put(ask.asked.key, entry);
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
