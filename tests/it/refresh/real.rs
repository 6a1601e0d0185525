//! The real Vercel CLI, signed in to the emulator by its login file.

use std::fs;
use std::os::unix::fs::symlink;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use tempfile::TempDir;

use super::{HOUR, MINUTE};
use crate::support::npm;
use crate::support::{Scene, Stage};

/// A sidecar that uses the CLI, and the home directory with its login.
async fn stage(settings: &str) -> Option<(Stage, TempDir)> {
    let cli = npm::vercel_cli().await?;
    let home = tempfile::tempdir().expect("a directory");
    let login = home.path().join("data/com.vercel.cli");
    fs::create_dir_all(&login).expect("a directory");
    fs::create_dir(home.path().join("bin")).expect("a directory");
    // Like `npm install --global`.
    symlink(cli.canonicalize().expect("the CLI"), home.path().join("bin/vercel")).expect("a link");
    let path = format!("{}:{}", home.path().join("bin").display(), std::env::var("PATH").expect("a PATH"));
    let scene = Scene::new().toml(settings).env("PATH", &path).env("HOME", home.path().to_str().expect("text"));
    let stage = scene.env("XDG_DATA_HOME", home.path().join("data").to_str().expect("text")).start().await;
    let api = serde_json::json!({"api": stage.emulator.url()});
    fs::write(login.join("config.json"), api.to_string()).expect("written");
    Some((stage, home))
}

fn sign_in(home: &TempDir) {
    let login = home.path().join("data/com.vercel.cli/auth.json");
    fs::write(login, r#"{"token":"vca_demo_session"}"#).expect("written");
}

#[tokio::test]
async fn the_token_is_refreshed_in_time_with_the_login_of_the_cli() {
    let Some((stage, home)) = stage("refresh = \"cli\"").await else { return };
    sign_in(&home);
    stage.slack_token().await;
    stage.pass(DEVELOPMENT_LIFE - 10 * MINUTE);
    stage.logs.wait_for("token refreshed, expires in 12 h").await;
    assert_eq!(stage.emulator.count("/projects/prj_web/token"), 1);
    let request = stage.emulator.received().into_iter().find(|r| r.target.starts_with("/projects/")).expect("request");
    assert_eq!(request.headers["authorization"], "Bearer vca_demo_session");
    stage.pass(HOUR);
    assert_eq!(stage.token("{}").send().await.status, 200, "the token in the file has ended");
}

#[tokio::test]
async fn a_missing_login_is_reported_in_the_words_of_the_cli() {
    let Some((stage, home)) = stage("").await else { return };
    let reply = stage.refresh().send().await;
    reply.assert_refused(502, "refresh_failed", "no login");
    assert!(reply.text().contains("No existing credentials found"), "{}", reply.text());
    assert_eq!(reply.json()["error"]["hint"], "vercel login");
    sign_in(&home);
    stage.pass(MINUTE);
    let reply = stage.refresh().send().await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["expires_in_seconds"], DEVELOPMENT_LIFE.as_secs());
}
