//! The sidecar that a command uses: the project's running one, or else one in this process.
//!
//! If a joined sidecar ends, this process replaces it: it has held duplicates of the sidecar's listeners from the start
//! ([`handover`]). If several commands lose the same sidecar, one of them replaces it and the others join that one.
//!
//! [`handover`]: crate::daemon::server::handover

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::RunError;
use super::child::Signals;
use super::joining::{self, Decision, Note};
use crate::config::{Config, EnvLookup, RefreshMode};
use crate::daemon::app::{App, StartupError};
use crate::daemon::server::Server;
use crate::daemon::server::handover::HeldSockets;
use crate::instance::Selector;
use crate::instance::client::{self, Client, ClientError, NotFound, Refusal};
use crate::instance::key::Key;
use crate::instance::run::{Run, RunRequest};
use crate::instance::state_file::Instance;
use crate::os::clock::Clock;
use crate::os::private_dir;
use crate::os::terminal;
use crate::proxy::guard::Policy;

/// Time between two attempts to replace a sidecar that has ended.
const REPLACE_INTERVAL: Duration = Duration::from_millis(500);

/// The sidecar of a command.
pub struct Sidecar {
    config: Config,
    address: SocketAddr,
    key: Key,
    host: Host,
}

/// The process that the sidecar is in.
enum Host {
    /// This process.
    ThisProcess(LocalServer),
    /// Another process. `None` if that offers no handover.
    OtherProcess(Option<HeldSockets>),
}

/// A sidecar in this process.
struct LocalServer {
    server: Arc<Server>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<bool>,
}

