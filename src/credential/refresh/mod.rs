//! Gets fresh OIDC tokens from the Vercel CLI, when a person asks and, if enabled, automatically before the token
//! expires (docs/configuration.md section 4).
//!
//! An app's request never starts a refresh. A fresh token is submitted to the owner of the identity, which decides
//! whether to use it; it is kept in memory, and the env file is not written. Automatic refresh needs an approval
//! ([`approvals`]), because the token in use and the link in `.vercel/` may have come with a repository.

pub mod approvals;
pub mod lock;
pub mod schedule;
pub mod vercel_cli;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::project_link::{self, ProjectLink};
use super::rotation::SubmitError;
use super::warning::{ENV_PULL, INSTALL_CLI, Warning};
use super::watch::TokenSubmitter;
use super::{Claims, Credential, Identity, OidcToken, TokenRejection};
use crate::events::{Event, Events};
use crate::os::clock::{Clock, Timestamp, format_duration};
use crate::os::private_dir;
use crate::remedy::Remedy;
use approvals::Approvals;
use lock::{LockError, RefreshLock};
use schedule::Schedule;
use vercel_cli::{Cli, CliEnvironment, CliError, CliNotUsable, Target};

/// The longest time between two checks of the clock.
const CHECK_INTERVAL: Duration = Duration::from_secs(15);
/// The shortest time between an attempt and one that a person asks for.
const MIN_INTERVAL_ON_REQUEST: Duration = Duration::from_secs(60);
/// The most requests that wait for one refresh.
const MAX_WAITING: usize = 64;

/// Settings of a [`Refresher`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether to refresh automatically, or only when a person asks.
    pub is_automatic: bool,
    /// The project's directory, canonical.
    pub project: PathBuf,
    /// The state directory, if there is one.
    pub state_dir: Option<PathBuf>,
    /// Upstream's origin.
    pub upstream: String,
    /// Environment variables for the CLI.
    pub cli_environment: CliEnvironment,
}

/// A successful refresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refreshed {
    /// The project's name, for people.
    pub project: String,
    /// The expiry of the fresh token.
    pub expires_at: Timestamp,
}

