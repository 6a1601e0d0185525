//! A directory that nobody else can enter, held by one process at a time: for what must not be prepared, swapped or made
//! twice by another.
//!
//! Nothing is ever made private here that was not: a directory that others may enter is refused, since what is in it may
//! be another's. Whoever uses one says what to do about it, by [`Problem::command`] and [`Problem::advice`].

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, Uid, access};

use crate::os::shell_quoting;

/// Another of our processes holds the lock for a few milliseconds; who holds it longer is none.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// There is no place for the state of sidecars.
    #[error("neither XDG_STATE_HOME nor HOME is set to an absolute path")]
    NoPlace,
    /// It leads elsewhere.
    #[error("{} is a link, not the directory itself", .0.display())]
    Link(PathBuf),
    /// Something else is in its place, or in that of one above it.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// It belongs to another user.
    #[error("{} is not a directory of yours, it belongs to user {owner}", .dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The group or everybody may look or write into it.
    #[error("others have access to {} (its mode is {:o}){}", .dir.display(), .mode, held(.foreign.as_deref()))]
    Open {
        /// The directory.
        dir: PathBuf,
        /// Its permissions.
        mode: u32,
        /// Something in it that belongs to another user.
        foreign: Option<PathBuf>,
    },
    /// It was made for us alone, and is open nevertheless.
    #[error("others have access to {}, as its file system keeps no permissions", .0.display())]
    KeepsNoModes(PathBuf),
    /// The system said no.
    #[error("could not {what} {}: {}", .path.display(), cause(.source))]
    System {
        /// What was tried, with what follows.
        what: &'static str,
        /// The directory, or a file in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("another program holds a lock on {}", .0.display())]
    Locked(PathBuf),
}

fn held(foreign: Option<&Path>) -> String {
    foreign.map_or_else(String::new, |file| format!(", and {} belongs to another user", file.display()))
}

