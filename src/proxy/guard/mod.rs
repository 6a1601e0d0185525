//! May this caller ask at all? Framing, `Host`, target form, browser and forwarding gates, instance key; in that order,
//! for every path, ours included. Pure.
//!
//! The rules and the incidents behind them are in docs/security.md H, F, O, P and C. The gates compare bytes against
//! lists of what is allowed; they never normalise and never guess. A refusal is decided before any of the body is read.

use http::header::{ACCEPT, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Version};

use super::error::{Code, RequestError, excerpt};
use crate::credential::placeholder;
use crate::instance::key::{KEY_HEADER, Key};
use crate::os::shell_quoting;

/// The name by which we recognise our own requests.
pub const VIA_NAME: &str = "connect-sidecar";

/// Where everything of ours is that is no health check, and the status page itself.
pub const OURS: &str = "/_sidecar/";
/// Where people look for the status page, and are led to it.
pub const NEAR_THE_PAGE: [&str; 2] = ["/", "/_sidecar"];
/// Where the counters are.
pub const METRICS: &str = "/metrics";

/// A `Host` value that is allowed besides the loopback names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost {
    /// Lower-case name.
    pub name: String,
    /// `None`: any port.
    pub port: Option<u16>,
}

/// What the guard lets through beyond the default. Never from a project's own file.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Further hosts.
    pub allowed_hosts: Vec<AllowedHost>,
    /// Web origins that may ask what apps may, exactly as browsers send them; for what is ours they need the key.
    pub allowed_origins: Vec<String>,
    /// Take requests that were forwarded.
    pub allow_forwarded: bool,
    /// Every request needs the instance key, or that of runs.
    pub require_key: bool,
    /// The instance key.
    pub key: Option<Key>,
    /// What the programs of runs have in its place, for what apps may ask.
    pub run_key: Option<Key>,
}

impl Policy {
    /// What the programs of runs have to send, if anything.
    pub fn key_of_runs(&self) -> Option<&Key> {
        self.run_key.as_ref().filter(|_| self.require_key)
    }
}

/// A request that passed.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Admitted {
    /// The web origin to admit in the reply, if an allowed one asked.
    pub origin: Option<HeaderValue>,
    /// It carries credentials of its own, which go nowhere. The placeholder is none.
    pub has_credentials: bool,
}

/// The way a connection came in, which says what its `Host` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// A loopback address, at this port.
    Loopback(u16),
    /// Another address of this machine, at this port: who comes by it may be anybody.
    Network(u16),
    /// The unix socket, which no web page can reach.
    UnixSocket,
}

/// Judges a request's head.
pub fn check(parts: &Parts, entrance: Entrance, policy: &Policy) -> Result<Admitted, RequestError> {
    let seen = Seen::in_headers(&parts.headers);
    check_framing(&seen, parts.version)?;
    check_host(&seen, entrance, policy)?;
    check_target(parts)?;
    let origin = check_browser(&seen, parts, policy)?;
    check_forwarding(&seen, policy)?;
    check_key(parts, entrance, policy)?;
    Ok(Admitted { origin, has_credentials: seen.credentials })
}

/// Judges the head of a request that an app has sent to `host`, one of Vercel's, and that was decrypted.
pub fn check_intercepted(parts: &Parts, host: &str) -> Result<Admitted, RequestError> {
    let seen = Seen::in_headers(&parts.headers);
    check_framing(&seen, parts.version)?;
    let said = seen.host.only().and_then(|said| split_host(said.as_bytes()));
    match said {
        Some((name, None | Some(443))) if name.eq_ignore_ascii_case(host.as_bytes()) => {}
        _ => return Err(RequestError::new(Code::BadHost, format!("Send one Host header that says `{host}`."))),
    }
    check_target(parts)?;
    check_loop(&seen)?;
    Ok(Admitted { origin: None, has_credentials: seen.credentials })
}

/// The headers that decide, found in one pass: looking each of them up costs more than all of the comparing.
#[derive(Default)]
struct Seen<'a> {
    host: Lines<'a>,
    transfer_encoding: Lines<'a>,
    expect: Lines<'a>,
    origin: Lines<'a>,
    sec_fetch_site: Lines<'a>,
    other_sec_fetch_mode: bool,
    navigates: bool,
    is_document: bool,
    asks_for_cors: bool,
    names_us: bool,
    credentials: bool,
    forwarded: Option<&'a HeaderName>,
}

/// The lines of one header.
#[derive(Default)]
struct Lines<'a> {
    last: Option<&'a HeaderValue>,
    count: usize,
}

impl<'a> Lines<'a> {
    fn add(&mut self, value: &'a HeaderValue) {
        self.last = Some(value);
        self.count += 1;
    }

    fn any(&self) -> bool {
        self.count > 0
    }

    /// The value, if the header is there exactly once.
    fn only(&self) -> Option<&'a HeaderValue> {
        self.last.filter(|_| self.count == 1)
    }
}

