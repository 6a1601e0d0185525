//! The unix socket, bound in a private directory and removed with its listener.
//!
//! It replaces nothing but a stale socket of our own user, and is never bound in the abstract namespace, which has no
//! permissions (docs/security.md S1 to S3).

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};

use crate::os::private_dir;

/// Why the socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A process listens on it.
    #[error("a sidecar is already running there; end that, or choose another path")]
    InUse,
    /// The path has no file name.
    #[error("expected the path of a file")]
    NotAFile,
    /// The path is taken by something else.
    #[error("something is there that is not a socket of yours; move it away, or choose another path")]
    Occupied,
    /// The directory is not private.
    #[error("{}; a directory for the socket alone will do, which need not be there yet", .0.with_command())]
    Directory(#[source] private_dir::Problem),
    /// A system call failed.
    #[error("could not {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Whether a process listens on it could not be determined.
    #[error("could not find out whether somebody listens there: {0}; move it away")]
    Unclear(#[source] io::Error),
}

fn could_not(action: &'static str) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::System { action, source }
}

/// Whether a process of this user may connect: our own user and root may.
pub fn may_connect(uid: u32) -> bool {
    uid == Uid::effective().as_raw() || Uid::from_raw(uid).is_root()
}

/// A listening socket. Its file is removed on drop.
pub struct UnixSocket {
    // First, so that the file is removed while the listener is open: no other process can take it for a stale socket.
    _file: SocketFile,
    listener: UnixListener,
}

/// The file of a socket that listens. Removed on drop, unless another file has replaced it.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode, which no other file has while the listener is open.
    id: (u64, u64),
}

impl SocketFile {
    /// The socket at `bound`, which will be at `path`. Makes it private to our user.
    pub(super) fn new(bound: &Path, path: PathBuf) -> io::Result<Self> {
        fs::set_permissions(bound, Permissions::from_mode(0o600))?;
        let meta = fs::symlink_metadata(bound)?;
        Ok(Self { path, id: (meta.dev(), meta.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl UnixSocket {
    /// Creates the socket with mode 0600, and its directory with mode 0700 if it is missing. Fails if the directory is
    /// not private, or if `path` is anything but a stale socket of our own user.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let (Some(dir), Some(_)) = (path.parent(), path.file_name()) else { return Err(SocketError::NotAFile) };
        // Without the lock, two processes may find the same stale socket, and the second remove that of the first.
        let _lock = private_dir::lock(dir).await.map_err(SocketError::Directory)?;
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(could_not("bind it"))?;
        // Until then the mode may be wider, which the private directory makes harmless. A umask would affect all
        // threads.
        let file = SocketFile::new(path, path.to_owned()).map_err(could_not("close it to others"))?;
        Ok(Self { _file: file, listener })
    }

    /// Accepts the next connection.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

/// Removes a stale socket at `path`.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() && meta.uid() == Uid::effective().as_raw() => {}
        Ok(_) => return Err(SocketError::Occupied),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(could_not("read its metadata")(e)),
    }
    match try_connect(path) {
        Ok(()) => Err(SocketError::InUse),
        // A process listens, but its backlog is full.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(could_not("remove what a sidecar has left there"))
        }
        Err(e) => Err(SocketError::Unclear(e)),
    }
}

/// Connects without waiting for the listener to accept.
fn try_connect(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
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

    /// The socket file that a killed process leaves.
    fn leave_stale(path: &Path) {
        drop(std::os::unix::net::UnixListener::bind(path).expect("a socket"));
    }

    async fn bind_error(path: &Path) -> String {
        match UnixSocket::bind(path).await.err() {
            None | Some(SocketError::InUse) => panic!("{path:?}"),
            Some(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn socket_and_directory_are_private_and_the_socket_is_removed_on_drop() {
        let dir = private();
        let path = dir.path().join("new/newer/s");
        let socket = UnixSocket::bind(&path).await.expect("a socket");
        assert_eq!((mode(&dir.path().join("new")), mode(path.parent().expect("one"))), (0o700, 0o700));
        assert_eq!(mode(&path), 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = private();
        let path = dir.path().join("s");
        leave_stale(&path);
        let socket = UnixSocket::bind(&path).await.expect("a socket");
        assert!(matches!(UnixSocket::bind(&path).await, Err(SocketError::InUse)));
        drop(socket);
        assert!(!path.exists());

        // A listener that never accepts, with a full backlog.
        let busy = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        busy.bind(&SockAddr::unix(&path).expect("an address")).expect("bound");
        busy.listen(0).expect("listening");
        let connect = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
            socket.set_nonblocking(true).expect("a socket");
            socket.connect(&SockAddr::unix(&path).expect("an address")).map(|()| socket)
        };
        let waiting: Vec<_> = (0..8).map_while(|_| connect().ok()).collect();
        assert!(waiting.len() < 8);
        assert!(matches!(UnixSocket::bind(&path).await, Err(SocketError::InUse)));
    }

    #[tokio::test]
    async fn other_files_are_not_replaced() {
        let dir = private();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "").expect("written");
        fs::create_dir(at("directory")).expect("a directory");
        leave_stale(&at("stale"));
        symlink(at("stale"), at("link")).expect("a link");
        symlink(at("none"), at("dangling")).expect("a link");
        let _datagram = std::os::unix::net::UnixDatagram::bind(at("datagram")).expect("a socket");
        let mut names = vec!["file", "directory", "link", "dangling", "datagram"];
        if Uid::effective().is_root() {
            leave_stale(&at("foreign"));
            std::os::unix::fs::chown(at("foreign"), Some(65534), None).expect("given away");
            names.push("foreign");
        }
        for name in names {
            let reason = bind_error(&at(name)).await;
            assert!(reason.contains("move it away"), "{name}: {reason}");
            assert!(fs::symlink_metadata(at(name)).is_ok(), "{name}");
        }
        assert!(bind_error(&at(&"x".repeat(200))).await.contains("could not bind"));
        assert!(bind_error(Path::new("/")).await.contains("path of a file"));
        assert!(bind_error(&dir.path().join("..")).await.contains("path of a file"));
    }

    #[tokio::test]
    async fn a_directory_with_access_for_others_is_refused() {
        let dir = private();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("a mode");
        let reason = bind_error(&dir.path().join("s")).await;
        assert!(reason.contains("others have access") && reason.contains("a directory for the socket alone"));
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[tokio::test]
    async fn another_socket_at_the_same_path_is_not_removed() {
        let dir = private();
        let path = dir.path().join("s");
        let first = UnixSocket::bind(&path).await.expect("a socket");
        fs::remove_file(&path).expect("removed");
        let _second = UnixSocket::bind(&path).await.expect("a socket");
        drop(first);
        assert!(path.exists());
        assert!(try_connect(&path).is_ok());
    }

    #[test]
    fn only_our_user_and_root_may_connect() {
        let own = Uid::effective().as_raw();
        assert!(may_connect(own) && may_connect(0));
        assert!(!may_connect(own + 1) && !may_connect(65534 - u32::from(own == 65534)));
    }
}
