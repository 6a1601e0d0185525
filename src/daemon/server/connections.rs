//! The open connections: how many there may be, what each is doing and since when, and the word to each of them to end.
//!
//! One look a second at all of them takes the place of a timer for each request, which costs a tenth of a cache hit; a
//! request leaves no more behind than what its connection is doing, in a place of the connection's own. Whoever is told
//! something is woken: a channel to each would be polled with every request. The numbers are those of docs/security.md
//! L1.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::os::peer;

/// A request's head must be there within this time after the last reply; an idle connection ends after it, too.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// A reply must be made within this time after the request's head.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A caller must take some of its reply within this time.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever takes its replies has taken them within this time, and nobody need ask the system whether it has.
const TAKEN_SOON: Duration = Duration::from_secs(2);
/// Whether a caller that has closed its half is still there is asked as often.
const ASK_AFTER_EVERY: Duration = Duration::from_secs(1);
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
    /// How many bytes the caller had taken when that was last asked, and since when it was so many.
    taken: Option<(u64, Duration)>,
    /// Of the task that serves it, once it runs.
    waker: Option<Waker>,
}

impl Entry {
    fn tell(&self, told: Told) {
        if self.place.told.fetch_max(told as u8, Ordering::Relaxed) < told as u8 {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
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
    /// Since when nothing more can be written, since the caller takes nothing, or [`NEVER`].
    stalled_since: AtomicU64,
    /// How many bytes were written.
    written: AtomicU64,
    /// When the first byte was written that the caller may not have taken yet, or [`NEVER`]. What is written is not taken:
    /// the system's buffers hold megabytes.
    untaken_since: AtomicU64,
    /// The other end and ours, where the system can be asked what was taken.
    ends: OnceLock<(SocketAddr, SocketAddr)>,
    /// It has said so.
    is_measured: AtomicBool,
    /// Something of what was written waits on this side.
    is_unsent: AtomicBool,
    /// The caller may have left, and it is to be seen then whether it has; 0 if there is no sign of it.
    ask_after_at: AtomicU64,
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
        self.ask_after_at.store(0, Ordering::Relaxed);
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

    /// The connection's ends are these.
    pub(super) fn is_between(&self, ends: (SocketAddr, SocketAddr)) {
        let _ = self.ends.set(ends);
    }

    /// Some of the reply was written.
    pub(super) fn written(&self, count: usize) {
        // One at a time: nobody else counts here.
        let written = self.written.load(Ordering::Relaxed);
        self.written.store(written + count as u64, Ordering::Relaxed);
        let (is_first, is_answering) = (self.untaken_since.load(Ordering::Relaxed) == NEVER, self.is_answering());
        if !is_first && is_answering {
            return;
        }
        let now = self.now();
        if is_first {
            self.untaken_since.store(now, Ordering::Relaxed);
        }
        if !is_answering {
            self.doing.store(now, Ordering::Relaxed);
        }
    }

    /// Whether it is to be seen now whether the caller is still there.
    pub(super) fn is_to_be_asked_after(&self) -> bool {
        let at = self.ask_after_at.load(Ordering::Relaxed);
        self.is_answering() && (at == 0 || at <= self.now())
    }

    /// It was looked whether the caller is still there, and is to be again after a while.
    pub(super) fn asked_after(&self) {
        self.ask_after_at.store(self.now() + ASK_AFTER_EVERY.as_millis() as u64, Ordering::Relaxed);
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

    /// Whether the connection is to end at once.
    pub(super) fn must_end(&self) -> bool {
        self.told.load(Ordering::Relaxed) == Told::End as u8
    }

    /// Whether there is something that the caller does not take.
    pub(super) fn is_stuck(&self) -> bool {
        self.stalled_since.load(Ordering::Relaxed) != NEVER || self.is_unsent.load(Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn is_answering(&self) -> bool {
        let doing = self.doing.load(Ordering::Relaxed);
        doing & ANSWERING != 0 && doing != REPLYING
    }

    /// Whether the system says what the caller takes.
    fn is_measured(&self) -> bool {
        self.is_measured.load(Ordering::Relaxed)
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
            // Whoever reads a little makes no room for more yet: where it is known what is taken, that decides.
            _ if stalled_since != NEVER && lasts(stalled_since, STALL_TIMEOUT) && !self.is_measured() => Told::End,
            REPLYING | RELAYING => Told::Nothing,
            _ if doing & ANSWERING == 0 && stalled_since == NEVER && lasts(doing, HEAD_TIMEOUT) => Told::End,
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
            written: AtomicU64::new(0),
            untaken_since: AtomicU64::new(NEVER),
            ends: OnceLock::new(),
            is_measured: AtomicBool::new(false),
            is_unsent: AtomicBool::new(false),
            ask_after_at: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            told: AtomicU8::new(Told::Nothing as u8),
            is_spare: AtomicBool::new(false),
        });
        place.doing.store(place.now(), Ordering::Relaxed);
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
        let entry = Entry { place: place.clone(), taken: None, waker: None };
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
            if entry.place.ask_after_at.load(Ordering::Relaxed) != 0 && entry.place.is_to_be_asked_after() {
                entry.wake();
            }
            due == Told::End
        };
        self.lock().open.extract_if(ends).for_each(drop);
        self.look_at_what_is_taken(now, |(peer, local)| peer::unread_bytes(peer, local));
    }

    /// Ends connections whose caller takes nothing of what it was sent, be it that all of it could be written.
    /// `not_taken` says how many bytes are still on this side, and how many wait on the other.
    fn look_at_what_is_taken(&self, now: Duration, not_taken: impl Fn((SocketAddr, SocketAddr)) -> Option<(u64, u64)>) {
        let millis = now.as_millis() as u64;
        let is_due = |place: &Place| {
            let since = place.untaken_since.load(Ordering::Relaxed);
            // For what is passed on, how long a caller stops between two parts is its own affair, until no more can be
            // written.
            let is_passed_on = place.doing.load(Ordering::Relaxed) == RELAYING;
            let is_stalled = place.stalled_since.load(Ordering::Relaxed) != NEVER;
            since != NEVER
                && (is_stalled || !is_passed_on)
                && millis.saturating_sub(since) >= TAKEN_SOON.as_millis() as u64
        };
        // Not under the lock: the system is asked for each of them.
        let asked: Vec<_> = {
            let state = self.lock();
            let due = state.open.iter().filter(|(_, entry)| is_due(&entry.place));
            due.filter_map(|(id, entry)| Some((*id, *entry.place.ends.get()?, entry.place.clone()))).collect()
        };
        for (id, ends, place) in asked {
            // In this order: what is written meanwhile may be taken, too.
            let written = place.written.load(Ordering::Relaxed);
            let not_taken = not_taken(ends);
            place.is_measured.store(not_taken.is_some(), Ordering::Relaxed);
            let (here, there) = not_taken.unwrap_or_default();
            let mut state = self.lock();
            let Some(entry) = state.open.get_mut(&id) else { continue };
            if here + there == 0 {
                place.untaken_since.store(NEVER, Ordering::Relaxed);
                entry.taken = None;
                continue;
            }
            let taken = written.saturating_sub(here + there);
            match entry.taken {
                Some((before, since)) if taken <= before => {
                    if now.saturating_sub(since) >= STALL_TIMEOUT {
                        place.is_unsent.store(here > 0, Ordering::Relaxed);
                        entry.tell(Told::End);
                        state.open.remove(&id);
                    }
                }
                _ => entry.taken = Some((taken, now)),
            }
        }
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
        third.place.written(1);
        pass(1).await;
        first.place.end_request();
        first.place.written(1);
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
            open.place.written(1);
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
        used.place.written(1);
        for open in [&stalled, &slow] {
            open.place.end_request();
            open.place.stalled(true);
        }
        look_at(18).await;
        assert_eq!(connections.count(), 6);
        slow.place.written(1);
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
            open.place.written(1);
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

    #[tokio::test(start_paused = true)]
    async fn whoever_takes_nothing_for_10_s_of_what_could_be_written_is_let_go() {
        let connections = room_for(8);
        let [reads, stands, slow, drops, relays, unknown, unread] = [(); 7].map(|()| open(&connections));
        let all = [&reads, &stands, &slow, &drops, &relays, &unknown, &unread];
        let under_way = relays.place.relay();
        for (port, open) in (1..).zip(all) {
            if port != 6 {
                open.place
                    .is_between((SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([127, 0, 0, 1], 80))));
            }
            open.place.written(1000);
        }
        // Still here and waiting there, by port and second.
        let look_at = async |second: u64| {
            let at = connections.began + Duration::from_secs(second);
            tokio::time::advance(at - Instant::now()).await;
            let not_taken = |(peer, _): (SocketAddr, SocketAddr)| match peer.port() {
                1 => Some((0, 0)),
                2 => Some((600, 400)),
                3 => Some((0, 1000 - second)),
                4 => {
                    if second < 8 {
                        Some((0, 1000))
                    } else {
                        None
                    }
                }
                7 => Some((0, 1000)),
                _ => Some((1000, 0)),
            };
            connections.look_at_what_is_taken(connections.began.elapsed(), not_taken);
        };
        look_at(1).await;
        assert_eq!(reads.place.untaken_since.load(Ordering::Relaxed), 0, "nobody is asked so soon");
        for second in 2..12 {
            look_at(second).await;
            for open in all {
                assert_told(open, Told::Nothing);
            }
        }
        look_at(12).await;
        for open in [&stands, &unread] {
            assert_told(open, Told::End);
        }
        assert!(stands.place.is_stuck() && !unread.place.is_stuck(), "what has been sent, it may still read");
        for open in [&reads, &slow, &drops, &relays, &unknown] {
            assert_told(open, Told::Nothing);
        }
        assert_eq!(connections.count(), 5);
        assert_eq!(reads.place.untaken_since.load(Ordering::Relaxed), NEVER);
        // That nothing more can be written to it counts for nothing where it is known that it reads.
        slow.place.stalled(true);
        pass(10).await;
        assert_eq!(slow.place.due(connections.began.elapsed()), Told::Nothing);
        // What is written to it meanwhile is no sign that it reads.
        drop(under_way);
        relays.place.written(10);
        look_at(25).await;
        look_at(34).await;
        assert_told(&relays, Told::Nothing);
        look_at(35).await;
        assert_told(&relays, Told::End);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_may_have_left_is_asked_after_once_a_second() {
        let connections = room_for(1);
        let open = open(&connections);
        let place = &open.place;
        assert!(!place.is_to_be_asked_after(), "an idle one is read from");
        place.begin_request();
        assert!(place.is_to_be_asked_after());
        place.asked_after();
        assert!(!place.is_to_be_asked_after());
        pass(1).await;
        assert!(place.is_to_be_asked_after());
        place.asked_after();
        place.begin_request();
        assert!(place.is_to_be_asked_after(), "anew for each request");
        place.end_request();
        assert!(!place.is_to_be_asked_after());
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
