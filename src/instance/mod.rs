//! Which sidecar runs where: the file in which each one is found, the key by which it proves itself, the client that
//! asks it, and who holds a port.
//!
//! Nothing here serves a request or reads a setting; what runs is in [`daemon`](crate::daemon), what is set in
//! [`config`](crate::config). The key goes to nobody who has not proven to hold it.

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

/// Which sidecar a command means.
#[derive(Debug, Clone)]
pub struct Selector {
    /// Where the state of running instances is kept, if there is a place.
    pub state_dir: Option<PathBuf>,
    /// The directory that the command is for: the project's, or one below it.
    pub directory: PathBuf,
    /// The port, if the user named one: then it is that, whatever its project.
    pub port: Option<u16>,
}
