//! The provider's leg: how Connect gets a token once it has let the caller through. Knows nothing of callers.
//!
//! Nothing is locked while a provider is asked; what it gives that must be kept goes to a connector's `vault`.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::errors::Kind;
use super::ids::random_id;
use super::state::State;
use super::world::{Connector, Installation};

/// Whom a token is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Subject {
    /// The app itself.
    App,
    /// A user of the app.
    User {
        /// The app's own id of the user.
        id: String,
        /// Who gave that id.
        issuer: Option<String>,
    },
    /// An assertion that Connect is to sign: `sub`, `iss`, `aud`, `additionalClaims`.
    JwtBearer(Map<String, Value>),
    /// A token that is to be exchanged.
    Exchange(String),
}

/// What narrows a token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Narrowing {
    /// Who is to accept it.
    pub audience: Option<Vec<String>>,
    /// What it may do. None at all is not the same as `*`.
    pub scopes: Option<Vec<String>>,
    /// What it may do it to (RFC 8707).
    pub resources: Option<Vec<String>>,
    /// The same in detail (RFC 9396).
    pub authorization_details: Option<Vec<Map<String, Value>>>,
}

/// What a provider is asked for: a grant or an installation is there if the connector needs one.
#[derive(Debug, Clone)]
pub struct Ask {
    /// By which connector, as it was when the caller was let through.
    pub connector: Connector,
    /// For whom.
    pub subject: Subject,
    /// Where.
    pub installation: Option<Installation>,
    /// For a caller of this environment; a person has none.
    pub environment: Option<String>,
    /// How narrow.
    pub narrowing: Narrowing,
    /// The time as the emulator sees it.
    pub now: SystemTime,
}

/// A provider's token.
#[derive(Debug, Clone)]
pub struct Minted {
    /// The token.
    pub token: String,
    /// Its end.
    pub expires_at: SystemTime,
    /// What the provider calls it.
    pub name: Option<String>,
    /// What the provider calls the subject.
    pub external_subject: Option<String>,
    /// What else the provider says, such as an instance's URL.
    pub metadata: Option<Value>,
    /// The claims of an ID token.
    pub claims: Option<Value>,
}

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProviderError {
    /// The user has to consent, again.
    AuthorizationRequired,
    /// It has to be installed, again.
    InstallationRequired,
    /// The grant is gone or unusable.
    NoToken,
    /// The kind does not know such subjects.
    Unresolved,
    /// The provider refuses the grant.
    InvalidGrant,
}

impl From<ProviderError> for Kind {
    fn from(error: ProviderError) -> Self {
        match error {
            ProviderError::AuthorizationRequired => Self::UserAuthorizationRequired,
            ProviderError::InstallationRequired => Self::InstallationRequired,
            ProviderError::NoToken => Self::NoToken,
            ProviderError::Unresolved => Self::UnresolvedToken,
            ProviderError::InvalidGrant => Self::InvalidGrant,
        }
    }
}

/// What came of taking tokens back at the provider.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Taken back.
    pub revoked: usize,
    /// Those that the provider cannot take back.
    pub skipped: usize,
    /// Those that it refused to take back.
    pub failed: usize,
}

/// Gets a token.
#[expect(clippy::unused_async, reason = "providers will be asked over the network")]
pub async fn mint(_state: &State, ask: Ask) -> Result<Minted, ProviderError> {
    let is_user = matches!(ask.subject, Subject::User { .. });
    let prefix = match (ask.connector.kind.as_str(), is_user) {
        ("slack", true) => "xoxp-",
        ("slack", false) => "xoxb-",
        ("github", true) => "ghu_",
        ("github", false) => "ghs_",
        _ => "tok_",
    };
    Ok(Minted {
        token: format!("{prefix}{}", random_id("", 36)),
        expires_at: ask.now + ask.connector.token_life,
        name: None,
        external_subject: None,
        metadata: None,
        claims: None,
    })
}

/// Takes back at the provider what is in the connector's vault for a user, or for everybody. What Connect keeps is
/// forgotten by the caller.
#[expect(clippy::unused_async, reason = "providers will be asked over the network")]
pub async fn revoke(_state: &State, _connector: &Connector, users: &[String]) -> Revoked {
    Revoked { revoked: users.len(), ..Revoked::default() }
}
