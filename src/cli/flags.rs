//! Loads the configuration of a command.

use std::ffi::OsString;

use super::{CommandError, current_dir};
use crate::config::args::GlobalArgs;
use crate::config::{self, Config};

/// The settings of flags, environment and files.
pub(super) fn load(global: &GlobalArgs) -> Result<Config, CommandError> {
    Ok(Config::load(global, &environment, &current_dir()?)?)
}

/// The settings for running programs through a sidecar, with interception if `intercept`.
pub(super) fn load_for_programs(global: &GlobalArgs, intercept: bool) -> Result<Config, CommandError> {
    let global = config::with_command_defaults(global, &environment);
    Ok(match intercept {
        true => Config::load_to_intercept(&global, &environment, &current_dir()?)?,
        false => Config::load(&global, &environment, &current_dir()?)?,
    })
}

/// An environment variable of this process.
pub(super) fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}
