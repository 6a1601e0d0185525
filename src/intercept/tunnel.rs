//! The far end of a tunnel whose bytes are passed on unread: how it is reached, and the passing on.
//!
//! Never leads to a port of ours, nor to an address that is good on this link only, whatever name it has.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec;

use http::Uri;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use tokio::net::TcpStream;
use tower_service::Service;

use super::target::Target;
use crate::proxy::dialer::{BoxError, TcpConnector};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::resolver::{Names, is_link_local, is_this_machine};

/// Name resolution and connection, through a proxy or not.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Reaches the far end of a tunnel.
pub(super) struct Dialer {
    names: Names,
    /// That of our own environment, and what it is not for.
    proxy: Arc<Matcher>,
    our_ports: [u16; 2],
}

impl Dialer {
    /// Goes by our own environment. `our_ports` are those that we listen on.
    pub(super) fn new(names: Names, our_ports: [u16; 2]) -> Self {
        Self { names, proxy: Arc::new(Matcher::from_env()), our_ports }
    }

    /// A connection to `target`, which may be gone to.
    pub(super) async fn connect(&self, target: &Target) -> Result<TcpStream, RequestError> {
        let unreachable =
            |why: &str| RequestError::new(Code::UpstreamUnreachable, format!("Could not connect to {target}: {why}."));
        let to: Uri =
            format!("https://{}:{}/", target.host, target.port).parse().map_err(|_| unreachable("no name"))?;
        let resolver = Resolver { names: self.names.clone(), port: target.port, our_ports: self.our_ports };
        let is_ourselves = self.proxy.intercept(&to).is_some_and(|proxy| self.is_ours(&proxy));
        let proxy = (!is_ourselves).then(|| self.proxy.clone());
        let connecting = TcpConnector::new(resolver, proxy).call(to);
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => {
                let first: &(dyn StdError + 'static) = &*error;
                let last = std::iter::successors(Some(first), |&e| e.source()).last().unwrap_or(first);
                let refused = last.downcast_ref::<Ours>().map(|ours| {
                    RequestError::new(Code::HostNotAllowed, format!("There is no tunnel to {target}: {ours}."))
                });
                Err(refused.unwrap_or_else(|| unreachable(&last.to_string())))
            }
            Err(_) => Err(RequestError::new(Code::UpstreamTimeout, format!("{target} could not be reached in time."))),
        }
    }

    /// Whether a proxy is this sidecar: it would ask itself for ever.
    fn is_ours(&self, proxy: &Intercept) -> bool {
        let host = proxy.uri().host().unwrap_or_default();
        let is_here =
            host.eq_ignore_ascii_case("localhost") || host.trim_matches(['[', ']']).parse().is_ok_and(is_this_machine);
        is_here && proxy.uri().port_u16().is_some_and(|port| self.our_ports.contains(&port))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_that_is_ourselves_is_none() {
        let dialer = Dialer { names: Names::system(), proxy: Arc::new(Matcher::from_env()), our_ports: [2774, 40000] };
        for (proxy, expected) in [
            ("http://127.0.0.1:2774", true),
            ("http://run:secret@127.0.0.1:40000", true),
            ("http://localhost:40000/", true),
            ("http://[::1]:2774", true),
            ("http://0.0.0.0:2774", true),
            ("http://127.0.0.1:3128", false),
            ("http://127.0.0.1", false),
            ("http://proxy.example:2774", false),
            ("http://10.0.0.1:2774", false),
        ] {
            let matcher = Matcher::builder().https(proxy).build();
            let found = matcher.intercept(&Uri::from_static("https://github.com/")).expect(proxy);
            assert_eq!(dialer.is_ours(&found), expected, "{proxy}");
        }
    }
}
