//! Opens connections: name resolution, TCP, the environment's proxy if it is enabled, TLS. Shared by all connections to
//! Vercel and by the tunnels of runs.
//!
//! TLS is always verified. A name that resolves to this machine is refused unless configuration allows it.

use std::error::Error as StdError;
use std::future::{Future, Ready, ready};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{io, vec};

use http::Uri;
use http::uri::Scheme;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::task::JoinError;
use tower_service::Service;

use super::resolver::{Names, Resolver, is_this_machine};
use crate::os::env_proxy::{EnvProxy, Protocol, ProxyServer};
use crate::os::tls;

/// Shared by all addresses of one family; the other family starts 0.3 s later. An address that does not answer leaves
/// enough time for the next one and for TLS.
const TCP_TIMEOUT: Duration = Duration::from_secs(4);
/// TCP keepalive: an idle connection is probed after this time, then at this interval, this many times. Connections
/// that a change of network has killed are detected within half a minute.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(15);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// The reason why there is no connection.
pub type BoxError = Box<dyn StdError + Send + Sync>;
/// A TCP stream to a server or through a proxy, with TLS to the proxy if its scheme is `https`.
pub type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Opens connections for one scheme.
pub(super) type Connector = HttpsConnector<TcpConnector<Resolver>>;

/// Connecting through a proxy failed.
#[derive(Debug, thiserror::Error)]
#[error("the proxy {server} did not lead there")]
pub struct ProxyFailed {
    /// The proxy without its password.
    pub server: String,
    /// The environment variable that sets it.
    pub variable: &'static str,
    source: BoxError,
}

/// The trusted root certificates could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The task that loads them panicked.
    #[error("loading them broke off")]
    Interrupted(#[source] JoinError),
    /// There are none, or TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// The settings of all connections.
pub struct Dialer {
    names: Names,
    extra_roots: Vec<CertificateDer<'static>>,
    env_proxy: Option<EnvProxy>,
    /// Loaded once, since loading the trusted roots takes about 40 ms.
    tls: OnceCell<Arc<ClientConfig>>,
}

impl Dialer {
    /// Trusts `extra_roots` besides the platform's roots and uses `env_proxy`, if there is one.
    pub(super) fn new(names: Names, extra_roots: Vec<CertificateDer<'static>>, env_proxy: Option<EnvProxy>) -> Self {
        Self { names, extra_roots, env_proxy, tls: OnceCell::new() }
    }

    /// Whether the environment's proxy is used.
    pub(super) fn uses_env_proxy(&self) -> bool {
        self.env_proxy.is_some()
    }

    /// A connector for servers of this scheme.
    pub(super) async fn connector(&self, scheme: &Scheme, may_be_this_machine: bool) -> Result<Connector, TrustError> {
        let tls = match &self.env_proxy {
            None if *scheme != Scheme::HTTPS => Arc::new(tls::client_config_without_roots()?),
            _ => self.tls().await?,
        };
        let is_refused = if may_be_this_machine { |_| false } else { is_this_machine };
        let resolver = Resolver { names: self.names.clone(), is_refused };
        let tcp = TcpConnector::new(resolver, self.env_proxy.clone(), tls.clone());
        Ok(HttpsConnector::from((tcp, tls)))
    }

    /// The TLS configuration of all connections.
    pub async fn tls(&self) -> Result<Arc<ClientConfig>, TrustError> {
        Ok(self.tls.get_or_try_init(|| load(self.extra_roots.clone())).await?.clone())
    }
}

async fn load(extra_roots: Vec<CertificateDer<'static>>) -> Result<Arc<ClientConfig>, TrustError> {
    let loading = tokio::task::spawn_blocking(move || tls::client_config(extra_roots)).await;
    Ok(Arc::new(loading.map_err(TrustError::Interrupted)??))
}

fn with_options<R>(mut http: HttpConnector<R>) -> HttpConnector<R> {
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(KEEPALIVE_AFTER));
    http.set_keepalive_interval(Some(KEEPALIVE_EVERY));
    http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    http.set_connect_timeout(Some(TCP_TIMEOUT));
    http
}

/// Opens TCP connections, through the environment's proxy if it is enabled.
#[derive(Clone)]
pub struct TcpConnector<R> {
    direct: HttpConnector<R>,
    resolver: R,
    /// The proxy may be on this machine.
    to_proxy: HttpsConnector<HttpConnector>,
    env_proxy: Option<EnvProxy>,
}

