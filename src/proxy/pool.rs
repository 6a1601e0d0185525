//! Connections to one origin: opened, kept alive, used again, thrown away; and why there was no answer.
//!
//! A connection that is not in use is just a value: the request that takes it drives it, in the task that it runs in
//! anyway, so no connection has a task of its own and nothing is woken twice. A request that the server may have received
//! is never sent again; one that provably was not, because a kept connection had closed before its first byte, goes out
//! on another.
//!
//! A connection may have died in silence, as when a VPN is switched, and all that were kept with it. So while one of them
//! is silent, none that was kept before is used; if it stays so until the request is given up, those are dropped.

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

use super::dialer::{self, BoxError, Connector, Dialer, ProxyFailed, causes};
use super::error::{Code, RequestError};
use super::resolver::RefusedAddress;
use crate::os::clock::{Clock, Timestamp};
use crate::os::env_proxy::Unusable;

/// Name resolution, connection and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A larger reply head is refused, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Kept connections are used again within this time.
const KEEP_ALIVE: Duration = Duration::from_secs(50);
/// Most connections that are kept.
const MAX_KEPT: usize = 16;
/// When wall clock and monotonic clock disagree by this much, the machine slept and its connections are dead.
const SLEPT: Duration = Duration::from_secs(10);

/// Of kept connections that were idle for this long, one is tried at a time.
const DOUBTFUL_AFTER: Duration = Duration::from_secs(5);
/// A kept connection on which nothing came for this long casts doubt on all that were kept before.
const SILENT_AFTER: Duration = Duration::from_secs(2);

/// Where the emulator listens unless it is told otherwise: the sidecar's neighbour.
pub const EMULATOR_PORT: u16 = 2775;

/// With TLS to the origin, where that is spoken.
type Stream = MaybeHttpsStream<dialer::Stream>;
/// The body of a request: known as a whole, or as it comes from an app.
pub(super) type RequestBody = Either<Full<Bytes>, Incoming>;

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
    /// The origin, for people.
    name: String,
    origin: Uri,
    may_be_this_machine: bool,
    dialer: Arc<Dialer>,
    clock: Clock,
    connector: OnceCell<Connector>,
    kept: Mutex<Kept>,
}

/// Connections that are not in use.
#[derive(Default)]
struct Kept {
    /// The one used last is at the end.
    lines: Vec<Line>,
    /// When the requests began that wait for an answer on a kept connection, and whether that had been idle for long.
    trials: Vec<(Instant, bool)>,
}

impl Kept {
    /// Whether a request that waits casts doubt on a connection that was kept at that time.
    fn is_doubtful(&self, kept_at: Instant, now: Instant) -> bool {
        let was_idle = now.duration_since(kept_at) >= DOUBTFUL_AFTER;
        self.trials.iter().any(|(begun, on_an_idle_one)| {
            kept_at <= *begun && (was_idle && *on_an_idle_one || now.duration_since(*begun) >= SILENT_AFTER)
        })
    }
}

/// `None` once it has ended. Boxed: with its TLS it is kilobytes, which every move of the request's task would copy.
type Connection = Option<Box<http1::Connection<Stream, RequestBody>>>;

/// A connection, and the hand that sends on it.
struct Line {
    sender: SendRequest<RequestBody>,
    connection: Connection,
    kept_at: (Instant, Timestamp),
}

/// A request on a kept connection, until its answer begins or it is given up.
struct Trial<'a> {
    pool: &'a Pool,
    begun: (Instant, bool),
    /// Nothing was heard on the connection.
    is_silent: bool,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        let mut kept = self.pool.kept();
        if let Some(at) = kept.trials.iter().position(|trial| *trial == self.begun) {
            kept.trials.swap_remove(at);
        }
        let (begun, _) = self.begun;
        if self.is_silent && begun.elapsed() >= SILENT_AFTER {
            kept.lines.retain(|line| line.kept_at.0 > begun);
        }
    }
}

/// An answer whose body is still to come.
pub(super) struct Answering<'a> {
    pool: &'a Pool,
    line: Line,
    /// Head and body.
    pub(super) response: Response<Incoming>,
}

/// An origin, for people.
pub(super) fn name_of(origin: &Uri) -> String {
    let authority = origin.authority().map(Authority::as_str).unwrap_or_default();
    format!("{}://{authority}", origin.scheme_str().unwrap_or_default())
}

impl Trial<'_> {
    /// The connection was alive, or is known not to be.
    fn heard(mut self) {
        self.is_silent = false;
    }
}

impl Pool {
    /// Connections to `origin`, none open yet.
    pub(super) fn new(origin: Uri, may_be_this_machine: bool, dialer: Arc<Dialer>, clock: Clock) -> Self {
        Self {
            name: name_of(&origin),
            origin,
            may_be_this_machine,
            dialer,
            clock,
            connector: OnceCell::new(),
            kept: Mutex::default(),
        }
    }

    /// The origin, for people.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The origin, if the settings name it.
    pub(super) fn named_origin(&self) -> Option<&Uri> {
        self.may_be_this_machine.then_some(&self.origin)
    }

    /// Loads the trust roots and opens a connection, so that the first request need not wait for either.
    pub(super) async fn prepare(&self) {
        // A failure is told by the request that meets it.
        if let Ok(line) = self.connect().await {
            self.keep(line);
        }
    }

