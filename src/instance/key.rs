//! The key of a running instance: whoever holds it may ask what only the user may, and whoever answers with a proof of it
//! is that instance.
//!
//! It is made anew at each start and appears nowhere but in the instance's own file. It must never be shown, nor sent to
//! a port whose owner has not proven to have it, and nothing that is derived from it may serve as anything else. What runs
//! are given is made from another key of this kind, which whoever takes the instance's place goes on with.

use std::{fmt, io};

use aws_lc_rs::{constant_time, hmac};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderName;

/// Carries the instance key.
pub const KEY_HEADER: HeaderName = HeaderName::from_static("sidecar-key");
/// Carries a nonce of 16 to 64 bytes: whoever is about to send the key asks first who answers at the port.
pub const NONCE_HEADER: HeaderName = HeaderName::from_static("sidecar-nonce");
/// Carries the proof that this instance answers.
pub const PROOF_HEADER: HeaderName = HeaderName::from_static("sidecar-proof");

/// The key, compared in constant time.
#[derive(Clone)]
pub struct Key(String);

impl Key {
    /// Takes the key's text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// A fresh key: 32 random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 32];
        // The system's own: the TLS library's generator takes some 60 ms to seed, and nobody waits for TLS at the start.
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Self(URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// The text, for the instance's own file and for a request of ours.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether this is it.
    pub fn is(&self, sent: &[u8]) -> bool {
        constant_time::verify_slices_are_equal(sent, self.0.as_bytes()).is_ok()
    }

    /// Answers a nonce: who listens on `port` has this key. The port is in it, so that nobody can pass the question on to
    /// the instance on another one.
    pub fn proof(&self, port: u16, nonce: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), &statement(port, nonce)))
    }

    /// Whether this is the answer to that nonce.
    pub fn is_proven_by(&self, port: u16, nonce: &[u8], proof: &[u8]) -> bool {
        let tag = URL_SAFE_NO_PAD.decode(proof).unwrap_or_default();
        hmac::verify(&self.signing(), &statement(port, nonce), &tag).is_ok()
    }

    /// The key that the programs of runs send: who has it may ask what apps may, and nothing else.
    pub fn run_key(&self) -> Self {
        Self(URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), b"run key\n")))
    }

    /// The secret of a run of this name: who has it may use our interception. Nothing of it has to be remembered, and it
    /// ends with the key.
    pub fn run_secret(&self, run: &str) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.signing(), &run_statement(run)))
    }

    /// Whether this is that run's secret.
    pub fn is_run_secret(&self, run: &str, sent: &[u8]) -> bool {
        let tag = URL_SAFE_NO_PAD.decode(sent).unwrap_or_default();
        hmac::verify(&self.signing(), &run_statement(run), &tag).is_ok()
    }

    fn signing(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

/// Anybody may have any nonce signed: the first line keeps the outcome from being anything else that the key derives.
fn statement(port: u16, nonce: &[u8]) -> Vec<u8> {
    [format!("instance proof\n{port}\n").as_bytes(), nonce].concat()
}

fn run_statement(run: &str) -> Vec<u8> {
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
    fn keys_are_long_and_never_the_same() {
        let (a, b) = (Key::random().expect("a key"), Key::random().expect("a key"));
        assert_eq!(a.text().len(), 43);
        assert_ne!(a.text(), b.text());
        assert!(a.is(a.text().as_bytes()) && !a.is(b.text().as_bytes()) && !a.is(b""));
    }

    #[test]
    fn a_proof_is_of_this_key_this_port_and_this_nonce() {
        let key = Key::new("secret".into());
        let proof = key.proof(2774, b"nonce");
        assert!(key.is_proven_by(2774, b"nonce", proof.as_bytes()));
        assert!(!key.is_proven_by(2775, b"nonce", proof.as_bytes()));
        assert!(!key.is_proven_by(2774, b"another", proof.as_bytes()));
        assert!(!Key::new("other".into()).is_proven_by(2774, b"nonce", proof.as_bytes()));
        for forged in ["", "x", &proof[1..]] {
            assert!(!key.is_proven_by(2774, b"nonce", forged.as_bytes()), "{forged}");
        }
    }

    #[test]
    fn a_runs_secret_is_of_this_key_and_this_run_and_no_proof() {
        let key = Key::new("secret".into());
        let secret = key.run_secret("r1");
        assert!(key.is_run_secret("r1", secret.as_bytes()));
        assert!(!key.is_run_secret("r2", secret.as_bytes()));
        assert!(!Key::new("other".into()).is_run_secret("r1", secret.as_bytes()));
        let run_key = key.run_key();
        assert_eq!((run_key.text().len(), key.is(run_key.text().as_bytes())), (43, false));
        let others = [key.text(), run_key.text(), &key.proof(1, b"r1"), &key.proof(1, b"run secret\nr1")];
        for forged in ["", "x", &secret[1..]].into_iter().chain(others) {
            assert!(!key.is_run_secret("r1", forged.as_bytes()), "{forged}");
        }
    }

    #[test]
    fn the_key_is_never_shown() {
        assert_eq!(format!("{:?}", Key::new("secret".into())), "[redacted]");
    }
}
