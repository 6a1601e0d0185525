//! The processes of a program that was started in a group of its own: none of them outlives what was asked of it, but for
//! one that has left the group.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Child;

/// A process group, whatever is left of which is killed when this is dropped: at once after its leader's end, or before.
#[derive(Debug)]
pub struct Group(Pid);

impl Group {
    /// That of a child which leads one (`process_group(0)`) and has not been waited for; `None` if it has.
    pub fn of(child: &Child) -> Option<Self> {
        child.id().and_then(|id| i32::try_from(id).ok()).map(|id| Self(Pid::from_raw(id)))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its number is not given to another so soon after its end.
        let _ = killpg(self.0, Signal::SIGKILL);
    }
}
