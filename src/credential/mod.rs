//! Who we are: the credential that is injected, and the principal it stands for.
//!
//! Everything here is a value; the one writer is [`watch`]. The token is a secret: it has no `Display`, its `Debug` is
//! redacted, and only [`Credential::bearer`] gives it out. Claims are read, never verified: verifying is upstream's.

pub mod env_file;
pub mod expiry_warnings;
pub mod placeholder;
pub mod project_link;
pub mod refresh;
pub mod rotation;
pub mod token_file;
pub mod warning;
pub mod warning_history;
pub mod watch;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use crate::os::clock::{Expiry, Timestamp};
use crate::os::safe_read::{Defect, DefectCause};
use crate::remedy::Remedy;

/// A longer token is refused (docs/configuration.md section 3), in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// A token whose `nbf` is further ahead than this is not used yet.
const NOT_BEFORE_TOLERANCE: Duration = Duration::from_secs(60);

/// Whom a credential stands for. Equal principals share cached provider tokens (docs/http.md section 1).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Principal([u8; 32]);

impl Principal {
    /// The principal that these parts name, `None` and `""` told apart.
    fn of(parts: &[Option<&str>]) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        for part in parts {
            let length = part.map_or(u64::MAX, |p| p.len() as u64);
            hash.update(&length.to_be_bytes());
            hash.update(part.unwrap_or_default().as_bytes());
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hash.finish().as_ref());
        Self(bytes)
    }

    /// A fixed-length name of the principal, for cache keys.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The claims of an OIDC token that anyone looks at (docs/vercel.md section 5). Not verified.
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
    /// A text or a list of them.
    #[serde(default)]
    aud: serde_json::Value,
    #[serde(default)]
    exp: serde_json::Value,
    #[serde(default)]
    iat: serde_json::Value,
    #[serde(default)]
    nbf: serde_json::Value,
}

impl Claims {
    /// `acme/web`, for people.
    pub fn project_name(&self) -> String {
        let of = |name: &Option<String>, id: &Option<String>| name.clone().or_else(|| id.clone());
        match (of(&self.owner, &self.owner_id), of(&self.project, &self.project_id)) {
            (Some(owner), Some(project)) => format!("{owner}/{project}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => "an unnamed project".into(),
        }
    }

    /// `acme/web (development, user_1)`: all that makes two principals differ, for people.
    pub fn description(&self) -> String {
        let details = [&self.environment, &self.user_id].into_iter().flatten().cloned().collect::<Vec<_>>();
        match details.as_slice() {
            [] => self.project_name(),
            details => format!("{} ({})", self.project_name(), details.join(", ")),
        }
    }
}

/// Why a text is no token that we would send (docs/configuration.md section 3). Holds nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejection {
    /// Over [`MAX_TOKEN_BYTES`].
    #[error("it is longer than 16 KiB")]
    TooLong,
    /// Not three base64url parts.
    #[error("it does not have three base64url parts")]
    NotThreeParts,
    /// The header is no JSON object with an `alg`.
    #[error("its header cannot be read")]
    Header,
    /// `alg` is `none`.
    #[error("it is unsigned (`alg` is `none`)")]
    Unsigned,
    /// The payload is no JSON object, or a claim has the wrong type.
    #[error("its claims cannot be read")]
    Payload,
    /// No numeric `exp`.
    #[error("it has no numeric `exp`")]
    NoExpiry,
    /// Issued by somebody else.
    #[error("its issuer is not https://oidc.vercel.com")]
    Issuer,
}

/// A Vercel OIDC token as read from the env file.
pub struct OidcToken {
    secret: SecretString,
    /// What the token says of itself.
    pub claims: Claims,
    /// When it ends.
    pub expires_at: Timestamp,
    issued_at: Option<Timestamp>,
    not_before: Option<Timestamp>,
    principal: Principal,
    fingerprint: String,
}

