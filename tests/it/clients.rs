//! Real HTTP clients as processes: `curl`, Node's `fetch`, Python's `urllib`. They set their own headers, choose
//! between IPv4 and IPv6, and frame bodies differently.

use tokio::process::Command;

use crate::support::http::APP;
use crate::support::process::run;
use crate::support::{SLACK, Scene, Stage};

/// Prints `<status> <body>` for a JSON POST; arguments: URL, body.
const NODE: &str = r#"
const [url, body] = process.argv.slice(1);
const reply = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body });
console.log(reply.status, await reply.text());
"#;
const PYTHON: &str = r#"
import sys, urllib.error, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
try:
    reply = urllib.request.urlopen(request, timeout=20)
except urllib.error.HTTPError as error:
    reply = error
print(reply.status, reply.read().decode())
"#;
const CURL: [&str; 6] = ["--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"];

/// A program of this machine without this process's environment, such as its proxy variables.
fn tool(name: &str, install: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    assert!(is_there, "this test runs `{name}`, which is not on the PATH: install {install}");
    let mut command = Command::new(name);
    command.env_clear().env("PATH", path).envs(std::env::var_os("HOME").map(|home| ("HOME", home))).kill_on_drop(true);
    command
}

/// The response that a client received.
#[derive(Debug)]
pub struct ClientResponse {
    pub status: u16,
    pub body: String,
}

impl ClientResponse {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

pub async fn curl(arguments: &[&str]) -> ClientResponse {
    let mut command = tool("curl", "curl 7.82 or later");
    command.args(CURL).args(arguments);
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
    let (body, status) = ended.stdout.rsplit_once('\n').expect("a status");
    ClientResponse { status: status.parse().expect("a number"), body: body.into() }
}

async fn script(mut command: Command, url: &str, body: &str) -> ClientResponse {
    command.args([url, body]);
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (status, body) = ended.stdout.trim_end().split_once(' ').expect("status and body");
    ClientResponse { status: status.parse().expect("a number"), body: body.into() }
}

#[derive(Debug, Clone, Copy)]
pub enum Client {
    CurlData,
    CurlJson,
    Node,
    Python,
}

impl Client {
    pub const ALL: [Self; 4] = [Self::CurlData, Self::CurlJson, Self::Node, Self::Python];

    pub async fn post(self, url: &str, body: &str) -> ClientResponse {
        match self {
            Self::CurlData => curl(&["-H", "content-type: application/json", "-d", body, url]).await,
            Self::CurlJson => curl(&["--json", body, url]).await,
            Self::Node => {
                let mut command = tool("node", "Node.js 18 or later");
                command.args(["--input-type=module", "--eval", NODE, "--"]);
                script(command, url, body).await
            }
            Self::Python => {
                let mut command = tool("python3", "Python 3");
                command.args(["-c", PYTHON]);
                script(command, url, body).await
            }
        }
    }
}

/// All origins by which an app may reach the sidecar.
fn origins(stage: &Stage) -> [String; 3] {
    ["127.0.0.1", "localhost", "[::1]"].map(|host| format!("http://{host}:{}", stage.addr.port()))
}

#[tokio::test]
async fn each_client_gets_a_token_a_typed_error_and_a_refusal() {
    let stage = Scene::new().start().await;
    let origin = &origins(&stage)[0];
    for client in Client::ALL {
        let token = client.post(&format!("{origin}{SLACK}"), APP).await;
        assert_eq!(token.status, 200, "{client:?}: {token:?}");
        assert!(token.json()["token"].as_str().is_some_and(|t| t.starts_with("xoxe.xoxb-")), "{client:?}: {token:?}");

        let error = client.post(&format!("{origin}/v1/connect/token/slack%2Fnot-installed"), APP).await;
        let code = &error.json()["error"]["code"];
        assert_eq!((error.status, code.as_str()), (422, Some("client_installation_required")), "{client:?}");

        let refusal = client.post(&format!("{origin}/v1/connect/token/slack/acme-slack"), APP).await;
        let json = refusal.json();
        assert_eq!((refusal.status, json["error"]["code"].as_str()), (404, Some("route_not_found")), "{client:?}");
        assert_eq!(json["error"]["hint"], SLACK, "{client:?}");
    }
    assert_eq!(stage.emulator.count("acme-slack"), 1, "all clients share one token");
}

#[tokio::test]
async fn every_client_reaches_the_sidecar_by_every_loopback_name() {
    let stage = Scene::new().start().await;
    let has_ipv6 = tokio::net::TcpListener::bind("[::1]:0").await.is_ok();
    for origin in origins(&stage).iter().filter(|origin| has_ipv6 || !origin.contains("::1")) {
        for client in Client::ALL {
            let token = client.post(&format!("{origin}{SLACK}"), APP).await;
            assert_eq!(token.status, 200, "{client:?} {origin}: {token:?}");
        }
    }
}

#[tokio::test]
async fn curl_without_a_json_content_type_gets_a_hint() {
    let stage = Scene::new().start().await;
    let url = format!("http://{}{SLACK}", stage.addr);
    for arguments in [&["-d", "{}", &url][..], &["-X", "POST", &url]] {
        let refusal = curl(arguments).await;
        let json = refusal.json();
        assert_eq!((refusal.status, json["error"]["code"].as_str()), (415, Some("json_required")), "{arguments:?}");
        assert_eq!(json["error"]["hint"], "-H 'content-type: application/json'");
    }
    assert!(stage.emulator.received().is_empty());
}

#[tokio::test]
async fn a_client_that_sends_too_much_can_read_the_error() {
    let stage = Scene::new().start().await;
    let body = format!("{{\"a\":\"{}\"}}", "x".repeat(120_000));
    for client in Client::ALL {
        let refusal = client.post(&format!("http://{}{SLACK}", stage.addr), &body).await;
        let json = refusal.json();
        assert_eq!((refusal.status, json["error"]["code"].as_str()), (413, Some("body_too_large")), "{client:?}");
    }
}
