//! The emulator's OIDC issuer: issues tokens with the claims of Vercel's development tokens, and verifies them. Claims
//! and lifetimes follow docs/vercel.md section 5.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ids::random_id;
use super::keys::{KeyError, RsaKey, seconds};
use super::world::{Project, World};

/// The claims of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The issuer, with the team's slug.
    pub iss: String,
    /// The audience, with the team's slug.
    pub aud: String,
    /// Owner, project and environment.
    pub sub: String,
    /// Team slug.
    pub owner: String,
    /// Team id.
    pub owner_id: String,
    /// Project name.
    pub project: String,
    /// Project id.
    pub project_id: String,
    /// Environment.
    pub environment: String,
    /// The user that a development token was issued to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// Issued at, in seconds since 1970.
    pub iat: u64,
    /// Not valid before, in seconds since 1970.
    pub nbf: u64,
    /// Expires at, in seconds since 1970.
    pub exp: u64,
    /// A unique id.
    pub jti: String,
}

/// The subject of a token.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Team slug.
    pub owner: String,
    /// Team id.
    pub owner_id: String,
    /// Project name.
    pub project: String,
    /// Project id.
    pub project_id: String,
    /// Environment.
    pub environment: String,
    /// User id.
    pub user_id: Option<String>,
}

impl Subject {
    /// The first project and member, in development.
    pub fn development(world: &World) -> Self {
        Self::of(world, world.projects.first(), world.members.first().map(|member| member.id.as_str()))
    }

    /// A project and a user, in development.
    pub fn of(world: &World, project: Option<&Project>, user: Option<&str>) -> Self {
        Self {
            owner: world.team.slug.clone(),
            owner_id: world.team.id.clone(),
            project: project.map(|p| p.name.clone()).unwrap_or_default(),
            project_id: project.map(|p| p.id.clone()).unwrap_or_default(),
            environment: "development".into(),
            user_id: user.map(str::to_owned),
        }
    }
}

/// Why a token is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// Not signed by this issuer, or not for this team.
    Invalid,
    /// Expired or not yet valid.
    Expired,
}

/// Issues and verifies tokens.
pub struct Issuer {
    key: RsaKey,
    key_id: String,
}

/// An issuer's key in the state file.
#[derive(Clone, Serialize, Deserialize)]
pub struct Key {
    id: String,
    pem: String,
}

impl Issuer {
    /// An issuer with a new key. Generating it takes a fraction of a second.
    pub fn new() -> Result<Self, KeyError> {
        Ok(Self { key: RsaKey::new()?, key_id: random_id("key", 12) })
    }

    /// An issuer with a saved key.
    pub fn with_key(key: Key) -> Result<Self, KeyError> {
        Ok(Self { key: RsaKey::from_pem(&key.pem)?, key_id: key.id })
    }

    /// The key, for saving.
    pub fn key(&self) -> Key {
        Key { id: self.key_id.clone(), pem: self.key.pem().to_owned() }
    }

    /// The public key.
    pub fn key_set(&self) -> JwkSet {
        self.key.jwks(&self.key_id)
    }

    /// The issuer of all emulators of this process. It is shared because generating a key dominates the start-up time.
    pub(super) fn of_this_process() -> Result<Arc<Self>, KeyError> {
        static ISSUER: OnceLock<Arc<Issuer>> = OnceLock::new();
        match ISSUER.get() {
            Some(issuer) => Ok(issuer.clone()),
            None => Self::new().map(|issuer| ISSUER.get_or_init(|| Arc::new(issuer)).clone()),
        }
    }

    /// Issues a signed token.
    pub fn issue(&self, subject: &Subject, now: SystemTime, life: Duration) -> String {
        let iat = seconds(now);
        let Subject { owner, owner_id, project, project_id, environment, user_id } = subject.clone();
        let claims = Claims {
            iss: format!("https://oidc.vercel.com/{owner}"),
            aud: format!("https://vercel.com/{owner}"),
            sub: format!("owner:{owner}:project:{project}:environment:{environment}"),
            iat,
            nbf: iat,
            exp: iat.saturating_add(life.as_secs()),
            jti: random_id("jti", 12),
            owner,
            owner_id,
            project,
            project_id,
            environment,
            user_id,
        };
        self.key.sign_as(self.key_id.clone(), &claims)
    }

