//! Limits for request heads.
//!
//! The HTTP library has the higher limit, which bounds memory. Requests to the sidecar itself are checked against lower
//! limits after they are read, so that the response can say why one is refused; the library sends only a status.
//! Browsers run into these limits through no fault of theirs: they send the cookies of all ports of a host name.

use http::header::{self, HeaderMap};
use http::request::Parts;

use crate::proxy::error::{Code, RequestError};

/// Largest request head that the HTTP library reads, in bytes.
pub(super) const MAX_READ_BYTES: usize = 128 * 1024;
/// Most header lines of a relayed request.
pub(super) const MAX_RELAYED_HEADERS: usize = 256;
/// Largest head of a request to the sidecar itself, in bytes.
const MAX_BYTES: usize = 16 * 1024;
/// Most header lines of a request to the sidecar itself.
const MAX_HEADERS: usize = 64;
/// Longest request target, in bytes.
const MAX_TARGET_BYTES: usize = 2 * 1024;

/// Refuses the head of a request to the sidecar itself that exceeds a limit.
pub(super) fn check(head: &Parts) -> Result<(), RequestError> {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if target > MAX_TARGET_BYTES {
        return Err(RequestError::new(Code::TargetTooLong, "The request target is longer than 2 KiB.").closing());
    }
    if head.headers.len() > MAX_HEADERS {
        return Err(RequestError::new(Code::HeadTooLarge, "The request has more than 64 header lines.").closing());
    }
    // 4 bytes for the colon, the space and the line end.
    let lines: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if target + lines > MAX_BYTES {
        return Err(too_large(&head.headers).closing());
    }
    Ok(())
}

fn too_large(headers: &HeaderMap) -> RequestError {
    let cookies: usize = headers.get_all(header::COOKIE).iter().map(header::HeaderValue::len).sum();
    if cookies <= MAX_BYTES / 2 {
        return RequestError::new(Code::HeadTooLarge, "The head of the request is larger than 16 KiB.");
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
    let (name, other) = match name {
        "localhost" => ("localhost", "127.0.0.1"),
        "[::1]" => ("[::1]", "localhost"),
        _ => ("127.0.0.1", "localhost"),
    };
    let message = format!(
        "The head of the request is larger than 16 KiB, and most of it is cookies: what a server on any port of {name} has \
         set, the browser sends to all of them. Clear the cookies of {name} in the browser, or use http://{other}:{port} \
         instead."
    );
    RequestError::new(Code::HeadTooLarge, message).hint(format!("clear the cookies of {name} in the browser"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn refusal(target: &str, headers: &[(&str, String)]) -> Option<RequestError> {
        let request = headers.iter().fold(Request::get(target), |request, (name, value)| request.header(*name, value));
        check(&request.body(()).expect("a request").into_parts().0).err()
    }

    #[test]
    fn a_head_may_have_16_kib() {
        // All that fits beside the target and the header's name.
        let filling = MAX_BYTES - "/".len() - "x-long".len() - 4;
        assert_eq!(refusal("/", &[("x-long", "x".repeat(filling))]), None);
        let refused = refusal("/", &[("x-long", "x".repeat(filling + 1))]).expect("refused");
        assert_eq!((refused.code, refused.close), (Code::HeadTooLarge, true));
        assert!(!refused.message.contains("cookie"), "{}", refused.message);
    }

    #[test]
    fn the_message_on_too_many_cookies_names_their_host() {
        for (host, name, other) in [
            ("127.0.0.1:2774", "cookies of 127.0.0.1 ", "http://localhost:2774 "),
            ("localhost:2774", "cookies of localhost ", "http://127.0.0.1:2774 "),
            ("[::1]:2774", "cookies of [::1] ", "http://localhost:2774 "),
        ] {
            let headers = [("host", host.to_owned()), ("cookie", "a=b; ".repeat(4000))];
            let refused = refusal("/_sidecar/", &headers).expect("refused");
            assert!(refused.message.contains(name) && refused.message.contains(other), "{}", refused.message);
        }
    }
}
