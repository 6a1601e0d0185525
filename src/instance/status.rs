//! The body of `GET /_sidecar/v1/status` (docs/http.md section 4), as the daemon writes it and commands read it.
//!
//! The field order is the order on the wire. A reader may be newer than the sidecar it asks, so fields that were added
//! later have a default. The report names connectors and projects but contains no token, body or header.

use serde::{Deserialize, Serialize};

use super::Settings;
use crate::remedy::Remedy;

/// The state of a sidecar. Times are RFC 3339 in UTC.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct StatusReport {
    /// The sidecar's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The current time by the clock that all other times use: this machine's, corrected by upstream's.
    #[serde(default)]
    pub now: String,
    /// Whole seconds since the process began to serve.
    #[serde(default)]
    pub uptime_seconds: u64,
    /// The name of the project directory.
    pub project: String,
    /// The credential.
    pub oidc: OidcStatus,
    /// The refreshing of the OIDC token.
    #[serde(default)]
    pub refresh: RefreshStatus,
    /// The token cache.
    pub cache: CacheStatus,
    /// The upstream.
    pub upstream: UpstreamStatus,
    /// Requests that failed.
    #[serde(default)]
    pub failures: FailureStatus,
    /// The month's token requests.
    #[serde(default)]
    pub usage: UsageStatus,
    /// The cached tokens.
    pub tokens: Vec<TokenStatus>,
    /// What to act on now.
    pub warnings: Vec<WarningStatus>,
    /// The settings, without secrets.
    pub settings: Settings,
}

/// The credential.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct OidcStatus {
    /// `valid`, `expiring`, `expired`, `missing` or `invalid`.
    pub state: String,
    /// Why it is invalid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Where the token in use came from.
    pub source: String,
    /// Where tokens are read from.
    #[serde(default)]
    pub configured_source: String,
    /// When the token expires.
    pub expires_at: Option<String>,
    /// Seconds until then, 0 once it has expired.
    pub expires_in_seconds: Option<u64>,
    /// Seconds from the token's `iat` to its `exp`.
    pub lifetime_seconds: Option<u64>,
    /// The claim `owner`.
    pub owner: Option<String>,
    /// The claim `project`.
    pub project: Option<String>,
    /// The claim `environment`.
    pub environment: Option<String>,
    /// The first 8 hex digits of the token's SHA-256.
    pub fingerprint: Option<String>,
}

/// The refreshing of the OIDC token.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct RefreshStatus {
    /// `cli` or `off`.
    pub mode: String,
    /// `idle`, `running`, `waiting`, `held` or `gave_up`.
    pub state: String,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
    /// When the next attempt is due.
    pub next_at: Option<String>,
}

/// The token cache. The counters start at zero with the process.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Tokens that are cached now.
    pub entries: usize,
    /// Requests answered from the cache.
    pub hits: u64,
    /// Requests that went upstream.
    pub misses: u64,
    /// Requests that joined a fetch in flight.
    pub collapsed: u64,
    /// Requests that did not have to go upstream.
    pub requests_saved: u64,
}

/// The upstream. The counters start at zero with the process.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// Its origin.
    pub url: String,
    /// Requests sent to it.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// When the last one failed.
    pub last_error_at: Option<String>,
}

/// Requests that were answered with an error, upstream's or the sidecar's own.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FailureStatus {
    /// How many, since the process started.
    pub count: u64,
    /// When the last one failed.
    pub last_at: Option<String>,
}

/// The team's token requests of this month, as Connect bills them.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UsageStatus {
    /// The calendar month in UTC, as in `2026-11`.
    pub month: String,
    /// Token requests that Connect answered with a token.
    pub requests: u64,
    /// Additional requests that the app would have made without the sidecar.
    pub saved: u64,
    /// The price of the saved requests on the Pro plan, in US dollars.
    pub saved_usd: f64,
    /// Requests a month that the Hobby plan includes.
    pub allowance: u64,
}

/// A cached token, without the token.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct TokenStatus {
    /// The connector, as the app wrote it.
    pub connector: String,
    /// The type of the subject: `app`, `user` and so on.
    pub subject: String,
    /// When Connect answered with it.
    #[serde(default)]
    pub stored_at: String,
    /// When it expires.
    pub expires_at: String,
    /// Requests answered with it from the cache.
    pub hits: u64,
}

/// Something to act on now.
#[derive(Debug, Serialize, Deserialize)]
pub struct WarningStatus {
    /// The kind of warning; stable.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// What to do about it.
    #[serde(flatten)]
    pub remedy: Option<Remedy>,
}
