//! Group X: what a project's own config file may set, and how errors in it are reported.

use super::contract::{Start, mock, reserve_port};

#[tokio::test]
async fn tX01_a_project_file_cannot_redirect_the_credential() {
    let (mut prepared, m2) = (Start::new().await, mock().await);
    prepared.command.env_remove("CONNECT_SIDECAR_UPSTREAM");
    let ended = prepared.toml(&format!("upstream = \"{}\"", m2.url())).end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains("sidecar.toml:1: `upstream`"), "{}", ended.stderr);
    assert_eq!(m2.connections(), 0);
}

#[tokio::test]
async fn tX03_a_project_file_sets_what_it_may() {
    let (_reserved, port) = reserve_port();
    let toml = format!("port = {port}\nlog_level = \"debug\"\nwarn_before = [\"13h\"]");
    let mut prepared = Start::new().await.toml(&toml);
    prepared.command.env_remove("CONNECT_SIDECAR_PORT");
    let mut s = prepared.serve().await;
    assert_eq!(s.addr.port(), port);
    s.serving.wait_for_log("the OIDC token of acme/web expires in").await;
    s.req().header("content-length", "5").send().await;
    s.serving.wait_for_log("DEBUG").await;
}

#[tokio::test]
async fn tX04_a_named_config_file_may_set_everything() {
    let (mut prepared, m2) = (Start::new().await, mock().await);
    prepared.command.env_remove("CONNECT_SIDECAR_UPSTREAM");
    let s = prepared.toml(&format!("upstream = \"{}\"", m2.url())).args(&["--config=sidecar.toml"]).serve().await;
    assert_eq!((s.req().send().await.status, m2.count(), s.m.count()), (200, 1, 0));
}

#[tokio::test]
async fn tX05_reports_a_config_error_by_line_without_its_content() {
    for (toml, said) in [
        ("\nupstram = \"CANARY\"", "sidecar.toml:2: unknown key `upstram`, did you mean `upstream`?"),
        ("port = 1\n\nlog_level = \"CANARY\nCANARY", "sidecar.toml:3: "),
    ] {
        let ended = Start::new().await.toml(toml).end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
        assert!(ended.stderr.contains(said) && !ended.stderr.contains("CANARY"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn tX07_a_project_file_cannot_name_an_env_file_outside_the_project() {
    for path in ["../other/.env", "/etc/passwd", "link", "dangling"] {
        let prepared = Start::new().await.toml(&format!("env_file = {path:?}"));
        for (link, target) in [("link", "/etc/passwd"), ("dangling", "../other/.env")] {
            std::os::unix::fs::symlink(target, prepared.project.join(link)).expect("a link");
        }
        let ended = prepared.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{path}: {}", ended.stderr);
        assert!(ended.stderr.contains("sidecar.toml:1: env_file"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn tX08_no_option_takes_a_token() {
    let ended = Start::new().await.args(&["--help"]).end().await;
    assert_eq!(ended.code, Some(0));
    let taking = ended.stdout.lines().filter(|line| line.trim_start().starts_with('-') && line.contains('<'));
    let taking: Vec<_> = taking.map(str::to_lowercase).collect();
    assert!(taking.len() > 10, "{}", ended.stdout);
    // This option takes a host.
    let taking: Vec<_> = taking.iter().map(|line| line.replace("--bearer-host", "--host")).collect();
    for word in ["token", "secret", "password", "key", "bearer"] {
        let option =
            |line: &&String| line.split("  ").find(|part| part.contains("--")).is_some_and(|o| o.contains(word));
        assert_eq!(taking.iter().find(option), None);
    }
}
