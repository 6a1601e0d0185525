//! Fresh OIDC tokens by the Vercel CLI (docs/configuration.md section 4): when it is run, how, what is taken of what it prints, and
//! what is said. The real CLI is in `real`; elsewhere a script plays its part.

mod approving;
mod asking;
mod real;
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

/// A directory with a program `vercel` in it, and what that leaves.
pub struct FakeCli(TempDir);

impl FakeCli {
    /// It is this shell script; `DIR` stands for its directory. Each run leaves a line.
    pub fn new(script: &str) -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        this.plays(script);
        this
    }

    /// One that prints what it is told to by [`FakeCli::prints`].
    pub fn printing() -> Self {
        Self::new("cat DIR/answer")
    }

    /// From now on it is this script.
    pub fn plays(&self, script: &str) {
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

    /// How many times it was run.
    pub fn runs(&self) -> usize {
        fs::read_to_string(self.dir().join("runs")).map_or(0, |runs| runs.lines().count())
    }

    /// A PATH on which it is, with what a script needs.
    pub fn path(&self) -> String {
        format!("{}:/usr/bin:/bin", self.dir().display())
    }

    /// A pipe for the script, as `DIR/pipe`.
    pub fn pipe(&self) -> Pipe {
        let path = self.dir().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        Pipe::listen(path)
    }
}

/// Puts a shell script somewhere. By another process: what one of ours has open to write cannot be run, and a test beside
/// this one may be starting a program that has it open for a moment, too.
pub fn plant(path: &Path, script: &str) {
    let mut writing = Command::new("/bin/sh");
    writing
        .args(["-c", "umask 022; printf '%s\\n' '#!/bin/sh' \"$1\" >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .arg(script);
    assert!(writing.status().expect("a shell").success());
}

/// Tells what is written to a pipe, and when nobody has it open any more.
pub struct Pipe {
    pub line: oneshot::Receiver<String>,
    pub closed: oneshot::Receiver<()>,
}

impl Pipe {
    fn listen(path: PathBuf) -> Self {
        let (said, line) = oneshot::channel();
        let (over, closed) = oneshot::channel();
        // No task: its end is not waited for where a test fails.
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(fs::File::open(path).expect("a pipe"));
            let mut line = String::new();
            let _ = pipe.read_line(&mut line);
            let _ = said.send(line);
            let _ = pipe.read_to_end(&mut Vec::new());
            let _ = over.send(());
        });
        Self { line, closed }
    }
}

/// A sidecar that finds this CLI and runs it by the clock, for a project that upstream has accepted.
pub async fn by_the_clock(cli: &FakeCli) -> Stage {
    let stage = unapproved(cli).await;
    stage.slack_token().await;
    stage
}

/// The same for a project of which upstream knows nothing yet.
pub async fn unapproved(cli: &FakeCli) -> Stage {
    Scene::new().toml("refresh = \"cli\"").env("PATH", &cli.path()).start().await
}

/// Has upstream accept the project of a sidecar.
pub async fn be_accepted(serving: &Serving) {
    let asked = Request::new(serving.addr, "POST", SLACK).json(APP).send().await;
    assert_eq!(asked.status, 200, "{}", asked.text());
}

/// A sidecar that finds this CLI and runs it when a person asks.
pub async fn when_asked(cli: &FakeCli) -> Stage {
    Scene::new().env("PATH", &cli.path()).start().await
}

impl Stage {
    /// A person's wish for a fresh token.
    pub fn refresh(&self) -> Request {
        self.request("POST", "/_sidecar/v1/refresh").header("sidecar-key", &self.key())
    }
}
