//! Says in time that the token is about to end: at each step of `warn_before` and at its end, once for each token.
//!
//! Compares the wall clock at each look, so a laptop that slept is told the right thing on waking; never counts down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::warning::Warning;
use super::warning_history::WarningHistory;
use super::{Identity, OidcToken, refresh};
use crate::events::{self, Event, Events};
use crate::os::clock::{Clock, Mark, Timestamp};

/// The longest time between two looks at the clock (docs/configuration.md section 3).
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// A refresher in working order has got a fresh token, or has failed, before a token has no more life than this: it
/// begins 15 min ahead, waits 5 min at most for its turn after another sidecar's, and gives the CLI a minute.
const REFRESHED_BY: Duration = Duration::from_secs(5 * 60);

/// The steps at which a token's end is warned of, and how often each was.
#[derive(Debug)]
pub struct WarningSteps(Vec<Step>);

/// So long before the end; the end itself is the step of zero.
#[derive(Debug)]
struct Step {
    before: Duration,
    said: AtomicU64,
}

impl WarningSteps {
    /// WarningSteps this long before the end, in any order, and the end.
    pub fn new(mut before: Vec<Duration>) -> Self {
        before.push(Duration::ZERO);
        before.sort_unstable_by(|a, b| b.cmp(a));
        before.dedup();
        Self(before.into_iter().map(|before| Step { before, said: AtomicU64::new(0) }).collect())
    }

    /// A token with no more life than this is about to end.
    pub fn longest(&self) -> Duration {
        self.0.first().map(|step| step.before).unwrap_or_default()
    }

    /// How often each was said by this process, the longest step first.
    pub fn counts(&self) -> impl Iterator<Item = (Duration, u64)> {
        self.0.iter().map(|step| (step.before, step.said.load(Ordering::Relaxed)))
    }

    /// The step that a token with so much life left is in.
    fn at(&self, left: Duration) -> Option<&Step> {
        self.0.iter().rev().find(|step| left <= step.before)
    }

    /// How long until the next step; `None` if none is left.
    fn until_next(&self, left: Duration) -> Option<Duration> {
        self.0.iter().find(|step| step.before < left).map(|step| left - step.before)
    }
}

/// What is to be said at `now` of a token whose end is near or has been.
pub fn warning(token: &OidcToken, now: Timestamp) -> Warning {
    let project = token.claims.project_name();
    match token.expires_at.since(now) {
        Duration::ZERO => Warning::expired(&project, now.since(token.expires_at)),
        left => Warning::expiring(&project, left),
    }
}

/// Whether people are to do something about a token with so much life left. Not while the sidecar is about to do it by
/// itself: they would run `vercel env pull` for nothing. A step that is kept back so is said once it is not any more.
pub fn concerns_people(left: Duration, refresh: &refresh::Snapshot) -> bool {
    left <= REFRESHED_BY || !refresh.is_in_order()
}

/// Warns on stderr and by events for as long as it is polled. `ask_clock` lets upstream correct our clock before a token
/// is declared dead.
pub async fn run<F>(
    mut identity: watch::Receiver<Arc<Identity>>,
    mut refresh: watch::Receiver<refresh::Snapshot>,
    clock: Clock,
    steps: Arc<WarningSteps>,
    mut warned: WarningHistory,
    events: Events,
    ask_clock: F,
) where
    F: AsyncFn(),
{
    let mut ticker = clock.ticker();
    let mut asked_for = None;
    loop {
        let snapshot = identity.borrow_and_update().clone();
        let mut pause = LOOK_EVERY;
        if let Some(token) = snapshot.oidc() {
            let has_asked = |(fingerprint, mark): &(String, Mark)| {
                fingerprint == token.fingerprint() && !clock.has_jumped_since(*mark)
            };
            if snapshot.looks_out_of_time(clock.now()) && !asked_for.as_ref().is_some_and(has_asked) {
                asked_for = Some((token.fingerprint().to_owned(), clock.mark()));
                ask_clock().await;
            }
            let now = clock.now();
            let left = token.expires_at.since(now);
            let is_theirs = concerns_people(left, &refresh.borrow_and_update());
            if is_theirs
                && let Some(step) = steps.at(left)
                && warned.is_news(token.fingerprint(), step.before).await
            {
                step.said.fetch_add(1, Ordering::Relaxed);
                events.publish(Event::Warning(say(token, now)));
            }
            pause = steps.until_next(left).map_or(LOOK_EVERY, |next| next.min(LOOK_EVERY));
        }
        tokio::select! {
            changed = identity.changed() => if changed.is_err() { return },
            Ok(()) = refresh.changed() => {}
            () = ticker.tick(pause) => {}
        }
    }
}

