//! `completions`: prints a shell completion script.

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::CommandError;
use crate::cli::args::Cli;

/// The values of flags that are checked with the rest of the configuration, not by the parser.
const VALUES: [(&str, &[&str]); 4] = [
    ("auth", &["oidc", "access-token"]),
    ("refresh", &["off", "cli"]),
    ("log_format", &["text", "json"]),
    ("log_level", &["error", "warn", "info", "debug", "trace"]),
];

/// Prints the script.
pub(super) async fn print(shell: Shell) -> Result<ExitCode, CommandError> {
    let mut command = with_values(Cli::command());
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    // The bash script uses two names for a program with a hyphen, and completes nothing after a subcommand
    // (https://github.com/clap-rs/clap/issues/6421).
    super::output::print(String::from_utf8_lossy(&script).replace("connect__subcmd__sidecar", "connect__sidecar"))
        .await?;
    Ok(ExitCode::SUCCESS)
}

fn with_values(command: Command) -> Command {
    let command = command.mut_args(|arg| match VALUES.iter().find(|(id, _)| *id == arg.get_id().as_str()) {
        Some((_, values)) if arg.get_action().takes_values() => arg.value_parser(PossibleValuesParser::new(*values)),
        _ => arg,
    });
    command.mut_subcommands(with_values)
}
