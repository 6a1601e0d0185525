//! Events for subscribers: requests, refusals, rotations and warnings. Publishing never blocks, and a cache hit without
//! subscribers does not allocate.
//!
//! Events contain names of connectors and projects, but no tokens, bodies or headers. The most recent events are kept
//! for new subscribers. Hits are kept separately, so that they do not displace other events.

pub mod line;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::os::clock::Timestamp;
use crate::remedy::Remedy;

/// The number of events, and of hits, kept for new subscribers.
const RECENT: usize = 100;
/// The number of events that a slow subscriber may be behind before it misses the oldest.
const BUFFERED: usize = 256;

/// An event: a line of `GET /_sidecar/v1/events` (docs/http.md section 5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A request to one of Connect's routes was answered.
    Request(Request),
    /// A request was refused that is not for one of Connect's routes.
    Refusal(Refusal),
    /// A new OIDC token is in use.
    Rotation(Rotation),
    /// Something needs attention.
    Warning(Warning),
}

/// A request to one of Connect's routes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    /// The time of the response.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The action, as in the log.
    pub action: &'static str,
    /// The connector as the app sent it, decoded. Untrusted text.
    pub connector: String,
    /// The type of the subject, if a token was requested and the body was valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<&'static str>,
    /// The source of a token: `hit`, `miss`, `collapsed` or `forced`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'static str>,
    /// The status of the response.
    pub status: u16,
    /// The error code, the sidecar's or Connect's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The message of an error of the sidecar: one or two sentences.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What to do about it, if known.
    #[serde(flatten)]
    pub remedy: Option<Remedy>,
    /// The time until the response, in milliseconds.
    pub ms: u64,
}

/// A request that was refused, or that is not for one of Connect's routes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The time of the response.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The method, if the request could be parsed. Untrusted text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The path, shortened and escaped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The status of the response.
    pub status: u16,
    /// The error code.
    pub code: &'static str,
    /// The message: one or two sentences.
    pub message: String,
    /// What to do about it.
    #[serde(flatten)]
    pub remedy: Remedy,
}

/// A new OIDC token, of the same principal or another, or the first one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rotation {
    /// The time at which it was picked up.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The display name of the project.
    pub project: String,
    /// The first 8 hex digits of the token's SHA-256.
    pub fingerprint: String,
    /// The expiry of the token.
    #[serde(serialize_with = "rfc3339")]
    pub expires_at: Timestamp,
}

/// A warning, such as of a token that expires soon or has expired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The time of the warning.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The log level: `ERROR` or `WARN`.
    pub level: &'static str,
    /// The code, as in the log and the status.
    pub code: &'static str,
    /// The message: one sentence.
    pub message: String,
    /// What to do about it.
    #[serde(flatten)]
    pub remedy: Remedy,
    /// The display name of the project.
    pub project: String,
}

fn rfc3339<S: serde::Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(at)
}

/// A request that was answered from the cache or by another request's fetch. Borrowed, since there can be many.
#[derive(Debug, Clone, Copy)]
pub struct Hit<'a> {
    /// The time of the response.
    pub at: Timestamp,
    /// The action.
    pub action: &'static str,
    /// The connector.
    pub connector: &'a str,
    /// The type of the subject, if the body was parsed.
    pub subject: Option<&'static str>,
    /// `hit` or `collapsed`.
    pub cache: &'static str,
    /// The status of the response.
    pub status: u16,
    /// The time until the response, in milliseconds.
    pub ms: u64,
}

impl Hit<'_> {
    fn event(&self) -> Event {
        let Self { at, action, connector, subject, cache, status, ms } = *self;
        let (connector, cache) = (connector.to_owned(), Some(cache));
        Event::Request(Request {
            at,
            action,
            connector,
            subject,
            cache,
            status,
            code: None,
            message: None,
            remedy: None,
            ms,
        })
    }
}

/// The most recent events with their sequence numbers.
#[derive(Debug, Default)]
struct Recent {
    last_number: u64,
    events: VecDeque<(u64, Arc<Event>)>,
    hits: VecDeque<RecentHit>,
}

