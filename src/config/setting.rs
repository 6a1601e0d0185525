//! The list of settings with the sources that may set each, and values before they are checked.

use std::path::{Path, PathBuf};

/// A setting, by its key in a file.
pub(super) struct Setting {
    pub(super) key: &'static str,
    /// Whether a project's own file may set it. Not if it could redirect a credential or widen access.
    pub(super) in_project: bool,
    /// Whether any file may set it.
    pub(super) in_files: bool,
}

const fn setting(key: &'static str, in_project: bool, in_files: bool) -> Setting {
    Setting { key, in_project, in_files }
}

pub(super) const SETTINGS: &[Setting] = &[
    setting("port", true, true),
    setting("env_file", true, true),
    setting("warn_before", true, true),
    setting("log_level", true, true),
    setting("cache.max_entries", true, true),
    setting("cache.buffer", true, true),
    setting("cache.max_age", true, true),
    setting("connectors.allow", true, true),
    setting("upstream", false, true),
    setting("upstream_ca", false, true),
    setting("auth", false, true),
    setting("team_id", false, true),
    setting("allowed_hosts", false, true),
    setting("allowed_origins", false, true),
    setting("bearer_hosts", false, true),
    setting("allow_forwarded", false, true),
    setting("require_key", false, true),
    setting("unix_socket", false, true),
    setting("use_env_proxy", false, true),
    setting("refresh", false, true),
    setting("wait", true, true),
    setting("desktop_notices", true, true),
    setting("dangerously_listen_on_network", false, false),
    setting("log_format", false, false),
];

/// A value before it is checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RawValue {
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<String>),
    /// Any other type.
    Other,
}

/// A value and where it comes from.
#[derive(Debug, Clone)]
pub(super) struct SettingValue {
    pub(super) raw: RawValue,
    /// As shown to people: `--port`, `CONNECT_SIDECAR_PORT`, `sidecar.toml:3: port`.
    pub(super) location: String,
    /// From a file, where values have types.
    pub(super) is_from_file: bool,
    /// From an environment variable, where lists are separated by commas.
    pub(super) is_from_variable: bool,
    /// From the project's own file.
    pub(super) is_from_project: bool,
    /// The directory that a relative path is resolved against.
    pub(super) base: PathBuf,
}

impl SettingValue {
    /// A value of a flag.
    pub(super) fn from_flag(raw: RawValue, flag: &str, base: &Path) -> Self {
        Self {
            raw,
            location: flag.to_owned(),
            is_from_file: false,
            is_from_variable: false,
            is_from_project: false,
            base: base.to_owned(),
        }
    }

    /// A value of an environment variable.
    pub(super) fn from_variable(raw: RawValue, name: &str, base: &Path) -> Self {
        Self { is_from_variable: true, ..Self::from_flag(raw, name, base) }
    }
}

/// The values of one source, each with the key of its setting.
pub(super) type Layer = Vec<(&'static str, SettingValue)>;
