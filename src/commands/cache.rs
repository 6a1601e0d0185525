//! `cache`: the tokens that the running sidecar keeps.

use std::process::ExitCode;

use crate::cli::GlobalArgs;
use crate::commands::CommandError;

/// Forgets them.
pub async fn clear(_connector: Option<&str>, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    super::find(global).await?;
    Err(CommandError::Other("not there yet".into()))
}
