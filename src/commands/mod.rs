//! The commands that ask a running sidecar: each finds it, asks it one thing and prints the answer.
//!
//! stdout carries data only. Where none runs, that is said plainly; nothing is started but for a token.

pub mod cache;
pub mod completions;
pub mod logs;
pub mod refresh;
pub mod status;
pub mod token;

use std::io;

use crate::app::StartupError;
use crate::cli::GlobalArgs;
use crate::client::{self, Client, NoneRuns, Unanswered};
use crate::config::{self, ConfigError};
use crate::status::instance::Instance;

/// Why a command has no answer. Exit code 2 for the configuration, else 1.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A flag or a variable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Nobody to ask.
    #[error(transparent)]
    NoneRuns(#[from] NoneRuns),
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

/// The running sidecar that the flags mean.
pub async fn find(args: &GlobalArgs) -> Result<(Instance, Client), CommandError> {
    let current_dir = std::env::current_dir().map_err(|e| CommandError::System("find the current directory", e))?;
    let wanted = config::wanted(args, &|name| std::env::var_os(name), &current_dir)?;
    Ok(client::find(&wanted).await?)
}
