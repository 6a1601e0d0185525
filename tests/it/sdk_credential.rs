//! An app with an official SDK while it runs: what it holds of the credential, and what it notices of the credential's
//! changes. That is nothing.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::run::secret_part;
use crate::support::process::Running;
use crate::support::workspace::Workspace;
use crate::support::{SLACK, env_file, npm, python, write_private};

/// The length of a slice of a secret that is too much of it, in bytes.
const SLICE: usize = 16;
/// Half of it: wherever in memory a slice lies, a block of this length at a multiple of it is within.
const BLOCK: usize = SLICE / 2;
/// A page without anything in it.
const EMPTY: [u8; 4096] = [0; 4096];
/// Memory is read in pieces of this length.
const PIECE: u64 = 4 * 1024 * 1024;

/// An app that asks for a token when it is told to.
struct App {
    running: Running,
    pid: Pid,
}

impl App {
    /// The app in this language, run with these flags of `run`. `None` where what it needs cannot be had.
    async fn start(workspace: &Workspace, language: &str, flags: &[&str]) -> Option<Self> {
        let program = match language {
            "node" => {
                let (node, sdk) = (npm::node(npm::NODES[3]).await?, npm::connect_sdk("2.3.2").await?);
                let modules = workspace.project().join("node_modules");
                if !modules.exists() {
                    std::os::unix::fs::symlink(sdk, modules).expect("a link");
                }
                fs::write(workspace.project().join("asked.mjs"), include_str!("sdk/asked.mjs")).expect("a file");
                [node.join("node").display().to_string(), "asked.mjs".into()]
            }
            _ => {
                fs::write(workspace.project().join("asked.py"), include_str!("python/asked.py")).expect("a file");
                [python::connect_sdk().await?.display().to_string(), "asked.py".into()]
            }
        };
        let mut command = workspace.sidecar(&["-v", "run"]);
        command.args(flags).args(["--", "sh", "-c", "echo $$; exec \"$@\"", "sh"]).args(program);
        command.process_group(0).stdin(std::process::Stdio::piped());
        let mut running = Running::start(command);
        let pid = running.pid().await;
        Some(Self { running, pid })
    }

    /// The token that it gets, or what it says is wrong.
    async fn ask(&mut self, how: &str) -> Value {
        let stdin = self.running.sidecar.stdin.as_mut().expect("stdin");
        stdin.write_all(format!("{how}\n").as_bytes()).await.expect("it reads");
        serde_json::from_str(&self.running.line().await).expect("JSON")
    }

    /// Lets it end.
    async fn end(mut self) {
        drop(self.running.sidecar.stdin.take());
        let ended = self.running.end().await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }

    fn environment(&self) -> Vec<u8> {
        fs::read(format!("/proc/{}/environ", self.pid)).expect("it runs")
    }

    /// Whether its memory has a slice of this text: all that can be read but what is as it is in a file, which is more
    /// than a core holds.
    fn memory_has_slice_of(&self, secret: &str) -> bool {
        let memory = File::open(format!("/proc/{}/mem", self.pid)).expect("it runs");
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).expect("it runs");
        let mut read_all_of = HashSet::new();
        let mut found = false;
        for line in maps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (range, rights) = (fields.next().expect("a range"), fields.next().expect("rights"));
            let (from, to) = range.split_once('-').expect("two addresses");
            let [from, to] = [from, to].map(|address| u64::from_str_radix(address, 16).expect("an address"));
            let is_as_in_file = !rights.contains('w') && line.contains(" /");
            // The last lies beyond what the offset in a file can say.
            if !rights.starts_with('r') || is_as_in_file || line.ends_with("[vsyscall]") {
                continue;
            }
            for at in (from..to).step_by(PIECE as usize) {
                let mut piece = vec![0; (to - at).min(PIECE + SLICE as u64) as usize];
                if memory.read_exact_at(&mut piece, at).is_ok() {
                    read_all_of.insert(fields.clone().last().unwrap_or_default());
                    found |= has_slice_of(secret, &piece);
                }
            }
        }
        assert!(read_all_of.is_superset(&HashSet::from(["[stack]", "[heap]"])), "{read_all_of:?}");
        found
    }
}

