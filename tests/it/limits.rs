//! Limits per client and their effect on other clients (docs/security.md L), and the check of the client's user (S4).

use std::time::{Duration, Instant};

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::command::{ask, get};
use crate::support::http::{Reply, closed, is_answered, kept_alive, raw};
use crate::support::process::{Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, Scene, Stage, let_timers_pass, soon};

const APP: &str = r#"{"subject":{"type":"app"}}"#;

/// The connection limit of a process with 80 descriptors, of which 64 are reserved.
const CONNECTION_LIMIT: usize = 16;

impl Workspace {
    /// A sidecar with a limit of [`CONNECTION_LIMIT`] connections.
    async fn serve_limited(&self) -> Serving {
        let command = self.sidecar(&[]);
        let command = command.as_std();
        let mut limited = Command::new("sh");
        limited
            .args(["-c", r#"ulimit -n 80 && exec "$0" "$@""#])
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear()
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .current_dir(command.get_current_dir().expect("a directory"))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true);
        Serving::start(limited).await
    }
}

impl Stage {
    /// The number of connections, apart from the one that reads the metrics.
    async fn connections(&self) -> usize {
        let metrics = self.request("GET", "/metrics").send().await.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("connect_sidecar_connections "));
        line.and_then(|count| count.parse::<usize>().ok()).expect("a number") - 1
    }

    /// Waits until all connections are closed.
    async fn all_closed(&self) {
        let waiting = async {
            while self.connections().await > 0 {
                tokio::task::yield_now().await;
            }
        };
        soon("all connections to end", waiting).await;
    }

    /// Advances the clock until there are `count` connections. The exact times are tested in `server::connections`;
    /// here they also depend on how fast the kernel reports what has arrived.
    async fn advance_until_connections(&self, count: usize) {
        let passing = async {
            while self.connections().await != count {
                let_timers_pass(Duration::from_secs(1)).await;
                self.settled().await;
            }
        };
        soon("the others to be closed", passing).await;
    }

    /// Waits until all tasks have run several times.
    async fn settled(&self) {
        for _ in 0..5 {
            self.caught_up().await;
        }
    }
}

/// The bytes of a token request that leaves its connection open.
fn token_request(stage: &Stage, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {SLACK} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}",
        stage.addr
    )
}

#[tokio::test]
async fn a_connection_over_the_limit_closes_the_longest_idle_one() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve_limited().await;
    let mut idle = Vec::new();
    for _ in 0..CONNECTION_LIMIT {
        idle.push(kept_alive(serving.addr).await);
    }
    let mut used = idle.remove(0);
    assert!(is_answered(&mut used, serving.addr).await);
    let newcomer = kept_alive(serving.addr).await;
    closed(idle.remove(0)).await;
    for stream in idle.iter_mut().chain([&mut used]) {
        assert!(is_answered(stream, serving.addr).await, "the others stay");
    }
    // The same for connections that never sent a request.
    let mut silent = Vec::new();
    for _ in 0..3 * CONNECTION_LIMIT {
        silent.push(TcpStream::connect(serving.addr).await.expect("a connection"));
    }
    assert_eq!(ask(&serving, APP).send().await.status, 200);
    closed(newcomer).await;
    closed(silent.remove(0)).await;
}

