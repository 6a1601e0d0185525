//! The signals that end long-running commands.

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::CommandError;
use crate::credential::ReloadHandle;

/// Serves until a signal arrives, then lets requests in flight finish. A second signal ends at once.
pub(super) async fn until_stopped<F>(
    mut stops: StopSignals,
    serve: impl FnOnce(Pin<Box<dyn Future<Output = ()>>>) -> F,
) -> ExitCode
where
    F: Future<Output = bool>,
{
    let mut first = stops.count.clone();
    let first = Box::pin(async move {
        let _ = first.wait_for(|count| *count >= 1).await;
    });
    tokio::select! {
        drained = serve(first) => if drained { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        _ = stops.count.wait_for(|count| *count >= 2) => ExitCode::FAILURE,
    }
}

/// Counts SIGINT and SIGTERM. SIGHUP reloads the env file, or counts too if there is none.
pub(super) struct StopSignals {
    count: watch::Receiver<u32>,
}

impl StopSignals {
    pub(super) fn listen(reloader: Option<ReloadHandle>) -> Result<Self, CommandError> {
        let listen = |kind| signal(kind).map_err(|e| CommandError::System("listen for signals", e));
        let (mut interrupt, mut terminate, mut hangup): (Signal, Signal, Signal) =
            (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
        let (counter, count) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => counter.send_modify(|count| *count += 1),
                    _ = terminate.recv() => counter.send_modify(|count| *count += 1),
                    _ = hangup.recv() => match &reloader {
                        Some(reloader) => reloader.reload().await,
                        None => counter.send_modify(|count| *count += 1),
                    },
                }
            }
        });
        Ok(Self { count })
    }
}

/// SIGINT and SIGTERM as events. They no longer end the process once this exists.
pub(super) struct Interruptions {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruptions {
    pub(super) fn listen() -> Result<Self, CommandError> {
        let listen = |kind| signal(kind).map_err(|e| CommandError::System("listen for signals", e));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// Returns when a signal arrives.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
