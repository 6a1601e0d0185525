//! Which sidecar a command selects, and that no other program gets the key (docs/security.md S5).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use connect_sidecar::instance::key::Key;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::support::process::{Ended, Serving, Stopped, isolated, run};
use crate::support::workspace::Workspace;
use crate::support::{instance_key, write_private};

/// The commands that ask a running sidecar.
const COMMANDS: [&[&str]; 6] =
    [&["status"], &["status", "--short"], &["status", "--json"], &["status", "--open"], &["cache", "clear"], &["logs"]];

fn pid_in(ended: &Ended) -> u64 {
    let state: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
    state["pid"].as_u64().expect("a process id")
}

#[tokio::test]
async fn the_nearest_project_is_selected_unless_a_port_is_given() {
    let workspace = Workspace::new().await;
    let (root, nested) = (workspace.project(), workspace.add_project("web/packages/api"));
    let (below, beside) = (workspace.add_project("web/packages/api/src"), workspace.add_project("web/docs"));
    let outer = workspace.serve_in(&root, &[]).await;
    let inner = workspace.serve_in(&nested, &[]).await;
    let ports = [&outer, &inner].map(|serving| serving.addr.port().to_string());
    for (dir, flags, meant) in [
        (&root, vec![], &outer),
        (&beside, vec![], &outer),
        (&nested, vec![], &inner),
        (&below, vec![], &inner),
        (&below, vec!["--project", "../../.."], &outer),
        (&root, vec!["--port", &ports[1]], &inner),
        (&below, vec!["--port", &ports[0]], &outer),
    ] {
        let asked = run(workspace.sidecar_in(dir, &[&["status", "--json"], flags.as_slice()].concat())).await;
        assert_eq!(pid_in(&asked), u64::from(meant.pid()), "{} {flags:?}", dir.display());
    }
}

#[tokio::test]
async fn of_two_sidecars_for_one_project_the_same_is_selected_until_it_ends() {
    let workspace = Workspace::new().await;
    let mut two = [workspace.serve(&[]).await, workspace.serve(&[]).await];
    two.sort_by_key(|serving| serving.addr.port());
    for _ in 0..3 {
        assert_eq!(pid_in(&run(workspace.sidecar(&["status", "--json"])).await), u64::from(two[0].pid()));
    }
    let [first, second] = two;
    // Killed, so that it cannot remove its state file.
    first.signal(nix::sys::signal::Signal::SIGKILL);
    first.end().await;
    assert_eq!(pid_in(&run(workspace.sidecar(&["status", "--json"])).await), u64::from(second.pid()));
}

#[tokio::test]
async fn if_none_runs_the_error_lists_those_of_other_projects() {
    let workspace = Workspace::new().await;
    let other = workspace.add_project("api");
    let web = workspace.project();
    for arguments in COMMANDS {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{arguments:?}");
        let expected = format!(
            "error: no sidecar runs for {}: start one with `connect-sidecar` in another terminal\n",
            web.display()
        );
        assert_eq!(ended.stderr, expected, "{arguments:?}");
    }
    let serving = workspace.serve_in(&other, &[]).await;
    let ended = run(workspace.sidecar(&["status"])).await;
    let hint = format!("\nerror: one runs for {}: that is --port {}\n", other.display(), serving.addr.port());
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.ends_with(&hint), "{}", ended.stderr);
    let ended = run(workspace.sidecar(&["status", "--port", "9"])).await;
    assert!(ended.stderr.contains("no sidecar of yours runs at port 9:"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_required_key_is_sent_to_the_sidecar() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&["--require-key"]).await;
    for arguments in [&["token", "slack/acme-slack"][..], &["status"], &["logs"], &["cache", "clear"]] {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

/// A server on a sidecar's port that answers every request with this proof. Returns its port and the received bytes.
async fn impostor(proof: impl Fn(u16) -> Option<String>) -> (u16, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let heard = Arc::new(Mutex::new(String::new()));
    let (received, proof) = (heard.clone(), proof(port).map(|proof| format!("sidecar-proof: {proof}\r\n")));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).await.unwrap_or_default();
            received.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&bytes[..read]));
            let proof = proof.as_deref().unwrap_or_default();
            let reply = format!(
                "HTTP/1.1 200 OK\r\n{proof}content-length: 15\r\nconnection: close\r\n\r\n{{\"status\":\"ok\"}}"
            );
            let _ = stream.write_all(reply.as_bytes()).await;
        }
    });
    (port, heard)
}

