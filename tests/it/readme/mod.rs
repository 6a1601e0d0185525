//! What the README and the pages in `docs` say is so: its commands run, its programs work, its settings and errors are the real ones.

mod knowing;
mod run;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use connect_sidecar::emulator::errors;
use connect_sidecar::emulator::fault::ScriptKind;
use tempfile::TempDir;
use tokio::process::Command;

use crate::emulator::{admin, emulator};
use crate::preload::path_with;
use crate::support::process::{Serving, isolated, run};
use crate::support::workspace::Workspace;
use crate::support::{Scene, Stage, network};

/// The README and all pages, one after the other; none of them goes on in the next.
const README: &str = concat!(
    include_str!("../../../README.md"),
    "\n## \n",
    include_str!("../../../docs/commands.md"),
    "\n## \n",
    include_str!("../../../docs/run.md"),
    "\n## \n",
    include_str!("../../../docs/emulator.md"),
    "\n## \n",
    include_str!("../../../docs/configuration.md"),
    "\n## \n",
    include_str!("../../../docs/http.md"),
    "\n## \n",
    include_str!("../../../docs/security.md"),
    "\n## \n",
    include_str!("../../../docs/vercel.md"),
    "\n## \n",
    include_str!("../../../docs/architecture.md"),
    "\n## \n",
    include_str!("../../../docs/troubleshooting.md"),
);
const CI: &str = include_str!("../../../.ci/run");

/// The two sections on the emulator: what is in their blocks is run as it stands.
const EMULATOR: [&str; 2] = ["Develop without an account", "Use it in CI"];

/// What is below a heading, up to the next.
fn section(heading: &str) -> &'static str {
    let (_, below) = README.split_once(&format!("\n## {heading}\n")).expect(heading);
    below.split("\n## ").next().unwrap_or(below)
}

/// The fenced blocks of a language, but for those on the emulator.
fn blocks(language: &str) -> Vec<&'static str> {
    let on_emulator: Vec<_> = EMULATOR.iter().flat_map(|heading| blocks_of(section(heading), language)).collect();
    blocks_of(README, language).into_iter().filter(|block| !on_emulator.contains(block)).collect()
}