#[tokio::test]
async fn while_all_connections_are_busy_others_get_503_and_health_is_answered() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve_limited().await;
    let hold = workspace.emulator.hold_answers();
    let mut busy = Vec::new();
    for n in 0..CONNECTION_LIMIT {
        busy.push(ask(&serving, &format!(r#"{{"scopes":["{n}"]}}"#)).begin().await);
    }
    soon("all requests", workspace.emulator.wait_for_requests(CONNECTION_LIMIT)).await;
    for _ in 0..3 * CONNECTION_LIMIT {
        let reply = ask(&serving, APP).send().await;
        assert_eq!((reply.status, reply.code().as_str()), (503, "overloaded"));
        assert_eq!((reply.header("retry-after"), reply.header("connection")), (Some("1"), Some("close")));
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(&serving, path).send().await.status, 200, "{path}");
    }
    assert_eq!(get(&serving, "/metrics").send().await.code(), "overloaded");
    hold.release();
    for sent in busy {
        assert_eq!(sent.reply().await.status, 200);
    }
}

#[tokio::test]
async fn a_connection_closes_after_a_thousand_requests() {
    let stage = Scene::new().start().await;
    let request = format!("GET /healthz HTTP/1.1\r\nhost: {}\r\n\r\n", stage.addr);
    let replies = Reply::parse_all(&raw(stage.addr, request.repeat(1001).as_bytes()).await);
    assert_eq!(replies.len(), 1000);
    assert!(replies.iter().all(|reply| reply.status == 200));
    let closing: Vec<_> = replies.iter().map(|reply| reply.header("connection")).collect();
    assert_eq!(closing.iter().position(|value| *value == Some("close")), Some(999));
}

#[tokio::test]
async fn a_head_has_at_most_64_lines_and_a_target_of_2_kib() {
    let stage = Scene::new().start().await;
    // The test client adds four lines of its own.
    let lines = |count| (0..count - 4).fold(stage.token(APP), |request, n| request.header(&format!("x-{n}"), "1"));
    let target = |length: usize| stage.request("GET", &format!("/{}", "x".repeat(length - 1)));
    for (request, status, code) in [
        (lines(65), 431, "head_too_large"),
        (target(2049), 414, "target_too_long"),
        (target(2048), 404, "route_not_found"),
    ] {
        let reply = request.send().await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    }
    assert!(stage.emulator.received().is_empty());
    assert_eq!(lines(64).send().await.status, 200);
}

#[tokio::test]
async fn too_many_cookies_are_explained_when_the_page_is_opened() {
    let stage = Scene::new().start().await;
    let open = |cookies: usize| {
        let page = stage.request("GET", "/_sidecar/").header("cookie", &"session=abcdefg; ".repeat(cookies / 17));
        page.header("sec-fetch-site", "none").header("sec-fetch-dest", "document").header("sec-fetch-mode", "navigate")
    };
    assert_eq!(open(15 * 1024).send().await.status, 200, "within the limit");
    for kib in [17, 40, 120] {
        let reply = open(kib * 1024).send().await;
        assert_eq!((reply.status, reply.header("sidecar-error")), (431, Some("head_too_large")), "{kib}");
        assert_eq!(reply.header("content-type"), Some("text/plain; charset=utf-8"));
        let text = reply.text();
        assert!(text.contains("Clear the cookies of 127.0.0.1 in the browser"), "{text}");
        assert!(text.contains(&format!("http://localhost:{}", stage.addr.port())), "{text}");
        // Requests of the page's script get JSON instead.
        let request = stage.request("GET", "/_sidecar/v1/status").header("cookie", &"a=b; ".repeat(kib * 1024 / 5));
        let reply = request.header("sec-fetch-site", "same-origin").send().await;
        reply.assert_refused(431, "head_too_large", "the state");
        assert!(reply.text().contains("Clear the cookies"), "{}", reply.text());
    }
    let other = stage.request("GET", "/healthz").header("x-long", &"x".repeat(20 * 1024)).send().await;
    other.assert_refused(431, "head_too_large", "another header");
    assert!(!other.text().contains("cookie"), "{}", other.text());
}

#[tokio::test]
async fn clients_that_read_nothing_are_closed_though_all_could_be_written() {
    const COUNT: usize = 6;
    let stage = Scene::new().start().await;
    let end = stage.clock.local().plus(Duration::from_secs(3600)).as_millis();
    let body = format!(r#"{{"token":"{}","expiresAt":{end}}}"#, "x".repeat(60_000));
    stage.emulator.inject(Fault::answer(200, "application/json", &body));
    assert_eq!(stage.token(APP).send().await.status, 200);
    let request = token_request(&stage, APP);
    let mut stalled = Vec::new();
    for count in [50; COUNT].into_iter().chain([1, 3]) {
        let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
        stream.write_all(request.repeat(count).as_bytes()).await.expect("sent");
        stalled.push(stream);
    }
    let mut slow = TcpStream::connect(stage.addr).await.expect("a connection");
    slow.write_all(request.repeat(50).as_bytes()).await.expect("sent");
    stage.settled().await;
    assert_eq!(stage.connections().await, stalled.len() + 1);
    // A client that reads slowly stays connected.
    for second in 0..9 {
        let_timers_pass(Duration::from_secs(1)).await;
        if second % 3 == 0 {
            soon("some of it", slow.read_exact(&mut [0; 1000])).await.expect("read");
        }
        stage.settled().await;
    }
    assert_eq!(stage.connections().await, stalled.len() + 1, "9 s");
    let reading = async {
        loop {
            soon("some of it", slow.read_exact(&mut [0; 1000])).await.expect("read");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = stage.advance_until_connections(1) => {}
        () = reading => {}
    }
    for mut stream in stalled {
        // Only what was sent already arrives. The rest is not kept.
        let mut rest = Vec::new();
        let _ = soon("the end", stream.read_to_end(&mut rest)).await;
        assert!(rest.len() < 20 * body.len(), "{} bytes were kept", rest.len());
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_its_response_is_closed() {
    let stage = Scene::new().start().await;
    let body = format!(r#"{{"x":"{}"}}"#, "x".repeat(1_000_000));
    stage.emulator.inject(Fault::always(FaultKind::Answer {
        status: 200,
        content_type: "application/json",
        body,
        headers: Vec::new(),
    }));
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(65_536).expect("an option");
    let mut stream = socket.connect(stage.addr).await.expect("a connection");
    // More than all buffers can hold.
    let request = format!("GET /v1/connect/connectors/x HTTP/1.1\r\nhost: {}\r\n\r\n", stage.addr);
    stream.write_all(request.repeat(16).as_bytes()).await.expect("sent");
    stage.settled().await;
    let before = stage.emulator.received().len();
    assert!(before < 16, "it does not buffer all responses");
    let_timers_pass(Duration::from_secs(9)).await;
    stage.settled().await;
    assert_eq!(stage.connections().await, 1);
    // A client that reads slowly stays connected.
    let mut read = vec![0; 2_000_000];
    soon("some of it", stream.read_exact(&mut read)).await.expect("read");
    stage.settled().await;
    assert!(stage.emulator.received().len() > before);
    for _ in 0..9 {
        let_timers_pass(Duration::from_secs(1)).await;
        stage.settled().await;
    }
    assert_eq!(stage.connections().await, 1, "9 s");
    stage.advance_until_connections(0).await;
}

#[tokio::test]
async fn a_connection_without_a_whole_head_closes_after_20_s() {
    let stage = Scene::new().start().await;
    let silent = TcpStream::connect(stage.addr).await.expect("a connection");
    let mut dripping = TcpStream::connect(stage.addr).await.expect("a connection");
    let used = kept_alive(stage.addr).await;
    for byte in b"GET / HTTP/1.1\r\nho" {
        let_timers_pass(Duration::from_secs(1)).await;
        dripping.write_all(&[*byte]).await.expect("sent");
        stage.caught_up().await;
    }
    let_timers_pass(Duration::from_secs(1)).await;
    stage.settled().await;
    assert_eq!(stage.connections().await, 3, "19 s");
    let_timers_pass(Duration::from_secs(1)).await;
    for stream in [silent, dripping, used] {
        closed(stream).await;
    }
}

/// Each complete request to this listener, with its connection.
fn requests(listener: TcpListener) -> mpsc::Receiver<(String, TcpStream)> {
    let (seen, requests) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut read = Vec::new();
                while !read.ends_with(APP.as_bytes()) {
                    if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let _ = seen.send((String::from_utf8_lossy(&read).into_owned(), stream)).await;
            });
        }
    });
    requests
}

#[tokio::test]
async fn a_request_that_takes_60_s_in_total_gets_504() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let mut requests = requests(listener);
    let stage = Scene::new().upstream(&url).start().await;
    let mut client = TcpStream::connect(stage.addr).await.expect("a connection");
    let request = token_request(&stage, APP);
    let (beginning, rest) = request.split_at(request.len() - 5);

    client.write_all(beginning.as_bytes()).await.expect("sent");
    stage.settled().await;
    let_timers_pass(Duration::from_secs(9)).await;
    client.write_all(rest.as_bytes()).await.expect("sent");
    let (first, mut upstream) = soon("a request", requests.recv()).await.expect("a request");
    stage.write_env(&stage.fresh_token(Duration::from_secs(13 * 3600)));
    // Upstream rejects the credential slowly.
    let refusal = r#"{"error":{"code":"forbidden","message":"m","invalidToken":true}}"#;
    let head = format!(
        "HTTP/1.1 401 X\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        refusal.len()
    );
    let_timers_pass(Duration::from_secs(19)).await;
    upstream.write_all(head.as_bytes()).await.expect("sent");
    stage.settled().await;
    let_timers_pass(Duration::from_secs(9)).await;
    upstream.write_all(refusal.as_bytes()).await.expect("sent");
    let (second, mut upstream) = soon("another request", requests.recv()).await.expect("a request");
    assert_ne!(first, second, "it retries with the fresh token");
    let_timers_pass(Duration::from_secs(19)).await;
    upstream.write_all(head.as_bytes()).await.expect("sent");
    stage.settled().await;

    let reply = tokio::spawn(async move {
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).await.expect("a reply");
        Reply::parse(&reply)
    });
    let_timers_pass(Duration::from_secs(3)).await;
    stage.settled().await;
    assert!(!reply.is_finished(), "59 s");
    let_timers_pass(Duration::from_secs(1)).await;
    let reply = soon("the reply", reply).await.expect("no panic");
    assert_eq!((reply.status, reply.code().as_str()), (504, "upstream_timeout"));
    assert!(reply.text().contains("60 s"), "{}", reply.text());
    assert_eq!(reply.header("connection"), Some("close"));
}

