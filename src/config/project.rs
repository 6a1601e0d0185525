//! Finds the project directory if none is named: the nearest directory at or above the current one with a marker file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::Uid;

/// The nearest directory above `dir` that contains one of `names`, and that name. `None` if `dir` itself contains one
/// or no directory does. Stops at the root of the git work tree, at `home`, and at directories that others may write
/// to.
pub(super) fn above<'d, 'n>(dir: &'d Path, names: &[&'n str], home: Option<&Path>) -> Option<(&'d Path, &'n str)> {
    let home = home.map(|home| home.canonicalize().unwrap_or_else(|_| home.to_owned()));
    for (depth, here) in dir.ancestors().enumerate() {
        let is_out_of_bounds = here.parent().is_none() || home.as_deref().is_some_and(|home| home.starts_with(here));
        if is_out_of_bounds || (depth > 0 && !only_user_may_write(here)) {
            return None;
        }
        let is_there = |name: &&&str| fs::symlink_metadata(here.join(name)).is_ok();
        if let Some(name) = names.iter().find(is_there) {
            return (depth > 0).then_some((here, *name));
        }
        if is_there(&&".git") {
            return None;
        }
    }
    None
}

fn only_user_may_write(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|meta| meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o002 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    #[test]
    fn the_nearest_directory_with_one_of_the_names_is_the_project() {
        let names = [".env.local", ".vercel/project.json"];
        for (case, files, found) in [
            ("the root has the file", &["a/.env.local"][..], Some(("a", 0))),
            ("the nearest counts", &["a/.env.local", "a/b/.vercel/project.json"], Some(("a/b", 1))),
            ("the directory itself counts most", &["a/.env.local", "a/b/c/.vercel/project.json"], None),
            ("nothing is there", &["a/.env"], None),
            ("the root of the work tree is the last", &["a/.env.local", "a/b/.git/HEAD"], None),
            ("the root of the work tree itself counts", &["a/.git/HEAD", "a/.env.local"], Some(("a", 0))),
            ("a work tree elsewhere has a file", &["a/.env.local", "a/b/.git"], None),
            ("the directory is such a root", &["a/.env.local", "a/b/c/.git/HEAD"], None),
            ("the home itself does not count", &[".env.local"], None),
        ] {
            let home = tempfile::tempdir().expect("a directory");
            let at = |path: &str| home.path().canonicalize().expect("a directory").join(path);
            fs::create_dir_all(at("a/b/c")).expect("directories");
            for path in files {
                fs::create_dir_all(at(path).parent().expect("above")).expect("a directory");
                fs::write(at(path), "").expect("a file");
            }
            let dir = at("a/b/c");
            let expected = found.map(|(dir, name)| (at(dir), names[name]));
            let found = above(&dir, &names, Some(home.path())).map(|(dir, name)| (dir.to_owned(), name));
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn directories_that_others_may_write_to_or_at_or_above_home_are_ignored() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().canonicalize().expect("a directory").join("root");
        let below = root.join("below");
        fs::create_dir_all(&below).expect("directories");
        fs::write(root.join("mark"), "").expect("a file");
        let found = |home: Option<&Path>| above(&below, &["mark"], home).map(|(dir, _)| dir.to_owned());
        assert_eq!(found(None), Some(root.clone()));
        let link = dir.path().join("link");
        symlink(&below, &link).expect("a link");
        for home in [&below, &root, &link] {
            assert_eq!(found(Some(home)), None, "{}", home.display());
        }
        fs::set_permissions(&root, Permissions::from_mode(0o777)).expect("a mode");
        assert_eq!(found(None), None);
        fs::set_permissions(&root, Permissions::from_mode(0o755)).expect("a mode");
        if Uid::effective().is_root() {
            chown(&root, Some(65534), None).expect("a new owner");
            assert_eq!(found(None), None);
        }
    }
}
