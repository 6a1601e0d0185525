//! `run` and `env`: a command finds the project's sidecar, or has one of its own, and works through it with no credential;
//! it never loses it, and nothing is left behind (docs/configuration.md section 1).

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::preload::path_with;
use crate::support::desk::Desk;
use crate::support::http::{APP, Request};
use crate::support::process::{Ended, Running, assert_no_slice_of, isolated, run};
use crate::support::scripted::Scripted;
use crate::support::tls::{authority, server};
use crate::support::{SLACK, npm, soon, write_private};

/// Asks for a token with curl, at `$1`.
const ASK: &str = r#"curl --silent --show-error --max-time 20 -H 'content-type: application/json' -d '{"subject":{"type":"app"}}' "$1""#;

/// `run FLAGS -- sh -c SCRIPT sh ARGUMENTS`.
fn through(desk: &Desk, flags: &[&str], script: &str, arguments: &[&str]) -> Command {
    let mut command = desk.sidecar(&["run"]);
    command.args(flags).args(["--", "sh", "-c", script, "sh"]).args(arguments);
    // Not in the foreground of the terminal that these tests may run in.
    command.process_group(0);
    command
}

/// A command that says where its sidecar is and goes on until its stdin ends.
fn going_on(desk: &Desk, flags: &[&str]) -> Command {
    let mut command = through(desk, flags, "echo $CONNECT_SIDECAR_URL; cat", &[]);
    command.stdin(Stdio::piped());
    command
}

/// The same, once it has said so.
async fn goes_on(desk: &Desk, flags: &[&str]) -> (Running, String) {
    let mut running = Running::start(going_on(desk, flags));
    let url = running.line().await;
    (running, url)
}

/// Lets it end.
async fn end(mut running: Running) -> Ended {
    drop(running.sidecar.stdin.take());
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    ended
}

fn ask(url: &str) -> Request {
    let addr = url.strip_prefix("http://").expect("a URL").parse().expect("an address");
    Request::new(addr, "POST", SLACK).json(APP)
}

