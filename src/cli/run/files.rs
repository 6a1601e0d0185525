//! The files that the command's variables name: the preload, and bundles of certificates.
//!
//! They hold no secret, but whoever could change them could run code in the command: they lie in a directory that nobody
//! else may enter. A run's own directory goes with it; what a run that was killed left behind goes with the next one.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use nix::fcntl::{Flock, FlockArg};

use super::environment::{BUNDLE_VARIABLES, Lookup, NODE_EXTRA_CERTIFICATES, PRELOAD_FILE};
use crate::os::atomic_file::{self, Durability};
use crate::os::private_dir;

const PRELOAD: &[u8] = include_bytes!("preload.cjs");
const BUNDLE_FILE: &str = "ca-bundle.pem";
const NODE_FILE: &str = "node-extra-ca.pem";
/// What the names of runs' directories begin with.
const RUN_PREFIX: &str = "run-";
/// Where the lasting ones are.
const LASTING: &str = "env";
/// Where Linux systems keep all their roots in one file. To take it as it is costs a tenth of reading each root.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/certs/ca-bundle.crt",
];

/// What is written: names and contents.
pub struct Contents(Vec<(&'static str, Vec<u8>)>);

impl Contents {
    /// The preload, and with interception the certificates: the system's, the user's (the files that `environment` names)
    /// and `ca`.
    pub fn new(environment: Lookup<'_>, ca: Option<&str>) -> Self {
        let mut contents = vec![(PRELOAD_FILE, PRELOAD.to_vec())];
        if let Some(ca) = ca {
            let users = |names: &[&str]| {
                let paths: BTreeSet<_> = names.iter().filter_map(|name| environment(name)).collect();
                paths.iter().filter_map(|path| fs::read(path).ok()).collect::<Vec<_>>()
            };
            contents.push((BUNDLE_FILE, bundle(system_roots, users(&BUNDLE_VARIABLES), ca)));
            contents.push((NODE_FILE, bundle(Vec::new, users(&[NODE_EXTRA_CERTIFICATES]), ca)));
        }
        Self(contents)
    }
}

/// One after another, each once. A file that has `ca` in it is a bundle of ours, which has the rest, too.
fn bundle(roots: impl FnOnce() -> Vec<u8>, users: Vec<Vec<u8>>, ca: &str) -> Vec<u8> {
    let is_ours = |file: &Vec<u8>| file.windows(ca.len()).any(|window| window == ca.as_bytes());
    let parts = match users.iter().find(|file| is_ours(file)) {
        Some(ours) => vec![ours.clone()],
        None => [roots()].into_iter().chain(users).chain([ca.as_bytes().to_vec()]).collect(),
    };
    let mut bundle = Vec::new();
    for part in parts.iter().map(|part| part.trim_ascii()).filter(|part| !part.is_empty()) {
        bundle.extend_from_slice(part);
        bundle.push(b'\n');
    }
    bundle
}

fn system_roots() -> Vec<u8> {
    let in_one_file = cfg!(target_os = "linux").then(|| SYSTEM_BUNDLES.iter().find_map(|path| fs::read(path).ok()));
    in_one_file.flatten().unwrap_or_else(|| {
        let roots = rustls_native_certs::load_native_certs().certs;
        roots.iter().map(|root| pem::encode(&pem::Pem::new("CERTIFICATE", root.to_vec()))).collect::<String>().into()
    })
}

/// Where they are.
pub struct Files {
    directory: PathBuf,
    /// Held for as long as the run needs them, after which they go.
    lock: Option<Flock<File>>,
}

impl Files {
    /// Writes them for one run, below the state directory if there is one that is ours alone: in another's, whoever has
    /// made it could put files of his own in their place.
    pub fn for_run(state_dir: Option<&Path>, contents: &Contents) -> io::Result<Self> {
        let parent = state_dir.filter(|dir| private_dir::check(dir).is_ok()).map(Path::to_owned);
        if let Some(dir) = &parent {
            remove_abandoned(dir);
        }
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        // A directory with a run's name is a locked one, unless its run has ended.
        let made =
            tempfile::Builder::new().prefix(".new-").permissions(Permissions::from_mode(0o700)).tempdir_in(&parent)?;
        let lock = try_lock(made.path())?;
        contents.write(made.path())?;
        let name = made.path().file_name().unwrap_or_default().to_string_lossy().replacen(".new-", RUN_PREFIX, 1);
        let directory = parent.join(name);
        fs::rename(made.keep(), &directory)?;
        Ok(Self { directory, lock: Some(lock) })
    }

    /// Writes them where they stay. What is there already is not touched, as others may be using it.
    pub fn lasting(state_dir: &Path, contents: &Contents) -> io::Result<Self> {
        let directory = private_dir::make_within(state_dir, Path::new(LASTING).join(contents.digest()))
            .map_err(|problem| io::Error::other(String::from(problem)))?;
        contents.write(&directory)?;
        Ok(Self { directory, lock: None })
    }

    /// The preload.
    pub fn preload(&self) -> PathBuf {
        self.directory.join(PRELOAD_FILE)
    }

    /// The system's certificates, the user's and ours.
    pub fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE_FILE)
    }

    /// What Node.js is to trust besides its own.
    pub fn node_certificates(&self) -> PathBuf {
        self.directory.join(NODE_FILE)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

impl Contents {
    fn digest(&self) -> String {
        let mut context = digest::Context::new(&digest::SHA256);
        self.0.iter().for_each(|(_, bytes)| context.update(bytes));
        context.finish().as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Each is written whole or not at all.
    fn write(&self, directory: &Path) -> io::Result<()> {
        for (name, bytes) in &self.0 {
            let path = directory.join(name);
            if fs::read(&path).is_ok_and(|there| there == *bytes) {
                continue;
            }
            atomic_file::write(&path, bytes, 0o600, Durability::Process)?;
        }
        Ok(())
    }
}

/// Removes directories of runs that were killed.
fn remove_abandoned(dir: &Path) {
    let is_of_a_run = |name: &OsStr| name.as_encoded_bytes().starts_with(RUN_PREFIX.as_bytes());
    for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| is_of_a_run(&entry.file_name())) {
        if let Ok(_alone) = try_lock(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn try_lock(dir: &Path) -> io::Result<Flock<File>> {
    Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::os::unix::fs::MetadataExt;

    const CA: &str = "-----BEGIN CERTIFICATE-----\nours\n-----END CERTIFICATE-----\n";

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).expect("UTF-8")
    }

    fn private() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    #[test]
    fn a_bundle_has_the_systems_roots_the_users_files_and_ours_each_on_lines_of_its_own() {
        let made = bundle(|| b"system".to_vec(), vec![b"users".to_vec(), b"".to_vec(), b"another\n".to_vec()], CA);
        assert_eq!(text(&made), format!("system\nusers\nanother\n{CA}"));
        let again = bundle(|| b"system".to_vec(), vec![made.clone()], CA);
        assert_eq!(text(&again), text(&made), "a run in a run");
    }

    #[test]
    fn a_file_that_several_variables_name_is_read_once_and_one_that_is_not_there_is_left_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let corporate = dir.path().join("corporate.pem");
        fs::write(&corporate, "corporate").expect("written");
        let environment = |name: &str| match name {
            "SSL_CERT_FILE" | "CURL_CA_BUNDLE" => Some(corporate.clone().into_os_string()),
            "DENO_CERT" => Some(OsString::from("/nowhere.pem")),
            _ => None,
        };
        let Contents(contents) = Contents::new(&environment, Some(CA));
        let content = |name: &str| text(&contents.iter().find(|(n, _)| *n == name).expect("there").1).to_owned();
        let bundle = content(BUNDLE_FILE);
        assert_eq!(bundle.matches("corporate").count(), 1);
        assert!(bundle.ends_with(CA) && bundle.matches("BEGIN CERTIFICATE").count() > 10, "the system's roots, too");
        assert_eq!(content(NODE_FILE), CA);
        let names = |ca| Contents::new(&environment, ca).0.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        assert_eq!(names(None), [PRELOAD_FILE]);
    }

    #[test]
    fn a_runs_files_are_private_and_go_with_it() {
        let state = private();
        let files = Files::for_run(Some(state.path()), &Contents::new(&|_| None, Some(CA))).expect("written");
        assert_eq!(fs::metadata(files.preload().parent().expect("a directory")).expect("there").mode() & 0o777, 0o700);
        for path in [files.preload(), files.bundle(), files.node_certificates()] {
            assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600, "{}", path.display());
        }
        let another = Files::for_run(Some(state.path()), &Contents::new(&|_| None, None)).expect("written");
        assert!(files.preload().exists(), "a later run leaves those of one that goes on");
        drop((files, another));
        assert_eq!(fs::read_dir(state.path()).expect("there").count(), 0);
    }

    #[test]
    fn the_files_of_a_run_that_was_killed_go_with_the_next_one() {
        let state = private();
        let abandoned = state.path().join("run-of-old");
        fs::create_dir(&abandoned).expect("a directory");
        fs::write(abandoned.join(PRELOAD_FILE), "").expect("written");
        fs::create_dir(state.path().join("ca")).expect("another directory");
        drop(Files::for_run(Some(state.path()), &Contents::new(&|_| None, None)).expect("written"));
        assert!(!abandoned.exists() && state.path().join("ca").exists());
    }

    #[test]
    fn where_others_have_access_no_files_are_put() {
        let state = private();
        fs::set_permissions(state.path(), Permissions::from_mode(0o777)).expect("a mode");
        let contents = Contents::new(&|_| None, None);
        let files = Files::for_run(Some(state.path()), &contents).expect("written elsewhere");
        assert!(!files.preload().starts_with(state.path()));
        assert!(Files::lasting(state.path(), &contents).is_err());
    }

    #[test]
    fn lasting_files_stay_and_others_contents_lie_elsewhere() {
        let state = private();
        let lasting = |ca| Files::lasting(state.path(), &Contents::new(&|_| None, ca)).expect("written");
        let (plain, same, other) = (lasting(None).preload(), lasting(None).preload(), lasting(Some(CA)).preload());
        assert_eq!(plain, same);
        assert_ne!(plain, other);
        assert_eq!(fs::read(plain).expect("there"), PRELOAD);
        assert_eq!(fs::metadata(state.path().join("env")).expect("there").mode() & 0o777, 0o700);
    }
}
