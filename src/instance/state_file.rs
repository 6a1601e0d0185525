//! The state file of a running instance, with its URL and key: `<state dir>/<port>.json`.
//!
//! The file has mode 0600 in a directory of mode 0700. It is written atomically, and removed when the instance ends
//! unless another instance has replaced it. The key is stored nowhere else.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::os::private_dir::{self, Problem};
use crate::os::safe_read;

/// The contents of a state file (docs/http.md section 3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The process id.
    pub pid: u32,
    /// The URL, as in the ready line.
    pub url: String,
    /// The key, sent as `Sidecar-Key`.
    pub key: String,
    /// The project's directory, as an absolute path.
    #[serde(serialize_with = "write_path", deserialize_with = "read_path")]
    pub project: PathBuf,
    /// The start time of the process in clock ticks since boot, if the system tells. It distinguishes the process from
    /// a later one with the same id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<u64>,
}

/// The prefix of a path that is not UTF-8. Other paths begin with a slash.
const FILE_URL: &str = "file://";
/// The characters that are escaped in such a path.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Serializes a path as text if it is UTF-8, or as a `file:` URL (RFC 8089), which keeps every byte.
fn write_path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => serializer.serialize_str(text),
        None => {
            serializer.collect_str(&format_args!("{FILE_URL}{}", percent_encode(path.as_os_str().as_bytes(), ESCAPED)))
        }
    }
}

fn read_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(match text.strip_prefix(FILE_URL) {
        Some(escaped) => OsString::from_vec(percent_decode_str(escaped).collect()).into(),
        None => text.into(),
    })
}

impl Instance {
    /// The address, if it is on loopback.
    pub fn address(&self) -> Option<SocketAddr> {
        let address: SocketAddr = self.url.strip_prefix("http://")?.parse().ok()?;
        address.ip().is_loopback().then_some(address)
    }

    /// Whether a process with its id runs that is not known to be another one. A zombie does not run.
    pub fn is_running(&self) -> bool {
        let pid = i32::try_from(self.pid).ok().filter(|pid| *pid > 0).map(Pid::from_raw);
        let is_same =
            process(self.pid).is_none_or(|now| now.state != 'Z' && self.began.is_none_or(|began| began == now.began));
        is_same && pid.is_some_and(|pid| kill(pid, None).is_ok())
    }

    /// Whether its process is stopped, by a signal or a debugger.
    pub fn is_stopped(&self) -> bool {
        process(self.pid).is_some_and(|now| matches!(now.state, 'T' | 't'))
    }

    /// Whether the process with its id may be the one that wrote the file. Without a start time in the file, it must at
    /// least have this program's name.
    pub fn may_be_its_process(&self) -> bool {
        process(self.pid).is_none_or(|now| match self.began {
            Some(began) => began == now.began,
            None => now.name == env!("CARGO_PKG_NAME"),
        })
    }
}

/// Process information from `/proc`, where that exists.
struct Process {
    /// The first 15 bytes of the program's file name.
    name: String,
    state: char,
    began: u64,
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain spaces and parentheses.
    let (before, after) = stat.rsplit_once(") ")?;
    let name = before.split_once('(')?.1.to_owned();
    Some(Process { name, state: after.chars().next()?, began: after.split(' ').nth(19)?.parse().ok()? })
}

/// The start time of this process, for its state file.
pub fn process_start() -> Option<u64> {
    process(std::process::id()).map(|process| process.began)
}

/// The state file of this instance. Dropping this removes the file.
pub struct InstanceFile {
    path: PathBuf,
    instance: Instance,
}

impl InstanceFile {
    /// Writes the file, and creates the directory if necessary.
    pub fn write(dir: &Path, port: u16, instance: Instance) -> Result<Self, Problem> {
        private_dir::make(dir)?;
        private_dir::keep_from_git(dir)?;
        let path = dir.join(format!("{port}.json"));
        // Strings and numbers can always be serialized.
        private_dir::write(&path, &serde_json::to_vec(&instance).unwrap_or_default())?;
        Ok(Self { path, instance })
    }
}

