//! What a service manager can do for us, and how its command is run: by its absolute path, without a shell, never for
//! long.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use crate::cli::CommandError;
use crate::os::subprocess::{self, Limits, Output};

/// The time is longer than a service may take to stop and to start again.
const LIMITS: Limits = Limits { time: Duration::from_secs(75), stdout: 1024 * 1024, stderr: 4096 };

/// What makes a file ours: it stands in a comment.
pub(super) const MARK: &str = "Written by `connect-sidecar service install`";

/// What a manager is to run. Its texts are without control characters.
pub(super) struct Service {
    pub(super) name: String,
    pub(super) project: String,
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

/// How a service stands.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// Whether it starts at login.
    pub(super) at_login: bool,
    /// What it does, for people.
    pub(super) activity: String,
    /// Whether it serves.
    pub(super) is_running: bool,
    /// Its process.
    pub(super) pid: Option<u32>,
    /// How it ended the last time, if it has.
    pub(super) exit_code: Option<i32>,
}

/// A service manager of the user's. Services go by the name of theirs.
pub(super) trait Manager {
    /// Where it looks for the service.
    fn file(&self, name: &str) -> PathBuf;
    /// What it wants to find there.
    fn definition(&self, service: &Service) -> String;
    /// An error if it is not there for this user.
    async fn reach(&self) -> Result<(), CommandError>;
    /// Makes it read the file, and start it at each login.
    async fn load(&self, name: &str) -> Result<(), CommandError>;
    /// Starts it, also if it runs already. An error if it does not come up.
    async fn start(&self, name: &str) -> Result<(), CommandError>;
    /// Stops it for good.
    async fn unload(&self, name: &str) -> Result<(), CommandError>;
    /// Makes it forget what is no longer there. That it cannot is no harm.
    async fn forget(&self, name: &str);
    /// How it stands.
    async fn state(&self, name: &str) -> Result<State, CommandError>;
    /// The command that shows its log.
    fn log_command(&self, name: &str) -> String;
    /// The command that gives services a variable.
    fn variable_command(&self, variable: &str) -> String;
}

/// Runs the manager's command to its end.
pub(super) async fn run(program: &Path, arguments: &[&str]) -> Result<Output, CommandError> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    let output = subprocess::run(command, LIMITS).await;
    output.map_err(|e| CommandError::Other(format!("could not run {}: {e}", shown(program, arguments))))
}

/// The same, and an error in the manager's words if it fails. Returns what it printed.
pub(super) async fn succeed(program: &Path, arguments: &[&str]) -> Result<String, CommandError> {
    let Output { status, stdout, stderr, .. } = run(program, arguments).await?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&stderr);
    let said = said.trim().lines().next().unwrap_or("it gave no reason").trim_end_matches('.');
    Err(CommandError::Other(format!("{} failed: {said}", shown(program, arguments))))
}

fn shown(program: &Path, arguments: &[&str]) -> String {
    format!("`{} {}`", program.file_name().unwrap_or_default().display(), arguments.join(" "))
}
