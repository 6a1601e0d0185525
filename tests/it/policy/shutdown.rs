//! Group S: shutdown, limits and resources.

use std::fs;
use std::time::Instant;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::http::{Request, kept_alive, token_head};
use crate::support::process::{proc_status, raise_descriptor_limit, sockets_of};
use crate::support::scripted::Says;
use crate::support::{SLACK, soon};

use super::contract::{
    Sidecar, Start, at_a_rate_of, fresh_jwt, ms, reserve_port, seconds, start, stated, token_answer, until, within,
};

/// The inodes of the listening sockets.
fn listening(s: &Sidecar) -> Vec<String> {
    let listening = sockets_of(s.addr.port()).into_iter().filter(|socket| socket.is_listening);
    listening.map(|socket| socket.inode).collect()
}

/// Sends this many different requests at once. Each gets a token, or one of these refusals with a `Retry-After`.
/// Returns the number of tokens.
async fn all_at_once(s: &Sidecar, count: usize, refusals: &[(u16, &str)]) -> usize {
    let asking: Vec<_> = (0..count).map(|_| tokio::spawn(s.req().send())).collect();
    let mut granted = 0;
    for asked in asking {
        let reply = asked.await.expect("no panic");
        if reply.status == 200 {
            granted += 1;
            continue;
        }
        assert!(refusals.contains(&(reply.status, &reply.code())), "{}", reply.text());
        reply.assert_safe();
        let after = reply.header("retry-after").and_then(|seconds| seconds.parse::<u64>().ok());
        assert!(after.is_some_and(|seconds| (1..=60).contains(&seconds)), "{reply:?}");
    }
    granted
}

