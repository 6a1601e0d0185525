//! Interception for programs that can only be pointed at the sidecar by proxy settings. A port of its own accepts
//! CONNECT from the programs of a run, decrypts connections to Vercel's hosts, and forwards all others unread.
//!
//! The [`Server`] answers the decrypted requests like any others. Clients without a run's secret are refused, and no
//! tunnel leads to this machine. The port and the CA are created when the first run needs them. The port closes when
//! the sidecar ends.

pub mod ca;
mod connect_port;
mod leaf;
mod target;
mod tunnel;

use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::daemon::server::handover::SharedSockets;
use crate::daemon::server::runs::{InterceptionError, InterceptionRequest, RunProxy};
use crate::daemon::server::{self, Server, listener};
use crate::instance::key::Key;
use crate::os::clock::Clock;
use crate::os::env_proxy::EnvProxy;
use crate::proxy::resolver::Names;
use ca::{Ca, CaError};
use connect_port::ConnectHandler;
use leaf::LeafCertificates;
use tunnel::{RunProxies, TunnelDialer};

/// Most open connections.
const MAX_CONNECTIONS: usize = 512;
/// Connections accepted beyond the limit, to answer them with an error.
const SPARE_CONNECTIONS: usize = 16;
/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The dependencies of interception. Nothing happens before [`Interception::run`].
pub struct Interception {
    /// Answers decrypted requests.
    pub server: Arc<Server>,
    /// The secret from which the secrets of runs are derived.
    pub secret: Key,
    /// Resolves host names.
    pub names: Names,
    /// The proxy settings of the sidecar's own environment.
    pub env_proxy: EnvProxy,
    /// The sidecar's plain HTTP port, to which no tunnel may lead.
    pub plain_port: u16,
    /// A socket inherited from a predecessor, whose runs know its port. Without one, the first run opens any free port.
    pub listener: Option<TcpListener>,
    /// Shares the socket with possible successors.
    pub shared_sockets: Arc<SharedSockets>,
    /// The directory for the CA, if there is one.
    pub state_dir: Option<PathBuf>,
    /// The project directory, in which the CA must not be.
    pub project: PathBuf,
    /// The clock.
    pub clock: Clock,
}

/// Why interception could not be set up.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("neither XDG_STATE_HOME nor HOME says where to keep a local CA")]
    NoStateDir,
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("could not listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
}

/// The open interception port.
struct Port {
    listener: TcpListener,
    number: u16,
    handler: Arc<ConnectHandler>,
}

impl Interception {
    /// Admits runs and serves their programs until dropped. Once `stopping`, no new runs or connections are accepted.
    /// `under_way` tracks the decrypted connections; tunnels with no known end last until this is dropped.
    pub async fn run(
        mut self,
        mut requests: mpsc::Receiver<InterceptionRequest>,
        stopping: CancellationToken,
        under_way: TaskTracker,
    ) {
        let mut port = None;
        let run_proxies = Arc::new(RunProxies::default());
        let mut connections = JoinSet::new();
        if self.listener.is_some()
            && let Err(error) = self.open(&mut port, &run_proxies).await
        {
            warn!("programs that go by their proxy settings cannot reach us: {error}");
        }
        loop {
            tokio::select! {
                Some(request) = requests.recv() => {
                    let InterceptionRequest { run, env_proxy, reply } = request;
                    let run_proxy = match stopping.is_cancelled() {
                        true => Err(InterceptionError::Stopping),
                        false => self.admit_run(&mut port, &run_proxies, &run, env_proxy).await,
                    };
                    // Fails if the run is gone.
                    let _ = reply.send(run_proxy);
                }
                (handler, accepted) = accept(port.as_ref()),
                    if connections.len() < MAX_CONNECTIONS + SPARE_CONNECTIONS =>
                {
                    match accepted {
                        Ok((stream, from)) => {
                            // Connections of other users are closed unanswered: an answer would use a slot.
                            if self.server.is_allowed(&stream, from) {
                                let _ = stream.set_nodelay(true);
                                let refusal = (connections.len() >= MAX_CONNECTIONS).then(server::overloaded);
                                connections.spawn(handler.serve(stream, refusal, under_way.clone()));
                            }
                        }
                        Err(error) => {
                            warn!("could not accept a connection: {error}");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
                Some(_) = connections.join_next() => {}
                // Immediately, so that a successor can accept.
                () = stopping.cancelled(), if port.is_some() => port = None,
            }
        }
    }

    async fn admit_run(
        &mut self,
        port: &mut Option<Port>,
        run_proxies: &Arc<RunProxies>,
        run: &str,
        env_proxy: Option<EnvProxy>,
    ) -> Result<RunProxy, InterceptionError> {
        let setup = self.open(port, run_proxies).await;
        let (number, ca) = setup.map_err(|error| InterceptionError::Setup(error.into()))?;
        if let Some(env_proxy) = env_proxy {
            run_proxies.insert(run, env_proxy, [self.plain_port, number]);
        }
        let secret = self.secret.run_secret(run);
        Ok(RunProxy { url: format!("http://{run}:{secret}@127.0.0.1:{number}"), ca })
    }

    /// Opens the port if it is closed, and renews the CA if it expires soon. Returns the port and the CA certificate,
    /// PEM.
    async fn open(
        &mut self,
        port: &mut Option<Port>,
        run_proxies: &Arc<RunProxies>,
    ) -> Result<(u16, String), SetupError> {
        let now = self.clock.local();
        if let Some(Port { number, handler, .. }) = port
            && !handler.certificates.ca().expires_soon(now)
        {
            return Ok((*number, handler.certificates.ca().pem().to_owned()));
        }
        let state_dir = self.state_dir.as_ref().ok_or(SetupError::NoStateDir)?;
        let domains = self.server.proxy().relay.hosts.names().map(str::to_owned).collect();
        let ca = Ca::load_or_create(state_dir, &self.project, domains, now).await?;
        let pem = ca.pem().to_owned();
        let (listener, number) = match port.take() {
            Some(Port { listener, number, .. }) => (listener, number),
            None => self.listen()?,
        };
        let handler = ConnectHandler {
            server: self.server.clone(),
            secret: self.secret.clone(),
            certificates: LeafCertificates::new(ca, self.clock.clone()),
            dialer: TunnelDialer {
                names: self.names.clone(),
                env_proxy: self.env_proxy.clone(),
                run_proxies: run_proxies.clone(),
                proxy_trust: self.server.proxy().upstream.dialer().clone(),
                own_ports: [self.plain_port, number],
            },
            unnamed_clients: AtomicU64::default(),
            warned_of_untrusted_ca: AtomicBool::default(),
        };
        *port = Some(Port { listener, number, handler: Arc::new(handler) });
        Ok((number, pem))
    }

    fn listen(&mut self) -> Result<(TcpListener, u16), SetupError> {
        let failed = |(address, source)| SetupError::Listen { address, source };
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let listener = match self.listener.take() {
            Some(listener) => listener,
            None => {
                let listener = listener::listen(address).map_err(failed)?;
                self.shared_sockets.add(&listener).map_err(|e| failed((address, e)))?;
                listener
            }
        };
        let number = listener.local_addr().map_err(|e| failed((address, e)))?.port();
        info!("intercepting on 127.0.0.1:{number} what the programs of a run send to Vercel");
        Ok((listener, number))
    }
}

/// Accepts the next connection; pending while there is no port.
async fn accept(port: Option<&Port>) -> (Arc<ConnectHandler>, io::Result<(TcpStream, SocketAddr)>) {
    match port {
        Some(port) => (port.handler.clone(), port.listener.accept().await),
        None => pending().await,
    }
}
