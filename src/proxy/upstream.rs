//! The way to Connect: one pinned origin, TLS always verified, everything bounded in time and size.
//!
//! A request is built from nothing but the raw target, the raw body, the bearer and three tracing headers. A reply that
//! is no proper answer (a redirect, HTML of a captive portal, a cut body) never leaves here. A POST that upstream may
//! have received is never sent twice: token requests are billed. Sources: docs/http.md section 1, docs/security.md U and L.

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

use super::admission::{Admission, Place};
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

/// Until the head of the reply is there, connecting included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Until the whole reply is there.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30);
/// A larger reply body is refused, in bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Upstream is asked for its clock no more often than this, unless the machine's clock has jumped since.
const CLOCK_QUESTION_EVERY: Duration = Duration::from_secs(60);
/// And has this long to answer, and to confirm what it has said.
const CLOCK_QUESTION_TIMEOUT: Duration = Duration::from_secs(3);
const USER_AGENT: &str = concat!("connect-sidecar/", env!("CARGO_PKG_VERSION"));

/// What is passed on of the app's headers.
const TRACING_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("x-request-id"),
];

/// Where upstream is and how it is reached.
#[derive(Debug, Clone)]
pub struct Options {
    /// `https`, or `http` on loopback.
    pub origin: Uri,
    /// Whether it may be on this machine. Connect itself is not: there, its name would lead back to us.
    pub may_be_this_machine: bool,
    /// Where the addresses of its name come from.
    pub names: Names,
    /// Trusted besides the platform's roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Added as `?teamId=`.
    pub team_id: Option<String>,
    /// Honour the proxy of our environment.
    pub use_env_proxy: bool,
    /// What our environment says of proxies.
    pub env_proxy: EnvProxy,
}

impl Options {
    /// The origin, for people.
    pub fn name(&self) -> String {
        pool::name_of(&self.origin)
    }

    /// Whether it is on loopback by what it is called.
    pub fn is_on_loopback(&self) -> bool {
        pool::is_on_loopback(&self.origin)
    }
}

/// One request for upstream, without its bearer.
#[derive(Debug, Clone)]
pub struct Outgoing {
    action: Action,
    method: Method,
    target: Uri,
    headers: HeaderMap,
    body: Bytes,
}

/// The client for upstream.
pub struct Upstream {
    team_id: Option<String>,
    /// The headers of every request, besides those that depend on it.
    own_headers: HeaderMap,
    admission: Admission,
    dialer: Arc<Dialer>,
    pool: Pool,
    clock: Clock,
    clock_questions: Semaphore,
    last_clock_question: Mutex<Option<(Instant, Mark)>>,
}

impl Upstream {
    /// A client; connects to nothing yet.
    pub fn new(options: Options, clock: Clock) -> Self {
        let Options { origin, may_be_this_machine, names, extra_roots, team_id, use_env_proxy, env_proxy } = options;
        let dialer = Arc::new(Dialer::new(names, extra_roots, use_env_proxy.then_some(env_proxy)));
        let authority = origin.authority().map(Authority::as_str).unwrap_or_default();
        let mut own_headers = HeaderMap::with_capacity(16);
        for (name, value) in [
            (header::HOST, authority),
            (header::ACCEPT, "application/json"),
            (header::ACCEPT_ENCODING, "identity"),
            (header::USER_AGENT, USER_AGENT),
            (header::VIA, "1.1 connect-sidecar"),
            (HeaderName::from_static("cdn-loop"), VIA_NAME),
        ] {
            own_headers.extend(HeaderValue::from_str(value).map(|value| (name, value)));
        }
        Self {
            team_id,
            own_headers,
            admission: Admission::new(),
            pool: Pool::new(origin, may_be_this_machine, dialer.clone(), clock.clone()),
            dialer,
            clock,
            clock_questions: Semaphore::new(1),
            last_clock_question: Mutex::new(None),
        }
    }

    /// Opens a connection ahead of the first request.
    pub async fn prepare(&self) {
        self.pool.prepare().await;
    }

    /// Builds a request: the raw path and `body` byte for byte, and of the app's headers only those for tracing.
    pub fn outgoing(&self, action: Action, app: &Parts, body: Bytes) -> Result<Outgoing, RequestError> {
        let bad_target = |_| RequestError::new(Code::BadTarget, "The request target cannot be forwarded.");
        let target = match &self.team_id {
            Some(team) => format!("{}?teamId={team}", app.uri.path()).parse().map_err(bad_target)?,
            None => app.uri.clone(),
        };
        let mut headers = self.own_headers.clone();
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

    /// Waits until one more request may go out; an error if that takes too long or they are too many. A revocation is
    /// never one too many.
    pub async fn admit(&self, action: Action) -> Result<Place<'_>, RequestError> {
        match action {
            Action::Revoke => self.admission.admit_at_any_rate().await,
            _ => self.admission.admit().await,
        }
    }

