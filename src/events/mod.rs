//! What happens, told to whoever listens now: requests, refusals, rotations, warnings. Tellers never wait, and a hit that
//! nobody hears allocates nothing.
//!
//! No token, no body and no header ever stands in an event; connectors and names of projects do. The last events are
//! kept, so that who comes late has something to look at: hits apart from the others, which they would push out.

pub mod line;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::os::clock::Timestamp;
use crate::remedy::Remedy;

/// Events that are kept for those who come late.
const RECENT: usize = 100;
/// Events that a slow listener may be behind; then it misses some.
const BUFFERED: usize = 256;

/// One thing that happened: a line of `GET /_sidecar/v1/events` (docs/http.md section 5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// An app's request to Connect was answered.
    Request(Request),
    /// A request was answered with an error that asked Connect for nothing.
    Refusal(Refusal),
    /// Another OIDC token is in use, or the first one.
    Rotation(Rotation),
    /// Something to act on.
    Warning(Warning),
}

/// A request to one of Connect's routes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    /// When it was answered, by our clock.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// What was asked for, as in the log.
    pub action: &'static str,
    /// Of which connector, as the app wrote it, decoded: foreign text.
    pub connector: String,
    /// On whose behalf, where a token was asked for and the request was understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<&'static str>,
    /// How a token came about: `hit`, `miss`, `collapsed` or `forced`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'static str>,
    /// The status of the reply.
    pub status: u16,
    /// The code of an error, ours or Connect's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What is wrong, a sentence or two for people, of an error of our own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What mends it, where that is known.
    #[serde(flatten)]
    pub remedy: Option<Remedy>,
    /// How long the app waited.
    pub ms: u64,
}

/// A request that is none of Connect's or was not let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// When it was answered, by our clock.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The method of the request, if that was understood: foreign text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Its path, shortened and escaped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The status of the reply.
    pub status: u16,
    /// The code of the error.
    pub code: &'static str,
    /// What is wrong, a sentence or two for people.
    pub message: String,
    /// What mends it.
    #[serde(flatten)]
    pub remedy: Remedy,
}

/// A fresh token of the same principal, or one of another; or the first, where there was none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rotation {
    /// When it was picked up, by our clock.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// The project, for people.
    pub project: String,
    /// The first 8 hex digits of the token's SHA-256.
    pub fingerprint: String,
    /// When it ends.
    #[serde(serialize_with = "rfc3339")]
    pub expires_at: Timestamp,
}

/// What is said at a step of `warn_before` and at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// When it was said, by our clock.
    #[serde(serialize_with = "rfc3339")]
    pub at: Timestamp,
    /// How bad, as in the log: `ERROR` or `WARN`.
    pub level: &'static str,
    /// As in the log and in the state's `warnings`.
    pub code: &'static str,
    /// What is wrong, a sentence for people.
    pub message: String,
    /// What mends it.
    #[serde(flatten)]
    pub remedy: Remedy,
    /// The project, for people.
    pub project: String,
}

fn rfc3339<S: serde::Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(at)
}

/// A request that was answered without asking Connect, as it is told: by reference, since there are many.
#[derive(Debug, Clone, Copy)]
pub struct Hit<'a> {
    /// When it was answered, by our clock.
    pub at: Timestamp,
    /// What was asked for.
    pub action: &'static str,
    /// Of which connector.
    pub connector: &'a str,
    /// On whose behalf, where that was looked at.
    pub subject: Option<&'static str>,
    /// `hit` or `collapsed`.
    pub cache: &'static str,
    /// The status of the reply.
    pub status: u16,
    /// How long the app waited.
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

/// The last events, each with its number.
#[derive(Debug, Default)]
struct Recent {
    told: u64,
    events: VecDeque<(u64, Arc<Event>)>,
    hits: VecDeque<KeptHit>,
}

/// A [`Hit`] that owns its name.
#[derive(Debug)]
struct KeptHit {
    number: u64,
    hit: Hit<'static>,
    connector: String,
}

impl Recent {
    fn number(&mut self) -> u64 {
        self.told += 1;
        self.told
    }

    fn keep(&mut self, event: Arc<Event>) {
        let number = self.number();
        if self.events.len() == RECENT {
            self.events.pop_front();
        }
        self.events.push_back((number, event));
    }

    /// The oldest makes room, and its name's memory is used again.
    fn keep_hit(&mut self, hit: Hit<'_>) {
        let number = self.number();
        let oldest = if self.hits.len() == RECENT { self.hits.pop_front() } else { None };
        let mut connector = oldest.map(|oldest| oldest.connector).unwrap_or_default();
        connector.clear();
        connector.push_str(hit.connector);
        self.hits.push_back(KeptHit { number, hit: Hit { connector: "", ..hit }, connector });
    }

    /// All of them, in their order.
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

/// Where events are told and heard.
#[derive(Debug, Clone)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    listeners: AtomicUsize,
    sender: broadcast::Sender<Arc<Event>>,
    recent: Mutex<Recent>,
    ended: CancellationToken,
}

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Inner {
            listeners: AtomicUsize::new(0),
            sender: broadcast::Sender::new(BUFFERED),
            recent: Mutex::default(),
            ended: CancellationToken::new(),
        }))
    }
}

