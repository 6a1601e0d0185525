//! Group W: the status page. Tests with a real browser are in `page`.

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::support::http::{APP, Reply};

use super::contract::start;

/// Maximum size of the page, in bytes.
const MAX_PAGE: usize = 40_000;

/// The text between two marks, each of which occurs once.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> &'a str {
    assert_eq!(text.matches(begin).count(), 1, "{begin}");
    let inner = text.split_once(begin).expect(begin).1;
    inner.split_once(end).expect(end).0
}

#[tokio::test]
async fn tW01_serves_a_static_page_without_data_and_a_strict_csp() {
    let s = start().await;
    s.ask(APP).send().await.token();
    let page = s.get("/_sidecar/").send().await;
    let html = page.text();
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(html.len() < MAX_PAGE, "{} bytes", html.len());
    let hash = |begin, end| STANDARD.encode(digest(&SHA256, between(&html, begin, end).as_bytes()));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; frame-ancestors \
         'none'; base-uri 'none'; form-action 'none'",
        hash("<script>", "</script>"),
        hash("<style>", "</style>")
    );
    assert_eq!(page.header("content-security-policy"), Some(policy.as_str()));
    assert_eq!(page.header("cross-origin-opener-policy"), Some("same-origin"));
    assert_eq!(page.header("x-frame-options"), Some("DENY"));
    for external in ["http:", "https:", "//www", "src=", "href=", "@import", "url("] {
        assert!(!html.contains(external), "{external}");
    }
    for dangerous in [
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "EventSource",
        "WebSocket",
        "cookie",
        "localStorage",
        "indexedDB",
    ] {
        assert!(!html.contains(dangerous), "{dangerous}");
    }
    assert_eq!(html, start().await.get("/_sidecar/").send().await.text(), "the same for everybody");
}

#[tokio::test]
async fn tW02_web_pages_need_the_key_for_the_status_and_local_tools_do_not() {
    let s = start().await;
    for path in ["/_sidecar/v1/status", "/metrics"] {
        assert_eq!(s.get(path).send().await.status, 200, "{path}");
        assert_eq!(s.get(path).header("sidecar-key", &s.key()).send().await.status, 200, "{path}");
    }
    let from_page = s.get("/_sidecar/v1/status").header("sec-fetch-site", "same-origin");
    s.deny(from_page.clone(), 401, "key_required").await;
    s.deny(from_page.clone().header("sidecar-key", "guessed"), 401, "key_required").await;
    assert_eq!(from_page.header("sidecar-key", &s.key()).send().await.status, 200);
}

#[tokio::test]
async fn tW03_no_other_page_reads_the_status_even_with_the_key() {
    let s = start().await;
    for path in ["/_sidecar/v1/status", "/_sidecar/v1/events", "/_sidecar/"] {
        let with_key = s.get(path).header("sidecar-key", &s.key());
        for site in ["cross-site", "same-site"] {
            s.deny(with_key.clone().header("sec-fetch-site", site), 403, "browser_request_refused").await;
        }
        for origin in [
            "https://evil.example",
            "http://127.0.0.1:3000",
            "http://localhost:{P}",
            "http://127.0.0.1:{P}",
            "null",
            "",
        ] {
            let from = with_key.clone().header("origin", &s.fill(origin));
            s.deny(from, 403, "browser_request_refused").await;
        }
    }
}

#[tokio::test]
async fn tW06_sets_no_cookie() {
    let s = start().await;
    let mut replies: Vec<Reply> = Vec::new();
    for path in ["/_sidecar/", "/_sidecar/v1/status", "/healthz", "/readyz", "/metrics", "/nowhere"] {
        replies.push(s.get(path).header("cookie", "a=b").send().await);
    }
    replies.push(s.req().send().await);
    for reply in replies {
        assert_eq!(reply.header("set-cookie"), None);
        reply.assert_safe();
    }
}
