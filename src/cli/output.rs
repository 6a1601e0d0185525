//! Writes to stdout, which may be slow or closed early.

use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncWriteExt;

use super::CommandError;

/// Whether somebody still reads stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// Yes.
    Reads,
    /// No, the other end was closed.
    Gone,
}

/// Whether somebody reads stdout, as far as can be told without writing.
pub(super) fn reader() -> Reader {
    let stdout = io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    match polled[0].revents() {
        Some(events) if events.contains(PollFlags::POLLERR) => Reader::Gone,
        _ => Reader::Reads,
    }
}

/// Writes to stdout without blocking other tasks.
pub(super) async fn print(text: impl AsRef<[u8]>) -> Result<Reader, CommandError> {
    let mut stdout = tokio::io::stdout();
    let written = async {
        stdout.write_all(text.as_ref()).await?;
        stdout.flush().await
    };
    match written.await {
        Ok(()) => Ok(Reader::Reads),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(e) => Err(CommandError::System("print the answer", e)),
    }
}

/// Prints the line that says where a server listens. Ignores a closed stdout.
pub(super) fn print_ready(server: &str, url: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{server} listening on {url}").and_then(|()| stdout.flush());
}
