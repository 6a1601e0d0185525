//! Runs of the CLI: which results are accepted, how it is terminated, and that there is only one at a time.

use std::fs;

use connect_sidecar::events::Event;

use super::{FakeCli, HOUR, MINUTE, SECOND, automatic, be_accepted, on_request};
use crate::support::http::Request;
use crate::support::process::{Running, Serving};
use crate::support::workspace::Workspace;
use crate::support::{env_file, fingerprint, let_timers_pass, soon, write_private};

#[tokio::test]
async fn anything_but_a_fresh_token_of_the_same_principal_is_refused_and_reported() {
    let cli = FakeCli::printing();
    let stage = on_request(&cli).await;
    let older = stage.fresh_token(HOUR);
    let in_use = stage.status().await["oidc"]["fingerprint"].clone();
    stage.pass(MINUTE);
    let of_another_project = stage.token_of(|s| (s.project, s.project_id) = ("shop".into(), "prj_shop".into()));
    let of_another_user = stage.token_of(|s| s.user_id = Some("user_bob".into()));
    let of_another_environment = stage.token_of(|s| s.environment = "production".into());
    let print = |text: &str| (text.to_owned(), "cat DIR/answer");
    let token = |token: &str| print(&serde_json::json!({ "token": token }).to_string());
    for ((answer, script), reason) in [
        (print("Vercel CLI 64.0.2\n"), "is not used: it does not have three base64url parts"),
        (print(""), "printed something else than a token"),
        (print("{\"error\":1}"), "printed something else than a token"),
        (print(&"x".repeat(1 << 20)), "printed more than 64 KiB"),
        (token(&of_another_project), "is not used: it is that of acme/shop (development, user_ada)"),
        (token(&of_another_user), "is not used: it is that of acme/web (development, user_bob), not of acme/web"),
        (token(&of_another_environment), "is not used: it is that of acme/web (production, user_ada)"),
        (token(&older), "is not used: it is no fresher than the one in use"),
        ((String::new(), "exit 3"), "ended with code 3 and said nothing"),
        ((String::new(), "kill -9 $$"), "ended with signal 9"),
        ((String::new(), "head -c 1000000 /dev/zero >&2; echo Error: late >&2; exit 1"), "ended with code 1"),
    ] {
        cli.prints(&answer);
        cli.set_script(script);
        let reply = stage.refresh().send().await;
        reply.assert_refused(502, "refresh_failed", reason);
        assert!(reply.text().contains(reason), "not {reason:?}: {}", reply.text());
        stage.logs.wait_for(reason).await;
        assert_eq!(stage.status().await["oidc"]["fingerprint"], in_use, "{reason}");
        stage.pass(MINUTE);
    }
}

#[tokio::test]
async fn a_cli_that_hangs_is_killed_after_a_minute_with_its_children() {
    let cli = FakeCli::new("exec 3>DIR/pipe; echo began >&3; sleep 1000 & sleep 1000");
    let pipe = cli.pipe();
    let stage = on_request(&cli).await;
    let pending = stage.refresh().begin().await;
    soon("the CLI", pipe.line).await.expect("started");
    let_timers_pass(50 * SECOND).await;
    let reply = pending.reply().await;
    assert!(reply.status == 502 && reply.text().contains("goes on"), "{}", reply.text());
    let_timers_pass(11 * SECOND).await;
    stage.logs.wait_for("the Vercel CLI took longer than 60 s").await;
    soon("all of them to end", pipe.closed).await.expect("closed");
}

#[tokio::test]
async fn children_that_outlive_the_cli_are_killed() {
    let cli = FakeCli::new("cat DIR/answer; exec 3>DIR/pipe; echo began >&3; sleep 1000 & exit 0");
    let pipe = cli.pipe();
    let mut stage = on_request(&cli).await;
    stage.pass(MINUTE);
    let fresh = stage.fresh_token(HOUR);
    cli.prints_token(&fresh);
    assert_eq!(stage.refresh().send().await.status, 200);
    stage.uses(&fresh).await;
    soon("the child to end", pipe.closed).await.expect("closed");
}

#[tokio::test]
async fn the_cli_is_killed_when_the_sidecar_ends() {
    let cli = FakeCli::new("exec 3>DIR/pipe; echo began >&3; sleep 1000 & sleep 1000");
    let pipe = cli.pipe();
    let workspace = Workspace::new().await;
    write_private(&workspace.project().join(".env.local"), &env_file(&workspace.emulator.oidc_token(MINUTE)));
    let mut command = workspace.sidecar(&["--refresh", "cli"]);
    command.env("PATH", cli.path());
    let serving = Serving::start(command).await;
    be_accepted(&serving).await;
    soon("the CLI", pipe.line).await.expect("started");
    assert_eq!(serving.stop().await.code, Some(0));
    soon("all of them to end", pipe.closed).await.expect("closed");
}