/// Why this process could not replace a sidecar that has ended.
#[derive(Debug, thiserror::Error)]
enum ReplaceError {
    #[error(transparent)]
    Handover(#[from] io::Error),
    #[error(transparent)]
    Startup(#[from] StartupError),
}

impl Sidecar {
    /// Joins the running sidecar selected by `config`. Starts one if none runs, or if the running one has another
    /// credential than the one that was set explicitly.
    pub async fn join_or_start(mut config: Config) -> Result<Self, RunError> {
        let _lock = lock(&config).await;
        match find(&config.selector()).await {
            Ok(found) => match joining::decide(found, &mut config).await? {
                Decision::Join(client, notes) => {
                    notes.iter().for_each(Note::print);
                    let (address, key) = (client.address(), client.key().clone());
                    let sockets = held_sockets(&config, address.port()).await;
                    if let Err(reason) = &sockets {
                        warn!(
                            "the command goes through the sidecar at {address}, and has none when that ends: {reason}"
                        );
                    }
                    return Ok(Self { config, address, key, host: Host::OtherProcess(sockets.ok()) });
                }
                Decision::StartOwn(_, notes) => {
                    notes.iter().for_each(Note::print);
                    config.is_announced = false;
                }
            },
            Err(NotFound::NotRunning(_)) => {}
            Err(unresponsive) => return Err(unresponsive.into()),
        }
        if let Some(note) = config.project_note() {
            terminal::note(&note);
        }
        let key = config.instance_key.get_or_insert(Key::random().map_err(StartupError::Key)?).clone();
        Ok(Self::start(config, key).await?)
    }

    /// Starts one for this process only, on a port that is not announced, since it may end at any time. It refreshes no
    /// token and shows no notices.
    pub async fn start_alone(config: Config) -> Result<Self, StartupError> {
        let key = Key::random().map_err(StartupError::Key)?;
        let config = Config {
            port: 0,
            unix_socket: None,
            network: None,
            instance_key: Some(key.clone()),
            is_announced: false,
            refresh: RefreshMode::Off,
            desktop_notices: false,
            policy: Policy { require_key: true, ..config.policy },
            ..config
        };
        Self::start(config, key).await
    }

    async fn start(config: Config, key: Key) -> Result<Self, StartupError> {
        let app = App::bind(config.clone(), Clock::system()).await?;
        let address = app.addr();
        Ok(Self { config, address, key, host: Host::ThisProcess(LocalServer::start(app)) })
    }

    /// A client for it. A joined sidecar has proven its identity.
    pub fn client(&self) -> Client {
        Client::new(self.address, self.key.clone())
    }

    /// Whether it is in another process.
    pub fn is_joined(&self) -> bool {
        matches!(self.host, Host::OtherProcess(_))
    }

    /// Registers a run in this environment.
    pub async fn begin_run(&self, intercept: bool, environment: EnvLookup<'_>) -> Result<Run, ClientError> {
        let request = RunRequest::new(intercept, environment);
        match &self.host {
            Host::ThisProcess(local) => {
                let run = local.server.begin_run(&request).await;
                run.map_err(|e| Refusal::new(e.code.as_str(), e.message, *e.remedy).into())
            }
            Host::OtherProcess(_) => self.client().begin_run(&request).await,
        }
    }

    /// Replaces the joined sidecar if it ends, for as long as this is polled.
    pub async fn keep_available(&mut self) -> Infallible {
        let mut failures = 0;
        while let Host::OtherProcess(Some(sockets)) = &mut self.host {
            sockets.sidecar_ended().await;
            match self.replace().await {
                Ok(()) => failures = 0,
                Err(reason) => {
                    failures += 1;
                    if failures == 1 {
                        warn!("the sidecar at {} has ended, and none could take its place yet: {reason}", self.address);
                    }
                    tokio::time::sleep(REPLACE_INTERVAL).await;
                }
            }
        }
        std::future::pending().await
    }

    /// Joins the sidecar that has replaced the one that ended, or replaces it in this process.
    async fn replace(&mut self) -> Result<(), ReplaceError> {
        let _lock = lock(&self.config).await;
        let Host::OtherProcess(Some(sockets)) = &self.host else { return Ok(()) };
        let port = self.address.port();
        if let Ok(successor) = held_sockets(&self.config, port).await {
            self.host = Host::OtherProcess(Some(successor));
            return Ok(());
        }
        // The key is new, since the process is. Only a sidecar that was started for it listens on the network.
        let config = Config { port, instance_key: None, network: None, ..self.config.clone() };
        let app = App::take_over(config, Clock::system(), sockets.inherit()?).await?;
        info!("the sidecar at {} has ended, this process has taken its place", self.address);
        self.host = Host::ThisProcess(LocalServer::start(app));
        Ok(())
    }

    /// Stops the sidecar if it is in this process. Its requests in flight may finish, unless a signal arrives.
    pub async fn stop(self, signals: &mut Signals) {
        if let Host::ThisProcess(LocalServer { stop, ended, .. }) = self.host {
            drop(stop);
            tokio::select! {
                _ = ended => {}
                () = signals.end() => {}
            }
        }
    }
}

impl LocalServer {
    fn start(app: App) -> Self {
        let server = app.server().clone();
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(app.serve(async move {
            let _ = stopped.await;
        }));
        Self { server, stop, ended }
    }
}

/// Finds the sidecar at the port that was set or, if none runs there, the project's.
async fn find(selector: &Selector) -> Result<(Instance, Client), NotFound> {
    match client::find(selector).await {
        Err(NotFound::NotRunning(_)) if selector.port.is_some() => {
            client::find(&Selector { port: None, ..selector.clone() }).await
        }
        found => found,
    }
}

/// Ensures that of several commands started at once, the first starts a sidecar and the others find it. Without a lock,
/// each may start its own, which costs some additional requests to Connect.
async fn lock(config: &Config) -> Option<impl Drop + use<>> {
    private_dir::lock(config.state_dir.as_deref()?).await.ok()
}

/// The handover of the sidecar at this port.
async fn held_sockets(config: &Config, port: u16) -> io::Result<HeldSockets> {
    HeldSockets::request(config.state_dir.as_deref().ok_or(io::ErrorKind::NotFound)?, port).await
}