impl<'a> Seen<'a> {
    fn in_headers(headers: &'a HeaderMap) -> Self {
        let mut seen = Self::default();
        for (name, value) in headers {
            match name.as_str() {
                "host" => seen.host.add(value),
                "transfer-encoding" => seen.transfer_encoding.add(value),
                "expect" => seen.expect.add(value),
                "origin" => seen.origin.add(value),
                "sec-fetch-site" => seen.sec_fetch_site.add(value),
                // Node's own fetch sends `cors`; only browsers send the rest.
                "sec-fetch-mode" => {
                    seen.other_sec_fetch_mode |= value != "cors";
                    seen.navigates = value == "navigate";
                }
                "sec-fetch-dest" => seen.is_document = value == "document",
                "access-control-request-method" | "access-control-request-headers" => seen.asks_for_cors = true,
                "authorization" => seen.credentials |= !placeholder::is_bearer(value),
                "cookie" | "proxy-authorization" => seen.credentials = true,
                "cdn-loop" => seen.names_us |= names_us(value),
                "via" => {
                    seen.names_us |= names_us(value);
                    seen.forwarded = Some(name);
                }
                // Set by proxies and tunnels in front of a server; an app on this machine sets none of them.
                "forwarded"
                | "x-forwarded-for"
                | "x-forwarded-host"
                | "x-forwarded-proto"
                | "x-forwarded-port"
                | "x-real-ip"
                | "cf-connecting-ip"
                | "tailscale-user-login" => seen.forwarded = Some(name),
                _ => {}
            }
        }
        seen
    }
}

fn names_us(value: &HeaderValue) -> bool {
    let words = value.as_bytes().split(|b| matches!(b, b' ' | b',' | b';' | b'\t'));
    words.into_iter().any(|word| word.eq_ignore_ascii_case(VIA_NAME.as_bytes()))
}

fn check_framing(seen: &Seen<'_>, version: Version) -> Result<(), RequestError> {
    if seen.transfer_encoding.any() {
        let encoding = seen.transfer_encoding.only();
        let only_chunked = encoding.is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !only_chunked || version != Version::HTTP_11 {
            let message = "Transfer-Encoding must be given once and be `chunked`.";
            return Err(RequestError::new(Code::BadFraming, message).closing());
        }
    }
    let expects_other = |v: &HeaderValue| !v.as_bytes().eq_ignore_ascii_case(b"100-continue");
    if seen.expect.count > 1 || seen.expect.last.is_some_and(expects_other) {
        return Err(RequestError::new(Code::ExpectationFailed, "Only `Expect: 100-continue` is understood."));
    }
    Ok(())
}

fn check_host(seen: &Seen<'_>, entrance: Entrance, policy: &Policy) -> Result<(), RequestError> {
    let bad = || RequestError::new(Code::BadHost, "Send one Host header with the address that you connect to.");
    let host = seen.host.only().ok_or_else(bad)?.as_bytes();
    let (name, port) = split_host(host).ok_or_else(bad)?;
    let is_allowed = || {
        policy.allowed_hosts.iter().any(|allowed| {
            name.eq_ignore_ascii_case(allowed.name.as_bytes()) && allowed.port.is_none_or(|p| p == port.unwrap_or(80))
        })
    };
    let is_ours = match entrance {
        Entrance::Loopback(local) => is_loopback_name(name) && port.unwrap_or(80) == local || is_allowed(),
        // Whoever says a loopback name there has been led to another machine than they meant.
        Entrance::Network(_) => !is_loopback_name(name) && is_allowed(),
        Entrance::UnixSocket => name.eq_ignore_ascii_case(b"localhost"),
    };
    if is_ours { Ok(()) } else { Err(host_not_allowed(&excerpt(host), entrance)) }
}

