//! Gets a fresh OIDC token in time, by the Vercel CLI: as a person asks, and by the clock if that was asked for
//! (docs/configuration.md section 4).
//!
//! Never because of an app's request. The token is offered to the owner of the identity, who judges it, and is kept in
//! memory only; the env file is not written. Whose token the clock may have got is for [`approvals`] to say: the token in
//! use and the link in `.vercel/` may have come with a repository, and count only where a person asks.

pub mod approvals;
pub mod lock;
pub mod schedule;
pub mod vercel_cli;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::warning::{INSTALL, PULL, Warning};
use super::watch::TokenSink;
use super::{Claims, Credential, Identity, OidcToken};
use crate::events::{Event, Events};
use crate::os::clock::{Clock, Timestamp, spoken};
use crate::os::safe_read;
use crate::remedy::Remedy;
use approvals::Approvals;
use lock::RefreshLock;
use schedule::Schedule;
use vercel_cli::{Cli, CliEnvironment, Target};

/// The longest time between two looks at the clock.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// A person may ask this often.
const APART_IF_ASKED: Duration = Duration::from_secs(60);
/// As many may wait for one refresh.
const WAITING: usize = 64;

/// How to refresh.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether the clock says when; else only people do.
    pub by_the_clock: bool,
    /// The project's directory, all links followed.
    pub project: PathBuf,
    /// Where sidecars keep their state, if there is a place.
    pub state_dir: Option<PathBuf>,
    /// Upstream, by its origin.
    pub upstream: String,
    /// What the CLI is given of our environment.
    pub surroundings: CliEnvironment,
}

/// A fresh token is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refreshed {
    /// The project, for people.
    pub project: String,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// Why there is no fresh token. Without a secret, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nothing says of which project one is wanted.
    #[error("there is no OIDC token that says which project it is for, and {0}")]
    NoProject(&'static str),
    /// There was an attempt less than a minute ago; how long to wait.
    #[error("the last attempt was less than a minute ago, the next may be made in {}", spoken(*.0))]
    TooSoon(Duration),
    /// There is no CLI that could be run, for this reason.
    #[error("{0}")]
    NoCli(String),
    /// It cannot be tried here, for this reason.
    #[error("{0}")]
    Unavailable(String),
    /// The CLI did not give a token, for this reason.
    #[error("{0}")]
    Cli(String),
    /// The CLI's token was not taken, for this reason.
    #[error("the token that the Vercel CLI printed is not used: {0}")]
    Refused(String),
}

impl Failure {
    /// What may mend it.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NoProject(_) => Remedy::run("vercel link"),
            Self::NoCli(_) => Remedy::run(INSTALL),
            Self::Cli(_) => Remedy::run("vercel login"),
            Self::Refused(_) | Self::Unavailable(_) => Remedy::run(PULL),
            Self::TooSoon(left) => Remedy::advice(format!("ask again in {}", spoken(*left))),
        }
    }
}

/// What is done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Nothing is due.
    Idle,
    /// A refresh is under way.
    Running,
    /// A refresh is due, and waits for its time after another.
    Waiting,
    /// A refresh is due, of a project that nobody has approved yet.
    Held,
    /// Nothing more is tried until the token changes or a person asks.
    GaveUp,
}

/// How it stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Whether the clock says when.
    pub by_the_clock: bool,
    /// What is done now.
    pub activity: Activity,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
    /// When the clock says that the next is due.
    pub next_at: Option<Timestamp>,
    /// Why no fresh token will come by itself, while that holds.
    pub warning: Option<Warning>,
}

impl Snapshot {
    /// Nothing has happened yet.
    pub fn first(by_the_clock: bool) -> Self {
        Self { by_the_clock, activity: Activity::Idle, last_error: None, next_at: None, warning: None }
    }

    /// Whether a fresh token may be counted on: the clock says when, and nothing has gone wrong.
    pub fn is_in_order(&self) -> bool {
        self.by_the_clock && self.last_error.is_none() && self.warning.is_none()
    }
}

type Reply = oneshot::Sender<Result<Refreshed, Failure>>;

/// Asks for a refresh. Without an identity that could be refreshed (an access token) it says so.
#[derive(Clone, Default, Debug)]
pub struct RefreshHandle(Option<mpsc::Sender<Reply>>);

