//! Keeps the process closed to others, and gives it room: no core dump, not readable by a debugger or through `/proc`
//! (docs/security.md M2), as many descriptors as its connections need, and news of its children. Failing at any of it
//! stops nothing.
//!
//! All of it is for this process alone: a command that it runs must find what it would have found without it.

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, Signal};

/// Descriptors that are wanted, where the system allows so many.
const DESCRIPTORS: rlim_t = 8192;

/// What this process came with: limits, as soft and hard ones, and blocked signals. Of the limits only soft ones are ever
/// changed: those can be had back.
#[derive(Debug, Clone, Copy)]
pub struct Inherited {
    core: Option<(rlim_t, rlim_t)>,
    descriptors: Option<(rlim_t, rlim_t)>,
    blocked: SigSet,
}

/// To be called before any secret is read, and before there is another thread, which would have its signals from this one.
pub fn apply() -> Inherited {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
    let inherited = Inherited {
        core: getrlimit(Resource::RLIMIT_CORE).ok(),
        descriptors: getrlimit(Resource::RLIMIT_NOFILE).ok(),
        blocked: SigSet::thread_get_mask().unwrap_or_else(|_| SigSet::empty()),
    };
    inherited.replace();
    inherited
}

impl Inherited {
    /// Does `start`, which starts another program, under these. What else goes on in this process meanwhile is
    /// under them, too, but a program starts in a millisecond.
    pub fn during<T>(self, start: impl FnOnce() -> T) -> T {
        set(Resource::RLIMIT_CORE, self.core, |soft, _| soft);
        set(Resource::RLIMIT_NOFILE, self.descriptors, |soft, _| soft);
        let _ = self.blocked.thread_set_mask();
        let started = start();
        self.replace();
        started
    }

    fn replace(self) {
        set(Resource::RLIMIT_CORE, self.core, |_, _| 0);
        set(Resource::RLIMIT_NOFILE, self.descriptors, |soft, hard| hard.min(DESCRIPTORS).max(soft));
        // Where it is blocked, nobody hears of a child's end.
        let _ = SigSet::from(Signal::SIGCHLD).thread_unblock();
    }
}

fn set(resource: Resource, inherited: Option<(rlim_t, rlim_t)>, soft: impl FnOnce(rlim_t, rlim_t) -> rlim_t) {
    if let Some((inherited_soft, hard)) = inherited {
        let _ = setrlimit(resource, soft(inherited_soft, hard), hard);
    }
}
