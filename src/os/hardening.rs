//! Process-wide settings at the start: no core dumps, no access for debuggers or through `/proc` (docs/security.md M2),
//! enough file descriptors, and SIGCHLD unblocked. A setting that fails is ignored.
//!
//! A command that this process runs gets the inherited settings back.

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, Signal};

/// The wanted number of file descriptors, if the hard limit allows it.
const DESCRIPTORS: rlim_t = 8192;

/// The limits (soft and hard) and the signal mask that this process has inherited. Only soft limits are changed,
/// because a lowered hard limit cannot be raised again.
#[derive(Debug, Clone, Copy)]
pub struct Inherited {
    core: Option<(rlim_t, rlim_t)>,
    descriptors: Option<(rlim_t, rlim_t)>,
    blocked: SigSet,
}

/// Applies the settings. Call it before any secret is read and before any thread is started: threads inherit the signal
/// mask.
pub fn apply() -> Inherited {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
    let inherited = Inherited {
        core: getrlimit(Resource::RLIMIT_CORE).ok(),
        descriptors: getrlimit(Resource::RLIMIT_NOFILE).ok(),
        blocked: SigSet::thread_get_mask().unwrap_or_else(|_| SigSet::empty()),
    };
    inherited.apply_own();
    inherited
}

impl Inherited {
    /// Runs `start`, which starts another program, with the inherited settings. They apply to the whole process for
    /// that millisecond.
    pub fn during<T>(self, start: impl FnOnce() -> T) -> T {
        set(Resource::RLIMIT_CORE, self.core, |soft, _| soft);
        set(Resource::RLIMIT_NOFILE, self.descriptors, |soft, _| soft);
        let _ = self.blocked.thread_set_mask();
        let started = start();
        self.apply_own();
        started
    }

    fn apply_own(self) {
        set(Resource::RLIMIT_CORE, self.core, |_, _| 0);
        set(Resource::RLIMIT_NOFILE, self.descriptors, |soft, hard| hard.min(DESCRIPTORS).max(soft));
        // While it is blocked, the end of a child goes unnoticed.
        let _ = SigSet::from(Signal::SIGCHLD).thread_unblock();
    }
}

fn set(resource: Resource, inherited: Option<(rlim_t, rlim_t)>, soft: impl FnOnce(rlim_t, rlim_t) -> rlim_t) {
    if let Some((inherited_soft, hard)) = inherited {
        let _ = setrlimit(resource, soft(inherited_soft, hard), hard);
    }
}
