//! A pool of keep-alive connections to one origin, and the errors for failed requests.
//!
//! An idle connection is just a value: the request that takes it polls it in its own task, so connections need no tasks
//! of their own. A request that the server may have received is never resent. One that was provably not sent, because
//! an idle connection had closed before its first byte, is sent on another connection.
//!
//! Connections can die without notice, for example when a VPN is switched, and then usually all idle ones do. While a
//! request on a reused connection gets no response, no connection that became idle before it is reused. If there is
//! still no response when the request is given up, those connections are dropped.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_rustls::MaybeHttpsStream;
use rustls::CertificateError;
use tokio::sync::OnceCell;
use tokio::time::Instant;
use tower_service::Service;

use super::dialer::{self, BoxError, Connector, Dialer, ProxyFailed, TrustError, causes};
use super::error::{Code, RequestError};
use super::resolver::RefusedAddress;
use crate::os::clock::{Clock, Timestamp};
use crate::os::env_proxy::Unusable;

/// Timeout for name resolution, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of a response head, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Idle connections are reused within this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Maximum number of idle connections.
const MAX_IDLE: usize = 16;
/// If the wall clock and the monotonic clock differ by this much, the machine was asleep and its connections are dead.
const SLEEP_THRESHOLD: Duration = Duration::from_secs(10);

/// Of the connections that were idle for this long, only one is tried at a time.
const SUSPECT_AFTER_IDLE: Duration = Duration::from_secs(5);
/// A reused connection without a response for this long makes all that became idle before it suspect.
const SUSPECT_AFTER_SILENCE: Duration = Duration::from_secs(2);

/// The emulator's default port, next to the sidecar's.
pub const EMULATOR_PORT: u16 = 2775;

/// A stream to the origin, with TLS for `https`.
type Stream = MaybeHttpsStream<dialer::Stream>;
/// A request body: in memory, or streamed from an app.
pub(super) type RequestBody = Either<Full<Bytes>, Incoming>;

/// Why there is no response.
#[derive(Debug)]
pub(super) enum Failure {
    /// The trusted roots could not be loaded.
    Trust(TrustError),
    /// There is no connection, and the request was not sent. A TLS error is in the chain of causes.
    Connect(BoxError),
    /// The connection was closed. The server may have received the request.
    Closed,
}

/// A pool of connections to one origin.
pub(super) struct Pool {
    /// The origin, for messages.
    name: String,
    origin: Uri,
    may_be_this_machine: bool,
    dialer: Arc<Dialer>,
    clock: Clock,
    connector: OnceCell<Connector>,
    idle: Mutex<Idle>,
}

/// The connections that are not in use.
#[derive(Default)]
struct Idle {
    /// The most recently used one is the last.
    connections: Vec<PooledConnection>,
    /// The requests that wait for a response on a reused connection: when they were sent, and whether the connection
    /// had been idle for [`SUSPECT_AFTER_IDLE`].
    pending: Vec<(Instant, bool)>,
}

impl Idle {
    /// Whether a connection that became idle at that time may be dead, judging by the pending requests.
    fn is_suspect(&self, idle_since: Instant, now: Instant) -> bool {
        let was_idle = now.duration_since(idle_since) >= SUSPECT_AFTER_IDLE;
        self.pending.iter().any(|(sent, on_idle_connection)| {
            let is_silent = now.duration_since(*sent) >= SUSPECT_AFTER_SILENCE;
            idle_since <= *sent && (was_idle && *on_idle_connection || is_silent)
        })
    }
}

/// `None` once it has ended. Boxed because it is several kilobytes with TLS, which moving the request's future would
/// copy.
type Connection = Option<Box<http1::Connection<Stream, RequestBody>>>;

/// A connection with its request sender.
struct PooledConnection {
    sender: SendRequest<RequestBody>,
    connection: Connection,
    /// By the monotonic clock and by the wall clock.
    idle_since: (Instant, Timestamp),
}

/// A request on a reused connection, until its response starts or it is given up.
struct PendingRequest<'a> {
    pool: &'a Pool,
    /// Its entry in [`Idle::pending`].
    entry: (Instant, bool),
    /// There was no sign of life, nor of the connection's end.
    is_silent: bool,
}

