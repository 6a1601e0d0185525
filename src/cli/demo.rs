//! `demo`: a tour of the sidecar against the emulator, in a scratch project, without account or network.
//!
//! Every step sends real requests to a real sidecar, prints the command that repeats it, and checks what it claims by
//! the reply, the requests that the emulator received, or the sidecar's log. The tour goes to stderr, as the log does.
//! It does not touch the user's project or configuration.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::CommandError;
use super::flags::environment;
use super::output::print_ready;
use super::signals::{StopSignals, until_stopped};
use crate::config::args::GlobalArgs;
use crate::config::{self, Config, ConfigError, EnvLookup};
use crate::daemon::app::App;
use crate::emulator::world::DEVELOPMENT_LIFE;
use crate::emulator::{Emulator, Options};
use crate::os::clock::Clock;
use crate::os::logging;
use crate::os::terminal::{Color, Palette};

/// The connector that works, as a path segment.
const SLACK: &str = "slack%2Facme-slack";
/// A connector that is not linked to the demo's project.
const UNLINKED: &str = "salesforce%2Fcrm";
/// The flags that the demo uses, besides the port.
const USED_FLAGS: [&str; 6] =
    ["--allowed-host", "--allowed-origin", "--allow-forwarded", "--unix-socket", "--log-format", "--log-level"];
/// The lifetime of the token that is about to expire. Shorter than the shortest default of `warn_before`.
const SHORT_LIFE: Duration = Duration::from_secs(4 * 60);
/// How long ago the tour's tokens were issued. Each is newer than the one before by whole seconds, the resolution of
/// `iat`, and tokens that the user requests are newer than all of them.
const ISSUED_AGO: [Duration; 3] = [Duration::from_secs(60), Duration::from_secs(40), Duration::from_secs(20)];
/// The number of concurrent requests in the step about single flight.
const HERD: usize = 20;
/// The time limit of each part of the tour.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// Why the demo could not start.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// An unused or invalid flag. Exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The scratch project or the emulator could not be set up.
    #[error("could not {0}: {1}")]
    Setup(&'static str, #[source] io::Error),
}

impl DemoError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 2,
            Self::Setup(..) => 1,
        }
    }
}

/// Runs the tour. Afterwards the sidecar ends if `once`, or else keeps serving.
pub(super) async fn demo(once: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let (demo, config) = Demo::prepare(global, &environment).await?;
    let color = config.logging.color;
    let _log = logging::start_with(logging::Options { color: false, ..config.logging }, demo.log());
    let app = App::bind(config, Clock::system()).await?;
    let stops = StopSignals::listen(Some(app.reloader()))?;
    let addr = app.addr();
    print_ready("connect-sidecar", &format!("http://{addr}"));
    let code = until_stopped(stops, |stop| async {
        let stopping = CancellationToken::new();
        let touring = stopping.run_until_cancelled(async {
            let succeeded = demo.tour(addr, color, once).await;
            if once {
                stopping.cancel();
            }
            succeeded
        });
        let serving = app.serve(async {
            tokio::select! {
                () = stop => stopping.cancel(),
                () = stopping.cancelled() => {}
            }
        });
        let (drained, succeeded) = tokio::join!(serving, touring);
        drained && succeeded.unwrap_or(true)
    });
    Ok(code.await)
}

/// The emulator and the scratch project. Both are removed when this is dropped.
pub struct Demo {
    scratch: TempDir,
    emulator: Emulator,
    log: CapturedLog,
}

