//! What `src/run/preload.cjs` does to `fetch`, on each Node.js that it is for.

use crate::support::{Stage, npm};
use std::path::Path;

use connect_sidecar::identity::placeholder;
use tokio::process::Command;

use crate::support::process::{isolated, run};

const PRELOAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/run/preload.cjs");
const BEHAVIOUR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/preload/behaviour.cjs");

/// A program in a project, on the Node.js of this directory, with the preload for this sidecar.
pub fn app(stage: &Stage, program: &str, project: &Path, node: &Path) -> Command {
    let mut command = isolated(program, project);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(node.to_owned()).chain(std::env::split_paths(&path));
    command
        .env("PATH", std::env::join_paths(path).expect("a path"))
        .env("NODE_OPTIONS", format!("--require \"{PRELOAD}\""))
        .env("CONNECT_SIDECAR_URL", format!("http://{}", stage.addr))
        .env("VERCEL_OIDC_TOKEN", placeholder::make(None, stage.clock.now().plus(placeholder::LIFE)));
    command
}

#[tokio::test]
async fn it_diverts_what_it_should_and_touches_nothing_else() {
    let home = tempfile::tempdir().expect("a directory");
    for version in npm::NODES {
        let Some(node) = npm::node(version).await else { return };
        let mut command = isolated(node.join("node").to_str().expect("a path"), home.path());
        command.args([BEHAVIOUR, PRELOAD]);
        let ended = run(command).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "14\n"), "Node.js {version}:\n{}", ended.stderr);
    }
}
