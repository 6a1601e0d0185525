//! Where a CONNECT wants to go, and whether it may: to one of Vercel's hosts, which are opened, or elsewhere, unread; never
//! to this machine. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Uri;

use crate::proxy::error::{Code, RequestError, excerpt};
use crate::proxy::hosts::{HTTPS_PORT, Hosts};
use crate::proxy::resolver::is_this_machine;

/// A host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// In lower case, without a dot at its end; an IPv6 address in brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

/// What becomes of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// We are at its other end.
    Opened,
    /// Its bytes are passed on unread.
    Blind,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", excerpt(self.host.as_bytes()), self.port)
    }
}

impl Target {
    /// Reads a CONNECT's target.
    pub(super) fn read(target: &Uri) -> Result<Self, RequestError> {
        let authority = target.authority().filter(|authority| !authority.as_str().contains('@'));
        let read = authority.and_then(|authority| {
            let host = authority.host().to_ascii_lowercase();
            let host = host.strip_suffix('.').unwrap_or(&host).to_owned();
            Some(Self { host, port: authority.port_u16().filter(|port| *port != 0)? })
        });
        let bad = || {
            RequestError::new(Code::BadTarget, "The target of CONNECT must be `host:port`.")
                .hint("send CONNECT host:port")
                .closing()
        };
        read.filter(|target| !target.host.is_empty()).ok_or_else(bad)
    }

    /// Whether it may be gone to, whoever asks, and how.
    pub(super) fn way(&self, hosts: &Hosts) -> Result<Way, RequestError> {
        let refused = |why: &str| {
            let hint = "set NO_PROXY for what is on this machine";
            Err(RequestError::new(Code::HostNotAllowed, format!("There is no tunnel to {self}: {why}.")).hint(hint))
        };
        let host = self.host.as_str();
        match self.address() {
            Err(NoAddress) => return refused("that is no way to write an address"),
            Ok(Some(address)) if is_this_machine(address) => return refused("that is this machine"),
            Ok(_) => {}
        }
        if host == "localhost" || host.ends_with(".localhost") {
            return refused("that is this machine");
        }
        match (hosts.intercepts(host), self.port) {
            (true, HTTPS_PORT) => return Ok(Way::Opened),
            (true, _) => return refused("Vercel is at port 443"),
            (false, _) => {}
        }
        // `api.vercel.com.example` is made to be taken for what it is not.
        let begins_as_ours = host.match_indices('.').any(|(at, _)| hosts.intercepts(&host[..at]));
        if begins_as_ours { refused("that only looks like a host of Vercel's") } else { Ok(Way::Blind) }
    }

    /// The address that it is, if it is one and no name. What some program might read as an address, and we do not, is
    /// neither: `127.1`, `0x7f000001`, `[fe80::1%lo]`.
    fn address(&self) -> Result<Option<IpAddr>, NoAddress> {
        if let Some(inner) = self.host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(NoAddress)?;
            return inner.parse::<Ipv6Addr>().map(|address| Some(address.into())).map_err(|_| NoAddress);
        }
        // No top-level domain begins with a digit.
        match self.host.rsplit('.').next().is_some_and(|last| last.starts_with(|first: char| first.is_ascii_digit())) {
            true => self.host.parse::<Ipv4Addr>().map(|address| Some(address.into())).map_err(|_| NoAddress),
            false => Ok(None),
        }
    }
}

/// It is an address of a form that we do not take.
struct NoAddress;

#[cfg(test)]
mod tests {
    use super::*;

    fn way(target: &str) -> Result<Way, Code> {
        let target = Uri::builder().authority(target).build().unwrap_or_else(|e| panic!("{target}: {e}"));
        Target::read(&target).and_then(|target| target.way(&Hosts::default())).map_err(|error| error.code)
    }

    #[test]
    fn vercels_hosts_are_opened_however_they_are_written() {
        for target in ["api.vercel.com:443", "API.Vercel.com:443", "api.vercel.com.:443", "api-iad1.vercel.com:443"] {
            assert_eq!(way(target), Ok(Way::Opened), "{target}");
        }
        assert_eq!(way("ai-gateway.vercel.sh:443"), Ok(Way::Opened));
    }

    #[test]
    fn everything_else_is_passed_on_unread() {
        for target in
            ["github.com:443", "github.com:22", "www.vercel.com:443", "10.0.0.1:443", "[2606:4700::1]:443", "intra:80"]
        {
            assert_eq!(way(target), Ok(Way::Blind), "{target}");
        }
    }

    #[test]
    fn nobody_gets_to_this_machine_nor_to_what_only_looks_like_vercel() {
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
            assert_eq!(way(target), Err(Code::HostNotAllowed), "{target}");
        }
    }

    #[test]
    fn what_is_no_host_and_port_is_no_target() {
        for target in ["github.com", "github.com:0", "user@github.com:443", "user:pass@github.com:443", ".:443"] {
            assert_eq!(way(target), Err(Code::BadTarget), "{target}");
        }
        assert_eq!(Target::read(&Uri::from_static("/")).expect_err("a path").code, Code::BadTarget);
    }

    proptest::proptest! {
        #[test]
        fn any_target_is_judged(host in "[a-z0-9.\\-\\[\\]:%_]{1,40}", port: u16) {
            if let Ok(uri) = Uri::builder().authority(format!("{host}:{port}")).build()
                && let Ok(target) = Target::read(&uri)
            {
                let _ = target.way(&Hosts::default());
            }
        }
    }
}
