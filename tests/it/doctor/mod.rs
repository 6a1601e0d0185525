//! `doctor` with the built binary: each fault is created and found by its code, and the doctor changes nothing.

mod cli;
mod files;
mod network;
mod running;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::World;
use serde_json::Value;
use tokio::process::Command;

use crate::support::process::{Ended, assert_no_slice_of, run};
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;
use crate::support::{env_file, write_private};

/// The result of `doctor --json`.
#[derive(Debug)]
struct Checkup {
    code: Option<i32>,
    ok: bool,
    findings: Vec<Value>,
}

impl Checkup {
    /// The finding with this code. Checks its severity.
    #[track_caller]
    fn found(&self, severity: &str, code: &str) -> &Value {
        let found = self.findings.iter().find(|finding| finding["code"] == code);
        let found = found.unwrap_or_else(|| panic!("no {code} in {self:#?}"));
        assert_eq!(found["severity"], severity, "{found:#?}");
        assert_eq!((self.ok, self.code), if self.has_problems() { (false, Some(1)) } else { (true, Some(0)) });
        found
    }

    fn has_problems(&self) -> bool {
        self.findings.iter().any(|finding| finding["severity"] == "problem")
    }

    /// The codes of all problems and warnings.
    fn bad(&self) -> Vec<&str> {
        let is_bad = |f: &&Value| f["severity"] == "problem" || f["severity"] == "warning";
        self.findings.iter().filter(is_bad).map(|f| f["code"].as_str().expect("a code")).collect()
    }
}

fn doctor(workspace: &Workspace) -> Command {
    workspace.sidecar(&["doctor", "--json"])
}

/// Runs the doctor, and checks that it printed no token, sent none and changed nothing.
async fn check_up(workspace: &Workspace, command: Command) -> Checkup {
    let before = snapshot(workspace.home.path());
    let asked_before = workspace.emulator.received().len();
    let ended = run(command).await;
    assert_eq!(before, snapshot(workspace.home.path()), "something was changed");
    assert_no_slice_of(tokens(workspace).iter().map(String::as_str), &format!("{}{}", ended.stdout, ended.stderr));
    for request in &workspace.emulator.received()[asked_before..] {
        assert!(!request.headers.contains_key("authorization"), "{request:?}");
    }
    let Ended { code, stdout, stderr } = ended;
    let json: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}{stderr}"));
    assert_eq!((&json["version"], stderr.as_str()), (&1.into(), ""));
    let findings = json["findings"].as_array().expect("a list").clone();
    Checkup { code, ok: json["ok"].as_bool().expect("a boolean"), findings }
}

/// All tokens in env files of the project.
fn tokens(workspace: &Workspace) -> Vec<String> {
    let entries = fs::read_dir(workspace.project()).expect("a project").map(|entry| entry.expect("an entry").path());
    let texts = entries.filter(|path| path.is_file()).filter_map(|path| fs::read_to_string(path).ok());
    let mut tokens = vec![workspace.token.clone()];
    for text in texts {
        let values = text.lines().filter_map(|line| line.strip_prefix("VERCEL_OIDC_TOKEN="));
        tokens.extend(values.map(|value| value.trim_matches('"').to_owned()).filter(|value| value.len() > 100));
    }
    tokens
}

/// Mode, modification time and content of everything below a directory.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let meta = fs::symlink_metadata(&path).expect("there");
            let content = if meta.is_file() { fs::read(&path).expect("a file") } else { Vec::new() };
            if meta.is_dir() {
                dirs.push(path.clone());
            }
            all.insert(path, (meta.mode(), meta.mtime(), meta.mtime_nsec(), content));
        }
    }
    all
}

/// Links the project to this Vercel project.
fn link(workspace: &Workspace, project_id: &str, org_id: &str) {
    fs::create_dir_all(workspace.project().join(".vercel")).expect("a directory");
    let json = serde_json::json!({"projectId": project_id, "orgId": org_id, "projectName": "web"});
    fs::write(workspace.project().join(".vercel/project.json"), json.to_string()).expect("a file");
}

