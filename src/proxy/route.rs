//! Finds the route of a raw path, which is one of five, and its connector. Pure.
//!
//! The bearer token gives access to more than these routes, so a path that any server could take for another one is
//! refused. The bytes are compared with what is allowed and never normalised (docs/security.md P). The connector is
//! decoded once, for checks and messages; upstream gets the raw bytes.

use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::error::{Code, RequestError};

/// Maximum length of the connector segment, in bytes.
const MAX_SEGMENT_BYTES: usize = 512;
/// Maximum number of parts of a connector. `mcp.linear.app/a/b` has three.
const MAX_PARTS: usize = 3;

/// Connect's subresources of a connector (docs/vercel.md sections 1.1 and 1.4).
const SUBRESOURCES: [&str; 5] = ["import", "tokens", "projects", "contacts", "trigger-destinations"];

/// The purpose of a request to Connect (docs/vercel.md section 1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Get a provider token.
    Token,
    /// Start a user's consent.
    Authorize,
    /// Start an installation.
    Install,
    /// Get a connector's metadata.
    Metadata,
    /// Revoke a subject's grants.
    Revoke,
}

impl Action {
    const fn method(self) -> Method {
        match self {
            Self::Token | Self::Authorize | Self::Install => Method::POST,
            Self::Metadata => Method::GET,
            Self::Revoke => Method::DELETE,
        }
    }

    /// A name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Authorize => "authorize",
            Self::Install => "install",
            Self::Metadata => "metadata",
            Self::Revoke => "revoke",
        }
    }
}

/// A request's route.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// The purpose.
    pub action: Action,
    /// The connector, decoded: `slack/acme-slack` or `scl_…`.
    pub connector: String,
}

/// Finds the route of a request and checks its method, connector and query, in this order.
pub fn parse(method: &Method, path: &str, query: Option<&str>) -> Result<Route, RequestError> {
    let (action, segment) = find(path)?;
    if *method != action.method() {
        return Err(RequestError::method_not_allowed(match action.method() {
            Method::GET => "GET",
            Method::DELETE => "DELETE",
            _ => "POST",
        }));
    }
    let connector = decode(segment).ok_or_else(|| {
        RequestError::new(
            Code::BadConnector,
            "The connector must be one percent-encoded segment such as `slack%2Facme-slack`.",
        )
    })?;
    if query.is_some() {
        return Err(RequestError::new(Code::QueryNotAllowed, "Connect's routes take no query string here."));
    }
    Ok(Route { action, connector })
}

/// The route's action and raw segment.
fn find(path: &str) -> Result<(Action, &str), RequestError> {
    let not_found = |mistake: Option<String>| {
        let error = RequestError::new(
            Code::RouteNotFound,
            match &mistake {
                None => "No such path. See `POST /v1/connect/token/{connector}`.".to_owned(),
                Some(path) => format!("The connector is one path segment: encode its `/` as `%2F`, as in `{path}`."),
            },
        );
        match mistake {
            None => error,
            Some(path) => error.hint(path),
        }
    };
    let (kind, rest) =
        path.strip_prefix("/v1/connect/").and_then(|rest| rest.split_once('/')).ok_or_else(|| not_found(None))?;
    let (action, segment, suffix) = match kind {
        "token" => (Action::Token, rest, ""),
        "authorize" => (Action::Authorize, rest, ""),
        "install" => (Action::Install, rest, ""),
        "connectors" => match rest.strip_suffix("/tokens") {
            Some(segment) => (Action::Revoke, segment, "/tokens"),
            None => (Action::Metadata, rest, ""),
        },
        _ => return Err(not_found(None)),
    };
    if segment.is_empty() {
        return Err(not_found(None));
    }
    if segment.contains('/') {
        // Probably an unencoded `slack/acme-slack`, unless it is `x/import` or a trailing slash.
        let is_other_path = |part| matches!(part, "" | "managed") || SUBRESOURCES.contains(&part);
        let is_unencoded = !segment.split('/').any(is_other_path);
        return Err(not_found(is_unencoded.then(|| {
            let encoded: String = segment.replace('/', "%2F").chars().filter(char::is_ascii_graphic).take(64).collect();
            format!("/v1/connect/{kind}/{encoded}{suffix}")
        })));
    }
    Ok((action, segment))
}

/// Encodes a connector as one segment, like the SDKs (`encodeURIComponent`); `None` if it is not a valid connector.
pub fn encode(connector: &str) -> Option<String> {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'!')
        .remove(b'~')
        .remove(b'*')
        .remove(b'\'')
        .remove(b'(')
        .remove(b')');
    let segment = utf8_percent_encode(connector, ENCODED).to_string();
    decode(&segment).map(|_| segment)
}

