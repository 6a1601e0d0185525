//! The command line: a file or directory for each command.
//!
//! A command calls the other parts, prints the result and maps errors to an exit code. stdout carries data only; if its
//! reader closes it early, that is no failure. Nothing here serves a request.

pub mod args;
mod browser;
mod ca;
mod cache;
mod completions;
pub mod demo;
pub mod doctor;
pub mod emulate;
mod env;
mod error;
mod flags;
mod logs;
mod output;
mod refresh;
mod report;
pub mod run;
mod running;
mod serve;
pub mod service;
mod signals;
mod status;
mod token;

use std::path::PathBuf;
use std::process::ExitCode;

use args::{CaCommand, CacheCommand, Cli, Command, ServiceCommand};
pub use error::CommandError;

use crate::os::hardening::Inherited;

/// Runs the command. `inherited` holds the process limits from before hardening, which are restored for child
/// processes.
pub async fn execute(cli: &Cli, inherited: Inherited) -> Result<ExitCode, CommandError> {
    let global = &cli.global_args()?;
    match cli.command.as_ref() {
        None | Some(Command::Serve(_)) => serve::serve(global).await,
        Some(Command::Demo { once }) => demo::demo(*once, global).await,
        Some(Command::Run { no_intercept, expose_token, command, .. }) => {
            let options =
                run::Options { intercept: !no_intercept, expose_token: *expose_token, report_problems: !global.quiet };
            run::execute(options, command, global, inherited).await
        }
        Some(Command::Env { format, no_intercept }) => env::print(*format, !no_intercept, global).await,
        Some(Command::Token(args)) => token::print(args, global).await,
        Some(Command::Status(args)) => status::show(*args, global).await,
        Some(Command::Doctor { json }) => doctor::examine(*json, global).await,
        Some(Command::Refresh) => refresh::refresh(global).await,
        Some(Command::Cache(CacheCommand::Clear { connector })) => cache::clear(connector.as_deref(), global).await,
        Some(Command::Logs { follow, json }) => logs::print(*follow, *json, global).await,
        Some(Command::Service(ServiceCommand::Install(_))) => service::install(global).await,
        Some(Command::Service(ServiceCommand::Status)) => service::status(global).await,
        Some(Command::Service(ServiceCommand::Uninstall)) => service::uninstall(global).await,
        Some(Command::Completions { shell }) => completions::print(*shell).await,
        Some(Command::Ca(CaCommand::Remove)) => ca::remove(),
        Some(Command::Emulate(args)) => emulate::emulate(args, global).await,
    }
}

fn current_dir() -> Result<PathBuf, CommandError> {
    std::env::current_dir().map_err(|e| CommandError::System("find the current directory", e))
}
