//! Whether a client may send requests at all: framing, `Host`, target form, browser and forwarding checks, instance
//! key, in that order and for every path. Pure.
//!
//! The rules are in docs/security.md H, F, O, P and C. The checks compare bytes with lists of what is allowed and never
//! normalise. They need only the head: a refused request's body is not read.

use http::header::{ACCEPT, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Version};

use super::error::{Code, RequestError, excerpt};
use crate::credential::placeholder;
use crate::instance::key::{KEY_HEADER, Key};
use crate::os::shell_quoting;

/// The sidecar's name in `Via` and `CDN-Loop`, by which it recognises its own requests.
pub const VIA_NAME: &str = "connect-sidecar";

/// The path of the status page, and the prefix of the sidecar's own endpoints other than the health checks.
pub const SIDECAR_PREFIX: &str = "/_sidecar/";
/// Paths that redirect browsers to the status page.
pub const PAGE_REDIRECTS: [&str; 2] = ["/", "/_sidecar"];
/// The path of the metrics.
pub const METRICS: &str = "/metrics";

/// A `Host` that is allowed besides the loopback names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost {
    /// The name in lower case.
    pub name: String,
    /// `None`: any port.
    pub port: Option<u16>,
}

/// What the guard allows beyond the default. A project's own file cannot set any of it.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Additional hosts.
    pub allowed_hosts: Vec<AllowedHost>,
    /// Web origins that may use Connect's routes, exactly as browsers send them. For the sidecar's own endpoints, they
    /// need the instance key.
    pub allowed_origins: Vec<String>,
    /// Accept forwarded requests.
    pub allow_forwarded: bool,
    /// Every request needs the instance key or the run key.
    pub require_key: bool,
    /// The instance key.
    pub key: Option<Key>,
    /// The key of the programs of runs, which is not valid where the instance key is always required.
    pub run_key: Option<Key>,
}

impl Policy {
    /// The run key, if programs of runs must send it.
    pub fn required_run_key(&self) -> Option<&Key> {
        self.run_key.as_ref().filter(|_| self.require_key)
    }
}

/// What the guard has found in a request that it accepts.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Accepted {
    /// The allowed web origin that sent it, to be named in the reply.
    pub origin: Option<HeaderValue>,
    /// It has credentials of its own, which are dropped. The placeholder does not count.
    pub has_credentials: bool,
}

/// The listener that accepted a connection. It decides which `Host` is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerKind {
    /// A loopback address, with its port.
    Loopback(u16),
    /// Another address of this machine, with its port. Anyone on the network can connect.
    Network(u16),
    /// The unix socket, which web pages cannot reach.
    UnixSocket,
}

/// Checks a request's head.
pub fn check(parts: &Parts, listener: ListenerKind, policy: &Policy) -> Result<Accepted, RequestError> {
    let headers = GuardHeaders::from_headers(&parts.headers);
    check_framing(&headers, parts.version)?;
    check_host(&headers, listener, policy)?;
    check_target(parts)?;
    let origin = check_browser(&headers, parts, policy)?;
    check_forwarding(&headers, policy)?;
    check_key(parts, listener, policy)?;
    Ok(Accepted { origin, has_credentials: headers.credentials })
}

/// Checks the head of an intercepted request to `host`, which is one of Vercel's.
pub fn check_intercepted(parts: &Parts, host: &str) -> Result<Accepted, RequestError> {
    let headers = GuardHeaders::from_headers(&parts.headers);
    check_framing(&headers, parts.version)?;
    match headers.host.only().and_then(|value| split_host(value.as_bytes())) {
        Some((name, None | Some(443))) if name.eq_ignore_ascii_case(host.as_bytes()) => {}
        _ => return Err(RequestError::new(Code::BadHost, format!("Send one Host header that says `{host}`."))),
    }
    check_target(parts)?;
    check_loop(&headers)?;
    Ok(Accepted { origin: None, has_credentials: headers.credentials })
}

/// The headers that the checks need, collected in one pass: separate lookups cost more than all comparisons.
#[derive(Default)]
struct GuardHeaders<'a> {
    host: HeaderValues<'a>,
    transfer_encoding: HeaderValues<'a>,
    expect: HeaderValues<'a>,
    origin: HeaderValues<'a>,
    sec_fetch_site: HeaderValues<'a>,
    other_sec_fetch_mode: bool,
    is_navigation: bool,
    is_document: bool,
    has_preflight_headers: bool,
    names_sidecar: bool,
    credentials: bool,
    forwarded: Option<&'a HeaderName>,
}

