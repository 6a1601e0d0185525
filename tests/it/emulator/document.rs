//! The OpenAPI document against the emulator's responses: schemathesis generates valid and invalid requests from the
//! document and checks that every response is documented.

use std::path::Path;
use std::time::Duration;

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;

use super::{OWNER, admin, emulator};
use crate::support::process::isolated;
use crate::support::python;

/// A connector of each type and two that requests may change. `fuzz.py` knows their names.
const CONNECTORS: [&str; 6] =
    ["github/app", "snowflake/dw", "salesforce/crm", "api-key/maps", "slack/spare", "oauth/spare"];

/// The checks on a response.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// An emulator with a connector of each type.
async fn every_kind() -> Emulator {
    let installed = "installations = [{ id = \"inst_acme\", tenant = \"T0ACME\" }]\ngranted_to = [\"user_ada\"]\n";
    let linked = "links = [{ project = \"web\", environments = [\"development\", \"production\"] }]\n";
    let seeds = CONNECTORS.map(|uid| format!("[[connectors]]\nuid = \"{uid}\"\n{linked}{installed}"));
    emulator(&seeds.concat()).await
}

/// Runs schemathesis with a bearer token on the operations that the flags `which` select.
async fn fuzz(emulator: &Emulator, python: &Path, bearer: &str, which: &[&str]) {
    let home = tempfile::tempdir().expect("a directory");
    std::fs::write(home.path().join("fuzz.py"), include_str!("fuzz.py")).expect("written");
    let url = emulator.url();
    let (document, header) = (format!("{url}/_emulator/openapi.json"), format!("Authorization: Bearer {bearer}"));
    let mut command = isolated(python.to_str().expect("a path"), home.path());
    command.args(["-m", "schemathesis.cli", "run", &document, "--url", &url, "--header", &header]);
    command.args(["--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "12", "--seed", "1"]);
    // Deterministic requests, independent of the speed of the machine, and no files.
    command.args([
        "--suppress-health-check",
        "all",
        "--generation-database",
        "none",
        "--no-color",
        "--warnings",
        "off",
    ]);
    command.args(which).env("SCHEMATHESIS_HOOKS", "fuzz").env("PYTHONPATH", home.path());
    let ended = tokio::time::timeout(Duration::from_secs(240), command.output()).await.expect("an end in time");
    let output = ended.expect("a command");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
}

/// How many requests with `part` in their target got this status.
fn answered(emulator: &Emulator, part: &str, status: u16) -> usize {
    let is_it = |status: u16, of: Option<http::StatusCode>| of.is_some_and(|of| of.as_u16() == status);
    emulator.received().iter().filter(|r| r.target.contains(part) && is_it(status, r.answered)).count()
}

#[tokio::test]
async fn every_response_to_a_session_is_documented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    // Excluded, since faults would affect the other requests.
    fuzz(&emulator, &python, OWNER, &["--exclude-path", "/_emulator/faults"]).await;
    for (part, status) in [("/v1/connect/token/", 200), ("/connectors", 201), ("/authorize/", 200), ("/connect/", 409)]
    {
        assert!(answered(&emulator, part, status) > 0, "{part} was never answered with {status}");
    }
}

#[tokio::test]
async fn every_response_to_a_project_is_documented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    let bearer = emulator.oidc_token(DEVELOPMENT_LIFE);
    fuzz(&emulator, &python, &bearer, &["--exclude-path", "/_emulator/faults"]).await;
    for (part, status) in [("/v1/connect/token/", 200), ("/v1/connect/token/", 422), ("/connectors", 403)] {
        assert!(answered(&emulator, part, status) > 0, "{part} was never answered with {status}");
    }
}

#[tokio::test]
async fn every_response_to_a_fault_script_is_documented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    fuzz(&emulator, &python, OWNER, &["--include-path", "/_emulator/faults"]).await;
}

#[tokio::test]
async fn the_document_is_served_and_identifies_itself() {
    let reply = admin(&emulator("").await, "GET", "openapi.json", "").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    assert_eq!(reply.json()["openapi"], "3.1.0");
}
