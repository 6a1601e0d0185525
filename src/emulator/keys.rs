//! RSA keys: of providers that sign, and of apps that prove with one who they are. A private key leaves here only as the
//! PEM that an app is given at a provider's console.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::Serialize;
use serde_json::{Value, json};

/// An RSA key of 2048 bits.
pub struct RsaKey {
    signing: EncodingKey,
    verifying: DecodingKey,
    pem: String,
    public_der: Vec<u8>,
}

impl fmt::Debug for RsaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RsaKey({})", self.fingerprint())
    }
}

impl RsaKey {
    /// A new key. Takes a fraction of a second.
    pub fn new() -> Result<Self, String> {
        let key = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)
            .map_err(|e| e.to_string())?;
        Self::of(&key)
    }

    /// The key in a PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Result<Self, String> {
        let key = rcgen::KeyPair::from_pem_and_sign_algo(pem, &rcgen::PKCS_RSA_SHA256).map_err(|e| e.to_string())?;
        Self::of(&key)
    }

    fn of(key: &rcgen::KeyPair) -> Result<Self, String> {
        use rcgen::PublicKeyData;
        let pem = key.serialize_pem();
        Ok(Self {
            signing: EncodingKey::from_rsa_pem(pem.as_bytes()).map_err(|e| e.to_string())?,
            verifying: DecodingKey::from_rsa_der(key.public_key_raw()),
            public_der: key.subject_public_key_info(),
            pem,
        })
    }

    /// The key of all providers of this process: making one takes longer than all else at a start.
    pub(super) fn of_this_process() -> Result<Arc<Self>, String> {
        static KEY: OnceLock<Arc<RsaKey>> = OnceLock::new();
        match KEY.get() {
            Some(key) => Ok(key.clone()),
            None => Self::new().map(|made| KEY.get_or_init(|| Arc::new(made)).clone()),
        }
    }

    /// The private key as a PKCS#8 PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// SHA-256 of the public key's DER in base64, as Snowflake names keys.
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", BASE64_STANDARD.encode(digest(&SHA256, &self.public_der)))
    }

    /// The public key as a set of one JWK.
    pub(super) fn jwks(&self) -> Value {
        let jwk = Jwk::from_encoding_key(&self.signing, Algorithm::RS256).map(|mut jwk| {
            jwk.common.key_id = Some(self.fingerprint());
            jwk.common.public_key_use = Some(PublicKeyUse::Signature);
            jwk
        });
        json!({"keys": jwk.into_iter().collect::<Vec<_>>()})
    }

    /// An RS256 JWT of these claims.
    pub(super) fn sign(&self, claims: &impl Serialize) -> String {
        let header = Header { kid: Some(self.fingerprint()), ..Header::new(Algorithm::RS256) };
        // The key was made for this algorithm and the claims are plain data.
        jsonwebtoken::encode(&header, claims, &self.signing).unwrap_or_default()
    }

    /// The claims of an RS256 JWT that this key signed and that is in force: begun, not over, and to last no longer than
    /// `longest` seconds.
    pub(super) fn verify(&self, jwt: &str, now: SystemTime, longest: u64) -> Result<Value, &'static str> {
        let mut validation = Validation::new(Algorithm::RS256);
        // Times are compared with the emulator's clock, below.
        validation.validate_exp = false;
        validation.required_spec_claims.clear();
        validation.validate_aud = false;
        let claims = jsonwebtoken::decode::<Value>(jwt, &self.verifying, &validation)
            .map_err(|_| "the signature is wrong")?
            .claims;
        let (now, time) = (seconds(now), |name: &str| claims[name].as_u64());
        match (time("iat"), time("exp")) {
            (Some(iat), _) if iat > now => Err("`iat` is in the future"),
            (Some(_), Some(exp)) if exp <= now => Err("`exp` is in the past"),
            (Some(_), Some(exp)) if exp > now + longest => Err("`exp` is too far in the future"),
            (Some(_), Some(_)) => Ok(claims),
            _ => Err("`iat` or `exp` is missing"),
        }
    }
}

/// A time as JWTs have it.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn verifies_only_its_own_tokens_while_they_are_in_force() {
        let (key, other) = (RsaKey::of_this_process().expect("a key"), RsaKey::new().expect("a key"));
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let jwt = key.sign(&json!({"iss": "7", "iat": 1000, "exp": 1600}));
        assert_eq!(key.verify(&jwt, at(1000), 600).expect("its own")["iss"], "7");
        for (key, now, longest, says) in [
            (&*key, 999, 600, "in the future"),
            (&*key, 1600, 600, "in the past"),
            (&*key, 1000, 599, "too far"),
            (&other, 1000, 600, "signature"),
        ] {
            let wrong = key.verify(&jwt, at(now), longest).expect_err(says);
            assert!(wrong.contains(says), "{wrong}");
        }
        let endless = key.sign(&json!({"iss": "7", "iat": 1000}));
        assert!(key.verify(&endless, at(1000), 600).is_err());
        assert_eq!(RsaKey::from_pem(key.pem()).expect("a key").fingerprint(), key.fingerprint());
    }
}