#[tokio::test]
async fn a_few_refusals_are_logged_and_the_rest_are_counted() {
    const COUNT: usize = 40;
    let stage = Scene::new().start().await;
    for _ in 0..COUNT {
        assert_eq!(stage.request("GET", "/nowhere").send().await.status, 404);
    }
    let_timers_pass(Duration::from_secs(1)).await;
    stage.logs.wait_for("too many refusals to log").await;
    // On a slow machine they may take more than a second.
    let hidden: usize = stage
        .logs
        .lines()
        .iter()
        .filter_map(|line| line.split_once(" hidden=")?.1.split(' ').next()?.parse::<usize>().ok())
        .sum();
    let logged = stage.logs.count("code=\"route_not_found\"");
    assert!((5..COUNT / 2).contains(&logged), "{logged}");
    assert_eq!(logged + hidden, COUNT);
}

#[tokio::test]
async fn a_client_that_disconnects_is_noticed_at_once_and_its_token_is_cached() {
    let stage = Scene::new().start().await;
    let request = token_request(&stage, APP);
    let end_of_head = request.len() - APP.len();
    for (what, sent) in [("nothing", 0), ("half a head", 20), ("a head", end_of_head), ("half a body", end_of_head + 9)]
    {
        let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
        stream.write_all(&request.as_bytes()[..sent]).await.expect("sent");
        stage.settled().await;
        assert_eq!(stage.connections().await, 1, "{what}");
        drop(stream);
        stage.all_closed().await;
    }
    assert!(stage.emulator.received().is_empty());

    let hold = stage.emulator.hold_answers();
    let mut stream = TcpStream::connect(stage.addr).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("sent");
    soon("the request upstream", stage.emulator.wait_for_requests(1)).await;
    drop(stream);
    stage.all_closed().await;
    hold.release();
    assert_eq!(stage.token(APP).send().await.status, 200);
    assert_eq!(stage.emulator.received().len(), 1, "from the first request");
}

