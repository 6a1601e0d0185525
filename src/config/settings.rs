//! The settings that a sidecar reports, and where a command's own settings differ from them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::setting::{RawValue, SettingValue};
use super::{Auth, Config, DEFAULT_UPSTREAM, RefreshMode, values};
use crate::instance::Settings;
use crate::proxy::guard::AllowedHost;
use crate::proxy::hosts::BearerHost;

/// The settings of a command that are compared with the running sidecar's.
pub(super) const COMPARED_SETTINGS: [&str; 18] = [
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

/// A setting of a command that the running sidecar has with another value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its key in a file.
    pub key: &'static str,
    /// Where the command's value comes from: a flag, a variable, or a file with its line.
    pub location: String,
    /// The command's value.
    pub here: Option<String>,
    /// The running sidecar's value.
    pub running: Option<String>,
}

impl Difference {
    /// Whether the setting determines the credential or its team.
    pub fn affects_credential(&self) -> bool {
        ["auth", "env_file", "team_id"].contains(&self.key)
    }

    /// Whether the setting determines where requests go.
    pub fn affects_upstream(&self) -> bool {
        self.key == "upstream"
    }

    /// Whether the command's value comes from a file, not from the command line or the environment.
    pub fn is_from_file(&self) -> bool {
        !self.location.starts_with("--") && !self.location.starts_with("CONNECT_SIDECAR_")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [here, running] = [&self.here, &self.running].map(|value| value.as_deref().unwrap_or("nothing"));
        write!(f, "{} says {here}, the sidecar that runs has {running}", self.location)
    }
}

impl Config {
    /// The settings as a sidecar reports them to other commands.
    pub fn settings(&self) -> Settings {
        let (auth, env_file) = match &self.auth {
            Auth::Oidc { env_file, .. } => ("oidc", canonical(env_file).to_str().map(str::to_owned)),
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
            ("refresh", Some(if self.refresh == RefreshMode::Cli { "cli" } else { "off" }.to_owned())),
            ("wait", Some(duration(self.wait))),
            ("warn_before", list(self.warn_before.iter().copied().map(duration).collect())),
            ("cache.max_entries", Some(self.cache.max_entries.to_string())),
            ("cache.buffer", Some(duration(self.cache.buffer))),
            ("cache.max_age", Some(duration(self.cache.max_age))),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// The explicit settings of this configuration that the running sidecar has with another value.
    pub fn differences(&self, running: &Settings) -> Vec<Difference> {
        let here = self.settings();
        let difference = |key: &'static str| {
            let location = self.explicit.get(key)?.clone();
            let (here, running) = (here.get(key).cloned(), running.get(key).cloned());
            // With an access token there is no env file; that difference is reported for `auth`.
            let is_absent = key == "env_file" && (here.is_none() || running.is_none());
            (here != running && !is_absent).then_some(Difference { key, location, here, running })
        };
        COMPARED_SETTINGS.into_iter().filter_map(difference).collect()
    }

    /// Adopts the running sidecar's settings that determine its project, upstream, credential and access policy. With
    /// `keep_explicit`, settings that are explicit in this configuration stay. An access token cannot be adopted.
    pub fn adopt_settings(&mut self, running: &Settings, project: &Path, keep_explicit: bool) {
        let explicit = if keep_explicit { self.explicit.clone() } else { BTreeMap::new() };
        let value = |key: &str| {
            let raw = RawValue::Text(running.get(key)?.clone());
            (!explicit.contains_key(key)).then(|| SettingValue::from_variable(raw, key, Path::new("")))
        };
        project.clone_into(&mut self.project);
        self.project_marker = None;
        if let Some(origin) = value("upstream").and_then(|v| values::upstream(&v).ok()) {
            self.upstream.origin = origin;
            self.upstream.may_be_this_machine = self.upstream.name() != DEFAULT_UPSTREAM;
        }
        if let (Some(path), Auth::Oidc { env_file, shown }) = (value("env_file"), &mut self.auth)
            && let RawValue::Text(path) = path.raw
        {
            *env_file = PathBuf::from(path);
            *shown = env_file.strip_prefix(project).unwrap_or(env_file).display().to_string();
        }
        if !explicit.contains_key("team_id") {
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
        if !explicit.contains_key("connectors.allow") {
            self.allowed_connectors = value("connectors.allow").and_then(|v| values::names(&v).ok());
        }
        if let Some(refresh) = value("refresh").and_then(|v| values::refresh(&v).ok()) {
            self.refresh = refresh;
        }
    }
}

/// The path with the links of its directory resolved, if possible. The file itself may not exist yet.
fn canonical(path: &Path) -> PathBuf {
    let of_parent = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    of_parent().unwrap_or_else(|| path.to_owned())
}
