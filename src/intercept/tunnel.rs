//! The far end of a tunnel whose bytes are passed on unread: how it is reached, and the passing on.
//!
//! Never leads to a port of ours, nor to an address that is good on this link only, whatever name it has.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use tokio::net::TcpStream;
use tower_service::Service;

use super::target::Target;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::resolver::{Names, is_link_local, is_this_machine};

/// Name resolution and connection, through a proxy or not.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type BoxError = Box<dyn StdError + Send + Sync>;

/// Reaches the far end of a tunnel.
pub(super) struct Dialer {
    names: Names,
    /// The proxy of our own environment, and what it is not for.
    matcher: Matcher,
    our_ports: [u16; 2],
}

impl Dialer {
    /// Goes by our own environment. `our_ports` are those that we listen on.
    pub(super) fn new(names: Names, our_ports: [u16; 2]) -> Self {
        Self { names, matcher: Matcher::from_env(), our_ports }
    }

    /// A connection to `target`, which may be gone to.
    pub(super) async fn connect(&self, target: &Target) -> Result<TcpStream, RequestError> {
        let unreachable =
            |why: &str| RequestError::new(Code::UpstreamUnreachable, format!("Could not connect to {target}: {why}."));
        let to: Uri =
            format!("https://{}:{}/", target.host, target.port).parse().map_err(|_| unreachable("no name"))?;
        let connecting = async {
            match self.proxy_for(&to) {
                None => {
                    let resolver = Resolver { names: self.names.clone(), port: target.port, our_ports: self.our_ports };
                    Ok(with_options(HttpConnector::new_with_resolver(resolver)).call(to).await?)
                }
                Some(proxy) => {
                    let mut tunnel = Tunnel::new(proxy.uri().clone(), with_options(HttpConnector::new()));
                    if let Some(auth) = proxy.basic_auth() {
                        tunnel = tunnel.with_auth(auth.clone());
                    }
                    Ok::<_, BoxError>(tunnel.call(to).await?)
                }
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => {
                let mut last: &(dyn StdError + 'static) = &*error;
                while let Some(cause) = last.source() {
                    last = cause;
                }
                Err(match last.downcast_ref::<Ours>() {
                    Some(ours) => {
                        RequestError::new(Code::HostNotAllowed, format!("There is no tunnel to {target}: {ours}."))
                    }
                    None => unreachable(&last.to_string()),
                })
            }
            Err(_) => Err(RequestError::new(Code::UpstreamTimeout, format!("{target} could not be reached in time."))),
        }
    }

    /// The proxy of our environment, if there is one for this, and it is not ourselves.
    fn proxy_for(&self, to: &Uri) -> Option<Intercept> {
        let is_ours = |proxy: &Intercept| {
            let host = proxy.uri().host().unwrap_or_default();
            let address = host.trim_matches(['[', ']']).parse().is_ok_and(is_this_machine);
            (address || host.eq_ignore_ascii_case("localhost"))
                && proxy.uri().port_u16().is_some_and(|port| self.our_ports.contains(&port))
        };
        self.matcher.intercept(to).filter(|proxy| !is_ours(proxy))
    }
}

fn with_options<R>(mut http: HttpConnector<R>) -> HttpConnector<R> {
    http.enforce_http(false);
    http.set_nodelay(true);
    // One that is silent for hours is not given up while both ends are there.
    http.set_keepalive(Some(Duration::from_secs(60)));
    http
}

/// The addresses of a name, but for those that lead back here.
#[derive(Clone)]
struct Resolver {
    names: Names,
    port: u16,
    our_ports: [u16; 2],
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let Self { names, port, our_ports } = self.clone();
        Box::pin(async move {
            let addresses = names.addresses(name).await?;
            let is_ours =
                |address: &IpAddr| is_link_local(*address) || (is_this_machine(*address) && our_ports.contains(&port));
            match addresses.iter().map(SocketAddr::ip).find(is_ours) {
                Some(address) => Err(Ours(address).into()),
                None => Ok(addresses.into_iter()),
            }
        })
    }
}

/// The name has this address.
#[derive(Debug)]
struct Ours(IpAddr);

impl fmt::Display for Ours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its address {} is this sidecar's or good on this link only", self.0)
    }
}

impl StdError for Ours {}
