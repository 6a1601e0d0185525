//! Snowflake, from Connect's side: a key-pair JWT is exchanged at the account's token endpoint. A role is requested as
//! a scope, such as `session:role:ANALYST`.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::http::HttpClient;
use super::{ProviderRefusal, ProviderToken};
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// The lifetime of the key-pair JWT, in seconds. Snowflake accepts up to an hour.
const JWT_LIFE: u64 = 300;

/// Gets a token for a user, `ACCOUNT.USER`.
pub(super) async fn exchange(
    http: &HttpClient,
    base: &str,
    (user, private_key): (&str, &str),
    narrowing: &Narrowing,
    now: SystemTime,
) -> Result<ProviderToken, ProviderRefusal> {
    let key = RsaKey::from_pem(private_key).map_err(|_| ProviderRefusal::new("invalid_key"))?;
    let now = seconds(now);
    let issuer = format!("{user}.{}", key.fingerprint());
    let jwt = key.sign(&json!({"iss": issuer, "sub": user, "iat": now, "exp": now + JWT_LIFE}));
    let scopes = narrowing.named_scopes().join(" ");
    let mut form = vec![("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"), ("assertion", jwt.as_str())];
    if !scopes.is_empty() {
        form.push(("scope", &scopes));
    }
    let (status, body) = http.form(&format!("{base}/oauth/token"), &[], &form).await?;
    // Snowflake returns the token as text; some of its documentation shows JSON.
    match (status, body.as_str().or(body["access_token"].as_str())) {
        (200, Some(token)) => {
            let expires_in = expiry(token).map(|exp| Duration::from_secs(exp.saturating_sub(now)));
            Ok(ProviderToken { token: token.to_owned(), expires_in, ..ProviderToken::default() })
        }
        _ => Err(ProviderRefusal::from_body(&body)),
    }
}

/// `exp` of a JWT, in seconds since 1970.
fn expiry(token: &str) -> Option<u64> {
    let payload = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<Value>(&payload).ok()?["exp"].as_u64()
}
