//! Answers CONNECT on the interception port. The request must carry a run's secret.
//!
//! A tunnel to one of Vercel's hosts is terminated here, with a TLS certificate for that host only, and may carry any
//! number of requests. All other tunnels are forwarded unread.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Parts, Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{AlertDescription, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::leaf::LeafCertificates;
use super::target::{Target, TunnelMode};
use super::tunnel::TunnelDialer;
use crate::daemon::server::{Server, stream};
use crate::instance::key::Key;
use crate::os::peer;
use crate::proxy::dialer::Stream;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::{self, Reply, ReplyBody};

/// Time for a CONNECT request to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest head of a CONNECT request, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Time for the TLS handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Some clients send their credentials only after a challenge.
const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"connect-sidecar\"");

/// Serves the connections to the interception port.
pub(super) struct ConnectHandler {
    pub(super) server: Arc<Server>,
    /// The secret from which the secrets of runs are derived.
    pub(super) secret: Key,
    pub(super) certificates: LeafCertificates,
    pub(super) dialer: TunnelDialer,
    /// Counts tunnels whose client process could not be determined.
    pub(super) unnamed_clients: AtomicU64,
    pub(super) warned_of_untrusted_ca: AtomicBool,
}

/// The end of a tunnel.
enum Destination {
    /// Terminated here with TLS as `host`. `client_id` identifies the client program.
    Intercepted { host: String, client_id: HeaderValue, tls: Arc<ServerConfig> },
    /// Forwarded to this connection.
    Remote(Box<Stream>),
}

