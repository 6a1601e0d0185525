//! `connect-sidecar refresh` and `POST /_sidecar/v1/refresh`.

use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::World;

use super::{FakeCli, HOUR, MINUTE, SECOND, on_request};
use crate::support::process::{Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{Scene, env_file, soon, write_private};

#[tokio::test]
async fn the_response_has_the_lifetime_or_the_reason() {
    let cli = FakeCli::printing();
    let mut stage = on_request(&cli).await;
    stage.pass(MINUTE);
    let fresh = stage.fresh_token(HOUR * 12);
    cli.prints_token(&fresh);
    stage.request("POST", "/_sidecar/v1/refresh").send().await.assert_refused(401, "key_required", "no key");
    stage.request("GET", "/_sidecar/v1/refresh").send().await.assert_refused(405, "method_not_allowed", "GET");
    let reply = stage.refresh().send().await;
    let answer = reply.json();
    assert_eq!((&answer["project"], &answer["expires_in_seconds"]), (&"acme/web".into(), &43200.into()));
    assert!(!reply.text().contains(&fresh[..16]), "never the token");
    stage.uses(&fresh).await;
    let oidc = &stage.status().await["oidc"];
    assert_eq!((&oidc["source"], &oidc["configured_source"]), (&"the Vercel CLI".into(), &".env.local".into()));

    stage.pass(20 * SECOND);
    let reply = stage.refresh().send().await;
    reply.assert_refused(429, "local_rate_limit", "once a minute");
    assert_eq!(reply.header("retry-after"), Some("40"));
    assert_eq!((cli.runs(), &stage.status().await["refresh"]["last_error"]), (1, &serde_json::Value::Null));
    stage.pass(MINUTE);
    stage.refresh().send().await.assert_refused(502, "refresh_failed", "the same token again");
    assert_eq!(stage.status().await["refresh"]["last_error"].as_str().map(|e| e.contains("no fresher")), Some(true));
}

#[tokio::test]
async fn simultaneous_requests_share_one_run() {
    let cli = FakeCli::new("echo began >DIR/pipe; read go <DIR/go; cat DIR/answer");
    let pipe = cli.pipe();
    let go = cli.dir().join("go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let stage = on_request(&cli).await;
    stage.pass(MINUTE);
    cli.prints_token(&stage.fresh_token(HOUR));
    let first = stage.refresh().begin().await;
    soon("the CLI", pipe.line).await.expect("started");
    assert_eq!(stage.status().await["refresh"]["state"], "running");
    let mut others = Vec::new();
    for _ in 0..10 {
        others.push(stage.refresh().begin().await);
    }
    stage.caught_up().await;
    std::thread::spawn(move || std::fs::write(go, "go\n"));
    assert_eq!(first.reply().await.status, 200);
    for other in others {
        assert_eq!(other.reply().await.status, 200);
    }
    assert_eq!(cli.runs(), 1);
}

#[tokio::test]
async fn an_access_token_is_not_refreshed() {
    let cli = FakeCli::printing();
    let scene = Scene::new().toml("auth = \"access-token\"\nrefresh = \"cli\"").env("VERCEL_TOKEN", "vca_demo_session");
    let stage = scene.env("PATH", &cli.path()).start().await;
    let reply = stage.refresh().send().await;
    assert!(reply.status == 502 && reply.text().contains("VERCEL_TOKEN"), "{}", reply.text());
    assert_eq!(stage.status().await["refresh"]["mode"], "off");
}

#[tokio::test]
async fn the_command_uses_the_running_sidecar() {
    let cli = FakeCli::printing();
    let workspace = Workspace::new().await;
    // Without the variable, the port is known from the state file only.
    let refresh = || {
        let mut command = workspace.sidecar(&["refresh"]);
        command.env_remove("CONNECT_SIDECAR_PORT");
        run(command)
    };
    let ended = refresh().await;
    assert!(ended.code == Some(1) && ended.stderr.contains("no sidecar runs for"), "{ended:?}");
    let mut subject = Subject::development(&World::demo());
    subject.project = "web\u{9b}\u{202e}".into();
    write_private(
        &workspace.project().join(".env.local"),
        &env_file(&workspace.emulator.oidc_token_for(&subject, HOUR)),
    );
    cli.prints_token(&workspace.emulator.oidc_token_for(&subject, HOUR * 12));
    let mut serving = workspace.sidecar(&[]);
    serving.env("PATH", cli.path());
    let _serving = Serving::start(serving).await;
    let ended = refresh().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.starts_with(r"refreshed: acme/web\u{9b}\u{202e}, expires in 11 h 59 min"), "{ended:?}");
    let ended = refresh().await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("less than a minute ago"), "{ended:?}");
}
