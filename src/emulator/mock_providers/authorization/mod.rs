//! An OAuth 2.0 authorization server without its wire format: clients, consents, grants and tokens. Each mock provider
//! wraps one in its own protocol.
//!
//! It implements RFC 6749 with PKCE (RFC 7636), rotating refresh tokens whose reuse revokes the grant (RFC 9700 section
//! 4.14), revocation (RFC 7009), introspection (RFC 7662), device codes (RFC 8628), resources (RFC 8707) and
//! authorization details (RFC 9396).

mod authorize;
mod scope;
mod token;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use aws_lc_rs::constant_time::verify_slices_are_equal;

use super::{App, Call};
use crate::emulator::ids::random_id;
pub(super) use authorize::redirect;
pub(super) use scope::Scope;

/// The lifetime of a device code.
pub(super) const DEVICE_CODE_LIFE: Duration = Duration::from_secs(600);
/// The minimum interval between polls for a device code.
pub(super) const DEVICE_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// The differences between providers.
#[derive(Debug)]
pub(super) struct ServerRules {
    /// The provider's name on its pages.
    pub name: &'static str,
    /// Whether PKCE is required. If used, the method must be S256.
    pub pkce_required: bool,
    /// Whether assertions (RFC 7523) and token exchange (RFC 8693) are supported.
    pub takes_assertions: bool,
    /// The prefix of access tokens, by subject.
    pub access_prefix: fn(&str) -> &'static str,
    /// The prefix of refresh tokens.
    pub refresh_prefix: &'static str,
    /// The lifetime of an unused refresh token.
    pub refresh_life: Duration,
    /// The supported types of authorization details.
    pub detail_types: &'static [&'static str],
}

/// An authorization server.
#[derive(Debug)]
pub(super) struct AuthorizationServer {
    rules: ServerRules,
    clients: HashMap<String, Client>,
    /// Consents, as pairs of client id and subject.
    consents: HashSet<(String, String)>,
    /// Questions on a page, by the form's CSRF token.
    questions: HashMap<String, AuthorizationRequest>,
    codes: HashMap<String, AuthorizationCode>,
    /// All grants, also revoked ones. Tokens refer to them by index.
    grants: Vec<Grant>,
    refresh_tokens: HashMap<String, RefreshToken>,
    access_tokens: HashMap<String, AccessToken>,
    devices: HashMap<String, DeviceCode>,
}

#[derive(Debug)]
struct Client {
    app: App,
    secret: String,
}

/// A client's request for authorization.
#[derive(Debug, Clone)]
struct AuthorizationRequest {
    client_id: String,
    subject: String,
    scope: Scope,
    nonce: Option<String>,
    delivery: Delivery,
}

/// How the client learns of the decision.
#[derive(Debug, Clone)]
enum Delivery {
    Redirect { uri: String, state: String, challenge: Option<String> },
    Device { code: String },
}

#[derive(Debug)]
struct AuthorizationCode {
    request: AuthorizationRequest,
    expires_at: SystemTime,
    /// The grant that the code was redeemed for.
    grant: Option<usize>,
}

#[derive(Debug, Clone)]
struct Grant {
    client_id: String,
    subject: String,
    scope: Scope,
    nonce: Option<String>,
    is_revoked: bool,
}

#[derive(Debug)]
struct RefreshToken {
    grant: usize,
    expires_at: SystemTime,
    is_used: bool,
}

/// An issued access token.
#[derive(Debug, Clone)]
pub(super) struct AccessToken {
    pub client_id: String,
    pub subject: String,
    pub scope: Scope,
    pub expires_at: SystemTime,
    grant: usize,
}

#[derive(Debug)]
struct DeviceCode {
    request: AuthorizationRequest,
    user_code: String,
    expires_at: SystemTime,
    last_poll: Option<SystemTime>,
    /// Whether the user approved, once decided.
    decision: Option<bool>,
}

