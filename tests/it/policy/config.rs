//! 6.11: what a project's own file may do, and what is said of a wrong one.

use super::contract::{Row, Start, mock, reserve_port, row};

pub fn rows() -> Vec<Row> {
    vec![
        row("tX01", "a project's own file cannot redirect the credential", async {
            let (mut to_be, m2) = (Start::new().await, mock().await);
            to_be.command.env_remove("CONNECT_SIDECAR_UPSTREAM");
            let ended = to_be.toml(&format!("upstream = \"{}\"", m2.url())).end().await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
            assert!(ended.stderr.contains("sidecar.toml:1: `upstream`"), "{}", ended.stderr);
            assert_eq!(m2.connections(), 0);
        }),
        row("tX03", "what it may set is applied", async {
            let (_reserved, port) = reserve_port();
            let toml = format!("port = {port}\nlog_level = \"debug\"\nwarn_before = [\"13h\"]");
            let mut to_be = Start::new().await.toml(&toml);
            to_be.command.env_remove("CONNECT_SIDECAR_PORT");
            let mut s = to_be.serve().await;
            assert_eq!(s.addr.port(), port);
            s.serving.wait_for_log("the OIDC token of acme/web expires in").await;
            s.req().header("content-length", "5").send().await;
            s.serving.wait_for_log("DEBUG").await;
        }),
        row("tX04", "one that is named may", async {
            let (mut to_be, m2) = (Start::new().await, mock().await);
            to_be.command.env_remove("CONNECT_SIDECAR_UPSTREAM");
            let s = to_be.toml(&format!("upstream = \"{}\"", m2.url())).args(&["--config=sidecar.toml"]).serve().await;
            assert_eq!((s.req().send().await.status, m2.count(), s.m.count()), (200, 1, 0));
        }),
        row("tX05", "a mistake is named with its line and nothing of what is there", async {
            for (toml, said) in [
                ("\nupstram = \"CANARY\"", "sidecar.toml:2: unknown key `upstram`, did you mean `upstream`?"),
                ("port = 1\n\nlog_level = \"CANARY\nCANARY", "sidecar.toml:3: "),
            ] {
                let ended = Start::new().await.toml(toml).end().await;
                assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
                assert!(ended.stderr.contains(said) && !ended.stderr.contains("CANARY"), "{}", ended.stderr);
            }
        }),
        row("tX07", "it names no env file outside the project", async {
            for path in ["../other/.env", "/etc/passwd", "link", "dangling"] {
                let to_be = Start::new().await.toml(&format!("env_file = {path:?}"));
                for (link, target) in [("link", "/etc/passwd"), ("dangling", "../other/.env")] {
                    std::os::unix::fs::symlink(target, to_be.project.join(link)).expect("a link");
                }
                let ended = to_be.end().await;
                assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{path}: {}", ended.stderr);
                assert!(ended.stderr.contains("sidecar.toml:1: env_file"), "{}", ended.stderr);
            }
        }),
        row("tX08", "no option takes a token", async {
            let ended = Start::new().await.args(&["--help"]).end().await;
            assert_eq!(ended.code, Some(0));
            let taking = ended.stdout.lines().filter(|line| line.trim_start().starts_with('-') && line.contains('<'));
            let taking: Vec<_> = taking.map(str::to_lowercase).collect();
            assert!(taking.len() > 10, "{}", ended.stdout);
            // This one takes a host.
            let taking: Vec<_> = taking.iter().map(|line| line.replace("--bearer-host", "--host")).collect();
            for word in ["token", "secret", "password", "key", "bearer"] {
                let option = |line: &&String| {
                    line.split("  ").find(|part| part.contains("--")).is_some_and(|o| o.contains(word))
                };
                assert_eq!(taking.iter().find(option), None);
            }
        }),
    ]
}
