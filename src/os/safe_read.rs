//! Reads small files that another user or a repository may have prepared, such as the env file: without blocking on a
//! FIFO or device, and without trusting a file that others can write.
//!
//! The file is opened once and checked through its descriptor (docs/security.md E1, E2). Errors never contain any of
//! its content.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Uid;

use crate::remedy::Remedy;

/// The largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A file that was read.
#[derive(Debug)]
pub struct Content {
    /// All of its bytes.
    pub bytes: Vec<u8>,
    /// Its mode lets the group or others read it.
    pub readable_by_others: bool,
    /// It changed while it was read, so `bytes` may be half-written.
    pub has_changed: bool,
    /// It has been unlinked and the path still leads to it: a bind mount of a file that was replaced on the host.
    pub is_stale_mount: bool,
}

/// Why a file was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// There is no such file.
    #[error("it does not exist")]
    Missing,
    /// The file exists and cannot be read, or must not be trusted.
    #[error(transparent)]
    Unusable(#[from] Defect),
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Defect {
    /// For people: a clause about "it", such as "it is a directory".
    pub reason: String,
    /// For code that suggests a fix.
    pub cause: DefectCause,
}

/// The property of a file that has to change before it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefectCause {
    /// Its content.
    Content,
    /// Its content is encrypted by dotenvx.
    Encrypted,
    /// Its mode lets everybody write to it.
    WritableByAll,
    /// Its mode does not let its owner read it.
    UnreadableByOwner,
    /// Its owner is another user.
    Owner,
    /// The mode of this parent directory does not let its owner enter it.
    ClosedDirectory(PathBuf),
    /// It is not a regular file.
    NotAFile,
    /// Its size.
    Size,
    /// The file system returns errors.
    FileSystem,
    /// The remedy is already known.
    Known(Remedy),
}

impl Defect {
    /// A defect with this reason and cause.
    pub fn new(reason: impl Into<String>, cause: DefectCause) -> Self {
        Self { reason: reason.into(), cause }
    }

    /// A defect of the file's content.
    pub fn in_content(reason: impl Into<String>) -> Self {
        Self::new(reason, DefectCause::Content)
    }
}

/// Reads the file. Blocks as long as the file system does, but not on a FIFO or a device.
pub fn read(path: &Path) -> Result<Content, ReadError> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(|e| match (e.kind(), e.raw_os_error().map(Errno::from_raw)) {
            (ErrorKind::NotFound | ErrorKind::NotADirectory, _) => ReadError::Missing,
            (_, Some(Errno::ELOOP)) => Defect::new("it is a loop of links", DefectCause::NotAFile).into(),
            (_, Some(Errno::ENXIO)) => Defect::new("it is a socket", DefectCause::NotAFile).into(),
            (ErrorKind::PermissionDenied, _) => {
                Defect::new("we are not permitted to read it", cause_of_denial(path)).into()
            }
            _ => Defect::new(format!("it cannot be opened ({})", e.kind()), DefectCause::FileSystem).into(),
        })?;
    let read_failed =
        |e: std::io::Error| Defect::new(format!("it cannot be read ({})", e.kind()), DefectCause::FileSystem);
    let before = file.metadata().map_err(read_failed)?;
    check(&before)?;
    let mut bytes = Vec::with_capacity(before.len() as usize + 1);
    file.by_ref().take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(read_failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large().into());
    }
    let after = file.metadata().map_err(read_failed)?;
    let version = |meta: &Metadata| (meta.len(), meta.mtime(), meta.mtime_nsec());
    let is_stale_mount = after.nlink() == 0 && leads_to(path, &after);
    Ok(Content {
        readable_by_others: before.mode() & 0o044 != 0,
        has_changed: version(&before) != version(&after)
            || after.len() != bytes.len() as u64
            || (after.nlink() == 0 && !is_stale_mount),
        is_stale_mount,
        bytes,
    })
}

fn leads_to(path: &Path, file: &Metadata) -> bool {
    fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
}

fn check(meta: &Metadata) -> Result<(), Defect> {
    let kind = meta.file_type();
    let (reason, cause) = if kind.is_dir() {
        ("it is a directory", DefectCause::NotAFile)
    } else if kind.is_fifo() {
        ("it is a FIFO", DefectCause::NotAFile)
    } else if kind.is_block_device() || kind.is_char_device() {
        ("it is a device", DefectCause::NotAFile)
    } else if !kind.is_file() {
        ("it is not a regular file", DefectCause::NotAFile)
    } else if meta.uid() != Uid::effective().as_raw() && meta.uid() != 0 {
        ("it belongs to another user", DefectCause::Owner)
    } else if meta.mode() & 0o002 != 0 {
        ("everybody may write to it", DefectCause::WritableByAll)
    } else if meta.len() > MAX_FILE_BYTES {
        return Err(too_large());
    } else {
        return Ok(());
    };
    Err(Defect::new(reason, cause))
}

