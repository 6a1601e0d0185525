//! The command that is run: a job of its own in front of the same terminal, and its end.
//!
//! It is to find what it would find without us: stdin, stdout and stderr, the limits, the keys that are typed, the jobs
//! of the shell. So it gets a process group of its own and, where we are in the foreground of a terminal, that terminal:
//! Ctrl-C reaches it once and us not at all. Signals that reach us are passed on to it, and when it has ended, what is
//! left of its group is ended, too. What made a group of its own, as daemons do, is left alone.
//!
//! As a part of a pipeline in the foreground (`… | less`) it stays in our group, as the other parts need the terminal,
//! too; there the terminal's signals reach everybody by themselves, and what it leaves behind stays as it would without us.

use std::ffi::OsStr;
use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::task::Poll;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::{Instant, sleep, sleep_until};

use crate::hardening::Inherited;

/// After a signal that asks it to end, the command may take this long.
const ENDING_LIMIT: Duration = Duration::from_secs(10);
/// After the command's end, the rest of its group may take this long, and this long again to be gone once killed.
const REST_LIMIT: Duration = Duration::from_secs(2);
/// Time between two looks at the rest of the group.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A process that asks to be stopped and goes on for this long is one that nobody could continue.
const STOPPING_TAKES: Duration = Duration::from_millis(100);

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
#[derive(Debug)]
pub struct CannotStart {
    command: String,
    error: io::Error,
}

impl CannotStart {
    fn new(command: &OsStr, error: io::Error) -> Self {
        Self { command: command.display().to_string(), error }
    }

    /// As shells have it: 127 for what is not there, 126 for what cannot be run.
    pub fn exit_code(&self) -> u8 {
        if self.error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
    }
}

impl std::fmt::Display for CannotStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, error } = self;
        match error.kind() {
            io::ErrorKind::NotFound if command.contains('/') => {
                write!(f, "could not run {command}: it is not there, or its first line names a program that is not")
            }
            io::ErrorKind::NotFound => {
                write!(f, "could not find {command} on PATH: check the name, or give its path (such as ./{command})")
            }
            io::ErrorKind::PermissionDenied => {
                write!(f, "could not run {command}: it is not an executable file; `chmod +x` makes it one")
            }
            _ => write!(f, "could not run {command}: {error}"),
        }
    }
}

impl std::error::Error for CannotStart {}

/// Runs the command to its end; its exit code, which is 128 + n after signal n.
pub async fn run(mut command: Command, signals: &mut Signals, limits: Inherited) -> Result<u8, CannotStart> {
    let terminal = Terminal::open();
    let shares_our_group = terminal.as_ref().is_some_and(Terminal::is_ours) && is_in_pipeline();
    if !shares_our_group {
        command.process_group(0);
    }
    // Orphans of the command become ours and not init's: then they can be waited for.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let child = limits.during(|| command.spawn()).map_err(|error| CannotStart::new(command.get_program(), error))?;
    let leader = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let job = Job { leader, shares_our_group, terminal };
    job.resume();
    let code = job.attend(signals).await;
    job.step_back();
    if !shares_our_group {
        end_group(leader, signals).await;
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
    leader: Pid,
    shares_our_group: bool,
    terminal: Option<Terminal>,
}

impl Job {
    /// Passes signals on until the command has ended; its exit code.
    async fn attend(&self, signals: &mut Signals) -> u8 {
        let mut asked_to_end = false;
        let mut deadline: Option<Instant> = None;
        loop {
            let signal = tokio::select! {
                signal = signals.next() => signal,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    deadline = None;
                    self.send(Signal::SIGKILL);
                    continue;
                }
            };
            match signal {
                // Of all children: nobody else waits for the command's orphans.
                Signal::SIGCHLD => loop {
                    match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                        Ok(WaitStatus::StillAlive) | Err(_) => break,
                        Ok(status) if status.pid() != Some(self.leader) => {}
                        Ok(WaitStatus::Exited(_, code)) => return u8::try_from(code).unwrap_or(u8::MAX),
                        Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as u8,
                        Ok(WaitStatus::Stopped(..)) => self.stop_as_well().await,
                        Ok(_) => {}
                    }
                },
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
        let _ = if self.shares_our_group { kill(self.leader, signal) } else { killpg(self.leader, signal) };
    }

    /// Was the command stopped at the terminal, our own group is, as it would have been as one job with the command; the
    /// shell sees that and takes the terminal.
    async fn stop_as_well(&self) {
        if self.shares_our_group || self.terminal.is_none() {
            return;
        }
        let _ = killpg(getpgrp(), Signal::SIGTSTP);
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
            terminal.give_to(self.leader);
        }
        // Also at the start: it may have asked for the terminal before it had it, and was stopped for that.
        self.send(Signal::SIGCONT);
    }

    /// Takes the terminal back, unless somebody else has it by now.
    fn step_back(&self) {
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.is_of(self.leader)) {
            terminal.give_to(getpgrp());
        }
    }
}

/// Ends what is left of the command's group.
async fn end_group(group: Pid, signals: &mut Signals) {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if killpg(group, signal).is_err() {
            return;
        }
        let _ = killpg(group, Signal::SIGCONT);
        let limit = Instant::now() + REST_LIMIT;
        let gone = async {
            while Instant::now() < limit {
                let everybody = Pid::from_raw(-group.as_raw());
                while matches!(waitpid(everybody, Some(WaitPidFlag::WNOHANG)), Ok(status) if status.pid().is_some()) {}
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
