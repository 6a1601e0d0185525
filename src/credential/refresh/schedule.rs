//! When the next refresh is due. Pure.
//!
//! By the wall clock alone, so that a laptop that slept refreshes on waking. A clock that jumps back must not put a
//! refresh off for as long.

use std::time::Duration;

use crate::os::clock::Timestamp;

/// A token is renewed this long before its end (docs/configuration.md section 4).
pub const AHEAD: Duration = Duration::from_secs(15 * 60);
/// The shortest time between two attempts, and the first pause after a failure.
pub const APART: Duration = Duration::from_secs(5 * 60);
/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// After so many failures in a row nothing more is tried.
pub const MOST_FAILURES: u32 = 3;

/// What is known of the attempts to renew one token.
#[derive(Debug, Default)]
pub struct Schedule {
    /// The token's fingerprint.
    token: Option<String>,
    failures: u32,
    not_before: Option<Timestamp>,
}

impl Schedule {
    /// Begins anew if the token in use is another than before.
    pub fn follow(&mut self, fingerprint: Option<&str>) {
        if self.token.as_deref() != fingerprint {
            *self = Self { token: fingerprint.map(str::to_owned), ..Self::default() };
        }
    }

    /// Begins anew, because a person asked.
    pub fn start_over(&mut self) {
        *self = Self { token: self.token.take(), ..Self::default() };
    }

    /// Whether nothing more is tried.
    pub fn has_given_up(&self) -> bool {
        self.failures >= MOST_FAILURES
    }

    /// When to renew a token that ends at `expires_at`; `None` if that was given up.
    pub fn due(&self, expires_at: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let not_before = self.not_before.filter(|not_before| not_before.since(now) <= LONGEST_PAUSE);
        let due = expires_at.minus(AHEAD);
        (!self.has_given_up()).then(|| not_before.map_or(due, |not_before| due.max(not_before)))
    }

    /// Puts the next attempt off until [`APART`] after the last.
    pub fn keep_apart(&mut self, last: Timestamp) {
        self.not_before = Some(last.plus(APART));
    }

    /// An attempt has failed. `jitter` from 0 to 255 spreads the next ones, by up to a quarter of the pause.
    pub fn failed(&mut self, now: Timestamp, jitter: u8) {
        self.failures += 1;
        let pause = APART * 2_u32.saturating_pow(self.failures - 1);
        let pause = pause + pause / 4 * u32::from(jitter) / 255;
        self.not_before = Some(now.plus(pause.min(LONGEST_PAUSE)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: u64 = 60;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_seconds(seconds as f64)
    }

    /// When a token that ends at 1000 min is renewed, in minutes.
    fn due(schedule: &Schedule, now: u64) -> Option<u64> {
        schedule.due(at(1000 * MIN), at(now * MIN)).map(|due| due.as_seconds() / MIN)
    }

    #[test]
    fn a_token_is_renewed_a_quarter_of_an_hour_before_its_end_and_after_failures_ever_later() {
        let mut schedule = Schedule::default();
        assert_eq!(due(&schedule, 0), Some(985));
        schedule.failed(at(985 * MIN), 0);
        assert_eq!(due(&schedule, 985), Some(990));
        schedule.failed(at(990 * MIN), 255);
        assert_eq!(due(&schedule, 990), Some(1002), "10 minutes and a quarter");
        schedule.failed(at(1002 * MIN), 0);
        assert_eq!((due(&schedule, 1002), schedule.has_given_up()), (None, true));
    }

    #[test]
    fn another_token_or_a_person_begins_anew() {
        let mut schedule = Schedule::default();
        schedule.follow(Some("a"));
        for _ in 0..MOST_FAILURES {
            schedule.failed(at(990 * MIN), 0);
        }
        schedule.follow(Some("a"));
        assert_eq!(due(&schedule, 990), None);
        schedule.follow(Some("b"));
        assert_eq!(due(&schedule, 990), Some(985));
        for _ in 0..MOST_FAILURES {
            schedule.failed(at(990 * MIN), 0);
        }
        schedule.start_over();
        assert_eq!(due(&schedule, 990), Some(985));
    }

    #[test]
    fn attempts_keep_apart_but_not_for_as_long_as_a_clock_jumps_back() {
        let mut schedule = Schedule::default();
        schedule.keep_apart(at(990 * MIN));
        assert_eq!(due(&schedule, 990), Some(995));
        assert_eq!(due(&schedule, 900), Some(985), "a clock that is put right");
    }
}
