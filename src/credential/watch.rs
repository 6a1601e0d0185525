//! Watches the env file and publishes who we are; the one owner of the [`Identity`].
//!
//! Events of the *parent directory* (a rename over the file ends a watch on the file itself) are nudges to read the
//! whole file again, and so is a slow poll, for file systems without events and for links whose target changes. What is
//! read is judged by [`succession`](super::rotation), and so is a token that is offered besides. Must never serve half a
//! token, never block the runtime on a file system, and never log what is in the file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::env_file::{self, Finding, Refusal};
use super::rotation::{Observation, RotationEvent, TokenRotation};
use super::warning::{PULL, Warning};
use super::{FileNotes, Identity, OidcToken, Reloader};
use crate::os::clock::{Clock, spoken};
use crate::os::safe_read::{self, Cause, Flaw, Problem};
use crate::remedy::Remedy;

/// Time between two looks without an event: a change is used within two seconds, reading and all (docs/configuration.md
/// section 3).
const POLL_EVERY: Duration = Duration::from_millis(1500);
/// The same while events are known not to come, or something is undecided.
const POLL_EVERY_WHEN_ALERT: Duration = Duration::from_millis(500);
/// Quiet that ends a burst of events.
const QUIET: Duration = Duration::from_millis(100);
/// A burst is cut off after this long.
const BURST: Duration = Duration::from_secs(1);
/// A file that keeps changing is taken as it is after this many looks.
const LOOKS_AT_A_CHANGING_FILE: u32 = 20;
/// A file system that does not answer for this long is left alone until the next look.
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Watches one env file.
pub struct EnvFileWatch {
    path: PathBuf,
    shown: String,
    clock: Clock,
    succession: TokenRotation,
    notes: FileNotes,
    publisher: watch::Sender<Arc<Identity>>,
    reloads: mpsc::Receiver<oneshot::Sender<()>>,
    offers: (TokenSink, mpsc::Receiver<Offer>),
    events: Events,
}

/// A token, and where to say what became of it.
type Offer = (OidcToken, oneshot::Sender<Result<(), String>>);

/// Where a token is offered that came by other means than the file.
#[derive(Clone, Debug)]
pub struct TokenSink(mpsc::Sender<Offer>);

impl TokenSink {
    /// Returns once it was judged and, if it was taken, published. An error is the reason for people.
    pub async fn offer(&self, token: OidcToken) -> Result<(), String> {
        let (judged, judgement) = oneshot::channel();
        let _ = self.0.send((token, judged)).await;
        judgement.await.unwrap_or_else(|_| Err("the sidecar is about to end".into()))
    }
}

impl EnvFileWatch {
    /// Subscribes to the file's directory and looks at the file once. `shown` is what people call it.
    pub async fn start(path: PathBuf, shown: String, clock: Clock) -> (Self, Reloader) {
        let (reloader, reloads) = Reloader::channel();
        let (offers, offered) = mpsc::channel(1);
        let mut this = Self {
            events: Events::new(&path),
            path,
            shown,
            clock,
            succession: TokenRotation::default(),
            notes: FileNotes::default(),
            publisher: watch::Sender::new(Arc::new(Identity::first(super::TokenState::Missing))),
            reloads,
            offers: (TokenSink(offers), offered),
        };
        this.events.subscribe();
        this.look().await;
        if this.publisher.borrow().principal().is_none() {
            this.say_what_is_lacking();
        }
        (this, reloader)
    }

