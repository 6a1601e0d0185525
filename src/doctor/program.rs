//! Programs that are asked something: found where no project can put them, run where they can change nothing.
//!
//! Found on the absolute entries of `PATH` outside the project, and only where nobody but root or we could have placed them
//! (trust-policy.md 4.14). Run without a shell, with an environment of its caller's choice, and for a limited time.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::unistd::{AccessFlags, Uid, access};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// No more is read of what a program writes, in bytes.
const MAX_OUTPUT: u64 = 64 * 1024;

/// A program on `PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// As `PATH` names it.
    pub(super) file: PathBuf,
    /// Why it is not run, if it is not.
    pub(super) refused: Option<String>,
}

/// The first program of this name that may be run; where there is none, the first that may not.
pub(super) fn find(name: &str, path: &OsStr, project: &Path) -> Option<Found> {
    let candidates = std::env::split_paths(path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
    let is_program = |file: &PathBuf| file.is_file() && access(file, AccessFlags::X_OK).is_ok();
    let found = candidates.filter(is_program).map(|file| Found { refused: refusal(&file, project), file });
    // Of several that are as good, the first.
    found.min_by_key(|found| found.refused.is_some())
}

/// The entries of a `PATH` from which programs may be run, for what a program runs itself.
pub(super) fn trusted(path: &OsStr, project: &Path) -> OsString {
    let trusted = std::env::split_paths(path).filter(|dir| dir.is_absolute() && refusal_of(dir, project).is_none());
    // What was split can be joined.
    std::env::join_paths(trusted).unwrap_or_default()
}

fn refusal(file: &Path, project: &Path) -> Option<String> {
    let named = file.parent().and_then(|dir| refusal_of(dir, project));
    named.or_else(|| refusal_of(&file.canonicalize().ok()?, project))
}

/// Why what is there is not run, if it is not: nobody but root or we may have placed it.
fn refusal_of(path: &Path, project: &Path) -> Option<String> {
    let shown = path.display();
    let (Ok(real), Ok(meta)) = (path.canonicalize(), fs::metadata(path)) else {
        return Some(format!("{shown} cannot be looked at"));
    };
    if real.starts_with(project) || [path, &real].iter().any(|path| path.ends_with("node_modules/.bin")) {
        return Some(format!("{shown} is filled by a project"));
    }
    if meta.uid() != 0 && meta.uid() != Uid::effective().as_raw() {
        return Some(format!("{shown} belongs to another user"));
    }
    (meta.mode() & 0o022 != 0).then(|| format!("others may write to {shown}"))
}

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
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn no_project_and_no_stranger_can_put_a_program_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().canonicalize().expect("a directory");
        let put = |dir: &str, dir_mode: u32, mode: u32| {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).expect("a directory");
            fs::set_permissions(&dir, Permissions::from_mode(dir_mode)).expect("a mode");
            fs::write(dir.join("tool"), "").expect("a file");
            fs::set_permissions(dir.join("tool"), Permissions::from_mode(mode)).expect("a mode");
            dir
        };
        let project = root.join("web");
        let planted = put("web/node_modules/.bin", 0o755, 0o755);
        let link = root.join("link");
        fs::create_dir(&link).expect("a directory");
        std::os::unix::fs::symlink(planted.join("tool"), link.join("tool")).expect("a link");
        let refused = [
            planted,
            link,
            put("open", 0o777, 0o755),
            put("writable", 0o755, 0o775),
            put("a/node_modules/.bin", 0o755, 0o755),
        ];
        let path = |dirs: &[PathBuf]| std::env::join_paths(dirs).expect("a path");
        let found = |dirs: &[PathBuf]| find("tool", &path(dirs), &project);
        for dir in &refused {
            let found = found(std::slice::from_ref(dir)).expect("found");
            assert!(found.refused.is_some(), "{dir:?}");
        }
        for dir in ["good".into(), put("plain", 0o755, 0o644)] {
            assert_eq!(found(&[dir]), None, "neither by a relative path nor without being a program");
        }
        let good = put("good", 0o755, 0o755);
        let all = [refused.as_slice(), std::slice::from_ref(&good)].concat();
        assert_eq!(found(&all), Some(Found { file: good.join("tool"), refused: None }));
        let [link, .., writable] = ["link", "writable"].map(|dir| root.join(dir));
        assert_eq!(trusted(&path(&all), &project), path(&[link, writable, good]), "there, the directory is good");
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
