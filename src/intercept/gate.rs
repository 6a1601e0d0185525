//! One connection to the interception port: its CONNECT, which must bring a run's secret, and the tunnel that comes of it.
//!
//! A tunnel to one of Vercel's hosts ends here, in TLS that names that host and nothing else; it may carry any number of
//! requests. No other tunnel is ever looked into.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{AlertDescription, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{debug, warn};

use super::leaf::Leaves;
use super::target::{Target, Way};
use super::tunnel::Dialer;
use crate::instance_key::Key;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::hosts::Hosts;
use crate::proxy::reply::Reply;
use crate::server::{Server, head, linger};

/// A CONNECT must be there within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// TLS must be done within this time.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// An opened tunnel ends after so long without a request: longer than clients keep an idle connection, so that none sends
/// a request on one that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Some clients send their secret only when they are asked for it.
const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"connect-sidecar\"");

/// What all connections go by.
pub(super) struct Gate {
    pub(super) server: Arc<Server>,
    pub(super) key: Key,
    pub(super) hosts: Hosts,
    pub(super) leaves: Leaves,
    pub(super) dialer: Dialer,
    /// How many were opened.
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
    There(TcpStream),
}

impl Gate {
    /// Serves one connection until it ends; with a `refusal`, only to tell that. Once `stopping`, it ends with the request
    /// that it is answering, for which `under_way` is held.
    pub(super) async fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        refusal: Option<RequestError>,
        stopping: CancellationToken,
        under_way: TaskTrackerToken,
    ) {
        let begun = Mutex::new(None);
        let service = service_fn(|request| {
            let (refusal, begun) = (refusal.clone(), &begun);
            let gate = &self;
            async move {
                let (reply, tunnel) = gate.answer(request, refusal).await;
                *begun.lock().unwrap_or_else(PoisonError::into_inner) = tunnel;
                Ok::<_, Infallible>(reply)
            }
        });
        let connection =
            http().header_read_timeout(HEAD_TIMEOUT).serve_connection(TokioIo::new(stream), service).with_upgrades();
        if let Err(error) = until_stopped(pin!(connection), &stopping, |c| c.graceful_shutdown()).await {
            debug!("a connection to the interception port ended: {error}");
        }
        let Some(Tunnel { near, far }) = begun.into_inner().unwrap_or_else(PoisonError::into_inner) else { return };
        let Ok(near) = near.await else { return };
        match far {
            Far::Here { host, caller, tls } => {
                self.converse(near, &host, &caller, tls, &stopping).await;
            }
            Far::There(mut there) => {
                drop(under_way);
                // Whoever breaks off has reasons of his own.
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(near), &mut there).await;
            }
        }
    }

    /// Answers a CONNECT, and says what is to come of it.
    async fn answer(&self, mut request: Request<Incoming>, refusal: Option<RequestError>) -> (Reply, Option<Tunnel>) {
        let near = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let far = match refusal {
            Some(refusal) => Err(refusal),
            None => self.open(&head).await,
        };
        match far {
            Ok(far) => (Response::default(), Some(Tunnel { near, far })),
            Err(error) => (self.refuse(&error, &head), None),
        }
    }

    /// The far end that a CONNECT asks for, if this caller may have it.
    async fn open(&self, head: &Parts) -> Result<Far, RequestError> {
        if head.method != Method::CONNECT {
            return Err(RequestError::method_not_allowed("CONNECT").closing());
        }
        let target = Target::read(&head.uri)?;
        let way = target.way(&self.hosts)?;
        let run = self.run_of(&head.headers).ok_or_else(|| {
            let message =
                "This proxy is for the programs of a `connect-sidecar run`, whose HTTPS_PROXY has its secret.";
            RequestError::new(Code::RunSecretRequired, message)
        })?;
        match way {
            Way::Opened => {
                let tls = self.leaves.tls_of(&target.host).map_err(|problem| {
                    RequestError::new(Code::InterceptionUnavailable, format!("No TLS as {target}: {problem}."))
                })?;
                let number = self.tunnels.fetch_add(1, Ordering::Relaxed);
                // A run's name is one that we have made, or its secret would not fit.
                let caller = HeaderValue::try_from(format!("{run}-{number}")).unwrap_or_else(|_| CHALLENGE);
                Ok(Far::Here { host: target.host, caller, tls })
            }
            Way::Blind => {
                debug!("a tunnel to {target}");
                self.dialer.connect(&target).await.map(Far::There)
            }
        }
    }

    /// The run whose secret the request brings.
    fn run_of(&self, headers: &HeaderMap) -> Option<String> {
        let (scheme, encoded) = headers.get(header::PROXY_AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        let credentials = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (run, secret) = credentials.split_once(':')?;
        let is_good = scheme.eq_ignore_ascii_case("basic") && self.key.is_run_secret(run, secret.as_bytes());
        is_good.then(|| run.to_owned())
    }

    fn refuse(&self, error: &RequestError, head: &Parts) -> Reply {
        let mut reply = self.server.refuse(error, Some(head));
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
        stopping: &CancellationToken,
    ) {
        let accepting = TlsAcceptor::from(tls).accept(TokioIo::new(near));
        let stream = match tokio::time::timeout(TLS_TIMEOUT, accepting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.say_no_tls(host, &error),
            Err(_) => return debug!("no TLS within {} s in a tunnel to {host}", TLS_TIMEOUT.as_secs()),
        };
        let service = service_fn(async |request| {
            Ok::<_, Infallible>(self.server.answer_intercepted(request, host, caller).await)
        });
        let mut connection = http().header_read_timeout(IDLE_TIMEOUT).serve_connection(TokioIo::new(stream), service);
        if let Err(error) = until_stopped(Pin::new(&mut connection), stopping, |c| c.graceful_shutdown()).await {
            debug!("a tunnel to {host} ended: {error}");
        }
        if !stopping.is_cancelled() {
            linger(connection.into_parts().io.into_inner()).await;
        }
    }

    /// A program that does not trust the run's CA cannot be helped from here, but its owner can.
    fn say_no_tls(&self, host: &str, error: &io::Error) {
        let cause = error.get_ref().and_then(|error| error.downcast_ref());
        let is_not_trusted = matches!(
            cause,
            Some(rustls::Error::AlertReceived(
                AlertDescription::UnknownCA
                    | AlertDescription::BadCertificate
                    | AlertDescription::CertificateUnknown
                    | AlertDescription::UnsupportedCertificate
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

fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).max_header_size(head::MAX_BYTES);
    http
}

/// Serves a connection to its end, and once `stopping`, no longer than its request lasts.
async fn until_stopped<C: Future>(
    mut connection: Pin<&mut C>,
    stopping: &CancellationToken,
    shut_down: impl Fn(Pin<&mut C>),
) -> C::Output {
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            shut_down(connection.as_mut());
            connection.await
        }
    }
}
