//! Refreshing by the Vercel CLI (docs/configuration.md section 4): when and how it is run, which output is accepted,
//! and what is reported. `real` uses the real CLI, the other modules a script in its place.

mod approvals;
mod real;
mod requests;
mod runs;
mod timing;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::support::http::{APP, Request};
use crate::support::process::Serving;
use crate::support::{SLACK, Scene, Stage};

pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const HOUR: Duration = Duration::from_secs(3600);

/// A directory with a script `vercel`, and the files that it writes.
pub struct FakeCli(TempDir);

impl FakeCli {
    /// A CLI that runs this shell script. `DIR` stands for its directory. Each run is counted.
    pub fn new(script: &str) -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        this.set_script(script);
        this
    }

    /// A CLI that prints the text set by [`FakeCli::prints`].
    pub fn printing() -> Self {
        Self::new("cat DIR/answer")
    }

    /// Replaces the script.
    pub fn set_script(&self, script: &str) {
        let dir = self.dir().to_str().expect("text").to_owned();
        plant(&self.dir().join("vercel"), &format!("echo run >>DIR/runs\n{script}\n").replace("DIR", &dir));
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn prints(&self, answer: &str) {
        fs::write(self.dir().join("answer"), answer).expect("written");
    }

    pub fn prints_token(&self, token: &str) {
        self.prints(&serde_json::json!({ "token": token }).to_string());
    }

    /// The number of runs.
    pub fn runs(&self) -> usize {
        fs::read_to_string(self.dir().join("runs")).map_or(0, |runs| runs.lines().count())
    }

    /// A PATH with its directory and those that a script needs.
    pub fn path(&self) -> String {
        format!("{}:/usr/bin:/bin", self.dir().display())
    }

    /// Creates the named pipe `DIR/pipe` for the script.
    pub fn pipe(&self) -> Pipe {
        let path = self.dir().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        Pipe::listen(path)
    }
}

/// Creates an executable shell script. A separate process writes it: a file that is open for writing cannot be
/// executed, and a child that another test starts at this moment would inherit our descriptor.
pub fn plant(path: &Path, script: &str) {
    let mut writing = Command::new("/bin/sh");
    writing
        .args(["-c", "umask 022; printf '%s\\n' '#!/bin/sh' \"$1\" >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .arg(script);
    assert!(writing.status().expect("a shell").success());
}

/// The first line that is written to a pipe, and a signal once no process has it open for writing.
pub struct Pipe {
    pub line: oneshot::Receiver<String>,
    pub closed: oneshot::Receiver<()>,
}

impl Pipe {
    fn listen(path: PathBuf) -> Self {
        let (line_sender, line) = oneshot::channel();
        let (closed_sender, closed) = oneshot::channel();
        // Not a task of the runtime, which would wait for it after a failed test.
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(fs::File::open(path).expect("a pipe"));
            let mut line = String::new();
            let _ = pipe.read_line(&mut line);
            let _ = line_sender.send(line);
            let _ = pipe.read_to_end(&mut Vec::new());
            let _ = closed_sender.send(());
        });
        Self { line, closed }
    }
}

/// A sidecar with automatic refresh by this CLI, for a project that upstream has accepted.
pub async fn automatic(cli: &FakeCli) -> Stage {
    let stage = unapproved(cli).await;
    stage.slack_token().await;
    stage
}

/// The same for a project that upstream has not accepted yet.
pub async fn unapproved(cli: &FakeCli) -> Stage {
    Scene::new().toml("refresh = \"cli\"").env("PATH", &cli.path()).start().await
}

/// Sends a request that makes upstream accept the sidecar's project.
pub async fn be_accepted(serving: &Serving) {
    let response = Request::new(serving.addr, "POST", SLACK).json(APP).send().await;
    assert_eq!(response.status, 200, "{}", response.text());
}

/// A sidecar that runs this CLI only on request.
pub async fn on_request(cli: &FakeCli) -> Stage {
    Scene::new().env("PATH", &cli.path()).start().await
}

impl Stage {
    /// The request of a person for a refresh.
    pub fn refresh(&self) -> Request {
        self.request("POST", "/_sidecar/v1/refresh").header("sidecar-key", &self.key())
    }
}
