//! The README's lines for apps as they are: each works as it stands, in a shell that finds the program on its `PATH`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use super::blocks;
use crate::clients::curl;
use crate::support::process::{Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{npm, python, soon};

/// The line that says this or, if none does, the first that begins so.
pub(super) fn line(beginning: &str) -> &'static str {
    let lines: Vec<_> = blocks("sh").into_iter().flat_map(str::lines).collect();
    let exact = lines.iter().find(|line| **line == beginning);
    let begins = || lines.iter().find(|line| line.starts_with(beginning));
    exact.or_else(begins).unwrap_or_else(|| panic!("no line begins with `{beginning}`"))
}

/// A shell at the workspace, with these directories first on its `PATH`.
pub(super) fn shell(workspace: &Workspace, line: &str, tools: &[&Path]) -> Command {
    let command = workspace.sidecar(&[]);
    let bin = workspace.project().with_file_name("bin");
    let program = bin.join("connect-sidecar");
    if !program.exists() {
        fs::create_dir_all(&bin).expect("a directory");
        symlink(command.as_std().get_program(), program).expect("a link");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = tools.iter().map(|tool| tool.to_path_buf()).chain([bin]).chain(std::env::split_paths(&path));
    let mut shell = Command::new("sh");
    shell.args(["-c", line]).env_clear();
    shell.envs(command.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.env("PATH", std::env::join_paths(directories).expect("a path")).env("NEXT_TELEMETRY_DISABLED", "1");
    shell.current_dir(workspace.project()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    shell.kill_on_drop(true);
    shell
}

/// Starts a sidecar in the project by this line.
pub(super) async fn serve(workspace: &Workspace, line: &str, tools: &[&Path]) -> Serving {
    Serving::start(shell(workspace, &format!("exec {line}"), tools)).await
}

/// Runs a line in the project; what it prints.
pub(super) async fn printed(workspace: &Workspace, line: &str, tools: &[&Path]) -> String {
    let ended = run(shell(workspace, line, tools)).await;
    assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    ended.stdout
}

#[tokio::test]
async fn programs_of_every_kind_get_a_token() {
    let (Some(node_sdk), Some(python)) = (npm::connect_sdk("2.3.2").await, python::connect_sdk().await) else { return };
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    symlink(node_sdk, workspace.project().join("node_modules")).expect("a link");
    for (name, program) in [
        (
            "app.mjs",
            "import { getToken } from '@vercel/connect';\n\
             console.log(await getToken('slack/acme-slack', { subject: { type: 'app' } }));\n",
        ),
        (
            "app.py",
            "from vercel import connect\n\
             print(connect.sync.get_token('slack/acme-slack', subject=connect.ConnectAppTokenSubject()))\n",
        ),
    ] {
        fs::write(workspace.project().join(name), program).expect("a program");
    }
    let node = printed(&workspace, line("connect-sidecar run -- node "), &[]).await;
    let python_dir = python.parent().expect("a directory");
    let python = printed(&workspace, line("connect-sidecar run -- python3 "), &[python_dir]).await;
    let curl = printed(&workspace, line("connect-sidecar run -- curl "), &[]).await;
    let curl: Value = serde_json::from_str(&curl).expect("JSON");
    for token in [node.trim(), python.trim(), curl["token"].as_str().expect("a token")] {
        assert!(token.starts_with("xoxe.xoxb-"), "{token}");
    }
    let shell =
        format!("{} && {}", line("eval "), line("connect-sidecar run -- curl ").replace("connect-sidecar run -- ", ""));
    let again: Value = serde_json::from_str(&printed(&workspace, &shell, &[]).await).expect("JSON");
    assert_eq!(again["token"], curl["token"]);
}

#[tokio::test]
async fn a_route_handler_of_next_js_gets_one() {
    let Some(packages) = npm::next().await else { return };
    let workspace = Workspace::new().await;
    // What is not below the packages is not compiled.
    let app = tempfile::tempdir_in(&packages).expect("a directory");
    let at = |name: &str| -> PathBuf { app.path().join(name) };
    fs::create_dir_all(at("app/slack")).expect("directories");
    let config = "module.exports = { turbopack: { root: require('node:path').dirname(__dirname) } };";
    let layout = "export default ({ children }) => <html><body>{children}</body></html>;";
    let package = r#"{"scripts":{"dev":"next dev --hostname 127.0.0.1 --port 0"}}"#;
    for (name, content) in [
        ("next.config.js", config),
        ("app/layout.js", layout),
        ("package.json", package),
        ("app/slack/route.js", blocks("javascript")[0]),
    ] {
        fs::write(at(name), content).expect("a file");
    }
    let _serving: Serving = workspace.serve(&[]).await;
    let next = packages.join("node_modules/.bin");
    let mut command = shell(&workspace, &format!("exec {}", line("connect-sidecar run -- npm ")), &[&next]);
    command.env("CONNECT_SIDECAR_PROJECT", workspace.project()).current_dir(app.path());
    let mut child = command.spawn().expect("a process");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    let url = async {
        while let Some(line) = lines.next_line().await.expect("text") {
            if let Some((_, url)) = line.split_once("Local:") {
                return url.trim().to_owned();
            }
        }
        panic!("it ended");
    };
    let url = soon("Next.js", url).await;
    let reply = curl(&[&format!("{url}/slack")]).await;
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(nix::unistd::Pid::from_raw).expect("a process");
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("a signal");
    soon("the end", child.wait()).await.expect("a status");
    assert!(reply.status == 200 && reply.json()["works"] == true, "{reply:?}");
}
