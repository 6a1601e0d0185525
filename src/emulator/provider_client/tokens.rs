//! Obtaining a token: from the vault, or by an exchange with the provider.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::oauth::OAuthClient;
use super::settings::Settings;
use super::vault::{CachedToken, VaultEntry, vault_key};
use super::{
    IssuedToken, ProviderClient, ProviderError, ProviderRefusal, ProviderRequest, ProviderToken, Subject, api_key,
    github, salesforce, slack, snowflake,
};
use crate::emulator::flow::Narrowing;
use crate::emulator::mock_providers::Registration;
use crate::emulator::provider_kind::ProviderKind;
use crate::emulator::state::Store;
use crate::emulator::world::Connector;

/// The minimum remaining life of a cached token, unless the request has another: the SDKs' default.
const VALIDITY_BUFFER: Duration = Duration::from_secs(30);

/// Returns a cached token if one fits and is valid, or else obtains one from the provider.
pub(in crate::emulator) async fn obtain_token(
    store: &Store,
    providers: &ProviderClient,
    request: ProviderRequest,
) -> Result<IssuedToken, ProviderError> {
    let key = vault_key(&request);
    let lock = providers.exchange_lock(&request.connector, &key);
    let _guard = lock.lock().await;
    let settings =
        Settings::from_connector(&request.connector).map_err(|refusal| refusal.to_provider_error(&request))?;
    let provider = providers.provider_url(&request.connector, &settings);
    let mut entry = VaultEntry::load(store, &request.connector.id, &key);
    if entry.provider != provider {
        entry = VaultEntry { provider, ..VaultEntry::default() };
    }
    let buffer = request.validity_buffer.unwrap_or(VALIDITY_BUFFER);
    entry.tokens.retain(|cached| cached.token.expires_at > request.now);
    let fits = |cached: &&CachedToken| {
        cached.narrowing == request.narrowing
            && (cached.environment.is_none() || cached.environment == request.environment)
            && cached.token.expires_at > request.now + buffer
    };
    if let Some(cached) = entry.tokens.iter().find(fits).filter(|_| providers.reuse_tokens) {
        return Ok(cached.token.clone());
    }
    if entry.is_revoked {
        return Err(ProviderError::NoToken);
    }
    let result = match fetch(providers, &request, &settings, &mut entry).await {
        Ok(token) => {
            let token = issued_token(&request.connector, token, request.now);
            entry.tokens.retain(|t| t.narrowing != request.narrowing || t.environment != request.environment);
            let (narrowing, environment) = (request.narrowing.clone(), request.environment.clone());
            entry.tokens.push(CachedToken { narrowing, environment, token: token.clone() });
            Ok(token)
        }
        Err(refusal) => {
            tracing::debug!(connector = %request.connector.uid, code = refusal.code(), "the provider refuses");
            let error = refusal.to_provider_error(&request);
            entry.is_revoked =
                error == ProviderError::NoToken && entry.refresh_token.is_some() && refusal.code() != "unreachable";
            Err(error)
        }
    };
    // Saved after a failure as well, since a refresh token may have been used up.
    entry.save(store, &request.connector.id, &key);
    result
}

/// Converts a provider's token into the form for apps.
pub(super) fn issued_token(connector: &Connector, token: ProviderToken, now: SystemTime) -> IssuedToken {
    let metadata = match connector.provider() {
        ProviderKind::Slack => slack::metadata(&token.extra),
        ProviderKind::GitHub => github::metadata(&token.extra),
        ProviderKind::Salesforce => salesforce::metadata(&token.extra),
        ProviderKind::Snowflake | ProviderKind::ApiKey | ProviderKind::OAuth => Value::Null,
    };
    IssuedToken {
        token: token.token,
        expires_at: now + token.expires_in.unwrap_or(connector.token_life),
        name: None,
        external_subject: token.extra.get("id").and_then(Value::as_str).map(str::to_owned),
        metadata: Some(metadata).filter(|metadata| metadata.as_object().is_some_and(|object| !object.is_empty())),
        claims: None,
    }
}

