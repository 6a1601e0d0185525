//! Group I: interception. Cases that need a clock or a resolver are in `intercept` and `runs`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use connect_sidecar::os::clock::Clock;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::support::tunnel::{Run, ask};

use super::contract::{Sidecar, start};

/// The only file in the directory.
const KEY: &str = "key-and-certificate.pem";

async fn begin(s: &Sidecar) -> Run {
    Run::begin(s.addr, &s.key(), Clock::system().local()).await
}

fn ca_dir(s: &Sidecar) -> PathBuf {
    s.instance().0.parent().expect("a directory").join("ca")
}

#[tokio::test]
async fn tI01_decrypts_vercel_alone_with_a_name_constrained_ca() {
    let s = start().await;
    let run = begin(&s).await;
    let opened = run.open("api.vercel.com").await;
    let leaf = &opened.stream.get_ref().1.peer_certificates().expect("certificates")[0];
    let (_, leaf) = X509Certificate::from_der(leaf).expect("a certificate");
    let names = leaf.subject_alternative_name().expect("readable").expect("there");
    assert_eq!(names.value.general_names, [GeneralName::DNSName("api.vercel.com")]);
    let validity = leaf.validity();
    assert!(validity.not_after.timestamp() - validity.not_before.timestamp() <= 24 * 3600);
    let (_, pem) = x509_parser::pem::parse_x509_pem(run.ca().as_bytes()).expect("PEM");
    let ca = pem.parse_x509().expect("a certificate");
    let constraints = ca.name_constraints().expect("readable").expect("there");
    assert!(constraints.critical && constraints.value.permitted_subtrees.is_some());
}

#[tokio::test]
async fn tI02_reaches_neither_this_machine_nor_lookalike_hosts() {
    let s = start().await;
    let run = begin(&s).await;
    let port = s.addr.port();
    for target in [
        &format!("127.0.0.1:{port}"),
        "localhost:22",
        "169.254.169.254:80",
        &format!("[::1]:{port}"),
        "api.vercel.com:80",
        "api.vercel.com.evil:443",
    ] {
        for request in [run.connect(target), run.stranger(target)] {
            request.send().await.assert_refused(403, "host_not_allowed", target);
        }
    }
    s.alive().await;
}

#[tokio::test]
async fn tI04_refuses_a_ca_that_others_can_read() {
    let s = start().await;
    begin(&s).await;
    let mode = |path: &PathBuf| fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777;
    let set = |path: &PathBuf, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    let dir = ca_dir(&s);
    let key = dir.join(KEY);
    assert_eq!((mode(&dir), mode(&key)), (0o700, 0o600));
    // A new start for each, because a running sidecar keeps its CA in memory.
    for what in ["an open key", "an open directory", "a link"] {
        let other = start().await;
        let dir = ca_dir(&other);
        let own_key = dir.join(KEY);
        fs::create_dir_all(&dir).expect("a directory");
        set(&dir, if what == "an open directory" { 0o755 } else { 0o700 });
        if what == "a link" {
            std::os::unix::fs::symlink(&key, &own_key).expect("a link");
        } else {
            fs::copy(&key, &own_key).expect("a copy");
            set(&own_key, if what == "an open key" { 0o644 } else { 0o600 });
        }
        let reply = ask(other.addr, &other.key()).json("{}").send().await;
        reply.assert_refused(503, "interception_unavailable", what);
    }
}