impl Event {
    /// Whether something is wrong.
    pub fn is_problem(&self) -> bool {
        match self {
            Self::Request(request) => request.status >= 400,
            Self::Refusal(_) | Self::Warning(_) => true,
            Self::Rotation(_) => false,
        }
    }
}

impl Events {
    /// Whether anybody listens now.
    pub fn is_heard(&self) -> bool {
        self.listeners() > 0
    }

    /// Tells those who listen, and those who come later.
    pub fn tell(&self, event: Event) {
        let event = Arc::new(event);
        let mut recent = self.recent();
        recent.keep(event.clone());
        // Within the lock, so that who begins to listen gets each event once.
        let _ = self.0.sender.send(event);
    }

    /// The same of a request that Connect was not asked for.
    pub fn tell_hit(&self, hit: Hit<'_>) {
        let mut recent = self.recent();
        recent.keep_hit(hit);
        if self.is_heard() {
            let _ = self.0.sender.send(Arc::new(hit.event()));
        }
    }

    /// Listens from now on; what was kept comes first.
    pub fn listen(&self) -> (Vec<Arc<Event>>, Listener) {
        let recent = self.recent();
        self.0.listeners.fetch_add(1, Ordering::Relaxed);
        let listener = Listener { receiver: self.0.sender.subscribe(), hears_hits: true, events: self.clone() };
        (recent.all(), listener)
    }

    /// Listens from now on to all but hits, and is nobody for whom these are told.
    pub fn listen_to_kept(&self) -> Listener {
        Listener { receiver: self.0.sender.subscribe(), hears_hits: false, events: self.clone() }
    }

    /// How many listen to everything now.
    pub fn listeners(&self) -> usize {
        self.0.listeners.load(Ordering::Relaxed)
    }

    /// Ends all listening, so that nobody waits for events of a process that is about to end.
    pub fn end(&self) {
        self.0.ended.cancel();
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.0.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears what happens.
#[derive(Debug)]
pub struct Listener {
    receiver: broadcast::Receiver<Arc<Event>>,
    /// Counted among those for whom a hit is worth telling.
    hears_hits: bool,
    events: Events,
}

impl Listener {
    /// The next event; `None` once there will be none. Who is too slow misses the oldest.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        loop {
            let heard = self.events.0.ended.run_until_cancelled(self.receiver.recv()).await?;
            match heard {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.hears_hits {
            self.events.0.listeners.fetch_sub(1, Ordering::Relaxed);
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
    async fn who_comes_late_gets_what_was_kept_and_then_each_event_once() {
        let events = Events::default();
        events.tell(rotation(1));
        events.tell_hit(hit("a", 1));
        events.tell(rotation(2));
        let (recent, mut listener) = events.listen();
        let recent: Vec<_> = recent.iter().map(|event| (**event).clone()).collect();
        assert_eq!(recent, [rotation(1), hit("a", 1).event(), rotation(2)]);
        assert!(events.is_heard());
        events.tell(rotation(3));
        events.tell_hit(hit("b", 4));
        for event in [rotation(3), hit("b", 4).event()] {
            assert_eq!(listener.next().await.as_deref(), Some(&event));
        }
        events.end();
        assert_eq!(listener.next().await, None);
        drop(listener);
        assert!(!events.is_heard());
        let (recent, _) = events.listen();
        assert_eq!(recent.len(), 5);
    }

    #[tokio::test]
    async fn as_many_as_fit_are_kept_and_a_slow_listener_misses_the_oldest() {
        let events = Events::default();
        let (_, mut slow) = events.listen();
        let last = (BUFFERED + RECENT) as u64;
        for n in 1..=last {
            events.tell(rotation(n));
        }
        assert_eq!(slow.next().await.as_deref(), Some(&rotation(last - BUFFERED as u64 + 1)));
        let (recent, _) = events.listen();
        assert_eq!((recent.len(), (*recent[0]).clone()), (RECENT, rotation(last - RECENT as u64 + 1)));
    }

    #[tokio::test]
    async fn hits_push_out_no_other_event_and_are_kept_in_their_order() {
        let events = Events::default();
        events.tell(rotation(1));
        for n in 0..=RECENT as u64 {
            events.tell_hit(hit(if n % 2 == 0 { "a much longer name" } else { "b" }, n));
        }
        events.tell(rotation(2));
        let (recent, _) = events.listen();
        let recent: Vec<_> = recent.iter().map(|event| (**event).clone()).collect();
        assert_eq!((recent.len(), &recent[0], &recent[RECENT + 1]), (RECENT + 2, &rotation(1), &rotation(2)));
        assert_eq!((&recent[1], &recent[2]), (&hit("b", 1).event(), &hit("a much longer name", 2).event()));
    }

    #[tokio::test]
    async fn who_listens_to_all_but_hits_makes_no_hit_worth_telling() {
        let events = Events::default();
        let mut listener = events.listen_to_kept();
        events.tell_hit(hit("a", 0));
        events.tell(rotation(1));
        assert_eq!(listener.next().await.as_deref(), Some(&rotation(1)));
        drop(listener);
        assert_eq!(events.listeners(), 0);
    }

    #[test]
    fn a_line_names_its_event_and_leaves_out_what_is_not_known() {
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