impl ConnectHandler {
    /// Serves one connection until it ends. `refusal` answers its request, if given. `under_way` tracks the connection
    /// while it is intercepted.
    pub(super) async fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        refusal: Option<RequestError>,
        under_way: TaskTracker,
    ) {
        let addresses = stream.peer_addr().ok().zip(stream.local_addr().ok());
        let accepted = Mutex::new(None);
        let service = service_fn(|request| async {
            let (reply, tunnel) = self.answer(request, addresses, refusal.clone()).await;
            *accepted.lock().unwrap_or_else(PoisonError::into_inner) = tunnel;
            Ok::<_, Infallible>(reply)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_header_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            debug!("a connection to the interception port ended: {error}");
        }
        let tunnel = accepted.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((client, destination)) = tunnel else { return };
        let Ok(client) = client.await else { return };
        match destination {
            Destination::Intercepted { host, client_id, tls } => {
                self.intercept(client, &host, &client_id, tls, &under_way).await;
            }
            Destination::Remote(remote) => {
                // Either side may disconnect at any time.
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(remote)).await;
            }
        }
    }

    /// Answers a CONNECT request and returns the tunnel, if it was accepted. `addresses` are the connection's peer and
    /// local address.
    async fn answer(
        &self,
        mut request: Request<Incoming>,
        addresses: Option<(SocketAddr, SocketAddr)>,
        refusal: Option<RequestError>,
    ) -> (Reply, Option<(OnUpgrade, Destination)>) {
        let client = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let outcome = match refusal {
            Some(refusal) => Err(refusal),
            None => self.connect(&head, addresses).await,
        };
        match outcome {
            Ok(destination) => {
                let established = Response::new(ReplyBody::Left(Full::<Bytes>::default()));
                (established, Some((client, destination)))
            }
            Err(error) => (self.refuse(&error, &head), None),
        }
    }

    /// Checks a CONNECT request and connects to its destination.
    async fn connect(
        &self,
        head: &request::Parts,
        addresses: Option<(SocketAddr, SocketAddr)>,
    ) -> Result<Destination, RequestError> {
        if head.method != Method::CONNECT {
            return Err(RequestError::method_not_allowed("CONNECT").closing());
        }
        let target = Target::parse(&head.uri)?;
        let mode = target.tunnel_mode(&self.server.proxy().relay.hosts)?;
        let run = self.authenticate(&head.headers).ok_or_else(|| {
            let message =
                "This proxy is for the programs of a `connect-sidecar run`, whose HTTPS_PROXY has its secret.";
            RequestError::new(Code::RunSecretRequired, message)
        })?;
        match mode {
            TunnelMode::Intercept => {
                let unavailable = |reason: String| RequestError::new(Code::InterceptionUnavailable, reason);
                let tls = self.certificates.server_config(&target.host);
                let tls = tls.map_err(|error| unavailable(format!("No TLS as {target}: {error}.")))?;
                // By process, since an SDK may open a connection for each request.
                let lookup =
                    tokio::task::spawn_blocking(move || addresses.and_then(|(peer, local)| peer::process(peer, local)));
                let client_id = match lookup.await.ok().flatten() {
                    Some(process) => format!("{run}-process-{process}"),
                    None => format!("{run}-tunnel-{}", self.unnamed_clients.fetch_add(1, Ordering::Relaxed)),
                };
                let client_id = HeaderValue::try_from(client_id);
                let client_id = client_id.map_err(|_| unavailable("The run's name is invalid.".into()))?;
                Ok(Destination::Intercepted { host: target.host, client_id, tls })
            }
            TunnelMode::Forward => {
                debug!("a tunnel to {target}");
                self.dialer.connect(&run, &target).await.map(|stream| Destination::Remote(Box::new(stream)))
            }
        }
    }

    /// The run whose secret the request carries.
    fn authenticate(&self, headers: &HeaderMap) -> Option<String> {
        let (scheme, encoded) = headers.get(header::PROXY_AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        let credentials = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (run, secret) = credentials.split_once(':')?;
        let is_good = scheme.eq_ignore_ascii_case("basic") && self.secret.is_run_secret(run, secret.as_bytes());
        is_good.then(|| run.to_owned())
    }

    fn refuse(&self, error: &RequestError, head: &request::Parts) -> Reply {
        let is_expected = match error.code {
            // The program's own destination is unreachable, which is no error of the sidecar.
            Code::UpstreamUnreachable | Code::UpstreamTimeout => true,
            Code::RunSecretRequired => !head.headers.contains_key(header::PROXY_AUTHORIZATION),
            _ => false,
        };
        let mut reply = match is_expected {
            true => {
                debug!("{error}");
                reply::error(error)
            }
            false => self.server.refuse(error, Some(head)),
        };
        if error.code == Code::RunSecretRequired {
            reply.headers_mut().insert(header::PROXY_AUTHENTICATE, CHALLENGE);
        }
        reply
    }

    /// Decrypts a tunnel and answers its requests as `host`.
    async fn intercept(
        &self,
        client: Upgraded,
        host: &str,
        client_id: &HeaderValue,
        tls: Arc<ServerConfig>,
        under_way: &TaskTracker,
    ) {
        let Ok(Parts { io, read_buf, .. }) = client.downcast::<TokioIo<TcpStream>>() else { return };
        let client = stream::with_prefix(read_buf, io.into_inner());
        let handshake = TlsAcceptor::from(tls).accept(client);
        match tokio::time::timeout(TLS_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => {
                let _under_way = under_way.token();
                self.server.serve_intercepted(stream, host, client_id).await;
            }
            Ok(Err(error)) => self.report_failed_handshake(host, &error),
            Err(_) => debug!("no TLS within {} s in a tunnel to {host}", TLS_TIMEOUT.as_secs()),
        }
    }

    /// Warns once if a program does not trust the local CA, which only its user can change.
    fn report_failed_handshake(&self, host: &str, error: &io::Error) {
        let cause = error.get_ref().and_then(|error| error.downcast_ref());
        let is_untrusted_ca = matches!(
            cause,
            Some(rustls::Error::AlertReceived(
                AlertDescription::UnknownCA | AlertDescription::BadCertificate | AlertDescription::CertificateUnknown
            ))
        );
        if is_untrusted_ca && !self.warned_of_untrusted_ca.swap(true, Ordering::Relaxed) {
            warn!(
                host,
                "a program of a run does not trust the local CA, so its requests to {host} fail: it must read its roots \
                 from SSL_CERT_FILE, or start the run with --no-intercept"
            );
        } else {
            debug!("no TLS in a tunnel to {host}: {error}");
        }
    }
}
