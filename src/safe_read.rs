//! Reads a small file that somebody else may have prepared (the env file, a configuration file) without ever hanging or
//! taking another user's word.
//!
//! The file is opened once and judged by its descriptor (trust-policy.md E1, E2). No part of its content may appear in
//! a problem.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Uid;

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
    /// Something is there that is not safe or not possible to read, for this reason.
    Unsafe(String),
}

/// Reads `path`. Blocks for as long as the file system does, not for a FIFO or a device.
pub fn read(path: &Path) -> Result<Content, Problem> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(|e| match (e.kind(), e.raw_os_error().map(Errno::from_raw)) {
            (ErrorKind::NotFound | ErrorKind::NotADirectory, _) => Problem::Missing,
            (_, Some(Errno::ELOOP)) => Problem::Unsafe("it is a loop of links".into()),
            (_, Some(Errno::ENXIO)) => Problem::Unsafe("it is a socket".into()),
            (ErrorKind::PermissionDenied, _) => Problem::Unsafe("we are not permitted to read it".into()),
            _ => Problem::Unsafe(format!("it cannot be opened ({})", e.kind())),
        })?;
    let unreadable = |e: std::io::Error| Problem::Unsafe(format!("it cannot be read ({})", e.kind()));
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
    let because = |reason: &str| Err(Problem::Unsafe(reason.into()));
    if kind.is_dir() {
        return because("it is a directory");
    }
    if kind.is_fifo() {
        return because("it is a FIFO");
    }
    if kind.is_block_device() || kind.is_char_device() {
        return because("it is a device");
    }
    if !kind.is_file() {
        return because("it is not a regular file");
    }
    if meta.uid() != Uid::effective().as_raw() && meta.uid() != 0 {
        return because("it belongs to another user");
    }
    if meta.mode() & 0o002 != 0 {
        return because("everybody may write to it, run `chmod 600` on it");
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    Ok(())
}

fn too_large() -> Problem {
    Problem::Unsafe("it is larger than 1 MiB".into())
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
                Problem::Unsafe(reason) => assert!(reason.contains(word), "{reason}"),
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
        assert!(matches!(problem(&path), Problem::Unsafe(r) if r.contains("chmod 600")));
    }

    #[test]
    fn stops_at_a_mebibyte() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize]).expect("a file");
        assert!(read(&path).is_ok());
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize + 1]).expect("a file");
        assert!(matches!(problem(&path), Problem::Unsafe(r) if r.contains("1 MiB")));
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
