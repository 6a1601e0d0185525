//! `run` and `env`: a command uses the project's sidecar or its own, without a credential, keeps one available, and
//! leaves nothing behind (docs/configuration.md section 1).

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
use crate::support::http::{APP, Request};
use crate::support::process::{Ended, Running, assert_no_slice_of, isolated, run};
use crate::support::scripted::Scripted;
use crate::support::tls::{authority, server};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, npm, soon, write_private};

/// Requests a token with curl at `$1`.
const ASK: &str = r#"curl --silent --show-error --max-time 20 -H 'content-type: application/json' -d '{"subject":{"type":"app"}}' "$1""#;

/// `run FLAGS -- sh -c SCRIPT sh ARGUMENTS`.
fn through(workspace: &Workspace, flags: &[&str], script: &str, arguments: &[&str]) -> Command {
    let mut command = workspace.sidecar(&["run"]);
    command.args(flags).args(["--", "sh", "-c", script, "sh"]).args(arguments);
    // Own group: the tests may run in the foreground of a terminal.
    command.process_group(0);
    command
}

/// A command that prints its sidecar's URL and runs until its stdin is closed.
fn printing_url(workspace: &Workspace, flags: &[&str]) -> Command {
    let mut command = through(workspace, flags, "echo $CONNECT_SIDECAR_URL; cat", &[]);
    command.stdin(Stdio::piped());
    command
}

/// The same, started, with the URL.
async fn start_printing_url(workspace: &Workspace, flags: &[&str]) -> (Running, String) {
    let mut running = Running::start(printing_url(workspace, flags));
    let url = running.line().await;
    (running, url)
}

/// Closes its stdin and waits for its end.
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

