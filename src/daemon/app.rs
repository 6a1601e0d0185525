//! The composition root: builds the parts, binds, spawns, shuts down. It only wires; decisions are the parts'.
//!
//! `App::bind` → [`App::addr`] → [`App::serve`] is what the binary, the demo and the tests all use.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
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
use crate::credential::{Credential, Identity, Reloader, TokenState};
use crate::daemon::intercept::Interception;
use crate::daemon::server::Server;
use crate::daemon::server::handover::{Door, Offer, Taken};
use crate::daemon::server::listener::{self, Listener};
use crate::daemon::server::runs::{self, Asked};
use crate::daemon::server::unix_socket::{self, UnixSocket};
use crate::daemon::status::Status;
#[cfg(feature = "desktop")]
use crate::daemon::status::notices::Notices;
use crate::daemon::status::usage;
use crate::events::{self, Event, Events};
use crate::instance::key::Key;
use crate::instance::port_owner::{self, Owner};
use crate::instance::state_file::{self, Instance, InstanceFile};
use crate::os::clock::Clock;
use crate::os::private_dir::Problem;
use crate::proxy::cache::Cache;
use crate::proxy::relay::Relay;
use crate::proxy::stats::Stats;
use crate::proxy::upstream::Upstream;
use crate::proxy::{MOST_WAITING, Proxy};

/// What is under way at the end may take this long (docs/configuration.md section 1).
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Why the process cannot begin to serve.
#[derive(Debug)]
pub enum StartupError {
    /// Somebody listens there already. Exit code 3.
    PortTaken {
        /// The address.
        address: SocketAddr,
        /// Who it is, where that can be found out.
        owner: Option<Box<Owner>>,
        /// The project that was to be served there.
        project: PathBuf,
    },
    /// Any other failure to listen.
    Listen(SocketAddr, io::Error),
    /// The unix socket, by its path.
    UnixSocket(PathBuf, unix_socket::Problem),
    /// No randomness for the instance key.
    Key(io::Error),
    /// A required key could not be put where its holders find it.
    InstanceFile(Problem),
}

impl fmt::Display for StartupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortTaken { address, owner, project } => {
                let taken = format!("could not listen on {address}: the port is taken");
                match owner.as_deref() {
                    Some(Owner::Sidecar { instance: Instance { pid, url, project: same, .. }, answers: true })
                        if same == project =>
                    {
                        write!(
                            f,
                            "already running here, at {url} (process {pid}, for {}): `connect-sidecar status` shows \
                             what it does; to start it anew, end it first: `kill {pid}`",
                            same.display()
                        )
                    }
                    Some(owner @ Owner::Sidecar { instance: Instance { pid, .. }, answers: false }) => {
                        write!(f, "{taken} by {owner}, which does not answer; if it is stopped: `kill -CONT {pid}`")
                    }
                    Some(owner) => write!(f, "{taken} by {owner}; end that, or choose another with --port"),
                    None => write!(f, "{taken}; end that, or choose another with --port"),
                }
            }
            Self::Listen(address, e) => write!(f, "could not listen on {address}: {e}"),
            Self::UnixSocket(path, problem) => write!(f, "--unix-socket {}: {problem}", path.display()),
            Self::Key(e) => write!(f, "could not make an instance key: {e}"),
            Self::InstanceFile(problem) => {
                write!(f, "could not write the instance key, which --require-key needs: {}", problem.with_command())?;
                problem.advice().map_or(Ok(()), |advice| write!(f, "; {advice}"))
            }
        }
    }
}

impl std::error::Error for StartupError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Listen(_, e) | Self::Key(e) => Some(e),
            Self::PortTaken { .. } | Self::UnixSocket(..) | Self::InstanceFile(_) => None,
        }
    }
}

impl StartupError {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PortTaken { .. } | Self::UnixSocket(_, unix_socket::Problem::InUse) => 3,
            Self::UnixSocket(_, unix_socket::Problem::Unfit(_)) => 2,
            // An address of another machine.
            Self::Listen(_, e) if e.kind() == io::ErrorKind::AddrNotAvailable => 2,
            _ => 1,
        }
    }
}

