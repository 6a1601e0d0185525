//! `GET /metrics`: it is understood by Prometheus' own tools, and has no labels from requests.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::http::APP;
use crate::support::{Scene, Stage, python, soon};

/// Prints each series as parsed by the official client library.
const PARSER: &str = "
import sys
from prometheus_client.parser import text_string_to_metric_families as families
for family in families(sys.stdin.read()):
    assert family.documentation, family.name
    for sample in family.samples:
        print(family.type, sample.name, sorted(sample.labels.items()), sample.value)
";

impl Stage {
    async fn metrics_text(&self) -> String {
        self.request("GET", "/metrics").send().await.text()
    }
}

async fn run_with_input(mut command: Command, text: &str) -> (bool, String) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().expect("a process");
    child.stdin.take().expect("stdin").write_all(text.as_bytes()).await.expect("written");
    let output = soon("its end", child.wait_with_output()).await.expect("output");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(printed).expect("text"))
}

/// A stage on which every metric has a value.
async fn busy_stage() -> Stage {
    let stage =
        Scene::new().toml("warn_before = [\"60m\", \"90s\"]").token_life(Duration::from_secs(3600)).start().await;
    stage.token(APP).send().await.token();
    stage.token(APP).send().await.token();
    stage.logs.wait_for("expires in 1 h").await;
    stage
}

#[tokio::test]
async fn the_official_parser_reads_every_line() {
    let Some(python) = python::prometheus_client().await else { return };
    let text = busy_stage().await.metrics_text().await;
    let mut command = Command::new(python);
    command.args(["-c", PARSER]);
    let (is_ok, parsed) = run_with_input(command, &text).await;
    assert!(is_ok, "{parsed}");
    let lines: Vec<_> = parsed.lines().collect();
    assert_eq!(lines.len(), text.lines().filter(|line| !line.starts_with('#')).count(), "{parsed}");
    for line in [
        "counter connect_sidecar_warnings_total [('step', '60m')] 1",
        "counter connect_sidecar_warnings_total [('step', '90s')] 0",
        "counter connect_sidecar_warnings_total [('step', 'expired')] 0",
        "counter connect_sidecar_token_requests_total [('result', 'hit')] 1",
        "gauge connect_sidecar_oidc_expires_at_seconds [] 1900003600",
    ] {
        assert!(lines.contains(&line), "{line}: {parsed}");
    }
}

#[tokio::test]
async fn promtool_reports_no_problems() {
    let text = busy_stage().await.metrics_text().await;
    if std::env::var_os("PATH")
        .is_none_or(|path| std::env::split_paths(&path).all(|dir| !dir.join("promtool").exists()))
    {
        return;
    }
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]);
    assert_eq!(run_with_input(command, &text).await, (true, String::new()), "{text}");
}

#[tokio::test]
async fn connector_names_create_no_series() {
    let stage = busy_stage().await;
    let series = |text: &str| -> BTreeSet<String> {
        text.lines().map(|line| line.rsplit_once(' ').expect("a value").0.to_owned()).collect()
    };
    let only_samples = |text: &str| {
        text.lines().filter(|line| !line.starts_with('#')).fold(String::new(), |all, line| all + line + "\n")
    };
    let before = series(&only_samples(&stage.metrics_text().await));
    let mut runner = TestRunner::deterministic();
    for _ in 0..64 {
        let name = "[ -~\\n\\PC]{1,40}".new_tree(&mut runner).expect("a name").current();
        let segment = utf8_percent_encode(&name, NON_ALPHANUMERIC);
        stage.request("POST", &format!("/v1/connect/token/{segment}")).json(APP).send().await;
    }
    assert_eq!(series(&only_samples(&stage.metrics_text().await)), before);
}
