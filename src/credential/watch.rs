//! Watches the env file and publishes the current [`Identity`]; its only writer.
//!
//! Two triggers lead to a read of the whole file: file system events of the parent directory (a watch of the file
//! itself would end when another file is renamed over it), and a slow poll, for file systems without events and for
//! symbolic links whose target changes. [`rotation`](super::rotation) decides what each read changes. Nothing of the
//! file's content is logged.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::rotation::{RotationEvent, SubmitError, TokenRotation};
use super::token_file::{self, TokenReading};
use super::warning::{ENV_PULL, Warning};
use super::{FileWarnings, Identity, OidcToken, ReloadHandle, TokenState, env_file};
use crate::os::clock::Clock;

/// Time between two reads without an event. Together with the read, a change is used within two seconds
/// (docs/configuration.md section 3).
const POLL_INTERVAL: Duration = Duration::from_millis(1500);
/// The same while there are no events, or while a decision is pending.
const SHORT_POLL_INTERVAL: Duration = Duration::from_millis(500);
/// A burst of events is over after this long without one.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// A burst of events is cut off after this long.
const MAX_BURST: Duration = Duration::from_secs(1);

/// Watches one env file.
pub struct EnvFileWatch {
    path: PathBuf,
    /// The path as shown to people.
    shown: String,
    clock: Clock,
    rotation: TokenRotation,
    file_warnings: FileWarnings,
    publisher: watch::Sender<Arc<Identity>>,
    reload_requests: mpsc::Receiver<oneshot::Sender<()>>,
    submitter: TokenSubmitter,
    submissions: mpsc::Receiver<Submission>,
    directory: DirectoryEvents,
}

/// A submitted token, and the channel for the answer.
type Submission = (OidcToken, oneshot::Sender<Result<(), SubmitError>>);

/// Submits tokens that do not come from the file.
#[derive(Clone, Debug)]
pub struct TokenSubmitter(mpsc::Sender<Submission>);

impl TokenSubmitter {
    /// Returns once the token is published, or with the reason why it is not used.
    pub async fn submit(&self, token: OidcToken) -> Result<(), SubmitError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.0.send((token, reply)).await;
        answer.await.unwrap_or(Err(SubmitError::ShuttingDown))
    }
}

impl EnvFileWatch {
    /// Subscribes to the file's directory and reads the file once. `shown` is the path as shown to people.
    pub async fn start(path: PathBuf, shown: String, clock: Clock) -> (Self, ReloadHandle) {
        let (reload_handle, reload_requests) = ReloadHandle::channel();
        let (submitter, submissions) = mpsc::channel(1);
        let mut this = Self {
            directory: DirectoryEvents::new(&path),
            path,
            shown,
            clock,
            rotation: TokenRotation::default(),
            file_warnings: FileWarnings::default(),
            publisher: watch::Sender::new(Arc::new(Identity::first(TokenState::Missing))),
            reload_requests,
            submitter: TokenSubmitter(submitter),
            submissions,
        };
        this.directory.subscribe();
        this.read_file().await;
        if matches!(this.rotation.state(), TokenState::Missing) {
            warn!(
                code = Warning::MISSING,
                hint = ENV_PULL,
                command = ENV_PULL,
                "no {} in {} yet, run `vercel link` and `{ENV_PULL}`",
                env_file::KEY,
                this.shown
            );
        }
        (this, reload_handle)
    }

