//! A consent or installation that is in progress. Data only.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ids::{millis, random_id};

/// The longest lifetime that a request may ask for.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);

/// What the person decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Whether to grant access on behalf of a user.
    Authorize,
    /// Whether and where to install the connector.
    Install,
}

impl Decision {
    /// The name in URLs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorize => "authorize",
            Self::Install => "install",
        }
    }

    /// Parses the name in URLs.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Authorize, Self::Install].into_iter().find(|decision| decision.name() == name)
    }
}

/// The state of a flow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "status")]
pub enum Status {
    /// Waiting for the decision.
    Pending,
    /// Approved.
    Success {
        /// The result for the caller, such as `installationId`.
        data: Value,
    },
    /// The provider failed or refused.
    Error {
        /// `code` and `message`.
        error: Value,
    },
    /// Denied by the person.
    Canceled,
}

/// A consent or installation flow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// The id, `req_…`.
    pub request: String,
    /// The SHA-256 of the verifier, in base64url.
    pub request_code: String,
    /// What the person decides about.
    pub decision: Decision,
    /// The connector's id.
    pub connector: String,
    /// The user who consents, if known.
    pub user: Option<String>,
    /// The id of the installation, if known.
    pub installation: Option<String>,
    /// The provider's name for the place to install to, if known.
    pub tenant: Option<String>,
    /// What the consent covers.
    pub narrowing: Narrowing,
    /// Where the last page links to.
    pub return_url: Option<String>,
    /// More parameters for the provider's authorization page.
    pub parameters: BTreeMap<String, String>,
    /// The device code, if one was requested.
    pub device_code: Option<String>,
    /// The end of its validity, in milliseconds since 1970.
    pub expires_at: u64,
    /// The state of a flow.
    pub status: Status,
}

impl Flow {
    /// A flow that starts now and waits for a decision.
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
            expires_at: millis(now + life.min(MAX_LIFE)),
            status: Status::Pending,
        }
    }
}

/// The restrictions on a token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Narrowing {
    /// The audiences that accept it.
    pub audience: Option<Vec<String>>,
    /// The scopes. `None` and `*` differ: they are cached separately.
    pub scopes: Option<Vec<String>>,
    /// The resources (RFC 8707).
    pub resources: Option<Vec<String>>,
    /// Fine-grained authorization details (RFC 9396).
    pub authorization_details: Option<Vec<Map<String, Value>>>,
}

impl Narrowing {
    /// The scopes without `*`, which stands for all scopes.
    pub(super) fn named_scopes(&self) -> Vec<&str> {
        self.scopes.iter().flatten().map(String::as_str).filter(|scope| *scope != "*").collect()
    }

    /// Whether there are no restrictions.
    pub(super) fn is_unrestricted(&self) -> bool {
        self.named_scopes().is_empty() && self.has_only_scopes()
    }

    pub(super) fn has_only_scopes(&self) -> bool {
        let is_empty = |list: &Option<Vec<String>>| list.as_ref().is_none_or(Vec::is_empty);
        is_empty(&self.audience)
            && is_empty(&self.resources)
            && self.authorization_details.as_ref().is_none_or(Vec::is_empty)
    }
}
