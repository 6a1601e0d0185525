//! The proxy that environment variables configure, and its exceptions. Pure.
//!
//! Variables, their order and their case are curl's: the first non-empty one of `https_proxy`, `HTTPS_PROXY`,
//! `all_proxy`, `ALL_PROXY`; for a plain `http` origin, of `http_proxy`, `all_proxy`, `ALL_PROXY`. `no_proxy` and
//! `NO_PROXY` are combined. If the proxy cannot be used, connections fail; they never bypass it.

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

/// Variables that name the proxy for `https`, in order of precedence.
const FOR_HTTPS: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
/// The same for `http`. Like curl, without `HTTP_PROXY`: a CGI server sets it from the `Proxy` header of a request.
const FOR_HTTP: [&str; 3] = ["http_proxy", "all_proxy", "ALL_PROXY"];
/// Variables that list hosts to be reached without a proxy.
pub const EXCEPTIONS: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// The variables that name a proxy for other schemes than `https`.
pub const FOR_THE_REST: [&str; 4] = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
/// The longest user or password for SOCKS5, in bytes (RFC 1929).
const MAX_SOCKS_CREDENTIAL: usize = 255;

/// Returns the value of an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The proxy settings of an environment.
#[derive(Debug, Clone, Default)]
pub struct EnvProxy {
    https: Choice,
    http: Choice,
    exceptions: Arc<[Exception]>,
}

/// The proxy for one scheme.
#[derive(Debug, Clone, Default)]
enum Choice {
    #[default]
    None,
    Server(Arc<ProxyServer>),
    /// The variable that counts cannot be used. Neither can the others in the list, which would count next.
    Unusable(Vec<Unusable>),
}

/// A variable whose proxy cannot be used. Contains nothing of its value but the scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {reason}")]
pub struct Unusable {
    /// The variable.
    pub variable: &'static str,
    /// What is wrong with it.
    #[source]
    pub reason: ParseError,
}

/// Why the value of a variable is not a usable proxy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It is not a URL with a host.
    #[error(
        "expected the URL of a proxy, such as http://proxy.example:3128; what is special in its user or password is \
         percent-encoded, such as @ as %40"
    )]
    NotAUrl,
    /// Its scheme is not supported.
    #[error("a proxy of scheme {0} is not supported: expected http, https, socks5 or socks5h")]
    Scheme(String),
    /// Its user or password is too long for SOCKS.
    #[error("a SOCKS proxy takes no user or password of over {MAX_SOCKS_CREDENTIAL} bytes")]
    LongCredential,
}

/// The protocol between us and a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP CONNECT.
    Http,
    /// HTTP CONNECT within TLS.
    Https,
    /// SOCKS5 with names resolved here.
    Socks5,
    /// SOCKS5 with names resolved by the proxy.
    Socks5h,
}

/// A proxy.
#[derive(Debug, Clone)]
pub struct ProxyServer {
    /// Its protocol.
    pub protocol: Protocol,
    /// The variable that names it.
    pub variable: &'static str,
    /// Host and port.
    authority: Authority,
    credentials: Option<(String, SecretString)>,
}

/// One entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exception {
    /// All hosts.
    All,
    /// Addresses, at this port or at any.
    Network(IpNet, Option<u16>),
    /// A domain with all its subdomains, at this port or at any. In lower case, without leading or trailing dot.
    Name(String, Option<u16>),
}

impl EnvProxy {
    /// Reads the variables.
    pub fn read(environment: Environment<'_>) -> Self {
        let list = exceptions(environment);
        Self {
            https: Choice::among(&FOR_HTTPS, environment),
            http: Choice::among(&FOR_HTTP, environment),
            exceptions: entries(&list).filter_map(Exception::parse).collect(),
        }
    }

    /// The variables that make the proxy for this scheme unusable; empty if there is no proxy or it can be used.
    pub fn unusable(&self, scheme: &uri::Scheme) -> &[Unusable] {
        match self.choice(scheme) {
            Choice::Unusable(all) => all,
            Choice::None | Choice::Server(_) => &[],
        }
    }

