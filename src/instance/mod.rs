//! Which sidecar runs where: the file in which each one is found, the key by which it proves itself, the client that
//! asks it, and who holds a port.
//!
//! The server is in [`daemon`](crate::daemon), the configuration in [`config`](crate::config).

pub mod client;
pub mod key;
pub mod port_owner;
pub mod run;
pub mod state_file;
pub mod status;

use std::collections::BTreeMap;
use std::path::PathBuf;

/// The settings of a running sidecar, by the names that they have in a file, written as in a variable. What is not set
/// is not there, and no secret is.
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
