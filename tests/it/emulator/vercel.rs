//! The real Vercel CLI against the emulator.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use connect_sidecar::emulator::Emulator;
use tempfile::TempDir;

use super::{OWNER, emulator};
use crate::support::npm;
use crate::support::process::{Ended, run};

/// A directory that is linked to the project `web`.
fn linked() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join(".vercel")).expect("a directory");
    let project = r#"{"projectId":"prj_web","orgId":"team_acme"}"#;
    std::fs::write(dir.path().join(".vercel/project.json"), project).expect("written");
    dir
}

async fn vercel(emulator: &Emulator, cli: &Path, session: &str, dir: &Path, args: &str) -> Ended {
    let args: Vec<_> = args.split(' ').collect();
    run(npm::vercel(cli, &emulator.url(), session, dir, &args)).await
}

/// Runs commands in order and checks each exit code and output.
async fn each(emulator: &Emulator, session: &str, commands: &[(&str, i32, &str)]) {
    let Some(cli) = npm::vercel_cli().await else { return };
    let dir = linked();
    for (args, code, shows) in commands {
        let ended = vercel(emulator, &cli, session, dir.path(), args).await;
        let all = format!("{}{}", ended.stdout, ended.stderr);
        assert!(ended.code == Some(*code) && all.contains(shows), "vercel {args}: not {shows:?}\n{all}");
    }
    let unknown: Vec<_> =
        emulator.received().into_iter().filter(|r| r.answered.is_none_or(|s| s.is_server_error())).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[tokio::test]
async fn a_connector_is_created_attached_detached_and_deleted() {
    let emulator = emulator("").await;
    each(
        &emulator,
        OWNER,
        &[
            ("connect create mcp.linear.app --name lin", 0, "mcp.linear.app connector created"),
            ("connect list", 0, "mcp.linear.app/lin"),
            ("connect detach mcp.linear.app/lin --yes", 0, "Detached connector mcp.linear.app/lin from web"),
            ("connect attach mcp.linear.app/lin -e preview --yes", 0, "for environments: preview"),
            ("connect open mcp.linear.app/lin", 0, "https://vercel.com/acme/~/connect/scl_"),
            ("connect remove mcp.linear.app/lin --yes --disconnect-all", 0, "successfully removed"),
        ],
    )
    .await;
    assert!(emulator.read(|world| world.connector("mcp.linear.app/lin").is_none()));
}

#[tokio::test]
async fn tokens_are_issued_and_revoked() {
    let emulator = emulator("").await;
    each(
        &emulator,
        OWNER,
        &[
            ("connect list --all-projects --json", 0, "\"uid\": \"oauth/linear\""),
            ("connect token slack/acme-slack --subject app --json", 0, "\"token\": \"xoxe.xoxb-"),
            ("connect token slack/acme-slack", 0, "xoxe.xoxp-"),
            ("connect revoke-tokens slack/acme-slack --my-tokens --yes", 0, "(1 token deleted)"),
            ("connect token slack/acme-slack", 1, "The user has not authorized the connector."),
            ("connect revoke-tokens slack/acme-slack --all-tokens --yes", 0, "(3 tokens deleted)"),
            ("connect token slack/none", 1, "Connector not found"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_role_without_the_permission_is_refused() {
    let emulator = emulator("").await;
    each(
        &emulator,
        "vca_developer",
        &[
            ("connect token slack/acme-slack --subject user", 0, "xoxe.xoxp-"),
            ("connect attach oauth/linear -e preview --yes", 1, "Owner or Member role required"),
            ("connect detach slack/acme-slack --yes", 1, "Owner or Member role required"),
            ("connect revoke-tokens slack/acme-slack --all-tokens --yes", 1, "You don't have permission to revoke"),
        ],
    )
    .await;
}

#[tokio::test]
async fn env_pull_includes_an_oidc_token() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let emulator = emulator("").await;
    let dir = linked();
    let pulled = vercel(&emulator, &cli, OWNER, dir.path(), "env pull --yes").await;
    assert_eq!(pulled.code, Some(0), "{pulled:?}");
    let file = std::fs::read_to_string(dir.path().join(".env.local")).expect("an env file");
    assert!(file.contains("MOTD=\"hello\"\n") && file.contains("\nVERCEL_OIDC_TOKEN=\"eyJ"), "{file}");
    let printed = vercel(&emulator, &cli, OWNER, dir.path(), "project token").await;
    let ask = super::request(&emulator, printed.stdout.trim(), "POST", super::SLACK).json("{}");
    assert_eq!(ask.send().await.status, 200, "{printed:?}");
}

#[tokio::test]
async fn the_cli_gets_its_token_after_an_installation_in_a_browser() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let emulator = emulator("[[connectors]]\nuid = \"github/app\"").await;
    let dir = linked();
    // A replacement for the program that opens a browser, which approves the page.
    let browser = dir.path().join("xdg-open");
    let consents = format!("{}/_emulator/consents", emulator.url());
    let says_yes = format!("#!/bin/sh\nexec curl -sS --data \"{{\\\"url\\\":\\\"$1\\\"}}\" {consents}\n");
    std::fs::write(&browser, says_yes).expect("written");
    std::fs::set_permissions(&browser, std::fs::Permissions::from_mode(0o700)).expect("a mode");
    let args = ["connect", "token", "github/app", "--subject", "app", "--yes"];
    let mut command = npm::vercel(&cli, &emulator.url(), OWNER, dir.path(), &args);
    let path = std::env::var("PATH").expect("a path");
    command.env("PATH", format!("{}:{path}", dir.path().display()));
    let ended = run(command).await;
    assert!(ended.code == Some(0) && ended.stdout.starts_with("ghs_"), "{ended:?}");
    assert!(emulator.count("/v1/connect/result/") > 0);
}
