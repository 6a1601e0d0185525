//! When the next refresh is due. Pure.
//!
//! Uses the wall clock alone, so that a machine that has slept refreshes on waking. If the clock jumps back, the next
//! refresh is not delayed by the size of the jump.

use std::time::Duration;

use crate::os::clock::Timestamp;

/// A token is refreshed this long before it expires (docs/configuration.md section 4).
pub const LEAD_TIME: Duration = Duration::from_secs(15 * 60);
/// The shortest time between two attempts, and the first pause after a failure.
const MIN_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The longest pause after a failure.
const MAX_PAUSE: Duration = Duration::from_secs(3600);
/// After this many failures in a row, automatic refresh stops.
pub const MAX_FAILURES: u32 = 3;

/// The state of the attempts to refresh one token.
#[derive(Debug, Default)]
pub struct Schedule {
    /// Fingerprint of the token.
    token: Option<String>,
    failures: u32,
    not_before: Option<Timestamp>,
}

impl Schedule {
    /// Starts over if the token in use has changed.
    pub fn follow(&mut self, fingerprint: Option<&str>) {
        if self.token.as_deref() != fingerprint {
            *self = Self { token: fingerprint.map(str::to_owned), ..Self::default() };
        }
    }

    /// Starts over, because a person has asked for a refresh.
    pub fn reset(&mut self) {
        *self = Self { token: self.token.take(), ..Self::default() };
    }

    /// Whether there were too many failures.
    pub fn has_given_up(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    /// When to refresh a token with this expiry; `None` after too many failures.
    pub fn due(&self, expires_at: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let not_before = self.not_before.filter(|not_before| not_before.since(now) <= MAX_PAUSE);
        let due = expires_at.minus(LEAD_TIME);
        (!self.has_given_up()).then(|| not_before.map_or(due, |not_before| due.max(not_before)))
    }

    /// Delays the next attempt until five minutes after the last.
    pub fn keep_distance(&mut self, last: Timestamp) {
        self.not_before = Some(last.plus(MIN_INTERVAL));
    }

    /// Doubles the pause after each failure. `jitter` (0 to 255) lengthens it by up to a quarter.
    pub fn record_failure(&mut self, now: Timestamp, jitter: u8) {
        self.failures += 1;
        let pause = MIN_INTERVAL * 2_u32.saturating_pow(self.failures - 1);
        let pause = pause + pause / 4 * u32::from(jitter) / 255;
        self.not_before = Some(now.plus(pause.min(MAX_PAUSE)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: u64 = 60;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_seconds(seconds as f64)
    }

    /// When a token that expires at 1000 min is refreshed, in minutes.
    fn due(schedule: &Schedule, now: u64) -> Option<u64> {
        schedule.due(at(1000 * MIN), at(now * MIN)).map(|due| due.as_seconds() / MIN)
    }

    #[test]
    fn refresh_is_due_15_minutes_before_the_expiry_and_later_after_failures() {
        let mut schedule = Schedule::default();
        assert_eq!(due(&schedule, 0), Some(985));
        schedule.record_failure(at(985 * MIN), 0);
        assert_eq!(due(&schedule, 985), Some(990));
        schedule.record_failure(at(990 * MIN), 255);
        assert_eq!(due(&schedule, 990), Some(1002), "10 minutes and a quarter");
        schedule.record_failure(at(1002 * MIN), 0);
        assert_eq!((due(&schedule, 1002), schedule.has_given_up()), (None, true));
    }

    #[test]
    fn another_token_or_a_request_starts_over() {
        let mut schedule = Schedule::default();
        schedule.follow(Some("a"));
        for _ in 0..MAX_FAILURES {
            schedule.record_failure(at(990 * MIN), 0);
        }
        schedule.follow(Some("a"));
        assert_eq!(due(&schedule, 990), None);
        schedule.follow(Some("b"));
        assert_eq!(due(&schedule, 990), Some(985));
        for _ in 0..MAX_FAILURES {
            schedule.record_failure(at(990 * MIN), 0);
        }
        schedule.reset();
        assert_eq!(due(&schedule, 990), Some(985));
    }

    #[test]
    fn attempts_keep_their_distance_even_if_the_clock_jumps_back() {
        let mut schedule = Schedule::default();
        schedule.keep_distance(at(990 * MIN));
        assert_eq!(due(&schedule, 990), Some(995));
        assert_eq!(due(&schedule, 900), Some(985), "a clock that was corrected");
    }
}
