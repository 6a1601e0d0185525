//! One connection to the interception port: its CONNECT, which must bring a run's secret, and the tunnel that comes of it.
//!
//! A tunnel to one of Vercel's hosts ends here, in TLS that names that host and nothing else; it may carry any number of
//! requests. No other tunnel is ever looked into.

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

use super::leaf::Leaves;
use super::target::{Target, Way};
use super::tunnel::Dialer;
use crate::daemon::server::{Server, stream};
use crate::instance::key::Key;
use crate::os::peer;
use crate::proxy::dialer::Stream;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::{self, Reply, ReplyBody};

/// A CONNECT must be there within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest head of a CONNECT, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// TLS must be done within this time.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Some clients send their secret only when they are asked for it.
const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"connect-sidecar\"");

/// What all connections go by.
pub(super) struct Gate {
    pub(super) server: Arc<Server>,
    /// What the runs' secrets are made from.
    pub(super) secret: Key,
    pub(super) leaves: Leaves,
    pub(super) dialer: Dialer,
    /// How many were opened by who knows whom.
    pub(super) tunnels: AtomicU64,
    pub(super) said_not_trusted: AtomicBool,
}

/// A tunnel that is about to begin.
struct Tunnel {
    near: OnUpgrade,
    far: Far,
}

/// Where a tunnel ends.
enum Far {
    /// Here, as this host; its caller goes by this name.
    Here {
        host: String,
        caller: HeaderValue,
        tls: Arc<ServerConfig>,
    },
    There(Box<Stream>),
}

impl Gate {
    /// Serves one connection until it ends; with a `refusal`, only to tell that. While it answers requests, its end is
    /// waited for by `under_way`.
    pub(super) async fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        refusal: Option<RequestError>,
        under_way: TaskTracker,
    ) {
        let ends = stream.peer_addr().ok().zip(stream.local_addr().ok());
        let begun = Mutex::new(None);
        let service = service_fn(|request| async {
            let (reply, tunnel) = self.answer(request, ends, refusal.clone()).await;
            *begun.lock().unwrap_or_else(PoisonError::into_inner) = tunnel;
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
        let tunnel = begun.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Tunnel { near, far }) = tunnel else { return };
        let Ok(near) = near.await else { return };
        match far {
            Far::Here { host, caller, tls } => self.converse(near, &host, &caller, tls, &under_way).await,
            Far::There(there) => {
                // Whoever breaks it off has reasons of his own.
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(near), &mut TokioIo::new(there)).await;
            }
        }
    }

    /// Answers a CONNECT, and says what is to come of it. `ends` are the connection's: theirs and ours.
    async fn answer(
        &self,
        mut request: Request<Incoming>,
        ends: Option<(SocketAddr, SocketAddr)>,
        refusal: Option<RequestError>,
    ) -> (Reply, Option<Tunnel>) {
        let near = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let far = match refusal {
            Some(refusal) => Err(refusal),
            None => self.open(&head, ends).await,
        };
        match far {
            Ok(far) => {
                let established = Response::new(ReplyBody::Left(Full::<Bytes>::default()));
                (established, Some(Tunnel { near, far }))
            }
            Err(error) => (self.refuse(&error, &head), None),
        }
    }

    /// The far end that a CONNECT asks for, if this caller may have it.
    async fn open(&self, head: &request::Parts, ends: Option<(SocketAddr, SocketAddr)>) -> Result<Far, RequestError> {
        if head.method != Method::CONNECT {
            return Err(RequestError::method_not_allowed("CONNECT").closing());
        }
        let target = Target::read(&head.uri)?;
        let way = target.way(&self.server.proxy().relay.hosts)?;
        let run = self.run_of(&head.headers).ok_or_else(|| {
            let message =
                "This proxy is for the programs of a `connect-sidecar run`, whose HTTPS_PROXY has its secret.";
            RequestError::new(Code::RunSecretRequired, message)
        })?;
        match way {
            Way::Opened => {
                let unavailable = |reason: String| RequestError::new(Code::InterceptionUnavailable, reason);
                let tls = self.leaves.tls_of(&target.host);
                let tls = tls.map_err(|problem| unavailable(format!("No TLS as {target}: {problem}.")))?;
                // An SDK may open a connection for each of its requests, so it goes by its process.
                let look =
                    tokio::task::spawn_blocking(move || ends.and_then(|(peer, local)| peer::process(peer, local)));
                let caller = match look.await.ok().flatten() {
                    Some(process) => format!("{run}-process-{process}"),
                    None => format!("{run}-tunnel-{}", self.tunnels.fetch_add(1, Ordering::Relaxed)),
                };
                let caller = HeaderValue::try_from(caller);
                let caller = caller.map_err(|_| unavailable("The run's name is none of ours.".into()))?;
                Ok(Far::Here { host: target.host, caller, tls })
            }
            Way::Blind => {
                debug!("a tunnel to {target}");
                self.dialer.connect(&run, &target).await.map(|stream| Far::There(Box::new(stream)))
            }
        }
    }

    /// The run whose secret the request brings.
    fn run_of(&self, headers: &HeaderMap) -> Option<String> {
        let (scheme, encoded) = headers.get(header::PROXY_AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        let credentials = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (run, secret) = credentials.split_once(':')?;
        let is_good = scheme.eq_ignore_ascii_case("basic") && self.secret.is_run_secret(run, secret.as_bytes());
        is_good.then(|| run.to_owned())
    }

    fn refuse(&self, error: &RequestError, head: &request::Parts) -> Reply {
        let is_ordinary = match error.code {
            // What a program's own tunnels cannot reach is its own affair.
            Code::UpstreamUnreachable | Code::UpstreamTimeout => true,
            Code::RunSecretRequired => !head.headers.contains_key(header::PROXY_AUTHORIZATION),
            _ => false,
        };
        let mut reply = match is_ordinary {
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

    /// Answers the requests in an opened tunnel, as `host`.
    async fn converse(
        &self,
        near: Upgraded,
        host: &str,
        caller: &HeaderValue,
        tls: Arc<ServerConfig>,
        under_way: &TaskTracker,
    ) {
        // What it was before it was upgraded.
        let Ok(Parts { io, read_buf, .. }) = near.downcast::<TokioIo<TcpStream>>() else { return };
        let near = stream::resumed(read_buf, io.into_inner());
        let accepting = TlsAcceptor::from(tls).accept(near);
        match tokio::time::timeout(TLS_TIMEOUT, accepting).await {
            Ok(Ok(stream)) => {
                let _under_way = under_way.token();
                self.server.serve_intercepted(stream, host, caller).await;
            }
            Ok(Err(error)) => self.say_no_tls(host, &error),
            Err(_) => debug!("no TLS within {} s in a tunnel to {host}", TLS_TIMEOUT.as_secs()),
        }
    }

    /// A program that does not trust the run's CA cannot be helped from here, but its owner can.
    fn say_no_tls(&self, host: &str, error: &io::Error) {
        let cause = error.get_ref().and_then(|error| error.downcast_ref());
        let is_not_trusted = matches!(
            cause,
            Some(rustls::Error::AlertReceived(
                AlertDescription::UnknownCA | AlertDescription::BadCertificate | AlertDescription::CertificateUnknown
            ))
        );
        if is_not_trusted && !self.said_not_trusted.swap(true, Ordering::Relaxed) {
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
