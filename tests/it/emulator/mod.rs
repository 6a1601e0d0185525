//! The emulator of Vercel Connect without a sidecar: authorization, the real clients, faults, and the `emulate`
//! command.

mod callers;
mod clients;
mod command;
mod consents;
mod document;
mod faults;
mod gates;
mod outside;
mod recorded_requests;
mod vercel;

use connect_sidecar::emulator::seed;
use connect_sidecar::emulator::{Emulator, Options};

use crate::support::http::{Reply, Request};

/// The token route of the connector that works.
pub const SLACK: &str = "/v1/connect/token/slack%2Facme-slack";
/// The owner's CLI session.
pub const OWNER: &str = "vca_owner";

/// Two projects, a member of each role, and credentials for each.
pub const SEED: &str = r#"
[team]
slug = "acme"

[[members]]
id = "user_ada"
[[members]]
id = "user_mem"
role = "member"
[[members]]
id = "user_dev"
role = "developer"
[[members]]
id = "user_eve"
role = "viewer"
[[members]]
id = "user_sec"
role = "viewer"
may = ["view", "revoke"]

[[projects]]
name = "web"
env = { MOTD = "hello" }
[[projects]]
name = "worker"

[[connectors]]
uid = "slack/acme-slack"
links = [{ project = "web", environments = ["development", "production"] }]
installations = [{ id = "inst_acme", tenant = "T0ACME" }]
granted_to = ["user_ada", "user_dev", "app_user_1"]
[[connectors]]
uid = "oauth/linear"
granted_to = ["user_ada"]

[[access_tokens]]
token = "vcp_web"
user = "user_ada"
project = "web"
[[access_tokens]]
token = "vcp_worker"
user = "user_ada"
project = "worker"
[[access_tokens]]
token = "vcp_team"
user = "user_ada"

[[sessions]]
token = "vca_owner"
user = "user_ada"
[[sessions]]
token = "vca_member"
user = "user_mem"
[[sessions]]
token = "vca_developer"
user = "user_dev"
[[sessions]]
token = "vca_viewer"
user = "user_eve"
[[sessions]]
token = "vca_security"
user = "user_sec"
"#;

/// An emulator with [`SEED`] and `more`.
pub async fn emulator(more: &str) -> Emulator {
    let world = seed::read(&format!("{SEED}\n{more}")).unwrap_or_else(|e| panic!("{e}"));
    Emulator::start(Options { world, ..Options::default() }).await.expect("an emulator")
}

/// A request with this bearer token.
pub fn request(emulator: &Emulator, bearer: &str, method: &str, target: &str) -> Request {
    Request::new(emulator.addr(), method, target).header("authorization", &format!("Bearer {bearer}"))
}

/// Sends a request and returns status, code and message of the response.
pub async fn refusal(request: Request) -> (u16, String, String) {
    let reply = request.send().await;
    let error = &reply.json()["error"];
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    (reply.status, text("code"), text("message"))
}

/// Sends a request to the admin API.
pub async fn admin(emulator: &Emulator, method: &str, route: &str, body: &str) -> Reply {
    Request::new(emulator.addr(), method, &format!("/_emulator/{route}")).json(body).send().await
}
