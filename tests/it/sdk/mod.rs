//! Connect's real SDK in an unmodified app through the preload, on each Node.js version and in all kinds of processes.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use connect_sidecar::emulator::fault::Fault;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::preload::app;
use crate::support::process::run;
use crate::support::{Scene, Stage, npm, soon};

const CALLS: &str = include_str!("calls.mjs");
const ASKED: &str = include_str!("asked.mjs");
/// A CommonJS program that sends one request.
const ONCE: &str = r#"
import("@vercel/connect").then(async ({ getToken }) => {
  console.log(await getToken("slack/acme-slack", { subject: { type: "app" } }));
  process.disconnect?.();
});
"#;

/// A project with the SDK and a Node.js version.
struct Project {
    dir: TempDir,
    node: PathBuf,
}

impl Project {
    /// `None` if either cannot be installed.
    async fn new(node: &str, sdk: &str) -> Option<Self> {
        let (node, sdk) = (npm::node(node).await?, npm::connect_sdk(sdk).await?);
        let dir = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(sdk, dir.path().join("node_modules")).expect("a link");
        for (name, content) in [
            ("calls.mjs", CALLS),
            ("asked.mjs", ASKED),
            ("once.js", ONCE),
            ("package.json", r#"{"private":true,"scripts":{"once":"node once.js"}}"#),
        ] {
            std::fs::write(dir.path().join(name), content).expect("a file");
        }
        Some(Self { dir, node })
    }

    /// A command in the project with the environment that `run` sets.
    fn command(&self, stage: &Stage, program: &str, arguments: &[&str]) -> Command {
        let mut command = app(stage, program, self.dir.path(), &self.node);
        command.args(arguments).env("NO_UPDATE_NOTIFIER", "1");
        command
    }

    /// Runs a command and returns its output.
    async fn printed(&self, stage: &Stage, program: &str, arguments: &[&str]) -> String {
        let ended = run(self.command(stage, program, arguments)).await;
        assert_eq!(ended.code, Some(0), "{program} {arguments:?}: {ended:?}");
        ended.stdout.trim_end().to_owned()
    }
}

/// Runs all calls of an SDK version on a Node.js version and checks the results and the number of upstream requests.
async fn every_call_is_served(node: &str, sdk: &str) {
    let Some(project) = Project::new(node, sdk).await else { return };
    let stage = Scene::new().start().await;
    stage.emulator.inject(Fault::status(404, "no_token").on("no-token"));
    stage.emulator.inject(Fault::status(422, "connector_installation_required").on("renamed"));
    let printed = project.printed(&stage, "node", &["calls.mjs"]).await;
    let results: Value = serde_json::from_str(&printed).expect("JSON");
    let of = |name: &str, cost: u64| {
        assert_eq!(results[name]["cost"], cost, "{name} on Node.js {node}: {results:#}");
        &results[name]["value"]
    };
    let token = |name: &str, cost: u64| of(name, cost).as_str().unwrap_or_else(|| panic!("{name}: {results:#}"));

    let first = token("getToken", 1);
    assert!(first.starts_with("xoxe.xoxb-"), "{first}");
    assert_eq!(of("getTokenResponse", 0)["token"], first);
    let forced = token("forceRefresh", 1);
    let after_rejection = token("rejected", 1);
    assert_eq!(token("worker", 0), after_rejection, "another thread shares it");
    assert_eq!(of("atOnce", 1), &json!(1), "the SDK makes a request of each, the sidecar one of all");
    assert!(token("user", 1).starts_with("xoxe.xoxp-"));
    let consents = format!("{}/api/v1/connect/authorize/", stage.emulator.url());
    assert!(of("startAuthorization", 1)["url"].as_str().is_some_and(|url| url.starts_with(&consents)));
    assert_eq!(of("getConnectorMetadata", 1)["uid"], "slack/acme-slack");
    assert_eq!(of("revokeToken", 1), "revoked");
    let after_revocation = token("after revokeToken", 1);
    let tokens = std::collections::BTreeSet::from([first, forced, after_rejection, after_revocation]);
    assert_eq!(tokens.len(), 4, "each is another one: {results:#}");

    for (name, class, code, status) in [
        ("not linked", "ConnectError", "forbidden", 403),
        ("not enabled", "ConnectError", "forbidden", 403),
        ("not installed", "ConnectorInstallationRequiredError", "client_installation_required", 422),
        ("not installed, newer", "ConnectorInstallationRequiredError", "connector_installation_required", 422),
        ("not authorized", "UserAuthorizationRequiredError", "user_authorization_required", 422),
        ("no token", "NoValidTokenError", "no_token", 404),
        ("not found", "ConnectError", "not_found", 404),
    ] {
        let error = of(name, 1);
        let shown = (&error["class"], &error["code"], &error["status"], &error["isConnectError"]);
        assert_eq!(shown, (&json!(class), &json!(code), &json!(status), &json!(true)), "{name}: {results:#}");
    }
    assert_eq!(of("percent", 0)["code"], "bad_connector", "what is encoded twice is refused here");

    let last = project.printed(&stage, "node", &["once.js"]).await;
    assert_eq!(last, after_revocation, "another process shares it");
    let before = stage.emulator.received().len();
    for (program, arguments) in [
        ("npm", ["run", "--silent", "once"].as_slice()),
        ("npx", &["--no", "-c", "node once.js"]),
        ("node", &["-e", "require('node:child_process').fork('once.js')"]),
        (
            "node",
            &["-e", "const c = require('node:cluster'); c.setupPrimary({ exec: 'once.js', execArgv: [] }); c.fork()"],
        ),
    ] {
        assert_eq!(project.printed(&stage, program, arguments).await, last, "{program} {arguments:?} on {node}");
    }
    project.printed(&stage, "node", &["--test", "once.js"]).await;
    assert_eq!(stage.emulator.received().len(), before);
    for request in stage.emulator.received() {
        assert!(request.headers["authorization"].to_str().is_ok_and(|bearer| !bearer.contains("placeholder")));
    }
    assert_eq!(stage.logs.count("dropped"), 0, "no app has a credential of its own: {:#?}", stage.logs.lines());
}

#[tokio::test]
async fn every_call_is_served_on_node_18() {
    every_call_is_served(npm::NODES[0], "2.3.2").await;
}

#[tokio::test]
async fn every_call_is_served_on_node_20() {
    every_call_is_served(npm::NODES[1], "2.3.2").await;
}

#[tokio::test]
async fn every_call_is_served_on_node_22() {
    every_call_is_served(npm::NODES[2], "2.3.2").await;
}

#[tokio::test]
async fn every_call_is_served_on_node_24() {
    every_call_is_served(npm::NODES[3], "2.3.2").await;
}

#[tokio::test]
async fn serves_every_call_of_an_older_sdk() {
    every_call_is_served(npm::NODES[2], "0.7.0").await;
}

#[tokio::test]
async fn an_app_outlives_its_token_and_gets_a_hint() {
    let Some(project) = Project::new(npm::NODES[3], "2.3.2").await else { return };
    let mut stage = Scene::new().start().await;
    let mut app = project.command(&stage, "node", &["asked.mjs"]).stdin(Stdio::piped()).spawn().expect("a process");
    let mut stdin = app.stdin.take().expect("stdin");
    let mut stdout = BufReader::new(app.stdout.take().expect("stdout")).lines();
    let mut ask = async |how: &str| -> Value {
        stdin.write_all(format!("{how}\n").as_bytes()).await.expect("it reads");
        let line = soon("an answer", stdout.next_line()).await.expect("text").expect("a line");
        serde_json::from_str(&line).expect("JSON")
    };
    let first = ask("").await;
    assert!(first.as_str().is_some_and(|token| token.starts_with("xoxe.xoxb-")), "{first}");

    let rotated = stage.fresh_token(DEVELOPMENT_LIFE + Duration::from_secs(1));
    stage.write_env(&rotated);
    stage.uses(&rotated).await;
    let second = ask("anew").await;
    assert!(second.is_string() && second != first, "{second}");
    let received = stage.emulator.received();
    assert_eq!(received.last().expect("a request").headers["authorization"], format!("Bearer {rotated}"));
    assert_eq!(stage.emulator.count("/v1/connect/token/"), 2);

    stage.pass(Duration::from_secs(13 * 3600));
    let error = ask("anew").await;
    assert_eq!((&error["name"], &error["code"]), (&json!("ConnectError"), &json!("oidc_token_expired")), "{error}");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("Run `vercel env pull`")), "{error}");
    assert_eq!(stage.emulator.count("/v1/connect/token/"), 2, "nobody is asked with it");

    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let third = ask("anew").await;
    assert!(third.is_string() && third != second, "{third}");
}
