//! `status`: text, one line, JSON, `--watch` and `--open`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::World;
use connect_sidecar::os::terminal::is_control_or_bidi;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::support::http::APP;
use crate::support::process::{Running, Serving, assert_no_slice_of, run};
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;
use crate::support::{Scene, env_file, fingerprint, instance_key, write_private};

#[tokio::test]
async fn status_is_printed_as_text_json_or_one_line() {
    let stage = Scene::new().start().await;
    stage.token(APP).send().await.token();
    stage.token(APP).send().await.token();
    let text = run(stage.command(&["status"])).await;
    assert_eq!((text.code, text.stderr.as_str()), (Some(0), ""));
    let token = fs::read_to_string(stage.env_path()).expect("a file").split('"').nth(3).expect("a token").to_owned();
    for part in [
        "web  valid, 12 h left\n",
        "project web, team acme, environment development\n",
        &format!(".env.local, fingerprint {}, until 20", fingerprint(&token)),
        &format!("sidecar   http://{}, ", stage.addr),
        ", 1 request, no errors\n",
        "1 token; hits 1, misses 1, collapsed 0: 1 request saved\n",
        "slack/acme-slack  app      1 h   1\n",
    ] {
        assert!(text.stdout.contains(part), "{part}: {}", text.stdout);
    }
    assert!(!text.stdout.contains('\x1b'), "no colors in a pipe");
    let json = run(stage.command(&["status", "--json"])).await;
    let body = stage.request("GET", "/_sidecar/v1/status").send().await.text();
    assert_eq!((json.code, json.stdout), (Some(0), body + "\n"));
    let short = run(stage.command(&["status", "--short"])).await;
    assert_eq!((short.code, short.stdout.as_str(), short.stderr.as_str()), (Some(0), "web 12 h\n", ""));

    stage.pass(Duration::from_secs(12 * 3600 - 600));
    let short = run(stage.command(&["status", "--short"])).await;
    assert_eq!((short.code, short.stdout.as_str()), (Some(0), "web 10 min, run vercel env pull\n"));
    stage.pass(Duration::from_secs(900));
    let short = run(stage.command(&["status", "--short"])).await;
    assert_eq!((short.code, short.stdout.as_str()), (Some(0), "web expired, run vercel env pull\n"));
    let text = run(stage.command(&["status"])).await;
    let warning = "\nwarning: The OIDC token of acme/web expired 5 min ago.\n         run `vercel env pull`\n";
    assert!(text.stdout.ends_with(warning), "{}", text.stdout);
    assert_no_slice_of([token.as_str(), &stage.key()], &[text.stdout, text.stderr, json.stderr, short.stderr].concat());
}

