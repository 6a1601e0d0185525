//! Connect's real SDK for Python in an unmodified program through interception: `run` only sets a proxy and a
//! certificate file.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::process::run;
use crate::support::python;
use crate::support::workspace::Workspace;

const CALLS: &str = include_str!("calls.py");

/// Runs all calls of the synchronous or the asynchronous API and checks the results and the upstream requests.
async fn every_call_is_served(half: &str) {
    let Some(python) = python::connect_sdk().await else { return };
    let workspace = Workspace::new().await;
    let python = python.to_str().expect("a path");
    let ended = run(workspace.sidecar(&["run", "--", python, "-c", CALLS, half])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let results: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let of = |name: &str, cost: u64| {
        assert_eq!(results[name]["cost"], cost, "{name}: {results:#}");
        &results[name]["value"]
    };
    let token = |name: &str, cost: u64| of(name, cost).as_str().unwrap_or_else(|| panic!("{name}: {results:#}"));

    let first = token("get_token", 1);
    assert!(first.starts_with("xoxe.xoxb-"), "{first}");
    assert_eq!(token("again", 0), first);
    let forced = token("force_refresh", 1);
    let after_rejection = token("rejected", 1);
    let later = token("rejected later", 1);
    assert!(token("user", 1).starts_with("xoxe.xoxp-"));
    assert!(token("start_authorization", 1).starts_with(&format!("{}/api/v1/connect/", workspace.emulator.url())));
    assert_eq!(of("get_connector_metadata", 1), "slack/acme-slack");
    assert_eq!(of("revoke_token", 1), &Value::Null);
    let after_revocation = token("after revoke_token", 1);
    let tokens = BTreeSet::from([first, forced, after_rejection, later, after_revocation]);
    assert_eq!(tokens.len(), 5, "each is another one: {results:#}");
    for (name, class, code, status) in [
        ("not linked", "ConnectApiError", "forbidden", 403),
        ("not installed", "ConnectorInstallationRequiredError", "client_installation_required", 422),
        ("not authorized", "UserAuthorizationRequiredError", "user_authorization_required", 422),
        ("not found", "ConnectNotFoundError", "not_found", 404),
    ] {
        assert_eq!(of(name, 1), &json!({"class": class, "code": code, "status": status}), "{name}: {results:#}");
    }
}

#[tokio::test]
async fn serves_every_synchronous_call() {
    every_call_is_served("sync").await;
}

#[tokio::test]
async fn serves_every_asynchronous_call() {
    every_call_is_served("async").await;
}
