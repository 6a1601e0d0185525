//! Real clients against the emulator: Connect's SDKs for TypeScript and Python, a relying party that verifies its OIDC
//! tokens, and a browser.

use std::path::PathBuf;

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::command::{fetch_env_file, home, start};
use super::{OWNER, SLACK, emulator, refusal, request};
use crate::preload::path_with;
use crate::support::process::{isolated, run, sidecar};
use crate::support::{npm, python};

/// The output of a command, parsed as JSON.
async fn printed(command: Command) -> Value {
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    serde_json::from_str(&ended.stdout).expect("JSON")
}

/// A directory with a JavaScript program and these packages.
fn program(text: &str, packages: PathBuf) -> TempDir {
    let dir = home();
    std::os::unix::fs::symlink(packages, dir.path().join("node_modules")).expect("a link");
    std::fs::write(dir.path().join("program.mjs"), text).expect("a file");
    dir
}

/// Checks the errors that a program reports.
fn errors<const N: usize>(results: &Value, expected: [(&str, &str, &str, u16); N], of: impl Fn(&Value) -> Value) {
    for (name, class, code, status) in expected {
        assert_eq!(of(&results[name]), json!([class, code, status]), "{name}: {results:#}");
    }
}

#[tokio::test]
async fn every_call_and_error_of_the_typescript_sdk_is_as_documented() {
    let (Some(packages), Some(node)) = (npm::connect_sdk("2.3.2").await, npm::node(npm::NODES[3]).await) else {
        return;
    };
    let dir = program(include_str!("sdk.mjs"), packages);
    let emulation = start(&dir, &[]).await;
    fetch_env_file(&dir, &emulation).await;
    let url = format!("http://{}", emulation.addr);
    let mut command = sidecar(dir.path());
    command
        .args(["--port", "0", "--upstream", &url, "run", "--no-intercept", "--", "node", "program.mjs", &url])
        .env("PATH", path_with(&node));
    let results = printed(command).await;

    assert!(results["after consent"].as_str().is_some_and(|t| t.starts_with("xoxe.xoxp-")), "{results:#}");
    assert_eq!((&results["metadata"]["uid"], &results["revocation"]), (&"slack/acme-slack".into(), &"done".into()));
    assert_eq!(results["after installation"]["tenantId"], "T0NEW", "{results:#}");
    errors(
        &results,
        [
            ("before consent", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("after denial", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("after revocation", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("before installation", "ConnectorInstallationRequiredError", "client_installation_required", 422),
            ("no token", "NoValidTokenError", "no_token", 422),
            // The SDK has this class for several documented errors.
            ("not linked", "ConnectError", "forbidden", 403),
            ("not enabled", "ConnectError", "forbidden", 403),
            ("not found", "ConnectError", "not_found", 404),
            ("unresolved", "ConnectError", "unresolved_token", 422),
            ("unauthorized", "ConnectError", "unauthorized", 401),
            ("unavailable", "ConnectError", "internal_server_error", 503),
            ("limited", "ConnectError", "rate_limited", 429),
        ],
        |error| {
            assert_eq!(error["isConnectError"], true, "{error}");
            json!([error["class"], error["code"], error["status"]])
        },
    );
    for (name, says) in [("not linked", "not linked to this project"), ("not enabled", "the development environment")] {
        assert!(results[name]["message"].as_str().is_some_and(|message| message.contains(says)), "{results:#}");
    }
}

async fn every_call_and_error_in_python(half: &str) {
    let Some(python) = python::connect_sdk().await else { return };
    let home = home();
    let emulation = start(&home, &[]).await;
    let token = fetch_env_file(&home, &emulation).await;
    let mut command = isolated(python.to_str().expect("a path"), home.path());
    let url = format!("http://{}", emulation.addr);
    command.args(["-c", include_str!("sdk.py"), &url, half]).env("VERCEL_OIDC_TOKEN", token);
    // The SDK would otherwise fetch the keys of the real issuer.
    command.env("HTTPS_PROXY", "http://127.0.0.1:1");
    let results = printed(command).await;

    assert!(results["app"].as_str().is_some_and(|t| t.starts_with("xoxe.xoxb-")), "{results:#}");
    assert_eq!(results["again"], true, "it is handed out again while it lasts: {results:#}");
    assert_eq!(results["response"], json!(["slack/acme-slack", "T0ACME"]));
    assert_eq!((&results["metadata"], &results["revocation"]), (&"slack/acme-slack".into(), &Value::Null));
    assert!(results["after consent"].as_str().is_some_and(|t| t.starts_with("xoxe.xoxp-")), "{results:#}");
    errors(
        &results,
        [
            ("before consent", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("after denial", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("after revocation", "UserAuthorizationRequiredError", "user_authorization_required", 422),
            ("not installed", "ConnectorInstallationRequiredError", "client_installation_required", 422),
            ("not linked", "ConnectApiError", "forbidden", 403),
            ("not enabled", "ConnectApiError", "forbidden", 403),
            ("not found", "ConnectNotFoundError", "not_found", 404),
            ("no token", "NoValidTokenError", "no_token", 422),
            ("authorization_pending", "AuthorizationPendingError", "authorization_pending", 400),
            ("slow_down", "AuthorizationPendingError", "slow_down", 400),
            ("access_denied", "AuthorizationDeniedError", "access_denied", 400),
            ("expired_token", "AuthorizationExpiredError", "expired_token", 400),
            ("invalid_grant", "InvalidGrantError", "invalid_grant", 400),
            ("unauthorized", "ConnectApiError", "unauthorized", 401),
        ],
        Value::clone,
    );
    for (name, class) in [
        ("wrong JSON", "ConnectResponseError"),
        ("wrong address", "ConnectValidationError"),
        ("no webhook", "ConnectWebhookVerificationError"),
        ("no credential", "ConnectCredentialsError"),
    ] {
        assert_eq!(results[name][0], class, "{name}: {results:#}");
    }
}

#[tokio::test]
async fn every_call_and_error_of_the_python_sdk_is_as_documented_in_synchronous_code() {
    every_call_and_error_in_python("sync").await;
}

#[tokio::test]
async fn every_call_and_error_of_the_python_sdk_is_as_documented_in_asynchronous_code() {
    every_call_and_error_in_python("async").await;
}

#[tokio::test]
async fn jose_verifies_an_oidc_token_by_the_published_keys() {
    let (Some(packages), Some(node)) = (npm::jose().await, npm::node(npm::NODES[3]).await) else { return };
    let dir = program(include_str!("jose.mjs"), packages);
    let (emulator, other) = (emulator("").await, start(&dir, &[]).await);
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let of_another = fetch_env_file(&dir, &other).await;
    let (signed, _) = token.rsplit_once('.').expect("a signature");
    let elsewhere = {
        let mut subject = emulator.read(Subject::development);
        subject.owner = "evil".into();
        emulator.oidc_token_for(&subject, DEVELOPMENT_LIFE)
    };
    for (token, audience, code) in [
        (&token, "https://vercel.com/acme", None),
        (&token, "https://vercel.com/other", Some("ERR_JWT_CLAIM_VALIDATION_FAILED")),
        (&elsewhere, "https://vercel.com/evil", Some("ERR_JWT_CLAIM_VALIDATION_FAILED")),
        (&emulator.oidc_token(std::time::Duration::ZERO), "https://vercel.com/acme", Some("ERR_JWT_EXPIRED")),
        (&format!("{signed}.AAAA"), "https://vercel.com/acme", Some("ERR_JWS_SIGNATURE_VERIFICATION_FAILED")),
        (&of_another, "https://vercel.com/acme", Some("ERR_JWKS_NO_MATCHING_KEY")),
    ] {
        let mut command = isolated(node.join("node").to_str().expect("a path"), dir.path());
        command.args(["program.mjs", &emulator.url(), token, audience]);
        let claims = printed(command).await;
        assert_eq!(claims["code"].as_str(), code, "{audience}: {claims}");
        let sub = "owner:acme:project:web:environment:development";
        assert_eq!(claims["sub"] == sub, code.is_none(), "{audience}: {claims}");
    }
}

/// Decides a flow in a browser. Returns what the browser saw and the result for the app.
async fn decide_in_browser(emulator: &Emulator, target: &str, mut body: Value, button: &str) -> Option<(Value, Value)> {
    let (packages, node) = (npm::browser().await?, npm::node(npm::NODES[3]).await?);
    let dir = program(include_str!("browser.mjs"), packages);
    body["returnUrl"] = format!("{}/.well-known/jwks", emulator.url()).into();
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let begun = request(emulator, &token, "POST", target).json(&body.to_string()).send().await.json();
    let mut command = isolated(node.join("node").to_str().expect("a path"), dir.path());
    command.args(["program.mjs", begun["url"].as_str().expect("a URL"), button]);
    let way = printed(command).await;
    let result = format!("/v1/connect/result/{}", begun["verifier"].as_str().expect("a verifier"));
    let told = request(emulator, OWNER, "GET", &result).send().await.json();
    assert_eq!((&way["end"], &way["complaints"]), (&body["returnUrl"], &json!([])), "{way:#}");
    Some((way, told))
}

#[tokio::test]
async fn a_person_consents_in_chromium_with_the_keyboard() {
    let emulator = emulator("").await;
    let user = json!({"subject": {"type": "user", "id": "user_new"}, "scopes": ["chat:write"]});
    for (button, said, status, given) in
        [("Deny", "Denied.", "canceled", 422), ("Approve", "Approved.", "success", 200)]
    {
        let Some((way, told)) =
            decide_in_browser(&emulator, "/v1/connect/authorize/slack%2Facme-slack", user.clone(), button).await
        else {
            return;
        };
        let asked = way["asked"]["text"].as_str().unwrap_or_default();
        let is_readable = asked.contains("slack/acme-slack asks for access as user_new") && !asked.contains("scl_");
        assert!(is_readable && asked.contains("chat:write"), "{way:#}");
        let is_at_provider = way["asked"]["url"].as_str().is_some_and(|url| !url.starts_with(&emulator.url()));
        assert!(is_at_provider && way["said"].as_str().is_some_and(|text| text.starts_with(said)), "{way:#}");
        assert_eq!(told["status"], status, "{told}");
        let ask = request(&emulator, &emulator.oidc_token(DEVELOPMENT_LIFE), "POST", SLACK).json(&user.to_string());
        assert_eq!(refusal(ask).await.0, given, "{button}");
    }
}

#[tokio::test]
async fn an_operator_installs_in_chromium_with_the_keyboard() {
    for uid in ["slack/new", "github/new", "snowflake/new"] {
        let links = "links = [{ project = \"web\", environments = [\"development\"] }]";
        let emulator = emulator(&format!("[[connectors]]\nuid = \"{uid}\"\n{links}")).await;
        let path = uid.replace('/', "%2F");
        for (button, status, is_installed) in [("Deny", "canceled", false), ("Approve", "success", true)] {
            let target = format!("/v1/connect/install/{path}");
            let Some((way, told)) = decide_in_browser(&emulator, &target, json!({"tenantId": "T0NEW"}), button).await
            else {
                return;
            };
            assert_eq!(told["status"], status, "{uid}: {told} {way:#}");
            let target = format!("/v1/connect/token/{path}");
            let token = emulator.oidc_token(DEVELOPMENT_LIFE);
            let reply = request(&emulator, &token, "POST", &target).json(r#"{"subject":{"type":"app"}}"#).send().await;
            assert_eq!(reply.json()["tenantId"] == "T0NEW", is_installed, "{uid} {button}: {}", reply.text());
        }
    }
}
