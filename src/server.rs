//! Connections and their requests: accepts, applies the gates to every path, answers our own and hands the rest to the
//! [`Proxy`].
//!
//! HTTP/1.1 and 1.0 only: no upgrade, no tunnel, no TLS. A request's connection ends with the caller, never the other
//! way round; what it started upstream goes on in the proxy's own tasks.

mod connections;
pub mod unix_socket;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use connections::{Connections, Finish};
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use unix_socket::UnixSocket;

use crate::proxy::Proxy;
use crate::proxy::error::{Code, RequestError, excerpt};
use crate::proxy::guard::{self, Admitted, Entrance, Policy};
use crate::proxy::reply::{self, Reply};
use crate::status::Status;

/// Largest request head, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// The first pause after a failed accept, doubled up to [`LONGEST_ACCEPT_PAUSE`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// What a caller still sends after its last reply is read for this long, and up to this many bytes.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 256 * 1024;

/// Where connections come in.
pub enum Listener {
    /// An address and port.
    Tcp(TcpListener),
    /// A path.
    Unix(UnixSocket),
}

/// A connection that came in.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer)),
            Self::Unix(socket) => socket.accept().await.map(Accepted::Unix),
        }
    }
}

/// Answers requests.
pub struct Server {
    proxy: Arc<Proxy>,
    policy: Policy,
    status: Status,
    connections: Connections,
    said_credentials_dropped: AtomicBool,
}

impl Server {
    /// A server for requests to Connect (`proxy`) and for what people look at (`status`), under this policy.
    pub fn new(proxy: Arc<Proxy>, policy: Policy, status: Status) -> Self {
        Self {
            proxy,
            policy,
            status,
            connections: Connections::new(),
            said_credentials_dropped: AtomicBool::new(false),
        }
    }

    /// The way of requests to Connect.
    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// Ends connections whose request does not come, for as long as it is polled.
    pub async fn end_idle_connections(self: Arc<Self>) {
        self.connections.end_idle().await;
    }

    /// Tells all connections to finish after the request under way.
    pub fn finish(&self) {
        self.connections.finish();
    }

    /// Accepts connections until `stopping`; each is served in a task of `tasks`.
    pub async fn accept(self: Arc<Self>, listener: Listener, tasks: TaskTracker, stopping: CancellationToken) {
        let mut pause = ACCEPT_PAUSE;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stopping.cancelled() => return,
            };
            match accepted {
                Ok(accepted) => {
                    pause = ACCEPT_PAUSE;
                    match accepted {
                        Accepted::Tcp(stream, peer) => tasks.spawn(self.clone().tcp_connection(stream, peer)),
                        Accepted::Unix(stream) => tasks.spawn(self.clone().unix_connection(stream)),
                    };
                }
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Serves one connection over TCP, if it may come by the address that it came by.
    async fn tcp_connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let Ok(local) = stream.local_addr() else { return };
        let is_loopback = |address: SocketAddr| address.ip().to_canonical().is_loopback();
        let entrance = match is_loopback(local) {
            true if is_loopback(peer) => Entrance::Loopback(local.port()),
            true => {
                debug!("closed a connection from {peer}, which is not this machine");
                return;
            }
            // Only a listener that was asked for accepts there.
            false => Entrance::Network(local.port()),
        };
        let _ = stream.set_nodelay(true);
        self.connection(stream, entrance).await;
    }

    /// Serves one connection over the unix socket, if it comes from a process of ours.
    async fn unix_connection(self: Arc<Self>, stream: UnixStream) {
        match stream.peer_cred() {
            Ok(peer) if unix_socket::may_connect(peer.uid()) => self.connection(stream, Entrance::UnixSocket).await,
            Ok(peer) => debug!("closed a connection from user {} to the unix socket", peer.uid()),
            Err(e) => debug!("closed a connection to the unix socket of which the user cannot be told: {e}"),
        }
    }

