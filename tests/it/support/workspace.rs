//! A developer's workspace: a home, a project and an emulator, in which the built binary runs as a user runs it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::os::clock::Clock;
use tempfile::TempDir;
use tokio::process::Command;

use super::process::{Serving, sidecar};
use super::tunnel::Run;
use super::{env_file, instance_key, write_private};

/// A home with a project in it, and upstream.
pub struct Workspace {
    pub home: TempDir,
    pub emulator: Emulator,
    /// The token in the project's env file.
    pub token: String,
    /// By how many seconds upstream's clock is ahead.
    ahead: Arc<AtomicU64>,
}

impl Workspace {
    pub async fn new() -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let ahead = Arc::new(AtomicU64::new(0));
        let (seconds, machine) = (ahead.clone(), Clock::system());
        let now = Arc::new(move || {
            let ahead = Duration::from_secs(seconds.load(Ordering::Relaxed));
            UNIX_EPOCH + Duration::from_millis(machine.local().plus(ahead).as_millis())
        });
        let options = Options { reuse_tokens: false, now, ..Options::default() };
        let emulator = Emulator::start(options).await.expect("an emulator");
        let token = emulator.oidc_token(DEVELOPMENT_LIFE);
        fs::create_dir(home.path().join("web")).expect("a project");
        write_private(&home.path().join("web/.env.local"), &env_file(&token));
        Self { home, emulator, token, ahead }
    }

    /// Moves upstream's clock.
    pub fn pass(&self, time: Duration) {
        self.ahead.fetch_add(time.as_secs(), Ordering::Relaxed);
    }

    /// Puts a token into the env file that lives this long and was issued a second after the one before, more or less:
    /// of two of one second, that with the longer life counts as the newer.
    pub fn pull(&self, life: Duration) -> String {
        self.pass(Duration::from_secs(1));
        let token = self.emulator.oidc_token(life);
        write_private(&self.project().join(".env.local"), &env_file(&token));
        token
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

    /// A run of a sidecar at this workspace.
    pub async fn begin_run(&self, serving: &Serving) -> Run {
        let key = instance_key(&self.home.path().join(".local/state"), serving.addr);
        Run::begin(serving.addr, &key, Clock::system().local()).await
    }
}
