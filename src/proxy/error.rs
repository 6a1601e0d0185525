//! Every error that the sidecar itself answers a request with: one table of codes, one shape.
//!
//! interface.md section 3 fixes codes and statuses. A message says what was tried and what to do; nothing of a body, a
//! header or a token may stand in it, and no more than a few escaped bytes of anything else the caller sent.

use std::fmt;

use http::{HeaderValue, StatusCode};
use serde::Serialize;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $status:literal $text:literal,)+) => {
        /// What went wrong, as `error.code` and the `sidecar-error` header say it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)+ }

        impl Code {
            /// All codes, in the order of interface.md.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The code on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The status that goes with it.
            pub const fn status(self) -> StatusCode {
                let status = match self { $(Self::$variant => StatusCode::from_u16($status),)+ };
                match status { Ok(status) => status, Err(_) => StatusCode::INTERNAL_SERVER_ERROR }
            }
        }
    };
}

codes! {
    /// `Host` is missing, doubled or malformed.
    BadHost = 400 "bad_host",
    /// The request target is not a plain path.
    BadTarget = 400 "bad_target",
    /// `Transfer-Encoding` is not just `chunked`.
    BadFraming = 400 "bad_framing",
    /// The connector segment does not decode to a connector.
    BadConnector = 400 "bad_connector",
    /// A query string.
    QueryNotAllowed = 400 "query_not_allowed",
    /// The body is no JSON object that has one reading.
    BadJson = 400 "bad_json",
    /// The instance key is required and missing or wrong.
    KeyRequired = 401 "key_required",
    /// `Host` names somebody else.
    HostNotAllowed = 403 "host_not_allowed",
    /// A web page asks.
    BrowserRequestRefused = 403 "browser_request_refused",
    /// Another proxy passes this on.
    ForwardedRequestRefused = 403 "forwarded_request_refused",
    /// Another user of this machine asks.
    PeerUidMismatch = 403 "peer_uid_mismatch",
    /// Not on the list of allowed connectors.
    ConnectorNotAllowed = 403 "connector_not_allowed",
    /// No such path.
    RouteNotFound = 404 "route_not_found",
    /// A known path with another method.
    MethodNotAllowed = 405 "method_not_allowed",
    /// The proxy asks for the secret of a run.
    RunSecretRequired = 407 "run_secret_required",
    /// The body did not come in time.
    BodyTimeout = 408 "body_timeout",
    /// The body is over its limit.
    BodyTooLarge = 413 "body_too_large",
    /// The request target is over its limit.
    TargetTooLong = 414 "target_too_long",
    /// The content type is not JSON.
    JsonRequired = 415 "json_required",
    /// The body is compressed.
    EncodingNotSupported = 415 "encoding_not_supported",
    /// `Expect` asks for something else than `100-continue`.
    ExpectationFailed = 417 "expectation_failed",
    /// More header lines than the limit.
    HeadTooLarge = 431 "head_too_large",
    /// Too many requests to upstream from here.
    LocalRateLimit = 429 "local_rate_limit",
    /// A connection that is to become another kind.
    UpgradeNotSupported = 501 "upgrade_not_supported",
    /// No connection to upstream.
    UpstreamUnreachable = 502 "upstream_unreachable",
    /// No TLS with upstream.
    UpstreamTls = 502 "upstream_tls",
    /// Upstream redirects.
    UpstreamRedirect = 502 "upstream_redirect",
    /// Upstream's reply is none, cut, too large or not JSON.
    UpstreamInvalidResponse = 502 "upstream_invalid_response",
    /// There is no fresh OIDC token to be had.
    RefreshFailed = 502 "refresh_failed",
    /// There is no OIDC token.
    OidcTokenMissing = 503 "oidc_token_missing",
    /// The OIDC token has expired.
    OidcTokenExpired = 503 "oidc_token_expired",
    /// The OIDC token cannot be used.
    OidcTokenInvalid = 503 "oidc_token_invalid",
    /// Too much at once.
    Overloaded = 503 "overloaded",
    /// Requests of a run's programs cannot be intercepted.
    InterceptionUnavailable = 503 "interception_unavailable",
    /// Upstream is too slow.
    UpstreamTimeout = 504 "upstream_timeout",
    /// The request has been through a sidecar already.
    LoopDetected = 508 "loop_detected",
}

