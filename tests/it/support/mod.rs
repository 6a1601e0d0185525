//! What the tests share: a project with an env file, an emulator, a sidecar, a clock that stands still, a log to read.

#[cfg(all(target_os = "linux", feature = "desktop"))]
pub mod desktop;
pub mod forwarder;
pub mod gateway;
pub mod http;
pub mod installed;
pub mod logs;
pub mod moved_clock;
pub mod network;
pub mod npm;
pub mod process;
pub mod proxy;
pub mod python;
pub mod scripted;
pub mod terminal;
pub mod tls;
pub mod tunnel;
pub mod workspace;

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connect_sidecar::config::Config;
use connect_sidecar::config::args::GlobalArgs;
use connect_sidecar::credential::{Identity, ReloadHandle};
use connect_sidecar::daemon::app::App;
use connect_sidecar::daemon::server::Server;
use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::world::World;
use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::os::clock::{Clock, Timestamp};
use connect_sidecar::proxy::resolver::Names;
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use http::{Reply, Request, Sent};
use logs::Logs;

/// Shows that the calling test, or a part of it, is skipped: the harness would call it passed. Written to stderr directly,
/// since the harness captures only what is printed by macros.
pub fn skipped(reason: impl std::fmt::Display) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED {test}: {reason}\n"));
}

/// The connector of most tests, as a path segment and as a uid.
pub const SLACK: &str = "/v1/connect/token/slack%2Facme-slack";
pub const SLACK_UID: &str = "slack/acme-slack";

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Bounds a wait.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Lets time pass for the timers of this thread, and for nothing else: no clock says so, and no data is waited for.
pub async fn let_timers_pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// Lets as much time pass as makes up for what went upstream: 40 requests may go out at once again.
pub async fn let_upstream_recover() {
    let_timers_pass(Duration::from_secs(2)).await;
}

/// A body of its own, so that no other request's answer fits.
pub fn body(name: &str) -> String {
    serde_json::json!({"scopes": [name]}).to_string()
}

/// Whether it is done once everybody has had their turns.
pub async fn is_over<T>(task: &JoinHandle<T>, stage: &Stage) -> bool {
    for _ in 0..5 {
        stage.caught_up().await;
    }
    task.is_finished()
}

/// How to set the scene. Reads as a sentence: `Scene::new().toml("…").start().await`.
#[must_use]
pub struct Scene {
    toml: String,
    env: HashMap<String, String>,
    token: Option<Option<Duration>>,
    env_file: Option<String>,
    world: World,
    tls: bool,
    names_upstream: bool,
    names: Option<Addresses>,
}

/// The addresses that every name has, of the emulator's.
type Addresses = Box<dyn FnOnce(SocketAddr) -> Vec<SocketAddr>>;

impl Scene {
    pub fn new() -> Self {
        Self {
            toml: String::new(),
            env: HashMap::new(),
            token: Some(Some(DEVELOPMENT_LIFE)),
            env_file: None,
            world: World::demo(),
            tls: false,
            names_upstream: true,
            names: None,
        }
    }

    /// Adds settings to the file given by `--config`.
    pub fn toml(mut self, toml: &str) -> Self {
        self.toml.push_str(toml);
        self.toml.push('\n');
        self
    }

    /// Sets a variable of the sidecar's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// The token in the env file lives this long.
    pub fn token_life(mut self, life: Duration) -> Self {
        self.token = Some(Some(life));
        self
    }

    /// There is no env file.
    pub fn without_env_file(mut self) -> Self {
        self.token = None;
        self
    }

    /// The env file holds exactly this; `{token}` stands for a good token.
    pub fn env_file(mut self, content: &str) -> Self {
        self.env_file = Some(content.into());
        self
    }

    /// Changes who and what there is upstream.
    pub fn world(mut self, change: impl FnOnce(&mut World)) -> Self {
        change(&mut self.world);
        self
    }

    /// Upstream speaks TLS.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Upstream is somebody else than the emulator, whose tokens are still those in the env file.
    pub fn upstream(self, url: &str) -> Self {
        self.env("CONNECT_SIDECAR_UPSTREAM", url)
    }

