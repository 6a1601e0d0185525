//! Programs that are asked something, where they can change nothing: without a shell, with an environment of the caller's
//! choice, and for a limited time. Only those that [`executable`](crate::os::executable) lets through.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::os::process_group;

/// No more is read of what a program writes, in bytes.
const MAX_OUTPUT: u64 = 64 * 1024;

/// How a program ended, and what it wrote to stdout.
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
}

/// Runs it with these variables and no others. `None` if it could not be run, or not in time. What is left
/// of it and its children then is killed.
pub(super) async fn ask(
    program: &Path,
    arguments: &[&OsStr],
    variables: &[(&str, OsString)],
    dir: &Path,
    limit: Duration,
) -> Option<Ended> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(variables.iter().map(|(name, value)| (name, value))).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let (mut child, group) = process_group::spawn(&mut command).ok()?;
    let mut output = child.stdout.take()?.take(MAX_OUTPUT);
    let ending = async {
        let mut stdout = Vec::new();
        output.read_to_end(&mut stdout).await.ok()?;
        // Whoever goes on writing is stopped by that.
        drop(output);
        let status = child.wait().await;
        drop(group);
        Some(Ended { code: status.ok()?.code(), stdout })
    };
    tokio::time::timeout(limit, ending).await.ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn its_children_are_killed_when_it_ends_or_is_given_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let patience = Duration::from_secs(20);
        for (script, ends) in [("sleep 60 >pipe & wait", false), ("exec 3>pipe; sleep 60 >/dev/null & exit 0", true)] {
            let arguments = ["-c".as_ref(), script.as_ref()];
            let asking = ask(Path::new("/bin/sh"), &arguments, &[], dir.path(), patience);
            let pipe = pipe.clone();
            let opening = tokio::task::spawn_blocking(move || std::fs::File::open(pipe));
            let began = async { opening.await.expect("no panic").expect("a reading end") };
            let mut pipe = if ends {
                let (asked, pipe) = tokio::join!(asking, began);
                assert!(asked.is_some(), "{script}");
                pipe
            } else {
                tokio::select! { _ = asking => panic!("it goes on: {script}"), pipe = began => pipe }
            };
            // Ends once nobody has the writing end.
            let reading = tokio::task::spawn_blocking(move || std::io::copy(&mut pipe, &mut std::io::sink()));
            assert!(tokio::time::timeout(patience, reading).await.is_ok(), "a child goes on: {script}");
        }
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_given_up_and_one_that_babbles_is_cut_short() {
        let asked = ask(Path::new("/bin/sleep"), &["60".as_ref()], &[], Path::new("/"), Duration::from_millis(1)).await;
        assert!(asked.is_none());
        let patience = Duration::from_secs(20);
        let babble = ask(Path::new("/bin/cat"), &["/dev/zero".as_ref()], &[], Path::new("/"), patience).await;
        let babble = babble.expect("an end");
        assert_eq!((babble.stdout.len(), babble.code), (64 * 1024, None), "ended by a signal");
    }
}
