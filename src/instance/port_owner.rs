//! Who holds a port: another sidecar, by its own file, or whichever process the system shows.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use crate::instance::client;
use crate::instance::state_file::{self, Instance};

/// Whoever listens there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Another of ours.
    Sidecar {
        /// What its file says.
        instance: Instance,
        /// Whether it answers.
        answers: bool,
    },
    /// Any other process.
    Process {
        /// Its number.
        pid: u32,
        /// What it calls itself.
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

/// Who listens at an address, where that can be found out: others' processes are not shown to everybody.
pub async fn find(address: SocketAddr, state_dir: Option<&Path>) -> Option<Owner> {
    let holds_it = |l: &listeners::Listener| {
        let held = l.socket;
        held.port() == address.port()
            && (held.ip() == address.ip() || held.ip().is_unspecified() || address.ip().is_unspecified())
            && l.state == listeners::SocketState::Listen
    };
    let process = listeners::get_all().ok().and_then(|all| all.into_iter().find(holds_it)).map(|l| l.process);
    let instance = state_dir.and_then(|dir| state_file::of_port(dir, address.port()));
    match (process, instance) {
        // Who holds it cannot be seen of a sidecar, which is closed to others: then its own file tells.
        (process, Some(instance)) if process.as_ref().map_or(instance.is_running(), |p| p.pid == instance.pid) => {
            let answers = !client::is_silent(&instance).await;
            Some(Owner::Sidecar { instance, answers })
        }
        (process, _) => process.map(|process| Owner::Process { pid: process.pid, name: process.name }),
    }
}
