//! The terms of the policy tests: a sidecar to start and a mock upstream, M, with assertions that a request is
//! forwarded (`pass`) or refused (`deny`).
//!
//! Specified durations are waited for with [`stated`] only. Specified limits assume an idle machine, so [`within`]
//! allows a multiple of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use connect_sidecar::os::clock::Clock;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;

use crate::support::http::{Reply, Request};
use crate::support::process::{Ended, Serving, assert_no_slice_of, isolated, run as run_to_end, sidecar};
use crate::support::scripted::{Received, Scripted, answer};
use crate::support::{SLACK, env_file, soon, write_private};

/// How much longer than specified something may take while all other tests run.
const BUSY_MACHINE_FACTOR: u32 = 5;

/// Waits for a specified duration.
pub async fn stated(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Waits until a specified duration has passed since then.
pub async fn stated_since(begun: Instant, time: Duration) {
    stated(time.saturating_sub(begun.elapsed())).await;
}

/// Polls until a condition holds.
pub async fn until(mut holds: impl AsyncFnMut() -> bool) {
    while !holds().await {
        stated(ms(10)).await;
    }
}

/// Does something `count` times at this rate.
pub async fn at_a_rate_of(per_second: u32, count: usize, mut act: impl AsyncFnMut(usize)) {
    let mut turns = tokio::time::interval(Duration::from_secs(1) / per_second);
    // Catching up after a pause would exceed the rate.
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for n in 0..count {
        turns.tick().await;
        act(n).await;
    }
}

/// Waits for a result within a specified limit.
pub async fn within<T>(time: Duration, what: &str, future: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let output = soon(what, future).await;
    assert!(begun.elapsed() < time * BUSY_MACHINE_FACTOR, "{what} took {:?}", begun.elapsed());
    output
}

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub fn now_ms() -> u64 {
    Clock::system().local().as_millis()
}

fn random(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).expect("random bytes");
    random.iter().map(|b| format!("{b:02x}")).collect()
}

