//! A stand-in for Vercel Connect on loopback: what `demo` and the tests talk to instead of the real one.
//!
//! It is honest where it matters: it signs development OIDC tokens with a key of its own and verifies them as any
//! relying party would, it knows teams, projects, connectors, links, installations and grants as data ([`world`]), and
//! refuses with the statuses and codes of connect-contract.md section 2.2. It can be told to misbehave ([`fault`]). It
//! shares no code with `proxy` and `identity`, so that a mistake there cannot hide here.

mod account;
mod admin;
pub mod connect;
pub mod fault;
mod ids;
pub mod oidc;
mod wire;
pub mod world;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use connect::{Asked, Given};
use fault::{Fault, Gate};
use oidc::{Issuer, Subject};
use world::World;

/// The time as the emulator sees it.
pub type Now = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How to start an emulator.
pub struct Options {
    /// 0 for any free port.
    pub port: u16,
    /// Speak TLS, with a certificate of a CA made for this emulator.
    pub tls: bool,
    /// Who and what there is.
    pub world: World,
    /// Its clock.
    pub now: Now,
}

impl Default for Options {
    fn default() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the emulator is another machine, with a clock of its own")]
        let now = Arc::new(SystemTime::now);
        Self { port: 0, tls: false, world: World::demo(), now }
    }
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// Method.
    pub method: Method,
    /// The raw request target.
    pub target: String,
    /// Headers, in the order they came.
    pub headers: HeaderMap,
    /// The raw body.
    pub body: Bytes,
    /// What was answered, once it is decided.
    pub answered: Option<StatusCode>,
}

/// A running emulator. It stops when this is dropped.
pub struct Emulator {
    addr: SocketAddr,
    ca_pem: Option<String>,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

/// What all connections share.
struct Shared {
    world: Mutex<World>,
    issuer: Arc<Issuer>,
    now: Now,
    received: watch::Sender<Vec<Received>>,
    faults: Mutex<Vec<Fault>>,
}

impl Emulator {
    /// Starts one on loopback.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", options.port)).await?;
        let addr = listener.local_addr()?;
        let (acceptor, ca_pem) = match options.tls {
            true => wire::tls_acceptor().map(|(acceptor, pem)| (Some(acceptor), Some(pem)))?,
            false => (None, None),
        };
        // Making the key takes a moment of pure computing.
        let issuer = tokio::task::spawn_blocking(Issuer::of_this_process)
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        let shared = Arc::new(Shared {
            world: Mutex::new(options.world),
            issuer,
            now: options.now,
            received: watch::Sender::new(Vec::new()),
            faults: Mutex::new(Vec::new()),
        });
        let stop = CancellationToken::new();
        let serving = wire::serve(listener, acceptor, shared.clone(), stop.clone());
        tokio::spawn(serving);
        Ok(Self { addr, ca_pem, shared, _stop: stop.drop_guard() })
    }

    /// Its origin, for `--upstream`.
    pub fn url(&self) -> String {
        let scheme = if self.ca_pem.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The certificate of its CA, if it speaks TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// A development OIDC token of the world's first project and user, as `vercel env pull` would bring.
    pub fn oidc_token(&self, life: Duration) -> String {
        let subject = Subject::development(&self.shared.world());
        self.oidc_token_for(&subject, life)
    }

    /// An OIDC token for anybody, issued now.
    pub fn oidc_token_for(&self, subject: &Subject, life: Duration) -> String {
        self.shared.issuer.issue(subject, (self.shared.now)(), life)
    }

    /// An env file as `vercel env pull` would have written it `ago`, with a token that has so much life `left` now.
    pub fn env_file(&self, ago: Duration, left: Duration) -> String {
        self.shared.env_file(ago, left)
    }

    /// Changes who and what there is.
    pub fn change(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.shared.world());
    }

    /// Makes the next request that the fault concerns go wrong.
    pub fn inject(&self, fault: Fault) {
        self.shared.faults().push(fault);
    }

    /// Holds back answers from now on until the gate is opened: requests are received and decided, not answered.
    pub fn gate(&self) -> Gate {
        let gate = Gate::default();
        self.inject(Fault::held_by(gate.clone()));
        gate
    }

    /// All requests so far, in the order of their arrival.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// How many requests there were for a path that contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.shared.received.borrow().iter().filter(|request| request.target.contains(part)).count()
    }

    /// Returns once there were `count` requests.
    pub async fn wait_for_requests(&self, count: usize) {
        let mut received = self.shared.received.subscribe();
        // The sender lives as long as `self`.
        let _ = received.wait_for(|received| received.len() >= count).await;
    }
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides a request, as Vercel would.
    fn decide(&self, asked: &Asked<'_>) -> Given {
        let (mut world, now) = (self.world(), (self.now)());
        account::decide(&world, &self.issuer, now, asked)
            .unwrap_or_else(|| connect::decide(&mut world, &self.issuer, now, asked))
    }

    fn env_file(&self, ago: Duration, left: Duration) -> String {
        let subject = Subject::development(&self.world());
        admin::env_file(&self.issuer.issue(&subject, (self.now)() - ago, ago + left))
    }

    /// Takes the next fault that concerns a request.
    fn next_fault(&self, target: &str) -> Option<Fault> {
        let mut faults = self.faults();
        let at = faults.iter().position(|fault| fault.concerns(target))?;
        if faults[at].use_up() { Some(faults.remove(at)) } else { Some(faults[at].clone()) }
    }
}
