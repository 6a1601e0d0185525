//! `env`: prints the variables that `run` sets, for a shell or an env file.

use std::io::{self, Write};
use std::process::ExitCode;

use super::CommandError;
use super::args::Format;
use super::flags::{environment, load_for_programs};
use super::run::{self, shell};
use crate::config::args::GlobalArgs;
use crate::os::logging;

/// Prints the variables.
pub(super) async fn print(format: Format, intercept: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let config = load_for_programs(global, intercept)?;
    let _log = logging::start(config.logging);
    let variables = run::env(config, intercept, &environment).await?;
    let printed = io::stdout().write_all(&shell::print(format, &variables));
    printed.map_err(|e| CommandError::System("print the variables", e))?;
    Ok(ExitCode::SUCCESS)
}
