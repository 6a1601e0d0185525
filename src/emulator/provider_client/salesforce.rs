//! Salesforce, from Connect's side.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::oauth::{Endpoints, OAuthClient};
use super::{ProviderRefusal, ProviderToken, select};
use crate::emulator::keys::seconds;

pub(super) fn endpoints(base: &str) -> Endpoints {
    let at = |name: &str| format!("{base}/services/oauth2/{name}");
    Endpoints::new(at("authorize"), at("token"), Some(at("revoke")))
}

/// Adds the lifetime, which Salesforce only tells by introspection.
pub(super) async fn with_expiry(
    client: &OAuthClient,
    mut token: ProviderToken,
    now: SystemTime,
) -> Result<ProviderToken, ProviderRefusal> {
    let url = client.endpoints.token.replace("/token", "/introspect");
    let secret = client.client_secret.as_deref().unwrap_or_default();
    let form = [("token", token.token.as_str()), ("client_id", &client.client_id), ("client_secret", secret)];
    let (_, body) = client.http.form(&url, &[], &form).await?;
    let left = body["exp"].as_u64().map(|exp| exp.saturating_sub(seconds(now)));
    token.expires_in = left.map(Duration::from_secs);
    Ok(token)
}

/// The metadata for the app, above all the URL to use the token at.
pub(super) fn metadata(extra: &Map<String, Value>) -> Value {
    select(extra, &[("instance_url", "instanceUrl"), ("id", "id"), ("issued_at", "issuedAt")])
}
