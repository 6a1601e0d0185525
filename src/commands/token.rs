//! `token`: a provider token on stdout, and nothing else.

use std::process::ExitCode;

use crate::cli::GlobalArgs;
use crate::commands::CommandError;

/// Prints it.
pub async fn print(_args: &crate::cli::TokenArgs, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    super::find(global).await?;
    Err(CommandError::Other("not there yet".into()))
}
