//! What a person sees in a browser: a question with two answers, or one sentence. Static HTML with a style of its own, that
//! may load nothing and run nothing; whatever comes from elsewhere is escaped.

use std::sync::LazyLock;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderValue, REFERRER_POLICY, SET_COOKIE, X_FRAME_OPTIONS};
use http::{HeaderMap, StatusCode};

use super::exchange::Given;

/// The name of the hidden field, and of the cookie, that hold the CSRF token.
const CSRF: &str = "csrf";

/// How the pages look, in light and in dark.
const STYLE: &str = include_str!("pages.css");

/// What a page may do: have this very style. `form-action` is left open: browsers hold redirects after a form to it, and
/// those lead back to the app.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let style = BASE64_STANDARD.encode(digest(&SHA256, STYLE.as_bytes()));
    format!("default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; frame-ancestors 'none'")
});

/// A question to a person.
pub(super) struct Question<'a> {
    /// Who asks, as a heading.
    pub who: &'a str,
    /// What is asked.
    pub asks: String,
    /// What is asked for, one by one.
    pub list: Vec<String>,
    /// The CSRF token: whoever sends the form has it from this page and has its cookie.
    pub csrf: &'a str,
}

/// The question, with a button to approve and one to deny. Both send the form to the page's own address.
pub(super) fn question(question: &Question<'_>) -> Given {
    let Question { who, asks, list, csrf } = question;
    let items: String = list.iter().map(|item| format!("<li>{}</li>", escape(item))).collect();
    let body = format!(
        "<p>{}</p><ul>{items}</ul><form method=\"post\"><input type=\"hidden\" name=\"{CSRF}\" value=\"{}\">\
         <button name=\"decision\" value=\"approve\">Approve</button> \
         <button name=\"decision\" value=\"deny\">Deny</button></form>",
        escape(asks),
        escape(csrf)
    );
    let mut given = html(StatusCode::OK, who, &body);
    // Not for other sites' requests, nor for scripts. Without `Secure`, since this is loopback without TLS.
    let cookie = format!("{CSRF}={csrf}; Path=/; HttpOnly; SameSite=Strict");
    given.headers.extend(HeaderValue::try_from(cookie).map(|cookie| (SET_COOKIE, cookie)));
    given
}

/// One sentence, with a link to go on if there is one.
pub(super) fn sentence(status: StatusCode, who: &str, sentence: &str, link: Option<&str>) -> Given {
    let link = link.map_or(String::new(), |to| format!("<p><a href=\"{}\">Go on</a></p>", escape(to)));
    html(status, who, &format!("<p>{}</p>{link}", escape(sentence)))
}

/// The CSRF token of a form, if its cookie has the same and no other page sent it.
pub(super) fn csrf_of<'a>(headers: &HeaderMap, form: &'a [(String, String)]) -> Option<&'a str> {
    let token = form.iter().find(|(name, _)| name == CSRF).map(|(_, value)| value.as_str())?;
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let cookies = header("cookie").unwrap_or_default();
    let has_cookie =
        cookies.split(';').any(|c| c.trim().strip_prefix(CSRF).and_then(|c| c.strip_prefix('=')) == Some(token));
    // A browser says where a form was; nothing else need.
    let own = format!("http://{}", header("host").unwrap_or_default());
    let is_own = header("origin").is_none_or(|origin| origin == own || origin == own.replacen("http:", "https:", 1));
    (has_cookie && is_own).then_some(token)
}

fn html(status: StatusCode, title: &str, body: &str) -> Given {
    let title = escape(title);
    let page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style>\
         <main><h1>{title}</h1>{body}<small>A page of connect-sidecar emulate</small></main></html>"
    );
    let mut given = Given::of(status, "text/html; charset=utf-8", page);
    given.headers.extend(HeaderValue::try_from(POLICY.as_str()).map(|policy| (CONTENT_SECURITY_POLICY, policy)));
    given.headers.extend([
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ]);
    given
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
    fn a_page_runs_and_loads_nothing_whatever_is_on_it() {
        let evil = "<script>\"'&";
        let given = question(&Question { who: evil, asks: evil.into(), list: vec![evil.into()], csrf: "token" });
        let body = String::from_utf8(given.body.expect("a body").to_vec()).expect("UTF-8");
        assert!(!body.contains("<script"), "{body}");
        assert_eq!(body.matches("&lt;script&gt;&quot;&#39;&amp;").count(), 4, "{body}");
        let policy = given.headers.iter().find(|(name, _)| name == CONTENT_SECURITY_POLICY).expect("a policy");
        let policy = policy.1.to_str().expect("text");
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
        let (_, rest) = body.split_once("<style>").expect("a style");
        let (style, _) = rest.split_once("</style>").expect("its end");
        let hash = BASE64_STANDARD.encode(digest(&SHA256, style.as_bytes()));
        assert!(policy.contains(&hash), "what the policy allows is what stands there");
        for loads in ["url(", "@import", "http", "<link", "<img"] {
            assert!(!style.contains(loads) && !body.contains(&format!("{loads}s:")), "{loads}");
        }
        assert!(style.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn a_form_counts_only_with_its_cookie_and_from_its_own_page() {
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
