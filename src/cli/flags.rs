//! The configuration that a command has by its flags.

use std::ffi::OsString;

use super::{CommandError, current_dir};
use crate::config::args::GlobalArgs;
use crate::config::{self, Config};

/// The settings of the environment, the files and these flags.
pub(super) fn load(global: &GlobalArgs) -> Result<Config, CommandError> {
    Ok(Config::load(global, &environment, &current_dir()?)?)
}

/// The same for a command whose programs are to find the sidecar, by interception too if `intercept`.
pub(super) fn load_for_programs(global: &GlobalArgs, intercept: bool) -> Result<Config, CommandError> {
    let global = config::of_a_command(global, &environment);
    Ok(match intercept {
        true => Config::load_to_intercept(&global, &environment, &current_dir()?)?,
        false => Config::load(&global, &environment, &current_dir()?)?,
    })
}

/// A variable of this process's environment.
pub(super) fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}
