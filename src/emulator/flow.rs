//! One consent or installation under way: what its beginner asked for, and how far it is. Data only.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ids::{millis, random_id};

/// The longest that a beginner may ask for.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What is to be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Whether a user consents.
    Authorize,
    /// Whether and where an operator installs.
    Install,
}

impl Decision {
    /// As in URLs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorize => "authorize",
            Self::Install => "install",
        }
    }

    /// By its name in URLs.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Authorize, Self::Install].into_iter().find(|decision| decision.name() == name)
    }
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "status")]
pub enum Status {
    /// Not decided.
    Pending,
    /// Decided for; what the beginner is to know of it.
    Success {
        /// Such as `installationId`.
        data: Value,
    },
    /// Decided against by the provider.
    Error {
        /// What went wrong.
        error: Value,
    },
    /// Decided against by the person.
    Canceled,
}

/// A flow under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// `req_…`
    pub request: String,
    /// The SHA-256 of its verifier, in base64url.
    pub request_code: String,
    /// What is to be decided.
    pub decision: Decision,
    /// By its id.
    pub connector: String,
    /// The user who is to consent, if that is settled.
    pub user: Option<String>,
    /// The installation or the tenant that it is about, if that is settled.
    pub installation: Option<String>,
    /// The provider's name for where to install.
    pub tenant: Option<String>,
    /// What the consent is for.
    pub narrowing: Narrowing,
    /// Where the browser goes afterwards.
    pub return_url: Option<String>,
    /// Further parameters for the provider's own page.
    pub parameters: BTreeMap<String, String>,
    /// What to poll with, if it was asked for.
    pub device_code: Option<String>,
    /// Its end, in milliseconds.
    pub expires_at: u64,
    /// How far it is.
    pub status: Status,
}

impl Flow {
    /// A flow that begins now.
    pub fn new(decision: Decision, connector: &str, request_code: &str, now: SystemTime, life: Duration) -> Self {
        Self {
            request: random_id("req", 16),
            request_code: request_code.into(),
            decision,
            connector: connector.into(),
            user: None,
            installation: None,
            tenant: None,
            narrowing: Narrowing::default(),
            return_url: None,
            parameters: BTreeMap::new(),
            device_code: None,
            expires_at: millis(now + life.min(LONGEST)),
            status: Status::Pending,
        }
    }
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

impl Narrowing {
    /// The scopes without `*`, which is everything that there can be.
    pub(super) fn named_scopes(&self) -> Vec<&str> {
        self.scopes.iter().flatten().map(String::as_str).filter(|scope| *scope != "*").collect()
    }

    /// Whether there is anything narrower to ask for than all.
    pub(super) fn is_any(&self) -> bool {
        self.named_scopes().is_empty() && self.has_only_scopes()
    }

    pub(super) fn has_only_scopes(&self) -> bool {
        let is_none = |list: &Option<Vec<String>>| list.as_ref().is_none_or(Vec::is_empty);
        is_none(&self.audience)
            && is_none(&self.resources)
            && self.authorization_details.as_ref().is_none_or(Vec::is_empty)
    }
}