impl PendingRequest<'_> {
    /// The connection is known to be alive, or to have ended.
    fn resolve(mut self) {
        self.is_silent = false;
    }
}

impl Drop for PendingRequest<'_> {
    fn drop(&mut self) {
        let mut idle = self.pool.idle();
        if let Some(at) = idle.pending.iter().position(|entry| *entry == self.entry) {
            idle.pending.swap_remove(at);
        }
        let (sent, _) = self.entry;
        if self.is_silent && sent.elapsed() >= SUSPECT_AFTER_SILENCE {
            idle.connections.retain(|connection| connection.idle_since.0 > sent);
        }
    }
}

/// A response whose body has not been read yet.
pub(super) struct PooledResponse<'a> {
    pool: &'a Pool,
    connection: PooledConnection,
    pub(super) response: Response<Incoming>,
}

/// An origin as it is shown in messages.
pub(super) fn name_of(origin: &Uri) -> String {
    let authority = origin.authority().map(Authority::as_str).unwrap_or_default();
    format!("{}://{authority}", origin.scheme_str().unwrap_or_default())
}

impl Pool {
    /// A pool without connections. `may_be_this_machine`: whether the origin's name may resolve to this machine.
    pub(super) fn new(origin: Uri, may_be_this_machine: bool, dialer: Arc<Dialer>, clock: Clock) -> Self {
        Self {
            name: name_of(&origin),
            origin,
            may_be_this_machine,
            dialer,
            clock,
            connector: OnceCell::new(),
            idle: Mutex::default(),
        }
    }

    /// The origin, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The origin, if it was set by configuration.
    pub(super) fn configured_origin(&self) -> Option<&Uri> {
        self.may_be_this_machine.then_some(&self.origin)
    }

    /// Loads the trust roots and opens a connection in advance.
    pub(super) async fn prepare(&self) {
        // The first request reports a failure.
        if let Ok(connection) = self.connect().await {
            self.release(connection);
        }
    }

