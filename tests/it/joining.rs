//! Which sidecar a command uses: the one of this directory or the nearest above, whatever its port and upstream; what
//! is printed if settings differ; and which directory is the project if no sidecar runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use connect_sidecar::emulator::{Emulator, Options};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::support::process::{Ended, Running, Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, SLACK_UID, env_file, write_private};

/// Prints the sidecar's URL.
const SHOW: &str = "echo $CONNECT_SIDECAR_URL";

/// The command in this directory, with no settings in its environment except the workspace's state directory.
fn plain(workspace: &Workspace, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = workspace.sidecar_in(dir, arguments);
    command.env_remove("CONNECT_SIDECAR_UPSTREAM").env_remove("CONNECT_SIDECAR_PORT").process_group(0);
    command
}

fn through(workspace: &Workspace, dir: &Path, flags: &[&str], script: &str) -> Command {
    plain(workspace, dir, &[&["run", "--no-intercept"], flags, &["--", "sh", "-c", script]].concat())
}

/// Starts a command that prints its sidecar's URL and runs until its stdin is closed.
async fn start_printing_url(mut command: Command) -> (Running, String) {
    let mut running = Running::start({
        command.stdin(Stdio::piped());
        command
    });
    let url = running.line().await;
    (running, url)
}

fn url(serving: &Serving) -> String {
    format!("http://{}", serving.addr)
}

fn directory(path: PathBuf) -> PathBuf {
    fs::create_dir_all(&path).expect("a directory");
    path
}

/// The URL in the JSON that `env` prints.
fn printed_url(ended: &Ended) -> String {
    let json: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
    json["CONNECT_SIDECAR_URL"].as_str().expect("a URL").to_owned()
}

#[tokio::test]
async fn a_sidecar_is_found_from_the_project_and_below_whatever_its_upstream_and_port() {
    let workspace = Workspace::new().await;
    let (web, below) = (workspace.project(), directory(workspace.project().join("apps/web")));
    let serving = workspace.serve(&[]).await;
    let note = format!(
        "note: requests to Connect go to {}, the upstream of the sidecar that runs for {} at {}\n",
        workspace.emulator.url(),
        web.display(),
        url(&serving)
    );
    for dir in [&web, &below] {
        let ended = run(through(&workspace, dir, &[], SHOW)).await;
        assert_eq!((ended.code, ended.stdout), (Some(0), format!("{}\n", url(&serving))), "{}", ended.stderr);
        assert_eq!(ended.stderr, note);
        let ended = run(plain(&workspace, dir, &["env", "--format", "json"])).await;
        assert_eq!((printed_url(&ended), ended.stderr.as_str()), (url(&serving), note.as_str()));
        let ended = run(plain(&workspace, dir, &["token", SLACK_UID])).await;
        assert!(ended.code == Some(0) && ended.stdout.starts_with("xox"), "{ended:?}");
        for arguments in [&["status"][..], &["status", "--short"], &["logs"], &["refresh"]] {
            let ended = run(plain(&workspace, dir, arguments)).await;
            assert!(!ended.stderr.contains("no sidecar runs"), "{arguments:?}: {}", ended.stderr);
        }
    }
    // An equal explicit upstream prints nothing.
    let upstream = workspace.emulator.url();
    let ended = run(through(&workspace, &below, &["--upstream", &upstream], SHOW)).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert_eq!(workspace.emulator.count(SLACK), 1, "the cache is shared");
}

#[tokio::test]
async fn a_command_with_another_explicit_upstream_fails() {
    let workspace = Workspace::new().await;
    let web = workspace.project();
    let serving = workspace.serve(&[]).await;
    let config = workspace.home.path().join(".config/connect-sidecar");
    let mine = directory(config).join("sidecar.toml");
    let commands: [&[&str]; 3] = [&["run", "--no-intercept", "--", "echo", "ran"], &["env"], &["token", SLACK_UID]];
    for place in ["--upstream", "CONNECT_SIDECAR_UPSTREAM", "sidecar.toml:1: upstream"] {
        for arguments in commands {
            let other = "https://api.vercel.com";
            let mut command = plain(&workspace, &web, arguments);
            match place {
                "--upstream" => {
                    command = plain(&workspace, &web, &[&["--upstream", other], arguments].concat());
                }
                "CONNECT_SIDECAR_UPSTREAM" => {
                    command.env(place, other);
                }
                _ => write_private(&mine, &format!("upstream = \"{other}\"")),
            }
            let ended = run(command).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{place} {arguments:?}: {ended:?}");
            let pid = serving.pid();
            for part in
                [place, other, &workspace.emulator.url(), &url(&serving), &format!("end that one by `kill {pid}`")]
            {
                assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
            }
            assert!(ended.stderr.ends_with(&format!("or leave {place} out\n")) || place.contains(':'), "{ended:?}");
        }
    }
    fs::remove_file(mine).expect("removed");
    assert_eq!(workspace.emulator.count(SLACK), 0);
    assert_eq!(run(plain(&workspace, &web, &["env"])).await.code, Some(0));
}

