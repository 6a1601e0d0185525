//! Every error that the sidecar itself answers a request with: one table of codes, one shape.
//!
//! docs/http.md section 2 fixes codes and statuses. A message says what was tried and what to do; nothing of a body, a
//! header or a token may stand in it, and no more than a few escaped bytes of anything else the caller sent. Each code has
//! a remedy, for where nothing more is known; who knows the cause says what mends that.

use std::borrow::Cow;
use std::fmt;

use http::{HeaderValue, StatusCode};
use serde::Serialize;

use crate::remedy::Remedy;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $status:literal $text:literal $kind:ident $remedy:literal,)+) => {
        /// What went wrong, as `error.code` and the `sidecar-error` header say it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)+ }

        impl Code {
            /// All codes, in the order of docs/http.md.
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

            /// What mends it, as far as the code alone tells.
            pub fn remedy(self) -> Remedy {
                match self { $(Self::$variant => Remedy::$kind($remedy),)+ }
            }
        }
    };
}

codes! {
    /// `Host` is missing, doubled or malformed.
    BadHost = 400 "bad_host" advice "send one Host header, with the address that you connect to",
    /// The request target is not a plain path.
    BadTarget = 400 "bad_target" advice "ask for a plain path, such as /v1/connect/token/slack%2Facme-slack",
    /// `Transfer-Encoding` is not just `chunked`.
    BadFraming = 400 "bad_framing" advice "send the whole body, with one Content-Length or chunked",
    /// The connector segment does not decode to a connector.
    BadConnector = 400 "bad_connector" advice "write the connector percent-encoded, such as slack%2Facme-slack",
    /// A query string.
    QueryNotAllowed = 400 "query_not_allowed" advice "leave out the `?` and what follows it",
    /// The body is no JSON object that has one reading.
    BadJson = 400 "bad_json" advice r#"send one JSON object in UTF-8 that has each key once, such as {"subject":{"type":"app"}}"#,
    /// The instance key is required and missing or wrong.
    KeyRequired = 401 "key_required" advice "send the instance key in one Sidecar-Key header: `connect-sidecar status --open` opens the page with it, `connect-sidecar env` exports it where --require-key is set",
    /// `Host` names somebody else.
    HostNotAllowed = 403 "host_not_allowed" advice "ask at the address that the sidecar printed when it started, or start it with --allowed-host",
    /// A web page asks.
    BrowserRequestRefused = 403 "browser_request_refused" advice "ask from a server or a script, or start the sidecar with --allowed-origin",
    /// Another proxy passes this on.
    ForwardedRequestRefused = 403 "forwarded_request_refused" run "connect-sidecar --allow-forwarded",
    /// Another user of this machine asks.
    PeerUidMismatch = 403 "peer_uid_mismatch" advice "start a sidecar as the user whose program asks",
    /// Not on the list of allowed connectors.
    ConnectorNotAllowed = 403 "connector_not_allowed" advice "add the connector to `connectors.allow` in sidecar.toml and start the sidecar again",
    /// No such path.
    RouteNotFound = 404 "route_not_found" advice "ask for one of Connect's routes, such as POST /v1/connect/token/slack%2Facme-slack",
    /// A known path with another method.
    MethodNotAllowed = 405 "method_not_allowed" advice "use a method that the Allow header names",
    /// The proxy asks for the secret of a run.
    RunSecretRequired = 407 "run_secret_required" advice "start the program with `connect-sidecar run -- CMD`, which gives it what the proxy asks for",
    /// The body did not come in time.
    BodyTimeout = 408 "body_timeout" advice "send the body at once",
    /// The body is over its limit.
    BodyTooLarge = 413 "body_too_large" advice "send a body of at most 64 KiB",
    /// The request target is over its limit.
    TargetTooLong = 414 "target_too_long" advice "ask for a shorter path",
    /// The content type is not JSON.
    JsonRequired = 415 "json_required" advice "-H 'content-type: application/json'",
    /// The body is compressed.
    EncodingNotSupported = 415 "encoding_not_supported" advice "send the body without Content-Encoding",
    /// `Expect` asks for something else than `100-continue`.
    ExpectationFailed = 417 "expectation_failed" advice "leave out the Expect header",
    /// More header lines than the limit.
    HeadTooLarge = 431 "head_too_large" advice "send fewer and shorter headers",
    /// Too many requests to upstream from here.
    LocalRateLimit = 429 "local_rate_limit" advice "ask again after the seconds that Retry-After names, and less often",
    /// A connection that is to become another kind.
    UpgradeNotSupported = 501 "upgrade_not_supported" advice "leave out the Upgrade header",
    /// No connection to upstream.
    UpstreamUnreachable = 502 "upstream_unreachable" advice "check the network and VPN",
    /// No TLS with upstream.
    UpstreamTls = 502 "upstream_tls" advice "check this machine's clock with `date`, and what is between it and upstream",
    /// Upstream redirects.
    UpstreamRedirect = 502 "upstream_redirect" advice "sign in to the network, if it wants that; else let --upstream name the API itself",
    /// Upstream's reply is none, cut, too large or not JSON.
    UpstreamInvalidResponse = 502 "upstream_invalid_response" advice "try again; if it stays so, look at https://www.vercel-status.com and check the VPN or proxy",
    /// There is no fresh OIDC token to be had.
    RefreshFailed = 502 "refresh_failed" run "vercel env pull",
    /// There is no OIDC token.
    OidcTokenMissing = 503 "oidc_token_missing" run "vercel env pull",
    /// The OIDC token has expired.
    OidcTokenExpired = 503 "oidc_token_expired" run "vercel env pull",
    /// The OIDC token cannot be used.
    OidcTokenInvalid = 503 "oidc_token_invalid" run "connect-sidecar doctor",
    /// Too much at once.
    Overloaded = 503 "overloaded" advice "ask again after the seconds that Retry-After names, and fewer at once",
    /// Requests of a run's programs cannot be intercepted.
    InterceptionUnavailable = 503 "interception_unavailable" run "connect-sidecar doctor",
    /// Upstream is too slow.
    UpstreamTimeout = 504 "upstream_timeout" advice "try again; check the VPN or proxy in between",
    /// The request has been through a sidecar already.
    LoopDetected = 508 "loop_detected" advice "let --upstream name the API itself, not a sidecar",
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
    /// What mends it. Boxed, since an error is part of every result.
    pub remedy: Box<Remedy>,
    /// `Allow`, with a 405.
    pub allow: Option<&'static str>,
    /// `Retry-After`: upstream's, or our own in whole seconds.
    pub retry_after: Option<HeaderValue>,
    /// Seconds that the OIDC token has left, once that is worth a warning.
    pub oidc_expires_in: Option<u32>,
    /// Those who listen were told of it already, with what was asked for.
    pub is_told: bool,
    /// The connection cannot be used again: the rest of the request was not read.
    pub close: bool,
}

