//! Finds programs on PATH that are safe to run (docs/security.md A2).
//!
//! A program is not run if the project could have supplied it: from the project, from the repository around it, or from
//! a `node_modules/.bin` (package managers put those of parent directories on PATH). Neither is a program that another
//! user could have replaced. The check covers the file and its directory; the directories above are not checked.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::os::safe_read;

/// Files that mark the root of a repository or workspace, besides a `package.json` with workspaces.
const ROOT_MARKERS: [&str; 3] = [".git", ".vercel/repo.json", "pnpm-workspace.yaml"];
/// Linux reads no more of a script's first line, in bytes.
const MAX_FIRST_LINE: u64 = 256;
/// The interpreter of a script may be a script. Linux follows no longer chain.
const MAX_INTERPRETERS: usize = 4;

/// A program found on PATH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its path, as PATH has it.
    pub file: PathBuf,
    /// The canonical path, or why it must not be run.
    pub checked: Result<PathBuf, Untrusted>,
}

/// Why a program must not be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// The file or its directory cannot be read.
    #[error("{} cannot be looked at ({})", .0.display(), .1)]
    Unreadable(PathBuf, io::ErrorKind),
    /// Its directory is a `node_modules/.bin`.
    #[error("it is in node_modules/.bin, which a project fills")]
    NodeModules,
    /// It is inside the project or its repository.
    #[error("it is inside the project or the repository around it, which may have planted it")]
    InProject,
    /// It is not an executable regular file.
    #[error("it is no executable file")]
    NotExecutable,
    /// The file or its directory belongs neither to this user nor to root.
    #[error("{} belongs to another user", .0.display())]
    OtherOwner(PathBuf),
    /// The group or others can write to the file or its directory.
    #[error("others may write to {shown}, `chmod go-w` it if that is not meant", shown = .0.display())]
    WritableByOthers(PathBuf),
}

impl Untrusted {
    fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |e| Self::Unreadable(path.to_owned(), e.kind())
    }
}

/// The first program of this name on `path` that may be run; if there is none, the first that may not. A name with a
/// slash is not found.
///
/// Call it before every run and do not keep the result: an upgrade may replace the file.
pub fn find(name: &str, path: &OsStr, project: &Path) -> Option<Found> {
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute() && !name.contains('/'));
    let files = entries.map(|entry| entry.join(name)).filter(|file| file.exists());
    let found = files.map(|file| Found { checked: check(&file, project), file });
    // `min_by_key` returns the first of several equal ones.
    found.min_by_key(|found| found.checked.is_err())
}

/// The canonical path of the program at an absolute path, if it may be run.
pub fn check(file: &Path, project: &Path) -> Result<PathBuf, Untrusted> {
    let root = repository_root(project, std::env::home_dir().as_deref());
    check_directory(file.parent().unwrap_or(Path::new("/")), root)?;
    check_file(file, root)
}

/// A PATH for `program` itself, with only those entries of `path` from which programs may be run.
///
/// The Vercel CLI is a script that starts with `#!/usr/bin/env node`, so the kernel lets `env` search PATH for the
/// interpreter. An entry is therefore also dropped if its file of that name may not be run. The interpreter can be a
/// script as well (the `node` of a version manager), so the chain is followed.
pub fn trusted_path(path: &OsStr, program: &Path, project: &Path) -> OsString {
    let root = repository_root(project, std::env::home_dir().as_deref());
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute());
    let mut trusted: Vec<_> = entries.filter_map(|entry| check_directory(&entry, root).ok()).collect();
    let mut script = program.to_owned();
    for _ in 0..MAX_INTERPRETERS {
        let Some(name) = env_interpreter(&script) else { break };
        // A dangling link counts: its target may be created at any time.
        let exists = |file: &Path| file.symlink_metadata().is_ok();
        trusted.retain(|entry| !exists(&entry.join(&name)) || check_file(&entry.join(&name), root).is_ok());
        let Some(found) = trusted.iter().map(|entry| entry.join(&name)).find(|file| exists(file)) else { break };
        script = found;
    }
    // Fails only for a canonical path that contains a colon.
    std::env::join_paths(trusted).unwrap_or_default()
}

