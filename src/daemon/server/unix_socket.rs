//! The unix socket: bound in a directory that nobody else can enter, and removed with its listener.
//!
//! It never takes the place of anything but a socket that one of our own processes has left behind, and is never bound
//! in the abstract namespace, where no permission holds (docs/security.md S1 to S3).

use std::fmt;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};

use crate::os::private_dir;

/// Why there is no socket.
#[derive(Debug)]
pub enum Problem {
    /// Somebody answers on it.
    InUse,
    /// It could not be made, or not safely: what is wrong and what to do.
    Unfit(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse => f.write_str("a sidecar is already running there; end that, or choose another path"),
            Self::Unfit(reason) => f.write_str(reason),
        }
    }
}

fn unfit<T>(reason: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Unfit(reason.into()))
}

/// Whether a process of this user may connect.
pub fn may_connect(uid: u32) -> bool {
    uid == Uid::effective().as_raw() || Uid::from_raw(uid).is_root()
}

/// A socket that listens, there as long as this lives.
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode. The listener holds on to them: while it lives, no other file has the same.
    id: (u64, u64),
}

impl UnixSocket {
    /// Makes the socket at `path`, and its directory if that is not there. Mode 0600 in 0700. Fails where the directory
    /// is not ours alone, and where anything is at `path` but a socket of ours on which nobody listens any more.
    pub async fn bind(path: &Path) -> Result<Self, Problem> {
        let (Some(dir), Some(_)) = (path.parent(), path.file_name()) else {
            return unfit("expected the path of a file");
        };
        // Of two that find the same stale socket, the second would remove the one that the first has just made.
        let _only_us = private_dir::lock(dir).await.or_else(|problem| {
            let reason = problem.with_command();
            unfit(format!("{reason}; a directory for the socket alone will do, which need not be there yet"))
        })?;
        remove_stale(path)?;
        let listener = UnixListener::bind(path).or_else(|e| unfit(format!("could not bind it: {e}")))?;
        // Between the two lines it may have a wider mode. Nobody can make use of that: its directory is closed to
        // others. To change the process's umask instead would change it under all other threads.
        let mode = fs::set_permissions(path, Permissions::from_mode(0o600));
        match mode.and_then(|()| fs::symlink_metadata(path)) {
            Ok(meta) => Ok(Self { listener, path: path.to_owned(), id: (meta.dev(), meta.ino()) }),
            Err(e) => unfit(format!("could not close it to others: {e}")),
        }
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for UnixSocket {
    /// While the listener is open still, so that no other start can have taken the socket for a stale one.
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes room at `path`, if that may be done.
fn remove_stale(path: &Path) -> Result<(), Problem> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() && meta.uid() == Uid::effective().as_raw() => {}
        Ok(_) => {
            return unfit("something is there that is not a socket of yours; move it away, or choose another path");
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return unfit(format!("could not look at it: {e}")),
    }
    match try_connect(path) {
        Ok(()) => Err(Problem::InUse),
        // Somebody listens and is too busy to accept.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Problem::InUse),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).or_else(|e| unfit(format!("could not remove what a sidecar has left there: {e}")))
        }
        Err(e) => unfit(format!("could not find out whether somebody listens there: {e}; move it away")),
    }
}

/// Without waiting for whoever listens.
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

    /// What a killed process leaves behind.
    fn leave_stale(path: &Path) {
        drop(std::os::unix::net::UnixListener::bind(path).expect("a socket"));
    }

    async fn unfit_at(path: &Path) -> String {
        match UnixSocket::bind(path).await.err() {
            Some(Problem::Unfit(reason)) => reason,
            other => panic!("{path:?}: {other:?}"),
        }
    }

    #[tokio::test]
    async fn its_directory_is_made_and_both_are_closed_to_others_and_it_goes_with_its_listener() {
        let dir = private();
        let path = dir.path().join("new/newer/s");
        let socket = UnixSocket::bind(&path).await.expect("a socket");
        assert_eq!((mode(&dir.path().join("new")), mode(path.parent().expect("one"))), (0o700, 0o700));
        assert_eq!(mode(&path), 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn one_on_which_somebody_listens_is_left_alone_and_a_stale_one_replaced() {
        let dir = private();
        let path = dir.path().join("s");
        leave_stale(&path);
        let socket = UnixSocket::bind(&path).await.expect("a socket");
        assert!(matches!(UnixSocket::bind(&path).await, Err(Problem::InUse)));
        drop(socket);
        assert!(!path.exists());

        // Nobody accepts, and there is no more room to wait.
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
        assert!(matches!(UnixSocket::bind(&path).await, Err(Problem::InUse)));
    }

    #[tokio::test]
    async fn nothing_else_is_replaced() {
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
            let reason = unfit_at(&at(name)).await;
            assert!(reason.contains("move it away"), "{name}: {reason}");
            assert!(fs::symlink_metadata(at(name)).is_ok(), "{name}");
        }
        assert!(unfit_at(&at(&"x".repeat(200))).await.contains("could not bind"));
        assert!(unfit_at(Path::new("/")).await.contains("path of a file"));
        assert!(unfit_at(&dir.path().join("..")).await.contains("path of a file"));
    }

    #[tokio::test]
    async fn a_directory_that_is_not_ours_alone_is_refused() {
        let dir = private();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("a mode");
        let reason = unfit_at(&dir.path().join("s")).await;
        assert!(reason.contains("others have access") && reason.contains("a directory for the socket alone"));
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[tokio::test]
    async fn what_has_taken_its_place_is_not_removed() {
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
    fn only_we_and_root_may_connect() {
        let ours = Uid::effective().as_raw();
        assert!(may_connect(ours) && may_connect(0));
        assert!(!may_connect(ours + 1) && !may_connect(65534 - u32::from(ours == 65534)));
    }
}