    /// Verifies signature, audience, issuer and validity period.
    pub fn verify(&self, token: &str, world: &World, now: SystemTime) -> Result<Claims, Rejection> {
        let mut validation = Validation::new(Algorithm::RS256);
        // Times are compared with the emulator's clock, below.
        validation.validate_exp = false;
        validation.set_audience(&[format!("https://vercel.com/{}", world.team.slug)]);
        validation
            .set_issuer(&[format!("https://oidc.vercel.com/{}", world.team.slug), "https://oidc.vercel.com".into()]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let claims = jsonwebtoken::decode::<Claims>(token, self.key.decoding_key(), &validation)
            .map_err(|_| Rejection::Invalid)?
            .claims;
        let now = seconds(now);
        if claims.nbf <= now && now < claims.exp { Ok(claims) } else { Err(Rejection::Expired) }
    }
}

/// The discovery document of a team's issuer, or of the global issuer. The keys are at the emulator's `origin`.
pub fn discovery(origin: &str, team: Option<&str>) -> Value {
    let issuer = team.map_or("https://oidc.vercel.com".to_owned(), |slug| format!("https://oidc.vercel.com/{slug}"));
    json!({
        "issuer": issuer,
        "jwks_uri": format!("{origin}/.well-known/jwks"),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
        "claims_supported": ["sub", "aud", "exp", "nbf", "iat", "iss", "jti", "owner", "owner_id", "project",
            "project_id", "environment", "user_id"],
    })
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use jsonwebtoken::DecodingKey;

    use super::*;
    use crate::emulator::world::DEVELOPMENT_LIFE;

    #[test]
    fn a_saved_key_and_its_public_key_verify_earlier_tokens() {
        let (world, issuer, now) = (World::demo(), Issuer::new().expect("a key"), UNIX_EPOCH + DEVELOPMENT_LIFE);
        let token = issuer.issue(&Subject::development(&world), now, DEVELOPMENT_LIFE);
        let again = Issuer::with_key(issuer.key()).expect("the key");
        assert!(again.verify(&token, &world, now).is_ok());

        let id = jsonwebtoken::decode_header(&token).expect("a header").kid.expect("a key's id");
        let set = again.key_set();
        let published = DecodingKey::from_jwk(set.find(&id).expect("the key")).expect("a key");
        let mut validation = Validation::new(Algorithm::RS256);
        validation.validate_exp = false;
        validation.set_audience(&["https://vercel.com/acme"]);
        assert!(jsonwebtoken::decode::<Claims>(&token, &published, &validation).is_ok());
        assert!(!serde_json::to_string(&set).expect("JSON").contains("\"d\""), "the private key is not published");
    }

    #[test]
    fn an_issuer_verifies_only_its_own_tokens_for_its_team_while_they_are_valid() {
        let world = World::demo();
        let (issuer, other) = (Issuer::new().expect("a key"), Issuer::new().expect("a key"));
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let subject = Subject::development(&world);
        let token = issuer.issue(&subject, now, DEVELOPMENT_LIFE);

        let claims = issuer.verify(&token, &world, now).expect("its own token");
        assert_eq!(claims.sub, "owner:acme:project:web:environment:development");
        assert_eq!(claims.exp - claims.iat, 12 * 3600);
        assert!(
            issuer.verify(&issuer.issue(&subject, now, Duration::MAX), &world, now).is_ok(),
            "the longest possible life"
        );
        assert_eq!(issuer.verify(&token, &world, now + DEVELOPMENT_LIFE), Err(Rejection::Expired));
        assert_eq!(issuer.verify(&token, &world, now - Duration::from_secs(1)), Err(Rejection::Expired));
        assert_eq!(other.verify(&token, &world, now), Err(Rejection::Invalid));
        let foreign = issuer.issue(&Subject { owner: "evil".into(), ..subject }, now, DEVELOPMENT_LIFE);
        assert_eq!(issuer.verify(&foreign, &world, now), Err(Rejection::Invalid));
        let (head, signature) = token.rsplit_once('.').expect("three parts");
        let tampered = format!("{head}.{}", signature.chars().rev().collect::<String>());
        assert_eq!(issuer.verify(&tampered, &world, now), Err(Rejection::Invalid));
    }
}
