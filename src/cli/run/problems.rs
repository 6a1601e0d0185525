//! What goes wrong in a sidecar that `run` joined, said in the terminal of the command: its log is in another.
//!
//! The requests of one command cannot be told from those of others, so it is all that goes wrong, each thing once.

use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;

use tracing::{Level, error, warn};

use crate::events::line::EventLine;
use crate::instance::client::{Client, EventLines};

/// So many are remembered as said; then all may be said anew.
const REMEMBERED: usize = 256;
/// What is told of before a command ends is here by then.
const ON_ITS_WAY: Duration = Duration::from_millis(200);

/// What goes wrong from its making on.
pub(super) struct Problems {
    sidecar: Client,
    /// `None` once there is nothing more to hear.
    lines: Option<EventLines>,
    said: HashSet<(String, Option<String>)>,
    /// Requests that had failed before.
    failures: Option<u64>,
}

impl Problems {
    /// Listens. A sidecar of another version tells nothing, and one that too many listen to: commands run without.
    pub(super) async fn of(sidecar: Client) -> Self {
        let lines = sidecar.problems().await.ok();
        let failures = count(&sidecar).await;
        Self { sidecar, lines, said: HashSet::new(), failures }
    }

    /// Says it for as long as it is polled. Cancel safe.
    pub(super) async fn say(&mut self) -> Infallible {
        while let Some(lines) = &mut self.lines {
            match lines.next().await {
                Some(line) => self.say_once(&line),
                None => self.lines = None,
            }
        }
        std::future::pending().await
    }

    /// Says what has gone wrong and was not heard yet.
    pub(super) async fn say_the_rest(&mut self) {
        if self.lines.is_some() && count(&self.sidecar).await > self.failures {
            let _ = tokio::time::timeout(ON_ITS_WAY, self.say()).await;
        }
    }

    fn say_once(&mut self, line: &[u8]) {
        let Some(EventLine { level, message, code, status, remedy, .. }) = EventLine::read(line) else { return };
        if self.said.len() == REMEMBERED {
            self.said.clear();
        }
        if !self.said.insert((message.clone(), code.clone())) {
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

async fn count(sidecar: &Client) -> Option<u64> {
    sidecar.status().await.ok().map(|state| state.failures.count)
}
