//! RSA keys of the OIDC issuer, of providers that sign tokens, and of apps that authenticate with a key.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::Serialize;
use serde_json::Value;

/// Why an RSA key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It could not be generated or parsed.
    #[error("could not generate or parse an RSA key: {0}")]
    Key(#[from] rcgen::Error),
    /// It could not be prepared for signing.
    #[error("could not load an RSA key for signing: {0}")]
    Signing(#[from] jsonwebtoken::errors::Error),
}

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
    /// Generates a key, which takes a fraction of a second.
    pub fn new() -> Result<Self, KeyError> {
        Self::from_pair(&rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?)
    }

    /// Parses a PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        Self::from_pair(&rcgen::KeyPair::from_pem_and_sign_algo(pem, &rcgen::PKCS_RSA_SHA256)?)
    }

    fn from_pair(key: &rcgen::KeyPair) -> Result<Self, KeyError> {
        use rcgen::PublicKeyData;
        let pem = key.serialize_pem();
        Ok(Self {
            signing: EncodingKey::from_rsa_pem(pem.as_bytes())?,
            verifying: DecodingKey::from_rsa_der(key.public_key_raw()),
            public_der: key.subject_public_key_info(),
            pem,
        })
    }

    /// The key of all mock providers of this process. It is shared because generating one dominates the start-up time.
    pub(super) fn of_this_process() -> Result<Arc<Self>, KeyError> {
        static KEY: OnceLock<Arc<RsaKey>> = OnceLock::new();
        match KEY.get() {
            Some(key) => Ok(key.clone()),
            None => Self::new().map(|key| KEY.get_or_init(|| Arc::new(key)).clone()),
        }
    }

    /// The private key as a PKCS#8 PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The SHA-256 of the public key's DER in base64, as Snowflake identifies keys.
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", BASE64_STANDARD.encode(digest(&SHA256, &self.public_der)))
    }

    /// The public key as a JWK set with one key.
    pub(super) fn jwks(&self, key_id: &str) -> JwkSet {
        let jwk = Jwk::from_encoding_key(&self.signing, Algorithm::RS256).ok().map(|mut jwk| {
            jwk.common.key_id = Some(key_id.to_owned());
            jwk.common.public_key_use = Some(PublicKeyUse::Signature);
            jwk
        });
        JwkSet { keys: jwk.into_iter().collect() }
    }

    /// Signs an RS256 JWT, with the fingerprint as key id.
    pub(super) fn sign(&self, claims: &impl Serialize) -> String {
        self.sign_as(self.fingerprint(), claims)
    }

    /// Signs an RS256 JWT with this key id.
    pub(super) fn sign_as(&self, key_id: String, claims: &impl Serialize) -> String {
        let header = Header { kid: Some(key_id), ..Header::new(Algorithm::RS256) };
        // Cannot fail: the key fits the algorithm, and the claims are plain data.
        jsonwebtoken::encode(&header, claims, &self.signing).unwrap_or_default()
    }

    /// The public key, for verifying a JWT.
    pub(super) fn decoding_key(&self) -> &DecodingKey {
        &self.verifying
    }

    /// Verifies the signature of an RS256 JWT and its times: `iat` is past, and `exp` is at most `max_life` seconds
    /// ahead.
    pub(super) fn verify(&self, jwt: &str, now: SystemTime, max_life: u64) -> Result<Value, &'static str> {
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
            (Some(_), Some(exp)) if exp > now + max_life => Err("`exp` is too far in the future"),
            (Some(_), Some(_)) => Ok(claims),
            _ => Err("`iat` or `exp` is missing"),
        }
    }
}

/// Seconds since 1970, as in JWTs.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_verifies_only_its_own_tokens_while_they_are_valid() {
        let (key, other) = (RsaKey::of_this_process().expect("a key"), RsaKey::new().expect("a key"));
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let jwt = key.sign(&json!({"iss": "7", "iat": 1000, "exp": 1600}));
        assert_eq!(key.verify(&jwt, at(1000), 600).expect("its own")["iss"], "7");
        for (key, now, max_life, expected) in [
            (&*key, 999, 600, "in the future"),
            (&*key, 1600, 600, "in the past"),
            (&*key, 1000, 599, "too far"),
            (&other, 1000, 600, "signature"),
        ] {
            let error = key.verify(&jwt, at(now), max_life).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        let endless = key.sign(&json!({"iss": "7", "iat": 1000}));
        assert!(key.verify(&endless, at(1000), 600).is_err());
        assert_eq!(RsaKey::from_pem(key.pem()).expect("a key").fingerprint(), key.fingerprint());
    }
}
