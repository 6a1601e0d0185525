//! The composition root: builds the parts, binds the sockets, spawns the tasks, shuts down. It contains no other logic.
//!
//! The binary, the demo and the tests all use `App::bind`, then [`App::addr`], then [`App::serve`].

mod error;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::{Auth, Config, RefreshMode};
use crate::credential::expiry_warnings::{self, WarningSteps};
use crate::credential::refresh::{self, RefreshHandle, Refresher};
use crate::credential::warning_history::WarningHistory;
use crate::credential::watch::EnvFileWatch;
use crate::credential::{Credential, Identity, ReloadHandle, TokenState};
use crate::daemon::intercept::Interception;
use crate::daemon::server::Server;
use crate::daemon::server::handover::{HandoverSocket, SharedSockets, Sockets};
use crate::daemon::server::listener::{self, BoundSockets, Listener};
use crate::daemon::server::runs::{InterceptionHandle, InterceptionRequest};
use crate::daemon::server::unix_socket::UnixSocket;
use crate::daemon::status::Status;
#[cfg(feature = "desktop")]
use crate::daemon::status::notices::Notices;
use crate::daemon::status::usage;
use crate::events::{self, Event, Events};
use crate::instance::key::Key;
use crate::instance::port_owner;
use crate::instance::state_file::{self, Instance, InstanceFile};
use crate::os::clock::Clock;
use crate::os::private_dir::Problem;
use crate::proxy::cache::Cache;
use crate::proxy::relay::Relay;
use crate::proxy::stats::Stats;
use crate::proxy::upstream::Upstream;
use crate::proxy::{MAX_WAITING, Proxy};

pub use error::StartupError;

/// Time for requests to finish at shutdown (docs/configuration.md section 1).
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A sidecar that listens and is ready to serve.
pub struct App {
    addr: SocketAddr,
    server: Arc<Server>,
    listeners: Vec<Listener>,
    interception: Interception,
    interception_requests: mpsc::Receiver<InterceptionRequest>,
    identity_source: IdentitySource,
    refresher: Option<Refresher>,
    refresh: watch::Receiver<refresh::Snapshot>,
    warning_steps: Arc<WarningSteps>,
    warning_history: WarningHistory,
    usage: usage::UsageRecorder,
    instance_file: Option<InstanceFile>,
    shared_sockets: Arc<SharedSockets>,
    handover_socket: Option<HandoverSocket>,
    #[cfg(feature = "desktop")]
    notices: Option<Notices>,
}

impl App {
    /// Binds the sockets and builds all parts. Nothing is served yet.
    pub async fn bind(config: Config, clock: Clock) -> Result<Self, StartupError> {
        let bound = match listener::bind(config.port, config.network) {
            Ok(bound) => bound,
            Err((address, e)) => return Err(explain_bind_error(address, e, &config).await),
        };
        let secret = Key::random().map_err(StartupError::Key)?;
        Self::take_over(config, clock, Sockets { bound, interception: None, secret }).await
    }