/// The response to a token request.
#[derive(Debug)]
pub(super) struct TokenResponse {
    pub access_token: String,
    pub refresh_token: Option<String>,
    /// The lifetime, in seconds.
    pub expires_in: u64,
    pub access: AccessToken,
    /// The `nonce` of the authorization request.
    pub nonce: Option<String>,
}

/// An error code and its description.
pub(super) type OAuthError = (&'static str, &'static str);

impl AuthorizationServer {
    pub(super) fn new(rules: ServerRules) -> Self {
        Self {
            rules,
            clients: HashMap::new(),
            consents: HashSet::new(),
            questions: HashMap::new(),
            codes: HashMap::new(),
            grants: Vec::new(),
            refresh_tokens: HashMap::new(),
            access_tokens: HashMap::new(),
            devices: HashMap::new(),
        }
    }

    /// Registers or updates an app. Returns client id and secret.
    pub(super) fn register(&mut self, app: &App) -> (String, String) {
        let id = format!("client-{}", app.name);
        let client = self
            .clients
            .entry(id.clone())
            .or_insert_with(|| Client { app: app.clone(), secret: random_id("secret", 32) });
        client.app = app.clone();
        (id, client.secret.clone())
    }

    pub(super) fn app(&self, client_id: &str) -> Option<&App> {
        self.clients.get(client_id).map(|client| &client.app)
    }

    pub(super) fn consent(&mut self, client_id: &str, subject: &str) {
        self.consents.insert((client_id.to_owned(), subject.to_owned()));
    }

    /// Revokes all consents and grants of a client, or only those of one subject.
    pub(super) fn withdraw(&mut self, client_id: &str, subject: Option<&str>) {
        let applies = |client: &str, of: &str| client == client_id && subject.is_none_or(|subject| subject == of);
        self.consents.retain(|(client, of)| !applies(client, of));
        self.grants.iter_mut().filter(|g| applies(&g.client_id, &g.subject)).for_each(|g| g.is_revoked = true);
    }

    /// Authenticates the client by Basic or by the form, but not by both. Returns its id.
    pub(super) fn authenticate(&self, call: &Call<'_>) -> Result<String, OAuthError> {
        let invalid = ("invalid_client", "unknown client or wrong secret");
        let (id, secret) = match (call.basic(), call.form("client_secret")) {
            (Some(pair), None) => pair,
            (None, Some(secret)) => (call.form("client_id").unwrap_or_default().to_owned(), secret.to_owned()),
            _ => return Err(invalid),
        };
        let client = self.clients.get(&id).ok_or(invalid)?;
        verify_slices_are_equal(client.secret.as_bytes(), secret.as_bytes()).map_err(|_| invalid)?;
        call.record_proof("client secret");
        Ok(id)
    }

    /// A valid access token.
    pub(super) fn access(&self, token: &str, now: SystemTime) -> Option<&AccessToken> {
        self.access_tokens.get(token).filter(|access| now < access.expires_at && !self.grants[access.grant].is_revoked)
    }

    /// Revokes a token; for a refresh token, its whole grant. Returns whether the token was known.
    pub(super) fn revoke(&mut self, token: &str) -> bool {
        let grant = self.refresh_tokens.get(token).map(|refresh| refresh.grant);
        if let Some(index) = grant {
            let Grant { client_id, subject, .. } = self.grants[index].clone();
            self.consents.remove(&(client_id, subject));
            self.grants[index].is_revoked = true;
        }
        self.access_tokens.remove(token).is_some() || grant.is_some()
    }

    /// Revokes everything that the subject of an access token has granted to its client. Returns whether the token was
    /// known.
    pub(super) fn revoke_grants_of(&mut self, token: &str) -> bool {
        let access = self.access_tokens.get(token).map(|access| (access.client_id.clone(), access.subject.clone()));
        if let Some((client_id, subject)) = &access {
            self.withdraw(client_id, Some(subject));
        }
        access.is_some()
    }
}
