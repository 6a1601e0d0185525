//! `refresh`: a fresh OIDC token now.

use std::process::ExitCode;

use crate::cli::GlobalArgs;
use crate::commands::CommandError;

/// Has the running sidecar get one.
pub async fn refresh(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    super::find(global).await?;
    Err(CommandError::Other("not there yet".into()))
}
