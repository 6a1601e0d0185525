//! The built binary as a user runs it: exit codes, stdout and stderr, signals, and that it leaks no secret
//! (docs/configuration.md section 1).

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, symlink};

use clap::CommandFactory;
use connect_sidecar::cli::args::Cli;
use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use listeners::SocketState;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::support::http::{Reply, Request, closed, kept_alive, raw};
use crate::support::network::taken_on_ipv6_only;
use crate::support::process::{Serving, assert_no_slice_of, isolated, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, env_file, fingerprint, soon, write_private};

pub fn get(serving: &Serving, path: &str) -> Request {
    Request::new(serving.addr, "GET", path)
}

pub fn ask(serving: &Serving, body: &str) -> Request {
    Request::new(serving.addr, "POST", SLACK).json(body)
}

#[tokio::test]
async fn stdout_has_only_the_ready_line() {
    let workspace = Workspace::new().await;
    for (arguments, signal) in [(&[][..], Signal::SIGTERM), (&["serve", "-vv"][..], Signal::SIGINT)] {
        let serving = workspace.serve(arguments).await;
        assert_eq!(
            serving.ready_line,
            format!("connect-sidecar listening on http://127.0.0.1:{}", serving.addr.port())
        );
        assert_eq!(ask(&serving, "{}").send().await.status, 200);
        assert_eq!(get(&serving, "/none").send().await.status, 404);
        serving.signal(signal);
        let ended = serving.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
        assert!(ended.stderr.contains("token of acme/web loaded"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn all_mistakes_are_reported_at_once_with_exit_code_2() {
    let workspace = Workspace::new().await;
    fs::write(workspace.project().join("sidecar.toml"), "prot = 1\nupstream = \"https://evil.example\"")
        .expect("written");
    let ended = run(workspace.sidecar(&["--log-level", "loud", "--auth", "access-token"])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert!(lines.iter().all(|line| line.starts_with("error: ")), "{lines:#?}");
    for part in ["sidecar.toml:1: unknown key `prot`", "sidecar.toml:2: `upstream`", "--log-level: ", "VERCEL_TOKEN: "]
    {
        assert_eq!(lines.iter().filter(|line| line.contains(part)).count(), 1, "{part}: {lines:#?}");
    }
    assert_eq!(lines.len(), 4);
    for bad in [&["--tokn"][..], &["unknown"], &["--port"], &["serve", "extra"], &["--color", "red"]] {
        let ended = run(workspace.sidecar(bad)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{bad:?}");
        assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn refresh_is_refused_for_commands_that_do_not_use_it() {
    let workspace = Workspace::new().await;
    let to_none = "this command has no use for it: it goes with `serve`, `run` and `service install`";
    for (arguments, message) in [
        (&["--refresh", "cli", "status"][..], to_none),
        (&["--refresh", "nonsense", "demo"], to_none),
        (&["--refresh", "off", "emulate"], to_none),
        (&["--refresh", "cli", "token", "slack/acme-slack", "--refresh"], to_none),
        (&["--refresh", "cli", "service", "status"], to_none),
        (&["--refresh", "nonsense"], "expected off or cli"),
        (&["--refresh", "cli", "serve", "--refresh", "nonsense"], "expected off or cli"),
        (&["--refresh", "nonsense", "run", "true"], "expected off or cli"),
        (&["--refresh", "nonsense", "service", "install"], "expected off or cli"),
    ] {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stderr, format!("error: --refresh: {message}\n"), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_taken_port_exits_with_3_and_names_its_owner() {
    let workspace = Workspace::new().await;
    let other = Workspace::new().await;
    let first = workspace.serve(&[]).await;
    let foreign = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let foreign = (foreign.local_addr().expect("an address"), foreign);
    // The state file of a killed sidecar.
    let state = workspace.home.path().join(".local/state/connect-sidecar");
    let left = r#"{"pid":1,"url":"","key":"","project":"/gone"}"#;
    write_private(&state.join(format!("{}.json", foreign.0.port())), left);
    let ours = format!("(process {})", std::process::id());
    let mut cases = vec![
        (
            first.addr,
            format!("by another connect-sidecar (process {}) for {}", first.pid(), workspace.project().display()),
        ),
        (foreign.0, ours.clone()),
    ];
    let only_v6 = taken_on_ipv6_only().await;
    if let Some(listener) = &only_v6 {
        cases.push((listener.local_addr().expect("an address"), ours));
    }
    for (address, owner) in cases {
        let mut command = other.sidecar(&["--port", &address.port().to_string()]);
        command.env("HOME", workspace.home.path());
        let ended = run(command).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
        let start = format!("error: could not listen on {address}: the port is taken by ");
        assert!(ended.stderr.starts_with(&start) && ended.stderr.contains(&owner), "{}", ended.stderr);
        assert!(ended.stderr.contains("--port"), "{}", ended.stderr);
    }
    assert_eq!(get(&first, "/healthz").send().await.status, 200, "the first is left alone");
}

#[tokio::test]
async fn a_signal_waits_for_requests_but_not_for_idle_connections() {
    let workspace = Workspace::new().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let serving = workspace.serve(&[]).await;
        let hold = workspace.emulator.hold_answers();
        let before = workspace.emulator.received().len();
        let asking = tokio::spawn(ask(&serving, "{}").send());
        soon("the request", workspace.emulator.wait_for_requests(before + 1)).await;
        let idle = kept_alive(serving.addr).await;
        let fresh = TcpStream::connect(serving.addr).await.expect("a connection");
        // `fresh` has been accepted once a later connection has had a reply.
        drop(kept_alive(serving.addr).await);
        serving.signal(signal);
        closed(idle).await;
        closed(fresh).await;
        assert!(TcpStream::connect(serving.addr).await.is_err(), "no new connections are accepted");
        hold.release();
        let reply = asking.await.expect("no panic");
        assert_eq!(reply.status, 200, "{reply:?}");
        let ended = serving.end().await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    let state = workspace.home.path().join(".local/state/connect-sidecar");
    let left: Vec<_> = fs::read_dir(&state).expect("a directory").flatten().map(|file| file.file_name()).collect();
    assert_eq!(
        left,
        [".gitignore"],
        "the state file is removed, and usage of an upstream on this machine is not recorded"
    );
}

#[tokio::test]
async fn a_second_signal_exits_at_once() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let _hold = workspace.emulator.hold_answers();
    let (addr, request) = (serving.addr, ask(&serving, "{}").bytes());
    let asking = tokio::spawn(async move { raw(addr, &request).await });
    soon("the request", workspace.emulator.wait_for_requests(1)).await;
    let idle = kept_alive(serving.addr).await;
    serving.signal(Signal::SIGTERM);
    closed(idle).await;
    serving.signal(Signal::SIGINT);
    let ended = serving.end().await;
    assert_eq!(ended.code, Some(1), "not all was done: {}", ended.stderr);
    assert!(!ended.stderr.contains("did not end within"), "it did not wait: {}", ended.stderr);
    assert_eq!(asking.await.expect("no panic"), b"", "the request is broken off");
}

#[tokio::test]
async fn sighup_reloads_the_env_file() {
    let workspace = Workspace::new().await;
    // An edit in another directory causes no event in the project directory.
    let elsewhere = workspace.home.path().join("env");
    fs::rename(workspace.project().join(".env.local"), &elsewhere).expect("renamed");
    symlink(&elsewhere, workspace.project().join(".env.local")).expect("a link");
    let mut serving = workspace.serve(&["-v"]).await;
    let idle = kept_alive(serving.addr).await;
    let fresh = workspace.emulator.oidc_token(DEVELOPMENT_LIFE);
    fs::write(&elsewhere, env_file(&fresh)).expect("written");
    serving.signal(Signal::SIGHUP);
    serving.wait_for_log("token refreshed, expires in ").await;
    let status = get(&serving, "/_sidecar/v1/status").send().await.json();
    assert_eq!(status["oidc"]["fingerprint"], fingerprint(&fresh));
    drop(idle);
    let ended = serving.stop().await;
    assert_eq!(ended.code, Some(0));
    assert!(!ended.stderr.contains("the poll found it"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_closed_or_blocked_stdout_or_stderr_does_not_stop_the_sidecar() {
    let workspace = Workspace::new().await;

    // stdout is closed from the start.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = workspace.sidecar(&[]);
    command.stdout(writer);
    let mut child = command.spawn().expect("a process");
    let mut log = child.stderr.take().expect("stderr");
    soon("a log", log.read_u8()).await.expect("it listens before it logs");
    let listening = listeners::get_all().expect("sockets").into_iter().filter(|l| l.state == SocketState::Listen);
    let mut own = listening.filter(|l| Some(l.process.pid) == child.id()).map(|l| l.socket);
    let addr = own.find(SocketAddr::is_ipv4).expect("its address");
    assert_eq!(Request::new(addr, "POST", SLACK).json("{}").send().await.status, 200);

    // stderr is closed later.
    let mut serving = workspace.serve(&[]).await;
    drop(serving.take_stderr());
    for _ in 0..3 {
        assert_eq!(get(&serving, "/none").send().await.status, 404);
    }
    assert_eq!(ask(&serving, "{}").send().await.status, 200);
    serving.signal(Signal::SIGTERM);
    assert_eq!(soon("its end", serving.child.wait()).await.expect("a status").code(), Some(0));

    // stderr is open but not read until the pipe is full. Each request logs a long line.
    let mut serving = workspace.serve(&[]).await;
    let stderr = serving.take_stderr();
    #[cfg(target_os = "linux")]
    nix::fcntl::fcntl(stderr.get_ref(), nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).expect("a smaller pipe");
    let unknown = format!("/v1/connect/connectors/{}", "x".repeat(200));
    let request = format!("GET {unknown} HTTP/1.1\r\nhost: {}\r\n", serving.addr);
    let many = format!("{request}\r\n").repeat(29) + &request + "connection: close\r\n\r\n";
    let replies = raw(serving.addr, many.as_bytes()).await;
    assert_eq!(String::from_utf8_lossy(&replies).matches("HTTP/1.1 404").count(), 30);
    serving.signal(Signal::SIGTERM);
    assert_eq!(soon("its end", serving.child.wait()).await.expect("a status").code(), Some(0));
}

#[tokio::test]
async fn json_logs_have_one_object_per_line() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&["--log-format", "json", "--log-level", "trace"]).await;
    ask(&serving, "{}").send().await;
    ask(&serving, "not JSON").send().await;
    get(&serving, "/%1b[31m%0aerror").send().await;
    Request::new(serving.addr, "POST", "/v1/connect/token/salesforce%2Fcrm").json("{}").send().await;
    let ended = serving.stop().await;
    let lines: Vec<serde_json::Value> =
        ended.stderr.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    assert!(lines.iter().all(|line| line["level"].is_string() && line["message"].is_string()), "{}", ended.stderr);
    assert!(lines.iter().any(|line| line["code"] == "bad_json" && line["status"] == 400), "{}", ended.stderr);
    assert!(lines.iter().any(|line| line["command"] == "vercel connect attach salesforce/crm"), "{}", ended.stderr);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn core_dumps_are_off_and_the_file_limit_is_raised() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", serving.pid())).expect("limits");
    let soft = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).expect("a limit");
        line[name.len()..].split_whitespace().next().expect("a number").to_owned()
    };
    assert_eq!(soft("Max core file size"), "0");
    assert!(soft("Max open files") == "unlimited" || soft("Max open files").parse::<u64>().expect("a number") >= 1024);
    serving.stop().await;
}

#[tokio::test]
async fn help_and_version_go_to_stdout() {
    let workspace = Workspace::new().await;
    for (arguments, part) in [
        (&["--version"][..], concat!("connect-sidecar ", env!("CARGO_PKG_VERSION"), "\n")),
        (&["--help"], "--env-file <PATH>"),
        (&["-h"], "--env-file <PATH>"),
        (&["serve", "--help"], "Usage: connect-sidecar serve"),
        (&["help"], "demo"),
    ] {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(ended.stdout.contains(part), "{}", ended.stdout);
    }
}

#[test]
fn help_lists_own_options_first_and_those_that_widen_access_last() {
    for (command, own) in [("token", "--user-id <ID>"), ("run", "--expose-token"), ("emulate", "--state <FILE>")] {
        let help = Cli::command().try_get_matches_from(["connect-sidecar", command, "--help"]).expect_err("help");
        let help = help.to_string();
        let at = |part: &str| help.find(part).unwrap_or_else(|| panic!("no {part:?}: {help}"));
        let order =
            [own, "Global options:", "--env-file", "--verbose", "--allowed-host", "--dangerously-listen-on-network"];
        assert!(order.map(at).is_sorted(), "{help}");
    }
}

#[test]
fn no_option_takes_a_secret() {
    let cli = Cli::command();
    let commands = std::iter::once(&cli).chain(cli.get_subcommands());
    for argument in commands.flat_map(clap::Command::get_arguments).filter(|a| a.get_action().takes_values()) {
        // A host name or a variable name is not a secret.
        if ["bearer_hosts", "secret_from_env"].contains(&argument.get_id().as_str()) {
            continue;
        }
        let names = [argument.get_id().as_str(), argument.get_long().unwrap_or_default()].concat();
        for word in ["token", "secret", "password", "key", "bearer"] {
            assert!(!names.contains(word), "{names}");
        }
    }
}

/// Successful and failing requests of every kind, with secrets in their bodies and headers.
async fn tour(workspace: &Workspace, serving: &Serving, secret_word: &str) -> Vec<String> {
    let body = format!(r#"{{"subject":{{"type":"user","id":"{secret_word}"}},"scopes":["{secret_word}"]}}"#);
    let app = r#"{"subject":{"type":"app"},"scopes":["read:everything"]}"#;
    let mut secrets = vec![body.clone(), app.into()];
    let mut provider_tokens = |reply: &Reply| {
        secrets.extend(reply.json()["token"].as_str().map(str::to_owned));
        reply.status
    };
    assert_eq!(provider_tokens(&ask(serving, app).send().await), 200);
    assert_eq!(provider_tokens(&ask(serving, app).send().await), 200, "a hit");
    assert_eq!(provider_tokens(&ask(serving, app).header("cache-control", "no-cache").send().await), 200);
    let echo = format!(r#"{{"error":{{"code":"{secret_word}","message":"{secret_word}"}}}}"#);
    for fault in [
        Fault::answer(200, "text/html", &format!("<html>{secret_word}")),
        Fault::answer(500, "application/json", &echo),
        Fault::answer(403, "application/json", &echo),
        Fault::answer(200, "application/json", &format!("[{secret_word:?}]")),
        Fault::status(401, "unauthorized"),
        Fault::rate_limited(Some(secret_word)),
        Fault::redirect(&format!("https://evil.example/{secret_word}")),
        Fault::once(FaultKind::Truncate),
        Fault::once(FaultKind::Reset),
    ] {
        workspace.emulator.inject(fault);
        ask(serving, app).header("cache-control", "no-cache").send().await;
    }
    let metadata = "/v1/connect/connectors/slack%2Facme-slack";
    let bearer = format!("Bearer {secret_word}");
    for request in [
        ask(serving, &body),
        ask(serving, &body).header("authorization", &bearer).header("cookie", secret_word),
        ask(serving, &body).header("sidecar-key", secret_word).header("sidecar-client", secret_word),
        ask(serving, &body).header("content-type", secret_word),
        ask(serving, &body).header("host", "evil.example"),
        ask(serving, &body).header("origin", &format!("https://{secret_word}.example")),
        ask(serving, &body).header("x-forwarded-for", secret_word),
        ask(serving, &body).header("expect", secret_word),
        ask(serving, &body).header("content-encoding", secret_word),
        ask(serving, &body[..body.len() - 1]),
        ask(serving, &body.replacen('{', &format!("{{{secret_word:?}:1,{secret_word:?}:1,"), 1)),
        ask(serving, &body.repeat(1000)),
        Request::new(serving.addr, "POST", "/v1/connect/authorize/slack%2Facme-slack").json(&body),
        Request::new(serving.addr, "POST", "/v1/connect/token/salesforce%2Fcrm").json(&body),
        Request::new(serving.addr, "DELETE", &format!("{metadata}/tokens")).json(&body),
        Request::new(serving.addr, "DELETE", "/_sidecar/v1/cache").header("sidecar-key", secret_word),
        get(serving, metadata).header("authorization", &bearer),
        get(serving, "/none").header("authorization", &bearer),
    ] {
        request.send().await;
    }
    raw(serving.addr, format!("POST {SLACK} HTTP/1.1\r\n{secret_word}\r\n\r\n").as_bytes()).await;
    secrets
}

#[tokio::test]
async fn no_secret_appears_in_any_response_or_log() {
    const SECRET_WORD: &str = "CANARY-of-a-caller-0123456789";
    let workspace = Workspace::new().await;
    let env_path = workspace.project().join(".env.local");
    let access_token = "vcp_demo_access_token";
    for auth in ["oidc", "access-token"] {
        let arguments = ["--log-level", "trace", "--auth", auth, "--team-id", "team_acme"];
        let mut command = workspace.sidecar(&arguments);
        command.env("RUST_LOG", "trace").env("VERCEL_TOKEN", access_token).env("RUST_BACKTRACE", "full");
        let mut serving = Serving::start(command).await;
        let mut secrets = tour(&workspace, &serving, SECRET_WORD).await;
        secrets.extend([SECRET_WORD.into(), access_token.into(), workspace.token.clone()]);
        let state = workspace.home.path().join(format!(".local/state/connect-sidecar/{}.json", serving.addr.port()));
        let instance: serde_json::Value = serde_json::from_slice(&fs::read(state).expect("a file")).expect("JSON");
        secrets.push(instance["key"].as_str().expect("a key").to_owned());
        let mut shown = Vec::new();
        if auth == "oidc" {
            let fresh = workspace.emulator.oidc_token(DEVELOPMENT_LIFE);
            secrets.push(fresh.clone());
            for content in [
                format!("VERCEL_OIDC_TOKEN=\"{}", &fresh[..fresh.len() / 2]),
                format!("VERCEL_OIDC_TOKEN=${fresh}\n"),
                format!("VERCEL_OIDC_TOKEN={}\nVERCEL_OIDC_TOKEN={fresh}\n", workspace.token),
            ] {
                fs::write(&env_path, content).expect("written");
                serving.signal(Signal::SIGHUP);
            }
            serving.wait_for_log("token refreshed").await;
        }
        for path in ["/_sidecar/v1/status", "/metrics", "/readyz", "/healthz", "/_sidecar/"] {
            shown.push(get(&serving, path).send().await.text());
        }
        let ended = serving.stop().await;
        shown.extend([ended.stdout, ended.stderr]);
        let shown = shown.join("\n");
        assert!(
            shown.contains("forbidden") && shown.contains("connect_sidecar_build_info"),
            "the output covers errors and metrics"
        );
        assert_no_slice_of(secrets.iter().map(String::as_str), &shown);
    }
}

#[tokio::test]
async fn a_start_without_a_token_logs_the_upstream_and_what_works_without_an_account() {
    let workspace = Workspace::new().await;
    let words = "without an account, see `connect-sidecar demo`, or start `connect-sidecar emulate`";
    let ended = workspace.serve(&[]).await.stop().await;
    assert!(!ended.stderr.contains(words), "there is a token: {}", ended.stderr);
    fs::remove_file(workspace.project().join(".env.local")).expect("removed");
    let ended = workspace.serve(&[]).await.stop().await;
    for text in [
        words,
        &format!("requests go to {}", workspace.emulator.url()),
        "`connect-sidecar status --open`",
        "vercel env pull",
    ] {
        assert!(ended.stderr.contains(text), "{text}: {}", ended.stderr);
    }
}

/// An unusable state directory: how to make it, the expected reason, and the expected remedy.
type UnusableStateDir = (fn(&std::path::Path), &'static str, &'static str);
const UNUSABLE_STATE_DIRS: [UnusableStateDir; 3] = [
    (
        |state| {
            fs::create_dir(state).expect("a directory");
            fs::set_permissions(state, PermissionsExt::from_mode(0o755)).expect("a mode");
        },
        "others have access to ",
        "; run `chmod 700 ",
    ),
    (|state| fs::write(state, "").expect("written"), " is not a directory", "; run `mv "),
    (
        |state| symlink("/nowhere", state).expect("a link"),
        " is a link, not the directory itself",
        "; set XDG_STATE_HOME to ",
    ),
];

#[tokio::test]
async fn an_unusable_state_directory_is_one_warning_and_requests_are_served() {
    for (break_dir, reason, remedy) in UNUSABLE_STATE_DIRS {
        let workspace = Workspace::new().await;
        let home = workspace.home.path().join(".local/state");
        fs::create_dir_all(&home).expect("a directory");
        break_dir(&home.join("connect-sidecar"));
        let serving = workspace.serve(&[]).await;
        assert_eq!(ask(&serving, "{}").send().await.status, 200);
        only_one_warning(&serving.stop().await.stderr, reason, remedy);
        let strict = run(workspace.sidecar(&["--require-key"])).await;
        assert_eq!((strict.code, strict.stdout.as_str()), (Some(1), ""), "{strict:?}");
        let begins = "error: could not write the instance key, which --require-key needs: ";
        assert!(strict.stderr.contains(begins) && strict.stderr.contains(reason), "{strict:?}");
        assert!(strict.stderr.contains(remedy), "{strict:?}");
    }
    let workspace = Workspace::new().await;
    let mut homeless = workspace.sidecar(&[]);
    homeless.env_remove("HOME").env("XDG_STATE_HOME", "relative");
    let ended = Serving::start(homeless).await.stop().await;
    only_one_warning(&ended.stderr, "neither XDG_STATE_HOME nor HOME is set to an absolute path", "set HOME");
    assert!(!workspace.project().join("relative").exists());
}

#[tokio::test]
async fn a_full_or_read_only_disk_is_named() {
    let can_mount =
        std::process::Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", "/mnt"]).status();
    if !can_mount.is_ok_and(|status| status.success()) {
        crate::support::skipped("nothing can be mounted here");
        return;
    }
    for (options, reason, remedy) in [
        ("ro,mode=700", "the file system is read-only", "; set XDG_STATE_HOME to a directory of your own"),
        ("size=4k,mode=700", "the disk is full", "; make room on that disk"),
    ] {
        let workspace = Workspace::new().await;
        let state = workspace.home.path().join(".local/state/connect-sidecar");
        fs::create_dir_all(&state).expect("a directory");
        let plain = workspace.sidecar(&[]);
        let mut mounted = isolated("unshare", workspace.home.path());
        let script =
            format!("mount -t tmpfs -o {options} none \"$1\"; head -c 4096 /dev/zero >\"$1/fill\"; exec \"$0\"");
        mounted.args(["-rm", "sh", "-c", &script]).arg(plain.as_std().get_program()).arg(&state);
        mounted.envs(plain.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
        mounted.current_dir(workspace.project());
        only_one_warning(&Serving::start(mounted).await.stop().await.stderr, reason, remedy);
    }
}

#[track_caller]
fn only_one_warning(log: &str, reason: &str, remedy: &str) {
    let lines: Vec<_> = log.lines().filter(|line| line.contains("will not find this sidecar")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains(reason) && lines[0].contains(remedy), "{reason}, {remedy}: {log}");
    assert!(!log.contains("could not save") && !log.contains("said again by the next start"), "{log}");
}