/// Says it in the log, and what is to be told of it.
fn say(token: &OidcToken, at: Timestamp) -> events::Warning {
    let project = token.claims.project_name();
    let warning = warning(token, at);
    warning.say(Some(&project));
    warning.told(at, project)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::Remedy;

    const MIN: u64 = 60;

    fn steps() -> WarningSteps {
        WarningSteps::new([5, 60, 15].map(|m| Duration::from_secs(m * MIN)).to_vec())
    }

    #[test]
    fn a_token_is_in_the_last_step_that_it_has_come_to() {
        let steps = steps();
        assert_eq!(steps.longest(), Duration::from_secs(60 * MIN));
        for (left, step, next) in [
            (3700, None, Some(100)),
            (3601, None, Some(1)),
            (3600, Some(3600), Some(2700)),
            (901, Some(3600), Some(1)),
            (900, Some(900), Some(600)),
            (300, Some(300), Some(300)),
            (1, Some(300), Some(1)),
            (0, Some(0), None),
        ] {
            let left = Duration::from_secs(left);
            assert_eq!(steps.at(left).map(|step| step.before.as_secs()), step, "{left:?} left");
            assert_eq!(steps.until_next(left).map(|next| next.as_secs()), next, "{left:?} left");
        }
        assert_eq!(WarningSteps::new(Vec::new()).longest(), Duration::ZERO);
    }

    #[test]
    fn nobody_is_bothered_while_a_refresher_in_working_order_has_time() {
        let off = refresh::Snapshot::first(false);
        let in_order = refresh::Snapshot::first(true);
        let last_error = Some("the Vercel CLI ended with code 1".to_owned());
        let failed = refresh::Snapshot { last_error, ..in_order.clone() };
        let gave_up = Some(Warning::refresh_gave_up(3, &Remedy::run("vercel login")));
        let gave_up = refresh::Snapshot { warning: gave_up, activity: refresh::Activity::GaveUp, ..failed.clone() };
        let unavailable = Some(Warning::refresh_unavailable("there is none"));
        let unavailable = refresh::Snapshot { warning: unavailable, ..in_order.clone() };
        let running = refresh::Snapshot { activity: refresh::Activity::Running, ..in_order.clone() };
        let waiting = refresh::Snapshot { activity: refresh::Activity::Waiting, ..in_order.clone() };
        for (state, snapshot, is_said) in [
            ("off", off, [true; 4]),
            ("in order", in_order, [false, false, true, true]),
            ("under way", running, [false, false, true, true]),
            ("waiting for its turn", waiting, [false, false, true, true]),
            ("failed", failed, [true; 4]),
            ("gave up", gave_up, [true; 4]),
            ("unavailable", unavailable, [true; 4]),
        ] {
            let said = [60, 15, 5, 0].map(|left| concerns_people(Duration::from_secs(left * MIN), &snapshot));
            assert_eq!(said, is_said, "{state}");
        }
    }

    /// What is said of tokens with `left` seconds of life, one after another.
    async fn said(tokens: &[(&str, u64)]) -> Vec<bool> {
        let (steps, mut warned) = (steps(), WarningHistory::in_memory());
        let mut said = Vec::new();
        for (token, left) in tokens {
            said.push(match steps.at(Duration::from_secs(*left)) {
                Some(step) => warned.is_news(token, step.before).await,
                None => false,
            });
        }
        said
    }

    #[tokio::test]
    async fn each_step_is_said_once_and_only_the_one_it_is_in() {
        let lives = [3601, 3600, 3599, 900, 600, 300, 1, 0, 0].map(|left| ("a", left));
        assert_eq!(said(&lives).await, [false, true, false, true, false, true, false, true, false]);
        assert_eq!(said(&[("a", 20_000), ("a", 200), ("a", 100)]).await, [false, true, false], "after a sleep");
        assert_eq!(said(&[("a", 0)]).await, [true], "after the end");
    }

    #[tokio::test]
    async fn a_clock_that_jumps_back_repeats_nothing_and_a_new_token_begins_anew() {
        let lives = [("a", 100), ("a", 86_400), ("a", 3000), ("b", 3000), ("a", 100)];
        assert_eq!(said(&lives).await, [true, false, false, true, false]);
    }
}
