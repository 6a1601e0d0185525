//! The commands that ask a running sidecar: each finds it, asks it one thing and prints the answer.
//!
//! stdout carries data only, and who closes it has seen enough: that is no failure. Where none runs, that is said
//! plainly; nothing is started but for a token.

mod browser;
pub mod cache;
pub mod completions;
pub mod logs;
pub mod refresh;
mod report;
pub mod status;
pub mod token;

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::StartupError;
use crate::cli::GlobalArgs;
use crate::client::{self, Client, NotFound, Unanswered};
use crate::config::{self, Config, ConfigError, Mistake, Wanted};
use crate::proxy::route;
use crate::run::joining::Differs;
use crate::status::instance::Instance;
use crate::terminal::{self, escaped};

/// Why a command has no answer. Exit code 2 for the configuration, else 1.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A flag or a variable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Nobody to ask.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The sidecar that runs has other settings than were named.
    #[error(transparent)]
    Differs(#[from] Differs),
    /// No answer, or a refusal.
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
    /// No sidecar of our own could be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The system would not have it.
    #[error("could not {0}: {1}")]
    System(&'static str, io::Error),
    /// Something else, in words.
    #[error("{0}")]
    Other(String),
}

/// The running sidecar that the flags mean. People are told which of the
/// settings that they have named do not count.
async fn find(args: &GlobalArgs) -> Result<(Instance, Client), CommandError> {
    let environment = |name: &str| std::env::var_os(name);
    let (instance, client) = client::find(&wanted(args)?).await?;
    if config::names_settings(args, &environment) {
        let (config, _) = Config::examine(args, &environment, &current_dir()?);
        // What it is asked next says what is wrong, if something is.
        let differences = client.state().await.map(|state| config.differences(&state.settings)).unwrap_or_default();
        for difference in differences.iter().filter(|difference| !difference.is_of_a_file()) {
            terminal::warn(&format!("{difference}, which counts"));
        }
    }
    Ok((instance, client))
}

/// Which one that is.
fn wanted(args: &GlobalArgs) -> Result<Wanted, CommandError> {
    Ok(config::wanted(args, &|name| std::env::var_os(name), &current_dir()?)?)
}

fn current_dir() -> Result<PathBuf, CommandError> {
    std::env::current_dir().map_err(|e| CommandError::System("find the current directory", e))
}

/// A connector, as it stands in a path.
fn segment(connector: &str) -> Result<String, ConfigError> {
    route::encode(connector).ok_or_else(|| {
        let message = format!("`{}` is none: give its uid or id, such as slack/acme-slack", escaped(connector));
        ConfigError(vec![Mistake { place: "CONNECTOR".into(), message }])
    })
}

/// Whether stdout is still read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Reads,
    Gone,
}

/// Whether anybody reads stdout, as far as can be told without writing.
fn reader() -> Reader {
    let stdout = io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    match polled[0].revents() {
        Some(events) if events.contains(PollFlags::POLLERR) => Reader::Gone,
        _ => Reader::Reads,
    }
}

/// Writes to stdout. Where that is full, only this waits.
async fn print(text: impl AsRef<[u8]>) -> Result<Reader, CommandError> {
    let mut stdout = tokio::io::stdout();
    let written = async {
        stdout.write_all(text.as_ref()).await?;
        stdout.flush().await
    };
    match written.await {
        Ok(()) => Ok(Reader::Reads),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(e) => Err(CommandError::System("print the answer", e)),
    }
}

/// The signals that ask a command to end which would go on by itself. They do not end it any more once this is there.
struct Interruptions {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruptions {
    fn listen() -> Result<Self, CommandError> {
        let on = |kind| signal(kind).map_err(|e| CommandError::System("listen for signals", e));
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    /// Returns when one has come.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
