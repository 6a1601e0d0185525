//! The one owner of what the emulator knows, and the file that keeps it across restarts. Nobody holds the lock while
//! waiting for anything.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::flow::Flow;
use super::oidc::{Issuer, Key};
use super::outside::Outside;
use super::world::{Problem, World, shown};
use crate::os::atomic_file::{self, Durability};

/// What the emulator knows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Kept {
    /// Who and what there is.
    pub world: World,
    /// Consents and installations under way.
    pub pending: Vec<Flow>,
}

/// Owns [`Kept`].
pub struct State {
    kept: Mutex<Kept>,
    changes: AtomicU64,
    file: Option<File>,
}

/// Where the state is kept.
struct File {
    path: PathBuf,
    key: Key,
    /// How many changes are in the file.
    saved: tokio::sync::Mutex<u64>,
}

#[derive(Serialize, Deserialize)]
struct Content<K> {
    issuer: Key,
    #[serde(flatten)]
    kept: K,
}

/// What was read of a file.
pub(super) struct Restored {
    pub(super) issuer: Key,
    pub(super) kept: Kept,
}

impl State {
    /// A state that is kept in memory, or in a file besides.
    pub(super) fn new(kept: Kept, file: Option<PathBuf>, issuer: &Issuer) -> Self {
        let file = file.map(|path| File { path, key: issuer.key().clone(), saved: tokio::sync::Mutex::new(0) });
        Self { kept: Mutex::new(kept), changes: AtomicU64::new(1), file }
    }

    /// Looks something up.
    pub fn read<T>(&self, read: impl FnOnce(&Kept) -> T) -> T {
        read(&self.lock())
    }

    /// Changes something. What depends on the change being kept waits for [`saved`](Self::saved).
    pub fn change<T>(&self, change: impl FnOnce(&mut Kept) -> T) -> T {
        let mut kept = self.lock();
        let changed = change(&mut kept);
        self.changes.fetch_add(1, Ordering::Relaxed);
        changed
    }

    /// Returns once all changes so far are in the file, if there is one. Those of several requests are written at once.
    pub async fn saved(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let due = self.changes.load(Ordering::Relaxed);
        let mut saved = file.saved.lock().await;
        if *saved >= due {
            return Ok(());
        }
        let (changes, content) = {
            let kept = self.lock();
            let content = Content { issuer: file.key.clone(), kept: &*kept };
            (self.changes.load(Ordering::Relaxed), serde_json::to_vec_pretty(&content).map_err(io::Error::other)?)
        };
        let path = file.path.clone();
        let write =
            tokio::task::spawn_blocking(move || atomic_file::write(&path, &content, 0o600, Durability::Machine));
        let write = write.await.map_err(io::Error::other)?;
        write.map_err(|e| {
            io::Error::new(e.kind(), format!("could not keep the state in {}: {e}", file.path.display()))
        })?;
        *saved = changes;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what [`State::saved`] wrote; `None` if there is no file yet. It may use no more from `outside` than a seed.
pub(super) fn restore(path: &Path, outside: &Outside) -> io::Result<Option<Restored>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let wrong = |what: String| {
        let advice = "mend it, or remove it to begin anew from the seed";
        io::Error::new(io::ErrorKind::InvalidData, format!("it is not a state of the emulator: {what}; {advice}"))
    };
    // No excerpt: it is full of secrets.
    let content: Content<Kept> =
        serde_json::from_slice(&bytes).map_err(|e| wrong(format!("line {}, column {}", e.line(), e.column())))?;
    let told = |problem: &Problem| format!("{}: {}", shown(&problem.path), problem.message);
    if let Some(problem) = content.kept.world.problems().first() {
        return Err(wrong(told(problem)));
    }
    match outside.problems(&content.kept.world) {
        problems if problems.is_empty() => Ok(Some(Restored { issuer: content.issuer, kept: content.kept })),
        problems => {
            let told: Vec<_> = problems.iter().map(told).collect();
            Err(io::Error::new(io::ErrorKind::InvalidData, told.join("; ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_state_comes_back_as_it_was_saved_and_is_for_us_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.json");
        assert!(restore(&path, &Outside::default()).expect("no error").is_none());
        let issuer = Issuer::new().expect("a key");
        let kept = Kept { world: World::demo(), pending: Vec::new() };
        let state = State::new(kept, Some(path.clone()), &issuer);
        state.saved().await.expect("saved");
        state.change(|kept| kept.world.connector("slack/acme-slack").expect("it is there").granted_to.clear());
        state.saved().await.expect("saved");

        let restored = restore(&path, &Outside::default()).expect("read").expect("a state");
        assert_eq!(restored.kept.world, state.read(|kept| kept.world.clone()));
        assert!(Issuer::with_key(restored.issuer).is_ok());
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 1, "no temporary file is left");
    }

    #[tokio::test]
    async fn a_file_that_is_no_state_is_refused_without_a_word_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.json");
        std::fs::write(&path, r#"{"issuer": "secret-secret"}"#).expect("written");
        let error = restore(&path, &Outside::default()).err().expect("refused").to_string();
        assert!(error.contains("line 1") && !error.contains("secret"), "{error}");
    }
}
