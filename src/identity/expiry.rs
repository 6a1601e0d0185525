//! Says in time that the token is about to end: at each step of `warn_before` and at its end, once for each token.
//!
//! Compares the wall clock at each look, so a laptop that slept is told the right thing on waking; never counts down.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, warn};

use super::Identity;
use crate::clock::{Clock, Timestamp, spoken};
use crate::events::{self, Event, Events};

/// The longest time between two looks at the clock (interface.md section 5).
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Tokens whose warnings are remembered.
const REMEMBERED_TOKENS: usize = 32;

/// What is to be said of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warning {
    /// This much of its life is left.
    Expiring(Duration),
    /// It ended this long ago.
    Expired(Duration),
}

/// Remembers what was said.
pub struct Warner {
    /// Largest first.
    steps: Vec<Duration>,
    /// Fingerprints, and how many steps each has passed.
    said: VecDeque<(String, usize)>,
}

impl Warner {
    /// Warns this long before the end, in any order.
    pub fn new(mut steps: Vec<Duration>) -> Self {
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps.dedup();
        Self { steps, said: VecDeque::new() }
    }

    /// What to say at `now` of the token `fingerprint` that ends at `expires_at`: at most one warning, for the step it
    /// is in, never again for that step or an earlier one.
    pub fn look(&mut self, fingerprint: &str, expires_at: Timestamp, now: Timestamp) -> Option<Warning> {
        let left = expires_at.since(now);
        let passed = match left {
            Duration::ZERO => self.steps.len() + 1,
            left => self.steps.iter().take_while(|step| left <= **step).count(),
        };
        let said = match self.said.iter_mut().find(|(known, _)| known == fingerprint) {
            Some((_, said)) => said,
            None => {
                self.said.truncate(REMEMBERED_TOKENS - 1);
                self.said.push_front((fingerprint.to_owned(), 0));
                &mut self.said[0].1
            }
        };
        if passed <= *said {
            return None;
        }
        *said = passed;
        Some(match left {
            Duration::ZERO => Warning::Expired(now.since(expires_at)),
            left => Warning::Expiring(left),
        })
    }

    /// How long until the next step of a token that ends at `expires_at`; `None` if none is left.
    fn until_next_step(&self, expires_at: Timestamp, now: Timestamp) -> Option<Duration> {
        let left = expires_at.since(now);
        let steps = self.steps.iter().copied().chain([Duration::ZERO]);
        steps.filter(|step| *step < left).map(|step| left - step).min()
    }
}

/// Warns on stderr and by events for as long as it is polled. `ask_clock` lets upstream correct our clock before a token
/// is declared dead.
pub async fn run<F>(
    mut identity: watch::Receiver<Arc<Identity>>,
    clock: Clock,
    steps: Vec<Duration>,
    events: Events,
    ask_clock: F,
) where
    F: AsyncFn(),
{
    let mut warner = Warner::new(steps);
    let mut ticker = clock.ticker();
    let mut asked_for = String::new();
    loop {
        let snapshot = identity.borrow_and_update().clone();
        let mut pause = LOOK_EVERY;
        if let Some(token) = snapshot.oidc() {
            if snapshot.looks_out_of_time(clock.now()) && asked_for != token.fingerprint() {
                token.fingerprint().clone_into(&mut asked_for);
                ask_clock().await;
            }
            let now = clock.now();
            if let Some(warning) = warner.look(token.fingerprint(), token.expires_at, now) {
                events.tell(Event::Warning(say(warning, token.claims.project_name(), now)));
            }
            pause = warner.until_next_step(token.expires_at, now).map_or(LOOK_EVERY, |next| next.min(LOOK_EVERY));
        }
        tokio::select! {
            changed = identity.changed() => if changed.is_err() { return },
            () = ticker.tick(pause) => {}
        }
    }
}

/// Says it in the log, and what is to be told of it.
fn say(warning: Warning, project: String, at: Timestamp) -> events::Warning {
    let hint = "vercel env pull";
    let (code, message) = match warning {
        Warning::Expiring(left) => {
            let message = format!("the OIDC token of {project} expires in {}, run `{hint}`", spoken(left));
            warn!(code = "oidc_token_expiring", project, hint, "{message}");
            ("oidc_token_expiring", message)
        }
        Warning::Expired(ago) => {
            let message = format!("the OIDC token of {project} expired {} ago, run `{hint}`", spoken(ago));
            error!(code = "oidc_token_expired", project, hint, "{message}");
            ("oidc_token_expired", message)
        }
    };
    events::Warning { at, code, message, hint, project }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: u64 = 60;

    fn warner() -> Warner {
        Warner::new([5, 60, 15].map(|m| Duration::from_secs(m * MIN)).to_vec())
    }

    /// What is said of a token with `left` seconds of life (negative: dead for so long).
    fn look(warner: &mut Warner, token: &str, left: i64) -> Option<Warning> {
        let now = 1_000_000_u64;
        let end = Timestamp::from_seconds(now.saturating_add_signed(left) as f64);
        warner.look(token, end, Timestamp::from_seconds(now as f64))
    }

    fn expiring(seconds: u64) -> Option<Warning> {
        Some(Warning::Expiring(Duration::from_secs(seconds)))
    }

    #[test]
    fn warns_once_at_each_step_and_once_at_the_end() {
        let mut warner = warner();
        for (left, said) in [
            (3601, None),
            (3600, expiring(3600)),
            (3599, None),
            (900, expiring(900)),
            (600, None),
            (300, expiring(300)),
            (1, None),
            (0, Some(Warning::Expired(Duration::ZERO))),
            (-60, None),
        ] {
            assert_eq!(look(&mut warner, "a", left), said, "{left} s left");
        }
    }

    #[test]
    fn says_only_the_step_it_is_in_after_a_sleep_or_a_late_start() {
        let mut warner = warner();
        assert_eq!(look(&mut warner, "a", 20_000), None);
        assert_eq!(look(&mut warner, "a", 200), expiring(200));
        assert_eq!(look(&mut warner, "b", -13 * 3600), Some(Warning::Expired(Duration::from_secs(13 * 3600))));
    }

    #[test]
    fn a_clock_that_jumps_back_repeats_nothing_and_a_new_token_begins_anew() {
        let mut warner = warner();
        assert_eq!(look(&mut warner, "a", 100), expiring(100));
        assert_eq!(look(&mut warner, "a", 86_400), None);
        assert_eq!(look(&mut warner, "a", 3000), None);
        assert_eq!(look(&mut warner, "b", 3000), expiring(3000));
        assert_eq!(look(&mut warner, "a", 100), None, "also after another token was there");
    }

    #[test]
    fn knows_when_the_next_step_is_due() {
        let warner = warner();
        let next = |left: u64| {
            let seconds = |s: u64| Timestamp::from_seconds(s as f64);
            warner.until_next_step(seconds(100 + left), seconds(100)).map(|d| d.as_secs())
        };
        assert_eq!(next(3700), Some(100));
        assert_eq!(next(3600), Some(2700));
        assert_eq!(next(10), Some(10));
        assert_eq!(next(0), None);
    }
}