    /// The identity, now and whenever it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Identity>> {
        self.publisher.subscribe()
    }

    /// A handle to submit tokens.
    pub fn submitter(&self) -> TokenSubmitter {
        self.submitter.clone()
    }

    /// Watches the file until the future is dropped.
    pub async fn run(mut self) {
        loop {
            let poll_soon = self.rotation.is_pending() || !self.directory.is_subscribed();
            let interval = if poll_soon { SHORT_POLL_INTERVAL } else { POLL_INTERVAL };
            let mut reload = None;
            let mut is_poll = false;
            tokio::select! {
                () = self.directory.burst() => {}
                () = tokio::time::sleep(interval) => is_poll = true,
                request = self.reload_requests.recv() => reload = request,
                Some((token, reply)) = self.submissions.recv() => {
                    let _ = reply.send(self.accept(token));
                    continue;
                }
            }
            self.directory.subscribe();
            let has_changed = self.read_file().await;
            if has_changed && is_poll && self.directory.is_subscribed() {
                self.directory.report_missed_event();
            }
            if let Some(done) = reload {
                let _ = done.send(());
            }
        }
    }

    /// Reads the file once and returns whether the token has changed.
    async fn read_file(&mut self) -> bool {
        let Some(reading) = token_file::read(&self.path).await else { return false };
        let warnings = match &reading {
            TokenReading::Token { warnings, .. } => *warnings,
            _ => self.file_warnings,
        };
        let event = self.rotation.apply(reading, Instant::now(), self.clock.now());
        let has_changed = event.as_ref().is_some_and(|event| *event != RotationEvent::OlderIgnored);
        let is_from_cli = self.publisher.borrow().is_from_cli;
        if has_changed || warnings != self.file_warnings || is_from_cli != self.rotation.is_submitted() {
            self.publish(warnings);
        }
        self.log_file_warnings(warnings);
        if let Some(event) = event {
            self.log_event(event, &self.shown);
        }
        has_changed
    }

    fn accept(&mut self, token: OidcToken) -> Result<(), SubmitError> {
        let event = self.rotation.submit(token, self.clock.now())?;
        self.publish(self.file_warnings);
        self.log_event(event, super::VERCEL_CLI);
        Ok(())
    }

    fn publish(&self, file_warnings: FileWarnings) {
        let (state, is_from_cli) = (self.rotation.state().clone(), self.rotation.is_submitted());
        self.publisher.send_modify(|identity| {
            let generation = identity.generation + 1;
            *identity = Arc::new(Identity { generation, state, file_warnings, is_from_cli });
        });
    }

    fn log_event(&self, event: RotationEvent, source: &str) {
        let identity = self.publisher.borrow().clone();
        let Some(token) = identity.oidc() else {
            match event {
                RotationEvent::Unusable(defect) => Warning::invalid(&self.shown, &defect).log(None),
                _ => warn!(
                    code = Warning::MISSING,
                    hint = ENV_PULL,
                    command = ENV_PULL,
                    "the token is gone from {}, run `{ENV_PULL}`",
                    self.shown
                ),
            }
            return;
        };
        let project = token.claims.project_name();
        let expiry = token.expires_at.expiry(self.clock.now());
        let fingerprint = token.fingerprint();
        match event {
            RotationEvent::Loaded => info!(project, fingerprint, "token of {project} loaded from {source}, {expiry}"),
            RotationEvent::Refreshed => info!(project, fingerprint, source, "token refreshed, {expiry}"),
            RotationEvent::PrincipalChanged(before, after) => {
                warn!(
                    project,
                    fingerprint, source, "the token is now that of {after}, it was that of {before}; {expiry}"
                );
            }
            RotationEvent::OlderIgnored => {
                info!(project, "{} holds an older token than the one in use, which stays", self.shown);
                return;
            }
            RotationEvent::Lost | RotationEvent::Unusable(_) => return,
        }
        if let Some(warning) = Warning::of_environment(token.claims.environment.as_deref()) {
            warning.log(None);
        }
    }

    fn log_file_warnings(&mut self, warnings: FileWarnings) {
        let known = std::mem::replace(&mut self.file_warnings, warnings);
        if warnings.readable_by_others && !known.readable_by_others {
            Warning::readable_by_others(&self.shown).log(None);
        }
        if warnings.duplicate_assignments && !known.duplicate_assignments {
            Warning::duplicate_assignments(&self.shown).log(None);
        }
        if warnings.is_stale_mount && !known.is_stale_mount {
            Warning::stale_mount(&self.shown).log(None);
        }
    }
}

/// File system events of the env file's parent directory that concern the file.
struct DirectoryEvents {
    directory: PathBuf,
    file_name: Option<std::ffi::OsString>,
    event_sender: mpsc::Sender<()>,
    events: mpsc::Receiver<()>,
    /// The subscription, and the directory that it is for.
    watcher: Option<(RecommendedWatcher, DirectoryId)>,
    /// Whether missing events were logged.
    has_reported: bool,
}

/// Device and inode: they tell a directory from its replacement at the same path.
type DirectoryId = (u64, u64);

fn directory_id(path: &Path) -> Option<DirectoryId> {
    fs::metadata(path).ok().filter(fs::Metadata::is_dir).map(|m| (m.dev(), m.ino()))
}

impl DirectoryEvents {
    fn new(path: &Path) -> Self {
        // One slot is enough: an event that finds it full leads to the same read.
        let (event_sender, events) = mpsc::channel(1);
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let file_name = path.file_name().map(ToOwned::to_owned);
        Self { directory, file_name, event_sender, events, watcher: None, has_reported: false }
    }

    fn is_subscribed(&self) -> bool {
        self.watcher.is_some()
    }

    /// Subscribes to the directory, or to its replacement. If that fails, only the poll is left.
    fn subscribe(&mut self) {
        let id = directory_id(&self.directory);
        if id.is_some() && self.watcher.as_ref().map(|(_, watched)| *watched) == id {
            return;
        }
        self.watcher = None;
        let Some(id) = id else { return };
        let event_sender = self.event_sender.clone();
        let file_name = self.file_name.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let is_relevant = event.as_ref().map_or(true, |event| {
                let is_file = |path: &PathBuf| path.file_name() == file_name.as_deref();
                // Our own reads are access events. To react to them would be an endless loop.
                !event.kind.is_access() && (event.need_rescan() || event.paths.iter().any(is_file))
            });
            if is_relevant {
                let _ = event_sender.try_send(());
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => self.watcher = Some((watcher, id)),
            Err(error) if !self.has_reported => {
                self.has_reported = true;
                let advice = match error.kind {
                    notify::ErrorKind::MaxFilesWatch => " (too many watches: raise fs.inotify.max_user_watches)",
                    _ => "",
                };
                warn!("no file system events for {}{advice}, looking twice a second", self.directory.display());
            }
            Err(_) => {}
        }
    }

    /// Returns at the end of a burst of events. Cancel safe: if an event gets lost, the poll finds the change.
    async fn burst(&mut self) {
        if self.events.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        let burst = async { while let Ok(Some(())) = tokio::time::timeout(DEBOUNCE, self.events.recv()).await {} };
        let _ = tokio::time::timeout(MAX_BURST, burst).await;
    }

    /// Logs, once, that the poll found a change for which there was no event.
    fn report_missed_event(&mut self) {
        if !self.has_reported && self.events.is_empty() {
            self.has_reported = true;
            debug!("a change in {} came without an event, the poll found it", self.directory.display());
        }
    }
}