/// A [`Hit`] that owns the connector's name.
#[derive(Debug)]
struct RecentHit {
    number: u64,
    hit: Hit<'static>,
    connector: String,
}

impl Recent {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn keep(&mut self, event: Arc<Event>) {
        let number = self.next_number();
        if self.events.len() == RECENT {
            self.events.pop_front();
        }
        self.events.push_back((number, event));
    }

    /// Reuses the oldest hit's allocation once the limit is reached.
    fn keep_hit(&mut self, hit: Hit<'_>) {
        let number = self.next_number();
        let oldest = if self.hits.len() == RECENT { self.hits.pop_front() } else { None };
        let mut connector = oldest.map(|oldest| oldest.connector).unwrap_or_default();
        connector.clear();
        connector.push_str(hit.connector);
        self.hits.push_back(RecentHit { number, hit: Hit { connector: "", ..hit }, connector });
    }

    /// All events and hits in order.
    fn all(&self) -> Vec<Arc<Event>> {
        let hits = self.hits.iter().map(|kept| {
            let hit = Hit { connector: &kept.connector, ..kept.hit };
            (kept.number, Arc::new(hit.event()))
        });
        let mut all: Vec<_> = self.events.iter().cloned().chain(hits).collect();
        all.sort_unstable_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, event)| event).collect()
    }
}

/// The channel for events. Clones share it.
#[derive(Debug, Clone)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The number of subscribers that receive hits.
    subscribers: AtomicUsize,
    sender: broadcast::Sender<Arc<Event>>,
    recent: Mutex<Recent>,
    closed: CancellationToken,
}

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Inner {
            subscribers: AtomicUsize::new(0),
            sender: broadcast::Sender::new(BUFFERED),
            recent: Mutex::default(),
            closed: CancellationToken::new(),
        }))
    }
}

impl Event {
    /// Whether this is an error or a warning.
    pub fn is_problem(&self) -> bool {
        match self {
            Self::Request(request) => request.status >= 400,
            Self::Refusal(_) | Self::Warning(_) => true,
            Self::Rotation(_) => false,
        }
    }
}

impl Events {
    /// Whether anybody subscribes to all events now.
    pub fn has_subscribers(&self) -> bool {
        self.subscribers() > 0
    }

    /// Sends an event to all subscribers and keeps it for later ones.
    pub fn publish(&self, event: Event) {
        let event = Arc::new(event);
        let mut recent = self.recent();
        recent.keep(event.clone());
        // Sent while the lock is held, so that a new subscriber gets each event exactly once.
        let _ = self.0.sender.send(event);
    }

    /// Publishes a hit.
    pub fn publish_hit(&self, hit: Hit<'_>) {
        let mut recent = self.recent();
        recent.keep_hit(hit);
        if self.has_subscribers() {
            let _ = self.0.sender.send(Arc::new(hit.event()));
        }
    }

    /// Subscribes to all events. Returns the recent ones as well.
    pub fn subscribe(&self) -> (Vec<Arc<Event>>, Subscription) {
        let recent = self.recent();
        self.0.subscribers.fetch_add(1, Ordering::Relaxed);
        let subscription =
            Subscription { receiver: self.0.sender.subscribe(), includes_hits: true, events: self.clone() };
        (recent.all(), subscription)
    }

    /// Subscribes to all events except hits. This does not count as a subscriber for
    /// [`has_subscribers`](Self::has_subscribers).
    pub fn subscribe_without_hits(&self) -> Subscription {
        Subscription { receiver: self.0.sender.subscribe(), includes_hits: false, events: self.clone() }
    }

    /// The number of subscribers to all events.
    pub fn subscribers(&self) -> usize {
        self.0.subscribers.load(Ordering::Relaxed)
    }

