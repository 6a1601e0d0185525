//! The store of the emulator's data, and the file that keeps it across restarts. The lock is never held across an
//! await.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::allowlist::Allowlist;
use super::flow::Flow;
use super::oidc::{Issuer, Key};
use super::world::{Problem, World, format_path};
use crate::os::atomic_file::{self, Durability};

/// The contents of the store.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Contents {
    /// The team's data.
    pub world: World,
    /// Consents and installations in progress.
    pub pending: Vec<Flow>,
}

/// Owns the [`Contents`].
pub struct Store {
    contents: Mutex<Contents>,
    changes: AtomicU64,
    file: Option<File>,
}

/// The file that the contents are saved to.
struct File {
    path: PathBuf,
    key: Key,
    /// The number of changes that the file includes.
    saved: tokio::sync::Mutex<u64>,
}

#[derive(Serialize, Deserialize)]
struct FileContents<C> {
    issuer: Key,
    #[serde(flatten)]
    contents: C,
}

/// The data read from a file.
pub(super) struct Restored {
    pub(super) issuer: Key,
    pub(super) contents: Contents,
}

impl Store {
    /// A store in memory that is also saved to `file`, if given.
    pub(super) fn new(contents: Contents, file: Option<PathBuf>, issuer: &Issuer) -> Self {
        let file = file.map(|path| File { path, key: issuer.key(), saved: tokio::sync::Mutex::new(0) });
        Self { contents: Mutex::new(contents), changes: AtomicU64::new(1), file }
    }

    /// Reads the contents.
    pub fn read<T>(&self, read: impl FnOnce(&Contents) -> T) -> T {
        read(&self.lock())
    }

    /// Changes the contents. A caller that relies on the change being saved awaits [`saved`](Self::saved).
    pub fn change<T>(&self, change: impl FnOnce(&mut Contents) -> T) -> T {
        let mut contents = self.lock();
        let changed = change(&mut contents);
        self.changes.fetch_add(1, Ordering::Relaxed);
        changed
    }

    /// Waits until all changes so far are in the file, if there is one. Concurrent callers share one write.
    pub async fn saved(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let target = self.changes.load(Ordering::Relaxed);
        let mut saved = file.saved.lock().await;
        if *saved >= target {
            return Ok(());
        }
        let (changes, content) = {
            let contents = self.lock();
            let content = FileContents { issuer: file.key.clone(), contents: &*contents };
            (self.changes.load(Ordering::Relaxed), serde_json::to_vec_pretty(&content).map_err(io::Error::other)?)
        };
        let path = file.path.clone();
        let write =
            tokio::task::spawn_blocking(move || atomic_file::write(&path, &content, 0o600, Durability::Machine));
        let write = write.await.map_err(io::Error::other)?;
        write.map_err(|e| {
            io::Error::new(e.kind(), format!("could not save the state to {}: {e}", file.path.display()))
        })?;
        *saved = changes;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what [`Store::saved`] wrote; `None` if there is no file yet. The allowlist applies as to a seed.
pub(super) fn restore(path: &Path, allowlist: &Allowlist) -> io::Result<Option<Restored>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let wrong = |what: String| {
        let advice = "fix it, or remove it to start from the seed again";
        io::Error::new(io::ErrorKind::InvalidData, format!("it is not a state file of the emulator: {what}; {advice}"))
    };
    // Only the position: an excerpt could contain secrets.
    let content: FileContents<Contents> =
        serde_json::from_slice(&bytes).map_err(|e| wrong(format!("line {}, column {}", e.line(), e.column())))?;
    let describe = |problem: &Problem| format!("{}: {}", format_path(&problem.path), problem.message);
    if let Some(problem) = content.contents.world.problems().first() {
        return Err(wrong(describe(problem)));
    }
    match allowlist.problems(&content.contents.world) {
        problems if problems.is_empty() => Ok(Some(Restored { issuer: content.issuer, contents: content.contents })),
        problems => {
            let problems: Vec<_> = problems.iter().map(describe).collect();
            Err(io::Error::new(io::ErrorKind::InvalidData, problems.join("; ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_saved_state_is_restored_and_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.json");
        assert!(restore(&path, &Allowlist::default()).expect("no error").is_none());
        let issuer = Issuer::new().expect("a key");
        let contents = Contents { world: World::demo(), pending: Vec::new() };
        let state = Store::new(contents, Some(path.clone()), &issuer);
        state.saved().await.expect("saved");
        state.change(|contents| {
            contents.world.connector_mut("slack/acme-slack").expect("it is there").granted_to.clear();
        });
        state.saved().await.expect("saved");

        let restored = restore(&path, &Allowlist::default()).expect("read").expect("a state");
        assert_eq!(restored.contents.world, state.read(|contents| contents.world.clone()));
        assert!(Issuer::with_key(restored.issuer).is_ok());
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 1, "no temporary file is left");
    }

    #[tokio::test]
    async fn an_invalid_file_is_refused_without_showing_its_contents() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.json");
        std::fs::write(&path, r#"{"issuer": "secret-secret"}"#).expect("written");
        let error = restore(&path, &Allowlist::default()).err().expect("refused").to_string();
        assert!(error.contains("line 1") && !error.contains("secret"), "{error}");
    }
}
