//! What `src/cli/run/preload.cjs` does to `fetch`, on each Node.js that it is for.

use crate::support::{Stage, npm};
use std::ffi::OsString;
use std::path::Path;

use tokio::process::Command;

use crate::support::process::{isolated, run, sidecar};

const PRELOAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cli/run/preload.cjs");
const BEHAVIOUR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/preload/behaviour.cjs");

/// A program in a directory, run through the stage's sidecar and by the Node.js of another directory.
pub fn app(stage: &Stage, program: &str, directory: &Path, node: &Path) -> Command {
    let mut command = sidecar(directory);
    command
        .arg("--config")
        .arg(stage.dir().join("config.toml"))
        .arg("--project")
        .arg(&stage.project)
        .args(["run", "--no-intercept", "--", program])
        .env("XDG_STATE_HOME", stage.dir().join("state"))
        .env("PATH", path_with(node));
    command
}

/// The `PATH`, with this directory first.
pub fn path_with(first: &Path) -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(first.to_owned()).chain(std::env::split_paths(&path))).expect("a path")
}

#[tokio::test]
async fn it_diverts_what_it_should_and_touches_nothing_else() {
    let home = tempfile::tempdir().expect("a directory");
    for version in npm::NODES {
        let Some(node) = npm::node(version).await else { return };
        let mut command = isolated(node.join("node").to_str().expect("a path"), home.path());
        command.args([BEHAVIOUR, PRELOAD]);
        let ended = run(command).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "15\n"), "Node.js {version}:\n{}", ended.stderr);
    }
}

/// Both are loaded in one process, one after the other, so that nothing else is between the two times.
#[tokio::test]
#[ignore = "measures time"]
async fn it_costs_less_than_a_millisecond_beyond_any_preload() {
    const PROGRAM: &str = "
        const [, warm, empty, preload] = process.argv;
        const load = (file) => { const begun = performance.now(); require(file); return performance.now() - begun; };
        load(warm);
        console.log(load(empty), load(preload));
    ";
    let home = tempfile::tempdir().expect("a directory");
    let empty = ["warm.cjs", "empty.cjs"].map(|name| home.path().join(name));
    for file in &empty {
        std::fs::write(file, "'use strict';\n").expect("a file");
    }
    for version in npm::NODES {
        let Some(node) = npm::node(version).await else { return };
        // The least of each: what else the machine does only adds.
        let mut least = [f64::INFINITY; 2];
        for _ in 0..40 {
            let mut command = isolated(node.join("node").to_str().expect("a path"), home.path());
            command.args(["-e", PROGRAM]).args(&empty).arg(PRELOAD).env("CONNECT_SIDECAR_URL", "http://127.0.0.1:2774");
            let ended = run(command).await;
            let times = ended.stdout.split_whitespace().map(|time| time.parse::<f64>().expect("a time"));
            least.iter_mut().zip(times).for_each(|(least, time)| *least = least.min(time));
        }
        let [any, ours] = least;
        eprintln!("Node.js {version}: {:.2} ms", ours - any);
        assert!(ours - any < 1.0, "Node.js {version}: {ours} ms, and {any} ms for any other");
    }
}
