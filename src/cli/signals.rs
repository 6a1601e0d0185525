//! The signals that end a command which would go on by itself.

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::CommandError;
use crate::credential::ReloadHandle;

/// Serves until a signal, then lets it drain; a second signal ends at once.
pub(super) async fn until_stopped<F>(
    mut stops: Stops,
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

/// SIGINT and SIGTERM, counted; SIGHUP reads the env file again, or is one of them where there is none.
pub(super) struct Stops {
    count: watch::Receiver<u32>,
}

impl Stops {
    pub(super) fn listen(reloader: Option<ReloadHandle>) -> Result<Self, CommandError> {
        let on = |kind| signal(kind).map_err(|e| CommandError::System("listen for signals", e));
        let (mut interrupt, mut terminate, mut hangup): (Signal, Signal, Signal) =
            (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?);
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

/// The signals that ask a command to end which would go on by itself. They do not end it any more once this is there.
pub(super) struct Interruptions {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruptions {
    pub(super) fn listen() -> Result<Self, CommandError> {
        let on = |kind| signal(kind).map_err(|e| CommandError::System("listen for signals", e));
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    /// Returns when one has come.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