impl OidcToken {
    /// Reads the claims of `secret` without verifying them.
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
        let header: Header = object_in(header).ok_or(TokenRejection::Header)?;
        if header.alg.eq_ignore_ascii_case("none") {
            return Err(TokenRejection::Unsigned);
        }
        let claims: Claims = object_in(payload).ok_or(TokenRejection::Payload)?;
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

    /// Whether `self` was issued before `other`; where that is not said or the same, whether it ends before.
    pub fn is_older_than(&self, other: &Self) -> bool {
        match (self.issued_at, other.issued_at) {
            (Some(a), Some(b)) if a != b => a < b,
            _ => self.expires_at < other.expires_at,
        }
    }

    /// Whether both are the very same text.
    pub fn is_same_text(&self, other: &Self) -> bool {
        self.secret.expose_secret() == other.secret.expose_secret()
    }

    /// How long it lives in all, if it says when it was issued.
    pub fn lifetime(&self) -> Option<Duration> {
        Some(self.expires_at.since(self.issued_at?))
    }

    /// The text, for whoever has asked in so many words to be given it.
    pub fn expose(&self) -> &str {
        self.secret.expose_secret()
    }

    /// Whether it may be sent at `now`.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        now < self.expires_at && !self.is_early_at(now)
    }

    fn is_early_at(&self, now: Timestamp) -> bool {
        self.not_before.is_some_and(|nbf| now.plus(NOT_BEFORE_TOLERANCE) < nbf)
    }

    /// The first 8 hex digits of the token's SHA-256: tells tokens apart without telling them.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Lenient about padding and trailing bits, as the SDKs are: this reads claims, it verifies nothing.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// What a part of a token says, if it is a JSON object. A derived reader alone would take a list as well, and text that
/// is no UTF-8 where it does not look.
fn object_in<T: DeserializeOwned>(part: &str) -> Option<T> {
    let json = String::from_utf8(BASE64URL.decode(part).ok()?).ok()?;
    if json.trim_start().starts_with('{') { serde_json::from_str(&json).ok() } else { None }
}

