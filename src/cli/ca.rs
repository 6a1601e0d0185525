//! `ca`: the local CA, which is made by the first `run` that intercepts.

use std::io::{self, Write};
use std::process::ExitCode;

use super::CommandError;
use super::flags::environment;
use crate::config;
use crate::daemon::intercept::ca;
use crate::os::terminal::escaped;

/// Deletes it.
pub(super) fn remove() -> Result<ExitCode, CommandError> {
    let removed = match config::state_dir(&environment) {
        Some(dir) => ca::remove(&dir).map_err(|e| CommandError::System("remove the local CA", e))?,
        None => None,
    };
    let said = match removed {
        Some(dir) => format!("removed the local CA in {}", dir.display()),
        None => "there is no local CA".to_owned(),
    };
    // A closed stdout is no reason to fail.
    let _ = writeln!(io::stdout(), "{}", escaped(&said));
    Ok(ExitCode::SUCCESS)
}