/// Runs git in the project.
fn git(workspace: &Workspace, arguments: &[&str]) {
    let mut command = std::process::Command::new("git");
    command.env_clear().env("PATH", std::env::var_os("PATH").expect("a path")).env("HOME", workspace.home.path());
    let output = command.args(arguments).current_dir(workspace.project()).output().expect("git");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A workspace without faults: linked to the token's project, in a repository that ignores the env file.
pub async fn healthy() -> Workspace {
    let workspace = Workspace::new().await;
    let subject = Subject::development(&World::demo());
    link(&workspace, &subject.project_id, &subject.owner_id);
    git(&workspace, &["init", "--quiet"]);
    fs::write(workspace.project().join(".gitignore"), ".env*\n.vercel\n").expect("a file");
    workspace
}

#[tokio::test]
async fn a_healthy_setup_has_no_problem_and_no_warning() {
    let workspace = healthy().await;
    let checkup = check_up(&workspace, doctor(&workspace)).await;
    assert_eq!(checkup.bad(), [""; 0], "{checkup:#?}");
    assert_eq!(checkup.found("note", "not_running")["fix"], "connect-sidecar");
    let serving = workspace.serve(&[]).await;
    let checkup = check_up(&workspace, doctor(&workspace)).await;
    assert_eq!(checkup.bad(), [""; 0], "{checkup:#?}");
    let title = checkup.found("ok", "instance")["title"].as_str().expect("text");
    assert!(title.contains(&serving.addr.to_string()), "{title}");
    for code in ["configuration", "credential", "network", "link", "watching"] {
        checkup.found("ok", code);
    }
}

#[tokio::test]
async fn text_output_is_wrapped_escaped_and_colored_only_on_a_terminal() {
    let workspace = healthy().await;
    let ended = run(workspace.sidecar(&["doctor"])).await;
    assert!(ended.stdout.ends_with("0 problems, 0 warnings, 2 notes\n") && !ended.stdout.contains('\x1b'), "{ended:?}");
    assert!(ended.stdout.lines().all(|line| line.chars().count() <= 100), "{}", ended.stdout);
    let mut subject = Subject::development(&World::demo());
    subject.project = "web\x1b[2J\u{202e}".into();
    let token = workspace.emulator.oidc_token_for(&subject, std::time::Duration::from_secs(60));
    write_private(&workspace.project().join(".env.local"), &env_file(&token));
    let ended = run(workspace.sidecar(&["doctor"])).await;
    assert!(ended.stdout.contains(r"web\u{1b}[2J\u{202e}") && !ended.stdout.contains('\x1b'), "{}", ended.stdout);

    let command = workspace.sidecar(&[]);
    let program = command.as_std().get_program().to_str().expect("a path").to_owned();
    let mut terminal = Terminal::like(&command).await;
    terminal.enter(&format!("TERM=xterm {program} doctor; echo end-$((1+1))")).await;
    assert!(terminal.sees("end-2").await.contains("\x1b[1;31mproblem"));
    terminal.enter(&format!("TERM=xterm NO_COLOR=1 {program} doctor; echo end-$((1+2))")).await;
    assert!(!terminal.sees("end-3").await.contains("\x1b["));
    terminal.enter(&format!("TERM=dumb {program} doctor; echo end-$((2+2))")).await;
    assert!(!terminal.sees("end-4").await.contains("\x1b["));
    terminal.close().await;
}

#[tokio::test]
async fn every_configuration_mistake_is_a_problem_and_the_rest_is_still_checked() {
    let workspace = healthy().await;
    fs::write(workspace.project().join("sidecar.toml"), "prot = 1\nupstream = \"https://evil.example\"\n")
        .expect("a file");
    let mut command = doctor(&workspace);
    command.env("CONNECT_SIDECAR_LOG_LEVEL", "loud");
    let checkup = check_up(&workspace, command).await;
    assert_eq!(checkup.bad(), ["configuration"; 3], "{checkup:#?}");
    let titles: Vec<_> = checkup.findings[..3].iter().map(|f| f["title"].as_str().expect("text")).collect();
    for place in ["sidecar.toml:1: unknown key `prot`", "sidecar.toml:2: `upstream`", "CONNECT_SIDECAR_LOG_LEVEL:"] {
        assert!(titles.iter().any(|title| title.contains(place)), "{place} in {titles:?}");
    }
    checkup.found("ok", "network");
    checkup.found("ok", "credential");

    let nowhere = check_up(&workspace, workspace.sidecar(&["doctor", "--json", "--project", "/nowhere"])).await;
    assert_eq!(nowhere.bad(), ["configuration"]);
    assert_eq!(run(workspace.sidecar(&["doctor", "--nonsense"])).await.code, Some(2));
}

#[tokio::test]
async fn an_access_token_is_checked_for_presence() {
    let workspace = healthy().await;
    let missing = check_up(&workspace, workspace.sidecar(&["doctor", "--json", "--auth", "access-token"])).await;
    let title = missing.found("problem", "configuration")["title"].as_str().expect("text");
    assert!(title.contains("VERCEL_TOKEN"), "{title}");
    let mut command = workspace.sidecar(&["doctor", "--json", "--auth", "access-token"]);
    command.env("VERCEL_TOKEN", "vca_canary_of_an_access_token");
    let set = check_up(&workspace, command).await;
    set.found("ok", "credential");
    assert!(set.bad().is_empty() && !format!("{set:?}").contains("canary"), "{set:#?}");
}