#[tokio::test]
async fn a_program_that_took_over_a_port_does_not_get_the_key() {
    const KEY: &str = "the-key-of-an-instance-that-has-ended-long-ago";
    let key = || Key::new(KEY.into());
    let replayed = move |port| Some(key().proof(port, b"a nonce of another time"));
    let of_another_port = move |port: u16| Some(key().proof(port.wrapping_add(1), b"a nonce of another time"));
    for (what, (port, heard)) in [
        ("no proof", impostor(|_| None).await),
        ("a replayed proof", impostor(replayed).await),
        ("a proof of another port", impostor(of_another_port).await),
        ("the key's hash", impostor(|_| Some("x".repeat(43))).await),
    ] {
        let workspace = Workspace::new().await;
        let dir = workspace.home.path().join(".local/state/connect-sidecar");
        std::fs::create_dir_all(&dir).expect("a directory");
        // The process id exists.
        let file = json!({
            "pid": std::process::id(), "url": format!("http://127.0.0.1:{port}"), "key": KEY, "project": workspace.project(),
        });
        write_private(&dir.join(format!("{port}.json")), &file.to_string());
        for arguments in COMMANDS {
            let ended = run(workspace.sidecar(arguments)).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {arguments:?}: {ended:?}");
            assert!(ended.stderr.contains("no sidecar runs for"), "{what}: {}", ended.stderr);
        }
        let port = port.to_string();
        let ended = run(workspace.sidecar(&["token", "slack/acme-slack", "--port", &port])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {ended:?}");
        let elsewhere = run(workspace.sidecar(&["status", "--project", "/"])).await;
        assert!(!elsewhere.stderr.contains("one runs for"), "{what}: {}", elsewhere.stderr);

        let heard = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(heard.contains("sidecar-nonce"), "{what}: it was asked");
        assert!(!heard.contains(KEY) && !heard.contains("sidecar-key"), "{what}: {heard}");
    }
}

#[tokio::test]
async fn a_stale_state_file_does_not_hide_a_running_sidecar() {
    let workspace = Workspace::new().await;
    let (port, heard) = impostor(|_| None).await;
    let serving = workspace.serve(&[]).await;
    let dir = workspace.home.path().join(".local/state/connect-sidecar");
    let key = instance_key(&workspace.home.path().join(".local/state"), serving.addr);
    let file = json!({
        "pid": std::process::id(), "url": format!("http://127.0.0.1:{port}"), "key": key, "project": workspace.project(),
    });
    write_private(&dir.join("1.json"), &file.to_string());
    let ended = run(workspace.sidecar(&["status", "--json"])).await;
    assert_eq!(pid_in(&ended), u64::from(serving.pid()));
    assert!(!heard.lock().unwrap_or_else(PoisonError::into_inner).contains(&key));
}

#[tokio::test]
async fn a_project_whose_path_is_not_utf_8_finds_its_own_sidecar_and_no_other() {
    let workspace = Workspace::new().await;
    // Equal after lossy conversion to UTF-8.
    let [project, twin] = [&b"caf\xe9 100%"[..], b"caf\xe8 100%"].map(|name| {
        let project = workspace.project().with_file_name(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir_all(project.join("src")).expect("a project");
        std::fs::copy(workspace.project().join(".env.local"), project.join(".env.local")).expect("copied");
        project
    });
    let serving = workspace.serve_in(&project, &[]).await;
    for dir in [&project, &project.join("src")] {
        let asked = run(workspace.sidecar_in(dir, &["status", "--json"])).await;
        assert_eq!(pid_in(&asked), u64::from(serving.pid()), "{}", dir.display());
    }
    let told = run(workspace.sidecar_in(&project, &["env", "--format", "json", "--no-intercept"])).await;
    let url = serde_json::from_str::<Value>(&told.stdout).expect("JSON")["CONNECT_SIDECAR_URL"].clone();
    assert_eq!(url, format!("http://{}", serving.addr));
    let joined = run(workspace.sidecar_in(&project, &["run", "--", "sh", "-c", "echo $CONNECT_SIDECAR_URL"])).await;
    assert_eq!(joined.stdout, format!("http://{}\n", serving.addr), "{joined:?}");
    let elsewhere = run(workspace.sidecar_in(&twin, &["status"])).await;
    assert_eq!((elsewhere.code, elsewhere.stderr.contains("no sidecar runs for ")), (Some(1), true), "{elsewhere:?}");
}

/// The commands that need a running sidecar or start one.
const ALL: [&[&str]; 12] = [
    &["status"],
    &["status", "--short"],
    &["status", "--json"],
    &["status", "--open"],
    &["cache", "clear"],
    &["logs"],
    &["logs", "-f"],
    &["refresh"],
    &["env"],
    &["token", "slack/acme-slack"],
    &["run", "--", "echo", "ran"],
    &["run", "--no-intercept", "--port", "0", "--", "echo", "ran"],
];

fn state_dir(workspace: &Workspace) -> std::path::PathBuf {
    workspace.home.path().join(".local/state/connect-sidecar")
}

/// The content of a sidecar's state file.
fn file_of(workspace: &Workspace, serving: &Serving) -> Value {
    let path = state_dir(workspace).join(format!("{}.json", serving.addr.port()));
    serde_json::from_slice(&std::fs::read(path).expect("a state file")).expect("JSON")
}

/// A port with a server that never responds.
async fn silent_port() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}

fn does_not_answer(project: &Path, pid: u32) -> String {
    format!(
        "error: the sidecar for {}: process {pid} does not answer; if it is stopped: `kill -CONT {pid}`\n",
        project.display()
    )
}

#[tokio::test]
async fn every_command_names_a_stopped_sidecar_and_none_starts_a_second_one() {
    let workspace = Workspace::new().await;
    let (web, below) = (workspace.project(), workspace.project().join("src"));
    std::fs::create_dir(&below).expect("a directory");
    let serving = workspace.serve(&[]).await;
    let port = serving.addr.port().to_string();
    let stopped = Stopped::process(serving.pid()).await;
    let expected = does_not_answer(&web, serving.pid());
    for dir in [&web, &below] {
        for arguments in ALL {
            let ended = run(workspace.sidecar_in(dir, arguments)).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{arguments:?}: {ended:?}");
            assert_eq!(ended.stderr, expected, "{arguments:?}");
        }
    }
    let elsewhere = run(workspace.sidecar_in(workspace.home.path(), &["status", "--port", &port])).await;
    assert_eq!((elsewhere.code, elsewhere.stderr), (Some(1), expected));
    let files = std::fs::read_dir(state_dir(&workspace)).expect("a directory").flatten();
    assert_eq!(files.filter(|file| file.path().extension().is_some_and(|e| e == "json")).count(), 1);
    drop(stopped);
    assert_eq!(pid_in(&run(workspace.sidecar(&["status", "--json"])).await), u64::from(serving.pid()));
}

#[tokio::test]
async fn a_hanging_sidecar_hides_those_of_directories_above_but_not_another_of_its_project() {
    let workspace = Workspace::new().await;
    let (root, nested) = (workspace.project(), workspace.add_project("web/api"));
    let outer = workspace.serve_in(&root, &[]).await;
    let inner = workspace.serve_in(&nested, &[]).await;
    // With the port of a server that never responds, it looks as if it hung.
    let (_listener, port) = silent_port().await;
    let path = state_dir(&workspace).join(format!("{}.json", inner.addr.port()));
    let mut file = file_of(&workspace, &inner);
    file["url"] = format!("http://127.0.0.1:{port}").into();
    write_private(&path, &file.to_string());
    let ended = run(workspace.sidecar_in(&nested, &["cache", "clear"])).await;
    assert_eq!((ended.code, ended.stderr), (Some(1), does_not_answer(&nested, inner.pid())));
    assert_eq!(pid_in(&run(workspace.sidecar_in(&root, &["status", "--json"])).await), u64::from(outer.pid()));
    let twin = workspace.serve_in(&nested, &[]).await;
    assert_eq!(pid_in(&run(workspace.sidecar_in(&nested, &["status", "--json"])).await), u64::from(twin.pid()));
}

#[tokio::test]
async fn a_reused_process_id_is_not_reported_as_unresponsive() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve_in(&workspace.add_project("elsewhere"), &[]).await;
    let mut sleep = isolated("sleep", workspace.home.path());
    let sleep = sleep.arg("600").spawn().expect("a process");
    let stopped = Stopped::process(sleep.id().expect("it runs")).await;
    let (listener, port) = silent_port().await;
    let mut of_another_start = file_of(&workspace, &serving);
    of_another_start["began"] = (of_another_start["began"].as_u64().expect("a number") + 1).into();
    for (what, file) in [
        ("another of this program, begun at another time", of_another_start),
        ("another program", json!({"pid": sleep.id(), "key": "k"})),
        ("another program, that is begun later", json!({"pid": sleep.id(), "key": "k", "began": 1})),
        ("none", json!({"pid": i32::MAX, "key": "k"})),
    ] {
        let mut file = file;
        file["url"] = format!("http://127.0.0.1:{port}").into();
        file["project"] = workspace.project().to_str().expect("text").into();
        write_private(&state_dir(&workspace).join("1.json"), &file.to_string());
        for arguments in [&["status"][..], &["status", "--short"], &["env"]] {
            let ended = run(workspace.sidecar(arguments)).await;
            assert_eq!(ended.code, Some(1), "{what}: {ended:?}");
            assert!(ended.stderr.starts_with("error: no sidecar runs for "), "{what}: {}", ended.stderr);
        }
    }
    drop((stopped, listener));
}

