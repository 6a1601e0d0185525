//! Certificates for the hosts that are opened: one each, made when it is first needed, in memory only.
//!
//! A handshake that names another host than the tunnel's gets none.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::ResolvesServerCertUsingSni;
use rustls::sign::CertifiedKey;

use super::ca::{Ca, Leaf};
use crate::os::clock::{Clock, Timestamp};
use crate::os::tls;

/// A certificate this close to its end is made anew: the handshake and the first requests are still to come.
const RENEW_BEFORE: Duration = Duration::from_secs(3600);
/// There are as many regions as an app can think of.
const MAX_KEPT: usize = 64;

/// Why there is no certificate.
#[derive(Debug)]
pub(super) enum Problem {
    /// The CA has ended: whoever was given it must be given another.
    CaEnded,
    /// It could not be made.
    Failed(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CaEnded => f.write_str("the local CA that this run trusts has ended; start the run anew"),
            Self::Failed(e) => write!(f, "could not make a certificate: {e}"),
        }
    }
}

/// What the hosts are opened with.
pub(super) struct Leaves {
    ca: Ca,
    clock: Clock,
    kept: Mutex<HashMap<String, Kept>>,
}

struct Kept {
    config: Arc<ServerConfig>,
    begins: Timestamp,
    ends: Timestamp,
}

impl Leaves {
    /// Certificates of this CA, none yet.
    pub(super) fn new(ca: Ca, clock: Clock) -> Self {
        Self { ca, clock, kept: Mutex::default() }
    }

    /// The CA behind them.
    pub(super) fn ca(&self) -> &Ca {
        &self.ca
    }

    /// The TLS of this host, in lower case.
    pub(super) fn tls_of(&self, host: &str) -> Result<Arc<ServerConfig>, Problem> {
        // Those who verify it go by the machine's own clock.
        let now = self.clock.local();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.get(host)
            && kept.begins <= now
            && kept.ends.since(now) > RENEW_BEFORE
        {
            return Ok(kept.config.clone());
        }
        let failed = |e: &dyn fmt::Display| Problem::Failed(e.to_string());
        let leaf = self.ca.issue(host, now).map_err(|e| failed(&e))?.ok_or(Problem::CaEnded)?;
        let (begins, ends) = (leaf.begins, leaf.ends);
        let config = Arc::new(server_config(host, leaf).map_err(|e| failed(&e))?);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(host.to_owned(), Kept { config: config.clone(), begins, ends });
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

    async fn leaves() -> (Leaves, Clock) {
        let dir = tempfile::tempdir().expect("a directory");
        let clock = Clock::test(Timestamp::from_millis(1_900_000_000_000));
        let (state, project) = (dir.path().join("state"), dir.path().join("web"));
        let ca = Ca::ready(&state, &project, vec!["vercel.com".into()], clock.local()).await.expect("a CA");
        (Leaves::new(ca, clock.clone()), clock)
    }

    #[tokio::test]
    async fn one_is_kept_until_near_its_end_by_the_wall_clock() {
        let (leaves, clock) = leaves().await;
        let tls = || leaves.tls_of("api.vercel.com").expect("TLS");
        let first = tls();
        clock.advance(Duration::from_secs(21 * 3600));
        assert!(Arc::ptr_eq(&first, &tls()));
        clock.advance(Duration::from_secs(3600));
        let second = tls();
        assert!(!Arc::ptr_eq(&first, &second), "an hour is left of it");
        clock.set(clock.local().minus(Duration::from_secs(2 * 3600)));
        assert!(!Arc::ptr_eq(&second, &tls()), "it has not begun yet");
    }

    #[tokio::test]
    async fn each_host_has_its_own_and_not_too_many_are_kept() {
        let (leaves, _) = leaves().await;
        let tls = |host: &str| leaves.tls_of(host).expect("TLS");
        assert!(!Arc::ptr_eq(&tls("api.vercel.com"), &tls("api-iad1.vercel.com")));
        for region in 0..2 * MAX_KEPT {
            tls(&format!("api-{region}.vercel.com"));
        }
        assert!(leaves.kept.lock().expect("a lock").len() <= MAX_KEPT);
    }

    #[tokio::test]
    async fn there_is_none_once_the_ca_has_ended() {
        let (leaves, clock) = leaves().await;
        clock.advance(Duration::from_secs(90 * 24 * 3600));
        let problem = leaves.tls_of("api.vercel.com").expect_err("no certificate");
        assert!(problem.to_string().contains("start the run anew"), "{problem}");
    }
}