fn fingerprint(secret: &str) -> String {
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

/// What is injected.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a handful in a process's life, each behind an `Arc`")]
pub enum Credential {
    /// `VERCEL_OIDC_TOKEN` from the env file.
    Oidc(OidcToken),
    /// `VERCEL_TOKEN` from our own environment; it does not say when it ends.
    AccessToken {
        /// The token.
        secret: SecretString,
        /// Stands for the token and the team that requests name.
        principal: Principal,
        /// As [`OidcToken::fingerprint`].
        fingerprint: String,
    },
}

impl Credential {
    /// An access token, used for `team_id` if one is given.
    pub fn access_token(secret: SecretString, team_id: Option<&str>) -> Self {
        let principal = Principal::of(&[Some("access token"), Some(secret.expose_secret()), team_id]);
        let fingerprint = fingerprint(secret.expose_secret());
        Self::AccessToken { secret, principal, fingerprint }
    }

    /// The value of `Authorization`, marked sensitive. `None` if the secret cannot stand in a header.
    pub fn bearer(&self) -> Option<HeaderValue> {
        let secret = match self {
            Self::Oidc(token) => &token.secret,
            Self::AccessToken { secret, .. } => secret,
        };
        let mut value = HeaderValue::try_from(format!("Bearer {}", secret.expose_secret())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Whom it stands for.
    pub fn principal(&self) -> &Principal {
        match self {
            Self::Oidc(token) => &token.principal,
            Self::AccessToken { principal, .. } => principal,
        }
    }

    /// See [`OidcToken::fingerprint`].
    pub fn fingerprint(&self) -> &str {
        match self {
            Self::Oidc(token) => &token.fingerprint,
            Self::AccessToken { fingerprint, .. } => fingerprint,
        }
    }

    /// The claims, of an OIDC token.
    pub fn claims(&self) -> Option<&Claims> {
        self.oidc().map(|token| &token.claims)
    }

    /// The OIDC token, if it is one.
    pub fn oidc(&self) -> Option<&OidcToken> {
        match self {
            Self::Oidc(token) => Some(token),
            Self::AccessToken { .. } => None,
        }
    }
}

/// Why nothing can be sent upstream (docs/http.md section 1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialProblem {
    /// There is no token.
    Missing,
    /// It has ended this long ago.
    Expired(Duration),
    /// There is something, but it is no usable token.
    Invalid(Defect),
}

impl CredentialProblem {
    /// As a sentence about `source`, with what to do.
    pub fn in_words(&self, source: &str) -> String {
        match self {
            Self::Missing => format!("There is no OIDC token in {source}. Run `vercel env pull`."),
            Self::Expired(ago) => {
                format!("The OIDC token in {source} {}. Run `vercel env pull`.", Expiry::Ago(*ago))
            }
            Self::Invalid(defect) => {
                let mut remedy = self.remedy(source).to_string();
                if let Some(first) = remedy.get_mut(..1) {
                    first.make_ascii_uppercase();
                }
                format!("The OIDC token in {source} cannot be used: {defect}. {remedy}.")
            }
        }
    }

    /// What mends it.
    pub fn remedy(&self, source: &str) -> Remedy {
        match self {
            Self::Missing | Self::Expired(_) => Remedy::run(warning::ENV_PULL),
            Self::Invalid(defect) => warning::remedy_for(defect, source),
        }
    }
}

/// What the env file (or our environment) last gave.
#[derive(Debug, Clone, Default)]
pub enum TokenState {
    /// A credential; an OIDC token may have expired since.
    Loaded(Arc<Credential>),
    /// Something unusable, for longer than the grace.
    Invalid {
        /// Why.
        reason: Defect,
        /// Whose token was there before: cached provider tokens of that principal are still served.
        last: Option<Principal>,
    },
    /// Nothing, for longer than the grace.
    #[default]
    Missing,
}

/// Remarks about the env file that outlive the log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileWarnings {
    /// Others can read the file.
    pub readable_by_others: bool,
    /// More than one line assigns the token.
    pub duplicate_assignments: bool,
    /// The file is mounted, and was replaced where it came from: no new token will be seen.
    pub is_stale_mount: bool,
}

/// A snapshot of who we are. Replaced as a whole, numbered upwards.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Grows with each snapshot that is published.
    pub generation: u64,
    /// The credential or the lack of it.
    pub state: TokenState,
    /// Remarks about the file.
    pub file_warnings: FileWarnings,
    /// The token is one that the Vercel CLI got, and not the file's.
    pub is_from_cli: bool,
}

/// What people call the source of a token that is not the file's.
pub const VERCEL_CLI: &str = "the Vercel CLI";

impl Identity {
    /// A first snapshot.
    pub fn first(state: TokenState) -> Self {
        Self { generation: 1, state, file_warnings: FileWarnings::default(), is_from_cli: false }
    }

    /// The credential to send at `now`, or why there is none.
    pub fn credential(&self, now: Timestamp) -> Result<&Arc<Credential>, CredentialProblem> {
        match &self.state {
            TokenState::Missing => Err(CredentialProblem::Missing),
            TokenState::Invalid { reason, .. } => Err(CredentialProblem::Invalid(reason.clone())),
            TokenState::Loaded(credential) => match credential.oidc() {
                Some(token) if token.expires_at <= now => Err(CredentialProblem::Expired(now.since(token.expires_at))),
                Some(token) if token.is_early_at(now) => {
                    let reason = "it is not valid yet, so this machine's clock may be wrong";
                    Err(CredentialProblem::Invalid(Defect::new(reason, DefectCause::Known(warning::set_clock()))))
                }
                _ => Ok(credential),
            },
        }
    }

    /// Whose cached provider tokens may be served: also an expired or unreadable token's principal, not a gone one's.
    pub fn principal(&self) -> Option<&Principal> {
        match &self.state {
            TokenState::Loaded(credential) => Some(credential.principal()),
            TokenState::Invalid { last, .. } => last.as_ref(),
            TokenState::Missing => None,
        }
    }

