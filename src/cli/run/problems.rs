//! Prints the problems of a sidecar that `run` joined, since that sidecar's log is in another terminal.
//!
//! The requests of one command cannot be told from those of others, so all problems are printed, each once.

use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;

use tracing::{Level, error, warn};

use crate::events::line::EventLine;
use crate::instance::client::{Client, EventLines};

/// How many printed problems are remembered. When the limit is reached, all may be printed again.
const MAX_REPORTED: usize = 256;
/// How long to wait, after the command has ended, for problems that occurred before.
const PENDING_LIMIT: Duration = Duration::from_millis(200);

/// Prints the problems that occur after it is created.
pub(super) struct ProblemReporter {
    sidecar: Client,
    /// `None` once the stream has ended.
    lines: Option<EventLines>,
    reported: HashSet<(String, Option<String>)>,
    /// The number of failed requests at the start.
    failures: Option<u64>,
}

impl ProblemReporter {
    /// Subscribes to the sidecar's problems. If that fails (another version, too many subscribers), none are printed.
    pub(super) async fn subscribe(sidecar: Client) -> Self {
        let lines = sidecar.problems().await.ok();
        let failures = failure_count(&sidecar).await;
        Self { sidecar, lines, reported: HashSet::new(), failures }
    }

    /// Prints problems for as long as it is polled. Cancel safe.
    pub(super) async fn report(&mut self) -> Infallible {
        while let Some(lines) = &mut self.lines {
            match lines.next().await {
                Some(line) => self.report_once(&line),
                None => self.lines = None,
            }
        }
        std::future::pending().await
    }

    /// Prints problems that have occurred but have not arrived yet.
    pub(super) async fn report_pending(&mut self) {
        if self.lines.is_some() && failure_count(&self.sidecar).await > self.failures {
            let _ = tokio::time::timeout(PENDING_LIMIT, self.report()).await;
        }
    }

    fn report_once(&mut self, line: &[u8]) {
        let Some(EventLine { level, message, code, status, remedy, .. }) = EventLine::read(line) else { return };
        if self.reported.len() == MAX_REPORTED {
            self.reported.clear();
        }
        if !self.reported.insert((message.clone(), code.clone())) {
            return;
        }
        let hint = remedy.as_ref().map(|remedy| &*remedy.hint);
        let command = remedy.as_ref().and_then(|remedy| remedy.command.as_deref());
        match level {
            Level::ERROR => error!(code, status, hint, command, "{message}"),
            _ => warn!(code, status, hint, command, "{message}"),
        }
    }
}

async fn failure_count(sidecar: &Client) -> Option<u64> {
    sidecar.status().await.ok().map(|status| status.failures.count)
}
