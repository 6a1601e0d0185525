//! The commands that ask a running sidecar, with the built binary: their output, and who gets the key.

mod completions;
mod finding;
mod logs;
mod status;
mod token;

use std::path::Path;

use tokio::process::Command;

use crate::support::process::{Serving, sidecar};
use crate::support::workspace::Workspace;
use crate::support::{Stage, env_file, write_private};

impl Workspace {
    /// Another project of this workspace, below its home.
    pub fn add_project(&self, path: &str) -> std::path::PathBuf {
        let dir = self.project().parent().expect("a home").join(path);
        std::fs::create_dir_all(&dir).expect("a project");
        write_private(&dir.join(".env.local"), &env_file(&self.token));
        dir
    }

    /// The built binary in another directory.
    pub fn sidecar_in(&self, dir: &Path, arguments: &[&str]) -> Command {
        let mut command = self.sidecar(arguments);
        command.current_dir(dir);
        command
    }

    pub async fn serve_in(&self, dir: &Path, arguments: &[&str]) -> Serving {
        Serving::start(self.sidecar_in(dir, arguments)).await
    }
}

impl Stage {
    /// The built binary, for a sidecar in the test's process.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = sidecar(self.dir());
        command.current_dir(&self.project).env("XDG_STATE_HOME", self.dir().join("state")).args(arguments);
        command
    }
}
