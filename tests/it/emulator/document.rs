//! The OpenAPI document that the emulator serves, held against what it answers: schemathesis makes requests of the
//! document, right ones and wrong ones, and finds no answer that is not in it.

use std::path::Path;
use std::time::Duration;

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;

use super::{OWNER, admin, emulator};
use crate::support::process::isolated;
use crate::support::python;

/// A connector of each kind, and two that may be spoiled; what `fuzz.py` knows.
const CONNECTORS: [&str; 6] =
    ["github/app", "snowflake/dw", "salesforce/crm", "api-key/maps", "slack/spare", "oauth/spare"];

/// What an answer must be.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// An emulator with a connector of each kind.
async fn every_kind() -> Emulator {
    let installed = "installations = [{ id = \"inst_acme\", tenant = \"T0ACME\" }]\ngranted_to = [\"user_ada\"]\n";
    let linked = "links = [{ project = \"web\", environments = [\"development\", \"production\"] }]\n";
    let seeds = CONNECTORS.map(|uid| format!("[[connectors]]\nuid = \"{uid}\"\n{linked}{installed}"));
    emulator(&seeds.concat()).await
}

/// Lets schemathesis ask with a bearer, of the document's operations that `which` leaves.
async fn fuzz(emulator: &Emulator, python: &Path, bearer: &str, which: &[&str]) {
    let home = tempfile::tempdir().expect("a directory");
    std::fs::write(home.path().join("fuzz.py"), include_str!("fuzz.py")).expect("written");
    let url = emulator.url();
    let (document, header) = (format!("{url}/_emulator/openapi.json"), format!("Authorization: Bearer {bearer}"));
    let mut command = isolated(python.to_str().expect("a path"), home.path());
    command.args(["-m", "schemathesis.cli", "run", &document, "--url", &url, "--header", &header]);
    command.args(["--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "12", "--seed", "1"]);
    // The same requests in each run, however slow the machine is, and no files of its own.
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

/// How many requests for a path that contains `part` were answered with this.
fn answered(emulator: &Emulator, part: &str, status: u16) -> usize {
    let is_it = |status: u16, of: Option<http::StatusCode>| of.is_some_and(|of| of.as_u16() == status);
    emulator.received().iter().filter(|r| r.target.contains(part) && is_it(status, r.answered)).count()
}

#[tokio::test]
async fn no_answer_to_a_session_is_undocumented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    // What makes requests go wrong would do so here.
    fuzz(&emulator, &python, OWNER, &["--exclude-path", "/_emulator/faults"]).await;
    for (part, status) in [("/v1/connect/token/", 200), ("/connectors", 201), ("/authorize/", 200), ("/connect/", 409)]
    {
        assert!(answered(&emulator, part, status) > 0, "{part} was never answered with {status}");
    }
}

#[tokio::test]
async fn no_answer_to_a_project_is_undocumented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    let bearer = emulator.oidc_token(DEVELOPMENT_LIFE);
    fuzz(&emulator, &python, &bearer, &["--exclude-path", "/_emulator/faults"]).await;
    for (part, status) in [("/v1/connect/token/", 200), ("/v1/connect/token/", 422), ("/connectors", 403)] {
        assert!(answered(&emulator, part, status) > 0, "{part} was never answered with {status}");
    }
}

#[tokio::test]
async fn no_answer_to_a_script_of_faults_is_undocumented() {
    let Some(python) = python::schemathesis().await else { return };
    let emulator = every_kind().await;
    fuzz(&emulator, &python, OWNER, &["--include-path", "/_emulator/faults"]).await;
}

#[tokio::test]
async fn the_document_is_served_and_says_of_itself_what_it_is() {
    let reply = admin(&emulator("").await, "GET", "openapi.json", "").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    assert_eq!(reply.json()["openapi"], "3.1.0");
}
