//! Whether changes of the env file are noticed by file system events, or by polling only.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use notify::{ErrorKind, RecursiveMode, Watcher};

use super::finding::{Finding, Severity};

/// How the env file's directory can be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Watching {
    /// By events.
    ByEvents,
    /// The file system of this name reports no changes made on other machines or outside a container.
    WithoutEvents(&'static str),
    /// The system's limit on watched directories is reached.
    TooManyWatches,
    /// The system's limit on event queues, or the limit on open files, is reached.
    TooManyQueues,
    /// It cannot be watched, for this reason.
    Impossible(String),
    /// The env file is a mount of its own and was replaced outside, so the mount shows the old file.
    Replaced,
    /// The env file is a mount of its own.
    FileMount,
    /// The env file is in a lower layer of an overlay.
    LowerLayer,
}

/// Tries to watch `dir`, and checks how `file` is mounted.
pub(super) fn gather(dir: &Path, file: Option<&Path>) -> Watching {
    if let Some(found) = file.and_then(file_mount) {
        return found;
    }
    let watched =
        notify::recommended_watcher(|_| {}).and_then(|mut watcher| watcher.watch(dir, RecursiveMode::NonRecursive));
    match watched {
        Ok(()) => shared_file_system(dir).map_or(Watching::ByEvents, Watching::WithoutEvents),
        Err(error) => match &error.kind {
            ErrorKind::MaxFilesWatch => Watching::TooManyWatches,
            ErrorKind::Io(e) if e.raw_os_error() == Some(Errno::EMFILE as i32) => Watching::TooManyQueues,
            _ => Watching::Impossible(error.to_string()),
        },
    }
}

fn file_mount(file: &Path) -> Option<Watching> {
    if fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.nlink() == 0) {
        return Some(Watching::Replaced);
    }
    // Exists on Linux only.
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    let file = file.canonicalize().ok()?;
    let mount = mount_of(&String::from_utf8_lossy(&mounts), &file)?;
    if mount.point == file {
        return Some(Watching::FileMount);
    }
    mount.has_in_lower_layer(&file).then_some(Watching::LowerLayer)
}

/// A line of `/proc/self/mountinfo` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// The part of the file system that is mounted.
    root: PathBuf,
    point: PathBuf,
    kind: String,
    options: String,
}

/// The mount that a file is on: among the mount points with the longest matching path, the last.
fn mount_of(mounts: &str, file: &Path) -> Option<Mount> {
    let parsed = mounts.lines().filter_map(|line| {
        let (fields, special) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, point) = (unescaped(fields.next()?).into(), unescaped(fields.next()?).into());
        let mut special = special.split(' ');
        let kind = special.next()?.to_owned();
        Some(Mount { root, point, kind, options: special.nth(1).unwrap_or_default().to_owned() })
    });
    parsed.filter(|mount| file.starts_with(&mount.point)).max_by_key(|mount| mount.point.components().count())
}

/// Replaces the octal escapes of whitespace and backslashes.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

impl Mount {
    /// Whether this is an overlay with the file in an accessible lower layer, but not in the upper layer.
    fn has_in_lower_layer(&self, file: &Path) -> bool {
        let Ok(below) = file.strip_prefix(&self.point) else { return false };
        let path = self.root.strip_prefix("/").unwrap_or(&self.root).join(below);
        let layers = |name: &str| {
            let option = self.options.split(',').find_map(|option| option.strip_prefix(name));
            option.map(|dirs| dirs.split(':').map(|dir| PathBuf::from(unescaped(dir))).collect::<Vec<_>>())
        };
        let has = |dirs: Option<Vec<PathBuf>>| dirs.into_iter().flatten().any(|dir| dir.join(&path).exists());
        self.kind == "overlay" && !has(layers("upperdir=")) && has(layers("lowerdir="))
    }
}

/// The name of the file system, if it can be changed from another machine or from outside a container.
#[cfg(target_os = "linux")]
fn shared_file_system(dir: &Path) -> Option<&'static str> {
    // The magic number of `statfs`, whose width depends on the platform.
    let number = nix::sys::statfs::statfs(dir).ok()?.filesystem_type().0 as u64 & 0xFFFF_FFFF;
    name_of(number)
}

#[cfg(not(target_os = "linux"))]
fn shared_file_system(_: &Path) -> Option<&'static str> {
    None
}

#[cfg(any(target_os = "linux", test))]
fn name_of(number: u64) -> Option<&'static str> {
    Some(match number {
        0x6969 => "NFS",
        // Windows drives in WSL.
        0x0102_1997 => "9p",
        // sshfs, virtiofs and the shares of Docker Desktop.
        0x6573_5546 => "FUSE",
        0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x786F_4256 => "VirtualBox's",
        _ => return None,
    })
}

