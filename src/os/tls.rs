//! TLS client configuration: trusts the platform's roots and additional certificates. Verification cannot be turned
//! off, and there is no key log.
//!
//! The certificate of a local CA is never trusted. It can be in the bundle that `SSL_CERT_FILE` names, because a
//! sidecar may itself be started by `run`.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::{ClientConfig, RootCertStore};

/// Prefix of the names of local CAs. It is also in every certificate that they sign, as the issuer.
pub const LOCAL_CA: &str = "connect-sidecar local CA";

/// The cryptography provider of the whole program.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A configuration that trusts the platform's roots and `extra`. Takes some 40 ms to read the platform's store.
pub fn client_config(mut extra: Vec<CertificateDer<'static>>) -> Result<ClientConfig, rustls::Error> {
    extra.retain(|certificate| !is_from_local_ca(certificate));
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    #[cfg(target_os = "macos")]
    let builder = {
        // The keychain decides. A local CA is never added to it.
        let verifier = rustls_platform_verifier::Verifier::new_with_extra_roots(extra, provider())?;
        // rustls calls every verifier but its own dangerous. This is the platform's.
        builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
    };
    #[cfg(not(target_os = "macos"))]
    let builder = builder.with_root_certificates(roots(extra, rustls_native_certs::load_native_certs())?);
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// `extra` and the readable certificates of the platform's store (or of `SSL_CERT_FILE` and `SSL_CERT_DIR`).
#[cfg(any(not(target_os = "macos"), test))]
fn roots(
    extra: Vec<CertificateDer<'static>>,
    platform: rustls_native_certs::CertificateResult,
) -> Result<RootCertStore, rustls::Error> {
    let mut store = RootCertStore::empty();
    for certificate in extra {
        store.add(certificate)?;
    }
    store.add_parsable_certificates(platform.certs.into_iter().filter(|certificate| !is_from_local_ca(certificate)));
    if store.is_empty() {
        let causes: String = platform.errors.iter().map(|e| format!("; {e}")).collect();
        return Err(rustls::Error::General(format!("no certificates to trust were found{causes}")));
    }
    Ok(store)
}

/// Whether it is the certificate of a local CA, of this or another machine, or was issued by one.
fn is_from_local_ca(certificate: &CertificateDer<'_>) -> bool {
    certificate.windows(LOCAL_CA.len()).any(|window| window == LOCAL_CA.as_bytes())
}

/// Whether a PEM file contains the certificate of a local CA.
pub fn holds_local_ca(path: &Path) -> bool {
    let certificates = CertificateDer::pem_file_iter(path).into_iter().flatten().flatten();
    certificates.into_iter().any(|certificate| is_from_local_ca(&certificate))
}

/// A configuration that trusts no certificate, for code that only makes plain connections.
pub fn client_config_without_roots() -> Result<ClientConfig, rustls::Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

/// Why no certificates were read. Contains nothing of the file, which may be a private key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadCertificatesError {
    /// It has no certificate.
    #[error("it holds no PEM certificate")]
    NoCertificate,
    /// It cannot be read.
    #[error("it cannot be read ({0})")]
    Io(std::io::ErrorKind),
    /// It has other content.
    #[error("it is not PEM")]
    NotPem,
}

/// The certificates in a PEM file, at least one.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ReadCertificatesError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(ReadCertificatesError::NoCertificate),
        Err(pem::Error::Io(e)) => Err(ReadCertificatesError::Io(e.kind())),
        // Some of these errors quote a line of the file.
        Err(_) => Err(ReadCertificatesError::NotPem),
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
    fn certificates_of_local_cas_are_not_trusted() {
        let local_cas = || vec![der("connect-sidecar local CA 0a1b2c3d"), der("connect-sidecar local CA of another")];
        let others = || vec![der("Acme Root"), der("connect-sidecar emulator")];
        let platform = |certs| {
            let mut result = rustls_native_certs::CertificateResult::default();
            result.certs = certs;
            result
        };
        for (extra, found, trusted) in [
            (vec![], [local_cas(), others()].concat(), Some(2)),
            (others(), local_cas(), Some(2)),
            (others(), others(), Some(4)),
            (vec![], local_cas(), None),
            (vec![], vec![], None),
        ] {
            let store = roots(extra, platform(found)).ok();
            assert_eq!(store.map(|store| store.len()), trusted);
        }
        assert!(client_config(local_cas()).is_ok(), "the platform's roots stay");
    }

    #[test]
    fn a_bundle_with_a_local_ca_is_detected() {
        let dir = tempfile::tempdir().expect("a directory");
        let (local, other) = (authority("connect-sidecar local CA 0a1b2c3d").pem(), authority("Acme Root").pem());
        for (content, holds) in [
            (format!("{other}{local}"), true),
            (local.clone(), true),
            (other.clone(), false),
            (format!("# connect-sidecar local CA\n{other}"), false),
            ("nonsense".into(), false),
        ] {
            let path = dir.path().join("bundle.pem");
            std::fs::write(&path, &content).expect("written");
            assert_eq!(holds_local_ca(&path), holds, "{content}");
        }
        assert!(!holds_local_ca(&dir.path().join("none")));
    }
}
