//! The children of this process: programs that were started for a purpose of ours, each in a group of its own, and
//! orphans of a command, which the system can make ours.
//!
//! None of the former outlives what was asked of it, but for one that has left its group. Each is waited for by whoever
//! started it, and by nobody else: [`reap_adopted`] leaves alone what was started by [`spawn`].

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// The children that whoever started them waits for. It is locked while one is started: a child that is not in it is an
/// adopted one.
static STARTED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn started() -> MutexGuard<'static, BTreeSet<i32>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process group, whatever is left of which is killed when this is dropped: at once after its leader's end, or before.
#[derive(Debug)]
pub struct Group(i32);

/// Starts a program that leads a group. The child is killed with its group if it is dropped before its end.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Group)> {
    let mut started = started();
    let child = command.process_group(0).kill_on_drop(true).spawn()?;
    let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::InvalidData)?;
    started.insert(id);
    Ok((child, Group(id)))
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its number is not given to another so soon after its end.
        let _ = killpg(Pid::from_raw(self.0), Signal::SIGKILL);
        started().remove(&self.0);
    }
}

/// Makes the orphans of our children ours and not init's, where the system lists our children: then they can be waited
/// for.
#[cfg(target_os = "linux")]
pub fn adopt_orphans() {
    if std::fs::exists("/proc/thread-self/children").unwrap_or_default() {
        let _ = nix::sys::prctl::set_child_subreaper(true);
    }
}

/// Waits for adopted children that have ended. `leader` is a child that was not started by [`spawn`].
#[cfg(target_os = "linux")]
pub fn reap_adopted(leader: Pid) {
    use rustix::process::{Pid, WaitOptions, waitpid};
    let started = started();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    for child in lists.flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<i32>>()) {
        if child != leader.as_raw() && !started.contains(&child) {
            // By its number alone: whose end it is does not change between the look and the wait.
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

    /// Returns once it has ended and was not waited for.
    fn becomes_a_zombie(id: u32) {
        while state_of(id).expect("nobody has waited for it") != "Z" {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_child_that_was_started_is_left_to_who_waits_for_it_and_any_other_is_reaped() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            // As another child of this process that nothing here has started, by what the list tells.
            let adopted = std::process::Command::new("true").spawn().expect("a process").id();
            let leader = std::process::Command::new("true").spawn();
            let mut leader = leader.expect("a process");
            let (mut child, group) = spawn(Command::new("sh").args(["-c", "exit 7"])).expect("a process");
            for id in [adopted, leader.id(), child.id().expect("not waited for")] {
                becomes_a_zombie(id);
            }
            reap_adopted(Pid::from_raw(leader.id().try_into().expect("a number")));
            assert_eq!(state_of(adopted), None, "reaped");
            assert!(leader.wait().expect("left alone").success());
            assert_eq!(child.wait().await.expect("left alone").code(), Some(7));
            let id = group.0;
            assert!(started().contains(&id));
            drop(group);
            assert!(!started().contains(&id));
        });
    }
}
