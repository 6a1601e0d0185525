//! The real Vercel CLI from npm against the emulator: the sidecar reads what the CLI writes.

use std::path::Path;

use crate::support::process::{Ended, run};
use crate::support::{Scene, Stage, npm};

/// Runs the CLI in the stage's project, signed in at the emulator.
async fn vercel(stage: &Stage, cli: &Path, args: &[&str]) -> Ended {
    let ended = run(npm::vercel(cli, &stage.emulator.url(), "vca_demo_session", &stage.project, args)).await;
    assert_eq!(ended.code, Some(0), "vercel {args:?}: {ended:?}");
    ended
}

#[tokio::test]
async fn token_written_by_the_vercel_cli_is_used_at_once() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let mut stage = Scene::new().without_env_file().start().await;
    let refused = stage.token("{}").send().await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "oidc_token_missing"));

    for args in [["link", "--yes", "--project", "web"].as_slice(), &["env", "pull"]] {
        vercel(&stage, &cli, args).await;
        let file = std::fs::read_to_string(stage.env_path()).expect("an env file");
        let token = file.split('"').nth(1).expect("a token").to_owned();
        assert!(file.starts_with("# Created by Vercel CLI\n") && token.starts_with("eyJ"), "{args:?}: {file}");
        stage.uses(&token).await;
        let body = format!(r#"{{"scopes":["{}"]}}"#, args[0]);
        assert_eq!(stage.token(&body).send().await.status, 200);
        let bearer = stage.emulator.received().last().expect("a request").headers["authorization"].clone();
        assert_eq!(bearer, format!("Bearer {token}"));
    }
    assert_eq!(stage.logs.count("token refreshed"), 1);
}

#[tokio::test]
async fn vercel_project_token_prints_a_token_of_the_same_principal() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let mut stage = Scene::new().start().await;
    let ended = vercel(&stage, &cli, &["project", "token", "prj_web", "--format=json", "--scope", "team_acme"]).await;
    let printed: serde_json::Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let token = printed["token"].as_str().expect("a token").to_owned();
    let before = stage.slack_token().await;
    stage.write_env(&token);
    stage.uses(&token).await;
    assert_eq!(stage.slack_token().await, before, "the cache stays warm");
}