    /// Serves one connection, whichever way it came in.
    async fn connection<S>(self: Arc<Self>, stream: S, entrance: Entrance)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (open, finishing) = self.connections.open();
        let (server, activity) = (&*self, &*open.activity);
        let service = service_fn(move |request| async move {
            activity.begin_request();
            let reply = server.answer(request, entrance).await;
            activity.end_request();
            Ok::<_, Infallible>(reply)
        });
        let mut connection = http1::Builder::new()
            // `connections` sees to it, for less than a timer costs.
            .header_read_timeout(None)
            .max_header_size(MAX_HEAD_BYTES)
            .writev(false)
            .serve_connection(TokioIo::new(stream), service);
        let ended = tokio::select! {
            biased;
            ended = &mut connection => ended,
            finish = finishing => {
                if finish == Ok(Finish::AfterRequest) {
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                    let _ = connection.await;
                }
                return;
            }
        };
        if let Err(error) = ended {
            // Callers hang up: that is no fault of ours, nor of theirs.
            debug!("a connection ended: {error}");
        }
        linger(connection.into_parts().io.into_inner()).await;
    }

    /// Answers one request.
    async fn answer(&self, request: Request<Incoming>, entrance: Entrance) -> Reply {
        let (head, body) = request.into_parts();
        let (admitted, outcome) = match guard::check(&head, entrance, &self.policy) {
            Ok(admitted) => {
                if admitted.has_credentials && !self.said_credentials_dropped.swap(true, Ordering::Relaxed) {
                    warn!("an app sends credentials of its own: they are dropped, the sidecar's are used instead");
                }
                let outcome = self.route(&head, body, &admitted).await;
                (admitted, outcome)
            }
            Err(refusal) => (Admitted::default(), Err(refusal)),
        };
        let mut reply = match outcome {
            Ok(reply) => reply,
            Err(error) => {
                self.proxy.stats.refused.count();
                let hint = error.hint.as_deref();
                let (method, path) = (excerpt(head.method.as_str().as_bytes()), excerpt(head.uri.path().as_bytes()));
                warn!(
                    code = error.code.as_str(),
                    status = error.status.as_u16(),
                    method,
                    path,
                    hint,
                    "{}",
                    error.message
                );
                reply::error(&error)
            }
        };
        if let Some(origin) = admitted.origin {
            reply.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            reply.headers_mut().insert(header::VARY, HeaderValue::from_static("Origin"));
        }
        reply
    }

    async fn route(&self, head: &Parts, body: Incoming, admitted: &Admitted) -> Result<Reply, RequestError> {
        if head.method == Method::OPTIONS && admitted.origin.is_some() {
            return Ok(preflight(&head.headers));
        }
        match head.uri.path() {
            path if path.starts_with("/v1/") => self.proxy.handle(head, body).await,
            "/healthz" => read_only(head).map(|()| reply::own(StatusCode::OK, JSON, r#"{"status":"ok"}"#)),
            "/readyz" => {
                read_only(head)?;
                self.status.readiness().map_err(|problem| self.proxy.no_credential(&problem))?;
                Ok(reply::own(StatusCode::OK, JSON, r#"{"status":"ready"}"#))
            }
            "/metrics" => {
                read_only(head)?;
                Ok(reply::own(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.status.metrics()))
            }
            "/_sidecar/v1/status" => {
                read_only(head)?;
                Ok(reply::own(StatusCode::OK, JSON, self.status.json()))
            }
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
            // The proxy's 404 is that of any unknown path.
            _ => self.proxy.handle(head, body).await,
        }
    }
}

/// Reads what the caller still sends: to close over unread bytes would reset the connection, and the caller would lose
/// the reply that says why its request was refused.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let _ = stream.shutdown().await;
    let reading = async { tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await };
    let _ = tokio::time::timeout(LINGER, reading).await;
}

const JSON: &str = "application/json";

/// GET and HEAD, without a query.
fn read_only(head: &Parts) -> Result<(), RequestError> {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Err(RequestError::method_not_allowed("GET, HEAD"));
    }
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

/// What [`bind`] has bound.
pub struct Bound {
    /// `127.0.0.1` with the port.
    pub loopback: SocketAddr,
    /// All of them.
    pub listeners: Vec<TcpListener>,
    /// Whether `[::1]` is not among them, since the host has no IPv6.
    pub without_ipv6: bool,
}

/// Binds both loopback addresses to one port, and the address in the network if one is given. The unspecified address
/// takes the place of its family's loopback address, which is part of it.
pub fn bind(port: u16, network: Option<IpAddr>) -> Result<Bound, (SocketAddr, io::Error)> {
    /// A port that is free on one address may be taken on another.
    const ATTEMPTS_AT_A_FREE_PORT: u32 = 16;
    let mut attempt = 1;
    loop {
        match bind_once(port, network) {
            Err((_, error))
                if port == 0 && error.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS_AT_A_FREE_PORT =>
            {
                attempt += 1;
            }
            bound => return bound,
        }
    }
}

fn bind_once(port: u16, network: Option<IpAddr>) -> Result<Bound, (SocketAddr, io::Error)> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let all = network.filter(IpAddr::is_unspecified);
    let first = listen((all.filter(IpAddr::is_ipv4).unwrap_or(v4), port).into())?;
    let port = first.local_addr().map_or(port, |addr| addr.port());
    let mut bound = Bound { loopback: (v4, port).into(), listeners: vec![first], without_ipv6: false };
    let all_v6 = all.filter(IpAddr::is_ipv6);
    match listen((all_v6.unwrap_or(v6), port).into()) {
        Ok(second) => bound.listeners.push(second),
        Err((_, error)) if all_v6.is_none() && is_no_ipv6(&error) => bound.without_ipv6 = true,
        Err(failed) => return Err(failed),
    }
    if let Some(address) = network.filter(|address| !address.is_unspecified()) {
        bound.listeners.push(listen((address, port).into())?);
    }
    Ok(bound)
}

fn is_no_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

/// Never with SO_REUSEPORT: two processes must not share the port.
fn listen(address: SocketAddr) -> Result<TcpListener, (SocketAddr, io::Error)> {
    let listen = || {
        let socket = match address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        if address.is_ipv6() {
            // Nobody comes in by an address of the other family, in which their own could not be told.
            socket2::SockRef::from(&socket).set_only_v6(true)?;
        }
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    listen().map_err(|error| (address, error))
}
