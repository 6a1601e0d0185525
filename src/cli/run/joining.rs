//! Decides whether a command uses the running sidecar, and adopts that sidecar's settings.
//!
//! Upstream decides who receives the requests, so an explicit upstream that differs is an error. For an explicit
//! credential that differs, the command starts its own sidecar, which other commands cannot find. For every other
//! difference, the user is told which setting is used.

use std::path::Path;

use crate::config::{Auth, Config, Difference};
use crate::instance::client::{Client, ClientError};
use crate::instance::state_file::Instance;
use crate::os::terminal;

/// Which sidecar a command uses.
pub enum Decision {
    /// The running one. The notes are for the user.
    Join(Client, Vec<Note>),
    /// Its own, because of this setting of the credential. The settings that are not explicit are the running
    /// sidecar's.
    StartOwn(SettingConflict, Vec<Note>),
}

/// Why a command cannot use the running sidecar.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The sidecar did not report its settings.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It has another upstream.
    #[error(transparent)]
    Conflict(#[from] SettingConflict),
}

/// An explicit setting that the running sidecar has with another value. Exit code 2.
#[derive(Debug, thiserror::Error)]
#[error(
    "{difference} (process {pid}, for {}, at {}): end that one by `kill {pid}`, or leave {} out",
    instance.project.display(), instance.url, difference.location, pid = instance.pid
)]
pub struct SettingConflict {
    difference: Box<Difference>,
    instance: Box<Instance>,
}

impl SettingConflict {
    fn new(difference: Difference, instance: Instance) -> Self {
        Self { difference: Box::new(difference), instance: Box::new(instance) }
    }

    /// The note for a command that starts its own sidecar because of this.
    fn note(&self) -> Note {
        let Instance { pid, project, url, .. } = &*self.instance;
        let project = project.display();
        let difference = &self.difference;
        Note::Warning(format!(
            "{difference} (process {pid}, for {project}, at {url}): this command has a sidecar of its own"
        ))
    }
}

/// Something that the user should know, though it is no error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A setting that the user may rely on is not used.
    Warning(String),
    /// Information.
    Note(String),
}

impl Note {
    /// Writes it to stderr.
    pub fn print(&self) {
        match self {
            Self::Warning(text) => terminal::warn(text),
            Self::Note(text) => terminal::note(text),
        }
    }
}

/// Decides whether a command with these settings uses the running sidecar, and adopts that sidecar's settings. A
/// command with an explicit port uses the sidecar at that port whatever its credential.
pub async fn decide((instance, client): (Instance, Client), config: &mut Config) -> Result<Decision, JoinError> {
    let running = client.status().await?.settings;
    let mut differences = config.differences(&running);
    let (port, explicit_port) = (client.address().port(), config.selector().port);
    if let Some(index) = differences.iter().position(Difference::affects_upstream) {
        return Err(SettingConflict::new(differences.swap_remove(index), instance).into());
    }
    let upstream_before = config.upstream.name();
    let of_credential = differences.iter().position(Difference::affects_credential);
    if let Some(index) = of_credential.filter(|_| explicit_port != Some(port)) {
        config.adopt_settings(&running, &instance.project, true);
        let conflict = SettingConflict::new(differences.swap_remove(index), instance);
        let upstream_note = upstream_note(config, &upstream_before, &conflict.instance);
        let notes = [conflict.note()].into_iter().chain(upstream_note).collect();
        return Ok(Decision::StartOwn(conflict, notes));
    }
    let Instance { url, project, .. } = &instance;
    let shown_project = project.display();
    let mut notes: Vec<_> =
        differences.iter().map(|difference| Note::Warning(format!("{difference}, which counts"))).collect();
    if let Some(explicit_port) = explicit_port.filter(|explicit| *explicit != port) {
        notes.push(Note::Warning(format!(
            "{} says {explicit_port}, the sidecar that runs for {shown_project} is at {url}, which counts",
            config.explicit.get("port").map_or("--port", String::as_str)
        )));
    }
    if let Some(env_file) = ignored_env_file(config, project, running.get("env_file")) {
        notes.push(Note::Warning(format!(
            "{env_file} does not count here: the sidecar that runs for {shown_project} at {url} has {}",
            running.get("env_file").map_or("an access token", String::as_str)
        )));
    }
    config.adopt_settings(&running, project, false);
    notes.extend(upstream_note(config, &upstream_before, &instance));
    Ok(Decision::Join(client, notes))
}

/// A note on where requests go, if the running sidecar's upstream is not the one of this command's settings.
fn upstream_note(config: &Config, before: &str, Instance { project, url, .. }: &Instance) -> Option<Note> {
    let upstream = config.upstream.name();
    (upstream != before).then(|| {
        Note::Note(format!(
            "requests to Connect go to {upstream}, the upstream of the sidecar that runs for {} at {url}",
            project.display()
        ))
    })
}

/// The env file of a project below the sidecar's that the sidecar does not read, if it exists and none is explicit.
fn ignored_env_file(config: &Config, project: &Path, running: Option<&String>) -> Option<String> {
    let Auth::Oidc { env_file, .. } = &config.auth else { return None };
    let is_nearer = config.project != project && config.project.starts_with(project);
    let is_another = running.is_none_or(|running| Path::new(running) != env_file);
    let is_ignored = is_nearer && is_another && !config.explicit.contains_key("env_file") && env_file.is_file();
    is_ignored.then(|| env_file.display().to_string())
}
