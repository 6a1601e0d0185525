//! A developer's desk: where the built binary runs as a user would run it.

use std::fs;
use std::path::PathBuf;

use connect_sidecar::clock::Clock;
use connect_sidecar::emulator::oidc::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options};
use tempfile::TempDir;
use tokio::process::Command;

use super::process::{Serving, sidecar};
use super::tunnel::Run;
use super::{env_file, instance_key, write_private};

/// A home with a project in it, and upstream.
pub struct Desk {
    pub home: TempDir,
    pub emulator: Emulator,
    /// The token in the project's env file.
    pub token: String,
}

impl Desk {
    pub async fn new() -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let options = Options { reuse_tokens: false, ..Options::default() };
        let emulator = Emulator::start(options).await.expect("an emulator");
        let token = emulator.oidc_token(DEVELOPMENT_LIFE);
        fs::create_dir(home.path().join("web")).expect("a project");
        write_private(&home.path().join("web/.env.local"), &env_file(&token));
        Self { home, emulator, token }
    }

    pub fn project(&self) -> PathBuf {
        self.home.path().canonicalize().expect("a directory").join("web")
    }

    /// The command in the project, on any free port.
    pub fn sidecar(&self, arguments: &[&str]) -> Command {
        let mut command = sidecar(self.home.path());
        command.current_dir(self.project());
        command.env("CONNECT_SIDECAR_PORT", "0").env("CONNECT_SIDECAR_UPSTREAM", self.emulator.url());
        command.args(arguments);
        command
    }

    pub async fn serve(&self, arguments: &[&str]) -> Serving {
        Serving::start(self.sidecar(arguments)).await
    }

    /// A run of a sidecar at this desk.
    pub async fn begin_run(&self, serving: &Serving) -> Run {
        let key = instance_key(&self.home.path().join(".local/state"), serving.addr);
        Run::begin(serving.addr, &key, Clock::system().local()).await
    }
}