/// Why a refresh has failed. Contains no secret.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RefreshError {
    /// Neither a token nor, if a person asks, a link says which project's token is wanted.
    #[error("there is no OIDC token that says which project it is for, and {0}")]
    NoProject(&'static str),
    /// The last attempt was less than a minute ago. Holds the time to wait.
    #[error("the last attempt was less than a minute ago, the next may be made in {}", format_duration(*.0))]
    TooSoon(Duration),
    /// There is no CLI that may be run.
    #[error(transparent)]
    NoCli(#[from] CliNotUsable),
    /// It is not possible here and now, for this reason.
    #[error("{0}")]
    Unavailable(&'static str),
    /// The lock could not be acquired.
    #[error(transparent)]
    Lock(Arc<LockError>),
    /// The time of the attempt could not be recorded.
    #[error("could not record the attempt: {0}")]
    Record(#[source] Arc<private_dir::Problem>),
    /// The CLI gave no token.
    #[error(transparent)]
    Cli(Arc<CliError>),
    /// The CLI printed something that is not a usable token.
    #[error("the token that the Vercel CLI printed is not used: {0}")]
    NotAToken(#[source] TokenRejection),
    /// The CLI's token is for another project. Holds its description.
    #[error("the token that the Vercel CLI printed is not used: it is that of {0}")]
    OtherProject(String),
    /// The CLI's token does not replace the one in use.
    #[error("the token that the Vercel CLI printed is not used: {0}")]
    NotAccepted(#[source] SubmitError),
}

impl RefreshError {
    /// What may help.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NoProject(_) => Remedy::run("vercel link"),
            Self::NoCli(_) => Remedy::run(INSTALL_CLI),
            Self::Cli(_) => Remedy::run("vercel login"),
            Self::TooSoon(left) => Remedy::advice(format!("ask again in {}", format_duration(*left))),
            _ => Remedy::run(ENV_PULL),
        }
    }
}

/// The state of automatic refresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AutoRefresh {
    /// It is not enabled.
    Off,
    /// The next refresh is due at this time; `None` if there is no token.
    Scheduled(Option<Timestamp>),
    /// A refresh is overdue and waits until this time, because of an earlier attempt.
    Delayed(Timestamp),
    /// A refresh is due, but nobody has approved the project.
    NotApproved(Warning),
    /// It has stopped until the token changes or a person asks.
    GaveUp(Warning),
}

/// The state of a [`Refresher`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The state of automatic refresh.
    pub auto: AutoRefresh,
    /// Whether a refresh is running, automatic or not.
    pub is_running: bool,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
    /// Set while automatic refresh finds no CLI that may be run.
    pub no_cli: Option<Warning>,
}

impl Snapshot {
    /// The state before the first check.
    pub fn new(is_automatic: bool) -> Self {
        let auto = if is_automatic { AutoRefresh::Scheduled(None) } else { AutoRefresh::Off };
        Self { auto, is_running: false, last_error: None, no_cli: None }
    }

    /// Whether automatic refresh is enabled and nothing has gone wrong.
    pub fn is_working(&self) -> bool {
        matches!(self.auto, AutoRefresh::Scheduled(_) | AutoRefresh::Delayed(_))
            && self.last_error.is_none()
            && self.no_cli.is_none()
    }

    /// When the next automatic refresh is due.
    pub fn next_at(&self) -> Option<Timestamp> {
        match self.auto {
            AutoRefresh::Scheduled(next_at) => next_at,
            AutoRefresh::Delayed(next_at) => Some(next_at),
            AutoRefresh::Off | AutoRefresh::NotApproved(_) | AutoRefresh::GaveUp(_) => None,
        }
    }

    /// Why there will be no automatic refresh.
    pub fn warning(&self) -> Option<&Warning> {
        match &self.auto {
            AutoRefresh::GaveUp(warning) => Some(warning),
            AutoRefresh::NotApproved(warning) => self.no_cli.as_ref().or(Some(warning)),
            _ => self.no_cli.as_ref(),
        }
    }
}

type Outcome = Result<Refreshed, RefreshError>;

/// Requests refreshes. The default handle is for access tokens and always fails.
#[derive(Clone, Default, Debug)]
pub struct RefreshHandle(Option<mpsc::Sender<oneshot::Sender<Outcome>>>);

impl RefreshHandle {
    /// Starts a refresh or joins the running one. Takes as long as the CLI, and other sidecars that run it first.
    pub async fn refresh(&self) -> Outcome {
        let requests =
            self.0.as_ref().ok_or(RefreshError::Unavailable("VERCEL_TOKEN is sent, which cannot be refreshed"))?;
        let (reply, outcome) = oneshot::channel();
        let _ = requests.send(reply).await;
        outcome.await.unwrap_or(Err(RefreshError::Unavailable("the sidecar is about to end")))
    }
}

/// Refreshes the token on request and, if enabled, automatically.
pub struct Refresher {
    options: Options,
    identity: watch::Receiver<Arc<Identity>>,
    submitter: TokenSubmitter,
    clock: Clock,
    events: Events,
    requests: mpsc::Receiver<oneshot::Sender<Outcome>>,
    snapshot: watch::Sender<Snapshot>,
    schedule: Schedule,
    /// The last credential that upstream has accepted.
    accepted: watch::Receiver<Option<Arc<Credential>>>,
    approvals: Approvals,
    blocked: Option<Blocked>,
    no_cli: Option<Warning>,
}

/// Why automatic refresh does nothing, with the warning that was given.
enum Blocked {
    /// The project of the token with this fingerprint is not approved.
    NotApproved { fingerprint: String, warning: Warning },
    /// Valid while the schedule has given up.
    GaveUp(Warning),
}

/// What starts a refresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    Schedule,
    Person,
}

