//! Reads from an answer what decides about storing it: a token's expiry and connector, or the `Retry-After` of a 429.
//! Pure. No part of a token leaves this module.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::os::clock::Timestamp;
use crate::proxy::reply::Answer;

/// A 429 applies for no longer than this.
pub(super) const MAX_RATE_LIMIT: Duration = Duration::from_secs(60);
/// A 429 without a valid `Retry-After` applies for this long.
const DEFAULT_RATE_LIMIT: Duration = Duration::from_secs(1);

/// A connector's names: the one in the request, its uid and its id.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectorNames(pub(super) Vec<String>);

impl ConnectorNames {
    /// The uid where it is known.
    pub(super) fn display_name(&self) -> &str {
        self.0.iter().find(|name| !is_id(name)).or(self.0.first()).map_or("", String::as_str)
    }

    pub(super) fn intersects(&self, aliases: &HashSet<String>) -> bool {
        self.0.iter().any(|name| aliases.contains(name))
    }
}

/// Besides its uid, a connector has an opaque id (docs/vercel.md section 1.3).
fn is_id(name: &str) -> bool {
    name.starts_with("scl_")
}

/// Whether `connector` may be another name of the connector with these `aliases`. An id and a uid may belong to the
/// same connector unless `aliases` has both kinds.
pub(super) fn may_be_named(connector: &str, aliases: &HashSet<String>) -> bool {
    aliases.contains(connector) || !aliases.iter().any(|alias| is_id(alias) == is_id(connector))
}

/// What a token answer grants.
pub(super) struct Grant {
    pub(super) expires_at: Timestamp,
    id: Option<String>,
    uid: Option<String>,
}

impl Grant {
    /// Reads an answer that may be stored: a 200 with a non-empty string `token` and a finite, positive number
    /// `expiresAt`.
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
        // These names are not guaranteed; without them, the entry only has the name in the request.
        let connector = response.connector.and_then(|raw| serde_json::from_str::<Connector>(raw.get()).ok());
        let Connector { id, uid } = connector.unwrap_or_default();
        (!response.token.is_empty() && response.expires_at.is_finite() && response.expires_at > 0.0).then(|| Self {
            expires_at: Timestamp::from_millis(response.expires_at as u64),
            id,
            uid,
        })
    }

    /// The connector's names. `requested` is the one in the request.
    pub(super) fn names(self, requested: &str) -> ConnectorNames {
        let mut names = vec![requested.to_owned()];
        for name in [self.uid, self.id].into_iter().flatten() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        ConnectorNames(names)
    }
}

/// How long a 429 applies: seconds or an HTTP date, one minute at most, one second if it is not valid.
pub(super) fn rate_limit_duration(retry_after: Option<&str>, now: Timestamp) -> Duration {
    let Some(text) = retry_after.map(str::trim) else { return DEFAULT_RATE_LIMIT };
    let duration = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        match httpdate::parse_http_date(text) {
            Ok(date) => Timestamp::from(date).since(now),
            Err(_) => DEFAULT_RATE_LIMIT,
        }
    };
    duration.min(MAX_RATE_LIMIT)
}
