//! Responses to the app: upstream's answer unchanged, or an error of the sidecar's own, with the headers of all
//! replies.
//!
//! An [`Answer`] contains only what may be passed on: upstream's status and body byte for byte, and headers from a list
//! (docs/http.md section 1). Each reply has the security headers of docs/security.md. None has a cookie, `Server` or,
//! except for an allowed origin, `Access-Control-*`.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{Either, Full};

use super::error::RequestError;

/// The body of a reply: in memory, or streamed from another host.
pub type ReplyBody = Either<Full<Bytes>, UnsyncBoxBody<Bytes, hyper::Error>>;
/// A response to the app.
pub type Reply = Response<ReplyBody>;

/// How the cache answered (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// The code of an error of the sidecar's own.
pub const SIDECAR_ERROR: HeaderName = HeaderName::from_static("sidecar-error");

/// The remaining lifetime of the OIDC token in seconds, if it is short.
pub const OIDC_EXPIRES_IN: HeaderName = HeaderName::from_static("sidecar-oidc-expires-in");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Upstream's headers that are passed on besides the content type.
const PASSED_ON: [HeaderName; 3] =
    [header::RETRY_AFTER, HeaderName::from_static("x-vercel-id"), HeaderName::from_static("x-request-id")];

/// The headers of every reply. Built once, because building them costs more than a cache lookup.
static SECURITY_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let headers = [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    headers.map(|(name, value)| (name, HeaderValue::from_static(value))).into_iter().collect()
});

/// The same with those that only matter for what a browser shows as a document: everything but JSON, which `nosniff`
/// keeps from being shown as anything else.
static DOCUMENT_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let policy = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    let mut headers = SECURITY_HEADERS.clone();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers
});

/// What may be passed on of upstream's answer.
#[derive(Debug)]
pub struct Answer {
    /// Upstream's status.
    pub status: StatusCode,
    /// Upstream's body.
    pub body: Bytes,
    /// All headers of the reply except `Cache-Status` and `Age`.
    headers: HeaderMap,
}

impl Answer {
    /// Keeps what may be passed on of upstream's answer. Everything is copied, because the originals are slices that
    /// would keep a connection's whole read buffer in memory.
    pub fn new(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let mut kept = SECURITY_HEADERS.clone();
        if status != StatusCode::NO_CONTENT {
            // The body is JSON, whatever upstream's content type says.
            let is_json = |value: &&HeaderValue| essence(value).is_some_and(|e| e == "application/json");
            let content_type = headers.get(header::CONTENT_TYPE).filter(is_json);
            kept.insert(header::CONTENT_TYPE, content_type.map_or(JSON, copied));
        }
        for name in PASSED_ON {
            if let Some(value) = headers.get(&name) {
                kept.insert(name, copied(value));
            }
        }
        Self { status, body: Bytes::copy_from_slice(body), headers: kept }
    }

    /// `Retry-After` as upstream sent it.
    pub fn retry_after(&self) -> Option<&str> {
        self.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok())
    }

    /// The reply.
    pub fn reply(&self) -> Reply {
        self.reply_with(self.headers.clone())
    }

    /// The headers of a reply to a token request, with `Cache-Status` (RFC 9211) and `Age`.
    pub fn headers_with_cache_status(&self, cache_status: &str, age: Option<Duration>) -> HeaderMap {
        let mut headers = self.headers.clone();
        if let Ok(status) = HeaderValue::try_from(format!("connect-sidecar; {cache_status}")) {
            headers.insert(CACHE_STATUS, status);
        }
        if let Some(age) = age {
            headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
        }
        headers
    }

    /// The reply with these headers.
    pub fn reply_with(&self, headers: HeaderMap) -> Reply {
        let mut response = with_body(self.body.clone());
        *response.status_mut() = self.status;
        *response.headers_mut() = headers;
        response
    }
}

fn copied(value: &HeaderValue) -> HeaderValue {
    // Copying a valid value cannot fail.
    HeaderValue::from_bytes(value.as_bytes()).unwrap_or(JSON)
}

/// The headers for cache hits on one answer. They change once per second at most, and building them costs more than the
/// lookup.
#[derive(Debug, Default)]
pub struct HitHeaders {
    headers: Arc<HeaderMap>,
    ttl_and_age: Option<(u64, u64)>,
}

impl HitHeaders {
    /// The headers for a hit on `answer` with this remaining lifetime and age.
    pub fn at(&mut self, answer: &Answer, ttl: Duration, age: Duration) -> Arc<HeaderMap> {
        let seconds = Some((ttl.as_secs(), age.as_secs()));
        if self.ttl_and_age != seconds {
            self.headers =
                Arc::new(answer.headers_with_cache_status(&format!("hit; ttl={}", ttl.as_secs()), Some(age)));
            self.ttl_and_age = seconds;
        }
        self.headers.clone()
    }
}

/// The media type of a content type in lower case, without parameters; `None` if there are several.
pub fn essence(value: &HeaderValue) -> Option<String> {
    let text = value.to_str().ok()?;
    let essence = text.split(';').next().unwrap_or_default().trim();
    (!text.contains(',')).then(|| essence.to_ascii_lowercase())
}

