//! The running sidecar that a command asks.

use super::flags::environment;
use super::{CommandError, current_dir};
use crate::config::args::GlobalArgs;
use crate::config::{self, Config, ConfigError, Mistake};
use crate::instance::Selector;
use crate::instance::client::{self, Client};
use crate::instance::state_file::Instance;
use crate::os::terminal::{self, escaped};
use crate::proxy::route;

/// The running sidecar that the flags mean. People are told which of the
/// settings that they have named do not count.
pub(super) async fn find(args: &GlobalArgs) -> Result<(Instance, Client), CommandError> {
    let (instance, client) = client::find(&wanted(args)?).await?;
    if config::names_settings(args, &environment) {
        let (config, _) = Config::examine(args, &environment, &current_dir()?);
        // What it is asked next says what is wrong, if something is.
        let differences = client.status().await.map(|state| config.differences(&state.settings)).unwrap_or_default();
        for difference in differences.iter().filter(|difference| !difference.is_of_a_file()) {
            terminal::warn(&format!("{difference}, which counts"));
        }
    }
    Ok((instance, client))
}

/// Which one that is.
pub(super) fn wanted(args: &GlobalArgs) -> Result<Selector, CommandError> {
    Ok(config::wanted(args, &environment, &current_dir()?)?)
}

/// A connector, as it stands in a path.
pub(super) fn segment(connector: &str) -> Result<String, ConfigError> {
    route::encode(connector).ok_or_else(|| {
        let message = format!("`{}` is none: give its uid or id, such as slack/acme-slack", escaped(connector));
        ConfigError(vec![Mistake { place: "CONNECTOR".into(), message }])
    })
}
