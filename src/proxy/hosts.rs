//! Which hosts are Vercel's: Connect's API, and the bearer hosts, to which the real OIDC token goes in place of the
//! placeholder. Pure.
//!
//! A bearer host is one that a package of Vercel's sends `VERCEL_OIDC_TOKEN` to as its bearer. The list is fixed here and
//! is only ever replaced by trusted configuration: whoever could add to it could have the token sent to himself.

use std::fmt;

use http::Uri;

/// By what `@ai-sdk/gateway` 3.0.232, `@vercel/queue` 0.6.0, `@vercel/blob` 2.8.0 and `@vercel/sandbox` 3.5.0 do. The
/// last two use `vercel.com/api`, which is all of Vercel's API: only what is theirs there is listed.
const DEFAULT: [&str; 7] = [
    "ai-gateway.vercel.sh",
    "*.vercel-queue.com",
    "vercel.com/api/blob",
    "*.private.blob.vercel-storage.com",
    "*.public.blob.vercel-storage.com",
    "vercel.com/api/v2/sandboxes",
    "vercel.com/api/v3/sandboxes",
];

/// Connect's API is below it.
const VERCEL: &str = "vercel.com";
/// Vercel's hosts are opened at this port alone.
pub const HTTPS_PORT: u16 = 443;

/// A host, or a part of one, that takes the OIDC token as a bearer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BearerHost {
    /// In lower case. `*.` at the beginning stands for any one label.
    pattern: String,
    /// The path, without a slash at its end, that it is or is below.
    path: String,
    /// Where it is, if not where its name says: `https`, or `http` on loopback.
    pub origin: Option<Uri>,
}

/// As it is written in the settings, without the origin.
impl fmt::Display for BearerHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.pattern, self.path)
    }
}

impl BearerHost {
    /// Reads `HOST[/PATH]`: a name of at least two labels, or `*.` before one, and a plain path. Of Vercel's API, whose
    /// other paths the token opens, too, there must be a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (pattern, path) = text.split_at(text.find('/').unwrap_or(text.len()));
        let path = path.strip_suffix('/').unwrap_or(path);
        let name = pattern.strip_prefix("*.").unwrap_or(pattern);
        let mut labels = name.split('.');
        let has_labels = name.contains('.') && labels.all(is_label);
        let is_address = name.ends_with(|last: char| last.is_ascii_digit());
        let is_part =
            |part: &str| part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~".contains(&b)) && !part.is_empty();
        let has_parts = path.split('/').skip(1).all(|part| is_part(part) && !part.starts_with('.'));
        let is_too_much = path.is_empty() && (name.eq_ignore_ascii_case(VERCEL) || is_connect(name));
        (has_labels && !is_address && has_parts && !is_too_much).then(|| Self {
            pattern: pattern.to_ascii_lowercase(),
            path: path.to_owned(),
            origin: None,
        })
    }

    /// The same, found at `origin`.
    pub fn at(self, origin: Uri) -> Self {
        Self { origin: Some(origin), ..self }
    }

    /// The name that it has or is below.
    fn name(&self) -> &str {
        self.pattern.strip_prefix("*.").unwrap_or(&self.pattern)
    }

    fn is(&self, host: &str) -> bool {
        match self.pattern.strip_prefix("*.") {
            None => host.eq_ignore_ascii_case(&self.pattern),
            Some(parent) => {
                host.split_once('.').is_some_and(|(label, rest)| is_label(label) && rest.eq_ignore_ascii_case(parent))
            }
        }
    }

    /// Whether a raw path is its path or below it, however it is read.
    fn covers(&self, path: &str) -> bool {
        let is_below = |rest: &str| rest.is_empty() || rest.starts_with('/');
        self.path.is_empty() || (path.strip_prefix(&self.path).is_some_and(is_below) && is_plain(path))
    }
}

