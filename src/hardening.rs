//! Keeps the process closed to others, and gives it room: no core dump, not readable by a debugger or through `/proc`
//! (trust-policy.md M2), as many descriptors as its connections need. Failing at any of it stops nothing.

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// Descriptors that are wanted, where the system allows so many.
const DESCRIPTORS: rlim_t = 8192;

/// To be called before any secret is read.
pub fn apply() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = hard.min(DESCRIPTORS).max(soft);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
    }
}
