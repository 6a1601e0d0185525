//! The settings of a running sidecar, as it tells them to other commands, and where those of a command differ from them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::sources::{Raw, Value};
use super::{Auth, Config, DEFAULT_UPSTREAM, Refresh, values};
use crate::instance::Settings;
use crate::proxy::guard::AllowedHost;
use crate::proxy::hosts::BearerHost;

/// The settings that a command may name and find otherwise in the sidecar that runs.
pub(super) const COMPARED: [&str; 18] = [
    "upstream",
    "auth",
    "env_file",
    "team_id",
    "use_env_proxy",
    "require_key",
    "bearer_hosts",
    "connectors.allow",
    "allowed_hosts",
    "allowed_origins",
    "allow_forwarded",
    "unix_socket",
    "refresh",
    "wait",
    "warn_before",
    "cache.max_entries",
    "cache.buffer",
    "cache.max_age",
];

/// A setting that a command was given, and that the running sidecar has otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name in a file.
    pub key: &'static str,
    /// Where the command was given it: a flag, a variable, or a file with its line.
    pub place: String,
    /// The command's.
    pub here: Option<String>,
    /// The running sidecar's.
    pub running: Option<String>,
}

impl Difference {
    /// Whether it decides which credential is used, or for whom.
    pub fn is_of_the_credential(&self) -> bool {
        ["auth", "env_file", "team_id"].contains(&self.key)
    }

    /// Whether it decides where requests go.
    pub fn is_of_upstream(&self) -> bool {
        self.key == "upstream"
    }

    /// Whether a file says it, and not the command line or the environment.
    pub fn is_of_a_file(&self) -> bool {
        !self.place.starts_with("--") && !self.place.starts_with("CONNECT_SIDECAR_")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [here, running] = [&self.here, &self.running].map(|value| value.as_deref().unwrap_or("nothing"));
        write!(f, "{} says {here}, the sidecar that runs has {running}", self.place)
    }
}

impl Config {
    /// What this sidecar tells others of its settings.
    pub fn settings(&self) -> Settings {
        let (auth, env_file) = match &self.auth {
            Auth::Oidc { env_file, .. } => ("oidc", shortest(env_file).to_str().map(str::to_owned)),
            Auth::AccessToken(_) => ("access-token", None),
        };
        let bearer_host = |host: &BearerHost| match &host.origin {
            Some(origin) => format!("{host}={}", origin.to_string().trim_end_matches('/')),
            None => host.to_string(),
        };
        let allowed_host = |AllowedHost { name, port }: &AllowedHost| match port {
            Some(port) => format!("{name}:{port}"),
            None => name.clone(),
        };
        let duration = |duration| humantime::format_duration(duration).to_string();
        let list = |items: Vec<String>| Some(items.join(",")).filter(|list| !list.is_empty());
        let policy = &self.policy;
        let all = [
            ("upstream", Some(self.upstream.name())),
            ("auth", Some(auth.to_owned())),
            ("env_file", env_file),
            ("team_id", self.upstream.team_id.clone()),
            ("use_env_proxy", Some(self.upstream.use_env_proxy.to_string())),
            ("require_key", Some(policy.require_key.to_string())),
            ("bearer_hosts", Some(self.hosts.bearers().iter().map(bearer_host).collect::<Vec<_>>().join(","))),
            ("connectors.allow", self.allowed_connectors.as_ref().map(|names| Vec::from_iter(names.clone()).join(","))),
            ("allowed_hosts", list(policy.allowed_hosts.iter().map(allowed_host).collect())),
            ("allowed_origins", list(policy.allowed_origins.clone())),
            ("allow_forwarded", Some(policy.allow_forwarded.to_string())),
            ("unix_socket", self.unix_socket.as_deref().and_then(Path::to_str).map(str::to_owned)),
            ("refresh", Some(if self.refresh == Refresh::Cli { "cli" } else { "off" }.to_owned())),
            ("wait", Some(duration(self.wait))),
            ("warn_before", list(self.warn_before.iter().copied().map(duration).collect())),
            ("cache.max_entries", Some(self.cache.max_entries.to_string())),
            ("cache.buffer", Some(duration(self.cache.buffer))),
            ("cache.max_age", Some(duration(self.cache.max_age))),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// Which settings that were named here the running sidecar has otherwise.
    pub fn differences(&self, running: &Settings) -> Vec<Difference> {
        let here = self.settings();
        let difference = |key: &'static str| {
            let place = self.named.get(key)?.clone();
            let (here, running) = (here.get(key).cloned(), running.get(key).cloned());
            // One that has an access token has no file, which is told by `auth`.
            let is_none = key == "env_file" && (here.is_none() || running.is_none());
            (here != running && !is_none).then_some(Difference { key, place, here, running })
        };
        COMPARED.into_iter().filter_map(difference).collect()
    }

    /// Takes the settings of the running sidecar of `project` that decide where its requests go, by which credential, and
    /// who may ask what: all of them, or those alone that were not named here. An access token cannot be taken.
    pub fn take_settings(&mut self, running: &Settings, project: &Path, keeps_what_is_named: bool) {
        let named = if keeps_what_is_named { self.named.clone() } else { BTreeMap::new() };
        let value = |key: &str| {
            let raw = Raw::Text(running.get(key)?.clone());
            (!named.contains_key(key)).then(|| Value::of_a_variable(raw, key))
        };
        project.clone_into(&mut self.project);
        self.found_by = None;
        if let Some(origin) = value("upstream").and_then(|v| values::upstream(&v).ok()) {
            self.upstream.origin = origin;
            self.upstream.may_be_this_machine = self.upstream.name() != DEFAULT_UPSTREAM;
        }
        if let (Some(path), Auth::Oidc { env_file, shown }) = (value("env_file"), &mut self.auth)
            && let Raw::Text(path) = path.raw
        {
            *env_file = PathBuf::from(path);
            *shown = env_file.strip_prefix(project).unwrap_or(env_file).display().to_string();
        }
        if !named.contains_key("team_id") {
            self.upstream.team_id = value("team_id").and_then(|v| values::team_id(&v).ok());
        }
        if let Some(yes) = value("use_env_proxy").and_then(|v| values::boolean(&v).ok()) {
            self.upstream.use_env_proxy = yes;
        }
        if let Some(yes) = value("require_key").and_then(|v| values::boolean(&v).ok()) {
            self.policy.require_key = yes;
        }
        if let Some(hosts) = value("bearer_hosts").and_then(|v| values::bearer_hosts(&v).ok()) {
            self.hosts = hosts;
        }
        if !named.contains_key("connectors.allow") {
            self.allowed_connectors = value("connectors.allow").and_then(|v| values::names(&v).ok());
        }
        if let Some(refresh) = value("refresh").and_then(|v| values::refresh(&v).ok()) {
            self.refresh = refresh;
        }
    }
}

/// The path as it is without links and detours, where it can be found out: the file may not be there yet.
fn shortest(path: &Path) -> PathBuf {
    let of_parent = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    of_parent().unwrap_or_else(|| path.to_owned())
}
