//! Expiry of the OIDC token: warnings, rotation, what is still served, and wrong clocks (docs/http.md section 1,
//! docs/configuration.md section 3). Time stands still unless a test moves it.

use std::time::{Duration, UNIX_EPOCH};

use connect_sidecar::emulator::fault::{AnswerHold, Fault};
use connect_sidecar::emulator::oidc::{Issuer, Subject};
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::world::World;
use connect_sidecar::emulator::{Emulator, ReceivedRequest};
use tokio::task::JoinHandle;

use crate::support::http::Reply;
use crate::support::{Scene, Stage, fingerprint, soon};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// The log lines about the token's expiry, in order.
fn warnings(stage: &Stage) -> Vec<String> {
    stage.logs.lines().into_iter().filter(|line| line.contains("OIDC token of")).collect()
}

fn expires_in(left: &str) -> String {
    format!("the OIDC token of acme/web expires in {left}, run `vercel env pull`")
}

/// What upstream was asked with a credential.
fn requests(emulator: &Emulator) -> Vec<ReceivedRequest> {
    emulator.received().into_iter().filter(|request| request.method != "HEAD").collect()
}

/// The fingerprints of the tokens that upstream has received.
fn bearers(emulator: &Emulator) -> Vec<String> {
    let bearer = |request: &ReceivedRequest| {
        fingerprint(request.headers["authorization"].to_str().expect("text").trim_start_matches("Bearer "))
    };
    requests(emulator).iter().map(bearer).collect()
}

#[tokio::test]
async fn each_step_and_the_expiry_give_one_warning() {
    let stage = Scene::new().start().await;
    stage.pass(DEVELOPMENT_LIFE - 61 * MINUTE);
    for (minutes, line) in [
        (1, Some(expires_in("1 h"))),
        (1, None),
        (44, Some(expires_in("15 min"))),
        (5, None),
        (5, Some(expires_in("5 min"))),
        (4, None),
        (1, Some("the OIDC token of acme/web expired 0 s ago, run `vercel env pull`".into())),
        (600, None),
    ] {
        stage.pass(minutes * MINUTE);
        if let Some(line) = line {
            stage.logs.wait_for(&line).await;
        }
    }
    // A round trip, so that everything due has been logged.
    assert_eq!(stage.request("GET", "/healthz").send().await.status, 200);
    assert_eq!(warnings(&stage).len(), 4, "{:#?}", warnings(&stage));
    assert!(warnings(&stage)[..3].iter().all(|line| line.starts_with("WARN")));
    assert!(warnings(&stage)[3].starts_with("ERROR"));
}

#[tokio::test]
async fn after_a_sleep_there_is_one_warning_for_the_last_step_reached() {
    for (slept, line) in [
        (DEVELOPMENT_LIFE - 50 * MINUTE, expires_in("50 min")),
        (DEVELOPMENT_LIFE - 90 * SECOND, expires_in("1 min")),
        (DEVELOPMENT_LIFE + 13 * 60 * MINUTE, "expired 13 h ago".into()),
    ] {
        let stage = Scene::new().start().await;
        stage.pass(slept);
        stage.logs.wait_for(&line).await;
        stage.pass(SECOND);
        assert_eq!(stage.request("GET", "/healthz").send().await.status, 200);
        assert_eq!(warnings(&stage).len(), 1, "{:#?}", warnings(&stage));
    }
}

