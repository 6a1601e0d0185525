//! The files that the command's variables name: the preload and the certificate bundles.
//!
//! They contain no secret, but anyone who could change them could run code in the command, so their directory is
//! accessible to the user only. A run removes its directory at its end; the next run removes those of runs that were
//! killed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use nix::fcntl::{Flock, FlockArg};

use super::environment::{BUNDLE_VARIABLES, NODE_EXTRA_CERTIFICATES, PRELOAD_FILE};
use crate::config::EnvLookup;
use crate::os::atomic_file::{self, Durability};
use crate::os::private_dir;

const PRELOAD: &[u8] = include_bytes!("preload.cjs");
const BUNDLE_FILE: &str = "ca-bundle.pem";
const NODE_FILE: &str = "node-extra-ca.pem";
/// The prefix of the directories of runs.
const RUN_PREFIX: &str = "run-";
/// The directory for the files of `env`.
const PERSISTENT_DIR: &str = "env";
/// Files in which Linux distributions keep all root certificates. Copying one takes a tenth of the time of parsing the
/// roots.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/certs/ca-bundle.crt",
];

/// The names and contents of the files.
pub struct Contents(Vec<(&'static str, Vec<u8>)>);

impl Contents {
    /// The preload and, with `ca`, the certificate bundles: the system's roots, the user's certificates (the files that
    /// `environment` names) and `ca`.
    pub fn new(environment: EnvLookup<'_>, ca: Option<&str>) -> Self {
        let mut contents = vec![(PRELOAD_FILE, PRELOAD.to_vec())];
        if let Some(ca) = ca {
            let user_files = |names: &[&str]| {
                let paths: BTreeSet<_> = names.iter().filter_map(|name| environment(name)).collect();
                paths.iter().filter_map(|path| fs::read(path).ok()).collect::<Vec<_>>()
            };
            contents.push((BUNDLE_FILE, bundle(system_roots, user_files(&BUNDLE_VARIABLES), ca)));
            contents.push((NODE_FILE, bundle(Vec::new, user_files(&[NODE_EXTRA_CERTIFICATES]), ca)));
        }
        Self(contents)
    }
}

/// Concatenates the certificates. A user's file that contains `ca` is a bundle of an outer run and contains all others.
fn bundle(roots: impl FnOnce() -> Vec<u8>, user_files: Vec<Vec<u8>>, ca: &str) -> Vec<u8> {
    let contains_ca = |file: &Vec<u8>| file.windows(ca.len()).any(|window| window == ca.as_bytes());
    let parts = match user_files.iter().find(|file| contains_ca(file)) {
        Some(outer) => vec![outer.clone()],
        None => [roots()].into_iter().chain(user_files).chain([ca.as_bytes().to_vec()]).collect(),
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

/// The files as written.
pub struct Files {
    directory: PathBuf,
    /// Held while the run needs the files; they are removed afterwards. `None`: they stay.
    lock: Option<Flock<File>>,
}

impl Files {
    /// Writes them for one run: into the state directory if that is accessible to the user only, or else into the
    /// directory for temporary files.
    pub fn for_run(state_dir: Option<&Path>, contents: &Contents) -> io::Result<Self> {
        let parent = state_dir.filter(|dir| private_dir::check(dir).is_ok()).map(Path::to_owned);
        if let Some(dir) = &parent {
            remove_abandoned(dir);
        }
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        // Renamed only once it is locked: an unlocked directory with the prefix of runs may be removed by another run.
        let made =
            tempfile::Builder::new().prefix(".new-").permissions(Permissions::from_mode(0o700)).tempdir_in(&parent)?;
        let lock = try_lock(made.path())?;
        contents.write(made.path())?;
        let name = made.path().file_name().unwrap_or_default().to_string_lossy().replacen(".new-", RUN_PREFIX, 1);
        let directory = parent.join(name);
        fs::rename(made.keep(), &directory)?;
        Ok(Self { directory, lock: Some(lock) })
    }

    /// Writes them where they stay. Existing files are left alone, since other programs may be using them.
    pub fn persistent(state_dir: &Path, contents: &Contents) -> io::Result<Self> {
        let directory = private_dir::make_within(state_dir, Path::new(PERSISTENT_DIR).join(contents.digest()))
            .map_err(|problem| io::Error::other(String::from(problem)))?;
        contents.write(&directory)?;
        Ok(Self { directory, lock: None })
    }

    /// The preload.
    pub fn preload(&self) -> PathBuf {
        self.directory.join(PRELOAD_FILE)
    }

    /// The bundle of the system's roots, the user's certificates and the CA.
    pub fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE_FILE)
    }

    /// The certificates that Node.js trusts in addition to its own.
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

/// Removes the directories of runs that were killed.
fn remove_abandoned(dir: &Path) {
    let is_run_dir = |name: &OsStr| name.as_encoded_bytes().starts_with(RUN_PREFIX.as_bytes());
    for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| is_run_dir(&entry.file_name())) {
        if let Ok(_lock) = try_lock(&entry.path()) {
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
    fn a_bundle_has_the_systems_roots_the_users_files_and_the_ca_on_separate_lines() {
        let made = bundle(|| b"system".to_vec(), vec![b"users".to_vec(), b"".to_vec(), b"another\n".to_vec()], CA);
        assert_eq!(text(&made), format!("system\nusers\nanother\n{CA}"));
        let again = bundle(|| b"system".to_vec(), vec![made.clone()], CA);
        assert_eq!(text(&again), text(&made), "a run inside a run");
    }

    #[test]
    fn a_file_named_by_several_variables_is_included_once_and_a_missing_one_is_skipped() {
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
        assert!(
            bundle.ends_with(CA) && bundle.matches("BEGIN CERTIFICATE").count() > 10,
            "the system's roots are included"
        );
        assert_eq!(content(NODE_FILE), CA);
        let names = |ca| Contents::new(&environment, ca).0.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        assert_eq!(names(None), [PRELOAD_FILE]);
    }

    #[test]
    fn a_runs_files_are_private_and_removed_at_its_end() {
        let state = private();
        let files = Files::for_run(Some(state.path()), &Contents::new(&|_| None, Some(CA))).expect("written");
        assert_eq!(fs::metadata(files.preload().parent().expect("a directory")).expect("there").mode() & 0o777, 0o700);
        for path in [files.preload(), files.bundle(), files.node_certificates()] {
            assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600, "{}", path.display());
        }
        let another = Files::for_run(Some(state.path()), &Contents::new(&|_| None, None)).expect("written");
        assert!(files.preload().exists(), "a later run does not remove those of a running one");
        drop((files, another));
        assert_eq!(fs::read_dir(state.path()).expect("there").count(), 0);
    }

    #[test]
    fn the_files_of_a_killed_run_are_removed_by_the_next_one() {
        let state = private();
        let abandoned = state.path().join("run-of-old");
        fs::create_dir(&abandoned).expect("a directory");
        fs::write(abandoned.join(PRELOAD_FILE), "").expect("written");
        fs::create_dir(state.path().join("ca")).expect("another directory");
        drop(Files::for_run(Some(state.path()), &Contents::new(&|_| None, None)).expect("written"));
        assert!(!abandoned.exists() && state.path().join("ca").exists());
    }

    #[test]
    fn no_files_are_written_to_a_state_directory_that_others_can_access() {
        let state = private();
        fs::set_permissions(state.path(), Permissions::from_mode(0o777)).expect("a mode");
        let contents = Contents::new(&|_| None, None);
        let files = Files::for_run(Some(state.path()), &contents).expect("written elsewhere");
        assert!(!files.preload().starts_with(state.path()));
        assert!(Files::persistent(state.path(), &contents).is_err());
    }

    #[test]
    fn persistent_files_stay_and_other_contents_have_another_directory() {
        let state = private();
        let persistent = |ca| Files::persistent(state.path(), &Contents::new(&|_| None, ca)).expect("written");
        let (plain, same, other) =
            (persistent(None).preload(), persistent(None).preload(), persistent(Some(CA)).preload());
        assert_eq!(plain, same);
        assert_ne!(plain, other);
        assert_eq!(fs::read(plain).expect("there"), PRELOAD);
        assert_eq!(fs::metadata(state.path().join("env")).expect("there").mode() & 0o777, 0o700);
    }
}