    /// Sends a request, on an idle connection if there is one.
    pub(super) async fn send(&self, mut request: Request<RequestBody>) -> Result<PooledResponse<'_>, Failure> {
        loop {
            let (mut pooled, pending) = match self.take() {
                Some((pooled, pending)) => (pooled, Some(pending)),
                None => (self.connect().await?, None),
            };
            let PooledConnection { sender, connection, .. } = &mut pooled;
            let sent = drive(connection, async {
                match sender.ready().await {
                    Ok(()) => sender.try_send_request(request).await.map_err(|mut e| e.take_message()),
                    Err(_) => Err(Some(request)),
                }
            })
            .await;
            match (sent, pending) {
                (Ok(response), pending) => {
                    pending.into_iter().for_each(PendingRequest::resolve);
                    return Ok(PooledResponse { pool: self, connection: pooled, response });
                }
                (Err(Some(unsent)), Some(pending)) => {
                    pending.resolve();
                    request = unsent;
                }
                (Err(_), _) => return Err(Failure::Closed),
            }
        }
    }

    async fn connect(&self) -> Result<PooledConnection, Failure> {
        let mut connector = self.connector().await?.clone();
        // Boxed because few requests open a connection, but every request's future would have the size for it.
        let opening = Box::pin(async {
            poll_fn(|cx| connector.poll_ready(cx)).await?;
            let stream = connector.call(self.origin.clone()).await?;
            Ok(http1::Builder::new().max_buf_size(MAX_HEAD_BYTES).handshake(stream).await?)
        });
        let opened =
            tokio::time::timeout(CONNECT_TIMEOUT, opening).await.unwrap_or_else(|_| Err(ConnectTimeout.into()));
        let (sender, connection) = opened.map_err(Failure::Connect)?;
        Ok(PooledConnection { sender, connection: Some(Box::new(connection)), idle_since: self.now() })
    }

    async fn connector(&self) -> Result<&Connector, Failure> {
        let scheme = self.origin.scheme().unwrap_or(&Scheme::HTTPS);
        let making = self.connector.get_or_try_init(|| self.dialer.connector(scheme, self.may_be_this_machine));
        making.await.map_err(Failure::Trust)
    }

    /// An idle connection that is neither known to be dead nor suspect.
    fn take(&self) -> Option<(PooledConnection, PendingRequest<'_>)> {
        let (now, wall_now) = self.now();
        let mut idle = self.idle();
        idle.connections.retain(|connection| {
            let (since, wall_since) = connection.idle_since;
            let (awake, passed) = (now.duration_since(since), wall_now.since(wall_since));
            awake < IDLE_TIMEOUT && awake.abs_diff(passed) < SLEEP_THRESHOLD && !connection.sender.is_closed()
        });
        // The most recently used one is the least suspect.
        let (idle_since, _) = idle.connections.last()?.idle_since;
        if idle.is_suspect(idle_since, now) {
            return None;
        }
        let entry = (now, now.duration_since(idle_since) >= SUSPECT_AFTER_IDLE);
        idle.pending.push(entry);
        Some((idle.connections.pop()?, PendingRequest { pool: self, entry, is_silent: true }))
    }

    /// Returns a connection to the pool.
    fn release(&self, mut connection: PooledConnection) {
        connection.idle_since = self.now();
        let mut idle = self.idle();
        if idle.connections.len() < MAX_IDLE && !connection.sender.is_closed() {
            idle.connections.push(connection);
        }
    }

    /// The error response for a failed request. `is_connect`: whether it was sent to Connect's API.
    pub(super) fn explain(&self, failure: Failure, is_connect: bool) -> RequestError {
        let name = &self.name;
        let error = match failure {
            Failure::Closed => {
                let message = format!("{name} broke off the connection without an answer.");
                return RequestError::new(Code::UpstreamInvalidResponse, message);
            }
            Failure::Trust(e) => {
                return RequestError::new(
                    Code::UpstreamTls,
                    format!("Could not load the trusted root certificates: {e}."),
                )
                .hint("install ca-certificates, or connect-sidecar --upstream-ca FILE");
            }
            Failure::Connect(error) => error,
        };
        let causes: Vec<_> = causes(&*error).collect();
        if let Some(RefusedAddress(address)) = causes.iter().find_map(|cause| cause.downcast_ref()) {
            let message = format!("The name of {name} resolves to this machine ({address}): nothing was sent there.");
            let hint = "take the name out of /etc/hosts; if that is meant, say so: connect-sidecar --upstream URL, or \
                        --bearer-host HOST=URL";
            return RequestError::new(Code::LoopDetected, message).hint(hint);
        }
        let unreachable = |message| RequestError::new(Code::UpstreamUnreachable, message);
        if let Some(Unusable { variable, reason }) = causes.iter().find_map(|cause| cause.downcast_ref()) {
            let message = format!("Could not connect to {name} by the proxy that {variable} names: {reason}.");
            return unreachable(message).command(format!("unset {variable}"));
        }
        let proxy = causes.iter().find_map(|cause| cause.downcast_ref::<ProxyFailed>());
        if let Some(tls) = causes.iter().find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            let other_end = proxy.map_or_else(|| name.clone(), |proxy| format!("the proxy {}", proxy.server));
            let error = RequestError::new(Code::UpstreamTls, format!("No TLS with {other_end}: {tls}."));
            return match tls {
                // A bad signature means an unknown issuer with the name of a known one.
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                    error.hint(
                        "if your company inspects TLS, pass its root certificate: connect-sidecar --upstream-ca FILE",
                    )
                }
                _ => error,
            };
        }
        // The innermost cause is the error of the operating system or of the proxy.
        let reason = causes.last().map_or_else(|| "no connection".to_owned(), ToString::to_string);
        if let Some(ProxyFailed { server, variable, .. }) = proxy {
            let message = format!("Could not connect to {name} through the proxy {server}: {reason}.");
            return unreachable(message).hint(format!("check {variable} and NO_PROXY"));
        }
        let is_refused = |cause: &&(dyn StdError + 'static)| {
            cause.downcast_ref().is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
        };
        if self.may_be_this_machine && is_on_loopback(&self.origin) && causes.iter().any(is_refused) {
            let error = unreachable(format!("Nothing listens at {name}: {reason}."));
            return if is_connect { error.command(emulate_command(&self.origin)) } else { error };
        }
        unreachable(format!("Could not connect to {name}: {reason}.")).hint(match self.dialer.uses_env_proxy() {
            true => "check the network, HTTPS_PROXY and NO_PROXY",
            false => "check the network; behind a proxy: connect-sidecar --use-env-proxy",
        })
    }

    fn now(&self) -> (Instant, Timestamp) {
        (Instant::now(), self.clock.local())
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PooledResponse<'_> {
    /// Reads the whole body. Fails if it is longer than `limit` bytes ([`http_body_util::LengthLimitError`]) or
    /// truncated.
    pub(super) async fn body(mut self, limit: usize) -> Result<Bytes, BoxError> {
        let body = Limited::new(self.response.into_body(), limit).collect();
        let body = drive(&mut self.connection.connection, body).await?.to_bytes();
        self.pool.release(self.connection);
        Ok(body)
    }

    /// The response with a streamed body. `pool` is the pool that the request was sent with.
    pub(super) async fn stream(self, pool: &Arc<Pool>) -> Response<StreamingBody> {
        let (head, body) = self.response.into_parts();
        let mut streaming = StreamingBody { pool: pool.clone(), connection: Some(self.connection), body };
        if streaming.body.is_end_stream() {
            poll_fn(|cx| {
                streaming.end(cx);
                Poll::Ready(())
            })
            .await;
        }
        Response::from_parts(head, streaming)
    }
}

