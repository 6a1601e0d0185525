//! May this caller ask at all? Framing, `Host`, target form, browser and forwarding gates, instance key; in that order,
//! for every path, ours included. Pure.
//!
//! The rules and the incidents behind them are in trust-policy.md sections 4.2 to 4.6. The gates compare bytes against
//! lists of what is allowed; they never normalise and never guess. A refusal is decided before any of the body is read.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Version};

use super::error::{Code, RequestError, excerpt};
use crate::identity::placeholder;
use crate::instance_key::Key;

/// The name by which we recognise our own requests.
pub const VIA_NAME: &str = "connect-sidecar";
/// Carries the instance key.
pub const KEY_HEADER: HeaderName = HeaderName::from_static("sidecar-key");

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
    /// Web origins that may ask, exactly as browsers send them.
    pub allowed_origins: Vec<String>,
    /// Take requests that were forwarded.
    pub allow_forwarded: bool,
    /// Every request needs the instance key.
    pub require_key: bool,
    /// The instance key.
    pub key: Option<Key>,
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
    check_key(parts, policy)?;
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
                "sec-fetch-mode" => seen.other_sec_fetch_mode |= value != "cors",
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
            return RequestError::new(Code::HostNotAllowed, message);
        }
    };
    RequestError::new(Code::HostNotAllowed, message).hint(format!("connect-sidecar --allowed-host {host}"))
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
    let refused = || {
        RequestError::new(
            Code::BrowserRequestRefused,
            "Requests from web pages are refused. Ask from a server or a script, or start with --allowed-origin.",
        )
    };
    if seen.origin.any() {
        let is_allowed =
            |origin: &&HeaderValue| policy.allowed_origins.iter().any(|a| a.as_bytes() == origin.as_bytes());
        let origin = seen.origin.only().filter(is_allowed).ok_or_else(refused)?;
        return Ok(Some(origin.clone()));
    }
    // Our own page asks from its own origin, and proves with the key that it was opened by who may.
    if parts.uri.path().starts_with("/_sidecar/") && seen.sec_fetch_site.only().is_some_and(|v| v == "same-origin") {
        return require_key(&parts.headers, policy).map(|()| None);
    }
    let preflight = parts.method == Method::OPTIONS && seen.asks_for_cors;
    if seen.sec_fetch_site.any() || seen.other_sec_fetch_mode || preflight {
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
        .hint("connect-sidecar --allow-forwarded")),
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

fn check_key(parts: &Parts, policy: &Policy) -> Result<(), RequestError> {
    if policy.require_key && !is_health(parts.uri.path()) { require_key(&parts.headers, policy) } else { Ok(()) }
}

/// Paths that are answered when others are not: to whoever has no key, and to one caller too many.
pub fn is_health(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz")
}

