//! A lock for each project between all sidecars of this user, and the time of each sidecar's last attempt.
//!
//! Two CLI processes that renew the login at the same time would end that login (docs/vercel.md section 7.1). So each
//! project has a private directory that is locked while the CLI runs. Each sidecar records the time of its last attempt
//! there, in a file named by a hash of its project directory. No token is stored.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::Flock;

use crate::credential::fingerprint;
use crate::os::clock::Timestamp;
use crate::os::private_dir;
use crate::os::safe_read;

/// How long to wait for other sidecars, each of which may run the CLI for a minute.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10 * 60);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The lock of a project, held until dropped.
pub struct RefreshLock {
    directory: PathBuf,
    last_attempt_file: PathBuf,
    _lock: Flock<File>,
}

/// Why the lock was not acquired.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The directory cannot be used.
    #[error("{}", .0.with_advice())]
    Directory(#[from] private_dir::Problem),
    /// Other sidecars held the lock for too long.
    #[error("the refreshes of other sidecars take too long")]
    Timeout,
}

impl RefreshLock {
    /// Waits for the lock of the project `project_id`. `project` is the directory that this sidecar serves.
    pub async fn acquire(state_dir: &Path, project_id: &str, project: &Path) -> Result<Self, LockError> {
        let directory = private_dir::make_within(state_dir, Path::new("refresh").join(project_id))?;
        let waiting = async {
            loop {
                match private_dir::try_lock(&directory)? {
                    Some(lock) => return Ok::<_, LockError>(lock),
                    None => tokio::time::sleep(POLL_INTERVAL).await,
                }
            }
        };
        let lock = tokio::time::timeout(ACQUIRE_TIMEOUT, waiting).await.unwrap_or(Err(LockError::Timeout))?;
        let last_attempt_file = directory.join(fingerprint(&project.to_string_lossy()));
        Ok(Self { directory, last_attempt_file, _lock: lock })
    }

    /// A directory that contains nothing that the CLI could take for a project.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// When the last attempt for this project directory began. A time in the future was recorded by another clock and
    /// is ignored.
    pub fn last_attempt(&self, now: Timestamp) -> Option<Timestamp> {
        let bytes = safe_read::read(&self.last_attempt_file).ok()?.bytes;
        let last = Timestamp::from_millis(std::str::from_utf8(&bytes).ok()?.parse().ok()?);
        (last <= now).then_some(last)
    }

    /// Records that an attempt begins.
    pub fn record_attempt(&self, now: Timestamp) -> Result<(), private_dir::Problem> {
        private_dir::write(&self.last_attempt_file, now.as_millis().to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[tokio::test(start_paused = true)]
    async fn the_lock_is_exclusive_and_attempts_are_recorded() {
        let state = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory");
        let at = Timestamp::from_millis;
        let acquire = async |project_id: &str, project: &str| {
            RefreshLock::acquire(state.path(), project_id, Path::new(project)).await
        };
        let lock = acquire("prj_1", "/a").await.expect("a lock");
        assert_eq!(lock.last_attempt(at(5)), None);
        lock.record_attempt(at(5)).expect("written");
        assert!(acquire("prj_2", "/a").await.is_ok(), "of another project");
        assert!(acquire("prj_1", "/b").await.is_err_and(|error| error.to_string().contains("too long")));
        drop(lock);
        assert_eq!(acquire("prj_1", "/b").await.expect("a lock").last_attempt(at(9)), None);
        let lock = acquire("prj_1", "/a").await.expect("a lock");
        assert_eq!((lock.last_attempt(at(9)), lock.last_attempt(at(4))), (Some(at(5)), None));
        assert_eq!(fs::metadata(lock.directory()).expect("there").permissions().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn nothing_is_created_below_a_directory_that_is_not_private() {
        let parent = tempfile::tempdir().expect("a directory");
        let (state, other) = (parent.path().join("state"), parent.path().join("other"));
        let acquire = async || RefreshLock::acquire(&state, "prj_1", Path::new("/a")).await.map(drop);
        for bad in [state.clone(), state.join("refresh")] {
            let private = |dir: &Path| fs::set_permissions(dir, Permissions::from_mode(0o700)).expect("a mode");
            fs::create_dir_all(bad.parent().expect("a parent")).expect("a directory");
            private(bad.parent().expect("a parent"));
            fs::create_dir(&other).expect("a directory");
            private(&other);
            symlink(&other, &bad).expect("a link");
            assert!(acquire().await.is_err_and(|error| error.to_string().contains("is a link")), "{}", bad.display());
            assert_eq!(fs::read_dir(&other).expect("a directory").count(), 0, "{}", bad.display());
            fs::remove_file(&bad).expect("removed");
            fs::rename(&other, &bad).expect("moved");
            fs::set_permissions(&bad, Permissions::from_mode(0o777)).expect("a mode");
            assert!(
                acquire().await.is_err_and(|error| error.to_string().contains("others have access")),
                "{}",
                bad.display()
            );
            assert_eq!(fs::read_dir(&bad).expect("a directory").count(), 0, "{}", bad.display());
            fs::remove_dir(&bad).expect("removed");
        }
        assert!(acquire().await.is_ok());
        for dir in [state.clone(), state.join("refresh"), state.join("refresh/prj_1")] {
            assert_eq!(fs::metadata(dir).expect("there").permissions().mode() & 0o777, 0o700);
        }
    }
}
