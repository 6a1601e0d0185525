//! Which file a program on PATH is, and whether it is safe to run (docs/security.md A2).
//!
//! What a project brings along is never run: not from the project itself or the repository around it, not from the
//! `node_modules/.bin` of a directory above it, which package managers put on PATH. Nor is what another user could have
//! put there or changed. Only files and their own directories are looked at; who could replace a directory above them is
//! not asked.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::os::safe_read;

/// What lies at the root of a repository or workspace, besides a `package.json` with workspaces.
const ROOT_MARKS: [&str; 3] = [".git", ".vercel/repo.json", "pnpm-workspace.yaml"];
/// A first line of a script is looked at so far, in bytes: Linux itself goes no further.
const FIRST_LINE: u64 = 256;
/// A script's interpreter may be a script, and so on: Linux goes no deeper.
const DEEPEST: usize = 4;

/// A program on PATH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// As PATH names it.
    pub file: PathBuf,
    /// The file itself, all links followed; or why it is not run, for people.
    pub judged: Result<PathBuf, String>,
}

/// The first program of this name on `path` that may be run; where there is none, the first that may not. Nothing is
/// found by a name that is a path.
///
/// Asked for anew before each run: what was judged is what is run, and an upgrade may move it.
pub fn find(name: &str, path: &OsStr, project: &Path) -> Option<Found> {
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute() && !name.contains('/'));
    let candidates = entries.map(|entry| entry.join(name)).filter(|file| file.exists());
    let judged = candidates.map(|file| Found { judged: judge(&file, project), file });
    // Of several that are as good, the first.
    judged.min_by_key(|found| found.judged.is_err())
}

/// The program at an absolute path, all links followed, if it may be run. An error is the reason for people.
pub fn judge(file: &Path, project: &Path) -> Result<PathBuf, String> {
    let root = root(project, std::env::home_dir().as_deref());
    judge_directory(file.parent().unwrap_or(Path::new("/")), root)?;
    judge_file(file, root)
}

/// The entries of a PATH from which programs may be run, for what `program` runs itself. Where its first line asks `env`
/// for an interpreter, none of them has one by that name that may not be run.
pub fn trusted(path: &OsStr, program: &Path, project: &Path) -> OsString {
    let root = root(project, std::env::home_dir().as_deref());
    let entries = std::env::split_paths(path).filter(|entry| entry.is_absolute());
    let mut trusted: Vec<_> = entries.filter_map(|entry| judge_directory(&entry, root).ok()).collect();
    let mut script = program.to_owned();
    for _ in 0..DEEPEST {
        let Some(name) = interpreter(&script) else { break };
        // Also a link that leads nowhere yet.
        let is_there = |file: &Path| file.symlink_metadata().is_ok();
        trusted.retain(|entry| !is_there(&entry.join(&name)) || judge_file(&entry.join(&name), root).is_ok());
        let Some(found) = trusted.iter().map(|entry| entry.join(&name)).find(|file| is_there(file)) else { break };
        script = found;
    }
    // One with a colon in its name, to which a link leads, cannot be joined.
    std::env::join_paths(trusted).unwrap_or_default()
}

/// The name by which a script's first line asks `env` for its interpreter.
fn interpreter(script: &Path) -> Option<String> {
    let mut start = Vec::new();
    File::open(script).ok()?.take(FIRST_LINE).read_to_end(&mut start).ok()?;
    let start = String::from_utf8_lossy(start.strip_prefix(b"#!")?).into_owned();
    let mut words = start.lines().next()?.split_ascii_whitespace();
    words.next().filter(|program| program.ends_with("/env"))?;
    let mut words = words.map(|word| word.strip_prefix("-S").unwrap_or(word));
    words.find(|word| !word.is_empty() && !word.starts_with('-') && !word.contains('=')).map(str::to_owned)
}

/// What counts as the project: it with all directories above it up to the topmost that looks like the root of a
/// repository, for what lies in one may say that it is a root itself. Neither `home` nor what contains it is one.
fn root<'a>(project: &'a Path, home: Option<&Path>) -> &'a Path {
    let home = home.and_then(|home| home.canonicalize().ok()).unwrap_or_else(|| "/".into());
    let above = project.ancestors().take_while(|dir| dir.parent().is_some() && !home.starts_with(dir));
    above.filter(|dir| is_root(dir)).last().unwrap_or(project)
}

fn is_root(dir: &Path) -> bool {
    #[derive(Deserialize)]
    struct Package {
        workspaces: Option<IgnoredAny>,
    }
    let package = || serde_json::from_slice::<Package>(&safe_read::read(&dir.join("package.json")).ok()?.bytes).ok();
    ROOT_MARKS.iter().any(|mark| dir.join(mark).exists()) || package().is_some_and(|it| it.workspaces.is_some())
}

/// The directory, all links followed, if programs in it may be run.
fn judge_directory(entry: &Path, root: &Path) -> Result<PathBuf, String> {
    let directory = entry.canonicalize().map_err(|e| format!("its directory cannot be looked at ({})", e.kind()))?;
    if [entry, &directory].iter().any(|path| path.ends_with("node_modules/.bin")) {
        return Err("it is in node_modules/.bin, which a project fills".into());
    }
    refuse_in_project(&[entry, &directory], root)?;
    refuse_foreign(&directory)?;
    Ok(directory)
}

fn judge_file(candidate: &Path, root: &Path) -> Result<PathBuf, String> {
    let file = candidate.canonicalize().map_err(|e| format!("it cannot be looked at ({})", e.kind()))?;
    refuse_in_project(&[&file], root)?;
    if !fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0) {
        return Err("it is no executable file".into());
    }
    refuse_foreign(&file)?;
    refuse_foreign(file.parent().unwrap_or(Path::new("/")))?;
    Ok(file)
}

fn refuse_in_project(paths: &[&Path], root: &Path) -> Result<(), String> {
    match paths.iter().any(|path| path.starts_with(root)) {
        true => Err("it is inside the project or the repository around it, which may have planted it".into()),
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
        let trusted = trusted(&machine.path(&entries), Path::new("/bin/sh"), &machine.at("project"));
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

    #[test]
    fn the_repository_around_a_project_is_as_the_project() {
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
            assert_eq!(root(&project, Some(&machine.at("home"))), expected, "{shown}");
            // It cannot make itself smaller.
            fs::write(project.join("package.json"), workspaces).expect("written");
            assert_eq!(root(&project, Some(&machine.at("home"))), expected, "{shown}");
            machine.program("home/repo/bin", 0o755, 0o755);
            let judged = find("tool", &machine.path(&["home/repo/bin"]), &project).expect("found").judged;
            if covers {
                assert!(judged.expect_err(&shown).contains("repository around it"), "{shown}");
            }
        }
        assert_eq!(root(Path::new("/"), None), Path::new("/"));
    }

    #[test]
    fn what_a_script_is_run_by_is_judged_as_well() {
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
            assert_eq!(trusted(&path, &program, &project), machine.path(expected), "{line}");
        }
        // An interpreter that is a script itself.
        fs::write(&program, "#!/usr/bin/env node\n").expect("written");
        fs::write(machine.at("good/node"), "#!/usr/bin/env shell\n").expect("written");
        symlink(machine.at("project/bin/node"), machine.at("bin/shell")).expect("a link");
        assert_eq!(trusted(&path, &program, &project), machine.path(&["good"]));
    }
}