/// Whether a name, as in `Host`, means the machine that it is said on. Other spellings of the same are not accepted.
pub fn is_loopback_name(name: &[u8]) -> bool {
    [&b"127.0.0.1"[..], b"localhost", b"[::1]"].iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn host_not_allowed(host: &str, entrance: Entrance) -> RequestError {
    let message = match entrance {
        Entrance::Loopback(port) => format!(
            "Host `{host}` is not this sidecar, which is 127.0.0.1:{port}. Use that address, or start with --allowed-host."
        ),
        Entrance::Network(_) => format!("Host `{host}` is not one that was allowed with --allowed-host."),
        Entrance::UnixSocket => {
            let message = format!("Host `{host}` is not this sidecar, which is `localhost` on its unix socket.");
            return RequestError::new(Code::HostNotAllowed, message).hint("send `Host: localhost`");
        }
    };
    RequestError::new(Code::HostNotAllowed, message)
        .command(format!("connect-sidecar --allowed-host {}", shell_quoting::word(host)))
}

/// `name[:port]` or `[v6][:port]`; `None` if it is neither.
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

/// The web origin to admit, if an allowed one asks.
fn check_browser(seen: &Seen<'_>, parts: &Parts, policy: &Policy) -> Result<Option<HeaderValue>, RequestError> {
    let path = parts.uri.path();
    let site = seen.sec_fetch_site.only().map(HeaderValue::as_bytes);
    let opens_window = parts.method == Method::GET && seen.navigates && seen.is_document;
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
    let is_preflight = || parts.method == Method::OPTIONS && seen.asks_for_cors;
    let is_from_us = path.starts_with(OURS) && site == Some(b"same-origin");
    if seen.origin.any() {
        // A browser names the page's origin with whatever is no GET, also to that origin. `Host` is one of ours.
        let is_own = |origin: &HeaderValue| {
            let host = seen.host.only().map_or(b"".as_slice(), HeaderValue::as_bytes);
            origin.as_bytes().strip_prefix(b"http://") == Some(host)
        };
        if is_from_us && seen.origin.only().is_some_and(is_own) {
            return require_key(&parts.headers, policy).map(|()| None);
        }
        let is_allowed =
            |origin: &&HeaderValue| policy.allowed_origins.iter().any(|a| a.as_bytes() == origin.as_bytes());
        let origin = seen.origin.only().filter(is_allowed).ok_or_else(refused)?;
        // It was let in for the apps' routes: what is told to people is for those who have the key.
        if !is_preflight() && (path.starts_with(OURS) || path == METRICS) {
            require_key(&parts.headers, policy)?;
        }
        return Ok(Some(origin.clone()));
    }
    // The page itself, in a window of its own, opened by hand or anew: it holds no data. A link elsewhere does not get it.
    if (path == OURS || NEAR_THE_PAGE.contains(&path)) && opens_window && matches!(site, Some(b"none" | b"same-origin"))
    {
        return Ok(None);
    }
    // The page asks from its own origin, and proves with the key that it was opened by who may.
    if is_from_us {
        return require_key(&parts.headers, policy).map(|()| None);
    }
    if seen.sec_fetch_site.any() || seen.other_sec_fetch_mode || is_preflight() {
        return Err(refused());
    }
    Ok(None)
}

fn check_forwarding(seen: &Seen<'_>, policy: &Policy) -> Result<(), RequestError> {
    check_loop(seen)?;
    match seen.forwarded {
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

fn check_loop(seen: &Seen<'_>) -> Result<(), RequestError> {
    if seen.names_us {
        return Err(RequestError::new(
            Code::LoopDetected,
            "This request has been through a connect-sidecar already. Check that its upstream is not a sidecar.",
        ));
    }
    Ok(())
}

fn check_key(parts: &Parts, entrance: Entrance, policy: &Policy) -> Result<(), RequestError> {
    let path = parts.uri.path();
    // A browser that is told to open the page sends no key, and gets no data.
    let is_page = (path == OURS || is_led_to_the_page(parts)) && matches!(entrance, Entrance::Loopback(_));
    let needs_none = !policy.require_key || is_health(path) || is_page;
    if needs_none || is_of_a_run(&parts.headers, policy) { Ok(()) } else { require_key(&parts.headers, policy) }
}

/// Whether a browser opens a window at a path near the status page. One that speaks to a name that it does not trust tells
/// that by what it takes alone.
pub fn is_led_to_the_page(parts: &Parts) -> bool {
    let says = |name: &str, expected: &str| parts.headers.get(name).is_some_and(|value| value == expected);
    let takes_pages = || {
        let accepted = parts.headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        !parts.headers.contains_key("sec-fetch-mode")
            && accepted.split([',', ';']).any(|kind| kind.trim() == "text/html")
    };
    let opens_window = says("sec-fetch-mode", "navigate") && says("sec-fetch-dest", "document");
    parts.method == Method::GET && NEAR_THE_PAGE.contains(&parts.uri.path()) && (opens_window || takes_pages())
}

/// Paths that are answered when others are not: to whoever has no key, and to one caller too many.
pub fn is_health(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz")
}

/// Whether a browser asks for something to show in a window.
pub fn is_browser_window(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate")
}

/// Whether a request brings the key of runs. What needs the instance key in any case is refused to it all the same.
fn is_of_a_run(headers: &HeaderMap, policy: &Policy) -> bool {
    let mut sent = headers.get_all(KEY_HEADER).iter();
    match (policy.key_of_runs(), sent.next(), sent.next()) {
        (Some(key), Some(sent), None) => key.matches(sent.as_bytes()),
        _ => false,
    }
}

/// Refuses a request without the instance key, given once.
pub fn require_key(headers: &HeaderMap, policy: &Policy) -> Result<(), RequestError> {
    let mut given = headers.get_all(KEY_HEADER).iter();
    let only = given.next().filter(|_| given.next().is_none());
    match &policy.key {
        Some(key) if key.matches(only.map_or(b"", HeaderValue::as_bytes)) => Ok(()),
        _ => Err(RequestError::new(Code::KeyRequired, "This needs the instance key in a Sidecar-Key header.")),
    }
}

#[cfg(test)]
mod tests;