impl Refresher {
    /// A refresher of the token in `identity`. Returns it with a handle for requests and with its state. `accepted` has
    /// the last credential that upstream has accepted: its project is approved.
    pub fn new(
        options: Options,
        identity: watch::Receiver<Arc<Identity>>,
        accepted: watch::Receiver<Option<Arc<Credential>>>,
        submitter: TokenSubmitter,
        clock: Clock,
        events: Events,
    ) -> (Self, RefreshHandle, watch::Receiver<Snapshot>) {
        let (request_sender, requests) = mpsc::channel(MAX_WAITING);
        let snapshot = watch::Sender::new(Snapshot::new(options.is_automatic));
        let snapshots = snapshot.subscribe();
        let approvals = Approvals::new(options.state_dir.as_deref(), &options.upstream, &options.project);
        let this = Self {
            options,
            identity,
            submitter,
            clock,
            events,
            requests,
            snapshot,
            schedule: Schedule::default(),
            accepted,
            approvals,
            blocked: None,
            no_cli: None,
        };
        (this, RefreshHandle(Some(request_sender)), snapshots)
    }

    /// Refreshes until the future is dropped or the identity has no more changes.
    pub async fn run(mut self) {
        let mut ticker = self.clock.ticker();
        let mut is_first_check = true;
        loop {
            // If there is no CLI, it may be installed at any time.
            if self.options.is_automatic && (std::mem::take(&mut is_first_check) || self.no_cli.is_some()) {
                let _ = self.find_cli().await;
            }
            self.identity.mark_unchanged();
            if self.due().is_some_and(|due| due <= self.clock.now())
                && self.is_approved().await
                && let Some(outcome) = self.attempt(Trigger::Schedule).await
            {
                self.answer_requests(&outcome);
            }
            self.update_snapshot(None);
            tokio::select! {
                changed = self.identity.changed() => if changed.is_err() { return },
                Ok(()) = self.accepted.changed(), if self.options.is_automatic => self.approve_accepted().await,
                Some(reply) = self.requests.recv() => {
                    self.schedule.reset();
                    if let Some(outcome) = self.attempt(Trigger::Person).await {
                        let _ = reply.send(outcome.clone());
                        self.answer_requests(&outcome);
                    }
                }
                () = ticker.tick(CHECK_INTERVAL) => {}
            }
        }
    }

    /// Answers the requests that came during a refresh with its outcome.
    fn answer_requests(&mut self, outcome: &Outcome) {
        while let Ok(reply) = self.requests.try_recv() {
            let _ = reply.send(outcome.clone());
        }
    }

    /// When the token in use is to be refreshed automatically.
    fn due(&mut self) -> Option<Timestamp> {
        let identity = self.identity.borrow().clone();
        let token = identity.oidc();
        self.schedule.follow(token.map(OidcToken::fingerprint));
        let token = token.filter(|_| self.options.is_automatic)?;
        self.schedule.due(token.expires_at, self.clock.now())
    }

    fn auto_refresh(&mut self) -> AutoRefresh {
        if !self.options.is_automatic {
            return AutoRefresh::Off;
        }
        let next_at = self.due();
        let now = self.clock.now();
        let identity = self.identity.borrow().clone();
        let current = identity.oidc();
        let is_late = current.is_some_and(|token| token.expires_at.minus(schedule::LEAD_TIME) <= now);
        match (&self.blocked, next_at) {
            (Some(Blocked::NotApproved { fingerprint, warning }), _)
                if current.is_some_and(|token| token.fingerprint() == fingerprint) =>
            {
                AutoRefresh::NotApproved(warning.clone())
            }
            (Some(Blocked::GaveUp(warning)), _) if self.schedule.has_given_up() => AutoRefresh::GaveUp(warning.clone()),
            (_, Some(next_at)) if is_late && next_at > now => AutoRefresh::Delayed(next_at),
            _ => AutoRefresh::Scheduled(next_at),
        }
    }