/// The shortest duration of a few attempts, since the machine may be busy.
async fn fastest(command: impl Fn() -> Command) -> (Duration, Ended) {
    let mut best: Option<(Duration, Ended)> = None;
    for _ in 0..5 {
        let begun = Instant::now();
        let ended = run(command()).await;
        let took = begun.elapsed();
        if best.as_ref().is_none_or(|(least, _)| took < *least) {
            best = Some((took, ended));
        }
    }
    best.expect("an attempt")
}

#[tokio::test]
async fn status_short_takes_at_most_300_ms_even_if_sidecars_hang() {
    const LIMIT: Duration = Duration::from_millis(300);
    let workspace = Workspace::new().await;
    let hung = workspace.serve_in(&workspace.add_project("hung"), &[]).await;
    let (_listener, port) = silent_port().await;
    let mut file = file_of(&workspace, &hung);
    file["url"] = format!("http://127.0.0.1:{port}").into();
    let mut write_state_file = |name: u16, project: &Path, pid: u32| {
        file["project"] = project.to_str().expect("text").into();
        file["pid"] = pid.into();
        if pid == std::process::id() {
            file.as_object_mut().expect("an object").remove("began");
        }
        write_private(&state_dir(&workspace).join(format!("{name}.json")), &file.to_string());
    };
    let short = || workspace.sidecar(&["status", "--short"]);
    for name in 1..=6 {
        write_state_file(name, &workspace.project(), hung.pid());
    }
    let (took, ended) = fastest(short).await;
    assert_eq!((ended.code, ended.stderr), (Some(1), does_not_answer(&workspace.project(), hung.pid())));
    assert!(took < LIMIT, "six that hang: {took:?}");
    for name in 1..=6 {
        write_state_file(name, &workspace.home.path().join("others"), std::process::id());
    }
    let (took, ended) = fastest(short).await;
    assert!(ended.code == Some(1) && ended.stderr.starts_with("error: no sidecar runs for "), "{ended:?}");
    assert!(took < LIMIT, "six of others: {took:?}");
    let serving = workspace.serve(&[]).await;
    let (took, ended) = fastest(short).await;
    assert!(ended.code == Some(0) && ended.stdout.starts_with("web "), "{ended:?}");
    assert!(took < LIMIT, "one that answers beside them: {took:?}");
    let _stopped = Stopped::process(serving.pid()).await;
    let (took, ended) = fastest(short).await;
    assert_eq!((ended.code, ended.stderr), (Some(1), does_not_answer(&workspace.project(), serving.pid())));
    assert!(took < LIMIT, "one that is stopped: {took:?}");
}

