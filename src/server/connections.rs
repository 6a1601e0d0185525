//! The open connections: which are idle and since when, and the word to each of them to finish.
//!
//! One look a second at all of them takes the place of a timer for each request, which costs a tenth of a cache hit.
//! Each connection waits on a channel of its own: one signal shared by all would be a lock that every request takes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// A request's head must be there within this time after the last reply; an idle connection ends after it, too.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Time between two looks at the connections.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a connection is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// End after the request under way.
    AfterRequest,
    /// End at once.
    Now,
}

/// All open connections.
pub(super) struct Connections {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    finishing: bool,
    next_id: u64,
    open: HashMap<u64, Entry>,
}

struct Entry {
    activity: Arc<Activity>,
    finish: oneshot::Sender<Finish>,
}

/// Since when a connection has been waiting for a request: milliseconds since the server began, or [`BUSY`].
pub(super) struct Activity {
    began: Instant,
    idle_since: AtomicU64,
}

/// A request is being answered.
const BUSY: u64 = u64::MAX;

impl Activity {
    /// A request's head has come.
    pub(super) fn begin_request(&self) {
        self.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// Its reply is made.
    pub(super) fn end_request(&self) {
        self.idle_since.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn idle_since(&self) -> Option<Duration> {
        match self.idle_since.load(Ordering::Relaxed) {
            BUSY => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }
}

impl Connections {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), state: Mutex::default() }
    }

    /// Adds a connection, idle at first. It is to finish as the receiver says.
    pub(super) fn open(&self) -> (Open<'_>, oneshot::Receiver<Finish>) {
        let (finish, finishing) = oneshot::channel();
        let activity = Arc::new(Activity { began: self.began, idle_since: AtomicU64::new(0) });
        activity.end_request();
        let mut state = self.lock();
        state.next_id += 1;
        let id = state.next_id;
        if state.finishing {
            let _ = finish.send(Finish::AfterRequest);
        } else {
            state.open.insert(id, Entry { activity: activity.clone(), finish });
        }
        (Open { connections: self, id, activity }, finishing)
    }

    /// Tells all connections, also those to come, to finish after their request.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        state.finishing = true;
        for (_, entry) in state.open.drain() {
            let _ = entry.finish.send(Finish::AfterRequest);
        }
    }

    /// Ends connections whose request does not come, for as long as it is polled.
    pub(super) async fn end_idle(&self) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.end_idle_at(self.began.elapsed());
        }
    }

    fn end_idle_at(&self, now: Duration) {
        let is_overdue = |_: &u64, entry: &mut Entry| {
            entry.activity.idle_since().is_some_and(|since| now.saturating_sub(since) >= HEAD_TIMEOUT)
        };
        for (_, entry) in self.lock().open.extract_if(is_overdue) {
            let _ = entry.finish.send(Finish::Now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among the open ones.
pub(super) struct Open<'a> {
    connections: &'a Connections,
    id: u64,
    pub(super) activity: Arc<Activity>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_are_told_to_finish_also_those_that_come_late() {
        let connections = Connections::new();
        let (_first, told) = connections.open();
        let (gone, _) = connections.open();
        drop(gone);
        assert_eq!(connections.lock().open.len(), 1);
        connections.finish();
        assert_eq!(told.await, Ok(Finish::AfterRequest));
        let (_late, told) = connections.open();
        assert_eq!(told.await, Ok(Finish::AfterRequest));
    }

    #[tokio::test(start_paused = true)]
    async fn only_those_that_wait_for_a_head_too_long_are_ended() {
        let connections = Connections::new();
        let (_idle, idle_told) = connections.open();
        let (busy, mut busy_told) = connections.open();
        busy.activity.begin_request();
        let (active, mut active_told) = connections.open();
        connections.end_idle_at(Duration::from_millis(19_999));
        assert_eq!(connections.lock().open.len(), 3);
        tokio::time::advance(Duration::from_secs(10)).await;
        active.activity.begin_request();
        active.activity.end_request();
        connections.end_idle_at(Duration::from_secs(20));
        assert_eq!(idle_told.await, Ok(Finish::Now));
        assert!(busy_told.try_recv().is_err() && active_told.try_recv().is_err());
        connections.end_idle_at(Duration::from_secs(30));
        assert_eq!(active_told.await, Ok(Finish::Now));
        assert!(busy_told.try_recv().is_err());
    }
}
