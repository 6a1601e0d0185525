//! A sidecar's place: its ports, and the secret that its runs' secrets are made from. A command of `run` can take it when
//! the sidecar has ended, and nobody else can.
//!
//! What such a command starts sends its secrets to ports that it was told of at the start. Whoever listened there between
//! the end of one sidecar and the start of the next would get them, and could answer. So a command that joins a sidecar
//! holds duplicates of its listening sockets: as long as one of these processes is left, the ports are not free, and what
//! is sent meanwhile waits for who takes the place. The secret goes with the sockets, and ends with the last that could
//! take the place. The instance key stays behind: each process makes one of its own.
//!
//! All this is handed over on a unix socket beside the instance's state file. The connection stays: further sockets follow
//! on it, and its end is the sidecar's.

use std::fs::{self, File, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::debug;

use super::listener::Bound;
use super::unix_socket::may_connect;
use crate::instance::key::Key;

/// As many sockets are handed over at the most: both loopback addresses, and where runs are intercepted.
const MOST_SOCKETS: usize = 3;
/// The longest secret, in bytes.
const MAX_SECRET: usize = 64;
/// Whoever does not hand its place over by then has none.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A sidecar's side: the place, and those who hold it, too. Empty once the sidecar ends.
pub struct Offer(Mutex<Option<Offered>>);

struct Offered {
    secret: Key,
    sockets: Vec<OwnedFd>,
    holders: Vec<UnixStream>,
}

impl Offer {
    /// Of these sockets.
    pub fn new<'a>(secret: Key, sockets: impl IntoIterator<Item = &'a TcpListener>) -> io::Result<Self> {
        let sockets = sockets.into_iter().map(|socket| socket.as_fd().try_clone_to_owned());
        let sockets = sockets.collect::<io::Result<_>>()?;
        Ok(Self(Mutex::new(Some(Offered { secret, sockets, holders: Vec::new() }))))
    }

    /// Another socket is part of the place from now on. All that hold the place have it when this returns.
    pub fn add(&self, socket: &TcpListener) -> io::Result<()> {
        self.change(|offered| {
            let socket = socket.as_fd().try_clone_to_owned()?;
            // Who has gone needs none, and who is dropped asks again.
            offered.holders.retain(|holder| send(holder, &offered.secret, &[socket.as_fd()]).is_ok());
            offered.sockets.push(socket);
            Ok(())
        })
        .unwrap_or(Ok(()))
    }

    /// Hands the place to those who come to the door, for as long as it is polled.
    pub async fn hand_out(&self, door: &Door) {
        loop {
            match door.listener.accept().await {
                Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| may_connect(peer.uid())) => {
                    let _ = self.change(|offered| offered.admit(stream));
                }
                Ok(_) => {}
                Err(error) => {
                    debug!("could not accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Tells all that hold the place that it may be taken.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn change<T>(&self, change: impl FnOnce(&mut Offered) -> T) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(change)
    }
}

impl Offered {
    fn admit(&mut self, holder: UnixStream) {
        self.holders.retain(|holder| !matches!(holder.try_read(&mut [0]), Ok(0)));
        let sockets: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        if send(&holder, &self.secret, &sockets).is_ok() {
            self.holders.push(holder);
        }
    }
}

/// Where a place is handed out: a socket in the state directory, there as long as this lives.
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode. While it listens, no other file has the same.
    id: (u64, u64),
}

impl Door {
    /// Opens the door of the sidecar at `port`, in a directory that is ours alone; what one that was killed has left is
    /// replaced.
    pub fn open(dir: &Path, port: u16) -> io::Result<Self> {
        let path = dir.join(name(port));
        let made = format!(".{}.{}", std::process::id(), name(port));
        let _ = fs::remove_file(dir.join(&made));
        let (_open, short) = short(dir)?;
        let listener = UnixListener::bind(short.join(&made))?;
        let made = dir.join(made);
        fs::set_permissions(&made, Permissions::from_mode(0o600))?;
        let meta = fs::symlink_metadata(&made)?;
        fs::rename(&made, &path)?;
        Ok(Self { listener, path, id: (meta.dev(), meta.ino()) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn name(port: u16) -> String {
    format!("{port}.sock")
}

/// A path of the directory that is short enough for that of a socket, good for as long as it is open.
fn short(dir: &Path) -> io::Result<(File, PathBuf)> {
    let open = File::open(dir)?;
    let path = match cfg!(target_os = "linux") {
        true => format!("/proc/self/fd/{}", open.as_raw_fd()).into(),
        false => dir.to_owned(),
    };
    Ok((open, path))
}

/// A command's side: the place of the sidecar at `port`, which nobody else gets as long as this lives.
pub struct Place {
    connection: UnixStream,
    port: u16,
    secret: Key,
    sockets: Vec<StdTcpListener>,
}

/// What a sidecar starts from that takes a place.
pub struct Taken {
    /// Its sockets.
    pub bound: Bound,
    /// Where its runs are intercepted, if any is.
    pub interception: Option<TcpListener>,
    /// What its runs' secrets are made from.
    pub secret: Key,
}

impl Place {
    /// That of the sidecar at `port` whose state file is in this directory.
    pub async fn of(dir: &Path, port: u16) -> io::Result<Self> {
        let taking = async {
            let (_open, short) = short(dir)?;
            let connection = UnixStream::connect(short.join(name(port))).await?;
            let mut place = Self { connection, port, secret: Key::new(String::new()), sockets: Vec::new() };
            place.receive().await?;
            let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let has_it = place.sockets.iter().any(|socket| socket.local_addr().is_ok_and(|addr| addr == loopback));
            if has_it { Ok(place) } else { Err(io::Error::other("its socket was not handed over")) }
        };
        timeout(PATIENCE, taking).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// Returns once its sidecar has ended. Cancel safe.
    pub async fn left(&mut self) {
        while self.receive().await.is_ok() {}
    }

    /// What a sidecar needs to take it. It stays held besides.
    pub fn take(&self) -> io::Result<Taken> {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut taken = Taken {
            bound: Bound { loopback, listeners: Vec::new(), without_ipv6: false },
            interception: None,
            secret: self.secret.clone(),
        };
        for socket in &self.sockets {
            let listener = TcpListener::from_std(socket.try_clone()?)?;
            match listener.local_addr()?.port() == self.port {
                true => taken.bound.listeners.push(listener),
                false => taken.interception = Some(listener),
            }
        }
        Ok(taken)
    }

    async fn receive(&mut self) -> io::Result<()> {
        let connection = &self.connection;
        let (secret, sockets) = connection.async_io(Interest::READABLE, || receive(connection)).await?;
        self.secret = secret;
        self.sockets.extend(sockets.into_iter().map(StdTcpListener::from));
        Ok(())
    }
}

/// One message: the secret, and sockets.
fn send(to: &UnixStream, secret: &Key, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(io::Error::other("more sockets than a place has"));
    }
    sendmsg(to, &[IoSlice::new(secret.text().as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(from: &UnixStream) -> io::Result<(Key, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut secret = [0; MAX_SECRET];
    #[cfg(target_os = "linux")]
    let flags = RecvFlags::CMSG_CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = RecvFlags::empty();
    // Sockets keep messages apart.
    let bytes = recvmsg(from, &mut [IoSliceMut::new(&mut secret)], &mut ancillary, flags)?.bytes;
    let mut sockets = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            sockets.extend(received);
        }
    }
    #[cfg(not(target_os = "linux"))]
    for socket in &sockets {
        rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC)?;
    }
    match std::str::from_utf8(&secret[..bytes]) {
        Ok(secret) if !secret.is_empty() => Ok((Key::new(secret.to_owned()), sockets)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.expect("a port")
    }

    fn port_of(listener: &TcpListener) -> u16 {
        listener.local_addr().expect("an address").port()
    }

    /// A directory whose path is longer than a socket's may be.
    fn deep() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let below = dir.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&below).expect("directories");
        (dir, below)
    }

    #[tokio::test]
    async fn a_place_outlives_its_sidecar_with_all_that_became_part_of_it_and_ends_with_the_last_holder() {
        let (_dir, dir) = deep();
        let (plain, intercepting) = (listener().await, listener().await);
        let (port, other) = (port_of(&plain), port_of(&intercepting));
        // What one that was killed has left.
        drop(std::os::unix::net::UnixListener::bind(short(&dir).expect("open").1.join(name(port))));
        let door = Door::open(&dir, port).expect("a door");
        let offer = Offer::new(Key::new("secret".into()), [&plain]).expect("an offer");
        let places =
            async { [Place::of(&dir, port).await.expect("one"), Place::of(&dir, port).await.expect("another")] };
        let [mut first, second] = tokio::select! {
            () = offer.hand_out(&door) => panic!("it goes on"),
            places = places => places,
        };
        offer.add(&intercepting).expect("added");
        drop((plain, intercepting, door));
        assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 0, "nothing stays");
        offer.end();
        timeout(PATIENCE, first.left()).await.expect("it has ended");
        assert!(Place::of(&dir, port).await.is_err(), "no sidecar, no place");
        let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        assert!(!free(port) && !free(other));

        let taken = first.take().expect("taken");
        assert_eq!((taken.bound.listeners.len(), taken.secret.text()), (1, "secret"));
        assert_eq!(taken.bound.loopback, taken.bound.listeners[0].local_addr().expect("an address"));
        assert_eq!(taken.interception.as_ref().map(port_of), Some(other));
        let caller = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        let accepted = timeout(PATIENCE, taken.bound.listeners[0].accept()).await.expect("accepted").expect("accepted");
        assert_eq!(accepted.1, caller.local_addr().expect("an address"));

        drop((first, taken, accepted));
        assert!(!free(port), "the other one holds it");
        drop(second);
        assert!(free(port));
    }

    #[tokio::test]
    async fn a_place_without_the_socket_that_commands_are_told_of_is_none() {
        let (_dir, dir) = deep();
        let another = listener().await;
        let door = Door::open(&dir, 1).expect("a door");
        let offer = Offer::new(Key::new("secret".into()), [&another]).expect("an offer");
        let refused = tokio::select! {
            () = offer.hand_out(&door) => panic!("it goes on"),
            place = Place::of(&dir, 1) => place.err(),
        };
        assert!(refused.expect("an error").to_string().contains("was not handed over"));
    }
}