    /// Like [`App::bind`], but with sockets that are bound already, such as those of a predecessor. The configured port
    /// is ignored.
    pub async fn take_over(config: Config, clock: Clock, sockets: Sockets) -> Result<Self, StartupError> {
        let Sockets { bound, interception: interception_listener, secret } = sockets;
        let addr = bound.loopback;
        let shared_sockets = share_sockets(&bound, interception_listener.as_ref(), &secret)?;
        let listeners = open_listeners(bound, &config).await?;

        let (identity_source, reloader) = IdentitySource::start(&config, &clock).await;
        let identity = identity_source.subscribe();
        let events = Events::default();
        let (accepted, accepted_credentials) = watch::channel(None);
        let (refresher, refresh_handle, refresh) =
            identity_source.refresher(&config, accepted_credentials, &clock, &events);

        let key = config.instance_key.clone().map_or_else(Key::random, Ok).map_err(StartupError::Key)?;
        let (instance_file, state_dir) = announce(&config, addr, &key)?;
        let handover_socket = open_handover_socket(&config, addr, instance_file.as_ref());

        let tasks = TaskTracker::new();
        let stats = Arc::new(Stats::default());
        let cache = Cache::new(config.cache, identity.clone(), clock.clone(), tasks.clone());
        let is_billed = !config.upstream.is_on_loopback();
        let (usage, usage_recorder) =
            usage::start(is_billed, state_dir.clone(), stats.clone(), clock.clone(), identity.clone());
        let warning_steps = Arc::new(WarningSteps::new(config.warn_before.clone()));
        #[cfg(feature = "desktop")]
        let notices = config.desktop_notices.then(|| Notices::new(&events, warning_steps.longest()));
        // The warnings of an unannounced sidecar reach only its own user, so they must not silence those of others.
        let warning_history = WarningHistory::kept_in(state_dir.as_deref().filter(|_| config.is_announced));
        let (names, env_proxy) = (config.upstream.names.clone(), config.upstream.env_proxy.clone());
        let upstream = Arc::new(Upstream::new(config.upstream.clone(), clock.clone()));
        let status = Status {
            clock: clock.clone(),
            identity: identity.clone(),
            refresh: refresh.clone(),
            cache: cache.clone(),
            stats: stats.clone(),
            usage,
            events: events.clone(),
            upstream: upstream.name().to_owned(),
            project: config.project.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            credential_source: config.auth.name().to_owned(),
            settings: config.settings(),
            steps: warning_steps.clone(),
            started_at: clock.local(),
        };
        let proxy = Proxy {
            cache,
            relay: Relay::new(config.hosts, &upstream, clock.clone()),
            upstream,
            identity,
            accepted,
            reloader,
            clock: clock.clone(),
            expiry_notice: warning_steps.longest(),
            allowed_connectors: config.allowed_connectors,
            credential_source: config.auth.name().to_owned(),
            stats,
            events,
            credential_wait: config.wait,
            waiting: Semaphore::new(MAX_WAITING),
            stopping: CancellationToken::new(),
            tasks,
        };
        let mut policy = config.policy;
        policy.key = Some(key);
        policy.run_key = Some(secret.run_key());
        if !policy.allowed_hosts.is_empty() && !policy.require_key {
            warn!("--allowed-host lets in anyone who can send that Host: consider --require-key");
        }
        let (interception_handle, interception_requests) = InterceptionHandle::channel();
        let server = Arc::new(Server::new(Arc::new(proxy), policy, status, refresh_handle, interception_handle));
        let interception = Interception {
            server: server.clone(),
            secret,
            names,
            env_proxy,
            plain_port: addr.port(),
            listener: interception_listener,
            shared_sockets: shared_sockets.clone(),
            state_dir: config.state_dir,
            project: config.project,
            clock,
        };
        Ok(Self {
            addr,
            server,
            listeners,
            interception,
            interception_requests,
            identity_source,
            refresher,
            refresh,
            warning_steps,
            warning_history,
            usage: usage_recorder,
            instance_file,
            shared_sockets,
            handover_socket,
            #[cfg(feature = "desktop")]
            notices,
        })
    }

    /// The IPv4 address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The server that answers its requests.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// The current identity and its changes.
    pub fn identity(&self) -> watch::Receiver<Arc<Identity>> {
        self.server.proxy().identity.clone()
    }

    /// Triggers a reload of the env file.
    pub fn reloader(&self) -> ReloadHandle {
        self.server.proxy().reloader.clone()
    }

    /// Serves until `stop`, then lets current requests finish. Returns whether all finished in time.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> bool {
        let proxy = self.server.proxy().clone();
        let stopping = proxy.stopping.clone();
        let background = Background::default();
        let fixed_identity = match self.identity_source {
            IdentitySource::EnvFile(watch) => {
                background.spawn(watch.run());
                None
            }
            IdentitySource::Fixed(identity) => Some(identity),
        };
        if let Some(refresher) = self.refresher {
            background.spawn(refresher.run());
        }
        #[cfg(feature = "desktop")]
        if let Some(notices) = self.notices {
            background.spawn(notices.run());
        }
        let upstream = proxy.upstream.clone();
        let ask_clock = async move || upstream.sync_clock().await;
        background.spawn(expiry_warnings::run(
            proxy.identity.clone(),
            self.refresh,
            proxy.clock.clone(),
            self.warning_steps,
            self.warning_history,
            proxy.events.clone(),
            ask_clock,
        ));
        let at_start = proxy.identity.borrow().oidc().map(|token| token.fingerprint().to_owned());
        background.spawn(report_rotations(proxy.clone(), at_start));
        let upstream = proxy.upstream.clone();
        background.spawn(async move { upstream.prepare().await });
        background.spawn(self.server.clone().enforce_limits());
        // Not cancelled like the others, since it must save the last counts.
        background.tasks.spawn(self.usage.run(background.ended.clone()));

