//! Runs a program to its end, with limits on its time and output.
//!
//! The program has no stdin and leads a process group of its own. However the run ends, all processes that are left in
//! the group are killed.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::oneshot;

use crate::os::child_processes;

/// How long output is still read after the program's own end: a process that has left the group may hold the pipes
/// open.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Limits of a run.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The program is killed after this time.
    pub time: Duration,
    /// The most that is read from stdout, in bytes. The pipe is then closed, which usually ends the program.
    pub stdout: u64,
    /// The most that is kept of stderr, in bytes. The rest is discarded. With 0, stderr is `/dev/null`.
    pub stderr: u64,
}

/// The result of a program that has ended by itself.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout, up to the limit.
    pub stdout: Vec<u8>,
    /// Whether it wrote more to stdout than the limit.
    pub is_truncated: bool,
    /// What it wrote to stderr, up to the limit.
    pub stderr: Vec<u8>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("it could not be started: {0}")]
    Start(#[source] io::Error),
    /// Its end could not be waited for.
    #[error("its end could not be waited for: {0}")]
    Wait(#[source] io::Error),
    /// It was killed at the end of its time.
    #[error("it took longer than {} s", .0.as_secs())]
    Timeout(Duration),
}

/// Runs the program. Arguments, environment and directory are those of `command`.
pub async fn run(mut command: Command, limits: Limits) -> Result<Output, Error> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(if limits.stderr > 0 { Stdio::piped() } else { Stdio::null() });
    let (mut child, group) = child_processes::spawn(&mut command).map_err(Error::Start)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (stdout_pipe, stderr_pipe) = (child.stdout.take(), child.stderr.take());
    let (ended, has_ended) = oneshot::channel::<()>();
    let waiting = async {
        let status = child.wait().await;
        drop(group);
        drop(ended);
        status
    };
    let reading = async {
        let read_stdout = async { drop(read(stdout_pipe, limits.stdout + 1, &mut stdout).await) };
        let read_stderr = async {
            if let Some(mut rest) = read(stderr_pipe, limits.stderr, &mut stderr).await {
                // A full pipe would block the program.
                let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
            }
        };
        tokio::select! {
            _ = async { tokio::join!(read_stdout, read_stderr) } => {}
            () = async { let _ = has_ended.await; tokio::time::sleep(DRAIN_TIME).await } => {}
        }
    };
    let ended = tokio::time::timeout(limits.time, async { tokio::join!(waiting, reading).0 }).await;
    let status = ended.map_err(|_| Error::Timeout(limits.time))?.map_err(Error::Wait)?;
    let is_truncated = stdout.len() as u64 > limits.stdout;
    stdout.truncate(usize::try_from(limits.stdout).unwrap_or(usize::MAX));
    Ok(Output { status, stdout, is_truncated, stderr })
}

/// Starts a program that may outlive this process, without input or output. It leads a process group, so Ctrl-C here
/// does not reach it. Returns its status if it ends within `wait`.
pub async fn start_detached(mut command: Command, wait: Duration) -> io::Result<Option<ExitStatus>> {
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    tokio::time::timeout(wait, child.wait()).await.ok().transpose()
}

/// Reads up to `limit` bytes. Returns the pipe if there may be more.
async fn read<R: AsyncRead + Unpin>(pipe: Option<R>, limit: u64, buffer: &mut Vec<u8>) -> Option<R> {
    let mut limited = pipe?.take(limit);
    let _ = limited.read_to_end(buffer).await;
    (limited.limit() == 0).then(|| limited.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(time: Duration) -> Limits {
        Limits { time, stdout: 64 * 1024, stderr: 0 }
    }

    fn command(program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        command
    }

    #[tokio::test]
    async fn remaining_children_are_killed_when_the_run_ends_or_is_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let patience = Duration::from_secs(20);
        for (script, ends) in [("sleep 60 >pipe & wait", false), ("exec 3>pipe; sleep 60 >/dev/null & exit 0", true)] {
            let mut shell = command("/bin/sh", &["-c", script]);
            shell.current_dir(dir.path());
            let running = run(shell, limits(patience));
            let pipe = pipe.clone();
            let opening = tokio::task::spawn_blocking(move || std::fs::File::open(pipe));
            let started = async { opening.await.expect("no panic").expect("a reading end") };
            let mut pipe = if ends {
                let (output, pipe) = tokio::join!(running, started);
                assert!(output.is_ok(), "{script}");
                pipe
            } else {
                tokio::select! { _ = running => panic!("still running: {script}"), pipe = started => pipe }
            };
            // Ends once no process has the writing end.
            let reading = tokio::task::spawn_blocking(move || std::io::copy(&mut pipe, &mut std::io::sink()));
            assert!(tokio::time::timeout(patience, reading).await.is_ok(), "a child still runs: {script}");
        }
    }

    #[tokio::test]
    async fn time_and_output_are_limited() {
        let hanging = run(command("/bin/sleep", &["60"]), limits(Duration::from_millis(1))).await;
        assert!(matches!(hanging, Err(Error::Timeout(_))));
        let endless = run(command("/bin/cat", &["/dev/zero"]), limits(Duration::from_secs(20))).await;
        let endless = endless.expect("an end");
        assert_eq!((endless.stdout.len(), endless.status.code()), (64 * 1024, None), "ended by a signal");
        assert!(endless.is_truncated);
    }
}
