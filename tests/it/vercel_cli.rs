//! The real Vercel CLI under `run`. It knows of the sidecar and the emulator only by the variables that every command
//! gets.

use std::fs;

use tokio::process::Command;

use crate::support::SLACK;
use crate::support::npm;
use crate::support::process::run;
use crate::support::workspace::Workspace;

/// `run -- vercel ARGUMENTS`, with the token of the demo's session.
fn vercel(workspace: &Workspace, cli: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = workspace.sidecar(&["run", "--", cli.to_str().expect("a path")]);
    command.args(["--token", "vca_demo_session"]).args(arguments).process_group(0);
    command.env("VERCEL_TELEMETRY_DISABLED", "1").env("NO_UPDATE_NOTIFIER", "1");
    command
}

#[tokio::test]
async fn tokens_come_from_the_cache_and_other_requests_use_its_own_session() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let workspace = Workspace::new().await;
    fs::create_dir(workspace.project().join(".vercel")).expect("a directory");
    let project = r#"{"projectId":"prj_web","orgId":"team_acme"}"#;
    fs::write(workspace.project().join(".vercel/project.json"), project).expect("written");
    let _serving = workspace.serve(&[]).await;
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let ended = run(vercel(&workspace, &cli, &["connect", "token", "slack/acme-slack", "--subject", "app"])).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        tokens.push(ended.stdout.trim().to_owned());
    }
    assert!(tokens[0].starts_with("xoxe.xoxb-") && tokens[0] == tokens[1], "{tokens:?}");
    assert_eq!(workspace.emulator.count(SLACK), 1, "the second comes from the cache");
    for request in workspace.emulator.received().iter().filter(|request| request.headers.contains_key("authorization"))
    {
        let token = if request.target == SLACK { &workspace.token } else { "vca_demo_session" };
        assert_eq!(request.headers["authorization"], format!("Bearer {token}"), "{}", request.target);
    }
    assert!(workspace.emulator.count("/v2/user") > 0, "it has queried its user");
}
