//! Directories that belong to this user alone (mode 0700), with an exclusive lock between processes.
//!
//! One policy for every directory in which a file of another user would be trusted, such as the state directory
//! (docs/security.md D1, D2): owned by the effective user, no access for group and others, not a symbolic link. A
//! directory that fails the check is refused and never repaired, because its content may already belong to another
//! user. [`Problem::command`] and [`Problem::advice`] say what to do about it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, Uid, access};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::os::atomic_file::{self, Durability};
use crate::os::{safe_read, shell_quoting};

/// Our processes hold the lock for a few milliseconds only; after a second it is another program's.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// No state directory is configured.
    #[error("neither XDG_STATE_HOME nor HOME is set to an absolute path")]
    NoStateDir,
    /// The path is a symbolic link.
    #[error("{} is a link, not the directory itself", .0.display())]
    Symlink(PathBuf),
    /// The path, or a part of it, is something other than a directory.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// The directory belongs to another user.
    #[error("{} is not a directory of yours, it belongs to user {owner}", .dir.display())]
    OtherOwner {
        /// The directory.
        dir: PathBuf,
        /// User id of its owner.
        owner: u32,
    },
    /// The mode gives access to the group or to others.
    #[error("others have access to {} (its mode is {:o}){}", .dir.display(), .mode, other_owner_note(.other_users_file.as_deref()))]
    AccessibleByOthers {
        /// The directory.
        dir: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// A file in it that belongs to another user, if there is one.
        other_users_file: Option<PathBuf>,
    },
    /// The directory was created with mode 0700 and the file system ignored that.
    #[error("others have access to {}, as its file system keeps no permissions", .0.display())]
    NoPermissions(PathBuf),
    /// A system call failed.
    #[error("could not {operation} {}: {}", .path.display(), plain_cause(.source))]
    System {
        /// What was tried, as a verb phrase that the path completes.
        operation: &'static str,
        /// The directory, or a file in it.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another process has held the lock for too long.
    #[error("another program holds a lock on {}", .0.display())]
    Locked(PathBuf),
}

fn other_owner_note(file: Option<&Path>) -> String {
    file.map_or_else(String::new, |file| format!(", and {} belongs to another user", file.display()))
}

fn plain_cause(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => "the disk is full".into(),
        io::ErrorKind::QuotaExceeded => "your quota of the disk is used up".into(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

impl Problem {
    fn system(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::System { operation, path: path.to_owned(), source: source.into() }
    }

    /// The shell command that fixes it, if there is one.
    pub fn command(&self) -> Option<String> {
        match self {
            Self::AccessibleByOthers { dir, .. } => Some(format!("chmod 700 {}", shell_quoting::file(dir))),
            Self::NotADirectory(file) => {
                let mut old = file.clone().into_os_string();
                old.push(".old");
                Some(format!("mv {} {}", shell_quoting::file(file), shell_quoting::file(old.as_ref())))
            }
            // Typically left behind by a start with sudo.
            Self::OtherOwner { dir, owner: 0 } => {
                Some(format!("sudo chown -R {} {}", Uid::effective(), shell_quoting::file(dir)))
            }
            _ => None,
        }
    }

    /// What to do in addition to the command, or instead of it, if the directory is the state directory.
    pub fn advice(&self) -> Option<&'static str> {
        const ELSEWHERE: &str = "set XDG_STATE_HOME to a directory of your own";
        match self {
            Self::NoStateDir => Some("set HOME, or XDG_STATE_HOME, to the absolute path of a directory of your own"),
            Self::AccessibleByOthers { other_users_file: Some(_), .. } => {
                Some("first see what others have put there, and remove it")
            }
            Self::AccessibleByOthers { other_users_file: None, .. } => {
                Some("where that changes nothing, as on a drive of Windows, set XDG_STATE_HOME to another file system")
            }
            Self::NoPermissions(_) => Some("set XDG_STATE_HOME to a directory on another file system"),
            Self::OtherOwner { owner, .. } if Uid::effective().is_root() && *owner != 0 => {
                Some("run it as the user whom the directory belongs to, or set XDG_STATE_HOME")
            }
            Self::Symlink(_) | Self::OtherOwner { .. } => Some(ELSEWHERE),
            Self::System { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some("make room on that disk"),
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Some(ELSEWHERE),
                _ => None,
            },
            Self::NotADirectory(_) | Self::Locked(_) => None,
        }
    }

    /// The problem, followed by the command that fixes it.
    pub fn with_command(&self) -> String {
        self.command().map_or_else(|| self.to_string(), |command| format!("{self}; run `{command}`"))
    }

    /// The problem, the command and the advice on one line.
    pub fn with_advice(&self) -> String {
        let advice = self.advice().map_or_else(String::new, |advice| format!("; {advice}"));
        self.with_command() + &advice
    }
}

impl From<Problem> for String {
    fn from(problem: Problem) -> Self {
        problem.with_advice()
    }
}

/// [`make`]s the directory and locks it against our other processes until the lock is dropped. Gives up after a second.
pub async fn lock(dir: &Path) -> Result<Flock<File>, Problem> {
    for _ in 0..LOCK_ATTEMPTS {
        if let Some(lock) = try_lock(dir)? {
            return Ok(lock);
        }
        tokio::time::sleep(LOCK_RETRY_INTERVAL).await;
    }
    Err(Problem::Locked(dir.to_owned()))
}

/// Like [`lock`], without waiting: `None` while another process holds the lock.
pub fn try_lock(dir: &Path) -> Result<Option<Flock<File>>, Problem> {
    make(dir)?;
    let opened = File::open(dir).map_err(|e| Problem::system("open", dir, e))?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(Problem::system("lock", dir, e)),
    }
}

