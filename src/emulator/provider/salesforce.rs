//! Salesforce, from Connect's side.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::oauth::{Endpoints, Party};
use super::{Fetched, Refused};
use crate::emulator::keys::seconds;

pub(super) fn endpoints(base: &str) -> Endpoints {
    let at = |what: &str| format!("{base}/services/oauth2/{what}");
    Endpoints::new(at("authorize"), at("token"), Some(at("revoke")))
}

/// Finds out how long a token lasts, which does not come with it.
pub(super) async fn with_end(party: &Party, mut fetched: Fetched, now: SystemTime) -> Result<Fetched, Refused> {
    let url = party.endpoints.token.replace("/token", "/introspect");
    let secret = party.client_secret.as_deref().unwrap_or_default();
    let form = [("token", fetched.token.as_str()), ("client_id", &party.client_id), ("client_secret", secret)];
    let (_, answer) = party.http.form(&url, &form).await?;
    let left = answer["exp"].as_u64().map(|exp| exp.saturating_sub(seconds(now)));
    fetched.lasts = left.map(Duration::from_secs);
    Ok(fetched)
}

/// What an app is told besides the token: above all where to use it.
pub(super) fn metadata(further: &Map<String, Value>) -> Value {
    [("instance_url", "instanceUrl"), ("id", "id"), ("issued_at", "issuedAt")]
        .iter()
        .filter_map(|(key, name)| Some(((*name).to_owned(), further.get(*key)?.clone())))
        .collect()
}
