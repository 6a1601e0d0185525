//! What goes back to the app: upstream's answer as it came, or an error of our own; with the headers that every reply has.
//!
//! An [`Answer`] holds only what may be relayed: upstream's status and body byte for byte, and headers from a list
//! (docs/http.md section 1). Each reply carries the response headers of docs/security.md W and the end. Never emits a
//! cookie, a `Server` or, but for an allowed origin, an `Access-Control-*` header.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{Either, Full};

use super::error::RequestError;

/// The body of any reply: known as a whole, or as it comes from another host.
pub type ReplyBody = Either<Full<Bytes>, UnsyncBoxBody<Bytes, hyper::Error>>;
/// Any reply.
pub type Reply = Response<ReplyBody>;

/// RFC 9211.
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// Says that an error is ours, and which.
pub const SIDECAR_ERROR: HeaderName = HeaderName::from_static("sidecar-error");

/// Says how many seconds the OIDC token has left, once that is worth a warning.
pub const OIDC_EXPIRES_IN: HeaderName = HeaderName::from_static("sidecar-oidc-expires-in");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What is passed on of upstream's headers, besides the content type.
const RELAYED: [HeaderName; 3] =
    [header::RETRY_AFTER, HeaderName::from_static("x-vercel-id"), HeaderName::from_static("x-request-id")];

/// The headers of every reply, made once: building them for each costs more than a cache look-up.
static SAFE_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        ),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
});

/// Upstream's answer, reduced to what may be passed on.
#[derive(Debug)]
pub struct Answer {
    /// Upstream's status.
    pub status: StatusCode,
    /// Upstream's body.
    pub body: Bytes,
    /// All headers of the reply but `cache-status` and `age`.
    headers: HeaderMap,
}

impl Answer {
    /// Keeps what may be passed on. `headers` are upstream's. All is copied: the originals are slices of a connection's
    /// read buffer, which would live as long as the answer does.
    pub fn new(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let mut kept = SAFE_HEADERS.clone();
        if status != StatusCode::NO_CONTENT {
            // Nothing but JSON is ever relayed, whatever upstream calls it.
            let is_json = |value: &&HeaderValue| essence(value).is_some_and(|e| e == "application/json");
            let content_type = headers.get(header::CONTENT_TYPE).filter(is_json);
            kept.insert(header::CONTENT_TYPE, content_type.map_or(JSON, copied));
        }
        for name in RELAYED {
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

    /// The reply for an app.
    pub fn reply(&self) -> Reply {
        self.reply_with(self.headers.clone())
    }

    /// The headers of a reply to a token request: what happened, after RFC 9211, and how old the answer is.
    pub fn headers_saying(&self, cache_status: &str, age: Option<Duration>) -> HeaderMap {
        let mut headers = self.headers.clone();
        if let Ok(status) = HeaderValue::try_from(format!("connect-sidecar; {cache_status}")) {
            headers.insert(CACHE_STATUS, status);
        }
        if let Some(age) = age {
            headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
        }
        headers
    }

    /// The reply for an app, with these headers.
    pub fn reply_with(&self, headers: HeaderMap) -> Reply {
        let mut response = whole(self.body.clone());
        *response.status_mut() = self.status;
        *response.headers_mut() = headers;
        response
    }
}

fn copied(value: &HeaderValue) -> HeaderValue {
    // It was a valid value before.
    HeaderValue::from_bytes(value.as_bytes()).unwrap_or(JSON)
}

/// The headers of hits on one answer. They change by the second at most, and making them costs more than the look-up.
#[derive(Debug, Default)]
pub struct HitHeaders {
    made: Arc<HeaderMap>,
    for_seconds: Option<(u64, u64)>,
}

impl HitHeaders {
    /// The headers for a hit on `answer` that may be served for `ttl` and came `age` ago.
    pub fn at(&mut self, answer: &Answer, ttl: Duration, age: Duration) -> Arc<HeaderMap> {
        let seconds = Some((ttl.as_secs(), age.as_secs()));
        if self.for_seconds != seconds {
            self.made = Arc::new(answer.headers_saying(&format!("hit; ttl={}", ttl.as_secs()), Some(age)));
            self.for_seconds = seconds;
        }
        self.made.clone()
    }
}

/// The lower-case media type of a content type, without parameters; `None` if it is no single one.
pub fn essence(value: &HeaderValue) -> Option<String> {
    let text = value.to_str().ok()?;
    let essence = text.split(';').next().unwrap_or_default().trim();
    (!text.contains(',')).then(|| essence.to_ascii_lowercase())
}

fn whole(body: Bytes) -> Reply {
    Response::new(ReplyBody::Left(Full::new(body)))
}

/// Gives a reply that is passed on the headers of every reply, and takes from it what would open it to web pages.
pub fn make_safe(headers: &mut HeaderMap) {
    let opens: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in opens.into_iter().chain([header::SERVER, header::SET_COOKIE]) {
        headers.remove(name);
    }
    for (name, value) in &*SAFE_HEADERS {
        headers.insert(name, value.clone());
    }
}

/// A reply of our own with a body of this type.
pub fn own(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut response = whole(body.into());
    *response.status_mut() = status;
    *response.headers_mut() = SAFE_HEADERS.clone();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The reply for an error of our own.
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

/// The same for a person: its message as a line of text.
pub fn error_in_words(error: &RequestError) -> Reply {
    let (mut head, _) = self::error(error).into_parts();
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Response::from_parts(head, ReplyBody::Left(Full::new(format!("{}\n", error.message).into())))
}

/// A `Retry-After`, rounded up to whole seconds: nobody is told to come back too early.
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
    fn relays_the_body_and_only_listed_headers() {
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
                "content-security-policy",
                "content-type",
                "cross-origin-resource-policy",
                "referrer-policy",
                "retry-after",
                "x-content-type-options",
                "x-frame-options",
                "x-request-id",
                "x-vercel-id",
            ]
        );
        assert_eq!(reply.headers()["content-type"], "application/json; charset=utf-8");
        assert_eq!(reply.headers()["cache-control"], "no-store");
    }

    #[test]
    fn never_relays_another_content_type() {
        for content_type in ["text/html", "application/json, text/html", "application/jsonp"] {
            let headers = upstream(&[("content-type", content_type)]);
            let reply = Answer::new(StatusCode::OK, &headers, b"{}").reply();
            assert_eq!(reply.headers()["content-type"], "application/json", "{content_type}");
        }
        let empty = Answer::new(StatusCode::NO_CONTENT, &HeaderMap::new(), b"").reply();
        assert!(!empty.headers().contains_key("content-type"));
    }

    #[test]
    fn the_headers_of_hits_follow_the_seconds() {
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
    fn an_error_names_itself() {
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
