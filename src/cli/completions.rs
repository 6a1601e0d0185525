//! `completions`: a script that completes the command line.

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::CommandError;
use crate::cli::args::Cli;

/// The values of flags that are checked with all else that is configured, and not by the parser.
const VALUES: [(&str, &[&str]); 4] = [
    ("auth", &["oidc", "access-token"]),
    ("refresh", &["off", "cli"]),
    ("log_format", &["text", "json"]),
    ("log_level", &["error", "warn", "info", "debug", "trace"]),
];

/// Prints it.
pub(super) async fn print(shell: Shell) -> Result<ExitCode, CommandError> {
    let mut command = with_values(Cli::command());
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    // The script for bash calls a program with a hyphen by two names, and completes nothing after a command
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
