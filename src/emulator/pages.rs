//! The HTML pages for browsers: a question with two buttons, or a single sentence. The content security policy forbids
//! scripts and external resources, and all inserted text is escaped.

use std::sync::LazyLock;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderValue, REFERRER_POLICY, SET_COOKIE, X_FRAME_OPTIONS};
use http::{HeaderMap, StatusCode};

use super::message::Response;

/// The name of the form field and the cookie with the CSRF token.
const CSRF: &str = "csrf";

/// The style sheet.
const STYLE: &str = include_str!("pages.css");

/// The content security policy, which allows only [`STYLE`]. `form-action` is not restricted, since browsers apply it
/// to redirects after a form, which lead back to the app.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let style = BASE64_STANDARD.encode(digest(&SHA256, STYLE.as_bytes()));
    format!("default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; frame-ancestors 'none'")
});

/// A question with an approve and a deny button.
pub(super) struct Question<'a> {
    /// The heading: who asks.
    pub title: &'a str,
    /// The question.
    pub question: String,
    /// The requested scopes and resources.
    pub items: Vec<String>,
    /// The CSRF token of the form and the cookie.
    pub csrf: &'a str,
}

/// The page of a question. Both buttons submit the form to the page's own URL.
pub(super) fn question(question: &Question<'_>) -> Response {
    let Question { title, question, items, csrf } = question;
    let items: String = items.iter().map(|item| format!("<li>{}</li>", escape(item))).collect();
    let body = format!(
        "<p>{}</p><ul>{items}</ul><form method=\"post\"><input type=\"hidden\" name=\"{CSRF}\" value=\"{}\">\
         <button name=\"decision\" value=\"approve\">Approve</button> \
         <button name=\"decision\" value=\"deny\">Deny</button></form>",
        escape(question),
        escape(csrf)
    );
    let mut response = html(StatusCode::OK, title, &body);
    // Without `Secure`, since loopback is served without TLS.
    let cookie = format!("{CSRF}={csrf}; Path=/; HttpOnly; SameSite=Strict");
    response.headers.extend(HeaderValue::try_from(cookie).map(|cookie| (SET_COOKIE, cookie)));
    response
}

/// A page with one sentence, and a link to continue if given.
pub(super) fn sentence(status: StatusCode, title: &str, sentence: &str, link: Option<&str>) -> Response {
    let link = link.map_or(String::new(), |to| format!("<p><a href=\"{}\">Continue</a></p>", escape(to)));
    html(status, title, &format!("<p>{}</p>{link}", escape(sentence)))
}

/// The CSRF token of a form, if the cookie matches and `Origin` is this server.
pub(super) fn csrf_of<'a>(headers: &HeaderMap, form: &'a [(String, String)]) -> Option<&'a str> {
    let token = form.iter().find(|(name, _)| name == CSRF).map(|(_, value)| value.as_str())?;
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let cookies = header("cookie").unwrap_or_default();
    let has_cookie =
        cookies.split(';').any(|c| c.trim().strip_prefix(CSRF).and_then(|c| c.strip_prefix('=')) == Some(token));
    // Browsers send `Origin` with a form; other clients need not.
    let own = format!("http://{}", header("host").unwrap_or_default());
    let is_own = header("origin").is_none_or(|origin| origin == own || origin == own.replacen("http:", "https:", 1));
    (has_cookie && is_own).then_some(token)
}

fn html(status: StatusCode, title: &str, body: &str) -> Response {
    let title = escape(title);
    let page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style>\
         <main><h1>{title}</h1>{body}<small>A page of connect-sidecar emulate</small></main></html>"
    );
    let mut response = Response::new(status, "text/html; charset=utf-8", page);
    response.headers.extend(HeaderValue::try_from(POLICY.as_str()).map(|policy| (CONTENT_SECURITY_POLICY, policy)));
    response.headers.extend([
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ]);
    response
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_runs_and_loads_nothing_whatever_text_is_inserted() {
        let evil = "<script>\"'&";
        let response =
            question(&Question { title: evil, question: evil.into(), items: vec![evil.into()], csrf: "token" });
        let body = String::from_utf8(response.body.expect("a body").to_vec()).expect("UTF-8");
        assert!(!body.contains("<script"), "{body}");
        assert_eq!(body.matches("&lt;script&gt;&quot;&#39;&amp;").count(), 4, "{body}");
        let policy = response.headers.iter().find(|(name, _)| name == CONTENT_SECURITY_POLICY).expect("a policy");
        let policy = policy.1.to_str().expect("text");
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
        let (_, rest) = body.split_once("<style>").expect("a style");
        let (style, _) = rest.split_once("</style>").expect("its end");
        let hash = BASE64_STANDARD.encode(digest(&SHA256, style.as_bytes()));
        assert!(policy.contains(&hash), "the policy allows the page's style");
        for loads in ["url(", "@import", "http", "<link", "<img"] {
            assert!(!style.contains(loads) && !body.contains(&format!("{loads}s:")), "{loads}");
        }
        assert!(style.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn a_form_is_accepted_only_with_its_cookie_and_from_its_own_page() {
        let form = [("decision".to_owned(), "approve".to_owned()), (CSRF.to_owned(), "abc".to_owned())];
        for (cookie, origin, counts) in [
            ("csrf=abc", None, true),
            ("theme=dark; csrf=abc", Some("http://127.0.0.1:7"), true),
            ("csrf=abcd", None, false),
            ("xcsrf=abc", None, false),
            ("", None, false),
            ("csrf=abc", Some("http://evil.example"), false),
            ("csrf=abc", Some("null"), false),
            ("csrf=abc", Some("http://127.0.0.1:8"), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("host", HeaderValue::from_static("127.0.0.1:7"));
            headers.insert("cookie", HeaderValue::from_static(cookie));
            if let Some(origin) = origin {
                headers.insert("origin", HeaderValue::from_static(origin));
            }
            assert_eq!(csrf_of(&headers, &form).is_some(), counts, "{cookie} {origin:?}");
        }
    }
}
