//! A directory that nobody else can enter, held by one process at a time: for what must not be prepared, swapped or made
//! twice by another.
//!
//! Nothing is ever made private here that was not: a directory that others may enter is refused, with what to do.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

/// Another of our processes holds the lock for a few milliseconds; who holds it longer is none.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The directory, made (0700) if need be, known to be ours alone, and locked against our other processes until the lock
/// is dropped. An error is the reason for people.
pub async fn lock(dir: &Path) -> Result<Flock<File>, String> {
    for _ in 0..LOCK_ATTEMPTS {
        if let Some(lock) = try_lock(dir)? {
            return Ok(lock);
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Err(format!("another program holds a lock on {}", dir.display()))
}

/// The same without waiting: `None` while somebody else has it locked.
pub fn try_lock(dir: &Path) -> Result<Option<Flock<File>>, String> {
    let shown = dir.display();
    make(dir)?;
    let opened = File::open(dir).map_err(|e| format!("could not open {shown}: {e}"))?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(format!("could not lock {shown}: {e}")),
    }
}

/// The directory, made (0700) if need be, known to be ours alone. What is above it may be anybody's and is made, too: where
/// it must be ours as well, it is made by a call of its own before. An error is the reason for people.
pub fn make(dir: &Path) -> Result<(), String> {
    let failed = |e| format!("could not make the directory {}: {e}", dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    check(dir)
}

/// Refuses a directory that is not ours alone. An error is the reason for people.
pub fn check(dir: &Path) -> Result<(), String> {
    let shown = dir.display();
    let meta = fs::symlink_metadata(dir).map_err(|e| format!("could not look at {shown}: {e}"))?;
    if meta.is_symlink() {
        return Err(format!("{shown} is a link, not the directory itself"));
    }
    if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() {
        return Err(format!("{shown} is not a directory of yours"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(format!("others have access to {shown}; `chmod 700` it if it is for nothing else"));
    }
    Ok(())
}

/// Puts a file (0600) into such a directory, whole or not at all. What was there before is replaced.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::Builder::new().prefix(".").permissions(Permissions::from_mode(0o600)).tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    fn private() -> TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").mode() & 0o7777
    }

    #[tokio::test]
    async fn it_is_made_with_all_above_it_and_closed_to_others() {
        let dir = private();
        let _lock = lock(&dir.path().join("new/newer")).await.expect("a directory");
        assert_eq!((mode(&dir.path().join("new")), mode(&dir.path().join("new/newer"))), (0o700, 0o700));
    }

    #[tokio::test]
    async fn one_that_is_not_ours_alone_is_refused() {
        let dir = private();
        let at = |name: &str| dir.path().join(name);
        for (name, bits) in [("everybody", 0o777), ("readable", 0o750), ("passable", 0o701), ("sticky", 0o1777)] {
            fs::create_dir(at(name)).expect("a directory");
            fs::set_permissions(at(name), Permissions::from_mode(bits)).expect("a mode");
            let reason = lock(&at(name)).await.expect_err(name);
            assert!(reason.contains("others have access") && reason.contains("chmod 700"), "{reason}");
            assert_eq!(mode(&at(name)), bits, "left as it is");
        }
        fs::create_dir(at("ours")).expect("a directory");
        symlink(at("ours"), at("link")).expect("a link");
        assert!(lock(&at("link")).await.expect_err("a link").contains("is a link"));
        fs::write(at("file"), "").expect("written");
        assert!(lock(&at("file")).await.expect_err("a file").contains("could not make the directory"));
        if Uid::effective().is_root() {
            fs::create_dir(at("foreign")).expect("a directory");
            fs::set_permissions(at("foreign"), Permissions::from_mode(0o700)).expect("a mode");
            std::os::unix::fs::chown(at("foreign"), Some(65534), None).expect("given away");
            assert!(lock(&at("foreign")).await.expect_err("foreign").contains("not a directory of yours"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_somebody_else_has_locked_is_not_waited_for_long() {
        let dir = private();
        let held = lock(dir.path()).await.expect("a lock");
        assert!(lock(dir.path()).await.expect_err("held").contains("holds a lock"));
        drop(held);
        assert!(lock(dir.path()).await.is_ok());
    }
}