#[tokio::test]
async fn a_watch_names_a_stopped_sidecar_and_continues_with_it() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let stopped = Stopped::process(serving.pid()).await;
    let mut watch = crate::support::process::Running::start(workspace.sidecar(&["status", "--watch"]));
    assert!(watch.line().await.contains("does not answer"));
    drop(stopped);
    let running = format!("http://{}", serving.addr);
    while !watch.line().await.contains(&running) {}
    watch.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(watch.end().await.code, Some(0));
}

#[tokio::test]
async fn every_command_warns_about_a_setting_that_the_sidecar_has_otherwise() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let upstream = workspace.emulator.url();
    for arguments in [&["status"][..], &["status", "--json"], &["logs"], &["cache", "clear"]] {
        let flags = ["--upstream", "http://127.0.0.1:1", "--team-id", "team_a"];
        let ended = run(workspace.sidecar(&[arguments, &flags[..]].concat())).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let expected = format!(
            "warning: --upstream says http://127.0.0.1:1, the sidecar that runs has {upstream}, which counts\n\
             warning: --team-id says team_a, the sidecar that runs has nothing, which counts\n"
        );
        assert_eq!(ended.stderr, expected, "{arguments:?}");
    }
    assert_eq!(serving.stop().await.code, Some(0));
}

