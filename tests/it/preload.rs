//! What `src/run/preload.cjs` does to `fetch`, on each Node.js that it is for.

use crate::support::npm;
use crate::support::process::{isolated, run};

/// The preload.
pub const PRELOAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/run/preload.cjs");
const BEHAVIOUR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/preload/behaviour.cjs");

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
