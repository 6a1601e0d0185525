//! Connections and their requests: accepts, applies the gates to every path, answers our own and hands the rest to the
//! [`Proxy`].
//!
//! HTTP/1.1 and 1.0 only: no upgrade, no tunnel, no TLS. A request's connection ends with the caller, never the other
//! way round; what it started upstream goes on in the proxy's own tasks.

mod connections;
mod event_stream;
pub mod handover;
mod head;
mod intercepted;
pub mod listener;
mod refresh;
mod refusals;
pub mod runs;
pub mod stream;
pub mod unix_socket;

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use crate::os::peer::{self, Peer};
use connections::{Connections, Open, Place};
use event_stream::Of;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use listener::{Accepted, Listener};
use refusals::Refusals;
use runs::Interception;
use stream::{Connection, Observed};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::credential::refresh::RefreshHandle;
use crate::daemon::status::{Status, page};
use crate::events::{Event, Refusal};
use crate::instance::key::{NONCE_HEADER, PROOF_HEADER};
use crate::instance::run::{Run, RunRequest};
use crate::proxy::Proxy;
use crate::proxy::body;
use crate::proxy::error::{Code, RequestError, excerpt};
use crate::proxy::guard::{self, Admitted, Entrance, Policy};
use crate::proxy::relay;
use crate::proxy::reply::{self, Reply};

/// A connection ends after so many requests: whoever keeps one for ever is looked at anew now and then.
const MAX_REQUESTS: u32 = 1000;
/// Time between two looks at the connections.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The first pause after a failed accept, doubled up to [`LONGEST_ACCEPT_PAUSE`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// What a caller still sends after its last reply is read for this long, and up to this many bytes.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 256 * 1024;

/// Answers requests.
pub struct Server {
    proxy: Arc<Proxy>,
    policy: Policy,
    status: Status,
    refresh: RefreshHandle,
    interception: Interception,
    connections: Arc<Connections>,
    listeners: Arc<Semaphore>,
    /// Places of runs that follow what goes wrong.
    followers: Arc<Semaphore>,
    refusals: Refusals,
    said_credentials_dropped: AtomicBool,
}

impl Server {
    /// A server for requests to Connect (`proxy`), for what people look at (`status`) and ask for (`refresh`), and for
    /// runs (`interception`), under this policy.
    pub fn new(
        proxy: Arc<Proxy>,
        policy: Policy,
        status: Status,
        refresh: RefreshHandle,
        interception: Interception,
    ) -> Self {
        Self {
            proxy,
            policy,
            status,
            refresh,
            interception,
            connections: Arc::new(Connections::new()),
            listeners: event_stream::places(),
            followers: event_stream::places(),
            refusals: Refusals::default(),
            said_credentials_dropped: AtomicBool::new(false),
        }
    }

    /// The way of requests to Connect.
    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// Begins a run, as `POST /_sidecar/v1/runs` does.
    pub async fn begin_run(&self, request: &RunRequest) -> Result<Run, RequestError> {
        runs::begin(request, &self.proxy, &self.interception, self.policy.key_of_runs()).await
    }