/// Whether there are 16 bytes on end of the secret in this.
fn has_slice_of(secret: &str, bytes: &[u8]) -> bool {
    let secret = secret.as_bytes();
    let blocks: HashSet<_> = secret.windows(BLOCK).collect();
    let begin = |block: &[u8]| usize::from(u16::from_le_bytes([block[0], block[1]]));
    let mut begins = vec![false; 1 << 16];
    blocks.iter().for_each(|block| begins[begin(block)] = true);
    let is_whole = |at: usize| {
        let around = &bytes[at.saturating_sub(BLOCK)..bytes.len().min(at + SLICE)];
        around.windows(SLICE).any(|slice| secret.windows(SLICE).any(|of| of == slice))
    };
    // Most of a process's memory was never written.
    let pages = bytes.chunks(EMPTY.len()).enumerate().filter(|(_, page)| **page != EMPTY[..page.len()]);
    pages.map(|(number, page)| (number * EMPTY.len(), page)).any(|(offset, page)| {
        let mut at = page.chunks_exact(BLOCK).enumerate();
        at.any(|(number, block)| begins[begin(block)] && blocks.contains(block) && is_whole(offset + number * BLOCK))
    })
}

#[test]
fn a_slice_is_found_wherever_it_lies_and_nothing_less() {
    let secret = "0123456789abcdefghijklmnopqrstuvwxyz";
    for begin in 0..=secret.len() - SLICE {
        for offset in 0..2 * SLICE {
            let with = |length: usize| {
                [&vec![b'-'; offset], &secret.as_bytes()[begin..begin + length], &[b'-'; SLICE]].concat()
            };
            assert!(has_slice_of(secret, &with(SLICE)), "{begin} {offset}");
            assert!(!has_slice_of(secret, &with(SLICE - 1)), "{begin} {offset}");
        }
    }
}

async fn nothing_of_the_token_is_held(language: &str) {
    let workspace = Workspace::new().await;
    let secret = secret_part(&workspace.token);
    for (flags, is_held) in [(&[][..], false), (&["--expose-token"], true)] {
        let Some(mut app) = App::start(&workspace, language, flags).await else { return };
        let token = app.ask("").await;
        let token = token.as_str().unwrap_or_else(|| panic!("{token}"));
        let environment = app.environment();
        assert_eq!(has_slice_of(secret, &environment), is_held, "{language} {flags:?}");
        assert_eq!(app.memory_has_slice_of(secret), is_held, "{language} {flags:?}");
        assert!(app.memory_has_slice_of(token), "{language}: its own token is there");
        app.end().await;
    }
}

#[tokio::test]
async fn nothing_of_the_token_is_in_the_environment_or_memory_of_a_node_app() {
    nothing_of_the_token_is_held("node").await;
}

#[tokio::test]
async fn nothing_of_the_token_is_in_the_environment_or_memory_of_a_python_app() {
    nothing_of_the_token_is_held("python").await;
}

async fn changes_go_unnoticed(language: &str, class: &str) {
    let workspace = Workspace::new().await;
    let file = workspace.project().join(".env.local");
    write_private(&file, &workspace.emulator.env_file(DEVELOPMENT_LIFE, Duration::ZERO));
    let Some(mut app) = App::start(&workspace, language, &[]).await else { return };
    let error = app.ask("").await;
    assert_eq!((&error["name"], &error["code"]), (&json!(class), &json!("oidc_token_expired")), "{error}");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("Run `vercel env pull`")), "{error}");
    assert_eq!(workspace.emulator.count(SLACK), 0, "nobody is asked with it");

    for (asked, life) in [(1, DEVELOPMENT_LIFE), (2, 2 * DEVELOPMENT_LIFE)] {
        let rotated = workspace.emulator.oidc_token(life);
        write_private(&file, &env_file(&rotated));
        app.running.wait_for_log("token refreshed").await;
        let token = app.ask("anew").await;
        assert!(token.is_string(), "{language}: {token}");
        let received = workspace.emulator.received();
        let last = received.iter().rfind(|request| request.target == SLACK).expect("a request");
        assert_eq!(last.headers["authorization"], format!("Bearer {rotated}"));
        assert_eq!(workspace.emulator.count(SLACK), asked);
    }
    app.end().await;
}

#[tokio::test]
async fn a_node_app_outlives_the_token_and_is_told_how_to_get_another() {
    changes_go_unnoticed("node", "ConnectError").await;
}

#[tokio::test]
async fn a_python_app_outlives_the_token_and_is_told_how_to_get_another() {
    changes_go_unnoticed("python", "ConnectApiError").await;
}