/// The values of one header.
#[derive(Default)]
struct HeaderValues<'a> {
    last: Option<&'a HeaderValue>,
    count: usize,
}

impl<'a> HeaderValues<'a> {
    fn add(&mut self, value: &'a HeaderValue) {
        self.last = Some(value);
        self.count += 1;
    }

    fn is_present(&self) -> bool {
        self.count > 0
    }

    /// The value, if there is exactly one.
    fn only(&self) -> Option<&'a HeaderValue> {
        self.last.filter(|_| self.count == 1)
    }
}

impl<'a> GuardHeaders<'a> {
    fn from_headers(all: &'a HeaderMap) -> Self {
        let mut headers = Self::default();
        for (name, value) in all {
            match name.as_str() {
                "host" => headers.host.add(value),
                "transfer-encoding" => headers.transfer_encoding.add(value),
                "expect" => headers.expect.add(value),
                "origin" => headers.origin.add(value),
                "sec-fetch-site" => headers.sec_fetch_site.add(value),
                // Node.js' fetch sends `cors`; only browsers send anything else.
                "sec-fetch-mode" => {
                    headers.other_sec_fetch_mode |= value != "cors";
                    headers.is_navigation = value == "navigate";
                }
                "sec-fetch-dest" => headers.is_document = value == "document",
                "access-control-request-method" | "access-control-request-headers" => {
                    headers.has_preflight_headers = true;
                }
                "authorization" => headers.credentials |= !placeholder::is_bearer(value),
                "cookie" | "proxy-authorization" => headers.credentials = true,
                "cdn-loop" => headers.names_sidecar |= names_sidecar(value),
                "via" => {
                    headers.names_sidecar |= names_sidecar(value);
                    headers.forwarded = Some(name);
                }
                // Set by proxies and tunnels in front of a server, never by an app on this machine.
                "forwarded"
                | "x-forwarded-for"
                | "x-forwarded-host"
                | "x-forwarded-proto"
                | "x-forwarded-port"
                | "x-real-ip"
                | "cf-connecting-ip"
                | "tailscale-user-login" => headers.forwarded = Some(name),
                _ => {}
            }
        }
        headers
    }
}

fn names_sidecar(value: &HeaderValue) -> bool {
    let words = value.as_bytes().split(|b| matches!(b, b' ' | b',' | b';' | b'\t'));
    words.into_iter().any(|word| word.eq_ignore_ascii_case(VIA_NAME.as_bytes()))
}

fn check_framing(headers: &GuardHeaders<'_>, version: Version) -> Result<(), RequestError> {
    if headers.transfer_encoding.is_present() {
        let encoding = headers.transfer_encoding.only();
        let only_chunked = encoding.is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !only_chunked || version != Version::HTTP_11 {
            let message = "Transfer-Encoding must be given once and be `chunked`.";
            return Err(RequestError::new(Code::BadFraming, message).closing());
        }
    }
    let expects_other = |v: &HeaderValue| !v.as_bytes().eq_ignore_ascii_case(b"100-continue");
    if headers.expect.count > 1 || headers.expect.last.is_some_and(expects_other) {
        return Err(RequestError::new(Code::ExpectationFailed, "Only `Expect: 100-continue` is understood."));
    }
    Ok(())
}

fn check_host(headers: &GuardHeaders<'_>, listener: ListenerKind, policy: &Policy) -> Result<(), RequestError> {
    let bad = || RequestError::new(Code::BadHost, "Send one Host header with the address that you connect to.");
    let host = headers.host.only().ok_or_else(bad)?.as_bytes();
    let (name, port) = split_host(host).ok_or_else(bad)?;
    let is_allowed = || {
        policy.allowed_hosts.iter().any(|allowed| {
            name.eq_ignore_ascii_case(allowed.name.as_bytes()) && allowed.port.is_none_or(|p| p == port.unwrap_or(80))
        })
    };
    let is_accepted = match listener {
        ListenerKind::Loopback(local) => is_loopback_name(name) && port.unwrap_or(80) == local || is_allowed(),
        // A client that uses a loopback name here meant another machine.
        ListenerKind::Network(_) => !is_loopback_name(name) && is_allowed(),
        ListenerKind::UnixSocket => name.eq_ignore_ascii_case(b"localhost"),
    };
    if is_accepted { Ok(()) } else { Err(host_not_allowed(&excerpt(host), listener)) }
}

