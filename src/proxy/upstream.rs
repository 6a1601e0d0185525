//! The way to Connect: one pinned origin, TLS always verified, everything bounded in time and size.
//!
//! A request is built from nothing but the raw target, the raw body, the bearer and three tracing headers. A reply that
//! is no proper answer (a redirect, HTML of a captive portal, a cut body) never leaves here. A POST that upstream may
//! have received is never sent twice: token requests are billed. Sources: interface.md section 3, trust-policy.md 4.7.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, Scheme};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::{OnceCell, Semaphore};
use tower_service::Service;
use tracing::{info, warn};

use super::error::{Code, RequestError};
use super::guard::VIA_NAME;
use super::reply::Answer;
use super::route::Action;
use crate::clock::{Clock, Correction, Timestamp, spoken};
use crate::tls;

/// Name resolution, connection and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Until the head of the reply is there, connecting included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Until the whole reply is there.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30);
/// A larger reply body is refused, in bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// A larger reply head is refused, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Idle connections are kept this long.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Upstream is asked for its clock no more often than this.
const CLOCK_QUESTION_EVERY: Duration = Duration::from_secs(60);
/// And has this long to answer.
const CLOCK_QUESTION_TIMEOUT: Duration = Duration::from_secs(3);
/// When wall clock and monotonic clock disagree by this much between two requests, the machine slept and the
/// connections are dead.
const SLEPT: Duration = Duration::from_secs(10);

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
    pub scheme: Scheme,
    /// Host and port.
    pub authority: Authority,
    /// Trusted besides the platform's roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Added as `?teamId=`.
    pub team_id: Option<String>,
    /// Honour `HTTPS_PROXY` and `NO_PROXY` of our environment.
    pub use_env_proxy: bool,
}

/// One request for upstream, without its bearer.
#[derive(Debug, Clone)]
pub struct Outgoing {
    action: Action,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
}

/// The client for upstream.
pub struct Upstream {
    options: Options,
    clock: Clock,
    /// Trust roots take some 40 ms to load: done once, off the way to the first reply.
    tls: OnceCell<Arc<rustls::ClientConfig>>,
    pool: Mutex<Option<Pool>>,
    clock_questions: Semaphore,
    last_clock_question: Mutex<Option<tokio::time::Instant>>,
}

struct Pool {
    client: HttpClient,
    used_at: Instant,
    used_at_wall: Timestamp,
}

type HttpClient = Client<Timed<HttpsConnector<Dialer>>, Full<Bytes>>;

impl Upstream {
    /// A client; connects to nothing yet.
    pub fn new(options: Options, clock: Clock) -> Self {
        Self {
            options,
            clock,
            tls: OnceCell::new(),
            pool: Mutex::new(None),
            clock_questions: Semaphore::new(1),
            last_clock_question: Mutex::new(None),
        }
    }

    /// Loads the trust roots, so that the first request need not wait for them.
    pub async fn prepare(&self) {
        // A failure is told by the request that needs them.
        let _ = self.tls().await;
    }

