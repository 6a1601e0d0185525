//! The far end of a tunnel whose bytes are passed on unread: how it is reached, and the passing on.
//!
//! Never leads to a port of ours, nor to an address that is good on this link only, whatever name it has.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec;

use http::Uri;
use hyper_util::client::legacy::connect::dns::Name;
use lru::LruCache;
use tower_service::Service;

use super::target::Target;
use crate::os::env_proxy::{EnvProxy, Protocol, ProxyServer, Unusable};
use crate::os::tls;
use crate::proxy::dialer::{self, BoxError, ProxyFailed, Stream, TcpConnector, causes};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::resolver::{Names, is_link_local, is_this_machine};

/// Name resolution and connection, through a proxy or not.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Of so many runs the proxies are known, those that asked last.
const MAX_RUNS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Reaches the far end of a tunnel.
pub(super) struct Dialer {
    pub(super) names: Names,
    /// That of our own environment, for a run that did not say what its own is.
    pub(super) env_proxy: EnvProxy,
    pub(super) of_runs: Arc<ProxiesOfRuns>,
    /// Knows whom to trust as a proxy.
    pub(super) trust: Arc<dialer::Dialer>,
    /// Those that we listen on.
    pub(super) our_ports: [u16; 2],
}

/// The proxies of the environments that runs were started in. They may hold a password, so they are in memory alone.
pub(super) struct ProxiesOfRuns(Mutex<LruCache<String, EnvProxy>>);

impl Default for ProxiesOfRuns {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_RUNS)))
    }
}

impl ProxiesOfRuns {
    /// Notes that of a run. One within another run of ours, whose proxy is this sidecar, has that of the outer one.
    pub(super) fn remember(&self, run: &str, env_proxy: EnvProxy, our_ports: [u16; 2]) {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let outer = env_proxy.https_server().filter(|server| is_ours(server, our_ports));
        let known = outer.and_then(|server| runs.get(server.user()?).cloned());
        runs.put(run.to_owned(), known.unwrap_or(env_proxy));
    }

    fn of(&self, run: &str) -> Option<EnvProxy> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(run).cloned()
    }
}

impl Dialer {
    /// A connection to `target`, which may be gone to, for a program of this run.
    pub(super) async fn connect(&self, run: &str, target: &Target) -> Result<Stream, RequestError> {
        let unreachable =
            |why: &str| RequestError::new(Code::UpstreamUnreachable, format!("Could not connect to {target}: {why}."));
        let to: Uri =
            format!("https://{}:{}/", target.host, target.port).parse().map_err(|_| unreachable("no name"))?;
        let resolver = Resolver { names: self.names.clone(), port: target.port, our_ports: self.our_ports };
        let env_proxy = self.of_runs.of(run).unwrap_or_else(|| self.env_proxy.clone());
        let server = match env_proxy.server_for(&to) {
            Ok(server) => server.filter(|server| !is_ours(server, self.our_ports)).cloned(),
            Err(Unusable { variable, reason }) => {
                let error = unreachable(&format!("the proxy that {variable} names cannot be used: {reason}"));
                return Err(error.command(format!("unset {variable}")));
            }
        };
        let by_tls = server.as_ref().is_some_and(|server| server.protocol == Protocol::Https);
        let tls = match by_tls {
            true => self.trust.tls().await,
            false => tls::client_config_without_roots().map(Arc::new).map_err(dialer::TrustError::from),
        };
        let tls =
            tls.map_err(|reason| unreachable(&format!("could not load the trusted root certificates: {reason}")))?;
        let connecting = TcpConnector::new(resolver, server.map(|_| env_proxy), tls).call(to);
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => {
                let causes: Vec<_> = causes(&*error).collect();
                if let Some(ours) = causes.iter().find_map(|cause| cause.downcast_ref::<Ours>()) {
                    let message = format!("There is no tunnel to {target}: {ours}.");
                    return Err(RequestError::new(Code::HostNotAllowed, message));
                }
                let reason = causes.last().map_or_else(String::new, ToString::to_string);
                Err(match causes.iter().find_map(|cause| cause.downcast_ref::<ProxyFailed>()) {
                    Some(ProxyFailed { server, variable, .. }) => {
                        unreachable(&format!("through the proxy {server}: {reason}"))
                            .hint(format!("check {variable} and NO_PROXY"))
                    }
                    None => unreachable(&reason),
                })
            }
            Err(_) => Err(RequestError::new(Code::UpstreamTimeout, format!("{target} could not be reached in time."))),
        }
    }
}

/// Whether a proxy is this sidecar: it would ask itself for ever.
fn is_ours(server: &ProxyServer, our_ports: [u16; 2]) -> bool {
    let host = server.host();
    let is_here =
        host.eq_ignore_ascii_case("localhost") || host.trim_matches(['[', ']']).parse().is_ok_and(is_this_machine);
    is_here && server.port().is_some_and(|port| our_ports.contains(&port))
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

    fn environment(https_proxy: &str, no_proxy: &str) -> EnvProxy {
        EnvProxy::read(&|name| match name {
            "https_proxy" => Some(https_proxy.into()),
            "no_proxy" => Some(no_proxy.into()),
            _ => None,
        })
    }

    #[test]
    fn a_proxy_that_is_ourselves_is_none() {
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
            let environment = environment(proxy, "");
            assert_eq!(is_ours(environment.https_server().expect(proxy), [2774, 40000]), expected, "{proxy}");
        }
    }

    #[test]
    fn a_run_within_a_run_goes_by_the_proxy_of_the_outer_one() {
        let runs = ProxiesOfRuns::default();
        let exempt = Uri::from_static("https://a.test");
        let proxy_of = |run| {
            let environment = runs.of(run).expect("it is known");
            assert!(environment.server_for(&exempt).expect("usable").is_none() || run == "other", "{run}");
            environment.https_server().map(ProxyServer::name)
        };
        runs.remember("outer", environment("socks5h://me:pass@proxy.test", "a.test"), [2774, 40000]);
        runs.remember("inner", environment("http://outer:secret@127.0.0.1:40000", "b.test"), [2774, 40000]);
        runs.remember("innermost", environment("http://inner:secret@127.0.0.1:40000", ""), [2774, 40000]);
        runs.remember("other", environment("http://stranger:secret@127.0.0.1:40000", ""), [2774, 40000]);
        for run in ["outer", "inner", "innermost"] {
            assert_eq!(proxy_of(run).as_deref(), Some("socks5h://proxy.test:1080"), "{run}");
        }
        assert_eq!(proxy_of("other").as_deref(), Some("http://127.0.0.1:40000"), "which is ourselves: none");
        assert!(runs.of("unknown").is_none());
    }
}
