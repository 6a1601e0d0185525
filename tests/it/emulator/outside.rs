//! Environment variables and remote issuers: the emulator uses only those that the command line allows, whatever a
//! seed, a state file or the API names.

use std::path::Path;

use connect_sidecar::emulator::allowlist::Allowlist;
use connect_sidecar::emulator::seed;
use connect_sidecar::emulator::{Emulator, Options};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::command::{fetch_env_file, home};
use super::{OWNER, SEED, refusal, request};
use crate::support::http::{APP, Request};
use crate::support::process::{Ended, Serving, run, sidecar};

const LINK: &str = "links = [{ project = \"web\", environments = [\"development\"] }]";
const SECRET: &str = "value-of-the-variable";

/// A seed with a project and this connector.
fn seed_with(connector: &str) -> String {
    format!("[team]\nslug = \"acme\"\n[[members]]\nid = \"user_ada\"\n[[projects]]\nname = \"web\"\n{connector}\n")
}

/// The command with a seed, these flags, and a variable in its environment.
fn emulate(home: &TempDir, seed: &str, flags: &[&str]) -> Command {
    let path = home.path().join("seed.toml");
    std::fs::write(&path, seed).expect("written");
    let mut command = sidecar(home.path());
    command.args(["emulate", "--port", "0", "--seed"]).arg(path).args(flags).env("MAPS_KEY", SECRET);
    command
}

async fn refused(command: Command) -> Vec<String> {
    let Ended { code, stdout, stderr } = run(command).await;
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    assert!(!stderr.contains(SECRET), "{stderr}");
    stderr.lines().map(str::to_owned).collect()
}

/// The response to a token request for a connector.
async fn token_of(home: &TempDir, serving: &Serving, connector: &str) -> Value {
    let bearer = fetch_env_file(home, serving).await;
    let target = format!("/v1/connect/token/{connector}");
    let ask = Request::new(serving.addr, "POST", &target).json(APP);
    ask.header("authorization", &format!("Bearer {bearer}")).send().await.json()
}

#[tokio::test]
async fn a_seed_may_only_use_what_the_command_line_allows() {
    let home = home();
    let maps = format!("[[connectors]]\nuid = \"api-key/maps\"\n{LINK}\ndata = {{ api_key_env = \"MAPS_KEY\" }}");
    let more = format!(
        "{maps}\n[[connectors]]\nuid = \"oauth/mine\"\n{LINK}\n[connectors.data]\nissuer = \"https://login.example\"\n\
         client_id = \"x\"\nclient_secret_env = \"HOME\"\n[[sessions]]\ntoken = \"t\"\nuser = \"user_x\""
    );
    for (flags, says) in [
        (
            &[][..],
            &[
                "seed.toml:10: `api_key_env` names a variable of your environment: allow it with --secret-from-env MAPS_KEY",
                "seed.toml:15: the provider \"https://login.example\" is not on this machine: allow it with --allow-issuer",
                "seed.toml:17: `client_secret_env` names a variable of your environment: allow it with --secret-from-env HOME",
                "seed.toml:20: there is no member `user_x`",
            ][..],
        ),
        (
            &["--secret-from-env", "HOME", "--secret-from-env", "NONE", "--allow-issuer", "http://login.example"],
            &[
                "--secret-from-env NONE: ",
                "--allow-issuer http://login.example: ",
                "MAPS_KEY",
                "--allow-issuer URL",
                "user_x",
            ],
        ),
        (
            &["--secret-from-env", "HOME", "--secret-from-env", "MAPS_KEY", "--allow-issuer", "https://login.example/"],
            &["user_x"],
        ),
    ] {
        let lines = refused(emulate(&home, &seed_with(&more), flags)).await;
        assert_eq!(lines.len(), says.len(), "{flags:?}: {lines:#?}");
        for (line, part) in lines.iter().zip(says) {
            assert!(line.starts_with("error: ") && line.contains(part), "{line}, not {part}");
        }
    }
    let allowed = emulate(&home, &seed_with(&maps), &["--secret-from-env", "MAPS_KEY"]);
    let mut serving = Serving::start(allowed).await;
    serving.wait_for_log("the sidecar ").await;
    assert_eq!(token_of(&home, &serving, "api-key%2Fmaps").await["token"], SECRET);
}

