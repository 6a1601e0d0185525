//! The binary: parses the command line, runs the command, and maps an error to stderr and an exit code.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use connect_sidecar::cli::args::{Cli, Command};
use connect_sidecar::cli::{self, CommandError};
use connect_sidecar::os::hardening::{self, Inherited};
use connect_sidecar::os::terminal::escaped;

fn main() -> ExitCode {
    let inherited = hardening::apply();
    let cli = Cli::parse();
    match run(&cli, inherited) {
        Ok(code) => code,
        Err(error) => {
            for line in error.to_string().lines() {
                let _ = writeln!(io::stderr(), "error: {}", escaped(line));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli, inherited: Inherited) -> Result<ExitCode, CommandError> {
    let mut runtime = match cli.command.as_ref().is_none_or(Command::serves) {
        true => tokio::runtime::Builder::new_multi_thread(),
        // A short command ends before worker threads would have started.
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = runtime
        // At most half of the cores: the others are for the apps, and waking another core costs more than it saves.
        .worker_threads((cores / 2).clamp(1, 4))
        .enable_all()
        .build()
        .map_err(|e| CommandError::System("start the runtime", e))?;
    let code = runtime.block_on(cli::execute(cli, inherited));
    // A hanging file system must not keep the process from ending.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}
