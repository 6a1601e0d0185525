//! Connects forwarded tunnels to their destination, through the run's own proxy if it has one.
//!
//! Refuses names that resolve to one of the sidecar's own ports or to a link-local address.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use lru::LruCache;
use tower_service::Service;

use super::target::Target;
use crate::os::env_proxy::{EnvProxy, Protocol, ProxyServer, Unusable};
use crate::os::tls;
use crate::proxy::dialer::{self, ProxyFailed, Stream, TcpConnector, causes};
use crate::proxy::error::{Code, RequestError};
use crate::proxy::resolver::{Names, RefusedAddress, Resolver, is_link_local, is_this_machine};

/// Time for name resolution and connection, including a proxy's.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Runs whose proxy settings are kept, by last use.
const MAX_RUNS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Connects tunnels.
pub(super) struct TunnelDialer {
    pub(super) names: Names,
    /// The sidecar's own proxy settings, for runs that did not report theirs.
    pub(super) env_proxy: EnvProxy,
    pub(super) run_proxies: Arc<RunProxies>,
    /// Has the trust roots for HTTPS proxies.
    pub(super) proxy_trust: Arc<dialer::Dialer>,
    /// The ports that the sidecar listens on.
    pub(super) own_ports: [u16; 2],
}

/// The proxy settings of each run's environment. They may contain passwords, so they are kept in memory only.
pub(super) struct RunProxies(Mutex<LruCache<String, EnvProxy>>);

impl Default for RunProxies {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_RUNS)))
    }
}

impl RunProxies {
    /// Stores the settings of a run. A run inside another run has this sidecar as its proxy, and gets the settings of
    /// the outer run instead.
    pub(super) fn insert(&self, run: &str, env_proxy: EnvProxy, own_ports: [u16; 2]) {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let outer = env_proxy.https_server().filter(|server| is_this_sidecar(server, own_ports));
        let known = outer.and_then(|server| runs.get(server.user()?).cloned());
        runs.put(run.to_owned(), known.unwrap_or(env_proxy));
    }

    fn get(&self, run: &str) -> Option<EnvProxy> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(run).cloned()
    }
}

impl TunnelDialer {
    /// Connects to `target`, which was checked, with the proxy settings of this run.
    pub(super) async fn connect(&self, run: &str, target: &Target) -> Result<Stream, RequestError> {
        let unreachable =
            |why: &str| RequestError::new(Code::UpstreamUnreachable, format!("Could not connect to {target}: {why}."));
        let to: Uri =
            format!("https://{}:{}/", target.host, target.port).parse().map_err(|_| unreachable("invalid name"))?;
        // No name may lead back to this sidecar.
        let is_refused = if self.own_ports.contains(&target.port) { is_this_machine } else { is_link_local };
        let resolver = Resolver { names: self.names.clone(), is_refused };
        let env_proxy = self.run_proxies.get(run).unwrap_or_else(|| self.env_proxy.clone());
        let server = match env_proxy.server_for(&to) {
            Ok(server) => server.filter(|server| !is_this_sidecar(server, self.own_ports)).cloned(),
            Err(Unusable { variable, reason }) => {
                let error = unreachable(&format!("the proxy that {variable} names cannot be used: {reason}"));
                return Err(error.command(format!("unset {variable}")));
            }
        };
        let is_https = server.as_ref().is_some_and(|server| server.protocol == Protocol::Https);
        let tls = match is_https {
            true => self.proxy_trust.tls().await,
            false => tls::client_config_without_roots().map(Arc::new).map_err(dialer::TrustError::from),
        };
        let tls =
            tls.map_err(|reason| unreachable(&format!("could not load the trusted root certificates: {reason}")))?;
        let connecting = TcpConnector::new(resolver, server.map(|_| env_proxy), tls).call(to);
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => {
                let causes: Vec<_> = causes(&*error).collect();
                if let Some(RefusedAddress(address)) = causes.iter().find_map(|cause| cause.downcast_ref()) {
                    let message = format!(
                        "There is no tunnel to {target}: its address {address} is this sidecar's or good on this link only."
                    );
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

/// Whether a proxy is this sidecar, which would forward to itself forever.
fn is_this_sidecar(server: &ProxyServer, own_ports: [u16; 2]) -> bool {
    let host = server.host();
    let is_local =
        host.eq_ignore_ascii_case("localhost") || host.trim_matches(['[', ']']).parse().is_ok_and(is_this_machine);
    is_local && server.port().is_some_and(|port| own_ports.contains(&port))
}

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
    fn this_sidecar_is_recognised_as_proxy() {
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
            assert_eq!(is_this_sidecar(environment.https_server().expect(proxy), [2774, 40000]), expected, "{proxy}");
        }
    }

    #[test]
    fn a_nested_run_uses_the_proxy_of_the_outer_run() {
        let runs = RunProxies::default();
        let exempt = Uri::from_static("https://a.test");
        let proxy_of = |run| {
            let environment = runs.get(run).expect("known");
            assert!(environment.server_for(&exempt).expect("usable").is_none() || run == "other", "{run}");
            environment.https_server().map(ProxyServer::name)
        };
        runs.insert("outer", environment("socks5h://me:pass@proxy.test", "a.test"), [2774, 40000]);
        runs.insert("inner", environment("http://outer:secret@127.0.0.1:40000", "b.test"), [2774, 40000]);
        runs.insert("innermost", environment("http://inner:secret@127.0.0.1:40000", ""), [2774, 40000]);
        runs.insert("other", environment("http://stranger:secret@127.0.0.1:40000", ""), [2774, 40000]);
        for run in ["outer", "inner", "innermost"] {
            assert_eq!(proxy_of(run).as_deref(), Some("socks5h://proxy.test:1080"), "{run}");
        }
        assert_eq!(
            proxy_of("other").as_deref(),
            Some("http://127.0.0.1:40000"),
            "this sidecar itself, so no proxy is used"
        );
        assert!(runs.get("unknown").is_none());
    }
}
