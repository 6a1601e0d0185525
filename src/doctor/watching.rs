//! Whether a change of the env file is noticed by an event, or by the poll alone.

use std::path::Path;

use nix::errno::Errno;
use notify::{ErrorKind, RecursiveMode, Watcher};

use super::finding::{Finding, Severity};

/// How a directory can be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Watching {
    /// By events.
    ByEvents,
    /// Its file system, of this name, tells no change that is made elsewhere.
    WithoutEvents(&'static str),
    /// The system lets us watch no more directories.
    TooManyWatches,
    /// Nor open another queue of events.
    TooManyQueues,
    /// Not at all, for this reason.
    Not(String),
}

/// Tries it.
pub(super) fn gather(dir: &Path) -> Watching {
    let watched =
        notify::recommended_watcher(|_| {}).and_then(|mut watcher| watcher.watch(dir, RecursiveMode::NonRecursive));
    match watched {
        Ok(()) => shared_file_system(dir).map_or(Watching::ByEvents, Watching::WithoutEvents),
        Err(error) => match &error.kind {
            ErrorKind::MaxFilesWatch => Watching::TooManyWatches,
            ErrorKind::Io(e) if e.raw_os_error() == Some(Errno::EMFILE as i32) => Watching::TooManyQueues,
            _ => Watching::Not(error.to_string()),
        },
    }
}

/// The name of a file system whose changes may be made on another machine, or outside of this container.
#[cfg(target_os = "linux")]
fn shared_file_system(dir: &Path) -> Option<&'static str> {
    // As `statfs` numbers them; narrower on some machines than on others.
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
        // Windows' drives in WSL are such.
        0x0102_1997 => "9p",
        // Of this kind are sshfs, virtiofs, and the shares of Docker Desktop.
        0x6573_5546 => "FUSE",
        0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x786F_4256 => "VirtualBox's",
        _ => return None,
    })
}

/// Judges it.
pub(super) fn judge(watching: &Watching) -> Finding {
    let detail = "Changes of the env file are found by the poll, within two seconds.";
    let finding = |severity, code, title: String| Finding::new(severity, code, title, detail);
    match watching {
        Watching::ByEvents => Finding::ok("watching", "changes are noticed at once"),
        Watching::WithoutEvents(name) => {
            let title = format!("the project is on a file system ({name}) that may tell no change made elsewhere");
            finding(Severity::Note, "no_file_events", title)
        }
        Watching::TooManyWatches => {
            finding(Severity::Warning, "watch_limit", "this user's file watches are used up".into())
                .fix("sudo sysctl fs.inotify.max_user_watches=524288")
        }
        Watching::TooManyQueues => {
            finding(Severity::Warning, "watch_limit", "this user's watchers, or our open files, are used up".into())
                .fix("sudo sysctl fs.inotify.max_user_instances=1024")
        }
        Watching::Not(reason) => {
            let title = format!("the project cannot be watched: {reason}");
            finding(Severity::Warning, "no_file_events", title)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_others_change_is_known_by_its_number() {
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
    fn without_events_there_is_the_poll() {
        for (watching, severity, code) in [
            (Watching::ByEvents, Severity::Ok, "watching"),
            (Watching::WithoutEvents("NFS"), Severity::Note, "no_file_events"),
            (Watching::TooManyWatches, Severity::Warning, "watch_limit"),
            (Watching::TooManyQueues, Severity::Warning, "watch_limit"),
            (Watching::Not("it is gone".into()), Severity::Warning, "no_file_events"),
        ] {
            let finding = judge(&watching);
            assert_eq!((finding.severity, finding.code.as_ref()), (severity, code));
        }
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(gather(dir.path()), Watching::ByEvents | Watching::WithoutEvents(_)));
        assert!(matches!(gather(&dir.path().join("none")), Watching::Not(_)));
    }
}