/// Creates the directory (0700) with its missing parents if needed, and [`check`]s it. The parents are not checked: use
/// [`make_within`] if they have to be private as well.
pub fn make(dir: &Path) -> Result<(), Problem> {
    let is_new = dir.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    if let Err(e) = DirBuilder::new().recursive(true).mode(0o700).create(dir) {
        existing_part(dir)?;
        return Err(Problem::system("make the directory", dir, e));
    }
    match check(dir) {
        Err(Problem::AccessibleByOthers { dir, .. }) if is_new => Err(Problem::NoPermissions(dir)),
        checked => checked,
    }
}

/// [`make`]s `root` and every directory on the relative path below it, and returns the last. Whoever could write to one
/// of them could replace what is below it.
pub fn make_within(root: &Path, relative: impl AsRef<Path>) -> Result<PathBuf, Problem> {
    make(root)?;
    let mut dir = root.to_owned();
    for name in relative.as_ref() {
        dir.push(name);
        make(&dir)?;
    }
    Ok(dir)
}

/// Fails unless the path is a directory of this user's that nobody else has access to.
pub fn check(dir: &Path) -> Result<(), Problem> {
    let meta = fs::symlink_metadata(dir).map_err(|e| Problem::system("look at", dir, e))?;
    let dir = dir.to_owned();
    if meta.is_symlink() {
        return Err(Problem::Symlink(dir));
    }
    if !meta.is_dir() {
        return Err(Problem::NotADirectory(dir));
    }
    if meta.uid() != Uid::effective().as_raw() {
        return Err(Problem::OtherOwner { dir, owner: meta.uid() });
    }
    if meta.mode() & 0o077 != 0 {
        let other_users_file = find_other_users_file(&dir);
        return Err(Problem::AccessibleByOthers { dir, mode: meta.mode() & 0o7777, other_users_file });
    }
    Ok(())
}

/// Predicts whether [`make`] and [`write`] would succeed, without changing anything.
pub fn examine(dir: &Path) -> Result<(), Problem> {
    let existing = existing_part(dir)?;
    access(existing, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|e| Problem::system("write to", existing, e))?;
    match statvfs(existing) {
        Ok(disk) if disk.blocks() > 0 && disk.blocks_available() == 0 => {
            Err(Problem::system("write to", existing, io::ErrorKind::StorageFull))
        }
        _ => Ok(()),
    }
}

/// The directory itself, [`check`]ed, or the nearest existing directory above it, in which it would be created.
fn existing_part(dir: &Path) -> Result<&Path, Problem> {
    let existing = dir.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(dir);
    if existing == dir {
        check(dir)?;
    } else if !existing.is_dir() {
        return Err(Problem::NotADirectory(existing.to_owned()));
    }
    Ok(existing)
}