/// A sidecar that listens and is ready to serve.
pub struct App {
    server: Arc<Server>,
    interception: Interception,
    /// Who wants to come in by it.
    asked: mpsc::Receiver<Asked>,
    listeners: Vec<Listener>,
    addr: SocketAddr,
    identity: watch::Receiver<Arc<Identity>>,
    /// Keeps an identity without a watch alive.
    fixed_identity: Option<watch::Sender<Arc<Identity>>>,
    watch: Option<EnvFileWatch>,
    refresher: Option<Refresher>,
    refresh: watch::Receiver<refresh::Snapshot>,
    reloader: Reloader,
    steps: Arc<WarningSteps>,
    warned: WarningHistory,
    clock: Clock,
    tasks: TaskTracker,
    usage: usage::Keeper,
    instance_file: Option<InstanceFile>,
    offer: Arc<Offer>,
    door: Option<Door>,
    #[cfg(feature = "desktop")]
    notices: Option<Notices>,
}

impl App {
    /// Builds all parts and listens; serves nobody yet.
    pub async fn bind(config: Config, clock: Clock) -> Result<Self, StartupError> {
        let bound = match listener::bind(config.port, config.network) {
            Ok(bound) => bound,
            Err((address, e)) => return Err(explain_bind(address, e, &config).await),
        };
        let secret = Key::random().map_err(StartupError::Key)?;
        Self::take_over(config, clock, Taken { bound, interception: None, secret }).await
    }

