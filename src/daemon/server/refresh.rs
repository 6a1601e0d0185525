//! `POST /_sidecar/v1/refresh`: a person wants a fresh OIDC token now. The answer says how long it is good for, or why
//! there is none; never the token.

use std::time::Duration;

use serde_json::json;

use crate::credential::refresh::{RefreshError, RefreshHandle};
use crate::os::clock::Clock;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply;

/// Who asks is answered by then, as a request may take a minute at most; the refresh itself goes on.
const LIMIT: Duration = Duration::from_secs(50);

/// Asks, and waits for the outcome.
pub(super) async fn ask(asker: &RefreshHandle, clock: &Clock) -> Result<String, RequestError> {
    let outcome = tokio::time::timeout(LIMIT, asker.refresh()).await.map_err(|_| {
        let message = "The refresh takes its time and goes on. `connect-sidecar status` tells how it ends.";
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