fn too_large() -> Defect {
    Defect::new("it is larger than 1 MiB", DefectCause::Size)
}

/// Why the system denied read access: the file's own mode or owner, or a directory on the way to it.
fn cause_of_denial(path: &Path) -> DefectCause {
    let is_own = |meta: &Metadata| meta.uid() == Uid::effective().as_raw();
    if let Ok(meta) = path.metadata() {
        return if is_own(&meta) { DefectCause::UnreadableByOwner } else { DefectCause::Owner };
    }
    // The closed directory is the nearest one whose metadata can be read.
    match path.ancestors().skip(1).find_map(|dir| Some((dir, dir.metadata().ok()?))) {
        Some((dir, meta)) if is_own(&meta) => DefectCause::ClosedDirectory(dir.to_owned()),
        _ => DefectCause::Owner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn error(path: &Path) -> ReadError {
        read(path).expect_err("not to be read")
    }

    #[test]
    fn anything_but_a_regular_file_is_named_and_never_blocks() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
        symlink(at("loop"), at("loop")).expect("a link");
        symlink(at("nowhere"), at("dangling")).expect("a link");
        symlink("/dev/zero", at("device")).expect("a link");
        for (path, word) in [
            (dir.path().to_owned(), "directory"),
            (at("fifo"), "FIFO"),
            (at("socket"), "socket"),
            (at("loop"), "loop"),
            (at("device"), "device"),
        ] {
            match error(&path) {
                ReadError::Unusable(defect) => assert!(defect.reason.contains(word), "{defect}"),
                ReadError::Missing => panic!("{path:?} is there"),
            }
        }
        assert_eq!(error(&at("dangling")), ReadError::Missing);
        assert_eq!(error(&at("none")), ReadError::Missing);
        assert_eq!(error(&at("none/below")), ReadError::Missing);
    }

    #[test]
    fn readability_by_others_is_reported_and_world_writable_files_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, "A=1").expect("a file");
        for (mode, others) in [(0o600, false), (0o644, true), (0o640, true), (0o604, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
            let content = read(&path).expect("content");
            assert_eq!((content.readable_by_others, content.has_changed), (others, false), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("a mode");
        assert!(matches!(error(&path), ReadError::Unusable(defect) if defect.cause == DefectCause::WritableByAll));
    }

    #[test]
    fn the_cause_of_denied_access_is_found() {
        if Uid::effective().is_root() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).expect("a directory");
        let path = inner.join(".env.local");
        fs::write(&path, "A=1").expect("a file");
        let cause_where = |closed: &Path, mode| {
            fs::set_permissions(closed, fs::Permissions::from_mode(0o000)).expect("a mode");
            let error = error(&path);
            fs::set_permissions(closed, fs::Permissions::from_mode(mode)).expect("a mode");
            match error {
                ReadError::Unusable(defect) => defect.cause,
                ReadError::Missing => panic!("it is there"),
            }
        };
        assert_eq!(cause_where(&path, 0o600), DefectCause::UnreadableByOwner);
        assert_eq!(cause_where(&inner, 0o700), DefectCause::ClosedDirectory(inner.clone()));
        assert!(read(&path).is_ok());
    }

    #[test]
    fn files_larger_than_1_mib_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize]).expect("a file");
        assert!(read(&path).is_ok());
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize + 1]).expect("a file");
        assert!(matches!(error(&path), ReadError::Unusable(defect) if defect.reason.contains("1 MiB")));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_unlinked_file_that_the_path_still_leads_to_is_a_stale_mount() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, "A=1").expect("a file");
        let open = fs::File::open(&path).expect("open");
        // Like a bind mount, this path leads to the file even after it was unlinked.
        let mounted = Path::new("/proc/self/fd").join(open.as_raw_fd().to_string());
        let flags =
            |path: &Path| read(path).map(|content| (content.is_stale_mount, content.has_changed)).expect("content");
        assert_eq!(flags(&mounted), (false, false));
        fs::write(dir.path().join("new"), "A=2").expect("a file");
        fs::rename(dir.path().join("new"), &path).expect("replaced");
        assert_eq!((flags(&mounted), flags(&path)), ((true, false), (false, false)));
    }
}