    /// No upstream is named: it is Connect itself.
    pub fn default_upstream(mut self) -> Self {
        self.names_upstream = false;
        self
    }

    /// Every name has these addresses; the closure is given the emulator's.
    pub fn resolving(mut self, addresses: impl FnOnce(SocketAddr) -> Vec<SocketAddr> + 'static) -> Self {
        self.names = Some(Box::new(addresses));
        self
    }

    pub async fn start(self) -> Stage {
        let dir = tempfile::tempdir().expect("a directory");
        let project = dir.path().join("web");
        fs::create_dir(&project).expect("a project");
        // A moment that is not now, so that nothing can lean on the machine's clock.
        let clock = Clock::test(Timestamp::from_millis(1_900_000_000_000));
        let emulator_clock = Clock::test(clock.local());
        let now = emulator_clock.clone();
        let options = Options {
            world: self.world,
            tls: self.tls,
            now: Arc::new(move || system_time(now.now())),
            // So that one can tell a token that was fetched from one that was kept.
            reuse_tokens: false,
            ..Options::default()
        };
        let emulator = Emulator::start(options).await.expect("an emulator");
        if let Some(Some(life)) = self.token {
            let token = emulator.oidc_token(life);
            let content = match &self.env_file {
                Some(content) => content.replace("{token}", &token),
                None => env_file(&token),
            };
            write_private(&project.join(".env.local"), &content);
        }
        let mut toml = format!("port = 0\n{}", self.toml);
        if self.names_upstream {
            toml = format!("upstream = \"{}\"\n{toml}", emulator.url());
        }
        if let Some(pem) = emulator.ca_pem() {
            fs::write(dir.path().join("ca.pem"), pem).expect("a file");
            toml = format!("upstream_ca = \"{}\"\n{toml}", dir.path().join("ca.pem").display());
        }
        write_private(&dir.path().join("config.toml"), &toml);

        let logs = Logs::capture();
        let args = GlobalArgs {
            config: Some(dir.path().join("config.toml")),
            project: Some(project.clone()),
            ..GlobalArgs::default()
        };
        let mut env = self.env;
        env.insert("XDG_STATE_HOME".into(), dir.path().join("state").display().to_string());
        env.insert("XDG_CONFIG_HOME".into(), dir.path().join("no-config").display().to_string());
        let mut config = Config::load(&args, &|name| env.get(name).map(Into::into), dir.path())
            .unwrap_or_else(|e| panic!("the scene's configuration is wrong:\n{e}"));
        if let Some(addresses) = self.names {
            config.upstream.names = Names::fixed(&addresses(emulator.addr()));
        }
        let app = App::bind(config, clock.clone()).await.unwrap_or_else(|e| panic!("{e}"));
        let (addr, identity, reloader) = (app.addr(), app.identity(), app.reloader());
        let server = app.server().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(app.serve(async move {
            let _ = stopped.await;
        }));
        let stop = Some(stop);
        Stage { emulator, emulator_clock, clock, logs, project, addr, identity, reloader, server, stop, ended, dir }
    }
}

/// A running sidecar and all around it.
pub struct Stage {
    pub emulator: Emulator,
    /// Upstream's clock.
    pub emulator_clock: Clock,
    /// The sidecar's clock.
    pub clock: Clock,
    pub logs: Logs,
    pub project: PathBuf,
    pub addr: SocketAddr,
    pub identity: watch::Receiver<Arc<Identity>>,
    pub reloader: ReloadHandle,
    /// What answers the sidecar's requests.
    pub server: Arc<Server>,
    /// The sidecar serves for as long as this lives.
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<bool>,
    dir: TempDir,
}

impl Stage {
    /// A request to the sidecar.
    pub fn request(&self, method: &str, target: &str) -> Request {
        Request::new(self.addr, method, target)
    }

    /// A token request with this body.
    pub fn token(&self, body: &str) -> Request {
        self.request("POST", SLACK).json(body)
    }

