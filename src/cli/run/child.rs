//! Runs the command of `run` as a job of its own, with signal forwarding and terminal control.
//!
//! The command should behave as if started by the shell: same stdin, stdout, stderr, limits, keyboard input and job
//! control. So it gets its own process group and, if this process is in the foreground of a terminal, control of that
//! terminal: Ctrl-C then reaches the command only. Signals sent to this process are forwarded. When the command ends,
//! the rest of its process group is terminated; processes that created their own group, such as daemons, are left
//! alone.
//!
//! In a foreground pipeline (`… | less`) the command stays in this process's group, since the other members need the
//! terminal too. The terminal then signals all of them, and processes left behind are not terminated.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::future::poll_fn;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::task::Poll;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{AccessFlags, Pid, access, getpgrp, tcgetpgrp, tcsetpgrp};
// nix cannot represent a wait status with a real-time signal.
use rustix::process::{self as wait, WaitOptions, waitpgid, waitpid};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

#[cfg(target_os = "linux")]
use crate::os::child_processes;
use crate::os::hardening::Inherited;

/// How long the command may take to end after SIGTERM or SIGINT before it is killed.
const TERMINATION_LIMIT: Duration = Duration::from_secs(10);
/// How long the rest of the group may take to end after SIGTERM, and again after SIGKILL.
const GROUP_LIMIT: Duration = Duration::from_secs(2);
/// Time between two checks of the rest of the group.
const GROUP_CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// How long to wait for a stop signal to take effect. It has none if no shell could continue this process.
const STOP_DELAY: Duration = Duration::from_millis(100);

/// The search path that shells use without PATH.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// The exit code if the command's is unknown.
const UNKNOWN_EXIT_CODE: u8 = 1;

/// The signals that are forwarded to the command.
const FORWARDED: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// The signals sent to this process.
pub struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// Starts listening. Signals that this process was started to ignore (`nohup`) stay ignored, and the command
    /// inherits that.
    pub fn listen() -> io::Result<Self> {
        let ignored = ignored_signals();
        let is_ignored = |signal: &Signal| ignored & (1 << (*signal as i32 - 1)) != 0;
        let forwarded = FORWARDED.into_iter().filter(|signal| !is_ignored(signal));
        let all = forwarded.chain([Signal::SIGCHLD, Signal::SIGCONT]);
        all.map(|signal| Ok((signal, unix::signal(SignalKind::from_raw(signal as i32))?)))
            .collect::<io::Result<_>>()
            .map(Self)
    }

    async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            let mut streams = self.0.iter_mut();
            let ready = streams.find_map(|(signal, stream)| stream.poll_recv(cx).is_ready().then_some(*signal));
            ready.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Returns when SIGINT or SIGTERM arrives.
    pub async fn end(&mut self) {
        while !matches!(self.next().await, Signal::SIGINT | Signal::SIGTERM) {}
    }
}

/// A bit mask of the signals that this process ignores, the lowest bit for signal 1. Empty on systems without `/proc`.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

/// The command could not be started.
#[derive(Debug, thiserror::Error)]
#[error("could not {message}")]
pub struct SpawnError {
    /// What was tried and why it failed, for people.
    message: String,
    #[source]
    error: io::Error,
}

impl SpawnError {
    /// `program` is the file that was run, if one was found.
    fn new(command: &OsStr, program: Option<&Path>, error: io::Error) -> Self {
        let command = command.display();
        let message = match program {
            Some(program) => format!("run {command}: {}", reason(program, &error)),
            None => format!("find {command} on PATH: check the name, or give its path (such as ./{command})"),
        };
        Self { message, error }
    }

    /// The exit code of shells: 127 if the command was not found, 126 if it could not be run.
    pub fn exit_code(&self) -> u8 {
        if self.error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
    }
}

/// Why a file could not be run, for people.
fn reason(program: &Path, error: &io::Error) -> String {
    let metadata = fs::metadata(program);
    let is_executable = || access(program, AccessFlags::X_OK).is_ok();
    match (error.kind(), metadata) {
        (_, Ok(metadata)) if metadata.is_dir() => "it is a directory, not an executable file".into(),
        (io::ErrorKind::NotFound, Ok(_)) => "the program that its first line or its header names is not there".into(),
        (io::ErrorKind::NotFound, Err(_)) => "it is not there".into(),
        (io::ErrorKind::PermissionDenied, Ok(_)) if is_executable() => {
            "the program that its first line names is not an executable file, or nothing on its file system is".into()
        }
        (io::ErrorKind::PermissionDenied, Ok(_)) => "it is not an executable file; `chmod +x` makes it one".into(),
        (io::ErrorKind::PermissionDenied, Err(_)) => "you may not enter the directory that it is in".into(),
        _ if error.raw_os_error() == Some(Errno::ENOEXEC as i32) => {
            "it is no program of this kind of machine, and no script".into()
        }
        _ => error.to_string(),
    }
}

