//! `service`: a sidecar that runs from login on.

use std::process::ExitCode;

use crate::cli::GlobalArgs;
use crate::commands::CommandError;

/// Installs, removes or shows it.
pub async fn run(_command: crate::cli::ServiceCommand, _global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    Err(CommandError::Other("not there yet".into()))
}
