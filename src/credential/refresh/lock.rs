//! One refresh at a time among all sidecars of this user that serve the same project, and when each had its last.
//!
//! Two runs of the CLI that renew its login at once would end that login (docs/vercel.md section 7.1). So there is a
//! private directory for each project, locked for as long as the CLI runs. In it each sidecar leaves the time of its last
//! attempt, known again by the directory that it serves, and nothing else: tokens are kept in memory only.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::Flock;

use crate::credential::fingerprint;
use crate::os::clock::Timestamp;
use crate::os::private_dir;
use crate::os::safe_read;

/// As many sidecars as this wait for their turn, and the CLI may take a minute for each.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// Time between two looks whether it is our turn.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Our turn: nobody else refreshes while this lives.
pub struct RefreshLock {
    directory: PathBuf,
    last: PathBuf,
    _lock: Flock<File>,
}

impl RefreshLock {
    /// Waits for the turn of the sidecar that serves `project` to renew a token of the project `project_id`. An error is
    /// the reason for people.
    pub async fn take(state_dir: &Path, project_id: &str, project: &Path) -> Result<Self, String> {
        let all = state_dir.join("refresh");
        // Not through a link or a directory of somebody else, who could swap what is below it.
        for dir in [state_dir, &all] {
            private_dir::make(dir)?;
        }
        let directory = all.join(project_id);
        let waiting = async {
            loop {
                match private_dir::try_lock(&directory) {
                    Ok(None) => tokio::time::sleep(LOOK_EVERY).await,
                    Ok(Some(lock)) => return Ok(lock),
                    Err(problem) => return Err(String::from(problem)),
                }
            }
        };
        let lock = tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| Err("the refreshes of other sidecars take too long".into()))?;
        let last = directory.join(fingerprint(&project.to_string_lossy()));
        Ok(Self { directory, last, _lock: lock })
    }

    /// A directory in which nothing is that the CLI could mistake for a project.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// When the last attempt of this sidecar, or of one before it, began. One that seems yet to come was by another clock.
    pub fn last(&self, now: Timestamp) -> Option<Timestamp> {
        let bytes = safe_read::read(&self.last).ok()?.bytes;
        let last = Timestamp::from_millis(std::str::from_utf8(&bytes).ok()?.parse().ok()?);
        (last <= now).then_some(last)
    }

    /// Remembers that an attempt begins.
    pub fn begin(&self, now: Timestamp) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.last)?;
        file.write_all(now.as_millis().to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[tokio::test(start_paused = true)]
    async fn one_at_a_time_has_its_turn_and_finds_when_it_had_its_last() {
        let state = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory");
        let at = Timestamp::from_millis;
        let take = async |project_id: &str, project: &str| {
            RefreshLock::take(state.path(), project_id, Path::new(project)).await
        };
        let turn = take("prj_1", "/a").await.expect("a turn");
        assert_eq!(turn.last(at(5)), None);
        turn.begin(at(5)).expect("written");
        assert!(take("prj_2", "/a").await.is_ok(), "of another project");
        assert!(take("prj_1", "/b").await.is_err_and(|reason| reason.contains("too long")));
        drop(turn);
        assert_eq!(take("prj_1", "/b").await.expect("a turn").last(at(9)), None);
        let turn = take("prj_1", "/a").await.expect("a turn");
        assert_eq!((turn.last(at(9)), turn.last(at(4))), (Some(at(5)), None));
        assert_eq!(fs::metadata(turn.directory()).expect("there").permissions().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn nothing_is_made_below_a_directory_that_is_not_ours_alone() {
        let parent = tempfile::tempdir().expect("a directory");
        let (state, other) = (parent.path().join("state"), parent.path().join("other"));
        let take = async || RefreshLock::take(&state, "prj_1", Path::new("/a")).await.map(drop);
        for bad in [state.clone(), state.join("refresh")] {
            let private = |dir: &Path| fs::set_permissions(dir, Permissions::from_mode(0o700)).expect("a mode");
            fs::create_dir_all(bad.parent().expect("a parent")).expect("a directory");
            private(bad.parent().expect("a parent"));
            fs::create_dir(&other).expect("a directory");
            private(&other);
            symlink(&other, &bad).expect("a link");
            assert!(take().await.is_err_and(|reason| reason.contains("is a link")), "{}", bad.display());
            assert_eq!(fs::read_dir(&other).expect("a directory").count(), 0, "{}", bad.display());
            fs::remove_file(&bad).expect("removed");
            fs::rename(&other, &bad).expect("moved");
            fs::set_permissions(&bad, Permissions::from_mode(0o777)).expect("a mode");
            assert!(take().await.is_err_and(|reason| reason.contains("others have access")), "{}", bad.display());
            assert_eq!(fs::read_dir(&bad).expect("a directory").count(), 0, "{}", bad.display());
            fs::remove_dir(&bad).expect("removed");
        }
        assert_eq!(take().await, Ok(()));
        for dir in [state.clone(), state.join("refresh"), state.join("refresh/prj_1")] {
            assert_eq!(fs::metadata(dir).expect("there").permissions().mode() & 0o777, 0o700);
        }
    }
}
