//! The process that listens on a port: a sidecar with a state file, or any other process that the system shows.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use crate::instance::client;
use crate::instance::state_file::{self, Instance};

/// The owner of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A sidecar of the same user.
    Sidecar {
        /// Its state file.
        instance: Instance,
        /// Whether it responds to requests.
        answers: bool,
    },
    /// Any other process.
    Process {
        /// The process id.
        pid: u32,
        /// The name of the process.
        name: String,
    },
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sidecar { instance: Instance { pid, project, .. }, .. } => {
                write!(f, "another connect-sidecar (process {pid}) for {}", project.display())
            }
            Self::Process { pid, name } => write!(f, "{name} (process {pid})"),
        }
    }
}

/// Finds the owner of an address, if possible: the system may hide processes of other users.
pub async fn find(address: SocketAddr, state_dir: Option<&Path>) -> Option<Owner> {
    let is_owner = |l: &listeners::Listener| {
        let socket = l.socket;
        socket.port() == address.port()
            && (socket.ip() == address.ip() || socket.ip().is_unspecified() || address.ip().is_unspecified())
            && l.state == listeners::SocketState::Listen
    };
    let process = listeners::get_all().ok().and_then(|all| all.into_iter().find(is_owner)).map(|l| l.process);
    let instance = state_dir.and_then(|dir| state_file::of_port(dir, address.port()));
    match (process, instance) {
        // The system hides the process of a sidecar, which is not dumpable; its state file identifies it.
        (process, Some(instance)) if process.as_ref().map_or(instance.is_running(), |p| p.pid == instance.pid) => {
            let answers = !client::is_unresponsive(&instance).await;
            Some(Owner::Sidecar { instance, answers })
        }
        (process, _) => process.map(|process| Owner::Process { pid: process.pid, name: process.name }),
    }
}
