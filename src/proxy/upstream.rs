//! The client for Connect's API: one fixed origin, verified TLS, limits of time and size.
//!
//! A request consists of the raw target, the raw body, the bearer token and up to three tracing headers. A response
//! that is not valid (a redirect, a captive portal's HTML, a truncated body) becomes an error. A POST that upstream may
//! have received is never resent, because token requests are billed. Sources: docs/http.md section 1, docs/security.md
//! U and L.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{Full, LengthLimitError};
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{info, warn};

use super::admission::{Admission, Permit};
use super::dialer::Dialer;
use super::error::{Code, RequestError};
use super::guard::VIA_NAME;
pub use super::pool::EMULATOR_PORT;
use super::pool::{self, Pool, RequestBody};
use super::remediation::UpstreamError;
use super::reply::Answer;
use super::resolver::Names;
use super::route::Action;
use crate::os::clock::{Clock, Correction, Mark, Timestamp, format_duration};
use crate::os::env_proxy::EnvProxy;

/// Time until the response head is received, including connecting.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Time until the whole response is received.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a response body, in bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Minimum time between two clock checks, unless the machine's clock has jumped since.
const CLOCK_SYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Time for a clock check, including its confirmation.
const CLOCK_SYNC_TIMEOUT: Duration = Duration::from_secs(3);
const USER_AGENT: &str = concat!("connect-sidecar/", env!("CARGO_PKG_VERSION"));

/// The app's headers that are forwarded.
const TRACING_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("x-request-id"),
];

/// The settings of the client.
#[derive(Debug, Clone)]
pub struct Options {
    /// `https`, or `http` on loopback.
    pub origin: Uri,
    /// Whether the origin's name may resolve to this machine. For Connect itself, that would lead back to the sidecar.
    pub may_be_this_machine: bool,
    /// The source of addresses.
    pub names: Names,
    /// Roots trusted besides the platform's.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Added as `?teamId=`.
    pub team_id: Option<String>,
    /// Use the environment's proxy.
    pub use_env_proxy: bool,
    /// The environment's proxy settings.
    pub env_proxy: EnvProxy,
}

impl Options {
    /// The origin, for messages.
    pub fn name(&self) -> String {
        pool::name_of(&self.origin)
    }

    /// Whether the origin's host is `localhost` or a loopback address.
    pub fn is_on_loopback(&self) -> bool {
        pool::is_on_loopback(&self.origin)
    }
}

/// A request for upstream without its bearer token.
#[derive(Debug, Clone)]
pub struct Outgoing {
    action: Action,
    method: Method,
    target: Uri,
    headers: HeaderMap,
    body: Bytes,
}

/// The client.
pub struct Upstream {
    team_id: Option<String>,
    /// The headers that all requests have in common.
    base_headers: HeaderMap,
    admission: Admission,
    dialer: Arc<Dialer>,
    pool: Pool,
    clock: Clock,
    /// One permit: one clock check at a time.
    clock_sync: Semaphore,
    last_clock_sync: Mutex<Option<(Instant, Mark)>>,
}

impl Upstream {
    /// A client without connections.
    pub fn new(options: Options, clock: Clock) -> Self {
        let Options { origin, may_be_this_machine, names, extra_roots, team_id, use_env_proxy, env_proxy } = options;
        let dialer = Arc::new(Dialer::new(names, extra_roots, use_env_proxy.then_some(env_proxy)));
        let authority = origin.authority().map(Authority::as_str).unwrap_or_default();
        let mut base_headers = HeaderMap::with_capacity(16);
        for (name, value) in [
            (header::HOST, authority),
            (header::ACCEPT, "application/json"),
            (header::ACCEPT_ENCODING, "identity"),
            (header::USER_AGENT, USER_AGENT),
            (header::VIA, "1.1 connect-sidecar"),
            (HeaderName::from_static("cdn-loop"), VIA_NAME),
        ] {
            base_headers.extend(HeaderValue::from_str(value).map(|value| (name, value)));
        }
        Self {
            team_id,
            base_headers,
            admission: Admission::new(),
            pool: Pool::new(origin, may_be_this_machine, dialer.clone(), clock.clone()),
            dialer,
            clock,
            clock_sync: Semaphore::new(1),
            last_clock_sync: Mutex::new(None),
        }
    }

