//! An app's request body: its type, its size and the time it takes. Says nothing of what is in it.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Method, header};
use http_body_util::BodyExt;
use hyper::body::Body;

use super::error::{Code, RequestError};
use super::reply;

/// A larger request body is refused, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// A request body must be there within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// JSON is due on every POST and on a DELETE with a body: a web page cannot claim it without asking first.
pub fn check_content_type(head: &Parts, body: &impl Body) -> Result<(), RequestError> {
    let headers = &head.headers;
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|value| value != "identity") {
        return Err(RequestError::new(Code::EncodingNotSupported, "Send the body without Content-Encoding."));
    }
    let is_due = head.method == Method::POST || (head.method == Method::DELETE && !body.is_end_stream());
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    let is_json = match (types.next(), types.next()) {
        (Some(one), None) => one == "application/json" || reply::essence(one).as_deref() == Some("application/json"),
        _ => false,
    };
    if is_due && !is_json {
        let message = "Send the body as JSON: add -H 'content-type: application/json' (curl 7.82 and later: --json).";
        return Err(RequestError::new(Code::JsonRequired, message).hint("-H 'content-type: application/json'"));
    }
    Ok(())
}

/// The whole body, within its limits of size and time.
pub async fn read<B>(mut body: B) -> Result<Bytes, RequestError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: StdError,
{
    let too_large = || RequestError::new(Code::BodyTooLarge, "The body is larger than 64 KiB.").closing();
    let broken = |_| RequestError::new(Code::BadFraming, "The body broke off.").closing();
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return Err(too_large());
    }
    let reading = async {
        let mut whole = Bytes::new();
        let mut pieces = Vec::new();
        while !body.is_end_stream()
            && let Some(frame) = body.frame().await
        {
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            if whole.len() + pieces.len() + data.len() > MAX_BODY_BYTES {
                return Err(too_large());
            }
            // Small bodies come in one piece, which is taken as it is.
            if whole.is_empty() && pieces.is_empty() {
                whole = data;
            } else {
                pieces.extend_from_slice(&std::mem::take(&mut whole));
                pieces.extend_from_slice(&data);
            }
        }
        Ok(if pieces.is_empty() { whole } else { pieces.into() })
    };
    // A small body is there with the head: most requests need no timer.
    let mut reading = std::pin::pin!(reading);
    if let Poll::Ready(body) = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await {
        return body;
    }
    tokio::time::timeout(BODY_TIMEOUT, reading)
        .await
        .unwrap_or_else(|_| Err(RequestError::new(Code::BodyTimeout, "The body did not arrive within 10 s.").closing()))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::Context;

    use hyper::body::Frame;
    use tokio::time::{Instant, Interval, interval};

    use super::*;

    /// A byte at each tick, without end.
    struct Trickle(Interval);

    impl Body for Trickle {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.poll_tick(cx).map(|_| Some(Ok(Frame::data(Bytes::from_static(b" ")))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_in_has_no_more_time_than_one_that_stalls() {
        for tick in [Duration::from_secs(1), Duration::from_secs(3600)] {
            let begun = Instant::now();
            let error = read(Trickle(interval(tick))).await.expect_err("it never ends");
            assert_eq!((error.code, error.close), (Code::BodyTimeout, true));
            assert_eq!(begun.elapsed(), BODY_TIMEOUT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_in_has_no_more_room_than_one_that_is_announced() {
        let error = read(Trickle(interval(Duration::from_nanos(1)))).await.expect_err("it never ends");
        assert_eq!((error.code, error.close), (Code::BodyTooLarge, true));
    }
}
