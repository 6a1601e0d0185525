//! `token`: with and without a running sidecar, and only the token on stdout.

use std::fs;
use std::time::Duration;

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use serde_json::Value;

use crate::refresh::FakeCli;
use crate::support::process::{Ended, Serving, assert_no_slice_of, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, SLACK_UID, env_file, write_private};

#[track_caller]
fn token(ended: &Ended) -> &str {
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    let token = ended.stdout.strip_suffix('\n').expect("a line feed");
    assert!(token.starts_with("xox") && !token.contains(char::is_whitespace), "{ended:?}");
    token
}

/// The token requests that Connect received.
fn token_requests(workspace: &Workspace) -> Vec<(String, Value)> {
    let received = workspace.emulator.received();
    let tokens = received.iter().filter(|request| request.target.contains("/token/"));
    tokens.map(|request| (request.target.clone(), serde_json::from_slice(&request.body).expect("JSON"))).collect()
}

#[tokio::test]
async fn a_token_comes_from_the_cache_shared_with_apps() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    // The request of the SDK.
    let body = r#"{"subject":{"type":"app"},"scopes":["*"]}"#;
    let of_app = crate::support::http::Request::new(serving.addr, "POST", SLACK).json(body).send().await.token();
    assert_eq!(token(&run(workspace.sidecar(&["token", SLACK_UID])).await), of_app);
    assert_eq!(token_requests(&workspace).len(), 1);
    let fresh = run(workspace.sidecar(&["token", SLACK_UID, "--refresh"])).await;
    assert_ne!(token(&fresh), of_app);
    assert_eq!(token(&run(workspace.sidecar(&["token", SLACK_UID])).await), token(&fresh));
    assert_eq!(token_requests(&workspace).len(), 2);

    let json = run(workspace.sidecar(&["token", SLACK_UID, "--json"])).await;
    let parsed: Value = serde_json::from_str(&json.stdout).expect("JSON");
    let expires_at = parsed["expires_at"].as_str().expect("a time");
    assert!(humantime::parse_rfc3339(expires_at).is_ok(), "{expires_at}");
    let expected = format!("{{\"version\":1,\"token\":\"{}\",\"expires_at\":\"{expires_at}\"}}\n", token(&fresh));
    assert_eq!(json.stdout, expected);
}