        let connections = TaskTracker::new();
        background.spawn(self.interception.run(self.interception_requests, stopping.clone(), connections.clone()));
        for listener in self.listeners {
            connections.spawn(self.server.clone().accept(listener, connections.clone(), stopping.clone()));
        }

        let handover = async {
            match &self.handover_socket {
                Some(socket) => self.shared_sockets.serve(socket).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop => {}
            () = handover => {}
        }
        stopping.cancel();
        // From here on, another process may take over.
        drop(self.instance_file);
        drop(self.handover_socket);
        self.shared_sockets.close();
        self.server.drain();
        proxy.events.close();
        connections.close();
        proxy.tasks.close();
        let draining = async {
            connections.wait().await;
            proxy.tasks.wait().await;
        };
        let is_drained = tokio::time::timeout(DRAIN_TIMEOUT, draining).await.is_ok();
        if !is_drained {
            warn!("some requests did not end within {} s and are broken off", DRAIN_TIMEOUT.as_secs());
        }
        background.end().await;
        drop(fixed_identity);
        is_drained
    }
}

/// Publishes the identity.
enum IdentitySource {
    EnvFile(Box<EnvFileWatch>),
    /// An access token, which never changes.
    Fixed(watch::Sender<Arc<Identity>>),
}

impl IdentitySource {
    async fn start(config: &Config, clock: &Clock) -> (Self, ReloadHandle) {
        match &config.auth {
            Auth::Oidc { env_file, shown } => {
                let (watch, reloader) = EnvFileWatch::start(env_file.clone(), shown.clone(), clock.clone()).await;
                (Self::EnvFile(Box::new(watch)), reloader)
            }
            Auth::AccessToken(secret) => {
                let credential = Credential::access_token(secret.clone(), config.upstream.team_id.as_deref());
                let identity = Identity::first(TokenState::Loaded(Arc::new(credential)));
                (Self::Fixed(watch::Sender::new(Arc::new(identity))), ReloadHandle::default())
            }
        }
    }

    fn subscribe(&self) -> watch::Receiver<Arc<Identity>> {
        match self {
            Self::EnvFile(watch) => watch.subscribe(),
            Self::Fixed(identity) => identity.subscribe(),
        }
    }

    /// The refresher of an OIDC token, its handle and its state. An access token has none.
    fn refresher(
        &self,
        config: &Config,
        accepted: watch::Receiver<Option<Arc<Credential>>>,
        clock: &Clock,
        events: &Events,
    ) -> (Option<Refresher>, RefreshHandle, watch::Receiver<refresh::Snapshot>) {
        let Self::EnvFile(watch) = self else {
            let snapshot = watch::Sender::new(refresh::Snapshot::new(false)).subscribe();
            return (None, RefreshHandle::default(), snapshot);
        };
        let options = refresh::Options {
            is_automatic: config.refresh == RefreshMode::Cli,
            project: config.project.clone(),
            state_dir: config.state_dir.clone(),
            upstream: config.upstream.name(),
            cli_environment: config.cli_environment.clone(),
        };
        let (clock, events) = (clock.clone(), events.clone());
        let (refresher, handle, snapshot) =
            Refresher::new(options, watch.subscribe(), accepted, watch.submitter(), clock, events);
        (Some(refresher), handle, snapshot)
    }
}

/// Tasks that run until the end of the process.
#[derive(Default)]
struct Background {
    tasks: TaskTracker,
    ended: CancellationToken,
}

