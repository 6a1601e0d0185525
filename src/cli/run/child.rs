//! The command that is run: a job of its own in front of the same terminal, and its end.
//!
//! It is to find what it would find without us: stdin, stdout and stderr, the limits, the keys that are typed, the jobs
//! of the shell. So it gets a process group of its own and, where we are in the foreground of a terminal, that terminal:
//! Ctrl-C reaches it once and us not at all. Signals that reach us are passed on to it, and when it has ended, what is
//! left of its group is ended, too. What made a group of its own, as daemons do, is left alone.
//!
//! As a part of a pipeline in the foreground (`… | less`) it stays in our group, as the other parts need the terminal,
//! too; there the terminal's signals reach everybody by themselves, and what it leaves behind stays as it would without us.

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
// Its status is the system's own: that of nix knows no real-time signal.
use rustix::process::{self as wait, WaitOptions, waitpgid, waitpid};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

#[cfg(target_os = "linux")]
use crate::os::child_processes;
use crate::os::hardening::Inherited;

/// After a signal that asks it to end, the command may take this long.
const ENDING_LIMIT: Duration = Duration::from_secs(10);
/// After the command's end, the rest of its group may take this long, and this long again to be gone once killed.
const REST_LIMIT: Duration = Duration::from_secs(2);
/// Time between two looks at the rest of the group.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A process that asks to be stopped and goes on for this long is one that nobody could continue.
const STOPPING_TAKES: Duration = Duration::from_millis(100);

/// Where a shell looks for a command if there is no PATH.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// The exit code of a command of which nobody knows how it ended.
const UNKNOWN_END: u8 = 1;

/// What is passed on.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// The signals that reach us from now on.
pub struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// Listens for all that matter to a running command. Those that we were started to ignore (`nohup`) stay ignored, by
    /// the command as well.
    pub fn listen() -> io::Result<Self> {
        let ignored = ignored_signals();
        let is_ignored = |signal: &Signal| ignored & (1 << (*signal as i32 - 1)) != 0;
        let passed_on = PASSED_ON.into_iter().filter(|signal| !is_ignored(signal));
        let all = passed_on.chain([Signal::SIGCHLD, Signal::SIGCONT]);
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

    /// Returns when one has come that asks a process to end at once.
    pub async fn end(&mut self) {
        while !matches!(self.next().await, Signal::SIGINT | Signal::SIGTERM) {}
    }
}

/// A bit for each signal that this process ignores, the lowest for signal 1; none where the system does not tell.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

/// The command could not be started.
#[derive(Debug, thiserror::Error)]
#[error("could not {what}")]
pub struct CannotStart {
    /// And why, for people.
    what: String,
    #[source]
    error: io::Error,
}

impl CannotStart {
    /// `program` is the file that was to be run, if one was found.
    fn new(command: &OsStr, program: Option<&Path>, error: io::Error) -> Self {
        let command = command.display();
        let what = match program {
            Some(program) => format!("run {command}: {}", reason(program, &error)),
            None => format!("find {command} on PATH: check the name, or give its path (such as ./{command})"),
        };
        Self { what, error }
    }