    /// The OIDC token, however old.
    pub fn oidc(&self) -> Option<&OidcToken> {
        match &self.state {
            TokenState::Loaded(credential) => credential.oidc(),
            _ => None,
        }
    }

    /// Seconds that are left at `now` of the OIDC token, if that is no more than `at_most`.
    pub fn seconds_left(&self, at_most: Duration, now: Timestamp) -> Option<u32> {
        let left = self.oidc()?.expires_at.since(now);
        (left <= at_most).then(|| u32::try_from(left.as_secs()).unwrap_or(u32::MAX))
    }

    /// Whether the machine's clock may be what makes the token look unusable: expired, or not valid yet.
    pub fn looks_out_of_time(&self, now: Timestamp) -> bool {
        self.oidc().is_some_and(|token| !token.is_valid_at(now))
    }
}

/// Asks the owner of the identity to read its source again. Without a source (an access token) it does nothing.
#[derive(Clone, Default, Debug)]
pub struct ReloadHandle(Option<mpsc::Sender<oneshot::Sender<()>>>);

impl ReloadHandle {
    /// A reloader and the end that its owner listens at.
    pub fn channel() -> (Self, mpsc::Receiver<oneshot::Sender<()>>) {
        let (sender, receiver) = mpsc::channel(8);
        (Self(Some(sender)), receiver)
    }

    /// Returns once the source was read and what was found is published. Bounded: gives up after two seconds.
    pub async fn reload(&self) {
        let Some(sender) = &self.0 else { return };
        let (done, read) = oneshot::channel();
        let round = async {
            if sender.send(done).await.is_ok() {
                let _ = read.await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), round).await;
    }
}

/// Makes tokens for the unit tests of this folder.
#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;

    pub(crate) fn jwt(claims: &serde_json::Value) -> SecretString {
        jwt_with_header(r#"{"alg":"RS256","typ":"JWT"}"#, &claims.to_string())
    }

    pub(crate) fn jwt_with_header(header: &str, payload: &str) -> SecretString {
        format!("{}.{}.c2ln", BASE64URL.encode(header), BASE64URL.encode(payload)).into()
    }

    /// A token of project `project`, issued at `iat` and ending at `exp`, in seconds.
    pub(crate) fn token(project: &str, iat: u64, exp: u64) -> OidcToken {
        OidcToken::decode(jwt(&serde_json::json!({
            "iss": "https://oidc.vercel.com/acme", "owner": "acme", "owner_id": "team_1", "project": project,
            "project_id": format!("prj_{project}"), "environment": "development", "user_id": "user_1",
            "iat": iat, "nbf": iat, "exp": exp,
        })))
        .expect("a well-formed token")
    }
}

#[cfg(test)]
mod tests {
    use super::fixtures::{jwt, jwt_with_header, token};
    use super::*;
    use serde_json::json;

    fn rejection(secret: SecretString) -> TokenRejection {
        OidcToken::decode(secret).expect_err("not to be taken")
    }

    #[test]
    fn takes_team_and_global_issuers() {
        for iss in ["https://oidc.vercel.com", "https://oidc.vercel.com/acme"] {
            assert!(OidcToken::decode(jwt(&json!({ "iss": iss, "exp": 9 }))).is_ok(), "{iss}");
        }
    }

