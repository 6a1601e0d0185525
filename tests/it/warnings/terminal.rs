//! Warnings on a terminal.

use super::about;
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;

const SIDECAR: &str = env!("CARGO_BIN_EXE_connect-sidecar");
const WARNING: &str = "the OIDC token of acme/web expires in 9 min, run `vercel env pull`";

#[tokio::test]
async fn warnings_are_coloured_as_a_whole_and_other_lines_are_not() {
    let workspace = Workspace::new().await;
    workspace.pull(about(9));
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    terminal.enter(&format!("TERM=xterm {SIDECAR}")).await;
    let before = terminal.sees("\x1b[33m").await;
    assert!(before.contains(" INFO token of acme/web loaded from .env.local"), "{before:?}");
    let warning = terminal.sees("\x1b[0m").await;
    assert!(warning.contains(&format!("  WARN {WARNING}")) && !warning.contains('\n'), "{warning:?}");
    terminal.press("\x03").await;
    assert_eq!(terminal.code().await, 0);

    workspace.pull(std::time::Duration::from_secs(1));
    terminal.enter(&format!("TERM=xterm {SIDECAR}")).await;
    terminal.sees("\x1b[31m").await;
    let error = terminal.sees("\x1b[0m").await;
    assert!(error.contains(" ERROR the OIDC token of acme/web expired"), "{error:?}");
    terminal.press("\x03").await;
    terminal.code().await;
    terminal.close().await;
}

#[tokio::test]
async fn warnings_are_plain_without_colours() {
    for variable in ["NO_COLOR=1 TERM=xterm", "TERM=dumb"] {
        let workspace = Workspace::new().await;
        workspace.pull(about(9));
        let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
        terminal.enter(&format!("{variable} {SIDECAR}")).await;
        let mut shown = terminal.sees(WARNING).await;
        terminal.press("\x03").await;
        terminal.enter("echo over-$((1+1))").await;
        shown += &terminal.sees("over-2").await;
        assert!(!shown.contains('\x1b'), "{variable}: {shown:?}");
        terminal.close().await;
    }
}