/// Decodes a raw segment; `None` if it is not a valid connector.
pub fn decode(segment: &str) -> Option<String> {
    if segment.len() > MAX_SEGMENT_BYTES {
        return None;
    }
    let mut decoded = Vec::with_capacity(segment.len());
    let (mut part_start, mut parts) = (0, 1);
    let mut rest = segment.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        let byte = match (*byte, after) {
            (byte, _) if UNENCODED[usize::from(byte)] => byte,
            (b'%', [high, low, after @ ..]) => {
                rest = after;
                let byte = hex_digit(*high)? << 4 | hex_digit(*low)?;
                match byte {
                    ..0x20 | 0x7F | b'\\' | b'%' | b'?' | b'#' => return None,
                    b'/' if !is_part(&decoded[part_start..]) => return None,
                    b'/' => {
                        part_start = decoded.len() + 1;
                        parts += 1;
                    }
                    _ => {}
                }
                byte
            }
            _ => return None,
        };
        decoded.push(byte);
    }
    let last = &decoded[part_start..];
    // `…/token/{connector}/import` stores a token, so a decoded connector must not look like a subresource.
    let is_subresource = |part: &[u8]| SUBRESOURCES.iter().any(|name| part == name.as_bytes());
    if !is_part(last) || decoded.split(|b| *b == b'/').any(is_subresource) || parts > MAX_PARTS {
        return None;
    }
    let connector = String::from_utf8(decoded).ok()?;
    // Non-ASCII text may contain further control characters.
    (connector.is_ascii() || !connector.chars().any(char::is_control)).then_some(connector)
}

fn is_part(part: &[u8]) -> bool {
    !matches!(part, b"" | b"." | b"..")
}

/// The characters that need no encoding in a segment (RFC 3986, `pchar`).
const UNENCODED: [bool; 256] = {
    let mut table = [false; 256];
    let plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:@";
    let mut i = 0;
    while i < plain.len() {
        table[plain[i] as usize] = true;
        i += 1;
    }
    table
};

const fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_code(method: &Method, target: &str) -> &'static str {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        parse(method, path, query).err().map_or("ok", |e| e.code.as_str())
    }

    #[test]
    fn knows_the_five_routes() {
        for (method, path, action, name) in [
            (Method::POST, "/v1/connect/token/slack%2Facme-slack", Action::Token, "token"),
            (Method::POST, "/v1/connect/authorize/slack%2facme-slack", Action::Authorize, "authorize"),
            (Method::POST, "/v1/connect/install/slack%2Facme-slack", Action::Install, "install"),
            (Method::GET, "/v1/connect/connectors/slack%2Facme-slack", Action::Metadata, "metadata"),
            (Method::DELETE, "/v1/connect/connectors/slack%2Facme-slack/tokens", Action::Revoke, "revoke"),
        ] {
            let route = Route { action, connector: "slack/acme-slack".into() };
            assert_eq!(parse(&method, path, None), Ok(route), "{path}");
            assert_eq!(action.as_str(), name, "the name in the log");
        }
    }

    #[test]
    fn refuses_other_paths() {
        for path in [
            "/",
            "/v1",
            "/v1/connect",
            "/v1/connect/",
            "/v1/connect/token",
            "/v1/connect/token/",
            "/v1/connect/tokens/x",
            "/V1/connect/token/x",
            "/v1/connect/Token/x",
            "/v1/connect/token/x/",
            "/v1/connect/token/x/import",
            "/v1/connect/token/slack%2Facme/import",
            "/v1/connect/connectors",
            "/v1/connect/connectors/",
            "/v1/connect/connectors//tokens",
            "/v1/connect/connectors/x/projects",
            "/v1/connect/networks/x",
            "/v1/kms/issuers/x/sign/token",
            "/v1/projects/x/token",
            "/v2/connect/token/x",
            "/v1/connect/token/../x",
        ] {
            assert_eq!(check_code(&Method::POST, path), "route_not_found", "{path}");
        }
    }

    #[test]
    fn explains_an_unencoded_slash() {
        for (path, fixed) in [
            ("/v1/connect/token/slack/acme", "/v1/connect/token/slack%2Facme"),
            ("/v1/connect/connectors/slack/acme/tokens", "/v1/connect/connectors/slack%2Facme/tokens"),
        ] {
            let error = parse(&Method::POST, path, None).expect_err("not found");
            assert_eq!((error.code, &*error.remedy.hint), (Code::RouteNotFound, fixed));
            assert!(error.message.contains("%2F"), "{}", error.message);
        }
        for path in [
            "/v1/connect/token/x/",
            "/v1/connect/token/x/import",
            "/v1/connect/connectors/x/projects",
            "/v1/connect/connectors/x/projects/prj_1",
            "/v1/connect/connectors/managed/oauth",
        ] {
            assert_eq!(
                parse(&Method::POST, path, None).expect_err("not found").remedy,
                Code::RouteNotFound.remedy().into(),
                "{path}"
            );
        }
    }

    #[test]
    fn each_route_has_one_method() {
        for (path, allowed) in [
            ("/v1/connect/token/x", "POST"),
            ("/v1/connect/authorize/x", "POST"),
            ("/v1/connect/install/x", "POST"),
            ("/v1/connect/connectors/x", "GET"),
            ("/v1/connect/connectors/x/tokens", "DELETE"),
        ] {
            for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "FOO"] {
                let method: Method = method.parse().expect("a method");
                match parse(&method, path, None) {
                    Ok(_) => assert_eq!(method.as_str(), allowed, "{path}"),
                    Err(error) => {
                        assert_eq!(
                            (error.code, error.allow),
                            (Code::MethodNotAllowed, Some(allowed)),
                            "{method} {path}"
                        );
                        assert_ne!(method.as_str(), allowed);
                    }
                }
            }
        }
    }

    #[test]
    fn refuses_ambiguous_connectors() {
        for segment in [
            "..",
            "%2e%2e",
            ".%2E",
            ".",
            "a%2F..%2Fb",
            "a%2F.%2Fb",
            "%2Fa",
            "a%2F",
            "a%2F%2Fb",
            "a%2Fb%2Fc%2Fd",
            "a%252Fb",
            "%25",
            "%252e%252e",
            "a%255Cb",
            "a%5Cb",
            "a%00b",
            "a%0Ab",
            "a%7Fb",
            "a%C2%85b",
            "%FF",
            "%C3",
            "%2",
            "%",
            "%zz",
            "%+1",
            "a%3Fb",
            "a%23b",
            "slack%2Fimport",
            "import",
            "slack%2Ftokens",
            "slack%2Fprojects",
            "slack%2Fprojects%2Fprj_1",
            "slack%2Fcontacts",
            "slack%2Ftrigger-destinations",
            "a b",
            "a\"b",
            "é",
            "a|b",
            "a\\b",
        ] {
            assert_eq!(
                check_code(&Method::POST, &format!("/v1/connect/token/{segment}")),
                "bad_connector",
                "{segment}"
            );
        }
        let long = |n: usize| format!("/v1/connect/token/{}", "a".repeat(n));
        assert_eq!(check_code(&Method::POST, &long(512)), "ok");
        assert_eq!(check_code(&Method::POST, &long(513)), "bad_connector");
        assert_eq!(check_code(&Method::POST, "/v1/connect/token/mcp.linear.app%2Fx%2Fy"), "ok");
        assert_eq!(check_code(&Method::POST, "/v1/connect/token/scl_01:a@b!$&'()*+,;=~"), "ok");
        assert_eq!(check_code(&Method::POST, "/v1/connect/token/caf%C3%A9"), "ok");
    }

    #[test]
    fn encoding_and_decoding_round_trips() {
        assert_eq!(encode("slack/acme-slack").as_deref(), Some("slack%2Facme-slack"));
        for connector in ["scl_slack", "mcp.linear.app/x", "a b/(c)!~*'", "é/ü", "a&b=c;d@e"] {
            assert_eq!(encode(connector).and_then(|segment| decode(&segment)).as_deref(), Some(connector));
        }
        for other in ["", "/", "..", "a//b", "a/../b", "slack%2Facme", "a?b", "a\n"] {
            assert_eq!(encode(other), None, "{other:?}");
        }
    }

    #[test]
    fn refuses_any_query() {
        for query in ["?", "?a=1", "?teamId=t"] {
            assert_eq!(
                check_code(&Method::POST, &format!("/v1/connect/token/x{query}")),
                "query_not_allowed",
                "{query}"
            );
        }
        assert_eq!(
            check_code(&Method::POST, "/v1/connect/token/%25?x"),
            "bad_connector",
            "the connector is checked first"
        );
        assert_eq!(
            check_code(&Method::GET, "/v1/connect/token/%25?x"),
            "method_not_allowed",
            "the method is checked before it"
        );
    }

    proptest! {
        #[test]
        fn no_accepted_path_decodes_to_another_route(segment in "[a-z0-9./%~;:@!?#\\\\2eEfF5cC-]{1,24}") {
            for prefix in ["/v1/connect/token/", "/v1/connect/connectors/"] {
                let path = format!("{prefix}{segment}");
                let method = if prefix.contains("token/") { Method::POST } else { Method::GET };
                let Ok(route) = parse(&method, &path, None) else { continue };
                // Decoded any number of times, it stays below the prefix and keeps its last part.
                let mut current = path.clone();
                for _ in 0..3 {
                    let decoded = decode_leniently(&current);
                    prop_assert!(decoded.starts_with(prefix));
                    prop_assert!(!decoded.split('/').any(|part| part == ".." || part == "."));
                    let is_subresource = |part| SUBRESOURCES.contains(&part);
                    prop_assert!(!decoded[prefix.len()..].split('/').any(is_subresource));
                    prop_assert!(!decoded.contains("//"));
                    prop_assert_eq!(&decoded, &format!("{prefix}{}", route.connector));
                    current = decoded;
                }
            }
        }
    }

    fn decode_leniently(path: &str) -> String {
        let mut out = Vec::new();
        let bytes = path.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            let hex = path.get(i + 1..i + 3).and_then(|h| u8::from_str_radix(h, 16).ok());
            match (bytes[i], hex) {
                (b'%', Some(byte)) => {
                    out.push(byte);
                    i += 3;
                }
                (byte, _) => {
                    out.push(byte);
                    i += 1;
                }
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    }
}
