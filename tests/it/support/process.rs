//! The built binary, run as a user would.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use super::soon;

/// A command of the binary with nothing of the tests' environment in it.
pub fn sidecar(home: &Path) -> Command {
    isolated(env!("CARGO_BIN_EXE_connect-sidecar"), home)
}

/// The same of any program.
pub fn isolated(program: &str, home: &Path) -> Command {
    let mut command = Command::new(program);
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
    pub ready_line: String,
    stdout: BufReader<ChildStdout>,
    stderr: Option<BufReader<ChildStderr>>,
    /// What was read of stderr.
    log: String,
}

impl Serving {
    /// Starts it and waits for its ready line.
    pub async fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("a process");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr"));
        let mut line = String::new();
        soon("the ready line", stdout.read_line(&mut line)).await.expect("a line");
        let ready_line = line.trim_end().to_owned();
        let Some((_, addr)) = ready_line.split_once(" listening on http") else {
            let mut log = String::new();
            let _ = soon("stderr", stderr.read_to_string(&mut log)).await;
            panic!("not ready: {line:?}\n{log}");
        };
        let addr = addr.trim_start_matches('s').trim_start_matches("://").parse().expect("an address");
        Self { child, addr, ready_line, stdout, stderr: Some(stderr), log: String::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Returns once a line of the log contains the text.
    pub async fn wait_for_log(&mut self, text: &str) {
        self.wait_for_log_after(0, text).await;
    }

    /// Returns once another line than those that were waited for contains the text.
    pub async fn wait_for_next_log(&mut self, text: &str) {
        self.wait_for_log_after(self.log.len(), text).await;
    }

    async fn wait_for_log_after(&mut self, mut seen: usize, text: &str) {
        let stderr = self.stderr.as_mut().expect("stderr");
        while !self.log[seen..].contains(text) {
            seen = self.log.len();
            let read = soon(text, stderr.read_line(&mut self.log)).await.expect("a line");
            assert_ne!(read, 0, "it ended without {text:?}:\n{}", self.log);
        }
    }

    /// What was waited for of stderr, and all before it.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// The end of stderr that is ours.
    pub fn take_stderr(&mut self) -> BufReader<ChildStderr> {
        self.stderr.take().expect("stderr")
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = i32::try_from(self.pid()).expect("a process id");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("a signal");
    }

    /// Asks it to end, and waits until it has.
    pub async fn stop(self) -> Ended {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.end().await
    }

    /// Waits for its end; its exit code, the rest of stdout, and stderr.
    pub async fn end(mut self) -> Ended {
        let mut stdout = String::new();
        let mut errors = self.take_stderr();
        let ended = async {
            let _ = tokio::join!(self.stdout.read_to_string(&mut stdout), errors.read_to_string(&mut self.log));
            self.child.wait().await
        };
        let status = soon("its end", ended).await.expect("a status");
        Ended { code: status.code(), stdout, stderr: self.log }
    }
}

/// A process that is stopped until this is dropped, or killed.
pub struct Stopped(Pid);

impl Stopped {
    /// Stops it, and returns once it is.
    pub async fn process(pid: u32) -> Self {
        let this = Self(Pid::from_raw(pid.try_into().expect("a process id")));
        kill(this.0, Signal::SIGSTOP).expect("a signal");
        let is_stopped = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
            stat.rsplit_once(") ").expect("a name").1.starts_with('T')
        };
        soon("it to be stopped", async {
            while !is_stopped() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        this
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// A command of `run` that goes on.
pub struct Running {
    pub sidecar: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut sidecar = command.spawn().expect("a process");
        let lines = BufReader::new(sidecar.stdout.take().expect("stdout")).lines();
        Self { sidecar, lines }
    }

    /// Reads its stderr until a line contains the text.
    pub async fn wait_for_log(&mut self, text: &str) {
        let mut stderr = BufReader::new(self.sidecar.stderr.as_mut().expect("stderr"));
        let mut log = String::new();
        while !log.contains(text) {
            let read = soon(text, stderr.read_line(&mut log)).await.expect("a line");
            assert_ne!(read, 0, "it ended without {text:?}:\n{log}");
        }
    }

    /// The next line of its stdout.
    pub async fn line(&mut self) -> String {
        soon("a line", self.lines.next_line()).await.expect("stdout").expect("a line")
    }

    /// The same, which is a process id.
    pub async fn pid(&mut self) -> Pid {
        Pid::from_raw(self.line().await.parse().expect("a process id"))
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.sidecar.id().expect("it runs").try_into().expect("a process id")), signal)
            .expect("sent");
    }

    /// Waits for its end; nobody has stdout any more then.
    pub async fn end(mut self) -> Ended {
        let status = soon("its end", self.sidecar.wait()).await.expect("a status");
        let (mut stdout, mut stderr) = (String::new(), String::new());
        soon("stdout's end", self.lines.get_mut().read_to_string(&mut stdout)).await.expect("text");
        soon("stderr's end", self.sidecar.stderr.take().expect("stderr").read_to_string(&mut stderr))
            .await
            .expect("text");
        assert_eq!(status.signal(), None, "{stderr}");
        Ended { code: status.code(), stdout, stderr }
    }
}

/// Nothing of these secrets is shown, not even 16 characters of one.
#[track_caller]
pub fn assert_no_slice_of<'a>(secrets: impl IntoIterator<Item = &'a str>, shown: &str) {
    for secret in secrets {
        let slice = secret.as_bytes().windows(16).find_map(|slice| {
            let slice = std::str::from_utf8(slice).expect("ASCII");
            shown.find(slice).map(|at| &shown[at.saturating_sub(200)..at])
        });
        assert_eq!(slice, None, "16 characters of a secret follow this");
    }
}

/// Lets this process open as many connections as its tests need.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the limit");
}

/// A line of `/proc/PID/status`, such as `VmRSS` in KiB.
pub fn proc_status(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a line");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// The CPU time that a process has used.
pub fn cpu_time(pid: u32) -> std::time::Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after_name = stat.rsplit_once(") ").expect("a name").1;
    let ticks = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number"));
    // Linux shows a hundredth of a second as a tick, whatever it counts in.
    std::time::Duration::from_millis(ticks.sum::<u64>() * 10)
}

/// A TCP socket of this machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Socket {
    /// Address and port, in hex as the system prints them.
    pub address: String,
    pub is_listening: bool,
    pub inode: String,
}

/// The sockets whose own port is this one, but for those that only wait for their time to be over.
pub fn sockets_of(port: u16) -> Vec<Socket> {
    let mut sockets = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<_> = line.split_whitespace().collect();
            let (address, state, inode) = (fields[1], fields[3], fields[9]);
            if address.ends_with(&format!(":{port:04X}")) && inode != "0" {
                sockets.push(Socket { address: address.into(), is_listening: state == "0A", inode: inode.into() });
            }
        }
    }
    sockets.sort();
    sockets
}