impl Demo {
    /// Starts the emulator, sets up the project, and returns the sidecar's configuration. Of the caller's flags and
    /// environment, the port and the logging options are used.
    pub async fn prepare(args: &GlobalArgs, environment: EnvLookup<'_>) -> Result<(Self, Config), DemoError> {
        let why = "the demo has a project, an upstream and a credential of its own";
        config::port_only(args, &USED_FLAGS, why)?;
        let scratch = tempfile::Builder::new()
            .prefix("connect-sidecar-demo-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir()
            .map_err(|e| DemoError::Setup("make a scratch directory", e))?;
        let emulator =
            Emulator::start(Options::default()).await.map_err(|e| DemoError::Setup("start the emulator", e))?;
        let demo = Self { scratch, emulator, log: CapturedLog::default() };
        std::fs::create_dir(demo.project())
            .and_then(|()| demo.pull(ISSUED_AGO[0], DEVELOPMENT_LIFE - ISSUED_AGO[0]))
            .map_err(|e| DemoError::Setup("write the scratch project", e))?;

        let args = GlobalArgs {
            project: Some(demo.project()),
            upstream: Some(demo.emulator.url()),
            // The tour reads the sidecar's log.
            quiet: false,
            ..args.clone()
        };
        let own_files = demo.scratch.path().join("configuration");
        let config = Config::load(
            &args,
            &|name| match name {
                "XDG_CONFIG_HOME" => Some(own_files.clone().into()),
                // Its warnings are not about the user's own project.
                "CONNECT_SIDECAR_DESKTOP_NOTICES" => Some("false".into()),
                "CONNECT_SIDECAR_PORT" | "CONNECT_SIDECAR_LOG_FORMAT" | "NO_COLOR" | "XDG_STATE_HOME" | "HOME" => {
                    environment(name)
                }
                _ => None,
            },
            demo.scratch.path(),
        )?;
        Ok((demo, config))
    }

    /// The writer for the sidecar's log, which the tour reads.
    pub fn log(&self) -> CapturedLog {
        self.log.clone()
    }

    /// Runs the tour with the sidecar at `sidecar`. With `once`, the sidecar is about to end afterwards. Returns
    /// whether every step succeeded.
    pub async fn tour(&self, sidecar: SocketAddr, color: bool, once: bool) -> bool {
        let mut tour = Tour {
            demo: self,
            sidecar,
            client: Client::builder(TokioExecutor::new()).build_http(),
            palette: Palette::new(color && io::stderr().is_terminal()),
            shown_log_lines: 0,
            steps: 0,
            failures: 0,
        };
        let ended = tokio::time::timeout(STEP_LIMIT * 3, tour.show_all()).await;
        tour.failures += u32::from(ended.is_err());
        tour.conclude(once);
        self.log.go_live();
        tour.failures == 0
    }

    fn project(&self) -> PathBuf {
        self.scratch.path().join("web")
    }

    fn env_path(&self) -> PathBuf {
        self.project().join(".env.local")
    }

    /// Writes the env file as the Vercel CLI does: in place, without a rename.
    fn pull(&self, ago: Duration, left: Duration) -> io::Result<()> {
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(self.env_path())?;
        file.write_all(self.emulator.env_file(ago, left).as_bytes())
    }
}

/// The sidecar's log: kept in memory during the tour, then written to stderr.
#[derive(Clone)]
pub struct CapturedLog(Arc<watch::Sender<Log>>);

#[derive(Default)]
struct Log {
    text: String,
    is_live: bool,
}

impl Default for CapturedLog {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::default()))
    }
}

impl CapturedLog {
    fn go_live(&self) {
        self.0.send_modify(|log| log.is_live = true);
    }

    /// The lines after the first `seen`, once one of them contains `text`.
    async fn lines_until(&self, seen: usize, text: &str) -> Vec<String> {
        let later = |log: &Log| log.text.lines().skip(seen).map(str::to_owned).collect::<Vec<_>>();
        let mut log = self.0.subscribe();
        let waiting = log.wait_for(|log| later(log).iter().any(|line| line.contains(text)));
        let _ = tokio::time::timeout(STEP_LIMIT, waiting).await;
        later(&self.0.borrow())
    }
}

