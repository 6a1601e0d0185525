//! The built binary, run as a user would.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use super::soon;

/// A command of the binary with nothing of the tests' environment in it.
pub fn sidecar(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_connect-sidecar"));
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// A command that ran to its end.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end.
pub async fn run(mut command: Command) -> Ended {
    let output = soon("the command's end", command.output()).await.expect("a command");
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A command that serves.
pub struct Serving {
    pub child: Child,
    pub addr: std::net::SocketAddr,
    stdout: BufReader<ChildStdout>,
}

impl Serving {
    /// Starts it and waits for its ready line.
    pub async fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("a process");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let mut line = String::new();
        soon("the ready line", stdout.read_line(&mut line)).await.expect("a line");
        let Some((_, addr)) = line.trim_end().split_once(" listening on http://") else {
            let mut stderr = String::new();
            let _ = soon("stderr", child.stderr.take().expect("stderr").read_to_string(&mut stderr)).await;
            panic!("not ready: {line:?}\n{stderr}");
        };
        Self { addr: addr.parse().expect("an address"), child, stdout }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).expect("it runs");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("a signal");
    }

    /// Waits for its end; its exit code, the rest of stdout, and stderr.
    pub async fn end(mut self) -> Ended {
        let mut stdout = String::new();
        let mut stderr = String::new();
        let mut errors = self.child.stderr.take().expect("stderr");
        let ended = async {
            let _ = tokio::join!(self.stdout.read_to_string(&mut stdout), errors.read_to_string(&mut stderr));
            self.child.wait().await
        };
        let status = soon("its end", ended).await.expect("a status");
        Ended { code: status.code(), stdout, stderr }
    }
}
