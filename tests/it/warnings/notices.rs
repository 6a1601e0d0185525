//! Warnings as desktop notifications, on a session bus of their own.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixListener;

use super::{MINUTE, OF_THE_TOKEN, about};
use crate::support::desktop::{Desktop, Notice};
use crate::support::http::Request;
use crate::support::moved_clock::MovedClock;
use crate::support::process::{Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{instance_key, write_private};

#[tokio::test]
async fn a_notification_is_replaced_by_the_next_warning_or_a_fresh_token() {
    let (workspace, desktop) = (Workspace::new().await, Desktop::new().await);
    workspace.pull(about(9));
    let mut command = workspace.sidecar(&[]);
    desktop.of(&mut command);
    let mut sidecar = Serving::start(command).await;
    let notice = |id, replaces, title: &str, body: &str, urgency| Notice {
        id,
        replaces,
        title: format!("The OIDC token of acme/web {title}"),
        body: body.into(),
        urgency,
    };
    let first = desktop.shows(|notice| notice.urgency == 1).await;
    let id = first.id;
    assert_eq!(first, notice(id, 0, "expires in 9 min", "Run: vercel env pull", 1));
    // Fresher, but about to expire as well, with its own warning.
    workspace.pull(Duration::from_secs(3));
    let over = desktop.shows(|notice| notice.urgency == 2).await;
    assert_eq!(over, notice(id, id, "expired 0 s ago", "Run: vercel env pull", 2));
    workspace.pull(about(12 * 60 - 1));
    let fresh = desktop.shows(|notice| notice.title.contains("refreshed")).await;
    assert_eq!(fresh, notice(id, id, "was refreshed", "It expires in 11 h 59 min.", 1));

    // There was no warning, so a fresh token gives no notification.
    workspace.pull(about(11 * 60 - 1));
    sidecar.wait_for_next_log("token refreshed, expires in 10 h 59 min").await;
    workspace.pull(about(3));
    let last = desktop.shows(|notice| notice.title.contains("expires in 3 min")).await;
    assert_eq!(last.id, id);
    let titles: Vec<_> = desktop.shown().into_iter().map(|notice| notice.title).collect();
    assert_eq!(titles.len(), 5, "one each: {titles:?}");
    assert_eq!(sidecar.stop().await.code, Some(0));
}

#[tokio::test]
async fn after_13_hours_of_sleep_there_is_one_warning_one_notification_and_one_event_within_15_s() {
    let (workspace, desktop) = (Workspace::new().await, Desktop::new().await);
    let clock = MovedClock::new(workspace.home.path());
    let mut command = workspace.sidecar(&[]);
    desktop.of(&mut command);
    clock.of(&mut command);
    let mut sidecar = Serving::start(command).await;
    let key = instance_key(&workspace.home.path().join(".local/state"), sidecar.addr);
    let events = Request::new(sidecar.addr, "GET", "/_sidecar/v1/events").header("sidecar-key", &key);
    let mut events = events.begin().await;
    events.until("\n\n").await;

    workspace.pass(13 * 60 * MINUTE);
    clock.is_ahead("+13h");
    let woken = Instant::now();
    sidecar.wait_for_log("the OIDC token of acme/web expired 1 h ago, run `vercel env pull`").await;
    desktop.shows(|notice| notice.title == "The OIDC token of acme/web expired 1 h ago" && notice.urgency == 2).await;
    let mut sent = events.until("oidc_token_expired").await;
    assert!(woken.elapsed() <= Duration::from_secs(16), "{:?}", woken.elapsed());

    workspace.pull(about(12 * 60));
    desktop.shows(|notice| notice.title.ends_with("was refreshed")).await;
    let log = sidecar.stop().await.stderr;
    sent += &events.rest().await;
    assert_eq!((log.matches(OF_THE_TOKEN).count(), desktop.shown().len()), (1, 2), "{log}");
    assert_eq!((sent.matches("\"warning\"").count(), sent.matches("\"rotation\"").count()), (1, 1), "{sent}");
}

#[tokio::test]
async fn notifications_can_be_turned_off() {
    for (arguments, variable, file) in
        [(&["--desktop-notices=false"][..], "", ""), (&[], "false", ""), (&[], "", "desktop_notices = false")]
    {
        let (workspace, desktop) = (Workspace::new().await, Desktop::new().await);
        write_private(&workspace.project().join("sidecar.toml"), file);
        workspace.pull(about(9));
        let mut command = workspace.sidecar(arguments);
        if !variable.is_empty() {
            command.env("CONNECT_SIDECAR_DESKTOP_NOTICES", variable);
        }
        desktop.of(&mut command);
        let mut sidecar = Serving::start(command).await;
        sidecar.wait_for_log(OF_THE_TOKEN).await;
        assert_eq!(sidecar.stop().await.code, Some(0));
        assert_eq!(desktop.shown(), []);
    }
}

#[tokio::test]
async fn without_a_bus_address_no_bus_is_searched() {
    let workspace = Workspace::new().await;
    workspace.pull(about(9));
    // The default location of a session bus.
    let bus = UnixListener::bind(workspace.home.path().join("bus")).expect("a socket");
    let mut command = workspace.sidecar(&["-vv"]);
    command.env("XDG_RUNTIME_DIR", workspace.home.path());
    let mut sidecar = Serving::start(command).await;
    sidecar.wait_for_log(OF_THE_TOKEN).await;
    workspace.pull(about(1));
    sidecar.wait_for_next_log(OF_THE_TOKEN).await;
    let ended = sidecar.stop().await;
    assert!(!ended.stderr.contains("notice"), "{}", ended.stderr);
    let bus = bus.into_std().expect("a socket");
    assert!(bus.accept().is_err(), "no connection");
}

#[tokio::test]
async fn an_unusable_bus_delays_nothing_and_logs_nothing() {
    let home = tempfile::tempdir().expect("a directory");
    let silent = home.path().join("silent");
    let _silent = UnixListener::bind(&silent).expect("a socket");
    for address in [format!("unix:path={}", silent.display()), "unix:path=/nowhere".into(), "nonsense".into()] {
        let workspace = Workspace::new().await;
        workspace.pull(about(9));
        let mut command = workspace.sidecar(&[]);
        command.env("DBUS_SESSION_BUS_ADDRESS", &address);
        let mut sidecar = Serving::start(command).await;
        sidecar.wait_for_log(OF_THE_TOKEN).await;
        workspace.pull(about(1));
        sidecar.wait_for_next_log(OF_THE_TOKEN).await;
        let healthy = Request::new(sidecar.addr, "GET", "/healthz").send().await;
        assert_eq!(healthy.status, 200, "{address}");
        let ended = sidecar.stop().await;
        assert_eq!(ended.code, Some(0), "{address}");
        assert!(!ended.stderr.contains("notice") && !ended.stderr.contains("bus"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn the_sidecar_of_a_run_gives_notifications_too() {
    let (workspace, desktop) = (Workspace::new().await, Desktop::new().await);
    workspace.pull(about(9));
    let mut command = workspace.sidecar(&["run", "--", "sleep", "60"]);
    desktop.of(&mut command);
    let mut running = command.spawn().expect("a process");
    let notice = desktop.shows(|_| true).await;
    assert_eq!(notice.title, "The OIDC token of acme/web expires in 9 min");
    let pid = i32::try_from(running.id().expect("it runs")).expect("a process id");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("sent");
    crate::support::soon("its end", running.wait()).await.expect("a status");
}

#[tokio::test]
async fn the_sidecar_of_a_single_token_gives_no_notifications() {
    let (workspace, desktop) = (Workspace::new().await, Desktop::new().await);
    write_private(&workspace.project().join(".env.local"), &workspace.emulator.env_file(60 * MINUTE, Duration::ZERO));
    // While it waits, a notification would be shown.
    let mut command = workspace.sidecar(&["token", "slack/acme-slack", "--wait", "2s"]);
    desktop.of(&mut command);
    let ended = run(command).await;
    assert!(ended.code == Some(1) && ended.stderr.contains(OF_THE_TOKEN), "{ended:?}");
    assert_eq!(desktop.shown(), []);
}