fn state_dir(desk: &Desk) -> PathBuf {
    desk.home.path().join(".local/state/connect-sidecar")
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

fn token_in(ended: &Ended) -> String {
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    let reply: serde_json::Value = serde_json::from_str(&ended.stdout).expect("JSON");
    reply["token"].as_str().expect("a token").to_owned()
}

#[tokio::test]
async fn a_command_gets_a_token_with_no_credential_and_leaves_nothing_behind() {
    let desk = Desk::new().await;
    let plain = format!("{} --no-progress-meter", ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{SLACK}")));
    let ended = run(through(&desk, &["--no-intercept"], &plain, &[])).await;
    assert!(!token_in(&ended).is_empty());
    assert_eq!(names_in(&state_dir(&desk)), [".gitignore"], "an upstream on this machine costs nothing");

    let connect = format!("https://api.vercel.com{SLACK}");
    let ended = run(through(&desk, &[], ASK, &[&connect])).await;
    assert!(!token_in(&ended).is_empty(), "intercepted");
    assert_eq!(names_in(&state_dir(&desk)), [".gitignore", "ca"], "the CA is this machine's");
    assert_eq!(desk.emulator.count(SLACK), 2);
}

#[tokio::test]
async fn a_running_sidecar_is_joined_and_its_cache_shared() {
    let desk = Desk::new().await;
    let serving = desk.serve(&[]).await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let first = token_in(&run(through(&desk, &[], ASK, &[&connect])).await);
    let (running, url) = goes_on(&desk, &["--port", "1"]).await;
    assert_eq!(url, format!("http://{}", serving.addr), "wherever it is");
    assert_eq!(ask(&url).send().await.token(), first);
    end(running).await;
    assert_eq!(desk.emulator.count(SLACK), 1);
    assert_eq!(serving.stop().await.code, Some(0), "it outlives its commands");
}

#[tokio::test]
async fn commands_at_once_share_one_sidecar() {
    let desk = Desk::new().await;
    let mut running: Vec<_> = (0..4).map(|_| Running::start(going_on(&desk, &["--no-intercept"]))).collect();
    let mut urls = Vec::new();
    for command in &mut running {
        urls.push(command.line().await);
    }
    urls.dedup();
    assert_eq!(urls.len(), 1, "{urls:?}");
    for command in running {
        end(command).await;
    }
    assert_eq!(names_in(&state_dir(&desk)), [".gitignore"]);
}

#[tokio::test]
async fn the_key_goes_to_nobody_who_cannot_prove_to_have_it() {
    let desk = Desk::new().await;
    // A program that has the port of an instance that ended badly.
    let impostor = Scripted::start().await;
    impostor.otherwise(|_, _| "HTTP/1.1 200 OK\r\nsidecar-proof: AAAA\r\ncontent-length: 2\r\n\r\n{}".into());
    let dir = state_dir(&desk);
    fs::create_dir_all(&dir).expect("a directory");
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).expect("a mode");
    let stale = serde_json::json!({
        "pid": std::process::id(),
        "url": impostor.url(),
        "key": "the-key-of-an-instance-that-is-no-more",
        "project": desk.project(),
    });
    write_private(&dir.join("1.json"), &stale.to_string());
    let ended = run(through(&desk, &["--no-intercept"], "echo $CONNECT_SIDECAR_URL", &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_ne!(ended.stdout.trim(), impostor.url());
    let heard: String = impostor.received().iter().map(|request| request.head.clone()).collect();
    assert!(heard.contains("sidecar-nonce") && !heard.contains("the-key-of"), "{heard}");
}

#[tokio::test]
async fn a_command_keeps_its_sidecar_when_the_one_that_it_joined_ends() {
    let desk = Desk::new().await;
    let connect = format!("https://api.vercel.com{SLACK}");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let serving = desk.serve(&[]).await;
        let key = key_at(&desk, &format!("http://{}", serving.addr));
        let mut command = through(&desk, &["-v"], &format!("echo $CONNECT_SIDECAR_URL; read -r _; {ASK}"), &[&connect]);
        command.stdin(Stdio::piped());
        let mut running = Running::start(command);
        let url = running.line().await;
        assert_eq!(url, format!("http://{}", serving.addr));
        // Even while the one that ends finishes what is under way.
        let before = desk.emulator.received().len();
        let hold = desk.emulator.hold_answers();
        let asking = Request::new(serving.addr, "POST", SLACK).json(r#"{"scopes":["slow"]}"#).begin().await;
        soon("the request", desk.emulator.wait_for_requests(before + 1)).await;
        serving.signal(signal);
        running.wait_for_log("this process has taken its place").await;
        hold.release();
        if signal == Signal::SIGTERM {
            assert_eq!(asking.reply().await.status, 200);
        }
        assert_ne!(key_at(&desk, &url), key, "a new process has a new key");
        let token = ask(&url).send().await.token();
        tokio::io::AsyncWriteExt::write_all(running.sidecar.stdin.as_mut().expect("stdin"), b"\n").await.expect("sent");
        let ended = running.end().await;
        let reply: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
        assert_eq!(reply["token"], token, "by the same proxy, with the same secret");
        drop(serving);
    }
}

/// Another user's program could bind the port when the sidecar has ended, be sent the command's secrets, and answer.
#[tokio::test]
async fn nobody_gets_the_ports_or_a_secret_between_the_end_of_a_sidecar_and_its_successor() {
    let desk = Desk::new().await;
    let mut serving = desk.serve(&["--require-key"]).await;
    let mut command = through(
        &desk,
        &["-v", "--require-key"],
        "echo $CONNECT_SIDECAR_URL; echo $CONNECT_SIDECAR_KEY; echo $HTTPS_PROXY; cat",
        &[],
    );
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    let [url, run_key, proxy] = [running.line().await, running.line().await, running.line().await];
    let key = key_at(&desk, &url);
    let asked_by_the_run = || ask(&url).header("sidecar-key", &run_key);
    let begin = |key: &str| ask(&url).target("/_sidecar/v1/runs").json("{}").header("sidecar-key", key);
    assert_eq!(asked_by_the_run().send().await.status, 200);
    assert_eq!(begin(&run_key).send().await.status, 401, "it is for what apps ask");

    // Nobody can take the place yet.
    running.signal(Signal::SIGSTOP);
    serving.signal(Signal::SIGKILL);
    soon("its end", serving.child.wait()).await.expect("a status");
    let port_of =
        |url: &str| url.rsplit_once(':').expect("a port").1.trim_end_matches('/').parse::<u16>().expect("a port");
    for host in ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"] {
        for port in [port_of(&url), port_of(&proxy)] {
            if host.starts_with('[') && port == port_of(&proxy) {
                continue;
            }
            let stranger = std::net::TcpListener::bind(format!("{host}:{port}"));
            assert!(stranger.is_err(), "{host}:{port}");
        }
    }
    let waiting = asked_by_the_run().begin().await;
    running.signal(Signal::SIGCONT);
    running.wait_for_log("this process has taken its place").await;
    assert_eq!(waiting.reply().await.status, 200, "it waits for the successor");

    assert_eq!(asked_by_the_run().send().await.status, 200, "the command's environment is good as it is");
    for (forged, what) in
        [(key.as_str(), "the key of a process that is gone"), ("", "none"), (run_key.as_str(), "the run's")]
    {
        assert_eq!(begin(forged).send().await.status, 401, "{what}");
    }
    assert_eq!(ask(&url).header("sidecar-key", &key).send().await.status, 401);
    let successors = key_at(&desk, &url);
    assert!(![&key, &run_key].contains(&&successors));
    assert_eq!(begin(&successors).send().await.status, 200);
    end(running).await;
    assert!(
        std::net::TcpListener::bind(("127.0.0.1", port_of(&url))).is_ok(),
        "the port is free with the command's end"
    );
}

fn instance_at(desk: &Desk, url: &str) -> serde_json::Value {
    let port = url.rsplit_once(':').expect("a port").1;
    let file = fs::read(state_dir(desk).join(format!("{port}.json"))).expect("a state file");
    serde_json::from_slice(&file).expect("JSON")
}

fn key_at(desk: &Desk, url: &str) -> String {
    instance_at(desk, url)["key"].as_str().expect("a key").to_owned()
}

#[tokio::test]
async fn of_several_commands_one_takes_over_and_the_others_join_it() {
    let desk = Desk::new().await;
    let (first, url) = goes_on(&desk, &["--no-intercept"]).await;
    let (mut second, second_url) = goes_on(&desk, &["--no-intercept", "-v"]).await;
    let (mut third, third_url) = goes_on(&desk, &["--no-intercept", "-v"]).await;
    assert_eq!([&second_url, &third_url], [&url, &url]);
    let key = key_at(&desk, &url);
    end(first).await;
    let has_it = "this process has taken its place";
    let (owner, mut other) = tokio::select! {
        () = second.wait_for_log(has_it) => (second, third),
        () = third.wait_for_log(has_it) => (third, second),
    };
    let pid = instance_at(&desk, &url)["pid"].as_u64();
    let second_key = key_at(&desk, &url);
    assert_eq!(pid, owner.sidecar.id().map(u64::from));
    assert_ne!(second_key, key);
    let token = ask(&url).send().await.token();
    end(owner).await;
    other.wait_for_log(has_it).await;
    assert!(![key, second_key].contains(&key_at(&desk, &url)));
    assert_ne!(ask(&url).send().await.token(), token, "its cache is its own");
    end(other).await;
    assert_eq!(names_in(&state_dir(&desk)), [".gitignore"], "an upstream on this machine costs nothing");
}

#[tokio::test]
async fn the_real_token_is_nowhere_in_the_commands_environment_unless_that_was_asked_for() {
    let desk = Desk::new().await;
    let show = "cat /proc/self/environ | tr '\\0' '\\n'";
    let hidden = run(through(&desk, &[], show, &[])).await;
    assert_no_slice_of([secret_part(&desk.token)], &hidden.stdout);
    let placeholder = variable(&hidden, "VERCEL_OIDC_TOKEN").expect("a placeholder");
    assert!(placeholder.ends_with(".connect-sidecar-placeholder"), "{placeholder}");
    assert_eq!(variable(&hidden, "CONNECT_SIDECAR_KEY"), None);
    assert!(
        variable(&hidden, "CONNECT_SIDECAR_BEARER_HOSTS").is_some_and(|hosts| hosts.contains("ai-gateway.vercel.sh,"))
    );
    let exposed = run(through(&desk, &["--expose-token"], show, &[])).await;
    assert_eq!(variable(&exposed, "VERCEL_OIDC_TOKEN"), Some(desk.token.as_str()));

    for (flags, is_there) in
        [(&["--auth", "access-token"][..], false), (&["--auth", "access-token", "--expose-token"], true)]
    {
        let mut command = through(&desk, flags, show, &[]);
        command.env("VERCEL_TOKEN", "vcp_demo_access_token");
        let ended = run(command).await;
        assert_eq!(variable(&ended, "VERCEL_TOKEN").is_some(), is_there, "{ended:?}");
        assert!(variable(&ended, "VERCEL_OIDC_TOKEN").is_some_and(|token| token.ends_with("-placeholder")));
    }
    let keyed = run(through(&desk, &["--require-key"], show, &[])).await;
    assert_eq!(variable(&keyed, "CONNECT_SIDECAR_KEY").map(str::len), Some(43));
}

/// What makes a JWT a credential: the claims before its signature are the placeholder's, too.
pub fn secret_part(token: &str) -> &str {
    token.rsplit_once('.').expect("a JWT").1
}

fn variable<'a>(ended: &'a Ended, name: &str) -> Option<&'a str> {
    ended.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

#[tokio::test]
async fn without_a_good_token_the_command_runs_but_none_is_exposed() {
    let desk = Desk::new().await;
    let expired = desk.emulator.env_file(DEVELOPMENT_LIFE, Duration::ZERO);
    write_private(&desk.project().join(".env.local"), &expired);
    let plain = ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{SLACK}"));
    let ended = run(through(&desk, &["--no-intercept"], &plain, &[])).await;
    assert_eq!(ended.code, Some(0));
    assert!(ended.stdout.contains("oidc_token_expired") && ended.stdout.contains("vercel env pull"), "{ended:?}");
    let refused = run(through(&desk, &["--expose-token"], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""));
    assert!(refused.stderr.contains("Run `vercel env pull`."), "{}", refused.stderr);
    fs::remove_file(desk.project().join(".env.local")).expect("removed");
    let refused = run(through(&desk, &["--expose-token"], "echo ran", &[])).await;
    assert!(refused.stderr.contains("error: There is no OIDC token in .env.local."), "{}", refused.stderr);
}

#[tokio::test]
async fn its_port_is_any_free_one_but_the_one_that_is_asked_for() {
    let desk = Desk::new().await;
    fs::write(desk.project().join("sidecar.toml"), "port = 1\nlog_level = \"debug\"").expect("written");
    let mut command = through(&desk, &["--no-intercept"], "echo $CONNECT_SIDECAR_URL", &[]);
    command.env_remove("CONNECT_SIDECAR_PORT");
    let ended = run(command).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "a file's settings of these are for `serve`");
    assert_ne!(ended.stdout, "http://127.0.0.1:1\n");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let refused = run(through(&desk, &["--port", &port], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(3), ""), "{}", refused.stderr);
    drop(taken);
    let ended = run(through(&desk, &["--no-intercept", "--port", &port], "echo $CONNECT_SIDECAR_URL", &[])).await;
    assert_eq!(ended.stdout, format!("http://127.0.0.1:{port}\n"));
}

