//! Programs that are asked something, where they can change nothing: without a shell, with an environment of the caller's
//! choice, and for a limited time. Only those that [`executable`](crate::executable) lets through.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// No more is read of what a program writes, in bytes.
const MAX_OUTPUT: u64 = 64 * 1024;

/// How a program ended, and what it wrote to stdout.
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
}

/// Runs it with these variables and no others. `None` if it could not be run, or not in time; then it is killed.
pub(super) async fn ask(
    program: &Path,
    arguments: &[&OsStr],
    variables: &[(&str, OsString)],
    dir: &Path,
    limit: Duration,
) -> Option<Ended> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(variables.iter().map(|(name, value)| (name, value))).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().ok()?;
    let mut output = child.stdout.take()?.take(MAX_OUTPUT);
    let ending = async {
        let mut stdout = Vec::new();
        output.read_to_end(&mut stdout).await.ok()?;
        // Whoever goes on writing is stopped by that.
        drop(output);
        Some(Ended { code: child.wait().await.ok()?.code(), stdout })
    };
    tokio::time::timeout(limit, ending).await.ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

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