    /// The token that a plain request gets.
    pub async fn slack_token(&self) -> String {
        self.token(r#"{"subject":{"type":"app"}}"#).send().await.token()
    }

    /// Sends a request and returns once it has reached upstream.
    pub async fn under_way(&self, request: Request) -> Sent {
        let before = self.emulator.received().len();
        let sent = request.begin().await;
        soon("upstream to be asked", self.emulator.wait_for_requests(before + 1)).await;
        sent
    }

    /// Returns once all that was sent before has been read: connections are accepted, and read, in their order.
    pub async fn caught_up(&self) {
        assert_eq!(self.request("GET", "/healthz").send().await.status, 200);
    }

    /// The state as JSON.
    pub async fn status(&self) -> serde_json::Value {
        self.request("GET", "/_sidecar/v1/status").send().await.json()
    }

    pub fn env_path(&self) -> PathBuf {
        self.project.join(".env.local")
    }

    /// Where test files may go.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The instance's key.
    pub fn key(&self) -> String {
        instance_key(&self.dir.path().join("state"), self.addr)
    }

    /// Ends the sidecar.
    pub async fn stop(&mut self) {
        self.stop = None;
        soon("the sidecar's end", &mut self.ended).await.expect("no panic");
    }

    /// Moves both clocks.
    pub fn pass(&self, time: Duration) {
        self.emulator_clock.advance(time);
        self.clock.advance(time);
    }

    /// A token for the demo's project that lives this long from now.
    pub fn fresh_token(&self, life: Duration) -> String {
        self.emulator.oidc_token(life)
    }

    /// A token of the demo's project, changed.
    pub fn token_of(&self, change: impl FnOnce(&mut Subject)) -> String {
        let mut subject = Subject::development(&World::demo());
        change(&mut subject);
        self.emulator.oidc_token_for(&subject, DEVELOPMENT_LIFE)
    }

    /// Writes the env file as `vercel env pull` does: truncate, then write.
    pub fn write_env(&self, token: &str) {
        fs::write(self.env_path(), env_file(token)).expect("written");
    }

    /// Returns once the sidecar uses another identity than at the call of `change`.
    pub async fn after_identity_change(&mut self, change: impl FnOnce(&Self)) {
        self.identity.mark_unchanged();
        change(self);
        soon("another identity", self.identity.changed()).await.expect("the sidecar runs");
    }

    /// Returns once the sidecar uses a token with this fingerprint.
    pub async fn uses(&mut self, token: &str) {
        let fingerprint = fingerprint(token);
        let mut identity = self.identity.clone();
        let found = identity.wait_for(|identity| identity.oidc().is_some_and(|t| t.fingerprint() == fingerprint));
        soon("the token to be used", found).await.expect("the sidecar runs");
    }

    /// Sends one request many times at once.
    pub async fn at_once(&self, count: usize, request: Request) -> Vec<Reply> {
        let tasks: Vec<_> = (0..count).map(|_| tokio::spawn(request.clone().send())).collect();
        let mut replies = Vec::with_capacity(count);
        for task in tasks {
            replies.push(soon("a reply", task).await.expect("no panic"));
        }
        replies
    }
}

/// The key of the instance at an address, whose state is kept below `state`.
pub fn instance_key(state: &Path, addr: SocketAddr) -> String {
    let file = state.join(format!("connect-sidecar/{}.json", addr.port()));
    let instance: serde_json::Value = serde_json::from_slice(&fs::read(file).expect("a state file")).expect("JSON");
    instance["key"].as_str().expect("a key").to_owned()
}

/// The first 8 hex digits of SHA-256, as status shows them.
pub fn fingerprint(token: &str) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    hash.as_ref()[..4].iter().map(|b| format!("{b:02x}")).collect()
}

/// An env file as the CLI writes it.
pub fn env_file(token: &str) -> String {
    format!("# Created by Vercel CLI\nDATABASE_URL=\"postgres://u:p@h/db\"\nVERCEL_OIDC_TOKEN=\"{token}\"\n")
}

/// Writes a file that only we can read.
pub fn write_private(path: &Path, content: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).expect("a file");
    file.write_all(content.as_bytes()).expect("written");
}

fn system_time(t: Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(t.as_millis())
}
