//! A terminal with a shell in it: what is typed, and what is shown.

use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::soon;

/// Runs its arguments in a terminal that they control, and passes on what is typed and shown.
const IN_TERMINAL: &str = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";

/// An interactive shell. It does not echo what is typed.
pub struct Terminal {
    shell: Child,
    keys: ChildStdin,
    screen: ChildStdout,
    shown: String,
}

impl Terminal {
    /// Opens one in the directory and with the variables of this command, which is not run.
    pub async fn like(command: &Command) -> Self {
        let command = command.as_std();
        let mut shell = Command::new("python3");
        shell.args(["-c", IN_TERMINAL, "bash", "--norc", "--noprofile", "--noediting", "-i"]).env_clear();
        for (name, value) in command.get_envs() {
            shell.env(name, value.expect("a value"));
        }
        shell.env("TERM", "dumb").current_dir(command.get_current_dir().expect("a directory"));
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true);
        let mut shell = shell.spawn().expect("a terminal");
        let (keys, screen) = (shell.stdin.take().expect("keys"), shell.stdout.take().expect("a screen"));
        let mut terminal = Self { shell, keys, screen, shown: String::new() };
        terminal.enter("stty -echo; PS1= PS2=; echo opened-$((1+1))").await;
        terminal.sees("opened-2").await;
        terminal
    }

    /// Types a line.
    pub async fn enter(&mut self, line: &str) {
        self.press(&format!("{line}\n")).await;
    }

    /// Types these characters.
    pub async fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).await.expect("a terminal");
    }

    /// Returns once this is shown, and forgets all up to it; what was shown before it.
    pub async fn sees(&mut self, text: &str) -> String {
        loop {
            if let Some(at) = self.shown.find(text) {
                let rest = self.shown.split_off(at + text.len());
                return std::mem::replace(&mut self.shown, rest);
            }
            let mut bytes = [0; 4096];
            let shown = &self.shown;
            let read =
                soon(&format!("{text:?} after {shown:?}"), self.screen.read(&mut bytes)).await.expect("a screen");
            assert_ne!(read, 0, "closed without {text:?}: {:?}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    /// Returns once a line with nothing but a number is shown.
    pub async fn sees_a_number(&mut self) -> i32 {
        loop {
            let line = self.sees("\r\n").await;
            if let Ok(number) = line.trim().parse() {
                return number;
            }
        }
    }

    /// The exit code of the last command.
    pub async fn code(&mut self) -> u8 {
        self.enter("echo code-$?.").await;
        self.sees("code-").await;
        self.sees(".").await.trim_end_matches('.').parse().expect("a code")
    }

    /// Leaves the shell.
    pub async fn close(mut self) {
        self.enter("exit").await;
        soon("the shell's end", self.shell.wait()).await.expect("a status");
    }
}
