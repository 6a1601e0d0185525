//! `ca`: manages the local CA, which the first intercepting `run` creates.

use std::io::{self, Write};
use std::process::ExitCode;

use super::CommandError;
use super::flags::environment;
use crate::config;
use crate::daemon::intercept::ca;
use crate::os::terminal::escaped;

/// Deletes the local CA.
pub(super) fn remove() -> Result<ExitCode, CommandError> {
    let removed = match config::state_dir(&environment) {
        Some(dir) => ca::remove(&dir).map_err(|e| CommandError::System("remove the local CA", e))?,
        None => None,
    };
    let message = match removed {
        Some(dir) => format!("removed the local CA in {}", dir.display()),
        None => "there is no local CA".to_owned(),
    };
    // A closed stdout is ignored.
    let _ = writeln!(io::stdout(), "{}", escaped(&message));
    Ok(ExitCode::SUCCESS)
}
