//! Vercel's hosts: Connect's API, and the bearer hosts, for which the placeholder is replaced with the real OIDC token.
//! Pure.
//!
//! A bearer host is one to which Vercel's packages send `VERCEL_OIDC_TOKEN` as a bearer token. The list is fixed and
//! only trusted configuration can replace it, because anyone who could extend it could have the token sent to them.

use std::fmt;

use http::Uri;

/// The hosts of `@ai-sdk/gateway` 3.0.232, `@vercel/queue` 0.6.0, `@vercel/blob` 2.8.0 and `@vercel/sandbox` 3.5.0. The
/// last two use `vercel.com/api`, which is all of Vercel's API, so only their own paths are listed.
const DEFAULT: [&str; 7] = [
    "ai-gateway.vercel.sh",
    "*.vercel-queue.com",
    "vercel.com/api/blob",
    "*.private.blob.vercel-storage.com",
    "*.public.blob.vercel-storage.com",
    "vercel.com/api/v2/sandboxes",
    "vercel.com/api/v3/sandboxes",
];

/// The parent domain of Connect's API.
const VERCEL: &str = "vercel.com";
/// The only port at which Vercel's hosts are intercepted.
pub const HTTPS_PORT: u16 = 443;

/// A host, or some of its paths, that takes the OIDC token as a bearer token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BearerHost {
    /// The host name in lower case. A leading `*.` matches one label.
    pattern: String,
    /// The path, without a trailing slash, that includes all paths below it. Empty for all paths.
    path: String,
    /// Replaces the origin that follows from the name: `https`, or `http` on loopback.
    pub origin: Option<Uri>,
}

/// The form in the settings, without the origin.
impl fmt::Display for BearerHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.pattern, self.path)
    }
}

impl BearerHost {
    /// Parses `HOST[/PATH]`: a name of at least two labels, possibly after `*.`, and a plain path. Hosts of Vercel's
    /// API need a path, because the token gives access to the other paths, too.
    pub fn parse(text: &str) -> Option<Self> {
        let (pattern, path) = text.split_at(text.find('/').unwrap_or(text.len()));
        let path = path.strip_suffix('/').unwrap_or(path);
        let name = pattern.strip_prefix("*.").unwrap_or(pattern);
        let mut labels = name.split('.');
        let has_labels = name.contains('.') && labels.all(is_label);
        let is_address = name.ends_with(|last: char| last.is_ascii_digit());
        let is_segment = |segment: &str| {
            segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~".contains(&b)) && !segment.is_empty()
        };
        let is_valid_path = path.split('/').skip(1).all(|segment| is_segment(segment) && !segment.starts_with('.'));
        let lacks_path = path.is_empty() && (name.eq_ignore_ascii_case(VERCEL) || is_connect(name));
        (has_labels && !is_address && is_valid_path && !lacks_path).then(|| Self {
            pattern: pattern.to_ascii_lowercase(),
            path: path.to_owned(),
            origin: None,
        })
    }

    /// The same host at another origin.
    pub fn at(self, origin: Uri) -> Self {
        Self { origin: Some(origin), ..self }
    }

    /// Its name, or its parent domain if it has a wildcard.
    fn name(&self) -> &str {
        self.pattern.strip_prefix("*.").unwrap_or(&self.pattern)
    }

    fn matches(&self, host: &str) -> bool {
        match self.pattern.strip_prefix("*.") {
            None => host.eq_ignore_ascii_case(&self.pattern),
            Some(parent) => {
                host.split_once('.').is_some_and(|(label, rest)| is_label(label) && rest.eq_ignore_ascii_case(parent))
            }
        }
    }

    /// Whether a raw path is its path or below it, for any server that decodes or normalises it.
    fn covers(&self, path: &str) -> bool {
        let is_below = |rest: &str| rest.is_empty() || rest.starts_with('/');
        self.path.is_empty() || (path.strip_prefix(&self.path).is_some_and(is_below) && is_unambiguous(path))
    }
}

/// Whether a raw path stays the same when it is decoded or normalised: no empty segments except the last, none that
/// start with a dot, no separators, and only harmless ASCII characters encoded.
fn is_unambiguous(path: &str) -> bool {
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

/// Vercel's hosts.
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
    /// Connect's API and these bearer hosts.
    pub fn new(bearers: Vec<BearerHost>) -> Self {
        Self { bearers }
    }

    /// The bearer hosts.
    pub fn bearers(&self) -> &[BearerHost] {
        &self.bearers
    }

    /// Whether connections to this host are intercepted: Connect's API and bearer hosts.
    pub fn intercepts(&self, host: &str) -> bool {
        is_connect(host) || self.bearers.iter().any(|bearer| bearer.matches(host))
    }

    /// Whether an intercepted host is `name` or ends with it, even without a dot before it, as some programs match
    /// `NO_PROXY`. `name` is in lower case.
    pub fn any_ends_in(&self, name: &str) -> bool {
        // Without the wildcard.
        let suffixes = self.bearers.iter().map(|bearer| bearer.pattern.trim_start_matches('*'));
        self.intercepts(name) || suffixes.chain(["api.vercel.com"]).any(|suffix| suffix.ends_with(name))
    }

    /// The names and parent domains that cover all of them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let is_vercel =
            |name: &str| name.strip_suffix(VERCEL).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let others = self.bearers.iter().map(BearerHost::name).filter(move |name| !is_vercel(name));
        std::iter::once(VERCEL).chain(others)
    }

    /// Whether only some paths of a host take the token and this path is ambiguous.
    pub fn is_ambiguous(&self, host: &str, path: &str) -> bool {
        let mut bearers = self.bearers.iter().filter(|bearer| bearer.matches(host)).peekable();
        bearers.peek().is_some() && bearers.all(|bearer| !bearer.path.is_empty()) && !is_unambiguous(path)
    }

    /// The bearer host for a raw path on a host.
    pub fn bearer(&self, host: &str, path: &str) -> Option<&BearerHost> {
        self.bearers.iter().find(|bearer| bearer.matches(host) && bearer.covers(path))
    }
}

/// Whether a host is Connect's API, the global one or a regional one.
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
    fn recognises_the_global_and_regional_hosts_of_connect() {
        for host in ["api.vercel.com", "API.Vercel.COM", "api-iad1.vercel.com", "api-dev-1.vercel.com"] {
            assert!(is_connect(host) && Hosts::default().intercepts(host), "{host}");
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
    fn the_default_bearer_hosts_are_those_of_vercels_packages() {
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
            assert!(hosts.intercepts(host) && is_bearer(&hosts, host, path), "{host}{path}");
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
            assert!(!hosts.intercepts(host), "{host}");
        }
    }

    #[test]
    fn no_decoding_of_a_path_escapes_the_listed_one() {
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
    fn ambiguous_paths_matter_only_where_some_paths_are_listed() {
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
    fn parses_a_name_with_an_optional_plain_path() {
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
    fn lists_the_names_of_all_hosts() {
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
        fn every_intercepted_host_is_covered_by_a_name(host in "([a-z0-9-]{0,4}\\.){0,3}(vercel\\.(com|sh)|vercel-queue\\.com|a)") {
            let hosts = Hosts::default();
            let is_below = |name: &str| host.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
            prop_assert!(!hosts.intercepts(&host) || hosts.names().any(is_below));
        }

        #[test]
        fn parsing_never_panics_and_round_trips(text in "\\PC{0,40}") {
            if let Some(bearer) = BearerHost::parse(&text) {
                prop_assert_eq!(BearerHost::parse(&bearer.to_string()), Some(bearer));
            }
        }
    }
}
