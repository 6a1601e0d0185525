//! The response body of `GET /_sidecar/v1/events`: one JSON event per line, until the client disconnects or the process
//! ends.
//!
//! Past events come first and end with an empty line. Further empty lines are heartbeats, which also reveal clients
//! that are gone.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::unfold;
use http::StatusCode;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connections::RelayGuard;
use crate::events::{Event, Events, Subscription};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::{self, Reply, ReplyBody};

/// Streams are never idle and have no timeout, so without a limit they could use up all connections.
pub(super) const MAX_STREAMS: usize = 16;
/// Time without events after which an empty line is sent.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);

/// Which events a stream contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filter {
    /// Recent and future events.
    All,
    /// Future events that report a problem.
    Problems,
}

/// The lines of one stream.
struct EventLines {
    past: Option<Vec<Arc<Event>>>,
    filter: Filter,
    listener: Subscription,
    _relay: RelayGuard,
    _permit: OwnedSemaphorePermit,
}

impl EventLines {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(past) = self.past.take() {
            let mut lines: String = past.iter().map(|event| line(event)).collect();
            lines.push('\n');
            return Some(lines.into());
        }
        let next = async {
            loop {
                match self.listener.next().await {
                    Some(event) if self.filter == Filter::Problems && !event.is_problem() => {}
                    next => return next,
                }
            }
        };
        match tokio::time::timeout(HEARTBEAT_INTERVAL, next).await {
            Ok(event) => event.map(|event| line(&event).into()),
            Err(_) => Some(Bytes::from_static(b"\n")),
        }
    }
}

fn line(event: &Event) -> String {
    // Strings and numbers always serialize.
    let mut line = serde_json::to_string(event).unwrap_or_default();
    line.push('\n');
    line
}

/// The response. `relay` is held until the stream ends.
pub(super) fn reply(
    events: &Events,
    filter: Filter,
    permits: &Arc<Semaphore>,
    relay: RelayGuard,
) -> Result<Reply, RequestError> {
    let Ok(permit) = permits.clone().try_acquire_owned() else {
        let message = format!("{MAX_STREAMS} event streams are open already. Close one of them.");
        let mut error = RequestError::new(Code::Overloaded, message).hint("close a status page or end a `logs -f`");
        error.retry_after = Some(reply::retry_after(HEARTBEAT_INTERVAL));
        return Err(error);
    };
    let (past, listener) = match filter {
        Filter::All => events.subscribe(),
        Filter::Problems => (Vec::new(), events.subscribe_without_hits()),
    };
    let lines = EventLines { past: Some(past), filter, listener, _relay: relay, _permit: permit };
    let frames = unfold(lines, async |mut lines| {
        let bytes = lines.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), lines))
    });
    let body = StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync();
    Ok(reply::own(StatusCode::OK, "application/x-ndjson", Bytes::new()).map(|_| ReplyBody::Right(body)))
}