    /// Ends all subscriptions, before the process ends.
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.0.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A subscription to events.
#[derive(Debug)]
pub struct Subscription {
    receiver: broadcast::Receiver<Arc<Event>>,
    /// Whether it is counted as a subscriber that receives hits.
    includes_hits: bool,
    events: Events,
}

impl Subscription {
    /// The next event, or `None` after [`Events::close`]. A slow subscriber misses the oldest events.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        loop {
            let received = self.events.0.closed.run_until_cancelled(self.receiver.recv()).await?;
            match received {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if self.includes_hits {
            self.events.0.subscribers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotation(n: u64) -> Event {
        let at = Timestamp::from_millis(n * 1000);
        Event::Rotation(Rotation { at, project: "acme/web".into(), fingerprint: "0".into(), expires_at: at })
    }

    fn hit(connector: &str, n: u64) -> Hit<'_> {
        let at = Timestamp::from_millis(n * 1000);
        Hit { at, action: "token", connector, subject: None, cache: "hit", status: 200, ms: n }
    }

    #[tokio::test]
    async fn a_new_subscriber_gets_recent_events_and_then_each_event_once() {
        let events = Events::default();
        events.publish(rotation(1));
        events.publish_hit(hit("a", 1));
        events.publish(rotation(2));
        let (recent, mut subscription) = events.subscribe();
        let recent: Vec<_> = recent.iter().map(|event| (**event).clone()).collect();
        assert_eq!(recent, [rotation(1), hit("a", 1).event(), rotation(2)]);
        assert!(events.has_subscribers());
        events.publish(rotation(3));
        events.publish_hit(hit("b", 4));
        for event in [rotation(3), hit("b", 4).event()] {
            assert_eq!(subscription.next().await.as_deref(), Some(&event));
        }
        events.close();
        assert_eq!(subscription.next().await, None);
        drop(subscription);
        assert!(!events.has_subscribers());
        let (recent, _) = events.subscribe();
        assert_eq!(recent.len(), 5);
    }

    #[tokio::test]
    async fn recent_events_are_limited_and_a_slow_subscriber_misses_the_oldest() {
        let events = Events::default();
        let (_, mut slow) = events.subscribe();
        let last = (BUFFERED + RECENT) as u64;
        for n in 1..=last {
            events.publish(rotation(n));
        }
        assert_eq!(slow.next().await.as_deref(), Some(&rotation(last - BUFFERED as u64 + 1)));
        let (recent, _) = events.subscribe();
        assert_eq!((recent.len(), (*recent[0]).clone()), (RECENT, rotation(last - RECENT as u64 + 1)));
    }

    #[tokio::test]
    async fn hits_do_not_displace_other_events_and_keep_their_order() {
        let events = Events::default();
        events.publish(rotation(1));
        for n in 0..=RECENT as u64 {
            events.publish_hit(hit(if n % 2 == 0 { "a much longer name" } else { "b" }, n));
        }
        events.publish(rotation(2));
        let (recent, _) = events.subscribe();
        let recent: Vec<_> = recent.iter().map(|event| (**event).clone()).collect();
        assert_eq!((recent.len(), &recent[0], &recent[RECENT + 1]), (RECENT + 2, &rotation(1), &rotation(2)));
        assert_eq!((&recent[1], &recent[2]), (&hit("b", 1).event(), &hit("a much longer name", 2).event()));
    }

    #[tokio::test]
    async fn a_subscription_without_hits_does_not_count_as_a_subscriber() {
        let events = Events::default();
        let mut subscription = events.subscribe_without_hits();
        events.publish_hit(hit("a", 0));
        events.publish(rotation(1));
        assert_eq!(subscription.next().await.as_deref(), Some(&rotation(1)));
        drop(subscription);
        assert_eq!(events.subscribers(), 0);
    }

    #[test]
    fn an_event_is_serialized_with_its_name_and_without_absent_fields() {
        let request = Request {
            at: Timestamp::from_millis(0),
            action: "token",
            connector: "slack/acme-slack".into(),
            subject: Some("app"),
            cache: Some("hit"),
            status: 200,
            code: None,
            message: None,
            remedy: None,
            ms: 0,
        };
        assert_eq!(
            serde_json::to_string(&Event::Request(request)).expect("json"),
            r#"{"event":"request","at":"1970-01-01T00:00:00Z","action":"token","connector":"slack/acme-slack","subject":"app","cache":"hit","status":200,"ms":0}"#
        );
    }
}