impl Write for CapturedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.borrow().is_live {
            return io::stderr().write(bytes);
        }
        self.0.send_modify(|log| log.text.push_str(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// The state of the tour.
struct Tour<'a> {
    demo: &'a Demo,
    sidecar: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
    palette: Palette,
    shown_log_lines: usize,
    steps: u32,
    failures: u32,
}

/// The parts of a reply that the tour checks.
struct Reply {
    status: StatusCode,
    cache_status: String,
    body: Value,
}

impl Reply {
    fn token(&self) -> &str {
        self.body["token"].as_str().unwrap_or_default()
    }
}

impl Tour<'_> {
    async fn show_all(&mut self) {
        let (sidecar, env_file) = (self.sidecar, self.demo.env_path().display().to_string());
        let emulator = self.demo.emulator.url();
        let json = "-H 'content-type: application/json'";
        let app = r#"{"subject":{"type":"app"}}"#;
        let ask = format!("curl -si http://{sidecar}/v1/connect/token/{SLACK} {json} -d '{app}'");

        self.introduce().await;

        self.step("A miss: the app holds no credential, the sidecar adds it and asks Connect");
        self.command(&ask);
        let miss = self.ask(SLACK, app).await;
        self.show_reply(&miss);
        self.check(miss.cache_status.contains("fwd=uri-miss; stored"), "the token is stored");
        self.check_log("token slack/acme-slack").await;

        self.step("A hit: the same again, from any process, costs nothing");
        self.command(&ask);
        let hit = self.ask(SLACK, app).await;
        self.show_reply(&hit);
        self.check(hit.cache_status.contains("; hit; ttl=") && hit.token() == miss.token(), "the same token");
        self.command(&format!("curl -s http://{sidecar}/_sidecar/v1/status"));
        let saved = self.requests_saved().await;
        self.check(saved == Some(1), &format!("\"requests_saved\":{}", saved.unwrap_or_default()));

        self.step(&format!("{HERD} equal requests at once cost one"));
        self.command(&format!(
            "now=$(date +%s); seq {HERD} | xargs -P {HERD} -I{{}} curl -si http://{sidecar}/v1/connect/token/{SLACK} \
             {json} -d '{{\"scopes\":[\"'$now'\"]}}' | grep -i cache-status"
        ));
        self.show_concurrent_requests().await;

        self.step(&format!("A warning: this token ends within {}", crate::os::clock::format_duration(SHORT_LIFE)));
        self.command(&format!("curl -s '{emulator}/_emulator/env.local?life=4m' > {env_file}"));
        let written = self.demo.pull(ISSUED_AGO[1], SHORT_LIFE);
        self.check(written.is_ok(), &format!("{env_file} is written anew"));
        self.check_log("expires in 3 min, run `vercel env pull`").await;

        self.step("A rotation: `vercel env pull` writes a fresh token, the sidecar picks it up");
        self.command(&format!("curl -s '{emulator}/_emulator/env.local' > {env_file}"));
        let written = self.demo.pull(ISSUED_AGO[2], DEVELOPMENT_LIFE - ISSUED_AGO[2]);
        self.check(written.is_ok(), &format!("{env_file} is written anew"));
        self.check_log("token refreshed, expires in 11 h 59 min").await;
        let kept = self.ask(SLACK, app).await;
        self.check(kept.cache_status.contains("; hit; ttl="), "what was cached before is still good");

        self.step("A typed error passes as it is, and the log says what mends it");
        self.command(&format!("curl -si http://{sidecar}/v1/connect/token/{UNLINKED} {json} -d '{app}'"));
        let refused = self.ask(UNLINKED, app).await;
        self.show_reply(&refused);
        let is_typed = refused.status == StatusCode::FORBIDDEN && refused.body["error"]["code"] == "forbidden";
        self.check(is_typed, "Connect's own answer");
        self.check_log("vercel connect attach salesforce/crm").await;
    }

    async fn show_concurrent_requests(&mut self) {
        let before = self.demo.emulator.count(SLACK);
        // Upstream does not respond before all requests have been sent.
        let hold = self.demo.emulator.hold_answers();
        let mut asking = JoinSet::new();
        for _ in 0..HERD {
            asking.spawn(self.request(Method::POST, &format!("/v1/connect/token/{SLACK}"), r#"{"scopes":["herd"]}"#));
        }
        let arrived = async {
            while self.demo.emulator.count(SLACK) == before {
                self.demo.emulator.wait_for_requests(self.demo.emulator.received().len() + 1).await;
            }
        };
        let _ = tokio::time::timeout(STEP_LIMIT, arrived).await;
        hold.release();
        let replies = asking.join_all().await;
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for reply in &replies {
            *kinds.entry(reply.cache_status.split("; ttl=").next().unwrap_or_default()).or_default() += 1;
        }
        for (kind, count) in kinds {
            self.print_result(&format!("{count:>2} × {kind}"));
        }
        let first = replies.first().map_or("", Reply::token);
        self.check(!first.is_empty() && replies.iter().all(|r| r.token() == first), "one token for all of them");
        self.check_log("token slack/acme-slack").await;
        let cost = self.demo.emulator.count(SLACK) - before;
        self.check(cost == 1, &format!("requests to Connect: {cost}"));
    }

    async fn introduce(&mut self) {
        let (sidecar, emulator) = (format!("http://{}", self.sidecar), self.demo.emulator.url());
        print("A demo of connect-sidecar: no account, no network, all of it on this machine.\n");
        print(&format!("  {sidecar:<24}  the sidecar, which apps ask without a credential"));
        print(&format!("  {emulator:<24}  an emulator of Vercel Connect, in the place of https://api.vercel.com"));
        print(&format!("  {}  the one credential", self.demo.env_path().display()));
        self.check_log("token of acme/web loaded").await;
    }

    fn conclude(&self, once: bool) {
        let Self { steps, failures, sidecar, .. } = self;
        print(&match failures {
            0 => format!("\nAll {steps} steps showed what they claim."),
            _ => format!("\n{failures} of the claims did not hold."),
        });
        if !once {
            let scratch = self.demo.scratch.path().display();
            print(&format!("The sidecar goes on at http://{sidecar}: try the commands, its log follows."));
            print(&format!("Ctrl-C ends it and removes {scratch}.\n"));
        }
    }

    fn step(&mut self, title: &str) {
        self.steps += 1;
        let title = format!("{}. {title}", self.steps);
        print(&format!("\n{}", self.palette.paint(Color::Bold, &title)));
    }

    fn command(&self, command: &str) {
        print(&format!("   $ {command}"));
    }

    fn print_result(&self, text: &str) {
        print(&format!("     {text}"));
    }

    fn show_reply(&self, reply: &Reply) {
        self.print_result(&format!("{}  cache-status: {}", reply.status.as_u16(), reply.cache_status));
        self.print_result(&match reply.token() {
            "" => reply.body.to_string(),
            token => format!("token {}…", token.chars().take(12).collect::<String>()),
        });
    }

    fn check(&mut self, holds: bool, claim: &str) {
        let mark =
            if holds { self.palette.paint(Color::Green, "✓") } else { self.palette.paint(Color::Red, "✗ not so:") };
        print(&format!("   {mark} {claim}"));
        self.failures += u32::from(!holds);
    }

    /// Shows the sidecar's new log lines once one of them contains `text`.
    async fn check_log(&mut self, text: &str) {
        let lines = self.demo.log.lines_until(self.shown_log_lines, text).await;
        self.shown_log_lines += lines.len();
        for line in &lines {
            self.print_result(&self.palette.paint(Color::Dim, line));
        }
        if !lines.iter().any(|line| line.contains(text)) {
            self.check(false, &format!("the log says `{text}`"));
        }
    }

    async fn requests_saved(&self) -> Option<u64> {
        let status = self.request(Method::GET, "/_sidecar/v1/status", "").await;
        status.body["cache"]["requests_saved"].as_u64()
    }

    async fn ask(&self, connector: &str, body: &'static str) -> Reply {
        self.request(Method::POST, &format!("/v1/connect/token/{connector}"), body).await
    }

    /// Sends a request to the sidecar. Without a reply, returns a 502 that fails the checks.
    fn request(&self, method: Method, path: &str, body: &'static str) -> impl Future<Output = Reply> + use<> {
        let sending = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.sidecar))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map(|request| self.client.request(request));
        async move {
            let exchange = async {
                let (head, body) = sending?.await?.into_parts();
                let body = body.collect().await?.to_bytes();
                let cache_status = head.headers.get("cache-status").and_then(|value| value.to_str().ok());
                Ok::<_, Box<dyn Error + Send + Sync>>(Reply {
                    status: head.status,
                    cache_status: cache_status.unwrap_or("none").to_owned(),
                    body: serde_json::from_slice(&body).unwrap_or_default(),
                })
            };
            let failed = |reason: String| Reply {
                status: StatusCode::BAD_GATEWAY,
                cache_status: "none".into(),
                body: format!("no reply: {reason}").into(),
            };
            match tokio::time::timeout(STEP_LIMIT, exchange).await {
                Ok(reply) => reply.unwrap_or_else(|e| failed(e.to_string())),
                Err(_) => failed("too slow".into()),
            }
        }
    }
}

/// Writes a line of the tour to stderr. Ignores a closed stderr.
fn print(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
