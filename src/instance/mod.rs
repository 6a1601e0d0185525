//! Running sidecars: the state file of each instance, the key that proves its identity, the client for its API, and the
//! owner of a port.
//!
//! The server is in [`daemon`](crate::daemon), the configuration in [`config`](crate::config).

pub mod client;
pub mod key;
pub mod port_owner;
pub mod state_file;

use std::collections::BTreeMap;
use std::path::PathBuf;

/// The settings of a running sidecar: names as in the configuration file, values as in an environment variable.
/// Contains only settings with a value, and no secrets.
pub type Settings = BTreeMap<String, String>;

/// The sidecar that a command is for.
#[derive(Debug, Clone)]
pub struct Selector {
    /// The directory with the state files, if there is one.
    pub state_dir: Option<PathBuf>,
    /// The project's directory, or one below it.
    pub directory: PathBuf,
    /// The port, if the user named one. It takes precedence over the directory.
    pub port: Option<u16>,
}
