//! The emulator's HTTP server: accepts connections, records each request, applies faults, and sends the response.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{DATE, HeaderValue};
use http::{HeaderName, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::access::{self, AccessDenied};
use super::admin_api;
use super::consent_pages;
use super::fault::{Fault, FaultKind};
use super::message::{Request, Response};

/// Creates a CA for this emulator and a TLS acceptor with a certificate that it issued. Also returns the CA in PEM.
pub(super) fn tls_acceptor() -> io::Result<(TlsAcceptor, String)> {
    let certificates = || -> Result<_, rcgen::Error> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::new(Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        // OpenSSL treats a certificate as self-signed if its name equals that of its issuer, so the CA has another
        // name.
        ca.distinguished_name.push(DnType::CommonName, "connect-sidecar emulator CA");
        let ca_certificate = ca.self_signed(&ca_key)?;
        let key = KeyPair::generate()?;
        let names = ["127.0.0.1", "localhost", "::1"].map(str::to_owned);
        let mut leaf = CertificateParams::new(names)?;
        leaf.distinguished_name.push(DnType::CommonName, "connect-sidecar emulator");
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key))?;
        Ok((ca_certificate.pem(), leaf.der().clone(), key.serialize_der()))
    };
    let (ca_pem, leaf, key) = certificates().map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(vec![leaf], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)))
        .map_err(io::Error::other)?;
    Ok((TlsAcceptor::from(Arc::new(config)), ca_pem))
}

/// Accepts connections until `stop` is cancelled.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    while let Some(Ok((stream, from))) = stop.run_until_cancelled(listener.accept()).await {
        // Checked right away: the owner of a closed connection can no longer be looked up.
        let Some(peer_check) = access::check_peer(&stream, from) else { continue };
        let (tls, shared) = (tls.clone(), shared.clone());
        let connection = async move {
            let _ = stream.set_nodelay(true);
            let reset = ConnectionReset::of(&stream);
            match tls {
                None => serve_connection(stream, shared, reset, peer_check).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve_connection(stream, shared, reset, peer_check).await;
                    }
                }
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(connection));
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    shared: Arc<Shared>,
    reset: Option<ConnectionReset>,
    peer_check: Result<(), AccessDenied>,
) {
    let reset = Arc::new(reset);
    let service = service_fn(move |request| respond(request, shared.clone(), reset.clone(), peer_check));
    // Clients may disconnect at any time.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn respond(
    request: http::Request<Incoming>,
    shared: Arc<Shared>,
    reset: Arc<Option<ConnectionReset>>,
    peer_check: Result<(), AccessDenied>,
) -> Result<http::Response<ResponseBody>, ConnectionAborted> {
    let (head, body) = request.into_parts();
    let audience = consent_pages::audience(head.uri.path());
    if let Err(denied) = peer_check.and_then(|()| access::check_head(&head, audience)) {
        return Ok(Response::from(denied).into());
    }
    let body = body.collect().await.map_err(|_| ConnectionAborted)?.to_bytes();
    let target = head.uri.path_and_query().map_or_else(|| head.uri.path().to_owned(), ToString::to_string);
    let request = Request::new(head.method, &target, head.headers, body);
    if let Some(response) = admin_api::handle(&shared, &request) {
        return Ok(after_saving(&shared, response).await.into());
    }
    let number = shared.record(&request);
    let fault = shared.next_fault(&target).map(Fault::kind);
    let mut response: http::Response<ResponseBody> = match &fault {
        Some(FaultKind::Answer { status, content_type, body, headers }) => {
            let status = StatusCode::from_u16(*status).unwrap_or_default();
            let mut response = Response::new(status, content_type, body.clone());
            for (name, value) in headers {
                let value = HeaderValue::try_from(value.as_str()).map_err(|_| ConnectionAborted)?;
                response.headers.push((HeaderName::from_static(name), value));
            }
            response.into()
        }
        _ => {
            let response = shared.handle(&request).await;
            let mut response: http::Response<_> = after_saving(&shared, response).await.into();
            let id = format!("dev1::{}", super::ids::random_id("", 20));
            if let Ok(id) = HeaderValue::try_from(id) {
                response.headers_mut().insert("x-vercel-id", id);
            }
            response
        }
    };
    match fault {
        None | Some(FaultKind::Answer { .. }) => {}
        Some(FaultKind::Delay(by)) => tokio::time::sleep(by).await,
        Some(FaultKind::Hold(hold)) => hold.released().await,
        Some(FaultKind::Hang) => std::future::pending().await,
        Some(FaultKind::Reset) => {
            if let Some(reset) = &*reset {
                reset.arm();
            }
            return Err(ConnectionAborted);
        }
        Some(FaultKind::Truncate) => response = response.map(ResponseBody::truncated),
    }
    shared.record_status(number, response.status());
    let date = httpdate::fmt_http_date(shared.now());
    if let Ok(date) = HeaderValue::try_from(date) {
        response.headers_mut().insert(DATE, date);
    }
    Ok(response)
}

/// Returns the response once the changes that it reports are saved, or a 500 with the reason why they are not.
async fn after_saving(shared: &Shared, response: Response) -> Response {
    match shared.store.saved().await {
        Ok(()) => response,
        Err(e) => Response::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    }
}

impl From<Response> for http::Response<ResponseBody> {
    fn from(response: Response) -> Self {
        response.into_http(ResponseBody::Whole)
    }
}

/// Closes the connection without a response, as a fault asks for.
#[derive(Debug, thiserror::Error)]
#[error("connection aborted by a fault")]
struct ConnectionAborted;

/// A second handle to a connection's socket, which makes closing it send a TCP reset.
struct ConnectionReset(socket2::Socket);

impl ConnectionReset {
    fn of(stream: &TcpStream) -> Option<Self> {
        socket2::SockRef::from(stream).try_clone().ok().map(Self)
    }

    fn arm(&self) {
        let _ = self.0.set_linger(Some(Duration::ZERO));
    }
}

/// A response body: complete, or cut off after half of its announced length.
enum ResponseBody {
    Whole(Option<Bytes>),
    Truncated { half: Option<Bytes>, announced: u64, sent: bool },
}

impl ResponseBody {
    fn truncated(self) -> Self {
        match self {
            Self::Whole(Some(bytes)) => Self::Truncated {
                half: Some(bytes.slice(..bytes.len() / 2)),
                announced: bytes.len() as u64,
                sent: false,
            },
            other => other,
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = ConnectionAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ConnectionAborted>>> {
        Poll::Ready(match &mut *self {
            Self::Whole(bytes) => bytes.take().map(|bytes| Ok(Frame::data(bytes))),
            Self::Truncated { half, sent, .. } => match half.take() {
                Some(half) => Some(Ok(Frame::data(half))),
                // Returning pending once makes hyper flush the half before the error.
                None if !std::mem::replace(sent, true) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None => Some(Err(ConnectionAborted)),
            },
        })
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Truncated { announced, .. } => SizeHint::with_exact(*announced),
        }
    }
}
