//! Which sidecar is meant, and that nobody else is given the key (trust-policy.md S5).

use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};

use connect_sidecar::instance_key::Key;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::desk::Desk;
use crate::support::process::{Ended, run};
use crate::support::{instance_key, write_private};

/// All that ask a running sidecar.
const COMMANDS: [&[&str]; 6] =
    [&["status"], &["status", "--short"], &["status", "--json"], &["status", "--open"], &["cache", "clear"], &["logs"]];

fn pid_in(ended: &Ended) -> u64 {
    let state: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
    state["pid"].as_u64().expect("a process id")
}

#[tokio::test]
async fn the_nearest_project_above_is_meant_unless_a_port_is_named() {
    let desk = Desk::new().await;
    let (root, nested) = (desk.project(), desk.add_project("web/packages/api"));
    let (below, beside) = (desk.add_project("web/packages/api/src"), desk.add_project("web/docs"));
    let outer = desk.serve_in(&root, &[]).await;
    let inner = desk.serve_in(&nested, &[]).await;
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
        let asked = run(desk.sidecar_in(dir, &[&["status", "--json"], flags.as_slice()].concat())).await;
        assert_eq!(pid_in(&asked), u64::from(meant.pid()), "{} {flags:?}", dir.display());
    }
}

#[tokio::test]
async fn of_two_for_one_project_it_is_always_the_same_until_that_ends() {
    let desk = Desk::new().await;
    let mut two = [desk.serve(&[]).await, desk.serve(&[]).await];
    two.sort_by_key(|serving| serving.addr.port());
    for _ in 0..3 {
        assert_eq!(pid_in(&run(desk.sidecar(&["status", "--json"])).await), u64::from(two[0].pid()));
    }
    let [first, second] = two;
    // Ended without a chance to take its file away.
    first.signal(nix::sys::signal::Signal::SIGKILL);
    first.end().await;
    assert_eq!(pid_in(&run(desk.sidecar(&["status", "--json"])).await), u64::from(second.pid()));
}

