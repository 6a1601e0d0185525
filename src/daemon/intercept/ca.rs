//! The local CA. It is created on this machine, kept in `<state dir>/ca/`, and trusted only by the child processes of
//! `run`.
//!
//! A critical name constraint limits it to Vercel's hosts, and it expires after 90 days (docs/security.md I1). Key and
//! certificate are in one file, so they always match. The key exists only in that file and in memory, and is not used
//! if another user could have read or placed it. The CA is never added to the system's trust store, and the sidecar's
//! own upstream client does not trust it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Uid;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::os::atomic_file::{self, Durability};
use crate::os::clock::Timestamp;
use crate::os::private_dir;
use crate::os::tls::LOCAL_CA;

/// Validity of the CA.
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// The CA is replaced this long before its expiry, since the run that gets it may use it for days.
const RENEW_BEFORE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates are valid from this long before their creation, in case the clock is set back.
const BACKDATED: Duration = Duration::from_secs(3600);
/// Validity of a host certificate, which never exceeds that of the CA.
const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
const DIRECTORY: &str = "ca";
const FILE: &str = "key-and-certificate.pem";
/// Most bytes that are read of the file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Why the CA cannot be used, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Its directory is not private.
    #[error("{}", .0.with_advice())]
    Directory(#[from] private_dir::Problem),
    /// The state directory is inside the project, from where the key could be published.
    #[error(
        "the key of the local CA would lie in {}, which is inside the project; set XDG_STATE_HOME to another place",
        .0.display()
    )]
    InsideProject(PathBuf),
    /// Another user may have read or placed the file, or it cannot be read.
    #[error(
        "{} {flaw}, so the local CA is not used; run `connect-sidecar ca remove`, and the next run makes another",
        .path.display()
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        flaw: String,
    },
    /// Key or certificate could not be created.
    #[error("could not make a local CA: {0}")]
    Create(#[source] rcgen::Error),
    /// The file could not be written.
    #[error("could not write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The task that creates it panicked.
    #[error("making the local CA broke off")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// The CA, ready to sign.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// The certificate, without the key.
    pem: String,
    not_after: Timestamp,
}

/// A host certificate with its key.
pub(super) struct Leaf {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: KeyPair,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

impl Ca {
    /// Loads the machine's CA. Creates a new one if there is none that permits all of `domains` and their subdomains
    /// and is valid for another week. Fails if another user may have accessed the key, or if it would be inside
    /// `project`, from where it could be published. The directory is excluded from git.
    pub(super) async fn load_or_create(
        state_dir: &Path,
        project: &Path,
        domains: Vec<String>,
        now: Timestamp,
    ) -> Result<Self, CaError> {
        refuse_published(state_dir, project)?;
        let dir = private_dir::make_within(state_dir, DIRECTORY)?;
        // Held until the file is written, so that of several processes only one creates a CA.
        let lock = private_dir::lock(&dir).await?;
        private_dir::keep_from_git(state_dir)?;
        let loading = tokio::task::spawn_blocking(move || {
            let _lock = lock;
            let path = dir.join(FILE);
            let existing = read(&path)?.and_then(|pem| Self::parse(&pem));
            if let Some(existing) = existing.filter(|ca| ca.is_usable(&domains, now)) {
                return Ok(existing);
            }
            let (ca, pem) = Self::create(&domains, now).map_err(CaError::Create)?;
            match atomic_file::write(&path, pem.as_bytes(), 0o600, Durability::Machine) {
                Ok(()) => Ok(ca),
                Err(source) => Err(CaError::Write { path, source }),
            }
        });
        loading.await.map_err(CaError::Interrupted)?
    }

    /// The certificate, as PEM.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// Whether it must be replaced before it is given to another run.
    pub(super) fn expires_soon(&self, now: Timestamp) -> bool {
        self.not_after.since(now) <= RENEW_BEFORE
    }

