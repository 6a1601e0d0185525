//! The sidecar's own error responses: one table of codes, one format.
//!
//! docs/http.md section 2 defines codes and statuses. A message says what was tried and what to do. It contains nothing
//! of a body, a header or a token, and at most a few escaped bytes of anything else that the client sent. Each code has
//! a default remedy; where the cause is known, a more specific one replaces it.

use std::borrow::Cow;
use std::fmt;

use http::{HeaderValue, StatusCode};
use serde::Serialize;

use super::stats::CacheUse;
use crate::remedy::Remedy;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $status:literal $text:literal $kind:ident $remedy:literal,)+) => {
        /// An error code, sent as `error.code` and in the `sidecar-error` header.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)+ }

        impl Code {
            /// All codes, in the order of docs/http.md.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The code on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// Its HTTP status.
            pub const fn status(self) -> StatusCode {
                let status = match self { $(Self::$variant => StatusCode::from_u16($status),)+ };
                match status { Ok(status) => status, Err(_) => StatusCode::INTERNAL_SERVER_ERROR }
            }

            /// The default remedy.
            pub fn remedy(self) -> Remedy {
                match self { $(Self::$variant => Remedy::$kind($remedy),)+ }
            }
        }
    };
}

codes! {
    /// `Host` is missing, repeated or malformed.
    BadHost = 400 "bad_host" advice "send one Host header, with the address that you connect to",
    /// The request target is not a plain path.
    BadTarget = 400 "bad_target" advice "ask for a plain path, such as /v1/connect/token/slack%2Facme-slack",
    /// `Transfer-Encoding` is not just `chunked`.
    BadFraming = 400 "bad_framing" advice "send the whole body, with one Content-Length or chunked",
    /// The connector segment does not decode to a connector.
    BadConnector = 400 "bad_connector" advice "write the connector percent-encoded, such as slack%2Facme-slack",
    /// There is a query string.
    QueryNotAllowed = 400 "query_not_allowed" advice "leave out the `?` and what follows it",
    /// The body is not an unambiguous JSON object.
    BadJson = 400 "bad_json" advice r#"send one JSON object in UTF-8 that has each key once, such as {"subject":{"type":"app"}}"#,
    /// The instance key is required and missing or wrong.
    KeyRequired = 401 "key_required" advice "send the instance key in one Sidecar-Key header: `connect-sidecar status --open` opens the page with it, `connect-sidecar env` exports it where --require-key is set",
    /// `Host` is not a name of the sidecar.
    HostNotAllowed = 403 "host_not_allowed" advice "ask at the address that the sidecar printed when it started, or start it with --allowed-host",
    /// The request comes from a web page.
    BrowserRequestRefused = 403 "browser_request_refused" advice "ask from a server or a script, or start the sidecar with --allowed-origin",
    /// The request was forwarded by another proxy.
    ForwardedRequestRefused = 403 "forwarded_request_refused" run "connect-sidecar --allow-forwarded",
    /// The request comes from another user of this machine.
    PeerUidMismatch = 403 "peer_uid_mismatch" advice "start a sidecar as the user whose program asks",
    /// The connector is not on the list of allowed ones.
    ConnectorNotAllowed = 403 "connector_not_allowed" advice "add the connector to `connectors.allow` in sidecar.toml and start the sidecar again",
    /// There is no such path.
    RouteNotFound = 404 "route_not_found" advice "ask for one of Connect's routes, such as POST /v1/connect/token/slack%2Facme-slack",
    /// The path does not take this method.
    MethodNotAllowed = 405 "method_not_allowed" advice "use a method that the Allow header names",
    /// The intercepting proxy requires the secret of a run.
    RunSecretRequired = 407 "run_secret_required" advice "start the program with `connect-sidecar run -- CMD`, which gives it what the proxy asks for",
    /// The body did not arrive in time.
    BodyTimeout = 408 "body_timeout" advice "send the body at once",
    /// The body is over its limit.
    BodyTooLarge = 413 "body_too_large" advice "send a body of at most 64 KiB",
    /// The request target is over its limit.
    TargetTooLong = 414 "target_too_long" advice "ask for a shorter path",
    /// The content type is not JSON.
    JsonRequired = 415 "json_required" advice "-H 'content-type: application/json'",
    /// The body is compressed.
    EncodingNotSupported = 415 "encoding_not_supported" advice "send the body without Content-Encoding",
    /// `Expect` is not `100-continue`.
    ExpectationFailed = 417 "expectation_failed" advice "leave out the Expect header",
    /// The head is over its limits.
    HeadTooLarge = 431 "head_too_large" advice "send fewer and shorter headers",
    /// The sidecar's own rate limit for upstream is reached.
    LocalRateLimit = 429 "local_rate_limit" advice "ask again after the seconds that Retry-After names, and less often",
    /// The request asks for a protocol upgrade.
    UpgradeNotSupported = 501 "upgrade_not_supported" advice "leave out the Upgrade header",
    /// There is no connection to upstream.
    UpstreamUnreachable = 502 "upstream_unreachable" advice "check the network and VPN",
    /// TLS with upstream failed.
    UpstreamTls = 502 "upstream_tls" advice "check this machine's clock with `date`, and what is between it and upstream",
    /// Upstream answered with a redirect.
    UpstreamRedirect = 502 "upstream_redirect" advice "sign in to the network, if it wants that; else let --upstream name the API itself",
    /// Upstream's response is missing, truncated, too large or not JSON.
    UpstreamInvalidResponse = 502 "upstream_invalid_response" advice "try again; if it stays so, look at https://www.vercel-status.com and check the VPN or proxy",
    /// The OIDC token could not be refreshed.
    RefreshFailed = 502 "refresh_failed" run "vercel env pull",
    /// There is no OIDC token.
    OidcTokenMissing = 503 "oidc_token_missing" run "vercel env pull",
    /// The OIDC token has expired.
    OidcTokenExpired = 503 "oidc_token_expired" run "vercel env pull",
    /// The OIDC token cannot be used.
    OidcTokenInvalid = 503 "oidc_token_invalid" run "connect-sidecar doctor",
    /// There are too many requests at once.
    Overloaded = 503 "overloaded" advice "ask again after the seconds that Retry-After names, and fewer at once",
    /// Interception for runs is not available.
    InterceptionUnavailable = 503 "interception_unavailable" run "connect-sidecar doctor",
    /// Upstream did not answer in time.
    UpstreamTimeout = 504 "upstream_timeout" advice "try again; check the VPN or proxy in between",
    /// The request has been through a sidecar already.
    LoopDetected = 508 "loop_detected" advice "let --upstream name the API itself, not a sidecar",
}

