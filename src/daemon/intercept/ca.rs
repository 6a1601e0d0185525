//! The local CA: made on this machine, for this machine, kept in `<state dir>/ca/`, trusted by the children of `run` alone.
//!
//! It can vouch for Vercel's hosts and for nothing else, says so in a critical name constraint, and ends after 90 days
//! (docs/security.md I1). Key and certificate are one file, so that they always belong together. The key never leaves
//! it but into our memory, and is not used if anybody else could have read or placed it. Neither the system's trust store
//! nor our own client for upstream ever learns of this CA.

use std::fmt;
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

/// From its beginning to its end.
const LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// One that ends within this time is made anew: whoever is given it now will use it for a while.
const RENEW_BEFORE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates begin a little earlier than they are made: a clock may be put back.
const BACKDATED: Duration = Duration::from_secs(3600);
/// A certificate for a host, from its beginning to its end; never beyond the CA's.
const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);
const DIRECTORY: &str = "ca";
const FILE: &str = "key-and-certificate.pem";
/// A larger file is none of ours, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Why there is no CA to be used: what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

/// A CA that may be used.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// Of the certificate alone.
    pem: String,
    ends: Timestamp,
}

/// A certificate for a host, with its key.
pub(super) struct Leaf {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: KeyPair,
    pub(super) begins: Timestamp,
    pub(super) ends: Timestamp,
}

impl Ca {
    /// The machine's CA, made if there is none, or none that permits all of `domains` and lasts another week. `domains`
    /// are names of which all below them are permitted, too. Refused where others may have had their hands on the key,
    /// and inside `project`, from where it could be published; git is told to leave it out, wherever that is.
    pub(super) async fn ready(
        state_dir: &Path,
        project: &Path,
        domains: Vec<String>,
        now: Timestamp,
    ) -> Result<Self, Unfit> {
        refuse_published(state_dir, project)?;
        let dir = private_dir::make_within(state_dir, DIRECTORY).map_err(unfit)?;
        // Of two processes that find no CA, the second takes the one that the first has made.
        let only_us = private_dir::lock(&dir).await.map_err(unfit)?;
        private_dir::keep_from_git(state_dir).map_err(unfit)?;
        let working = tokio::task::spawn_blocking(move || {
            let _only_us = only_us;
            let path = dir.join(FILE);
            let kept = read(&path)?.and_then(|pem| Self::parse(&pem));
            if let Some(kept) = kept.filter(|kept| kept.will_do(&domains, now)) {
                return Ok(kept);
            }
            let (made, pem) =
                Self::make(&domains, now).map_err(|e| Unfit(format!("could not make a local CA: {e}")))?;
            atomic_file::write(&path, pem.as_bytes(), 0o600, Durability::Machine)
                .map_err(|e| Unfit(format!("could not write {}: {e}", path.display())))?;
            Ok(made)
        });
        working.await.unwrap_or_else(|_| Err(Unfit("making the local CA broke off".into())))
    }

    /// The certificate.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// Whether it is to be replaced by the next that is asked for.
    pub(super) fn ends_soon(&self, now: Timestamp) -> bool {
        self.ends.since(now) <= RENEW_BEFORE
    }