/// Whether a name in `Host` is a loopback name. Other spellings of the same addresses are not accepted.
pub fn is_loopback_name(name: &[u8]) -> bool {
    [&b"127.0.0.1"[..], b"localhost", b"[::1]"].iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn host_not_allowed(host: &str, listener: ListenerKind) -> RequestError {
    let message = match listener {
        ListenerKind::Loopback(port) => format!(
            "Host `{host}` is not this sidecar, which is 127.0.0.1:{port}. Use that address, or start with --allowed-host."
        ),
        ListenerKind::Network(_) => format!("Host `{host}` is not one that was allowed with --allowed-host."),
        ListenerKind::UnixSocket => {
            let message = format!("Host `{host}` is not this sidecar, which is `localhost` on its unix socket.");
            return RequestError::new(Code::HostNotAllowed, message).hint("send `Host: localhost`");
        }
    };
    RequestError::new(Code::HostNotAllowed, message)
        .command(format!("connect-sidecar --allowed-host {}", shell_quoting::word(host)))
}

/// Splits `name[:port]` or `[v6][:port]`; `None` if it is neither.
fn split_host(host: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let name_end = match host.first()? {
        b'[' => {
            let end = host.iter().position(|b| *b == b']')? + 1;
            let inner = &host[1..end - 1];
            inner.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')).then_some(end)?
        }
        _ => {
            let end = host.iter().position(|b| *b == b':').unwrap_or(host.len());
            let name = &host[..end];
            let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
            (!name.is_empty() && !name.ends_with(b".") && name.iter().all(plain)).then_some(end)?
        }
    };
    match &host[name_end..] {
        [] => Some((&host[..name_end], None)),
        [b':', digits @ ..]
            if matches!(digits, [b'1'..=b'9', ..]) && digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit) =>
        {
            let port = digits.iter().fold(0_u32, |port, d| port * 10 + u32::from(d - b'0'));
            Some((&host[..name_end], Some(u16::try_from(port).ok()?)))
        }
        _ => None,
    }
}

fn check_target(parts: &Parts) -> Result<(), RequestError> {
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(RequestError::method_not_allowed("GET, POST, DELETE").closing());
    }
    let uri = &parts.uri;
    let path = uri.path();
    if uri.scheme().is_some() || uri.authority().is_some() || !path.starts_with('/') || path.starts_with("//") {
        return Err(RequestError::new(
            Code::BadTarget,
            "The request target must be a plain path, as in `POST /v1/connect/token/…`.",
        ));
    }
    Ok(())
}

/// The allowed web origin that sent the request, if there is one.
fn check_browser(
    headers: &GuardHeaders<'_>,
    parts: &Parts,
    policy: &Policy,
) -> Result<Option<HeaderValue>, RequestError> {
    let path = parts.uri.path();
    let site = headers.sec_fetch_site.only().map(HeaderValue::as_bytes);
    let opens_window = parts.method == Method::GET && headers.is_navigation && headers.is_document;
    let refused = || match site {
        Some(b"none") if opens_window => RequestError::new(
            Code::BrowserRequestRefused,
            "Nothing here is for a browser but the status page. Run `connect-sidecar status --open`.",
        )
        .command("connect-sidecar status --open"),
        _ => RequestError::new(
            Code::BrowserRequestRefused,
            "Requests from web pages are refused. Ask from a server or a script, or start with --allowed-origin.",
        ),
    };
    let is_preflight = || parts.method == Method::OPTIONS && headers.has_preflight_headers;
    let is_same_origin = path.starts_with(SIDECAR_PREFIX) && site == Some(b"same-origin");
    if headers.origin.is_present() {
        // Except with GET, browsers send `Origin` to the page's own origin, too. `Host` was checked before.
        let is_own = |origin: &HeaderValue| {
            let host = headers.host.only().map_or(b"".as_slice(), HeaderValue::as_bytes);
            origin.as_bytes().strip_prefix(b"http://") == Some(host)
        };
        if is_same_origin && headers.origin.only().is_some_and(is_own) {
            return require_key(&parts.headers, policy).map(|()| None);
        }
        let is_allowed =
            |origin: &&HeaderValue| policy.allowed_origins.iter().any(|a| a.as_bytes() == origin.as_bytes());
        let origin = headers.origin.only().filter(is_allowed).ok_or_else(refused)?;
        // The origin is allowed for Connect's routes. The sidecar's own endpoints need the key.
        if !is_preflight() && (path.starts_with(SIDECAR_PREFIX) || path == METRICS) {
            require_key(&parts.headers, policy)?;
        }
        return Ok(Some(origin.clone()));
    }
    // The page contains no data and may be opened in a window, by the user or by a reload, but not by a link elsewhere.
    if (path == SIDECAR_PREFIX || PAGE_REDIRECTS.contains(&path))
        && opens_window
        && matches!(site, Some(b"none" | b"same-origin"))
    {
        return Ok(None);
    }
    // Requests of the page come from the same origin and have the key.
    if is_same_origin {
        return require_key(&parts.headers, policy).map(|()| None);
    }
    if headers.sec_fetch_site.is_present() || headers.other_sec_fetch_mode || is_preflight() {
        return Err(refused());
    }
    Ok(None)
}

