//! When automatic refresh runs the CLI, and when it stops.

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::events::Event;
use serde_json::Value;

use super::{FakeCli, HOUR, MINUTE, automatic, on_request};
use crate::support::{Scene, fingerprint};

#[tokio::test]
async fn a_token_is_refreshed_15_minutes_before_it_expires_and_the_env_file_is_unchanged() {
    let cli = FakeCli::printing();
    let mut stage = automatic(&cli).await;
    let before = std::fs::read_to_string(stage.env_path()).expect("an env file");
    let provider_token = stage.slack_token().await;
    stage.pass(DEVELOPMENT_LIFE - 16 * MINUTE);
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    cli.prints_token(&fresh);
    stage.caught_up().await;
    let status = stage.status().await;
    assert_eq!((&status["refresh"]["mode"], &status["refresh"]["state"]), (&"cli".into(), &"idle".into()));
    assert_eq!(cli.runs(), 0, "it is not time yet");
    stage.pass(MINUTE);
    stage.uses(&fresh).await;
    stage.logs.wait_for("token refreshed, expires in 11 h 59 min").await;
    assert_eq!(std::fs::read_to_string(stage.env_path()).expect("an env file"), before);

    // Reads of the file, which still has the older token, change nothing and log nothing.
    stage.reloader.reload().await;
    assert_eq!(stage.status().await["oidc"]["fingerprint"], fingerprint(&fresh));
    assert_eq!((stage.logs.count("older token"), stage.logs.count("token refreshed")), (0, 1));
    assert_eq!(stage.slack_token().await.len(), provider_token.len(), "requests go on");
    let other = stage.token_of(|subject| (subject.project, subject.project_id) = ("shop".into(), "prj_shop".into()));
    stage.write_env(&other);
    stage.uses(&other).await;
    assert_eq!(cli.runs(), 1);
    let (told, _) = stage.server.proxy().events.subscribe();
    assert_eq!(told.iter().filter(|event| matches!(***event, Event::Rotation(_))).count(), 2);
}

#[tokio::test]
async fn after_a_sleep_it_runs_at_once_and_requests_of_apps_never_run_it() {
    let cli = FakeCli::printing();
    let mut stage = automatic(&cli).await;
    stage.pass(DEVELOPMENT_LIFE + 13 * HOUR);
    // The script has nothing to print yet.
    stage.logs.wait_for("could not refresh the OIDC token").await;
    for reply in stage.at_once(50, stage.token("{}")).await {
        reply.assert_refused(503, "oidc_token_expired", "at once");
    }
    assert_eq!(cli.runs(), 1);
    let fresh = stage.fresh_token(HOUR);
    cli.prints_token(&fresh);
    stage.pass(7 * MINUTE);
    stage.uses(&fresh).await;
    assert_eq!(cli.runs(), 2);
}

#[tokio::test]
async fn without_the_setting_nothing_runs() {
    let cli = FakeCli::printing();
    let stage = on_request(&cli).await;
    stage.pass(DEVELOPMENT_LIFE + HOUR);
    stage.logs.wait_for("expired").await;
    stage.caught_up().await;
    let status = stage.status().await;
    assert_eq!((&status["refresh"]["mode"], &status["refresh"]["next_at"]), (&"off".into(), &Value::Null));
    assert_eq!(cli.runs(), 0);
}

