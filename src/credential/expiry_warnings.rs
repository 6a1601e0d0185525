//! Warns before the token expires: at each step of `warn_before` and at the expiry, once for each token.
//!
//! Each check compares with the wall clock and no countdown is kept, so the warning is right after the machine has
//! slept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::warning::Warning;
use super::warning_history::WarningHistory;
use super::{Identity, OidcToken, refresh};
use crate::events::{Event, Events};
use crate::os::clock::{Clock, Mark, Timestamp};

/// The longest time between two checks (docs/configuration.md section 3).
const CHECK_INTERVAL: Duration = Duration::from_secs(15);

/// By this time before the expiry, automatic refresh has succeeded or failed: it starts 15 minutes before, waits at
/// most 5 minutes after another sidecar's attempt, and gives the CLI a minute.
const REFRESH_DEADLINE: Duration = Duration::from_secs(5 * 60);

/// The steps at which to warn, the longest first, with the number of warnings given at each.
#[derive(Debug)]
pub struct WarningSteps(Vec<Step>);

#[derive(Debug)]
struct Step {
    /// Time before the expiry; zero for the expiry itself.
    before: Duration,
    warnings: AtomicU64,
}

impl WarningSteps {
    /// Steps at these times before the expiry, in any order, and at the expiry.
    pub fn new(mut before: Vec<Duration>) -> Self {
        before.push(Duration::ZERO);
        before.sort_unstable_by(|a, b| b.cmp(a));
        before.dedup();
        Self(before.into_iter().map(|before| Step { before, warnings: AtomicU64::new(0) }).collect())
    }

    /// The first step. A token with at most this much time left counts as expiring.
    pub fn longest(&self) -> Duration {
        self.0.first().map(|step| step.before).unwrap_or_default()
    }

    /// Each step with the number of warnings that this process has given at it, the longest step first.
    pub fn counts(&self) -> impl Iterator<Item = (Duration, u64)> {
        self.0.iter().map(|step| (step.before, step.warnings.load(Ordering::Relaxed)))
    }

    /// The last step that a token with this much time left has reached.
    fn reached(&self, left: Duration) -> Option<&Step> {
        self.0.iter().rev().find(|step| left <= step.before)
    }

    /// The time until the next step; `None` if there is none.
    fn until_next(&self, left: Duration) -> Option<Duration> {
        self.0.iter().find(|step| step.before < left).map(|step| left - step.before)
    }
}

/// The warning for a token that is about to expire or has expired.
pub fn warning(token: &OidcToken, now: Timestamp) -> Warning {
    Warning::expiry(&token.claims.project_name(), token.expires_at.expiry(now))
}

/// Whether to warn of a token with this much time left. While automatic refresh works and has time, there is no reason
/// to run `vercel env pull`. A step that is suppressed for this reason is reported once the reason is gone.
pub fn should_warn(left: Duration, refresh: &refresh::Snapshot) -> bool {
    left <= REFRESH_DEADLINE || !refresh.is_working()
}