#[tokio::test]
async fn node_finds_its_preload_wherever_the_state_is_kept_and_beside_one_of_the_users() {
    // In the main thread, in a process below, and in a worker: whether the user's was loaded, and ours.
    const PROGRAM: &str = "
        const { isMainThread, Worker } = require('node:worker_threads');
        const look = '[globalThis.users === 1, fetch.toString().includes(`divert`)].join()';
        const child = () => require('node:child_process').execFileSync(process.execPath, ['-p', look], { encoding: 'utf8' });
        console.log(eval(look), isMainThread ? child().trim() : '');
        if (isMainThread) new Worker(__filename);
    ";
    let desk = Desk::new().await;
    let awkward = ["it's \"my\" state 100%25 $HOME", "state\\dir"].map(|name| desk.home.path().join(name));
    let users = desk.home.path().join("users.cjs");
    fs::write(&users, "globalThis.users = 1;").expect("a file");
    fs::write(desk.project().join("look.cjs"), PROGRAM).expect("a file");
    for version in npm::NODES {
        let Some(node) = npm::node(version).await else { return };
        for option in ["--no-warnings", "--require", "--import", "--require "] {
            let (options, has_users) = match option.trim_start_matches("--no-warnings") {
                "" => (option.to_owned(), false),
                option => (format!("{option}={}", users.display()).replace(" =", " "), true),
            };
            for state in &awkward {
                let mut command = desk.sidecar(&["run", "--no-intercept", "--", "node", "look.cjs"]);
                command.env("PATH", path_with(&node)).env("XDG_STATE_HOME", state).env("NODE_OPTIONS", &options);
                let ended = run(command).await;
                let line = format!("{has_users},true");
                let expected = format!("{line} {line}\n{line} \n");
                assert_eq!((ended.code, &ended.stdout), (Some(0), &expected), "{version} {options}: {}", ended.stderr);
                assert_eq!(names_in(&state.join("connect-sidecar")), [".gitignore"]);
            }
        }
    }
}