pub async fn tS01_answers_a_request_in_flight_before_exiting() {
    let s = start().await;
    s.m.will(Says::from(token_answer(1)).after(seconds(2)));
    let sent = s.req().begin().await;
    let begun = Instant::now();
    stated(ms(500)).await;
    s.m.asked(1).await;
    s.serving.signal(Signal::SIGTERM);
    let refuses = until(async || TcpStream::connect(s.addr).await.is_err());
    within(ms(200), "nobody to be let in any more", refuses).await;
    assert_eq!(sent.reply().await.status, 200);
    assert_eq!(s.serving.end().await.code, Some(0));
    assert!(begun.elapsed() < seconds(4) + seconds(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn tS02_idle_connections_do_not_delay_the_shutdown() {
    let s = start().await;
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(kept_alive(s.addr).await);
    }
    s.serving.signal(Signal::SIGTERM);
    assert_eq!(within(ms(1500), "its end", s.serving.end()).await.code, Some(0));
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tS04_sighup_rereads_the_file_and_ends_nothing() {
    let mut s = start().await;
    let (before, fresh) = (listening(&s), fresh_jwt());
    assert!(!before.is_empty());
    s.m.will(Says::from(token_answer(1)).after(ms(500)));
    let sent = s.req().begin().await;
    s.m.asked(1).await;
    s.write_env(&fresh);
    s.serving.signal(Signal::SIGHUP);
    s.serving.wait_for_log("token refreshed").await;
    assert_eq!(sent.reply().await.status, 200);
    assert_eq!(listening(&s), before);
    s.assert_uses(&fresh).await;
}

#[tokio::test]
async fn tS06_idle_connections_keep_nobody_out() {
    raise_descriptor_limit();
    let s = start().await;
    let mut idle = Vec::new();
    for _ in 0..600 {
        idle.push(s.connect().await);
    }
    within(seconds(1), "an answer", s.pass(s.req())).await;
    s.alive().await;
}

pub async fn tS08_drops_clients_that_vanish() {
    raise_descriptor_limit();
    let s = start().await;
    let port = s.addr.port();
    s.pass(s.req()).await;
    let before = listening(&s).len();
    let half = s.fill(&token_head("1.1", ""));
    let mut clients = Vec::new();
    for _ in 0..500 {
        let mut client = s.connect().await;
        client.write_all(&half.as_bytes()[..half.len() / 2]).await.expect("written");
        clients.push(client);
    }
    // By now all connections are accepted.
    s.healthy().await;
    assert!(sockets_of(port).len() >= 500 + before);
    let begun = Instant::now();
    until(async || sockets_of(port).len() <= before + 5).await;
    assert!(begun.elapsed() < seconds(30), "after {:?}", begun.elapsed());
    drop(clients);
    s.alive().await;
}

#[tokio::test]
async fn tS09_works_without_a_reader_of_its_output() {
    let (reserved, port) = reserve_port();
    let silent = ["-c", "exec \"$0\" \"$@\" 2>&-"];
    let mut prepared = Start::new().await.args(&[&format!("--port={port}")]).through("sh", &silent);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut child = prepared.command.stdout(writer).spawn().expect("a process");
    let addr = ([127, 0, 0, 1], port).into();
    within(seconds(3), "it to listen", until(async || TcpStream::connect(addr).await.is_ok())).await;
    drop(reserved);
    for n in 0..100 {
        let request = Request::new(addr, "POST", SLACK).json(&format!("{{\"scopes\":[\"{}\"]}}", n % 10));
        assert_eq!(request.send().await.status, 200);
    }
    assert_eq!(prepared.m.count(), 10);
    child.start_kill().expect("a signal");
}

pub async fn tS11_limits_upstream_to_16_concurrent_requests() {
    raise_descriptor_limit();
    let s = start().await;
    s.m.otherwise(|_, n| Says::from(token_answer(n)).after(seconds(3)));
    let begun = Instant::now();
    let granted = all_at_once(&s, 400, &[(503, "overloaded"), (429, "local_rate_limit")]).await;
    assert!(begun.elapsed() < seconds(35), "{:?}", begun.elapsed());
    assert_eq!(granted, s.m.count());
    let at: Vec<_> = s.m.received().iter().map(|seen| seen.at).collect();
    let most = at.iter().map(|a| at.iter().filter(|b| *b <= a && a.duration_since(**b) < seconds(3)).count());
    assert!(most.max().is_some_and(|most| (2..=16).contains(&most)));
}

#[tokio::test]
async fn tS12_limits_upstream_to_20_requests_a_second_after_a_burst() {
    raise_descriptor_limit();
    let s = start().await;
    let begun = Instant::now();
    let granted = all_at_once(&s, 200, &[(429, "local_rate_limit")]).await;
    let in_time = s.m.received().iter().filter(|seen| seen.at < begun + seconds(1)).count();
    assert!(in_time <= 65 && (40..200).contains(&granted), "{in_time}, {granted}");
    assert_eq!(granted, s.m.count());
}

pub async fn tS13_a_minute_of_load_and_rotations_leaks_nothing() {
    let s = start().await;
    s.pass(s.req()).await;
    let asking = at_a_rate_of(50, 3000, async |n| {
        let expected = match n % 10 {
            0 => (s.req(), 200),
            1 => (s.req().header("origin", "null"), 403),
            2 => (s.ask("[]"), 400),
            3 => (s.get("/_sidecar/v1/status"), 200),
            4 => (s.get("/metrics"), 200),
            _ => (s.ask("{}"), 200),
        };
        assert_eq!(expected.0.send().await.status, expected.1);
    });
    let mut threads = Vec::new();
    let rotating = async {
        for _ in 0..11 {
            stated(seconds(5)).await;
            s.write_env(&fresh_jwt());
            threads.push(proc_status(s.pid(), "Threads"));
        }
    };
    tokio::join!(asking, rotating);
    assert!(proc_status(s.pid(), "VmRSS") < 64 * 1024);
    // Reading a file uses a blocking thread for some time.
    let (first, most) = (threads[0], threads.iter().max().expect("some"));
    assert!(*most <= first + 1, "{threads:?}");
    let rotations = s.get("/metrics").send().await.text();
    let line = rotations.lines().find(|line| line.starts_with("connect_sidecar_oidc_rotations_total"));
    assert_eq!(line, Some("connect_sidecar_oidc_rotations_total 11"));
}

#[tokio::test]
async fn tS14_restarts_after_a_kill_on_the_same_port() {
    let (_reserved, port) = reserve_port();
    let port_flag = format!("--port={port}");
    let mut s = Start::new().await.args(&[&port_flag]).serve().await;
    let (left, first) = s.instance();
    s.serving.child.start_kill().expect("a signal");
    soon("its end", s.serving.child.wait()).await.expect("a status");
    assert!(left.exists(), "it had no time to clean up");
    let mut again = Start::new().await.args(&[&port_flag]);
    again.command.env("HOME", s.home.path());
    let second = again.serve().await;
    second.alive().await;
    let now: serde_json::Value = serde_json::from_slice(&fs::read(left).expect("there")).expect("JSON");
    assert_eq!(now["pid"], second.pid());
    assert_ne!(now["key"], first["key"]);
}

#[tokio::test]
async fn tS14_replaces_the_stale_unix_socket_after_a_kill() {
    let prepared = Start::new().await;
    let path = prepared.home.path().join("run/x.sock");
    let flag = format!("--unix-socket={}", path.display());
    let mut s = prepared.args(&[&flag]).serve().await;
    let second = Start::new().await.args(&[&flag]).end().await;
    assert_eq!(second.code, Some(3), "while it runs it keeps it: {}", second.stderr);
    s.serving.child.start_kill().expect("a signal");
    soon("its end", s.serving.child.wait()).await.expect("a status");
    assert!(path.exists(), "it had no time to clean up");
    let again = Start::new().await.args(&[&flag]).serve().await;
    again.alive().await;
    assert!(tokio::net::UnixStream::connect(&path).await.is_ok());
}
