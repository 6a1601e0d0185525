//! `connect-sidecar emulate`, started as a user starts it.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;

use connect_sidecar::emulator::fault::ScriptKind;
use connect_sidecar::emulator::seed;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::process::Command;

use super::SLACK;
use crate::support::http::{APP, Request};
use crate::support::npm;
use crate::support::process::{Serving, isolated, run, sidecar};

pub fn home() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// The command with this home directory and a free port.
fn emulate(home: &TempDir, arguments: &[&str]) -> Command {
    let mut command = sidecar(home.path());
    command.args(["emulate", "--port", "0"]).args(arguments).env("TMPDIR", home.path());
    command
}

/// Starts the command and waits for its output.
pub async fn start(home: &TempDir, arguments: &[&str]) -> Serving {
    let mut serving = Serving::start(emulate(home, arguments)).await;
    serving.wait_for_log("the sidecar ").await;
    serving
}

/// The value after a name in the output.
fn line<'s>(serving: &'s Serving, name: &str) -> &'s str {
    let line = serving.log().lines().find_map(|line| line.strip_prefix("  ")?.strip_prefix(name));
    line.unwrap_or_else(|| panic!("{name}: {}", serving.log())).trim()
}

async fn shell(home: &TempDir, line: &str) -> crate::support::process::Ended {
    let mut command = isolated("sh", home.path());
    command.args(["-c", line]);
    run(command).await
}

/// The token in an env file.
fn token(env_file: &str) -> &str {
    env_file.split('"').nth(1).expect("a token")
}

/// Runs the printed command for an env file and returns the token in it.
pub async fn fetch_env_file(home: &TempDir, serving: &Serving) -> String {
    let curl = line(serving, "an env file").to_owned();
    assert_eq!(shell(home, &curl).await.code, Some(0), "{curl}");
    token(&std::fs::read_to_string(home.path().join(".env.local")).expect("an env file")).to_owned()
}

#[tokio::test]
async fn the_printed_commands_work_as_printed() {
    let home = home();
    let serving = start(&home, &[]).await;
    assert_eq!(serving.ready_line, format!("connect-sidecar emulator listening on http://{}", serving.addr));
    let token = fetch_env_file(&home, &serving).await;
    let ask = Request::new(serving.addr, "POST", SLACK).json(APP);
    let reply = ask.header("authorization", &format!("Bearer {token}")).send().await;
    assert!(reply.token().starts_with("xoxe.xoxb-"));
    assert_eq!(line(&serving, "the sidecar"), format!("connect-sidecar --upstream http://{}", serving.addr));
    assert_eq!(line(&serving, ".vercel/project.json"), r#"{"projectId":"prj_web","orgId":"team_acme"}"#);
    let cli: Vec<_> = line(&serving, "the Vercel CLI").split(' ').collect();
    let ["vercel", "--api", url, "--token", session, args @ ..] = cli.as_slice() else { panic!("{cli:?}") };
    let Some(program) = npm::vercel_cli().await else { return };
    let listed = run(npm::vercel(&program, url, session, home.path(), args)).await;
    assert!(listed.code == Some(0) && listed.stderr.contains("slack/acme-slack"), "{listed:?}");
}

#[tokio::test]
async fn the_ca_file_is_removed_when_the_emulator_ends() {
    let home = home();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let serving = start(&home, &["--tls"]).await;
        assert_eq!(serving.ready_line, format!("connect-sidecar emulator listening on https://{}", serving.addr));
        let ca = line(&serving, "its CA").to_owned();
        let curl = line(&serving, "an env file").to_owned();
        assert!(curl.contains(&format!(" --cacert {ca} ")), "{curl}");
        let ran = shell(&home, &curl).await;
        assert_eq!(ran.code, Some(0), "{curl}\n{}", ran.stderr);
        assert!(line(&serving, "the sidecar").ends_with(&format!(" --upstream-ca {ca}")));
        serving.signal(signal);
        let ended = serving.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{signal}: {}", ended.stderr);
        assert!(!std::path::Path::new(&ca).parent().expect("a directory").exists(), "{signal}: {ca}");
    }
}

