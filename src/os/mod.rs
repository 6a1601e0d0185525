//! Adapters for the operating system: time, files, processes, the terminal, TLS roots, proxy variables.
//!
//! The modules know nothing of Vercel, of Connect or of the other parts of this program.

pub mod atomic_file;
pub mod child_processes;
pub mod clock;
pub mod env_proxy;
pub mod executable;
pub mod hardening;
pub mod logging;
pub mod peer;
pub mod private_dir;
pub mod safe_read;
pub mod shell_quoting;
pub mod subprocess;
pub mod terminal;
pub mod tls;