fn state_dir(workspace: &Workspace) -> PathBuf {
    workspace.home.path().join(".local/state/connect-sidecar")
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
async fn a_command_gets_a_token_without_a_credential_and_leaves_nothing_behind() {
    let workspace = Workspace::new().await;
    let plain = format!("{} --no-progress-meter", ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{SLACK}")));
    let ended = run(through(&workspace, &["--no-intercept"], &plain, &[])).await;
    assert!(!token_in(&ended).is_empty());
    assert_eq!(
        names_in(&state_dir(&workspace)),
        [".gitignore"],
        "usage of an upstream on this machine is not recorded"
    );

    let connect = format!("https://api.vercel.com{SLACK}");
    let ended = run(through(&workspace, &[], ASK, &[&connect])).await;
    assert!(!token_in(&ended).is_empty(), "intercepted");
    assert_eq!(names_in(&state_dir(&workspace)), [".gitignore", "ca"], "the CA stays");
    assert_eq!(workspace.emulator.count(SLACK), 2);
}

#[tokio::test]
async fn a_running_sidecar_is_joined_and_its_cache_is_shared() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let first = token_in(&run(through(&workspace, &[], ASK, &[&connect])).await);
    let (running, url) = start_printing_url(&workspace, &["--port", "1"]).await;
    assert_eq!(url, format!("http://{}", serving.addr), "whatever its port");
    assert_eq!(ask(&url).send().await.token(), first);
    end(running).await;
    assert_eq!(workspace.emulator.count(SLACK), 1);
    assert_eq!(serving.stop().await.code, Some(0), "it keeps running after its commands");
}

#[tokio::test]
async fn concurrent_commands_share_one_sidecar() {
    let workspace = Workspace::new().await;
    let mut running: Vec<_> = (0..4).map(|_| Running::start(printing_url(&workspace, &["--no-intercept"]))).collect();
    let mut urls = Vec::new();
    for command in &mut running {
        urls.push(command.line().await);
    }
    urls.dedup();
    assert_eq!(urls.len(), 1, "{urls:?}");
    for command in running {
        end(command).await;
    }
    assert_eq!(names_in(&state_dir(&workspace)), [".gitignore"]);
}

#[tokio::test]
async fn the_key_is_not_sent_to_a_server_that_cannot_prove_to_have_it() {
    let workspace = Workspace::new().await;
    // Another program listens on the port of a killed instance.
    let impostor = Scripted::start().await;
    impostor.otherwise(|_, _| "HTTP/1.1 200 OK\r\nsidecar-proof: AAAA\r\ncontent-length: 2\r\n\r\n{}".into());
    let dir = state_dir(&workspace);
    fs::create_dir_all(&dir).expect("a directory");
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).expect("a mode");
    let stale = serde_json::json!({
        "pid": std::process::id(),
        "url": impostor.url(),
        "key": "the-key-of-an-instance-that-is-no-more",
        "project": workspace.project(),
    });
    write_private(&dir.join("1.json"), &stale.to_string());
    let ended = run(through(&workspace, &["--no-intercept"], "echo $CONNECT_SIDECAR_URL", &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_ne!(ended.stdout.trim(), impostor.url());
    let heard: String = impostor.received().iter().map(|request| request.head.clone()).collect();
    assert!(heard.contains("sidecar-nonce") && !heard.contains("the-key-of"), "{heard}");
}

#[tokio::test]
async fn a_command_keeps_working_when_the_joined_sidecar_ends() {
    let workspace = Workspace::new().await;
    let connect = format!("https://api.vercel.com{SLACK}");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let serving = workspace.serve(&[]).await;
        let key = key_at(&workspace, &format!("http://{}", serving.addr));
        let mut command =
            through(&workspace, &["-v"], &format!("echo $CONNECT_SIDECAR_URL; read -r _; {ASK}"), &[&connect]);
        command.stdin(Stdio::piped());
        let mut running = Running::start(command);
        let url = running.line().await;
        assert_eq!(url, format!("http://{}", serving.addr));
        // Even while the ending sidecar finishes requests in flight.
        let before = workspace.emulator.received().len();
        let hold = workspace.emulator.hold_answers();
        let asking = Request::new(serving.addr, "POST", SLACK).json(r#"{"scopes":["slow"]}"#).begin().await;
        soon("the request", workspace.emulator.wait_for_requests(before + 1)).await;
        serving.signal(signal);
        running.wait_for_log("this process has taken its place").await;
        hold.release();
        if signal == Signal::SIGTERM {
            assert_eq!(asking.reply().await.status, 200);
        }
        assert_ne!(key_at(&workspace, &url), key, "a new process has a new key");
        let token = ask(&url).send().await.token();
        tokio::io::AsyncWriteExt::write_all(running.sidecar.stdin.as_mut().expect("stdin"), b"\n").await.expect("sent");
        let ended = running.end().await;
        let reply: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
        assert_eq!(reply["token"], token, "through the same proxy with the same secret");
        drop(serving);
    }
}

/// Otherwise another user's program could bind the port after the sidecar's end, and receive the command's secrets.
#[tokio::test]
async fn no_other_program_gets_the_ports_or_a_secret_during_a_takeover() {
    let workspace = Workspace::new().await;
    let mut serving = workspace.serve(&["--require-key"]).await;
    let mut command = through(
        &workspace,
        &["-v", "--require-key"],
        "echo $CONNECT_SIDECAR_URL; echo $CONNECT_SIDECAR_KEY; echo $HTTPS_PROXY; cat",
        &[],
    );
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    let [url, run_key, proxy] = [running.line().await, running.line().await, running.line().await];
    let key = key_at(&workspace, &url);
    let request_of_the_run = || ask(&url).header("sidecar-key", &run_key);
    let begin = |key: &str| ask(&url).target("/_sidecar/v1/runs").json("{}").header("sidecar-key", key);
    assert_eq!(request_of_the_run().send().await.status, 200);
    assert_eq!(begin(&run_key).send().await.status, 401, "the run key is valid for app requests only");

    // The successor is stopped, so it cannot take over yet.
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
    let waiting = request_of_the_run().begin().await;
    running.signal(Signal::SIGCONT);
    running.wait_for_log("this process has taken its place").await;
    assert_eq!(waiting.reply().await.status, 200, "the request waits for the successor");

    assert_eq!(request_of_the_run().send().await.status, 200, "the command's environment stays valid");
    for (forged, what) in
        [(key.as_str(), "the key of the ended process"), ("", "none"), (run_key.as_str(), "the run's")]
    {
        assert_eq!(begin(forged).send().await.status, 401, "{what}");
    }
    assert_eq!(ask(&url).header("sidecar-key", &key).send().await.status, 401);
    let successors = key_at(&workspace, &url);
    assert!(![&key, &run_key].contains(&&successors));
    assert_eq!(begin(&successors).send().await.status, 200);
    end(running).await;
    assert!(
        std::net::TcpListener::bind(("127.0.0.1", port_of(&url))).is_ok(),
        "the port is free after the command's end"
    );
}

fn instance_at(workspace: &Workspace, url: &str) -> serde_json::Value {
    let port = url.rsplit_once(':').expect("a port").1;
    let file = fs::read(state_dir(workspace).join(format!("{port}.json"))).expect("a state file");
    serde_json::from_slice(&file).expect("JSON")
}

fn key_at(workspace: &Workspace, url: &str) -> String {
    instance_at(workspace, url)["key"].as_str().expect("a key").to_owned()
}

#[tokio::test]
async fn one_of_several_commands_takes_over_and_the_others_join_it() {
    let workspace = Workspace::new().await;
    let (first, url) = start_printing_url(&workspace, &["--no-intercept"]).await;
    let (mut second, second_url) = start_printing_url(&workspace, &["--no-intercept", "-v"]).await;
    let (mut third, third_url) = start_printing_url(&workspace, &["--no-intercept", "-v"]).await;
    assert_eq!([&second_url, &third_url], [&url, &url]);
    let key = key_at(&workspace, &url);
    end(first).await;
    let took_over = "this process has taken its place";
    let (owner, mut other) = tokio::select! {
        () = second.wait_for_log(took_over) => (second, third),
        () = third.wait_for_log(took_over) => (third, second),
    };
    let pid = instance_at(&workspace, &url)["pid"].as_u64();
    let second_key = key_at(&workspace, &url);
    assert_eq!(pid, owner.sidecar.id().map(u64::from));
    assert_ne!(second_key, key);
    let token = ask(&url).send().await.token();
    end(owner).await;
    other.wait_for_log(took_over).await;
    assert!(![key, second_key].contains(&key_at(&workspace, &url)));
    assert_ne!(ask(&url).send().await.token(), token, "its cache is its own");
    end(other).await;
    assert_eq!(
        names_in(&state_dir(&workspace)),
        [".gitignore"],
        "usage of an upstream on this machine is not recorded"
    );
}

#[tokio::test]
async fn the_real_token_is_in_the_commands_environment_only_with_expose_token() {
    let workspace = Workspace::new().await;
    let show = "cat /proc/self/environ | tr '\\0' '\\n'";
    let hidden = run(through(&workspace, &[], show, &[])).await;
    assert_no_slice_of([secret_part(&workspace.token)], &hidden.stdout);
    let placeholder = variable(&hidden, "VERCEL_OIDC_TOKEN").expect("a placeholder");
    assert!(placeholder.ends_with(".connect-sidecar-placeholder"), "{placeholder}");
    assert_eq!(variable(&hidden, "CONNECT_SIDECAR_KEY"), None);
    assert!(
        variable(&hidden, "CONNECT_SIDECAR_BEARER_HOSTS").is_some_and(|hosts| hosts.contains("ai-gateway.vercel.sh,"))
    );
    let exposed = run(through(&workspace, &["--expose-token"], show, &[])).await;
    assert_eq!(variable(&exposed, "VERCEL_OIDC_TOKEN"), Some(workspace.token.as_str()));

    for (flags, is_there) in
        [(&["--auth", "access-token"][..], false), (&["--auth", "access-token", "--expose-token"], true)]
    {
        let mut command = through(&workspace, flags, show, &[]);
        command.env("VERCEL_TOKEN", "vcp_demo_access_token");
        let ended = run(command).await;
        assert_eq!(variable(&ended, "VERCEL_TOKEN").is_some(), is_there, "{ended:?}");
        assert!(variable(&ended, "VERCEL_OIDC_TOKEN").is_some_and(|token| token.ends_with("-placeholder")));
    }
    let keyed = run(through(&workspace, &["--require-key"], show, &[])).await;
    assert_eq!(variable(&keyed, "CONNECT_SIDECAR_KEY").map(str::len), Some(43));
}

/// The signature of a JWT. The placeholder has the same claims, so only the signature is secret.
pub fn secret_part(token: &str) -> &str {
    token.rsplit_once('.').expect("a JWT").1
}

fn variable<'a>(ended: &'a Ended, name: &str) -> Option<&'a str> {
    ended.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

#[tokio::test]
async fn without_a_valid_token_the_command_runs_but_expose_token_fails() {
    let workspace = Workspace::new().await;
    let expired = workspace.emulator.env_file(DEVELOPMENT_LIFE, Duration::ZERO);
    write_private(&workspace.project().join(".env.local"), &expired);
    let plain = ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{SLACK}"));
    let ended = run(through(&workspace, &["--no-intercept"], &plain, &[])).await;
    assert_eq!(ended.code, Some(0));
    assert!(ended.stdout.contains("oidc_token_expired") && ended.stdout.contains("vercel env pull"), "{ended:?}");
    let refused = run(through(&workspace, &["--expose-token"], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""));
    assert!(refused.stderr.contains("Run `vercel env pull`."), "{}", refused.stderr);
    fs::remove_file(workspace.project().join(".env.local")).expect("removed");
    let refused = run(through(&workspace, &["--expose-token"], "echo ran", &[])).await;
    assert!(refused.stderr.contains("error: There is no OIDC token in .env.local."), "{}", refused.stderr);
}

#[tokio::test]
async fn the_port_is_any_free_one_unless_a_flag_sets_it() {
    let workspace = Workspace::new().await;
    fs::write(workspace.project().join("sidecar.toml"), "port = 1\nlog_level = \"debug\"").expect("written");
    let mut command = through(&workspace, &["--no-intercept"], "echo $CONNECT_SIDECAR_URL", &[]);
    command.env_remove("CONNECT_SIDECAR_PORT");
    let ended = run(command).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "port and log level of a file are for `serve`");
    assert_ne!(ended.stdout, "http://127.0.0.1:1\n");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let refused = run(through(&workspace, &["--port", &port], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(3), ""), "{}", refused.stderr);
    drop(taken);
    let ended = run(through(&workspace, &["--no-intercept", "--port", &port], "echo $CONNECT_SIDECAR_URL", &[])).await;
    assert_eq!(ended.stdout, format!("http://127.0.0.1:{port}\n"));
}

