//! Connections to upstream: opened, kept alive, used again, thrown away.
//!
//! A connection that is not in use is just a value: the request that takes it drives it, in the task that it runs in
//! anyway, so no connection has a task of its own and nothing is woken twice. A request that upstream may have received
//! is never sent again; one that provably was not, because a kept connection had closed before its first byte, goes out
//! on another.

use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::Scheme;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tower_service::Service;

use super::resolver::Resolver;
use crate::clock::{Clock, Timestamp};
use crate::tls;

/// Name resolution, connection and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// All addresses of one family share this, and the other family begins 0.3 s later: one that swallows what is sent to it
/// leaves time for the next, and for TLS.
const TCP_TIMEOUT: Duration = Duration::from_secs(4);
/// A larger reply head is refused, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Kept connections are used again within this time.
const KEEP_ALIVE: Duration = Duration::from_secs(50);
/// Most connections that are kept.
const MAX_KEPT: usize = 16;
/// When wall clock and monotonic clock disagree by this much, the machine slept and its connections are dead.
const SLEPT: Duration = Duration::from_secs(10);

type BoxError = Box<dyn StdError + Send + Sync>;
type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Why there was no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The trust roots could not be loaded.
    Roots(String),
    /// No connection; the request was not sent. The chain of causes tells whether it was TLS.
    Connect(BoxError),
    /// The connection broke off. The request may have been received.
    BrokenOff,
}

/// Connections to one origin.
pub(super) struct Pool {
    scheme: Scheme,
    origin: Uri,
    resolver: Resolver,
    extra_roots: Vec<CertificateDer<'static>>,
    use_env_proxy: bool,
    clock: Clock,
    /// Trust roots take some 40 ms to load: done once, off the way to the first reply.
    connector: OnceCell<HttpsConnector<Dialer>>,
    /// The one used last is at the end.
    kept: Mutex<Vec<Line>>,
}

/// `None` once it has ended. Boxed: with its TLS it is kilobytes, which every move of the request's task would copy.
type Connection = Option<Box<http1::Connection<Stream, Full<Bytes>>>>;

/// A connection, and the hand that sends on it.
struct Line {
    sender: SendRequest<Full<Bytes>>,
    connection: Connection,
    kept_at: (Instant, Timestamp),
}

/// An answer whose body is still to come.
pub(super) struct Answering<'a> {
    pool: &'a Pool,
    line: Line,
    /// Head and body.
    pub(super) response: Response<Incoming>,
}

impl Pool {
    /// Connections to `origin`, none open yet.
    pub(super) fn new(
        origin: Uri,
        resolver: Resolver,
        extra_roots: Vec<CertificateDer<'static>>,
        use_env_proxy: bool,
        clock: Clock,
    ) -> Self {
        Self {
            scheme: origin.scheme().cloned().unwrap_or(Scheme::HTTPS),
            origin,
            resolver,
            extra_roots,
            use_env_proxy,
            clock,
            connector: OnceCell::new(),
            kept: Mutex::default(),
        }
    }

    /// Loads the trust roots and opens a connection, so that the first request need not wait for either.
    pub(super) async fn prepare(&self) {
        // A failure is told by the request that meets it.
        if let Ok(line) = self.connect().await {
            self.keep(line);
        }
    }

