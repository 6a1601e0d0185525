//! The registration of runs (`POST /_sidecar/v1/runs`) and the local CA.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use connect_sidecar::config::Config;
use connect_sidecar::config::args::GlobalArgs;
use connect_sidecar::daemon::app::App;
use connect_sidecar::daemon::server::handover::HeldSockets;
use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::os::clock::Clock;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::support::http::{APP, Request};
use crate::support::process::{assert_no_slice_of, run};
use crate::support::tunnel::{Run, ask, slack};
use crate::support::workspace::Workspace;
use crate::support::{Scene, Stage, env_file, instance_key, soon, write_private};

const API: &str = "api.vercel.com";

fn ca_dir(stage: &Stage) -> PathBuf {
    stage.dir().join("state/connect-sidecar/ca")
}

#[tokio::test]
async fn the_interception_port_and_the_ca_are_created_by_the_first_run() {
    let stage = Scene::new().start().await;
    let key = stage.key();
    let plain = ask(stage.addr, &key).json(r#"{"intercept":false}"#).send().await;
    assert_eq!(plain.status, 200, "{}", plain.text());
    plain.assert_safe();
    let json = plain.json();
    let names: Vec<_> = json.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(names, ["bearer_hosts", "key_required", "placeholder", "run"]);
    assert_eq!((&json["bearer_hosts"][0], &json["key_required"]), (&"ai-gateway.vercel.sh".into(), &false.into()));
    assert!(!ca_dir(&stage).exists());
    assert_eq!(stage.logs.count("intercepting"), 0);

    let (first, second) = (Run::of(&stage).await, Run::of(&stage).await);
    assert_eq!(stage.logs.count("intercepting"), 1);
    assert_eq!((first.addr, first.ca()), (second.addr, second.ca()));
    assert_ne!(first.authorization, second.authorization);
    assert_ne!(first.json["run"], second.json["run"]);
    assert_eq!(fs::metadata(ca_dir(&stage)).expect("a CA").permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn a_run_needs_the_key_and_is_refused_to_web_pages() {
    let stage = Scene::new().start().await;
    let key = stage.key();
    let good = ask(stage.addr, &key).json("{}");
    for (what, request, status, code) in [
        ("no key", good.clone().without("sidecar-key"), 401, "key_required"),
        ("another key", good.clone().header("sidecar-key", "x"), 401, "key_required"),
        ("a page", good.clone().header("origin", "http://localhost:3000"), 403, "browser_request_refused"),
        ("a page of ours", good.clone().header("sec-fetch-site", "cross-site"), 403, "browser_request_refused"),
        ("a form", good.clone().header("content-type", "text/plain"), 415, "json_required"),
        ("a query", good.clone().target("/_sidecar/v1/runs?x"), 400, "query_not_allowed"),
        ("no JSON", ask(stage.addr, &key).json("{"), 400, "bad_json"),
        ("another type", ask(stage.addr, &key).json(r#"{"intercept":1}"#), 400, "bad_json"),
        ("an unknown key", ask(stage.addr, &key).json(r#"{"x":true}"#), 400, "bad_json"),
        (
            "a question",
            Request::new(stage.addr, "GET", "/_sidecar/v1/runs").header("sidecar-key", &key),
            405,
            "method_not_allowed",
        ),
    ] {
        request.send().await.assert_refused(status, code, what);
    }
    assert!(!ca_dir(&stage).exists());
    assert_eq!(ask(stage.addr, &key).json("").send().await.status, 200, "no body means the defaults");
}

#[tokio::test]
async fn a_run_gets_no_part_of_the_credential() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let token = fs::read_to_string(stage.env_path()).expect("a file");
    let token = token.split('"').rfind(|part| part.starts_with("eyJ")).expect("a token");
    let [_, payload, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let response = run.json.to_string();
    assert!(!response.contains(payload), "the claims are in it, but in another encoding");
    assert_no_slice_of([signature], &response);
    let placeholder = run.json["placeholder"].as_str().expect("a placeholder");
    assert!(placeholder.ends_with(".connect-sidecar-placeholder"), "{placeholder}");
}

#[tokio::test]
async fn a_ca_that_others_can_access_is_not_used_until_fixed() {
    let stage = Scene::new().start().await;
    let key = stage.key();
    let (dir, file) = (ca_dir(&stage), ca_dir(&stage).join("key-and-certificate.pem"));
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    let refused = async |what: &str, hint: &str| {
        let reply = ask(stage.addr, &key).json("{}").send().await;
        reply.assert_refused(503, "interception_unavailable", what);
        assert!(reply.text().contains(hint), "{what}: {}", reply.text());
    };
    fs::create_dir_all(&dir).expect("a directory");
    set(&dir, 0o755);
    refused("an open directory", "chmod 700").await;
    set(&dir, 0o700);
    fs::write(&file, "").expect("a file");
    set(&file, 0o644);
    refused("an open key", "connect-sidecar ca remove").await;
    fs::remove_file(&file).expect("removed");
    std::os::unix::fs::symlink(stage.env_path(), &file).expect("a link");
    refused("a link", "is a link").await;
    assert_eq!(stage.token(APP).send().await.status, 200, "everything else works");
    assert_eq!(ask(stage.addr, &key).json(r#"{"intercept":false}"#).send().await.status, 200);
    fs::remove_file(&file).expect("removed");
    let run = Run::of(&stage).await;
    let mut opened = run.open(API).await;
    assert_eq!(opened.send(slack(&opened)).await.status, 200);
}

#[tokio::test]
async fn an_expiring_ca_is_replaced_by_the_next_run() {
    let stage = Scene::new().start().await;
    let first = Run::of(&stage).await;
    stage.pass(Duration::from_secs(84 * 24 * 3600));
    let second = Run::of(&stage).await;
    assert_ne!(first.ca(), second.ca());
    assert_eq!(first.addr, second.addr, "the port stays");
    assert!(second.open(API).await.stream.get_ref().1.peer_certificates().is_some());
    assert_eq!(stage.logs.count("intercepting"), 1);
}

#[tokio::test]
async fn a_replacement_sidecar_serves_the_runs_of_the_one_that_ended() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir(dir.path().join("web")).expect("a project");
    let emulator = Emulator::start(Options::default()).await.expect("an emulator");
    let token = emulator.oidc_token(Duration::from_secs(3600));
    write_private(&dir.path().join("web/.env.local"), &env_file(&token));
    let args = GlobalArgs {
        project: Some(dir.path().join("web")),
        port: Some("0".into()),
        upstream: Some(emulator.url()),
        ..GlobalArgs::default()
    };
    let home = dir.path().to_owned();
    let start = async |place: Option<&HeldSockets>| {
        let environment = |name: &str| (name == "HOME").then(|| home.clone().into_os_string());
        let config = Config::load(&args, &environment, dir.path()).expect("a configuration");
        let clock = Clock::system();
        let app = match place {
            Some(place) => App::take_over(config, clock, place.inherit().expect("a place")).await,
            None => App::bind(config, clock).await,
        };
        let app = app.expect("an app");
        let (addr, (stop, stopped)) = (app.addr(), oneshot::channel::<()>());
        let serving = tokio::spawn(app.serve(async {
            let _ = stopped.await;
        }));
        (addr, stop, serving)
    };
    let key_of = |addr: SocketAddr| instance_key(&dir.path().join(".local/state"), addr);
    let (addr, stop, serving) = start(None).await;
    let key = key_of(addr);
    let run = Run::begin(addr, &key, Clock::system().local()).await;
    let state = dir.path().join(".local/state/connect-sidecar");
    let mut place = HeldSockets::request(&state, addr.port()).await.expect("a place");
    drop(stop);
    assert!(serving.await.expect("no panic"));
    soon("the end", place.sidecar_ended()).await;
    assert!(TcpListener::bind(run.addr).await.is_err(), "no other program gets its port");

    let (successor, _stop, _serving) = start(Some(&place)).await;
    assert_eq!(successor, addr);
    assert_ne!(key_of(addr), key);
    let mut opened = run.open(API).await;
    assert_eq!(opened.send(slack(&opened)).await.status, 200);
}

#[tokio::test]
async fn the_ca_can_be_removed() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    workspace.begin_run(&serving).await;
    let dir = workspace.home.path().join(".local/state/connect-sidecar/ca");
    assert!(dir.exists());
    let removed = run(workspace.sidecar(&["ca", "remove"])).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert!(removed.stdout.contains(dir.to_str().expect("a path")), "{removed:?}");
    assert!(!dir.exists());
    let odd = workspace.home.path().join("\x1b[2J");
    fs::create_dir_all(odd.join("connect-sidecar/ca")).expect("a directory");
    let mut remove = workspace.sidecar(&["ca", "remove"]);
    remove.env("XDG_STATE_HOME", &odd);
    assert!(run(remove).await.stdout.ends_with("/\\u{1b}[2J/connect-sidecar/ca\n"));
    let again = run(workspace.sidecar(&["ca", "remove"])).await;
    assert_eq!((again.code, again.stdout.as_str()), (Some(0), "there is no local CA\n"));
}

#[tokio::test]
async fn a_command_is_not_started_with_a_ca_that_others_can_access() {
    let workspace = Workspace::new().await;
    let dir = workspace.home.path().join(".local/state/connect-sidecar/ca");
    let file = dir.join("key-and-certificate.pem");
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    let began = run(workspace.sidecar(&["run", "--", "echo", "begun"])).await;
    assert_eq!((began.code, began.stdout.as_str()), (Some(0), "begun\n"), "{began:?}");
    let refused = async |hint: &str| {
        let ended = run(workspace.sidecar(&["run", "--", "echo", "begun"])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
        assert!(ended.stderr.contains(hint), "{}", ended.stderr);
    };
    set(&file, 0o644);
    refused("connect-sidecar ca remove").await;
    set(&file, 0o600);
    set(&dir, 0o755);
    refused("chmod 700").await;
    set(&dir, 0o700);
    fs::rename(&file, workspace.home.path().join("elsewhere")).expect("moved");
    std::os::unix::fs::symlink(workspace.home.path().join("elsewhere"), &file).expect("a link");
    refused("is a link").await;
    let without = run(workspace.sidecar(&["run", "--no-intercept", "--", "echo", "begun"])).await;
    assert_eq!((without.code, without.stdout.as_str()), (Some(0), "begun\n"), "{without:?}");
}
