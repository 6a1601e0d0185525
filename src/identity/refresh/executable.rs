//! Which file the Vercel CLI is, if one is safe to run (trust-policy.md 4.14).
//!
//! What a project brings along is never run: not from the project itself, not from the `node_modules/.bin` of a
//! directory above it, which package managers put on PATH. Nor is what another user could have put there or changed.
//! Only files and their own directories are looked at; who could replace a directory above them is not asked.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// Its name on PATH.
pub const NAME: &str = "vercel";

/// A CLI that may be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executable {
    /// The file itself, all links followed.
    pub file: PathBuf,
    /// The entries of PATH from which programs may be run, for what it runs itself: its first line asks for `node`.
    pub path: OsString,
}

/// The first CLI on `path` that may be run. An error is the reason for people, and names the first that may not.
///
/// Asked for anew before each run: what was judged is what is run, and an upgrade may move it.
pub fn find(path: &OsStr, project: &Path) -> Result<Executable, String> {
    let mut accepted = Vec::new();
    let mut found = None;
    let mut refused = None;
    for entry in std::env::split_paths(path).filter(|entry| entry.is_absolute()) {
        let candidate = entry.join(NAME);
        let judged = match judge_directory(&entry, project) {
            Ok(directory) => {
                accepted.push(directory);
                judge_file(&candidate, project)
            }
            Err(reason) => Err(reason),
        };
        match judged {
            Ok(file) => found = found.or(Some(file)),
            Err(reason) if candidate.exists() => refused = refused.or(Some((candidate, reason))),
            Err(_) => {}
        }
    }
    match (found, refused) {
        (Some(file), _) => {
            let path = std::env::join_paths(accepted).map_err(|e| format!("PATH cannot be passed on: {e}"))?;
            Ok(Executable { file, path })
        }
        (None, Some((candidate, reason))) => {
            Err(format!("the Vercel CLI at {} is not run: {reason}", candidate.display()))
        }
        (None, None) => Err("the Vercel CLI is not on PATH, `npm install --global vercel` puts it there".into()),
    }
}

/// The directory, all links followed, if programs in it may be run.
fn judge_directory(entry: &Path, project: &Path) -> Result<PathBuf, String> {
    let directory = entry.canonicalize().map_err(|e| format!("its directory cannot be looked at ({})", e.kind()))?;
    if [entry, &directory].iter().any(|path| path.ends_with("node_modules/.bin")) {
        return Err("it is in node_modules/.bin, which a project fills".into());
    }
    refuse_in_project(&[entry, &directory], project)?;
    refuse_foreign(&directory)?;
    Ok(directory)
}

fn judge_file(candidate: &Path, project: &Path) -> Result<PathBuf, String> {
    let file = candidate.canonicalize().map_err(|e| format!("it cannot be looked at ({})", e.kind()))?;
    refuse_in_project(&[&file], project)?;
    if !fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0) {
        return Err("it is no executable file".into());
    }
    refuse_foreign(&file)?;
    refuse_foreign(file.parent().unwrap_or(Path::new("/")))?;
    Ok(file)
}

fn refuse_in_project(paths: &[&Path], project: &Path) -> Result<(), String> {
    match paths.iter().any(|path| path.starts_with(project)) {
        true => Err("it is inside the project, which may have planted it".into()),
        false => Ok(()),
    }
}

fn refuse_foreign(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let meta: Metadata = fs::metadata(path).map_err(|e| format!("{shown} cannot be looked at ({})", e.kind()))?;
    if meta.uid() != 0 && meta.uid() != Uid::effective().as_raw() {
        return Err(format!("{shown} belongs to another user"));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("others may write to {shown}, `chmod go-w` it if that is not meant"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    struct Machine(TempDir);

    impl Machine {
        fn new() -> Self {
            let this = Self(tempfile::tempdir().expect("a directory"));
            fs::create_dir(this.at("project")).expect("a project");
            this
        }

        /// Without links on the way, as a project's directory is known.
        fn at(&self, path: &str) -> PathBuf {
            self.0.path().canonicalize().expect("a directory").join(path)
        }

        /// A CLI in a directory, both with these modes.
        fn cli(&self, directory: &str, directory_mode: u32, mode: u32) -> PathBuf {
            let directory = self.at(directory);
            fs::create_dir_all(&directory).expect("a directory");
            let file = directory.join(NAME);
            fs::write(&file, "#!/bin/sh\n").expect("written");
            fs::set_permissions(&file, Permissions::from_mode(mode)).expect("a mode");
            fs::set_permissions(&directory, Permissions::from_mode(directory_mode)).expect("a mode");
            file
        }

        fn find(&self, entries: &[&str]) -> Result<Executable, String> {
            let entries = entries.iter().map(|entry| match entry.strip_prefix("./") {
                Some(relative) => PathBuf::from(relative),
                None => self.at(entry),
            });
            find(&std::env::join_paths(entries).expect("a PATH"), &self.at("project"))
        }
    }

    #[test]
    fn the_first_that_may_be_run_is_found_with_the_entries_that_are_fit() {
        let machine = Machine::new();
        machine.cli("project/node_modules/.bin", 0o755, 0o755);
        machine.cli("open", 0o777, 0o755);
        let good = machine.cli("bin", 0o755, 0o755);
        machine.cli("later", 0o755, 0o755);
        fs::create_dir(machine.at("tools")).expect("a directory");
        let found = machine.find(&["project/node_modules/.bin", "open", "none", "tools", "bin", "later"]);
        let path = std::env::join_paths(["tools", "bin", "later"].map(|entry| machine.at(entry))).expect("a PATH");
        assert_eq!(found, Ok(Executable { file: good, path }));
    }

    #[test]
    fn what_a_project_or_another_user_could_have_put_there_is_not_run() {
        let machine = Machine::new();
        machine.cli("project/bin", 0o755, 0o755);
        machine.cli("node_modules/.bin", 0o755, 0o755);
        machine.cli("open", 0o777, 0o755);
        machine.cli("group", 0o775, 0o755);
        machine.cli("writable", 0o755, 0o757);
        machine.cli("plain", 0o755, 0o644);
        symlink(machine.at("project/bin"), machine.at("into-project")).expect("a link");
        fs::create_dir(machine.at("links")).expect("a directory");
        symlink(machine.at("project/bin/vercel"), machine.at("links/vercel")).expect("a link");
        symlink(machine.at("links"), machine.at("project/out")).expect("a link");
        fs::create_dir(machine.at("open-target")).expect("a directory");
        symlink(machine.at("open/vercel"), machine.at("open-target/vercel")).expect("a link");
        for (entry, reason) in [
            ("project/bin", "inside the project"),
            ("into-project", "inside the project"),
            ("links", "inside the project"),
            ("project/out", "inside the project"),
            ("node_modules/.bin", "in node_modules/.bin"),
            ("open", "others may write"),
            ("group", "others may write"),
            ("writable", "others may write"),
            ("open-target", "others may write"),
            ("plain", "no executable file"),
            ("none", "not on PATH"),
            ("./bin", "not on PATH"),
        ] {
            let problem = machine.find(&[entry]).expect_err(entry);
            assert!(problem.contains(reason), "{entry}: {problem}");
        }
        if Uid::effective().is_root() {
            let foreign = machine.cli("foreign", 0o755, 0o755);
            std::os::unix::fs::chown(&foreign, Some(65534), None).expect("given away");
            assert!(machine.find(&["foreign"]).expect_err("foreign").contains("another user"));
        }
    }
}
