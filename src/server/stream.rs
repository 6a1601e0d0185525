//! A connection's bytes, and word of how they go out: whether the caller takes what is written to it.
//!
//! Passes everything on as it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connections::Place;

/// A stream that tells its connection's place how writing goes.
pub(super) struct Observed<'a, S> {
    stream: S,
    place: &'a Place,
    is_stalled: bool,
}

impl<'a, S> Observed<'a, S> {
    pub(super) fn new(stream: S, place: &'a Place) -> Self {
        Self { stream, place, is_stalled: false }
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Observed<'_, S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Observed<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if written.is_ready() {
            self.place.written();
        }
        // A write that waits is tried again with every poll: only the first time counts.
        if self.is_stalled != written.is_pending() {
            self.is_stalled = written.is_pending();
            self.place.stalled(self.is_stalled);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