impl Background {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.ended.clone().run_until_cancelled_owned(task));
    }

    async fn end(self) {
        self.ended.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Shares the sockets with processes that may take over. The network address is excluded: a `run` does not listen
/// there.
fn share_sockets(
    bound: &BoundSockets,
    interception: Option<&TcpListener>,
    secret: &Key,
) -> Result<Arc<SharedSockets>, StartupError> {
    let is_loopback = |listener: &&TcpListener| listener.local_addr().is_ok_and(|addr| addr.ip().is_loopback());
    let sockets = bound.listeners.iter().filter(is_loopback).chain(interception);
    let shared = SharedSockets::new(secret.clone(), sockets);
    shared.map(Arc::new).map_err(|e| StartupError::Listen(bound.loopback, e))
}

async fn open_listeners(bound: BoundSockets, config: &Config) -> Result<Vec<Listener>, StartupError> {
    if bound.without_ipv6 {
        info!("this machine has no IPv6: listening on 127.0.0.1 only");
    }
    let mut listeners: Vec<_> = bound.listeners.into_iter().map(Listener::Tcp).collect();
    if let Some(path) = &config.unix_socket {
        let socket = UnixSocket::bind(path).await.map_err(|e| StartupError::UnixSocket(path.clone(), e))?;
        listeners.push(Listener::Unix(socket));
        info!("listening on the unix socket {}", path.display());
    }
    if let Some(address) = config.network {
        let address = SocketAddr::new(address, bound.loopback.port());
        warn!(
            "LISTENING ON THE NETWORK at {address}: anyone who reaches it and has the key gets this project's tokens"
        );
    }
    Ok(listeners)
}

/// Writes the instance file, by which other commands find this sidecar. Returns it with the state directory, if that
/// can be used.
fn announce(
    config: &Config,
    addr: SocketAddr,
    key: &Key,
) -> Result<(Option<InstanceFile>, Option<PathBuf>), StartupError> {
    if !config.is_announced {
        return Ok((None, config.state_dir.clone()));
    }
    let instance = Instance {
        pid: std::process::id(),
        url: format!("http://{addr}"),
        key: key.text().to_owned(),
        project: config.project.clone(),
        began: state_file::process_start(),
    };
    let written = match &config.state_dir {
        Some(dir) => InstanceFile::write(dir, addr.port(), instance),
        None => Err(Problem::NoStateDir),
    };
    match written {
        Ok(file) => Ok((Some(file), config.state_dir.clone())),
        Err(problem) if config.policy.require_key => Err(StartupError::InstanceFile(problem)),
        Err(problem) => {
            let hint = problem.command();
            warn!(
                code = "state_directory",
                hint,
                "`status`, `run` and all other commands will not find this sidecar, and what it warns of and counts is \
                 forgotten at its end: {}, and start it anew",
                String::from(problem)
            );
            Ok((None, None))
        }
    }
}

fn open_handover_socket(
    config: &Config,
    addr: SocketAddr,
    instance_file: Option<&InstanceFile>,
) -> Option<HandoverSocket> {
    let dir = config.state_dir.as_deref().filter(|_| instance_file.is_some())?;
    HandoverSocket::bind(dir, addr.port())
        .inspect_err(|e| warn!("commands that join this sidecar will lose it when it ends: {e}"))
        .ok()
}

/// Publishes an event for each token that comes into use after the one with the fingerprint `at_start`, and counts
/// those that replace another.
async fn report_rotations(proxy: Arc<Proxy>, at_start: Option<String>) {
    let mut identity = proxy.identity.clone();
    let (mut in_use, mut last) = (at_start.clone(), at_start);
    while identity.changed().await.is_ok() {
        let snapshot = identity.borrow_and_update().clone();
        let before = std::mem::replace(&mut in_use, snapshot.oidc().map(|token| token.fingerprint().to_owned()));
        let Some(token) = snapshot.oidc() else { continue };
        let replaced = last.replace(token.fingerprint().to_owned());
        if replaced.is_some() && replaced != in_use {
            proxy.stats.rotations.count();
        }
        if before != in_use {
            proxy.events.publish(Event::Rotation(events::Rotation {
                at: proxy.clock.now(),
                project: token.claims.project_name(),
                fingerprint: token.fingerprint().to_owned(),
                expires_at: token.expires_at,
            }));
        }
    }
}

async fn explain_bind_error(address: SocketAddr, error: io::Error, config: &Config) -> StartupError {
    match error.kind() {
        io::ErrorKind::AddrInUse => StartupError::PortTaken {
            address,
            owner: port_owner::find(address, config.state_dir.as_deref()).await.map(Box::new),
            project: config.project.clone(),
        },
        _ => StartupError::Listen(address, error),
    }
}
