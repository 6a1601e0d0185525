//! The wall clock, the only judge of expiry, and its test double.
//!
//! Expiry is compared on use, never waited for: monotonic timers stand still while a laptop sleeps, so a timer
//! ([`Ticker`]) is only a hint to look again. The clock corrects itself by upstream's `Date` (interface.md section 5), for as
//! long as the machine's own clock does not jump: what was learned of it does not hold for the one that it is then.
//! It must never panic on odd times: all arithmetic saturates.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// Differences from upstream's clock up to this are left alone (interface.md section 5).
const TOLERATED_SKEW_MS: u64 = 30_000;

/// A point in wall-clock time: milliseconds since the Unix epoch, the unit of Connect's `expiresAt`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The instant `ms` milliseconds after the epoch.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms)
    }

    /// The instant `s` seconds after the epoch, fractions kept to the millisecond; absurd values saturate.
    pub fn from_seconds(s: f64) -> Self {
        Self((s * 1000.0) as u64)
    }

    /// Reads what is shown of one.
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

    /// Time from `earlier` until `self`; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// `self` moved later by `d`, saturating.
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }

    /// `self` moved earlier by `d`, saturating.
    pub fn minus(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(t: SystemTime) -> Self {
        Self(t.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// RFC 3339 in UTC, whole seconds; times beyond the year 9999 show as its last second.
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

/// What comparing our clock with upstream's `Date` led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Correction {
    /// Nothing changed.
    Unchanged,
    /// The local clock is off; it was not before. Say so, once.
    Began {
        /// Upstream's time minus ours, in milliseconds.
        offset_ms: i64,
    },
    /// The local clock is right again.
    Ended,
}

/// The wall clock, corrected by upstream's. Clones share one state.
#[derive(Clone)]
pub struct Clock(Arc<Inner>);

struct Inner {
    /// `Some` in tests: the time to tell, in milliseconds since the epoch.
    test: Option<watch::Sender<u64>>,
    /// Upstream's time minus ours, in milliseconds.
    offset_ms: AtomicI64,
    /// How far the machine's clock was ahead of its timers when that was learned, in milliseconds: another number is
    /// another clock.
    learned_at_lead_ms: AtomicI64,
    started: Instant,
    /// How far a test clock was advanced, in milliseconds; setting it is a jump.
    advanced_ms: AtomicI64,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::new(None)
    }

    /// A clock that stands at `start` until told otherwise by [`Clock::advance`] or [`Clock::set`].
    pub fn test(start: Timestamp) -> Self {
        Self::new(Some(watch::Sender::new(start.0)))
    }

    fn new(test: Option<watch::Sender<u64>>) -> Self {
        Self(Arc::new(Inner {
            test,
            offset_ms: AtomicI64::new(0),
            learned_at_lead_ms: AtomicI64::new(0),
            started: Instant::now(),
            advanced_ms: AtomicI64::new(0),
        }))
    }

    /// The time, corrected by upstream's clock.
    pub fn now(&self) -> Timestamp {
        let local = self.local();
        Timestamp(local.0.saturating_add_signed(self.offset_at(local)))
    }

    /// What the machine itself says the time is.
    pub fn local(&self) -> Timestamp {
        match &self.0.test {
            #[expect(clippy::disallowed_methods, reason = "this is the clock")]
            None => SystemTime::now().into(),
            Some(ms) => Timestamp(*ms.borrow()),
        }
    }

    /// Upstream's time minus the machine's, in milliseconds; 0 while they agree to 30 s.
    pub fn offset_ms(&self) -> i64 {
        self.offset_at(self.local())
    }

    /// The offset, while the clock that says `local` is the one that it was learned of.
    fn offset_at(&self, local: Timestamp) -> i64 {
        match self.0.offset_ms.load(Ordering::Relaxed) {
            0 => 0,
            offset => {
                let jumped = self.lead_ms(local).abs_diff(self.0.learned_at_lead_ms.load(Ordering::Relaxed));
                if jumped <= TOLERATED_SKEW_MS { offset } else { 0 }
            }
        }
    }

    /// How far the machine's clock is ahead of its timers: the same unless it jumps, or the machine sleeps.
    fn lead_ms(&self, local: Timestamp) -> i64 {
        let passed = match &self.0.test {
            None => i64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(i64::MAX),
            Some(_) => self.0.advanced_ms.load(Ordering::Relaxed),
        };
        i64::try_from(local.0).unwrap_or(i64::MAX).saturating_sub(passed)
    }

    /// Learns from a `Date` that upstream has just sent.
    pub fn observe(&self, upstream: Timestamp) -> Correction {
        let local = self.local();
        let offset = if local.0.abs_diff(upstream.0) > TOLERATED_SKEW_MS {
            i64::try_from(i128::from(upstream.0) - i128::from(local.0)).unwrap_or(0)
        } else {
            0
        };
        self.0.learned_at_lead_ms.store(self.lead_ms(local), Ordering::Relaxed);
        match (self.0.offset_ms.swap(offset, Ordering::Relaxed), offset) {
            (0, 0) => Correction::Unchanged,
            (0, offset_ms) => Correction::Began { offset_ms },
            (_, 0) => Correction::Ended,
            _ => Correction::Unchanged,
        }
    }

    /// Lets time pass on a test clock; without effect on the machine's.
    pub fn advance(&self, by: Duration) {
        let ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.0.advanced_ms.fetch_add(ms, Ordering::Relaxed);
        self.set(self.local().plus(by));
    }

    /// Makes a test clock jump; without effect on the machine's.
    pub fn set(&self, to: Timestamp) {
        if let Some(ms) = &self.0.test {
            ms.send_replace(to.0);
        }
    }

    /// A source of hints to look at the clock again.
    pub fn ticker(&self) -> Ticker {
        Ticker(self.0.test.as_ref().map(watch::Sender::subscribe))
    }
}

/// Says when to look at the clock again: after a while by the machine's timers, at each change of a test clock.
pub struct Ticker(Option<watch::Receiver<u64>>);

impl Ticker {
    /// Returns after `at_most` at the latest (the machine's clock), or once the time has changed since the last
    /// call (a test clock). Cancel safe.
    pub async fn tick(&mut self, at_most: Duration) {
        match &mut self.0 {
            None => tokio::time::sleep(at_most).await,
            Some(changes) => {
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

/// How people say a span: `11 h 59 min`, `14 min`, `20 s`. Rounded down, at most two units.
pub fn spoken(span: Duration) -> String {
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

    #[test]
    fn a_skew_of_30_s_is_tolerated_and_more_is_corrected() {
        let clock = Clock::test(at(1_000_000));
        assert_eq!(clock.observe(at(1_030_000)), Correction::Unchanged);
        assert_eq!(clock.now(), at(1_000_000));
        assert_eq!(clock.observe(at(1_030_001)), Correction::Began { offset_ms: 30_001 });
        assert_eq!(clock.now(), at(1_030_001));
        assert_eq!(clock.observe(at(900_000)), Correction::Unchanged, "still off: said once");
        assert_eq!(clock.now(), at(900_000));
        assert_eq!(clock.observe(at(1_000_000)), Correction::Ended);
        assert_eq!(clock.now(), at(1_000_000));
    }

    #[test]
    fn what_was_learned_of_a_clock_holds_until_it_jumps() {
        let (right, day) = (at(1_900_000_000_000), Duration::from_secs(86_400));
        for wrong in [right.plus(day), right.minus(day)] {
            let clock = Clock::test(wrong);
            clock.observe(right);
            clock.advance(day);
            assert_eq!(clock.now(), right.plus(day), "time passes");
            clock.set(wrong.plus(day + Duration::from_secs(30)));
            assert_eq!(clock.now(), right.plus(day + Duration::from_secs(30)), "a little is no jump");
            clock.set(right.plus(day));
            assert_eq!((clock.now(), clock.offset_ms()), (right.plus(day), 0), "it was put right");
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
    fn spans_are_said_in_at_most_two_units() {
        for (seconds, said) in [
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
            assert_eq!(spoken(Duration::from_secs(seconds)), said);
        }
    }
}
