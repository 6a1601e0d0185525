//! What the README says of knowing before the token expires: its commands, prompts, fields and names are the real ones.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::world::World;
use connect_sidecar::os::logging::FIELDS;

use super::run::{line, printed, serve, shell};
use super::{README, blocks, section};
use crate::doctor::healthy;
use crate::refresh::{FakeCli, HOUR, MINUTE, be_accepted};
use crate::service::ServiceWorkspace;
use crate::support::http::APP;
use crate::support::installed::program;
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;
use crate::support::{Scene, env_file, write_private};

/// What is between the backticks of a text.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[tokio::test]
async fn a_running_sidecar_answers_its_commands() {
    let workspace = Workspace::new().await;
    let _serving = serve(&workspace, line("connect-sidecar"), &[]).await;
    let commands = blocks("sh").into_iter().find(|block| block.contains("connect-sidecar status")).expect("a block");
    let said = ["web  valid", "xoxe.xoxb-", " INFO token slack/acme-slack ", "forgot 1 token of slack/acme-slack\n"];
    assert_eq!(commands.lines().count(), said.len(), "{commands}");
    for (command, said) in commands.lines().zip(said) {
        let shown = printed(&workspace, command, &[]).await;
        assert!(shown.contains(said), "{command}: {shown}");
    }
}

#[tokio::test]
async fn doctor_finds_nothing_where_all_is_well() {
    let workspace = healthy().await;
    let shown = printed(&workspace, line("connect-sidecar doctor"), &[]).await;
    assert!(shown.contains("\n0 problems, 0 warnings, "), "{shown}");
}

#[tokio::test]
async fn the_cli_gets_a_token_before_the_end_and_when_asked() {
    for (start, life) in [(line("connect-sidecar --refresh"), MINUTE), (line("connect-sidecar"), HOUR)] {
        let (workspace, cli) = (Workspace::new().await, FakeCli::printing());
        write_private(&workspace.project().join(".env.local"), &env_file(&workspace.emulator.oidc_token(life)));
        cli.prints_token(&workspace.emulator.oidc_token(DEVELOPMENT_LIFE));
        let mut serving = serve(&workspace, start, &[cli.dir()]).await;
        if life == MINUTE {
            be_accepted(&serving).await;
        } else {
            let shown = printed(&workspace, line("connect-sidecar refresh"), &[]).await;
            assert!(shown.starts_with("refreshed: acme/web, expires in "), "{shown}");
        }
        serving.wait_for_log("token refreshed, expires in ").await;
        assert_eq!(cli.runs(), 1, "{start}");
    }
}

#[tokio::test]
async fn a_service_is_installed_and_started() {
    let office = ServiceWorkspace::new().await;
    let shown = printed(&office.workspace, line("connect-sidecar service"), &[]).await;
    assert!(shown.contains(office.unit().0.to_str().expect("a path")), "{shown}");
    assert_eq!(office.calls().pop().as_deref(), Some("--user restart UNIT"));
}

/// In its own words; of a project whose name is not for prompts to expand, too.
#[tokio::test]
async fn prompts_show_the_time_left_what_to_run_or_nothing() {
    let (_, told) = README.split_once("\nIn the prompt, ").expect("what it shows");
    let [valid, expired] = quoted(told).take(2).collect::<Vec<_>>()[..] else { panic!("{told}") };
    for (name, start, language, rest) in [
        ("bash", "exec bash --noprofile --noediting -i", "bash", ["$ ", "# "]),
        ("zsh", "exec zsh -i", "zsh", ["% ", "# "]),
    ] {
        if !program(name).await {
            continue;
        }
        let workspace = Workspace::new().await;
        let [settings] = blocks(language)[..] else { panic!("one block for {name}") };
        fs::write(workspace.home.path().join(format!(".{name}rc")), settings).expect("a file");
        let mut terminal = Terminal::like(&shell(&workspace, "", &[])).await;
        let end = rest[usize::from(nix::unistd::geteuid().is_root())];
        terminal.enter(start).await;
        terminal.sees(&format!("web {end}")).await;

        let serving = workspace.serve(&[]).await;
        terminal.enter("").await;
        terminal.sees(&format!("web ({valid}) {end}")).await;
        serving.stop().await;

        let subject = Subject { project: "5%n".into(), ..Subject::development(&World::demo()) };
        let token = workspace.emulator.oidc_token_for(&subject, Duration::ZERO);
        write_private(&workspace.project().join(".env.local"), &env_file(&token));
        let _serving = workspace.serve(&[]).await;
        terminal.enter("").await;
        terminal.sees(&format!("web ({}) {end}", expired.replace("web ", "5%n "))).await;
        terminal.close().await;
    }
}

#[tokio::test]
async fn tmux_shows_the_time_left_in_its_status_line() {
    if !program("tmux").await {
        return;
    }
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    fs::write(workspace.home.path().join(".tmux.conf"), blocks("tmux")[0]).expect("a file");
    let mut command = shell(&workspace, "", &[]);
    command.env("TMUX_TMPDIR", workspace.home.path()).env("SHELL", "/bin/sh").env("LC_ALL", "C.UTF-8");
    let mut terminal = Terminal::like(&command).await;
    // So that it ends with its terminal, also where this test fails.
    let tmux = "exec env TERM=xterm tmux new-session -c ~/web \\; set -g destroy-unattached on";
    terminal.enter(&format!("stty rows 24 cols 100; cd /; {tmux}")).await;
    terminal.sees("web 11 h 59 min").await;
    terminal.close().await;
}

#[test]
fn the_fields_are_those_of_the_log() {
    let (_, told) = section("Know before it expires").split_once("each line is an object with ").expect("its fields");
    let (always, table) = told.split_once("| --- | --- |\n").expect("a table");
    let first_cells = table.lines().map_while(|row| row.strip_prefix("| ")?.split(" | ").next());
    let named: Vec<_> = quoted(always).chain(first_cells.flat_map(quoted)).collect();
    assert_eq!(named, FIELDS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_metrics_are_there_and_the_header_tells_what_it_says() {
    let stage = Scene::new().token_life(2 * HOUR).start().await;
    let metrics = stage.request("GET", "/metrics").send().await.text();
    let named: BTreeSet<_> = quoted(README).filter(|name| name.starts_with("connect_sidecar_")).collect();
    assert!(named.len() > 4, "{named:?}");
    for name in named {
        assert!(metrics.contains(&format!("\n# TYPE {name} ")), "{name}: {metrics}");
    }
    let header = quoted(README).find_map(|quoted| quoted.strip_suffix(": <seconds>")).expect("a header");
    for seconds in [None, Some("3600"), Some("0")] {
        let reply = stage.token(APP).send().await;
        assert_eq!(reply.header(&header.to_lowercase()), seconds);
        stage.pass(HOUR);
    }
}