#[tokio::test]
async fn flags_give_the_same_request_as_the_vercel_clis() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    for (connector, flags, path, body) in [
        (SLACK_UID, &[][..], SLACK, r#"{"scopes":["*"],"subject":{"type":"app"}}"#),
        ("a%b", &[], "", ""),
        (
            "scl_slack",
            &["--subject", "user", "--user-id", "user_ada", "--scopes", "chat:write,im:write"],
            "/v1/connect/token/scl_slack",
            r#"{"scopes":["chat:write","im:write"],"subject":{"id":"user_ada","type":"user"}}"#,
        ),
        (
            "mcp.linear.app/x y",
            &["--installation-id", "inst_1"],
            "/v1/connect/token/mcp.linear.app%2Fx%20y",
            r#"{"installationId":"inst_1","scopes":["*"],"subject":{"type":"app"}}"#,
        ),
    ] {
        let ended = run(workspace.sidecar(&[&["token", connector], flags].concat())).await;
        if path.is_empty() {
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
            assert!(ended.stderr.starts_with("error: CONNECTOR: "), "{}", ended.stderr);
            continue;
        }
        let (last_path, last_body) = token_requests(&workspace).pop().expect("a request");
        assert_eq!((last_path.as_str(), last_body), (path, serde_json::from_str(body).expect("JSON")));
    }
    let ended = run(workspace.sidecar(&["token", SLACK_UID, "--subject", "app", "--user-id", "u"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
}

#[tokio::test]
async fn without_a_running_sidecar_one_in_this_process_is_used_and_leaves_nothing() {
    let workspace = Workspace::new().await;
    let first = run(workspace.sidecar(&["token", SLACK_UID])).await;
    let second = run(workspace.sidecar(&["token", SLACK_UID, "-q"])).await;
    assert_ne!(token(&first), token(&second), "nothing is cached");
    let state = workspace.home.path().join(".local/state/connect-sidecar");
    let left: Vec<_> = fs::read_dir(&state).into_iter().flatten().flatten().map(|file| file.file_name()).collect();
    assert!(left.is_empty(), "usage of an upstream on this machine is not recorded: {left:?}");
    assert_eq!(run(workspace.sidecar(&["status"])).await.code, Some(1));
    let mut in_port = workspace.sidecar(&["token", SLACK_UID]);
    in_port.env("CONNECT_SIDECAR_PORT", "9");
    token(&run(in_port).await);
    let ended = run(workspace.sidecar(&["token", SLACK_UID, "--port", "9"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""));
    assert!(ended.stderr.contains("no sidecar of yours runs at port 9"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_sidecar_in_this_process_refreshes_nothing_and_records_no_warnings() {
    let (workspace, cli) = (Workspace::new().await, FakeCli::printing());
    fs::create_dir_all(workspace.home.path().join(".config/connect-sidecar")).expect("a directory");
    write_private(&workspace.home.path().join(".config/connect-sidecar/sidecar.toml"), "refresh = \"cli\"");
    let over = workspace.emulator.env_file(Duration::from_secs(3600), Duration::ZERO);
    write_private(&workspace.project().join(".env.local"), &over);
    cli.prints_token(&workspace.emulator.oidc_token(DEVELOPMENT_LIFE));
    let with_cli = |arguments: &[&str]| {
        let mut command = workspace.sidecar(arguments);
        command.env("PATH", cli.path());
        command
    };
    // The wait would give a refresh enough time.
    let ended = run(with_cli(&["token", SLACK_UID, "--wait", "2s"])).await;
    assert_eq!((ended.code, ended.stdout.as_str(), cli.runs()), (Some(1), "", 0), "{ended:?}");
    assert!(ended.stderr.contains("s ago, run `vercel env pull`"), "{ended:?}");

    let mut serving = Serving::start(with_cli(&["--refresh", "off"])).await;
    serving.wait_for_log("ago, run `vercel env pull`").await;
    assert_eq!(serving.stop().await.code, Some(0));
}

#[tokio::test]
async fn an_explicit_credential_is_used_for_the_token() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let other = workspace.emulator.oidc_token(DEVELOPMENT_LIFE / 2);
    write_private(&workspace.project().join("other.env"), &env_file(&other));
    let own = run(workspace.sidecar(&["token", SLACK_UID, "--env-file", "other.env"])).await;
    assert!(own.code == Some(0) && own.stdout.starts_with("xox"), "{own:?}");
    assert!(own.stderr.starts_with("warning: --env-file says ") && own.stderr.ends_with("of its own\n"), "{own:?}");
    let bearer = || workspace.emulator.received().last().expect("a request").headers["authorization"].clone();
    assert_eq!(bearer(), format!("Bearer {other}"));
    let port = serving.addr.port().to_string();
    let there = run(workspace.sidecar(&["token", SLACK_UID, "--env-file", "other.env", "--port", &port])).await;
    assert!(there.code == Some(0) && there.stdout.starts_with("xox"), "{there:?}");
    assert!(there.stderr.ends_with(".env.local, which counts\n"), "{there:?}");
    assert_eq!(bearer(), format!("Bearer {}", workspace.token), "the port selects the running sidecar");
}

#[tokio::test]
async fn an_error_names_the_command_that_fixes_it() {
    let workspace = Workspace::new().await;
    let message = r#"{"error":{"code":"forbidden","message":"The Connector is not linked to this project.\u001b[2J"}}"#;
    let not_linked = Fault::answer(403, "application/json", message);
    for runs in [false, true] {
        let _serving = if runs { Some(workspace.serve(&[]).await) } else { None };
        for (fault, expected) in [
            (
                not_linked.clone(),
                "error: Connect answered 403 forbidden (The Connector is not linked to this project.\\u{1b}[2J): \
                 run `vercel connect attach slack/acme-slack`\n",
            ),
            (Fault::status(404, "not_found"), "run `vercel connect list`"),
            (Fault::status(403, "forbidden"), "run `vercel connect attach slack/acme-slack --environment development`"),
            (Fault::status(422, "client_installation_required"), "run `vercel connect open slack/acme-slack`"),
            (Fault::status(422, "user_authorization_required"), "run `vercel connect token slack/acme-slack`"),
            (Fault::once(FaultKind::Reset), "error: "),
        ] {
            workspace.emulator.inject(fault.on("/token/"));
            let ended = run(workspace.sidecar(&["token", SLACK_UID, "--scopes", "x"])).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{runs}: {ended:?}");
            assert!(ended.stderr.contains(expected), "{runs}, {expected}: {}", ended.stderr);
            assert_no_slice_of([workspace.token.as_str()], &ended.stderr);
        }
    }
}

#[tokio::test]
async fn an_invalid_credential_is_an_error_with_the_command_that_fixes_it() {
    let workspace = Workspace::new().await;
    let _ = fs::remove_file(workspace.project().join(".env.local"));
    for runs in [false, true] {
        let _serving = if runs { Some(workspace.serve(&[]).await) } else { None };
        let ended = run(workspace.sidecar(&["token", SLACK_UID])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{runs}: {ended:?}");
        let last = ended.stderr.lines().last().expect("a line");
        assert!(last.starts_with("error: ") && last.contains("vercel env pull"), "{runs}: {}", ended.stderr);
    }
    assert_eq!(token_requests(&workspace), []);
}
