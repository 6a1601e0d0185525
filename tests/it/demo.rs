//! `demo` as a new user runs it.

use std::time::Duration;

use connect_sidecar::cli::demo::Demo;
use connect_sidecar::config::args::GlobalArgs;
use connect_sidecar::daemon::app::App;
use connect_sidecar::os::clock::Clock;
use tokio::io::AsyncBufReadExt;
use tokio::process::Command;
use tokio::sync::oneshot;

use crate::support::process::{Serving, run, sidecar};
use crate::support::soon;

#[tokio::test]
async fn the_tour_succeeds_and_leaves_nothing_behind() {
    let home = tempfile::tempdir().expect("a directory");
    let mut command = sidecar(home.path());
    command.args(["demo", "--once", "--port", "0"]).env("TMPDIR", home.path());
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(ended.stdout.lines().count(), 1, "{}", ended.stdout);
    assert!(ended.stdout.starts_with("connect-sidecar listening on http://127.0.0.1:"));
    for shown in [
        "fwd=uri-miss; stored",
        "; hit; ttl=",
        "\"requests_saved\":1",
        "requests to Connect: 1",
        "expires in 3 min, run `vercel env pull`",
        "token refreshed, expires in 11 h 59 min",
        "run `vercel connect attach salesforce/crm`",
        "All 6 steps showed what they claim.",
    ] {
        assert!(ended.stderr.contains(shown), "{shown}\n{}", ended.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(home.path()).expect("a directory").flatten().map(|f| f.file_name()).collect();
    assert_eq!(left, [".local"], "only the state directory is left");
    let usage = home.path().join(".local/state/connect-sidecar/usage.json");
    assert!(!usage.exists(), "usage of the demo is not recorded");
}

#[tokio::test]
async fn every_command_of_the_tour_can_be_repeated() {
    let home = tempfile::tempdir().expect("a directory");
    let mut command = sidecar(home.path());
    command.args(["demo", "--port", "0"]).env("TMPDIR", home.path());
    let mut demo = Serving::start(command).await;
    let mut lines = demo.take_stderr().lines();
    let mut commands = Vec::new();
    while let Some(line) = soon("the tour", lines.next_line()).await.expect("a line")
        && !line.starts_with("Ctrl-C")
    {
        commands.extend(line.trim_start().strip_prefix("$ ").map(str::to_owned));
    }
    let expected = [
        ("cache-status: connect-sidecar; hit; ttl=", None),
        ("cache-status: connect-sidecar; hit; ttl=", None),
        ("\"requests_saved\":", None),
        ("cache-status: connect-sidecar; fwd=uri-miss; stored", None),
        ("", Some("expires in 3 min, run `vercel env pull`")),
        ("", Some("token refreshed, expires in 11 h 59 min")),
        ("HTTP/1.1 403 Forbidden", Some("vercel connect attach salesforce/crm")),
    ];
    assert_eq!(commands.len(), expected.len(), "{commands:#?}");
    for (command, (output, log)) in commands.iter().zip(expected) {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).kill_on_drop(true);
        let ran = run(shell).await;
        assert!(ran.code == Some(0) && ran.stdout.contains(output), "{command}\n{ran:?}");
        if let Some(log) = log {
            while !soon(log, lines.next_line()).await.expect("a line").expect("a log line").contains(log) {}
        }
    }
    demo.signal(nix::sys::signal::Signal::SIGINT);
    let status = soon("its end", demo.child.wait()).await.expect("a status");
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn a_tour_with_a_failed_check_fails() {
    let home = tempfile::tempdir().expect("a directory");
    let args = GlobalArgs { port: Some("0".into()), ..GlobalArgs::default() };
    let state = home.path().as_os_str().to_owned();
    let environment = |name: &str| (name == "XDG_STATE_HOME").then(|| state.clone());
    let (demo, mut config) = Demo::prepare(&args, &environment).await.unwrap_or_else(|e| panic!("{e}"));
    let log = demo.log();
    let _log = tracing::subscriber::set_default(tracing_subscriber::fmt().with_writer(move || log.clone()).finish());
    config.cache.max_age = Duration::ZERO;
    let app = App::bind(config, Clock::system()).await.unwrap_or_else(|e| panic!("{e}"));
    let addr = app.addr();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(app.serve(async {
        let _ = stopped.await;
    }));
    assert!(!soon("the tour", demo.tour(addr, false, true)).await, "nothing is cached");
    drop(stop);
    soon("its end", serving).await.expect("no panic");
}

#[tokio::test]
async fn unused_flags_are_refused_all_at_once() {
    let home = tempfile::tempdir().expect("a directory");
    let mut command = sidecar(home.path());
    command.args(["demo", "--once", "--upstream", "https://api.vercel.com", "--project", "."]);
    let ended = run(command).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    for flag in ["error: --upstream: ", "error: --project: "] {
        assert!(ended.stderr.contains(flag), "{}", ended.stderr);
    }
}
