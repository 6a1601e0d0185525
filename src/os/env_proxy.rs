//! The proxy that the environment names, and the hosts that it is not for. Pure.
//!
//! Variables, their order and their case are curl's: `https_proxy`, `HTTPS_PROXY`, `all_proxy`, `ALL_PROXY`, of which the
//! first that is not empty counts; for a plain `http` origin `http_proxy` takes the place of the first two. `no_proxy` and
//! `NO_PROXY` count together. A proxy that we do not speak to is none to go round: what would go through it fails.

use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::HeaderValue;
use http::uri::{self, Authority};
use http::{Uri, uri::PathAndQuery};
use ipnet::IpNet;
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};

/// Where the proxy for `https` is named, the strongest first.
const FOR_HTTPS: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
/// The same for `http`. curl leaves out `HTTP_PROXY`, which a web server sets to what a stranger sends as `Proxy`.
const FOR_HTTP: [&str; 3] = ["http_proxy", "all_proxy", "ALL_PROXY"];
/// Where the hosts are named that are reached without.
pub const EXCEPTIONS: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// All variables that name a proxy for something else than `https`.
pub const FOR_THE_REST: [&str; 4] = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
/// The most that a SOCKS5 proxy takes as a user or a password (RFC 1929).
const MAX_SOCKS_CREDENTIAL: usize = 255;

/// Looks a variable up.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What an environment says of proxies.
#[derive(Debug, Clone, Default)]
pub struct EnvProxy {
    https: Choice,
    http: Choice,
    exceptions: Arc<[Exception]>,
}

/// What the variables for one scheme come to.
#[derive(Debug, Clone, Default)]
enum Choice {
    #[default]
    None,
    Server(Arc<ProxyServer>),
    /// The variable that counts, and weaker ones that are no better.
    Unusable(Vec<Unusable>),
}

/// A variable whose proxy cannot be used. Nothing of its value is repeated but a scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {reason}")]
pub struct Unusable {
    /// The variable.
    pub variable: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
}

/// How a proxy is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP CONNECT.
    Http,
    /// HTTP CONNECT within TLS.
    Https,
    /// SOCKS5 with addresses that are looked up here.
    Socks5,
    /// SOCKS5 with names that the proxy looks up.
    Socks5h,
}

/// A proxy.
#[derive(Debug, Clone)]
pub struct ProxyServer {
    /// How it is spoken to.
    pub protocol: Protocol,
    /// Which variable names it.
    pub variable: &'static str,
    /// With its port.
    authority: Authority,
    credentials: Option<(String, SecretString)>,
}

/// Hosts that are reached without a proxy: one entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exception {
    /// All of them.
    All,
    /// Addresses, at this port or any.
    Network(IpNet, Option<u16>),
    /// A name, in lower case and without a dot at either end, and all below it; at this port or any.
    Name(String, Option<u16>),
}

impl EnvProxy {
    /// Reads an environment.
    pub fn read(environment: Environment<'_>) -> Self {
        let list = exceptions(environment);
        Self {
            https: Choice::among(&FOR_HTTPS, environment),
            http: Choice::among(&FOR_HTTP, environment),
            exceptions: entries(&list).filter_map(Exception::parse).collect(),
        }
    }

    /// Why the proxy for this scheme cannot be used, a line for each variable; empty if there is none or it can.
    pub fn unusable(&self, scheme: &uri::Scheme) -> &[Unusable] {
        match self.choice(scheme) {
            Choice::Unusable(all) => all,
            Choice::None | Choice::Server(_) => &[],
        }
    }

    /// The proxy that leads to an origin, if one does.
    pub fn server_for(&self, origin: &Uri) -> Result<Option<&Arc<ProxyServer>>, &Unusable> {
        let scheme = origin.scheme().unwrap_or(&uri::Scheme::HTTPS);
        let port = origin.port_u16().unwrap_or(if *scheme == uri::Scheme::HTTP { 80 } else { 443 });
        if origin.host().is_none_or(|host| self.exceptions.iter().any(|exception| exception.is_for(host, port))) {
            return Ok(None);
        }
        match self.choice(scheme) {
            Choice::None => Ok(None),
            Choice::Server(server) => Ok(Some(server)),
            Choice::Unusable(all) => all.first().map_or(Ok(None), Err),
        }
    }