    /// The proxy for an origin; `None` for a direct connection.
    pub fn server_for(&self, origin: &Uri) -> Result<Option<&Arc<ProxyServer>>, &Unusable> {
        let scheme = origin.scheme().unwrap_or(&uri::Scheme::HTTPS);
        let port = origin.port_u16().unwrap_or(if *scheme == uri::Scheme::HTTP { 80 } else { 443 });
        if origin.host().is_none_or(|host| self.exceptions.iter().any(|exception| exception.applies_to(host, port))) {
            return Ok(None);
        }
        match self.choice(scheme) {
            Choice::None => Ok(None),
            Choice::Server(server) => Ok(Some(server)),
            Choice::Unusable(all) => all.first().map_or(Ok(None), Err),
        }
    }

    /// The proxy for `https`, regardless of exceptions.
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

/// The value that names the proxy for `https`, and the combined exceptions, to be passed on to another process.
pub fn for_https(environment: Environment<'_>) -> (Option<OsString>, String) {
    (FOR_HTTPS.iter().find_map(|name| non_empty(environment, name)), exceptions(environment))
}

/// The value of a variable, if it is not empty.
fn non_empty(environment: Environment<'_>, name: &str) -> Option<OsString> {
    environment(name).filter(|value| !value.is_empty())
}

/// The values of `NO_PROXY` and `no_proxy`, combined.
pub fn exceptions(environment: Environment<'_>) -> String {
    let lists = EXCEPTIONS.iter().filter_map(|name| non_empty(environment, name));
    lists.map(|list| list.to_string_lossy().into_owned()).collect::<Vec<_>>().join(",")
}

/// The entries of a list, separated by commas or whitespace.
pub fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty())
}

impl Choice {
    fn among(variables: &[&'static str], environment: Environment<'_>) -> Self {
        let mut unusable = Vec::new();
        for variable in variables {
            let Some(value) = non_empty(environment, variable) else { continue };
            match ProxyServer::parse(variable, value.to_str()) {
                Ok(server) if unusable.is_empty() => return Self::Server(Arc::new(server)),
                // Usable, but an unusable one takes precedence.
                Ok(_) => break,
                Err(reason) => unusable.push(Unusable { variable, reason }),
            }
        }
        if unusable.is_empty() { Self::None } else { Self::Unusable(unusable) }
    }
}

impl ProxyServer {
    fn parse(variable: &'static str, text: Option<&str>) -> Result<Self, ParseError> {
        let text = text.ok_or(ParseError::NotAUrl)?.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        if !(1..=16).contains(&scheme.len()) || !scheme.chars().all(is_scheme) {
            return Err(ParseError::NotAUrl);
        }
        let (protocol, default_port) = match scheme.to_ascii_lowercase().as_str() {
            "http" => (Protocol::Http, 80),
            "https" => (Protocol::Https, 443),
            "socks5" => (Protocol::Socks5, 1080),
            "socks5h" => (Protocol::Socks5h, 1080),
            other => return Err(ParseError::Scheme(other.to_owned())),
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user_info, address) = rest.rsplit_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        let authority: Authority = address.parse().map_err(|_| ParseError::NotAUrl)?;
        let host = authority.host();
        let port = match address.strip_prefix(host) {
            Some("" | ":") => default_port,
            Some(_) => authority.port_u16().filter(|port| *port != 0).ok_or(ParseError::NotAUrl)?,
            None => return Err(ParseError::NotAUrl),
        };
        if host.is_empty() {
            return Err(ParseError::NotAUrl);
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
            return Err(ParseError::LongCredential);
        }
        let authority = format!("{host}:{port}").parse().map_err(|_| ParseError::NotAUrl)?;
        Ok(Self { protocol, variable, authority, credentials })
    }

    /// Its URL without user and password, for people.
    pub fn name(&self) -> String {
        let scheme = match self.protocol {
            Protocol::Http => "http",
            Protocol::Https => "https",
            Protocol::Socks5 => "socks5",
            Protocol::Socks5h => "socks5h",
        };
        format!("{scheme}://{}", self.authority)
    }

    /// The URI to connect to: `https` if the connection to the proxy uses TLS, else `http`.
    pub fn endpoint(&self) -> Uri {
        let mut parts = uri::Parts::default();
        parts.scheme = Some(if self.protocol == Protocol::Https { uri::Scheme::HTTPS } else { uri::Scheme::HTTP });
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
        // A URI with all three parts is always valid.
        Uri::from_parts(parts).unwrap_or_default()
    }

