//! Group A: refreshing the token with the Vercel CLI.

use std::fs;

use crate::refresh::{FakeCli, plant};
use crate::support::http::Request;

use super::contract::fresh_jwt;
use super::token_life::with_life;

/// The remaining lifetime of an expired token, in seconds.
const EXPIRED: i64 = -300;

#[tokio::test]
async fn tA01_does_not_run_a_cli_from_the_project() {
    let prepared = with_life(EXPIRED).await.accepted();
    let bin = prepared.project.join("node_modules/.bin");
    fs::create_dir_all(&bin).expect("a directory");
    let ran = prepared.project.join("ran");
    plant(&bin.join("vercel"), &format!("touch {}", ran.display()));
    let path = format!("{}:node_modules/.bin:.:/usr/bin:/bin", bin.display());
    let mut s = prepared.env("PATH", &path).args(&["--refresh", "cli"]).serve().await;
    s.serving.wait_for_log("is not run: it is in node_modules/.bin").await;
    s.serving.wait_for_log("could not refresh the OIDC token").await;
    let asked = Request::new(s.addr, "POST", "/_sidecar/v1/refresh").header("sidecar-key", &s.key());
    let asked = asked.send().await;
    asked.assert_refused(502, "refresh_failed", "asked for, too");
    assert!(!ran.exists());
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tA03_runs_the_cli_with_fixed_arguments_and_few_variables() {
    let proc = |name: &str| format!("tr '\\0' '\\n' </proc/$$/{name} >DIR/{name}");
    let cli = FakeCli::new(&[&proc("cmdline"), &proc("environ"), "pwd >DIR/cwd; cat DIR/answer"].join("\n"));
    let (fresh, secret) = (fresh_jwt(), fresh_jwt());
    cli.prints_token(&fresh);
    let mut prepared = with_life(EXPIRED).await.accepted().env("PATH", &format!("relative:{}", cli.path()));
    for name in ["VERCEL_TOKEN", "VERCEL_OIDC_TOKEN", "NODE_OPTIONS", "HTTPS_PROXY", "SOME_SECRET"] {
        prepared = prepared.env(name, &secret);
    }
    let home = prepared.home.path().canonicalize().expect("a home");
    let mut s = prepared.env("LANG", "C.UTF-8").args(&["--refresh", "cli"]).serve().await;
    s.serving.wait_for_log("token refreshed").await;
    s.assert_uses(&fresh).await;
    let left = |name: &str| fs::read_to_string(cli.dir().join(name)).expect("written");
    let mut variables: Vec<_> = left("environ").lines().map(str::to_owned).collect();
    variables.sort();
    let expected = [
        "CI=1".to_owned(),
        format!("HOME={}", s.home.path().display()),
        "LANG=C.UTF-8".to_owned(),
        "NO_COLOR=1".to_owned(),
        "NO_UPDATE_NOTIFIER=1".to_owned(),
    ];
    assert_eq!(variables[..5], expected);
    assert!(variables[5].starts_with("PATH=") && !variables[5].contains("relative"), "{variables:?}");
    assert_eq!(variables[6..], ["VERCEL_TELEMETRY_DISABLED=1"]);
    let arguments = "project\ntoken\nprj_1\n--format=json\n--scope\nteam_1";
    assert_eq!(left("cmdline"), format!("/bin/sh\n{}\n{arguments}\n", cli.dir().join("vercel").display()));
    let cwd = left("cwd");
    assert!(cwd.starts_with(home.to_str().expect("text")) && !cwd.contains("/web"), "{cwd}");
    let old = s.j0.clone();
    s.leaks_nothing(&[&fresh, &old, &secret]).await;
}

#[tokio::test]
async fn tA05_requests_do_not_trigger_the_cli() {
    let cli = FakeCli::new("exit 1");
    let prepared = with_life(EXPIRED).await.accepted().env("PATH", &cli.path()).args(&["--refresh", "cli"]);
    let mut s = prepared.serve().await;
    s.serving.wait_for_log("could not refresh the OIDC token").await;
    for _ in 0..1000 {
        s.req().send().await.assert_refused(503, "oidc_token_expired", "an expired token");
    }
    assert_eq!(cli.runs(), 1);
}