/// Refuses a request without the instance key.
pub fn require_key(headers: &HeaderMap, policy: &Policy) -> Result<(), RequestError> {
    match &policy.key {
        Some(key) if key.is(headers.get(KEY_HEADER).map_or(b"", HeaderValue::as_bytes)) => Ok(()),
        _ => Err(RequestError::new(Code::KeyRequired, "This needs the instance key in a Sidecar-Key header.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    const LOOPBACK: Entrance = Entrance::Loopback(2774);

    /// A good request with `extra` header lines; `Host` is replaced if `extra` has one.
    fn request(extra: &[(&str, &str)]) -> Parts {
        let mut builder = Request::post("/v1/connect/token/x");
        if !extra.iter().any(|(name, _)| *name == "host") {
            builder = builder.header("host", "127.0.0.1:2774");
        }
        for (name, value) in extra {
            builder = builder.header(*name, HeaderValue::from_bytes(value.as_bytes()).expect("a value"));
        }
        builder.body(()).expect("a request").into_parts().0
    }

    fn verdict(parts: &Parts, policy: &Policy) -> &'static str {
        check(parts, LOOPBACK, policy).err().map_or("ok", |e| e.code.as_str())
    }

    fn default_verdict(extra: &[(&str, &str)]) -> &'static str {
        verdict(&request(extra), &Policy::default())
    }

    #[test]
    fn only_the_loopback_names_with_our_port_are_hosts() {
        for host in ["127.0.0.1:2774", "localhost:2774", "LocalHost:2774", "[::1]:2774"] {
            assert_eq!(default_verdict(&[("host", host)]), "ok", "{host}");
        }
        for host in [
            "localhost",
            "127.0.0.1",
            "127.0.0.1:2775",
            "0.0.0.0:2774",
            "[::]:2774",
            "127.0.0.2:2774",
            "a.localhost:2774",
            "localhost6:2774",
            "x.local:2774",
            "host.docker.internal:2774",
            "127.0.0.1.nip.io:2774",
            "localhost.evil.com:2774",
            "evil.example:2774",
            "[::ffff:127.0.0.1]:2774",
            "2130706433:2774",
            "0x7f000001:2774",
            "127.1:2774",
        ] {
            assert_eq!(default_verdict(&[("host", host)]), "host_not_allowed", "{host}");
        }
        for host in [
            "",
            "localhost.:2774",
            "user@localhost:2774",
            "local host:2774",
            "localhost:2774,x",
            "localhost:",
            "localhost:+2774",
            "localhost:99999",
            "localhost:02774",
            "[::1",
            "[]x:2774",
            "[::1]x",
            ":2774",
            "%6c:2774",
            "löcalhost:2774",
        ] {
            assert_eq!(default_verdict(&[("host", host)]), "bad_host", "{host}");
        }
        assert_eq!(default_verdict(&[("host", "127.0.0.1:2774"), ("host", "127.0.0.1:2774")]), "bad_host");
        let mut parts = request(&[]);
        parts.headers.remove("host");
        assert_eq!(verdict(&parts, &Policy::default()), "bad_host");
    }

    #[test]
    fn the_port_may_be_left_out_only_where_it_is_80() {
        let at_80 = |host| check(&request(&[("host", host)]), Entrance::Loopback(80), &Policy::default());
        assert!(at_80("localhost").is_ok() && at_80("localhost:80").is_ok());
    }

    #[test]
    fn further_hosts_are_exact() {
        let host = |name: &str, port| AllowedHost { name: name.into(), port };
        let policy =
            Policy { allowed_hosts: vec![host("dev.test", Some(2774)), host("any.test", None)], ..Policy::default() };
        for (host, expected) in [
            ("dev.test:2774", "ok"),
            ("DEV.test:2774", "ok"),
            ("dev.test", "host_not_allowed"),
            ("x.dev.test:2774", "host_not_allowed"),
            ("any.test", "ok"),
            ("any.test:1", "ok"),
        ] {
            assert_eq!(verdict(&request(&[("host", host)]), &policy), expected, "{host}");
        }
    }

    #[test]
    fn each_entrance_has_hosts_of_its_own() {
        let names = ["dev.test", "localhost", "127.0.0.1"];
        let allowed_hosts = names.map(|name| AllowedHost { name: name.into(), port: None }).into();
        let policy = Policy { allowed_hosts, ..Policy::default() };
        for (host, loopback, network, unix_socket) in [
            ("127.0.0.1:2774", true, false, false),
            ("[::1]:2774", true, false, false),
            ("localhost:2774", true, false, true),
            ("LOCALHOST", true, false, true),
            ("localhost:1", true, false, true),
            ("dev.test", true, true, false),
            ("Dev.Test:2774", true, true, false),
            ("192.0.2.2:2774", false, false, false),
            ("0.0.0.0:2774", false, false, false),
        ] {
            for (entrance, is_good) in
                [(LOOPBACK, loopback), (Entrance::Network(2774), network), (Entrance::UnixSocket, unix_socket)]
            {
                let refusal = check(&request(&[("host", host)]), entrance, &policy).err();
                let expected = if is_good { None } else { Some("host_not_allowed") };
                assert_eq!(refusal.map(|e| e.code.as_str()), expected, "{host} by {entrance:?}");
            }
        }
        for entrance in [Entrance::Network(2774), Entrance::UnixSocket] {
            for host in ["", "localhost:", "localhost.", "dev.test:x"] {
                let refusal = check(&request(&[("host", host)]), entrance, &policy).expect_err("a bad host");
                assert_eq!(refusal.code, Code::BadHost, "{host} by {entrance:?}");
            }
        }
    }

    #[test]
    fn a_web_page_is_refused_whatever_it_calls_itself() {
        for origin in ["https://evil.example", "null", "", "http://127.0.0.1:2774"] {
            assert_eq!(default_verdict(&[("origin", origin)]), "browser_request_refused", "{origin}");
        }
        for site in ["cross-site", "same-site", "same-origin", "none"] {
            assert_eq!(default_verdict(&[("sec-fetch-site", site)]), "browser_request_refused", "{site}");
        }
        for mode in ["navigate", "no-cors", "websocket", "same-origin"] {
            assert_eq!(default_verdict(&[("sec-fetch-mode", mode)]), "browser_request_refused", "{mode}");
        }
        let mut preflight = request(&[("access-control-request-method", "POST")]);
        preflight.method = Method::OPTIONS;
        assert_eq!(verdict(&preflight, &Policy::default()), "browser_request_refused");
    }

    #[test]
    fn what_nodes_fetch_sends_is_no_browser() {
        assert_eq!(default_verdict(&[("sec-fetch-mode", "cors"), ("accept-language", "*")]), "ok");
    }

    #[test]
    fn an_allowed_origin_is_exact_and_admitted() {
        let policy = Policy { allowed_origins: vec!["https://app.example".into()], ..Policy::default() };
        let admitted =
            check(&request(&[("origin", "https://app.example"), ("sec-fetch-site", "cross-site")]), LOOPBACK, &policy);
        assert_eq!(admitted.expect("allowed").origin, Some(HeaderValue::from_static("https://app.example")));
        for origin in ["https://app.example:8443", "http://app.example", "https://app.example.evil.com", "null"] {
            assert_eq!(verdict(&request(&[("origin", origin)]), &policy), "browser_request_refused", "{origin}");
        }
        let twice = request(&[("origin", "https://app.example"), ("origin", "https://app.example")]);
        assert_eq!(verdict(&twice, &policy), "browser_request_refused");
    }

    #[test]
    fn forwarded_requests_are_refused_unless_allowed_and_loops_always() {
        let policy = Policy { allow_forwarded: true, ..Policy::default() };
        for name in [
            "forwarded",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-port",
            "x-real-ip",
            "cf-connecting-ip",
            "tailscale-user-login",
            "via",
        ] {
            let parts = request(&[(name, "x")]);
            assert_eq!(verdict(&parts, &Policy::default()), "forwarded_request_refused", "{name}");
            assert_eq!(verdict(&parts, &policy), "ok", "{name}");
        }
        for (name, value) in [
            ("cdn-loop", "connect-sidecar"),
            ("via", "1.1 p, 1.1 Connect-Sidecar"),
            ("cdn-loop", "a;b,connect-sidecar;v=1"),
        ] {
            assert_eq!(verdict(&request(&[(name, value)]), &policy), "loop_detected", "{name}: {value}");
        }
    }

    #[test]
    fn framing_is_plain_chunked_or_nothing() {
        assert_eq!(default_verdict(&[("transfer-encoding", "chunked")]), "ok");
        assert_eq!(default_verdict(&[("transfer-encoding", "gzip, chunked")]), "bad_framing");
        assert_eq!(
            default_verdict(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
            "bad_framing"
        );
        let mut old = request(&[("transfer-encoding", "chunked")]);
        old.version = Version::HTTP_10;
        assert_eq!(verdict(&old, &Policy::default()), "bad_framing");
        assert_eq!(default_verdict(&[("expect", "100-Continue")]), "ok");
        assert_eq!(default_verdict(&[("expect", "200-ok")]), "expectation_failed");
    }

    #[test]
    fn a_target_is_a_plain_path() {
        for (method, target, expected) in [
            (Method::POST, "http://127.0.0.1:2774/v1/connect/token/x", "bad_target"),
            (Method::POST, "//evil/x", "bad_target"),
            (Method::GET, "*", "bad_target"),
            (Method::CONNECT, "api.vercel.com:443", "method_not_allowed"),
            (Method::TRACE, "/v1/connect/token/x", "method_not_allowed"),
        ] {
            let mut parts = request(&[]);
            parts.method = method;
            parts.uri = target.parse().expect("a target");
            assert_eq!(verdict(&parts, &Policy::default()), expected, "{target}");
        }
    }

    #[test]
    fn the_key_is_needed_everywhere_but_for_health() {
        let policy = Policy { require_key: true, key: Some(Key::new("secret".into())), ..Policy::default() };
        assert_eq!(verdict(&request(&[]), &policy), "key_required");
        assert_eq!(verdict(&request(&[("sidecar-key", "secre")]), &policy), "key_required");
        assert_eq!(verdict(&request(&[("sidecar-key", "secret")]), &policy), "ok");
        for path in ["/healthz", "/readyz"] {
            let mut parts = request(&[]);
            parts.uri = path.parse().expect("a path");
            assert_eq!(verdict(&parts, &policy), "ok", "{path}");
        }
        let no_key = Policy { require_key: true, ..Policy::default() };
        assert_eq!(verdict(&request(&[("sidecar-key", "")]), &no_key), "key_required", "never open by mistake");
    }

    #[test]
    fn our_own_page_may_ask_with_the_key_and_nobody_elses() {
        let policy = Policy { key: Some(Key::new("secret".into())), ..Policy::default() };
        let (key, own) = (("sidecar-key", "secret"), ("sec-fetch-site", "same-origin"));
        for (path, extra, expected) in [
            ("/_sidecar/v1/status", &[own, key][..], "ok"),
            ("/_sidecar/v1/status", &[own], "key_required"),
            ("/_sidecar/v1/status", &[("sec-fetch-site", "cross-site"), key], "browser_request_refused"),
            ("/_sidecar/v1/status", &[own, own, key], "browser_request_refused"),
            ("/_sidecar/v1/status", &[own, key, ("origin", "http://127.0.0.1:2774")], "browser_request_refused"),
            ("/v1/connect/token/x", &[own, key], "browser_request_refused"),
        ] {
            let mut parts = request(extra);
            parts.uri = path.parse().expect("a path");
            assert_eq!(verdict(&parts, &policy), expected, "{path} {extra:?}");
        }
    }

    #[test]
    fn only_a_browsers_question_before_a_request_is_a_preflight() {
        let ask = ("access-control-request-method", "POST");
        for (method, extra, expected) in [
            (Method::OPTIONS, &[ask][..], "browser_request_refused"),
            (Method::OPTIONS, &[], "ok"),
            (Method::POST, &[ask], "ok"),
        ] {
            let mut parts = request(extra);
            parts.method = method;
            assert_eq!(verdict(&parts, &Policy::default()), expected, "{} {extra:?}", parts.method);
        }
    }

    #[test]
    fn credentials_of_the_apps_own_are_noticed() {
        let has = |extra: &[(&str, &str)]| {
            check(&request(extra), LOOPBACK, &Policy::default()).expect("good").has_credentials
        };
        for name in ["authorization", "cookie", "proxy-authorization"] {
            assert!(has(&[(name, "x")]), "{name}");
        }
        assert!(!has(&[("accept", "x")]));
    }

    #[test]
    fn the_first_failure_answers() {
        let all_wrong = [("transfer-encoding", "gzip"), ("host", "evil:1"), ("origin", "null"), ("via", "x")];
        let expected = ["bad_framing", "host_not_allowed", "browser_request_refused", "forwarded_request_refused"];
        for (skip, expected) in expected.into_iter().enumerate() {
            assert_eq!(default_verdict(&all_wrong[skip..]), expected);
        }
    }
}
