//! The open connections: how many there may be, what each is doing and since when, and the word to each of them to end.
//!
//! One look a second at all of them takes the place of a timer for each request, which costs a tenth of a cache hit; a
//! request leaves no more behind than what its connection is doing, in a place of the connection's own. Whoever is told
//! something is woken: a channel to each would be polled with every request. The numbers are those of trust-policy.md
//! section 4.7.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// A request's head must be there within this time after the last reply; an idle connection ends after it, too.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// A reply must be made within this time after the request's head.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A caller must take some of its reply within this time.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// As many connections may be open, and as many requests under way.
const MAX_CONNECTIONS: usize = 512;
/// Descriptors that are left to everything else.
const OTHER_DESCRIPTORS: usize = 64;
/// As many connections may be open however few descriptors there are.
const MIN_CONNECTIONS: usize = 16;
/// Whoever has just come is not idle: a request may be on its way.
const JUST_COME: Duration = Duration::from_millis(10);
/// When every connection is busy, as many more are let in to be told so, and to ask for our health.
const SPARE_CONNECTIONS: usize = 16;

/// What a connection is told. The later ones outweigh the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Told {
    Nothing,
    /// End after the request under way.
    Finish,
    /// The reply is overdue.
    Late,
    /// End at once.
    End,
}

/// All open connections.
pub(super) struct Connections {
    began: Instant,
    limit: usize,
    /// One for each socket. Who is told to end still has its own for a moment, and the next has to wait for it.
    sockets: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    finishing: bool,
    next_id: u64,
    /// Those that are not told to end.
    open: HashMap<u64, Entry>,
}

struct Entry {
    place: Arc<Place>,
    /// Of the task that serves it, once it runs.
    waker: Option<Waker>,
}

impl Entry {
    fn tell(&self, told: Told) {
        if self.place.told.fetch_max(told as u8, Ordering::Relaxed) < told as u8
            && let Some(waker) = &self.waker
        {
            waker.wake_by_ref();
        }
    }
}

/// What one connection is doing. Times are milliseconds since the server began.
pub(super) struct Place {
    began: Instant,
    /// Waiting for a request since then; or, with [`ANSWERING`], making a reply since then; or [`REPLYING`], or
    /// [`RELAYING`].
    doing: AtomicU64,
    /// Since when the caller takes nothing of what is written, or [`NEVER`].
    stalled_since: AtomicU64,
    requests: AtomicU32,
    told: AtomicU8,
    /// It was let in beyond the limit.
    is_spare: AtomicBool,
}

const ANSWERING: u64 = 1 << 63;
/// The reply is made and not yet written.
const REPLYING: u64 = u64::MAX;
/// The request is passed on, and the answer as it comes: how long either takes is not for us to say.
const RELAYING: u64 = u64::MAX - 1;
const NEVER: u64 = u64::MAX;

impl Place {
    /// A request's head has come; how many there were on this connection.
    pub(super) fn begin_request(&self) -> u32 {
        self.doing.store(ANSWERING | self.now(), Ordering::Relaxed);
        // One at a time: nobody else counts here.
        let count = self.requests.load(Ordering::Relaxed) + 1;
        self.requests.store(count, Ordering::Relaxed);
        count
    }

    /// Its reply is made, or the first of it.
    pub(super) fn end_request(&self) {
        if self.doing.load(Ordering::Relaxed) != RELAYING {
            self.doing.store(REPLYING, Ordering::Relaxed);
        }
    }

    /// The request is passed on, until what is returned is dropped.
    pub(super) fn relay(self: &Arc<Self>) -> Relaying {
        self.doing.store(RELAYING, Ordering::Relaxed);
        Relaying(self.clone())
    }

    /// The caller has taken some of what is written.
    pub(super) fn written(&self) {
        if !self.is_answering() {
            self.doing.store(self.now(), Ordering::Relaxed);
        }
    }

    /// The caller takes nothing more of what is written, from now on or no longer.
    pub(super) fn stalled(&self, is_stalled: bool) {
        self.stalled_since.store(if is_stalled { self.now() } else { NEVER }, Ordering::Relaxed);
    }

    /// The answer; `None` once it is overdue.
    pub(super) async fn in_time<F: Future>(&self, answer: F) -> Option<F::Output> {
        let mut answer = pin!(answer);
        let is_late = || self.told.load(Ordering::Relaxed) >= Told::Late as u8;
        poll_fn(|cx| if is_late() { Poll::Ready(None) } else { answer.as_mut().poll(cx).map(Some) }).await
    }