impl RefreshHandle {
    /// Has a fresh token got now, or waits for the one that is under way. Takes as long as the CLI, and others before it.
    pub async fn ask(&self) -> Result<Refreshed, Failure> {
        let unavailable = |reason: &str| Failure::Unavailable(reason.to_owned());
        let asks = self.0.as_ref().ok_or_else(|| unavailable("VERCEL_TOKEN is sent, which cannot be refreshed"))?;
        let (reply, answer) = oneshot::channel();
        let _ = asks.send(reply).await;
        answer.await.unwrap_or_else(|_| Err(unavailable("the sidecar is about to end")))
    }
}

/// Refreshes for as long as it is polled.
pub struct Refresher {
    options: Options,
    identity: watch::Receiver<Arc<Identity>>,
    offers: TokenSink,
    clock: Clock,
    events: Events,
    asks: mpsc::Receiver<Reply>,
    snapshot: watch::Sender<Snapshot>,
    schedule: Schedule,
    /// Whose token upstream has accepted last.
    accepted: watch::Receiver<Option<Arc<Credential>>>,
    approvals: Approvals,
    /// The token that the clock does not renew for want of an approval, by its fingerprint, and what was said of that.
    held: Option<(String, Warning)>,
    /// Holds while there is no CLI that could be run by the clock.
    unavailable: Option<Warning>,
    /// What was said when it was last given up.
    gave_up: Option<Warning>,
}

/// Who wants a refresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Clock,
    Person,
}

impl Refresher {
    /// A refresher of what `offers` leads to and `identity` tells of, for projects that were `accepted`; how to ask it, and
    /// how it stands.
    pub fn new(
        options: Options,
        identity: watch::Receiver<Arc<Identity>>,
        accepted: watch::Receiver<Option<Arc<Credential>>>,
        offers: TokenSink,
        clock: Clock,
        events: Events,
    ) -> (Self, RefreshHandle, watch::Receiver<Snapshot>) {
        let (asker, asks) = mpsc::channel(WAITING);
        let snapshot = watch::Sender::new(Snapshot::first(options.by_the_clock));
        let standing = snapshot.subscribe();
        let schedule = Schedule::default();
        let approvals = Approvals::new(options.state_dir.as_deref(), &options.upstream, &options.project);
        let this = Self {
            options,
            identity,
            offers,
            clock,
            events,
            asks,
            snapshot,
            schedule,
            accepted,
            approvals,
            held: None,
            unavailable: None,
            gave_up: None,
        };
        (this, RefreshHandle(Some(asker)), standing)
    }

    /// Looks at the clock, and does what is due or asked for.
    pub async fn run(mut self) {
        let mut ticker = self.clock.ticker();
        let mut has_looked = false;
        loop {
            // It may be installed any time.
            if self.options.by_the_clock && (!std::mem::replace(&mut has_looked, true) || self.unavailable.is_some()) {
                let _ = self.find_cli().await;
            }
            self.identity.mark_unchanged();
            if self.due().is_some_and(|due| due <= self.clock.now()) && self.is_approved().await {
                let outcome = self.attempt(Cause::Clock).await;
                // Who asked meanwhile is given what came of it.
                while let Some(outcome) = &outcome
                    && let Ok(reply) = self.asks.try_recv()
                {
                    let _ = reply.send(outcome.clone());
                }
            }
            self.tell(None);
            tokio::select! {
                changed = self.identity.changed() => if changed.is_err() { return },
                Ok(()) = self.accepted.changed(), if self.options.by_the_clock => self.note_accepted().await,
                Some(reply) = self.asks.recv() => {
                    self.schedule.start_over();
                    if let Some(outcome) = self.attempt(Cause::Person).await {
                        let _ = reply.send(outcome.clone());
                        while let Ok(reply) = self.asks.try_recv() {
                            let _ = reply.send(outcome.clone());
                        }
                    }
                }
                () = ticker.tick(LOOK_EVERY) => {}
            }
        }
    }

    /// When the clock says that the token in use is to be renewed.
    fn due(&mut self) -> Option<Timestamp> {
        let identity = self.identity.borrow().clone();
        let token = identity.oidc();
        self.schedule.follow(token.map(OidcToken::fingerprint));
        let token = token.filter(|_| self.options.by_the_clock)?;
        self.schedule.due(token.expires_at, self.clock.now())
    }

