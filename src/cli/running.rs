//! Finds the running sidecar that a command asks.

use super::flags::environment;
use super::{CommandError, current_dir};
use crate::config::args::GlobalArgs;
use crate::config::{self, Config, ConfigError};
use crate::instance::Selector;
use crate::instance::client::{self, Client};
use crate::instance::state_file::Instance;
use crate::os::terminal::{self, escaped};
use crate::proxy::route;

/// The running sidecar that the flags select. Warns about flags and variables that the sidecar has with another value.
pub(super) async fn find(args: &GlobalArgs) -> Result<(Instance, Client), CommandError> {
    let (instance, client) = client::find(&selector(args)?).await?;
    if config::sets_compared_setting(args, &environment) {
        let (config, _) = Config::examine(args, &environment, &current_dir()?);
        // An error here is ignored: the command's own request will fail with it.
        let differences = client.status().await.map(|status| config.differences(&status.settings)).unwrap_or_default();
        for difference in differences.iter().filter(|difference| !difference.is_from_file()) {
            terminal::warn(&format!("{difference}, which counts"));
        }
    }
    Ok((instance, client))
}

/// Selects the running sidecar by flags and environment.
pub(super) fn selector(args: &GlobalArgs) -> Result<Selector, CommandError> {
    Ok(config::selector(args, &environment, &current_dir()?)?)
}

/// A connector as a path segment.
pub(super) fn segment(connector: &str) -> Result<String, ConfigError> {
    route::encode(connector).ok_or_else(|| {
        let message = format!("`{}` is none: give its uid or id, such as slack/acme-slack", escaped(connector));
        ConfigError::new("CONNECTOR", message)
    })
}