fn with_body(body: Bytes) -> Reply {
    Response::new(ReplyBody::Left(Full::new(body)))
}

/// Adds the security headers to a relayed response and removes headers that would give web pages access to it.
pub fn add_security_headers(headers: &mut HeaderMap) {
    let cors: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in cors.into_iter().chain([header::SERVER, header::SET_COOKIE]) {
        headers.remove(name);
    }
    for (name, value) in &*DOCUMENT_HEADERS {
        headers.insert(name, value.clone());
    }
}

/// A reply of the sidecar's own.
pub fn own(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut response = with_body(body.into());
    *response.status_mut() = status;
    let headers = if content_type == JSON { &SECURITY_HEADERS } else { &DOCUMENT_HEADERS };
    *response.headers_mut() = HeaderMap::clone(headers);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The reply for an error.
pub fn error(error: &RequestError) -> Reply {
    let mut response = own(error.status, "application/json", error.body());
    let headers = response.headers_mut();
    headers.insert(SIDECAR_ERROR, HeaderValue::from_static(error.code.as_str()));
    if let Some(allow) = error.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if let Some(retry_after) = &error.retry_after {
        headers.insert(header::RETRY_AFTER, retry_after.clone());
    }
    if let Some(left) = error.oidc_expires_in {
        headers.insert(OIDC_EXPIRES_IN, left.into());
    }
    if error.close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The reply for an error as plain text, for a browser window.
pub fn error_as_text(error: &RequestError) -> Reply {
    let (mut head, _) = self::error(error).into_parts();
    head.headers.extend(HeaderMap::clone(&DOCUMENT_HEADERS));
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Response::from_parts(head, ReplyBody::Left(Full::new(format!("{}\n", error.message).into())))
}

/// A `Retry-After` in seconds, rounded up.
pub fn retry_after(d: Duration) -> HeaderValue {
    HeaderValue::from(d.as_secs() + u64::from(d.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::error::Code;

    fn upstream(headers: &[(&'static str, &'static str)]) -> HeaderMap {
        headers.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn passes_on_the_body_and_only_listed_headers() {
        let headers = upstream(&[
            ("content-type", "application/json; charset=utf-8"),
            ("retry-after", "7"),
            ("x-vercel-id", "iad1::x"),
            ("x-request-id", "r"),
            ("set-cookie", "a=b"),
            ("access-control-allow-origin", "*"),
            ("server", "Vercel"),
            ("strict-transport-security", "x"),
            ("alt-svc", "h3"),
            ("location", "/"),
            ("connection", "x-evil"),
            ("x-evil", "1"),
        ]);
        let reply = Answer::new(StatusCode::TOO_MANY_REQUESTS, &headers, b"{}").reply();
        assert_eq!(reply.status(), 429);
        let mut names: Vec<_> = reply.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "cache-control",
                "content-type",
                "cross-origin-resource-policy",
                "retry-after",
                "x-content-type-options",
                "x-request-id",
                "x-vercel-id",
            ]
        );
        assert_eq!(reply.headers()["content-type"], "application/json; charset=utf-8");
        assert_eq!(reply.headers()["cache-control"], "no-store");
    }

    #[test]
    fn always_sends_the_json_content_type() {
        for content_type in ["text/html", "application/json, text/html", "application/jsonp"] {
            let headers = upstream(&[("content-type", content_type)]);
            let reply = Answer::new(StatusCode::OK, &headers, b"{}").reply();
            assert_eq!(reply.headers()["content-type"], "application/json", "{content_type}");
        }
        let empty = Answer::new(StatusCode::NO_CONTENT, &HeaderMap::new(), b"").reply();
        assert!(!empty.headers().contains_key("content-type"));
    }

    #[test]
    fn the_headers_of_hits_change_with_the_seconds() {
        let answer = Answer::new(StatusCode::OK, &HeaderMap::new(), b"{}");
        let mut headers = HitHeaders::default();
        for (ttl_ms, age_ms, status, age) in [
            (2999, 0, "connect-sidecar; hit; ttl=2", "0"),
            (2001, 999, "connect-sidecar; hit; ttl=2", "0"),
            (1999, 1000, "connect-sidecar; hit; ttl=1", "1"),
            (1999, 2000, "connect-sidecar; hit; ttl=1", "2"),
        ] {
            let made = headers.at(&answer, Duration::from_millis(ttl_ms), Duration::from_millis(age_ms));
            assert_eq!(made["cache-status"], status);
            assert_eq!(made["age"], age);
        }
    }

    #[test]
    fn an_error_has_its_headers() {
        let mut refused = RequestError::method_not_allowed("POST").closing();
        refused.retry_after = Some(retry_after(Duration::from_millis(1001)));
        let reply = error(&refused);
        for (name, value) in [
            ("sidecar-error", Code::MethodNotAllowed.as_str()),
            ("allow", "POST"),
            ("retry-after", "2"),
            ("connection", "close"),
            ("cache-control", "no-store"),
            ("content-type", "application/json"),
        ] {
            assert_eq!(reply.headers()[name], value);
        }
    }
}