impl RequestError {
    /// An error with the remedy of its code.
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
            is_told: false,
            close: false,
        }
    }

    /// Says what to change, in words.
    pub fn hint(self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::advice(hint))
    }

    /// Says what to run.
    pub fn command(self, command: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::run(command))
    }

    /// Says what mends it.
    pub fn remedy(mut self, remedy: Remedy) -> Self {
        *self.remedy = remedy;
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

    /// For the log: the message, and what mends it unless the message says that itself.
    pub fn line(&self) -> String {
        self.remedy.after(&self.message)
    }

    /// The reply's body: Vercel's shape plus what mends it and whose error it is.
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
        let error = RequestError::new(Code::OidcTokenExpired, "It \"expired\".");
        let body = String::from_utf8(error.body()).expect("UTF-8");
        let expected = r#"{"error":{"code":"oidc_token_expired","message":"It \"expired\".","hint":"vercel env pull","command":"vercel env pull","source":"connect-sidecar"}}"#;
        assert_eq!(body, expected);
    }

    #[test]
    fn an_error_of_every_code_says_what_to_do_and_has_a_command_only_where_one_can_be_pasted() {
        for code in Code::ALL {
            let body: serde_json::Value =
                serde_json::from_slice(&RequestError::new(*code, "x").body()).expect("a body");
            let (hint, command) = (body["error"]["hint"].as_str(), body["error"]["command"].as_str());
            let hint = hint.unwrap_or_else(|| panic!("{code:?} has no hint"));
            assert!(!hint.is_empty() && !hint.ends_with('.'), "{code:?}: {hint}");
            let is_ours = |command: &str| command.starts_with("vercel ") || command.starts_with("connect-sidecar ");
            assert!(command.is_none_or(is_ours), "{code:?}: {command:?}");
            assert_eq!(is_ours(hint), command.is_some(), "{code:?}: {hint}");
        }
    }

    #[test]
    fn who_knows_the_cause_says_what_mends_it() {
        let error = || RequestError::new(Code::OidcTokenExpired, "x");
        assert_eq!(*error().hint("set the clock").remedy, Remedy::advice("set the clock"));
        assert_eq!(*error().command("vercel link").remedy, Remedy::run("vercel link"));
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