/// A file in the directory that belongs neither to this user nor to root.
fn find_other_users_file(dir: &Path) -> Option<PathBuf> {
    let trusted = [0, Uid::effective().as_raw()];
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_other_users = |entry: &fs::DirEntry| entry.metadata().is_ok_and(|meta| !trusted.contains(&meta.uid()));
    entries.into_iter().find(is_other_users).map(|entry| entry.path())
}

/// Writes a `.gitignore` that excludes the whole directory: it may be inside a work tree, for example if the user's
/// home is one.
pub fn keep_from_git(dir: &Path) -> Result<(), Problem> {
    const RULES: &[u8] = b"*\n";
    let path = dir.join(".gitignore");
    if fs::read(&path).is_ok_and(|existing| existing == RULES) { Ok(()) } else { write(&path, RULES) }
}

/// Changes a JSON file in a private directory under the lock of the directory. `change` gets the content, or the
/// default if the file is missing or unusable, and returns whether to write it back; so does this function.
pub async fn update_json<T: Serialize + DeserializeOwned + Default>(
    file: &Path,
    change: impl FnOnce(&mut T) -> bool + Send + 'static,
) -> Result<bool, Problem> {
    let lock = lock(file.parent().unwrap_or(file)).await?;
    let path = file.to_owned();
    let update = tokio::task::spawn_blocking(move || {
        let _lock = lock;
        let mut content: T = read_json(&path);
        if !change(&mut content) {
            return Ok(false);
        }
        let bytes = serde_json::to_vec(&content).map_err(|e| Problem::system("write", &path, e))?;
        write(&path, &bytes).map(|()| true)
    });
    update.await.unwrap_or_else(|e| Err(Problem::system("write", file, io::Error::other(e))))
}

/// The content of a JSON file, or the default if it is missing or unusable.
pub fn read_json<T: DeserializeOwned + Default>(file: &Path) -> T {
    let content = safe_read::read(file).ok();
    content.and_then(|content| serde_json::from_slice(&content.bytes).ok()).unwrap_or_default()
}

