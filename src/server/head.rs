//! How large a request's head may be, beyond what the HTTP library sees to.

use http::request::Parts;

use crate::proxy::error::{Code, RequestError};

/// Largest request head, in bytes, for the HTTP library.
pub(super) const MAX_BYTES: usize = 16 * 1024;
/// Header lines of a request. The library's own limit is 100; to ask it for another costs an allocation a request.
const MAX_HEADERS: usize = 64;
/// Longest request target, in bytes.
const MAX_TARGET_BYTES: usize = 2 * 1024;

/// Refuses a head that is over a limit.
pub(super) fn check(head: &Parts) -> Result<(), RequestError> {
    if head.uri.path_and_query().is_some_and(|target| target.as_str().len() > MAX_TARGET_BYTES) {
        return Err(RequestError::new(Code::TargetTooLong, "The request target is longer than 2 KiB.").closing());
    }
    if head.headers.len() > MAX_HEADERS {
        return Err(RequestError::new(Code::HeadTooLarge, "The request has more than 64 header lines.").closing());
    }
    Ok(())
}
