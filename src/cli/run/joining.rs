//! Whether a command goes through the sidecar that runs, and which settings count then: the running one's.
//!
//! Upstream decides who sees the requests: where another was named than the running one has, the command does not begin. By
//! another credential it has a sidecar of its own, that nobody else finds. Of all else it is said what counts.

use std::path::Path;

use crate::config::{Auth, Config, Difference};
use crate::instance::client::{Client, ClientError};
use crate::instance::state_file::Instance;
use crate::os::terminal;

/// What comes of it.
pub enum Joined {
    /// The command goes through it, and people are to know this.
    Through(Client, Vec<Note>),
    /// This setting of the credential was named otherwise. The others, as far as they were not named, are the running one's.
    OtherCredential(Differs, Vec<Note>),
}

/// A setting was named that the sidecar which runs has otherwise. Exit code 2.
#[derive(Debug, thiserror::Error)]
#[error(
    "{difference} (process {pid}, for {}, at {}): end that one by `kill {pid}`, or leave {} out",
    instance.project.display(), instance.url, difference.place, pid = instance.pid
)]
pub struct Differs {
    difference: Box<Difference>,
    instance: Box<Instance>,
}

impl Differs {
    fn new(difference: Difference, instance: Instance) -> Self {
        Self { difference: Box::new(difference), instance: Box::new(instance) }
    }

    /// What is to be known by who has a sidecar of its own for that.
    fn note(&self) -> Note {
        let Instance { pid, project, url, .. } = &*self.instance;
        let project = project.display();
        let difference = &self.difference;
        Note::Warning(format!(
            "{difference} (process {pid}, for {project}, at {url}): this command has a sidecar of its own"
        ))
    }
}

/// What people are to know, though nothing is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Something does not count that they may count on.
    Warning(String),
    /// Where they are.
    Note(String),
}

impl Note {
    /// Writes it on stderr.
    pub fn tell(&self) {
        match self {
            Self::Warning(text) => terminal::warn(text),
            Self::Note(text) => terminal::note(text),
        }
    }
}

/// Whether a command with these settings goes through that sidecar, whose settings it has then. Who has named its port means
/// it, whatever its credential is.
pub async fn join(
    (instance, client): (Instance, Client),
    config: &mut Config,
) -> Result<Result<Joined, Differs>, ClientError> {
    let running = client.status().await?.settings;
    let mut differences = config.differences(&running);
    let (port, named) = (client.address().port(), config.wanted().port);
    if let Some(at) = differences.iter().position(Difference::is_of_upstream) {
        return Ok(Err(Differs::new(differences.swap_remove(at), instance)));
    }
    let before = config.upstream.name();
    if let Some(at) = differences.iter().position(Difference::is_of_the_credential).filter(|_| named != Some(port)) {
        config.take_settings(&running, &instance.project, true);
        let differs = Differs::new(differences.swap_remove(at), instance);
        let notes = vec![differs.note()].into_iter().chain(upstream_note(config, &before, &differs.instance));
        let notes = notes.collect();
        return Ok(Ok(Joined::OtherCredential(differs, notes)));
    }
    let Instance { url, project, .. } = &instance;
    let shown = project.display();
    let mut notes: Vec<_> =
        differences.iter().map(|difference| Note::Warning(format!("{difference}, which counts"))).collect();
    if let Some(named) = named.filter(|named| *named != port) {
        notes.push(Note::Warning(format!(
            "{} says {named}, the sidecar that runs for {shown} is at {url}, which counts",
            config.named.get("port").map_or("--port", String::as_str)
        )));
    }
    if let Some(env_file) = another_env_file(config, project, running.get("env_file")) {
        notes.push(Note::Warning(format!(
            "{env_file} does not count here: the sidecar that runs for {shown} at {url} has {}",
            running.get("env_file").map_or("an access token", String::as_str)
        )));
    }
    config.take_settings(&running, project, false);
    notes.extend(upstream_note(config, &before, &instance));
    Ok(Ok(Joined::Through(client, notes)))
}

/// Where requests go, if that is the running sidecar's upstream and nobody named it here.
fn upstream_note(config: &Config, before: &str, Instance { project, url, .. }: &Instance) -> Option<Note> {
    let upstream = config.upstream.name();
    (upstream != before).then(|| {
        Note::Note(format!(
            "requests to Connect go to {upstream}, the upstream of the sidecar that runs for {} at {url}",
            project.display()
        ))
    })
}

/// The env file of a project that is nearer than the sidecar's, if nobody named one and it has one.
fn another_env_file(config: &Config, project: &Path, running: Option<&String>) -> Option<String> {
    let Auth::Oidc { env_file, .. } = &config.auth else { return None };
    let is_nearer = config.project != project && config.project.starts_with(project);
    let is_another = running.is_none_or(|running| Path::new(running) != env_file);
    let is_passed_over = is_nearer && is_another && !config.named.contains_key("env_file") && env_file.is_file();
    is_passed_over.then(|| env_file.display().to_string())
}