#[tokio::test]
async fn node_loads_the_preload_from_any_path_and_next_to_the_users_own() {
    // Prints for the main thread, a child process and a worker whether the user's preload and the sidecar's were
    // loaded.
    const PROGRAM: &str = "
        const { isMainThread, Worker } = require('node:worker_threads');
        const look = '[globalThis.users === 1, fetch.toString().includes(`divert`)].join()';
        const child = () => require('node:child_process').execFileSync(process.execPath, ['-p', look], { encoding: 'utf8' });
        console.log(eval(look), isMainThread ? child().trim() : '');
        if (isMainThread) new Worker(__filename);
    ";
    let workspace = Workspace::new().await;
    let awkward = ["it's \"my\" state 100%25 $HOME", "state\\dir"].map(|name| workspace.home.path().join(name));
    let users = workspace.home.path().join("users.cjs");
    fs::write(&users, "globalThis.users = 1;").expect("a file");
    fs::write(workspace.project().join("look.cjs"), PROGRAM).expect("a file");
    for version in npm::NODES {
        let Some(node) = npm::node(version).await else { return };
        for option in ["--no-warnings", "--require", "--import", "--require "] {
            let (options, has_users) = match option.trim_start_matches("--no-warnings") {
                "" => (option.to_owned(), false),
                option => (format!("{option}={}", users.display()).replace(" =", " "), true),
            };
            for state in &awkward {
                let mut command = workspace.sidecar(&["run", "--no-intercept", "--", "node", "look.cjs"]);
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
async fn a_run_inside_a_run_shares_its_sidecar() {
    let workspace = Workspace::new().await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let inner = format!("echo $CONNECT_SIDECAR_URL; echo $NODE_OPTIONS | grep -o require; {ASK}");
    let outer = "echo $CONNECT_SIDECAR_URL; \"$0\" run -- sh -c \"$1\" sh \"$2\"";
    let program = env!("CARGO_BIN_EXE_connect-sidecar");
    let mut command = workspace.sidecar(&["run", "--", "sh", "-c", outer, program, &inner, &connect]);
    command.process_group(0);
    let ended = run(command).await;
    let lines: Vec<_> = ended.stdout.lines().collect();
    let [outer_url, inner_url, "require", reply] = lines[..] else { panic!("{ended:?}") };
    assert_eq!(outer_url, inner_url);
    assert!(reply.contains("\"token\""), "{reply}");
}

#[tokio::test]
async fn the_environments_proxy_is_used_only_with_use_env_proxy() {
    let workspace = Workspace::new().await;
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
            let mut command = workspace.sidecar(&["run", flag, "--", "sh", "-c"]);
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
async fn with_an_unsafe_local_ca_a_command_runs_only_without_interception() {
    let workspace = Workspace::new().await;
    assert_eq!(run(through(&workspace, &[], "true", &[])).await.code, Some(0));
    fs::set_permissions(state_dir(&workspace).join("ca"), PermissionsExt::from_mode(0o755)).expect("a mode");
    let refused = run(through(&workspace, &[], "echo ran", &[])).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{}", refused.stderr);
    assert!(refused.stderr.contains("chmod 700") && refused.stderr.contains("--no-intercept"), "{}", refused.stderr);
    let plain = run(through(&workspace, &["--no-intercept"], "echo ran", &[])).await;
    assert_eq!((plain.code, plain.stdout.as_str()), (Some(0), "ran\n"));
}

#[tokio::test]
async fn files_of_a_killed_run_are_removed_by_the_next_one() {
    let workspace = Workspace::new().await;
    let (running, _) = start_printing_url(&workspace, &["--no-intercept"]).await;
    running.signal(Signal::SIGKILL);
    let mut killed = running.sidecar;
    soon("its end", killed.wait()).await.expect("a status");
    let left = names_in(&state_dir(&workspace));
    assert!(left.iter().any(|name| name.starts_with("run-")), "{left:?}");
    let ended = run(through(&workspace, &["--no-intercept"], "true", &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let left = names_in(&state_dir(&workspace));
    assert!(!left.iter().any(|name| name.starts_with("run-")), "{left:?}");
}

#[tokio::test]
async fn env_prints_the_variables_of_a_running_sidecar() {
    let workspace = Workspace::new().await;
    let none = run(workspace.sidecar(&["env"])).await;
    assert_eq!((none.code, none.stdout.as_str()), (Some(1), ""));
    assert!(none.stderr.contains("start one with `connect-sidecar`"), "{}", none.stderr);

    let serving = workspace.serve(&[]).await;
    let connect = format!("https://api.vercel.com{SLACK}");
    let sidecar = workspace.sidecar(&[]);
    let mut shell = isolated("sh", workspace.home.path());
    shell.args(["-c", &format!("eval \"$(\"$0\" env)\"; {ASK}")]).arg(sidecar.as_std().get_program()).arg(&connect);
    shell.envs(sidecar.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.current_dir(workspace.project());
    let token = token_in(&run(shell).await);
    assert_eq!(Request::new(serving.addr, "POST", SLACK).json(APP).send().await.token(), token);

    let json = run(workspace.sidecar(&["env", "--format", "json", "--no-intercept"])).await;
    let variables: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(variables["CONNECT_SIDECAR_URL"], format!("http://{}", serving.addr));
    assert!(variables.get("HTTPS_PROXY").is_none());
    let dotenv = run(workspace.sidecar(&["env", "--format", "dotenv"])).await;
    assert!(dotenv.stdout.contains(&format!("CONNECT_SIDECAR_URL='http://{}'\n", serving.addr)), "{dotenv:?}");
    for shown in [&json, &dotenv] {
        assert_no_slice_of([secret_part(&workspace.token)], &shown.stdout);
    }
}

#[tokio::test]
async fn the_sidecar_trusts_the_users_roots_but_no_local_ca() {
    let workspace = Workspace::new().await;
    let ((users, by_users), (local, by_local)) =
        (authority("Acme Root"), authority("connect-sidecar local CA 0a1b2c3d"));
    let bundle = workspace.home.path().join("bundle.pem");
    fs::write(&bundle, format!("{users}{local}")).expect("written");
    // A project without a running sidecar.
    let other = workspace.project().with_file_name("other");
    fs::create_dir(&other).expect("a project");
    fs::copy(workspace.project().join(".env.local"), other.join(".env.local")).expect("copied");
    let program = workspace.sidecar(&[]).as_std().get_program().to_str().expect("a path").to_owned();
    for (issuer, is_trusted) in [(&by_users, true), (&by_local, false)] {
        for around in [&[][..], &["run", "--", &program]] {
            let (addr, decrypted) = server(Ipv4Addr::LOCALHOST.into(), "127.0.0.1", issuer, |_| {}).await;
            let (other, upstream) = (other.to_str().expect("a path"), format!("https://{addr}"));
            let token = ["--project", other, "--upstream", &upstream, "token", "slack/acme-slack"];
            let mut command = workspace.sidecar(&[around, &token].concat());
            command.env("SSL_CERT_FILE", &bundle).process_group(0);
            let ended = run(command).await;
            assert_eq!(ended.stdout, if is_trusted { "good\n" } else { "" }, "{around:?}: {ended:?}");
            assert_eq!(decrypted.borrow().is_empty(), !is_trusted, "{around:?}");
        }
    }
}

#[tokio::test]
async fn git_ignores_the_state_in_a_home_that_is_a_work_tree() {
    let workspace = Workspace::new().await;
    let git = |arguments: &[&str]| {
        let mut git = std::process::Command::new("git");
        git.env_clear().env("PATH", std::env::var_os("PATH").expect("a path")).env("HOME", workspace.home.path());
        let ended = git.args(arguments).current_dir(workspace.home.path()).output().expect("git");
        assert!(ended.status.success(), "{ended:?}");
        String::from_utf8(ended.stdout).expect("text")
    };
    git(&["init", "--quiet"]);
    let add = "git -C \"$HOME\" add --all && git -C \"$HOME\" ls-files";
    let ended = run(through(&workspace, &[], add, &[])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("web/.env.local") && !ended.stdout.contains("connect-sidecar/"), "{}", ended.stdout);
    assert!(state_dir(&workspace).join("ca/key-and-certificate.pem").exists());
}

#[tokio::test]
async fn problems_of_a_joined_sidecar_are_printed_once_by_run() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    let unlinked = "/v1/connect/token/salesforce%2Fcrm";
    let ask = format!("{} >&2", ASK.replace("$1", &format!("$CONNECT_SIDECAR_URL{unlinked}")));
    let said = "token salesforce/crm: run `vercel connect attach salesforce/crm`";
    for (flags, script, times) in [
        (&["--no-intercept"][..], format!("{ask}; {ask}"), 1),
        (&["--no-intercept", "-q"], ask.clone(), 0),
        (&["--no-intercept"], "true".to_owned(), 0),
    ] {
        let ended = run(through(&workspace, flags, &script, &[])).await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches(said).count(), times, "{flags:?} {script}: {}", ended.stderr);
    }
}