    /// Builds a request: the raw `path` and `body` byte for byte, and of the app's headers only those for tracing.
    pub fn outgoing(
        &self,
        action: Action,
        method: Method,
        path: &str,
        app_headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Outgoing, RequestError> {
        let target = match &self.options.team_id {
            Some(team) => format!("{path}?teamId={team}"),
            None => path.to_owned(),
        };
        let uri = Uri::builder()
            .scheme(self.options.scheme.clone())
            .authority(self.options.authority.clone())
            .path_and_query(target)
            .build()
            .map_err(|_| RequestError::new(Code::BadTarget, "The request target cannot be forwarded."))?;
        let mut headers = HeaderMap::with_capacity(12);
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        headers.insert(header::VIA, HeaderValue::from_static("1.1 connect-sidecar"));
        headers.insert("cdn-loop", HeaderValue::from_static(VIA_NAME));
        if method == Method::POST || !body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        for name in TRACING_HEADERS {
            let mut values = app_headers.get_all(&name).iter();
            if let (Some(value), None) = (values.next(), values.next())
                && value.len() <= 256
                && value.as_bytes().iter().all(|b| (0x20..0x7F).contains(b))
            {
                headers.insert(name, value.clone());
            }
        }
        Ok(Outgoing { action, method, uri, headers, body })
    }

    /// Sends a request with this `Authorization` and takes a proper answer back.
    pub async fn send(&self, outgoing: &Outgoing, bearer: HeaderValue) -> Result<Answer, RequestError> {
        let begun = tokio::time::Instant::now();
        let mut request = outgoing.request();
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        let response =
            tokio::time::timeout(HEAD_TIMEOUT, self.exchange(request)).await.map_err(|_| self.too_slow())??;
        self.learn_the_time(response.headers());
        let (head, body) = response.into_parts();
        if head.status.is_redirection() {
            return Err(RequestError::new(
                Code::UpstreamRedirect,
                format!(
                    "{} answered with a redirect ({}), which is never followed.",
                    self.name(),
                    head.status.as_u16()
                ),
            ));
        }
        let body = tokio::time::timeout_at(begun + TOTAL_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect())
            .await
            .map_err(|_| self.too_slow())?
            .map_err(|e| {
                let what =
                    if e.is::<LengthLimitError>() { "an answer of over 1 MiB" } else { "an answer that breaks off" };
                self.invalid(head.status, &head.headers, what)
            })?
            .to_bytes();
        match flaw(outgoing.action, head.status, &body) {
            Some(flaw) => Err(self.invalid(head.status, &head.headers, flaw)),
            None => Ok(Answer::new(head.status, &head.headers, body)),
        }
    }

    /// Asks upstream for its clock, without a credential; at most once a minute. Callers at the same time share one
    /// question.
    pub async fn ask_clock(&self) {
        let Ok(_one_at_a_time) = self.clock_questions.acquire().await else { return };
        {
            let mut last = self.last_clock_question.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_some_and(|at| at.elapsed() < CLOCK_QUESTION_EVERY) {
                return;
            }
            *last = Some(tokio::time::Instant::now());
        }
        let uri = Uri::builder()
            .scheme(self.options.scheme.clone())
            .authority(self.options.authority.clone())
            .path_and_query("/")
            .build();
        let Ok(uri) = uri else { return };
        let mut request = Request::new(Full::default());
        *request.method_mut() = Method::HEAD;
        *request.uri_mut() = uri;
        request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        if let Ok(Ok(response)) = tokio::time::timeout(CLOCK_QUESTION_TIMEOUT, self.exchange(request)).await {
            self.learn_the_time(response.headers());
        }
    }

    /// The origin, for people.
    pub fn name(&self) -> String {
        format!("{}://{}", self.options.scheme, self.options.authority)
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<http::Response<Incoming>, RequestError> {
        let client = self.client().await?;
        client.request(request).await.map_err(|e| self.explain(&e))
    }

    fn learn_the_time(&self, headers: &HeaderMap) {
        let date = headers.get(header::DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        let Some(date) = date else { return };
        match self.clock.observe(Timestamp::from(date)) {
            Correction::Unchanged => {}
            Correction::Began { offset_ms } => {
                let off = spoken(Duration::from_millis(offset_ms.unsigned_abs()));
                let how = if offset_ms > 0 { "behind" } else { "ahead of" };
                warn!(offset_ms, "this machine's clock is {off} {how} {}'s, which is used instead", self.name());
            }
            Correction::Ended => info!("this machine's clock agrees with {}'s again", self.name()),
        }
    }

    async fn tls(&self) -> Result<&Arc<rustls::ClientConfig>, RequestError> {
        self.tls
            .get_or_try_init(|| async {
                if self.options.scheme != Scheme::HTTPS {
                    return tls::client_config_without_roots().map(Arc::new).map_err(|e| e.to_string());
                }
                let roots = self.options.extra_roots.clone();
                tokio::task::spawn_blocking(move || tls::client_config(roots))
                    .await
                    .map_err(|_| "loading them broke off".to_owned())
                    .and_then(|config| config.map_err(|e| e.to_string()))
                    .map(Arc::new)
            })
            .await
            .map_err(|e| {
                RequestError::new(Code::UpstreamTls, format!("Could not load the trusted root certificates: {e}."))
                    .hint("install ca-certificates, or connect-sidecar --upstream-ca FILE")
            })
    }

    /// The pooled client, made anew if the machine has slept since it was last used.
    async fn client(&self) -> Result<HttpClient, RequestError> {
        let tls = self.tls().await?.clone();
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (Instant::now(), self.clock.local());
        if let Some(pool) = &mut *pool {
            let awake = now.0.duration_since(pool.used_at);
            let passed = now.1.since(pool.used_at_wall);
            if awake.abs_diff(passed) < SLEPT {
                (pool.used_at, pool.used_at_wall) = now;
                return Ok(pool.client.clone());
            }
        }
        let client = self.connect_with(tls);
        *pool = Some(Pool { client: client.clone(), used_at: now.0, used_at_wall: now.1 });
        Ok(client)
    }

    fn connect_with(&self, tls: Arc<rustls::ClientConfig>) -> HttpClient {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(Duration::from_secs(15)));
        let matcher = self.options.use_env_proxy.then(|| Arc::new(Matcher::from_env()));
        let dialer = Dialer { http, matcher };
        let https = HttpsConnector::from((dialer, tls));
        Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .pool_max_idle_per_host(16)
            .http1_max_buf_size(MAX_HEAD_BYTES)
            .http1_max_headers(100)
            .build(Timed(https))
    }

    fn too_slow(&self) -> RequestError {
        RequestError::new(Code::UpstreamTimeout, format!("{} did not answer in time.", self.name()))
    }

    /// An error for a reply that cannot be passed on. 429 and 503 keep their status and `Retry-After`.
    fn invalid(&self, status: StatusCode, headers: &HeaderMap, what: &str) -> RequestError {
        let message = format!("{} sent {what} (status {}).", self.name(), status.as_u16());
        let mut error = RequestError::new(Code::UpstreamInvalidResponse, message);
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            error.status = status;
            error.retry_after = headers.get(header::RETRY_AFTER).cloned();
        }
        error
    }

    fn explain(&self, error: &hyper_util::client::legacy::Error) -> RequestError {
        let name = self.name();
        if !error.is_connect() {
            return RequestError::new(
                Code::UpstreamInvalidResponse,
                format!("{name} broke off the connection without an answer."),
            );
        }
        let causes: Vec<_> = std::iter::successors(error.source(), |&e| e.source()).collect();
        if let Some(tls) = causes.iter().copied().find_map(rustls_error) {
            let error = RequestError::new(Code::UpstreamTls, format!("No TLS with {name}: {tls}."));
            return match tls {
                rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => error.hint(
                    "if your company inspects TLS, pass its root certificate: connect-sidecar --upstream-ca FILE",
                ),
                _ => error,
            };
        }
        // The innermost cause is what the operating system said.
        let reason = causes.last().map_or_else(|| "no connection".to_owned(), ToString::to_string);
        let error = RequestError::new(Code::UpstreamUnreachable, format!("Could not connect to {name}: {reason}."));
        if self.options.use_env_proxy {
            error
        } else {
            error.hint("check the network; behind a proxy: connect-sidecar --use-env-proxy")
        }
    }
}

fn rustls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    error.downcast_ref().or_else(|| inner.and_then(|e| e.downcast_ref()))
}

