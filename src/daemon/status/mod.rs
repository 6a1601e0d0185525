//! Readiness, the status as JSON, metrics, and the status page. Reads snapshots and changes nothing.
//!
//! The output contains names of connectors and projects, but no tokens, bodies or headers.

mod metrics;
#[cfg(feature = "desktop")]
pub mod notices;
pub mod page;
pub mod usage;

use std::sync::Arc;

use tokio::sync::watch;

use crate::credential::expiry_warnings::{self, WarningSteps};
use crate::credential::refresh::{self, AutoRefresh};
use crate::credential::warning::Warning;
use crate::credential::{CredentialProblem, Identity, OidcToken, TokenState, VERCEL_CLI};
use crate::events::Events;
use crate::instance::Settings;
use crate::instance::status::{
    CacheStatus, FailureStatus, OidcStatus, RefreshStatus, StatusReport, TokenStatus, UpstreamStatus, WarningStatus,
};
use crate::os::clock::{Clock, Timestamp};
use crate::proxy::cache::Cache;
use crate::proxy::stats::Stats;
use usage::Usage;

/// Read access to the state of all parts.
pub struct Status {
    /// The clock, corrected by upstream's.
    pub clock: Clock,
    /// The current identity.
    pub identity: watch::Receiver<Arc<Identity>>,
    /// The state of refreshing the OIDC token.
    pub refresh: watch::Receiver<refresh::Snapshot>,
    /// The token cache.
    pub cache: Cache,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Token requests of this month.
    pub usage: Usage,
    /// Published events.
    pub events: Events,
    /// Origin of upstream.
    pub upstream: String,
    /// Name of the project directory.
    pub project: String,
    /// Display name of the credential's source, such as `.env.local`.
    pub credential_source: String,
    /// What it was told, for the commands that ask it. No secret is among it.
    pub settings: Settings,
    /// When a token's end is warned of; from the longest step on it is `expiring`.
    pub steps: Arc<WarningSteps>,
    /// Start of this process, by the machine's clock.
    pub started_at: Timestamp,
}

/// The time in a counter that holds milliseconds since the epoch; 0 means never.
fn time(ms: u64) -> Option<String> {
    (ms != 0).then(|| Timestamp::from_millis(ms).to_string())
}

impl Status {
    /// Fails if there is no usable credential.
    pub fn readiness(&self) -> Result<(), CredentialProblem> {
        self.identity.borrow().credential(self.clock.now()).map(|_| ())
    }

