//! The operations of a service manager, and how its commands are run: by absolute path, without a shell, with a
//! timeout.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::ServiceError;
use crate::os::subprocess::{self, Limits, Output};

/// The time is longer than a service may take to stop and start again.
const LIMITS: Limits = Limits { time: Duration::from_secs(75), stdout: 1024 * 1024, stderr: 4096 };

/// Marks a file as written by this program; part of a comment.
pub(super) const MARK: &str = "Written by `connect-sidecar service install`";

/// A service to run. No text in it has control characters.
pub(super) struct Service {
    pub(super) name: String,
    pub(super) project: String,
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

/// The state of a service.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceState {
    /// Whether it starts at login.
    pub(super) at_login: bool,
    /// What it is doing, for people.
    pub(super) activity: String,
    /// Whether it is running.
    pub(super) is_running: bool,
    /// Its process id.
    pub(super) pid: Option<u32>,
    /// The exit code of the last run, if it has ended.
    pub(super) exit_code: Option<i32>,
}

/// The user's service manager. `name` is that of a [`Service`].
pub(super) trait Manager {
    /// The path of the service's definition.
    fn file(&self, name: &str) -> PathBuf;
    /// The content of the service's definition.
    fn definition(&self, service: &Service) -> String;
    /// Checks that the manager is available to this user.
    async fn check_available(&self) -> Result<(), ServiceError>;
    /// Loads the definition and enables the service at login.
    async fn load(&self, name: &str) -> Result<(), ServiceError>;
    /// Starts or restarts the service. Fails if it does not come up.
    async fn restart(&self, name: &str) -> Result<(), ServiceError>;
    /// Stops the service and disables it.
    async fn unload(&self, name: &str) -> Result<(), ServiceError>;
    /// Makes the manager drop a service whose definition was removed. Ignores errors.
    async fn discard(&self, name: &str);
    /// The state of the service.
    async fn state(&self, name: &str) -> Result<ServiceState, ServiceError>;
    /// The command that shows its log.
    fn log_command(&self, name: &str) -> String;
    /// The command that sets a variable for services.
    fn variable_command(&self, variable: &str) -> String;
}

/// Runs the manager's command to its end.
pub(super) async fn run(program: &Path, arguments: &[&str]) -> Result<Output, ServiceError> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    let output = subprocess::run(command, LIMITS).await;
    output.map_err(|e| ServiceError::Manager(format!("could not run {}: {e}", shown(program, arguments))))
}

/// The same, and an error in the manager's words if it fails. Returns what it printed.
pub(super) async fn succeed(program: &Path, arguments: &[&str]) -> Result<String, ServiceError> {
    let Output { status, stdout, stderr, .. } = run(program, arguments).await?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&stderr);
    let said = said.trim().lines().next().unwrap_or("it gave no reason").trim_end_matches('.');
    Err(ServiceError::Manager(format!("{} failed: {said}", shown(program, arguments))))
}

fn shown(program: &Path, arguments: &[&str]) -> String {
    format!("`{} {}`", program.file_name().unwrap_or_default().display(), arguments.join(" "))
}