    /// Publishes the state, and the outcome of an attempt if there was one.
    fn update_snapshot(&mut self, outcome: Option<&Outcome>) {
        let auto = self.auto_refresh();
        self.snapshot.send_modify(|snapshot| {
            snapshot.auto = auto;
            snapshot.is_running = false;
            snapshot.no_cli.clone_from(&self.no_cli);
            if let Some(outcome) = outcome {
                snapshot.last_error = outcome.as_ref().err().map(ToString::to_string);
            }
        });
    }

    /// Tries to refresh; `None` if the schedule turns out to need no refresh any more.
    async fn attempt(&mut self, trigger: Trigger) -> Option<Outcome> {
        self.snapshot.send_modify(|snapshot| snapshot.is_running = true);
        let outcome = self.refresh(trigger).await.transpose()?;
        if let Err(RefreshError::TooSoon(_)) = outcome {
            // This was no attempt.
            self.update_snapshot(None);
            return Some(outcome);
        }
        if let Err(error) = &outcome {
            let mut jitter = [0];
            let _ = getrandom::fill(&mut jitter);
            self.schedule.record_failure(self.clock.now(), jitter[0]);
            let remedy = error.remedy();
            let (hint, command) = (&*remedy.hint, remedy.command.as_deref());
            warn!(code = "refresh_failed", hint, command, "could not refresh the OIDC token: {error}, {remedy}");
            if trigger == Trigger::Schedule && self.schedule.has_given_up() {
                let warning = Warning::refresh_gave_up(schedule::MAX_FAILURES, &remedy);
                self.publish_warning(&warning);
                self.blocked = Some(Blocked::GaveUp(warning));
            }
        }
        self.update_snapshot(Some(&outcome));
        Some(outcome)
    }

    async fn refresh(&mut self, trigger: Trigger) -> Result<Option<Refreshed>, RefreshError> {
        let target = self.target(trigger).await?;
        let cli = self.find_cli().await?;
        let no_state_dir = RefreshError::Unavailable("neither XDG_STATE_HOME nor HOME is set");
        let state_dir = self.options.state_dir.as_deref().ok_or(no_state_dir)?;
        let lock = RefreshLock::acquire(state_dir, &target.project_id, &self.options.project).await;
        let lock = lock.map_err(|e| RefreshError::Lock(Arc::new(e)))?;
        let now = self.clock.now();
        let last = lock.last_attempt(now);
        match trigger {
            Trigger::Schedule => {
                if let Some(last) = last {
                    self.schedule.keep_distance(last);
                }
                // While other sidecars held the lock, the token may have been refreshed by other means.
                if self.due().is_none_or(|due| due > now) {
                    return Ok(None);
                }
            }
            Trigger::Person => {
                let left = last.map(|last| last.plus(MIN_INTERVAL_ON_REQUEST).since(now)).unwrap_or_default();
                if !left.is_zero() {
                    return Err(RefreshError::TooSoon(left));
                }
            }
        }
        lock.record_attempt(now).map_err(|e| RefreshError::Record(Arc::new(e)))?;
        let printed = vercel_cli::project_token(&cli, &target, &self.options.cli_environment, lock.directory()).await;
        let printed = printed.map_err(|e| RefreshError::Cli(Arc::new(e)))?;
        let token = OidcToken::decode(printed).map_err(RefreshError::NotAToken)?;
        if target_of(&token.claims).as_ref() != Some(&target) {
            return Err(RefreshError::OtherProject(token.claims.description()));
        }
        let refreshed = Refreshed { project: token.claims.project_name(), expires_at: token.expires_at };
        self.submitter.submit(token).await.map_err(RefreshError::NotAccepted)?;
        if trigger == Trigger::Person {
            self.approvals.add_confirmed(&target).await;
        }
        Ok(Some(refreshed))
    }