#[tokio::test]
async fn a_command_with_another_explicit_credential_starts_its_own_sidecar() {
    let workspace = Workspace::new().await;
    let web = workspace.project();
    write_private(&web.join("other.env"), &env_file(&workspace.token));
    let serving = workspace.serve(&[]).await;
    let of_its_own = format!("for {}, at {}): this command has a sidecar of its own\n", web.display(), url(&serving));
    // Settings that are not explicit are those of the running sidecar.
    let upstream = format!("note: requests to Connect go to {}, ", workspace.emulator.url());
    for (flags, place) in [
        (&["--env-file", "other.env"][..], "--env-file says "),
        (&["--auth", "access-token"], "--auth says access-token, the sidecar that runs has oidc"),
        (&["--team-id", "team_a"], "--team-id says team_a, the sidecar that runs has nothing"),
    ] {
        let with_token = |mut command: Command| {
            command.env("VERCEL_TOKEN", "vcp_demo_access_token");
            command
        };
        let (mut running, own) =
            start_printing_url(with_token(through(&workspace, &web, flags, "echo $CONNECT_SIDECAR_URL; cat"))).await;
        assert_ne!(own, url(&serving), "{place}");
        let found = run(plain(&workspace, &web, &["env", "--format", "json"])).await;
        assert_eq!(printed_url(&found), url(&serving), "{place}");
        drop(running.sidecar.stdin.take());
        let ended = running.end().await;
        for part in [place, &of_its_own, &upstream] {
            assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
        }
        let ended = run(with_token(plain(&workspace, &web, &[&["env"], flags].concat()))).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "`env` starts no sidecar: {ended:?}");
        assert!(ended.stderr.contains(place), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn a_warning_says_which_of_two_different_settings_is_used() {
    let workspace = Workspace::new().await;
    let web = workspace.project();
    let serving = workspace.serve(&["--wait", "2s"]).await;
    let there = url(&serving);
    let allow = "[connectors]\nallow = [\"slack/acme-slack\"]\n";
    for (flags, file, warning) in [
        (&["--require-key"][..], "", "--require-key says true, the sidecar that runs has false, which counts"),
        (&["--bearer-host", "a.test/x"], "", "--bearer-host says a.test/x, the sidecar that runs has ai-gateway"),
        (&["--wait", "3s"], "", "--wait says 3s, the sidecar that runs has 2s, which counts"),
        (&["--refresh", "cli"], "", "--refresh says cli, the sidecar that runs has off, which counts"),
        (&["--use-env-proxy"], "", "--use-env-proxy says true, the sidecar that runs has false, which counts"),
        (&[], allow, "sidecar.toml:2: connectors.allow says slack/acme-slack, the sidecar that runs has nothing"),
        (&["--port", "1"], "", &format!("--port says 1, the sidecar that runs for {} is at {there}", web.display())),
        (&["--wait", "2s"], "", ""),
    ] {
        fs::write(web.join("sidecar.toml"), file).expect("written");
        let upstream = workspace.emulator.url();
        let ended = run(through(&workspace, &web, &[&["--upstream", &*upstream], flags].concat(), SHOW)).await;
        assert_eq!((ended.code, ended.stdout), (Some(0), format!("{there}\n")), "{}", ended.stderr);
        let lines: Vec<_> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), usize::from(!warning.is_empty()), "{lines:?}");
        assert!(ended.stderr.is_empty() || ended.stderr.starts_with(&format!("warning: {warning}")), "{lines:?}");
    }
}

