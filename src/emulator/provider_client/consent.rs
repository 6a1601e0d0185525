//! Connect's side of a consent that a person gives: the provider's page, the redirect back, and what is stored.
//!
//! Consents in progress are limited to [`MAX_PENDING`]. A redirect must carry the `state` that the browser was sent
//! with, and its code is useless without the PKCE verifier, which never leaves this process.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::oauth::{AuthorizationUrl, OAuthClient};
use super::settings::Settings;
use super::tokens::issued_token;
use super::vault::{CachedToken, VaultEntry};
use super::{ProviderClient, ProviderRefusal, ProviderToken, salesforce};
use crate::emulator::flow::{Decision, Flow, Status};
use crate::emulator::ids::random_id;
use crate::emulator::provider_kind::ProviderKind;
use crate::emulator::state::Store;
use crate::emulator::world::{Connector, user_key};

/// The most consents in progress. The oldest are dropped.
const MAX_PENDING: usize = 100;

/// Which page asks the person.
pub(in crate::emulator) enum ConsentPage {
    /// The provider's, at this URL.
    AtProvider(String),
    /// The emulator's own.
    Local,
}

/// A consent whose browser was redirected to the provider.
#[derive(Clone)]
pub(in crate::emulator) struct PendingRedirect {
    state: String,
    verifier: String,
    /// The request code of the flow.
    pub(in crate::emulator) request_code: String,
    /// The tenant to install to.
    pub(in crate::emulator) tenant: Option<String>,
    connector: Connector,
    /// Whether the redirect carries no code: a GitHub app is only installed.
    without_code: bool,
}

