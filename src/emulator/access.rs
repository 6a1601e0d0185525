//! Access control of the emulator and the mock providers: local programs of the same user, and browsers that a person
//! has navigated to one of the pages. Checked by connection and request head, before the body is read.
//!
//! The admin API issues credentials without asking for one. A web page that rebinds its DNS name to 127.0.0.1 or
//! submits a form here must therefore be refused on every route.

use std::net::SocketAddr;

use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, Method, StatusCode};
use serde_json::json;
use tokio::net::TcpStream;

use super::allowlist::is_loopback_name;
use super::message::Response;
use crate::os::peer;

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AccessDenied {
    /// The peer is another user of this machine.
    OtherUser,
    /// `Host` does not name this machine.
    Host,
    /// The request was sent by a web page.
    Page,
}

impl From<AccessDenied> for Response {
    fn from(denied: AccessDenied) -> Self {
        let (code, message) = match denied {
            AccessDenied::OtherUser => {
                ("peer_uid_mismatch", "The emulator only serves the user that it runs as, and root.")
            }
            AccessDenied::Host => ("host_not_allowed", "Send one Host header with a loopback name, such as 127.0.0.1."),
            AccessDenied::Page => ("browser_request_refused", "Requests from web pages are refused."),
        };
        Self::json(StatusCode::FORBIDDEN, &json!({"error": {"code": code, "message": message}}))
    }
}

/// Who may use a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// Only programs.
    Programs,
    /// Browsers as well: they may navigate there from another site, and submit the page's own form.
    Browsers,
}

/// Checks that the peer is the same user or root. `None` if the connection is already closed.
pub(super) fn check_peer(stream: &TcpStream, from: SocketAddr) -> Option<Result<(), AccessDenied>> {
    let peer = peer::identify(stream, from, stream.local_addr().ok()?).ok()?;
    Some(if peer.is_allowed() { Ok(()) } else { Err(AccessDenied::OtherUser) })
}

/// Checks `Host`, `Origin` and the `Sec-Fetch-*` headers of a request.
pub(super) fn check_head(head: &Parts, audience: Audience) -> Result<(), AccessDenied> {
    let host = own_host(&head.headers).ok_or(AccessDenied::Host)?;
    let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap_or("not text"));
    let (site, mode, destination) = (header("sec-fetch-site"), header("sec-fetch-mode"), header("sec-fetch-dest"));
    // Typed into the address bar, sent by a program, or by one of the emulator's own pages.
    let is_own = matches!(site, None | Some("none" | "same-origin"));
    let is_navigation = head.method == Method::GET && mode == Some("navigate") && destination == Some("document");
    let is_own_origin = |origin: &http::HeaderValue| {
        let own = [format!("http://{host}"), format!("https://{host}")];
        own.iter().any(|own| own.as_bytes() == origin.as_bytes())
    };
    let is_allowed = match audience {
        Audience::Programs => is_own && !head.headers.contains_key(ORIGIN),
        Audience::Browsers => (is_own || is_navigation) && head.headers.get_all(ORIGIN).iter().all(is_own_origin),
    };
    if is_allowed { Ok(()) } else { Err(AccessDenied::Page) }
}

/// The single `Host`, if it is a loopback name. The port may differ, since requests can be forwarded from another one.
fn own_host(headers: &HeaderMap) -> Option<&str> {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return None };
    let host = host.to_str().ok().filter(|host| !host.contains('@'))?;
    let authority: Authority = host.parse().ok()?;
    is_loopback_name(authority.host()).then_some(host)
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn check(method: &str, audience: Audience, headers: &[(&str, &str)]) -> Result<(), AccessDenied> {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check_head(&request.body(()).expect("a request").into_parts().0, audience)
    }

    #[test]
    fn local_programs_are_allowed_everywhere_and_web_pages_nowhere() {
        let host = ("host", "127.0.0.1:2775");
        for (headers, expected) in [
            (&[host][..], Ok(())),
            (&[("host", "localhost:2775")], Ok(())),
            (&[("host", "LOCALHOST")], Ok(())),
            (&[("host", "[::1]:2775")], Ok(())),
            (&[host, ("sec-fetch-site", "none")], Ok(())),
            (&[host, ("sec-fetch-mode", "cors")], Ok(())),
            (&[host, ("sec-fetch-site", "cross-site")], Err(AccessDenied::Page)),
            (&[host, ("sec-fetch-site", "same-site")], Err(AccessDenied::Page)),
            (&[host, ("origin", "null")], Err(AccessDenied::Page)),
            (&[host, ("origin", "https://evil.example")], Err(AccessDenied::Page)),
            (&[("host", "rebound.example:2775")], Err(AccessDenied::Host)),
            (&[("host", "rebound.example:2775"), ("sec-fetch-site", "same-origin")], Err(AccessDenied::Host)),
            (&[("host", "127.0.0.1.example")], Err(AccessDenied::Host)),
            (&[("host", "localhost.example:2775")], Err(AccessDenied::Host)),
            (&[("host", "evil@127.0.0.1:2775")], Err(AccessDenied::Host)),
            (&[host, ("host", "rebound.example")], Err(AccessDenied::Host)),
            (&[("host", "")], Err(AccessDenied::Host)),
            (&[], Err(AccessDenied::Host)),
        ] {
            for (method, audience) in
                [("GET", Audience::Programs), ("POST", Audience::Programs), ("POST", Audience::Browsers)]
            {
                assert_eq!(check(method, audience, headers), expected, "{method} {audience:?} {headers:?}");
            }
        }
    }

    #[test]
    fn a_browser_may_navigate_to_a_page_and_submit_its_form_and_nothing_else() {
        let host = ("host", "127.0.0.1:2775");
        let (cross, opened) = (("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"));
        let (document, own) = (("sec-fetch-dest", "document"), ("origin", "http://127.0.0.1:2775"));
        for (method, headers, is_allowed) in [
            ("GET", &[host, cross, opened, document][..], true),
            ("GET", &[host, ("sec-fetch-site", "same-site"), opened, document], true),
            ("GET", &[host, cross, opened, ("sec-fetch-dest", "iframe")], false),
            ("GET", &[host, cross, opened, ("sec-fetch-dest", "embed")], false),
            ("GET", &[host, cross, ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")], false),
            ("GET", &[host, cross], false),
            ("GET", &[host, cross, opened, document, ("origin", "https://evil.example")], false),
            ("POST", &[host, cross, opened, document], false),
            ("POST", &[host, cross, opened, document, own], false),
            ("POST", &[host, ("sec-fetch-site", "same-origin"), opened, document, own], true),
            ("POST", &[host, own], true),
            ("POST", &[host, ("origin", "http://127.0.0.1:3000")], false),
            ("POST", &[host, ("origin", "null")], false),
            ("POST", &[host, own, ("origin", "https://evil.example")], false),
        ] {
            assert_eq!(check(method, Audience::Browsers, headers).is_ok(), is_allowed, "{method} {headers:?}");
            let is_refused_to_programs = headers.iter().any(|(name, _)| *name == "origin") || headers.contains(&cross);
            assert!(
                !is_refused_to_programs || check(method, Audience::Programs, headers).is_err(),
                "{method} {headers:?}"
            );
        }
    }
}