/// The finding about watching.
pub(super) fn evaluate(watching: &Watching) -> Finding {
    let detail = "Changes of the env file are found by polling, within two seconds.";
    let finding = |severity, code, title: String| Finding::new(severity, code, title, detail);
    match watching {
        Watching::ByEvents => Finding::ok("watching", "changes are noticed at once"),
        Watching::WithoutEvents(name) => {
            let title = format!("the project is on a file system ({name}) that may not report changes made elsewhere");
            finding(Severity::Note, "no_file_events", title)
        }
        Watching::TooManyWatches => {
            finding(Severity::Warning, "watch_limit", "this user's file watches are used up".into())
                .fix("sudo sysctl fs.inotify.max_user_watches=524288")
        }
        Watching::TooManyQueues => finding(
            Severity::Warning,
            "watch_limit",
            "this user's watchers, or this process's open files, are used up".into(),
        )
        .fix("sudo sysctl fs.inotify.max_user_instances=1024"),
        Watching::Impossible(reason) => {
            let title = format!("the project cannot be watched: {reason}");
            finding(Severity::Warning, "no_file_events", title)
        }
        Watching::Replaced => {
            let title =
                "the env file was replaced outside, and its mount shows the old one: mount the directory instead";
            let detail = "A mount of a single file keeps showing that file, so a new token is never seen.";
            Finding::new(Severity::Warning, "env_file_replaced", title, detail)
        }
        Watching::FileMount => {
            let title = "the env file is a mount of its own: mount its directory instead";
            let detail = "Writes to it are noticed. Once it is replaced outside, no change is seen any more.";
            Finding::new(Severity::Note, "env_file_mounted", title, detail)
        }
        Watching::LowerLayer => {
            let title = "the env file is in a lower layer of an overlay";
            let detail = "Changes made in that layer may never be seen; changes made in the project are.";
            Finding::new(Severity::Note, "env_file_in_lower_layer", title, detail)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_file_systems_are_recognized_by_their_magic_number() {
        for (number, name) in [
            (0x6969, Some("NFS")),
            (0x0102_1997, Some("9p")),
            (0x6573_5546, Some("FUSE")),
            (0xFF53_4D42, Some("SMB")),
            // ext4, tmpfs, overlay.
            (0xEF53, None),
            (0x0102_1994, None),
            (0x794C_7630, None),
        ] {
            assert_eq!(name_of(number), name, "{number:x}");
        }
    }

    #[test]
    fn every_way_of_watching_has_a_finding() {
        for (watching, severity, code) in [
            (Watching::ByEvents, Severity::Ok, "watching"),
            (Watching::WithoutEvents("NFS"), Severity::Note, "no_file_events"),
            (Watching::TooManyWatches, Severity::Warning, "watch_limit"),
            (Watching::TooManyQueues, Severity::Warning, "watch_limit"),
            (Watching::Impossible("it is gone".into()), Severity::Warning, "no_file_events"),
            (Watching::Replaced, Severity::Warning, "env_file_replaced"),
            (Watching::FileMount, Severity::Note, "env_file_mounted"),
            (Watching::LowerLayer, Severity::Note, "env_file_in_lower_layer"),
        ] {
            let finding = evaluate(&watching);
            assert_eq!((finding.severity, finding.code.as_ref()), (severity, code));
        }
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(gather(dir.path(), None), Watching::ByEvents | Watching::WithoutEvents(_)));
        assert!(matches!(gather(&dir.path().join("none"), None), Watching::Impossible(_)));
    }

    #[test]
    fn the_mount_of_a_file_is_the_last_of_those_closest_to_it() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      30 22 8:1 /home/me/.env.local /app/.env.local rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                      31 22 0:40 / /my\\040app rw - overlay overlay rw,lowerdir=/l\n\
                      32 22 0:41 / /twice rw - tmpfs tmpfs rw\n33 32 0:42 / /twice rw - ext4 /dev/sdb rw\n";
        let of = |path: &str| mount_of(mounts, Path::new(path)).map(|mount| (mount.point, mount.kind));
        for (path, point, kind) in [
            ("/app/.env.local", "/app/.env.local", "ext4"),
            ("/app/.env.local.bak", "/", "ext4"),
            ("/my app/.env.local", "/my app", "overlay"),
            ("/my app2", "/", "ext4"),
            ("/twice/x", "/twice", "ext4"),
        ] {
            assert_eq!(of(path), Some((point.into(), kind.into())), "{path}");
        }
        assert_eq!(mount_of("nonsense\n\n", Path::new("/")), None);
    }

    #[test]
    fn a_file_is_in_a_lower_layer_if_the_upper_layer_has_no_copy() {
        let dir = tempfile::tempdir().expect("a directory");
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        fs::create_dir_all(lower.join("web")).expect("a directory");
        fs::create_dir_all(upper.join("web")).expect("a directory");
        let mount = |kind: &str, root: &str| Mount {
            root: root.into(),
            point: "/merged".into(),
            kind: kind.into(),
            options: format!("rw,lowerdir=/none:{},upperdir={},workdir=/w", lower.display(), upper.display()),
        };
        let file = Path::new("/merged/web/.env.local");
        let is_lower = || mount("overlay", "/").has_in_lower_layer(file);
        assert!(!is_lower(), "it is in no accessible layer");
        fs::write(lower.join("web/.env.local"), "").expect("a file");
        assert!(is_lower());
        assert!(
            mount("overlay", "/web").has_in_lower_layer(Path::new("/merged/.env.local")),
            "a subdirectory is mounted"
        );
        assert!(!mount("ext4", "/").has_in_lower_layer(file));
        fs::write(upper.join("web/.env.local"), "").expect("a file");
        assert!(!is_lower(), "the upper layer has a copy");
    }
}
