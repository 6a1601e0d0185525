//! GitHub, from Connect's side: a JWT signed with the app's key gets an installation token; users consent by the web
//! flow.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use http::header::AUTHORIZATION;
use serde_json::{Map, Value, json};

use super::http::HttpClient;
use super::oauth::{Endpoints, OAuthClient};
use super::{ProviderRefusal, ProviderToken, select};
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// The lifetime of the app's JWT, in seconds. GitHub accepts up to ten minutes.
const JWT_LIFE: u64 = 540;
/// How far the JWT is backdated, in seconds, to allow for clock drift as GitHub recommends.
const BACKDATED: u64 = 60;

pub(super) fn endpoints(base: &str) -> Endpoints {
    Endpoints::new(format!("{base}/login/oauth/authorize"), format!("{base}/login/oauth/access_token"), None)
}

/// Converts GitHub's response to RFC 6749: errors have status 200.
pub(super) fn normalize(status: u16, body: Value) -> (u16, Value) {
    (if body.get("error").is_some() { 400 } else { status }, body)
}

/// Gets an installation token.
pub(super) async fn installation_token(
    http: &HttpClient,
    base: &str,
    (client_id, private_key): (&str, &str),
    installation: u64,
    narrowing: &Narrowing,
    now: SystemTime,
) -> Result<ProviderToken, ProviderRefusal> {
    let key = RsaKey::from_pem(private_key).map_err(|_| ProviderRefusal::new("invalid_key"))?;
    let now = seconds(now);
    let jwt = key.sign(&json!({"iss": client_id, "iat": now - BACKDATED, "exp": now + JWT_LIFE}));
    let url = format!("{base}/app/installations/{installation}/access_tokens");
    let body = restrictions(narrowing)?;
    let headers = [(AUTHORIZATION, format!("Bearer {jwt}"))];
    let body = Value::Object(body).to_string().into_bytes();
    let (status, body) = http.json(Method::POST, &url, &headers, body).await?;
    match (status, body["token"].as_str()) {
        (201, Some(token)) => {
            let expires_at = body["expires_at"].as_str().and_then(|time| humantime::parse_rfc3339_weak(time).ok());
            let expires_in = expires_at.map(|time| Duration::from_secs(seconds(time).saturating_sub(now)));
            let extra = body.as_object().cloned().unwrap_or_default();
            Ok(ProviderToken { token: token.to_owned(), expires_in, extra, ..ProviderToken::default() })
        }
        (401, _) => Err(ProviderRefusal::new("invalid_client")),
        (404, _) => Err(ProviderRefusal::new("not_installed")),
        (403 | 422, _) => Err(ProviderRefusal::new("invalid_scope")),
        _ => Err(ProviderRefusal::new("invalid_answer")),
    }
}

/// The body that restricts an installation token. It is built from `authorizationDetails` of type
/// `github_app_installation` with `repositories` (`acme/web`) and `permissions` (`contents:read`), and from scopes in
/// the form of permissions. GitHub apps have no other scopes, and their tokens have no audience but GitHub's API.
fn restrictions(narrowing: &Narrowing) -> Result<Map<String, Value>, ProviderRefusal> {
    let (mut repositories, mut permissions) = (Vec::new(), Map::new());
    let mut permit = |text: &str| {
        let pair = text.split_once(':').filter(|(_, level)| ["read", "write", "admin"].contains(level));
        permissions.extend(pair.map(|(name, level)| (name.to_owned(), level.into())));
    };
    narrowing.named_scopes().into_iter().for_each(&mut permit);
    for details in narrowing.authorization_details.iter().flatten() {
        if details.get("type").and_then(Value::as_str) != Some("github_app_installation") {
            return Err(ProviderRefusal::new("invalid_authorization_details"));
        }
        let list =
            |name: &str| details.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        list("permissions").for_each(&mut permit);
        let name = |repository: &str| repository.rsplit('/').next().unwrap_or_default().to_owned();
        repositories.extend(list("repositories").map(name));
    }
    let mut body = Map::new();
    if !repositories.is_empty() {
        body.insert("repositories".into(), repositories.into());
    }
    if !permissions.is_empty() {
        body.insert("permissions".into(), permissions.into());
    }
    Ok(body)
}

/// The metadata for the app.
pub(super) fn metadata(extra: &Map<String, Value>) -> Value {
    select(extra, &["permissions", "repository_selection", "repositories"].map(|key| (key, key)))
}

/// Revokes a user's consent.
pub(super) async fn revoke_user(client: &OAuthClient, base: &str, access_token: &str) -> Result<(), ProviderRefusal> {
    let secret = client.client_secret.as_deref().unwrap_or_default();
    let basic = BASE64_STANDARD.encode(format!("{}:{secret}", client.client_id));
    let url = format!("{base}/applications/{}/grant", client.client_id);
    let body = json!({"access_token": access_token}).to_string().into_bytes();
    match client.http.json(Method::DELETE, &url, &[(AUTHORIZATION, format!("Basic {basic}"))], body).await? {
        (204, _) => Ok(()),
        (_, body) => Err(ProviderRefusal::from_body(&body)),
    }
}

/// Revokes an installation token.
pub(super) async fn revoke_installation_token(
    http: &HttpClient,
    base: &str,
    token: &str,
) -> Result<(), ProviderRefusal> {
    let url = format!("{base}/installation/token");
    match http.json(Method::DELETE, &url, &[(AUTHORIZATION, format!("Bearer {token}"))], Vec::new()).await? {
        (204, _) => Ok(()),
        (_, body) => Err(ProviderRefusal::from_body(&body)),
    }
}
