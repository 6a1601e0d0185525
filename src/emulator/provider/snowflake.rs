//! Snowflake, from Connect's side: a key-pair JWT, exchanged at the account's token endpoint. A role is a scope,
//! `session:role:ANALYST`.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};

use super::http::Http;
use super::{Fetched, Refused};
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// How long the key-pair JWT lasts: within Snowflake's hour.
const JWT_LIFE: u64 = 300;

/// A token for the app's own user, `ACCOUNT.USER`.
pub(super) async fn exchange(
    http: &Http,
    base: &str,
    (user, private_key): (&str, &str),
    narrowing: &Narrowing,
    now: SystemTime,
) -> Result<Fetched, Refused> {
    let key = RsaKey::from_pem(private_key).map_err(|_| Refused::new("invalid_key"))?;
    let now = seconds(now);
    let issuer = format!("{user}.{}", key.fingerprint());
    let jwt = key.sign(&json!({"iss": issuer, "sub": user, "iat": now, "exp": now + JWT_LIFE}));
    let scopes = narrowing.named_scopes().join(" ");
    let mut form = vec![("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"), ("assertion", jwt.as_str())];
    if !scopes.is_empty() {
        form.push(("scope", &scopes));
    }
    let (status, answer) = http.form(&format!("{base}/oauth/token"), &form).await?;
    // Text is what Snowflake answers; JSON is what some say it does.
    let token = answer.as_str().or(answer["access_token"].as_str());
    match (status, token) {
        (200, Some(token)) => {
            let lasts = expiry(token).map(|exp| Duration::from_secs(exp.saturating_sub(now)));
            Ok(Fetched { token: token.to_owned(), lasts, refresh_token: None, scopes: None, further: Map::new() })
        }
        _ => Err(Refused::of(&answer)),
    }
}

/// When a token ends by its own account, in seconds.
fn expiry(token: &str) -> Option<u64> {
    let payload = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<Value>(&payload).ok()?["exp"].as_u64()
}
