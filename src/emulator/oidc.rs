//! The emulator's issuer of OIDC tokens: a key of its own, the claims of Vercel's development tokens, verification.
//!
//! Claims and lifetimes are those of docs/vercel.md section 5.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::world::{Project, World};

/// The claims of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Issuer, with the team's slug.
    pub iss: String,
    /// Audience, with the team's slug.
    pub aud: String,
    /// Owner, project and environment in one.
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
    /// Issued at, in seconds.
    pub iat: u64,
    /// Not before, in seconds.
    pub nbf: u64,
    /// Ends at, in seconds.
    pub exp: u64,
    /// Tells tokens of the same second apart.
    pub jti: String,
}

/// Whom a token is for.
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
    /// The world's first project and member, in development.
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

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// Not signed by us, or not a token of this team.
    Invalid,
    /// Over, or not begun.
    Expired,
}

/// Issues and verifies tokens.
pub struct Issuer {
    signing: EncodingKey,
    verifying: DecodingKey,
    key: Key,
}

/// An issuer's key, as it is kept.
#[derive(Clone, Serialize, Deserialize)]
pub struct Key {
    id: String,
    pem: String,
}

impl Issuer {
    /// An issuer with a new RSA key. Takes a fraction of a second.
    pub fn new() -> Result<Self, String> {
        let key = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)
            .map_err(|e| e.to_string())?;
        Self::with_key(Key { id: super::ids::random_id("key", 12), pem: key.serialize_pem() })
    }

    /// An issuer with a key that was kept.
    pub fn with_key(key: Key) -> Result<Self, String> {
        let pair = rcgen::KeyPair::from_pem(&key.pem).map_err(|e| e.to_string())?;
        Ok(Self {
            signing: EncodingKey::from_rsa_pem(key.pem.as_bytes()).map_err(|e| e.to_string())?,
            verifying: DecodingKey::from_rsa_der(pair.public_key_raw()),
            key,
        })
    }

    /// The key, to be kept.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The public key, for whoever verifies tokens.
    pub fn key_set(&self) -> JwkSet {
        let jwk = Jwk::from_encoding_key(&self.signing, Algorithm::RS256).ok().map(|mut jwk| {
            jwk.common.key_id = Some(self.key.id.clone());
            jwk.common.public_key_use = Some(PublicKeyUse::Signature);
            jwk
        });
        JwkSet { keys: jwk.into_iter().collect() }
    }

    /// The issuer of all emulators of this process: making a key takes longer than all else at a start.
    pub(super) fn of_this_process() -> Result<Arc<Self>, String> {
        static ISSUER: OnceLock<Arc<Issuer>> = OnceLock::new();
        match ISSUER.get() {
            Some(issuer) => Ok(issuer.clone()),
            None => Self::new().map(|made| ISSUER.get_or_init(|| Arc::new(made)).clone()),
        }
    }

    /// A signed token.
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
            jti: super::ids::random_id("jti", 12),
            owner,
            owner_id,
            project,
            project_id,
            environment,
            user_id,
        };
        let mut header = Header::new(Algorithm::RS256);
        header.kid = Some(self.key.id.clone());
        // The key was made for this algorithm and the claims are plain data.
        jsonwebtoken::encode(&header, &claims, &self.signing).unwrap_or_default()
    }

    /// Verifies signature, audience, issuer and times.
    pub fn verify(&self, token: &str, world: &World, now: SystemTime) -> Result<Claims, Rejection> {
        let mut validation = Validation::new(Algorithm::RS256);
        // Times are compared with the emulator's clock, below.
        validation.validate_exp = false;
        validation.set_audience(&[format!("https://vercel.com/{}", world.team.slug)]);
        validation
            .set_issuer(&[format!("https://oidc.vercel.com/{}", world.team.slug), "https://oidc.vercel.com".into()]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let claims =
            jsonwebtoken::decode::<Claims>(token, &self.verifying, &validation).map_err(|_| Rejection::Invalid)?.claims;
        let now = seconds(now);
        if claims.nbf <= now && now < claims.exp { Ok(claims) } else { Err(Rejection::Expired) }
    }
}

/// The discovery document of the issuer of a team, or of the one for all; the keys are at the emulator's `origin`.
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

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::world::DEVELOPMENT_LIFE;

    #[test]
    fn a_kept_key_and_its_published_half_verify_what_it_signed_before() {
        let (world, issuer, now) = (World::demo(), Issuer::new().expect("a key"), UNIX_EPOCH + DEVELOPMENT_LIFE);
        let token = issuer.issue(&Subject::development(&world), now, DEVELOPMENT_LIFE);
        let again = Issuer::with_key(issuer.key().clone()).expect("the key");
        assert!(again.verify(&token, &world, now).is_ok());

        let id = jsonwebtoken::decode_header(&token).expect("a header").kid.expect("a key's id");
        let set = again.key_set();
        let published = DecodingKey::from_jwk(set.find(&id).expect("the key")).expect("a key");
        let mut validation = Validation::new(Algorithm::RS256);
        validation.validate_exp = false;
        validation.set_audience(&["https://vercel.com/acme"]);
        assert!(jsonwebtoken::decode::<Claims>(&token, &published, &validation).is_ok());
        assert!(!serde_json::to_string(&set).expect("JSON").contains("\"d\""), "the private half stays here");
    }

    #[test]
    fn verifies_only_its_own_tokens_of_its_own_team_while_they_last() {
        let world = World::demo();
        let (issuer, other) = (Issuer::new().expect("a key"), Issuer::new().expect("a key"));
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let subject = Subject::development(&world);
        let token = issuer.issue(&subject, now, DEVELOPMENT_LIFE);

        let claims = issuer.verify(&token, &world, now).expect("its own token");
        assert_eq!(claims.sub, "owner:acme:project:web:environment:development");
        assert_eq!(claims.exp - claims.iat, 12 * 3600);
        assert!(issuer.verify(&issuer.issue(&subject, now, Duration::MAX), &world, now).is_ok(), "as long as can be");
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
