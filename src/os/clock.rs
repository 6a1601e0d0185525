//! The wall clock, which alone decides what has expired, and a clock for tests.
//!
//! An expiry is compared with the clock on use. No timer waits for it, because monotonic timers stop while the machine
//! sleeps; a [`Ticker`] is only a hint to check again. The clock is corrected by upstream's `Date` header
//! (docs/configuration.md section 3): only after two responses agree, only up to a limit, and only until the machine's
//! clock jumps. A correction never extends a lifetime ([`Clock::latest`]). All arithmetic saturates, so that no time
//! can cause a panic.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// A smaller difference from upstream's clock is not corrected (docs/configuration.md section 3).
const TOLERATED_SKEW_MS: u64 = 30_000;
/// A greater difference is ignored. With a greater one, TLS would fail as well: most server certificates are replaced
/// every one or two months.
const MAX_CORRECTION_MS: u64 = 31 * 86_400_000;
/// Two responses agree if their offsets differ by no more than this: `Date` has whole seconds, and the network adds a
/// delay. The `Date` of a stored response stands still and so does not agree with a later one.
const MAX_DISAGREEMENT_MS: u64 = 5_000;

/// A point in wall-clock time: milliseconds since the Unix epoch, the unit of Connect's `expiresAt`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The instant `ms` milliseconds after the epoch.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms)
    }

    /// The instant `s` seconds after the epoch, with millisecond precision. Saturates.
    pub fn from_seconds(s: f64) -> Self {
        Self((s * 1000.0) as u64)
    }

    /// Parses RFC 3339, the format of `Display`.
    pub fn parse(rfc3339: &str) -> Option<Self> {
        humantime::parse_rfc3339(rfc3339).ok().map(Self::from)
    }

    /// Milliseconds since the epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Seconds since the epoch, rounded down.
    pub const fn as_seconds(self) -> u64 {
        self.0 / 1000
    }

    /// The time from `earlier` to `self`; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// `self` as an expiry, seen at `now`.
    pub const fn expiry(self, now: Self) -> Expiry {
        match self.0 > now.0 {
            true => Expiry::In(self.since(now)),
            false => Expiry::Ago(now.since(self)),
        }
    }

    /// `self + d`, saturating.
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }

    /// `self - d`, saturating.
    pub fn minus(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(t: SystemTime) -> Self {
        Self(t.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// RFC 3339 in UTC, in whole seconds. Times after the year 9999 show as its last second.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LAST_SECOND_OF_9999: u64 = 253_402_300_799;
        let t = UNIX_EPOCH + Duration::from_secs(self.as_seconds().min(LAST_SECOND_OF_9999));
        humantime::format_rfc3339_seconds(t).fmt(f)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The effect of an observed `Date`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Correction {
    /// None.
    Unchanged,
    /// The machine's clock is now corrected by this offset. Returned once, to be reported.
    Began {
        /// Upstream's time minus ours, in milliseconds.
        offset_ms: i64,
    },
    /// The machine's clock is right again.
    Ended,
    /// The difference is too large and was ignored. Returned once, to be reported.
    Implausible {
        /// Upstream's time minus ours, in milliseconds.
        offset_ms: i64,
    },
}

/// A reading of the machine's clock, to detect a jump since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    lead_ms: i64,
}

#[derive(Default)]
struct Unapplied {
    /// The last offset that no second response has confirmed.
    unconfirmed: Option<Observation>,
    has_reported_implausible: bool,
}

#[derive(Clone, Copy)]
struct Observation {
    offset_ms: i64,
    lead_ms: i64,
}

/// The wall clock, corrected by upstream's. Clones share their state.
#[derive(Clone)]
pub struct Clock(Arc<Inner>);

struct Inner {
    /// `Some` for a test clock: its time, in milliseconds since the epoch.
    test: Option<watch::Sender<u64>>,
    /// Upstream's time minus ours, in milliseconds.
    offset_ms: AtomicI64,
    /// The machine's clock minus its timers when the offset was observed, in milliseconds. If this difference changes,
    /// the clock has jumped and the offset is void.
    observed_lead_ms: AtomicI64,
    unapplied: Mutex<Unapplied>,
    started: Instant,
    /// The sum of [`Clock::advance`], in milliseconds. [`Clock::set`] does not count and so is a jump.
    advanced_ms: AtomicI64,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::new(None)
    }

    /// A clock for tests that stands still until [`Clock::advance`] or [`Clock::set`].
    pub fn test(start: Timestamp) -> Self {
        Self::new(Some(watch::Sender::new(start.0)))
    }

    fn new(test: Option<watch::Sender<u64>>) -> Self {
        Self(Arc::new(Inner {
            test,
            offset_ms: AtomicI64::new(0),
            observed_lead_ms: AtomicI64::new(0),
            unapplied: Mutex::default(),
            started: Instant::now(),
            advanced_ms: AtomicI64::new(0),
        }))
    }

    /// The time, corrected by upstream's clock.
    pub fn now(&self) -> Timestamp {
        let local = self.local();
        Timestamp(local.0.saturating_add_signed(self.offset_at(local)))
    }

    /// The later of the machine's time and upstream's. What has expired by either of them has expired.
    pub fn latest(&self) -> Timestamp {
        let local = self.local();
        Timestamp(local.0.saturating_add_signed(self.offset_at(local).max(0)))
    }

    /// The machine's time, not corrected.
    pub fn local(&self) -> Timestamp {
        match &self.0.test {
            #[expect(clippy::disallowed_methods, reason = "this is the clock")]
            None => SystemTime::now().into(),
            Some(ms) => Timestamp(*ms.borrow()),
        }
    }

    /// Upstream's time minus the machine's, in milliseconds; 0 if they differ by 30 s or less.
    pub fn offset_ms(&self) -> i64 {
        self.offset_at(self.local())
    }

    /// The offset, unless the machine's clock has jumped since it was observed.
    fn offset_at(&self, local: Timestamp) -> i64 {
        match self.0.offset_ms.load(Ordering::Relaxed) {
            0 => 0,
            offset => {
                let jumped = self.lead_ms(local).abs_diff(self.0.observed_lead_ms.load(Ordering::Relaxed));
                if jumped <= TOLERATED_SKEW_MS { offset } else { 0 }
            }
        }
    }

    /// The machine's clock minus its timers. Constant unless the clock jumps or the machine sleeps.
    fn lead_ms(&self, local: Timestamp) -> i64 {
        let passed = match &self.0.test {
            None => i64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(i64::MAX),
            Some(_) => self.0.advanced_ms.load(Ordering::Relaxed),
        };
        i64::try_from(local.0).unwrap_or(i64::MAX).saturating_sub(passed)
    }

    /// A mark for [`Clock::has_jumped_since`].
    pub fn mark(&self) -> Mark {
        Mark { lead_ms: self.lead_ms(self.local()) }
    }

    /// Whether the machine's clock has jumped, or the machine has slept, since the mark.
    pub fn has_jumped_since(&self, mark: Mark) -> bool {
        self.mark().lead_ms.abs_diff(mark.lead_ms) > TOLERATED_SKEW_MS
    }

    /// Whether an observed offset waits for a second response to confirm it.
    pub fn has_unconfirmed_offset(&self) -> bool {
        self.0.unapplied.lock().unwrap_or_else(PoisonError::into_inner).unconfirmed.is_some()
    }

    /// Takes the `Date` of a response that has just arrived. A `Date` that confirms the machine's clock, or the current
    /// correction, takes effect at once; a new correction takes effect when two responses agree.
    pub fn observe(&self, upstream: Timestamp) -> Correction {
        let local = self.local();
        let lead_ms = self.lead_ms(local);
        let offset_ms = i64::try_from(i128::from(upstream.0) - i128::from(local.0)).unwrap_or(i64::MAX);
        let mut unapplied = self.0.unapplied.lock().unwrap_or_else(PoisonError::into_inner);
        if offset_ms.unsigned_abs() > MAX_CORRECTION_MS {
            unapplied.unconfirmed = None;
            return match std::mem::replace(&mut unapplied.has_reported_implausible, true) {
                true => Correction::Unchanged,
                false => Correction::Implausible { offset_ms },
            };
        }
        let is_right = offset_ms.unsigned_abs() <= TOLERATED_SKEW_MS;
        let current = self.offset_at(local);
        let is_current = current != 0 && offset_ms.abs_diff(current) <= TOLERATED_SKEW_MS;
        let is_confirmed = unapplied.unconfirmed.is_some_and(|before| {
            lead_ms.abs_diff(before.lead_ms) <= MAX_DISAGREEMENT_MS
                && offset_ms.abs_diff(before.offset_ms) <= MAX_DISAGREEMENT_MS
        });
        if !(is_right || is_current || is_confirmed) {
            unapplied.unconfirmed = Some(Observation { offset_ms, lead_ms });
            return Correction::Unchanged;
        }
        unapplied.unconfirmed = None;
        unapplied.has_reported_implausible &= !is_right;
        let offset_ms = if is_right { 0 } else { offset_ms };
        self.0.observed_lead_ms.store(lead_ms, Ordering::Relaxed);
        match (self.0.offset_ms.swap(offset_ms, Ordering::Relaxed), offset_ms) {
            (0, 0) => Correction::Unchanged,
            (0, offset_ms) => Correction::Began { offset_ms },
            (_, 0) => Correction::Ended,
            _ => Correction::Unchanged,
        }
    }

    /// Lets time pass on a test clock. No effect on the machine's.
    pub fn advance(&self, by: Duration) {
        let ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.0.advanced_ms.fetch_add(ms, Ordering::Relaxed);
        self.set(self.local().plus(by));
    }

    /// Makes a test clock jump. No effect on the machine's.
    pub fn set(&self, to: Timestamp) {
        if let Some(ms) = &self.0.test {
            ms.send_replace(to.0);
        }
    }

    /// A ticker of this clock.
    pub fn ticker(&self) -> Ticker {
        Ticker(self.0.test.as_ref().map(watch::Sender::subscribe))
    }
}

/// Signals when to check the clock again: after a time, or at each change of a test clock.
pub struct Ticker(Option<watch::Receiver<u64>>);

impl Ticker {
    /// Returns after `interval`; on a test clock, once the time has changed since the last call. Cancel safe.
    pub async fn tick(&mut self, interval: Duration) {
        match &mut self.0 {
            None => tokio::time::sleep(interval).await,
            Some(changes) => {
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

/// The time until an expiry, or since it. Displays as `expires in 14 min` or `expired 2 h ago`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// It is this far in the future.
    In(Duration),
    /// It was this long ago; zero at the very moment.
    Ago(Duration),
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(left) => write!(f, "expires in {}", format_duration(*left)),
            Self::Ago(ago) => write!(f, "expired {} ago", format_duration(*ago)),
        }
    }
}

/// A duration for people: `11 h 59 min`, `14 min`, `20 s`. Rounded down, at most two units.
pub fn format_duration(span: Duration) -> String {
    let s = span.as_secs();
    match (s / 86_400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, _) => format!("{min} min"),
        (0, h, 0, _) => format!("{h} h"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (1, 0, ..) => "1 day".into(),
        (d, 0, ..) => format!("{d} days"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(at(5).minus(Duration::from_secs(1)), at(0));
        assert_eq!(at(u64::MAX).plus(Duration::MAX), at(u64::MAX));
        assert_eq!(at(1).since(at(9)), Duration::ZERO);
        assert_eq!(Timestamp::from_seconds(-3.0), at(0));
        assert_eq!(Timestamp::from_seconds(f64::INFINITY), at(u64::MAX));
        assert_eq!(at(u64::MAX).to_string(), "9999-12-31T23:59:59Z");
        assert_eq!(Timestamp::parse("1970-01-01T00:00:01Z"), Some(at(1000)));
    }

    /// The effect of the second of two equal responses.
    fn observe_twice(clock: &Clock, upstream: Timestamp) -> Correction {
        assert_eq!(clock.observe(upstream), Correction::Unchanged, "one response is not enough");
        clock.observe(upstream)
    }

    #[test]
    fn a_skew_of_30_s_is_tolerated_and_more_is_corrected_when_two_responses_agree() {
        let clock = Clock::test(at(1_000_000));
        assert_eq!(clock.observe(at(1_030_000)), Correction::Unchanged);
        assert!(!clock.has_unconfirmed_offset());
        assert_eq!(clock.observe(at(1_030_001)), Correction::Unchanged);
        assert_eq!((clock.now(), clock.has_unconfirmed_offset()), (at(1_000_000), true), "one response may be wrong");
        assert_eq!(clock.observe(at(1_030_001)), Correction::Began { offset_ms: 30_001 });
        assert_eq!((clock.now(), clock.has_unconfirmed_offset()), (at(1_030_001), false));
        assert_eq!(clock.observe(at(900_000)), Correction::Unchanged);
        assert_eq!(clock.now(), at(1_030_001), "one response does not overrule two");
        assert_eq!(clock.observe(at(1_040_000)), Correction::Unchanged);
        assert_eq!(clock.now(), at(1_040_000), "small changes of the offset are followed");
        assert_eq!(observe_twice(&clock, at(900_000)), Correction::Unchanged, "still off: reported once");
        assert_eq!(clock.now(), at(900_000));
        assert_eq!(
            clock.observe(at(1_000_000)),
            Correction::Ended,
            "the machine's clock counts as the second response"
        );
        assert_eq!(clock.now(), at(1_000_000));
    }

    #[test]
    fn responses_that_contradict_each_other_or_stand_still_are_ignored() {
        let start = 1_900_000_000_000;
        let day = Duration::from_secs(86_400);
        let clock = Clock::test(at(start));
        for hours in [3, 1, 2, 5, 4] {
            clock.observe(at(start).plus(Duration::from_secs(3600 * hours)));
            assert_eq!(clock.now(), at(start), "{hours}");
        }
        let copied = at(start).minus(day);
        for _ in 0..5 {
            clock.observe(copied);
            clock.advance(Duration::from_secs(6));
        }
        assert_eq!(clock.now(), clock.local(), "the same `Date` again and again");
        let jumped = Clock::test(at(start));
        jumped.observe(at(start).plus(day));
        jumped.set(at(start).minus(day));
        jumped.observe(at(start));
        assert_eq!(jumped.now(), jumped.local(), "the machine's clock has jumped between the two");
    }

    #[test]
    fn no_response_moves_the_clock_beyond_the_limit() {
        let local = at(1_900_000_000_000);
        let most = Duration::from_millis(MAX_CORRECTION_MS);
        let second = Duration::from_secs(1);
        for absurd in
            [at(0), at(u64::MAX), at(253_402_300_799_000), local.plus(most + second), local.minus(most + second)]
        {
            let clock = Clock::test(local);
            assert!(matches!(clock.observe(absurd), Correction::Implausible { .. }), "{absurd}");
            for _ in 0..5 {
                assert_eq!(clock.observe(absurd), Correction::Unchanged, "{absurd}: reported once");
            }
            assert_eq!((clock.now(), clock.latest(), clock.offset_ms()), (local, local, 0), "{absurd}");
            assert!(!clock.has_unconfirmed_offset(), "{absurd}");
        }
        for far in [local.plus(most), local.minus(most)] {
            let clock = Clock::test(local);
            assert!(matches!(observe_twice(&clock, far), Correction::Began { .. }), "{far}");
            assert_eq!(clock.now(), far);
        }
    }

    #[test]
    fn latest_is_the_later_of_both_clocks() {
        let local = at(1_900_000_000_000);
        let hour = Duration::from_secs(3600);
        for (upstream, latest) in [(local.plus(hour), local.plus(hour)), (local.minus(hour), local), (local, local)] {
            let clock = Clock::test(local);
            clock.observe(upstream);
            clock.observe(upstream);
            assert_eq!((clock.now(), clock.latest()), (upstream, latest));
        }
    }

    #[test]
    fn jumps_are_detected_and_passing_time_is_not_a_jump() {
        let start = at(1_900_000_000_000);
        let hour = Duration::from_secs(3600);
        let clock = Clock::test(start);
        let mark = clock.mark();
        clock.advance(hour);
        assert!(!clock.has_jumped_since(mark));
        for (to, has_jumped) in [
            (start.plus(hour + Duration::from_secs(30)), false),
            (start.plus(hour + Duration::from_secs(31)), true),
            (start.plus(hour - Duration::from_secs(31)), true),
            (start, true),
            (start.plus(hour), false),
        ] {
            clock.set(to);
            assert_eq!(clock.has_jumped_since(mark), has_jumped, "{to}");
        }
    }

    #[test]
    fn a_correction_holds_until_the_clock_jumps() {
        let (right, day) = (at(1_900_000_000_000), Duration::from_secs(86_400));
        for wrong in [right.plus(day), right.minus(day)] {
            let clock = Clock::test(wrong);
            observe_twice(&clock, right);
            clock.advance(day);
            assert_eq!(clock.now(), right.plus(day), "time passes");
            clock.set(wrong.plus(day + Duration::from_secs(30)));
            assert_eq!(clock.now(), right.plus(day + Duration::from_secs(30)), "a small step is not a jump");
            clock.set(right.plus(day));
            assert_eq!((clock.now(), clock.offset_ms()), (right.plus(day), 0), "the clock was set right");
            assert_eq!(clock.observe(right.plus(day)), Correction::Ended);
        }
    }

    #[tokio::test]
    async fn a_ticker_never_misses_a_change_made_before_it_waits() {
        let clock = Clock::test(at(0));
        let mut ticker = clock.ticker();
        clock.advance(Duration::from_secs(1));
        ticker.tick(Duration::MAX).await;
        assert_eq!(clock.now(), at(1000));
    }

    #[test]
    fn durations_have_at_most_two_units() {
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (3599, "59 min"),
            (3600, "1 h"),
            (43_199, "11 h 59 min"),
            (86_400, "1 day"),
            (172_800, "2 days"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(format_duration(Duration::from_secs(seconds)), expected);
        }
    }
}
