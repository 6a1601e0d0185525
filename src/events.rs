//! What happens, told to whoever listens now: requests, rotations, warnings. Tellers never wait, and a hit that nobody
//! hears costs no more than to find that out.
//!
//! No token, no body and no header ever stands in an event; connectors and names of projects do. The last events but for
//! hits are kept, so that who comes late has something to look at.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::clock::Timestamp;
use crate::remedy::Remedy;

/// Events that are kept for those who come late.
const RECENT: usize = 100;
/// Events that a slow listener may be behind; then it misses some.
const BUFFERED: usize = 256;

/// One thing that happened: a line of `GET /_sidecar/v1/events` (interface.md section 4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// An app's request to Connect was answered.
    Request(Request),
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
    /// How a token came about: `hit`, `miss`, `joined` or `forced`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'static str>,
    /// The status of the reply.
    pub status: u16,
    /// The code of an error, ours or Connect's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What mends it, where that is known.
    #[serde(flatten)]
    pub remedy: Option<Remedy>,
    /// How long the app waited.
    pub ms: u64,
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

/// Where events are told and heard.
#[derive(Debug, Clone)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    listeners: AtomicUsize,
    sender: broadcast::Sender<Arc<Event>>,
    recent: Mutex<VecDeque<Arc<Event>>>,
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

impl Events {
    /// Whether anybody listens now.
    pub fn is_heard(&self) -> bool {
        self.listeners() > 0
    }

    /// Tells those who listen, and those who come later.
    pub fn tell(&self, event: Event) {
        let event = Arc::new(event);
        let mut recent = self.recent();
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(event.clone());
        // Within the lock, so that who begins to listen gets each event once.
        let _ = self.0.sender.send(event);
    }

    /// Tells those who listen now, of what happens too often to be kept.
    pub fn tell_listeners(&self, event: impl FnOnce() -> Event) {
        if self.is_heard() {
            let _ = self.0.sender.send(Arc::new(event()));
        }
    }

    /// Listens from now on; what was kept comes first.
    pub fn listen(&self) -> (Vec<Arc<Event>>, Listener) {
        let recent = self.recent();
        self.0.listeners.fetch_add(1, Ordering::Relaxed);
        let listener = Listener { receiver: self.0.sender.subscribe(), hears_hits: true, events: self.clone() };
        (recent.iter().cloned().collect(), listener)
    }

    /// Listens from now on to what is kept, and is nobody for whom hits are told.
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

    fn recent(&self) -> MutexGuard<'_, VecDeque<Arc<Event>>> {
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

    #[tokio::test]
    async fn who_comes_late_gets_what_was_kept_and_then_each_event_once() {
        let events = Events::default();
        events.tell(rotation(1));
        events.tell_listeners(|| panic!("nobody listens"));
        let (recent, mut listener) = events.listen();
        assert_eq!(recent.iter().map(|event| (**event).clone()).collect::<Vec<_>>(), [rotation(1)]);
        assert!(events.is_heard());
        events.tell(rotation(2));
        events.tell_listeners(|| rotation(3));
        for n in [2, 3] {
            assert_eq!(listener.next().await.as_deref(), Some(&rotation(n)));
        }
        events.end();
        assert_eq!(listener.next().await, None);
        drop(listener);
        assert!(!events.is_heard());
        let (recent, _) = events.listen();
        assert_eq!(recent.len(), 2, "what was only for those who listened is not kept");
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
    async fn who_listens_to_what_is_kept_makes_no_hit_worth_telling() {
        let events = Events::default();
        let mut listener = events.listen_to_kept();
        events.tell_listeners(|| panic!("nobody listens to hits"));
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
            remedy: None,
            ms: 0,
        };
        assert_eq!(
            serde_json::to_string(&Event::Request(request)).expect("json"),
            r#"{"event":"request","at":"1970-01-01T00:00:00Z","action":"token","connector":"slack/acme-slack","subject":"app","cache":"hit","status":200,"ms":0}"#
        );
    }
}
