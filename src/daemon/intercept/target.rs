//! Parses the target of a CONNECT and decides what happens to the tunnel: interception for Vercel's hosts, forwarding
//! for others, and refusal for this machine. No I/O.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Uri;

use crate::proxy::error::{Code, RequestError, excerpt};
use crate::proxy::hosts::{HTTPS_PORT, Hosts};
use crate::proxy::resolver::is_this_machine;

/// The target of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// In lower case, without a trailing dot. An IPv6 address is in brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

/// What happens to a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TunnelMode {
    /// It is terminated and decrypted here.
    Intercept,
    /// Its bytes are forwarded unread.
    Forward,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", excerpt(self.host.as_bytes()), self.port)
    }
}

impl Target {
    /// Parses the target of a CONNECT request.
    pub(super) fn parse(target: &Uri) -> Result<Self, RequestError> {
        let authority = target.authority().filter(|authority| !authority.as_str().contains('@'));
        let parsed = authority.and_then(|authority| {
            let host = authority.host().to_ascii_lowercase();
            let host = host.strip_suffix('.').unwrap_or(&host).to_owned();
            Some(Self { host, port: authority.port_u16().filter(|port| *port != 0)? })
        });
        let bad = || {
            RequestError::new(Code::BadTarget, "The target of CONNECT must be `host:port`.")
                .hint("send CONNECT host:port")
                .closing()
        };
        parsed.filter(|target| !target.host.is_empty()).ok_or_else(bad)
    }

    /// What happens to a tunnel to this target, or why it is refused. Does not depend on the client.
    pub(super) fn tunnel_mode(&self, hosts: &Hosts) -> Result<TunnelMode, RequestError> {
        let refused = |why: &str| {
            let hint = "set NO_PROXY for what is on this machine";
            Err(RequestError::new(Code::HostNotAllowed, format!("There is no tunnel to {self}: {why}.")).hint(hint))
        };
        let host = self.host.as_str();
        match self.address() {
            Err(OddAddress) => return refused("that is no way to write an address"),
            Ok(Some(address)) if is_this_machine(address) => return refused("that is this machine"),
            Ok(_) => {}
        }
        if host == "localhost" || host.ends_with(".localhost") {
            return refused("that is this machine");
        }
        match (hosts.intercepts(host), self.port) {
            (true, HTTPS_PORT) => return Ok(TunnelMode::Intercept),
            (true, _) => return refused("Vercel is at port 443"),
            (false, _) => {}
        }
        // `api.vercel.com.example` imitates one of Vercel's hosts.
        let imitates_vercel = host.match_indices('.').any(|(at, _)| hosts.intercepts(&host[..at]));
        if imitates_vercel { refused("that only looks like a host of Vercel's") } else { Ok(TunnelMode::Forward) }
    }

    /// The host as an IP address, or `None` if it is a name. Forms that only some programs accept as an address, such
    /// as `127.1`, `0x7f000001` or `[fe80::1%lo]`, are errors.
    fn address(&self) -> Result<Option<IpAddr>, OddAddress> {
        if let Some(inner) = self.host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(OddAddress)?;
            return inner.parse::<Ipv6Addr>().map(|address| Some(address.into())).map_err(|_| OddAddress);
        }
        // No top-level domain begins with a digit.
        match self.host.rsplit('.').next().is_some_and(|last| last.starts_with(|first: char| first.is_ascii_digit())) {
            true => self.host.parse::<Ipv4Addr>().map(|address| Some(address.into())).map_err(|_| OddAddress),
            false => Ok(None),
        }
    }
}

/// An address in an unusual form.
struct OddAddress;

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(target: &str) -> Result<TunnelMode, Code> {
        let target = Uri::builder().authority(target).build().unwrap_or_else(|e| panic!("{target}: {e}"));
        Target::parse(&target).and_then(|target| target.tunnel_mode(&Hosts::default())).map_err(|error| error.code)
    }

    #[test]
    fn vercels_hosts_are_intercepted_however_they_are_written() {
        for target in ["api.vercel.com:443", "API.Vercel.com:443", "api.vercel.com.:443", "api-iad1.vercel.com:443"] {
            assert_eq!(mode(target), Ok(TunnelMode::Intercept), "{target}");
        }
        assert_eq!(mode("ai-gateway.vercel.sh:443"), Ok(TunnelMode::Intercept));
    }

    #[test]
    fn other_hosts_are_forwarded() {
        for target in
            ["github.com:443", "github.com:22", "www.vercel.com:443", "10.0.0.1:443", "[2606:4700::1]:443", "intra:80"]
        {
            assert_eq!(mode(target), Ok(TunnelMode::Forward), "{target}");
        }
    }

    #[test]
    fn this_machine_and_imitations_of_vercel_are_refused() {
        for target in [
            "127.0.0.1:2774",
            "127.9.9.9:443",
            "127.0.0.1.:443",
            "0.0.0.0:443",
            "169.254.169.254:80",
            "localhost:22",
            "LOCALHOST.:443",
            "app.localhost:443",
            "[::1]:2774",
            "[::]:443",
            "[fe80::1]:443",
            "[::ffff:127.0.0.1]:443",
            "[::ffff:a9fe:a9fe]:80",
            "127.1:443",
            "2130706433:443",
            "0x7f000001:443",
            "0177.0.0.1:443",
            "127.0.0.0x1:443",
            "1.2.3.4.5:443",
            "api.vercel.com:80",
            "ai-gateway.vercel.sh:8443",
            "api.vercel.com.evil:443",
            "api.vercel.com.example.com:443",
            "ai-gateway.vercel.sh.example:443",
        ] {
            assert_eq!(mode(target), Err(Code::HostNotAllowed), "{target}");
        }
    }

    #[test]
    fn a_target_needs_a_host_and_a_port() {
        for target in ["github.com", "github.com:0", "user@github.com:443", "user:pass@github.com:443", ".:443"] {
            assert_eq!(mode(target), Err(Code::BadTarget), "{target}");
        }
        assert_eq!(Target::parse(&Uri::from_static("/")).expect_err("a path").code, Code::BadTarget);
    }

    proptest::proptest! {
        #[test]
        fn no_target_panics(host in "[a-z0-9.\\-\\[\\]:%_]{1,40}", port: u16) {
            if let Ok(uri) = Uri::builder().authority(format!("{host}:{port}")).build()
                && let Ok(target) = Target::parse(&uri)
            {
                let _ = target.tunnel_mode(&Hosts::default());
            }
        }
    }
}
