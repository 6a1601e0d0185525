//! Expiry warnings in the log, on a terminal, on the desktop, in events, status, metrics and responses. Each is given
//! once per token and step, by all sidecars of the project together and over restarts (docs/configuration.md section
//! 3).

mod header;
#[cfg(all(target_os = "linux", feature = "desktop"))]
mod notices;
mod restarts;
mod terminal;

use std::time::Duration;

use crate::support::{Scene, soon};

const MINUTE: Duration = Duration::from_secs(60);

/// A lifetime that is shown as this number of minutes for the next half minute.
fn about(minutes: u32) -> Duration {
    MINUTE * minutes + MINUTE / 2
}

/// Start of a log line about the token's expiry.
const OF_THE_TOKEN: &str = "the OIDC token of acme/web ";

#[tokio::test]
async fn log_events_status_and_metrics_agree() {
    let stage = Scene::new().token_life(61 * MINUTE).start().await;
    let mut events = stage.request("GET", "/_sidecar/v1/events").header("sidecar-key", &stage.key()).begin().await;
    events.until("\n\n").await;
    for (minutes, step, code, what) in [
        (1, "60m", "oidc_token_expiring", "expires in 1 h"),
        (45, "15m", "oidc_token_expiring", "expires in 15 min"),
        (10, "5m", "oidc_token_expiring", "expires in 5 min"),
        (5, "expired", "oidc_token_expired", "expired 0 s ago"),
    ] {
        stage.pass(minutes * MINUTE);
        stage.logs.wait_for(&format!("{OF_THE_TOKEN}{what}, run `vercel env pull` code=\"{code}\"")).await;
        let line = events.until("\"project\":\"acme/web\"}\n").await;
        let event = line.lines().last().expect("a line");
        let event: serde_json::Value =
            serde_json::from_str(&event[event.find('{').expect("an object")..]).expect("an event");
        let listed = &stage.status().await["warnings"];
        assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
        let sentence = format!("The OIDC token of acme/web {what}.");
        for warning in [&event, &listed[0]] {
            assert_eq!((&warning["code"], &warning["message"]), (&code.into(), &sentence.clone().into()), "{warning}");
            assert_eq!(warning["hint"], "vercel env pull");
        }
        assert_eq!(event["event"], "warning");
        let metrics = soon("metrics", stage.request("GET", "/metrics").send()).await.text();
        assert!(metrics.contains(&format!("connect_sidecar_warnings_total{{step=\"{step}\"}} 1\n")), "{metrics}");
    }
    assert_eq!(stage.logs.count(OF_THE_TOKEN), 4);
}