    /// Sends a request with this `Authorization` and takes a proper answer back. It has its place for as long.
    pub async fn send(
        &self,
        outgoing: &Outgoing,
        bearer: HeaderValue,
        _place: Place<'_>,
    ) -> Result<Answer, RequestError> {
        let mut request = outgoing.request();
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        self.exchange(outgoing.action, request).await
    }

    /// Asks, without a credential, for what needs one: that there is a proper answer tells all that can be told of the way
    /// there, and `Clock` learns the time. What the answer says does not matter.
    pub async fn probe(&self) -> Result<Answer, RequestError> {
        let mut request = Request::new(RequestBody::Left(Full::default()));
        *request.uri_mut() = Uri::from_static("/v1/connect/connectors/connect-sidecar-doctor");
        *request.headers_mut() = self.own_headers.clone();
        let answer = self.exchange(Action::Metadata, request).await;
        if self.clock.has_unconfirmed_offset() {
            self.ask_clock().await;
        }
        answer
    }

    async fn exchange(&self, action: Action, request: Request<RequestBody>) -> Result<Answer, RequestError> {
        let begun = Instant::now();
        let too_slow = |_| RequestError::new(Code::UpstreamTimeout, format!("{} did not answer in time.", self.name()));
        let sending = tokio::time::timeout_at(begun + HEAD_TIMEOUT, self.pool.send(request));
        let answering = sending.await.map_err(too_slow)?.map_err(|failure| self.pool.explain(failure, true))?;
        let (status, headers) = (answering.response.status(), answering.response.headers().clone());
        self.learn_the_time(&headers);
        if status.is_redirection() {
            return Err(RequestError::new(
                Code::UpstreamRedirect,
                format!("{} answered with a redirect ({}), which is never followed.", self.name(), status.as_u16()),
            ));
        }
        let body = tokio::time::timeout_at(begun + TOTAL_TIMEOUT, answering.body(MAX_BODY_BYTES));
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

    /// Asks upstream for its clock, without a credential, and again if that has to be confirmed; at most once a minute for
    /// as long as the machine's clock does not jump. Callers at the same time share one question.
    pub async fn ask_clock(&self) {
        let Ok(_one_at_a_time) = self.clock_questions.acquire().await else { return };
        let _place = {
            let mut last = self.last_clock_question.lock().unwrap_or_else(PoisonError::into_inner);
            let was_lately =
                |(at, mark): (Instant, Mark)| at.elapsed() < CLOCK_QUESTION_EVERY && !self.clock.has_jumped_since(mark);
            if last.is_some_and(was_lately) {
                return;
            }
            // Requests wait for this: where it would have to wait itself, it is not asked, and may be the next time.
            let Some(place) = self.admission.admit_at_once() else { return };
            *last = Some((Instant::now(), self.clock.mark()));
            place
        };
        let questions = async {
            self.ask_clock_once().await?;
            if self.clock.has_unconfirmed_offset() {
                self.ask_clock_once().await?;
            }
            Some(())
        };
        // No answer leaves the clock as it is.
        let _ = tokio::time::timeout(CLOCK_QUESTION_TIMEOUT, questions).await;
    }

    async fn ask_clock_once(&self) -> Option<()> {
        let mut request = Request::new(RequestBody::Left(Full::default()));
        *request.method_mut() = Method::HEAD;
        *request.headers_mut() = self.own_headers.clone();
        request.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let answering = self.pool.send(request).await.ok()?;
        self.learn_the_time(answering.response.headers());
        answering.body(0).await.ok().map(drop)
    }

    /// How it is reached, for whoever goes to other hosts of Vercel's.
    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.dialer
    }

    /// The team that every request names.
    pub(super) fn team_id(&self) -> Option<&str> {
        self.team_id.as_deref()
    }

    /// The origin, if the settings name it.
    pub(super) fn named_origin(&self) -> Option<&Uri> {
        self.pool.named_origin()
    }

    /// The origin, for people.
    pub fn name(&self) -> &str {
        self.pool.name()
    }

    fn learn_the_time(&self, headers: &HeaderMap) {
        // A copy has the `Date` of its original.
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

    /// An error for a reply that cannot be passed on. 429 and 503 keep their status and `Retry-After`.
    fn invalid(&self, status: StatusCode, headers: &HeaderMap, what: &str) -> RequestError {
        let message = format!("{} sent {what} (status {}).", self.name(), status.as_u16());
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

/// Why a complete reply is no proper answer, if it is none.
pub fn flaw(action: Action, status: StatusCode, body: &[u8]) -> Option<&'static str> {
    if status == StatusCode::NO_CONTENT {
        return (action != Action::Revoke).then_some("no content where JSON is due");
    }
    // What is skipped over is not checked to be UTF-8.
    let is_json = str::from_utf8(body).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
    let is_object = body.trim_ascii_start().starts_with(b"{");
    match (is_json, action == Action::Token && status.is_success() && !is_object) {
        (false, _) => Some("an answer that is not JSON"),
        (true, true) => Some("an answer that is no JSON object"),
        (true, false) => None,
    }
}

impl Outgoing {
    /// What it is for.
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