#[tokio::test]
async fn two_output_formats_at_once_are_refused() {
    let workspace = Workspace::new().await;
    let ended = run(workspace.sidecar(&["status", "--json", "--short"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
}

#[tokio::test]
async fn colors_are_used_on_terminals_unless_turned_off() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    let command = format!("{} status", env!("CARGO_BIN_EXE_connect-sidecar"));
    for (variables, begins) in [
        ("TERM=xterm", "\x1b[1mweb\x1b[0m  \x1b[32mvalid"),
        ("TERM=xterm NO_COLOR=1", "web  valid"),
        ("TERM=dumb", "web  valid"),
    ] {
        terminal.enter(&format!("{variables} {command}; echo shown")).await;
        let shown = terminal.sees("shown\r\n").await;
        assert!(shown.trim_start().starts_with(begins), "{variables}: {shown:?}");
    }
    terminal.close().await;
}

#[tokio::test]
async fn json_on_a_terminal_is_escaped_but_equal() {
    let workspace = Workspace::new().await;
    let mut subject = Subject::development(&World::demo());
    subject.project = "web\u{9b}2J\u{202e}".into();
    let token = workspace.emulator.oidc_token_for(&subject, Duration::from_secs(3600));
    write_private(&workspace.project().join(".env.local"), &env_file(&token));
    let _serving = workspace.serve(&[]).await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    for (i, command) in ["status", "logs", "doctor"].into_iter().enumerate() {
        let piped = run(workspace.sidecar(&[command, "--json"])).await;
        assert!(piped.stdout.contains("web\u{9b}2J\u{202e}"), "{command}: {piped:?}");
        let program = env!("CARGO_BIN_EXE_connect-sidecar");
        terminal.enter(&format!("{program} {command} --json; echo end-$(({i}+1))")).await;
        let shown = terminal.sees(&format!("end-{}\r\n", i + 1)).await;
        assert!(shown.contains(r"web\u009b2J\u202e"), "{command}: {shown:?}");
        let lines = shown.lines().filter(|line| line.starts_with('{'));
        let read: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert!(!read.is_empty() && !shown.replace("\r\n", "").contains(is_control_or_bidi), "{command}: {shown:?}");
    }
    terminal.close().await;
}

#[tokio::test]
async fn a_watch_prints_changes_survives_a_restart_and_ends_with_0() {
    let workspace = Workspace::new().await;
    let mut watch = Running::start(workspace.sidecar(&["status", "--watch"]));
    assert!(watch.line().await.starts_with("no sidecar runs for "));
    let until = async |watch: &mut Running, text: &str| while !watch.line().await.contains(text) {};
    let serving = workspace.serve(&[]).await;
    until(&mut watch, &format!("process {}", serving.pid())).await;
    serving.stop().await;
    until(&mut watch, "no sidecar runs for ").await;
    let serving = workspace.serve(&[]).await;
    until(&mut watch, &format!("process {}", serving.pid())).await;
    watch.signal(Signal::SIGINT);
    let ended = watch.end().await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn a_watch_ends_when_stdout_is_closed_or_flags_are_wrong() {
    let workspace = Workspace::new().await;
    let mut watch = workspace.sidecar(&["status", "--watch"]).spawn().expect("a process");
    drop(watch.stdout.take());
    let status = crate::support::soon("its end", watch.wait()).await.expect("a status");
    assert_eq!(status.code(), Some(0));
    let ended = run(workspace.sidecar(&["status", "--watch", "--port", "x"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
}

#[tokio::test]
async fn a_watch_uses_the_alternate_screen_and_restores_the_terminal() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    let command = format!("TERM=xterm {} status --watch", env!("CARGO_BIN_EXE_connect-sidecar"));
    terminal.enter(&format!("stty rows 5 cols 80; {command}")).await;
    terminal.sees("\x1b[?1049h\x1b[?25l").await;
    terminal.sees("valid").await;
    let screen = terminal.sees("\x1b[J").await;
    assert_eq!(screen.matches("\r\n").count(), 4, "as many lines as fit: {screen:?}");
    serving.stop().await;
    terminal.sees("no sidecar runs for").await;
    terminal.press("\x03").await;
    terminal.sees("\x1b[?25h\x1b[?1049l").await;
    assert_eq!(terminal.code().await, 0);
    terminal.close().await;
}

/// A fake browser that writes its arguments to a file.
fn opener(dir: &Path, name: &str) -> std::path::PathBuf {
    let opened = dir.join(format!("{name}.opened"));
    let script = format!("#!/bin/sh\nprintf '%s\\n' \"$@\" > '{0}.part' && mv '{0}.part' '{0}'\n", opened.display());
    fs::write(dir.join(name), script).expect("a program");
    fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).expect("a mode");
    opened
}

fn with_openers(mut command: Command, dir: &Path) -> Command {
    let path = format!("{}:/usr/bin:/bin", dir.display());
    command.env("PATH", path);
    command
}

fn page_of(workspace: &Workspace, serving: &Serving) -> (String, String) {
    let key = instance_key(&workspace.home.path().join(".local/state"), serving.addr);
    let page = format!("http://{}/_sidecar/", serving.addr);
    let opened = format!("{page}#key={key}");
    (page, opened)
}

#[tokio::test]
async fn the_page_is_opened_with_the_key_which_is_not_printed() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let (page, url) = page_of(&workspace, &serving);
    let bin = tempfile::tempdir().expect("a directory");
    let names = ["xdg-open", "first", "second"];
    let [by_desktop, by_first, by_second] = names.map(|name| opener(bin.path(), name));
    for (browser, opened, arguments) in [
        (None, &by_desktop, url.clone()),
        (Some("first"), &by_first, url.clone()),
        (Some("not-there:second --new %s last"), &by_second, format!("--new\n{url}\nlast")),
        (Some("false"), &by_desktop, url.clone()),
        (Some(""), &by_desktop, url.clone()),
    ] {
        let _ = fs::remove_file(opened);
        let mut command = with_openers(workspace.sidecar(&["status", "--open"]), bin.path());
        if let Some(browser) = browser {
            command.env("BROWSER", browser);
        }
        let ended = run(command).await;
        assert_eq!((ended.code, ended.stdout), (Some(0), format!("opened {page}\n")), "{browser:?}: {}", ended.stderr);
        assert_eq!(fs::read_to_string(opened).expect("opened"), arguments + "\n", "{browser:?}");
    }
}

#[tokio::test]
async fn programs_of_the_project_or_by_relative_path_do_not_get_the_key() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let (page, url) = page_of(&workspace, &serving);
    let (planted, bin) = (workspace.project().join("tools"), tempfile::tempdir().expect("a directory"));
    fs::create_dir(&planted).expect("a directory");
    let names = ["xdg-open", "first"];
    for name in names {
        opener(&planted, name);
    }
    let by_good = opener(bin.path(), "good");
    std::os::unix::fs::symlink(planted.join("first"), bin.path().join("link")).expect("a link");
    let absolute = planted.join("first").display().to_string();
    for (browser, reason) in [
        ("", "xdg-open: it is not run: it is inside the project"),
        ("first", "first: it is not run: it is inside the project"),
        (&absolute, "tools/first: it is not run: it is inside the project"),
        ("link", "link: it is not run: it is inside the project"),
        ("./first", "./first: it is not there"),
        ("tools/first", "tools/first: it is not there"),
    ] {
        let mut command = workspace.sidecar(&["status", "--open"]);
        let path = format!("{0}:{1}:.:tools", planted.display(), bin.path().display());
        command.env("PATH", &path).env("BROWSER", browser).current_dir(workspace.project());
        let ended = run(command).await;
        assert_eq!((ended.code, ended.stdout), (Some(1), format!("{page}\n")), "{browser}: {}", ended.stderr);
        assert!(ended.stderr.contains(reason), "{browser}: {}", ended.stderr);
    }
    for browser in [bin.path().join("good").to_str().expect("a path"), "good"] {
        let _ = fs::remove_file(&by_good);
        // Programs that the browser itself runs are found in the same directories.
        let path = format!("{}:{}:/usr/bin:/bin", planted.display(), bin.path().display());
        let script = fs::read_to_string(bin.path().join("good")).expect("a script");
        fs::write(bin.path().join("good"), script.replace("printf", "first; printf")).expect("written");
        let mut command = workspace.sidecar(&["status", "--open"]);
        command.env("PATH", path).env("BROWSER", browser);
        assert_eq!(run(command).await.code, Some(0), "{browser}");
        assert_eq!(fs::read_to_string(&by_good).expect("opened"), format!("{url}\n"), "{browser}");
    }
    assert_eq!(fs::read_dir(&planted).expect("a directory").count(), names.len(), "none of them has run");
}

#[tokio::test]
async fn without_a_browser_the_url_is_printed_without_the_key() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let (page, url) = page_of(&workspace, &serving);
    let mut command = workspace.sidecar(&["status", "--open"]);
    command.env("PATH", "/nowhere").env("BROWSER", "neither");
    let ended = run(command).await;
    assert_eq!((ended.code, ended.stdout), (Some(1), format!("{page}\n")));
    let key = url.split_once("#key=").expect("a key").1;
    assert_no_slice_of([key], &ended.stderr);
    for part in ["neither: it is not there; xdg-open: it is not there", "#key=", &serving.addr.port().to_string()] {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
}