    /// Whether the connection is to end after the request under way.
    pub(super) fn is_finishing(&self) -> bool {
        self.told.load(Ordering::Relaxed) == Told::Finish as u8
    }

    /// Returns once the connection is to end at once.
    pub(super) async fn ended(&self) {
        let has_ended = || self.told.load(Ordering::Relaxed) == Told::End as u8;
        poll_fn(|_| if has_ended() { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn is_answering(&self) -> bool {
        let doing = self.doing.load(Ordering::Relaxed);
        doing & ANSWERING != 0 && doing != REPLYING
    }

    fn idle_since(&self) -> Option<u64> {
        let is_writing = self.stalled_since.load(Ordering::Relaxed) != NEVER;
        Some(self.doing.load(Ordering::Relaxed)).filter(|doing| doing & ANSWERING == 0 && !is_writing)
    }

    fn has_just_come(&self, idle_since: u64) -> bool {
        let age = Duration::from_millis(self.now().saturating_sub(idle_since));
        self.requests.load(Ordering::Relaxed) == 0 && age < JUST_COME
    }

    /// What it must be told at this time.
    fn due(&self, now: Duration) -> Told {
        let lasts = |since: u64, limit: Duration| now.saturating_sub(Duration::from_millis(since)) >= limit;
        let doing = self.doing.load(Ordering::Relaxed);
        let stalled_since = self.stalled_since.load(Ordering::Relaxed);
        match doing {
            _ if stalled_since != NEVER && lasts(stalled_since, STALL_TIMEOUT) => Told::End,
            REPLYING | RELAYING => Told::Nothing,
            _ if doing & ANSWERING == 0 && lasts(doing, HEAD_TIMEOUT) => Told::End,
            _ if doing & ANSWERING != 0 && lasts(doing & !ANSWERING, REQUEST_TIMEOUT) => Told::Late,
            _ => Told::Nothing,
        }
    }
}

/// A request is passed on.
pub(super) struct Relaying(Arc<Place>);

impl Drop for Relaying {
    fn drop(&mut self) {
        // All of it may have been written by now, and then nothing tells that it was.
        self.0.doing.store(self.0.now(), Ordering::Relaxed);
    }
}

impl Connections {
    /// None yet. How many there may be depends on the descriptors that the process has now.
    pub(super) fn new() -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        Self::at_most(limit(descriptors))
    }

    fn at_most(limit: usize) -> Self {
        let sockets = Arc::new(Semaphore::new(limit + SPARE_CONNECTIONS));
        Self { began: Instant::now(), limit, sockets, state: Mutex::default() }
    }

    /// Adds a connection, idle at first. Where that makes too many, the one that has been idle longest ends; where none
    /// is idle and there is no room to say so either, `None`. Returns once the others that have to end have done so.
    pub(super) async fn open(self: &Arc<Self>) -> Option<Open> {
        let mut open = self.add()?;
        open.socket = self.sockets.clone().acquire_owned().await.ok();
        Some(open)
    }

    fn add(self: &Arc<Self>) -> Option<Open> {
        let place = Arc::new(Place {
            began: self.began,
            doing: AtomicU64::new(0),
            stalled_since: AtomicU64::new(NEVER),
            requests: AtomicU32::new(0),
            told: AtomicU8::new(Told::Nothing as u8),
            is_spare: AtomicBool::new(false),
        });
        place.written();
        let mut state = self.lock();
        while state.open.len() >= self.limit {
            let is_full = state.open.len() >= self.limit + SPARE_CONNECTIONS;
            let idle = state.open.iter().filter_map(|(id, Entry { place, .. })| {
                let since = place.idle_since()?;
                (is_full || !place.has_just_come(since)).then_some((since, *id))
            });
            // Those of one moment in the order in which they came.
            let Some((_, id)) = idle.min() else { break };
            if let Some(entry) = state.open.remove(&id) {
                entry.tell(Told::End);
            }
        }
        if state.open.len() >= self.limit + SPARE_CONNECTIONS {
            return None;
        }
        place.is_spare.store(state.open.len() >= self.limit, Ordering::Relaxed);
        state.next_id += 1;
        let id = state.next_id;
        let entry = Entry { place: place.clone(), waker: None };
        if state.finishing {
            entry.tell(Told::Finish);
        } else {
            state.open.insert(id, entry);
        }
        Some(Open { connections: self.clone(), id, place, socket: None })
    }

    /// How many are open.
    pub(super) fn count(&self) -> usize {
        self.lock().open.len()
    }

    /// Whether the request that has begun on this connection is one too many. Only those that were let in beyond the
    /// limit have to count: the others cannot be too many.
    pub(super) fn is_overloaded_by(&self, place: &Place) -> bool {
        place.is_spare.load(Ordering::Relaxed)
            && self.lock().open.values().filter(|entry| entry.place.is_answering()).count() > self.limit
    }

    /// Tells all connections, also those to come, to finish after their request.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        state.finishing = true;
        for (_, entry) in state.open.drain() {
            entry.tell(Told::Finish);
        }
    }

    /// Ends connections whose request does not come or whose caller does not read, and replies that take too long. To be
    /// called once a second.
    pub(super) fn look(&self) {
        let now = self.began.elapsed();
        let ends = |_: &u64, entry: &mut Entry| {
            let due = entry.place.due(now);
            entry.tell(due);
            due == Told::End
        };
        self.lock().open.extract_if(ends).for_each(drop);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many connections so many descriptors are enough for.
fn limit(descriptors: u64) -> usize {
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    descriptors.saturating_sub(OTHER_DESCRIPTORS).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS)
}

/// A connection's place among the open ones.
pub(super) struct Open {
    connections: Arc<Connections>,
    id: u64,
    pub(super) place: Arc<Place>,
    socket: Option<OwnedSemaphorePermit>,
}

impl Open {
    /// The connection is served in this task, which is to be woken when it is told something.
    pub(super) async fn serve_here(&self) {
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        // Whatever it was told before stands in its place.
        if let Some(entry) = self.connections.lock().open.get_mut(&self.id) {
            entry.waker = Some(waker);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With room for so many.
    fn room_for(limit: usize) -> Arc<Connections> {
        Arc::new(Connections::at_most(limit))
    }

    fn open(connections: &Arc<Connections>) -> Open {
        connections.add().expect("room")
    }

    fn told(open: &Open) -> u8 {
        open.place.told.load(Ordering::Relaxed)
    }

    fn assert_told(open: &Open, expected: Told) {
        assert_eq!(told(open), expected as u8, "{expected:?}");
    }

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[test]
    fn there_are_as_many_as_descriptors_allow_and_always_some() {
        for (descriptors, expected) in [(0, 16), (64, 16), (80, 16), (81, 17), (576, 512), (8192, 512), (u64::MAX, 512)]
        {
            assert_eq!(limit(descriptors), expected, "{descriptors}");
        }
    }

    #[test]
    fn all_are_told_to_finish_also_those_that_come_late() {
        let connections = room_for(8);
        let first = open(&connections);
        drop(open(&connections));
        assert_eq!(connections.count(), 1);
        connections.finish();
        assert!(first.place.is_finishing());
        assert!(open(&connections).place.is_finishing());
    }

    #[tokio::test(start_paused = true)]
    async fn one_too_many_ends_the_one_that_has_been_idle_longest() {
        let connections = room_for(4);
        let [first, second, third, reading] = [(); 4].map(|()| open(&connections));
        // Idle, but for a reply that is still on its way.
        reading.place.stalled(true);
        pass(1).await;
        first.place.begin_request();
        third.place.begin_request();
        third.place.end_request();
        third.place.written();
        pass(1).await;
        first.place.end_request();
        first.place.written();
        let mut newcomers = Vec::new();
        for ended in [&second, &third, &first] {
            assert_told(ended, Told::Nothing);
            let newcomer = open(&connections);
            assert_told(ended, Told::End);
            newcomer.place.begin_request();
            assert!(!connections.is_overloaded_by(&newcomer.place), "it is within the limit");
            newcomers.push(newcomer);
        }
        assert_eq!(connections.count(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_just_come_is_not_idle_while_there_is_room() {
        let connections = room_for(1);
        let first = open(&connections);
        let others: Vec<_> = (0..SPARE_CONNECTIONS).map(|_| open(&connections)).collect();
        assert_told(&first, Told::Nothing);
        let _one_too_many = open(&connections);
        assert_told(&first, Told::End);
        tokio::time::advance(JUST_COME).await;
        let _newcomer = open(&connections);
        assert!(others.iter().all(|open| told(open) == Told::End as u8));
    }

    #[test]
    fn while_all_are_busy_a_few_more_get_to_hear_it_and_the_rest_nothing() {
        let connections = room_for(2);
        let busy = [(); 2].map(|()| open(&connections));
        for open in &busy {
            open.place.begin_request();
        }
        let spare: Vec<_> = (0..SPARE_CONNECTIONS)
            .map(|_| {
                let spare = open(&connections);
                spare.place.begin_request();
                assert!(connections.is_overloaded_by(&spare.place));
                spare
            })
            .collect();
        assert!(connections.add().is_none());
        // Once there is room, it is theirs as well.
        for open in spare.iter().skip(1).chain(&busy) {
            open.place.end_request();
        }
        assert!(!connections.is_overloaded_by(&spare[0].place));
        for open in &busy {
            assert_told(open, Told::Nothing);
            open.place.written();
        }
        let _newcomer = open(&connections);
        assert!(busy.iter().all(|open| told(open) == Told::End as u8), "as many end as are too many");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_20_s_a_reply_60_s_and_a_caller_that_does_not_read_10_s() {
        let connections = room_for(8);
        let [idle, used, answering, replying, stalled, slow] = [(); 6].map(|()| open(&connections));
        answering.place.begin_request();
        // What is made and not yet written has no time of its own.
        replying.place.begin_request();
        replying.place.end_request();
        let look_at = async |second: u64| {
            let at = connections.began + Duration::from_secs(second);
            tokio::time::advance(at - Instant::now()).await;
            connections.look();
        };
        for open in [&used, &slow] {
            open.place.begin_request();
        }
        look_at(9).await;
        used.place.end_request();
        used.place.written();
        for open in [&stalled, &slow] {
            open.place.end_request();
            open.place.stalled(true);
        }
        look_at(18).await;
        assert_eq!(connections.count(), 6);
        slow.place.written();
        slow.place.stalled(false);
        slow.place.stalled(true);
        look_at(19).await;
        assert_told(&stalled, Told::End);
        assert_told(&idle, Told::Nothing);
        look_at(20).await;
        assert_told(&idle, Told::End);
        look_at(27).await;
        assert_told(&slow, Told::Nothing);
        look_at(28).await;
        assert_told(&slow, Told::End);
        assert_told(&used, Told::Nothing);
        look_at(29).await;
        assert_told(&used, Told::End);
        look_at(59).await;
        assert_told(&answering, Told::Nothing);
        look_at(60).await;
        assert_told(&answering, Told::Late);
        assert_told(&replying, Told::Nothing);
        assert_eq!(connections.count(), 2, "a late one may still say so");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_passed_on_has_no_end_but_for_a_caller_that_does_not_read() {
        let connections = room_for(1);
        let [relaying, stalled] = [(); 2].map(|()| open(&connections));
        let under_way = [&relaying, &stalled].map(|open| {
            open.place.begin_request();
            let under_way = open.place.relay();
            open.place.end_request();
            open.place.written();
            under_way
        });
        pass(3600).await;
        stalled.place.stalled(true);
        connections.look();
        pass(10).await;
        connections.look();
        assert_told(&stalled, Told::End);
        assert_told(&relaying, Told::Nothing);
        assert!(relaying.place.idle_since().is_none(), "nobody may take its place");
        assert!(relaying.place.is_answering(), "and it counts as one that is under way");
        drop(under_way);
        pass(19).await;
        connections.look();
        assert_told(&relaying, Told::Nothing);
        pass(1).await;
        connections.look();
        assert_told(&relaying, Told::End);
    }

    #[tokio::test]
    async fn one_that_takes_anothers_place_waits_until_that_has_gone() {
        let connections = room_for(1);
        let mut others = Vec::new();
        for _ in 0..1 + SPARE_CONNECTIONS {
            others.push(connections.open().await.expect("room"));
        }
        let mut next = pin!(connections.open());
        assert!(poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx).is_pending())).await);
        assert_told(&others[0], Told::End);
        others.clear();
        assert!(next.await.is_some());
    }

    #[tokio::test]
    async fn an_answer_that_is_late_is_given_up() {
        let connections = room_for(1);
        let open = open(&connections);
        open.serve_here().await;
        assert_eq!(open.place.in_time(async { 1 }).await, Some(1));
        let mut answer = pin!(open.place.in_time(std::future::pending::<()>()));
        assert!(poll_fn(|cx| Poll::Ready(answer.as_mut().poll(cx).is_pending())).await);
        for entry in connections.lock().open.values() {
            entry.tell(Told::Late);
        }
        assert_eq!(answer.await, None);
    }
}