/// The consents in progress.
#[derive(Default)]
pub(super) struct PendingConsents {
    redirects: Mutex<Vec<PendingRedirect>>,
    /// Device codes, by request code.
    devices: Mutex<HashMap<String, (String, Connector)>>,
    /// CSRF tokens of the emulator's own question, by request code.
    csrf_tokens: Mutex<HashMap<String, String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProviderClient {
    /// The CSRF token of the question for a flow.
    pub(in crate::emulator) fn csrf(&self, request_code: &str) -> String {
        let mut tokens = lock(&self.pending_consents.csrf_tokens);
        if tokens.len() >= MAX_PENDING {
            tokens.clear();
        }
        tokens.entry(request_code.to_owned()).or_insert_with(|| random_id("", 32)).clone()
    }

    /// Removes and returns the consent that a redirect with this query belongs to.
    pub(in crate::emulator) fn take_redirect(&self, query: &[(String, String)]) -> Option<PendingRedirect> {
        let state = query.iter().find(|(name, _)| name == "state").map(|(_, value)| value)?;
        let mut redirects = lock(&self.pending_consents.redirects);
        let index = redirects.iter().position(|redirect| redirect.state == *state)?;
        Some(redirects.remove(index))
    }
}

fn connector_of(store: &Store, flow: &Flow) -> Option<Connector> {
    store.read(|contents| contents.world.connector(&flow.connector).cloned())
}

/// Starts the provider's flow and returns the page that asks the person.
pub(in crate::emulator) async fn begin(
    store: &Store,
    providers: &ProviderClient,
    flow: &Flow,
) -> Result<ConsentPage, ProviderRefusal> {
    let connector = connector_of(store, flow).ok_or(ProviderRefusal::new("no_connector"))?;
    let settings = Settings::from_connector(&connector)?;
    let kind = connector.provider();
    let tenant = (flow.decision == Decision::Install).then(|| tenant(&connector, flow));
    let (authorization, without_code) = match (kind, &tenant) {
        (ProviderKind::Snowflake | ProviderKind::ApiKey, _) => return Ok(ConsentPage::Local),
        (ProviderKind::GitHub, Some(tenant)) => {
            let registration = providers.register(&connector, &settings)?;
            let state = random_id("", 32);
            let query = form_urlencoded::Serializer::new(String::new())
                .extend_pairs([("state", state.as_str()), ("target", tenant)])
                .finish();
            let base = providers.mocks.base(kind);
            let url = format!("{base}/apps/{}/installations/new?{query}", registration.client_id);
            (AuthorizationUrl { url, state, verifier: String::new() }, true)
        }
        (ProviderKind::Slack | ProviderKind::GitHub | ProviderKind::Salesforce | ProviderKind::OAuth, _) => {
            let client = providers.oauth_client(&connector, &settings).await?;
            let is_slack = kind == ProviderKind::Slack;
            let (scope_name, hint) = match &tenant {
                Some(tenant) => ("scope", (if is_slack { "team" } else { "login_hint" }, tenant.clone())),
                None => (if is_slack { "user_scope" } else { "scope" }, ("login_hint", user(store, flow))),
            };
            let mut extra = vec![(hint.0.to_owned(), hint.1)];
            // `prompt=none` from the app would skip the person's decision.
            let allowed = flow.parameters.iter().filter(|(name, value)| *name != "prompt" || *value != "none");
            extra.extend(allowed.map(|(name, value)| (name.clone(), value.clone())));
            (client.authorization_url(&flow.narrowing, scope_name, &extra)?, false)
        }
    };
    let AuthorizationUrl { url, state, verifier } = authorization;
    let mut redirects = lock(&providers.pending_consents.redirects);
    if redirects.len() >= MAX_PENDING {
        redirects.remove(0);
    }
    let request_code = flow.request_code.clone();
    redirects.push(PendingRedirect { state, verifier, request_code, tenant, connector, without_code });
    Ok(ConsentPage::AtProvider(url))
}

/// The user who consents: the flow's, or the first member.
fn user(store: &Store, flow: &Flow) -> String {
    let first = store.read(|contents| contents.world.members.first().map(|member| member.id.clone()));
    flow.user.clone().or(first).unwrap_or_else(|| "user".into())
}

/// The tenant to install to: the flow's, or that of the named installation.
fn tenant(connector: &Connector, flow: &Flow) -> String {
    let id = flow.installation.as_ref();
    let installation = connector.installations.iter().find(|installation| Some(&installation.id) == id);
    let tenant = flow.tenant.clone().or(installation.map(|installation| installation.tenant_id.clone()));
    tenant.unwrap_or_else(|| "T0ACME".into())
}

/// The outcome of a consent: the token, if the provider gave one, and the connector that it is for.
pub(in crate::emulator) struct ConsentResult(Option<ProviderToken>, Connector);

/// Exchanges the code of a redirect for a token.
pub(in crate::emulator) async fn finish(
    providers: &ProviderClient,
    redirect: &PendingRedirect,
    query: &[(String, String)],
    now: SystemTime,
) -> Result<ConsentResult, ProviderRefusal> {
    let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    if redirect.without_code {
        return match (parameter("installation_id"), parameter("error")) {
            (Some(_), None) => Ok(ConsentResult(None, redirect.connector.clone())),
            (_, error) => Err(ProviderRefusal::new(error.unwrap_or("invalid_request"))),
        };
    }
    let client = oauth_client(providers, &redirect.connector).await?;
    let mut token = client.redeem_redirect(&redirect.state, &redirect.verifier, query).await?;
    if redirect.connector.provider() == ProviderKind::Salesforce {
        token = salesforce::with_expiry(&client, token, now).await?;
    }
    Ok(ConsentResult(Some(token), redirect.connector.clone()))
}

async fn oauth_client(providers: &ProviderClient, connector: &Connector) -> Result<OAuthClient, ProviderRefusal> {
    let settings = Settings::from_connector(connector)?;
    providers.oauth_client(connector, &settings).await
}

/// Stores the token of a consent in the vault, for the subject that the flow was decided for.
pub(in crate::emulator) fn store_consent(
    store: &Store,
    providers: &ProviderClient,
    request_code: &str,
    result: ConsentResult,
    now: SystemTime,
) {
    let ConsentResult(Some(mut token), connector) = result else { return };
    let Ok(settings) = Settings::from_connector(&connector) else { return };
    let flow = store.read(|contents| contents.pending.iter().find(|flow| flow.request_code == request_code).cloned());
    let Some(flow) = flow else { return };
    let key = match (&flow.status, flow.decision) {
        (Status::Success { data }, Decision::Install) => {
            format!("app:{}", data["installationId"].as_str().unwrap_or_default())
        }
        (Status::Success { .. }, Decision::Authorize) => user_key(&user(store, &flow)),
        _ => return,
    };
    let mut entry = VaultEntry { provider: providers.provider_url(&connector, &settings), ..VaultEntry::default() };
    entry.take_refresh_token(&mut token);
    if entry.refresh_token.is_none() {
        // Without a refresh token, this token is the only one until the next consent.
        let token = issued_token(&connector, token, now);
        entry.tokens.push(CachedToken { narrowing: flow.narrowing, environment: None, token });
    }
    entry.save(store, &connector.id, &key);
}

/// Requests a device code. Returns the URL for the person and the code to enter there, or `None` if the provider does
/// not support device codes.
pub(in crate::emulator) async fn begin_device(
    store: &Store,
    providers: &ProviderClient,
    flow: &Flow,
) -> Option<(String, String)> {
    let connector = connector_of(store, flow).filter(|connector| connector.provider() == ProviderKind::OAuth)?;
    let client = oauth_client(providers, &connector).await.ok()?;
    let hint = [("login_hint".to_owned(), user(store, flow))];
    let device = client.authorize_device(&flow.narrowing, &hint).await.ok()?;
    let mut devices = lock(&providers.pending_consents.devices);
    if devices.len() >= MAX_PENDING {
        devices.clear();
    }
    devices.insert(flow.request_code.clone(), (device.device_code, connector));
    Some((device.verification_uri_complete.unwrap_or(device.verification_uri), device.user_code))
}

/// Polls the provider once for a flow's device code. `None` if the flow has none.
pub(in crate::emulator) async fn poll(
    providers: &ProviderClient,
    request_code: &str,
) -> Option<Result<ConsentResult, ProviderRefusal>> {
    let (device_code, connector) = lock(&providers.pending_consents.devices).get(request_code).cloned()?;
    let client = match oauth_client(providers, &connector).await {
        Ok(client) => client,
        Err(refusal) => return Some(Err(refusal)),
    };
    let result = client.poll_device(&device_code).await;
    if !result.as_ref().is_err_and(ProviderRefusal::is_temporary) {
        lock(&providers.pending_consents.devices).remove(request_code);
    }
    Some(result.map(|token| ConsentResult(Some(token), connector)))
}
