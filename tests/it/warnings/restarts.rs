//! Warnings given before a restart, or by other sidecars of the project, are not repeated.

use std::fs;

use connect_sidecar::instance::state_file;

use super::{OF_THE_TOKEN, about};
use crate::support::process::Serving;
use crate::support::workspace::Workspace;
use crate::support::{fingerprint, write_private};

#[tokio::test]
async fn a_restart_within_a_step_repeats_no_warning() {
    let workspace = Workspace::new().await;
    let token = workspace.pull(about(9));
    let mut first = workspace.serve(&[]).await;
    first.wait_for_log("the OIDC token of acme/web expires in 9 min, run `vercel env pull`").await;
    let state_dir = workspace.home.path().join(".local/state/connect-sidecar");
    let history = fs::read_to_string(state_dir.join("warned.json")).expect("the history");
    assert_eq!(history, format!(r#"{{"said":[{{"fingerprint":"{}","step_ms":900000}}]}}"#, fingerprint(&token)));
    assert_eq!(state_file::all(&state_dir).len(), 1, "the history is not taken for an instance");
    first.stop().await;

    let mut second = workspace.serve(&[]).await;
    second.wait_for_log("token of acme/web loaded from .env.local, expires in 9 min").await;
    // A warning about another token shows that the first one was checked.
    workspace.pull(about(3));
    second.wait_for_log("the OIDC token of acme/web expires in 3 min").await;
    let log = second.stop().await.stderr;
    assert_eq!(log.matches(OF_THE_TOKEN).count(), 1, "{log}");
}

#[tokio::test]
async fn sidecars_of_a_project_give_each_warning_once() {
    let workspace = Workspace::new().await;
    workspace.pull(about(9));
    let mut sidecars = vec![workspace.serve(&[]).await, workspace.serve(&[]).await, workspace.serve(&[]).await];
    for minutes in [7, 3, 12 * 60] {
        workspace.pull(about(minutes));
        for sidecar in &mut sidecars {
            sidecar.wait_for_next_log("token refreshed").await;
        }
    }
    let mut log = String::new();
    for sidecar in sidecars {
        log += &sidecar.stop().await.stderr;
    }
    for left in ["expires in 9 min, run", "expires in 7 min, run", "expires in 3 min, run"] {
        assert_eq!(log.matches(left).count(), 1, "{left}: {log}");
    }
}

#[tokio::test]
async fn a_new_step_is_reported_after_a_restart() {
    let workspace = Workspace::new().await;
    workspace.pull(about(9));
    let mut first = workspace.serve(&[]).await;
    first.wait_for_log(OF_THE_TOKEN).await;
    first.stop().await;
    // The token has now reached a later step.
    write_private(&workspace.project().join("sidecar.toml"), "warn_before = [\"15m\", \"12m\"]");
    let mut second = workspace.serve(&[]).await;
    second.wait_for_log("the OIDC token of acme/web expires in 9 min, run").await;
    second.stop().await;
}

#[tokio::test]
async fn without_a_state_directory_warnings_are_given_anyway() {
    let workspace = Workspace::new().await;
    workspace.pull(about(9));
    fs::write(workspace.home.path().join("no-directory"), "").expect("a file");
    for _ in 0..2 {
        let mut command = workspace.sidecar(&[]);
        command.env("XDG_STATE_HOME", workspace.home.path().join("no-directory"));
        let mut sidecar = Serving::start(command).await;
        sidecar.wait_for_log("the OIDC token of acme/web expires in 9 min, run `vercel env pull`").await;
        sidecar.stop().await;
    }
}
