//! The open connections: how many are allowed, what each is doing and since when, and which must close.
//!
//! A timer per request would cost a tenth of a cache hit. Instead, each connection records its phase in its
//! [`Activity`], and one sweep a second ([`Connections::enforce_timeouts`]) checks all of them. A connection that must
//! close gets a [`Directive`] and its task is woken; a channel per connection would have to be polled with every
//! request. The limits are those of docs/security.md L1.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::os::peer;

/// Time for a request head to arrive after the last response, and so the longest time a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Time from a request's head until its response is ready.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A client must read some of its response within this time.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A normal client has read its response by then, so the system's socket queues are not read earlier.
const READ_CHECK_DELAY: Duration = Duration::from_secs(2);
/// Time between two checks whether a client that closed its sending side still exists.
const PEER_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Most open connections, and most concurrent requests.
const MAX_CONNECTIONS: usize = 512;
/// Descriptors reserved for everything else.
const RESERVED_DESCRIPTORS: usize = 64;
/// The connection limit never falls below this, however few descriptors there are.
const MIN_CONNECTIONS: usize = 16;
/// A connection this young is not idle: its first request is probably on its way.
const NEW_CONNECTION_GRACE: Duration = Duration::from_millis(10);
/// Connections accepted beyond the limit while all are busy, to answer them with an error and to answer health checks.
const SPARE_CONNECTIONS: usize = 16;

/// What a connection must do. Higher values override lower ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Directive {
    KeepOpen,
    /// Close after the current request.
    Drain,
    /// Answer the current request with a timeout error.
    FailRequest,
    /// Close immediately.
    Close,
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// Waiting for a request.
    Reading,
    /// Producing a response.
    Answering,
    /// The response is ready, but none of it is written yet.
    Replying,
    /// Streaming a relayed request and its response, which has no time limit.
    Relaying,
}

/// All open connections.
pub(super) struct Connections {
    started: Instant,
    limit: usize,
    /// One permit per socket. A connection that was told to close holds its permit until it has closed, and a new
    /// connection waits for it.
    sockets: Arc<Semaphore>,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    is_draining: bool,
    next_id: u64,
    /// Connections that were not told to close.
    entries: HashMap<u64, Entry>,
}

struct Entry {
    activity: Arc<Activity>,
    /// Bytes the client had read at the last check, and since when that number has not grown.
    read_progress: Option<(u64, Duration)>,
    /// Of the task that serves the connection, once it runs.
    waker: Option<Waker>,
}