    /// Sends a request, on a kept connection if one is alive.
    pub(super) async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Answering<'_>, Failure> {
        loop {
            let (mut line, was_kept) = match self.take() {
                Some(line) => (line, true),
                None => (self.connect().await?, false),
            };
            let Line { sender, connection, .. } = &mut line;
            let sent = drive(connection, async {
                match sender.ready().await {
                    Ok(()) => sender.try_send_request(request).await.map_err(|mut e| e.take_message()),
                    Err(_) => Err(Some(request)),
                }
            })
            .await;
            match sent {
                Ok(response) => return Ok(Answering { pool: self, line, response }),
                Err(Some(unsent)) if was_kept => request = unsent,
                Err(_) => return Err(Failure::BrokenOff),
            }
        }
    }

    async fn connect(&self) -> Result<Line, Failure> {
        let mut connector = self.connector().await?.clone();
        // Boxed for the same reason: few requests open a connection, all would carry the room for it.
        let opening = Box::pin(async {
            poll_fn(|cx| connector.poll_ready(cx)).await?;
            let stream = connector.call(self.origin.clone()).await?;
            Ok(http1::Builder::new().max_buf_size(MAX_HEAD_BYTES).handshake(stream).await?)
        });
        let opened =
            tokio::time::timeout(CONNECT_TIMEOUT, opening).await.unwrap_or_else(|_| Err(ConnectTimeout.into()));
        let (sender, connection) = opened.map_err(Failure::Connect)?;
        Ok(Line { sender, connection: Some(Box::new(connection)), kept_at: self.now() })
    }

    async fn connector(&self) -> Result<&HttpsConnector<Dialer>, Failure> {
        self.connector
            .get_or_try_init(|| async {
                let tls = if self.scheme == Scheme::HTTPS {
                    let roots = self.extra_roots.clone();
                    let loading = tokio::task::spawn_blocking(move || tls::client_config(roots)).await;
                    loading.map_err(|_| Failure::Roots("loading them broke off".into()))?
                } else {
                    tls::client_config_without_roots()
                };
                let tls = tls.map_err(|e| Failure::Roots(e.to_string()))?;
                let direct = with_options(HttpConnector::new_with_resolver(self.resolver.clone()));
                let matcher = self.use_env_proxy.then(|| Arc::new(Matcher::from_env()));
                let dialer = Dialer { direct, to_proxy: with_options(HttpConnector::new()), matcher };
                Ok(HttpsConnector::from((dialer, Arc::new(tls))))
            })
            .await
    }

    /// A kept connection that is not known to be dead.
    fn take(&self) -> Option<Line> {
        let (at, wall) = self.now();
        let mut kept = self.kept();
        kept.retain(|line| {
            let (kept_at, kept_wall) = line.kept_at;
            let (awake, passed) = (at.duration_since(kept_at), wall.since(kept_wall));
            awake < KEEP_ALIVE && awake.abs_diff(passed) < SLEPT && !line.sender.is_closed()
        });
        kept.pop()
    }

    fn keep(&self, mut line: Line) {
        line.kept_at = self.now();
        let mut kept = self.kept();
        if kept.len() < MAX_KEPT && !line.sender.is_closed() {
            kept.push(line);
        }
    }

    fn now(&self) -> (Instant, Timestamp) {
        (Instant::now(), self.clock.local())
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Line>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answering<'_> {
    /// The whole body; an error if it is longer than `limit` bytes ([`http_body_util::LengthLimitError`]) or breaks off.
    pub(super) async fn body(mut self, limit: usize) -> Result<Bytes, BoxError> {
        let body = Limited::new(self.response.into_body(), limit).collect();
        let body = drive(&mut self.line.connection, body).await?.to_bytes();
        self.pool.keep(self.line);
        Ok(body)
    }
}

/// Does `work` while moving what goes over the connection. One that ends is dropped at once: only that tells the work,
/// and hands it back a request that was still waiting to be written.
async fn drive<T>(connection: &mut Connection, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        if connection.as_mut().is_some_and(|open| Pin::new(open).poll(cx).is_ready()) {
            *connection = None;
        }
        work.as_mut().poll(cx)
    })
    .await
}

fn with_options<R>(mut http: HttpConnector<R>) -> HttpConnector<R> {
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(Duration::from_secs(15)));
    http.set_connect_timeout(Some(TCP_TIMEOUT));
    http
}

/// Opens TCP connections, through a proxy of our environment where asked for.
#[derive(Clone)]
struct Dialer {
    direct: HttpConnector<Resolver>,
    /// A proxy may well be on this machine.
    to_proxy: HttpConnector,
    matcher: Option<Arc<Matcher>>,
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.direct.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let proxy = self.matcher.as_ref().and_then(|matcher| matcher.intercept(&to));
        let (mut direct, to_proxy) = (self.direct.clone(), self.to_proxy.clone());
        Box::pin(async move {
            match proxy {
                None => Ok(direct.call(to).await?),
                Some(proxy) => {
                    let mut tunnel = Tunnel::new(proxy.uri().clone(), to_proxy);
                    if let Some(auth) = proxy.basic_auth() {
                        tunnel = tunnel.with_auth(auth.clone());
                    }
                    Ok(tunnel.call(to).await?)
                }
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
