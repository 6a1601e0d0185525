//! What people and tools look at: readiness, the state as JSON, metrics, the page. Reads snapshots, changes nothing.
//!
//! No token, no body and no header ever appears here; connectors and names of projects do.

mod metrics;
#[cfg(feature = "desktop")]
pub mod notices;
pub mod page;
pub mod usage;

use std::sync::Arc;

use tokio::sync::watch;

use crate::credential::expiry_warnings::{self, WarningSteps};
use crate::credential::refresh::{self, Activity};
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

/// Sees everything, owns nothing.
pub struct Status {
    /// The time.
    pub clock: Clock,
    /// Who we are.
    pub identity: watch::Receiver<Arc<Identity>>,
    /// How the refreshing of the OIDC token stands.
    pub refresh: watch::Receiver<refresh::Snapshot>,
    /// What is stored.
    pub cache: Cache,
    /// Counters.
    pub stats: Arc<Stats>,
    /// The month so far.
    pub usage: Usage,
    /// What happens.
    pub events: Events,
    /// Upstream's origin.
    pub upstream: String,
    /// The project directory's name.
    pub project: String,
    /// What people call the source of the credential.
    pub credential_source: String,
    /// What it was told, for the commands that ask it. No secret is among it.
    pub settings: Settings,
    /// When a token's end is warned of; from the longest step on it is `expiring`.
    pub steps: Arc<WarningSteps>,
    /// When this process began to serve.
    pub started_at: Timestamp,
}

/// The time in a counter that holds milliseconds since the epoch; 0 means never.
fn time(ms: u64) -> Option<String> {
    (ms != 0).then(|| Timestamp::from_millis(ms).to_string())
}

impl Status {
    /// Whether a request could be sent upstream now.
    pub fn readiness(&self) -> Result<(), CredentialProblem> {
        self.identity.borrow().credential(self.clock.now()).map(|_| ())
    }

    /// The state as JSON.
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

    /// Prometheus text. `connections` are open now.
    pub fn metrics(&self, connections: usize) -> String {
        let now = self.clock.now();
        let identity = self.identity.borrow().clone();
        metrics::render(&metrics::Readings {
            counts: self.stats.counts(),
            entries: self.cache.tokens().len(),
            connections,
            listeners: self.events.listeners(),
            warnings: self.steps.counts().collect(),
            uptime: self.clock.local().since(self.started_at),
            is_ready: identity.credential(now).is_ok(),
            expires_at: identity.oidc().map(|token| token.expires_at),
            clock_offset_ms: self.clock.offset_ms(),
        })
    }

    fn oidc(&self, identity: &Identity, now: Timestamp) -> OidcStatus {
        let (state, reason) = match identity.credential(now) {
            Ok(credential) => match credential.oidc() {
                Some(token) if token.expires_at.since(now) <= self.steps.longest() => ("expiring", None),
                _ => ("valid", None),
            },
            Err(CredentialProblem::Missing) => ("missing", None),
            Err(CredentialProblem::Expired(_)) => ("expired", None),
            Err(CredentialProblem::Invalid(flaw)) => ("invalid", Some(flaw.reason)),
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
            mode: if snapshot.by_the_clock { "cli" } else { "off" }.to_owned(),
            state: match snapshot.activity {
                Activity::Idle => "idle",
                Activity::Running => "running",
                Activity::Waiting => "waiting",
                Activity::Held => "held",
                Activity::GaveUp => "gave_up",
            }
            .to_owned(),
            last_error: snapshot.last_error,
            next_at: snapshot.next_at.map(|at| at.to_string()),
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
            Err(CredentialProblem::Invalid(flaw)) => warnings.push(Warning::invalid(source, &flaw)),
            Ok(_) | Err(CredentialProblem::Expired(_)) => {
                let about_to_end = token.filter(|token| {
                    let left = token.expires_at.since(now);
                    left <= self.steps.longest() && expiry_warnings::concerns_people(left, &refresh)
                });
                warnings.extend(about_to_end.map(|token| expiry_warnings::warning(token, now)));
            }
        }
        warnings.extend(refresh.warning);
        warnings.extend(token.and_then(|t| Warning::of_environment(t.claims.environment.as_deref())));
        if identity.notes.readable_by_others {
            warnings.push(Warning::readable_by_others(source));
        }
        if identity.notes.duplicate_assignments {
            warnings.push(Warning::duplicate_assignments(source));
        }
        if identity.notes.is_replaced {
            warnings.push(Warning::replaced(source));
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
