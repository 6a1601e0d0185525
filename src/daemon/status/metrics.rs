//! Metrics in the Prometheus text format. Label values come from fixed lists or settings, never from requests.

use std::fmt::Write;
use std::time::Duration;

use crate::os::clock::Timestamp;
use crate::proxy::stats::Counts;

/// Current values of the metrics.
pub(super) struct Readings {
    pub(super) counts: Counts,
    pub(super) entries: usize,
    pub(super) connections: usize,
    pub(super) listeners: usize,
    pub(super) warnings: Vec<(Duration, u64)>,
    pub(super) uptime: Duration,
    pub(super) is_ready: bool,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) clock_offset_ms: i64,
}

/// Renders the text exposition format, version 0.0.4.
pub(super) fn render(readings: &Readings) -> String {
    let Readings { counts, entries, connections, listeners, warnings, uptime, is_ready, expires_at, clock_offset_ms } =
        readings;
    let mut out = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
        let _ = writeln!(out, "# HELP connect_sidecar_{name} {help}\n# TYPE connect_sidecar_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "connect_sidecar_{name}{labels} {value}");
        }
    };
    metric(
        "build_info",
        "gauge",
        "The running version.",
        &[(concat!("{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0)],
    );
    metric("uptime_seconds", "gauge", "Time since the process started.", &[("", uptime.as_secs_f64())]);
    metric(
        "token_requests_total",
        "counter",
        "Token requests by cache result.",
        &[
            ("{result=\"hit\"}", counts.hits as f64),
            ("{result=\"miss\"}", counts.misses as f64),
            ("{result=\"collapsed\"}", counts.collapsed as f64),
        ],
    );
    let saved = counts.requests_saved() as f64;
    metric("requests_saved_total", "counter", "Upstream requests that hits and joined requests saved.", &[("", saved)]);
    metric("cache_entries", "gauge", "Cached tokens.", &[("", *entries as f64)]);
    let sent = counts.upstream_requests as f64;
    metric("upstream_requests_total", "counter", "Requests sent upstream.", &[("", sent)]);
    let failed = counts.upstream_errors as f64;
    metric(
        "upstream_errors_total",
        "counter",
        "Upstream responses with status 5xx and failed upstream connections.",
        &[("", failed)],
    );
    metric(
        "refused_total",
        "counter",
        "Requests answered with an error of the sidecar's own.",
        &[("", counts.refused as f64)],
    );
    metric(
        "failed_total",
        "counter",
        "Requests answered with an error, whether upstream's or the sidecar's.",
        &[("", counts.failed as f64)],
    );
    metric("connections", "gauge", "Open client connections.", &[("", *connections as f64)]);
    metric("event_listeners", "gauge", "Open event streams.", &[("", *listeners as f64)]);
    metric(
        "unknown_peers_total",
        "counter",
        "Accepted connections whose user could not be determined.",
        &[("", counts.unknown_peers as f64)],
    );
    metric("oidc_rotations_total", "counter", "OIDC tokens that replaced another.", &[("", counts.rotations as f64)]);
    metric("ready", "gauge", "1 while a valid credential is loaded.", &[("", f64::from(u8::from(*is_ready)))]);
    if let Some(expires_at) = expires_at {
        let seconds = expires_at.as_seconds() as f64;
        metric("oidc_expires_at_seconds", "gauge", "Expiry of the OIDC token, in Unix time.", &[("", seconds)]);
    }
    let labels: Vec<_> = warnings.iter().map(|(step, count)| (label(*step), *count as f64)).collect();
    let samples: Vec<_> = labels.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    metric("warnings_total", "counter", "Expiry warnings given by this process, by time before the expiry.", &samples);
    let offset = *clock_offset_ms as f64 / 1000.0;
    metric("clock_offset_seconds", "gauge", "Upstream's clock minus this machine's, if corrected.", &[("", offset)]);
    out
}

/// The label of a warning step: in whole minutes if possible, otherwise in seconds.
fn label(step: Duration) -> String {
    let seconds = step.as_secs_f64();
    match seconds % 60.0 {
        _ if step.is_zero() => r#"{step="expired"}"#.to_owned(),
        0.0 => format!(r#"{{step="{}m"}}"#, seconds / 60.0),
        _ => format!(r#"{{step="{seconds}s"}}"#),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_labels() {
        for (ms, expected) in [(3_600_000, "60m"), (90_000, "90s"), (1500, "1.5s"), (0, "expired")] {
            assert_eq!(label(Duration::from_millis(ms)), format!("{{step=\"{expected}\"}}"));
        }
    }
}
