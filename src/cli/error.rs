//! The errors of commands and their exit codes.

use std::io;

use super::browser::BrowserError;
use super::demo::DemoError;
use super::emulate::EmulateError;
use super::run::RunError;
use super::run::joining::{JoinError, SettingConflict};
use super::service::ServiceError;
use super::token::TokenError;
use crate::config::ConfigError;
use crate::daemon::app::StartupError;
use crate::instance::client::{ClientError, NotFound};

const FAILED: u8 = 1;
const BAD_CONFIGURATION: u8 = 2;

/// Why a command fails. The exit code is 2 for a wrong configuration, 3 for a port that is taken, and otherwise 1.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No sidecar runs, or it does not respond.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The running sidecar conflicts with an explicit setting.
    #[error(transparent)]
    Conflict(SettingConflict),
    /// The running sidecar did not answer, or refused the request.
    #[error(transparent)]
    ClientError(#[from] ClientError),
    /// No sidecar could be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The demo could not start.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The command of `run` could not run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The emulator could not start.
    #[error(transparent)]
    Emulate(#[from] EmulateError),
    /// A system call failed.
    #[error("could not {0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// `token` got no token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A service could not be managed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// `status --open` could not open a browser.
    #[error(
        "could not open it in a browser ({reason}): open it by hand, with `#key=` and the `key` in \
         $XDG_STATE_HOME/connect-sidecar/{port}.json (or ~/.local/state/…) behind it"
    )]
    Browser {
        /// What failed.
        #[source]
        reason: BrowserError,
        /// The sidecar's port.
        port: String,
    },
}

impl From<JoinError> for CommandError {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Client(error) => Self::ClientError(error),
            JoinError::Conflict(conflict) => Self::Conflict(conflict),
        }
    }
}

impl CommandError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Conflict(_) => BAD_CONFIGURATION,
            Self::Startup(error) => error.exit_code(),
            Self::Demo(error) => error.exit_code(),
            Self::Run(error) => error.exit_code(),
            Self::Emulate(error) => error.exit_code(),
            Self::NotFound(_)
            | Self::ClientError(_)
            | Self::System(..)
            | Self::Token(_)
            | Self::Service(_)
            | Self::Browser { .. } => FAILED,
        }
    }
}
