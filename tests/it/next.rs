//! A real Next.js app in development mode, edited while it runs through the sidecar.

use std::net::SocketAddr;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;

use crate::clients::curl;
use crate::preload::path_with;
use crate::support::workspace::Workspace;
use crate::support::{npm, soon};

const CONFIG: &str = "module.exports = { turbopack: { root: require('node:path').dirname(__dirname) } };";
const LAYOUT: &str = "export default ({ children }) => <html><body>{children}</body></html>;";
/// Responds with a token and the number of the edit.
const ROUTE: &str = r#"
import { getToken } from "@vercel/connect";
export const dynamic = "force-dynamic";
export async function GET() {
  return Response.json({ edit: EDIT, token: await getToken("slack/acme-slack", { subject: { type: "app" } }) });
}
"#;

/// `run -- next dev`.
struct Next {
    child: Child,
    addr: SocketAddr,
}

impl Next {
    async fn start(workspace: &Workspace, app: &Path, node: &Path) -> Self {
        let project = workspace.project();
        let project = project.to_str().expect("a path");
        let mut command = workspace.sidecar(&["--project", project, "run", "--", "node"]);
        command.args(["../node_modules/next/dist/bin/next", "dev", "--hostname", "127.0.0.1", "--port", "0"]);
        command.current_dir(app).env("PATH", path_with(node)).env("NEXT_TELEMETRY_DISABLED", "1");
        // Ended with SIGTERM on drop, so that it terminates its own children.
        let mut child = command.kill_on_drop(false).spawn().expect("a process");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let addr = async {
            while let Some(line) = lines.next_line().await.expect("text") {
                if let Some((_, addr)) = line.split_once("Local:").and_then(|(_, url)| url.split_once("http://")) {
                    return addr.trim().parse().expect("an address");
                }
            }
            panic!("it ended");
        };
        let addr = soon("Next.js", addr).await;
        // Drains the lines that it prints for each request.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child, addr }
    }

    /// Sends SIGTERM.
    fn signal(&self) {
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
    }

    /// Ends it and checks that nothing is left.
    async fn end(mut self) {
        self.signal();
        soon("the end", self.child.wait()).await.expect("a status");
        assert!(TcpStream::connect(self.addr).await.is_err(), "nothing is left");
    }

    /// The token that the route returns once this edit is active.
    async fn token(&self, edit: u64) -> String {
        let answer = async {
            loop {
                let reply = curl(&[&format!("http://{}/api/token", self.addr)]).await;
                assert_eq!(reply.status, 200, "{reply:?}");
                let json = reply.json();
                if json["edit"] == edit {
                    return json["token"].as_str().expect("a token").to_owned();
                }
            }
        };
        soon("the edit", answer).await
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        self.signal();
    }
}

#[tokio::test]
async fn a_next_route_handler_keeps_its_token_across_edits() {
    let Some(node) = npm::node(npm::NODES[2]).await else { return };
    let Some(packages) = npm::next().await else { return };
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    let project = tempfile::tempdir_in(packages).expect("a directory");
    let route = project.path().join("app/api/token/route.js");
    let edit = |number: u64| std::fs::write(&route, ROUTE.replace("EDIT", &number.to_string())).expect("a file");
    std::fs::create_dir_all(route.parent().expect("a parent")).expect("directories");
    for (name, content) in [("next.config.js", CONFIG), ("app/layout.js", LAYOUT), ("package.json", "{}")] {
        std::fs::write(project.path().join(name), content).expect("a file");
    }
    edit(1);
    let next = Next::start(&workspace, project.path(), &node).await;
    let first = next.token(1).await;
    assert!(first.starts_with("xoxe.xoxb-"), "{first}");
    for number in [2, 3] {
        edit(number);
        assert_eq!(next.token(number).await, first);
    }
    next.end().await;
    let restarted = Next::start(&workspace, project.path(), &node).await;
    assert_eq!(restarted.token(3).await, first);
    restarted.end().await;
    assert_eq!(workspace.emulator.received().len(), 1, "edits and a restart cause no request");
}