/// Warns in the log and by events until the future is dropped. `sync_clock` is called before a token is reported as
/// expired or not yet valid: it lets upstream correct our clock.
pub async fn run<F>(
    mut identity: watch::Receiver<Arc<Identity>>,
    mut refresh: watch::Receiver<refresh::Snapshot>,
    clock: Clock,
    steps: Arc<WarningSteps>,
    mut history: WarningHistory,
    events: Events,
    sync_clock: F,
) where
    F: AsyncFn(),
{
    let mut ticker = clock.ticker();
    let mut synced_for = None;
    loop {
        let current = identity.borrow_and_update().clone();
        let mut pause = CHECK_INTERVAL;
        if let Some(token) = current.oidc() {
            let is_synced = |(fingerprint, mark): &(String, Mark)| {
                fingerprint == token.fingerprint() && !clock.has_jumped_since(*mark)
            };
            if current.is_outside_validity(clock.now()) && !synced_for.as_ref().is_some_and(is_synced) {
                synced_for = Some((token.fingerprint().to_owned(), clock.mark()));
                sync_clock().await;
            }
            let now = clock.now();
            let left = token.expires_at.since(now);
            let is_due = should_warn(left, &refresh.borrow_and_update());
            if is_due
                && let Some(step) = steps.reached(left)
                && history.record(token.fingerprint(), step.before).await
            {
                step.warnings.fetch_add(1, Ordering::Relaxed);
                let (warning, project) = (warning(token, now), token.claims.project_name());
                warning.log(Some(&project));
                events.publish(Event::Warning(warning.to_event(now, project)));
            }
            pause = steps.until_next(left).map_or(CHECK_INTERVAL, |next| next.min(CHECK_INTERVAL));
        }
        tokio::select! {
            changed = identity.changed() => if changed.is_err() { return },
            Ok(()) = refresh.changed() => {}
            () = ticker.tick(pause) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::refresh::AutoRefresh;
    use super::*;
    use crate::remedy::Remedy;

    const MIN: u64 = 60;

    fn steps() -> WarningSteps {
        WarningSteps::new([5, 60, 15].map(|m| Duration::from_secs(m * MIN)).to_vec())
    }

    #[test]
    fn the_last_step_reached_counts() {
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
            assert_eq!(steps.reached(left).map(|step| step.before.as_secs()), step, "{left:?} left");
            assert_eq!(steps.until_next(left).map(|next| next.as_secs()), next, "{left:?} left");
        }
        assert_eq!(WarningSteps::new(Vec::new()).longest(), Duration::ZERO);
    }

    #[test]
    fn no_warning_while_automatic_refresh_works_and_has_time() {
        let off = refresh::Snapshot::new(false);
        let in_order = refresh::Snapshot::new(true);
        let last_error = Some("the Vercel CLI ended with code 1".to_owned());
        let failed = refresh::Snapshot { last_error, ..in_order.clone() };
        let auto = AutoRefresh::GaveUp(Warning::refresh_gave_up(3, &Remedy::run("vercel login")));
        let gave_up = refresh::Snapshot { auto, ..failed.clone() };
        let no_cli = Some(Warning::refresh_unavailable(&"there is none"));
        let unavailable = refresh::Snapshot { no_cli, ..in_order.clone() };
        let running = refresh::Snapshot { is_running: true, ..in_order.clone() };
        let waiting = refresh::Snapshot { auto: AutoRefresh::Delayed(Timestamp::from_millis(1)), ..in_order.clone() };
        for (state, snapshot, expected) in [
            ("off", off, [true; 4]),
            ("in order", in_order, [false, false, true, true]),
            ("running", running, [false, false, true, true]),
            ("delayed", waiting, [false, false, true, true]),
            ("failed", failed, [true; 4]),
            ("gave up", gave_up, [true; 4]),
            ("unavailable", unavailable, [true; 4]),
        ] {
            let warns = [60, 15, 5, 0].map(|left| should_warn(Duration::from_secs(left * MIN), &snapshot));
            assert_eq!(warns, expected, "{state}");
        }
    }

    /// Whether a warning is given for each of these tokens, with their seconds left.
    async fn is_reported(tokens: &[(&str, u64)]) -> Vec<bool> {
        let (steps, mut history) = (steps(), WarningHistory::in_memory());
        let mut reported = Vec::new();
        for (token, left) in tokens {
            reported.push(match steps.reached(Duration::from_secs(*left)) {
                Some(step) => history.record(token, step.before).await,
                None => false,
            });
        }
        reported
    }

    #[tokio::test]
    async fn each_step_is_reported_once_and_only_the_last_one_reached() {
        let lives = [3601, 3600, 3599, 900, 600, 300, 1, 0, 0].map(|left| ("a", left));
        assert_eq!(is_reported(&lives).await, [false, true, false, true, false, true, false, true, false]);
        assert_eq!(is_reported(&[("a", 20_000), ("a", 200), ("a", 100)]).await, [false, true, false], "after a sleep");
        assert_eq!(is_reported(&[("a", 0)]).await, [true], "after the end");
    }

    #[tokio::test]
    async fn a_clock_that_jumps_back_repeats_nothing_and_a_new_token_starts_over() {
        let lives = [("a", 100), ("a", 86_400), ("a", 3000), ("b", 3000), ("a", 100)];
        assert_eq!(is_reported(&lives).await, [true, false, false, true, false]);
    }
}