    #[test]
    fn refuses_what_is_no_vercel_token() {
        let vercel = "https://oidc.vercel.com";
        for (secret, expected) in [
            (jwt(&json!({"iss": vercel})), TokenRejection::NoExpiry),
            (jwt(&json!({"iss": vercel, "exp": null})), TokenRejection::NoExpiry),
            (jwt(&json!({"iss": vercel, "exp": "9"})), TokenRejection::NoExpiry),
            (jwt(&json!({"iss": "https://oidc.vercel.com.evil.example", "exp": 9})), TokenRejection::Issuer),
            (jwt(&json!({"exp": 9})), TokenRejection::Issuer),
            (jwt(&json!(["exp"])), TokenRejection::Payload),
            (jwt_with_header(r#"{"alg":"nOnE"}"#, "{}"), TokenRejection::Unsigned),
            (jwt_with_header("[]", "{}"), TokenRejection::Header),
            (jwt_with_header(r#"["RS256"]"#, "{}"), TokenRejection::Header),
            (jwt(&json!([vercel, null, null, null, null, null, null, null, 9])), TokenRejection::Payload),
            (jwt_with_header(r#"{"alg":"RS256"}"#, r#"{"exp":1e999}"#), TokenRejection::Payload),
            ("a.b".into(), TokenRejection::NotThreeParts),
            ("a.b.".into(), TokenRejection::NotThreeParts),
            ("a.b.c.d".into(), TokenRejection::NotThreeParts),
            ("a.b.c\r\nX: 1".into(), TokenRejection::NotThreeParts),
            ("a.b.c".into(), TokenRejection::Header),
            ("a".repeat(MAX_TOKEN_BYTES + 1).into(), TokenRejection::TooLong),
        ] {
            assert_eq!(rejection(secret), expected);
        }
    }

    #[test]
    fn a_refreshed_token_keeps_its_principal_and_each_named_claim_changes_it() {
        let base = json!({"iss": "https://oidc.vercel.com/a", "owner_id": "t", "project_id": "p", "environment": "e",
            "user_id": "u", "sub": "s", "exp": 9});
        let of = |change: &serde_json::Value| {
            let mut claims = base.clone();
            claims.as_object_mut().expect("object").extend(change.as_object().expect("object").clone());
            OidcToken::decode(jwt(&claims)).expect("a token").principal
        };
        let principal = of(&json!({}));
        assert_eq!(of(&json!({"exp": 10, "iat": 3, "sub": "other", "project": "renamed"})), principal);
        for change in [
            json!({"iss": "https://oidc.vercel.com/b"}),
            json!({"owner_id": "x"}),
            json!({"project_id": "x"}),
            json!({"environment": "x"}),
            json!({"user_id": "x"}),
            json!({"user_id": null}),
            json!({"owner_id": null}),
        ] {
            assert_ne!(of(&change), principal, "{change}");
        }
        assert_ne!(of(&json!({"user_id": null, "sub": "x"})), of(&json!({"user_id": null})));
    }

    #[test]
    fn a_token_is_used_until_it_expires_and_not_long_before_it_begins() {
        let identity = Identity::first(TokenState::Loaded(Arc::new(Credential::Oidc(token("web", 1000, 2000)))));
        let at = |s: f64| identity.credential(Timestamp::from_seconds(s)).map(|_| ());
        assert_eq!(at(1999.999), Ok(()));
        assert_eq!(at(2000.0), Err(CredentialProblem::Expired(Duration::ZERO)));
        assert_eq!(at(2060.0), Err(CredentialProblem::Expired(Duration::from_secs(60))));
        assert_eq!(at(940.0), Ok(()), "a minute of difference is nothing");
        assert!(matches!(at(939.0), Err(CredentialProblem::Invalid(_))));
    }

    #[test]
    fn age_is_by_issue_and_else_by_expiry() {
        assert!(token("web", 1, 900).is_older_than(&token("web", 2, 800)));
        assert!(token("web", 2, 800).is_older_than(&token("web", 2, 900)));
        assert!(!token("web", 2, 900).is_older_than(&token("web", 2, 900)));
    }

    #[test]
    fn no_debug_output_tells_a_secret() {
        let credential = Credential::access_token("CANARY-SECRET".into(), None);
        let bearer = credential.bearer().expect("a header");
        let secret = jwt(&json!({"iss": "https://oidc.vercel.com", "exp": 9}));
        let text = secret.expose_secret().to_owned();
        let oidc =
            Identity::first(TokenState::Loaded(Arc::new(Credential::Oidc(OidcToken::decode(secret).expect("token")))));
        let shown = format!("{credential:?} {bearer:?} {oidc:?}");
        assert!(!shown.contains("CANARY") && !shown.contains(&text[..16]), "{shown}");
    }
}