    /// Tells how it stands, and what came of an attempt.
    fn tell(&mut self, outcome: Option<&Result<Refreshed, Failure>>) {
        let next_at = self.due();
        let now = self.clock.now();
        let identity = self.identity.borrow().clone();
        let is_late = identity.oidc().is_some_and(|token| token.expires_at.minus(schedule::AHEAD) <= now);
        let held = self.held.as_ref().filter(|(held, _)| identity.oidc().is_some_and(|t| t.fingerprint() == held));
        let next_at = next_at.filter(|_| held.is_none());
        let activity = match next_at {
            _ if held.is_some() => Activity::Held,
            _ if self.options.by_the_clock && self.schedule.has_given_up() => Activity::GaveUp,
            Some(next_at) if is_late && next_at > now => Activity::Waiting,
            _ => Activity::Idle,
        };
        let gave_up = self.gave_up.as_ref().filter(|_| activity == Activity::GaveUp);
        let warning = gave_up.or(self.unavailable.as_ref()).or(held.map(|(_, warning)| warning));
        self.snapshot.send_modify(|snapshot| {
            (snapshot.activity, snapshot.next_at) = (activity, next_at);
            snapshot.warning = warning.cloned();
            if let Some(outcome) = outcome {
                snapshot.last_error = outcome.as_ref().err().map(ToString::to_string);
            }
        });
    }

    /// Tries to get a fresh token; `None` if the clock has no need of one any more.
    async fn attempt(&mut self, cause: Cause) -> Option<Result<Refreshed, Failure>> {
        self.snapshot.send_modify(|snapshot| snapshot.activity = Activity::Running);
        let outcome = self.refresh(cause).await.transpose()?;
        if let Err(Failure::TooSoon(_)) = outcome {
            // Nothing was tried.
            self.tell(None);
            return Some(outcome);
        }
        if let Err(failure) = &outcome {
            let mut jitter = [0];
            let _ = getrandom::fill(&mut jitter);
            self.schedule.failed(self.clock.now(), jitter[0]);
            let remedy = failure.remedy();
            let (hint, command) = (&*remedy.hint, remedy.command.as_deref());
            warn!(code = "refresh_failed", hint, command, "could not refresh the OIDC token: {failure}, {remedy}");
            if cause == Cause::Clock && self.schedule.has_given_up() {
                let warning = Warning::refresh_gave_up(schedule::MOST_FAILURES, &remedy);
                self.alert(&warning);
                self.gave_up = Some(warning);
            }
        }
        self.tell(Some(&outcome));
        Some(outcome)
    }

    async fn refresh(&mut self, cause: Cause) -> Result<Option<Refreshed>, Failure> {
        let target = self.target(cause).await?;
        let cli = self.find_cli().await.map_err(Failure::NoCli)?;
        let state_dir = self.options.state_dir.as_deref();
        let state_dir =
            state_dir.ok_or_else(|| Failure::Unavailable("neither XDG_STATE_HOME nor HOME is set".into()))?;
        let turn = RefreshLock::take(state_dir, &target.project_id, &self.options.project).await;
        let turn = turn.map_err(Failure::Unavailable)?;
        let now = self.clock.now();
        let last = turn.last(now);
        match cause {
            Cause::Clock => {
                if let Some(last) = last {
                    self.schedule.keep_apart(last);
                }
                // The token may have been renewed by other means while others had their turns.
                if self.due().is_none_or(|due| due > now) {
                    return Ok(None);
                }
            }
            Cause::Person => {
                let left = last.map(|last| last.plus(APART_IF_ASKED).since(now)).unwrap_or_default();
                if !left.is_zero() {
                    return Err(Failure::TooSoon(left));
                }
            }
        }
        let not_noted = |e| format!("could not note the attempt in {}: {e}", turn.directory().display());
        turn.begin(now).map_err(|e| Failure::Unavailable(not_noted(e)))?;
        let printed = vercel_cli::project_token(&cli, &target, &self.options.surroundings, turn.directory()).await;
        let refused = |reason: String| Failure::Refused(reason);
        let token = OidcToken::decode(printed.map_err(Failure::Cli)?).map_err(|reason| refused(reason.to_string()))?;
        if target_of(&token.claims).as_ref() != Some(&target) {
            return Err(refused(format!("it is that of {}", token.claims.description())));
        }
        let refreshed = Refreshed { project: token.claims.project_name(), expires_at: token.expires_at };
        self.offers.offer(token).await.map_err(refused)?;
        if cause == Cause::Person {
            self.approvals.confirmed(&target).await;
        }
        Ok(Some(refreshed))
    }

