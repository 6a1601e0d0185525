//! Why a command ends with another exit code than 0.

use std::io;

use super::demo::DemoError;
use super::emulate::EmulateError;
use super::run::RunError;
use super::run::joining::Differs;
use crate::config::ConfigError;
use crate::daemon::app::StartupError;
use crate::instance::client::{ClientError, NotFound};

const FAILED: u8 = 1;
const BAD_CONFIGURATION: u8 = 2;

/// Why a command fails. Exit code 2 for the configuration, 3 for a port that is taken, else 1; what a command of `run`
/// ends with is its own.
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
    ClientError(#[from] ClientError),
    /// No sidecar could be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The demo could not begin.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The command of `run` could not be run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The emulator could not begin.
    #[error(transparent)]
    Emulate(#[from] EmulateError),
    /// The system would not have it.
    #[error("could not {0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// Something else, in words.
    #[error("{0}")]
    Other(String),
}

impl CommandError {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Differs(_) => BAD_CONFIGURATION,
            Self::Startup(error) => error.exit_code(),
            Self::Demo(error) => error.exit_code(),
            Self::Run(error) => error.exit_code(),
            Self::Emulate(error) => error.exit_code(),
            Self::NotFound(_) | Self::ClientError(_) | Self::System(..) | Self::Other(_) => FAILED,
        }
    }
}