fn check_forwarding(headers: &GuardHeaders<'_>, policy: &Policy) -> Result<(), RequestError> {
    check_loop(headers)?;
    match headers.forwarded {
        Some(name) if !policy.allow_forwarded => Err(RequestError::new(
            Code::ForwardedRequestRefused,
            format!(
                "Requests passed on by another proxy are refused (`{name}` is set). Ask directly, or start with --allow-forwarded."
            ),
        )
        .command("connect-sidecar --allow-forwarded")),
        _ => Ok(()),
    }
}

fn check_loop(headers: &GuardHeaders<'_>) -> Result<(), RequestError> {
    if headers.names_sidecar {
        return Err(RequestError::new(
            Code::LoopDetected,
            "This request has been through a connect-sidecar already. Check that its upstream is not a sidecar.",
        ));
    }
    Ok(())
}

fn check_key(parts: &Parts, listener: ListenerKind, policy: &Policy) -> Result<(), RequestError> {
    let path = parts.uri.path();
    // A browser that opens the page cannot send a key, and gets no data.
    let is_page = (path == SIDECAR_PREFIX || is_page_redirect(parts)) && matches!(listener, ListenerKind::Loopback(_));
    let is_exempt = !policy.require_key || is_health(path) || is_page;
    if is_exempt || has_run_key(&parts.headers, policy) { Ok(()) } else { require_key(&parts.headers, policy) }
}

/// Whether a browser opens one of [`PAGE_REDIRECTS`] in a window. If the `Host` is not a loopback name, browsers send
/// no `Sec-Fetch-*` headers, and `Accept` decides.
pub fn is_page_redirect(parts: &Parts) -> bool {
    let has = |name: &str, expected: &str| parts.headers.get(name).is_some_and(|value| value == expected);
    let accepts_html = || {
        let accepted = parts.headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        !parts.headers.contains_key("sec-fetch-mode")
            && accepted.split([',', ';']).any(|kind| kind.trim() == "text/html")
    };
    let opens_window = || has("sec-fetch-mode", "navigate") && has("sec-fetch-dest", "document");
    parts.method == Method::GET && PAGE_REDIRECTS.contains(&parts.uri.path()) && (opens_window() || accepts_html())
}

/// Whether a path is a health check. Those need no key and are answered under overload.
pub fn is_health(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz")
}

/// Whether a browser navigates to the path in a window.
pub fn is_browser_window(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate")
}

/// Whether a request has the run key. Endpoints that always need the instance key refuse it nevertheless.
fn has_run_key(headers: &HeaderMap, policy: &Policy) -> bool {
    let mut sent = headers.get_all(KEY_HEADER).iter();
    match (policy.required_run_key(), sent.next(), sent.next()) {
        (Some(key), Some(sent), None) => key.matches(sent.as_bytes()),
        _ => false,
    }
}

/// Refuses a request that does not have the instance key exactly once.
pub fn require_key(headers: &HeaderMap, policy: &Policy) -> Result<(), RequestError> {
    let mut values = headers.get_all(KEY_HEADER).iter();
    let only = values.next().filter(|_| values.next().is_none());
    match &policy.key {
        Some(key) if key.matches(only.map_or(b"", HeaderValue::as_bytes)) => Ok(()),
        _ => Err(RequestError::new(Code::KeyRequired, "This needs the instance key in a Sidecar-Key header.")),
    }
}

#[cfg(test)]
mod tests;