#[tokio::test]
async fn an_explicit_port_selects_the_sidecar_at_that_port() {
    let workspace = Workspace::new().await;
    let (web, api) = (workspace.project(), workspace.add_project("api"));
    let (serving, other) = (workspace.serve(&[]).await, workspace.serve_in(&api, &[]).await);
    let port = other.addr.port().to_string();
    let ended = run(through(&workspace, &web, &["--port", &port], SHOW)).await;
    assert_eq!(ended.stdout, format!("{}\n", url(&other)), "{ended:?}");
    assert!(ended.stderr.contains(&api.display().to_string()), "{}", ended.stderr);
    let ended = run(plain(&workspace, &web, &["env", "--format", "json", "--port", &port])).await;
    assert_eq!(printed_url(&ended), url(&other));
    let ended = run(plain(&workspace, &web, &["env", "--port", "9"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
    drop(serving);
}

#[tokio::test]
async fn a_replacement_sidecar_has_the_settings_of_the_one_that_ended() {
    let workspace = Workspace::new().await;
    let below = directory(workspace.project().join("apps/web"));
    write_private(&workspace.project().join("other.env"), &env_file(&workspace.token));
    fs::remove_file(workspace.project().join(".env.local")).expect("removed");
    let serving = workspace.serve(&["--env-file", "other.env"]).await;
    let script = "echo $CONNECT_SIDECAR_URL; cat";
    let (mut running, joined) = start_printing_url(through(&workspace, &below, &["-v"], script)).await;
    assert_eq!(joined, url(&serving));
    serving.signal(Signal::SIGKILL);
    running.wait_for_log("this process has taken its place").await;
    let ended = run(plain(&workspace, &below, &["token", SLACK_UID])).await;
    assert!(ended.code == Some(0) && ended.stdout.starts_with("xox"), "{ended:?}");
    assert_eq!(workspace.emulator.count(SLACK), 1);
    let state = run(plain(&workspace, &workspace.project(), &["status", "--json"])).await;
    let state: Value = serde_json::from_str(&state.stdout).unwrap_or_else(|e| panic!("{e}: {state:?}"));
    assert_eq!((&state["project"], &state["oidc"]["source"]), (&"web".into(), &"other.env".into()));
    drop(running.sidecar.stdin.take());
    running.end().await;
}

#[tokio::test]
async fn a_nearer_env_file_that_is_not_used_is_named() {
    let workspace = Workspace::new().await;
    let nested = workspace.add_project("web/apps/api");
    let serving = workspace.serve(&[]).await;
    let ended = run(workspace.sidecar_in(&nested, &["env"])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let expected = format!(
        "warning: {0}/apps/api/.env.local does not count here: the sidecar that runs for {0} at {1} has {0}/.env.local\n",
        workspace.project().display(),
        url(&serving)
    );
    assert_eq!(ended.stderr, expected);
}

/// The directory `apps/web` of the workspace's project, without project files.
fn app(workspace: &Workspace) -> PathBuf {
    directory(workspace.project().join("apps/web"))
}

#[tokio::test]
async fn without_a_running_sidecar_the_nearest_directory_with_a_marker_file_is_the_project() {
    let note = |project: &Path, name: &str| {
        format!("note: the project is {}, the nearest directory above with {name}\n", project.display())
    };
    for (what, change, expected) in [
        ("an env file", "", Some(".env.local")),
        ("a link", "mkdir .vercel && mv .env.local .vercel/project.json", Some(".vercel/project.json")),
        ("a work tree's root", "git init --quiet .", Some(".env.local")),
        ("an env file of its own", "cp .env.local apps/web/", None),
        ("a link of its own", "mkdir apps/web/.vercel && cp .env.local apps/web/.vercel/project.json", None),
        ("a work tree of its own", "git init --quiet apps/web", None),
        ("no file", "rm .env.local", None),
    ] {
        let workspace = Workspace::new().await;
        let (web, app) = (workspace.project(), app(&workspace));
        let changed = std::process::Command::new("sh").args(["-c", change]).current_dir(&web).status();
        assert!(changed.expect("a shell").success(), "{what}");
        let upstream = workspace.emulator.url();
        let flags = ["--upstream", &*upstream];
        let ended = run(through(&workspace, &app, &flags, SHOW)).await;
        let expected_note = expected.map(|name| note(&web, name)).unwrap_or_default();
        assert_eq!(ended.code, Some(0), "{what}");
        assert!(ended.stderr.starts_with(&expected_note), "{what}: {}", ended.stderr);
        assert_eq!(ended.stderr.contains("note: "), expected.is_some(), "{what}: {}", ended.stderr);
        let ended = run(plain(&workspace, &app, &[&["token", SLACK_UID], &flags[..]].concat())).await;
        assert!(ended.stderr.starts_with(&expected_note), "{what}: {}", ended.stderr);
        if expected == Some(".env.local") {
            assert!(ended.stdout.starts_with("xox"), "{what}: {ended:?}");
        }
        let mut serving = Serving::start(plain(&workspace, &app, &[&["--port", "0"], &flags[..]].concat())).await;
        if let Some(name) = expected {
            serving.wait_for_log(note(&web, name).trim_start_matches("note: ").trim_end()).await;
        }
        let project = expected.map_or(&app, |_| &web);
        let found = run(plain(&workspace, project, &["env", "--format", "json"])).await;
        assert_eq!(printed_url(&found), url(&serving), "{what}");
        let found = run(plain(&workspace, &web, &["env", "--format", "json"])).await;
        assert_eq!(found.code == Some(0), expected.is_some(), "{what}: {found:?}");
    }
}

#[tokio::test]
async fn settings_are_read_from_the_project_that_was_found() {
    let workspace = Workspace::new().await;
    let (web, app) = (workspace.project(), app(&workspace));
    fs::rename(web.join(".env.local"), web.join("mine.env")).expect("renamed");
    fs::write(web.join("sidecar.toml"), "env_file = \"mine.env\"\n[connectors]\nallow = [\"github/acme\"]\n")
        .expect("written");
    let ended = run(workspace.sidecar_in(&app, &["token", SLACK_UID])).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("connectors.allow"), "{}", ended.stderr);
    fs::write(web.join("sidecar.toml"), "env_file = \"mine.env\"\n").expect("written");
    let ended = run(workspace.sidecar_in(&app, &["token", SLACK_UID])).await;
    assert!(ended.stdout.starts_with("xox"), "{ended:?}");
    // An env file in the user's configuration file is relative to the project.
    fs::remove_file(web.join("sidecar.toml")).expect("removed");
    let mine = directory(workspace.home.path().join(".config/connect-sidecar")).join("sidecar.toml");
    write_private(&mine, "env_file = \"mine.env\"\n");
    let ended = run(workspace.sidecar_in(&app, &["token", SLACK_UID])).await;
    assert!(ended.stdout.starts_with("xox") && ended.stderr.contains("with mine.env"), "{ended:?}");
}

#[tokio::test]
async fn an_explicit_project_or_env_file_turns_off_the_search() {
    let workspace = Workspace::new().await;
    let app = app(&workspace);
    for flags in [&["--project", "."][..], &["--env-file", ".env.local"]] {
        let ended = run(workspace.sidecar_in(&app, &[&["token", SLACK_UID], flags].concat())).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("vercel env pull") && !ended.stderr.contains("note: "), "{}", ended.stderr);
    }
    for variable in ["CONNECT_SIDECAR_PROJECT", "CONNECT_SIDECAR_ENV_FILE"] {
        let mut command = workspace.sidecar_in(&app, &["token", SLACK_UID]);
        command.env(variable, if variable.ends_with("PROJECT") { "." } else { ".env.local" });
        let ended = run(command).await;
        assert!(ended.code == Some(1) && !ended.stderr.contains("note: "), "{variable}: {ended:?}");
    }
}

#[tokio::test]
async fn two_projects_have_a_sidecar_each() {
    let workspace = Workspace::new().await;
    let other_upstream = Emulator::start(Options::default()).await.expect("an emulator");
    let (web, api) = (workspace.project(), workspace.add_project("api"));
    let first = workspace.serve(&[]).await;
    let (mut running, own) = start_printing_url(through(
        &workspace,
        &api,
        &["--upstream", &other_upstream.url()],
        "echo $CONNECT_SIDECAR_URL; cat",
    ))
    .await;
    assert_ne!(own, url(&first));
    for (dir, there) in [(&web, url(&first)), (&api, own)] {
        let found = run(plain(&workspace, dir, &["env", "--format", "json"])).await;
        assert_eq!(printed_url(&found), there);
    }
    drop(running.sidecar.stdin.take());
    assert_eq!(running.end().await.stderr, "");
}