fn blocks_of(text: &'static str, language: &str) -> Vec<&'static str> {
    let opening = format!("\n```{language}\n");
    text.split(opening.as_str()).skip(1).filter_map(|rest| rest.split("\n```").next()).collect()
}

/// The values of a key in YAML that are text: in its line, or in the deeper lines below it after a `|`.
fn values(yaml: &str, key: &str) -> Vec<String> {
    let depth = |line: &str| line.len() - line.trim_start().len();
    let mut values = Vec::new();
    let mut lines = yaml.lines().peekable();
    while let Some(line) = lines.next() {
        match line.trim_start().trim_start_matches("- ").strip_prefix(&format!("{key}: ")) {
            Some("|") => {
                let mut block = String::new();
                while let Some(next) = lines.next_if(|next| depth(next) > depth(line)) {
                    block += &format!("{}\n", next.trim_start());
                }
                values.push(block);
            }
            Some(value) => values.push(value.to_owned()),
            None => {}
        }
    }
    values
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
    let workspace = Workspace::new().await;
    let runtime_dir = workspace.project().with_file_name("runtime");
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
        shell.current_dir(workspace.project()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell.kill_on_drop(true);
        shell
    };
    let line = start.replacen("connect-sidecar", "exec \"$1\"", 1);
    let _serving = Serving::start(shell(workspace.sidecar(&[]), &line)).await;
    let reply = run(shell(workspace.sidecar(&[]), curl)).await;
    assert!(
        reply.stdout.starts_with("HTTP/1.1 200 OK") && reply.stdout.contains("\"token\":\"xoxe.xoxb-"),
        "{reply:?}"
    );
}

/// A developer's home with a project, `web`, whose test prints a token; `connect-sidecar` is on the `PATH`.
struct Project(TempDir);

impl Project {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let app = "const url = `${process.env.CONNECT_SIDECAR_URL}/v1/connect/token/slack%2Facme-slack`;
            const headers = { 'content-type': 'application/json' };
            const reply = await fetch(url, { method: 'POST', headers, body: '{\"subject\":{\"type\":\"app\"}}' });
            console.log((await reply.json()).token);";
        std::fs::create_dir(dir.path().join("web")).expect("a directory");
        for (name, content) in [
            ("app.mjs", app),
            ("package.json", r#"{"private":true,"scripts":{"test":"node app.mjs"}}"#),
            ("seed.toml", blocks_of(section(EMULATOR[0]), "toml")[0]),
        ] {
            std::fs::write(dir.path().join("web").join(name), content).expect("a file");
        }
        Self(dir)
    }

    fn shell(&self, line: &str) -> Command {
        let mut command = isolated("bash", self.0.path());
        let binary = Path::new(env!("CARGO_BIN_EXE_connect-sidecar")).parent().expect("a directory");
        command
            .current_dir(self.0.path().join("web"))
            .args(["-ec", line])
            .env("PATH", path_with(binary))
            .env("NO_UPDATE_NOTIFIER", "1");
        command
    }

    async fn serve(&self, line: &str) -> Serving {
        Serving::start(self.shell(&format!("exec {line}"))).await
    }

    /// What a line prints, if all is well.
    async fn printed(&self, line: &str) -> String {
        let ended = run(self.shell(line)).await;
        assert_eq!(ended.code, Some(0), "{line}\n{ended:?}");
        ended.stdout
    }
}

#[tokio::test]
async fn its_emulator_serves_an_app_without_an_account() {
    if !network::is_own("readme::its_emulator_serves_an_app_without_an_account") {
        return;
    }
    let (section, project) = (section(EMULATOR[0]), Project::new());
    let commands: Vec<_> = blocks_of(section, "sh").into_iter().flat_map(str::lines).collect();
    let [emulate, fetch, serve, seeded, order, end] = commands[..] else { panic!("{commands:#?}") };
    let token = blocks("sh").into_iter().find(|block| block.starts_with("curl ")).expect("one that asks");

    let mut emulator = project.serve(emulate).await;
    emulator.wait_for_log("the sidecar ").await;
    assert_eq!(emulator.log().trim_end(), blocks_of(section, "text")[0]);
    project.printed(fetch).await;
    let sidecar = project.serve(serve).await;
    assert!(project.printed(token).await.starts_with("HTTP/1.1 200 OK"));
    sidecar.stop().await;
    emulator.stop().await;

    let emulator = project.serve(seeded).await;
    project.printed(fetch).await;
    let sidecar = project.serve(serve).await;
    project.printed(order).await;
    for n in 0..2 {
        assert!(project.printed(token).await.contains(" 503 "), "{n}");
    }
    assert!(project.printed(token).await.starts_with("HTTP/1.1 200 OK"));
    let uninstalled = token.replace("slack%2Facme-slack", "github%2Facme-github");
    assert!(project.printed(&uninstalled).await.contains("client_installation_required"), "as the seed says");
    project.printed(order).await;
    project.printed(end).await;
    assert!(!project.printed(&uninstalled).await.contains(" 503 "));
    sidecar.stop().await;
    emulator.stop().await;
}

#[tokio::test]
async fn its_faults_can_be_ordered() {
    let emulator = emulator("").await;
    let (_, from) = section(EMULATOR[0]).split_once("order it: ").expect("a list");
    let kinds: Vec<_> = from.split_once(", in the seed").expect("its end").0.split('`').skip(1).step_by(2).collect();
    for kind in &kinds {
        let fault = format!(r#"{{"kind":"{kind}","by":"1s","status":503}}"#);
        assert_eq!(admin(&emulator, "POST", "faults", &fault).await.status, 204, "{kind}");
    }
    for (_, name, takes) in ScriptKind::ALL {
        let row = section(EMULATOR[0]).lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("{name} has no row"));
        for parameter in takes.split('`').skip(1).step_by(2) {
            assert!(row.contains(&format!("`{parameter}`")), "{row} lacks `{parameter}`");
        }
    }
    let unknown = admin(&emulator, "POST", "faults", r#"{"kind":"none"}"#).await.text();
    let (_, known) = unknown.split_once("expected one of ").expect("all there are");
    assert_eq!(known.matches('`').count(), 2 * kinds.len(), "{known}, {kinds:?}");
}

#[tokio::test]
async fn its_job_tests_an_app_without_an_account() {
    if !network::is_own("readme::its_job_tests_an_app_without_an_account") {
        return;
    }
    let project = Project::new();
    let steps = values(blocks_of(section(EMULATOR[1]), "yaml")[0], "run");
    let [install, rest @ ..] = steps.as_slice() else { panic!("no steps") };
    assert!(CI.contains(&install.replace("vendor/connect-sidecar", ".")), "{install} is run by nobody");
    // What a runner does when the job is over.
    let job = format!("trap 'kill $!' EXIT\n{}", rest.join("\n"));
    let printed = project.printed(&job).await;
    assert!(printed.contains("xoxe.xoxb-"), "{printed}");
}

#[tokio::test]
async fn its_services_share_one_loopback() {
    if !network::is_own("readme::its_services_share_one_loopback") {
        return;
    }
    let project = Project::new();
    let yaml = blocks_of(section(EMULATOR[1]), "yaml")[1];
    let [emulator, sidecar, app] = &values(yaml, "command")[..] else { panic!("{yaml}") };
    let (healthy, url) = (&values(yaml, "test")[0], &values(yaml, "CONNECT_SIDECAR_URL")[0]);
    let emulator = project.serve(emulator).await;
    let sidecar = project.serve(sidecar).await;
    project.printed(healthy).await;
    let printed = project.printed(&format!("CONNECT_SIDECAR_URL={url} {app}")).await;
    assert!(printed.contains("xoxe.xoxb-"), "{printed}");
    sidecar.stop().await;
    emulator.stop().await;
}

#[test]
fn its_errors_are_those_of_the_emulator() {
    assert!(
        section(EMULATOR[1]).trim_end().ends_with(errors::markdown(false).trim_end()),
        "{}",
        errors::markdown(false)
    );
}

#[test]
fn its_tests_exist() {
    let named: Vec<_> = section(EMULATOR[1])
        .lines()
        .filter(|line| line.starts_with("| "))
        .flat_map(|row| row.split('`').skip(1).step_by(2))
        .filter(|name| name.contains("::"))
        .collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        let (module, test) = name.rsplit_once("::").expect("a path");
        let path = format!("{}/tests/it/{}", env!("CARGO_MANIFEST_DIR"), module.replace("::", "/"));
        let sources = [format!("{path}.rs"), format!("{path}/mod.rs")];
        let source = sources.iter().find_map(|file| std::fs::read_to_string(file).ok());
        let source = source.unwrap_or_else(|| panic!("{name}: there is no {sources:?}"));
        let is_there = ["#[tokio::test]\nasync fn", "#[test]\nfn"]
            .iter()
            .any(|start| source.contains(&format!("{start} {test}()")));
        assert!(is_there, "there is no {name}");
    }
}

/// Each command is run somewhere: here, by another test, or by `.ci/run`.
#[test]
fn its_commands_are_all_run() {
    let in_tests = [
        "connect-sidecar",
        "vercel link",
        "vercel env pull",
        // In `knowing`.
        "connect-sidecar status",
        "connect-sidecar token slack/acme-slack",
        "connect-sidecar logs",
        "connect-sidecar cache clear slack/acme-slack",
        "connect-sidecar doctor",
        "connect-sidecar --refresh cli",
        "connect-sidecar refresh",
        "connect-sidecar service install",
    ];
    // In `run`, and with the real CLI in `vercel_cli`.
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

/// The anchor of a heading, as forges make it: letters, digits and hyphens of its text.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim_start().to_lowercase().replace(' ', "-");
    text.chars().filter(|c| c.is_alphanumeric() || *c == '-').collect()
}

#[test]
fn links_and_pictures_lead_somewhere_and_every_page_is_tested() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |page: &Path| std::fs::read_to_string(page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
    let docs = std::fs::read_dir(root.join("docs")).expect("a directory").flatten().map(|entry| entry.path());
    let docs: Vec<_> = docs.collect();
    for page in &docs {
        assert!(README.contains(&read(page)), "{} is not among the tested pages", page.display());
    }
    let others = ["README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md"];
    let mut pictures = 0;
    for page in docs.into_iter().chain(others.map(|name| root.join(name))) {
        let text = read(&page);
        let after = |opening, end| text.split(opening).skip(1).filter_map(move |rest: &str| rest.split(end).next());
        let targets = after("](", ')').chain(after("src=\"", '"')).chain(after("srcset=\"", '"'));
        for target in targets.filter(|target| !target.contains("://")) {
            pictures += usize::from(target.ends_with(".png"));
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { page.clone() } else { page.parent().expect("a directory").join(file) };
            assert!(file.exists(), "{}: {target} leads nowhere", page.display());
            let is_there = || read(&file).lines().any(|line| line.starts_with('#') && slug(line) == anchor);
            assert!(anchor.is_empty() || is_there(), "{}: {target} leads nowhere", page.display());
        }
    }
    assert!(pictures > 2, "{pictures}");
}

#[test]
fn the_readme_is_read_in_a_few_minutes() {
    assert!(include_str!("../../../README.md").len() < 10_000);
}

#[test]
fn its_settings_are_those_of_the_projects_file() {
    let file = include_str!("../../../sidecar.toml");
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