    /// The proxy for `https`, whatever it is not for.
    pub fn https_server(&self) -> Option<&ProxyServer> {
        match &self.https {
            Choice::Server(server) => Some(server),
            Choice::None | Choice::Unusable(_) => None,
        }
    }

    fn choice(&self, scheme: &uri::Scheme) -> &Choice {
        if *scheme == uri::Scheme::HTTP { &self.http } else { &self.https }
    }
}

/// What names the proxy for `https` and what it is not for, to be handed on to whoever goes by it in our place.
pub fn for_https(environment: Environment<'_>) -> (Option<OsString>, String) {
    (FOR_HTTPS.iter().find_map(|name| set(environment, name)), exceptions(environment))
}

/// What is not empty.
fn set(environment: Environment<'_>, name: &str) -> Option<OsString> {
    environment(name).filter(|value| !value.is_empty())
}

/// Both lists as one.
pub fn exceptions(environment: Environment<'_>) -> String {
    let lists = EXCEPTIONS.iter().filter_map(|name| set(environment, name));
    lists.map(|list| list.to_string_lossy().into_owned()).collect::<Vec<_>>().join(",")
}

/// The entries of a list. Some readers take commas alone, some blanks as well.
pub fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty())
}

impl Choice {
    fn among(variables: &[&'static str], environment: Environment<'_>) -> Self {
        let mut unusable = Vec::new();
        for variable in variables {
            let Some(value) = set(environment, variable) else { continue };
            match ProxyServer::parse(variable, value.to_str()) {
                Ok(server) if unusable.is_empty() => return Self::Server(Arc::new(server)),
                // It would count once the stronger one is gone.
                Ok(_) => break,
                Err(reason) => unusable.push(Unusable { variable, reason }),
            }
        }
        if unusable.is_empty() { Self::None } else { Self::Unusable(unusable) }
    }
}

impl ProxyServer {
    fn parse(variable: &'static str, text: Option<&str>) -> Result<Self, String> {
        let no_url = || {
            "expected the URL of a proxy, such as http://proxy.example:3128; what is special in its user or password is \
             percent-encoded, such as @ as %40"
                .to_owned()
        };
        let text = text.ok_or_else(no_url)?.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        if !(1..=16).contains(&scheme.len()) || !scheme.chars().all(is_scheme) {
            return Err(no_url());
        }
        let (protocol, default_port) = match scheme.to_ascii_lowercase().as_str() {
            "http" => (Protocol::Http, 80),
            "https" => (Protocol::Https, 443),
            "socks5" => (Protocol::Socks5, 1080),
            "socks5h" => (Protocol::Socks5h, 1080),
            other => {
                return Err(format!(
                    "a proxy of scheme {other} is not supported: expected http, https, socks5 or socks5h"
                ));
            }
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user_info, place) = rest.rsplit_once('@').map_or((None, rest), |(user, place)| (Some(user), place));
        let authority: Authority = place.parse().map_err(|_| no_url())?;
        let host = authority.host();
        let port = match place.strip_prefix(host) {
            Some("" | ":") => default_port,
            Some(_) => authority.port_u16().filter(|port| *port != 0).ok_or_else(no_url)?,
            None => return Err(no_url()),
        };
        if host.is_empty() {
            return Err(no_url());
        }
        let credentials = user_info.map(|user_info| {
            let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
            let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
            (decoded(user), SecretString::from(decoded(password)))
        });
        let is_too_long = |(user, password): &(String, SecretString)| {
            user.len().max(password.expose_secret().len()) > MAX_SOCKS_CREDENTIAL
        };
        let is_socks = matches!(protocol, Protocol::Socks5 | Protocol::Socks5h);
        if is_socks && credentials.as_ref().is_some_and(is_too_long) {
            return Err(format!("a SOCKS proxy takes no user or password of over {MAX_SOCKS_CREDENTIAL} bytes"));
        }
        let authority = format!("{host}:{port}").parse().map_err(|_| no_url())?;
        Ok(Self { protocol, variable, authority, credentials })
    }

    /// Where it is and how it is spoken to, for people: without user and password.
    pub fn name(&self) -> String {
        let scheme = match self.protocol {
            Protocol::Http => "http",
            Protocol::Https => "https",
            Protocol::Socks5 => "socks5",
            Protocol::Socks5h => "socks5h",
        };
        format!("{scheme}://{}", self.authority)
    }