/// Whether nobody who decodes or normalises reads a raw path as another one: no empty segment but the last, none that
/// begins with a dot, and nothing that separates or is encoded but what is harmless in ASCII.
fn is_plain(path: &str) -> bool {
    let Some(path) = path.strip_prefix('/') else { return false };
    let mut segments = path.split('/').peekable();
    while let Some(segment) = segments.next() {
        if segment.starts_with('.') || (segment.is_empty() && segments.peek().is_some()) {
            return false;
        }
    }
    let is_harmless = |b: u8| (b' '..0x7F).contains(&b) && !b"/\\.%;?#".contains(&b);
    let is_literal = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@/".contains(&b);
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let is_fine = match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
                let decoded = digit().zip(digit()).and_then(|(high, low)| u8::try_from(high << 4 | low).ok());
                decoded.is_some_and(is_harmless)
            }
            byte => is_literal(byte),
        };
        if !is_fine {
            return false;
        }
    }
    true
}

/// The hosts that are Vercel's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    bearers: Vec<BearerHost>,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new(DEFAULT.into_iter().filter_map(BearerHost::parse).collect())
    }
}

impl Hosts {
    /// Connect's API, and these bearer hosts.
    pub fn new(bearers: Vec<BearerHost>) -> Self {
        Self { bearers }
    }

    /// The bearer hosts.
    pub fn bearers(&self) -> &[BearerHost] {
        &self.bearers
    }

    /// Whether interception opens what goes to this host: Connect's API or a bearer host.
    pub fn opens(&self, host: &str) -> bool {
        is_connect(host) || self.bearers.iter().any(|bearer| bearer.is(host))
    }

    /// Whether a host that is opened is `name`, is below it, or ends in it for somebody who does not look for a dot. In
    /// lower case.
    pub fn any_ends_in(&self, name: &str) -> bool {
        // Of a pattern, what follows the label that may be any.
        let ends = self.bearers.iter().map(|bearer| bearer.pattern.trim_start_matches('*'));
        self.opens(name) || ends.chain(["api.vercel.com"]).any(|end| end.ends_with(name))
    }

    /// The names that all of them have or are below.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let is_vercel =
            |name: &str| name.strip_suffix(VERCEL).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let others = self.bearers.iter().map(BearerHost::name).filter(move |name| !is_vercel(name));
        std::iter::once(VERCEL).chain(others)
    }

    /// Whether some paths of a host take the token and others do not, and this one could be read as another.
    pub fn is_ambiguous(&self, host: &str, path: &str) -> bool {
        let mut bearers = self.bearers.iter().filter(|bearer| bearer.is(host)).peekable();
        bearers.peek().is_some() && bearers.all(|bearer| !bearer.path.is_empty()) && !is_plain(path)
    }

    /// The bearer host that a raw path on a host belongs to.
    pub fn bearer(&self, host: &str, path: &str) -> Option<&BearerHost> {
        self.bearers.iter().find(|bearer| bearer.is(host) && bearer.covers(path))
    }
}

/// Whether a host is Connect's API: the global one, or that of a region.
pub fn is_connect(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    let label = host.strip_suffix(VERCEL).and_then(|rest| rest.strip_suffix('.'));
    label.is_some_and(|label| label == "api" || label.strip_prefix("api-").is_some_and(is_label))
}

fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hosts(texts: &[&str]) -> Hosts {
        Hosts::new(texts.iter().map(|text| BearerHost::parse(text).expect("a bearer host")).collect())
    }

    fn is_bearer(hosts: &Hosts, host: &str, path: &str) -> bool {
        hosts.bearer(host, path).is_some()
    }

    #[test]
    fn connects_api_is_the_global_one_and_that_of_any_region() {
        for host in ["api.vercel.com", "API.Vercel.COM", "api-iad1.vercel.com", "api-dev-1.vercel.com"] {
            assert!(is_connect(host) && Hosts::default().opens(host), "{host}");
            assert!(!is_bearer(&Hosts::default(), host, "/v1/connect/token/x"), "{host}");
        }
        for host in [
            "vercel.com",
            "api.vercel.com.",
            "api.vercel.com.evil.example",
            "api-.vercel.com",
            "api-a.b.vercel.com",
            "api-a_b.vercel.com",
            "xapi.vercel.com",
            "x.api.vercel.com",
            "evilvercel.com",
            "api.evilvercel.com",
            "apivercel.com",
            "api",
            "",
        ] {
            assert!(!is_connect(host), "{host}");
        }
    }

    #[test]
    fn the_default_bearer_hosts_are_what_vercels_packages_use() {
        let hosts = Hosts::default();
        let written: Vec<_> = hosts.bearers().iter().map(BearerHost::to_string).collect();
        assert_eq!(written, DEFAULT);
        for (host, path) in [
            ("ai-gateway.vercel.sh", "/v3/ai/language-model"),
            ("AI-Gateway.vercel.sh", "/"),
            ("iad1.vercel-queue.com", "/api/v3/topic/orders"),
            ("vercel.com", "/api/blob"),
            ("vercel.com", "/api/blob/mpu"),
            ("abc123.private.blob.vercel-storage.com", "/a/../b"),
            ("abc123.public.blob.vercel-storage.com", "/a.txt"),
            ("vercel.com", "/api/v2/sandboxes/sessions/x/cmd"),
            ("vercel.com", "/api/v3/sandboxes"),
        ] {
            assert!(hosts.opens(host) && is_bearer(&hosts, host, path), "{host}{path}");
        }
        for (host, path) in [
            ("x.ai-gateway.vercel.sh", "/"),
            ("vercel.sh", "/"),
            ("vercel-queue.com", "/"),
            ("a.b.vercel-queue.com", "/"),
            (".vercel-queue.com", "/"),
            ("blob.vercel-storage.com", "/"),
            ("x.blob.vercel-storage.com", "/"),
            ("vercel.com", "/"),
            ("vercel.com", "/api"),
            ("vercel.com", "/api/blobs"),
            ("vercel.com", "/api/v1/projects"),
            ("api.vercel.com", "/v2/sandboxes"),
            ("api.vercel.com", "/api/blob"),
            ("evil.example", "/api/blob"),
        ] {
            assert!(!is_bearer(&hosts, host, path), "{host}{path}");
        }
        for host in ["www.vercel.com", "github.com", "vercel.sh", "127.0.0.1", "localhost", ""] {
            assert!(!hosts.opens(host), "{host}");
        }
    }

    #[test]
    fn no_reading_of_a_path_leads_out_of_the_one_that_is_listed() {
        let hosts = Hosts::default();
        for path in [
            "/api/blob/..",
            "/api/blob/../v9/projects",
            "/api/blob/./../v9/projects",
            "/api/blob/x/..;/../v9/projects",
            "/api/blob/%2e%2e/v9/projects",
            "/api/blob/%2E./v9/projects",
            "/api/blob/.%2e/v9/projects",
            "/api/blob/x%2f..%2f..%2fv9",
            "/api/blob/x%2F../v9",
            "/api/blob/..\\v9",
            "/api/blob/%5c..%5cv9",
            "/api/blob/%252e%252e/v9",
            "/api/../api/blob",
            "//api/blob",
            "/API/blob",
            "/api%2fblob",
            "api/blob",
            "",
            "/api/blob//v9",
            "/api//blob",
            "/api/blob//",
            "/api/blob/;x",
            "/api/blob;x/v9",
            "/api/blob/%3bx",
            "/api/blob/x%3B..",
            "/api/blob/a%2fb",
            "/api/blob/a%2Eb",
            "/api/blob/%c0%af",
            "/api/blob/%C3%A9",
            "/api/blob/%EF%BC%8F",
            "/api/blob/\u{ff0f}v9",
            "/api/blob/é",
            "/api/blob/%00",
            "/api/blob/%0a",
            "/api/blob/%7f",
            "/api/blob/%3f",
            "/api/blob/%23",
            "/api/blob/%25",
            "/api/blob/%",
            "/api/blob/%2",
            "/api/blob/%+2",
            "/api/blob/%u002e",
            "/api/blob/a|b",
            "/api/blob/a\"b",
            "/api/blob/.hidden",
        ] {
            assert!(!is_bearer(&hosts, "vercel.com", path), "{path}");
        }
        for path in ["/api/blob/", "/api/blob/a.b", "/api/blob/a%20b:@(c)", "/api/v3/sandboxes/x%2Bz,1=2"] {
            assert!(is_bearer(&hosts, "vercel.com", path) && !hosts.is_ambiguous("vercel.com", path), "{path}");
        }
    }

    #[test]
    fn a_path_that_could_be_read_otherwise_matters_where_only_some_are_listed() {
        let hosts = hosts(&["vercel.com/api/blob", "ai.example", "both.example/v1", "both.example"]);
        for (host, path, is_ambiguous) in [
            ("vercel.com", "/api/blob/%2e%2e/v9", true),
            ("VERCEL.com", "/x;/../api/blob", true),
            ("vercel.com", "/v9/projects", false),
            ("ai.example", "/a//b/%2e%2e", false),
            ("both.example", "/v1/%2e%2e", false),
            ("other.example", "/a//b", false),
        ] {
            assert_eq!(hosts.is_ambiguous(host, path), is_ambiguous, "{host}{path}");
        }
    }

    #[test]
    fn a_bearer_host_is_a_name_and_at_most_a_plain_path() {
        for (text, written) in [
            ("ai.example", "ai.example"),
            ("AI.Example/V1/", "ai.example/V1"),
            ("*.queue.example", "*.queue.example"),
            ("api.vercel.com/v1/ai", "api.vercel.com/v1/ai"),
        ] {
            assert_eq!(BearerHost::parse(text).expect(text).to_string(), written);
        }
        for text in [
            "",
            "*",
            "*.",
            "*.com",
            "com",
            "localhost",
            "127.0.0.1",
            "[::1]",
            "a..b",
            ".a.b",
            "a.b.",
            "a.*.b",
            "a*.b.c",
            "**.a.b",
            "*.*.a.b",
            "a.b:443",
            "u@a.b",
            "https://a.b",
            "a.b//",
            "a.b//x",
            "a.b/../x",
            "a.b/.",
            "a.b/x?y",
            "a.b/x#y",
            "a.b/%78",
            "a b.c",
            "vercel.com",
            "vercel.com/",
            "VERCEL.com",
            "*.vercel.com",
            "api.vercel.com",
            "api-iad1.vercel.com",
            "a.b=c",
        ] {
            assert_eq!(BearerHost::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_names_are_vercels_own_and_those_of_the_others() {
        let names = |hosts: &Hosts| hosts.names().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            names(&Hosts::default()),
            [
                "vercel.com",
                "ai-gateway.vercel.sh",
                "vercel-queue.com",
                "private.blob.vercel-storage.com",
                "public.blob.vercel-storage.com"
            ]
        );
        let hosts = hosts(&["x.vercel.com", "evilvercel.com", "*.example.com"]);
        assert_eq!(names(&hosts), ["vercel.com", "evilvercel.com", "example.com"]);
    }

    proptest! {
        #[test]
        fn every_host_that_is_opened_has_a_name_that_is_named(host in "([a-z0-9-]{0,4}\\.){0,3}(vercel\\.(com|sh)|vercel-queue\\.com|a)") {
            let hosts = Hosts::default();
            let is_below = |name: &str| host.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
            prop_assert!(!hosts.opens(&host) || hosts.names().any(is_below));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}") {
            if let Some(bearer) = BearerHost::parse(&text) {
                prop_assert_eq!(BearerHost::parse(&bearer.to_string()), Some(bearer));
            }
        }
    }
}
