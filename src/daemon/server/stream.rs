//! A connection's bytes, and word of how it goes: whether the caller takes what is written to it, and whether it is still
//! there while its request is answered.
//!
//! Passes everything on as it is.

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

use super::connections::Place;
use crate::os::peer;

/// A stream of bytes above a socket.
pub trait Connection: AsyncRead + AsyncWrite + Unpin {
    /// The socket.
    fn socket(&self) -> Socket<'_>;
}

/// A connected socket.
#[derive(Clone, Copy)]
pub enum Socket<'a> {
    /// One of TCP.
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

/// A connection of which somebody else has read the first bytes.
pub type Resumed = Join<Chain<Cursor<Bytes>, OwnedReadHalf>, OwnedWriteHalf>;

impl Connection for Resumed {
    fn socket(&self) -> Socket<'_> {
        Socket::Tcp(self.reader().get_ref().1.as_ref())
    }
}

/// The connection with the bytes that were read of it.
pub fn resumed(read: Bytes, stream: TcpStream) -> Resumed {
    let (reader, writer) = stream.into_split();
    tokio::io::join(Cursor::new(read).chain(reader), writer)
}

/// What has become of the other end.
enum OtherEnd {
    Open,
    /// It sends nothing more. Whether it still reads is another question.
    Closed,
    Gone,
}

impl Socket<'_> {
    /// The other end and ours, of TCP.
    pub(super) fn ends(self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Tcp(stream) => Some((stream.peer_addr().ok()?, stream.local_addr().ok()?)),
            Self::Unix(_) => None,
        }
    }

    /// Gives up what is not sent yet when it is closed: nobody takes it.
    pub(super) fn abort(self) {
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

    fn other_end(self) -> OtherEnd {
        // That it was reset, or that a unix socket was closed for good, shows without being asked for.
        let mut asked = [PollFd::new(self.fd(), PollFlags::empty())];
        let found = poll(&mut asked, PollTimeout::ZERO).ok().and_then(|_| asked[0].revents());
        if found.is_some_and(|found| found.intersects(PollFlags::POLLERR | PollFlags::POLLHUP)) {
            return OtherEnd::Gone;
        }
        match SockRef::from(&self.fd()).peek(&mut [MaybeUninit::uninit()]) {
            Ok(0) => OtherEnd::Closed,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => OtherEnd::Gone,
            _ => OtherEnd::Open,
        }
    }

    /// Whether nobody is there to take an answer. One who has closed its half still is.
    fn is_left(self) -> bool {
        match self.other_end() {
            OtherEnd::Open => false,
            OtherEnd::Gone => true,
            // Of whom this machine knows nothing is taken to be there.
            OtherEnd::Closed => self.ends().is_some_and(|(peer, local)| {
                peer.ip().to_canonical().is_loopback() && !peer::is_connected(peer, local)
            }),
        }
    }
}

/// A stream that tells its connection's place how writing goes.
pub(super) struct Observed<'a, S> {
    stream: S,
    place: &'a Place,
    is_stalled: bool,
}

impl<'a, S: Connection> Observed<'a, S> {
    pub(super) fn new(stream: S, place: &'a Place) -> Self {
        Self { stream, place, is_stalled: false }
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }

    /// Whether the caller has left while its request is answered. The HTTP library does not look then, so that a caller
    /// may close its half.
    fn is_left(&self, cx: &mut Context<'_>) -> bool {
        if !self.place.is_to_be_asked_after() {
            return false;
        }
        // Until more bytes come, or their end. After that nothing wakes us any more, but a look at all connections.
        let socket = self.stream.socket();
        if socket.poll_read_ready(cx).is_pending() {
            return false;
        }
        self.place.asked_after();
        socket.is_left()
    }
}

impl<S: Connection> AsyncRead for Observed<'_, S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: Connection> AsyncWrite for Observed<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.place.written(count);
        }
        // A write that waits is tried again with every poll: only the first time counts.
        if self.is_stalled != written.is_pending() {
            self.is_stalled = written.is_pending();
            self.place.stalled(self.is_stalled);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_left(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