    /// As shells have it: 127 for what is not there, 126 for what cannot be run.
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

/// The file that a shell would run for this name: itself if it has a slash, else the first executable file on PATH. Where
/// there is none, bash names what comes first of that name, unless it is a directory.
fn find(name: &OsStr, path: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let here = |dir: PathBuf| if dir.as_os_str().is_empty() { ".".into() } else { dir };
    let mut named = env::split_paths(path).map(|dir| here(dir).join(name)).filter(|file| file.exists()).peekable();
    let first = named.peek().filter(|first| first.is_file()).cloned();
    named.find(|file| file.is_file() && access(file, AccessFlags::X_OK).is_ok()).or(first)
}

/// Whether a file that the system does not know how to run is a script, by what bash goes by: no program begins so.
fn is_script(program: &Path) -> io::Result<bool> {
    let mut sample = Vec::new();
    File::open(program)?.take(80).read_to_end(&mut sample)?;
    let first_line = match sample.starts_with(b"#!") {
        true => &*sample,
        false => sample.split(|byte| *byte == b'\n').next().unwrap_or_default(),
    };
    Ok(!sample.starts_with(b"\x7fELF") && !first_line.contains(&0))
}

/// Starts, by `spawn`, what a shell would start for these words: a name and its arguments.
fn start<T>(words: (&OsStr, &[OsString]), mut spawn: impl FnMut(Command) -> io::Result<T>) -> Result<T, CannotStart> {
    let (name, arguments) = words;
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let file = find(name, &path).ok_or_else(|| CannotStart::new(name, None, io::ErrorKind::NotFound.into()))?;
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
    started.map_err(|error| CannotStart::new(name, Some(&file), error))
}

/// Runs a command to its end; its exit code, which is 128 + n after signal n. `set` gives it its variables.
pub async fn run(
    words: (&OsStr, &[OsString]),
    set: impl Fn(&mut Command),
    signals: &mut Signals,
    limits: Inherited,
) -> Result<u8, CannotStart> {
    let terminal = Terminal::open();
    let shares_our_group = terminal.as_ref().is_some_and(Terminal::is_ours) && is_in_pipeline();
    #[cfg(target_os = "linux")]
    child_processes::adopt_orphans();
    let child = start(words, |mut command| {
        set(&mut command);
        if !shares_our_group {
            command.process_group(0);
        }
        limits.during(|| command.spawn())
    })?;
    let job = Job { leader: wait::Pid::from_child(&child), shares_our_group, terminal };
    job.resume();
    let code = job.attend(signals).await;
    job.step_back();
    if !shares_our_group {
        end_group(job.leader, signals).await;
    }
    Ok(code)
}

/// Whether our stdin or stdout is another program's end of a pipe.
fn is_in_pipeline() -> bool {
    let is_pipe = |file: &dyn AsFd| {
        let kind = fstat(file.as_fd()).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        matches!(kind, Ok(SFlag::S_IFIFO | SFlag::S_IFSOCK))
    };
    is_pipe(&io::stdin()) || is_pipe(&io::stdout())
}

/// The command as it runs.
struct Job {
    leader: wait::Pid,
    shares_our_group: bool,
    terminal: Option<Terminal>,
}

/// What has become of the command.
enum Change {
    /// It has ended, which gives this exit code.
    Ended(u8),
    /// A signal has stopped it.
    Stopped(i32),
}

impl Job {
    fn id(&self) -> Pid {
        Pid::from_raw(self.leader.as_raw_nonzero().get())
    }

    /// What has become of it since the last look.
    fn change(&self) -> Option<Change> {
        let status = match waitpid(Some(self.leader), WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            Ok(status) => status?.1,
            // Whatever it is, no later look tells more.
            Err(error) => {
                warn!("the command has ended, but it is not known how ({error}): taken as exit code {UNKNOWN_END}");
                return Some(Change::Ended(UNKNOWN_END));
            }
        };
        let code = status.exit_status().or_else(|| Some(128 + status.terminating_signal()?));
        match code {
            Some(code) => Some(Change::Ended(u8::try_from(code).unwrap_or(u8::MAX))),
            None => status.stopping_signal().map(Change::Stopped),
        }
    }

