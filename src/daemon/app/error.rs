//! Errors at the start of a sidecar.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::daemon::server::unix_socket::SocketError;
use crate::instance::port_owner::Owner;
use crate::instance::state_file::Instance;
use crate::os::private_dir::Problem;

/// Why the sidecar could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// Another process listens there. Exit code 3.
    #[error("{}", port_taken(*address, owner.as_deref(), project))]
    PortTaken {
        /// The address.
        address: SocketAddr,
        /// The process, if it could be determined.
        owner: Option<Box<Owner>>,
        /// The project of the sidecar that could not start.
        project: PathBuf,
    },
    /// Any other failure to listen.
    #[error("could not listen on {0}: {1}")]
    Listen(SocketAddr, #[source] io::Error),
    /// The unix socket at this path could not be bound.
    #[error("--unix-socket {}: {}", .0.display(), .1)]
    UnixSocket(PathBuf, #[source] SocketError),
    /// No randomness for the instance key.
    #[error("could not make an instance key: {0}")]
    Key(#[source] io::Error),
    /// The key is required but could not be written where clients look for it.
    #[error(
        "could not write the instance key, which --require-key needs: {}{}",
        .0.with_command(),
        .0.advice().map_or_else(String::new, |advice| format!("; {advice}"))
    )]
    InstanceFile(#[source] Problem),
}

fn port_taken(address: SocketAddr, owner: Option<&Owner>, project: &Path) -> String {
    let taken = format!("could not listen on {address}: the port is taken");
    match owner {
        Some(Owner::Sidecar { instance: Instance { pid, url, project: same, .. }, answers: true })
            if same == project =>
        {
            format!(
                "already running here, at {url} (process {pid}, for {}): `connect-sidecar status` shows what it does; to \
                 start it anew, end it first: `kill {pid}`",
                same.display()
            )
        }
        Some(owner @ Owner::Sidecar { instance: Instance { pid, .. }, answers: false }) => {
            format!("{taken} by {owner}, which does not answer; if it is stopped: `kill -CONT {pid}`")
        }
        Some(owner) => format!("{taken} by {owner}; end that, or choose another with --port"),
        None => format!("{taken}; end that, or choose another with --port"),
    }
}

impl StartupError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PortTaken { .. } | Self::UnixSocket(_, SocketError::InUse) => 3,
            Self::UnixSocket(..) => 2,
            // An address of another machine.
            Self::Listen(_, e) if e.kind() == io::ErrorKind::AddrNotAvailable => 2,
            _ => 1,
        }
    }
}