    /// Approves the project of the last credential that upstream has accepted.
    async fn approve_accepted(&mut self) {
        let credential = self.accepted.borrow_and_update().clone();
        if let Some(target) = credential.and_then(|credential| target_of(credential.claims()?)) {
            self.approvals.add_accepted(&target).await;
        }
    }

    /// Whether the token in use may be refreshed automatically. If not, warns once for each token.
    async fn is_approved(&mut self) -> bool {
        let identity = self.identity.borrow().clone();
        let token = identity.oidc().and_then(|token| Some((token, target_of(&token.claims)?)));
        // Without a project there is nothing to approve. The attempt will fail with the reason.
        let Some((token, target)) = token else { return true };
        if self.accepted.has_changed().unwrap_or_default() {
            self.approve_accepted().await;
        }
        let linked = linked_target(&self.options.project).await;
        if self.approvals.is_approved(&target, linked.as_ref()).await {
            self.blocked = None;
            return true;
        }
        let is_reported = matches!(&self.blocked, Some(Blocked::NotApproved { fingerprint, .. })
            if fingerprint == token.fingerprint());
        if !is_reported {
            let warning = Warning::refresh_held(&target.project_id, &target.owner_id);
            self.publish_warning(&warning);
            let fingerprint = token.fingerprint().to_owned();
            self.blocked = Some(Blocked::NotApproved { fingerprint, warning });
        }
        false
    }

    /// The project of the token in use. If there is none and a person asks, the linked project.
    async fn target(&self, trigger: Trigger) -> Result<Target, RefreshError> {
        let identity = self.identity.borrow().clone();
        match (identity.oidc().and_then(|token| target_of(&token.claims)), trigger) {
            (Some(target), _) => Ok(target),
            (None, Trigger::Schedule) => Err(RefreshError::NoProject("only a person may have another read")),
            (None, Trigger::Person) => {
                let linked = linked_target(&self.options.project).await;
                linked.ok_or(RefreshError::NoProject("no project is linked in .vercel/project.json"))
            }
        }
    }

    /// Finds the CLI. If automatic refresh needs it and there is none, warns once.
    async fn find_cli(&mut self) -> Result<Cli, CliNotUsable> {
        let (path, project) = (self.options.cli_environment.path.clone(), self.options.project.clone());
        let search = tokio::task::spawn_blocking(move || Cli::find(&path, &project));
        let found = search.await.unwrap_or(Err(CliNotUsable::NotFound));
        let error = found.as_ref().err().filter(|_| self.options.is_automatic);
        let warning = error.map(Warning::refresh_unavailable);
        if let Some(warning) = warning.as_ref().filter(|_| self.no_cli.is_none()) {
            self.publish_warning(warning);
        }
        if warning.is_some() || self.no_cli.is_some() {
            let error = found.as_ref().err().map(ToString::to_string);
            self.snapshot.send_modify(|snapshot| snapshot.last_error = error);
        }
        self.no_cli = warning;
        found
    }

    /// Logs the warning and sends it as an event.
    fn publish_warning(&self, warning: &Warning) {
        warning.log(None);
        let identity = self.identity.borrow().clone();
        let project = identity.oidc().map(|token| token.claims.project_name()).unwrap_or_default();
        self.events.publish(Event::Warning(warning.to_event(self.clock.now(), project)));
    }
}

fn target_of(claims: &Claims) -> Option<Target> {
    Target::new(claims.project_id.as_deref()?, claims.owner_id.as_deref()?)
}

/// The project that the directory's own `.vercel/project.json` names. Links of directories above do not count: a person
/// confirms a project for one directory.
async fn linked_target(project: &Path) -> Option<Target> {
    let project = project.to_owned();
    match tokio::task::spawn_blocking(move || project_link::of_directory(&project)).await.ok()?? {
        ProjectLink::Linked(linked) => Target::new(&linked.project_id, &linked.owner_id),
        _ => None,
    }
}
