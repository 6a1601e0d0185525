//! Who may ask the emulator and its stand-ins at all: programs of this user on this machine, and a browser that a person
//! has led to one of the pages. Judged by the connection and by a request's head, before any of its body is read.
//!
//! Nothing here needs a credential to be of worth to a page: one that rebinds its own name to 127.0.0.1, or has a form
//! sent here, must find every door closed.

use std::net::SocketAddr;

use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, Method, StatusCode};
use serde_json::json;
use tokio::net::TcpStream;

use super::exchange::Given;
use super::outside::is_loopback_name;
use crate::os::peer;

/// Why somebody is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Barred {
    /// Another user of this machine.
    OtherUser,
    /// `Host` is not this machine.
    Host,
    /// A page's request.
    Page,
}

impl From<Barred> for Given {
    fn from(barred: Barred) -> Self {
        let (code, message) = match barred {
            Barred::OtherUser => ("peer_uid_mismatch", "The emulator answers the user that it runs as, and root."),
            Barred::Host => ("host_not_allowed", "Send one Host header with a loopback name, such as 127.0.0.1."),
            Barred::Page => ("browser_request_refused", "Requests from web pages are refused."),
        };
        Self::json(StatusCode::FORBIDDEN, &json!({"error": {"code": code, "message": message}}))
    }
}

/// What a path is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Visitors {
    /// Programs alone.
    Programs,
    /// People with a browser, too: it is led there from elsewhere, and sends the page's own form.
    People,
}

/// Whether a connection's other end is ours; `None` if there is none to answer any more.
pub(super) fn let_in(stream: &TcpStream, from: SocketAddr) -> Option<Result<(), Barred>> {
    let peer = peer::identify(stream, from, stream.local_addr().ok()?).ok()?;
    Some(if peer.is_allowed() { Ok(()) } else { Err(Barred::OtherUser) })
}

/// Judges a request's head.
pub(super) fn check(head: &Parts, visitors: Visitors) -> Result<(), Barred> {
    let host = own_host(&head.headers).ok_or(Barred::Host)?;
    let of = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap_or("not text"));
    let (site, mode, destination) = (of("sec-fetch-site"), of("sec-fetch-mode"), of("sec-fetch-dest"));
    // Opened by hand, or sent by a page of ours.
    let is_own = matches!(site, None | Some("none" | "same-origin"));
    let is_led_here = head.method == Method::GET && mode == Some("navigate") && destination == Some("document");
    let sent_by = |origin: &http::HeaderValue| {
        let own = [format!("http://{host}"), format!("https://{host}")];
        own.iter().any(|own| own.as_bytes() == origin.as_bytes())
    };
    let is_let_in = match visitors {
        Visitors::Programs => is_own && !head.headers.contains_key(ORIGIN),
        Visitors::People => (is_own || is_led_here) && head.headers.get_all(ORIGIN).iter().all(sent_by),
    };
    if is_let_in { Ok(()) } else { Err(Barred::Page) }
}

/// The one `Host`, if it means this machine. Whatever port it names: a resolver may have led here.
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

    fn judged(method: &str, visitors: Visitors, headers: &[(&str, &str)]) -> Result<(), Barred> {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check(&request.body(()).expect("a request").into_parts().0, visitors)
    }

    #[test]
    fn programs_of_this_machine_are_let_in_everywhere_and_no_page_is() {
        let host = ("host", "127.0.0.1:2775");
        for (headers, expected) in [
            (&[host][..], Ok(())),
            (&[("host", "localhost:2775")], Ok(())),
            (&[("host", "LOCALHOST")], Ok(())),
            (&[("host", "[::1]:2775")], Ok(())),
            (&[host, ("sec-fetch-site", "none")], Ok(())),
            (&[host, ("sec-fetch-mode", "cors")], Ok(())),
            (&[host, ("sec-fetch-site", "cross-site")], Err(Barred::Page)),
            (&[host, ("sec-fetch-site", "same-site")], Err(Barred::Page)),
            (&[host, ("origin", "null")], Err(Barred::Page)),
            (&[host, ("origin", "https://evil.example")], Err(Barred::Page)),
            (&[("host", "rebound.example:2775")], Err(Barred::Host)),
            (&[("host", "rebound.example:2775"), ("sec-fetch-site", "same-origin")], Err(Barred::Host)),
            (&[("host", "127.0.0.1.example")], Err(Barred::Host)),
            (&[("host", "localhost.example:2775")], Err(Barred::Host)),
            (&[("host", "evil@127.0.0.1:2775")], Err(Barred::Host)),
            (&[host, ("host", "rebound.example")], Err(Barred::Host)),
            (&[("host", "")], Err(Barred::Host)),
            (&[], Err(Barred::Host)),
        ] {
            for (method, visitors) in
                [("GET", Visitors::Programs), ("POST", Visitors::Programs), ("POST", Visitors::People)]
            {
                assert_eq!(judged(method, visitors, headers), expected, "{method} {visitors:?} {headers:?}");
            }
        }
    }

    #[test]
    fn a_browser_is_led_to_a_page_and_sends_its_own_form_and_nothing_else() {
        let host = ("host", "127.0.0.1:2775");
        let (cross, opened) = (("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"));
        let (document, own) = (("sec-fetch-dest", "document"), ("origin", "http://127.0.0.1:2775"));
        for (method, headers, is_let_in) in [
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
            assert_eq!(judged(method, Visitors::People, headers).is_ok(), is_let_in, "{method} {headers:?}");
            let own_origin = headers.iter().any(|(name, _)| *name == "origin") || headers.contains(&cross);
            assert!(!own_origin || judged(method, Visitors::Programs, headers).is_err(), "{method} {headers:?}");
        }
    }
}