#[tokio::test]
async fn a_missing_cli_is_reported_from_the_start_until_it_is_installed() {
    let cli = FakeCli::printing();
    let stage = automatic(&cli).await;
    stage.caught_up().await;
    assert_eq!(stage.logs.count("cannot be refreshed"), 0);
    assert_eq!(stage.status().await["warnings"], serde_json::json!([]));

    let cli = FakeCli::printing();
    fs::remove_file(cli.dir().join("vercel")).expect("uninstalled");
    let stage = automatic(&cli).await;
    let line = "the OIDC token cannot be refreshed: the Vercel CLI is not on PATH, run `npm install --global vercel`";
    stage.logs.wait_for(line).await;
    stage.caught_up().await;
    let status = stage.status().await;
    assert_eq!(status["refresh"]["last_error"], "the Vercel CLI is not on PATH", "{status:#}");
    let listed = serde_json::json!([{
        "code": "refresh_unavailable",
        "message": "The OIDC token cannot be refreshed: the Vercel CLI is not on PATH.",
        "hint": "npm install --global vercel",
        "command": "npm install --global vercel",
    }]);
    assert_eq!(status["warnings"], listed, "{status:#}");
    let (events, _) = stage.server.proxy().events.subscribe();
    let warnings = events.iter().filter(|event| matches!(***event, Event::Warning(_)));
    let [Event::Warning(event)] = &warnings.map(|event| (**event).clone()).collect::<Vec<_>>()[..] else {
        panic!("{events:?}");
    };
    assert_eq!((event.code, &*event.remedy.hint), ("refresh_unavailable", "npm install --global vercel"));
    assert_eq!(event.message, listed[0]["message"]);
    let reply = stage.refresh().send().await;
    reply.assert_refused(502, "refresh_failed", "a person asks");
    assert_eq!(reply.json()["error"]["hint"], "npm install --global vercel");

    stage.pass(MINUTE);
    stage.caught_up().await;
    assert_eq!((&stage.status().await["warnings"], stage.logs.count(line)), (&listed, 1), "one line");
    cli.set_script("cat DIR/answer");
    stage.pass(MINUTE);
    let is_found = async { while stage.status().await["warnings"] != serde_json::json!([]) {} };
    soon("the CLI", is_found).await;
    assert_eq!(stage.status().await["refresh"]["last_error"], serde_json::Value::Null);
}

/// Each sidecar keeps its token in memory, so each needs its own run.
#[tokio::test]
async fn sidecars_of_a_project_run_the_cli_one_at_a_time() {
    let cli = FakeCli::new("mkdir DIR/busy || echo overlap >>DIR/overlaps; sleep 0.1; cat DIR/answer; rmdir DIR/busy");
    let workspace = Workspace::new().await;
    let old = workspace.emulator.oidc_token(MINUTE);
    let fresh = workspace.emulator.oidc_token(HOUR * 12);
    cli.prints_token(&fresh);
    let mut serving = Vec::new();
    for n in 0..5 {
        let project = workspace.project().with_file_name(format!("web{n}"));
        fs::create_dir(&project).expect("a project");
        write_private(&project.join(".env.local"), &env_file(&old));
        let mut command = workspace.sidecar(&["--refresh", "cli"]);
        command.current_dir(project).env("PATH", cli.path());
        serving.push(Serving::start(command).await);
        be_accepted(serving.last().expect("one")).await;
    }
    for serving in &mut serving {
        serving.wait_for_log("token refreshed, expires in 11 h 59 min").await;
    }
    assert_eq!(cli.runs(), 5);
    assert!(!cli.dir().join("overlaps").exists(), "two ran at once");
    for serving in serving {
        let status = Request::new(serving.addr, "GET", "/_sidecar/v1/status").send().await.json();
        assert_eq!(status["oidc"]["fingerprint"], fingerprint(&fresh));
    }
}

#[tokio::test]
async fn attempts_keep_their_distance_over_a_restart() {
    let cli = FakeCli::new("exit 1");
    let workspace = Workspace::new().await;
    write_private(&workspace.project().join(".env.local"), &env_file(&workspace.emulator.oidc_token(MINUTE)));
    let start = async || {
        let mut command = workspace.sidecar(&["--refresh", "cli"]);
        command.env("PATH", cli.path());
        Serving::start(command).await
    };
    let mut serving = start().await;
    be_accepted(&serving).await;
    serving.wait_for_log("could not refresh the OIDC token").await;
    serving.stop().await;
    let serving = start().await;
    let waits = async {
        loop {
            let status = Request::new(serving.addr, "GET", "/_sidecar/v1/status");
            if status.send().await.json()["refresh"]["state"] == "waiting" {
                return;
            }
        }
    };
    soon("it to wait", waits).await;
    assert_eq!(cli.runs(), 1);
}

/// The command of `run` leaves orphans as fast as it can, which the sidecar's process reaps while it waits for the CLI.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn reaping_orphans_does_not_take_the_exit_status_of_the_cli() {
    // Automatic refresh needs a request that upstream accepts.
    const ORPHANS: &str = "curl -sS -o /dev/null \"$CONNECT_SIDECAR_URL/v1/connect/token/slack%2Facme-slack\" \
        -H 'content-type: application/json' -d '{\"subject\":{\"type\":\"app\"}}'; while [ ! -e \"$1\" ]; do (true &); (true &); : >\"$2\"; done";
    let cli = FakeCli::new("until [ -e DIR/orphans ]; do sleep 0.01; done; cat DIR/answer");
    let workspace = Workspace::new().await;
    cli.prints_token(&workspace.emulator.oidc_token(HOUR * 12));
    let old = workspace.emulator.oidc_token(MINUTE);
    for n in 0..4 {
        let project = workspace.project().with_file_name(format!("web{n}"));
        fs::create_dir(&project).expect("a project");
        write_private(&project.join(".env.local"), &env_file(&old));
        let mut command =
            workspace.sidecar(&["run", "-v", "--no-intercept", "--refresh", "cli", "--", "sh", "-c", ORPHANS]);
        let over = project.join("over");
        command.arg("sh").arg(&over).arg(cli.dir().join("orphans")).current_dir(&project).process_group(0);
        command.env("PATH", cli.path());
        let mut running = Running::start(command);
        running.wait_for_log("token refreshed, expires in 11 h 59 min").await;
        fs::write(over, "").expect("written");
        let ended = running.end().await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    assert_eq!(cli.runs(), 4);
}