/// Sets the descriptor limit of a running process.
async fn limit_descriptors(of: &Serving, soft: &str) {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &of.pid().to_string(), &format!("--nofile={soft}:")]).kill_on_drop(true);
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "prlimit comes with util-linux: {ended:?}");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn without_descriptors_it_serves_open_connections_and_recovers() {
    const MESSAGE: &str = "could not accept a connection";
    let workspace = Workspace::new().await;
    let mut serving = workspace.serve(&[]).await;
    assert_eq!(ask(&serving, APP).send().await.status, 200);
    let mut old = kept_alive(serving.addr).await;
    limit_descriptors(&serving, "4").await;

    let waiting = get(&serving, "/healthz").begin().await;
    serving.wait_for_log(MESSAGE).await;
    let began = Instant::now();
    for _ in 0..3 {
        assert!(is_answered(&mut old, serving.addr).await);
        serving.wait_for_next_log(MESSAGE).await;
    }
    assert!(began.elapsed() >= Duration::from_millis(50 + 100 + 200 - 20), "the pauses grow");
    limit_descriptors(&serving, "1024").await;
    assert_eq!(waiting.reply().await.status, 200);
    assert_eq!(ask(&serving, APP).send().await.status, 200);
    assert!(is_answered(&mut old, serving.addr).await);
}