#[tokio::test]
async fn serve_on_the_port_of_the_projects_own_sidecar_says_it_is_already_running() {
    let workspace = Workspace::new().await;
    let (web, below) = (workspace.project(), workspace.project().join("apps/web"));
    std::fs::create_dir_all(&below).expect("a directory");
    let serving = workspace.serve(&[]).await;
    let (port, pid) = (serving.addr.port().to_string(), serving.pid());
    let there = format!("already running here, at http://127.0.0.1:{port} (process {pid}, for {})", web.display());
    for dir in [&web, &below] {
        let ended = run(workspace.sidecar_in(dir, &["--port", &port])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{ended:?}");
        for part in [&*there, "`connect-sidecar status`", &format!("`kill {pid}`")] {
            assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
        }
    }
    let other = workspace.add_project("api");
    let ended = run(workspace.sidecar_in(&other, &["--port", &port])).await;
    let taken = format!("by another connect-sidecar (process {pid}) for {}; end that, or", web.display());
    assert_eq!(ended.code, Some(3));
    assert!(ended.stderr.contains(&taken) && ended.stderr.ends_with("with --port\n"), "{}", ended.stderr);
    let _stopped = Stopped::process(pid).await;
    for dir in [&web, &other] {
        let ended = run(workspace.sidecar_in(dir, &["--port", &port])).await;
        assert_eq!(ended.code, Some(3));
        let said = format!("does not answer; if it is stopped: `kill -CONT {pid}`\n");
        assert!(ended.stderr.ends_with(&said), "{}", ended.stderr);
    }
}
