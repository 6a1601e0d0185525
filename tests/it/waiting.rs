//! `--wait`: a request without a valid OIDC token waits for a fresh one, up to a limit.

use std::time::Duration;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::proxy::MAX_WAITING;

use crate::support::http::Request;
use crate::support::workspace::Workspace;
use crate::support::{SLACK, Scene, env_file, is_over, let_timers_pass, soon, write_private};

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn waiting_requests_continue_with_the_fresh_token_and_equal_ones_are_collapsed() {
    let mut stage = Scene::new().toml("wait = \"30s\"").start().await;
    stage.pass(DEVELOPMENT_LIFE + HOUR);
    let waiting: Vec<_> = (0..20).map(|_| tokio::spawn(stage.token("{}").send())).collect();
    for task in &waiting {
        assert!(!is_over(task, &stage).await);
    }
    assert_eq!(stage.emulator.count(SLACK), 0);
    let fresh = stage.fresh_token(HOUR);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    for task in waiting {
        assert_eq!(soon("a reply", task).await.expect("no panic").status, 200);
    }
    assert_eq!(stage.emulator.count(SLACK), 1);
}

#[tokio::test]
async fn a_waiting_request_fails_with_the_reason_after_the_limit() {
    let expired = Scene::new().toml("wait = \"10s\"").start().await;
    expired.pass(DEVELOPMENT_LIFE + HOUR);
    let missing = Scene::new().toml("wait = \"10s\"").without_env_file().start().await;
    for (stage, code) in [(expired, "oidc_token_expired"), (missing, "oidc_token_missing")] {
        let waiting = tokio::spawn(stage.token("{}").send());
        assert!(!is_over(&waiting, &stage).await, "{code}");
        let_timers_pass(9 * SECOND).await;
        assert!(!is_over(&waiting, &stage).await, "{code}");
        let_timers_pass(2 * SECOND).await;
        soon("a reply", waiting).await.expect("no panic").assert_refused(503, code, "the time is up");
    }
}

#[tokio::test]
async fn a_missing_token_is_waited_for_but_not_for_a_cache_hit_or_with_an_invalid_token() {
    let mut stage = Scene::new().toml("wait = \"30s\"").without_env_file().start().await;
    let waiting = tokio::spawn(stage.token("{}").send());
    assert!(!is_over(&waiting, &stage).await);
    let fresh = stage.fresh_token(HOUR / 60);
    write_private(&stage.env_path(), &env_file(&fresh));
    stage.uses(&fresh).await;
    assert_eq!(soon("a reply", waiting).await.expect("no panic").status, 200);

    stage.pass(HOUR / 60 * 2);
    assert_eq!(stage.token("{}").send().await.header("cache-status").map(|s| s.contains("hit")), Some(true));
    let stage = Scene::new().toml("wait = \"30s\"").env_file("VERCEL_OIDC_TOKEN=a.b.c\n").start().await;
    stage.token("{}").send().await.assert_refused(503, "oidc_token_invalid", "an invalid token");
}

#[tokio::test]
async fn waiting_ends_when_the_sidecar_ends() {
    let workspace = Workspace::new().await;
    write_private(&workspace.project().join(".env.local"), &env_file(&workspace.emulator.oidc_token(Duration::ZERO)));
    let serving = workspace.serve(&["--wait", "40s"]).await;
    let waiting = Request::new(serving.addr, "POST", SLACK).json("{}").begin().await;
    // Connections are served in order, so the request above is waiting now.
    assert_eq!(Request::new(serving.addr, "GET", "/healthz").send().await.status, 200);
    let (ended, reply) = tokio::join!(serving.stop(), waiting.reply());
    reply.assert_refused(503, "oidc_token_expired", "at once");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[tokio::test]
async fn requests_beyond_the_maximum_fail_at_once() {
    let stage = Scene::new().toml("wait = \"30s\"").without_env_file().start().await;
    let waiting: Vec<_> = (0..MAX_WAITING).map(|_| tokio::spawn(stage.token("{}").send())).collect();
    for task in &waiting {
        assert!(!is_over(task, &stage).await);
    }
    stage.token("{}").send().await.assert_refused(503, "oidc_token_missing", "one too many");
    for task in waiting {
        task.abort();
    }
}
