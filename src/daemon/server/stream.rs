//! Streams of client connections, and a wrapper that reports to [`Activity`] how writes go and notices when the client
//! disconnects while its request is being answered.

use std::io::{self, Cursor};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Chain, Join, ReadBuf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

use super::connections::Activity;
use crate::os::peer;

/// A byte stream on top of a socket.
pub trait Connection: AsyncRead + AsyncWrite + Unpin {
    /// The underlying socket.
    fn socket(&self) -> Socket<'_>;
}

/// A connected socket.
#[derive(Clone, Copy)]
pub enum Socket<'a> {
    /// A TCP socket.
    Tcp(&'a TcpStream),
    /// A unix socket.
    Unix(&'a UnixStream),
}

impl Connection for TcpStream {
    fn socket(&self) -> Socket<'_> {
        Socket::Tcp(self)
    }
}

impl Connection for UnixStream {
    fn socket(&self) -> Socket<'_> {
        Socket::Unix(self)
    }
}

impl<S: Connection> Connection for TlsStream<S> {
    fn socket(&self) -> Socket<'_> {
        self.get_ref().0.socket()
    }
}

/// A TCP connection preceded by bytes that were already read from it.
pub type PrefixedStream = Join<Chain<Cursor<Bytes>, OwnedReadHalf>, OwnedWriteHalf>;

impl Connection for PrefixedStream {
    fn socket(&self) -> Socket<'_> {
        Socket::Tcp(self.reader().get_ref().1.as_ref())
    }
}

/// Puts bytes that were already read back in front of the stream.
pub fn with_prefix(prefix: Bytes, stream: TcpStream) -> PrefixedStream {
    let (reader, writer) = stream.into_split();
    tokio::io::join(Cursor::new(prefix).chain(reader), writer)
}

/// The state of the client's side of a connection.
enum PeerState {
    Open,
    /// It has closed its sending side and may still read.
    HalfClosed,
    Gone,
}

impl Socket<'_> {
    /// Peer and local address of a TCP socket.
    pub(super) fn addresses(self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Tcp(stream) => Some((stream.peer_addr().ok()?, stream.local_addr().ok()?)),
            Self::Unix(_) => None,
        }
    }

    /// Makes closing discard unsent data and reset the connection.
    pub(super) fn reset_on_close(self) {
        if let Self::Tcp(stream) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    fn poll_read_ready(self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(cx),
            Self::Unix(stream) => stream.poll_read_ready(cx),
        }
    }

    fn peer_state(self) -> PeerState {
        // Resets and hang-ups are always reported, even if no event is requested.
        let mut polled = [PollFd::new(self.fd(), PollFlags::empty())];
        let events = poll(&mut polled, PollTimeout::ZERO).ok().and_then(|_| polled[0].revents());
        if events.is_some_and(|events| events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP)) {
            return PeerState::Gone;
        }
        match SockRef::from(&self.fd()).peek(&mut [MaybeUninit::uninit()]) {
            Ok(0) => PeerState::HalfClosed,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => PeerState::Gone,
            _ => PeerState::Open,
        }
    }

    /// Whether the client can no longer receive a response. After closing only its sending side it still can.
    fn is_peer_gone(self) -> bool {
        match self.peer_state() {
            PeerState::Open => false,
            PeerState::Gone => true,
            // A peer on another machine cannot be looked up, so it is assumed to be there.
            PeerState::HalfClosed => self.addresses().is_some_and(|(peer, local)| {
                peer.ip().to_canonical().is_loopback() && !peer::is_connected(peer, local)
            }),
        }
    }
}

/// A stream that records its writes in an [`Activity`], and fails once the client is gone.
pub(super) struct MonitoredStream<'a, S> {
    stream: S,
    activity: &'a Activity,
    is_write_blocked: bool,
}

impl<'a, S: Connection> MonitoredStream<'a, S> {
    pub(super) fn new(stream: S, activity: &'a Activity) -> Self {
        Self { stream, activity, is_write_blocked: false }
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }

    /// Whether the client disconnected while its request is being answered. With half-close allowed, the HTTP library
    /// does not check this itself.
    fn is_peer_gone(&self, cx: &mut Context<'_>) -> bool {
        if !self.activity.should_check_peer() {
            return false;
        }
        // Wakes this task once, on input or its end. Later checks are woken by `Connections::enforce_timeouts`.
        let socket = self.stream.socket();
        if socket.poll_read_ready(cx).is_pending() {
            return false;
        }
        self.activity.peer_checked();
        socket.is_peer_gone()
    }
}

impl<S: Connection> AsyncRead for MonitoredStream<'_, S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: Connection> AsyncWrite for MonitoredStream<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.activity.record_write(count);
        }
        // A pending write is retried with every poll, so only changes are recorded.
        if self.is_write_blocked != written.is_pending() {
            self.is_write_blocked = written.is_pending();
            self.activity.set_write_blocked(self.is_write_blocked);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_peer_gone(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
