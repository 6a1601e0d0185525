//! Accepts connections, determines who is connected, and serves HTTP on them.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Request;
use http::header::{self, HeaderValue};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::connections::{Activity, OpenConnection};
use super::listener::{Accepted, Listener};
use super::stream::{Connection, MonitoredStream};
use super::{Client, Server, head, unix_socket};
use crate::os::peer::{self, Peer};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::guard::ListenerKind;
use crate::proxy::reply::Reply;

/// Requests per connection, so that a long-lived client is identified again now and then.
const MAX_REQUESTS: u32 = 1000;
/// The pause after a failed accept, doubled up to [`MAX_ACCEPT_PAUSE`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const MAX_ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// After the last response, input is discarded for this long, up to this many bytes.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 256 * 1024;

impl Server {
    /// Accepts connections until `stopping`. Each is served in a task of `tasks`.
    pub async fn accept(self: Arc<Self>, listener: Listener, tasks: TaskTracker, stopping: CancellationToken) {
        let mut pause = ACCEPT_PAUSE;
        loop {
            let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await else { return };
            match accepted {
                Ok(accepted) => {
                    pause = ACCEPT_PAUSE;
                    // Immediately: once the client has gone, its user can no longer be looked up.
                    let Some(client) = self.identify(&accepted) else { continue };
                    // Here, since tasks may start in another order than connections arrive.
                    match self.connections.open().await {
                        Some(open) => drop(tasks.spawn(self.clone().serve(accepted, client, open))),
                        None => debug!("closed a connection: there are too many, and none is idle"),
                    }
                }
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    if stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return;
                    }
                    pause = (pause * 2).min(MAX_ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Whether the client of a connection to a loopback port may send requests.
    pub fn is_allowed(&self, stream: &TcpStream, from: SocketAddr) -> bool {
        self.identify_tcp(stream, from).is_some_and(|(_, peer)| peer.is_allowed())
    }

    /// Determines the client before anything is read; `None` if the connection must be closed.
    fn identify(&self, accepted: &Accepted) -> Option<(ListenerKind, Peer)> {
        match accepted {
            Accepted::Tcp(stream, from) => self.identify_tcp(stream, *from),
            Accepted::Unix(stream) => may_use_socket(stream).then_some((ListenerKind::UnixSocket, Peer::NotChecked)),
        }
    }

    fn identify_tcp(&self, stream: &TcpStream, from: SocketAddr) -> Option<(ListenerKind, Peer)> {
        let local = stream.local_addr().ok()?;
        let is_loopback = |address: SocketAddr| address.ip().to_canonical().is_loopback();
        if !is_loopback(local) {
            // Only an explicitly configured listener accepts here. The key authenticates the client, not the kernel.
            return Some((ListenerKind::Network(local.port()), Peer::NotChecked));
        }
        if !is_loopback(from) {
            debug!("closed a connection from {from}, which is not this machine");
            return None;
        }
        let peer = peer::identify(stream, from, local);
        let peer = peer.inspect_err(|e| debug!("closed a connection whose user could not be determined: {e}")).ok()?;
        if peer == Peer::Unknown {
            self.proxy.stats.unknown_peers.count();
        }
        Some((ListenerKind::Loopback(local.port()), peer))
    }

    async fn serve(self: Arc<Self>, accepted: Accepted, (entrance, peer): (ListenerKind, Peer), open: OpenConnection) {
        let activity = &open.activity;
        open.attach_task().await;
        let answer = |request| self.answer(request, Client { entrance, peer, activity });
        match accepted {
            Accepted::Tcp(stream, _) => {
                let _ = stream.set_nodelay(true);
                self.serve_http(stream, activity, None, answer).await;
            }
            Accepted::Unix(stream) => self.serve_http(stream, activity, None, answer).await,
        }
    }

    /// Serves HTTP on a connection until it ends. Without `max_headers` the library's limit of 100 header lines holds;
    /// any other costs an allocation per request.
    pub(super) async fn serve_http<S, F>(
        &self,
        stream: S,
        activity: &Activity,
        max_headers: Option<usize>,
        answer: impl Fn(Request<Incoming>) -> F,
    ) where
        S: Connection,
        F: Future<Output = Reply>,
    {
        if let Some(addresses) = stream.socket().addresses() {
            activity.set_addresses(addresses);
        }
        let answer = &answer;
        let service = service_fn(move |request: Request<Incoming>| async move {
            let number = activity.begin_request();
            // Pinned here, since the future is too large to move.
            let answer = pin!(answer(request));
            let mut reply = activity.unless_timed_out(answer).await.unwrap_or_else(|| self.refuse(&timed_out(), None));
            if number >= MAX_REQUESTS {
                reply.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            activity.end_request();
            Ok::<_, Infallible>(reply)
        });
        let mut http = http1::Builder::new();
        // `Connections` enforces the timeout, which is cheaper than a timer.
        http.header_read_timeout(None);
        // A client may close its sending side after its last request. `MonitoredStream` detects those that are gone.
        http.half_close(true);
        http.max_header_size(head::MAX_READ_BYTES).max_buf_size(head::MAX_READ_BYTES).writev(false);
        if let Some(max_headers) = max_headers {
            http.max_headers(max_headers);
        }
        let mut connection = http.serve_connection(TokioIo::new(MonitoredStream::new(stream, activity)), service);
        let ended = poll_fn(|cx| {
            let mut connection = Pin::new(&mut connection);
            if activity.must_close() {
                return Poll::Ready(Ok(()));
            }
            if activity.is_draining() {
                connection.as_mut().graceful_shutdown();
            }
            connection.poll(cx)
        });
        if let Err(error) = ended.await {
            // Normal: clients disconnect at any time.
            debug!("a connection ended: {error}");
        }
        let stream = connection.into_parts().io.into_inner().into_inner();
        if activity.must_close() {
            if activity.has_undelivered_output() {
                stream.socket().reset_on_close();
            }
        } else if !activity.is_draining() {
            discard_input(stream).await;
        }
    }

    /// Answers one request as if it had come from our own user over loopback at this port, on a connection of its own.
    /// Returns `None` if there are too many connections. For the fuzz target, which parses requests itself.
    pub async fn answer_alone(&self, request: Request<Incoming>, port: u16) -> Option<Reply> {
        let open = self.connections.open().await?;
        open.attach_task().await;
        let client =
            Client { entrance: ListenerKind::Loopback(port), peer: Peer::NotChecked, activity: &open.activity };
        open.activity.begin_request();
        Some(self.answer(request, client).await)
    }
}

fn may_use_socket(stream: &UnixStream) -> bool {
    match stream.peer_cred() {
        Ok(peer) if unix_socket::may_connect(peer.uid()) => true,
        Ok(peer) => {
            debug!("closed a connection from user {} to the unix socket", peer.uid());
            false
        }
        Err(e) => {
            debug!("closed a connection to the unix socket whose user could not be determined: {e}");
            false
        }
    }
}

/// The error for a request that took too long.
fn timed_out() -> RequestError {
    RequestError::new(Code::UpstreamTimeout, "The request was not answered within 60 s.").hint("try again").closing()
}

/// Reads and drops further input: closing a socket with unread bytes resets it, and the client would lose the response
/// that says why its request was refused.
async fn discard_input(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let _ = stream.shutdown().await;
    let reading = async { tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await };
    let _ = tokio::time::timeout(LINGER, reading).await;
}