    /// Keeps the connections within their limits of time, and the log in its own, for as long as it is polled.
    pub async fn look_after_connections(self: Arc<Self>) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.connections.look();
            self.refusals.sum_up();
        }
    }

    /// Tells all connections to finish after the request under way.
    pub fn finish(&self) {
        self.connections.finish();
    }

    /// Accepts connections until `stopping`; each is served in a task of `tasks`.
    pub async fn accept(self: Arc<Self>, listener: Listener, tasks: TaskTracker, stopping: CancellationToken) {
        let mut pause = ACCEPT_PAUSE;
        loop {
            let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await else { return };
            match accepted {
                Ok(accepted) => {
                    pause = ACCEPT_PAUSE;
                    // At once: the longer a caller has to leave, the less there is to be found out about it.
                    let Some(accepted) = self.identify(accepted) else { continue };
                    // In the order in which they come, which that of their tasks need not be.
                    match self.connections.open().await {
                        Some(open) => drop(tasks.spawn(self.clone().connection(accepted, open))),
                        None => debug!("closed a connection: there are too many, and none is idle"),
                    }
                }
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    if stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return;
                    }
                    pause = (pause * 2).min(LONGEST_ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Who has come, by what is known before anything is read; `None` if they may not come the way that they came.
    fn identify(&self, accepted: Accepted) -> Option<Identified> {
        match accepted {
            Accepted::Tcp(stream, from) => {
                let (entrance, peer) = self.let_in_tcp(&stream, from)?;
                Some(Identified::Tcp(stream, entrance, peer))
            }
            Accepted::Unix(stream) => may_use_socket(&stream).then_some(Identified::Unix(stream)),
        }
    }

    /// Serves one connection.
    async fn connection(self: Arc<Self>, identified: Identified, open: Open) {
        let place = &open.place;
        open.serve_here().await;
        match identified {
            Identified::Tcp(stream, entrance, peer) => {
                let _ = stream.set_nodelay(true);
                let caller = Caller { entrance, peer, place };
                self.converse(stream, place, Lines::Few, |request| self.answer(request, caller)).await;
            }
            Identified::Unix(stream) => {
                let caller = Caller { entrance: Entrance::UnixSocket, peer: Peer::NotAsked, place };
                self.converse(stream, place, Lines::Few, |request| self.answer(request, caller)).await;
            }
        }
    }

    /// By which address a connection came in and whose it is; `None` if it may not come by that address, or has gone.
    fn let_in_tcp(&self, stream: &TcpStream, from: SocketAddr) -> Option<(Entrance, Peer)> {
        let local = stream.local_addr().ok()?;
        let is_loopback = |address: SocketAddr| address.ip().to_canonical().is_loopback();
        if !is_loopback(local) {
            // Only a listener that was asked for accepts there. The key tells who may ask, not the kernel.
            return Some((Entrance::Network(local.port()), Peer::NotAsked));
        }
        if !is_loopback(from) {
            debug!("closed a connection from {from}, which is not this machine");
            return None;
        }
        let peer = peer::of(stream, from, local);
        let peer = peer.inspect_err(|e| debug!("closed a connection of which the user cannot be told: {e}")).ok()?;
        if peer == Peer::Unknown {
            self.proxy.stats.unknown_peers.count();
        }
        Some((Entrance::Loopback(local.port()), peer))
    }

    /// Answers a connection's requests, one after another, until it ends. A head has as many lines at most.
    async fn converse<S, F>(&self, stream: S, place: &Place, lines: Lines, answer: impl Fn(Request<Incoming>) -> F)
    where
        S: Connection,
        F: Future<Output = Reply>,
    {
        if let Some(ends) = stream.socket().ends() {
            place.is_between(ends);
        }
        let answer = &answer;
        let service = service_fn(move |request: Request<Incoming>| async move {
            let number = place.begin_request();
            // Pinned here: it is too large to be moved for nothing.
            let answer = pin!(answer(request));
            let mut reply = place.in_time(answer).await.unwrap_or_else(|| self.refuse(&late(), None));
            if number >= MAX_REQUESTS {
                reply.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            place.end_request();
            Ok::<_, Infallible>(reply)
        });
        let mut http = http1::Builder::new();
        // `connections` sees to it, for less than a timer costs.
        http.header_read_timeout(None);
        // Whoever has sent its last request may say so and wait for the answer. `stream` sees who has left.
        http.half_close(true);
        http.max_header_size(head::MAX_READ_BYTES).max_buf_size(head::MAX_READ_BYTES).writev(false);
        if let Lines::Many = lines {
            http.max_headers(head::MANY_LINES);
        }
        let mut connection = http.serve_connection(TokioIo::new(Observed::new(stream, place)), service);
        let ended = poll_fn(|cx| {
            let mut connection = Pin::new(&mut connection);
            if place.must_end() {
                return Poll::Ready(Ok(()));
            }
            if place.is_finishing() {
                connection.as_mut().graceful_shutdown();
            }
            connection.poll(cx)
        });
        if let Err(error) = ended.await {
            // Callers hang up: that is no fault of ours, nor of theirs.
            debug!("a connection ended: {error}");
        }
        let stream = connection.into_parts().io.into_inner().into_inner();
        if place.must_end() {
            if place.is_stuck() {
                stream.socket().abort();
            }
        } else if !place.is_finishing() {
            linger(stream).await;
        }
    }

    /// Answers one request as if it had come over loopback, at this port and from our own user, on a connection of its
    /// own; `None` if there are too many. For whoever reads requests by means of their own.
    pub async fn answer_alone(&self, request: Request<Incoming>, port: u16) -> Option<Reply> {
        let open = self.connections.open().await?;
        open.serve_here().await;
        let caller = Caller { entrance: Entrance::Loopback(port), peer: Peer::NotAsked, place: &open.place };
        open.place.begin_request();
        Some(self.answer(request, caller).await)
    }

    /// Answers one request.
    async fn answer(&self, request: Request<Incoming>, caller: Caller<'_>) -> Reply {
        let (head, body) = request.into_parts();
        let (admitted, outcome) = match self.admit(&head, caller) {
            Ok(admitted) => {
                let outcome = self.route(&head, body, &admitted, caller).await;
                (admitted, outcome)
            }
            Err(refusal) => (Admitted::default(), Err(refusal)),
        };
        let mut reply = self.reply(outcome, &head);
        if let Some(origin) = admitted.origin {
            reply.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            reply.headers_mut().insert(header::VARY, HeaderValue::from_static("Origin"));
        }
        reply
    }

    /// Whether this caller may ask with this head at all.
    fn admit(&self, head: &Parts, caller: Caller<'_>) -> Result<Admitted, RequestError> {
        check_peer(caller.peer)?;
        // What is passed on has no limits of ours.
        if !head.uri.path().starts_with(RELAY) {
            head::check(head)?;
        }
        let admitted = guard::check(head, caller.entrance, &self.policy)?;
        self.notice_credentials(&admitted);
        Ok(admitted)
    }

    /// Says once that an app's own credentials go nowhere.
    fn notice_credentials(&self, admitted: &Admitted) {
        if admitted.has_credentials && !self.said_credentials_dropped.swap(true, Ordering::Relaxed) {
            warn!("an app sends credentials of its own: they are dropped, the sidecar's are used instead");
        }
    }

    /// Whether a connection to a loopback port of ours may be served: an error is the answer to all of its requests, and
    /// with `None` it is to be closed.
    pub fn judge(&self, stream: &TcpStream, from: SocketAddr) -> Option<Result<(), RequestError>> {
        self.let_in_tcp(stream, from).map(|(_, peer)| check_peer(peer))
    }

    /// The reply of a request, whatever came of it. Errors of upstream's are counted among those that apps met.
    fn reply(&self, outcome: Result<Reply, RequestError>, head: &Parts) -> Reply {
        let reply = outcome.unwrap_or_else(|error| self.refuse(&error, Some(head)));
        // A probe that is told "not now" is no app that was let down.
        if reply.status().as_u16() >= 400 && !guard::is_health(head.uri.path()) {
            self.proxy.count_failure();
        }
        reply
    }

    /// The reply for an error of our own, counted, logged and told.
    pub fn refuse(&self, error: &RequestError, head: Option<&Parts>) -> Reply {
        self.proxy.stats.refused.count();
        if self.refusals.show_next() {
            let shown = |of: fn(&Parts) -> &str| head.map(|head| excerpt(of(head).as_bytes()));
            let (method, path) = (shown(|head| head.method.as_str()), shown(|head| head.uri.path()));
            warn!(
                code = error.code.as_str(),
                status = error.status.as_u16(),
                method,
                path,
                hint = &*error.remedy.hint,
                command = error.remedy.command.as_deref(),
                "{}",
                error.line()
            );
            if !error.is_told {
                self.proxy.events.tell(Event::Refusal(Refusal {
                    at: self.proxy.clock.now(),
                    method,
                    path,
                    status: error.status.as_u16(),
                    code: error.code.as_str(),
                    message: error.message.clone(),
                    remedy: (*error.remedy).clone(),
                }));
            }
        }
        match head {
            // Who reads it is a person, and not a program.
            Some(head) if error.code == Code::HeadTooLarge && guard::is_browser_window(&head.headers) => {
                reply::error_in_words(error)
            }
            _ => reply::error(error),
        }
    }

    /// The answer to the caller's nonce, if it sends one (docs/security.md S5).
    fn proof(&self, head: &Parts, entrance: Entrance) -> Option<HeaderValue> {
        let (Entrance::Loopback(port), Some(key)) = (entrance, &self.policy.key) else { return None };
        let nonce = head.headers.get(NONCE_HEADER)?.as_bytes();
        let is_fit = NONCE_BYTES.contains(&nonce.len());
        is_fit.then(|| key.proof(port, nonce))?.try_into().ok()
    }

    async fn route(
        &self,
        head: &Parts,
        body: Incoming,
        admitted: &Admitted,
        caller: Caller<'_>,
    ) -> Result<Reply, RequestError> {
        if self.connections.is_overloaded_by(caller.place) && !guard::is_health(head.uri.path()) {
            return Err(overloaded());
        }
        if head.method == Method::OPTIONS && admitted.origin.is_some() {
            return Ok(preflight(&head.headers));
        }
        match head.uri.path() {
            path if path.starts_with("/v1/") => self.proxy.handle(head, body).await,
            "/healthz" => {
                read_only(head)?;
                let mut reply = reply::own(StatusCode::OK, JSON, r#"{"status":"ok"}"#);
                reply.headers_mut().extend(self.proof(head, caller.entrance).map(|proof| (PROOF_HEADER, proof)));
                Ok(reply)
            }
            "/readyz" => {
                read_only(head)?;
                self.status.readiness().map_err(|problem| self.proxy.no_credential(&problem))?;
                Ok(reply::own(StatusCode::OK, JSON, r#"{"status":"ready"}"#))
            }
            guard::METRICS => {
                read_only(head)?;
                Ok(reply::own(
                    StatusCode::OK,
                    "text/plain; version=0.0.4; charset=utf-8",
                    self.status.metrics(self.connections.count()),
                ))
            }
            "/_sidecar/v1/status" => {
                read_only(head)?;
                Ok(reply::own(StatusCode::OK, JSON, self.status.json()))
            }
            "/_sidecar/v1/events" => {
                if head.method != Method::GET {
                    return Err(RequestError::method_not_allowed("GET"));
                }
                let (of, places) = match head.uri.query() {
                    Some("only=problems") => (Of::Problems, &self.followers),
                    _ => (Of::Everything, &self.listeners),
                };
                if of == Of::Everything {
                    no_query(head)?;
                }
                event_stream::reply(&self.status.events, of, places, caller.place.relay())
            }
            guard::OURS => {
                read_only(head)?;
                Ok(page::reply())
            }
            _ if guard::is_led_to_the_page(head) => {
                no_query(head)?;
                Ok(page::elsewhere())
            }
            path if guard::NEAR_THE_PAGE.contains(&path) => {
                let message = format!("Nothing is answered here. The status page is at {}.", guard::OURS);
                Err(RequestError::new(Code::RouteNotFound, message).hint("connect-sidecar status --open"))
            }
            // Boxed: it is rare, and every request would carry the room for it.
            path if path.starts_with(RELAY) => Box::pin(self.relay(head, body, caller.place)).await,
            "/_sidecar/v1/cache" => {
                if head.method != Method::DELETE {
                    return Err(RequestError::method_not_allowed("DELETE"));
                }
                guard::require_key(&head.headers, &self.policy)?;
                let evicted = match connector_in_query(head.uri.query())? {
                    None => self.proxy.cache.clear(),
                    Some(connector) => self.proxy.cache.evict(&connector),
                };
                Ok(reply::own(StatusCode::OK, JSON, format!(r#"{{"evicted":{evicted}}}"#)))
            }
            "/_sidecar/v1/refresh" => {
                if head.method != Method::POST {
                    return Err(RequestError::method_not_allowed("POST"));
                }
                guard::require_key(&head.headers, &self.policy)?;
                no_query(head)?;
                let refreshed = refresh::ask(&self.refresh, &self.proxy.clock).await?;
                Ok(reply::own(StatusCode::OK, JSON, refreshed))
            }
            "/_sidecar/v1/runs" => {
                if head.method != Method::POST {
                    return Err(RequestError::method_not_allowed("POST"));
                }
                guard::require_key(&head.headers, &self.policy)?;
                no_query(head)?;
                body::check_content_type(head, &body)?;
                let body = body::read(body).await?;
                let run = self.begin_run(&runs::parse(&body)?).await?;
                // Serializing strings cannot fail.
                Ok(reply::own(StatusCode::OK, JSON, serde_json::to_vec(&run).unwrap_or_default()))
            }
            // The proxy's 404 is that of any unknown path.
            _ => self.proxy.handle(head, body).await,
        }
    }

    /// `{host}/{raw path}?{query}`, for an app that sends there what it would send to that host.
    async fn relay(&self, head: &Parts, body: Incoming, place: &Arc<Place>) -> Result<Reply, RequestError> {
        let target = head.uri.path_and_query().map_or("", PathAndQuery::as_str);
        let target = target.strip_prefix(RELAY).unwrap_or_default();
        let (host, target) = target.split_at(target.find('/').unwrap_or(target.len()));
        let path = target.split('?').next().unwrap_or_default();
        if !relay::has_placeholder(&head.headers) || self.proxy.relay.hosts.bearer(host, path).is_none() {
            let message = "Only requests with the placeholder for the OIDC token are passed on here, and only to hosts that \
                           take the real one.";
            return Err(RequestError::new(Code::RouteNotFound, message));
        }
        let mut reply = self.proxy.relay(host, target, head, body, place.relay()).await?;
        reply::make_safe(reply.headers_mut());
        Ok(reply)
    }
}

const NONCE_BYTES: RangeInclusive<usize> = 16..=64;

/// How many lines a head may have.
#[derive(Clone, Copy)]
enum Lines {
    /// Those that cost nothing to be ready for.
    Few,
    /// As many as other servers take.
    Many,
}

/// A connection, and who has come by it.
enum Identified {
    Tcp(TcpStream, Entrance, Peer),
    Unix(UnixStream),
}

/// Who asks, on which connection.
#[derive(Clone, Copy)]
struct Caller<'a> {
    /// The way that it came in.
    entrance: Entrance,
    peer: Peer,
    place: &'a Arc<Place>,
}

fn check_peer(peer: Peer) -> Result<(), RequestError> {
    if peer.may_ask() {
        return Ok(());
    }
    let message = match peer {
        Peer::Unknown => {
            "The system does not say whose connection this is. Ask from this machine itself, or use --unix-socket."
        }
        _ => "This sidecar answers the user that started it, and no other user of this machine.",
    };
    Err(RequestError::new(Code::PeerUidMismatch, message).closing())
}

/// Whether whoever is at the other end of the unix socket may use it.
fn may_use_socket(stream: &UnixStream) -> bool {
    match stream.peer_cred() {
        Ok(peer) if unix_socket::may_connect(peer.uid()) => true,
        Ok(peer) => {
            debug!("closed a connection from user {} to the unix socket", peer.uid());
            false
        }
        Err(e) => {
            debug!("closed a connection to the unix socket of which the user cannot be told: {e}");
            false
        }
    }
}

/// The answer of a request that took as long as one may.
fn late() -> RequestError {
    RequestError::new(Code::UpstreamTimeout, "The request was not answered within 60 s.").hint("try again").closing()
}

/// The answer of a request that is one too many.
pub fn overloaded() -> RequestError {
    let message = "Too many requests are under way. Ask again in a second.";
    let mut error = RequestError::new(Code::Overloaded, message).closing();
    error.retry_after = Some(reply::retry_after(Duration::from_secs(1)));
    error
}

/// Reads what the caller still sends: to close over unread bytes would reset the connection, and the caller would lose
/// the reply that says why its request was refused.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let _ = stream.shutdown().await;
    let reading = async { tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await };
    let _ = tokio::time::timeout(LINGER, reading).await;
}

/// Before the host and the path of a request that is passed on.
const RELAY: &str = "/_sidecar/v1/relay/";
const JSON: &str = "application/json";

/// GET and HEAD, without a query.
fn read_only(head: &Parts) -> Result<(), RequestError> {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Err(RequestError::method_not_allowed("GET, HEAD"));
    }
    no_query(head)
}

fn no_query(head: &Parts) -> Result<(), RequestError> {
    match head.uri.query() {
        None => Ok(()),
        Some(_) => Err(RequestError::new(Code::QueryNotAllowed, "This path takes no query string.")),
    }
}

/// `connector=slack%2Facme-slack`, or no query for all of them.
fn connector_in_query(query: Option<&str>) -> Result<Option<String>, RequestError> {
    let Some(query) = query else { return Ok(None) };
    let connector = query.strip_prefix("connector=").and_then(crate::proxy::route::decode);
    match connector {
        Some(connector) => Ok(Some(connector)),
        None => Err(RequestError::new(Code::BadConnector, "The one parameter is `connector=`, percent-encoded.")),
    }
}

/// What a browser asks before a page of an allowed origin may send JSON.
fn preflight(asked: &HeaderMap) -> Reply {
    let mut reply = reply::own(StatusCode::NO_CONTENT, JSON, "");
    let headers = reply.headers_mut();
    headers.remove(header::CONTENT_TYPE);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    if asked.contains_key(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        let allowed = "cache-control, content-type, sidecar-client, sidecar-key, traceparent, tracestate, x-request-id";
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
    }
    reply
}
