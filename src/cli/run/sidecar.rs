//! The sidecar that a command goes through: the project's running one, or else one in this process.
//!
//! A command never loses its sidecar: if the one that was joined ends, one in this process takes its place
//! ([`handover`]), which the command holds from the start. Of several commands that lose theirs at once, one takes over and
//! the others join it.
//!
//! [`handover`]: crate::daemon::server::handover

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::RunError;
use super::child::Signals;
use super::joining::{self, Joined, Note};
use crate::config::{Config, Refresh};
use crate::daemon::app::{App, StartupError};
use crate::daemon::server::handover::HeldSockets;
use crate::instance::Selector;
use crate::instance::client::{self, Client, NotFound};
use crate::instance::key::Key;
use crate::instance::state_file::Instance;
use crate::os::clock::Clock;
use crate::os::private_dir;
use crate::os::terminal;
use crate::proxy::guard::Policy;

/// Time between two attempts to take the place of a sidecar that has ended.
const ATTEMPT_EVERY: Duration = Duration::from_millis(500);

/// The sidecar of a command.
pub struct Sidecar {
    config: Config,
    address: SocketAddr,
    key: Key,
    way: Way,
}

/// Who serves.
enum Way {
    /// This process.
    Here(Serving),
    /// Another, whose place is held; not that of one which gives none.
    Joined(Option<HeldSockets>),
}

/// A sidecar in this process.
struct Serving {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<bool>,
}

impl Sidecar {
    /// Joins the running sidecar that is meant; starts one if none runs, or none by the credential that was named.
    pub async fn join_or_start(mut config: Config) -> Result<Self, RunError> {
        let _alone = lock(&config).await;
        match find(&config.wanted()).await {
            Ok(found) => match joining::join(found, &mut config).await?? {
                Joined::Through(client, notes) => {
                    notes.iter().for_each(Note::tell);
                    let (address, key) = (client.address(), client.key().clone());
                    let place = place_of(&config, address.port()).await;
                    if let Err(reason) = &place {
                        warn!(
                            "the command goes through the sidecar at {address}, and has none when that ends: {reason}"
                        );
                    }
                    return Ok(Self { config, address, key, way: Way::Joined(place.ok()) });
                }
                Joined::OtherCredential(_, notes) => {
                    notes.iter().for_each(Note::tell);
                    config.is_announced = false;
                }
            },
            Err(NotFound::NotRunning(_)) => {}
            Err(silent) => return Err(silent.into()),
        }
        if let Some(note) = config.project_note() {
            terminal::note(&note);
        }
        let key = config.instance_key.get_or_insert(Key::random().map_err(StartupError::Key)?).clone();
        let (address, serving) = serve(App::bind(config.clone(), Clock::system()).await?);
        Ok(Self { config, address, key, way: Way::Here(serving) })
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
        let (address, serving) = serve(App::bind(config.clone(), Clock::system()).await?);
        Ok(Self { config, address, key, way: Way::Here(serving) })
    }

    /// A way to it. Whoever was joined has proven who it is.
    pub fn client(&self) -> Client {
        Client::new(self.address, self.key.clone())
    }

    /// Whether it is in another process.
    pub fn is_joined(&self) -> bool {
        matches!(self.way, Way::Joined(_))
    }

    /// Sees to it that it is there, for as long as it is polled.
    pub async fn keep(&mut self) -> Infallible {
        let mut failures = 0;
        while let Way::Joined(Some(place)) = &mut self.way {
            place.sidecar_ended().await;
            match self.replace().await {
                Ok(()) => failures = 0,
                Err(reason) => {
                    failures += 1;
                    if failures == 1 {
                        warn!("the sidecar at {} has ended, and none could take its place yet: {reason}", self.address);
                    }
                    tokio::time::sleep(ATTEMPT_EVERY).await;
                }
            }
        }
        std::future::pending().await
    }

    /// Joins whoever has taken the place of the one that has ended, or takes it.
    async fn replace(&mut self) -> Result<(), String> {
        let _alone = lock(&self.config).await;
        let Way::Joined(Some(place)) = &self.way else { return Ok(()) };
        let port = self.address.port();
        if let Ok(successor) = place_of(&self.config, port).await {
            self.way = Way::Joined(Some(successor));
            return Ok(());
        }
        // Another process, another key. In the network only who was told so listens.
        let config = Config { port, instance_key: None, network: None, ..self.config.clone() };
        let taken = place.inherit().map_err(|e| e.to_string())?;
        let app = App::take_over(config, Clock::system(), taken).await.map_err(|e| e.to_string())?;
        info!("the sidecar at {} has ended, this process has taken its place", self.address);
        self.way = Way::Here(serve(app).1);
        Ok(())
    }

    /// Ends the one in this process, if it is: lets what is under way for others finish, unless a signal comes.
    pub async fn end(self, signals: &mut Signals) {
        if let Way::Here(Serving { stop, ended }) = self.way {
            drop(stop);
            tokio::select! {
                _ = ended => {}
                () = signals.end() => {}
            }
        }
    }
}

/// The sidecar at the port that was named or, if none runs there, the project's: there one could be started at that port.
async fn find(wanted: &Selector) -> Result<(Instance, Client), NotFound> {
    match client::find(wanted).await {
        Err(NotFound::NotRunning(_)) if wanted.port.is_some() => {
            client::find(&Selector { port: None, ..wanted.clone() }).await
        }
        found => found,
    }
}

/// Of several commands that look for a sidecar at once, the first starts it and the others find it. Where there is no
/// lock to be had, two may start one each, which costs no more than a request.
async fn lock(config: &Config) -> Option<impl Drop + use<>> {
    private_dir::lock(config.state_dir.as_deref()?).await.ok()
}

/// The place of the sidecar at this port.
async fn place_of(config: &Config, port: u16) -> io::Result<HeldSockets> {
    HeldSockets::request(config.state_dir.as_deref().ok_or(io::ErrorKind::NotFound)?, port).await
}

fn serve(app: App) -> (SocketAddr, Serving) {
    let address = app.addr();
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(app.serve(async move {
        let _ = stopped.await;
    }));
    (address, Serving { stop, ended })
}
