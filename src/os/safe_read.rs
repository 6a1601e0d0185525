//! Reads a small file that somebody else may have prepared (the env file, a configuration file) without ever hanging or
//! taking another user's word.
//!
//! The file is opened once and judged by its descriptor (docs/security.md E1, E2). No part of its content may appear in
//! a problem.

use std::fmt;
use std::fs::{self, Metadata, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Uid;

use crate::remedy::Remedy;

/// A larger file is not read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// What was read.
#[derive(Debug)]
pub struct Content {
    /// The whole file.
    pub bytes: Vec<u8>,
    /// The group or everybody may read it.
    pub readable_by_others: bool,
    /// The file changed while it was read: look again.
    pub changing: bool,
    /// The file has no name any more, and yet the path leads to it: it is mounted there, and was replaced where it came from.
    pub is_replaced: bool,
}

/// Why there is no content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Nothing is there.
    Missing,
    /// Something is there that is not safe or not possible to read.
    Unsafe(Flaw),
}

/// Why something is not used: in words, and as what has to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// For people.
    pub reason: String,
    /// What has to change.
    pub cause: Cause,
}

/// What has to change before a file can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// What it holds.
    Content,
    /// What it holds is encrypted by dotenvx.
    Encrypted,
    /// Its mode: everybody may write to it.
    WritableByAll,
    /// Its mode: its owner may not read it.
    UnreadableByOwner,
    /// Its owner.
    Owner,
    /// The mode of this directory, which keeps even its owner from what is in it.
    ClosedDirectory(PathBuf),
    /// It is no file: something else is in its place.
    Kind,
    /// Its size.
    Size,
    /// The file system that it is on.
    FileSystem,
    /// Something of which whoever found it knows what mends it.
    Known(Remedy),
}

impl Flaw {
    /// Why, and what has to change.
    pub fn new(reason: impl Into<String>, cause: Cause) -> Self {
        Self { reason: reason.into(), cause }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// What a file holds is no good.
impl From<String> for Flaw {
    fn from(reason: String) -> Self {
        Self::new(reason, Cause::Content)
    }
}

/// What a file holds is no good.
impl From<&str> for Flaw {
    fn from(reason: &str) -> Self {
        Self::new(reason, Cause::Content)
    }
}

/// Reads `path`. Blocks for as long as the file system does, not for a FIFO or a device.
pub fn read(path: &Path) -> Result<Content, Problem> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(|e| match (e.kind(), e.raw_os_error().map(Errno::from_raw)) {
            (ErrorKind::NotFound | ErrorKind::NotADirectory, _) => Problem::Missing,
            (_, Some(Errno::ELOOP)) => Problem::Unsafe(Flaw::new("it is a loop of links", Cause::Kind)),
            (_, Some(Errno::ENXIO)) => Problem::Unsafe(Flaw::new("it is a socket", Cause::Kind)),
            (ErrorKind::PermissionDenied, _) => {
                Problem::Unsafe(Flaw::new("we are not permitted to read it", what_forbids(path)))
            }
            _ => Problem::Unsafe(Flaw::new(format!("it cannot be opened ({})", e.kind()), Cause::FileSystem)),
        })?;
    let unreadable =
        |e: std::io::Error| Problem::Unsafe(Flaw::new(format!("it cannot be read ({})", e.kind()), Cause::FileSystem));
    let before = file.metadata().map_err(unreadable)?;
    refuse_unsafe(&before)?;
    let mut bytes = Vec::with_capacity(before.len() as usize + 1);
    file.by_ref().take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let after = file.metadata().map_err(unreadable)?;
    let stamp = |m: &Metadata| (m.len(), m.mtime(), m.mtime_nsec());
    let is_replaced = after.nlink() == 0 && leads_to(path, &after);
    Ok(Content {
        readable_by_others: before.mode() & 0o044 != 0,
        changing: stamp(&before) != stamp(&after)
            || after.len() != bytes.len() as u64
            || (after.nlink() == 0 && !is_replaced),
        is_replaced,
        bytes,
    })
}

fn leads_to(path: &Path, file: &Metadata) -> bool {
    fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (file.dev(), file.ino()))
}