    /// The status as JSON (docs/http.md section 4).
    pub fn json(&self) -> String {
        let now = self.clock.now();
        let identity = self.identity.borrow().clone();
        let counts = self.stats.counts();
        let tokens = self.cache.tokens();
        let report = StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            now: now.to_string(),
            uptime_seconds: self.clock.local().since(self.started_at).as_secs(),
            project: self.project.clone(),
            oidc: self.oidc(&identity, now),
            refresh: self.refresh(),
            cache: CacheStatus {
                entries: tokens.len(),
                hits: counts.hits,
                misses: counts.misses,
                collapsed: counts.collapsed,
                requests_saved: counts.requests_saved(),
            },
            upstream: UpstreamStatus {
                url: self.upstream.clone(),
                requests: counts.upstream_requests,
                errors: counts.upstream_errors,
                last_error_at: time(counts.upstream_failed_at_ms),
            },
            failures: FailureStatus { count: counts.failed, last_at: time(counts.failed_at_ms) },
            usage: self.usage.report(),
            tokens: tokens
                .into_iter()
                .map(|token| TokenStatus {
                    connector: token.connector,
                    subject: token.subject.as_str().to_owned(),
                    stored_at: token.stored_at.to_string(),
                    expires_at: token.expires_at.to_string(),
                    hits: token.hits,
                })
                .collect(),
            warnings: self.warnings(&identity, now),
            settings: self.settings.clone(),
        };
        serde_json::to_string(&report).unwrap_or_default()
    }

    fn oidc(&self, identity: &Identity, now: Timestamp) -> OidcStatus {
        let (state, reason) = match identity.credential(now) {
            Ok(credential) => match credential.oidc() {
                Some(token) if token.expires_at.since(now) <= self.steps.longest() => ("expiring", None),
                _ => ("valid", None),
            },
            Err(CredentialProblem::Missing) => ("missing", None),
            Err(CredentialProblem::Expired(_)) => ("expired", None),
            Err(CredentialProblem::Invalid(defect)) => ("invalid", Some(defect.reason)),
        };
        let token = identity.oidc();
        let claim = |of: fn(&crate::credential::Claims) -> &Option<String>| token.and_then(|t| of(&t.claims).clone());
        OidcStatus {
            state: state.to_owned(),
            reason,
            source: if identity.is_from_cli { VERCEL_CLI.into() } else { self.credential_source.clone() },
            configured_source: self.credential_source.clone(),
            expires_at: token.map(|t| t.expires_at.to_string()),
            expires_in_seconds: token.map(|t| t.expires_at.since(now).as_secs()),
            lifetime_seconds: token.and_then(OidcToken::lifetime).map(|life| life.as_secs()),
            owner: claim(|c| &c.owner),
            project: claim(|c| &c.project),
            environment: claim(|c| &c.environment),
            fingerprint: match &identity.state {
                TokenState::Loaded(credential) => Some(credential.fingerprint().to_owned()),
                TokenState::Invalid { .. } | TokenState::Missing => None,
            },
        }
    }

    fn refresh(&self) -> RefreshStatus {
        let snapshot = self.refresh.borrow().clone();
        RefreshStatus {
            mode: if snapshot.auto == AutoRefresh::Off { "off" } else { "cli" }.to_owned(),
            state: match snapshot.auto {
                _ if snapshot.is_running => "running",
                AutoRefresh::Off | AutoRefresh::Scheduled(_) => "idle",
                AutoRefresh::Delayed(_) => "waiting",
                AutoRefresh::NotApproved(_) => "held",
                AutoRefresh::GaveUp(_) => "gave_up",
            }
            .to_owned(),
            next_at: snapshot.next_at().map(|at| at.to_string()),
            last_error: snapshot.last_error,
        }
    }

    /// What to act on now, in the words of the log.
    fn warnings(&self, identity: &Identity, now: Timestamp) -> Vec<WarningStatus> {
        let source = &self.credential_source;
        let token = identity.oidc();
        let refresh = self.refresh.borrow().clone();
        let mut warnings = Vec::new();
        match identity.credential(now) {
            Err(CredentialProblem::Missing) => warnings.push(Warning::missing(source)),
            Err(CredentialProblem::Invalid(defect)) => warnings.push(Warning::invalid(source, &defect)),
            Ok(_) | Err(CredentialProblem::Expired(_)) => {
                let expiring = token.filter(|token| {
                    let left = token.expires_at.since(now);
                    left <= self.steps.longest() && expiry_warnings::should_warn(left, &refresh)
                });
                warnings.extend(expiring.map(|token| expiry_warnings::warning(token, now)));
            }
        }
        warnings.extend(refresh.warning().cloned());
        warnings.extend(token.and_then(|t| Warning::of_environment(t.claims.environment.as_deref())));
        if identity.file_warnings.readable_by_others {
            warnings.push(Warning::readable_by_others(source));
        }
        if identity.file_warnings.duplicate_assignments {
            warnings.push(Warning::duplicate_assignments(source));
        }
        if identity.file_warnings.is_stale_mount {
            warnings.push(Warning::stale_mount(source));
        }
        if self.clock.offset_ms() != 0 {
            let by = std::time::Duration::from_millis(self.clock.offset_ms().unsigned_abs());
            warnings.push(Warning::clock_skew(by));
        }
        let report = |warning: Warning| WarningStatus {
            code: warning.code.to_owned(),
            message: warning.sentence(),
            remedy: Some(warning.remedy),
        };
        warnings.into_iter().map(report).collect()
    }
}
