//! What tests install from a registry: once, below the build directory. Needs the registry the first time only. And
//! which programs they find on this machine.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// `required` where every client must be there, as in `.ci/run`. Elsewhere a test is skipped for want of one.
const CLIENTS: &str = "CONNECT_SIDECAR_TEST_CLIENTS";

/// What was asked for in this run. Its lock is held while something is installed: one thing at a time.
static ASKED: Mutex<BTreeMap<String, Option<PathBuf>>> = Mutex::new(BTreeMap::new());

/// The directory that these commands have filled, or fill now: each runs in it. `None`, and why on stderr, where that
/// fails.
pub async fn installed(name: &str, commands: impl FnOnce(&Path) -> Vec<Command> + Send + 'static) -> Option<PathBuf> {
    let at = name.to_owned();
    had(name, move || install(&at, commands)).await
}

/// Whether this program is on the `PATH`; no test puts it there.
pub async fn program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|program| program.is_file());
    had(name, || found.ok_or_else(|| "it is not on PATH".to_owned())).await.is_some()
}

/// What is found, or has been in this run.
async fn had(name: &str, find: impl FnOnce() -> Result<PathBuf, String> + Send + 'static) -> Option<PathBuf> {
    let name = name.to_owned();
    let finding = tokio::task::spawn_blocking(move || {
        let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = asked.get(&name) {
            return known.clone();
        }
        let found = match find() {
            Ok(path) => Some(path),
            Err(problem) if std::env::var_os(CLIENTS).is_some_and(|clients| clients == "required") => {
                panic!("{name}: {problem}")
            }
            Err(problem) => {
                // Past the harness, which shows only what a failed test prints.
                let _ = writeln!(std::io::stderr(), "SKIPPED, for want of {name}: {problem}");
                None
            }
        };
        asked.insert(name, found.clone());
        found
    });
    finding.await.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic()))
}

fn install(name: &str, commands: impl FnOnce(&Path) -> Vec<Command>) -> Result<PathBuf, String> {
    let done = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if done.is_dir() {
        return Ok(done);
    }
    let parent = done.parent().expect("a parent");
    std::fs::create_dir_all(parent).expect("a directory");
    // Moved into its place when it is whole: another run may be doing the same.
    let making = tempfile::tempdir_in(parent).expect("a directory");
    for mut command in commands(making.path()) {
        let program = command.get_program().to_string_lossy().into_owned();
        let ended = command.current_dir(making.path()).output().map_err(|e| format!("could not run {program}: {e}"))?;
        if !ended.status.success() {
            return Err(format!("{program} failed:\n{}", String::from_utf8_lossy(&ended.stderr)));
        }
    }
    if let Err(e) = std::fs::rename(making.path(), &done) {
        assert!(done.is_dir(), "could not put {name} into its place: {e}");
    }
    Ok(done)
}