#[tokio::test]
async fn a_state_file_may_only_use_what_the_command_line_allows() {
    let home = home();
    let maps = format!("[[connectors]]\nuid = \"api-key/maps\"\n{LINK}\ndata = {{ api_key_env = \"MAPS_KEY\" }}");
    let state = home.path().join("state.json");
    let state = state.to_str().expect("a path");
    let flags = ["--state", state, "--secret-from-env", "MAPS_KEY"];
    let mut serving = Serving::start(emulate(&home, &seed_with(&maps), &flags)).await;
    serving.wait_for_log("the sidecar ").await;
    serving.stop().await;
    assert!(Path::new(state).exists());
    let lines = refused(emulate(&home, &seed_with(&maps), &flags[..2])).await;
    assert!(lines.len() == 1 && lines[0].contains("--secret-from-env MAPS_KEY"), "{lines:?}");
    let serving = Serving::start(emulate(&home, &seed_with(&maps), &flags)).await;
    serving.stop().await;
}

#[tokio::test]
async fn the_api_may_not_name_a_variable() {
    let more = format!(
        "[[connectors]]\nuid = \"oauth/mine\"\n{LINK}\ndata = {{ client_id = \"x\", client_secret_env = \"MAPS_KEY\" }}\n\
         [[connectors]]\nuid = \"api-key/plain\"\n{LINK}"
    );
    let allowlist = || Allowlist::new([("MAPS_KEY".to_owned(), SECRET.into())].into(), Vec::new());
    let world = seed::read_with(&format!("{SEED}\n{more}"), &allowlist()).unwrap_or_else(|e| panic!("{e}"));
    let options = Options { world, allowlist: allowlist(), ..Options::default() };
    let emulator = Emulator::start(options).await.expect("an emulator");
    let of = |connector: &str| format!("/v1/connect/connectors/{connector}");
    let before = emulator.read(|world| world.connectors.clone());
    for variable in ["MAPS_KEY", "PATH"] {
        for key in ["api_key_env", "client_secret_env", "private_key_env"] {
            let create = json!({"service": "api-key", "name": "mine", "projectId": "web", "data": {key: variable}});
            let update = json!({"data": {key: variable}});
            for (method, target, body) in [
                ("POST", "/v1/connect/connectors", &create),
                ("POST", "/v1/connect/connectors/managed", &create),
                ("POST", "/v2/connect/connectors", &create),
                ("PATCH", &of("api-key%2Fplain"), &update),
                ("PATCH", &of("oauth%2Fmine").replace("v1", "v2"), &update),
            ] {
                let (status, code, message) =
                    refusal(request(&emulator, OWNER, method, target).json(&body.to_string())).await;
                assert!(
                    matches!((status, &*code), (400, "bad_request") | (404, "not_found")),
                    "{method} {target} {body}: {status} {code} {message}"
                );
                assert!(status == 404 || message.contains("--secret-from-env"), "{message}");
            }
        }
    }
    for (connector, issuer, says) in [
        ("oauth%2Fmine", "http://127.0.0.1:9", "by the seed"),
        ("oauth%2Flinear", "https://evil.example", "--allow-issuer"),
    ] {
        for key in ["issuer", "service_url"] {
            let body = json!({"data": {key: issuer}}).to_string();
            let (status, _, message) = refusal(request(&emulator, OWNER, "PATCH", &of(connector)).json(&body)).await;
            assert!(status == 400 && message.contains(says), "{connector} {key}: {status} {message}");
        }
    }
    assert_eq!(emulator.read(|world| world.connectors.clone()), before);
    let taken = json!({"data": {"api_key": "made-up"}}).to_string();
    assert_eq!(request(&emulator, OWNER, "PATCH", &of("api-key%2Fplain")).json(&taken).send().await.status, 200);
}