fn refuse_unsafe(meta: &Metadata) -> Result<(), Problem> {
    let kind = meta.file_type();
    let because = |reason: &str, cause| Err(Problem::Unsafe(Flaw::new(reason, cause)));
    if kind.is_dir() {
        return because("it is a directory", Cause::Kind);
    }
    if kind.is_fifo() {
        return because("it is a FIFO", Cause::Kind);
    }
    if kind.is_block_device() || kind.is_char_device() {
        return because("it is a device", Cause::Kind);
    }
    if !kind.is_file() {
        return because("it is not a regular file", Cause::Kind);
    }
    if meta.uid() != Uid::effective().as_raw() && meta.uid() != 0 {
        return because("it belongs to another user", Cause::Owner);
    }
    if meta.mode() & 0o002 != 0 {
        return because("everybody may write to it", Cause::WritableByAll);
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    Ok(())
}

fn too_large() -> Problem {
    Problem::Unsafe(Flaw::new("it is larger than 1 MiB", Cause::Size))
}

/// Why the system does not let us read a file: its own mode or owner, or that of a directory on the way to it.
fn what_forbids(path: &Path) -> Cause {
    let is_ours = |meta: &Metadata| meta.uid() == Uid::effective().as_raw();
    if let Ok(meta) = path.metadata() {
        return if is_ours(&meta) { Cause::UnreadableByOwner } else { Cause::Owner };
    }
    // The nearest directory of which anything can be told is the one that lets nobody in.
    let closed = path.ancestors().skip(1).find_map(|dir| Some((dir, dir.metadata().ok()?)));
    match closed {
        Some((dir, meta)) if is_ours(&meta) => Cause::ClosedDirectory(dir.to_owned()),
        _ => Cause::Owner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn problem(path: &Path) -> Problem {
        read(path).expect_err("not to be read")
    }

    #[test]
    fn names_what_is_no_regular_file_and_never_hangs() {
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
            match problem(&path) {
                Problem::Unsafe(flaw) => assert!(flaw.reason.contains(word), "{flaw}"),
                Problem::Missing => panic!("{path:?} is there"),
            }
        }
        assert_eq!(problem(&at("dangling")), Problem::Missing);
        assert_eq!(problem(&at("none")), Problem::Missing);
        assert_eq!(problem(&at("none/below")), Problem::Missing);
    }

    #[test]
    fn tells_who_else_may_read_and_refuses_what_all_may_write() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, "A=1").expect("a file");
        for (mode, others) in [(0o600, false), (0o644, true), (0o640, true), (0o604, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
            let content = read(&path).expect("content");
            assert_eq!((content.readable_by_others, content.changing), (others, false), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("a mode");
        assert!(matches!(problem(&path), Problem::Unsafe(flaw) if flaw.cause == Cause::WritableByAll));
    }

    #[test]
    fn what_forbids_to_read_it_is_told_apart() {
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
            let problem = problem(&path);
            fs::set_permissions(closed, fs::Permissions::from_mode(mode)).expect("a mode");
            match problem {
                Problem::Unsafe(flaw) => flaw.cause,
                Problem::Missing => panic!("it is there"),
            }
        };
        assert_eq!(cause_where(&path, 0o600), Cause::UnreadableByOwner);
        assert_eq!(cause_where(&inner, 0o700), Cause::ClosedDirectory(inner.clone()));
        assert!(read(&path).is_ok());
    }

    #[test]
    fn stops_at_a_mebibyte() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize]).expect("a file");
        assert!(read(&path).is_ok());
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize + 1]).expect("a file");
        assert!(matches!(problem(&path), Problem::Unsafe(flaw) if flaw.reason.contains("1 MiB")));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_without_a_name_that_the_path_still_leads_to_was_replaced() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, "A=1").expect("a file");
        let open = fs::File::open(&path).expect("open");
        // As a mount of the file would, this leads to it whatever becomes of its name.
        let mounted = Path::new("/proc/self/fd").join(open.as_raw_fd().to_string());
        let seen = |path: &Path| read(path).map(|content| (content.is_replaced, content.changing)).expect("content");
        assert_eq!(seen(&mounted), (false, false));
        fs::write(dir.path().join("new"), "A=2").expect("a file");
        fs::rename(dir.path().join("new"), &path).expect("replaced");
        assert_eq!((seen(&mounted), seen(&path)), ((true, false), (false, false)));
    }
}
