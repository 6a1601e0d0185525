//! Connect's side of the providers: how it gets, refreshes and revokes tokens. Callers are authorized before.
//!
//! Every token comes from an exchange with a provider over HTTP: a [mock provider](super::mock_providers), or the
//! issuer that a connector's `data` names. What must be kept, such as a refresh token, goes to the connector's `vault`
//! and is never part of a response, a log line or an error.
//!
//! A grant that the seed contains is registered with the mock provider as given. Its first token comes from an
//! authorization without a prompt (`prompt=none`). The store is not locked during an exchange, but each grant has one
//! exchange at a time: a provider treats two uses of one refresh token as a theft.

mod api_key;
mod consent;
mod github;
mod http;
mod oauth;
mod revocation;
mod salesforce;
mod settings;
mod slack;
mod snowflake;
mod tokens;
mod vault;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Clock;
use super::allowlist::Allowlist;
use super::errors::Kind;
use super::flow::Narrowing;
use super::mock_providers::{App, MockProviders, Registration};
use super::provider_kind::ProviderKind;
use super::world::{Connector, Installation};
use consent::PendingConsents;
pub(super) use consent::{ConsentPage, begin, begin_device, finish, poll, store_consent};
use http::{HttpClient, Unreachable};
use oauth::{Endpoints, OAuthClient};
pub(super) use revocation::{applies_to, revoke};
use settings::Settings;
pub(super) use tokens::obtain_token;

/// The subject that a token is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Subject {
    /// The app itself.
    App,
    /// A user of the app.
    User {
        /// The app's own id of the user.
        id: String,
        /// The issuer of that id.
        issuer: Option<String>,
    },
    /// An assertion for Connect to sign: `sub`, `iss`, `aud`, `additionalClaims`.
    JwtBearer(Map<String, Value>),
    /// A token to exchange.
    Exchange(String),
}

/// A request for a provider's token. The caller has checked grant and installation.
#[derive(Debug, Clone)]
pub struct ProviderRequest {
    /// The connector as it was when the caller was authorized.
    pub connector: Connector,
    /// The subject.
    pub subject: Subject,
    /// The installation, if the connector has one.
    pub installation: Option<Installation>,
    /// The caller's environment; a member has none.
    pub environment: Option<String>,
    /// The restrictions on the token.
    pub narrowing: Narrowing,
    /// The minimum remaining life of the token.
    pub validity_buffer: Option<Duration>,
    /// The emulator's current time.
    pub now: SystemTime,
}

/// A token for an app.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IssuedToken {
    /// The token.
    pub token: String,
    /// The expiry.
    pub expires_at: SystemTime,
    /// The provider's name for the token.
    pub name: Option<String>,
    /// The provider's id of the subject.
    pub external_subject: Option<String>,
    /// More data from the provider, such as an instance URL.
    pub metadata: Option<Value>,
    /// The claims of an ID token.
    pub claims: Option<Value>,
}

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProviderError {
    /// The user must consent, possibly again.
    AuthorizationRequired,
    /// The connector must be installed, possibly again.
    InstallationRequired,
    /// The grant is revoked or not usable.
    NoToken,
    /// The provider does not support this subject.
    Unresolved,
}

impl From<ProviderError> for Kind {
    fn from(error: ProviderError) -> Self {
        match error {
            ProviderError::AuthorizationRequired => Self::UserAuthorizationRequired,
            ProviderError::InstallationRequired => Self::InstallationRequired,
            ProviderError::NoToken => Self::NoToken,
            ProviderError::Unresolved => Self::UnresolvedToken,
        }
    }
}

/// An error code of a provider, or of the way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProviderRefusal(String);

impl ProviderRefusal {
    /// Keeps a provider's code only if it looks like one, since it is shown and could contain anything.
    fn new(code: &str) -> Self {
        let is_code = code.len() <= 40 && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        Self(if is_code { code.to_owned() } else { "refused".to_owned() })
    }

    /// The code in a provider's response body.
    fn from_body(body: &Value) -> Self {
        Self::new(body["error"].as_str().or(body["message"].as_str()).unwrap_or("invalid_answer"))
    }

    /// The code.
    pub(super) fn code(&self) -> &str {
        &self.0
    }

    /// Whether a device code may be polled again after this.
    pub(super) fn is_temporary(&self) -> bool {
        matches!(self.code(), "authorization_pending" | "slow_down" | "unreachable")
    }

    /// The error for the app. The codes are those of RFC 6749, and Slack's and GitHub's equivalents.
    fn to_provider_error(&self, request: &ProviderRequest) -> ProviderError {
        let not_granted = match request.subject {
            Subject::User { .. } => ProviderError::AuthorizationRequired,
            _ if request.connector.needs_installation() => ProviderError::InstallationRequired,
            _ => ProviderError::Unresolved,
        };
        match self.code() {
            "invalid_scope"
            | "invalid_target"
            | "invalid_authorization_details"
            | "consent_required"
            | "interaction_required"
            | "login_required"
            | "access_denied" => not_granted,
            "not_installed" => ProviderError::InstallationRequired,
            "unauthorized_client" | "unsupported_grant_type" => ProviderError::Unresolved,
            _ => ProviderError::NoToken,
        }
    }
}

impl From<Unreachable> for ProviderRefusal {
    fn from(_: Unreachable) -> Self {
        Self::new("unreachable")
    }
}

/// A token as the provider returned it.
#[derive(Default)]
struct ProviderToken {
    token: String,
    /// The lifetime, if the provider states it.
    expires_in: Option<Duration>,
    refresh_token: Option<String>,
    scopes: Option<Vec<String>>,
    /// All other fields of the response.
    extra: Map<String, Value>,
}

