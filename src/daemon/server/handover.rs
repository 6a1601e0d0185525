//! Hands a sidecar's ports over to another process. A `run` that has joined a sidecar can take over its listening
//! sockets when the sidecar ends, and nobody else can.
//!
//! The programs of a run send secrets to ports that they learn at their start. If these ports became free between the
//! end of one sidecar and the start of the next, any other process could listen there, receive the secrets and answer.
//! So every `run` that joins a sidecar holds duplicates of its listening sockets, passed by SCM_RIGHTS: while any of
//! these processes lives, the ports stay bound, and connections wait in the backlog for the successor. The secret from
//! which the runs' secrets are derived goes with the sockets. The instance key does not: each process creates its own.
//!
//! The transfer uses a unix socket beside the instance's state file. The connection stays open: sockets opened later
//! follow on it, and its end means that the sidecar has ended.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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

use super::listener::BoundSockets;
use super::unix_socket::{SocketFile, may_connect};
use crate::instance::key::Key;

/// Most sockets in one message: both loopback addresses and the interception port.
const MAX_SOCKETS: usize = 3;
/// Longest secret, in bytes.
const MAX_SECRET: usize = 64;
/// Time for a sidecar to hand over its sockets.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The sidecar's side: the listening sockets that it shares, and the processes that hold duplicates of them. `None`
/// once the sidecar has ended.
pub struct SharedSockets(Mutex<Option<Shared>>);

struct Shared {
    secret: Key,
    sockets: Vec<OwnedFd>,
    holders: Vec<UnixStream>,
}

