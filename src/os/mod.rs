//! Adapters for the operating system and its conventions: time, files, processes, the terminal, TLS roots, proxy
//! variables.
//!
//! Nothing here knows Vercel, Connect or any other part of this program, nor decides what a finding means for them.

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