    /// Where to connect to: `https` where that is to be by TLS, else `http`.
    pub fn endpoint(&self) -> Uri {
        let mut parts = uri::Parts::default();
        parts.scheme = Some(if self.protocol == Protocol::Https { uri::Scheme::HTTPS } else { uri::Scheme::HTTP });
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
        // With all its parts it is always one.
        Uri::from_parts(parts).unwrap_or_default()
    }

    /// Its host, an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        self.authority.host()
    }

    /// Its port.
    pub fn port(&self) -> Option<u16> {
        self.authority.port_u16()
    }

    /// The user, if one is named.
    pub fn user(&self) -> Option<&str> {
        self.credentials.as_ref().map(|(user, _)| user.as_str())
    }

    /// User and password.
    pub fn credentials(&self) -> Option<(&str, &str)> {
        self.credentials.as_ref().map(|(user, password)| (user.as_str(), password.expose_secret()))
    }

    /// `Proxy-Authorization`.
    pub fn basic_auth(&self) -> Option<HeaderValue> {
        let (user, password) = self.credentials()?;
        let mut value =
            HeaderValue::try_from(format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl Exception {
    /// Reads an entry: `*`, an address, a network, or a name, also written as `.name`, `*.name`, `name.` or with a port.
    pub fn parse(entry: &str) -> Option<Self> {
        let entry = entry.split_once("://").map_or(entry, |(_, rest)| rest).to_ascii_lowercase();
        if entry == "*" {
            return Some(Self::All);
        }
        let network = |text: &str| {
            let text = text.trim_matches(['[', ']']);
            text.parse::<IpNet>()
                .ok()
                .or_else(|| text.parse::<IpAddr>().ok().map(|address| address.to_canonical().into()))
        };
        if let Some(network) = network(&entry) {
            return Some(Self::Network(network, None));
        }
        let (host, port) = match entry.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
            Some((host, Ok(port))) => (host, Some(port)),
            _ => (entry.as_str(), None),
        };
        if let Some(network) = network(host) {
            return Some(Self::Network(network, port));
        }
        let name = host.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.');
        match (name, host) {
            ("", "*") => Some(Self::All),
            ("", _) => None,
            _ => Some(Self::Name(name.to_owned(), port)),
        }
    }

    /// Whether a host, at this port, is among them.
    fn is_for(&self, host: &str, port: u16) -> bool {
        let host = host.to_ascii_lowercase();
        let host = host.trim_end_matches('.').trim_matches(['[', ']']);
        let is_port = |wanted: &Option<u16>| wanted.is_none_or(|wanted| wanted == port);
        match (self, host.parse::<IpAddr>()) {
            (Self::All, _) => true,
            (Self::Network(network, wanted), Ok(address)) => {
                is_port(wanted) && network.contains(&address.to_canonical())
            }
            (Self::Name(name, wanted), Err(_)) => {
                let is_below = |rest: &str| rest.is_empty() || rest.ends_with('.');
                is_port(wanted) && host.strip_suffix(name.as_str()).is_some_and(is_below)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> EnvProxy {
        EnvProxy::read(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
    }

    fn uri(text: &str) -> Uri {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn to_vercel(variables: &[(&str, &str)]) -> Option<String> {
        let proxy = read(variables);
        let server = proxy.server_for(&uri("https://api.vercel.com/")).expect("usable");
        server.map(|server| server.name())
    }

    #[test]
    fn the_variables_count_in_the_order_of_curl() {
        let all = [("https_proxy", "a"), ("HTTPS_PROXY", "b"), ("all_proxy", "c"), ("ALL_PROXY", "d")];
        for (at, expected) in ["http://a:80", "http://b:80", "http://c:80", "http://d:80"].into_iter().enumerate() {
            assert_eq!(to_vercel(&all[at..]).as_deref(), Some(expected));
            let mut emptied = all;
            emptied.iter_mut().take(at).for_each(|(_, value)| *value = "");
            assert_eq!(to_vercel(&emptied).as_deref(), Some(expected), "an empty one is none");
        }
        assert_eq!(to_vercel(&[("http_proxy", "a"), ("HTTP_PROXY", "a")]), None);
        for (variables, expected) in [
            (&[("http_proxy", "a"), ("ALL_PROXY", "d")][..], Some("http://a:80")),
            (&[("HTTP_PROXY", "a"), ("https_proxy", "b")], None),
            (&[("all_proxy", "c")], Some("http://c:80")),
        ] {
            let proxy = read(variables);
            let server = proxy.server_for(&uri("http://connect.test/")).expect("usable");
            assert_eq!(server.map(|server| server.name()).as_deref(), expected, "{variables:?}");
        }
    }

    #[test]
    fn a_proxy_has_its_protocol_its_port_and_its_credentials() {
        for (text, name, endpoint, credentials) in [
            ("proxy.corp", "http://proxy.corp:80", "http://proxy.corp:80/", None),
            ("proxy.corp:3128", "http://proxy.corp:3128", "http://proxy.corp:3128/", None),
            ("HTTP://proxy.corp/", "http://proxy.corp:80", "http://proxy.corp:80/", None),
            ("https://proxy.corp", "https://proxy.corp:443", "https://proxy.corp:443/", None),
            ("socks5://proxy.corp", "socks5://proxy.corp:1080", "http://proxy.corp:1080/", None),
            ("SOCKS5H://[::1]:9050/x?y", "socks5h://[::1]:9050", "http://[::1]:9050/", None),
            ("http://[fd00::1]", "http://[fd00::1]:80", "http://[fd00::1]:80/", None),
            (" http://127.0.0.1:1 ", "http://127.0.0.1:1", "http://127.0.0.1:1/", None),
            ("me:pass@proxy.corp:1", "http://proxy.corp:1", "http://proxy.corp:1/", Some(("me", "pass"))),
            ("socks5://me@proxy.corp", "socks5://proxy.corp:1080", "http://proxy.corp:1080/", Some(("me", ""))),
            (
                "https://m%40il:p%3a%2Fss:w%20@proxy.corp",
                "https://proxy.corp:443",
                "https://proxy.corp:443/",
                Some(("m@il", "p:/ss:w ")),
            ),
            ("http://me:p@ss@proxy.corp", "http://proxy.corp:80", "http://proxy.corp:80/", Some(("me", "p@ss"))),
        ] {
            let server = ProxyServer::parse("HTTPS_PROXY", Some(text)).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((server.name(), server.endpoint().to_string()), (name.into(), endpoint.into()), "{text}");
            assert_eq!(server.credentials(), credentials, "{text}");
            if let Some((_, password)) = credentials.filter(|(_, password)| !password.is_empty()) {
                let shown = format!("{server:?}{:?}{}", server.basic_auth(), server.name());
                assert!(!shown.contains(password) && !shown.contains(&STANDARD.encode(password)), "{shown}");
            }
        }
        let server = ProxyServer::parse("x", Some("http://Aladdin:open%20sesame@h")).expect("a proxy");
        assert_eq!(server.basic_auth().expect("credentials"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    }

    #[test]
    fn what_is_not_spoken_is_refused_by_name_and_without_its_password() {
        let long = format!("socks5://u:{}@h", "x".repeat(256));
        for (text, said) in [
            ("socks4://u:hunter2@h:1", "scheme socks4 is"),
            ("SOCKS4A://h", "scheme socks4a is"),
            ("socks://h", "scheme socks is"),
            ("ftp://u:hunter2@h", "scheme ftp is"),
            ("quic+x://h", "scheme quic+x is"),
            ("not a url", "expected the URL"),
            ("hunter2 x://h", "expected the URL"),
            ("u:hunter2://h", "expected the URL"),
            ("http://", "expected the URL"),
            ("http://u:hunter2@", "expected the URL"),
            ("http://:3128", "expected the URL"),
            ("http://h:0", "expected the URL"),
            ("http://h:70000", "expected the URL"),
            ("http://h:x", "expected the URL"),
            ("http://u:hunter2/x@h", "expected the URL"),
            ("http://[::1", "expected the URL"),
            ("://h", "expected the URL"),
            (&long, "over 255 bytes"),
        ] {
            let reason = ProxyServer::parse("HTTPS_PROXY", Some(text)).expect_err(text);
            assert!(reason.contains(said) && !reason.contains("hunter2"), "{text}: {reason}");
        }
        assert!(ProxyServer::parse("HTTPS_PROXY", None).is_err(), "not UTF-8");
    }

    #[test]
    fn only_the_variable_that_counts_can_be_wrong_and_then_all_that_would_count_next_are_named() {
        let named = |variables: &[(&str, &str)]| -> Vec<_> {
            read(variables).unusable(&uri::Scheme::HTTPS).iter().map(|unusable| unusable.variable).collect()
        };
        assert_eq!(named(&[("HTTPS_PROXY", "http://h"), ("ALL_PROXY", "socks4://h")]), [""; 0]);
        assert_eq!(named(&[("HTTPS_PROXY", "socks4://h"), ("ALL_PROXY", "not a url")]), ["HTTPS_PROXY", "ALL_PROXY"]);
        assert_eq!(named(&[("https_proxy", "ftp://h"), ("ALL_PROXY", "http://h")]), ["https_proxy"]);
        assert_eq!(named(&[("http_proxy", "ftp://h")]), [""; 0]);
        let proxy = read(&[("HTTPS_PROXY", "socks4://h"), ("NO_PROXY", "vercel.com")]);
        assert!(proxy.server_for(&uri("https://github.com")).is_err(), "it is not gone round");
        assert!(proxy.server_for(&uri("https://api.vercel.com")).is_ok_and(|server| server.is_none()));
    }

    #[test]
    fn a_host_is_exempt_by_any_spelling_of_itself_and_of_what_it_is_below() {
        for (list, host, expected) in [
            ("vercel.com", "api.vercel.com", true),
            (".vercel.com", "api.vercel.com", true),
            ("*.vercel.com", "api.vercel.com", true),
            (".vercel.com", "vercel.com", true),
            ("API.Vercel.COM", "api.vercel.com", true),
            ("api.vercel.com.", "api.vercel.com", true),
            ("api.vercel.com", "API.vercel.com.", true),
            ("api.vercel.com:443", "api.vercel.com", true),
            ("api.vercel.com:8443", "api.vercel.com", false),
            ("a, b ,\tvercel.com", "api.vercel.com", true),
            ("a vercel.com b", "api.vercel.com", true),
            ("*", "api.vercel.com", true),
            ("a,*", "10.0.0.1", true),
            ("https://api.vercel.com", "api.vercel.com", true),
            ("ercel.com", "api.vercel.com", false),
            ("pi.vercel.com", "api.vercel.com", false),
            ("x.api.vercel.com", "api.vercel.com", false),
            ("", "api.vercel.com", false),
            (",.,", "api.vercel.com", false),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.0.0.0/8", "10.example", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3:443", "10.1.2.3", true),
            ("10.1.2.3:80", "10.1.2.3", false),
            ("fd00::/8", "[fd00::1]", true),
            ("[fd00::1]", "[fd00::1]", true),
            ("[fd00::1]:443", "[fd00::1]", true),
            ("fd00::1", "[fd00::2]", false),
            ("10.0.0.0/8", "[::ffff:10.1.2.3]", true),
            ("3", "10.1.2.3", false),
        ] {
            for variable in EXCEPTIONS {
                let proxy = read(&[("ALL_PROXY", "http://h"), (variable, list)]);
                let server = proxy.server_for(&uri(&format!("https://{host}/"))).expect("usable");
                assert_eq!(server.is_none(), expected, "{variable}={list:?} {host}");
            }
        }
        let both = read(&[("ALL_PROXY", "h"), ("no_proxy", "a.test"), ("NO_PROXY", "b.test")]);
        for host in ["https://a.test", "https://b.test"] {
            assert!(both.server_for(&uri(host)).expect("usable").is_none(), "{host}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused_and_shows_no_password(text in "(http://|socks5://)?(\\PC{0,8}:hunter2@)?\\PC{0,20}") {
            match ProxyServer::parse("ALL_PROXY", Some(&text)) {
                Ok(server) => {
                    proptest::prop_assert!(server.endpoint().authority().is_some());
                    let shown = format!("{server:?}");
                    proptest::prop_assert!(!shown.contains("hunter2"));
                }
                Err(reason) => proptest::prop_assert!(!reason.contains("hunter2")),
            }
            let _ = Exception::parse(&text);
        }
    }
}