#[tokio::test]
async fn after_three_failures_it_stops_with_a_warning_until_the_token_changes_or_a_person_asks() {
    let cli = FakeCli::new("echo 'Error: no credentials, vca_SECRET' >&2; exit 1");
    let mut stage = automatic(&cli).await;
    stage.pass(DEVELOPMENT_LIFE - 15 * MINUTE);
    let failed = "could not refresh the OIDC token: the Vercel CLI ended with code 1: Error: no credentials, …";
    for (failures, minutes) in [(1, 7), (2, 13)] {
        stage.logs.wait_for_count(failed, failures).await;
        stage.caught_up().await;
        let status = stage.status().await;
        assert_eq!(status["refresh"]["state"], "waiting", "{status:#}");
        assert!(status["refresh"]["last_error"].as_str().is_some_and(|error| error.contains("code 1")), "{status:#}");
        stage.pass(4 * MINUTE);
        stage.caught_up().await;
        assert_eq!(cli.runs(), failures, "not so soon");
        stage.pass(minutes * MINUTE - 4 * MINUTE);
    }
    stage.logs.wait_for("gave up refreshing the OIDC token after 3 failures in a row: `vercel login` may help").await;
    stage.caught_up().await;
    let status = stage.status().await;
    assert_eq!(status["refresh"]["state"], "gave_up");
    let warned = status["warnings"].as_array().expect("a list").iter().find(|w| w["code"] == "refresh_gave_up");
    let warned = warned.unwrap_or_else(|| panic!("{status:#}")).clone();
    assert_eq!(warned["hint"], "connect-sidecar refresh");
    let (told, _) = stage.server.proxy().events.subscribe();
    let is_told = |event: &Event| matches!(event, Event::Warning(told) if told.code == warned["code"] && told.message == warned["message"]);
    assert_eq!(told.iter().filter(|event| is_told(event)).count(), 1);
    stage.pass(3 * HOUR);
    stage.caught_up().await;
    assert_eq!(cli.runs(), 3);

    stage.refresh().send().await.assert_refused(502, "refresh_failed", "a person asks");
    stage.pass(7 * MINUTE);
    stage.logs.wait_for_count(failed, 5).await;
    let expiring = stage.fresh_token(14 * MINUTE);
    let fresh = stage.fresh_token(HOUR);
    cli.set_script("cat DIR/answer");
    cli.prints_token(&fresh);
    stage.write_env(&expiring);
    stage.uses(&expiring).await;
    stage.pass(6 * MINUTE);
    stage.uses(&fresh).await;
    assert_eq!((cli.runs(), stage.logs.count("SECRET")), (6, 0));
}

#[tokio::test]
async fn expiry_warnings_are_given_only_if_automatic_refresh_fails_or_is_late() {
    let cli = FakeCli::new("exit 1");
    let stage = automatic(&cli).await;
    stage.pass(DEVELOPMENT_LIFE - 59 * MINUTE);
    stage.caught_up().await;
    assert_eq!(stage.status().await["warnings"], serde_json::json!([]), "it has time");
    stage.pass(44 * MINUTE);
    stage.logs.wait_for("could not refresh the OIDC token").await;
    stage.logs.wait_for("the OIDC token of acme/web expires in 15 min, run `vercel env pull`").await;
    assert_eq!(stage.status().await["warnings"][0]["code"], "oidc_token_expiring");
    assert_eq!(stage.logs.count("the OIDC token of acme/web expires"), 1);

    let cli = FakeCli::new("exec sleep 1000");
    let stage = automatic(&cli).await;
    stage.pass(DEVELOPMENT_LIFE - 6 * MINUTE);
    stage.caught_up().await;
    assert_eq!(stage.status().await["warnings"], serde_json::json!([]));
    stage.pass(MINUTE);
    stage.logs.wait_for("the OIDC token of acme/web expires in 5 min, run `vercel env pull`").await;
}

#[tokio::test]
async fn the_linked_project_counts_only_if_a_person_asks() {
    let cli = FakeCli::printing();
    let scene = Scene::new().without_env_file().toml("refresh = \"cli\"").env("PATH", &cli.path());
    let mut stage = scene.start().await;
    let fresh = stage.fresh_token(HOUR);
    cli.prints_token(&fresh);
    let reply = stage.refresh().send().await;
    assert!(reply.text().contains("no project is linked") && reply.text().contains("vercel link"), "{}", reply.text());
    std::fs::create_dir(stage.project.join(".vercel")).expect("a directory");
    let link = |id: &str| {
        let link = serde_json::json!({"projectId": id, "orgId": "team_acme"}).to_string();
        std::fs::write(stage.project.join(".vercel/project.json"), link).expect("written");
    };
    link("--cwd=/");
    assert!(stage.refresh().send().await.text().contains("no project is linked"));
    link("prj_web");
    stage.pass(HOUR / 2);
    stage.caught_up().await;
    assert_eq!(cli.runs(), 0);
    let other = stage.token_of(|subject| (subject.project, subject.project_id) = ("shop".into(), "prj_shop".into()));
    cli.prints_token(&other);
    let reply = stage.refresh().send().await;
    assert!(reply.text().contains("it is that of acme/shop"), "{}", reply.text());
    stage.pass(MINUTE);
    cli.prints_token(&fresh);
    let reply = stage.refresh().send().await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["project"], "acme/web");
    stage.uses(&fresh).await;
    // The file never had a token, so its absence does not drop this one.
    stage.reloader.reload().await;
    let next = stage.fresh_token(HOUR);
    cli.prints_token(&next);
    stage.pass(20 * MINUTE);
    stage.uses(&next).await;
}