    /// Issues a certificate with a new key for this host; `None` if the CA has expired.
    pub(super) fn issue(&self, host: &str, now: Timestamp) -> Result<Option<Leaf>, rcgen::Error> {
        let not_before = now.minus(BACKDATED);
        let not_after = not_before.plus(LEAF_LIFETIME).min(self.not_after);
        if not_after <= now {
            return Ok(None);
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([host.to_owned()])?;
        params.distinguished_name = distinguished_name(host);
        set_validity(&mut params, not_before, not_after);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.into();
        Ok(Some(Leaf { certificate, key, not_before, not_after }))
    }

    /// A new CA, and the content of its file.
    fn create(domains: &[String], now: Timestamp) -> Result<(Self, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let not_before = now.minus(BACKDATED);
        let not_after = not_before.plus(LIFETIME);
        let mut params = CertificateParams::default();
        // Makes the name unique, for programs that trust two of these CAs.
        let id: String = params.key_identifier(&key).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name = distinguished_name(&format!("{LOCAL_CA} {id}"));
        set_validity(&mut params, not_before, not_after);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: domains.iter().cloned().map(GeneralSubtree::DnsName).collect(),
            // Name constraints do not cover addresses, so these are excluded separately.
            excluded_subtrees: vec![
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv4Addr::UNSPECIFIED.into(), 0)),
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv6Addr::UNSPECIFIED.into(), 0)),
            ],
        });
        let certificate = params.self_signed(&key)?;
        let (key_pem, pem) = (key.serialize_pem(), certificate.pem());
        let file = format!("{key_pem}{pem}");
        Ok((Self { issuer: Issuer::new(params, key), certificate: certificate.into(), pem, not_after }, file))
    }

    /// Parses the content of the file; `None` if it is not one that we have written.
    fn parse(file: &[u8]) -> Option<Self> {
        // The key comes first.
        let key = KeyPair::from_pem(std::str::from_utf8(file).ok()?).ok()?;
        let certificate = CertificateDer::from_pem_slice(file).ok()?;
        let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return None;
        }
        let not_after = Timestamp::from_seconds(parsed.validity().not_after.timestamp() as f64);
        let at = file.windows(BEGIN.len()).position(|window| window == BEGIN)?;
        let pem = String::from_utf8(file[at..].to_vec()).ok()?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).ok()?;
        Some(Self { issuer, certificate, pem, not_after })
    }

    fn is_usable(&self, domains: &[String], now: Timestamp) -> bool {
        let Ok((_, parsed)) = X509Certificate::from_der(&self.certificate) else { return false };
        let Ok(Some(constraints)) = parsed.name_constraints() else { return false };
        let permitted = constraints.value.permitted_subtrees.iter().flatten();
        let permitted: Vec<_> = permitted.map(|subtree| &subtree.base).collect();
        let is_valid_yet = parsed.validity().not_before.timestamp() <= now.as_seconds() as i64;
        is_valid_yet
            && !self.expires_soon(now)
            && domains.iter().all(|domain| permitted.contains(&&GeneralName::DNSName(domain)))
    }
}

/// Whether a CA exists. Fails like [`Ca::load_or_create`] but creates nothing.
pub fn exists(state_dir: &Path, project: &Path) -> Result<bool, CaError> {
    let dir = state_dir.join(DIRECTORY);
    if dir.symlink_metadata().is_err() {
        return Ok(false);
    }
    refuse_published(state_dir, project)?;
    private_dir::check(&dir)?;
    Ok(read(&dir.join(FILE))?.is_some())
}

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// Deletes the CA's directory. Returns its path, or `None` if there was no CA.
pub fn remove(state_dir: &Path) -> io::Result<Option<PathBuf>> {
    let dir = state_dir.join(DIRECTORY);
    match fs::remove_dir_all(&dir) {
        Ok(()) => Ok(Some(dir)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display()))),
    }
}

/// Refuses a state directory inside the project, whose files are deployed and copied into images.
fn refuse_published(state_dir: &Path, project: &Path) -> Result<(), CaError> {
    // The directory may not exist yet, so its nearest existing ancestor is checked.
    let real = state_dir.ancestors().find_map(|dir| dir.canonicalize().ok()).unwrap_or_else(|| state_dir.to_owned());
    if real.starts_with(project) {
        return Err(CaError::InsideProject(state_dir.to_owned()));
    }
    Ok(())
}