    /// The identity, now and whenever it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Identity>> {
        self.publisher.subscribe()
    }

    /// Where to offer it a token.
    pub fn offers(&self) -> TokenSink {
        self.offers.0.clone()
    }

    /// Looks at the file for as long as it is polled.
    pub async fn run(mut self) {
        loop {
            let alert = self.succession.is_undecided() || !self.events.are_coming();
            let poll = if alert { POLL_EVERY_WHEN_ALERT } else { POLL_EVERY };
            let mut asked = None;
            let mut polled = false;
            tokio::select! {
                () = self.events.burst() => {}
                () = tokio::time::sleep(poll) => polled = true,
                reload = self.reloads.recv() => asked = reload,
                Some((token, judged)) = self.offers.1.recv() => {
                    let _ = judged.send(self.judge(token));
                    continue;
                }
            }
            self.events.subscribe();
            let changed = self.look().await;
            if changed && polled && self.events.are_coming() {
                self.events.say_that_only_the_poll_saw_it();
            }
            if let Some(asked) = asked {
                let _ = asked.send(());
            }
        }
    }

    /// One look at the file; tells whether another identity was published.
    async fn look(&mut self) -> bool {
        let Some(observed) = self.observe().await else { return false };
        let notes = match &observed {
            Observation::Token { notes, .. } => *notes,
            _ => self.notes,
        };
        let news = self.succession.observe(observed, Instant::now(), self.clock.now());
        let changed = news.as_ref().is_some_and(|news| *news != RotationEvent::OlderIgnored);
        let is_from_cli = self.publisher.borrow().is_from_cli;
        if changed || notes != self.notes || is_from_cli != self.succession.is_offered() {
            self.publish(notes);
        }
        self.say_notes(notes);
        if let Some(news) = news {
            self.say(news, &self.shown);
        }
        changed
    }

    /// Takes an offered token or not.
    fn judge(&mut self, token: OidcToken) -> Result<(), String> {
        let news = self.succession.offer(token, self.clock.now())?;
        self.publish(self.notes);
        self.say(news, super::VERCEL_CLI);
        Ok(())
    }

    fn publish(&self, notes: FileNotes) {
        let (state, is_from_cli) = (self.succession.state().clone(), self.succession.is_offered());
        self.publisher.send_modify(|identity| {
            *identity = Arc::new(Identity { generation: identity.generation + 1, state, notes, is_from_cli });
        });
    }

    /// Reads and scans the file; `None` if the file system does not answer.
    async fn observe(&self) -> Option<Observation> {
        for look in 1.. {
            let path = self.path.clone();
            let reading = tokio::task::spawn_blocking(move || safe_read::read(&path));
            let content = match tokio::time::timeout(READ_TIMEOUT, reading).await {
                Ok(Ok(read)) => read,
                Ok(Err(_)) | Err(_) => return None,
            };
            match content {
                Ok(content) if content.changing && look < LOOKS_AT_A_CHANGING_FILE => {
                    tokio::time::sleep(QUIET).await;
                }
                Ok(content) => return Some(scan(&content)),
                Err(Problem::Missing) => return Some(Observation::Missing),
                Err(Problem::Unsafe(reason)) => return Some(Observation::Invalid(reason)),
            }
        }
        None
    }

    fn say(&self, news: RotationEvent, source: &str) {
        let identity = self.publisher.borrow().clone();
        let Some(token) = identity.oidc() else {
            match news {
                RotationEvent::Unusable(flaw) => Warning::invalid(&self.shown, &flaw).say(None),
                _ => warn!(
                    code = Warning::MISSING,
                    hint = PULL,
                    command = PULL,
                    "the token is gone from {}, run `{PULL}`",
                    self.shown
                ),
            }
            return;
        };
        let project = token.claims.project_name();
        let now = self.clock.now();
        let life = match token.expires_at.since(now) {
            Duration::ZERO => format!("expired {} ago", spoken(now.since(token.expires_at))),
            left => format!("expires in {}", spoken(left)),
        };
        let fingerprint = token.fingerprint();
        match news {
            RotationEvent::Loaded => info!(project, fingerprint, "token of {project} loaded from {source}, {life}"),
            RotationEvent::Refreshed => info!(project, fingerprint, source, "token refreshed, {life}"),
            RotationEvent::PrincipalChanged(before, after) => {
                warn!(
                    project,
                    fingerprint, source, "the token is now that of {after}, it was that of {before}; {life}"
                );
            }
            RotationEvent::OlderIgnored => {
                info!(project, "{} holds an older token than the one in use, which stays", self.shown);
                return;
            }
            RotationEvent::Lost | RotationEvent::Unusable(_) => return,
        }
        if let Some(warning) = Warning::of_environment(token.claims.environment.as_deref()) {
            warning.say(None);
        }
    }

    fn say_notes(&mut self, notes: FileNotes) {
        if notes.readable_by_others && !self.notes.readable_by_others {
            Warning::readable_by_others(&self.shown).say(None);
        }
        if notes.duplicate_assignments && !self.notes.duplicate_assignments {
            Warning::duplicate_assignments(&self.shown).say(None);
        }
        if notes.is_replaced && !self.notes.is_replaced {
            Warning::replaced(&self.shown).say(None);
        }
        self.notes = notes;
    }

    fn say_what_is_lacking(&self) {
        match self.succession.state() {
            super::TokenState::Invalid { .. } => {}
            _ => warn!(
                code = Warning::MISSING,
                hint = PULL,
                command = PULL,
                "no {} in {} yet, run `vercel link` and `{PULL}`",
                env_file::KEY,
                self.shown
            ),
        }
    }
}

