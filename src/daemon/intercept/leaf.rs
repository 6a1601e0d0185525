//! Certificates for intercepted hosts, one per host, issued on first use and kept in memory only.
//!
//! A handshake gets a certificate only if its SNI names the tunnel's host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::ResolvesServerCertUsingSni;
use rustls::sign::CertifiedKey;

use super::ca::{Ca, Leaf};
use crate::os::clock::{Clock, Timestamp};
use crate::os::tls;

/// A certificate is replaced this long before its expiry, so that it outlives the handshake and the first requests.
const RENEW_BEFORE: Duration = Duration::from_secs(3600);
/// Most cached certificates. An app may invent any number of region names.
const MAX_CACHED: usize = 64;

/// Why no certificate could be issued.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeafError {
    #[error("the local CA that this run trusts has expired; restart the run")]
    CaExpired,
    #[error("could not issue a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    #[error("could not use the certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// Issues and caches certificates.
pub(super) struct LeafCertificates {
    ca: Ca,
    clock: Clock,
    cache: Mutex<HashMap<String, CachedConfig>>,
}

struct CachedConfig {
    config: Arc<ServerConfig>,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl LeafCertificates {
    /// Certificates signed by this CA.
    pub(super) fn new(ca: Ca, clock: Clock) -> Self {
        Self { ca, clock, cache: Mutex::default() }
    }

    /// The CA that signs them.
    pub(super) fn ca(&self) -> &Ca {
        &self.ca
    }

    /// The TLS configuration for this host, in lower case.
    pub(super) fn server_config(&self, host: &str) -> Result<Arc<ServerConfig>, LeafError> {
        // Clients verify certificates by the machine's own clock.
        let now = self.clock.local();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = cache.get(host)
            && cached.not_before <= now
            && cached.not_after.since(now) > RENEW_BEFORE
        {
            return Ok(cached.config.clone());
        }
        let leaf = self.ca.issue(host, now)?.ok_or(LeafError::CaExpired)?;
        let (not_before, not_after) = (leaf.not_before, leaf.not_after);
        let config = Arc::new(server_config(host, leaf)?);
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        cache.insert(host.to_owned(), CachedConfig { config: config.clone(), not_before, not_after });
        Ok(config)
    }
}

fn server_config(host: &str, leaf: Leaf) -> Result<ServerConfig, rustls::Error> {
    let provider = tls::provider();
    let key = PrivatePkcs8KeyDer::from(leaf.key.serialize_der());
    let certified = CertifiedKey::from_der(vec![leaf.certificate], key.into(), &provider)?;
    let mut by_name = ResolvesServerCertUsingSni::new();
    by_name.add(host, certified)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(by_name));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn certificates() -> (LeafCertificates, Clock) {
        let dir = tempfile::tempdir().expect("a directory");
        let clock = Clock::test(Timestamp::from_millis(1_900_000_000_000));
        let (state, project) = (dir.path().join("state"), dir.path().join("web"));
        let ca = Ca::load_or_create(&state, &project, vec!["vercel.com".into()], clock.local()).await.expect("a CA");
        (LeafCertificates::new(ca, clock.clone()), clock)
    }

    #[tokio::test]
    async fn a_certificate_is_cached_until_near_its_expiry_by_the_local_clock() {
        let (certificates, clock) = certificates().await;
        let tls = || certificates.server_config("api.vercel.com").expect("TLS");
        let first = tls();
        clock.advance(Duration::from_secs(21 * 3600));
        assert!(Arc::ptr_eq(&first, &tls()));
        clock.advance(Duration::from_secs(3600));
        let second = tls();
        assert!(!Arc::ptr_eq(&first, &second), "only an hour is left");
        clock.set(clock.local().minus(Duration::from_secs(2 * 3600)));
        assert!(!Arc::ptr_eq(&second, &tls()), "it is not valid yet");
    }

    #[tokio::test]
    async fn each_host_has_its_own_certificate_and_the_cache_is_bounded() {
        let (certificates, _) = certificates().await;
        let tls = |host: &str| certificates.server_config(host).expect("TLS");
        assert!(!Arc::ptr_eq(&tls("api.vercel.com"), &tls("api-iad1.vercel.com")));
        for region in 0..2 * MAX_CACHED {
            tls(&format!("api-{region}.vercel.com"));
        }
        assert!(certificates.cache.lock().expect("a lock").len() <= MAX_CACHED);
    }

    #[tokio::test]
    async fn an_expired_ca_issues_no_certificate() {
        let (certificates, clock) = certificates().await;
        clock.advance(Duration::from_secs(90 * 24 * 3600));
        let error = certificates.server_config("api.vercel.com").expect_err("no certificate");
        assert!(error.to_string().contains("restart the run"), "{error}");
    }
}
