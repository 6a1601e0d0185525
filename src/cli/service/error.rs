//! Why a service could not be managed.

use std::path::PathBuf;

/// Why a service could not be managed. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is no directory for service definitions.
    #[error("neither HOME nor XDG_CONFIG_HOME says where a service could be put")]
    NoDirectory,
    /// The manager's program is missing, or the user has no session with it.
    #[error("no service is possible here: {0}")]
    Unavailable(String),
    /// A command of the manager failed. Says which, and why.
    #[error("{0}")]
    Manager(String),
    /// The service is installed but failed to start.
    #[error(
        "{name} is installed, but does not run: {reason}\nits log: {log_command}\nthen `connect-sidecar service \
         install` again, or `connect-sidecar service uninstall`"
    )]
    NotStarted {
        /// The service.
        name: String,
        /// Why, if known.
        reason: String,
        /// The command that shows its log.
        log_command: String,
    },
    /// The service was told to stop, but is still running.
    #[error("{name} does not end; try `{command}`")]
    NotStopped {
        /// The service.
        name: String,
        /// The command that stops it.
        command: String,
    },
    /// The file of the service was not written by this program.
    #[error("{} was not written by this program: move it away first, if it is not needed", .0.display())]
    ForeignFile(PathBuf),
}