    /// The same in the place of another, wherever `config` would listen.
    pub async fn take_over(config: Config, clock: Clock, taken: Taken) -> Result<Self, StartupError> {
        let Taken { bound, interception: intercepting, secret } = taken;
        let settings = config.settings();
        if bound.without_ipv6 {
            info!("this machine has no IPv6: listening on 127.0.0.1 only");
        }
        let addr = bound.loopback;
        // The address in the network is not for a command to take over.
        let is_loopback = |listener: &&TcpListener| listener.local_addr().is_ok_and(|addr| addr.ip().is_loopback());
        let offer = Offer::new(secret.clone(), bound.listeners.iter().filter(is_loopback).chain(&intercepting))
            .map_err(|e| StartupError::Listen(addr, e))?;
        let offer = Arc::new(offer);
        let mut listeners: Vec<_> = bound.listeners.into_iter().map(Listener::Tcp).collect();
        if let Some(path) = config.unix_socket {
            match UnixSocket::bind(&path).await {
                Ok(socket) => listeners.push(Listener::Unix(socket)),
                Err(problem) => return Err(StartupError::UnixSocket(path, problem)),
            }
            info!("listening on the unix socket {}", path.display());
        }
        if let Some(address) = config.network {
            let address = SocketAddr::new(address, addr.port());
            warn!(
                "LISTENING ON THE NETWORK at {address}: whoever reaches it and has the key gets this project's tokens"
            );
        }

        let credential_source = config.auth.name().to_owned();
        let (watch, fixed_identity, reloader) = match config.auth {
            Auth::Oidc { env_file, shown } => {
                let (watch, reloader) = EnvFileWatch::start(env_file, shown, clock.clone()).await;
                (Some(watch), None, reloader)
            }
            Auth::AccessToken(secret) => {
                let credential = Credential::access_token(secret, config.upstream.team_id.as_deref());
                let identity = Identity::first(TokenState::Loaded(Arc::new(credential)));
                (None, Some(watch::Sender::new(Arc::new(identity))), Reloader::default())
            }
        };
        let identity = match (&watch, &fixed_identity) {
            (Some(watch), _) => watch.subscribe(),
            (None, Some(fixed)) => fixed.subscribe(),
            (None, None) => watch::Sender::new(Arc::new(Identity::first(TokenState::Missing))).subscribe(),
        };

        let events = Events::default();
        let (accepted, was_accepted) = watch::channel(None);
        let by_the_clock = config.refresh == RefreshMode::Cli;
        let (refresher, refresh_asker, refresh) = match &watch {
            Some(watch) => {
                let options = refresh::Options {
                    by_the_clock,
                    project: config.project.clone(),
                    state_dir: config.state_dir.clone(),
                    upstream: config.upstream.name(),
                    surroundings: config.cli_environment,
                };
                let (clock, events) = (clock.clone(), events.clone());
                let (refresher, asker, refresh) =
                    Refresher::new(options, watch.subscribe(), was_accepted, watch.offers(), clock, events);
                (Some(refresher), asker, refresh)
            }
            None => (None, RefreshHandle::default(), watch::Sender::new(refresh::Snapshot::first(false)).subscribe()),
        };

        let key = config.instance_key.map_or_else(Key::random, Ok).map_err(StartupError::Key)?;
        let instance = Instance {
            pid: std::process::id(),
            url: format!("http://{addr}"),
            key: key.text().to_owned(),
            project: config.project.clone(),
            began: state_file::began(),
        };
        let instance_file = match &config.state_dir {
            _ if !config.is_announced => Ok(None),
            Some(dir) => InstanceFile::write(dir, addr.port(), instance).map(Some),
            None => Err(Problem::NoPlace),
        };
        let (instance_file, kept_in) = match instance_file {
            Ok(file) => (file, config.state_dir.as_deref()),
            Err(problem) if config.policy.require_key => return Err(StartupError::InstanceFile(problem)),
            Err(problem) => {
                let hint = problem.command();
                warn!(
                    code = "state_directory",
                    hint,
                    "`status`, `run` and all other commands will not find this sidecar, and what it warns of and counts \
                     is forgotten at its end: {}, and start it anew",
                    String::from(problem)
                );
                (None, None)
            }
        };

        let door = match (&instance_file, &config.state_dir) {
            (Some(_), Some(dir)) => Door::open(dir, addr.port())
                .inspect_err(|e| warn!("commands that join this sidecar will lose it when it ends: {e}"))
                .ok(),
            _ => None,
        };

        let tasks = TaskTracker::new();
        let stats = Arc::new(Stats::default());
        let cache = Cache::new(config.cache, identity.clone(), clock.clone(), tasks.clone());
        let is_billed = !config.upstream.is_on_loopback();
        let (usage, usage_keeper) =
            usage::begin(is_billed, kept_in.map(Path::to_owned), stats.clone(), clock.clone(), identity.clone());
        let (names, env_proxy) = (config.upstream.names.clone(), config.upstream.env_proxy.clone());
        let steps = Arc::new(WarningSteps::new(config.warn_before));
        #[cfg(feature = "desktop")]
        let notices = config.desktop_notices.then(|| Notices::of(&events, steps.longest()));
        // What is said by one that nobody knows of is said to whoever started it alone.
        let warned = WarningHistory::kept_in(kept_in.filter(|_| config.is_announced));
        let upstream = Arc::new(Upstream::new(config.upstream, clock.clone()));
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
            credential_source: credential_source.clone(),
            settings,
            steps: steps.clone(),
            started_at: clock.local(),
        };
        let proxy = Proxy {
            cache,
            relay: Relay::new(config.hosts, &upstream, clock.clone()),
            upstream,
            identity: identity.clone(),
            accepted,
            reloader: reloader.clone(),
            clock: clock.clone(),
            about_to_end: steps.longest(),
            allowed_connectors: config.allowed_connectors,
            credential_source,
            stats,
            events,
            wait: config.wait,
            waiting: Semaphore::new(MOST_WAITING),
            stopping: CancellationToken::new(),
            tasks: tasks.clone(),
        };
        let mut policy = config.policy;
        policy.key = Some(key);
        policy.run_key = Some(secret.run_key());
        if !policy.allowed_hosts.is_empty() && !policy.require_key {
            warn!("--allowed-host lets in whoever can send that Host: consider --require-key");
        }
        let (asking, asked) = runs::Interception::channel();
        let server = Arc::new(Server::new(Arc::new(proxy), policy, status, refresh_asker, asking));
        let interception = Interception {
            server: server.clone(),
            secret,
            names,
            env_proxy,
            plain_port: addr.port(),
            listener: intercepting,
            offer: offer.clone(),
            state_dir: config.state_dir,
            project: config.project,
            clock: clock.clone(),
        };
        Ok(Self {
            server,
            interception,
            asked,
            listeners,
            addr,
            identity,
            fixed_identity,
            watch,
            refresher,
            refresh,
            reloader,
            steps,
            warned,
            clock,
            tasks,
            usage: usage_keeper,
            instance_file,
            offer,
            door,
            #[cfg(feature = "desktop")]
            notices,
        })
    }

    /// The IPv4 address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What answers its requests.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// The identity, now and whenever it changes.
    pub fn identity(&self) -> watch::Receiver<Arc<Identity>> {
        self.identity.clone()
    }

    /// Makes it read the env file again.
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Serves until `stop`, then lets what is under way finish. Returns whether all of it did within the limit.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> bool {
        let background = TaskTracker::new();
        let ended = CancellationToken::new();
        let spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            background.spawn(ended.clone().run_until_cancelled_owned(task));
        };
        let proxy = self.server.proxy().clone();
        if let Some(watch) = self.watch {
            spawn(Box::pin(watch.run()));
        }
        if let Some(refresher) = self.refresher {
            spawn(Box::pin(refresher.run()));
        }
        let (upstream, events) = (proxy.upstream.clone(), proxy.events.clone());
        let ask_clock = async move || upstream.ask_clock().await;
        #[cfg(feature = "desktop")]
        if let Some(notices) = self.notices {
            spawn(Box::pin(notices.run()));
        }
        let (identity, refresh) = (self.identity.clone(), self.refresh);
        let (clock, steps, warned) = (self.clock, self.steps, self.warned);
        spawn(Box::pin(expiry_warnings::run(identity, refresh, clock, steps, warned, events.clone(), ask_clock)));
        let at_start = self.identity.borrow().oidc().map(|token| token.fingerprint().to_owned());
        spawn(Box::pin(follow(self.identity, at_start, proxy.clone())));
        let stopping = proxy.stopping.clone();
        spawn(Box::pin(async move { proxy.upstream.prepare().await }));
        // Ends by itself: what was counted last is still to be saved.
        background.spawn(self.usage.run(ended.clone()));

        spawn(Box::pin(self.server.clone().look_after_connections()));

        let connections = TaskTracker::new();
        spawn(Box::pin(self.interception.run(self.asked, stopping.clone(), connections.clone())));
        for listener in self.listeners {
            connections.spawn(self.server.clone().accept(listener, connections.clone(), stopping.clone()));
        }

        let (offer, door) = (self.offer, self.door);
        let handing_out = async {
            match &door {
                Some(door) => offer.hand_out(door).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop => {}
            () = handing_out => {}
        }
        stopping.cancel();
        // From now on another process may take this one's place.
        drop(self.instance_file);
        drop(door);
        offer.end();
        self.server.finish();
        events.end();
        connections.close();
        self.tasks.close();
        let under_way = async {
            connections.wait().await;
            self.tasks.wait().await;
        };
        let done = tokio::time::timeout(DRAIN_LIMIT, under_way).await.is_ok();
        if !done {
            warn!("some requests did not end within {} s and are broken off", DRAIN_LIMIT.as_secs());
        }
        ended.cancel();
        background.close();
        background.wait().await;
        drop(self.fixed_identity);
        done
    }
}