/// An error that answers one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    /// What went wrong.
    pub code: Code,
    /// The reply's status: that of the code, save that upstream's 429 and 503 keep theirs.
    pub status: StatusCode,
    /// Upstream's status, where it answered and the answer is not passed on.
    pub upstream_status: Option<StatusCode>,
    /// One or two sentences for a person.
    pub message: String,
    /// What to run or change, bare.
    pub hint: Option<String>,
    /// `Allow`, with a 405.
    pub allow: Option<&'static str>,
    /// `Retry-After`: upstream's, or our own in whole seconds.
    pub retry_after: Option<HeaderValue>,
    /// Seconds that the OIDC token has left, once that is worth a warning.
    pub oidc_expires_in: Option<u32>,
    /// The connection cannot be used again: the rest of the request was not read.
    pub close: bool,
}

impl RequestError {
    /// An error without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            status: code.status(),
            upstream_status: None,
            message: message.into(),
            hint: None,
            allow: None,
            retry_after: None,
            oidc_expires_in: None,
            close: false,
        }
    }

    /// Adds what to run or change.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Ends the connection after the reply.
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Whether the sidecar itself held the request back, so that upstream knows nothing of it.
    pub fn is_unsent(&self) -> bool {
        matches!(self.code, Code::LocalRateLimit | Code::Overloaded)
    }

    /// 405 for a path that knows these methods.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        let mut error = Self::new(Code::MethodNotAllowed, format!("This path takes {allow}."));
        error.allow = Some(allow);
        error
    }

    /// The reply's body: Vercel's shape plus a hint and whose error it is.
    pub fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Details<'a>,
        }
        #[derive(Serialize)]
        struct Details<'a> {
            code: &'a str,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            hint: Option<&'a str>,
            source: &'a str,
        }
        let (code, message, hint) = (self.code.as_str(), &self.message, self.hint.as_deref());
        let envelope = Envelope { error: Details { code, message, hint, source: "connect-sidecar" } };
        // Plain strings can always be written.
        serde_json::to_vec(&envelope).unwrap_or_default()
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for RequestError {}

/// At most `64` bytes of something foreign, control characters and non-ASCII escaped.
pub fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 64;
    let mut shown: String =
        bytes.iter().take(SHOWN).flat_map(|b| std::ascii::escape_default(*b)).map(char::from).collect();
    if bytes.len() > SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_vercels_shape_and_names_its_source() {
        let error = RequestError::new(Code::OidcTokenExpired, "It \"expired\".").hint("vercel env pull");
        let body = String::from_utf8(error.body()).expect("UTF-8");
        let expected = r#"{"error":{"code":"oidc_token_expired","message":"It \"expired\".","hint":"vercel env pull","source":"connect-sidecar"}}"#;
        assert_eq!(body, expected);
        assert!(!String::from_utf8(RequestError::new(Code::BadHost, "x").body()).expect("UTF-8").contains("hint"));
    }

    #[test]
    fn every_code_has_its_own_text_and_an_error_status() {
        let mut texts: Vec<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), Code::ALL.len());
        assert!(Code::ALL.iter().all(|c| c.status().as_u16() >= 400 && c.status() != 500));
    }

    #[test]
    fn an_excerpt_is_short_and_plain() {
        assert_eq!(excerpt(b"a\x1b[31m\n\xff"), "a\\x1b[31m\\n\\xff");
        assert_eq!(excerpt(&[b'x'; 65]), format!("{}…", "x".repeat(64)));
    }
}