#[tokio::test]
async fn the_state_survives_a_restart_with_its_credentials_and_without_its_seed() {
    let home = home();
    let (seed, state) = (home.path().join("seed.toml"), home.path().join("state.json"));
    let example = run(emulate(&home, &["--example-seed"])).await;
    assert_eq!((example.code, example.stdout.as_str()), (Some(0), seed::EXAMPLE));
    std::fs::write(&seed, example.stdout).expect("written");
    let arguments = ["--seed", seed.to_str().expect("a path"), "--state", state.to_str().expect("a path")];

    let first = start(&home, &arguments).await;
    assert!(first.log().contains("as seeded by"), "{}", first.log());
    let get = async |serving: &Serving, path: &str| Request::new(serving.addr, "GET", path).send().await;
    let env_file = get(&first, "/_emulator/env.local").await.text();
    let bearer = format!("Bearer {}", token(&env_file));
    let revoke = Request::new(first.addr, "DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens").json("{}");
    let revoked = revoke.header("authorization", &bearer).send().await;
    assert_eq!(revoked.json()["deleted"], 1, "{}", revoked.text());
    // SIGKILL: everything that was confirmed must be saved already.
    first.signal(Signal::SIGKILL);
    first.end().await;

    std::fs::remove_file(&seed).expect("removed");
    let second = start(&home, &arguments).await;
    assert!(second.log().contains("as it was kept in"), "{}", second.log());
    let user = r#"{"subject":{"type":"user","id":"user_ada"}}"#;
    for (body, status) in [(APP, 200), (user, 422)] {
        let ask = Request::new(second.addr, "POST", SLACK).json(body).header("authorization", &bearer);
        assert_eq!(ask.send().await.status, status, "{body}");
    }
    second.stop().await;
    std::fs::write(&state, "{").expect("written");
    let ended = run(emulate(&home, &arguments)).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains("state.json") && ended.stderr.contains("remove it"), "{}", ended.stderr);
}

#[tokio::test]
async fn all_mistakes_in_seed_and_flags_are_reported_with_exit_code_2() {
    let home = home();
    let seed = home.path().join("seed.toml");
    std::fs::write(&seed, "[team]\nslug = \"acme\"\nsulg = \"x\"\n[[sessions]]\ntoken = \"t\"\nuser = \"user_x\"\n")
        .expect("written");
    let seed = seed.to_str().expect("a path");
    for (arguments, says) in [
        (&["--seed", seed][..], &["seed.toml:3: unknown field `sulg`", "seed.toml:6: there is no member `user_x`"][..]),
        (&["--seed", "none.toml"], &["could not read none.toml"]),
        (&["--upstream", "http://127.0.0.1:1", "--require-key"], &["--upstream: ", "--require-key: "]),
    ] {
        let ended = run(emulate(&home, arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
        let lines: Vec<_> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), says.len(), "{lines:#?}");
        for (line, part) in lines.iter().zip(says) {
            assert!(line.starts_with("error: ") && line.contains(part), "{line}, not {part}");
        }
    }
}

#[tokio::test]
async fn a_taken_port_gives_exit_code_3() {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let port = listener.local_addr().expect("an address").port().to_string();
    let home = home();
    let mut command = sidecar(home.path());
    command.args(["emulate", "--port", &port]);
    let ended = run(command).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains(&port) && ended.stderr.contains("--port"), "{}", ended.stderr);
}

#[tokio::test]
async fn the_seed_sets_rate_limits() {
    let home = home();
    let serving = start(&home, &[]).await;
    let metadata = Request::new(serving.addr, "GET", "/v1/connect/connectors/slack%2Facme-slack")
        .header("authorization", "Bearer vca_demo_session");
    let mut client = crate::support::http::KeptAlive::to(serving.addr).await;
    for n in 0..200 {
        assert_eq!(client.send(&metadata).await.status, 200, "{n}");
    }
    assert_eq!(client.send(&metadata).await.status, 429);
}

#[tokio::test]
async fn the_help_lists_each_fault_with_its_parameters() {
    let home = home();
    let help = run(emulate(&home, &["--help"])).await.stdout;
    let (_, faults) = help.split_once("\nFaults, ").expect("a list");
    for (_, name, takes) in ScriptKind::ALL {
        let line = faults.lines().find(|line| line.trim_start().split(' ').next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("{name}: {faults}"));
        // `retry_after` is documented once for all errors.
        let own = takes.split('`').skip(1).step_by(2).filter(|parameter| *parameter != "retry_after");
        assert!(own.into_iter().all(|parameter| line.contains(&format!("`{parameter}`"))), "{line}");
    }
    assert!(faults.contains("`on`") && faults.contains("`times`") && faults.contains("`retry_after`"), "{faults}");
}

#[tokio::test]
async fn the_printed_command_makes_an_env_file_only_its_owner_can_read() {
    let home = home();
    let serving = start(&home, &[]).await;
    fetch_env_file(&home, &serving).await;
    let mode = std::fs::metadata(home.path().join(".env.local")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
