//! The key of a running instance. It authorizes requests that only the user may send, and the instance proves its
//! identity with it.
//!
//! A new key is generated at each start and stored only in the instance's state file. It is never shown, and never sent
//! to a port whose owner has not proven to have it. Values derived from it are separated by purpose. The secrets of
//! runs are derived from another key of this type, which a successor of the instance takes over.

use std::{fmt, io};

use aws_lc_rs::{constant_time, hmac};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderName;

/// The header with the instance key.
pub const KEY_HEADER: HeaderName = HeaderName::from_static("sidecar-key");
/// The header with a nonce of 16 to 64 bytes, by which a client asks for a proof before it sends the key.
pub const NONCE_HEADER: HeaderName = HeaderName::from_static("sidecar-nonce");
/// The response header with the instance's proof.
pub const PROOF_HEADER: HeaderName = HeaderName::from_static("sidecar-proof");

/// A key, compared in constant time.
#[derive(Clone)]
pub struct Key(String);

impl Key {
    /// A key with this text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// A new key of 32 random bytes, in base64url.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 32];
        // The system's generator, since seeding that of the TLS library takes some 60 ms.
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Self(URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// The text, for the state file and for requests.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether `sent` equals the key.
    pub fn matches(&self, sent: &[u8]) -> bool {
        constant_time::verify_slices_are_equal(sent, self.0.as_bytes()).is_ok()
    }

    /// The proof for a nonce that the instance on `port` has this key. It includes the port, so that another program
    /// cannot relay the nonce to the instance.
    pub fn proof(&self, port: u16, nonce: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), &proof_message(port, nonce)))
    }

    /// Whether this is the proof for the nonce.
    pub fn verify_proof(&self, port: u16, nonce: &[u8], proof: &[u8]) -> bool {
        let tag = URL_SAFE_NO_PAD.decode(proof).unwrap_or_default();
        hmac::verify(&self.signing(), &proof_message(port, nonce), &tag).is_ok()
    }

    /// The key for programs of runs, which authorizes only what apps may request.
    pub fn run_key(&self) -> Self {
        Self(URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), b"run key\n")))
    }

    /// The secret of a run, which authorizes using the interception. It is derived from the run's name, so that it need
    /// not be stored.
    pub fn run_secret(&self, run: &str) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), &run_message(run)))
    }

    /// Whether `sent` is the run's secret.
    pub fn is_run_secret(&self, run: &str, sent: &[u8]) -> bool {
        let tag = URL_SAFE_NO_PAD.decode(sent).unwrap_or_default();
        hmac::verify(&self.signing(), &run_message(run), &tag).is_ok()
    }

    fn signing(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

/// The signed message of a proof. Since anybody may choose the nonce, the first line separates proofs from other
/// derived values.
fn proof_message(port: u16, nonce: &[u8]) -> Vec<u8> {
    [format!("instance proof\n{port}\n").as_bytes(), nonce].concat()
}

fn run_message(run: &str) -> Vec<u8> {
    format!("run secret\n{run}").into_bytes()
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_keys_are_long_and_differ() {
        let (a, b) = (Key::random().expect("a key"), Key::random().expect("a key"));
        assert_eq!(a.text().len(), 43);
        assert_ne!(a.text(), b.text());
        assert!(a.matches(a.text().as_bytes()) && !a.matches(b.text().as_bytes()) && !a.matches(b""));
    }

    #[test]
    fn a_proof_is_bound_to_key_port_and_nonce() {
        let key = Key::new("secret".into());
        let proof = key.proof(2774, b"nonce");
        assert!(key.verify_proof(2774, b"nonce", proof.as_bytes()));
        assert!(!key.verify_proof(2775, b"nonce", proof.as_bytes()));
        assert!(!key.verify_proof(2774, b"another", proof.as_bytes()));
        assert!(!Key::new("other".into()).verify_proof(2774, b"nonce", proof.as_bytes()));
        for forged in ["", "x", &proof[1..]] {
            assert!(!key.verify_proof(2774, b"nonce", forged.as_bytes()), "{forged}");
        }
    }

    #[test]
    fn a_runs_secret_is_bound_to_key_and_run_and_differs_from_other_values() {
        let key = Key::new("secret".into());
        let secret = key.run_secret("r1");
        assert!(key.is_run_secret("r1", secret.as_bytes()));
        assert!(!key.is_run_secret("r2", secret.as_bytes()));
        assert!(!Key::new("other".into()).is_run_secret("r1", secret.as_bytes()));
        let run_key = key.run_key();
        assert_eq!((run_key.text().len(), key.matches(run_key.text().as_bytes())), (43, false));
        let others = [key.text(), run_key.text(), &key.proof(1, b"r1"), &key.proof(1, b"run secret\nr1")];
        for forged in ["", "x", &secret[1..]].into_iter().chain(others) {
            assert!(!key.is_run_secret("r1", forged.as_bytes()), "{forged}");
        }
    }

    #[test]
    fn a_key_is_redacted_in_debug_output() {
        assert_eq!(format!("{:?}", Key::new("secret".into())), "[redacted]");
    }
}