impl<R: Clone> TcpConnector<R> {
    /// `resolver` resolves names, except those that a proxy resolves itself. `tls` is for connections to a proxy.
    pub fn new(resolver: R, env_proxy: Option<EnvProxy>, tls: Arc<ClientConfig>) -> Self {
        let direct = with_options(HttpConnector::new_with_resolver(resolver.clone()));
        let to_proxy = HttpsConnector::from((with_options(HttpConnector::new()), tls));
        Self { direct, resolver, to_proxy, env_proxy }
    }
}

impl<R> TcpConnector<R>
where
    R: Service<Name, Response = vec::IntoIter<SocketAddr>, Error = BoxError, Future: Send> + Clone + Send,
{
    async fn connect_through(&mut self, server: &ProxyServer, to: Uri) -> Result<Stream, BoxError> {
        if server.protocol != Protocol::Socks5 {
            return self.tunnel(server, to).await;
        }
        let mut last_error = BoxError::from("its name has no address");
        for address in self.addresses(&to).await? {
            let to = Uri::builder().scheme("https").authority(address.to_string()).path_and_query("/").build()?;
            match self.tunnel(server, to).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last_error = error,
            }
        }
        Err(last_error)
    }

    /// The addresses of an origin with its port.
    async fn addresses(&mut self, to: &Uri) -> Result<Vec<SocketAddr>, BoxError> {
        let host = to.host().unwrap_or_default();
        let port = to.port_u16().unwrap_or(if to.scheme() == Some(&Scheme::HTTP) { 80 } else { 443 });
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let addresses = self.resolver.call(host.parse::<Name>()?).await?;
        let at_port = |address: SocketAddr| {
            let is_default = to.port_u16().is_none() && address.port() != 0;
            SocketAddr::new(address.ip(), if is_default { address.port() } else { port })
        };
        Ok(addresses.map(at_port).collect())
    }

    /// Lets a proxy connect to `to`.
    async fn tunnel(&mut self, server: &ProxyServer, to: Uri) -> Result<Stream, BoxError> {
        let failed = |source: BoxError| ProxyFailed { server: server.name(), variable: server.variable, source };
        let endpoint = server.endpoint();
        let stream = self.to_proxy.call(endpoint.clone()).await.map_err(failed)?;
        let connected = Connected(Some(stream));
        let tunnelled = match server.protocol {
            Protocol::Http | Protocol::Https => {
                let mut tunnel = Tunnel::new(endpoint, connected);
                if let Some(auth) = server.basic_auth() {
                    tunnel = tunnel.with_auth(auth);
                }
                tunnel.call(to).await.map_err(|e| failed(e.into()))
            }
            Protocol::Socks5 | Protocol::Socks5h => {
                let mut socks = SocksV5::new(endpoint, connected);
                if let Some((user, password)) = server.credentials() {
                    socks = socks.with_auth(user.to_owned(), password.to_owned());
                }
                socks.call(to).await.map_err(|e| failed(e.into()))
            }
        };
        Ok(tunnelled?)
    }
}

impl<R> Service<Uri> for TcpConnector<R>
where
    R: Service<Name, Response = vec::IntoIter<SocketAddr>, Error = BoxError, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static,
{
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.direct.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let mut this = self.clone();
        Box::pin(async move {
            let server = match &this.env_proxy {
                Some(env_proxy) => env_proxy.server_for(&to).map_err(Clone::clone)?.cloned(),
                None => None,
            };
            match server {
                None => Ok(Stream::Http(this.direct.call(to).await?)),
                Some(server) => this.connect_through(&server, to).await,
            }
        })
    }
}

/// A connection to a proxy that is already open, as a connector for the proxy protocols.
struct Connected(Option<Stream>);

impl Service<Uri> for Connected {
    type Response = Stream;
    type Error = io::Error;
    type Future = Ready<io::Result<Stream>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        ready(self.0.take().ok_or_else(|| io::ErrorKind::NotConnected.into()))
    }
}

/// An error and its causes, the innermost last.
pub fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| cause(error))
}

/// The cause of an error. An error wrapped in an I/O error is not its source, but what it stands for.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    match error.downcast_ref().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}
