//! The sidecar that a command goes through: the project's running one, or else one in this process.
//!
//! A command never loses its sidecar: if the one that was joined ends, one in this process takes over its port and its
//! key. Of several commands that lose theirs at once, one takes over and the others join it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::child::Signals;
use crate::app::{App, StartupError};
use crate::client::{Client, State};
use crate::clock::Clock;
use crate::config::{Config, Refresh};
use crate::instance_key::Key;
use crate::private_dir;
use crate::proxy::guard::Policy;
use crate::status::instance;

/// Time between two looks at whether the joined instance is still there.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The sidecar of a command.
pub struct Sidecar {
    config: Config,
    address: SocketAddr,
    key: Key,
    serving: Option<Serving>,
}

/// A sidecar in this process.
struct Serving {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<bool>,
}

impl Sidecar {
    /// Joins the project's running sidecar if it is as `config` would have it; else starts one.
    pub async fn join_or_start(mut config: Config) -> Result<Self, StartupError> {
        let _alone = lock(&config).await;
        if let Some(client) = find(&config).await {
            return Ok(Self { config, address: client.address(), key: client.key().clone(), serving: None });
        }
        let key = config.instance_key.get_or_insert(Key::random().map_err(StartupError::Key)?).clone();
        let (address, serving) = start(config.clone()).await?;
        Ok(Self { config, address, key, serving: Some(serving) })
    }

    /// Starts one for this process alone, at a port that nobody else is told: it may end at any time, so nobody is to
    /// count on it. It refreshes nothing and gives no notices: who asks one thing is told of its answer.
    pub async fn start_alone(config: Config) -> Result<Self, StartupError> {
        let key = Key::random().map_err(StartupError::Key)?;
        let config = Config {
            port: 0,
            unix_socket: None,
            network: None,
            instance_key: Some(key.clone()),
            is_announced: false,
            refresh: Refresh::Off,
            desktop_notices: false,
            policy: Policy { require_key: true, ..config.policy },
            ..config
        };
        let (address, serving) = start(config.clone()).await?;
        Ok(Self { config, address, key, serving: Some(serving) })
    }

    /// A way to it. Whoever was joined has proven who it is.
    pub fn client(&self) -> Client {
        Client::new(self.address, self.key.clone())
    }

    /// Sees to it that it is there, for as long as it is polled. `proxy` is the port where the command is intercepted, if
    /// it is.
    pub async fn keep(&mut self, proxy: Option<u16>) -> Infallible {
        let mut failures = 0;
        while self.serving.is_none() {
            tokio::time::sleep(LOOK_EVERY).await;
            if self.is_there() {
                continue;
            }
            match self.take_over(proxy).await {
                Ok(()) => failures = 0,
                Err(reason) => {
                    failures += 1;
                    // The first time, it may not have let go of its port yet.
                    if failures == 2 {
                        warn!("the sidecar at {} has ended, and none could take its place yet: {reason}", self.address);
                    }
                }
            }
        }
        std::future::pending().await
    }

    /// Whether the instance that was joined, or one that has taken over from it, is there.
    fn is_there(&self) -> bool {
        let now = self.config.state_dir.as_deref().and_then(|dir| instance::of_port(dir, self.address.port()));
        now.is_some_and(|now| self.key.is(now.key.as_bytes()) && now.is_running())
    }

    async fn take_over(&mut self, proxy: Option<u16>) -> Result<(), String> {
        let _alone = lock(&self.config).await;
        if !self.is_there() {
            let config = Config {
                port: self.address.port(),
                instance_key: Some(self.key.clone()),
                interception_port: proxy,
                ..self.config.clone()
            };
            let (_, serving) = start(config).await.map_err(|e| e.to_string())?;
            info!("the sidecar at {} has ended, this process has taken its place", self.address);
            self.serving = Some(serving);
        }
        Ok(())
    }

    /// Ends the one in this process, if it is: lets what is under way for others finish, unless a signal comes.
    pub async fn end(self, signals: &mut Signals) {
        if let Some(Serving { stop, ended }) = self.serving {
            drop(stop);
            tokio::select! {
                _ = ended => {}
                () = signals.end() => {}
            }
        }
    }
}

/// A way to the project's running sidecar that is as `config` would have it.
pub async fn find(config: &Config) -> Option<Client> {
    for instance in instance::all(config.state_dir.as_deref()?) {
        if instance.project != config.project || !instance.is_running() {
            continue;
        }
        let Some(client) = Client::to(&instance).await else { continue };
        let is_wanted = |state: State| {
            state.upstream.url == config.upstream.name() && state.oidc.configured_source == config.auth.name()
        };
        if client.state().await.is_ok_and(is_wanted) {
            return Some(client);
        }
    }
    None
}

/// Of several commands that look for a sidecar at once, the first starts it and the others find it. Where there is no
/// lock to be had, two may start one each, which costs no more than a request.
async fn lock(config: &Config) -> Option<impl Drop + use<>> {
    private_dir::lock(config.state_dir.as_deref()?).await.ok()
}

async fn start(config: Config) -> Result<(SocketAddr, Serving), StartupError> {
    let app = App::bind(config, Clock::system()).await?;
    let address = app.addr();
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(app.serve(async move {
        let _ = stopped.await;
    }));
    Ok((address, Serving { stop, ended }))
}
