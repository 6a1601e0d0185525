//! Requests of programs that can only be led here by their proxy settings: a port of its own that takes CONNECT from the
//! programs of a run, opens what goes to Vercel's hosts, and passes everything else on unread.
//!
//! What is opened is answered by the [`Server`], like any other request. Strangers, who do not know a run's secret, get
//! nothing; nobody gets to this machine. There is no port, and no CA, until the first run asks for a way in; the port
//! ends with the sidecar.

pub mod ca;
mod gate;
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

use crate::daemon::server::handover::Offer;
use crate::daemon::server::runs::{Asked, WayIn};
use crate::daemon::server::{self, Server, listener};
use crate::instance::key::Key;
use crate::os::clock::Clock;
use crate::os::env_proxy::EnvProxy;
use crate::proxy::error::RequestError;
use crate::proxy::resolver::Names;
use ca::Ca;
use gate::Gate;
use leaf::Leaves;
use tunnel::{Dialer, ProxiesOfRuns};

/// As many connections may be open.
const MAX_CONNECTIONS: usize = 512;
/// As many more are let in to be told that there are too many.
const SPARE_CONNECTIONS: usize = 16;
/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What interception needs. It does nothing before [`Interception::run`].
pub struct Interception {
    /// Answers what is opened.
    pub server: Arc<Server>,
    /// What the runs' secrets are made from.
    pub secret: Key,
    /// Where the addresses of names come from.
    pub names: Names,
    /// The proxy of our own environment.
    pub env_proxy: EnvProxy,
    /// The port of requests that need no interception: no tunnel leads there.
    pub plain_port: u16,
    /// Where to listen from the beginning, for programs that know the port from our predecessor. Otherwise any port will
    /// do, once it is asked for.
    pub listener: Option<TcpListener>,
    /// Whoever takes our place listens there, too.
    pub offer: Arc<Offer>,
    /// Where the CA is kept, if there is a place.
    pub state_dir: Option<PathBuf>,
    /// Where it must not be.
    pub project: PathBuf,
    /// The time.
    pub clock: Clock,
}

/// The port, once there is one.
struct Open {
    listener: TcpListener,
    port: u16,
    gate: Arc<Gate>,
}

impl Interception {
    /// Answers who asks for a way in, and serves those who come by it, for as long as it is polled. Once `stopping`, nobody
    /// else is let in. Whoever is being answered is waited for by `under_way`; a blind tunnel, whose end nobody knows, goes
    /// on until this is dropped.
    pub async fn run(mut self, mut asked: mpsc::Receiver<Asked>, stopping: CancellationToken, under_way: TaskTracker) {
        let mut open = None;
        let of_runs = Arc::new(ProxiesOfRuns::default());
        let mut connections = JoinSet::new();
        if self.listener.is_some()
            && let Err(reason) = self.open(&mut open, &of_runs).await
        {
            warn!("programs that go by their proxy settings cannot reach us: {reason}");
        }
        loop {
            tokio::select! {
                Some(asked) = asked.recv() => {
                    let way_in = match stopping.is_cancelled() {
                        true => Err("the sidecar is about to end".into()),
                        false => self.way_in(&mut open, &of_runs, &asked.run, asked.env_proxy).await,
                    };
                    // Who has gone meanwhile needs none.
                    let _ = asked.answer.send(way_in);
                }
                (gate, accepted) = accept(open.as_ref()), if connections.len() < MAX_CONNECTIONS + SPARE_CONNECTIONS => {
                    match accepted {
                        Ok((stream, from)) => {
                            let is_one_too_many = connections.len() >= MAX_CONNECTIONS;
                            if let Some(refusal) = self.judge(&stream, from, is_one_too_many) {
                                let _ = stream.set_nodelay(true);
                                connections.spawn(gate.serve(stream, refusal, under_way.clone()));
                            }
                        }
                        Err(error) => {
                            warn!("could not accept a connection: {error}");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
                Some(_) = connections.join_next() => {}
                // At once, for whoever takes our place.
                () = stopping.cancelled(), if open.is_some() => open = None,
            }
        }
    }

    /// What a connection's requests are all refused with, if they are; `None` if it is to be closed.
    fn judge(&self, stream: &TcpStream, from: SocketAddr, is_one_too_many: bool) -> Option<Option<RequestError>> {
        // Another user's is closed, too: to tell it why would keep a place from those who may come.
        self.server.judge(stream, from)?.ok()?;
        Some(is_one_too_many.then(server::overloaded))
    }

    async fn way_in(
        &mut self,
        open: &mut Option<Open>,
        of_runs: &Arc<ProxiesOfRuns>,
        run: &str,
        env_proxy: Option<EnvProxy>,
    ) -> Result<WayIn, String> {
        let (port, ca) = self.open(open, of_runs).await?;
        if let Some(env_proxy) = env_proxy {
            of_runs.remember(run, env_proxy, [self.plain_port, port]);
        }
        let secret = self.secret.run_secret(run);
        Ok(WayIn { proxy: format!("http://{run}:{secret}@127.0.0.1:{port}"), ca })
    }

    /// Opens the port, if it is not open yet, with a CA that lasts for a while; the port and the CA's certificate.
    async fn open(&mut self, open: &mut Option<Open>, of_runs: &Arc<ProxiesOfRuns>) -> Result<(u16, String), String> {
        let now = self.clock.local();
        if let Some(Open { port, gate, .. }) = open
            && !gate.leaves.ca().ends_soon(now)
        {
            return Ok((*port, gate.leaves.ca().pem().to_owned()));
        }
        let state_dir =
            self.state_dir.as_ref().ok_or("neither XDG_STATE_HOME nor HOME says where to keep a local CA")?;
        let domains = self.server.proxy().relay.hosts.names().map(str::to_owned).collect();
        let ca = Ca::ready(state_dir, &self.project, domains, now).await.map_err(|e| e.to_string())?;
        let pem = ca.pem().to_owned();
        let (listener, port) = match open.take() {
            Some(Open { listener, port, .. }) => (listener, port),
            None => {
                let could_not = |(address, e)| format!("could not listen on {address}: {e}");
                let address = (Ipv4Addr::LOCALHOST, 0).into();
                let listener = match self.listener.take() {
                    Some(listener) => listener,
                    None => {
                        let listener = listener::listen(address).map_err(could_not)?;
                        self.offer.add(&listener).map_err(|e| could_not((address, e)))?;
                        listener
                    }
                };
                let port = listener.local_addr().map_err(|e| could_not((address, e)))?.port();
                info!("intercepting on 127.0.0.1:{port} what the programs of a run send to Vercel");
                (listener, port)
            }
        };
        let gate = Gate {
            server: self.server.clone(),
            secret: self.secret.clone(),
            leaves: Leaves::new(ca, self.clock.clone()),
            dialer: Dialer {
                names: self.names.clone(),
                env_proxy: self.env_proxy.clone(),
                of_runs: of_runs.clone(),
                trust: self.server.proxy().upstream.dialer().clone(),
                our_ports: [self.plain_port, port],
            },
            tunnels: AtomicU64::default(),
            said_not_trusted: AtomicBool::default(),
        };
        *open = Some(Open { listener, port, gate: Arc::new(gate) });
        Ok((port, pem))
    }
}

/// The next connection, once there is a port, and what it comes through.
async fn accept(open: Option<&Open>) -> (Arc<Gate>, io::Result<(TcpStream, SocketAddr)>) {
    match open {
        Some(open) => (open.gate.clone(), open.listener.accept().await),
        None => pending().await,
    }
}