    /// Its host. An IPv6 address is in brackets.
    pub fn host(&self) -> &str {
        self.authority.host()
    }

    /// Its port.
    pub fn port(&self) -> Option<u16> {
        self.authority.port_u16()
    }

    /// The user, if there is one.
    pub fn user(&self) -> Option<&str> {
        self.credentials.as_ref().map(|(user, _)| user.as_str())
    }

    /// User and password.
    pub fn credentials(&self) -> Option<(&str, &str)> {
        self.credentials.as_ref().map(|(user, password)| (user.as_str(), password.expose_secret()))
    }

    /// The value of `Proxy-Authorization`.
    pub fn basic_auth(&self) -> Option<HeaderValue> {
        let (user, password) = self.credentials()?;
        let mut value =
            HeaderValue::try_from(format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl Exception {
    /// Parses `*`, an address, a network, or a name, which may also be written as `.name`, `*.name`, `name.` or with a
    /// port.
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

    /// Whether it applies to a host at this port.
    fn applies_to(&self, host: &str, port: u16) -> bool {
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
    fn variables_have_the_precedence_of_curl() {
        let all = [("https_proxy", "a"), ("HTTPS_PROXY", "b"), ("all_proxy", "c"), ("ALL_PROXY", "d")];
        for (at, expected) in ["http://a:80", "http://b:80", "http://c:80", "http://d:80"].into_iter().enumerate() {
            assert_eq!(to_vercel(&all[at..]).as_deref(), Some(expected));
            let mut emptied = all;
            emptied.iter_mut().take(at).for_each(|(_, value)| *value = "");
            assert_eq!(to_vercel(&emptied).as_deref(), Some(expected), "empty variables are ignored");
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
    fn proxy_urls_are_parsed() {
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
    fn unsupported_urls_are_refused_without_showing_the_password() {
        let long = format!("socks5://u:{}@h", "x".repeat(256));
        for (text, expected) in [
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
            let reason = ProxyServer::parse("HTTPS_PROXY", Some(text)).expect_err(text).to_string();
            assert!(reason.contains(expected) && !reason.contains("hunter2"), "{text}: {reason}");
        }
        assert!(ProxyServer::parse("HTTPS_PROXY", None).is_err(), "not UTF-8");
    }

    #[test]
    fn an_unusable_variable_is_reported_with_those_that_would_count_next() {
        let named = |variables: &[(&str, &str)]| -> Vec<_> {
            read(variables).unusable(&uri::Scheme::HTTPS).iter().map(|unusable| unusable.variable).collect()
        };
        assert_eq!(named(&[("HTTPS_PROXY", "http://h"), ("ALL_PROXY", "socks4://h")]), [""; 0]);
        assert_eq!(named(&[("HTTPS_PROXY", "socks4://h"), ("ALL_PROXY", "not a url")]), ["HTTPS_PROXY", "ALL_PROXY"]);
        assert_eq!(named(&[("https_proxy", "ftp://h"), ("ALL_PROXY", "http://h")]), ["https_proxy"]);
        assert_eq!(named(&[("http_proxy", "ftp://h")]), [""; 0]);
        let proxy = read(&[("HTTPS_PROXY", "socks4://h"), ("NO_PROXY", "vercel.com")]);
        assert!(proxy.server_for(&uri("https://github.com")).is_err(), "it is not bypassed");
        assert!(proxy.server_for(&uri("https://api.vercel.com")).is_ok_and(|server| server.is_none()));
    }

    #[test]
    fn exceptions_match_hosts_in_every_notation() {
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
        fn no_text_panics_or_shows_its_password(text in "(http://|socks5://)?(\\PC{0,8}:hunter2@)?\\PC{0,20}") {
            match ProxyServer::parse("ALL_PROXY", Some(&text)) {
                Ok(server) => {
                    proptest::prop_assert!(server.endpoint().authority().is_some());
                    let shown = format!("{server:?}");
                    proptest::prop_assert!(!shown.contains("hunter2"));
                }
                Err(reason) => proptest::prop_assert!(!reason.to_string().contains("hunter2")),
            }
            let _ = Exception::parse(&text);
        }
    }
}