/// Obtains a token from the provider.
async fn fetch(
    providers: &ProviderClient,
    request: &ProviderRequest,
    settings: &Settings,
    entry: &mut VaultEntry,
) -> Result<ProviderToken, ProviderRefusal> {
    let ProviderRequest { connector, subject, narrowing, .. } = request;
    let kind = connector.provider();
    let is_user = matches!(subject, Subject::User { .. });
    match (subject, kind) {
        (Subject::JwtBearer(claims), ProviderKind::OAuth) => {
            let client = providers.oauth_client(connector, settings).await?;
            let key = match settings.private_key(&providers.allowlist)? {
                Some(key) => key,
                None => providers.register(connector, settings)?.private_key,
            };
            return client.exchange_assertion(&key, claims, narrowing, request.now).await;
        }
        (Subject::Exchange(token), ProviderKind::OAuth) => {
            return providers.oauth_client(connector, settings).await?.exchange_token(token, narrowing).await;
        }
        // Snowflake has only assertions; `sub` names another user of the account with the same key.
        (Subject::App | Subject::JwtBearer(_), ProviderKind::Snowflake) => {
            return snowflake_token(providers, request, settings).await;
        }
        (Subject::App, ProviderKind::ApiKey) => return api_key::attach(settings, narrowing, &providers.allowlist),
        (Subject::App, ProviderKind::GitHub) => return installation_token(providers, request, settings).await,
        (Subject::JwtBearer(_) | Subject::Exchange(_), _)
        | (Subject::User { .. }, ProviderKind::ApiKey | ProviderKind::Snowflake) => {
            return Err(ProviderRefusal::new("unsupported_grant_type"));
        }
        (Subject::App, ProviderKind::Slack | ProviderKind::Salesforce | ProviderKind::OAuth)
        | (
            Subject::User { .. },
            ProviderKind::Slack | ProviderKind::GitHub | ProviderKind::Salesforce | ProviderKind::OAuth,
        ) => {}
    }
    let client = providers.oauth_client(connector, settings).await?;
    let mut token = match &entry.refresh_token {
        // Slack cannot narrow a token.
        Some(refresh_token) if kind == ProviderKind::Slack => {
            client.refresh(refresh_token, &Narrowing::default()).await?
        }
        Some(refresh_token) => client.refresh(refresh_token, narrowing).await?,
        None if kind == ProviderKind::OAuth && !is_user => client.client_credentials(narrowing).await?,
        None if settings.issuer.is_some() => return Err(ProviderRefusal::new("consent_required")),
        None => first_token(providers, &client, request, entry).await?,
    };
    entry.take_refresh_token(&mut token);
    match kind {
        ProviderKind::Slack => slack::check_scopes(&token, narrowing).map(|()| token),
        ProviderKind::Salesforce => salesforce::with_expiry(&client, token, request.now).await,
        ProviderKind::GitHub | ProviderKind::Snowflake | ProviderKind::ApiKey | ProviderKind::OAuth => Ok(token),
    }
}

async fn snowflake_token(
    providers: &ProviderClient,
    request: &ProviderRequest,
    settings: &Settings,
) -> Result<ProviderToken, ProviderRefusal> {
    let ProviderRequest { connector, subject, narrowing, now, .. } = request;
    let subject = if let Subject::JwtBearer(claims) = subject { claims.get("sub") } else { None };
    let user = settings.snowflake_user(connector, subject.and_then(Value::as_str));
    let console = providers.mocks.console();
    console.add_snowflake_user(&user, settings.roles.clone(), connector.token_life.as_secs());
    let registered_key = providers.register(connector, settings)?.private_key;
    let key = settings.private_key(&providers.allowlist)?.unwrap_or(registered_key);
    let base = providers.mocks.base(ProviderKind::Snowflake);
    snowflake::exchange(&providers.http, &base, (&user, &key), narrowing, *now).await
}

async fn installation_token(
    providers: &ProviderClient,
    request: &ProviderRequest,
    settings: &Settings,
) -> Result<ProviderToken, ProviderRefusal> {
    let ProviderRequest { connector, installation, narrowing, now, .. } = request;
    let Registration { client_id, private_key, .. } = providers.register(connector, settings)?;
    let account = &installation.as_ref().ok_or(ProviderRefusal::new("not_installed"))?.tenant_id;
    let number = providers.mocks.console().install_github(&client_id, account);
    let key = settings.private_key(&providers.allowlist)?.unwrap_or(private_key);
    let base = providers.mocks.base(ProviderKind::GitHub);
    github::installation_token(&providers.http, &base, (&client_id, &key), number, narrowing, *now).await
}

/// The first token of a grant that the seed contains.
async fn first_token(
    providers: &ProviderClient,
    client: &OAuthClient,
    request: &ProviderRequest,
    entry: &mut VaultEntry,
) -> Result<ProviderToken, ProviderRefusal> {
    let kind = request.connector.provider();
    let is_slack = kind == ProviderKind::Slack;
    let tenant = request.installation.as_ref().map_or("app", |installation| installation.tenant_id.as_str());
    let (hint, scope_name) = match &request.subject {
        Subject::User { id, .. } => (("login_hint", id.as_str()), if is_slack { "user_scope" } else { "scope" }),
        _ if is_slack => (("team", tenant), "scope"),
        _ => (("login_hint", tenant), "scope"),
    };
    providers.mocks.console().consent(kind, &client.client_id, hint.1);
    let mut token = client.authorize_without_prompt(&Narrowing::default(), scope_name, hint).await?;
    entry.take_refresh_token(&mut token);
    match (&entry.refresh_token, request.narrowing.is_unrestricted() || is_slack) {
        // The grant itself is unrestricted; a refresh narrows the token.
        (Some(refresh_token), false) => client.refresh(refresh_token, &request.narrowing).await,
        _ => Ok(token),
    }
}
