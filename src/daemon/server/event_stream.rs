//! The body of `GET /_sidecar/v1/events`: one event a line, for as long as the caller reads and the process lives.
//!
//! What happened before comes first and ends with an empty line; so does each quiet while, that a caller who is gone is
//! found out.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::unfold;
use http::StatusCode;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connections::Relaying;
use crate::events::{Event, Events, Subscription};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::{self, Reply, ReplyBody};

/// A stream is never idle and never late: without a limit, streams could take the places of all apps.
const MOST_LISTENERS: usize = 16;
/// Without an event for so long, an empty line shows that the connection lives.
const QUIET: Duration = Duration::from_secs(10);

/// What somebody listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// All that was and all that comes.
    Everything,
    /// What goes wrong from now on.
    Problems,
}

/// All that is to come.
struct Lines {
    past: Option<Vec<Arc<Event>>>,
    of: Of,
    listener: Subscription,
    _under_way: Relaying,
    _place: OwnedSemaphorePermit,
}

impl Lines {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(past) = self.past.take() {
            let mut lines: String = past.iter().map(|event| line(event)).collect();
            lines.push('\n');
            return Some(lines.into());
        }
        let next = async {
            loop {
                match self.listener.next().await {
                    Some(event) if self.of == Of::Problems && !event.is_problem() => {}
                    next => return next,
                }
            }
        };
        match tokio::time::timeout(QUIET, next).await {
            Ok(event) => event.map(|event| line(&event).into()),
            Err(_) => Some(Bytes::from_static(b"\n")),
        }
    }
}

fn line(event: &Event) -> String {
    // Plain strings and numbers can always be written.
    let mut line = serde_json::to_string(event).unwrap_or_default();
    line.push('\n');
    line
}

/// The places of those who listen.
pub(super) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MOST_LISTENERS))
}

/// The reply. `under_way` is held until nobody reads it any more.
pub(super) fn reply(
    events: &Events,
    of: Of,
    places: &Arc<Semaphore>,
    under_way: Relaying,
) -> Result<Reply, RequestError> {
    let Ok(place) = places.clone().try_acquire_owned() else {
        let message = format!("{MOST_LISTENERS} listen to events already. End one of them.");
        let mut error = RequestError::new(Code::Overloaded, message).hint("close a status page or end a `logs -f`");
        error.retry_after = Some(reply::retry_after(QUIET));
        return Err(error);
    };
    let (past, listener) = match of {
        Of::Everything => events.subscribe(),
        Of::Problems => (Vec::new(), events.subscribe_without_hits()),
    };
    let lines = Lines { past: Some(past), of, listener, _under_way: under_way, _place: place };
    let frames = unfold(lines, async |mut lines| {
        let bytes = lines.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), lines))
    });
    let body = StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync();
    Ok(reply::own(StatusCode::OK, "application/x-ndjson", Bytes::new()).map(|_| ReplyBody::Right(body)))
}
