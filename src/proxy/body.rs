//! Reads an app's request body, within limits of type, size and time. Its content is checked in [`super::key`].

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

/// Maximum size of a request body, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time within which a request body must be complete.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Requires a JSON content type on every POST and on a DELETE with a body: web pages cannot send it without a
/// preflight.
pub fn check_content_type(head: &Parts, body: &impl Body) -> Result<(), RequestError> {
    let headers = &head.headers;
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|value| value != "identity") {
        return Err(RequestError::new(Code::EncodingNotSupported, "Send the body without Content-Encoding."));
    }
    let is_required = head.method == Method::POST || (head.method == Method::DELETE && !body.is_end_stream());
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    let is_json = match (types.next(), types.next()) {
        (Some(one), None) => one == "application/json" || reply::essence(one).as_deref() == Some("application/json"),
        _ => false,
    };
    if is_required && !is_json {
        let message = "Send the body as JSON: add -H 'content-type: application/json' (curl 7.82 and later: --json).";
        return Err(RequestError::new(Code::JsonRequired, message).hint("-H 'content-type: application/json'"));
    }
    Ok(())
}

/// Reads the whole body. The errors close the connection.
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
        let mut first = Bytes::new();
        let mut joined = Vec::new();
        while !body.is_end_stream()
            && let Some(frame) = body.frame().await
        {
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            if first.len() + joined.len() + data.len() > MAX_BODY_BYTES {
                return Err(too_large());
            }
            // A small body is one frame, which needs no copy.
            if first.is_empty() && joined.is_empty() {
                first = data;
            } else {
                joined.extend_from_slice(&std::mem::take(&mut first));
                joined.extend_from_slice(&data);
            }
        }
        Ok(if joined.is_empty() { first } else { joined.into() })
    };
    // A small body arrives with the head, so most requests need no timer.
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

    /// An endless body of one byte per tick.
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
    async fn a_trickling_body_times_out_like_a_stalled_one() {
        for tick in [Duration::from_secs(1), Duration::from_secs(3600)] {
            let start = Instant::now();
            let error = read(Trickle(interval(tick))).await.expect_err("an endless body");
            assert_eq!((error.code, error.close), (Code::BodyTimeout, true));
            assert_eq!(start.elapsed(), BODY_TIMEOUT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_without_a_length_has_the_same_size_limit() {
        let error = read(Trickle(interval(Duration::from_nanos(1)))).await.expect_err("an endless body");
        assert_eq!((error.code, error.close), (Code::BodyTooLarge, true));
    }
}
