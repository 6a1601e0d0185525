//! The checks of the running sidecar and its port.

use std::fs;
use std::time::Duration;

use connect_sidecar::emulator::fault::Fault;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use tokio::net::TcpListener;
use tokio::process::Command;

use super::{check_up, doctor, healthy};
use crate::support::process::Stopped;
use crate::support::workspace::Workspace;
use crate::support::write_private;

fn at_port(workspace: &Workspace, port: u16) -> Command {
    let mut command = doctor(workspace);
    command.env("CONNECT_SIDECAR_PORT", port.to_string());
    command
}

#[tokio::test]
async fn a_taken_port_is_reported_with_its_owner() {
    let workspace = healthy().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let checkup = check_up(&workspace, at_port(&workspace, port)).await;
    let title = checkup.found("problem", "port_taken")["title"].as_str().expect("text");
    assert!(title.contains(&format!("(process {})", std::process::id())), "{title}");
    // The doctor does not keep the port.
    drop(listener);
    check_up(&workspace, at_port(&workspace, port)).await.found("note", "not_running");
}

#[tokio::test]
async fn a_sidecar_of_another_project_is_recognized() {
    let workspace = healthy().await;
    let api = workspace.home.path().join("api");
    fs::create_dir(&api).expect("a directory");
    let serving = workspace.serve(&["--project", "../api"]).await;
    let checkup = check_up(&workspace, at_port(&workspace, serving.addr.port())).await;
    let title = checkup.found("problem", "port_taken")["title"].as_str().expect("text");
    let api = api.canonicalize().expect("a directory");
    assert!(title.contains("another connect-sidecar") && title.contains(&api.display().to_string()), "{title}");
}

#[tokio::test]
async fn an_expired_token_in_the_file_is_a_warning_while_the_sidecar_has_a_valid_one() {
    let workspace = healthy().await;
    let serving = workspace.serve(&[]).await;
    // The sidecar does not replace its token by an older one.
    let old = workspace.emulator.env_file(DEVELOPMENT_LIFE + Duration::from_secs(60), Duration::ZERO);
    write_private(&workspace.project().join(".env.local"), &old);
    let checkup = check_up(&workspace, doctor(&workspace)).await;
    checkup.found("warning", "oidc_token_expired");
    checkup.found("note", "other_token");
    drop(serving.stop().await);
    check_up(&workspace, doctor(&workspace)).await.found("problem", "oidc_token_expired");
}

#[tokio::test]
async fn warnings_of_the_sidecar_are_reported_once() {
    let workspace = healthy().await;
    let file = workspace.project().join(".env.local");
    let content = fs::read_to_string(&file).expect("a file");
    write_private(&file, &format!("{content}{content}"));
    let _serving = workspace.serve(&[]).await;
    let checkup = check_up(&workspace, doctor(&workspace)).await;
    assert_eq!(checkup.bad(), ["duplicate_assignments"], "{checkup:#?}");
    // A warning that only the sidecar has, since the doctor checks another file.
    write_private(&workspace.project().join(".env.other"), &content);
    let mut command = doctor(&workspace);
    command.env("CONNECT_SIDECAR_ENV_FILE", ".env.other");
    let checkup = check_up(&workspace, command).await;
    assert_eq!(checkup.found("warning", "duplicate_assignments")["detail"], "The running sidecar reports this.");
}

#[tokio::test]
async fn checks_use_the_running_sidecars_upstream_and_settings() {
    let workspace = healthy().await;
    let below = workspace.project().join("apps/web");
    fs::create_dir_all(&below).expect("a directory");
    let file = workspace.project().join("mine.env");
    fs::rename(workspace.project().join(".env.local"), &file).expect("renamed");
    fs::write(workspace.project().join(".gitignore"), "*.env\n.vercel\n").expect("a file");
    let _serving = workspace.serve(&["--env-file", "mine.env"]).await;
    for dir in [workspace.project(), below] {
        let unnamed = || {
            let mut command = doctor(&workspace);
            command.env_remove("CONNECT_SIDECAR_UPSTREAM").current_dir(&dir);
            command
        };
        let well = check_up(&workspace, unnamed()).await;
        assert_eq!(well.bad(), [""; 0], "{well:#?}");
        well.found("ok", "credential");
        workspace.emulator.inject(Fault::status(503, "unavailable"));
        let title = check_up(&workspace, unnamed()).await.found("problem", "upstream_failing")["title"].to_string();
        assert!(title.contains(&workspace.emulator.url().replace("http://", "")), "{title}");
    }
}

#[tokio::test]
async fn an_explicit_upstream_that_differs_is_reported_and_checked() {
    let workspace = healthy().await;
    let _serving = workspace.serve(&[]).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let closed = format!("http://{closed}");
    let checkup = check_up(&workspace, workspace.sidecar(&["doctor", "--json", "--upstream", &closed])).await;
    let title = checkup.found("warning", "other_setting")["title"].as_str().expect("text");
    let expected = format!("--upstream says {closed}, the sidecar that runs has {}", workspace.emulator.url());
    assert_eq!(title, expected);
    checkup.found("problem", "upstream_unreachable");
}

#[tokio::test]
async fn an_unresponsive_sidecar_is_a_problem_with_the_command_that_continues_it() {
    let workspace = healthy().await;
    let serving = workspace.serve(&[]).await;
    let stopped = Stopped::process(serving.pid()).await;
    let checkup = check_up(&workspace, at_port(&workspace, serving.addr.port())).await;
    let found = checkup.found("problem", "instance_silent");
    assert_eq!(found["fix"], format!("kill -CONT {}", serving.pid()));
    assert!(found["title"].as_str().is_some_and(|title| title.contains("does not answer")), "{found}");
    assert_eq!(checkup.bad(), ["instance_silent"], "{checkup:#?}");
    drop(stopped);
    check_up(&workspace, doctor(&workspace)).await.found("ok", "instance");
}