#[tokio::test]
async fn a_command_in_a_command_shares_its_sidecar() {
    let desk = Desk::new().await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let inner = format!("echo $CONNECT_SIDECAR_URL; echo $NODE_OPTIONS | grep -o require; {ASK}");
    let outer = "echo $CONNECT_SIDECAR_URL; \"$0\" run -- sh -c \"$1\" sh \"$2\"";
    let program = env!("CARGO_BIN_EXE_connect-sidecar");
    let mut command = desk.sidecar(&["run", "--", "sh", "-c", outer, program, &inner, &connect]);
    command.process_group(0);
    let ended = run(command).await;
    let lines: Vec<_> = ended.stdout.lines().collect();
    let [outer_url, inner_url, "require", reply] = lines[..] else { panic!("{ended:?}") };
    assert_eq!(outer_url, inner_url);
    assert!(reply.contains("\"token\""), "{reply}");
}

#[tokio::test]
async fn behind_a_proxy_connect_is_asked_through_it_only_if_that_is_said() {
    let desk = Desk::new().await;
    let proxy = Scripted::start().await;
    proxy.otherwise(|_, _| "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n".into());
    let connect = format!("https://api.vercel.com{SLACK}");
    let program = env!("CARGO_BIN_EXE_connect-sidecar");
    let within = "exec \"$0\" run -- sh -c \"$1\" sh \"$2\"";
    for (flag, hint, asked) in [
        ("--no-intercept", "behind a proxy: connect-sidecar --use-env-proxy", None),
        ("--use-env-proxy", "check HTTPS_PROXY and NO_PROXY", Some("CONNECT connect.invalid:443 HTTP/1.1")),
    ] {
        for nested in [false, true] {
            let before = proxy.received().len();
            let plain = ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{SLACK}"));
            let mut command = desk.sidecar(&["run", flag, "--", "sh", "-c"]);
            match nested {
                false => command.arg(&plain),
                true => command.args([within, program, &plain, &connect]),
            };
            command.env("CONNECT_SIDECAR_UPSTREAM", "https://connect.invalid").env("HTTPS_PROXY", proxy.url());
            command.process_group(0);
            let ended = run(command).await;
            let reply: serde_json::Value =
                serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
            assert_eq!(reply["error"]["code"], "upstream_unreachable", "{ended:?}");
            let said = reply["error"]["hint"].as_str().unwrap_or_default();
            assert!(said.ends_with(hint), "{reply}");
            let heard: BTreeSet<_> = proxy.received()[before..].iter().map(|r| r.line().to_owned()).collect();
            assert_eq!(heard, asked.into_iter().map(str::to_owned).collect(), "{flag}, nested: {nested}");
        }
    }
}

