//! `doctor`: checks the whole set-up, changes nothing.

use std::process::ExitCode;

use crate::cli::GlobalArgs;
use crate::commands::CommandError;

/// Checks and prints; exit code 1 if a request would fail now or soon.
pub async fn examine(_json: bool, _global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    Err(CommandError::Other("not there yet".into()))
}
