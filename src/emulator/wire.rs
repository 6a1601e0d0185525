//! The emulator's connections: accepts, records each request as it came, applies faults, answers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{DATE, HeaderValue};
use http::{HeaderName, Request, Response, StatusCode};
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
use super::admin;
use super::consent;
use super::exchange::{Asked, Given};
use super::fault::Trouble;
use super::gate::{self, Barred};

/// A CA made for this emulator, and a server with a certificate of it.
pub(super) fn tls_acceptor() -> io::Result<(TlsAcceptor, String)> {
    let certificates = || -> Result<_, rcgen::Error> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::new(Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        // OpenSSL takes a certificate for self-signed whose name is that of its issuer.
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

/// Accepts until `stop`.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    while let Some(Ok((stream, from))) = stop.run_until_cancelled(listener.accept()).await {
        // At once: who has left cannot be asked about any more.
        let Some(standing) = gate::let_in(&stream, from) else { continue };
        let (tls, shared) = (tls.clone(), shared.clone());
        let connection = async move {
            let _ = stream.set_nodelay(true);
            let reset = Reset::of(&stream);
            match tls {
                None => talk(stream, shared, reset, standing).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        talk(stream, shared, reset, standing).await;
                    }
                }
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(connection));
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    shared: Arc<Shared>,
    reset: Option<Reset>,
    standing: Result<(), Barred>,
) {
    let reset = Arc::new(reset);
    let service = service_fn(move |request| answer(request, shared.clone(), reset.clone(), standing));
    // Callers may hang up at any time.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    reset: Arc<Option<Reset>>,
    standing: Result<(), Barred>,
) -> Result<Response<AnswerBody>, Broken> {
    let (head, body) = request.into_parts();
    if let Err(barred) = standing.and_then(|()| gate::check(&head, consent::visitors(head.uri.path()))) {
        return Ok(response(barred.into()));
    }
    let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let target = head.uri.path_and_query().map_or_else(|| head.uri.path().to_owned(), ToString::to_string);
    let asked = Asked::new(head.method, &target, head.headers, body);
    if let Some(given) = admin::decide(&shared, &asked) {
        return Ok(response(kept(&shared, given).await));
    }
    let number = shared.receive(&asked);
    let trouble = shared.next_fault(&target).map(super::fault::Fault::trouble);
    let response = match &trouble {
        Some(Trouble::Answer { status, content_type, body, headers }) => {
            let status = StatusCode::from_u16(*status).unwrap_or_default();
            let mut given = Given::of(status, content_type, body.clone());
            for (name, value) in headers {
                let value = HeaderValue::try_from(value.as_str()).map_err(|_| Broken)?;
                given.headers.push((HeaderName::from_static(name), value));
            }
            response(given)
        }
        _ => {
            let given = shared.decide(&asked).await;
            let mut response = response(kept(&shared, given).await);
            let id = format!("dev1::{}", super::ids::random_id("", 20));
            if let Ok(id) = HeaderValue::try_from(id) {
                response.headers_mut().insert("x-vercel-id", id);
            }
            response
        }
    };
    let response = match trouble {
        None | Some(Trouble::Answer { .. }) => response,
        Some(Trouble::Delay(by)) => {
            tokio::time::sleep(by).await;
            response
        }
        Some(Trouble::Held(gate)) => {
            gate.opened().await;
            response
        }
        Some(Trouble::Hang) => std::future::pending().await,
        Some(Trouble::Reset) => {
            if let Some(reset) = &*reset {
                reset.arm();
            }
            return Err(Broken);
        }
        Some(Trouble::Truncate) => response.map(AnswerBody::cut),
    };
    shared.answered(number, response.status());
    let mut response = response;
    let date = httpdate::fmt_http_date(shared.now());
    if let Ok(date) = HeaderValue::try_from(date) {
        response.headers_mut().insert(DATE, date);
    }
    Ok(response)
}

/// The answer once what it says is kept, or what kept it from being so.
async fn kept(shared: &Shared, given: Given) -> Given {
    match shared.state.saved().await {
        Ok(()) => given,
        Err(e) => Given::of(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", format!("{e}\n")),
    }
}

fn response(given: Given) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::Whole(given.body));
    *response.status_mut() = given.status;
    response.headers_mut().extend(given.headers);
    response
}

/// Ends a connection without an answer.
#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken off on purpose")
    }
}

impl std::error::Error for Broken {}

/// A second handle of a connection's socket, to make its end a reset.
struct Reset(socket2::Socket);

impl Reset {
    fn of(stream: &TcpStream) -> Option<Self> {
        socket2::SockRef::from(stream).try_clone().ok().map(Self)
    }

    fn arm(&self) {
        let _ = self.0.set_linger(Some(Duration::ZERO));
    }
}

/// A body that comes whole, or breaks off in the middle of what was announced.
enum AnswerBody {
    Whole(Option<Bytes>),
    Cut { half: Option<Bytes>, announced: u64, sent: bool },
}

impl AnswerBody {
    fn cut(self) -> Self {
        match self {
            Self::Whole(Some(bytes)) => {
                Self::Cut { half: Some(bytes.slice(..bytes.len() / 2)), announced: bytes.len() as u64, sent: false }
            }
            other => other,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Poll::Ready(match &mut *self {
            Self::Whole(bytes) => bytes.take().map(|bytes| Ok(Frame::data(bytes))),
            Self::Cut { half, sent, .. } => match half.take() {
                Some(half) => Some(Ok(Frame::data(half))),
                // A connection that has something to wait for sends what it has first.
                None if !std::mem::replace(sent, true) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None => Some(Err(Broken)),
            },
        })
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Cut { announced, .. } => SizeHint::with_exact(*announced),
        }
    }
}
