//! What a day of development costs: each request for a token that reaches Connect is billed.

use std::collections::BTreeSet;

use crate::preload::path_with;
use crate::support::npm;
use crate::support::process::Running;
use crate::support::workspace::Workspace;

const DEV_SERVER: &str = include_str!("dev_server.mjs");

#[tokio::test]
async fn ten_restarts_of_four_workers_with_three_connectors_cost_three_requests_and_not_120() {
    let Some(node) = npm::node(npm::NODES[3]).await else { return };
    let Some(sdk) = npm::connect_sdk("2.3.2").await else { return };
    let workspace = Workspace::new().await;
    std::os::unix::fs::symlink(sdk, workspace.project().join("node_modules")).expect("a link");
    std::fs::write(workspace.project().join("dev_server.mjs"), DEV_SERVER).expect("a file");
    let restarts = "for _ in 1 2 3 4 5 6 7 8 9 10; do node dev_server.mjs || exit; done";
    let mut command = workspace.sidecar(&["run", "--", "sh", "-c", restarts]);
    command.env("PATH", path_with(&node)).process_group(0);
    let mut running = Running::start(command);
    let mut tokens = BTreeSet::new();
    for _ in 0..120 {
        tokens.insert(running.line().await);
    }
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{ended:?}");
    assert_eq!(tokens.len(), 3, "{tokens:?}");
    assert_eq!(workspace.emulator.received().len(), 3, "all that reached Connect");
}