/// The file that a shell would run for this name: the name itself if it has a slash, else the first executable file on
/// PATH. Without one, the first file of that name, which bash names in its error.
fn find(name: &OsStr, path: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let or_current = |dir: PathBuf| if dir.as_os_str().is_empty() { ".".into() } else { dir };
    let mut candidates =
        env::split_paths(path).map(|dir| or_current(dir).join(name)).filter(|file| file.exists()).peekable();
    let first = candidates.peek().filter(|first| first.is_file()).cloned();
    candidates.find(|file| file.is_file() && access(file, AccessFlags::X_OK).is_ok()).or(first)
}

/// Whether a file that the system cannot execute is a shell script, by the rules of bash.
fn is_script(program: &Path) -> io::Result<bool> {
    let mut sample = Vec::new();
    File::open(program)?.take(80).read_to_end(&mut sample)?;
    let first_line = match sample.starts_with(b"#!") {
        true => &*sample,
        false => sample.split(|byte| *byte == b'\n').next().unwrap_or_default(),
    };
    Ok(!sample.starts_with(b"\x7fELF") && !first_line.contains(&0))
}

/// Spawns what a shell would for these words, a name and its arguments.
fn start<T>(words: (&OsStr, &[OsString]), mut spawn: impl FnMut(Command) -> io::Result<T>) -> Result<T, SpawnError> {
    let (name, arguments) = words;
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let file = find(name, &path).ok_or_else(|| SpawnError::new(name, None, io::ErrorKind::NotFound.into()))?;
    let mut command = Command::new(&file);
    command.arg0(name).args(arguments);
    let started = spawn(command).or_else(|error| {
        if error.raw_os_error() != Some(Errno::ENOEXEC as i32) || !is_script(&file)? {
            return Err(error);
        }
        let mut shell = Command::new("/bin/sh");
        let is_an_option = file.as_os_str().as_bytes().starts_with(b"-");
        shell.arg(if is_an_option { Path::new(".").join(&file) } else { file.clone() }).args(arguments);
        spawn(shell)
    });
    started.map_err(|error| SpawnError::new(name, Some(&file), error))
}

/// Runs a command. Returns its exit code, which is 128 + n after signal n. `set_variables` sets its environment.
pub async fn run(
    words: (&OsStr, &[OsString]),
    set_variables: impl Fn(&mut Command),
    signals: &mut Signals,
    limits: Inherited,
) -> Result<u8, SpawnError> {
    let terminal = Terminal::open();
    let shares_group = terminal.as_ref().is_some_and(Terminal::is_foreground) && is_in_pipeline();
    #[cfg(target_os = "linux")]
    child_processes::adopt_orphans();
    let child = start(words, |mut command| {
        set_variables(&mut command);
        if !shares_group {
            command.process_group(0);
        }
        limits.during(|| command.spawn())
    })?;
    let job = Job { leader: wait::Pid::from_child(&child), shares_group, terminal };
    job.resume();
    let code = job.wait(signals).await;
    job.reclaim_terminal();
    if !shares_group {
        end_group(job.leader, signals).await;
    }
    Ok(code)
}

/// Whether stdin or stdout of this process is a pipe or socket.
fn is_in_pipeline() -> bool {
    let is_pipe = |file: &dyn AsFd| {
        let kind = fstat(file.as_fd()).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        matches!(kind, Ok(SFlag::S_IFIFO | SFlag::S_IFSOCK))
    };
    is_pipe(&io::stdin()) || is_pipe(&io::stdout())
}

/// The running command.
struct Job {
    leader: wait::Pid,
    shares_group: bool,
    terminal: Option<Terminal>,
}

/// A change of the command's state.
enum Change {
    /// It has ended with this exit code.
    Ended(u8),
    /// This signal has stopped it.
    Stopped(i32),
}

impl Job {
    fn id(&self) -> Pid {
        Pid::from_raw(self.leader.as_raw_nonzero().get())
    }

    /// The next change of its state, if there is one.
    fn change(&self) -> Option<Change> {
        let status = match waitpid(Some(self.leader), WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            Ok(status) => status?.1,
            // A later call would fail too.
            Err(error) => {
                warn!(
                    "the command has ended, but it is not known how ({error}): taken as exit code {UNKNOWN_EXIT_CODE}"
                );
                return Some(Change::Ended(UNKNOWN_EXIT_CODE));
            }
        };
        let code = status.exit_status().or_else(|| Some(128 + status.terminating_signal()?));
        match code {
            Some(code) => Some(Change::Ended(u8::try_from(code).unwrap_or(u8::MAX))),
            None => status.stopping_signal().map(Change::Stopped),
        }
    }