fn cause(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => "the disk is full".into(),
        io::ErrorKind::QuotaExceeded => "your quota of the disk is used up".into(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

impl Problem {
    fn system(what: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::System { what, path: path.to_owned(), source: source.into() }
    }

    /// The command that mends it, where one does.
    pub fn command(&self) -> Option<String> {
        match self {
            Self::Open { dir, .. } => Some(format!("chmod 700 {}", shell_quoting::file(dir))),
            Self::NotADirectory(file) => {
                let mut old = file.clone().into_os_string();
                old.push(".old");
                Some(format!("mv {} {}", shell_quoting::file(file), shell_quoting::file(old.as_ref())))
            }
            // As after a start by sudo.
            Self::Foreign { dir, owner: 0 } => {
                Some(format!("sudo chown -R {} {}", Uid::effective(), shell_quoting::file(dir)))
            }
            _ => None,
        }
    }

    /// What to do besides, or instead, where it is the directory for the state of sidecars.
    pub fn advice(&self) -> Option<&'static str> {
        const ELSEWHERE: &str = "set XDG_STATE_HOME to a directory of your own";
        match self {
            Self::NoPlace => Some("set HOME, or XDG_STATE_HOME, to the absolute path of a directory of your own"),
            Self::Open { foreign: Some(_), .. } => Some("first see what others have put there, and remove it"),
            Self::Open { foreign: None, .. } => {
                Some("where that changes nothing, as on a drive of Windows, set XDG_STATE_HOME to another file system")
            }
            Self::KeepsNoModes(_) => Some("set XDG_STATE_HOME to a directory on another file system"),
            Self::Foreign { owner, .. } if Uid::effective().is_root() && *owner != 0 => {
                Some("run it as the user whom the directory belongs to, or set XDG_STATE_HOME")
            }
            Self::Link(_) | Self::Foreign { .. } => Some(ELSEWHERE),
            Self::System { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some("make room on that disk"),
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Some(ELSEWHERE),
                _ => None,
            },
            Self::NotADirectory(_) | Self::Locked(_) => None,
        }
    }

    /// The problem with the command that mends it.
    pub fn with_command(&self) -> String {
        self.command().map_or_else(|| self.to_string(), |command| format!("{self}; run `{command}`"))
    }
}

/// All of it on one line, for people.
impl From<Problem> for String {
    fn from(problem: Problem) -> Self {
        let advice = problem.advice().map_or_else(Self::new, |advice| format!("; {advice}"));
        problem.with_command() + &advice
    }
}

/// The directory, made (0700) if need be, known to be ours alone, and locked against our other processes until the lock
/// is dropped.
pub async fn lock(dir: &Path) -> Result<Flock<File>, Problem> {
    for _ in 0..LOCK_ATTEMPTS {
        if let Some(lock) = try_lock(dir)? {
            return Ok(lock);
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Err(Problem::Locked(dir.to_owned()))
}

/// The same without waiting: `None` while somebody else has it locked.
pub fn try_lock(dir: &Path) -> Result<Option<Flock<File>>, Problem> {
    make(dir)?;
    let opened = File::open(dir).map_err(|e| Problem::system("open", dir, e))?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(Problem::system("lock", dir, e)),
    }
}

/// The directory, made (0700) if need be, known to be ours alone. What is above it may be anybody's and is made, too: where
/// it must be ours as well, it is made by a call of its own before.
pub fn make(dir: &Path) -> Result<(), Problem> {
    let is_new = dir.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    if let Err(e) = DirBuilder::new().recursive(true).mode(0o700).create(dir) {
        place_of(dir)?;
        return Err(Problem::system("make the directory", dir, e));
    }
    match check(dir) {
        Err(Problem::Open { dir, .. }) if is_new => Err(Problem::KeepsNoModes(dir)),
        checked => checked,
    }
}

/// Refuses a directory that is not ours alone.
pub fn check(dir: &Path) -> Result<(), Problem> {
    let meta = fs::symlink_metadata(dir).map_err(|e| Problem::system("look at", dir, e))?;
    let dir = dir.to_owned();
    if meta.is_symlink() {
        return Err(Problem::Link(dir));
    }
    if !meta.is_dir() {
        return Err(Problem::NotADirectory(dir));
    }
    if meta.uid() != Uid::effective().as_raw() {
        return Err(Problem::Foreign { dir, owner: meta.uid() });
    }
    if meta.mode() & 0o077 != 0 {
        let foreign = foreign_in(&dir);
        return Err(Problem::Open { dir, mode: meta.mode() & 0o7777, foreign });
    }
    Ok(())
}

/// Whether [`make`] and [`write`] would succeed, as far as that is seen without changing anything.
pub fn examine(dir: &Path) -> Result<(), Problem> {
    let place = place_of(dir)?;
    access(place, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|e| Problem::system("write to", place, e))?;
    match statvfs(place) {
        Ok(disk) if disk.blocks() > 0 && disk.blocks_available() == 0 => {
            Err(Problem::system("write to", place, io::ErrorKind::StorageFull))
        }
        _ => Ok(()),
    }
}

/// The directory, if it is there and ours alone; where it is not there, the nearest above it, in which it would be made.
fn place_of(dir: &Path) -> Result<&Path, Problem> {
    let place = nearest(dir);
    if place == dir {
        check(dir)?;
    } else if !place.is_dir() {
        return Err(Problem::NotADirectory(place.to_owned()));
    }
    Ok(place)
}

/// The path itself or the nearest above it at which there is something.
fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(dir)
}

/// Something in a directory that is neither ours nor root's.
fn foreign_in(dir: &Path) -> Option<PathBuf> {
    let ours = [0, Uid::effective().as_raw()];
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_foreign = |entry: &fs::DirEntry| entry.metadata().is_ok_and(|meta| !ours.contains(&meta.uid()));
    entries.into_iter().find(is_foreign).map(|entry| entry.path())
}

/// Has git leave out all that is in such a directory: it may be in a work tree, as where a home is one.
pub fn keep_from_git(dir: &Path) -> Result<(), Problem> {
    const RULES: &[u8] = b"*\n";
    let path = dir.join(".gitignore");
    if fs::read(&path).is_ok_and(|there| there == RULES) { Ok(()) } else { write(&path, RULES) }
}

/// Puts a file (0600) into such a directory, whole or not at all. What was there before is replaced.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    let write = || -> io::Result<()> {
        let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let permissions = Permissions::from_mode(0o600);
        let mut file = tempfile::Builder::new().prefix(".").permissions(permissions).tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|e| Problem::system("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{chown, symlink};
    use tempfile::TempDir;

    fn private() -> TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    /// The reason, for people.
    fn refused(locked: Result<Flock<File>, Problem>) -> String {
        locked.expect_err("refused").into()
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
            let reason = refused(lock(&at(name)).await);
            let expected = format!("chmod 700 {}", at(name).display());
            assert!(reason.contains("others have access") && reason.contains(&expected), "{reason}");
            assert_eq!(mode(&at(name)), bits, "left as it is");
        }
        fs::create_dir(at("ours")).expect("a directory");
        symlink(at("ours"), at("link")).expect("a link");
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
            chown(at("foreign"), Some(65534), None).expect("given away");
            let reason = refused(lock(&at("foreign")).await);
            assert!(reason.contains("not a directory of yours") && reason.contains("user 65534"), "{reason}");
        }
    }

    #[tokio::test]
    async fn what_another_has_put_into_an_open_one_is_named() {
        if !Uid::effective().is_root() {
            return;
        }
        let dir = private();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).expect("a mode");
        fs::write(dir.path().join("ours"), "").expect("a file");
        let reason = refused(lock(dir.path()).await);
        assert!(!reason.contains("belongs to another user"), "{reason}");
        let theirs = dir.path().join("2774.json");
        fs::write(&theirs, "").expect("a file");
        chown(&theirs, Some(65534), None).expect("given away");
        let reason = refused(lock(dir.path()).await);
        let named = format!("{} belongs to another user", theirs.display());
        assert!(reason.contains(&named) && reason.contains("first see what others have put there"), "{reason}");
        assert!(theirs.exists());
    }

    #[test]
    fn an_examination_sees_what_making_it_would_meet_and_changes_nothing() {
        let dir = private();
        let at = |name: &str| dir.path().join(name);
        for name in ["open", "ours"] {
            fs::create_dir(at(name)).expect("a directory");
        }
        fs::set_permissions(at("open"), Permissions::from_mode(0o755)).expect("a mode");
        fs::set_permissions(at("ours"), Permissions::from_mode(0o700)).expect("a mode");
        fs::write(at("file"), "").expect("written");
        symlink(at("ours"), at("link")).expect("a link");
        symlink(at("nowhere"), at("dangling")).expect("a link");
        for (name, problem) in [
            ("ours", None),
            ("ours/not/yet", None),
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
    fn what_the_system_says_is_named_with_what_to_do() {
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
    fn git_is_told_once_to_leave_it_out() {
        let dir = private();
        let rules = dir.path().join(".gitignore");
        for before in [None, Some(""), Some("!*\n")] {
            let _ = fs::remove_file(&rules);
            before.into_iter().for_each(|before| fs::write(&rules, before).expect("written"));
            keep_from_git(dir.path()).expect("told");
            assert_eq!(fs::read_to_string(&rules).expect("a file"), "*\n");
        }
        let written = fs::metadata(&rules).expect("there").ino();
        keep_from_git(dir.path()).expect("told");
        assert_eq!(fs::metadata(&rules).expect("there").ino(), written);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_somebody_else_has_locked_is_not_waited_for_long() {
        let dir = private();
        let held = lock(dir.path()).await.expect("a lock");
        assert!(refused(lock(dir.path()).await).contains("holds a lock"));
        drop(held);
        assert!(lock(dir.path()).await.is_ok());
    }
}