    /// Remembers whose token upstream has accepted.
    async fn note_accepted(&mut self) {
        let credential = self.accepted.borrow_and_update().clone();
        if let Some(target) = credential.and_then(|credential| target_of(credential.claims()?)) {
            self.approvals.accepted(&target).await;
        }
    }

    /// Whether the clock may renew the token in use. That it may not is said once for each token.
    async fn is_approved(&mut self) -> bool {
        let identity = self.identity.borrow().clone();
        let named = identity.oidc().and_then(|token| Some((token, target_of(&token.claims)?)));
        // Without a project there is nothing to approve, which the attempt says.
        let Some((token, target)) = named else { return true };
        if self.accepted.has_changed().unwrap_or_default() {
            self.note_accepted().await;
        }
        let project = self.options.project.clone();
        let linked = tokio::task::spawn_blocking(move || linked(&project)).await.ok().flatten();
        if self.approvals.allow(&target, linked.as_ref()).await {
            self.held = None;
            return true;
        }
        if self.held.as_ref().is_none_or(|(held, _)| held != token.fingerprint()) {
            let warning = Warning::refresh_held(&target.project_id, &target.owner_id);
            self.alert(&warning);
            self.held = Some((token.fingerprint().to_owned(), warning));
        }
        false
    }

    /// Whose token to get.
    async fn target(&self, cause: Cause) -> Result<Target, Failure> {
        let identity = self.identity.borrow().clone();
        match (identity.oidc().and_then(|token| target_of(&token.claims)), cause) {
            (Some(target), _) => Ok(target),
            (None, Cause::Clock) => Err(Failure::NoProject("only a person may have another read")),
            (None, Cause::Person) => {
                let project = self.options.project.clone();
                let linked = tokio::task::spawn_blocking(move || linked(&project)).await;
                linked.ok().flatten().ok_or(Failure::NoProject("no project is linked in .vercel/project.json"))
            }
        }
    }

    /// Finds the CLI. That there is none is said once, if the clock needs it.
    async fn find_cli(&mut self) -> Result<Cli, String> {
        let (path, project) = (self.options.surroundings.path.clone(), self.options.project.clone());
        let finding = tokio::task::spawn_blocking(move || Cli::find(&path, &project));
        let found = finding.await.unwrap_or_else(|e| Err(e.to_string()));
        let warning = found.as_ref().err().filter(|_| self.options.by_the_clock);
        let warning = warning.map(|reason| Warning::refresh_unavailable(reason));
        if let Some(warning) = warning.as_ref().filter(|_| self.unavailable.is_none()) {
            self.alert(warning);
        }
        if warning.is_some() || self.unavailable.is_some() {
            self.snapshot.send_modify(|snapshot| snapshot.last_error = found.as_ref().err().cloned());
        }
        self.unavailable = warning;
        found
    }

    /// Says what makes that there will be no fresh token.
    fn alert(&self, warning: &Warning) {
        warning.say(None);
        let identity = self.identity.borrow().clone();
        let project = identity.oidc().map(|token| token.claims.project_name()).unwrap_or_default();
        self.events.publish(Event::Warning(warning.told(self.clock.now(), project)));
    }
}

fn target_of(claims: &Claims) -> Option<Target> {
    Target::new(claims.project_id.as_deref()?, claims.owner_id.as_deref()?)
}

/// The project that a directory is linked to.
fn linked(project: &Path) -> Option<Target> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Link {
        project_id: String,
        org_id: String,
    }
    let bytes = safe_read::read(&project.join(".vercel/project.json")).ok()?.bytes;
    let link: Link = serde_json::from_slice(&bytes).ok()?;
    Target::new(&link.project_id, &link.org_id)
}
