//! Metrics in the Prometheus text format. Label values come from fixed lists or settings, never from requests.

use std::fmt::Write;
use std::time::Duration;

use super::Status;

impl Status {
    /// The metrics in text exposition format 0.0.4. `connections` is the number of open connections.
    pub fn metrics(&self, connections: usize) -> String {
        let now = self.clock.now();
        let identity = self.identity.borrow().clone();
        let counts = self.stats.counts();
        let uptime = self.clock.local().since(self.started_at);
        let mut out = String::new();
        let mut metric = |name: &str, help: &str, samples: &[(&str, f64)]| {
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            let _ = writeln!(out, "# HELP connect_sidecar_{name} {help}\n# TYPE connect_sidecar_{name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "connect_sidecar_{name}{labels} {value}");
            }
        };
        let version = concat!("{version=\"", env!("CARGO_PKG_VERSION"), "\"}");
        metric("build_info", "The running version.", &[(version, 1.0)]);
        metric("uptime_seconds", "Time since the process started.", &[("", uptime.as_secs_f64())]);
        let results = [
            ("{result=\"hit\"}", counts.hits as f64),
            ("{result=\"miss\"}", counts.misses as f64),
            ("{result=\"collapsed\"}", counts.collapsed as f64),
        ];
        metric("token_requests_total", "Token requests by cache result.", &results);
        for (name, help, value) in [
            ("requests_saved_total", "Upstream requests that hits and joined requests saved.", counts.requests_saved()),
            ("cache_entries", "Cached tokens.", self.cache.tokens().len() as u64),
            ("upstream_requests_total", "Requests sent upstream.", counts.upstream_requests),
            (
                "upstream_errors_total",
                "Upstream responses with status 5xx and failed upstream connections.",
                counts.upstream_errors,
            ),
            ("refused_total", "Requests answered with an error of the sidecar's own.", counts.refused),
            ("failed_total", "Requests answered with an error, whether upstream's or the sidecar's.", counts.failed),
            ("connections", "Open client connections.", connections as u64),
            ("event_listeners", "Open event streams.", self.events.subscribers() as u64),
            ("unknown_peers_total", "Accepted connections whose user could not be determined.", counts.unknown_peers),
            ("oidc_rotations_total", "OIDC tokens that replaced another.", counts.rotations),
            ("ready", "1 while a valid credential is loaded.", u64::from(identity.credential(now).is_ok())),
        ] {
            metric(name, help, &[("", value as f64)]);
        }
        if let Some(token) = identity.oidc() {
            let seconds = token.expires_at.as_seconds() as f64;
            metric("oidc_expires_at_seconds", "Expiry of the OIDC token, in Unix time.", &[("", seconds)]);
        }
        let labels: Vec<_> = self.steps.counts().map(|(step, count)| (label(step), count as f64)).collect();
        let samples: Vec<_> = labels.iter().map(|(label, count)| (label.as_str(), *count)).collect();
        metric("warnings_total", "Expiry warnings given by this process, by time before the expiry.", &samples);
        let offset = self.clock.offset_ms() as f64 / 1000.0;
        metric("clock_offset_seconds", "Upstream's clock minus this machine's, if corrected.", &[("", offset)]);
        out
    }
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
