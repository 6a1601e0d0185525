//! Resolves upstream's name. Unless configuration allows it, an address of this machine is an error: a name redirected
//! to loopback would send every request back to the sidecar (docs/security.md U1).

use std::error::Error as StdError;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::vec;

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;

type BoxError = Box<dyn StdError + Send + Sync>;

/// A source of addresses.
#[derive(Debug, Clone)]
pub struct Names(Source);

#[derive(Debug, Clone)]
enum Source {
    System(GaiResolver),
    Fixed(Arc<[SocketAddr]>),
}

impl Names {
    /// The system's resolver.
    pub fn system() -> Self {
        Self(Source::System(GaiResolver::new()))
    }

    /// The addresses of a name.
    pub async fn addresses(&self, name: Name) -> std::io::Result<Vec<SocketAddr>> {
        match &self.0 {
            Source::System(system) => Ok(system.clone().call(name).await?.collect()),
            Source::Fixed(addresses) => Ok(addresses.to_vec()),
        }
    }

    /// A test double with these addresses for every name. Their port is used if the origin has none.
    pub fn fixed(addresses: &[SocketAddr]) -> Self {
        Self(Source::Fixed(addresses.into()))
    }
}

/// A resolver for connectors.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    /// The source of addresses.
    pub(super) names: Names,
    /// Whether addresses of this machine are allowed.
    pub(super) may_be_this_machine: bool,
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let Self { names, may_be_this_machine } = self.clone();
        Box::pin(async move {
            let addresses = names.addresses(name).await?;
            // One such address is enough, because the connector may use any of them.
            match addresses.iter().map(SocketAddr::ip).find(|address| is_this_machine(*address)) {
                Some(address) if !may_be_this_machine => Err(PointsToThisMachine(address).into()),
                _ => Ok(addresses.into_iter()),
            }
        })
    }
}

/// Whether an address is one of this machine or link-local, where no public service can be.
pub fn is_this_machine(address: IpAddr) -> bool {
    // `::ffff:127.0.0.1` is 127.0.0.1.
    let address = address.to_canonical();
    address.is_loopback() || address.is_unspecified() || is_link_local(address)
}

/// Whether an address is link-local.
pub fn is_link_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// A name resolves to this machine, which is not allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0} is an address of this machine")]
pub(super) struct PointsToThisMachine(pub(super) IpAddr);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_addresses_of_this_machine_in_every_form() {
        for (address, expected) in [
            ("127.0.0.1", true),
            ("127.255.0.9", true),
            ("0.0.0.0", true),
            ("169.254.169.254", true),
            ("::1", true),
            ("::", true),
            ("fe80::1", true),
            ("febf::1", true),
            ("::ffff:127.0.0.1", true),
            ("::ffff:0.0.0.0", true),
            ("::ffff:169.254.1.1", true),
            ("76.76.21.21", false),
            ("128.0.0.1", false),
            ("10.0.0.1", false),
            ("192.168.1.1", false),
            ("169.255.0.1", false),
            ("2606:4700::1", false),
            ("fec0::1", false),
            ("fd00::1", false),
            ("::ffff:76.76.21.21", false),
        ] {
            assert_eq!(is_this_machine(address.parse().expect("an address")), expected, "{address}");
        }
    }
}