/// Why a complete reply is no proper answer, if it is none.
fn flaw(action: Action, status: StatusCode, body: &[u8]) -> Option<&'static str> {
    if status == StatusCode::NO_CONTENT {
        return (action != Action::Revoke).then_some("no content where JSON is due");
    }
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok();
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

    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }
}

/// Opens TCP connections, through a proxy of our environment where asked for.
#[derive(Clone)]
struct Dialer {
    http: HttpConnector,
    matcher: Option<Arc<Matcher>>,
}

type Dialing<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;
type BoxError = Box<dyn StdError + Send + Sync>;

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Dialing<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let proxy = self.matcher.as_ref().and_then(|matcher| matcher.intercept(&to));
        let mut http = self.http.clone();
        Box::pin(async move {
            match proxy {
                None => Ok(http.call(to).await?),
                Some(proxy) => {
                    let mut tunnel = Tunnel::new(proxy.uri().clone(), http);
                    if let Some(auth) = proxy.basic_auth() {
                        tunnel = tunnel.with_auth(auth.clone());
                    }
                    Ok(tunnel.call(to).await?)
                }
            }
        })
    }
}

/// A connector that gives up after [`CONNECT_TIMEOUT`], name resolution and TLS included.
#[derive(Clone)]
struct Timed<C>(C);

impl<C> Service<Uri> for Timed<C>
where
    C: Service<Uri>,
    C::Error: Into<BoxError>,
    C::Future: Send + 'static,
    C::Response: 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Dialing<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.0.call(to);
        Box::pin(async move {
            match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(connected) => connected.map_err(Into::into),
                Err(_) => Err(ConnectTimeout.into()),
            }
        })
    }
}

#[derive(Debug)]
struct ConnectTimeout;

impl fmt::Display for ConnectTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no connection within 5 s")
    }
}

impl StdError for ConnectTimeout {}