/// Writes or replaces a file (0600) in a private directory, atomically.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    atomic_file::write(path, bytes, 0o600, Durability::Process).map_err(|e| Problem::system("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    use tempfile::TempDir;

    fn private() -> TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    /// The error as one line.
    fn refused(locked: Result<Flock<File>, Problem>) -> String {
        locked.expect_err("refused").into()
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").mode() & 0o7777
    }

    #[tokio::test]
    async fn directory_and_missing_parents_are_created_with_mode_0700() {
        let dir = private();
        let _lock = lock(&dir.path().join("new/newer")).await.expect("a directory");
        assert_eq!((mode(&dir.path().join("new")), mode(&dir.path().join("new/newer"))), (0o700, 0o700));
    }

    #[tokio::test]
    async fn a_directory_that_others_can_access_is_refused() {
        let dir = private();
        let at = |name: &str| dir.path().join(name);
        for (name, bits) in [("everybody", 0o777), ("readable", 0o750), ("passable", 0o701), ("sticky", 0o1777)] {
            fs::create_dir(at(name)).expect("a directory");
            fs::set_permissions(at(name), Permissions::from_mode(bits)).expect("a mode");
            let reason = refused(lock(&at(name)).await);
            let expected = format!("chmod 700 {}", at(name).display());
            assert!(reason.contains("others have access") && reason.contains(&expected), "{reason}");
            assert_eq!(mode(&at(name)), bits, "unchanged");
        }
        fs::create_dir(at("private")).expect("a directory");
        symlink(at("private"), at("link")).expect("a link");
        assert!(refused(lock(&at("link")).await).contains("is a link"));
        fs::write(at("file"), "").expect("written");
        for path in ["file", "file/below/it"] {
            let reason = refused(lock(&at(path)).await);
            let file = at("file").display().to_string();
            assert_eq!(reason, format!("{file} is not a directory; run `mv {file} {file}.old`"));
        }
        if Uid::effective().is_root() {
            fs::create_dir(at("foreign")).expect("a directory");
            fs::set_permissions(at("foreign"), Permissions::from_mode(0o700)).expect("a mode");
            chown(at("foreign"), Some(65534), None).expect("chown");
            let reason = refused(lock(&at("foreign")).await);
            assert!(reason.contains("not a directory of yours") && reason.contains("user 65534"), "{reason}");
        }
    }

    #[tokio::test]
    async fn a_file_of_another_user_in_an_open_directory_is_named() {
        if !Uid::effective().is_root() {
            return;
        }
        let dir = private();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).expect("a mode");
        fs::write(dir.path().join("own"), "").expect("a file");
        let reason = refused(lock(dir.path()).await);
        assert!(!reason.contains("belongs to another user"), "{reason}");
        let other_users = dir.path().join("2774.json");
        fs::write(&other_users, "").expect("a file");
        chown(&other_users, Some(65534), None).expect("chown");
        let reason = refused(lock(dir.path()).await);
        let named = format!("{} belongs to another user", other_users.display());
        assert!(reason.contains(&named) && reason.contains("first see what others have put there"), "{reason}");
        assert!(other_users.exists());
    }

    #[test]
    fn examine_predicts_the_result_of_make_and_changes_nothing() {
        let dir = private();
        let at = |name: &str| dir.path().join(name);
        for name in ["open", "private"] {
            fs::create_dir(at(name)).expect("a directory");
        }
        fs::set_permissions(at("open"), Permissions::from_mode(0o755)).expect("a mode");
        fs::set_permissions(at("private"), Permissions::from_mode(0o700)).expect("a mode");
        fs::write(at("file"), "").expect("written");
        symlink(at("private"), at("link")).expect("a link");
        symlink(at("nowhere"), at("dangling")).expect("a link");
        for (name, problem) in [
            ("private", None),
            ("private/not/yet", None),
            ("open/not/yet", None),
            ("link/not/yet", None),
            ("open", Some("others have access")),
            ("link", Some("is a link")),
            ("file", Some("is not a directory")),
            ("file/below", Some("is not a directory")),
            ("dangling/below", Some("is not a directory")),
        ] {
            let before = fs::read_dir(dir.path()).expect("a directory").count();
            let examined = examine(&at(name)).err().map(String::from);
            assert_eq!(examined.is_some(), problem.is_some(), "{name}: {examined:?}");
            let (examined, problem) = (examined.unwrap_or_default(), problem.unwrap_or_default());
            assert!(examined.contains(problem), "{name}: {examined}");
            assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), before, "{name}");
            let made = make(&at(name)).err().map(String::from).unwrap_or_default();
            assert_eq!(made.is_empty(), examined.is_empty(), "{name}: {made}");
        }
    }

    #[test]
    fn every_level_below_the_root_is_checked() {
        let root = private();
        assert_eq!(make_within(root.path(), "a/b").expect("made"), root.path().join("a/b"));
        fs::set_permissions(root.path().join("a"), Permissions::from_mode(0o755)).expect("a mode");
        let refused = make_within(root.path(), "a/c").expect_err("refused");
        assert!(refused.to_string().contains("others have access"), "{refused}");
        assert!(!root.path().join("a/c").exists());
    }

    #[test]
    fn system_errors_come_with_advice() {
        let of = |kind: io::ErrorKind| String::from(Problem::system("write", Path::new("/s/1.json"), kind));
        for (kind, expected) in [
            (io::ErrorKind::StorageFull, "could not write /s/1.json: the disk is full; make room on that disk"),
            (
                io::ErrorKind::QuotaExceeded,
                "could not write /s/1.json: your quota of the disk is used up; make room on that disk",
            ),
            (
                io::ErrorKind::ReadOnlyFilesystem,
                "could not write /s/1.json: the file system is read-only; set XDG_STATE_HOME to a directory of your own",
            ),
        ] {
            assert_eq!(of(kind), expected);
        }
    }

    #[test]
    fn the_gitignore_is_written_only_if_it_differs() {
        let dir = private();
        let rules = dir.path().join(".gitignore");
        for before in [None, Some(""), Some("!*\n")] {
            let _ = fs::remove_file(&rules);
            before.into_iter().for_each(|before| fs::write(&rules, before).expect("written"));
            keep_from_git(dir.path()).expect("written");
            assert_eq!(fs::read_to_string(&rules).expect("a file"), "*\n");
        }
        let written = fs::metadata(&rules).expect("there").ino();
        keep_from_git(dir.path()).expect("written");
        assert_eq!(fs::metadata(&rules).expect("there").ino(), written);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_lock_times_out() {
        let dir = private();
        let held = lock(dir.path()).await.expect("a lock");
        assert!(refused(lock(dir.path()).await).contains("holds a lock"));
        drop(held);
        assert!(lock(dir.path()).await.is_ok());
    }
}
