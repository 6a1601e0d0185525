//! The built binary under a mixed load for as long as one likes: every answer is the right one, and nothing grows.
//!
//! `SOAK_SECONDS=600 cargo test --release --test it soak -- --ignored --nocapture`. Sixteen apps ask 2,000 times a second
//! between them, nearly always for what is cached, now and then for what is refused. One more asks for what must go
//! upstream, slower than the limits on that; every twentieth of those fails there. The env file is rewritten every second.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options};
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::interval;

use crate::support::http::{KeptAlive, Reply, Request};
use crate::support::process::{Serving, sidecar};
use crate::support::{SLACK, env_file, soon, write_private};

const APPS: u32 = 16;
const REQUESTS_A_SECOND: u32 = 2000;
const UPSTREAM_REQUESTS_A_SECOND: u32 = 12;
/// An app opens a new connection after this many requests.
const REQUESTS_A_CONNECTION: u32 = 700;
/// Resident memory, in KiB. The code of a debug build, which counts, is several times that of a release.
const MOST_MEMORY: u64 = if cfg!(debug_assertions) { 32 * 1024 } else { 24 * 1024 };

/// What is asked for again and again: the path, the connector, the body, and how its token begins.
const CACHED: [(&str, &str, &str, &str); 6] = [
    (SLACK, "slack/acme-slack", r#"{"subject":{"type":"app"}}"#, "xoxe.xoxb-"),
    (SLACK, "slack/acme-slack", r#"{"subject":{"type":"user","id":"user_ada"}}"#, "xoxe.xoxp-"),
    (SLACK, "slack/acme-slack", r#"{"scopes":["chat:write","users:read"]}"#, "xoxe.xoxb-"),
    ("/v1/connect/token/github%2Facme-github", "github/acme-github", r#"{"subject":{"type":"app"}}"#, "ghs_"),
    ("/v1/connect/token/github%2facme-github", "github/acme-github", r#"{"subject":{"type":"user"}}"#, "ghu_"),
    ("/v1/connect/token/oauth%2Flinear", "oauth/linear", "", "at_"),
];

/// A request upstream must answer with an error of its own, and its status.
const TYPED_ERRORS: [(&str, u16); 4] = [
    ("/v1/connect/token/salesforce%2Fcrm", 403),
    ("/v1/connect/token/snowflake%2Fwarehouse", 403),
    ("/v1/connect/token/slack%2Fnot-installed", 422),
    ("/v1/connect/token/slack%2Fnone", 404),
];

fn ask(addr: SocketAddr, path: &str, body: &str) -> Request {
    Request::new(addr, "POST", path).json(body)
}

/// Requests that are refused here, with their status.
fn refusals(addr: SocketAddr) -> [(Request, u16); 5] {
    let (path, _, body, _) = CACHED[0];
    [
        (ask(addr, path, body).header("origin", "https://evil.example"), 403),
        (ask(addr, path, body).header("host", "evil.example"), 403),
        (ask(addr, "/v1/connect/token/slack/acme-slack", body), 404),
        (ask(addr, path, r#"{"a":1,"a":2}"#), 400),
        (ask(addr, path, body).header("content-type", "text/plain"), 415),
    ]
}

/// Checks that a token is the connector's that was asked for, and of the kind of subject that was.
fn token(reply: &Reply, connector: &str, begins: &str) -> String {
    let (token, json) = (reply.token(), reply.json());
    assert_eq!(json["connector"]["uid"], connector, "{json}");
    assert!(token.starts_with(begins), "{json}");
    token
}

/// An app that asks until the end. Returns how often it did.
async fn app(number: u32, addr: SocketAddr, known: BTreeMap<usize, String>, end: Instant) -> u64 {
    let mut line = KeptAlive::to(addr).await;
    let mut ticks = interval(Duration::from_secs(1) * APPS / REQUESTS_A_SECOND);
    let mut count = 0;
    while Instant::now() < end {
        ticks.tick().await;
        let n = number + count;
        if count % REQUESTS_A_CONNECTION == REQUESTS_A_CONNECTION - 1 {
            line = KeptAlive::to(addr).await;
        }
        if n.is_multiple_of(97) {
            let [(request, status), ..] = &refusals(addr)[n as usize % 5..] else { unreachable!() };
            let reply = line.send(request).await;
            assert_eq!(reply.status, *status, "{}", reply.text());
            reply.code();
        } else {
            let which = n as usize % CACHED.len();
            let (path, connector, body, begins) = CACHED[which];
            let reply = line.send(&ask(addr, path, body)).await;
            assert_eq!(known[&which], token(&reply, connector, begins), "another token than before");
            assert!(reply.cache_status().starts_with("connect-sidecar; hit"), "{}", reply.cache_status());
        }
        count += 1;
    }
    count.into()
}

/// Asks for what must go upstream, one after the other, until the end. Returns how often it did.
async fn newcomer(addr: SocketAddr, emulator: &Emulator, end: Instant) -> u64 {
    let mut line = KeptAlive::to(addr).await;
    let mut ticks = interval(Duration::from_secs(1) / UPSTREAM_REQUESTS_A_SECOND);
    let mut count = 0;
    while Instant::now() < end {
        ticks.tick().await;
        count += 1;
        let (path, connector, _, _) = CACHED[count % CACHED.len()];
        let body = format!(r#"{{"subject":{{"type":"app"}},"scopes":["s{count}"]}}"#);
        let (path, expected) = match count % 20 {
            0 => {
                let (fault, status) = match count / 20 % 5 {
                    0 => (Fault::status(500, "internal_server_error"), 500),
                    1 => (Fault::once(FaultKind::Reset), 502),
                    2 => (Fault::once(FaultKind::Truncate), 502),
                    3 => (Fault::answer(200, "text/html", "<html>"), 502),
                    _ => (Fault::rate_limited(Some("1")), 429),
                };
                emulator.inject(fault);
                (path, status)
            }
            n if n.is_multiple_of(3) => TYPED_ERRORS[count % TYPED_ERRORS.len()],
            _ => (path, 200),
        };
        let reply = line.send(&ask(addr, path, &body)).await;
        assert_eq!(reply.status, expected, "{path} {count}: {}", reply.text());
        assert!(reply.cache_status().starts_with("connect-sidecar; fwd=") || expected == 502, "{:?}", reply.headers);
        if expected == 200 {
            token(&reply, connector, "");
        }
    }
    count as u64
}

/// What the process takes: KiB of memory, threads, and descriptors, where we may see those.
#[derive(Debug, Clone, Copy)]
struct Taken {
    memory: u64,
    threads: u64,
    descriptors: Option<usize>,
}

fn taken(pid: u32) -> Taken {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    // The process is closed to others: only root sees these.
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count);
    Taken { memory: number("VmRSS:"), threads: number("Threads:"), descriptors }
}

fn spread<T: Ord + Copy + std::ops::Sub<Output = T>>(values: impl Iterator<Item = T> + Clone) -> Option<T> {
    Some(values.clone().max()? - values.min()?)
}

fn median(values: &[Taken]) -> u64 {
    let mut memory: Vec<u64> = values.iter().map(|taken| taken.memory).collect();
    memory.sort_unstable();
    memory[memory.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes as long as SOAK_SECONDS says, ten minutes unless it says something"]
#[expect(clippy::print_stdout, reason = "figures are what it is run for")]
async fn every_answer_is_the_right_one_and_nothing_grows() {
    let seconds: u64 = std::env::var("SOAK_SECONDS").map_or(600, |text| text.parse().expect("a number of seconds"));
    let home = tempfile::tempdir().expect("a directory");
    let emulator = Emulator::start(Options::default()).await.expect("an emulator");
    let env_path = home.path().join(".env.local");
    write_private(&env_path, &env_file(&emulator.oidc_token(DEVELOPMENT_LIFE)));
    // Small enough to be full soon: what grows after that grows for ever.
    let config = home.path().join("soak.toml");
    write_private(&config, "[cache]\nmax_entries = 64\n");
    let mut command = sidecar(home.path());
    command.args(["--port", "0", "--upstream", &emulator.url()]).arg("--config").arg(&config);
    let mut serving = Serving::start(command).await;
    let (addr, pid, mut log) = (serving.addr, serving.pid(), serving.take_stderr());
    let reading = tokio::spawn(async move {
        let (mut total, mut piece) = (0, vec![0; 64 * 1024]);
        while let Ok(read @ 1..) = log.read(&mut piece).await {
            total += read;
        }
        total
    });

    let mut line = KeptAlive::to(addr).await;
    let mut known = BTreeMap::new();
    for (which, (path, connector, body, begins)) in CACHED.into_iter().enumerate() {
        let reply = line.send(&ask(addr, path, body)).await;
        known.insert(which, token(&reply, connector, begins));
    }
    drop(line);

    let (begun, time) = (Instant::now(), Duration::from_secs(seconds));
    let end = begun + time;
    let mut apps = JoinSet::new();
    for number in 0..APPS {
        apps.spawn(app(number, addr, known.clone(), end));
    }
    let watching = async {
        let (mut ticks, mut samples, mut rotations) = (interval(Duration::from_secs(1)), Vec::new(), 0_u32);
        while begun.elapsed() + Duration::from_secs(1) < time {
            ticks.tick().await;
            // As `vercel env pull` does it: truncate, then write.
            fs::write(&env_path, env_file(&emulator.oidc_token(DEVELOPMENT_LIFE))).expect("written");
            rotations += 1;
            samples.push(taken(pid));
        }
        (samples, rotations)
    };
    let (went_upstream, (samples, rotations)) = tokio::join!(newcomer(addr, &emulator, end), watching);
    let asked: u64 = apps.join_all().await.into_iter().sum();

    let warm = &samples[samples.len() / 3..];
    let (early, late) = (median(&warm[..warm.len() / 2]), median(&warm[warm.len() / 2..]));
    let most = samples.iter().map(|taken| taken.memory).max().unwrap_or_default();
    let threads = spread(warm.iter().map(|taken| taken.threads));
    let descriptors = spread(warm.iter().filter_map(|taken| taken.descriptors));
    let last = samples.last().expect("a sample");
    println!(
        "{asked} requests of apps ({:.0} a second) and {went_upstream} upstream in {seconds} s, {rotations} rotations; \
         memory {early} KiB, then {late} KiB, {most} KiB at most; {} threads, spread {threads:?}; \
         {:?} descriptors, spread {descriptors:?}",
        asked as f64 / begun.elapsed().as_secs_f64(),
        last.threads,
        last.descriptors,
    );
    serving.signal(Signal::SIGTERM);
    let status = soon("its end", serving.child.wait()).await.expect("a status");
    assert_eq!(status.code(), Some(0));
    println!("{} bytes of log", reading.await.expect("no panic"));

    assert!(most < MOST_MEMORY, "{most} KiB");
    assert!(late <= early + early / 50, "it grows: {early} KiB, then {late} KiB");
    // The runtime lends a thread for each read of the env file and takes it back when it is idle; a connection that an
    // app has just left may not have ended yet.
    assert!(threads <= Some(1), "{samples:?}");
    assert!(descriptors <= Some(4), "{samples:?}");
}
