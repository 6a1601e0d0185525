//! What the README says is so: its commands run, its programs work, its settings and errors are the real ones.

mod run;

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::support::desk::Desk;
use crate::support::process::{Serving, run};
use crate::support::{Scene, Stage};

const README: &str = include_str!("../../README.md");
const CI: &str = include_str!("../../.ci/run");

/// The fenced blocks of a language.
fn blocks(language: &str) -> Vec<&'static str> {
    let opening = format!("\n```{language}\n");
    README.split(opening.as_str()).skip(1).filter_map(|rest| rest.split("\n```").next()).collect()
}

/// Runs a program of the README against the stage; what it prints.
async fn printed(stage: &Stage, program: &[&str], text: &str) -> String {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).arg(text.replace("2774", &stage.addr.port().to_string()));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{text}\n{ended:?}");
    ended.stdout
}

#[tokio::test]
async fn its_requests_get_a_token_from_every_language() {
    let stage = Scene::new().start().await;
    let is_plain_curl = |block: &&str| block.starts_with("curl ") && !block.contains(" --unix-socket ");
    let curls: Vec<_> = blocks("sh").into_iter().filter(is_plain_curl).collect();
    assert_eq!((curls.len(), blocks("js").len(), blocks("python").len()), (1, 1, 1));
    let reply = printed(&stage, &["sh", "-c"], curls[0]).await;
    assert!(reply.starts_with("HTTP/1.1 200 OK") && reply.contains("\"token\":\"xoxe.xoxb-"), "{reply}");
    let node = printed(&stage, &["node", "--input-type=module", "--eval"], blocks("js")[0]).await;
    assert!(node.starts_with("xoxe.xoxb-"), "{node}");
    let python = printed(&stage, &["python3", "-c"], blocks("python")[0]).await;
    assert!(python.starts_with("xoxe.xoxb-"), "{python}");
    assert_eq!(stage.emulator.received().len(), 1, "they ask for the same");
}

#[tokio::test]
async fn its_unix_socket_is_made_and_gives_a_token() {
    let [start, curl] = blocks("sh").into_iter().filter(|b| b.contains(" --unix-socket ")).collect::<Vec<_>>()[..]
    else {
        panic!("a line that starts it, and one that asks");
    };
    let desk = Desk::new().await;
    let runtime_dir = desk.project().with_file_name("runtime");
    std::fs::create_dir(&runtime_dir).expect("a directory");
    // As a shell would read the arguments, for the program that the tests have built.
    let shell = |command: Command, line: &str| {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", line, "sh"])
            .arg(command.as_std().get_program())
            .env_clear()
            .env("XDG_RUNTIME_DIR", &runtime_dir);
        shell.envs(command.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.current_dir(desk.project()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell.kill_on_drop(true);
        shell
    };
    let line = start.replacen("connect-sidecar", "exec \"$1\"", 1);
    let _serving = Serving::start(shell(desk.sidecar(&[]), &line)).await;
    let reply = run(shell(desk.sidecar(&[]), curl)).await;
    assert!(
        reply.stdout.starts_with("HTTP/1.1 200 OK") && reply.stdout.contains("\"token\":\"xoxe.xoxb-"),
        "{reply:?}"
    );
}

/// Each command is run somewhere: here, by another test, or by `.ci/run`.
#[test]
fn its_commands_are_all_run() {
    let in_tests = ["connect-sidecar", "vercel link", "vercel env pull"];
    // In `run`, and with the real CLI in `unmodified`.
    let runs_apps = |command: &str| command.starts_with("connect-sidecar run -- ") || command.starts_with("eval ");
    let in_ci = |command: &str| {
        let plain = |line: &str| line.replace(" --locked", "");
        let runs = |line: &str| plain(line).starts_with(&format!("step {}", plain(command)));
        CI.lines().any(runs)
    };
    let mut commands: Vec<_> = blocks("sh")
        .into_iter()
        .flat_map(str::lines)
        .filter(|c| !c.starts_with("curl ") && !c.contains(" --unix-socket "))
        .collect();
    commands.extend(
        README
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|c| c.starts_with("cargo ")),
    );
    for command in commands {
        assert!(in_tests.contains(&command) || runs_apps(command) || in_ci(command), "nobody runs `{command}`");
    }
}

#[test]
fn its_settings_are_those_of_the_projects_file() {
    let file = include_str!("../../sidecar.toml");
    assert_eq!(blocks("toml").len(), 1);
    assert!(file.trim_end().ends_with(blocks("toml")[0]), "{file}");
}

#[tokio::test]
async fn its_error_is_what_an_app_gets() {
    let stage = Scene::new().token_life(Duration::from_secs(3600)).start().await;
    stage.pass(Duration::from_secs(3600 + 12 * 60));
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.text().as_str()), (503, blocks("json")[0]));
}
