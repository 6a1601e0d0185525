//! The status page: a static HTML file without data. Its script requests all data with the instance key.
//!
//! Style and script are inlined and allowed by their hashes. The page may not load anything else or be framed
//! (docs/security.md W and the end).

use std::sync::LazyLock;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONTENT_SECURITY_POLICY, HeaderName, LOCATION};
use http::{HeaderValue, StatusCode};

use crate::proxy::guard::SIDECAR_PREFIX;
use crate::proxy::reply::{self, Reply};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
const PAGE: &str = include_str!("page.html");

static HTML: LazyLock<String> = LazyLock::new(|| PAGE.replace("{style}", STYLE).replace("{script}", SCRIPT));

static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |text: &str| STANDARD.encode(digest::digest(&digest::SHA256, text.as_bytes()));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; frame-ancestors 'none'; \
         base-uri 'none'; form-action 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// Redirects a browser to the page.
pub fn redirect() -> Reply {
    let mut reply = reply::own(StatusCode::SEE_OTHER, "text/plain; charset=utf-8", "");
    reply.headers_mut().insert(LOCATION, HeaderValue::from_static(SIDECAR_PREFIX));
    reply
}

/// The page.
pub fn reply() -> Reply {
    let mut reply = reply::own(StatusCode::OK, "text/html; charset=utf-8", HTML.as_str());
    let headers = reply.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, POLICY.clone());
    headers.insert(HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin"));
    reply
}
