//! How a server is reached: its name resolved, TCP, through a proxy of our environment where asked for, and TLS. Shared by
//! all that connect to Vercel.
//!
//! TLS is always verified, and a name that was bent to this machine leads nowhere unless it may be here.

use std::error::Error as StdError;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec;

use http::Uri;
use http::uri::Scheme;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tower_service::Service;

use super::resolver::{Names, Resolver};
use crate::tls;

/// All addresses of one family share this, and the other family begins 0.3 s later: one that swallows what is sent to it
/// leaves time for the next, and for TLS.
const TCP_TIMEOUT: Duration = Duration::from_secs(4);

/// Why there is no connection.
pub type BoxError = Box<dyn StdError + Send + Sync>;
/// Opens connections to one server.
pub(super) type Connector = HttpsConnector<TcpConnector<Resolver>>;

/// What all connections have in common.
pub(super) struct Dialer {
    names: Names,
    extra_roots: Vec<CertificateDer<'static>>,
    use_env_proxy: bool,
    /// Trust roots take some 40 ms to load: done once, off the way to the first reply.
    tls: OnceCell<Arc<ClientConfig>>,
}

impl Dialer {
    /// Trusts `extra_roots` besides the platform's.
    pub(super) fn new(names: Names, extra_roots: Vec<CertificateDer<'static>>, use_env_proxy: bool) -> Self {
        Self { names, extra_roots, use_env_proxy, tls: OnceCell::new() }
    }

    /// Whether `HTTPS_PROXY` and `NO_PROXY` of our environment are honoured.
    pub(super) fn uses_env_proxy(&self) -> bool {
        self.use_env_proxy
    }

    /// Opens connections to a server of this scheme. An error says why the trust roots could not be loaded.
    pub(super) async fn connector(&self, scheme: &Scheme, may_be_this_machine: bool) -> Result<Connector, String> {
        let tls = if *scheme == Scheme::HTTPS {
            self.tls.get_or_try_init(|| load(self.extra_roots.clone())).await?.clone()
        } else {
            Arc::new(tls::client_config_without_roots().map_err(|e| e.to_string())?)
        };
        let resolver = Resolver { names: self.names.clone(), may_be_this_machine };
        let matcher = self.use_env_proxy.then(|| Arc::new(Matcher::from_env()));
        Ok(HttpsConnector::from((TcpConnector::new(resolver, matcher), tls)))
    }
}

async fn load(extra_roots: Vec<CertificateDer<'static>>) -> Result<Arc<ClientConfig>, String> {
    let loading = tokio::task::spawn_blocking(move || tls::client_config(extra_roots)).await;
    loading.map_err(|_| "loading them broke off".to_owned())?.map(Arc::new).map_err(|e| e.to_string())
}

fn with_options<R>(mut http: HttpConnector<R>) -> HttpConnector<R> {
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(Duration::from_secs(15)));
    http.set_connect_timeout(Some(TCP_TIMEOUT));
    http
}

/// Opens TCP connections, through a proxy of our environment where asked for.
#[derive(Clone)]
pub struct TcpConnector<R> {
    direct: HttpConnector<R>,
    /// A proxy may well be on this machine.
    to_proxy: HttpConnector,
    matcher: Option<Arc<Matcher>>,
}

impl<R> TcpConnector<R> {
    /// Without a proxy, names have the addresses that `resolver` says.
    pub fn new(resolver: R, matcher: Option<Arc<Matcher>>) -> Self {
        let direct = with_options(HttpConnector::new_with_resolver(resolver));
        Self { direct, to_proxy: with_options(HttpConnector::new()), matcher }
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
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.direct.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let proxy = self.matcher.as_ref().and_then(|matcher| matcher.intercept(&to));
        let (mut direct, to_proxy) = (self.direct.clone(), self.to_proxy.clone());
        Box::pin(async move {
            match proxy {
                None => Ok(direct.call(to).await?),
                Some(proxy) => {
                    let mut tunnel = Tunnel::new(proxy.uri().clone(), to_proxy);
                    if let Some(auth) = proxy.basic_auth() {
                        tunnel = tunnel.with_auth(auth.clone());
                    }
                    Ok(tunnel.call(to).await?)
                }
            }
        })
    }
}