impl Drop for InstanceFile {
    fn drop(&mut self) {
        if read(&self.path).as_ref() == Some(&self.instance) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The instance whose state file is for this port.
pub fn of_port(dir: &Path, port: u16) -> Option<Instance> {
    read(&dir.join(format!("{port}.json")))
}

/// All instances with a state file, also those that have ended without removing it.
pub fn all(dir: &Path) -> Vec<Instance> {
    let paths = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_of_port = |path: &PathBuf| {
        let port = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json"));
        port.is_some_and(|port| port.parse::<u16>().is_ok())
    };
    paths.filter(is_of_port).filter_map(|path| read(&path)).collect()
}

fn read(path: &Path) -> Option<Instance> {
    serde_json::from_slice(&safe_read::read(path).ok()?.bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn instance(pid: u32) -> Instance {
        Instance { pid, url: "http://127.0.0.1:1".into(), key: "k".into(), project: "/p".into(), began: None }
    }

    #[test]
    fn the_file_is_private_and_removed_with_its_instance() {
        let state = tempfile::tempdir().expect("a directory");
        let dir = state.path().join("below/connect-sidecar");
        let file = InstanceFile::write(&dir, 1, instance(7)).expect("written");
        let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join("1.json"))), (0o700, 0o600));
        assert_eq!(of_port(&dir, 1), Some(instance(7)));
        drop(file);
        let left = fs::read_dir(&dir).expect("there").flatten().map(|entry| entry.file_name());
        assert_eq!(left.collect::<Vec<_>>(), [".gitignore"]);
    }

    #[test]
    fn every_byte_of_the_projects_path_survives() {
        let home = tempfile::tempdir().expect("a directory");
        let state = home.path().join("connect-sidecar");
        for (bytes, written) in [
            (&b"/home/me/web"[..], "/home/me/web"),
            ("/home/me/caf\u{e9} 100%".as_bytes(), "/home/me/caf\u{e9} 100%"),
            (b"/home/me/file:%2F", "/home/me/file:%2F"),
            (b"/a \"b\"\n\\c", "/a \"b\"\n\\c"),
            (b"/home/me/caf\xe9", "file:///home/me/caf%E9"),
            (b"/\xff%41 \n/\xe2\x82", "file:///%FF%2541%20%0A/%E2%82"),
        ] {
            let project = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let written_instance = Instance { project: project.clone(), ..instance(7) };
            let _file = InstanceFile::write(&state, 1, written_instance).expect("written");
            assert_eq!(of_port(&state, 1).map(|read| read.project), Some(project), "{written}");
            let json = fs::read(state.join("1.json")).expect("a file");
            let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
            assert_eq!(json["project"], written);
        }
    }

    #[test]
    fn the_file_of_a_later_instance_is_not_removed() {
        let home = tempfile::tempdir().expect("a directory");
        let state = home.path().join("connect-sidecar");
        let first = InstanceFile::write(&state, 1, instance(7)).expect("written");
        let _second = InstanceFile::write(&state, 1, instance(8)).expect("written");
        drop(first);
        assert_eq!(of_port(&state, 1), Some(instance(8)));
    }

    #[test]
    fn a_symbolic_link_is_refused_as_the_directory() {
        let state = tempfile::tempdir().expect("a directory");
        let link = state.path().join("connect-sidecar");
        std::os::unix::fs::symlink(state.path(), &link).expect("a link");
        assert!(InstanceFile::write(&link, 1, instance(7)).is_err());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused_and_unchanged() {
        let state = tempfile::tempdir().expect("a directory");
        let open = state.path().join("open");
        for mode in [0o777, 0o1777, 0o755, 0o710] {
            fs::create_dir(&open).expect("a directory");
            fs::set_permissions(&open, fs::Permissions::from_mode(mode)).expect("a mode");
            let refused = InstanceFile::write(&open, 1, instance(7)).err().expect("refused");
            assert!(matches!(refused, Problem::AccessibleByOthers { .. }), "{refused}");
            assert_eq!(fs::metadata(&open).expect("there").mode() & 0o7777, mode);
            fs::remove_dir(&open).expect("empty");
        }
    }
}
