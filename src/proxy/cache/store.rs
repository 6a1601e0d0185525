//! The cache's state: entries, rate limits, flights and parsed requests, all of one principal.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use lru::LruCache;
use tokio::sync::watch;

use super::grant::{ConnectorNames, Grant, may_be_named, rate_limit_duration};
use super::{CacheRequest, Client, FetchResult, Found, Limits, UpstreamResult};
use crate::credential::{Identity, Principal};
use crate::os::clock::Timestamp;
use crate::proxy::key::{Key, Subject, TokenRequest};
use crate::proxy::reply::{Answer, HitHeaders};

/// Larger answers are not stored, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Maximum size of all stored answers together, in bytes.
const MAX_TOTAL_BYTES: usize = 4 * 1024 * 1024;
/// Clients remembered per token.
const MAX_CLIENTS: usize = 256;

/// All that the cache's lock protects.
pub(super) struct Store {
    pub(super) identity: watch::Receiver<Arc<Identity>>,
    /// That of the newest identity seen. Nothing of another principal is stored.
    pub(super) principal: Option<Principal>,
    pub(super) entries: LruCache<Key, Entry>,
    /// Sum of the entries' body lengths.
    pub(super) bytes: usize,
    /// Parsed requests by a keyed hash of their bytes, so that a hit needs no parsing.
    pub(super) parsed: LruCache<u64, ParsedRequest>,
    pub(super) flights: HashMap<Key, Flight>,
    rate_limits: HashMap<Key, RateLimit>,
    pub(super) last_flight_id: u64,
    limits: Limits,
}

/// A request's bytes and what they were parsed to. Several of them can have the same key.
pub(super) struct ParsedRequest {
    pub(super) path: Box<str>,
    pub(super) body: Box<[u8]>,
    pub(super) token_request: TokenRequest,
}

/// A stored token.
pub(super) struct Entry {
    pub(super) answer: Arc<Answer>,
    headers: HitHeaders,
    pub(super) stored_at: Timestamp,
    pub(super) expires_at: Timestamp,
    pub(super) names: ConnectorNames,
    pub(super) subject: Subject,
    pub(super) hits: u64,
    /// Clients that have received this token.
    served_to: VecDeque<Client>,
}

impl Entry {
    /// How much longer it may be served; zero if it may not.
    pub(super) fn ttl(&self, limits: &Limits, now: Timestamp) -> Duration {
        let end = self.expires_at.minus(limits.buffer).min(self.stored_at.plus(limits.max_age));
        end.since(now)
    }

    fn add_client(&mut self, client: Client) {
        if self.served_to.len() == MAX_CLIENTS {
            self.served_to.pop_front();
        }
        self.served_to.push_back(client);
    }
}

/// A fetch in flight.
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) connector: String,
    /// Its request needs a token that is valid for longer than this.
    pub(super) buffer: Duration,
    pub(super) result: watch::Receiver<Option<FetchResult>>,
    pub(super) clients: Vec<Client>,
}

/// Upstream's 429 for a key.
struct RateLimit {
    result: UpstreamResult,
    since: Timestamp,
    until: Timestamp,
}

impl RateLimit {
    /// Also over when the clock was set back.
    fn applies_at(&self, now: Timestamp) -> bool {
        self.since <= now && now < self.until
    }
}

/// The cache has no answer. `forced` if a fresh token is wanted.
pub(super) struct Miss {
    pub(super) forced: bool,
}

impl Store {
    pub(super) fn new(limits: Limits, identity: watch::Receiver<Arc<Identity>>) -> Self {
        let principal = identity.borrow().principal().cloned();
        Self {
            principal,
            identity,
            entries: LruCache::new(limits.max_entries),
            bytes: 0,
            parsed: LruCache::new(limits.max_entries.saturating_mul(NonZeroUsize::MIN.saturating_add(1))),
            flights: HashMap::new(),
            rate_limits: HashMap::new(),
            last_flight_id: 0,
            limits,
        }
    }