/// What there is in a file.
pub fn scan(content: &safe_read::Content) -> Observation {
    match env_file::find_token(&content.bytes) {
        Finding::Absent => Observation::Missing,
        Finding::Refused(refusal) => {
            let cause = match &refusal {
                Refusal::Encrypted => Cause::Encrypted,
                Refusal::Withheld => Cause::Known(Remedy::run("vercel env pull --environment=development")),
                _ => Cause::Content,
            };
            Observation::Invalid(Flaw::new(refusal.to_string(), cause))
        }
        Finding::Value { value, assignments, open_ended } => {
            let notes = FileNotes {
                readable_by_others: content.readable_by_others,
                duplicate_assignments: assignments > 1,
                is_replaced: content.is_replaced,
            };
            match OidcToken::decode(value) {
                Ok(token) => Observation::Token { token, notes, open_ended },
                Err(rejection) => Observation::Invalid(rejection.to_string().into()),
            }
        }
    }
}

/// Nudges from the file's parent directory.
struct Events {
    directory: PathBuf,
    file_name: Option<std::ffi::OsString>,
    nudge: mpsc::Sender<()>,
    nudges: mpsc::Receiver<()>,
    /// The subscription, and which directory it is for.
    watcher: Option<(RecommendedWatcher, DirectoryId)>,
    complained: bool,
}

/// Device and inode: a directory that was moved away and made anew is another one.
type DirectoryId = (u64, u64);

fn directory_id(path: &Path) -> Option<DirectoryId> {
    fs::metadata(path).ok().filter(fs::Metadata::is_dir).map(|m| (m.dev(), m.ino()))
}

impl Events {
    fn new(path: &Path) -> Self {
        // A nudge that finds the channel full is not lost: one is waiting there already.
        let (nudge, nudges) = mpsc::channel(1);
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let file_name = path.file_name().map(ToOwned::to_owned);
        Self { directory, file_name, nudge, nudges, watcher: None, complained: false }
    }

    fn are_coming(&self) -> bool {
        self.watcher.is_some()
    }

    /// Watches the directory, also after it was replaced. Failing that, the poll has to do.
    fn subscribe(&mut self) {
        let id = directory_id(&self.directory);
        if id.is_some() && self.watcher.as_ref().map(|(_, watched)| *watched) == id {
            return;
        }
        self.watcher = None;
        let Some(id) = id else { return };
        let nudge = self.nudge.clone();
        let file_name = self.file_name.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let concerns_us = event.as_ref().map_or(true, |event| {
                let named = |path: &PathBuf| path.file_name() == file_name.as_deref();
                // Our own reading is reported as access; acting on it would never end.
                !event.kind.is_access() && (event.need_rescan() || event.paths.iter().any(named))
            });
            if concerns_us {
                let _ = nudge.try_send(());
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => self.watcher = Some((watcher, id)),
            Err(error) if !self.complained => {
                self.complained = true;
                let advice = match error.kind {
                    notify::ErrorKind::MaxFilesWatch => " (too many watches: raise fs.inotify.max_user_watches)",
                    _ => "",
                };
                warn!("no file system events for {}{advice}, looking twice a second", self.directory.display());
            }
            Err(_) => {}
        }
    }

    /// Returns when a burst of nudges is over. Cancel safe: a nudge that is swallowed leads to a look by the poll.
    async fn burst(&mut self) {
        if self.nudges.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        let burst = async { while let Ok(Some(())) = tokio::time::timeout(QUIET, self.nudges.recv()).await {} };
        let _ = tokio::time::timeout(BURST, burst).await;
    }

    fn say_that_only_the_poll_saw_it(&mut self) {
        if !self.complained && self.nudges.is_empty() {
            self.complained = true;
            debug!("a change in {} came without an event, the poll found it", self.directory.display());
        }
    }
}