/// A request to one of Connect's routes that was answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedRequest {
    /// The name of the route's action.
    pub action: &'static str,
    /// The connector, decoded: text from the client.
    pub connector: String,
    /// Time until the response, in milliseconds.
    pub ms: u64,
}

/// An error response to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    /// What went wrong.
    pub code: Code,
    /// The response status: that of the code, or upstream's 429 or 503.
    pub status: StatusCode,
    /// Upstream's status, if it answered and the answer is not passed on.
    pub upstream_status: Option<StatusCode>,
    /// One or two sentences for a person.
    pub message: String,
    /// How to fix it. Boxed to keep results small.
    pub remedy: Box<Remedy>,
    /// `Allow`, with a 405.
    pub allow: Option<&'static str>,
    /// `Retry-After`: upstream's, or the sidecar's own in whole seconds.
    pub retry_after: Option<HeaderValue>,
    /// Remaining lifetime of the OIDC token in seconds, if it is short.
    pub oidc_expires_in: Option<u32>,
    /// The request to Connect that it answers, for the event. Without one, the event is a refusal.
    pub request: Option<Box<FailedRequest>>,
    /// How the cache took part, to be counted.
    pub cache_use: Option<CacheUse>,
    /// Close the connection after the response: the rest of the request was not read.
    pub close: bool,
}

