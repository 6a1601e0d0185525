//! `logs` and `cache clear`.

use std::time::Duration;

use connect_sidecar::emulator::fault::Fault;
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::http::{APP, KeptAlive};
use crate::support::process::{Running, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK_UID, Scene, let_timers_pass, soon};

#[tokio::test]
async fn events_are_printed_as_text_or_json() {
    let stage = Scene::new().start().await;
    stage.token(APP).send().await.token();
    stage.emulator.inject(Fault::status(404, "not_found"));
    stage.token(r#"{"scopes":["x"]}"#).send().await;
    let text = run(stage.command(&["logs"])).await;
    assert_eq!((text.code, text.stderr.as_str()), (Some(0), ""));
    let at = stage.clock.now().to_string();
    let [first, second] = text.stdout.lines().collect::<Vec<_>>()[..] else { panic!("{}", text.stdout) };
    let begins = format!("{at}  INFO token {SLACK_UID} status=200 subject=app cache=miss ms=");
    assert!(first.starts_with(&begins), "{first}");
    let begins = format!("{at}  WARN token {SLACK_UID}: run `vercel connect list` to see the connectors there are");
    assert!(second.starts_with(&begins) && second.contains(" status=404 code=not_found "), "{second}");
    let json = run(stage.command(&["logs", "--json"])).await;
    assert_eq!(json.stdout.lines().count(), 2);
    for line in json.stdout.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(event["event"], "request");
    }
}

#[tokio::test]
async fn hits_refusals_and_warnings_are_formatted_as_in_the_log() {
    let stage = Scene::new().token_life(Duration::from_secs(300)).start().await;
    stage.logs.wait_for("expires in 5 min").await;
    stage.token(APP).send().await.token();
    stage.token(APP).send().await.token();
    stage.request("GET", "/healthz").header("host", "evil.example").send().await;
    stage.pass(Duration::from_secs(300));
    stage.logs.wait_for("expired 0 s ago").await;
    let text = run(stage.command(&["logs"])).await;
    let lines: Vec<_> = text.stdout.lines().map(|line| line.split_once(' ').map_or("", |(_, line)| line)).collect();
    let [expiring, miss, hit, refusal, expired] = lines[..] else { panic!("{}", text.stdout) };
    let pull = "run `vercel env pull`";
    assert_eq!(expiring, format!(" WARN The OIDC token of acme/web expires in 5 min: {pull} code=oidc_token_expiring"));
    assert!(miss.starts_with(&format!(" INFO token {SLACK_UID} ")) && miss.contains("cache=miss"), "{miss}");
    assert!(hit.starts_with(&format!(" INFO token {SLACK_UID} ")) && hit.contains("cache=hit"), "{hit}");
    assert!(refusal.starts_with(" WARN Host `evil.example` is not this sidecar"), "{refusal}");
    assert!(
        refusal.contains("run `connect-sidecar --allowed-host evil.example` status=403 code=host_not_allowed"),
        "{refusal}"
    );
    assert_eq!(expired, format!("ERROR The OIDC token of acme/web expired 0 s ago: {pull} code=oidc_token_expired"));
}

#[tokio::test]
async fn following_prints_new_events_until_the_sidecar_ends() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    run(workspace.sidecar(&["token", SLACK_UID])).await;
    let mut logs = Running::start(workspace.sidecar(&["logs", "-f"]));
    assert!(logs.line().await.contains("cache=miss"));
    run(workspace.sidecar(&["token", SLACK_UID])).await;
    assert!(logs.line().await.contains("cache=hit"));
    serving.stop().await;
    let ended = logs.end().await;
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(0), "", ""));
}

#[tokio::test]
async fn a_signal_ends_following_with_0() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    run(workspace.sidecar(&["token", SLACK_UID])).await;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut logs = Running::start(workspace.sidecar(&["logs", "--follow"]));
        logs.line().await;
        logs.signal(signal);
        assert_eq!(logs.end().await.code, Some(0));
    }
}

#[tokio::test]
async fn a_signal_ends_following_even_if_stdout_is_blocked() {
    let stage = Scene::new().start().await;
    let mut logs = stage.command(&["logs", "-f"]).spawn().expect("a process");
    let (token, mut app) = (stage.token(APP), KeptAlive::to(stage.addr).await);
    let followed = async {
        while !stage.server.proxy().events.has_subscribers() {
            tokio::task::yield_now().await;
        }
    };
    soon("somebody who listens", followed).await;
    // More than a pipe buffers.
    for _ in 0..1500 {
        assert_eq!(app.send(&token).await.status, 200);
    }
    let pid = i32::try_from(logs.id().expect("it runs")).expect("a process id");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("sent");
    assert_eq!(soon("its end", logs.wait()).await.expect("a status").code(), Some(0));
}

#[tokio::test]
async fn following_ends_with_0_when_stdout_is_closed() {
    for quiet in [false, true] {
        let stage = Scene::new().start().await;
        stage.token(APP).send().await.token();
        let mut logs = stage.command(&["logs", "-f"]).spawn().expect("a process");
        let mut stdout = BufReader::new(logs.stdout.take().expect("stdout"));
        let line = &mut String::new();
        soon("a line", stdout.read_line(line)).await.expect("a line");
        drop(stdout);
        if quiet {
            stage.caught_up().await;
            let_timers_pass(Duration::from_secs(11)).await;
        } else {
            stage.token(APP).header("cache-control", "no-cache").send().await.token();
        }
        let output = soon("its end", logs.wait_with_output()).await.expect("a status");
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{quiet}");
    }
}

#[tokio::test]
async fn cache_clear_prints_how_many_tokens_were_removed() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    for scopes in ["a", "b", "c"] {
        run(workspace.sidecar(&["token", SLACK_UID, "--scopes", scopes])).await;
    }
    run(workspace.sidecar(&["token", "github/acme-github"])).await;
    for (arguments, code, stdout) in [
        (&["cache", "clear", "none/such"][..], 0, "forgot 0 tokens of none/such\n"),
        (&["cache", "clear", SLACK_UID], 0, "forgot 3 tokens of slack/acme-slack\n"),
        (&["cache", "clear"], 0, "forgot 1 token\n"),
        (&["cache", "clear"], 0, "forgot 0 tokens\n"),
        (&["cache", "clear", "a//b"], 2, ""),
    ] {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), stdout), "{arguments:?}: {}", ended.stderr);
    }
}
