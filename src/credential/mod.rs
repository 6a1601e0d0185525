//! The credential that is sent upstream: where it is read, when it expires, and how it is refreshed.
//!
//! This module has the values; [`watch`] is the only writer. A token is a secret: it has no `Display`, its `Debug` is
//! redacted, and only [`Credential::bearer`] and [`OidcToken::expose`] return it. Claims are read and not verified,
//! which is upstream's task.

pub mod env_file;
pub mod expiry_warnings;
mod oidc_token;
pub mod placeholder;
pub mod project_link;
pub mod refresh;
pub mod rotation;
pub mod token_file;
pub mod warning;
pub mod warning_history;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{mpsc, oneshot};

use crate::os::clock::{Expiry, Timestamp};
use crate::os::safe_read::{Defect, DefectCause};
use crate::remedy::Remedy;
use oidc_token::fingerprint;
pub use oidc_token::{Claims, MAX_TOKEN_BYTES, OidcToken, TokenRejection};

/// The principal of a credential, as a hash. Equal principals share cached provider tokens (docs/http.md section 1).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Principal([u8; 32]);

impl Principal {
    /// Hashes the parts. `None` and `""` are different.
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

    /// The hash, for cache keys.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A credential for requests to upstream.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a handful in a process's life, each behind an `Arc`")]
pub enum Credential {
    /// `VERCEL_OIDC_TOKEN` from the env file.
    Oidc(OidcToken),
    /// `VERCEL_TOKEN` from our environment. Its expiry is unknown.
    AccessToken {
        /// The token.
        secret: SecretString,
        /// Derived from the token and the team in requests.
        principal: Principal,
        /// See [`OidcToken::fingerprint`].
        fingerprint: String,
    },
}

impl Credential {
    /// An access token that is used for `team_id`, if given.
    pub fn access_token(secret: SecretString, team_id: Option<&str>) -> Self {
        let principal = Principal::of(&[Some("access token"), Some(secret.expose_secret()), team_id]);
        let fingerprint = fingerprint(secret.expose_secret());
        Self::AccessToken { secret, principal, fingerprint }
    }

    /// The value of `Authorization`, marked as sensitive. `None` if the secret is not valid in a header.
    pub fn bearer(&self) -> Option<HeaderValue> {
        let secret = match self {
            Self::Oidc(token) => &token.secret,
            Self::AccessToken { secret, .. } => secret,
        };
        let mut value = HeaderValue::try_from(format!("Bearer {}", secret.expose_secret())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Its principal.
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

    /// The claims, if it is an OIDC token.
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

/// Why there is no credential to send (docs/http.md section 1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialProblem {
    /// There is no token.
    Missing,
    /// The token expired this long ago.
    Expired(Duration),
    /// The file or the token cannot be used.
    Invalid(Defect),
}

impl CredentialProblem {
    /// The problem of `source` and its remedy, in sentences.
    pub fn message(&self, source: &str) -> String {
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

    /// What fixes it.
    pub fn remedy(&self, source: &str) -> Remedy {
        match self {
            Self::Missing | Self::Expired(_) => Remedy::run(warning::ENV_PULL),
            Self::Invalid(defect) => warning::remedy_for(defect, source),
        }
    }
}

/// The last result of reading the env file or our environment.
#[derive(Debug, Clone, Default)]
pub enum TokenState {
    /// A credential. An OIDC token may have expired since.
    Loaded(Arc<Credential>),
    /// The file or the token has been unusable for longer than the grace period.
    Invalid {
        /// Why.
        reason: Defect,
        /// The principal of the last good token. Its cached provider tokens are still served.
        last: Option<Principal>,
    },
    /// There has been no token for longer than the grace period.
    #[default]
    Missing,
}

/// What to warn of about the env file, besides an unusable token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileWarnings {
    /// Other users can read it.
    pub readable_by_others: bool,
    /// More than one line assigns the token.
    pub duplicate_assignments: bool,
    /// It is a bind mount of a file that was replaced on the host, so no new token will be seen.
    pub is_stale_mount: bool,
}

/// A snapshot of the credential. Each change publishes a new one.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Increases with each published snapshot.
    pub generation: u64,
    /// The credential, or why there is none.
    pub state: TokenState,
    /// What to warn of about the file.
    pub file_warnings: FileWarnings,
    /// The token is from the Vercel CLI and not in the file.
    pub is_from_cli: bool,
}

/// The name of the source of a token that is not in the file.
pub const VERCEL_CLI: &str = "the Vercel CLI";

impl Identity {
    /// The first snapshot.
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

