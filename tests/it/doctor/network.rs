//! The checks of the network path to Connect.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::os::clock::Clock;
use tokio::net::TcpListener;
use tokio::process::Command;

use super::{Checkup, check_up, doctor, healthy};
use crate::support::workspace::Workspace;

async fn check_up_at(workspace: &Workspace, upstream: &str, change: impl FnOnce(&mut Command)) -> Checkup {
    let mut command = doctor(workspace);
    command.env("CONNECT_SIDECAR_UPSTREAM", upstream);
    change(&mut command);
    check_up(workspace, command).await
}

#[tokio::test]
async fn dns_failures_closed_ports_and_proxies_are_told_apart() {
    let workspace = healthy().await;
    let offline = check_up_at(&workspace, "https://connect.invalid", |_| {}).await;
    offline.found("problem", "dns_failed");
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let closed = format!("http://{closed}");
    let checkup = check_up_at(&workspace, &closed, |command| {
        command.env("ALL_PROXY", "socks4://me:canary-of-a-proxy@127.0.0.1:9");
    });
    let checkup = checkup.await;
    let port = closed.rsplit(':').next().expect("a port");
    let fix = format!("connect-sidecar emulate --port {port}");
    assert_eq!(checkup.found("problem", "upstream_unreachable")["fix"], fix, "a local upstream is no network problem");
    let unsupported = checkup.found("warning", "proxy_not_supported");
    assert!(unsupported["title"].as_str().is_some_and(|title| title.contains("ALL_PROXY: ")), "{unsupported}");
    assert!(!format!("{checkup:?}").contains("canary"), "{checkup:#?}");
    let used = check_up_at(&workspace, &closed, |command| {
        command.env("ALL_PROXY", "socks4://127.0.0.1:9").env("CONNECT_SIDECAR_USE_ENV_PROXY", "true");
    });
    let refused = used.await;
    let title = refused.found("problem", "configuration")["title"].as_str().expect("text").to_owned();
    assert!(title.starts_with("ALL_PROXY: a proxy of scheme socks4 "), "{title}");
    let proxied = |command: &mut Command| {
        command.env("HTTPS_PROXY", "http://me:canary-of-a-proxy@127.0.0.1:9");
    };
    let proxy = check_up_at(&workspace, "https://connect.invalid", proxied).await;
    assert_eq!(proxy.found("problem", "proxy_not_used")["fix"], "connect-sidecar --use-env-proxy");
    let through = check_up_at(&workspace, "https://connect.invalid", |command| {
        proxied(command);
        command.env("CONNECT_SIDECAR_USE_ENV_PROXY", "true");
    });
    let through = through.await;
    through.found("problem", "upstream_unreachable");
    assert!(!format!("{proxy:?}{through:?}").contains("canary"), "{through:#?}");
    let itself = check_up_at(&workspace, "https://connect.invalid", |command| {
        proxied(command);
        command.env("CONNECT_SIDECAR_USE_ENV_PROXY", "true").env("CONNECT_SIDECAR_URL", "http://127.0.0.1:2774");
    });
    itself.await.found("problem", "proxy_is_a_sidecar");
}

#[tokio::test]
async fn an_unknown_certificate_authority_is_reported_with_the_certificate_to_pass() {
    let workspace = healthy().await;
    let tls = Emulator::start(Options { tls: true, ..Options::default() }).await.expect("an emulator");
    let url = tls.url();
    let unknown = check_up_at(&workspace, &url, |_| {}).await;
    // The file is unknown, so there is no command to paste.
    let unknown = unknown.found("problem", "upstream_tls");
    assert!(unknown["hint"].as_str().is_some_and(|hint| hint.contains("--upstream-ca FILE")), "{unknown}");
    assert_eq!((&unknown["fix"], &unknown["command"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    let ca = workspace.home.path().join("corp.pem");
    fs::write(&ca, tls.ca_pem().expect("a CA")).expect("a file");
    let known_to_node = check_up_at(&workspace, &url, |command| {
        command.env("NODE_EXTRA_CA_CERTS", &ca);
    });
    let fix = format!("connect-sidecar --upstream-ca {}", ca.display());
    assert_eq!(known_to_node.await.found("problem", "upstream_tls")["fix"], fix);
    let passed = check_up_at(&workspace, &url, |command| {
        command.env("CONNECT_SIDECAR_UPSTREAM_CA", &ca);
    });
    passed.await.found("ok", "network");
}

#[tokio::test]
async fn captive_portals_are_told_from_failures_of_connect() {
    let html = "<html>Welcome to the hotel</html>";
    for (fault, code) in [
        (Fault::always(FaultKind::Reset), "upstream_broken_off"),
        (Fault::answer(200, "text/html", html), "captive_portal"),
        (Fault::redirect("http://portal.example/login"), "captive_portal"),
        (Fault::answer(502, "text/html", html), "upstream_failing"),
        (Fault::status(503, "unavailable"), "upstream_failing"),
    ] {
        let workspace = healthy().await;
        workspace.emulator.inject(fault);
        check_up(&workspace, doctor(&workspace)).await.found("problem", code);
    }
}

#[tokio::test]
async fn the_doctor_ends_within_ten_seconds_if_upstream_hangs() {
    let workspace = healthy().await;
    workspace.emulator.inject(Fault::always(FaultKind::Hang));
    let begun = std::time::Instant::now();
    check_up(&workspace, doctor(&workspace)).await.found("problem", "upstream_timeout");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn clock_skew_is_reported_and_corrected_for() {
    let workspace = healthy().await;
    let ahead = |by: Duration| Options {
        now: Arc::new(move || UNIX_EPOCH + Duration::from_millis(Clock::system().local().plus(by).as_millis())),
        ..Options::default()
    };
    let a_little = Emulator::start(ahead(Duration::from_secs(20))).await.expect("an emulator");
    assert!(check_up_at(&workspace, &a_little.url(), |_| {}).await.bad().is_empty());
    let much = Emulator::start(ahead(Duration::from_secs(13 * 3600))).await.expect("an emulator");
    let checkup = check_up_at(&workspace, &much.url(), |_| {}).await;
    let title = checkup.found("warning", "clock_skew")["title"].as_str().expect("text");
    assert!(title.contains("12 h 59 min behind") || title.contains("13 h behind"), "{title}");
    checkup.found("problem", "oidc_token_expired");
}
