//! `completions`: each script works in its shell.

use std::path::PathBuf;

use crate::support::installed::program;
use crate::support::process::{isolated, run};
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;

/// The words before the cursor, the word being typed, and its expected completion.
const COMPLETED: [(&str, &str, &str); 8] = [
    ("connect-sidecar", "st", "status"),
    ("connect-sidecar", "com", "completions"),
    ("connect-sidecar status", "--sh", "--short"),
    ("connect-sidecar token", "--inst", "--installation-id"),
    ("connect-sidecar serve --auth", "acc", "access-token"),
    ("connect-sidecar serve --refresh", "cl", "cli"),
    ("connect-sidecar token --subject", "us", "user"),
    ("connect-sidecar status --log-level", "tr", "trace"),
];

/// Prints the completions of `LAST` after `WORDS` with the shell's `SCRIPT`, one per line.
const BY_BASH: &str = r#"source "$SCRIPT"; COMP_WORDS=($WORDS "$LAST"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _connect__sidecar connect-sidecar "$LAST" "${COMP_WORDS[COMP_CWORD - 1]}"; printf '%s\n' "${COMPREPLY[@]}""#;
const BY_FISH: &str = r#"source "$SCRIPT"; complete -C"$WORDS $LAST" | string replace -r '\t.*' ''"#;

/// A file with the shell's script, if the shell is installed.
async fn script(workspace: &Workspace, shell: &'static str) -> Option<PathBuf> {
    if !program(shell).await {
        return None;
    }
    let script = run(workspace.sidecar(&["completions", shell])).await;
    assert_eq!((script.code, script.stderr.as_str()), (Some(0), ""));
    let file = workspace.home.path().join(shell);
    std::fs::write(&file, &script.stdout).expect("written");
    Some(file)
}

#[tokio::test]
async fn bash_and_fish_complete_commands_flags_and_their_values() {
    let workspace = Workspace::new().await;
    for (shell, program) in [("bash", BY_BASH), ("fish", BY_FISH)] {
        let Some(file) = script(&workspace, shell).await else { continue };
        for (words, last, expected) in COMPLETED {
            let mut command = isolated(shell, workspace.home.path());
            command.args(["-c", program]).env("SCRIPT", &file).env("WORDS", words).env("LAST", last);
            let completed = run(command).await;
            assert_eq!(
                (completed.stdout.trim_end(), completed.stderr.as_str()),
                (expected, ""),
                "{shell}: {words} {last}"
            );
        }
    }
}

#[tokio::test]
async fn zsh_completes_commands_flags_and_their_values() {
    let workspace = Workspace::new().await;
    let Some(file) = script(&workspace, "zsh").await else { return };
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    terminal.enter("exec env TERM=dumb zsh -f -i").await;
    terminal.enter(&format!("PS1=; autoload -Uz compinit; compinit -u; source {}; echo re''ady", file.display())).await;
    terminal.sees("ready\r").await;
    for (words, last, expected) in COMPLETED {
        // Completes with tab, then turns the line into a command that prints it.
        terminal.press(&format!("{words} {last}\t\x01print -r -- '<\x05>'\n")).await;
        terminal.sees(&format!("\n<{words} {expected}")).await;
    }
    terminal.close().await;
}

#[tokio::test]
async fn every_shell_has_a_script_and_a_closed_stdout_is_no_error() {
    let workspace = Workspace::new().await;
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = run(workspace.sidecar(&["completions", shell])).await;
        assert_eq!((script.code, script.stderr.as_str()), (Some(0), ""), "{shell}");
        assert!(script.stdout.contains("access-token"), "{shell}");
        let mut half = workspace.sidecar(&["completions", shell]).spawn().expect("a process");
        drop(half.stdout.take());
        let output = half.wait_with_output().await.expect("a status");
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()), "{shell}");
    }
}