    /// Sends a request, on a kept connection if one is alive.
    pub(super) async fn send(&self, mut request: Request<RequestBody>) -> Result<Answering<'_>, Failure> {
        loop {
            let (mut line, trial) = match self.take() {
                Some((line, trial)) => (line, Some(trial)),
                None => (self.connect().await?, None),
            };
            let Line { sender, connection, .. } = &mut line;
            let sent = drive(connection, async {
                match sender.ready().await {
                    Ok(()) => sender.try_send_request(request).await.map_err(|mut e| e.take_message()),
                    Err(_) => Err(Some(request)),
                }
            })
            .await;
            match (sent, trial) {
                (Ok(response), trial) => {
                    trial.into_iter().for_each(Trial::heard);
                    return Ok(Answering { pool: self, line, response });
                }
                (Err(Some(unsent)), Some(trial)) => {
                    trial.heard();
                    request = unsent;
                }
                (Err(_), _) => return Err(Failure::BrokenOff),
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

    async fn connector(&self) -> Result<&Connector, Failure> {
        let scheme = self.origin.scheme().unwrap_or(&Scheme::HTTPS);
        let making = self.connector.get_or_try_init(|| self.dialer.connector(scheme, self.may_be_this_machine));
        making.await.map_err(Failure::Roots)
    }

    /// A kept connection that is neither known to be dead nor doubtful.
    fn take(&self) -> Option<(Line, Trial<'_>)> {
        let (at, wall) = self.now();
        let mut kept = self.kept();
        kept.lines.retain(|line| {
            let (kept_at, kept_wall) = line.kept_at;
            let (awake, passed) = (at.duration_since(kept_at), wall.since(kept_wall));
            awake < KEEP_ALIVE && awake.abs_diff(passed) < SLEPT && !line.sender.is_closed()
        });
        // Of all that are kept, the last is the least doubtful.
        let (kept_at, _) = kept.lines.last()?.kept_at;
        if kept.is_doubtful(kept_at, at) {
            return None;
        }
        let begun = (at, at.duration_since(kept_at) >= DOUBTFUL_AFTER);
        kept.trials.push(begun);
        Some((kept.lines.pop()?, Trial { pool: self, begun, is_silent: true }))
    }

    fn keep(&self, mut line: Line) {
        line.kept_at = self.now();
        let mut kept = self.kept();
        if kept.lines.len() < MAX_KEPT && !line.sender.is_closed() {
            kept.lines.push(line);
        }
    }

    /// The error for a request that met this failure; `is_connect` tells whether Connect's API was asked.
    pub(super) fn explain(&self, failure: Failure, is_connect: bool) -> RequestError {
        let name = &self.name;
        let error = match failure {
            Failure::BrokenOff => {
                let message = format!("{name} broke off the connection without an answer.");
                return RequestError::new(Code::UpstreamInvalidResponse, message);
            }
            Failure::Roots(e) => {
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
                // The second is an unknown issuer with the name of a known one.
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                    error.hint(
                        "if your company inspects TLS, pass its root certificate: connect-sidecar --upstream-ca FILE",
                    )
                }
                _ => error,
            };
        }
        // The innermost cause is what the operating system, or the proxy, said.
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

    fn kept(&self) -> MutexGuard<'_, Kept> {
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

    /// The answer with its body as it comes. `pool` is the one that was asked.
    pub(super) async fn stream(self, pool: &Arc<Pool>) -> Response<Streaming> {
        let (head, body) = self.response.into_parts();
        let mut streaming = Streaming { pool: pool.clone(), line: Some(self.line), body };
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

/// The body of an answer, as it comes. Whoever reads it moves what goes over the connection, the rest of the request
/// included; to drop it before its end is to hang up.
pub(super) struct Streaming {
    pool: Arc<Pool>,
    line: Option<Line>,
    body: Incoming,
}

impl Streaming {
    /// Keeps the connection, if the request was read to its end, too.
    fn end(&mut self, cx: &mut Context<'_>) {
        let Some(mut line) = self.line.take() else { return };
        move_on(&mut line.connection, cx);
        if line.sender.is_ready() {
            self.pool.keep(line);
        }
    }
}

impl Body for Streaming {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let mut frame = Pin::new(&mut this.body).poll_frame(cx);
        if let (Poll::Pending, Some(line)) = (&frame, &mut this.line) {
            move_on(&mut line.connection, cx);
            frame = Pin::new(&mut this.body).poll_frame(cx);
        }
        match &frame {
            Poll::Ready(Some(Err(_))) => this.line = None,
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

/// Does `work` while moving what goes over the connection.
async fn drive<T>(connection: &mut Connection, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        move_on(connection, cx);
        work.as_mut().poll(cx)
    })
    .await
}

/// Moves what goes over the connection. One that ends is dropped at once: only that tells whoever waits for it, and hands
/// back a request that was still waiting to be written.
fn move_on(connection: &mut Connection, cx: &mut Context<'_>) {
    if connection.as_mut().is_some_and(|open| Pin::new(open).poll(cx).is_ready()) {
        *connection = None;
    }
}

/// Whether an origin is on loopback by what it is called.
pub(super) fn is_on_loopback(origin: &Uri) -> bool {
    let host = origin.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// What starts the emulator where this origin is looked for.
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
