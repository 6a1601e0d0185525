//! stdout of a command, which may be closed early or be slow.

use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncWriteExt;

use super::CommandError;

/// Whether stdout is still read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// It is.
    Reads,
    /// Nobody will see more.
    Gone,
}

/// Whether anybody reads stdout, as far as can be told without writing.
pub(super) fn reader() -> Reader {
    let stdout = io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    match polled[0].revents() {
        Some(events) if events.contains(PollFlags::POLLERR) => Reader::Gone,
        _ => Reader::Reads,
    }
}

/// Writes to stdout. Where that is full, only this waits.
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

/// The one line on stdout. A closed stdout is no reason to stop.
pub(super) fn say_ready(what: &str, url: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{what} listening on {url}").and_then(|()| stdout.flush());
}
