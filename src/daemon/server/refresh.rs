//! `POST /_sidecar/v1/refresh`: refreshes the OIDC token on request. The response has the new token's project and
//! expiry, or the reason of a failure, and never the token.

use std::time::Duration;

use serde_json::json;

use crate::credential::refresh::{RefreshError, RefreshHandle};
use crate::os::clock::Clock;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply;

/// Below the request timeout of 60 s, so that the client gets an answer. The refresh itself continues.
const TIMEOUT: Duration = Duration::from_secs(50);

/// Starts a refresh, or joins the running one, and returns the response body.
pub(super) async fn refresh(handle: &RefreshHandle, clock: &Clock) -> Result<String, RequestError> {
    let outcome = tokio::time::timeout(TIMEOUT, handle.refresh()).await.map_err(|_| {
        let message = "The refresh goes on. `connect-sidecar status` shows its outcome.";
        RequestError::new(Code::RefreshFailed, message).command("connect-sidecar status")
    })?;
    let refreshed = outcome.map_err(|error| {
        let code = match error {
            RefreshError::TooSoon(_) => Code::LocalRateLimit,
            _ => Code::RefreshFailed,
        };
        let mut refused = RequestError::new(code, format!("The OIDC token was not refreshed: {error}."));
        if let RefreshError::TooSoon(left) = error {
            refused.retry_after = Some(reply::retry_after(left));
        }
        refused.remedy(error.remedy())
    })?;
    let left = refreshed.expires_at.since(clock.now());
    Ok(json!({
        "project": refreshed.project,
        "expires_at": refreshed.expires_at.to_string(),
        "expires_in_seconds": left.as_secs(),
    })
    .to_string())
}