    /// A certificate for this host, with a key of its own; `None` once the CA has ended.
    pub(super) fn issue(&self, host: &str, now: Timestamp) -> Result<Option<Leaf>, rcgen::Error> {
        let begins = now.minus(BACKDATED);
        let ends = begins.plus(LEAF_LIFE).min(self.ends);
        if ends <= now {
            return Ok(None);
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([host.to_owned()])?;
        params.distinguished_name = named(host);
        set_life(&mut params, begins, ends);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.into();
        Ok(Some(Leaf { certificate, key, begins, ends }))
    }

    fn make(domains: &[String], now: Timestamp) -> Result<(Self, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let begins = now.minus(BACKDATED);
        let ends = begins.plus(LIFE);
        let mut params = CertificateParams::default();
        // So that two of them are told apart, where a program is given both.
        let id: String = params.key_identifier(&key).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name = named(&format!("{LOCAL_CA} {id}"));
        set_life(&mut params, begins, ends);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: domains.iter().cloned().map(GeneralSubtree::DnsName).collect(),
            // A constraint on names says nothing of addresses.
            excluded_subtrees: vec![
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv4Addr::UNSPECIFIED.into(), 0)),
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv6Addr::UNSPECIFIED.into(), 0)),
            ],
        });
        let certificate = params.self_signed(&key)?;
        let (key_pem, pem) = (key.serialize_pem(), certificate.pem());
        let file = format!("{key_pem}{pem}");
        Ok((Self { issuer: Issuer::new(params, key), certificate: certificate.into(), pem, ends }, file))
    }

    /// `None` if it is not what we would have written.
    fn parse(file: &[u8]) -> Option<Self> {
        // The key comes first.
        let key = KeyPair::from_pem(std::str::from_utf8(file).ok()?).ok()?;
        let certificate = CertificateDer::from_pem_slice(file).ok()?;
        let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return None;
        }
        let ends = Timestamp::from_seconds(parsed.validity().not_after.timestamp() as f64);
        let at = file.windows(BEGIN.len()).position(|window| window == BEGIN)?;
        let pem = String::from_utf8(file[at..].to_vec()).ok()?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).ok()?;
        Some(Self { issuer, certificate, pem, ends })
    }

    fn will_do(&self, domains: &[String], now: Timestamp) -> bool {
        let Ok((_, parsed)) = X509Certificate::from_der(&self.certificate) else { return false };
        let Ok(Some(constraints)) = parsed.name_constraints() else { return false };
        let permitted = constraints.value.permitted_subtrees.iter().flatten();
        let permitted: Vec<_> = permitted.map(|subtree| &subtree.base).collect();
        let has_begun = parsed.validity().not_before.timestamp() <= now.as_seconds() as i64;
        has_begun
            && !self.ends_soon(now)
            && domains.iter().all(|domain| permitted.contains(&&GeneralName::DNSName(domain)))
    }
}

fn unfit(problem: private_dir::Problem) -> Unfit {
    Unfit(problem.into())
}

/// Whether there is a CA; refused as [`Ca::ready`] would refuse it. Makes nothing.
pub fn is_there(state_dir: &Path, project: &Path) -> Result<bool, Unfit> {
    let dir = state_dir.join(DIRECTORY);
    if dir.symlink_metadata().is_err() {
        return Ok(false);
    }
    refuse_published(state_dir, project)?;
    private_dir::check(&dir).map_err(unfit)?;
    Ok(read(&dir.join(FILE))?.is_some())
}

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// Deletes the CA and all that belongs to it; where it was, if there was one.
pub fn remove(state_dir: &Path) -> io::Result<Option<PathBuf>> {
    let dir = state_dir.join(DIRECTORY);
    match fs::remove_dir_all(&dir) {
        Ok(()) => Ok(Some(dir)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display()))),
    }
}

/// What lies in a project is deployed with it, and copied into images.
fn refuse_published(state_dir: &Path, project: &Path) -> Result<(), Unfit> {
    // What is not there yet lies where the nearest of its parents that is there lies.
    let real = state_dir.ancestors().find_map(|dir| dir.canonicalize().ok()).unwrap_or_else(|| state_dir.to_owned());
    if real.starts_with(project) {
        let shown = state_dir.display();
        return Err(Unfit(format!(
            "the key of the local CA would lie in {shown}, which is inside the project; set XDG_STATE_HOME to another place"
        )));
    }
    Ok(())
}