impl SharedSockets {
    /// Shares these sockets, together with the secret of runs.
    pub fn new<'a>(secret: Key, sockets: impl IntoIterator<Item = &'a TcpListener>) -> io::Result<Self> {
        let sockets = sockets.into_iter().map(|socket| socket.as_fd().try_clone_to_owned());
        let sockets = sockets.collect::<io::Result<_>>()?;
        Ok(Self(Mutex::new(Some(Shared { secret, sockets, holders: Vec::new() }))))
    }

    /// Shares another socket. All current holders have received it when this returns.
    pub fn add(&self, socket: &TcpListener) -> io::Result<()> {
        self.update(|shared| {
            let socket = socket.as_fd().try_clone_to_owned()?;
            // A holder that cannot be reached is dropped. If it still lives, it connects again.
            shared.holders.retain(|holder| send(holder, &shared.secret, &[socket.as_fd()]).is_ok());
            shared.sockets.push(socket);
            Ok(())
        })
        .unwrap_or(Ok(()))
    }

    /// Sends the sockets to each process of our user that connects. Never returns.
    pub async fn serve(&self, socket: &HandoverSocket) {
        loop {
            match socket.listener.accept().await {
                Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| may_connect(peer.uid())) => {
                    let _ = self.update(|shared| shared.add_holder(stream));
                }
                Ok(_) => {}
                Err(error) => {
                    debug!("could not accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Stops sharing. Disconnects all holders, which may take over from now on.
    pub fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn update<T>(&self, update: impl FnOnce(&mut Shared) -> T) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(update)
    }
}

impl Shared {
    fn add_holder(&mut self, holder: UnixStream) {
        self.holders.retain(|holder| !matches!(holder.try_read(&mut [0]), Ok(0)));
        let sockets: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        if send(&holder, &self.secret, &sockets).is_ok() {
            self.holders.push(holder);
        }
    }
}

/// The unix socket in the state directory on which sockets are handed over. Removed on drop.
pub struct HandoverSocket {
    _file: SocketFile,
    listener: UnixListener,
}

impl HandoverSocket {
    /// Binds the socket of the sidecar at `port` in a private directory. Replaces what a killed sidecar has left there.
    pub fn bind(dir: &Path, port: u16) -> io::Result<Self> {
        let path = dir.join(file_name(port));
        let temporary = format!(".{}.{}", std::process::id(), file_name(port));
        let _ = fs::remove_file(dir.join(&temporary));
        let (_dir, short) = short_path(dir)?;
        let listener = UnixListener::bind(short.join(&temporary))?;
        let temporary = dir.join(temporary);
        let file = SocketFile::new(&temporary, path.clone())?;
        fs::rename(&temporary, &path)?;
        Ok(Self { _file: file, listener })
    }
}

fn file_name(port: u16) -> String {
    format!("{port}.sock")
}

/// A path of the directory that is short enough for a socket address. It is valid while the returned file is open.
fn short_path(dir: &Path) -> io::Result<(File, PathBuf)> {
    let open = File::open(dir)?;
    let path = match cfg!(target_os = "linux") {
        true => format!("/proc/self/fd/{}", open.as_raw_fd()).into(),
        false => dir.to_owned(),
    };
    Ok((open, path))
}

/// The side of a `run`: duplicates of the listening sockets of the sidecar at `port`. The ports stay bound while this
/// lives.
pub struct HeldSockets {
    connection: UnixStream,
    port: u16,
    secret: Key,
    sockets: Vec<StdTcpListener>,
}

/// What a sidecar starts with, new or inherited from its predecessor.
pub struct Sockets {
    /// The plain HTTP sockets.
    pub bound: BoundSockets,
    /// The interception port, if there is one already.
    pub interception: Option<TcpListener>,
    /// The secret from which the secrets of runs are derived.
    pub secret: Key,
}

impl HeldSockets {
    /// Requests the sockets of the sidecar at `port` whose state file is in `dir`.
    pub async fn request(dir: &Path, port: u16) -> io::Result<Self> {
        let receiving = async {
            let (_dir, short) = short_path(dir)?;
            let connection = UnixStream::connect(short.join(file_name(port))).await?;
            let mut held = Self { connection, port, secret: Key::new(String::new()), sockets: Vec::new() };
            held.receive().await?;
            let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let has_port = held.sockets.iter().any(|socket| socket.local_addr().is_ok_and(|addr| addr == loopback));
            if has_port { Ok(held) } else { Err(io::Error::other("its socket was not handed over")) }
        };
        timeout(HANDOVER_TIMEOUT, receiving).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// Returns once the sidecar has ended. Cancel safe.
    pub async fn sidecar_ended(&mut self) {
        while self.receive().await.is_ok() {}
    }

    /// The sockets for a successor. They remain held here, too.
    pub fn inherit(&self) -> io::Result<Sockets> {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut inherited = Sockets {
            bound: BoundSockets { loopback, listeners: Vec::new(), without_ipv6: false },
            interception: None,
            secret: self.secret.clone(),
        };
        for socket in &self.sockets {
            let listener = TcpListener::from_std(socket.try_clone()?)?;
            match listener.local_addr()?.port() == self.port {
                true => inherited.bound.listeners.push(listener),
                false => inherited.interception = Some(listener),
            }
        }
        Ok(inherited)
    }

    async fn receive(&mut self) -> io::Result<()> {
        let connection = &self.connection;
        let (secret, sockets) = connection.async_io(Interest::READABLE, || receive(connection)).await?;
        self.secret = secret;
        self.sockets.extend(sockets.into_iter().map(StdTcpListener::from));
        Ok(())
    }
}

/// Sends one message with the secret and the sockets.
fn send(to: &UnixStream, secret: &Key, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(io::Error::other("too many sockets for one message"));
    }
    sendmsg(to, &[IoSlice::new(secret.text().as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(from: &UnixStream) -> io::Result<(Key, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut secret = [0; MAX_SECRET];
    #[cfg(target_os = "linux")]
    let flags = RecvFlags::CMSG_CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = RecvFlags::empty();
    // A message with descriptors is never merged with the next one.
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

    const TIMEOUT: Duration = Duration::from_secs(20);

    async fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.expect("a port")
    }

    fn port_of(listener: &TcpListener) -> u16 {
        listener.local_addr().expect("an address").port()
    }

    /// A directory whose path is too long for a socket address.
    fn deep_dir() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let below = dir.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&below).expect("directories");
        (dir, below)
    }

    #[tokio::test]
    async fn held_sockets_outlive_the_sidecar_and_are_freed_with_the_last_holder() {
        let (_dir, dir) = deep_dir();
        let (plain, intercepting) = (listener().await, listener().await);
        let (port, other) = (port_of(&plain), port_of(&intercepting));
        // The leftover of a killed sidecar.
        drop(std::os::unix::net::UnixListener::bind(short_path(&dir).expect("open").1.join(file_name(port))));
        let handover = HandoverSocket::bind(&dir, port).expect("a socket");
        let shared = SharedSockets::new(Key::new("secret".into()), [&plain]).expect("shared");
        let request = async || HeldSockets::request(&dir, port).await;
        let requests = async { [request().await.expect("one"), request().await.expect("another")] };
        let [mut first, second] = tokio::select! {
            () = shared.serve(&handover) => panic!("it never returns"),
            held = requests => held,
        };
        shared.add(&intercepting).expect("added");
        drop((plain, intercepting, handover));
        assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 0, "nothing is left behind");
        shared.close();
        timeout(TIMEOUT, first.sidecar_ended()).await.expect("it has ended");
        assert!(request().await.is_err(), "no sidecar is left to ask");
        let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        assert!(!free(port) && !free(other));

        let inherited = first.inherit().expect("inherited");
        assert_eq!((inherited.bound.listeners.len(), inherited.secret.text()), (1, "secret"));
        assert_eq!(inherited.bound.loopback, inherited.bound.listeners[0].local_addr().expect("an address"));
        assert_eq!(inherited.interception.as_ref().map(port_of), Some(other));
        let client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        let accepted =
            timeout(TIMEOUT, inherited.bound.listeners[0].accept()).await.expect("accepted").expect("accepted");
        assert_eq!(accepted.1, client.local_addr().expect("an address"));

        drop((first, inherited, accepted));
        assert!(!free(port), "the other one holds it");
        drop(second);
        assert!(free(port));
    }

    #[tokio::test]
    async fn a_handover_without_the_requested_port_is_refused() {
        let (_dir, dir) = deep_dir();
        let another = listener().await;
        let handover = HandoverSocket::bind(&dir, 1).expect("a socket");
        let shared = SharedSockets::new(Key::new("secret".into()), [&another]).expect("shared");
        let refused = tokio::select! {
            () = shared.serve(&handover) => panic!("it never returns"),
            held = HeldSockets::request(&dir, 1) => held.err(),
        };
        assert!(refused.expect("an error").to_string().contains("was not handed over"));
    }
}
