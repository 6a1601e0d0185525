//! A development OIDC token: its claims, what makes it unusable, and when it is valid. Claims are read and not verified,
//! which is upstream's task.

use std::fmt;
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Principal;
use crate::os::clock::Timestamp;

/// The longest token that is accepted, in bytes (docs/configuration.md section 3).
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// A token is used this long before its `nbf`, to tolerate a clock that is behind.
const NOT_BEFORE_TOLERANCE: Duration = Duration::from_secs(60);

/// The claims of an OIDC token that are used (docs/vercel.md section 5). Not verified.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Claims {
    /// Issuer.
    #[serde(default)]
    pub iss: String,
    /// Subject.
    pub sub: Option<String>,
    /// Team slug.
    pub owner: Option<String>,
    /// Team id.
    pub owner_id: Option<String>,
    /// Project name.
    pub project: Option<String>,
    /// Project id.
    pub project_id: Option<String>,
    /// Environment.
    pub environment: Option<String>,
    /// The Vercel user that a development token was issued to.
    pub user_id: Option<String>,
    /// A string or a list of strings.
    #[serde(default)]
    pub(super) aud: serde_json::Value,
    #[serde(default)]
    pub(super) exp: serde_json::Value,
    #[serde(default)]
    pub(super) iat: serde_json::Value,
    #[serde(default)]
    pub(super) nbf: serde_json::Value,
}

impl Claims {
    /// Team and project for people, such as `acme/web`.
    pub fn project_name(&self) -> String {
        let name_or_id = |name: &Option<String>, id: &Option<String>| name.clone().or_else(|| id.clone());
        match (name_or_id(&self.owner, &self.owner_id), name_or_id(&self.project, &self.project_id)) {
            (Some(owner), Some(project)) => format!("{owner}/{project}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => "an unnamed project".into(),
        }
    }

    /// Everything that distinguishes principals, for people, such as `acme/web (development, user_1)`.
    pub fn description(&self) -> String {
        let details = [&self.environment, &self.user_id].into_iter().flatten().cloned().collect::<Vec<_>>();
        match details.as_slice() {
            [] => self.project_name(),
            details => format!("{} ({})", self.project_name(), details.join(", ")),
        }
    }
}

/// Why a text is not accepted as a token (docs/configuration.md section 3). Contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejection {
    /// Over [`MAX_TOKEN_BYTES`].
    #[error("it is longer than 16 KiB")]
    TooLong,
    /// Not three base64url parts.
    #[error("it does not have three base64url parts")]
    NotThreeParts,
    /// The header is not a JSON object with an `alg`.
    #[error("its header cannot be read")]
    Header,
    /// `alg` is `none`.
    #[error("it is unsigned (`alg` is `none`)")]
    Unsigned,
    /// The payload is not a JSON object, or a claim has the wrong type.
    #[error("its claims cannot be read")]
    Payload,
    /// No numeric `exp`.
    #[error("it has no numeric `exp`")]
    NoExpiry,
    /// The issuer is not Vercel.
    #[error("its issuer is not https://oidc.vercel.com")]
    Issuer,
}

/// A Vercel OIDC token.
pub struct OidcToken {
    pub(super) secret: SecretString,
    /// Its claims.
    pub claims: Claims,
    /// Its expiry.
    pub expires_at: Timestamp,
    issued_at: Option<Timestamp>,
    not_before: Option<Timestamp>,
    pub(super) principal: Principal,
    pub(super) fingerprint: String,
}

impl OidcToken {
    /// Decodes a JWT. The signature is not verified.
    pub fn decode(secret: SecretString) -> Result<Self, TokenRejection> {
        #[derive(Deserialize)]
        struct Header {
            alg: String,
        }
        let text = secret.expose_secret();
        if text.len() > MAX_TOKEN_BYTES {
            return Err(TokenRejection::TooLong);
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenRejection::NotThreeParts);
        };
        let is_base64url = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if [header, payload, signature].iter().any(|p| p.is_empty() || !p.bytes().all(is_base64url)) {
            return Err(TokenRejection::NotThreeParts);
        }
        let header: Header = decode_object(header).ok_or(TokenRejection::Header)?;
        if header.alg.eq_ignore_ascii_case("none") {
            return Err(TokenRejection::Unsigned);
        }
        let claims: Claims = decode_object(payload).ok_or(TokenRejection::Payload)?;
        let seconds = |claim: &serde_json::Value| claim.as_f64().map(Timestamp::from_seconds);
        let expires_at = seconds(&claims.exp).ok_or(TokenRejection::NoExpiry)?;
        if claims.iss != "https://oidc.vercel.com" && !claims.iss.starts_with("https://oidc.vercel.com/") {
            return Err(TokenRejection::Issuer);
        }
        let principal = Principal::of(&[
            Some(&claims.iss),
            claims.owner_id.as_deref(),
            claims.project_id.as_deref(),
            claims.environment.as_deref(),
            claims.user_id.as_deref().or(claims.sub.as_deref()),
        ]);
        Ok(Self {
            expires_at,
            issued_at: seconds(&claims.iat),
            not_before: seconds(&claims.nbf),
            principal,
            fingerprint: fingerprint(text),
            claims,
            secret,
        })
    }

    /// Whether `self` was issued before `other`. If they do not tell, or are equal, whether `self` expires before
    /// `other`.
    pub fn is_older_than(&self, other: &Self) -> bool {
        match (self.issued_at, other.issued_at) {
            (Some(a), Some(b)) if a != b => a < b,
            _ => self.expires_at < other.expires_at,
        }
    }

    /// Whether both are the same text.
    pub fn is_same_text(&self, other: &Self) -> bool {
        self.secret.expose_secret() == other.secret.expose_secret()
    }

    /// The time from its issue to its expiry, if it has an `iat`.
    pub fn lifetime(&self) -> Option<Duration> {
        Some(self.expires_at.since(self.issued_at?))
    }

    /// The secret text. Only for users who explicitly ask for it.
    pub fn expose(&self) -> &str {
        self.secret.expose_secret()
    }

    /// Whether it is neither expired nor before its `nbf`.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        now < self.expires_at && !self.is_early_at(now)
    }

    pub(super) fn is_early_at(&self, now: Timestamp) -> bool {
        self.not_before.is_some_and(|nbf| now.plus(NOT_BEFORE_TOLERANCE) < nbf)
    }

    /// The first 8 hex digits of the token's SHA-256, to identify it in logs.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Accepts padding and trailing bits, like the SDKs.
pub(super) const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Decodes a part of a JWT that must be a JSON object. Serde alone would also accept an array, and invalid UTF-8 in
/// fields that it skips.
pub(super) fn decode_object<T: DeserializeOwned>(part: &str) -> Option<T> {
    let json = String::from_utf8(BASE64URL.decode(part).ok()?).ok()?;
    if json.trim_start().starts_with('{') { serde_json::from_str(&json).ok() } else { None }
}

pub(super) fn fingerprint(secret: &str) -> String {
    let hash = digest::digest(&digest::SHA256, secret.as_bytes());
    hash.as_ref().iter().take(4).map(|b| format!("{b:02x}")).collect()
}

impl fmt::Debug for OidcToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OidcToken")
            .field("fingerprint", &self.fingerprint)
            .field("expires_at", &self.expires_at)
            .finish()
    }
}
