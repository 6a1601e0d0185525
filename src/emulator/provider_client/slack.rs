//! Slack, from Connect's side.

use serde_json::{Map, Value};

use super::oauth::Endpoints;
use super::{ProviderRefusal, ProviderToken, select};
use crate::emulator::flow::Narrowing;

pub(super) fn endpoints(base: &str) -> Endpoints {
    Endpoints::new(
        format!("{base}/oauth/v2/authorize"),
        format!("{base}/api/oauth.v2.access"),
        Some(format!("{base}/api/auth.revoke")),
    )
}

/// Converts Slack's response to RFC 6749: errors have status 200 and `"ok": false`, and a user's token is nested in
/// `authed_user`.
pub(super) fn normalize(status: u16, mut body: Value) -> (u16, Value) {
    if body["ok"] == false {
        return (400, body);
    }
    if let Some(fields) = body.as_object_mut()
        && !fields.contains_key("access_token")
        && let Some(Value::Object(user)) = fields.remove("authed_user")
    {
        fields.extend(user);
    }
    (status, body)
}

/// Refuses scopes that were not granted. Slack cannot narrow a token, which always has all granted scopes. Its only
/// audience and resource is Slack's API, and it has no authorization details.
pub(super) fn check_scopes(token: &ProviderToken, narrowing: &Narrowing) -> Result<(), ProviderRefusal> {
    let granted = token.scopes.as_deref().unwrap_or_default();
    let granted: Vec<&str> = granted.iter().map(String::as_str).filter(|scope| !scope.is_empty()).collect();
    let is_granted = |scope: &&str| granted.is_empty() || granted.contains(scope);
    match narrowing.named_scopes().iter().all(is_granted) {
        true => Ok(()),
        false => Err(ProviderRefusal::new("invalid_scope")),
    }
}

/// The metadata for the app.
pub(super) fn metadata(extra: &Map<String, Value>) -> Value {
    select(extra, &["team", "bot_user_id", "app_id"].map(|key| (key, key)))
}