/// Reads the file if it exists. Fails unless it is private to our user.
fn read(path: &Path) -> Result<Option<Vec<u8>>, CaError> {
    let refused = |flaw: String| CaError::File { path: path.to_owned(), flaw };
    let unreadable = |e: io::Error| refused(format!("cannot be read ({})", e.kind()));
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(Errno::ELOOP as i32) => return Err(refused("is a link".into())),
        Err(e) => return Err(refused(format!("cannot be opened ({})", e.kind()))),
    };
    let meta = file.metadata().map_err(unreadable)?;
    let flaw = if !meta.is_file() || meta.nlink() != 1 {
        "is not a plain file with one name"
    } else if meta.uid() != Uid::effective().as_raw() {
        "belongs to another user"
    } else if meta.mode() & 0o077 != 0 {
        "is open to others"
    } else {
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
        return Ok(Some(bytes));
    };
    Err(refused(flaw.into()))
}

fn distinguished_name(common_name: &str) -> rcgen::DistinguishedName {
    let mut name = rcgen::DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn set_validity(params: &mut CertificateParams, not_before: Timestamp, not_after: Timestamp) {
    let date = |at: Timestamp| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_seconds());
    (params.not_before, params.not_after) = (date(not_before), date(not_after));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::fs::symlink;
    use std::sync::Arc;

    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};
    use tempfile::TempDir;

    use crate::os::tls;

    const NOW: Timestamp = Timestamp::from_millis(1_900_000_000_000);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn domains() -> Vec<String> {
        vec!["vercel.com".into(), "ai-gateway.vercel.sh".into()]
    }

    /// A home directory with a project.
    struct Home(TempDir);

    impl Home {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            fs::create_dir(dir.path().join("web")).expect("a project");
            Self(dir)
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().canonicalize().expect("a directory").join(name)
        }

        fn file(&self) -> PathBuf {
            self.at("state/ca").join(FILE)
        }

        async fn ca_at(&self, now: Timestamp) -> Result<Ca, CaError> {
            Ca::load_or_create(&self.at("state"), &self.at("web"), domains(), now).await
        }

        async fn ca(&self) -> Ca {
            self.ca_at(NOW).await.unwrap_or_else(|e| panic!("{e}"))
        }

        async fn refusal(&self) -> String {
            self.ca_at(NOW).await.err().expect("refused").to_string()
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    }

    /// Whether a client that trusts the CA accepts its certificate for this host.
    fn is_accepted(ca: &Ca, host: &str) -> bool {
        let leaf = ca.issue(host, NOW).expect("a certificate").expect("in time");
        let mut roots = RootCertStore::empty();
        roots.add(ca.certificate.clone()).expect("a root");
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider()).build();
        let name = ServerName::try_from(host).expect("a name");
        let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.as_seconds()));
        verifier.expect("a verifier").verify_server_cert(&leaf.certificate, &[], &name, &[], now).is_ok()
    }

    #[tokio::test]
    async fn the_ca_is_created_once_and_private() {
        let home = Home::new();
        let made = home.ca().await;
        assert_eq!((mode(&home.at("state/ca")), mode(&home.file())), (0o700, 0o600));
        assert_eq!(fs::read_dir(home.at("state/ca")).expect("a directory").count(), 1, "no temporary file is left");
        let again = home.ca().await;
        assert_eq!((again.pem(), again.not_after), (made.pem(), made.not_after));
        assert!(is_accepted(&again, "api.vercel.com"));
        let shown = made.pem();
        assert!(shown.starts_with("-----BEGIN CERTIFICATE-----") && !shown.contains("PRIVATE KEY"), "{shown}");
        assert_eq!(shown.matches("BEGIN").count(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn concurrent_processes_create_a_single_ca() {
        let home = Arc::new(Home::new());
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let home = home.clone();
                tokio::spawn(async move { home.ca().await.pem().to_owned() })
            })
            .collect();
        let mut made = Vec::new();
        for task in tasks {
            made.push(task.await.expect("a CA"));
        }
        made.dedup();
        assert_eq!(made.len(), 1);
    }

    #[tokio::test]
    async fn the_ca_is_constrained_to_its_domains() {
        let ca = Home::new().ca().await;
        for host in ["vercel.com", "api.vercel.com", "api-iad1.vercel.com", "ai-gateway.vercel.sh"] {
            assert!(is_accepted(&ca, host), "{host}");
        }
        for host in ["github.com", "vercel.sh", "evilvercel.com", "127.0.0.1", "10.0.0.1", "::1", "2606:4700::1"] {
            assert!(!is_accepted(&ca, host), "{host}");
        }
    }

    #[tokio::test]
    async fn certificates_have_the_right_usages_and_validity() {
        let ca = Home::new().ca().await;
        let (_, root) = X509Certificate::from_der(&ca.certificate).expect("a certificate");
        let lifetime = |certificate: &X509Certificate<'_>| {
            let validity = certificate.validity();
            (validity.not_after.timestamp() - validity.not_before.timestamp()) as u64
        };
        assert!(lifetime(&root) <= 90 * 24 * 3600, "{}", lifetime(&root));
        let constraints = root.name_constraints().expect("readable").expect("there");
        assert!(constraints.critical);
        let basic = root.basic_constraints().expect("readable").expect("there");
        assert!(basic.critical && basic.value.ca && basic.value.path_len_constraint == Some(0));
        let usage = root.key_usage().expect("readable").expect("there");
        assert!(usage.critical && usage.value.key_cert_sign() && !usage.value.digital_signature());
        let extended = root.extended_key_usage().expect("readable").expect("there").value;
        assert!(extended.server_auth && !extended.client_auth && !extended.any);

        let leaf = ca.issue("api.vercel.com", NOW).expect("a certificate").expect("in time");
        let (_, parsed) = X509Certificate::from_der(&leaf.certificate).expect("a certificate");
        assert!(lifetime(&parsed) <= 24 * 3600);
        assert_eq!(parsed.validity().not_after.timestamp() as u64, leaf.not_after.as_seconds());
        let names = parsed.subject_alternative_name().expect("readable").expect("there");
        assert_eq!(names.value.general_names, [GeneralName::DNSName("api.vercel.com")]);
        assert!(!parsed.is_ca());
        assert_ne!(parsed.public_key().raw, root.public_key().raw);

        let last_hour = ca.not_after.minus(Duration::from_secs(3600));
        assert_eq!(
            ca.issue("api.vercel.com", last_hour).expect("a certificate").expect("in time").not_after,
            ca.not_after
        );
        assert!(ca.issue("api.vercel.com", ca.not_after).expect("no error").is_none());
    }

    #[tokio::test]
    async fn a_file_that_others_could_have_read_or_placed_is_refused_and_left_alone() {
        let home = Home::new();
        home.ca().await;
        let file = home.file();
        let content = fs::read(&file).expect("a file");
        for bits in [0o644, 0o640, 0o604, 0o620, 0o602] {
            set_mode(&file, bits);
            assert!(home.refusal().await.contains("is open to others"), "{bits:o}");
            assert_eq!((mode(&file), fs::read(&file).expect("a file")), (bits, content.clone()), "unchanged");
        }
        set_mode(&file, 0o600);
        for bits in [0o755, 0o750, 0o701] {
            set_mode(&home.at("state/ca"), bits);
            assert!(home.refusal().await.contains("others have access"), "{bits:o}");
        }
        set_mode(&home.at("state/ca"), 0o700);
        assert!(home.ca_at(NOW).await.is_ok());

        fs::hard_link(&file, home.at("second-name")).expect("a link");
        assert!(home.refusal().await.contains("one name"));
        fs::remove_file(home.at("second-name")).expect("removed");
        if Uid::effective().is_root() {
            std::os::unix::fs::chown(&file, Some(65534), None).expect("given away");
            assert!(home.refusal().await.contains("another user"));
            std::os::unix::fs::chown(home.at("state/ca"), Some(65534), None).expect("given away");
            assert!(home.refusal().await.contains("not a directory of yours"));
            std::os::unix::fs::chown(home.at("state/ca"), Some(0), None).expect("taken back");
        }
        fs::rename(&file, home.at("elsewhere")).expect("moved");
        symlink(home.at("elsewhere"), &file).expect("a link");
        let refusal = home.refusal().await;
        assert!(refusal.contains("is a link") && refusal.contains("connect-sidecar ca remove"), "{refusal}");
        fs::remove_file(&file).expect("removed");
        fs::create_dir(&file).expect("a directory");
        assert!(home.refusal().await.contains("plain file"));
        fs::remove_dir_all(home.at("state/ca")).expect("removed");
        symlink(home.at("web"), home.at("state/ca")).expect("a link");
        assert!(home.refusal().await.contains("is a link"));
    }

    #[tokio::test]
    async fn no_ca_is_created_inside_the_project() {
        let home = Home::new();
        for state in ["web", "web/.state", "web/a/b/c"] {
            let refusal =
                Ca::load_or_create(&home.at(state), &home.at("web"), domains(), NOW).await.err().expect("refused");
            assert!(refusal.to_string().contains("inside the project"), "{refusal}");
        }
        symlink(home.at("web"), home.at("state")).expect("a link");
        assert!(home.refusal().await.contains("inside the project"));
    }

    #[tokio::test]
    async fn git_ignores_the_key_even_if_the_home_is_a_work_tree() {
        let home = Home::new();
        let git = |arguments: &[&str]| {
            let mut git = std::process::Command::new("git");
            git.arg("-C").arg(home.at("")).args(arguments).env("HOME", home.at("")).env_remove("GIT_DIR");
            let ended = git.output().expect("git");
            assert!(ended.status.success(), "{ended:?}");
            String::from_utf8(ended.stdout).expect("text")
        };
        git(&["init", "--quiet"]);
        fs::write(home.at("state.txt"), "").expect("a file");
        home.ca().await;
        // As in a home directory that tracks only named files.
        fs::write(home.at(".gitignore"), "!state/\n!state/**\n").expect("a file");
        git(&["add", "--all"]);
        let added = git(&["ls-files"]);
        assert!(added.contains("state.txt") && !added.contains("state/"), "{added}");
    }

    #[tokio::test]
    async fn an_unusable_ca_is_replaced() {
        let home = Home::new();
        let first = home.ca().await;
        let later = |days| NOW.plus(DAY * days);
        let kept = home.ca_at(later(82)).await.expect("a CA");
        assert_eq!(kept.pem(), first.pem());
        assert!(!kept.expires_soon(later(82)) && kept.expires_soon(later(83)));
        let renewed = home.ca_at(later(83)).await.expect("a CA");
        assert_ne!(renewed.pem(), first.pem());
        assert_eq!(home.ca_at(later(83)).await.expect("a CA").pem(), renewed.pem(), "it is reused");

        let earlier = home.ca().await;
        assert_ne!(earlier.pem(), renewed.pem(), "the renewed one is not valid yet");

        let more = [domains(), vec!["gateway.example".into()]].concat();
        let wider = Ca::load_or_create(&home.at("state"), &home.at("web"), more, NOW).await.expect("a CA");
        assert!(is_accepted(&wider, "gateway.example") && !is_accepted(&earlier, "gateway.example"));
        assert_eq!(home.ca().await.pem(), wider.pem(), "it permits these domains, too");

        let good = fs::read_to_string(home.file()).expect("a file");
        let other = Home::new();
        other.ca().await;
        let foreign = fs::read_to_string(other.file()).expect("a file");
        let at = |text: &str| text.find("-----BEGIN CERT").expect("a certificate");
        let mixed = format!("{}{}", &foreign[..at(&foreign)], &good[at(&good)..]);
        for content in ["", "x", &good[..good.len() / 2], &good[..at(&good)], &good[at(&good)..], &mixed] {
            fs::write(home.file(), content).expect("written");
            let ca = home.ca().await;
            assert_ne!(ca.pem(), wider.pem());
            assert!(is_accepted(&ca, "api.vercel.com"), "{} bytes", content.len());
        }
    }

    #[tokio::test]
    async fn removal_deletes_the_whole_ca_and_nothing_else() {
        let home = Home::new();
        let state = home.at("state");
        assert_eq!(remove(&state).expect("nothing to do"), None);
        home.ca().await;
        fs::write(state.join("2774.json"), "{}").expect("a file");
        set_mode(&home.file(), 0o644);
        assert_eq!(remove(&state).expect("removed"), Some(state.join("ca")));
        let mut left: Vec<_> =
            fs::read_dir(&state).expect("a directory").flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, [".gitignore", "2774.json"]);
        symlink(home.at("web"), state.join("ca")).expect("a link");
        fs::write(home.at("web/app.js"), "").expect("a file");
        assert_eq!(remove(&state).expect("removed"), Some(state.join("ca")));
        assert!(home.at("web/app.js").exists() && !state.join("ca").is_symlink());
    }
}
