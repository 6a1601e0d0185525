//! Which file a program on PATH is, and whether it is safe to run (trust-policy.md 4.14).
//!
//! What a project brings along is never run: not from the project itself, not from the `node_modules/.bin` of a
//! directory above it, which package managers put on PATH. Nor is what another user could have put there or changed.
//! Only files and their own directories are looked at; who could replace a directory above them is not asked.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// A program on PATH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// As PATH names it.
    pub file: PathBuf,
    /// The file itself, all links followed; or why it is not run, for people.
    pub judged: Result<PathBuf, String>,
}

/// The first program of this name on `path` that may be run; where there is none, the first that may not.
///
/// Asked for anew before each run: what was judged is what is run, and an upgrade may move it.
pub fn find(name: &str, path: &OsStr, project: &Path) -> Option<Found> {
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute());
    let candidates = entries.map(|entry| (entry.join(name), entry)).filter(|(file, _)| file.exists());
    let judged = candidates.map(|(file, entry)| {
        let judged = judge_directory(&entry, project).and_then(|_| judge_file(&file, project));
        Found { file, judged }
    });
    // Of several that are as good, the first.
    judged.min_by_key(|found| found.judged.is_err())
}

/// The entries of a PATH from which programs may be run, for what a program runs itself.
pub fn trusted(path: &OsStr, project: &Path) -> OsString {
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute());
    let trusted = entries.filter_map(|entry| judge_directory(&entry, project).ok());
    // One with a colon in its name, to which a link leads, cannot be joined.
    std::env::join_paths(trusted).unwrap_or_default()
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

        /// A program in a directory, both with these modes.
        fn program(&self, directory: &str, directory_mode: u32, mode: u32) -> PathBuf {
            let directory = self.at(directory);
            fs::create_dir_all(&directory).expect("a directory");
            let file = directory.join("tool");
            fs::write(&file, "#!/bin/sh\n").expect("written");
            fs::set_permissions(&file, Permissions::from_mode(mode)).expect("a mode");
            fs::set_permissions(&directory, Permissions::from_mode(directory_mode)).expect("a mode");
            file
        }

        fn path(&self, entries: &[&str]) -> OsString {
            let entries = entries.iter().map(|entry| match entry.strip_prefix("./") {
                Some(relative) => PathBuf::from(relative),
                None => self.at(entry),
            });
            std::env::join_paths(entries).expect("a PATH")
        }

        fn find(&self, entries: &[&str]) -> Option<Found> {
            find("tool", &self.path(entries), &self.at("project"))
        }
    }

    #[test]
    fn the_first_that_may_be_run_is_found_with_the_entries_that_are_fit() {
        let machine = Machine::new();
        machine.program("project/node_modules/.bin", 0o755, 0o755);
        machine.program("open", 0o777, 0o755);
        let good = machine.program("bin", 0o755, 0o755);
        machine.program("later", 0o755, 0o755);
        fs::create_dir(machine.at("tools")).expect("a directory");
        let entries = ["project/node_modules/.bin", "open", "none", "tools", "bin", "later"];
        assert_eq!(machine.find(&entries), Some(Found { file: good.clone(), judged: Ok(good) }));
        let trusted = trusted(&machine.path(&entries), &machine.at("project"));
        assert_eq!(trusted, machine.path(&["tools", "bin", "later"]));
    }

    #[test]
    fn what_a_project_or_another_user_could_have_put_there_is_not_run() {
        let machine = Machine::new();
        machine.program("project/bin", 0o755, 0o755);
        machine.program("node_modules/.bin", 0o755, 0o755);
        machine.program("open", 0o777, 0o755);
        machine.program("group", 0o775, 0o755);
        machine.program("writable", 0o755, 0o757);
        machine.program("plain", 0o755, 0o644);
        symlink(machine.at("project/bin"), machine.at("into-project")).expect("a link");
        fs::create_dir(machine.at("links")).expect("a directory");
        symlink(machine.at("project/bin/tool"), machine.at("links/tool")).expect("a link");
        symlink(machine.at("links"), machine.at("project/out")).expect("a link");
        fs::create_dir(machine.at("open-target")).expect("a directory");
        symlink(machine.at("open/tool"), machine.at("open-target/tool")).expect("a link");
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
        ] {
            let problem = machine.find(&[entry]).expect(entry).judged.expect_err(entry);
            assert!(problem.contains(reason), "{entry}: {problem}");
        }
        for entry in ["none", "./bin"] {
            assert_eq!(machine.find(&[entry]), None, "{entry}");
        }
        if Uid::effective().is_root() {
            let foreign = machine.program("foreign", 0o755, 0o755);
            std::os::unix::fs::chown(&foreign, Some(65534), None).expect("given away");
            let problem = machine.find(&["foreign"]).expect("found").judged.expect_err("foreign");
            assert!(problem.contains("another user"), "{problem}");
        }
    }
}
