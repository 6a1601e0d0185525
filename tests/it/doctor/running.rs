//! The checks of the running sidecar and its port.

use std::fs;
use std::time::Duration;

use connect_sidecar::emulator::fault::Fault;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use tokio::net::TcpListener;
use tokio::process::Command;

use super::{check_up, doctor, healthy};
use crate::support::desk::Desk;
use crate::support::process::Stopped;
use crate::support::write_private;

fn at_port(desk: &Desk, port: u16) -> Command {
    let mut command = doctor(desk);
    command.env("CONNECT_SIDECAR_PORT", port.to_string());
    command
}

#[tokio::test]
async fn a_taken_port_is_reported_with_its_owner() {
    let desk = healthy().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let checkup = check_up(&desk, at_port(&desk, port)).await;
    let title = checkup.found("problem", "port_taken")["title"].as_str().expect("text");
    assert!(title.contains(&format!("(process {})", std::process::id())), "{title}");
    // The doctor does not keep the port.
    drop(listener);
    check_up(&desk, at_port(&desk, port)).await.found("note", "not_running");
}

#[tokio::test]
async fn a_sidecar_of_another_project_is_recognized() {
    let desk = healthy().await;
    let api = desk.home.path().join("api");
    fs::create_dir(&api).expect("a directory");
    let serving = desk.serve(&["--project", "../api"]).await;
    let checkup = check_up(&desk, at_port(&desk, serving.addr.port())).await;
    let title = checkup.found("problem", "port_taken")["title"].as_str().expect("text");
    let api = api.canonicalize().expect("a directory");
    assert!(title.contains("another connect-sidecar") && title.contains(&api.display().to_string()), "{title}");
}

#[tokio::test]
async fn an_expired_token_in_the_file_is_a_warning_while_the_sidecar_has_a_valid_one() {
    let desk = healthy().await;
    let serving = desk.serve(&[]).await;
    // The sidecar does not replace its token by an older one.
    let old = desk.emulator.env_file(DEVELOPMENT_LIFE + Duration::from_secs(60), Duration::ZERO);
    write_private(&desk.project().join(".env.local"), &old);
    let checkup = check_up(&desk, doctor(&desk)).await;
    checkup.found("warning", "oidc_token_expired");
    checkup.found("note", "other_token");
    drop(serving.stop().await);
    check_up(&desk, doctor(&desk)).await.found("problem", "oidc_token_expired");
}

#[tokio::test]
async fn warnings_of_the_sidecar_are_reported_once() {
    let desk = healthy().await;
    let file = desk.project().join(".env.local");
    let content = fs::read_to_string(&file).expect("a file");
    write_private(&file, &format!("{content}{content}"));
    let _serving = desk.serve(&[]).await;
    let checkup = check_up(&desk, doctor(&desk)).await;
    assert_eq!(checkup.bad(), ["duplicate_assignments"], "{checkup:#?}");
    // A warning that only the sidecar has, since the doctor checks another file.
    write_private(&desk.project().join(".env.other"), &content);
    let mut command = doctor(&desk);
    command.env("CONNECT_SIDECAR_ENV_FILE", ".env.other");
    let checkup = check_up(&desk, command).await;
    assert_eq!(checkup.found("warning", "duplicate_assignments")["detail"], "The running sidecar reports this.");
}

#[tokio::test]
async fn checks_use_the_running_sidecars_upstream_and_settings() {
    let desk = healthy().await;
    let below = desk.project().join("apps/web");
    fs::create_dir_all(&below).expect("a directory");
    let file = desk.project().join("mine.env");
    fs::rename(desk.project().join(".env.local"), &file).expect("renamed");
    fs::write(desk.project().join(".gitignore"), "*.env\n.vercel\n").expect("a file");
    let _serving = desk.serve(&["--env-file", "mine.env"]).await;
    for dir in [desk.project(), below] {
        let unnamed = || {
            let mut command = doctor(&desk);
            command.env_remove("CONNECT_SIDECAR_UPSTREAM").current_dir(&dir);
            command
        };
        let well = check_up(&desk, unnamed()).await;
        assert_eq!(well.bad(), [""; 0], "{well:#?}");
        well.found("ok", "credential");
        desk.emulator.inject(Fault::status(503, "unavailable"));
        let title = check_up(&desk, unnamed()).await.found("problem", "upstream_failing")["title"].to_string();
        assert!(title.contains(&desk.emulator.url().replace("http://", "")), "{title}");
    }
}

#[tokio::test]
async fn an_explicit_upstream_that_differs_is_reported_and_checked() {
    let desk = healthy().await;
    let _serving = desk.serve(&[]).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let closed = format!("http://{closed}");
    let checkup = check_up(&desk, desk.sidecar(&["doctor", "--json", "--upstream", &closed])).await;
    let title = checkup.found("warning", "other_setting")["title"].as_str().expect("text");
    let expected = format!("--upstream says {closed}, the sidecar that runs has {}", desk.emulator.url());
    assert_eq!(title, expected);
    checkup.found("problem", "upstream_unreachable");
}

#[tokio::test]
async fn an_unresponsive_sidecar_is_a_problem_with_the_command_that_continues_it() {
    let desk = healthy().await;
    let serving = desk.serve(&[]).await;
    let stopped = Stopped::process(serving.pid()).await;
    let checkup = check_up(&desk, at_port(&desk, serving.addr.port())).await;
    let found = checkup.found("problem", "instance_silent");
    assert_eq!(found["fix"], format!("kill -CONT {}", serving.pid()));
    assert!(found["title"].as_str().is_some_and(|title| title.contains("does not answer")), "{found}");
    assert_eq!(checkup.bad(), ["instance_silent"], "{checkup:#?}");
    drop(stopped);
    check_up(&desk, doctor(&desk)).await.found("ok", "instance");
}