    /// The principal whose cached provider tokens may be served. Also set if the token is expired or unusable, but not
    /// if it is missing.
    pub fn principal(&self) -> Option<&Principal> {
        match &self.state {
            TokenState::Loaded(credential) => Some(credential.principal()),
            TokenState::Invalid { last, .. } => last.as_ref(),
            TokenState::Missing => None,
        }
    }

    /// The OIDC token, even if it has expired.
    pub fn oidc(&self) -> Option<&OidcToken> {
        match &self.state {
            TokenState::Loaded(credential) => credential.oidc(),
            _ => None,
        }
    }

    /// Seconds until the OIDC token expires, if no more than `at_most`; 0 if it has expired.
    pub fn seconds_left(&self, at_most: Duration, now: Timestamp) -> Option<u32> {
        let left = self.oidc()?.expires_at.since(now);
        (left <= at_most).then(|| u32::try_from(left.as_secs()).unwrap_or(u32::MAX))
    }

    /// Whether the token is expired or not valid yet, which may be due to a wrong clock of this machine.
    pub fn is_outside_validity(&self, now: Timestamp) -> bool {
        self.oidc().is_some_and(|token| !token.is_valid_at(now))
    }
}

/// Makes [`watch`] read the env file again. The default handle is for access tokens and does nothing.
#[derive(Clone, Default, Debug)]
pub struct ReloadHandle(Option<mpsc::Sender<oneshot::Sender<()>>>);

impl ReloadHandle {
    /// A handle, and the receiver of its requests. Each request carries a channel that signals its completion.
    pub fn channel() -> (Self, mpsc::Receiver<oneshot::Sender<()>>) {
        let (sender, receiver) = mpsc::channel(8);
        (Self(Some(sender)), receiver)
    }

    /// Returns once the file was read and the result is published, after two seconds at most.
    pub async fn reload(&self) {
        let Some(sender) = &self.0 else { return };
        let (done, is_done) = oneshot::channel();
        let reload = async {
            if sender.send(done).await.is_ok() {
                let _ = is_done.await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), reload).await;
    }
}

/// Tokens for unit tests.
#[cfg(test)]
pub(crate) mod fixtures {
    use base64::Engine;

    use super::oidc_token::BASE64URL;
    use super::*;

    pub(crate) fn jwt(claims: &serde_json::Value) -> SecretString {
        jwt_with_header(r#"{"alg":"RS256","typ":"JWT"}"#, &claims.to_string())
    }

    pub(crate) fn jwt_with_header(header: &str, payload: &str) -> SecretString {
        format!("{}.{}.c2ln", BASE64URL.encode(header), BASE64URL.encode(payload)).into()
    }

    /// A token of project `project`, with `iat` and `exp` in seconds.
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
        OidcToken::decode(secret).expect_err("rejected")
    }

    #[test]
    fn team_and_global_issuers_are_accepted() {
        for iss in ["https://oidc.vercel.com", "https://oidc.vercel.com/acme"] {
            assert!(OidcToken::decode(jwt(&json!({ "iss": iss, "exp": 9 }))).is_ok(), "{iss}");
        }
    }

    #[test]
    fn other_texts_are_rejected() {
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
    fn the_principal_depends_on_exactly_these_claims() {
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
    fn a_token_is_used_from_a_minute_before_nbf_until_exp() {
        let identity = Identity::first(TokenState::Loaded(Arc::new(Credential::Oidc(token("web", 1000, 2000)))));
        let at = |s: f64| identity.credential(Timestamp::from_seconds(s)).map(|_| ());
        assert_eq!(at(1999.999), Ok(()));
        assert_eq!(at(2000.0), Err(CredentialProblem::Expired(Duration::ZERO)));
        assert_eq!(at(2060.0), Err(CredentialProblem::Expired(Duration::from_secs(60))));
        assert_eq!(at(940.0), Ok(()), "a minute before nbf");
        assert!(matches!(at(939.0), Err(CredentialProblem::Invalid(_))));
    }

    #[test]
    fn age_is_by_iat_and_then_by_exp() {
        assert!(token("web", 1, 900).is_older_than(&token("web", 2, 800)));
        assert!(token("web", 2, 800).is_older_than(&token("web", 2, 900)));
        assert!(!token("web", 2, 900).is_older_than(&token("web", 2, 900)));
    }

    #[test]
    fn debug_output_contains_no_secret() {
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