    /// Forwards signals until the command has ended. Returns its exit code.
    async fn wait(&self, signals: &mut Signals) -> u8 {
        let mut termination_requested = false;
        let mut deadline: Option<Instant> = None;
        loop {
            // Checked after every wake-up, since SIGCHLD may be lost.
            while let Some(change) = self.change() {
                match change {
                    Change::Ended(code) => return code,
                    Change::Stopped(signal) => self.stop_with_command(signal).await,
                }
            }
            #[cfg(target_os = "linux")]
            child_processes::reap_adopted(self.id());
            let signal = tokio::select! {
                signal = signals.next() => signal,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    deadline = None;
                    self.send(Signal::SIGKILL);
                    continue;
                }
            };
            match signal {
                Signal::SIGCHLD => {}
                Signal::SIGCONT => self.resume(),
                // The terminal has sent it to the command as well.
                Signal::SIGINT | Signal::SIGQUIT if self.shares_group => {}
                Signal::SIGINT | Signal::SIGTERM if termination_requested => self.send(Signal::SIGKILL),
                signal => {
                    self.send(signal);
                    termination_requested |= matches!(signal, Signal::SIGINT | Signal::SIGTERM);
                    if termination_requested || signal == Signal::SIGHUP {
                        deadline.get_or_insert_with(|| Instant::now() + TERMINATION_LIMIT);
                        // A stopped process cannot handle it.
                        self.send(Signal::SIGCONT);
                    }
                }
            }
        }
    }

    fn send(&self, signal: Signal) {
        // Fails only if the command has ended, which the next check notices.
        let _ = if self.shares_group { kill(self.id(), signal) } else { killpg(self.id(), signal) };
    }

    /// Stops this process's group when the command is stopped at the terminal, as if both were one job. The shell
    /// notices and takes the terminal.
    async fn stop_with_command(&self, signal: i32) {
        if self.shares_group || self.terminal.is_none() {
            return;
        }
        // With the same signal, which the shell reports. Not SIGSTOP: it would stop a process that no shell continues.
        let signal = Signal::try_from(signal).ok().filter(|signal| *signal != Signal::SIGSTOP);
        let _ = killpg(getpgrp(), signal.unwrap_or(Signal::SIGTSTP));
        // Continues once the shell has continued this process. A group without a shell is not stopped at all.
        sleep(STOP_DELAY).await;
        self.resume();
    }

    /// Gives the command the terminal if this process has it, and continues the command.
    fn resume(&self) {
        if self.shares_group {
            return;
        }
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.is_foreground()) {
            terminal.set_foreground(self.id());
        }
        // Also at the start: it may have been stopped for using the terminal before it had control of it.
        self.send(Signal::SIGCONT);
    }

    /// Takes the terminal back, unless another group has it by now.
    fn reclaim_terminal(&self) {
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.is_held_by(self.id())) {
            terminal.set_foreground(getpgrp());
        }
    }
}

/// Terminates what is left of the command's group.
async fn end_group(leader: wait::Pid, signals: &mut Signals) {
    let group = Pid::from_raw(leader.as_raw_nonzero().get());
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if killpg(group, signal).is_err() {
            return;
        }
        let _ = killpg(group, Signal::SIGCONT);
        let limit = Instant::now() + GROUP_LIMIT;
        let gone = async {
            while Instant::now() < limit {
                while let Ok(Some(_)) = waitpgid(leader, WaitOptions::NOHANG) {}
                if killpg(group, None).is_err() {
                    return true;
                }
                sleep(GROUP_CHECK_INTERVAL).await;
            }
            false
        };
        tokio::select! {
            gone = gone => if gone { return },
            () = signals.end() => {}
        }
    }
}

/// The terminal that controls this process.
struct Terminal(File);

impl Terminal {
    fn open() -> Option<Self> {
        File::options().read(true).write(true).open("/dev/tty").ok().map(Self)
    }

    /// Whether this process's group is in the foreground.
    fn is_foreground(&self) -> bool {
        tcgetpgrp(&self.0) == Ok(getpgrp())
    }

    /// Whether this group is in the foreground, or one that no longer exists.
    fn is_held_by(&self, group: Pid) -> bool {
        tcgetpgrp(&self.0).is_ok_and(|front| front == group || killpg(front, None) == Err(Errno::ESRCH))
    }

    /// Puts a group in the foreground. SIGTTOU is blocked, since it would stop this process if it is in the background.
    fn set_foreground(&self, group: Pid) {
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTTOU);
        let Ok(before) = stop.thread_swap_mask(SigmaskHow::SIG_BLOCK) else { return };
        // Fails if the group has already ended.
        let _ = tcsetpgrp(&self.0, group);
        let _ = before.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_reaped_elsewhere_has_an_unknown_exit_code() {
        let mut child = Command::new("true").spawn().expect("a process");
        let job = Job { leader: wait::Pid::from_child(&child), shares_group: true, terminal: None };
        assert!(child.wait().expect("a status").success());
        assert!(matches!(job.change(), Some(Change::Ended(UNKNOWN_EXIT_CODE))));
    }
}