#[tokio::test]
async fn where_none_runs_that_is_said_with_those_that_run_for_others() {
    let desk = Desk::new().await;
    let other = desk.add_project("api");
    let web = desk.project();
    for arguments in COMMANDS {
        let ended = run(desk.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{arguments:?}");
        let expected = format!(
            "error: no sidecar runs for {}: start one with `connect-sidecar` in another terminal\n",
            web.display()
        );
        assert_eq!(ended.stderr, expected, "{arguments:?}");
    }
    let serving = desk.serve_in(&other, &[]).await;
    let ended = run(desk.sidecar(&["status"])).await;
    let hint = format!("\nerror: one runs for {}: that is --port {}\n", other.display(), serving.addr.port());
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.ends_with(&hint), "{}", ended.stderr);
    let ended = run(desk.sidecar(&["status", "--port", "9"])).await;
    assert!(ended.stderr.contains("no sidecar of yours runs at port 9:"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_required_key_is_sent_to_who_has_it() {
    let desk = Desk::new().await;
    let _serving = desk.serve(&["--require-key"]).await;
    for arguments in [&["token", "slack/acme-slack"][..], &["status"], &["logs"], &["cache", "clear"]] {
        let ended = run(desk.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

/// A program that has a sidecar's port and answers everybody with this proof.
async fn squat(proof: impl Fn(u16) -> Option<String>) -> (u16, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let heard = Arc::new(Mutex::new(String::new()));
    let (hears, proof) = (heard.clone(), proof(port).map(|proof| format!("sidecar-proof: {proof}\r\n")));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).await.unwrap_or_default();
            hears.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&bytes[..read]));
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
async fn who_has_taken_a_port_is_not_given_its_key() {
    const KEY: &str = "the-key-of-an-instance-that-has-ended-long-ago";
    let key = || Key::new(KEY.into());
    let replayed = move |port| Some(key().proof(port, b"a nonce of another time"));
    let of_another_port = move |port: u16| Some(key().proof(port.wrapping_add(1), b"a nonce of another time"));
    for (what, (port, heard)) in [
        ("no proof", squat(|_| None).await),
        ("a replayed proof", squat(replayed).await),
        ("a proof of another port", squat(of_another_port).await),
        ("the key's hash", squat(|_| Some("x".repeat(43))).await),
    ] {
        let desk = Desk::new().await;
        let dir = desk.home.path().join(".local/state/connect-sidecar");
        std::fs::create_dir_all(&dir).expect("a directory");
        // A process of that number runs.
        let file = json!({
            "pid": std::process::id(), "url": format!("http://127.0.0.1:{port}"), "key": KEY, "project": desk.project(),
        });
        write_private(&dir.join(format!("{port}.json")), &file.to_string());
        for arguments in COMMANDS {
            let ended = run(desk.sidecar(arguments)).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {arguments:?}: {ended:?}");
            assert!(ended.stderr.contains("no sidecar runs for"), "{what}: {}", ended.stderr);
        }
        let port = port.to_string();
        let ended = run(desk.sidecar(&["token", "slack/acme-slack", "--port", &port])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {ended:?}");
        let elsewhere = run(desk.sidecar(&["status", "--project", "/"])).await;
        assert!(!elsewhere.stderr.contains("one runs for"), "{what}: {}", elsewhere.stderr);

        let heard = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(heard.contains("sidecar-nonce"), "{what}: it was asked");
        assert!(!heard.contains(KEY) && !heard.contains("sidecar-key"), "{what}: {heard}");
    }
}

#[tokio::test]
async fn a_stale_file_does_not_hide_the_sidecar_that_runs() {
    let desk = Desk::new().await;
    let (port, heard) = squat(|_| None).await;
    let serving = desk.serve(&[]).await;
    let dir = desk.home.path().join(".local/state/connect-sidecar");
    let key = instance_key(&desk.home.path().join(".local/state"), serving.addr);
    let file = json!({
        "pid": std::process::id(), "url": format!("http://127.0.0.1:{port}"), "key": key, "project": desk.project(),
    });
    write_private(&dir.join("1.json"), &file.to_string());
    let ended = run(desk.sidecar(&["status", "--json"])).await;
    assert_eq!(pid_in(&ended), u64::from(serving.pid()));
    assert!(!heard.lock().unwrap_or_else(PoisonError::into_inner).contains(&key));
}

#[tokio::test]
async fn a_project_whose_path_is_not_utf_8_finds_its_own_sidecar_and_no_other() {
    let desk = Desk::new().await;
    // Equal once they are made readable.
    let [project, twin] = [&b"caf\xe9 100%"[..], b"caf\xe8 100%"].map(|name| {
        let project = desk.project().with_file_name(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir_all(project.join("src")).expect("a project");
        std::fs::copy(desk.project().join(".env.local"), project.join(".env.local")).expect("copied");
        project
    });
    let serving = desk.serve_in(&project, &[]).await;
    for dir in [&project, &project.join("src")] {
        let asked = run(desk.sidecar_in(dir, &["status", "--json"])).await;
        assert_eq!(pid_in(&asked), u64::from(serving.pid()), "{}", dir.display());
    }
    let told = run(desk.sidecar_in(&project, &["env", "--format", "json", "--no-intercept"])).await;
    let url = serde_json::from_str::<Value>(&told.stdout).expect("JSON")["CONNECT_SIDECAR_URL"].clone();
    assert_eq!(url, format!("http://{}", serving.addr));
    let joined = run(desk.sidecar_in(&project, &["run", "--", "sh", "-c", "echo $CONNECT_SIDECAR_URL"])).await;
    assert_eq!(joined.stdout, format!("http://{}\n", serving.addr), "{joined:?}");
    let elsewhere = run(desk.sidecar_in(&twin, &["status"])).await;
    assert_eq!((elsewhere.code, elsewhere.stderr.contains("no sidecar runs for ")), (Some(1), true), "{elsewhere:?}");
}