/// An OIDC token with changed claims.
pub fn jwt(change: impl FnOnce(&mut Value)) -> String {
    let now = now_ms() / 1000;
    let mut claims = json!({
        "iss": "https://oidc.vercel.com/acme",
        "aud": "https://vercel.com/acme",
        "sub": "owner:acme:project:web:environment:development",
        "owner": "acme",
        "owner_id": "team_1",
        "project": "web",
        "project_id": "prj_1",
        "environment": "development",
        "iat": now,
        "exp": now + 12 * 3600,
    });
    change(&mut claims);
    let [header, payload] = [json!({"alg": "RS256"}), claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    format!("{header}.{payload}.CANARYOIDC{}", random(20))
}

/// Another token of the same principal.
pub fn fresh_jwt() -> String {
    jwt(|_| {})
}

/// A JSON response.
pub fn json_answer(status: u16, lines: &str, body: &str) -> String {
    answer(status, &format!("Content-Type: application/json\r\n{lines}"), body)
}

/// A response with the valid token number `n`.
pub fn token_answer(n: usize) -> String {
    token_answer_until(n, &(now_ms() + 3_600_000).to_string())
}

/// A response with token number `n` and this `expiresAt`.
pub fn token_answer_until(n: usize, expires_at: &str) -> String {
    let connector = r#"{"id":"c1","uid":"slack/acme-slack","type":"slack"}"#;
    let token = format!("CANARYPROV-{n}-{}", random(8));
    json_answer(200, "", &format!(r#"{{"token":"{token}","expiresAt":{expires_at},"connector":{connector}}}"#))
}

/// A mock upstream that answers every request with a valid token.
pub async fn mock() -> Scripted {
    let m = Scripted::start().await;
    m.otherwise(|_, n| token_answer(n).into());
    m
}

pub async fn has_ipv6() -> bool {
    tokio::net::TcpListener::bind("[::1]:0").await.is_ok()
}

/// A port that is reserved while the socket lives. The socket is bound but does not listen, so the sidecar can use the
/// port.
pub fn reserve_port() -> (TcpSocket, u16) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let port = socket.local_addr().expect("an address").port();
    (socket, port)
}

/// A sidecar to be started: its project with the OIDC token J0 in the env file, the mock upstream M, and the command.
pub struct Start {
    pub home: TempDir,
    pub project: PathBuf,
    pub m: Scripted,
    pub j0: String,
    pub command: Command,
}

impl Start {
    pub async fn new() -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let project = home.path().canonicalize().expect("a directory").join("web");
        std::fs::create_dir(&project).expect("a project");
        let (m, j0) = (mock().await, fresh_jwt());
        write_private(&project.join(".env.local"), &env_file(&j0));
        let mut command = sidecar(home.path());
        command.current_dir(&project).env("CONNECT_SIDECAR_PORT", "0").env("CONNECT_SIDECAR_UPSTREAM", m.url());
        Self { home, project, m, j0, command }
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.command.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the content of the env file, with `{J0}` for the token.
    pub fn env_file(self, content: impl AsRef<[u8]>) -> Self {
        let content = match std::str::from_utf8(content.as_ref()) {
            Ok(text) => text.replace("{J0}", &self.j0).into_bytes(),
            Err(_) => content.as_ref().to_owned(),
        };
        std::fs::write(self.project.join(".env.local"), content).expect("written");
        self
    }

    /// Pretends that M has accepted a token of this project before, which automatic refreshes require.
    pub fn accepted(self) -> Self {
        use std::os::unix::fs::DirBuilderExt;
        let state = self.home.path().join(".local/state/connect-sidecar");
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&state);
        made.expect("a state directory");
        let accepted = json!({"by": self.m.url(), "owner_id": "team_1", "project_id": "prj_1"});
        write_private(&state.join("refreshable.json"), &json!({"accepted": [accepted]}).to_string());
        self
    }

    /// Removes the env file.
    pub fn without_env_file(self) -> Self {
        std::fs::remove_file(self.project.join(".env.local")).expect("removed");
        self
    }

    /// Sets the project's `sidecar.toml`.
    pub fn toml(self, content: &str) -> Self {
        std::fs::write(self.project.join("sidecar.toml"), content).expect("written");
        self
    }

    /// Runs the sidecar through another command, which gets the path and the arguments after its own.
    pub fn through(mut self, program: &str, args: &[&str]) -> Self {
        let mut outer = isolated(program, self.home.path());
        let inner = self.command.as_std();
        outer.args(args).arg(inner.get_program()).args(inner.get_args()).current_dir(&self.project);
        outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.command = outer;
        self
    }

    pub async fn serve(self) -> Sidecar {
        let Self { home, project, m, j0, command } = self;
        let serving = Serving::start(command).await;
        let sidecar = Sidecar { addr: serving.addr, serving, m, project, j0, home, cases: AtomicUsize::new(0) };
        sidecar.healthy().await;
        sidecar
    }

    /// Runs the command until it exits.
    pub async fn end(self) -> Ended {
        run_to_end(self.command).await
    }
}

/// Starts a sidecar with default settings.
pub async fn start() -> Sidecar {
    Start::new().await.serve().await
}

/// A running sidecar with its mock upstream.
pub struct Sidecar {
    pub serving: Serving,
    pub addr: SocketAddr,
    pub m: Scripted,
    pub project: PathBuf,
    /// The OIDC token in the env file at the start.
    pub j0: String,
    pub home: TempDir,
    cases: AtomicUsize,
}

impl Sidecar {
    pub fn pid(&self) -> u32 {
        self.serving.pid()
    }

    /// Replaces `{P}` and `{M}` with the ports of the sidecar and of M.
    pub fn fill(&self, text: &str) -> String {
        text.replace("{P}", &self.addr.port().to_string()).replace("{M}", &self.m.addr().port().to_string())
    }

    /// A valid token request with a new cache key.
    pub fn req(&self) -> Request {
        let case = self.cases.fetch_add(1, Ordering::Relaxed);
        self.ask(&format!(r#"{{"subject":{{"type":"app"}},"scopes":["{case}"]}}"#))
    }

    /// A valid token request with this body.
    pub fn ask(&self, body: &str) -> Request {
        Request::new(self.addr, "POST", SLACK).json(body)
    }

    pub fn get(&self, path: &str) -> Request {
        Request::new(self.addr, "GET", path)
    }

    /// Sends a request and asserts that it is forwarded once and its response returned.
    pub async fn pass(&self, request: Request) -> Reply {
        let before = self.m.count();
        let shown = String::from_utf8_lossy(&request.bytes()).into_owned();
        let reply = request.send().await;
        let received = self.m.received();
        assert_eq!((reply.status, received.len()), (200, before + 1), "{shown}{}", reply.text());
        let (head, body) = shown.split_once("\r\n\r\n").expect("a request");
        self.assert_passed_on(&received[before], head.lines().next().expect("a line"), body, &reply);
        reply
    }

    /// Asserts that M received this request with the credential and the client received M's response.
    #[track_caller]
    pub fn assert_passed_on(&self, seen: &Received, line: &str, body: &str, reply: &Reply) {
        assert_eq!(seen.line(), line.replace("HTTP/1.0", "HTTP/1.1"));
        assert_eq!(seen.values("host"), [self.m.addr().to_string()]);
        assert_eq!(seen.values("authorization"), [format!("Bearer {}", self.j0)]);
        assert_eq!(seen.values("content-length"), [body.len().to_string()]);
        assert!(seen.values("transfer-encoding").is_empty(), "{}", seen.head);
        assert_eq!(seen.body, body);
        assert_eq!(reply.body, seen.answer);
        assert_eq!(reply.header("sidecar-error"), None);
    }

    /// Sends a request and asserts that it is refused without an upstream request.
    pub async fn deny(&self, request: Request, status: u16, code: &str) -> Reply {
        let (before, shown) = (self.m.count(), String::from_utf8_lossy(&request.bytes()).into_owned());
        let reply = request.send().await;
        reply.assert_refused(status, code, &shown);
        assert_eq!(self.m.count(), before, "{shown}");
        reply
    }

    /// Sends a request and asserts that it is sent upstream once and fails.
    pub async fn fails(&self, request: Request, status: u16, code: &str) -> Reply {
        let (before, shown) = (self.m.count(), String::from_utf8_lossy(&request.bytes()).into_owned());
        let reply = request.begin().await.reply_at_last().await;
        reply.assert_refused(status, code, &shown);
        assert_eq!(self.m.count(), before + 1, "sent once: {shown}");
        reply
    }

    pub async fn healthy(&self) {
        let health = within(ms(500), "/healthz", self.get("/healthz").send()).await;
        assert_eq!((health.status, health.text().as_str()), (200, r#"{"status":"ok"}"#));
    }

    /// Asserts that the sidecar is healthy and forwards requests.
    pub async fn alive(&self) {
        self.healthy().await;
        self.pass(self.req()).await;
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.expect("a connection")
    }

    pub fn env_path(&self) -> PathBuf {
        self.project.join(".env.local")
    }

    /// Writes the env file like the Vercel CLI.
    pub fn write_env(&self, token: &str) {
        std::fs::write(self.env_path(), env_file(token)).expect("written");
    }

    /// Asserts that this OIDC token is sent upstream.
    pub async fn assert_uses(&self, token: &str) {
        let before = self.m.count();
        let reply = self.req().send().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(self.m.received()[before].values("authorization"), [format!("Bearer {token}")]);
    }

    /// The instance file: its path and content.
    pub fn instance(&self) -> (PathBuf, Value) {
        let path = self.home.path().join(format!(".local/state/connect-sidecar/{}.json", self.addr.port()));
        let instance = serde_json::from_slice(&std::fs::read(&path).expect("a state file")).expect("JSON");
        (path, instance)
    }

    pub fn key(&self) -> String {
        self.instance().1["key"].as_str().expect("a key").to_owned()
    }

    pub async fn status(&self) -> Value {
        self.get("/_sidecar/v1/status").send().await.json()
    }

    /// Stops the sidecar and asserts that none of its secrets is in its output or its pages: M's tokens, J0, the key
    /// and `others`. Returns what was shown.
    pub async fn leaks_nothing(self, others: &[&str]) -> String {
        let mut secrets: Vec<_> = others.iter().map(|secret| (*secret).to_owned()).collect();
        let tokens = self.m.received().into_iter().filter_map(|received| {
            serde_json::from_slice::<Value>(&received.answer).ok()?["token"].as_str().map(str::to_owned)
        });
        secrets.extend(tokens);
        secrets.extend([self.j0.clone(), self.key()]);
        let mut shown = String::new();
        for path in ["/_sidecar/v1/status", "/metrics", "/readyz", "/_sidecar/"] {
            shown.push_str(&self.get(path).send().await.text());
        }
        let ended = self.serving.stop().await;
        shown.push_str(&ended.stdout);
        shown.push_str(&ended.stderr);
        // All tokens have the same header.
        let parts = secrets.iter().flat_map(|secret| secret.split('.').filter(|part| !part.starts_with("eyJhbGci")));
        assert_no_slice_of(parts, &shown);
        shown
    }
}