/// Tells of each token that comes into use after
/// the one `at_start`. One that takes another's place is a rotation, and counted; the first is none.
async fn follow(mut identity: watch::Receiver<Arc<Identity>>, at_start: Option<String>, proxy: Arc<Proxy>) {
    let (mut in_use, mut last) = (at_start.clone(), at_start);
    loop {
        let snapshot = identity.borrow_and_update().clone();
        let before = std::mem::replace(&mut in_use, snapshot.oidc().map(|token| token.fingerprint().to_owned()));
        if let Some(token) = snapshot.oidc() {
            let replaced = last.replace(token.fingerprint().to_owned());
            if replaced.is_some() && replaced != in_use {
                proxy.stats.rotations.count();
            }
            if before != in_use {
                proxy.events.tell(Event::Rotation(events::Rotation {
                    at: proxy.clock.now(),
                    project: token.claims.project_name(),
                    fingerprint: token.fingerprint().to_owned(),
                    expires_at: token.expires_at,
                }));
            }
        }
        if identity.changed().await.is_err() {
            return;
        }
    }
}

async fn explain_bind(address: SocketAddr, error: io::Error, config: &Config) -> StartupError {
    match error.kind() {
        io::ErrorKind::AddrInUse => StartupError::PortTaken {
            address,
            owner: port_owner::find(address, config.state_dir.as_deref()).await.map(Box::new),
            project: config.project.clone(),
        },
        _ => StartupError::Listen(address, error),
    }
}
