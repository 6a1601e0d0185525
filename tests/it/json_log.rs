//! The log for machines: what a busy sidecar writes is one JSON object a line, with fields of the table alone.

use std::collections::BTreeSet;
use std::time::Duration;

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::os::logging::FIELDS;
use serde_json::Value;

use crate::support::http::{APP, Request};
use crate::support::tunnel::slack;
use crate::support::workspace::Workspace;
use crate::support::{SLACK, body};

#[tokio::test]
async fn every_line_is_an_object_with_fields_of_the_table_alone() {
    let workspace = Workspace::new().await;
    let mut sidecar = workspace.serve(&["--log-format=json", "-vv"]).await;
    let request = |method: &str, target: &str| Request::new(sidecar.addr, method, target);
    let token = |body: &str| request("POST", SLACK).json(body);
    for asked in [
        token(APP),
        token(APP),
        token(APP).header("cache-control", "no-cache"),
        token("["),
        token(&body("mine")).header("authorization", "Bearer mine"),
        request("POST", "/v1/connect/token/salesforce%2Fcrm").json(APP),
        request("POST", "/v1/connect/token/%00%1b%5B31m%22").json(APP),
        request("GET", "/v1/connect/connectors/slack%2Facme-slack"),
        request("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens"),
        request("GET", "/nowhere\"\\"),
        request("GET", "/healthz").header("host", "evil.example"),
    ] {
        asked.send().await;
    }
    for fault in [Fault::status(500, "internal"), Fault::once(FaultKind::Reset), Fault::rate_limited(Some("1"))] {
        workspace.emulator.inject(fault);
        token(&body("faulty")).send().await;
    }
    let mut opened = workspace.begin_run(&sidecar).await.open("api.vercel.com").await;
    opened.send(slack(&opened)).await;
    workspace.pull(Duration::from_secs(9 * 60 + 30));
    sidecar.wait_for_log("expires in 9 min, run").await;
    let log = sidecar.stop().await.stderr;

    let mut used = BTreeSet::new();
    for line in log.lines() {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let fields: Vec<_> = value.as_object().expect("an object").keys().cloned().collect();
        for always in &FIELDS[..3] {
            assert!(value[always.0].is_string(), "{line}");
        }
        used.extend(fields);
    }
    let table: BTreeSet<_> = FIELDS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let strange: Vec<_> = used.difference(&table).collect();
    assert!(strange.is_empty(), "{strange:?}: {log}");
    // What takes a wrong clock, a flood or another host is not in it.
    let unused: Vec<_> = table.difference(&used).map(String::as_str).collect();
    assert_eq!(unused, ["hidden", "host", "offset_ms"], "{log}");
}