impl Entry {
    fn direct(&self, directive: Directive) {
        if self.activity.directive.fetch_max(directive as u8, Relaxed) < directive as u8 {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

/// What one connection is doing. Times are milliseconds since the server started.
pub(super) struct Activity {
    server_started: Instant,
    /// A [`Phase`], stored after `since` and loaded before it: a torn read can only shorten the measured time.
    phase: AtomicU8,
    /// When the phase began.
    since: AtomicU64,
    /// Since when writes are pending because the send buffer is full, or [`NEVER`].
    write_blocked_since: AtomicU64,
    bytes_written: AtomicU64,
    /// When the first byte was written that the client may not have read yet, or [`NEVER`]. Written does not mean read:
    /// the system buffers megabytes.
    unread_since: AtomicU64,
    /// Peer and local address, where the system can report the queues of both sockets.
    addresses: OnceLock<(SocketAddr, SocketAddr)>,
    /// The system reported them at the last check.
    is_read_progress_known: AtomicBool,
    /// Some of the response is still in our own send queue.
    has_unsent: AtomicBool,
    /// When to check again whether the client is still there; 0 while nothing suggests that it left.
    next_peer_check: AtomicU64,
    request_count: AtomicU32,
    directive: AtomicU8,
    /// Accepted beyond the limit.
    is_spare: AtomicBool,
}

const NEVER: u64 = u64::MAX;

impl Activity {
    fn new(server_started: Instant) -> Self {
        Self {
            server_started,
            phase: AtomicU8::new(Phase::Reading as u8),
            since: AtomicU64::new(server_started.elapsed().as_millis() as u64),
            write_blocked_since: AtomicU64::new(NEVER),
            bytes_written: AtomicU64::new(0),
            unread_since: AtomicU64::new(NEVER),
            addresses: OnceLock::new(),
            is_read_progress_known: AtomicBool::new(false),
            has_unsent: AtomicBool::new(false),
            next_peer_check: AtomicU64::new(0),
            request_count: AtomicU32::new(0),
            directive: AtomicU8::new(Directive::KeepOpen as u8),
            is_spare: AtomicBool::new(false),
        }
    }

    /// A request head has arrived. Returns how many requests this connection has had.
    pub(super) fn begin_request(&self) -> u32 {
        self.enter(Phase::Answering, self.now());
        self.next_peer_check.store(0, Relaxed);
        // Only the connection's own task counts.
        let count = self.request_count.load(Relaxed) + 1;
        self.request_count.store(count, Relaxed);
        count
    }

    /// The response is ready, or at least its head.
    pub(super) fn end_request(&self) {
        if self.phase() != Phase::Relaying {
            self.phase.store(Phase::Replying as u8, Release);
        }
    }

    /// Lifts the time limits for a streamed response until the guard is dropped.
    pub(super) fn begin_relay(self: &Arc<Self>) -> RelayGuard {
        self.phase.store(Phase::Relaying as u8, Release);
        RelayGuard(self.clone())
    }

    /// Sets peer and local address.
    pub(super) fn set_addresses(&self, addresses: (SocketAddr, SocketAddr)) {
        let _ = self.addresses.set(addresses);
    }

    /// Some of the response was written.
    pub(super) fn record_write(&self, count: usize) {
        // Only the connection's own task counts.
        let written = self.bytes_written.load(Relaxed);
        self.bytes_written.store(written + count as u64, Relaxed);
        let (is_first_unread, is_busy) = (self.unread_since.load(Relaxed) == NEVER, self.is_busy());
        if !is_first_unread && is_busy {
            return;
        }
        let now = self.now();
        if is_first_unread {
            self.unread_since.store(now, Relaxed);
        }
        if !is_busy {
            self.enter(Phase::Reading, now);
        }
    }

    /// Whether to check now that the client is still there.
    pub(super) fn should_check_peer(&self) -> bool {
        let at = self.next_peer_check.load(Relaxed);
        self.is_busy() && (at == 0 || at <= self.now())
    }

    /// The client was checked; schedules the next check.
    pub(super) fn peer_checked(&self) {
        self.next_peer_check.store(self.now() + PEER_CHECK_INTERVAL.as_millis() as u64, Relaxed);
    }

    /// Writes became pending, or are possible again.
    pub(super) fn set_write_blocked(&self, is_blocked: bool) {
        self.write_blocked_since.store(if is_blocked { self.now() } else { NEVER }, Relaxed);
    }

    /// The result of `response`, or `None` once it has timed out.
    pub(super) async fn unless_timed_out<F: Future>(&self, response: F) -> Option<F::Output> {
        let mut response = pin!(response);
        let is_timed_out = || self.directive.load(Relaxed) >= Directive::FailRequest as u8;
        poll_fn(|cx| if is_timed_out() { Poll::Ready(None) } else { response.as_mut().poll(cx).map(Some) }).await
    }

    /// Whether the connection must close after the current request.
    pub(super) fn is_draining(&self) -> bool {
        self.directive.load(Relaxed) == Directive::Drain as u8
    }

    /// Whether the connection must close immediately.
    pub(super) fn must_close(&self) -> bool {
        self.directive.load(Relaxed) == Directive::Close as u8
    }

    /// Whether output is queued on our side that the client does not read.
    pub(super) fn has_undelivered_output(&self) -> bool {
        self.is_write_blocked() || self.has_unsent.load(Relaxed)
    }

    fn now(&self) -> u64 {
        self.server_started.elapsed().as_millis() as u64
    }

    fn phase(&self) -> Phase {
        const PHASES: [Phase; 4] = [Phase::Reading, Phase::Answering, Phase::Replying, Phase::Relaying];
        PHASES[usize::from(self.phase.load(Acquire))]
    }

    fn enter(&self, phase: Phase, now: u64) {
        self.since.store(now, Relaxed);
        self.phase.store(phase as u8, Release);
    }

    fn is_busy(&self) -> bool {
        matches!(self.phase(), Phase::Answering | Phase::Relaying)
    }

    fn is_write_blocked(&self) -> bool {
        self.write_blocked_since.load(Relaxed) != NEVER
    }

    fn idle_since(&self) -> Option<u64> {
        (self.phase() == Phase::Reading && !self.is_write_blocked()).then(|| self.since.load(Relaxed))
    }

    fn is_new(&self, idle_since: u64) -> bool {
        let age = Duration::from_millis(self.now().saturating_sub(idle_since));
        self.request_count.load(Relaxed) == 0 && age < NEW_CONNECTION_GRACE
    }

    /// What the time limits require at this time.
    fn timeout_directive(&self, now: Duration) -> Directive {
        let lasts = |since: u64, limit: Duration| now.saturating_sub(Duration::from_millis(since)) >= limit;
        let phase = self.phase();
        let since = self.since.load(Relaxed);
        let blocked_since = self.write_blocked_since.load(Relaxed);
        let is_blocked = blocked_since != NEVER;
        // A slow reader may free too little buffer for a write. Where the system reports what is read, that decides.
        if is_blocked && lasts(blocked_since, STALL_TIMEOUT) && !self.is_read_progress_known.load(Relaxed) {
            return Directive::Close;
        }
        match phase {
            Phase::Reading if !is_blocked && lasts(since, HEAD_TIMEOUT) => Directive::Close,
            Phase::Answering if lasts(since, REQUEST_TIMEOUT) => Directive::FailRequest,
            _ => Directive::KeepOpen,
        }
    }

    /// Whether the client has had enough time to read what was written.
    fn should_check_read_progress(&self, now: Duration) -> bool {
        let since = self.unread_since.load(Relaxed);
        // A client may pause a relayed stream for as long as it likes, until the buffers are full.
        since != NEVER
            && (self.is_write_blocked() || self.phase() != Phase::Relaying)
            && now.saturating_sub(Duration::from_millis(since)) >= READ_CHECK_DELAY
    }
}

/// Keeps a connection in [`Phase::Relaying`].
pub(super) struct RelayGuard(Arc<Activity>);

impl Drop for RelayGuard {
    fn drop(&mut self) {
        // The response may be fully written already, so no further write would end the phase.
        self.0.enter(Phase::Reading, self.0.now());
    }
}

impl Connections {
    /// The limit depends on the descriptors that the process may open.
    pub(super) fn new() -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        Self::with_limit(connection_limit(descriptors))
    }

    fn with_limit(limit: usize) -> Self {
        let sockets = Arc::new(Semaphore::new(limit + SPARE_CONNECTIONS));
        Self { started: Instant::now(), limit, sockets, registry: Mutex::default() }
    }

    /// Registers a connection. Over the limit, the connection that has been idle longest closes; if none is idle and
    /// the spare connections are in use, returns `None`. Waits until the connections that must close have done so.
    pub(super) async fn open(self: &Arc<Self>) -> Option<OpenConnection> {
        let mut open = self.register()?;
        open.socket = self.sockets.clone().acquire_owned().await.ok();
        Some(open)
    }

    fn register(self: &Arc<Self>) -> Option<OpenConnection> {
        let mut registry = self.lock();
        while registry.entries.len() >= self.limit {
            let is_full = registry.entries.len() >= self.limit + SPARE_CONNECTIONS;
            let idle = registry.entries.iter().filter_map(|(id, Entry { activity, .. })| {
                let since = activity.idle_since()?;
                (is_full || !activity.is_new(since)).then_some((since, *id))
            });
            // Ties are broken by age.
            let Some((_, id)) = idle.min() else { break };
            if let Some(entry) = registry.entries.remove(&id) {
                entry.direct(Directive::Close);
            }
        }
        if registry.entries.len() >= self.limit + SPARE_CONNECTIONS {
            return None;
        }
        let activity = Arc::new(Activity::new(self.started));
        activity.is_spare.store(registry.entries.len() >= self.limit, Relaxed);
        registry.next_id += 1;
        let id = registry.next_id;
        let entry = Entry { activity: activity.clone(), read_progress: None, waker: None };
        if registry.is_draining {
            entry.direct(Directive::Drain);
        } else {
            registry.entries.insert(id, entry);
        }
        Some(OpenConnection { connections: self.clone(), id, activity, socket: None })
    }

    /// The number of open connections.
    pub(super) fn count(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether the current request of this connection exceeds the limit of concurrent requests. Only spare connections
    /// can exceed it.
    pub(super) fn is_over_limit(&self, activity: &Activity) -> bool {
        activity.is_spare.load(Relaxed)
            && self.lock().entries.values().filter(|entry| entry.activity.is_busy()).count() > self.limit
    }

    /// Tells all connections, including later ones, to close after their current request.
    pub(super) fn drain(&self) {
        let mut registry = self.lock();
        registry.is_draining = true;
        for (_, entry) in registry.entries.drain() {
            entry.direct(Directive::Drain);
        }
    }

    /// Closes connections that send no request or whose client does not read, and fails requests that take too long.
    /// Call once a second.
    pub(super) fn enforce_timeouts(&self) {
        let now = self.started.elapsed();
        let must_close = |_: &u64, entry: &mut Entry| {
            let directive = entry.activity.timeout_directive(now);
            entry.direct(directive);
            if entry.activity.next_peer_check.load(Relaxed) != 0 && entry.activity.should_check_peer() {
                entry.wake();
            }
            directive == Directive::Close
        };
        self.lock().entries.extract_if(must_close).for_each(drop);
        self.close_stalled_readers(now, |(peer, local)| peer::unread_bytes(peer, local));
    }

    /// Closes connections whose client has stopped reading, even if the whole response could be written. `queued`
    /// returns the bytes in our send queue and those in the client's receive queue.
    fn close_stalled_readers(&self, now: Duration, queued: impl Fn((SocketAddr, SocketAddr)) -> Option<(u64, u64)>) {
        // Collected first, so that no system call runs under the lock.
        let due: Vec<_> = {
            let registry = self.lock();
            let due = registry.entries.iter().filter(|(_, entry)| entry.activity.should_check_read_progress(now));
            due.filter_map(|(id, entry)| Some((*id, *entry.activity.addresses.get()?, entry.activity.clone())))
                .collect()
        };
        for (id, addresses, activity) in due {
            // Before the queues are read: bytes written in between would otherwise look as if they had been read.
            let written = activity.bytes_written.load(Relaxed);
            let queued = queued(addresses);
            activity.is_read_progress_known.store(queued.is_some(), Relaxed);
            let (unsent, unread) = queued.unwrap_or_default();
            let mut registry = self.lock();
            let Some(entry) = registry.entries.get_mut(&id) else { continue };
            if unsent + unread == 0 {
                activity.unread_since.store(NEVER, Relaxed);
                entry.read_progress = None;
                continue;
            }
            let read = written.saturating_sub(unsent + unread);
            match entry.read_progress {
                Some((before, since)) if read <= before => {
                    if now.saturating_sub(since) >= STALL_TIMEOUT {
                        activity.has_unsent.store(unsent > 0, Relaxed);
                        entry.direct(Directive::Close);
                        registry.entries.remove(&id);
                    }
                }
                _ => entry.read_progress = Some((read, now)),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of connections that this many descriptors allow.
fn connection_limit(descriptors: u64) -> usize {
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    descriptors.saturating_sub(RESERVED_DESCRIPTORS).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS)
}

/// A registered connection; dropping it removes it from the registry.
pub(super) struct OpenConnection {
    connections: Arc<Connections>,
    id: u64,
    pub(super) activity: Arc<Activity>,
    socket: Option<OwnedSemaphorePermit>,
}

impl OpenConnection {
    /// Registers the current task to be woken when the connection gets a directive.
    pub(super) async fn attach_task(&self) {
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        // An earlier directive is already stored in the activity.
        if let Some(entry) = self.connections.lock().entries.get_mut(&self.id) {
            entry.waker = Some(waker);
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.connections.lock().entries.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_limit(limit: usize) -> Arc<Connections> {
        Arc::new(Connections::with_limit(limit))
    }

    fn open(connections: &Arc<Connections>) -> OpenConnection {
        connections.register().expect("room")
    }

    fn assert_directive(open: &OpenConnection, expected: Directive) {
        assert_eq!(open.activity.directive.load(Relaxed), expected as u8, "{expected:?}");
    }

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    async fn advance_to(connections: &Connections, second: u64) {
        tokio::time::advance(connections.started + Duration::from_secs(second) - Instant::now()).await;
    }

    #[test]
    fn the_limit_follows_the_descriptors_within_bounds() {
        for (descriptors, expected) in [(0, 16), (64, 16), (80, 16), (81, 17), (576, 512), (8192, 512), (u64::MAX, 512)]
        {
            assert_eq!(connection_limit(descriptors), expected, "{descriptors}");
        }
    }

    #[test]
    fn draining_reaches_open_and_later_connections() {
        let connections = with_limit(8);
        let first = open(&connections);
        drop(open(&connections));
        assert_eq!(connections.count(), 1);
        connections.drain();
        assert!(first.activity.is_draining());
        assert!(open(&connections).activity.is_draining());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_over_the_limit_closes_the_longest_idle_one() {
        let connections = with_limit(4);
        let [first, second, third, reading] = [(); 4].map(|()| open(&connections));
        // Idle, except that its response is still being written.
        reading.activity.set_write_blocked(true);
        pass(1).await;
        first.activity.begin_request();
        third.activity.begin_request();
        third.activity.end_request();
        third.activity.record_write(1);
        pass(1).await;
        first.activity.end_request();
        first.activity.record_write(1);
        let mut newcomers = Vec::new();
        for ended in [&second, &third, &first] {
            assert_directive(ended, Directive::KeepOpen);
            let newcomer = open(&connections);
            assert_directive(ended, Directive::Close);
            newcomer.activity.begin_request();
            assert!(!connections.is_over_limit(&newcomer.activity), "within the limit");
            newcomers.push(newcomer);
        }
        assert_eq!(connections.count(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_is_not_idle_while_spares_are_free() {
        let connections = with_limit(1);
        let first = open(&connections);
        let others: Vec<_> = (0..SPARE_CONNECTIONS).map(|_| open(&connections)).collect();
        assert_directive(&first, Directive::KeepOpen);
        let _one_too_many = open(&connections);
        assert_directive(&first, Directive::Close);
        tokio::time::advance(NEW_CONNECTION_GRACE).await;
        let _newcomer = open(&connections);
        others.iter().for_each(|open| assert_directive(open, Directive::Close));
    }

    #[test]
    fn spare_connections_are_answered_while_all_are_busy_and_the_rest_are_closed() {
        let connections = with_limit(2);
        let busy = [(); 2].map(|()| open(&connections));
        for open in &busy {
            open.activity.begin_request();
        }
        let spare: Vec<_> = (0..SPARE_CONNECTIONS)
            .map(|_| {
                let spare = open(&connections);
                spare.activity.begin_request();
                assert!(connections.is_over_limit(&spare.activity));
                spare
            })
            .collect();
        assert!(connections.register().is_none());
        // Spare connections count as normal ones once others are idle.
        for open in spare.iter().skip(1).chain(&busy) {
            open.activity.end_request();
        }
        assert!(!connections.is_over_limit(&spare[0].activity));
        for open in &busy {
            assert_directive(open, Directive::KeepOpen);
            open.activity.record_write(1);
        }
        let _newcomer = open(&connections);
        busy.iter().for_each(|open| assert_directive(open, Directive::Close));
    }

    #[tokio::test(start_paused = true)]
    async fn limits_are_20_s_for_a_head_60_s_for_a_response_10_s_for_a_blocked_write() {
        let connections = with_limit(8);
        let [idle, used, answering, replying, stalled, slow] = [(); 6].map(|()| open(&connections));
        answering.activity.begin_request();
        // A response that is ready but unwritten has no limit of its own.
        replying.activity.begin_request();
        replying.activity.end_request();
        let sweep_at = async |second: u64| {
            advance_to(&connections, second).await;
            connections.enforce_timeouts();
        };
        for open in [&used, &slow] {
            open.activity.begin_request();
        }
        sweep_at(9).await;
        used.activity.end_request();
        used.activity.record_write(1);
        for open in [&stalled, &slow] {
            open.activity.end_request();
            open.activity.set_write_blocked(true);
        }
        sweep_at(18).await;
        assert_eq!(connections.count(), 6);
        slow.activity.record_write(1);
        slow.activity.set_write_blocked(false);
        slow.activity.set_write_blocked(true);
        sweep_at(19).await;
        assert_directive(&stalled, Directive::Close);
        assert_directive(&idle, Directive::KeepOpen);
        sweep_at(20).await;
        assert_directive(&idle, Directive::Close);
        sweep_at(27).await;
        assert_directive(&slow, Directive::KeepOpen);
        sweep_at(28).await;
        assert_directive(&slow, Directive::Close);
        assert_directive(&used, Directive::KeepOpen);
        sweep_at(29).await;
        assert_directive(&used, Directive::Close);
        sweep_at(59).await;
        assert_directive(&answering, Directive::KeepOpen);
        sweep_at(60).await;
        assert_directive(&answering, Directive::FailRequest);
        assert_directive(&replying, Directive::KeepOpen);
        assert_eq!(connections.count(), 2, "the failed request is still answered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_relayed_stream_is_unlimited_unless_the_client_stops_reading() {
        let connections = with_limit(1);
        let [relaying, stalled] = [(); 2].map(|()| open(&connections));
        let under_way = [&relaying, &stalled].map(|open| {
            open.activity.begin_request();
            let under_way = open.activity.begin_relay();
            open.activity.end_request();
            open.activity.record_write(1);
            under_way
        });
        pass(3600).await;
        stalled.activity.set_write_blocked(true);
        connections.enforce_timeouts();
        pass(10).await;
        connections.enforce_timeouts();
        assert_directive(&stalled, Directive::Close);
        assert_directive(&relaying, Directive::KeepOpen);
        assert!(relaying.activity.idle_since().is_none(), "it cannot be evicted");
        assert!(relaying.activity.is_busy(), "it counts as a concurrent request");
        drop(under_way);
        pass(19).await;
        connections.enforce_timeouts();
        assert_directive(&relaying, Directive::KeepOpen);
        pass(1).await;
        connections.enforce_timeouts();
        assert_directive(&relaying, Directive::Close);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_for_10_s_is_closed_though_all_was_written() {
        let connections = with_limit(8);
        let [reads, stalled, slow, disappears, relays, unknown, unread] = [(); 7].map(|()| open(&connections));
        let all = [&reads, &stalled, &slow, &disappears, &relays, &unknown, &unread];
        let under_way = relays.activity.begin_relay();
        for (port, open) in (1..).zip(all) {
            if port != 6 {
                let [client, server] = [port, 80].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
                open.activity.set_addresses((client, server));
            }
            open.activity.record_write(1000);
        }
        // Bytes in our send queue and in the client's receive queue, by port and second.
        let sweep_at = async |second: u64| {
            advance_to(&connections, second).await;
            let queued = |(peer, _): (SocketAddr, SocketAddr)| match peer.port() {
                1 => Some((0, 0)),
                2 => Some((600, 400)),
                3 => Some((0, 1000 - second)),
                4 if second >= 8 => None,
                4 | 7 => Some((0, 1000)),
                _ => Some((1000, 0)),
            };
            connections.close_stalled_readers(connections.started.elapsed(), queued);
        };
        sweep_at(1).await;
        assert_eq!(reads.activity.unread_since.load(Relaxed), 0, "the queues are not read so early");
        for second in 2..12 {
            sweep_at(second).await;
            for open in all {
                assert_directive(open, Directive::KeepOpen);
            }
        }
        sweep_at(12).await;
        for open in [&stalled, &unread] {
            assert_directive(open, Directive::Close);
        }
        assert!(stalled.activity.has_undelivered_output());
        assert!(!unread.activity.has_undelivered_output(), "it may still read what was sent");
        for open in [&reads, &slow, &disappears, &relays, &unknown] {
            assert_directive(open, Directive::KeepOpen);
        }
        assert_eq!(connections.count(), 5);
        assert_eq!(reads.activity.unread_since.load(Relaxed), NEVER);
        // A blocked write does not count where the client is known to read.
        slow.activity.set_write_blocked(true);
        pass(10).await;
        assert_eq!(slow.activity.timeout_directive(connections.started.elapsed()), Directive::KeepOpen);
        // Writing more is not a sign that the client reads.
        drop(under_way);
        relays.activity.record_write(10);
        sweep_at(25).await;
        sweep_at(34).await;
        assert_directive(&relays, Directive::KeepOpen);
        sweep_at(35).await;
        assert_directive(&relays, Directive::Close);
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_closed_client_is_checked_once_a_second() {
        let connections = with_limit(1);
        let open = open(&connections);
        let activity = &open.activity;
        assert!(!activity.should_check_peer(), "an idle connection is read from");
        activity.begin_request();
        assert!(activity.should_check_peer());
        activity.peer_checked();
        assert!(!activity.should_check_peer());
        pass(1).await;
        assert!(activity.should_check_peer());
        activity.peer_checked();
        activity.begin_request();
        assert!(activity.should_check_peer(), "again for each request");
        activity.end_request();
        assert!(!activity.should_check_peer());
    }

    #[tokio::test]
    async fn a_new_connection_waits_until_the_evicted_one_has_closed() {
        let connections = with_limit(1);
        let mut others = Vec::new();
        for _ in 0..1 + SPARE_CONNECTIONS {
            others.push(connections.open().await.expect("room"));
        }
        let mut next = pin!(connections.open());
        assert!(poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx).is_pending())).await);
        assert_directive(&others[0], Directive::Close);
        others.clear();
        assert!(next.await.is_some());
    }

    #[tokio::test]
    async fn a_response_is_abandoned_on_timeout() {
        let connections = with_limit(1);
        let open = open(&connections);
        open.attach_task().await;
        assert_eq!(open.activity.unless_timed_out(async { 1 }).await, Some(1));
        let mut answer = pin!(open.activity.unless_timed_out(std::future::pending::<()>()));
        assert!(poll_fn(|cx| Poll::Ready(answer.as_mut().poll(cx).is_pending())).await);
        for entry in connections.lock().entries.values() {
            entry.direct(Directive::FailRequest);
        }
        assert_eq!(answer.await, None);
    }
}