    /// Drops everything if the principal has changed.
    pub(super) fn follow_identity(&mut self) {
        // An error means that the identity will not change again.
        if !self.identity.has_changed().unwrap_or(true) {
            return;
        }
        let principal = self.identity.borrow_and_update().principal().cloned();
        if self.principal != principal {
            self.principal = principal;
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
        self.flights.clear();
        self.rate_limits.clear();
        self.parsed.clear();
    }

    /// Answers a request from its entry or rate limit, if the rules allow it.
    pub(super) fn lookup(
        &mut self,
        request: &TokenRequest,
        mut forced: bool,
        client: Option<Client>,
        now: Timestamp,
    ) -> Result<Found, Miss> {
        if !forced && let Some(entry) = self.entries.get_mut(&request.key) {
            let ttl = entry.ttl(&self.limits, now);
            if ttl.is_zero() {
                self.remove(&request.key);
            } else if entry.expires_at.since(now) > request.validity_buffer {
                if client.is_some_and(|client| entry.served_to.contains(&client)) {
                    // The client has this valid token in its own cache, so it asks because it was told to refresh.
                    forced = true;
                } else {
                    if let Some(client) = client {
                        entry.add_client(client);
                    }
                    entry.hits += 1;
                    let headers = entry.headers.at(&entry.answer, ttl, now.since(entry.stored_at));
                    return Ok(Found::Hit { answer: entry.answer.clone(), headers, at: now });
                }
            }
        }
        match self.rate_limits.get(&request.key) {
            Some(limit) if limit.applies_at(now) => Ok(Found::RateLimited {
                result: limit.result.clone(),
                age: now.since(limit.since),
                left: limit.until.since(now),
            }),
            _ => Err(Miss { forced }),
        }
    }

    /// Stores the answer if it is a token that may be served again, and returns for how long that is.
    pub(super) fn store(
        &mut self,
        request: &CacheRequest,
        answer: &Arc<Answer>,
        served_to: Vec<Client>,
        now: Timestamp,
    ) -> Option<Duration> {
        if request.token_request.subject == Subject::Token || answer.body.len() > MAX_ANSWER_BYTES {
            return None;
        }
        let grant = Grant::read(answer)?;
        let mut entry = Entry {
            answer: answer.clone(),
            headers: HitHeaders::default(),
            stored_at: now,
            expires_at: grant.expires_at,
            names: grant.names(&request.connector),
            subject: request.token_request.subject,
            hits: 0,
            served_to: VecDeque::new(),
        };
        served_to.into_iter().for_each(|client| entry.add_client(client));
        let ttl = entry.ttl(&self.limits, now);
        if ttl.is_zero() {
            return None;
        }
        self.insert(request.token_request.key, entry);
        Some(ttl)
    }

    /// Remembers the result if it is upstream's 429.
    pub(super) fn store_rate_limit(&mut self, key: Key, result: &UpstreamResult, now: Timestamp) {
        self.rate_limits.retain(|_, limit| limit.applies_at(now));
        let (status, retry_after) = match result {
            Ok(answer) => (Some(answer.status), answer.retry_after()),
            // Not the error's own status: the sidecar refuses with 429, too.
            Err(error) => (error.upstream_status, error.retry_after.as_ref().and_then(|value| value.to_str().ok())),
        };
        if status == Some(StatusCode::TOO_MANY_REQUESTS) {
            let until = now.plus(rate_limit_duration(retry_after, now));
            self.rate_limits.insert(key, RateLimit { result: result.clone(), since: now, until });
        }
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.pop(key)?;
        self.bytes -= entry.answer.body.len();
        Some(entry)
    }

    /// Adds or replaces the entry of a key, and drops the least recently used ones beyond the limits.
    pub(super) fn insert(&mut self, key: Key, entry: Entry) {
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

    /// Drops the entries and flights of a connector, by any of its names. Returns the number of entries dropped.
    pub(super) fn evict(&mut self, connector: &str) -> usize {
        let mut aliases = HashSet::from([connector.to_owned()]);
        loop {
            let before = aliases.len();
            for (_, entry) in &self.entries {
                if entry.names.intersects(&aliases) {
                    aliases.extend(entry.names.0.iter().cloned());
                }
            }
            if aliases.len() == before {
                break;
            }
        }
        let matching = self.entries.iter().filter(|(_, entry)| entry.names.intersects(&aliases));
        let evicted: Vec<Key> = matching.map(|(key, _)| *key).collect();
        for key in &evicted {
            self.remove(key);
        }
        self.flights.retain(|_, flight| !may_be_named(&flight.connector, &aliases));
        evicted.len()
    }
}
