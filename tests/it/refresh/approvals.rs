//! Which projects are refreshed automatically: not those that only files name.

use std::fs;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::events::Event;

use super::{FakeCli, HOUR, MINUTE, SECOND, automatic, be_accepted, unapproved};
use crate::support::Stage;
use crate::support::process::Serving;
use crate::support::workspace::Workspace;
use crate::support::{env_file, soon, write_private};

const HELD: &str = "the OIDC token is not refreshed by itself: no request for prj_web of team_acme was accepted yet";

fn link(stage: &Stage, project_id: &str) {
    let link = serde_json::json!({"projectId": project_id, "orgId": "team_acme"}).to_string();
    fs::create_dir_all(stage.project.join(".vercel")).expect("a directory");
    fs::write(stage.project.join(".vercel/project.json"), link).expect("written");
}

#[tokio::test]
async fn a_project_that_only_files_name_is_not_refreshed_and_the_warning_says_how_to_confirm_it() {
    let cli = FakeCli::printing();
    let stage = unapproved(&cli).await;
    link(&stage, "prj_web");
    stage.pass(DEVELOPMENT_LIFE - 14 * MINUTE);
    stage.logs.wait_for(HELD).await;
    stage.caught_up().await;
    let status = stage.status().await;
    assert_eq!(
        (&status["refresh"]["state"], &status["refresh"]["next_at"]),
        (&"held".into(), &serde_json::Value::Null)
    );
    let listed = status["warnings"].as_array().expect("a list");
    let codes: Vec<_> = listed.iter().map(|warning| warning["code"].as_str().unwrap_or_default()).collect();
    assert_eq!(codes, ["oidc_token_expiring", "refresh_held"], "the expiry warning is not suppressed: {status:#}");
    assert_eq!(listed[1]["hint"], "connect-sidecar refresh");
    stage.pass(HOUR);
    stage.caught_up().await;
    assert_eq!((cli.runs(), stage.logs.count(HELD)), (0, 1), "it is said once");
    let (told, _) = stage.server.proxy().events.subscribe();
    let is_told = |event: &Event| matches!(event, Event::Warning(told) if told.code == "refresh_held");
    assert_eq!(told.iter().filter(|event| is_told(event)).count(), 1);
}

#[tokio::test]
async fn a_request_that_upstream_accepts_approves_and_a_refused_one_does_not() {
    let cli = FakeCli::printing();
    let mut stage = unapproved(&cli).await;
    stage.pass(DEVELOPMENT_LIFE - 14 * MINUTE);
    stage.logs.wait_for(HELD).await;
    let fault = connect_sidecar::emulator::fault::Fault::status;
    for (status, code) in [(401, "unauthorized"), (403, "forbidden"), (429, "rate_limited"), (500, "internal")] {
        stage.emulator.inject(fault(status, code));
        let body = crate::support::body(code);
        assert_eq!(stage.token(&body).send().await.status, status, "{code}");
        stage.caught_up().await;
    }
    assert_eq!(cli.runs(), 0);
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    cli.prints_token(&fresh);
    stage.slack_token().await;
    stage.uses(&fresh).await;
    assert_eq!(cli.runs(), 1);
    let warning_is_gone = async { while stage.status().await["warnings"] != serde_json::json!([]) {} };
    soon("the end of the warning", warning_is_gone).await;
}

#[tokio::test]
async fn a_forged_token_does_not_refresh_its_project() {
    let cli = FakeCli::printing();
    let mut stage = automatic(&cli).await;
    let forged = stage.token_of(|subject| (subject.project, subject.project_id) = ("bank".into(), "prj_bank".into()));
    let (signed, _) = forged.rsplit_once('.').expect("a signature");
    let forged = format!("{signed}.Zm9yZ2Vk");
    stage.write_env(&forged);
    stage.uses(&forged).await;
    assert_eq!(stage.token(&crate::support::body("x")).send().await.status, 403);
    stage.pass(DEVELOPMENT_LIFE - 10 * MINUTE);
    stage.logs.wait_for("no request for prj_bank of team_acme was accepted yet").await;
    stage.caught_up().await;
    assert_eq!(cli.runs(), 0);
}

#[tokio::test]
async fn a_linked_project_that_a_person_has_refreshed_is_refreshed_automatically() {
    for (linked, is_automatic) in [(Some("prj_web"), true), (Some("prj_other"), false), (None, false)] {
        let cli = FakeCli::printing();
        let mut stage = unapproved(&cli).await;
        if let Some(project_id) = linked {
            link(&stage, project_id);
        }
        stage.pass(MINUTE);
        let first = stage.fresh_token(DEVELOPMENT_LIFE);
        cli.prints_token(&first);
        assert_eq!(stage.refresh().send().await.status, 200);
        stage.uses(&first).await;
        stage.pass(SECOND);
        let second = stage.fresh_token(2 * DEVELOPMENT_LIFE);
        cli.prints_token(&second);
        stage.pass(DEVELOPMENT_LIFE - 14 * MINUTE);
        if is_automatic {
            stage.uses(&second).await;
        } else {
            stage.logs.wait_for(HELD).await;
        }
        assert_eq!(cli.runs(), if is_automatic { 2 } else { 1 }, "{linked:?}");
    }
}

#[tokio::test]
async fn approvals_survive_a_restart() {
    let cli = FakeCli::printing();
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&["--refresh", "cli"]).await;
    be_accepted(&serving).await;
    let file = workspace.home.path().join(".local/state/connect-sidecar/refreshable.json");
    let is_written = async {
        while !file.exists() {
            tokio::task::yield_now().await;
        }
    };
    soon("the file", is_written).await;
    serving.stop().await;
    write_private(&workspace.project().join(".env.local"), &env_file(&workspace.emulator.oidc_token(MINUTE)));
    cli.prints_token(&workspace.emulator.oidc_token(HOUR));
    let mut command = workspace.sidecar(&["--refresh", "cli"]);
    command.env("PATH", cli.path());
    let mut serving = Serving::start(command).await;
    serving.wait_for_log("token refreshed, expires in ").await;
    assert_eq!(cli.runs(), 1);
}