/// The interpreter's name in a first line such as `#!/usr/bin/env node`.
fn env_interpreter(script: &Path) -> Option<String> {
    let mut start = Vec::new();
    File::open(script).ok()?.take(MAX_FIRST_LINE).read_to_end(&mut start).ok()?;
    let start = String::from_utf8_lossy(start.strip_prefix(b"#!")?).into_owned();
    let mut words = start.lines().next()?.split_ascii_whitespace();
    words.next().filter(|program| program.ends_with("/env"))?;
    let mut words = words.map(|word| word.strip_prefix("-S").unwrap_or(word));
    words.find(|word| !word.is_empty() && !word.starts_with('-') && !word.contains('=')).map(str::to_owned)
}

/// The topmost directory at or above the project that looks like the root of a repository, else the project. The
/// topmost, because a nested directory could declare itself a root to exclude its surroundings. Neither `home` nor a
/// directory that contains it is a root.
fn repository_root<'a>(project: &'a Path, home: Option<&Path>) -> &'a Path {
    let home = home.and_then(|home| home.canonicalize().ok()).unwrap_or_else(|| "/".into());
    let above = project.ancestors().take_while(|dir| dir.parent().is_some() && !home.starts_with(dir));
    above.filter(|dir| is_repository_root(dir)).last().unwrap_or(project)
}

fn is_repository_root(dir: &Path) -> bool {
    #[derive(Deserialize)]
    struct Package {
        workspaces: Option<IgnoredAny>,
    }
    let package = || serde_json::from_slice::<Package>(&safe_read::read(&dir.join("package.json")).ok()?.bytes).ok();
    ROOT_MARKERS.iter().any(|name| dir.join(name).exists()) || package().is_some_and(|it| it.workspaces.is_some())
}

/// The canonical directory, if programs in it may be run.
fn check_directory(entry: &Path, root: &Path) -> Result<PathBuf, Untrusted> {
    let directory = entry.canonicalize().map_err(Untrusted::unreadable(entry))?;
    if [entry, &directory].iter().any(|path| path.ends_with("node_modules/.bin")) {
        return Err(Untrusted::NodeModules);
    }
    check_outside(root, &[entry, &directory])?;
    check_owner_and_mode(&directory)?;
    Ok(directory)
}

fn check_file(file: &Path, root: &Path) -> Result<PathBuf, Untrusted> {
    let file = file.canonicalize().map_err(Untrusted::unreadable(file))?;
    check_outside(root, &[&file])?;
    if !fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0) {
        return Err(Untrusted::NotExecutable);
    }
    check_owner_and_mode(&file)?;
    check_owner_and_mode(file.parent().unwrap_or(Path::new("/")))?;
    Ok(file)
}

fn check_outside(root: &Path, paths: &[&Path]) -> Result<(), Untrusted> {
    if paths.iter().any(|path| path.starts_with(root)) { Err(Untrusted::InProject) } else { Ok(()) }
}