    /// Opens a connection in advance.
    pub async fn prepare(&self) {
        self.pool.prepare().await;
    }

    /// Builds a request with the app's raw path, its body and its tracing headers.
    pub fn outgoing(&self, action: Action, app: &Parts, body: Bytes) -> Result<Outgoing, RequestError> {
        let bad_target = |_| RequestError::new(Code::BadTarget, "The request target cannot be forwarded.");
        let target = match &self.team_id {
            Some(team) => format!("{}?teamId={team}", app.uri.path()).parse().map_err(bad_target)?,
            None => app.uri.clone(),
        };
        let mut headers = self.base_headers.clone();
        if app.method == Method::POST || !body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        for name in TRACING_HEADERS {
            let mut values = app.headers.get_all(&name).iter();
            if let (Some(value), None) = (values.next(), values.next())
                && value.len() <= 256
                && value.as_bytes().iter().all(|b| (0x20..0x7F).contains(b))
            {
                headers.insert(name, value.clone());
            }
        }
        Ok(Outgoing { action, method: app.method.clone(), target, headers, body })
    }

    /// Waits for a permit for a request, within the limits of number and rate ([`super::admission`]). Revocations are
    /// not limited by the rate.
    pub async fn admit(&self, action: Action) -> Result<Permit<'_>, RequestError> {
        match action {
            Action::Revoke => self.admission.admit_above_rate().await,
            _ => self.admission.admit().await,
        }
    }

    /// Sends a request with this `Authorization` and returns a valid answer. It holds its permit meanwhile.
    pub async fn send(
        &self,
        outgoing: &Outgoing,
        bearer: HeaderValue,
        _permit: Permit<'_>,
    ) -> Result<Answer, RequestError> {
        let mut request = outgoing.request();
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        self.exchange(outgoing.action, request).await
    }

    /// Sends a request without a credential, to test the connection and to learn upstream's time. Any valid answer will
    /// do, although it is an authentication error.
    pub async fn probe(&self) -> Result<Answer, RequestError> {
        let mut request = Request::new(RequestBody::Left(Full::default()));
        *request.uri_mut() = Uri::from_static("/v1/connect/connectors/connect-sidecar-doctor");
        *request.headers_mut() = self.base_headers.clone();
        let answer = self.exchange(Action::Metadata, request).await;
        if self.clock.has_unconfirmed_offset() {
            self.sync_clock().await;
        }
        answer
    }

    async fn exchange(&self, action: Action, request: Request<RequestBody>) -> Result<Answer, RequestError> {
        let start = Instant::now();
        let too_slow = |_| RequestError::new(Code::UpstreamTimeout, format!("{} did not answer in time.", self.name()));
        let sending = tokio::time::timeout_at(start + HEAD_TIMEOUT, self.pool.send(request));
        let pooled = sending.await.map_err(too_slow)?.map_err(|failure| self.pool.explain(failure, true))?;
        let (status, headers) = (pooled.response.status(), pooled.response.headers().clone());
        self.observe_date(&headers);
        if status.is_redirection() {
            return Err(RequestError::new(
                Code::UpstreamRedirect,
                format!("{} answered with a redirect ({}), which is never followed.", self.name(), status.as_u16()),
            ));
        }
        let body = tokio::time::timeout_at(start + TOTAL_TIMEOUT, pooled.body(MAX_BODY_BYTES));
        let body = body.await.map_err(too_slow)?.map_err(|e| {
            let too_long = e.is::<LengthLimitError>();
            self.invalid(
                status,
                &headers,
                if too_long { "an answer of over 1 MiB" } else { "an answer that breaks off" },
            )
        })?;
        match flaw(action, status, &body) {
            Some(flaw) => Err(self.invalid(status, &headers, flaw)),
            None => Ok(Answer::new(status, &headers, &body)),
        }
    }

    /// Asks upstream for its time, without a credential, and once more if a difference needs confirmation. At most once
    /// a minute unless the machine's clock jumps. Concurrent callers share one check.
    pub async fn sync_clock(&self) {
        let Ok(_one_at_a_time) = self.clock_sync.acquire().await else { return };
        let _permit = {
            let mut last = self.last_clock_sync.lock().unwrap_or_else(PoisonError::into_inner);
            let is_recent =
                |(at, mark): (Instant, Mark)| at.elapsed() < CLOCK_SYNC_INTERVAL && !self.clock.has_jumped_since(mark);
            if last.is_some_and(is_recent) {
                return;
            }
            // Requests wait for this check, so it does not wait for a permit itself.
            let Some(permit) = self.admission.try_admit() else { return };
            *last = Some((Instant::now(), self.clock.mark()));
            permit
        };
        let sync = async {
            self.request_date().await?;
            if self.clock.has_unconfirmed_offset() {
                self.request_date().await?;
            }
            Some(())
        };
        // Without an answer, the clock is not corrected.
        let _ = tokio::time::timeout(CLOCK_SYNC_TIMEOUT, sync).await;
    }

    async fn request_date(&self) -> Option<()> {
        let mut request = Request::new(RequestBody::Left(Full::default()));
        *request.method_mut() = Method::HEAD;
        *request.headers_mut() = self.base_headers.clone();
        request.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let pooled = self.pool.send(request).await.ok()?;
        self.observe_date(pooled.response.headers());
        pooled.body(0).await.ok().map(drop)
    }

    /// The dialer, for connections to other hosts of Vercel's.
    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.dialer
    }

    /// The team that is added to every request.
    pub(super) fn team_id(&self) -> Option<&str> {
        self.team_id.as_deref()
    }

    /// The origin, if it was set by configuration.
    pub(super) fn configured_origin(&self) -> Option<&Uri> {
        self.pool.configured_origin()
    }

    /// The origin, for messages.
    pub fn name(&self) -> &str {
        self.pool.name()
    }

    /// Compares the clock with the `Date` of a response.
    fn observe_date(&self, headers: &HeaderMap) {
        // A cached response has the `Date` of the original one.
        if headers.get_all(header::AGE).iter().any(|age| age != "0") {
            return;
        }
        let date = headers.get(header::DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        let Some(date) = date else { return };
        match self.clock.observe(Timestamp::from(date)) {
            Correction::Unchanged => {}
            Correction::Began { offset_ms } => {
                let off = format_duration(Duration::from_millis(offset_ms.unsigned_abs()));
                let how = if offset_ms > 0 { "behind" } else { "ahead of" };
                let code = "clock_skew";
                warn!(code, offset_ms, "this machine's clock is {off} {how} {}'s, which is used instead", self.name());
            }
            Correction::Ended => info!("this machine's clock agrees with {}'s again", self.name()),
            Correction::Implausible { offset_ms } => {
                let off = format_duration(Duration::from_millis(offset_ms.unsigned_abs()));
                let how = if offset_ms > 0 { "ahead of" } else { "behind" };
                let code = "clock_skew";
                warn!(code, offset_ms, "{}'s clock is {off} {how} this machine's, which is not believed", self.name());
            }
        }
    }

    /// The error for a response that cannot be passed on. 429 and 503 keep their status and `Retry-After`.
    fn invalid(&self, status: StatusCode, headers: &HeaderMap, flaw: &str) -> RequestError {
        let message = format!("{} sent {flaw} (status {}).", self.name(), status.as_u16());
        let mut error = RequestError::new(Code::UpstreamInvalidResponse, message);
        error.upstream_status = Some(status);
        if UpstreamError::default().rejects_credential(status) {
            error = error.command("vercel env pull");
        }
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            error.status = status;
            error.retry_after = headers.get(header::RETRY_AFTER).cloned();
        }
        error
    }
}

/// Why a complete response cannot be passed on, if it cannot.
pub fn flaw(action: Action, status: StatusCode, body: &[u8]) -> Option<&'static str> {
    if status == StatusCode::NO_CONTENT {
        return (action != Action::Revoke).then_some("no content where JSON is due");
    }
    // `IgnoredAny` does not check that strings are UTF-8.
    let is_json = str::from_utf8(body).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
    let is_object = body.trim_ascii_start().starts_with(b"{");
    match (is_json, action == Action::Token && status.is_success() && !is_object) {
        (false, _) => Some("an answer that is not JSON"),
        (true, true) => Some("an answer that is no JSON object"),
        (true, false) => None,
    }
}

impl Outgoing {
    /// The action of its route.
    pub fn action(&self) -> Action {
        self.action
    }

    fn request(&self) -> Request<RequestBody> {
        let mut request = Request::new(RequestBody::Left(Full::new(self.body.clone())));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }
}
