//! TLS as a client: one provider, verification always on, trust in the platform's roots and those we are given.
//!
//! There is no switch to turn verification off, and no key log. A local CA is never among the roots, whoever names it: the
//! variables of a `run`, in which we may be, name a bundle that has it.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::{ClientConfig, RootCertStore};

/// What the names of local CAs begin with: all that they sign has it, too.
pub const LOCAL_CA: &str = "connect-sidecar local CA";

/// The one provider of cryptography.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that trusts the platform's roots and `extra`. Takes some 40 ms: it reads the platform's store.
pub fn client_config(mut extra: Vec<CertificateDer<'static>>) -> Result<ClientConfig, rustls::Error> {
    extra.retain(|certificate| !is_of_local_ca(certificate));
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    #[cfg(target_os = "macos")]
    let builder = {
        // Trust is the keychain's to judge, which no local CA is ever in.
        let verifier = rustls_platform_verifier::Verifier::new_with_extra_roots(extra, provider())?;
        // It is the platform's verifier that we set: rustls calls any but its own dangerous.
        builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
    };
    #[cfg(not(target_os = "macos"))]
    let builder = builder.with_root_certificates(roots(extra, rustls_native_certs::load_native_certs())?);
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// `extra`, and what can be read of the system's store or of what `SSL_CERT_FILE` and `SSL_CERT_DIR` name instead.
#[cfg(any(not(target_os = "macos"), test))]
fn roots(
    extra: Vec<CertificateDer<'static>>,
    platform: rustls_native_certs::CertificateResult,
) -> Result<RootCertStore, rustls::Error> {
    let mut store = RootCertStore::empty();
    for certificate in extra {
        store.add(certificate)?;
    }
    store.add_parsable_certificates(platform.certs.into_iter().filter(|certificate| !is_of_local_ca(certificate)));
    if store.is_empty() {
        let why: String = platform.errors.iter().map(|e| format!("; {e}")).collect();
        return Err(rustls::Error::General(format!("no certificates to trust were found{why}")));
    }
    Ok(store)
}

/// Whether it is a local CA, this machine's or another's, or a certificate of one.
fn is_of_local_ca(certificate: &CertificateDer<'_>) -> bool {
    certificate.windows(LOCAL_CA.len()).any(|window| window == LOCAL_CA.as_bytes())
}

/// Whether a PEM file holds the certificate of a local CA.
pub fn holds_local_ca(path: &Path) -> bool {
    let certificates = CertificateDer::pem_file_iter(path).into_iter().flatten().flatten();
    certificates.into_iter().any(|certificate| is_of_local_ca(&certificate))
}

/// A client that trusts nobody, for connections that are plain.
pub fn client_config_without_roots() -> Result<ClientConfig, rustls::Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

/// The certificates in a PEM file; an error says what is wrong with it, without a word of what it holds.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err("it holds no PEM certificate".into()),
        Err(pem::Error::Io(e)) => Err(format!("it cannot be read ({})", e.kind())),
        // The file may be a private key, and some of these errors repeat a line.
        Err(_) => Err("it is not PEM".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};

    fn authority(name: &str) -> rcgen::Certificate {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate")
    }

    fn der(name: &str) -> CertificateDer<'static> {
        authority(name).der().clone()
    }

    #[test]
    fn no_local_ca_is_trusted_and_all_else_is() {
        let local = || vec![der("connect-sidecar local CA 0a1b2c3d"), der("connect-sidecar local CA of another")];
        let users = || vec![der("Acme Root"), der("connect-sidecar emulator")];
        let platform = |certs| {
            let mut result = rustls_native_certs::CertificateResult::default();
            result.certs = certs;
            result
        };
        for (extra, found, trusted) in [
            (vec![], [local(), users()].concat(), Some(2)),
            (users(), local(), Some(2)),
            (users(), users(), Some(4)),
            (vec![], local(), None),
            (vec![], vec![], None),
        ] {
            let store = roots(extra, platform(found)).ok();
            assert_eq!(store.map(|store| store.len()), trusted);
        }
        assert!(client_config(local()).is_ok(), "what the system trusts stays");
    }

    #[test]
    fn a_bundle_of_a_run_is_known_by_what_it_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        let (ours, theirs) = (authority("connect-sidecar local CA 0a1b2c3d").pem(), authority("Acme Root").pem());
        for (content, holds) in [
            (format!("{theirs}{ours}"), true),
            (ours.clone(), true),
            (theirs.clone(), false),
            (format!("# connect-sidecar local CA\n{theirs}"), false),
            ("nonsense".into(), false),
        ] {
            let path = dir.path().join("bundle.pem");
            std::fs::write(&path, &content).expect("written");
            assert_eq!(holds_local_ca(&path), holds, "{content}");
        }
        assert!(!holds_local_ca(&dir.path().join("none")));
    }
}