impl RequestError {
    /// An error with the default remedy of its code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            status: code.status(),
            upstream_status: None,
            message: message.into(),
            remedy: Box::new(code.remedy()),
            allow: None,
            retry_after: None,
            oidc_expires_in: None,
            request: None,
            cache_use: None,
            close: false,
        }
    }

    /// Sets advice as the remedy.
    pub fn hint(self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::advice(hint))
    }

    /// Sets a command to run as the remedy.
    pub fn command(self, command: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::run(command))
    }

    /// Sets the remedy.
    pub fn remedy(mut self, remedy: Remedy) -> Self {
        *self.remedy = remedy;
        self
    }

    /// Closes the connection after the response.
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Whether the sidecar refused to send the request upstream.
    pub fn is_unsent(&self) -> bool {
        matches!(self.code, Code::LocalRateLimit | Code::Overloaded)
    }

    /// 405 for a path that takes these methods.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        let mut error = Self::new(Code::MethodNotAllowed, format!("This path takes {allow}."));
        error.allow = Some(allow);
        error
    }

    /// The text for the log: the message, and the remedy unless the message contains it.
    pub fn line(&self) -> String {
        self.remedy.after(&self.message)
    }

    /// The response body, in Vercel's format with the remedy and the source added.
    pub fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Details<'a>,
        }
        #[derive(Serialize)]
        struct Details<'a> {
            code: &'a str,
            message: &'a str,
            #[serde(flatten)]
            remedy: &'a Remedy,
            source: &'a str,
        }
        let (code, message, remedy) = (self.code.as_str(), &self.message, &self.remedy);
        let envelope = Envelope { error: Details { code, message, remedy, source: "connect-sidecar" } };
        // Serializing plain strings cannot fail.
        serde_json::to_vec(&envelope).unwrap_or_default()
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for RequestError {}

/// At most 64 bytes of untrusted text, with control characters and non-ASCII escaped.
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
    fn the_body_has_vercels_format_and_names_its_source() {
        let error = RequestError::new(Code::OidcTokenExpired, "It \"expired\".");
        let body = String::from_utf8(error.body()).expect("UTF-8");
        let expected = r#"{"error":{"code":"oidc_token_expired","message":"It \"expired\".","hint":"vercel env pull","command":"vercel env pull","source":"connect-sidecar"}}"#;
        assert_eq!(body, expected);
    }

    #[test]
    fn every_code_has_a_hint_and_a_command_only_where_one_can_be_pasted() {
        for code in Code::ALL {
            let body: serde_json::Value =
                serde_json::from_slice(&RequestError::new(*code, "x").body()).expect("a body");
            let (hint, command) = (body["error"]["hint"].as_str(), body["error"]["command"].as_str());
            let hint = hint.unwrap_or_else(|| panic!("{code:?} has no hint"));
            assert!(!hint.is_empty() && !hint.ends_with('.'), "{code:?}: {hint}");
            let is_pasteable =
                |command: &str| command.starts_with("vercel ") || command.starts_with("connect-sidecar ");
            assert!(command.is_none_or(is_pasteable), "{code:?}: {command:?}");
            assert_eq!(is_pasteable(hint), command.is_some(), "{code:?}: {hint}");
        }
    }

    #[test]
    fn a_specific_remedy_replaces_the_default() {
        let error = || RequestError::new(Code::OidcTokenExpired, "x");
        assert_eq!(*error().hint("set the clock").remedy, Remedy::advice("set the clock"));
        assert_eq!(*error().command("vercel link").remedy, Remedy::run("vercel link"));
    }

    #[test]
    fn every_code_has_a_unique_text_and_an_error_status() {
        let mut texts: Vec<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), Code::ALL.len());
        assert!(Code::ALL.iter().all(|c| c.status().as_u16() >= 400 && c.status() != 500));
    }

    #[test]
    fn an_excerpt_is_short_and_escaped() {
        assert_eq!(excerpt(b"a\x1b[31m\n\xff"), "a\\x1b[31m\\n\\xff");
        assert_eq!(excerpt(&[b'x'; 65]), format!("{}…", "x".repeat(64)));
    }
}
