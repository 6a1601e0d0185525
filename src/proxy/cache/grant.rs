//! What an answer says about itself: a token that may be stored, until when and of which connector; or how long a 429 is
//! to be held. Pure. No part of a token leaves here.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::os::clock::Timestamp;
use crate::proxy::reply::Answer;

/// A 429 is held no longer than this.
pub(super) const MAX_HOLD: Duration = Duration::from_secs(60);
/// A 429 without a readable `Retry-After` is held for this long.
const DEFAULT_HOLD: Duration = Duration::from_secs(1);
/// What a connector is called: as it was request for, by id, by uid.
#[derive(Debug, Clone, Default)]
pub(super) struct Names(pub(super) Vec<String>);

impl Names {
    pub(super) fn shown(&self) -> &str {
        self.0.iter().find(|name| !is_id(name)).or(self.0.first()).map_or("", String::as_str)
    }
}

/// Connectors have an opaque id besides their uid (docs/vercel.md section 1.3).
fn is_id(name: &str) -> bool {
    name.starts_with("scl_")
}

/// Whether a flight for `connector` may concern one of `aliases`, the names of one connector. An id and a uid may be
/// the same connector unless the names of both kinds are known.
pub(super) fn could_be_among(connector: &str, aliases: &HashSet<String>) -> bool {
    aliases.contains(connector) || !aliases.iter().any(|alias| is_id(alias) == is_id(connector))
}

/// What a token answer says about itself.
pub(super) struct Grant {
    pub(super) expires_at: Timestamp,
    id: Option<String>,
    uid: Option<String>,
}

impl Grant {
    /// Reads an answer that may be stored: 200, a non-empty string `token`, a finite number `expiresAt`.
    pub(super) fn read(answer: &Answer) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct TokenResponse<'a> {
            #[serde(borrow)]
            token: Cow<'a, str>,
            expires_at: f64,
            #[serde(borrow)]
            connector: Option<&'a RawValue>,
        }
        #[derive(Default, Deserialize)]
        struct Connector {
            id: Option<String>,
            uid: Option<String>,
        }
        if answer.status != StatusCode::OK {
            return None;
        }
        let response: TokenResponse<'_> = serde_json::from_slice(&answer.body).ok()?;
        // Nobody promises these names: an answer without them is stored under the one it was request for by.
        let connector = response.connector.and_then(|raw| serde_json::from_str::<Connector>(raw.get()).ok());
        let Connector { id, uid } = connector.unwrap_or_default();
        (!response.token.is_empty() && response.expires_at.is_finite() && response.expires_at > 0.0).then(|| Self {
            expires_at: Timestamp::from_millis(response.expires_at as u64),
            id,
            uid,
        })
    }

    pub(super) fn names(self, request: &str) -> Names {
        let mut names = vec![request.to_owned()];
        for name in [self.uid, self.id].into_iter().flatten() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Names(names)
    }
}

/// How long a 429 is held: seconds or an HTTP date, at most a minute, one second where it cannot be read.
pub(super) fn hold_time(retry_after: Option<&str>, now: Timestamp) -> Duration {
    let Some(text) = retry_after.map(str::trim) else { return DEFAULT_HOLD };
    let request = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        match httpdate::parse_http_date(text) {
            Ok(date) => Timestamp::from(date).since(now),
            Err(_) => DEFAULT_HOLD,
        }
    };
    request.min(MAX_HOLD)
}
