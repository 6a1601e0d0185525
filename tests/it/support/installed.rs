//! What tests install from a registry: once, below the build directory. Needs the registry the first time only. And
//! which programs they find on this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// `required` if a missing client fails its tests, as in `.ci/run`; otherwise it skips them.
const CLIENTS: &str = "CONNECT_SIDECAR_TEST_CLIENTS";

/// The results of this run so far, by name. Locked during an installation, so that only one runs at a time.
static RESULTS: Mutex<BTreeMap<String, Result<PathBuf, String>>> = Mutex::new(BTreeMap::new());

/// The directory in which these commands have run, or run now. `None` if one of them fails, which
/// [skips](super::skipped) the test.
pub async fn installed(name: &str, commands: impl FnOnce(&Path) -> Vec<Command> + Send + 'static) -> Option<PathBuf> {
    let directory = name.to_owned();
    cached(name, move || install(&directory, commands)).await
}

/// Whether this program is on the `PATH`; no test puts it there. If not, the test is [skipped](super::skipped).
pub async fn program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|program| program.is_file());
    cached(name, || found.ok_or_else(|| "it is not on PATH".to_owned())).await.is_some()
}

async fn cached(name: &str, find: impl FnOnce() -> Result<PathBuf, String> + Send + 'static) -> Option<PathBuf> {
    let key = name.to_owned();
    let finding = tokio::task::spawn_blocking(move || {
        let mut results = RESULTS.lock().unwrap_or_else(PoisonError::into_inner);
        results.entry(key).or_insert_with(find).clone()
    });
    match finding.await.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic())) {
        Ok(path) => Some(path),
        Err(problem) if std::env::var_os(CLIENTS).is_some_and(|clients| clients == "required") => {
            panic!("{name}: {problem}")
        }
        Err(problem) => {
            super::skipped(format_args!("{name} is missing: {problem}"));
            None
        }
    }
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