#[cfg(target_os = "linux")]
#[tokio::test]
#[allow(clippy::print_stderr, reason = "a test that cannot be run says so")]
async fn other_users_of_this_machine_are_refused() {
    if !nix::unistd::geteuid().is_root() {
        crate::support::skipped("only root can connect as another user");
        return;
    }
    const NOBODY: u32 = 65_534;
    let stage = Scene::new().start().await;
    let has_ipv6 = TcpListener::bind("[::1]:0").await.is_ok();
    for host in ["127.0.0.1", "[::1]"].into_iter().filter(|host| has_ipv6 || !host.contains(':')) {
        for path in [SLACK, "/healthz", "/readyz", "/metrics", "/_sidecar/v1/status", "/nowhere"] {
            let ask = async |uid: u32| {
                let mut curl = Command::new("curl");
                curl.args(["--silent", "--include", "--max-time", "20", "--header", "content-type: application/json"]);
                curl.args(if path == SLACK { &["--data", APP][..] } else { &[] });
                curl.arg(format!("http://{host}:{}{path}", stage.addr.port()));
                curl.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
                curl.uid(uid).gid(uid).kill_on_drop(true);
                Reply::parse(run(curl).await.stdout.as_bytes())
            };
            let reply = ask(NOBODY).await;
            assert_eq!((reply.status, reply.code().as_str()), (403, "peer_uid_mismatch"), "{host}{path}");
            assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
            let own = ask(0).await;
            assert_eq!(own.status, if path == "/nowhere" { 404 } else { 200 }, "{host}{path}");
        }
    }
    assert_eq!(stage.emulator.received().len(), 1, "only our own request went upstream");
}

/// Connects, sends a request and disconnects, a thousand times.
#[cfg(target_os = "linux")]
const HIT_AND_RUN: &str = r#"
import socket, struct, sys
port, path = int(sys.argv[1]), sys.argv[2]
for number in range(1000):
    body = b'{"scopes":["%d"]}' % number
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(head.encode() + body)
        if number % 2:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"#;

#[cfg(target_os = "linux")]
#[tokio::test]
#[allow(clippy::print_stderr, reason = "a test that cannot be run says so")]
async fn other_users_cannot_evade_the_check_by_disconnecting() {
    if !nix::unistd::geteuid().is_root() {
        crate::support::skipped("only root can connect as another user");
        return;
    }
    let stage = Scene::new().start().await;
    let mut python = Command::new("python3");
    python.args(["-c", HIT_AND_RUN, &stage.addr.port().to_string(), SLACK]).uid(65_534).gid(65_534);
    let ended = run(python).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    stage.settled().await;
    assert!(stage.emulator.received().is_empty(), "{} went upstream", stage.emulator.received().len());
    assert_eq!(stage.token(APP).send().await.status, 200);
}
