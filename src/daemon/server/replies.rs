//! Responses and errors that do not belong to a single path.

use std::time::Duration;

use http::StatusCode;
use http::header::{self, HeaderMap, HeaderValue};

use crate::os::peer::Peer;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::{self, Reply};

/// A response with a JSON body.
pub(super) fn json(body: impl Into<bytes::Bytes>) -> Reply {
    reply::own(StatusCode::OK, "application/json", body)
}

/// Refuses clients of other users.
pub(super) fn check_peer(peer: Peer) -> Result<(), RequestError> {
    if peer.may_ask() {
        return Ok(());
    }
    let message = match peer {
        Peer::Unknown => {
            "The system does not say whose connection this is. Ask from this machine itself, or use --unix-socket."
        }
        _ => "This sidecar answers the user that started it, and no other user of this machine.",
    };
    Err(RequestError::new(Code::PeerUidMismatch, message).closing())
}

/// The error for a request that took too long.
pub(super) fn timed_out() -> RequestError {
    RequestError::new(Code::UpstreamTimeout, "The request was not answered within 60 s.").hint("try again").closing()
}

/// The error for a request over the limit of concurrent requests.
pub fn overloaded() -> RequestError {
    let message = "Too many requests are under way. Ask again in a second.";
    let mut error = RequestError::new(Code::Overloaded, message).closing();
    error.retry_after = Some(reply::retry_after(Duration::from_secs(1)));
    error
}

/// The response to a CORS preflight from an allowed origin.
pub(super) fn preflight(request_headers: &HeaderMap) -> Reply {
    let mut reply = reply::own(StatusCode::NO_CONTENT, "application/json", "");
    let headers = reply.headers_mut();
    headers.remove(header::CONTENT_TYPE);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    if request_headers.contains_key(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        let allowed = "cache-control, content-type, sidecar-client, sidecar-key, traceparent, tracestate, x-request-id";
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
    }
    reply
}