/// The file, if there is one and it is ours alone.
fn read(path: &Path) -> Result<Option<Vec<u8>>, Unfit> {
    let refused = |what: &str| {
        Err(Unfit(format!(
            "{} {what}, so the local CA is not used; run `connect-sidecar ca remove`, and the next run makes another",
            path.display()
        )))
    };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(Errno::ELOOP as i32) => return refused("is a link"),
        Err(e) => return refused(&format!("cannot be opened ({})", e.kind())),
    };
    let unreadable = |e: io::Error| refused(&format!("cannot be read ({})", e.kind()));
    let meta = match file.metadata() {
        Ok(meta) => meta,
        Err(e) => return unreadable(e),
    };
    if !meta.is_file() || meta.nlink() != 1 {
        return refused("is not a plain file with one name");
    }
    if meta.uid() != Uid::effective().as_raw() {
        return refused("belongs to another user");
    }
    if meta.mode() & 0o077 != 0 {
        return refused("is open to others");
    }
    let mut bytes = Vec::new();
    match file.take(MAX_FILE_BYTES).read_to_end(&mut bytes) {
        Ok(_) => Ok(Some(bytes)),
        Err(e) => unreadable(e),
    }
}

fn named(common_name: &str) -> rcgen::DistinguishedName {
    let mut name = rcgen::DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn set_life(params: &mut CertificateParams, begins: Timestamp, ends: Timestamp) {
    let date = |at: Timestamp| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_seconds());
    (params.not_before, params.not_after) = (date(begins), date(ends));
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

    /// A place for state, and a project beside it.
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

        async fn ready_at(&self, now: Timestamp) -> Result<Ca, Unfit> {
            Ca::ready(&self.at("state"), &self.at("web"), domains(), now).await
        }

        async fn ca(&self) -> Ca {
            self.ready_at(NOW).await.unwrap_or_else(|e| panic!("{e}"))
        }

        async fn refusal(&self) -> String {
            self.ready_at(NOW).await.err().expect("refused").to_string()
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    }

    /// Whether a client that trusts the CA takes its certificate for this host.
    fn is_taken(ca: &Ca, host: &str) -> bool {
        let leaf = ca.issue(host, NOW).expect("a certificate").expect("in time");
        let mut roots = RootCertStore::empty();
        roots.add(ca.certificate.clone()).expect("a root");
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider()).build();
        let name = ServerName::try_from(host).expect("a name");
        let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.as_seconds()));
        verifier.expect("a verifier").verify_server_cert(&leaf.certificate, &[], &name, &[], now).is_ok()
    }

    #[tokio::test]
    async fn it_is_made_once_and_closed_to_others() {
        let home = Home::new();
        let made = home.ca().await;
        assert_eq!((mode(&home.at("state/ca")), mode(&home.file())), (0o700, 0o600));
        assert_eq!(fs::read_dir(home.at("state/ca")).expect("a directory").count(), 1, "nothing else is left");
        let again = home.ca().await;
        assert_eq!((again.pem(), again.ends), (made.pem(), made.ends));
        assert!(is_taken(&again, "api.vercel.com"));
        let shown = made.pem();
        assert!(shown.starts_with("-----BEGIN CERTIFICATE-----") && !shown.contains("PRIVATE KEY"), "{shown}");
        assert_eq!(shown.matches("BEGIN").count(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn any_number_of_processes_at_once_end_with_one() {
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
    async fn it_vouches_for_the_hosts_that_it_was_made_for_and_no_other() {
        let ca = Home::new().ca().await;
        for host in ["vercel.com", "api.vercel.com", "api-iad1.vercel.com", "ai-gateway.vercel.sh"] {
            assert!(is_taken(&ca, host), "{host}");
        }
        for host in ["github.com", "vercel.sh", "evilvercel.com", "127.0.0.1", "10.0.0.1", "::1", "2606:4700::1"] {
            assert!(!is_taken(&ca, host), "{host}");
        }
    }

    #[tokio::test]
    async fn its_certificates_say_what_they_are_for_and_end_in_time() {
        let ca = Home::new().ca().await;
        let (_, root) = X509Certificate::from_der(&ca.certificate).expect("a certificate");
        let life = |certificate: &X509Certificate<'_>| {
            let validity = certificate.validity();
            (validity.not_after.timestamp() - validity.not_before.timestamp()) as u64
        };
        assert!(life(&root) <= 90 * 24 * 3600, "{}", life(&root));
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
        assert!(life(&parsed) <= 24 * 3600);
        assert_eq!(parsed.validity().not_after.timestamp() as u64, leaf.ends.as_seconds());
        let names = parsed.subject_alternative_name().expect("readable").expect("there");
        assert_eq!(names.value.general_names, [GeneralName::DNSName("api.vercel.com")]);
        assert!(!parsed.is_ca());
        assert_ne!(parsed.public_key().raw, root.public_key().raw);

        let last_hour = ca.ends.minus(Duration::from_secs(3600));
        assert_eq!(ca.issue("api.vercel.com", last_hour).expect("a certificate").expect("in time").ends, ca.ends);
        assert!(ca.issue("api.vercel.com", ca.ends).expect("no error").is_none());
    }

    #[tokio::test]
    async fn one_that_others_could_have_read_or_placed_is_refused_and_left() {
        let home = Home::new();
        home.ca().await;
        let file = home.file();
        let content = fs::read(&file).expect("a file");
        for bits in [0o644, 0o640, 0o604, 0o620, 0o602] {
            set_mode(&file, bits);
            assert!(home.refusal().await.contains("is open to others"), "{bits:o}");
            assert_eq!((mode(&file), fs::read(&file).expect("a file")), (bits, content.clone()), "left as it is");
        }
        set_mode(&file, 0o600);
        for bits in [0o755, 0o750, 0o701] {
            set_mode(&home.at("state/ca"), bits);
            assert!(home.refusal().await.contains("others have access"), "{bits:o}");
        }
        set_mode(&home.at("state/ca"), 0o700);
        assert!(home.ready_at(NOW).await.is_ok());

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
    async fn none_is_made_where_it_could_be_published() {
        let home = Home::new();
        for state in ["web", "web/.state", "web/a/b/c"] {
            let refusal = Ca::ready(&home.at(state), &home.at("web"), domains(), NOW).await.err().expect("refused");
            assert!(refusal.to_string().contains("inside the project"), "{refusal}");
        }
        symlink(home.at("web"), home.at("state")).expect("a link");
        assert!(home.refusal().await.contains("inside the project"));
    }

    #[tokio::test]
    async fn git_leaves_its_key_out_where_a_home_is_a_work_tree() {
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
        // As a home of which all is left out but what is named.
        fs::write(home.at(".gitignore"), "!state/\n!state/**\n").expect("a file");
        git(&["add", "--all"]);
        let added = git(&["ls-files"]);
        assert!(added.contains("state.txt") && !added.contains("state/"), "{added}");
    }

    #[tokio::test]
    async fn one_that_will_not_do_is_made_anew() {
        let home = Home::new();
        let first = home.ca().await;
        let later = |days| NOW.plus(DAY * days);
        let kept = home.ready_at(later(82)).await.expect("a CA");
        assert_eq!(kept.pem(), first.pem());
        assert!(!kept.ends_soon(later(82)) && kept.ends_soon(later(83)));
        let renewed = home.ready_at(later(83)).await.expect("a CA");
        assert_ne!(renewed.pem(), first.pem());
        assert_eq!(home.ready_at(later(83)).await.expect("a CA").pem(), renewed.pem(), "it is kept");

        let earlier = home.ca().await;
        assert_ne!(earlier.pem(), renewed.pem(), "that one has not begun yet");

        let more = [domains(), vec!["gateway.example".into()]].concat();
        let wider = Ca::ready(&home.at("state"), &home.at("web"), more, NOW).await.expect("a CA");
        assert!(is_taken(&wider, "gateway.example") && !is_taken(&earlier, "gateway.example"));
        assert_eq!(home.ca().await.pem(), wider.pem(), "it permits what is wanted");

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
            assert!(is_taken(&ca, "api.vercel.com"), "{} bytes", content.len());
        }
    }

    #[tokio::test]
    async fn all_of_it_is_removed_and_nothing_but_it() {
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