    /// Passes signals on until the command has ended; its exit code.
    async fn attend(&self, signals: &mut Signals) -> u8 {
        let mut asked_to_end = false;
        let mut deadline: Option<Instant> = None;
        loop {
            // Whatever has woken us: a signal may be lost, an end may not.
            while let Some(change) = self.change() {
                match change {
                    Change::Ended(code) => return code,
                    Change::Stopped(signal) => self.stop_as_well(signal).await,
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
                // The terminal has sent it to the command, too.
                Signal::SIGINT | Signal::SIGQUIT if self.shares_our_group => {}
                Signal::SIGINT | Signal::SIGTERM if asked_to_end => self.send(Signal::SIGKILL),
                signal => {
                    self.send(signal);
                    asked_to_end |= matches!(signal, Signal::SIGINT | Signal::SIGTERM);
                    if asked_to_end || signal == Signal::SIGHUP {
                        deadline.get_or_insert_with(|| Instant::now() + ENDING_LIMIT);
                        // What is stopped cannot heed it.
                        self.send(Signal::SIGCONT);
                    }
                }
            }
        }
    }

    fn send(&self, signal: Signal) {
        // It fails only for what has ended, of which we are about to hear.
        let _ = if self.shares_our_group { kill(self.id(), signal) } else { killpg(self.id(), signal) };
    }

    /// Was the command stopped at the terminal, our own group is, as it would have been as one job with the command; the
    /// shell sees that and takes the terminal.
    async fn stop_as_well(&self, signal: i32) {
        if self.shares_our_group || self.terminal.is_none() {
            return;
        }
        // By the same signal, which the shell tells. Not by the one that stops also who could not be continued.
        let signal = Signal::try_from(signal).ok().filter(|signal| *signal != Signal::SIGSTOP);
        let _ = killpg(getpgrp(), signal.unwrap_or(Signal::SIGTSTP));
        // This is over when the shell has continued us. A group that no shell looks after is not stopped at all.
        sleep(STOPPING_TAKES).await;
        self.resume();
    }

    /// Puts the command where we are, in the foreground or not, and lets it go on.
    fn resume(&self) {
        if self.shares_our_group {
            return;
        }
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.is_ours()) {
            terminal.give_to(self.id());
        }
        // Also at the start: it may have asked for the terminal before it had it, and was stopped for that.
        self.send(Signal::SIGCONT);
    }

    /// Takes the terminal back, unless somebody else has it by now.
    fn step_back(&self) {
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.is_of(self.id())) {
            terminal.give_to(getpgrp());
        }
    }
}

/// Ends what is left of the command's group.
async fn end_group(leader: wait::Pid, signals: &mut Signals) {
    let group = Pid::from_raw(leader.as_raw_nonzero().get());
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if killpg(group, signal).is_err() {
            return;
        }
        let _ = killpg(group, Signal::SIGCONT);
        let limit = Instant::now() + REST_LIMIT;
        let gone = async {
            while Instant::now() < limit {
                while let Ok(Some(_)) = waitpgid(leader, WaitOptions::NOHANG) {}
                if killpg(group, None).is_err() {
                    return true;
                }
                sleep(LOOK_EVERY).await;
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

    /// Whether our group is in the foreground.
    fn is_ours(&self) -> bool {
        tcgetpgrp(&self.0) == Ok(getpgrp())
    }

    /// Whether this group, or one that is gone, is in the foreground.
    fn is_of(&self, group: Pid) -> bool {
        tcgetpgrp(&self.0).is_ok_and(|front| front == group || killpg(front, None) == Err(Errno::ESRCH))
    }

    /// Puts a group in the foreground, also from the background: there the system would stop us for it.
    fn give_to(&self, group: Pid) {
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTTOU);
        let Ok(before) = stop.thread_swap_mask(SigmaskHow::SIG_BLOCK) else { return };
        // It fails for a group that has ended already.
        let _ = tcsetpgrp(&self.0, group);
        let _ = before.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_another_wait_has_taken_has_ended_and_no_success_is_made_up() {
        let mut child = Command::new("true").spawn().expect("a process");
        let job = Job { leader: wait::Pid::from_child(&child), shares_our_group: true, terminal: None };
        assert!(child.wait().expect("a status").success());
        assert!(matches!(job.change(), Some(Change::Ended(UNKNOWN_END))));
    }
}