/// A streamed response body. Reading it polls the connection, which also sends the rest of the request. Dropping it
/// before its end closes the connection.
pub(super) struct StreamingBody {
    pool: Arc<Pool>,
    connection: Option<PooledConnection>,
    body: Incoming,
}

impl StreamingBody {
    /// Returns the connection to the pool, if the request was sent completely.
    fn end(&mut self, cx: &mut Context<'_>) {
        let Some(mut pooled) = self.connection.take() else { return };
        poll_connection(&mut pooled.connection, cx);
        if pooled.sender.is_ready() {
            self.pool.release(pooled);
        }
    }
}

impl Body for StreamingBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let mut frame = Pin::new(&mut this.body).poll_frame(cx);
        if let (Poll::Pending, Some(pooled)) = (&frame, &mut this.connection) {
            poll_connection(&mut pooled.connection, cx);
            frame = Pin::new(&mut this.body).poll_frame(cx);
        }
        match &frame {
            Poll::Ready(Some(Err(_))) => this.connection = None,
            Poll::Ready(_) if this.body.is_end_stream() => this.end(cx),
            Poll::Ready(None) => this.end(cx),
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Runs `work` while polling the connection.
async fn drive<T>(connection: &mut Connection, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        poll_connection(connection, cx);
        work.as_mut().poll(cx)
    })
    .await
}

/// Polls the connection. When it ends it is dropped at once, which wakes its request and returns a request that has not
/// been written yet.
fn poll_connection(connection: &mut Connection, cx: &mut Context<'_>) {
    if connection.as_mut().is_some_and(|open| Pin::new(open).poll(cx).is_ready()) {
        *connection = None;
    }
}

/// Whether the origin's host is `localhost` or a loopback address.
pub(super) fn is_on_loopback(origin: &Uri) -> bool {
    let host = origin.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// The command that starts the emulator at this origin.
fn emulate_command(origin: &Uri) -> String {
    let is_tls = origin.scheme() == Some(&Scheme::HTTPS);
    let port = origin.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let mut command = "connect-sidecar emulate".to_owned();
    if is_tls {
        command.push_str(" --tls");
    }
    if port != EMULATOR_PORT {
        command.push_str(&format!(" --port {port}"));
    }
    command
}

#[derive(Debug)]
struct ConnectTimeout;

impl fmt::Display for ConnectTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no connection within 5 s")
    }
}

impl StdError for ConnectTimeout {}