/// Selects the fields of a provider's response that the app gets as `metadata`: pairs of the provider's key and the
/// app's.
fn select(extra: &Map<String, Value>, keys: &[(&str, &str)]) -> Value {
    keys.iter().filter_map(|(key, name)| Some(((*name).to_owned(), extra.get(*key)?.clone()))).collect()
}

/// The mock providers, and the client that talks to them and to remote issuers.
pub(super) struct ProviderClient {
    mocks: MockProviders,
    http: HttpClient,
    redirect_uri: String,
    reuse_tokens: bool,
    allowlist: Allowlist,
    /// Locks that serialize exchanges, by connector and vault key.
    exchange_locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    pending_consents: PendingConsents,
    /// Endpoints found by discovery, by issuer.
    discovered: Mutex<HashMap<String, Endpoints>>,
}

impl ProviderClient {
    /// Starts the mock providers. Providers redirect browsers back to `redirect_uri`.
    pub(super) async fn start(
        clock: Clock,
        redirect_uri: String,
        reuse_tokens: bool,
        allowlist: Allowlist,
    ) -> io::Result<Self> {
        Ok(Self {
            mocks: MockProviders::start(clock).await?,
            http: HttpClient::new(),
            redirect_uri,
            reuse_tokens,
            allowlist,
            exchange_locks: Mutex::default(),
            pending_consents: PendingConsents::default(),
            discovered: Mutex::default(),
        })
    }

    /// The mock providers.
    pub(super) fn mocks(&self) -> &MockProviders {
        &self.mocks
    }

    /// The variables and issuers that connectors may use.
    pub(super) fn allowlist(&self) -> &Allowlist {
        &self.allowlist
    }

    /// The lock for exchanges of one vault entry.
    fn exchange_lock(&self, connector: &Connector, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.exchange_locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.entry(format!("{} {key}", connector.id)).or_default().clone()
    }

    /// Registers the connector's app with its mock provider.
    fn register(&self, connector: &Connector, settings: &Settings) -> Result<Registration, ProviderRefusal> {
        let app = App {
            name: connector.id.clone(),
            title: connector.uid.clone(),
            scopes: settings.scopes.clone(),
            resources: settings.resources.clone(),
            redirect_uris: vec![self.redirect_uri.clone()],
            token_life: connector.token_life.as_secs(),
        };
        let (console, kind) = (self.mocks.console(), connector.provider());
        let registration = console.register(kind, &app).map_err(|_| ProviderRefusal::new("invalid_key"))?;
        if kind == ProviderKind::GitHub {
            console.set_github_grants(&registration.client_id, settings.github_grants(connector));
        }
        Ok(registration)
    }

    /// The client for the connector's authorization server: the issuer that it names, or its mock provider.
    async fn oauth_client(&self, connector: &Connector, settings: &Settings) -> Result<OAuthClient, ProviderRefusal> {
        let unchanged: fn(u16, Value) -> (u16, Value) = |status, body| (status, body);
        if let Some(issuer) = &settings.issuer {
            if !self.allowlist.allows_issuer(issuer) {
                return Err(ProviderRefusal::new("issuer_not_allowed"));
            }
            let client_id = settings.client_id.clone().ok_or(ProviderRefusal::new("invalid_client"))?;
            let known = self.discovered.lock().unwrap_or_else(PoisonError::into_inner).get(issuer).cloned();
            let endpoints = match known {
                Some(endpoints) => endpoints,
                None => Endpoints::discover(&self.http, issuer, self.allowlist.names_issuer(issuer)).await?,
            };
            self.discovered.lock().unwrap_or_else(PoisonError::into_inner).insert(issuer.clone(), endpoints.clone());
            return Ok(OAuthClient {
                endpoints,
                client_id,
                client_secret: settings.client_secret(&self.allowlist)?,
                redirect_uri: self.redirect_uri.clone(),
                secret_in_form: false,
                normalize: unchanged,
                http: self.http.clone(),
            });
        }
        let Registration { client_id, client_secret, .. } = self.register(connector, settings)?;
        let kind = connector.provider();
        let base = self.mocks.base(kind);
        let (endpoints, normalize, secret_in_form) = match kind {
            ProviderKind::Slack => (slack::endpoints(&base), slack::normalize as fn(_, _) -> _, false),
            ProviderKind::GitHub => (github::endpoints(&base), github::normalize as fn(_, _) -> _, true),
            ProviderKind::Salesforce => (salesforce::endpoints(&base), unchanged, true),
            ProviderKind::Snowflake | ProviderKind::ApiKey | ProviderKind::OAuth => {
                (Endpoints::discover(&self.http, &base, false).await?, unchanged, false)
            }
        };
        Ok(OAuthClient {
            endpoints,
            client_id,
            client_secret: Some(settings.client_secret(&self.allowlist)?.unwrap_or(client_secret)),
            redirect_uri: self.redirect_uri.clone(),
            secret_in_form,
            normalize,
            http: self.http.clone(),
        })
    }

    /// The URL that identifies the connector's provider in its vault.
    fn provider_url(&self, connector: &Connector, settings: &Settings) -> String {
        settings.issuer.clone().unwrap_or_else(|| self.mocks.base(connector.provider()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_providers_error_is_shown_only_if_it_looks_like_a_code() {
        for (body, shown) in [
            (json!({"error": "invalid_grant"}), "invalid_grant"),
            (json!({"error": "rt_S3CRET"}), "refused"),
            (json!({"message": "Bad credentials"}), "refused"),
            (json!({"error": "x".repeat(41)}), "refused"),
            (json!("text"), "invalid_answer"),
        ] {
            assert_eq!(ProviderRefusal::from_body(&body).code(), shown, "{body}");
        }
    }
}