fn check_owner_and_mode(path: &Path) -> Result<(), Untrusted> {
    let meta: Metadata = fs::metadata(path).map_err(Untrusted::unreadable(path))?;
    if meta.uid() != 0 && meta.uid() != Uid::effective().as_raw() {
        return Err(Untrusted::OtherOwner(path.to_owned()));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(Untrusted::WritableByOthers(path.to_owned()));
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

        /// The canonical path.
        fn at(&self, path: &str) -> PathBuf {
            self.0.path().canonicalize().expect("a directory").join(path)
        }

        /// Creates a program in a directory, with these modes.
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
    fn the_first_trusted_program_is_found_and_untrusted_entries_are_dropped() {
        let machine = Machine::new();
        machine.program("project/node_modules/.bin", 0o755, 0o755);
        machine.program("open", 0o777, 0o755);
        let good = machine.program("bin", 0o755, 0o755);
        machine.program("later", 0o755, 0o755);
        fs::create_dir(machine.at("tools")).expect("a directory");
        let entries = ["project/node_modules/.bin", "open", "none", "tools", "bin", "later"];
        assert_eq!(machine.find(&entries), Some(Found { file: good.clone(), checked: Ok(good) }));
        let trusted = trusted_path(&machine.path(&entries), Path::new("/bin/sh"), &machine.at("project"));
        assert_eq!(trusted, machine.path(&["tools", "bin", "later"]));
    }

    #[test]
    fn programs_of_the_project_and_of_other_users_are_untrusted() {
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
            let problem = machine.find(&[entry]).expect(entry).checked.expect_err(entry).to_string();
            assert!(problem.contains(reason), "{entry}: {problem}");
        }
        for entry in ["none", "./bin"] {
            assert_eq!(machine.find(&[entry]), None, "{entry}");
        }
        if Uid::effective().is_root() {
            let foreign = machine.program("foreign", 0o755, 0o755);
            std::os::unix::fs::chown(&foreign, Some(65534), None).expect("given away");
            let problem = machine.find(&["foreign"]).expect("found").checked.expect_err("foreign").to_string();
            assert!(problem.contains("another user"), "{problem}");
        }
    }

    #[test]
    fn the_repository_around_a_project_is_untrusted() {
        let workspaces = r#"{"workspaces":["apps/*"]}"#;
        for (mark, content, covers) in [
            ("repo/.git/HEAD", "", true),
            ("repo/.git", "gitdir: elsewhere", true),
            ("repo/.vercel/repo.json", "{}", true),
            ("repo/pnpm-workspace.yaml", "", true),
            ("repo/package.json", workspaces, true),
            ("repo/package.json", r#"{"name":"apps"}"#, false),
            ("repo/package.json", r#"{"workspaces":"#, false),
            ("repo/apps/web/.git", "", false),
            (".git", "", false),
            ("../.git", "", false),
        ] {
            let machine = Machine(tempfile::tempdir().expect("a directory"));
            let project = machine.at("home/repo/apps/web");
            fs::create_dir_all(&project).expect("a project");
            let mark_at = machine.at("home").join(mark);
            fs::create_dir_all(mark_at.parent().expect("a parent")).expect("a directory");
            fs::write(mark_at, content).expect("written");
            let expected = if covers { machine.at("home/repo") } else { project.clone() };
            let shown = format!("{mark} {content}");
            assert_eq!(repository_root(&project, Some(&machine.at("home"))), expected, "{shown}");
            // A root inside the repository changes nothing.
            fs::write(project.join("package.json"), workspaces).expect("written");
            assert_eq!(repository_root(&project, Some(&machine.at("home"))), expected, "{shown}");
            machine.program("home/repo/bin", 0o755, 0o755);
            let checked = find("tool", &machine.path(&["home/repo/bin"]), &project).expect("found").checked;
            if covers {
                assert!(checked.expect_err(&shown).to_string().contains("repository around it"), "{shown}");
            }
        }
        assert_eq!(repository_root(Path::new("/"), None), Path::new("/"));
    }

    #[test]
    fn the_interpreters_of_a_script_are_checked() {
        let machine = Machine::new();
        let program = machine.program("bin", 0o755, 0o755);
        let (project, path) = (machine.at("project"), machine.path(&["links", "dangling", "good", "bin"]));
        for directory in ["links", "dangling", "project/bin"] {
            machine.program(directory, 0o755, 0o755);
        }
        fs::copy(&program, machine.at("project/bin/node")).expect("copied");
        symlink(machine.at("project/bin/node"), machine.at("links/node")).expect("a link");
        symlink(machine.at("project/later"), machine.at("dangling/node")).expect("a link");
        fs::create_dir(machine.at("good")).expect("a directory");
        fs::copy(&program, machine.at("good/node")).expect("copied");
        let all = ["links", "dangling", "good", "bin"];
        for (line, expected) in [
            ("#!/usr/bin/env node", &["good", "bin"][..]),
            ("#!/usr/bin/env -S node --title=a", &["good", "bin"]),
            ("#! /usr/bin/env -Snode", &["good", "bin"]),
            ("#!/usr/bin/env A=b node", &["good", "bin"]),
            ("#!/bin/sh node", &all),
            ("#!/usr/bin/env ruby", &all),
            ("node", &all),
        ] {
            fs::write(&program, format!("{line}\nconsole.log()\n")).expect("written");
            assert_eq!(trusted_path(&path, &program, &project), machine.path(expected), "{line}");
        }
        // The interpreter is a script.
        fs::write(&program, "#!/usr/bin/env node\n").expect("written");
        fs::write(machine.at("good/node"), "#!/usr/bin/env shell\n").expect("written");
        symlink(machine.at("project/bin/node"), machine.at("bin/shell")).expect("a link");
        assert_eq!(trusted_path(&path, &program, &project), machine.path(&["good"]));
    }
}
