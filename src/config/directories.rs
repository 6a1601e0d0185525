//! Directories of the user that hold state and configuration.

use std::ffi::OsString;
use std::path::PathBuf;

use super::EnvLookup;

/// Where running instances keep their state and the local CA: `$XDG_STATE_HOME/connect-sidecar`, or
/// `~/.local/state/connect-sidecar`. `None` without a home directory.
pub fn state_dir(environment: EnvLookup<'_>) -> Option<PathBuf> {
    Some(home_dir(environment, "XDG_STATE_HOME", ".local/state")?.join("connect-sidecar"))
}

/// The user's configuration directory: `$XDG_CONFIG_HOME` or `~/.config`. `None` without a home directory.
pub fn config_home(environment: EnvLookup<'_>) -> Option<PathBuf> {
    home_dir(environment, "XDG_CONFIG_HOME", ".config")
}

fn home_dir(environment: EnvLookup<'_>, variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |path: OsString| Some(PathBuf::from(path)).filter(|path| path.is_absolute());
    environment(variable).and_then(absolute).or_else(|| Some(environment("HOME").and_then(absolute)?.join(below_home)))
}