#[tokio::test]
async fn a_start_or_a_rotation_within_a_step_gives_one_warning() {
    let mut stage = Scene::new().token_life(10 * MINUTE).start().await;
    stage.logs.wait_for(&expires_in("10 min")).await;
    assert_eq!(stage.status().await["oidc"]["state"], "expiring");
    stage.pass(SECOND);
    let fresh = stage.fresh_token(7 * MINUTE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    stage.logs.wait_for(&expires_in("7 min")).await;
    stage.pass(2 * MINUTE);
    stage.logs.wait_for(&expires_in("5 min")).await;
    assert_eq!(warnings(&stage).len(), 3, "{:#?}", warnings(&stage));
}

#[tokio::test]
async fn the_steps_are_configurable_and_the_state_is_expiring_from_the_longest_on() {
    let stage = Scene::new().toml("warn_before = [\"2m\", \"30m\"]").token_life(31 * MINUTE).start().await;
    for (minutes, state, left) in
        [(0, "valid", None), (1, "expiring", Some("30 min")), (27, "expiring", None), (1, "expiring", Some("2 min"))]
    {
        stage.pass(minutes * MINUTE);
        if let Some(left) = left {
            stage.logs.wait_for(&expires_in(left)).await;
        }
        assert_eq!(stage.status().await["oidc"]["state"], state);
    }
    assert_eq!(warnings(&stage).len(), 2, "{:#?}", warnings(&stage));
    stage.pass(2 * MINUTE);
    assert_eq!(stage.status().await["oidc"]["state"], "expired");
}

#[tokio::test]
async fn a_rotation_is_announced_once_and_keeps_the_cache() {
    let mut stage = Scene::new().start().await;
    let provider_token = stage.slack_token().await;
    stage.pass(MINUTE);
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.pass(SECOND);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    stage.write_env(&fresh);
    stage.reloader.reload().await;
    assert_eq!(stage.logs.count("token refreshed, expires in 11 h 59 min"), 1);
    assert_eq!(stage.logs.count("token refreshed"), 1);
    assert_eq!(stage.slack_token().await, provider_token, "the same principal's cache is kept");
    assert_eq!(stage.status().await["oidc"]["fingerprint"], fingerprint(&fresh));
}

#[tokio::test]
async fn another_principal_is_announced_with_both_names_and_finds_an_empty_cache() {
    type Change = fn(&mut Subject);
    let changes: [(Change, &str); 3] = [
        (|s| (s.project, s.project_id) = ("shop".into(), "prj_shop".into()), "acme/shop (development, user_ada)"),
        (|s| (s.owner, s.owner_id) = ("evil".into(), "team_evil".into()), "evil/web (development, user_ada)"),
        (|s| s.user_id = Some("user_bob".into()), "acme/web (development, user_bob)"),
    ];
    for (change, name) in changes {
        let mut stage = Scene::new().start().await;
        stage.slack_token().await;
        assert_eq!(stage.status().await["cache"]["entries"], 1);
        let other = stage.token_of(change);
        stage.write_env(&other);
        stage.uses(&other).await;
        let line = format!("the token is now that of {name}, it was that of acme/web (development, user_ada)");
        assert_eq!(stage.logs.count(&line), 1, "{:#?}", stage.logs.lines());
        assert_eq!(stage.logs.count("token refreshed"), 0);
        assert_eq!(stage.status().await["cache"]["entries"], 0, "{name}");
        stage.token(r#"{"subject":{"type":"app"}}"#).send().await;
        assert_eq!(bearers(&stage.emulator).last(), Some(&fingerprint(&other)), "nothing of the one before is served");
    }
}

#[tokio::test]
async fn a_token_of_another_environment_gives_a_warning() {
    let mut stage = Scene::new().start().await;
    assert_eq!(stage.logs.count("not development"), 0);
    let production = stage.token_of(|subject| subject.environment = "production".into());
    stage.write_env(&production);
    stage.uses(&production).await;
    assert_eq!(stage.logs.count("this token is of environment production, not development"), 1);
    let status = stage.status().await;
    assert_eq!(status["oidc"]["environment"], "production");
    assert_eq!(status["warnings"][0]["code"], "not_development");
}

#[tokio::test]
async fn neither_an_older_nor_an_expired_token_replaces_a_valid_one() {
    let scene = Scene::new().start().await;
    let older = scene.fresh_token(2 * DEVELOPMENT_LIFE);
    let expired = scene.fresh_token(SECOND);
    scene.pass(MINUTE);
    let mut stage = scene;
    let current = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&current);
    stage.uses(&current).await;
    for token in [&older, &expired] {
        stage.write_env(token);
        stage.reloader.reload().await;
        assert_eq!(stage.status().await["oidc"]["fingerprint"], fingerprint(&current));
    }
    assert_eq!(stage.logs.count("holds an older token than the one in use, which stays"), 2);
    stage.pass(DEVELOPMENT_LIFE);
    stage.write_env(&older);
    stage.uses(&older).await;
    assert_eq!(stage.token("{}").send().await.status, 200, "the longer life counts once the other has ended");
}

#[tokio::test]
async fn a_cached_token_is_served_after_the_credential_has_expired_and_nothing_is_sent() {
    let stage = Scene::new().token_life(30 * MINUTE).start().await;
    let body = r#"{"subject":{"type":"app"}}"#;
    let provider_token = stage.slack_token().await;
    stage.pass(42 * MINUTE);
    let cached = stage.token(body).send().await;
    assert_eq!(cached.json()["token"], provider_token);
    assert_eq!((cached.cache_status(), cached.header("age")), ("connect-sidecar; hit; ttl=1050", Some("2520")));
    let metadata = "/v1/connect/connectors/slack%2Facme-slack";
    for refused in [
        stage.token(body).header("cache-control", "no-cache"),
        stage.token(r#"{"scopes":["new"]}"#),
        stage.request("POST", "/v1/connect/authorize/slack%2Facme-slack").json("{}"),
        stage.request("GET", metadata),
        stage.request("DELETE", &format!("{metadata}/tokens")),
    ] {
        let reply = refused.send().await;
        assert_eq!((reply.status, reply.code().as_str()), (503, "oidc_token_expired"));
        assert_eq!(
            reply.json()["error"]["message"],
            "The OIDC token in .env.local expired 12 min ago. Run `vercel env pull`."
        );
        assert_eq!(reply.json()["error"]["hint"], "vercel env pull");
        assert_eq!(reply.header("cache-status"), None);
    }
    let ready = stage.request("GET", "/readyz").send().await;
    assert_eq!((ready.status, ready.code().as_str()), (503, "oidc_token_expired"));
    assert_eq!(requests(&stage.emulator).len(), 1, "only the first went upstream");
    let questions: Vec<_> = stage.emulator.received().into_iter().filter(|r| r.method == "HEAD").collect();
    assert_eq!(questions.len(), 1, "upstream's clock is queried once a minute");
    assert!(!questions[0].headers.contains_key("authorization"));
    assert_eq!(stage.token(body).send().await.json()["token"], provider_token, "a failed forced fetch keeps the entry");
    assert_eq!(stage.status().await["oidc"]["state"], "expired");
    stage.pass(20 * MINUTE);
    assert_eq!(stage.token(body).send().await.code(), "oidc_token_expired", "the provider's token has ended, too");
}

#[tokio::test]
async fn upstreams_clock_corrects_a_wrong_one_with_one_warning() {
    let stage = Scene::new().start().await;
    stage.clock.advance(40 * MINUTE);
    for scope in ["1", "2", "3"] {
        let reply = stage.token(&format!(r#"{{"scopes":["{scope}"]}}"#)).send().await;
        // 40 min less than by upstream's.
        assert_eq!(reply.cache_status(), "connect-sidecar; fwd=uri-miss; stored; ttl=1170", "kept by the earlier end");
    }
    let line = format!("this machine's clock is 40 min ahead of {}'s, which is used instead", stage.emulator.url());
    assert_eq!(stage.logs.count(&line), 1, "{:#?}", stage.logs.lines());
    assert_eq!(stage.status().await["warnings"][0]["code"], "clock_skew");
    stage.emulator_clock.advance(40 * MINUTE);
    assert_eq!(stage.token(r#"{"scopes":["4"]}"#).send().await.status, 200);
    assert_eq!(stage.logs.count("agrees with"), 1);
    assert_eq!(stage.status().await["warnings"], serde_json::json!([]));
}

#[tokio::test]
async fn a_clock_that_makes_the_token_look_expired_or_not_yet_valid_is_checked_without_a_credential() {
    // At the start and after a jump; ahead and behind.
    for (ahead, behind) in [(13 * 60 * MINUTE, Duration::ZERO), (Duration::ZERO, 90 * MINUTE)] {
        let stage = Scene::new().start().await;
        stage.clock.set(stage.clock.local().plus(ahead).minus(behind));
        let reply = stage.token("{}").send().await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let received = stage.emulator.received();
        // The second confirms the first.
        for question in &received[..2] {
            assert_eq!((question.method.as_str(), question.target.as_str()), ("HEAD", "/"));
            assert!(!question.headers.contains_key("authorization"));
        }
        assert_eq!(received.len(), 3);
        assert_eq!(stage.logs.count("which is used instead"), 1);
        assert_eq!(warnings(&stage), [""; 0], "it has not expired");
    }
}

/// A stage on which upstream finds the token over that the sidecar still finds good, and a request under way whose
/// refusal is held back.
async fn with_a_request_about_to_be_refused() -> (Stage, AnswerHold, JoinHandle<Reply>) {
    let stage = Scene::new().token_life(10 * MINUTE).start().await;
    stage.pass(10 * MINUTE - 10 * SECOND);
    // Within the tolerance between two clocks.
    stage.emulator_clock.advance(20 * SECOND);
    let hold = stage.emulator.hold_answers();
    let asking = tokio::spawn(stage.token("{}").send());
    soon("the request", stage.emulator.wait_for_requests(1)).await;
    (stage, hold, asking)
}

#[tokio::test]
async fn after_a_refusal_the_file_is_read_again_and_a_fresh_token_tried_once() {
    for (second_answer, status) in [(None, 200), (Some(401), 401), (Some(500), 500)] {
        let (stage, hold, asking) = with_a_request_about_to_be_refused().await;
        let old = stage.status().await["oidc"]["fingerprint"].as_str().expect("a fingerprint").to_owned();
        let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
        stage.write_env(&fresh);
        if let Some(status) = second_answer {
            stage.emulator.inject(Fault::status(status, "unauthorized"));
        }
        hold.release();
        let reply = asking.await.expect("no panic");
        assert_eq!((reply.status, reply.header("sidecar-error")), (status, None), "{reply:?}");
        assert_eq!(bearers(&stage.emulator), [old, fingerprint(&fresh)], "exactly once more");
    }
}

#[tokio::test]
async fn a_refused_token_is_not_tried_again_without_another() {
    let (stage, hold, asking) = with_a_request_about_to_be_refused().await;
    hold.release();
    let reply = asking.await.expect("no panic");
    assert_eq!((reply.status, reply.header("sidecar-error")), (401, None), "upstream's own answer");
    assert_eq!(requests(&stage.emulator).len(), 1);
    assert_eq!(stage.logs.count("vercel env pull"), 2, "of the expiry and of the request: {:?}", stage.logs.lines());

    // A 403 about the connector says nothing about the credential.
    let stage = Scene::new().start().await;
    stage.pass(SECOND);
    stage.write_env(&stage.fresh_token(DEVELOPMENT_LIFE));
    let reply = stage.request("POST", "/v1/connect/token/salesforce%2Fcrm").json("{}").send().await;
    assert_eq!((reply.status, requests(&stage.emulator).len()), (403, 1));
}

#[tokio::test]
async fn a_403_about_the_token_counts_as_a_refused_token() {
    let stage = Scene::new().without_env_file().start().await;
    let now = UNIX_EPOCH + Duration::from_millis(stage.clock.local().as_millis());
    let forged = Issuer::new().expect("a key").issue(&Subject::development(&World::demo()), now, DEVELOPMENT_LIFE);
    stage.write_env(&forged);
    stage.reloader.reload().await;
    let hold = stage.emulator.hold_answers();
    let asking = tokio::spawn(stage.token("{}").send());
    soon("the request", stage.emulator.wait_for_requests(1)).await;
    stage.pass(SECOND);
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&fresh);
    hold.release();
    let reply = asking.await.expect("no panic");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(bearers(&stage.emulator), [fingerprint(&forged), fingerprint(&fresh)]);
}
