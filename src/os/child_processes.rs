//! Child processes: helper programs, each in a process group of its own, and orphans of a command that Linux has
//! re-parented to this process.
//!
//! A child from [`spawn`] is waited for by its caller alone: [`reap_adopted`] skips it, because it would take the exit
//! status.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// Ids of the children from [`spawn`]. Locked while a child is started, so that every other child is an adopted one.
static STARTED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn started() -> MutexGuard<'static, BTreeSet<i32>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process group. All processes left in it are killed on drop, which must follow soon after the leader has ended.
#[derive(Debug)]
pub struct Group(i32);

/// Starts a program that leads a new process group. Both are killed if they are dropped before the program has ended.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Group)> {
    let mut started = started();
    let child = command.process_group(0).kill_on_drop(true).spawn()?;
    let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::InvalidData)?;
    started.insert(id);
    Ok((child, Group(id)))
}

impl Drop for Group {
    fn drop(&mut self) {
        // The id is not reused so soon after the end of the leader.
        let _ = killpg(Pid::from_raw(self.0), Signal::SIGKILL);
        started().remove(&self.0);
    }
}

/// Makes this process the parent of orphaned descendants, instead of init. Only if the kernel lists our children,
/// because [`reap_adopted`] needs that.
#[cfg(target_os = "linux")]
pub fn adopt_orphans() {
    if std::fs::exists("/proc/thread-self/children").unwrap_or_default() {
        let _ = nix::sys::prctl::set_child_subreaper(true);
    }
}

/// Reaps adopted children that have ended. `leader` is the child of ours that was not started by [`spawn`].
#[cfg(target_os = "linux")]
pub fn reap_adopted(leader: Pid) {
    use rustix::process::{Pid, WaitOptions, waitpid};
    let started = started();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    for child in lists.flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<i32>>()) {
        if child != leader.as_raw() && !started.contains(&child) {
            // The id cannot be reused before it has been waited for.
            let _ = waitpid(Pid::from_raw(child), WaitOptions::NOHANG);
        }
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::fs;

    fn state_of(id: u32) -> Option<String> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        Some(stat.rsplit_once(") ")?.1[..1].to_owned())
    }

    /// Returns once the process has ended without being waited for.
    fn wait_for_zombie(id: u32) {
        while state_of(id).expect("nobody has waited for it") != "Z" {
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_adopted_children_are_reaped() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            // Not from `spawn`, so it looks like an adopted child.
            let adopted = std::process::Command::new("true").spawn().expect("a process").id();
            let leader = std::process::Command::new("true").spawn();
            let mut leader = leader.expect("a process");
            let (mut child, group) = spawn(Command::new("sh").args(["-c", "exit 7"])).expect("a process");
            for id in [adopted, leader.id(), child.id().expect("not waited for")] {
                wait_for_zombie(id);
            }
            reap_adopted(Pid::from_raw(leader.id().try_into().expect("a number")));
            assert_eq!(state_of(adopted), None, "reaped");
            assert!(leader.wait().expect("not reaped").success());
            assert_eq!(child.wait().await.expect("not reaped").code(), Some(7));
            let id = group.0;
            assert!(started().contains(&id));
            drop(group);
            assert!(!started().contains(&id));
        });
    }
}