#[tokio::test]
async fn with_a_local_ca_that_is_not_safe_to_use_it_runs_only_without_interception() {
    let desk = Desk::new().await;
    assert_eq!(run(through(&desk, &[], "true", &[])).await.code, Some(0));
    fs::set_permissions(state_dir(&desk).join("ca"), PermissionsExt::from_mode(0o755)).expect("a mode");
    let refused = run(through(&desk, &[], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{}", refused.stderr);
    assert!(refused.stderr.contains("chmod 700") && refused.stderr.contains("--no-intercept"), "{}", refused.stderr);
    let plain = run(through(&desk, &["--no-intercept"], "echo ran", &[])).await;
    assert_eq!((plain.code, plain.stdout.as_str()), (Some(0), "ran\n"));
}

#[tokio::test]
async fn what_a_killed_run_left_goes_with_the_next_one() {
    let desk = Desk::new().await;
    let (running, _) = goes_on(&desk, &["--no-intercept"]).await;
    running.signal(Signal::SIGKILL);
    let mut killed = running.sidecar;
    soon("its end", killed.wait()).await.expect("a status");
    let left = names_in(&state_dir(&desk));
    assert!(left.iter().any(|name| name.starts_with("run-")), "{left:?}");
    let ended = run(through(&desk, &["--no-intercept"], "true", &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let left = names_in(&state_dir(&desk));
    assert!(!left.iter().any(|name| name.starts_with("run-")), "{left:?}");
}

#[tokio::test]
async fn the_variables_of_a_running_sidecar_can_be_had_by_a_shell() {
    let desk = Desk::new().await;
    let none = run(desk.sidecar(&["env"])).await;
    assert_eq!((none.code, none.stdout.as_str()), (Some(1), ""));
    assert!(none.stderr.contains("start one with `connect-sidecar`"), "{}", none.stderr);

    let serving = desk.serve(&[]).await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let sidecar = desk.sidecar(&[]);
    let mut shell = isolated("sh", desk.home.path());
    shell.args(["-c", &format!("eval \"$(\"$0\" env)\"; {ASK}")]).arg(sidecar.as_std().get_program()).arg(&connect);
    shell.envs(sidecar.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.current_dir(desk.project());
    let token = token_in(&run(shell).await);
    assert_eq!(Request::new(serving.addr, "POST", SLACK).json(APP).send().await.token(), token);

    let json = run(desk.sidecar(&["env", "--format", "json", "--no-intercept"])).await;
    let variables: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(variables["CONNECT_SIDECAR_URL"], format!("http://{}", serving.addr));
    assert!(variables.get("HTTPS_PROXY").is_none());
    let dotenv = run(desk.sidecar(&["env", "--format", "dotenv"])).await;
    assert!(dotenv.stdout.contains(&format!("CONNECT_SIDECAR_URL='http://{}'\n", serving.addr)), "{dotenv:?}");
    for shown in [&json, &dotenv] {
        assert_no_slice_of([secret_part(&desk.token)], &shown.stdout);
    }
}

#[tokio::test]
async fn our_own_client_trusts_whom_the_user_trusts_and_never_a_local_ca() {
    let desk = Desk::new().await;
    let ((users, by_users), (local, by_local)) =
        (authority("Acme Root"), authority("connect-sidecar local CA 0a1b2c3d"));
    let bundle = desk.home.path().join("bundle.pem");
    fs::write(&bundle, format!("{users}{local}")).expect("written");
    // For which none runs.
    let other = desk.project().with_file_name("other");
    fs::create_dir(&other).expect("a project");
    fs::copy(desk.project().join(".env.local"), other.join(".env.local")).expect("copied");
    let program = desk.sidecar(&[]).as_std().get_program().to_str().expect("a path").to_owned();
    for (issuer, is_trusted) in [(&by_users, true), (&by_local, false)] {
        for around in [&[][..], &["run", "--", &program]] {
            let (addr, decrypted) = server(Ipv4Addr::LOCALHOST.into(), "127.0.0.1", issuer, |_| {}).await;
            let (other, upstream) = (other.to_str().expect("a path"), format!("https://{addr}"));
            let token = ["--project", other, "--upstream", &upstream, "token", "slack/acme-slack"];
            let mut command = desk.sidecar(&[around, &token].concat());
            command.env("SSL_CERT_FILE", &bundle).process_group(0);
            let ended = run(command).await;
            assert_eq!(ended.stdout, if is_trusted { "good\n" } else { "" }, "{around:?}: {ended:?}");
            assert_eq!(decrypted.borrow().is_empty(), !is_trusted, "{around:?}");
        }
    }
}

#[tokio::test]
async fn a_home_that_is_a_git_work_tree_is_no_obstacle_and_nothing_of_ours_is_added_to_it() {
    let desk = Desk::new().await;
    let git = |arguments: &[&str]| {
        let mut git = std::process::Command::new("git");
        git.env_clear().env("PATH", std::env::var_os("PATH").expect("a path")).env("HOME", desk.home.path());
        let ended = git.args(arguments).current_dir(desk.home.path()).output().expect("git");
        assert!(ended.status.success(), "{ended:?}");
        String::from_utf8(ended.stdout).expect("text")
    };
    git(&["init", "--quiet"]);
    let add = "git -C \"$HOME\" add --all && git -C \"$HOME\" ls-files";
    let ended = run(through(&desk, &[], add, &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("web/.env.local") && !ended.stdout.contains("connect-sidecar/"), "{}", ended.stdout);
    assert!(state_dir(&desk).join("ca/key-and-certificate.pem").exists());
}

#[tokio::test]
async fn what_goes_wrong_in_a_joined_sidecar_is_said_once_in_the_terminal_of_the_command() {
    let desk = Desk::new().await;
    let _serving = desk.serve(&[]).await;
    let unlinked = "/v1/connect/token/salesforce%2Fcrm";
    let ask = format!("{} >&2", ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{unlinked}")));
    let said = "token salesforce/crm: run `vercel connect attach salesforce/crm`";
    for (flags, script, times) in [
        (&["--no-intercept"][..], format!("{ask}; {ask}"), 1),
        (&["--no-intercept", "-q"], ask.clone(), 0),
        (&["--no-intercept"], "true".to_owned(), 0),
    ] {
        let ended = run(through(&desk, flags, &script, &[])).await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches(said).count(), times, "{flags:?} {script}: {}", ended.stderr);
    }
}
