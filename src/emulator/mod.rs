//! A stand-in for Vercel Connect on loopback: what `demo` and the tests talk to instead of the real one.
//!
//! It is honest where it matters: it signs development OIDC tokens with a key of its own and verifies them as any
//! relying party would, it knows teams, projects, connectors, links, installations and grants as data ([`world`]), and
//! refuses with the statuses and codes of docs/vercel.md section 2.2. It can be told to misbehave ([`fault`]). It
//! shares no code with `proxy` and `identity`, so that a mistake there cannot hide here; whose connection it has is told
//! by [`server::peer`](crate::os::peer) for both.

mod account;
mod admin;
pub mod caller;
mod connect;
mod consent;
pub mod errors;
pub mod exchange;
pub mod fault;
pub mod flow;
pub mod flows;
mod gate;
mod ids;
pub mod keys;
pub mod limits;
mod manage;
pub mod oidc;
mod openapi;
pub mod outside;
mod pages;
pub mod provider;
pub mod seed;
pub mod standin;
pub mod state;
mod wire;
pub mod world;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use caller::Caller;
use errors::{Kind, Refusal};
use exchange::{Asked, Given};
use fault::{Effect, Fault, Gate, Script};
use limits::{Class, Counts};
use oidc::{Issuer, Subject};
use outside::Outside;
use provider::Providers;
use standin::Standins;
use state::{Kept, State};
use world::{Permission, World};

/// The time as the emulator sees it.
pub type Now = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How to start an emulator.
pub struct Options {
    /// 0 for any free port.
    pub port: u16,
    /// Speak TLS, with a certificate of a CA made for this emulator.
    pub tls: bool,
    /// Who and what there is, unless `state` says so.
    pub world: World,
    /// What it may use from outside of itself.
    pub outside: Outside,
    /// The file that keeps the state across restarts.
    pub state: Option<PathBuf>,
    /// How many of the last requests are remembered.
    pub remember: usize,
    /// Whether a provider's token is handed out again while it lasts, as Connect does; a new one each time if not.
    pub reuse_tokens: bool,
    /// Its clock.
    pub now: Now,
}

impl Default for Options {
    fn default() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the emulator is another machine, with a clock of its own")]
        let now = Arc::new(SystemTime::now);
        Self {
            port: 0,
            tls: false,
            world: World::demo(),
            outside: Outside::default(),
            state: None,
            remember: usize::MAX,
            reuse_tokens: true,
            now,
        }
    }
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// How many came before it.
    pub number: usize,
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
    state: State,
    issuer: Arc<Issuer>,
    /// Where it is, for the addresses of its own pages.
    origin: String,
    providers: Providers,
    clock: Now,
    /// How many seconds the clock is off.
    skew: Arc<AtomicI64>,
    counts: Mutex<Counts>,
    received: watch::Sender<Vec<Received>>,
    remember: usize,
    faults: Mutex<Vec<Fault>>,
}

impl Emulator {
    /// Starts one on loopback. An error of the kind `InvalidData` is about the file of the state.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", options.port)).await?;
        let addr = listener.local_addr()?;
        let (acceptor, ca_pem) = match options.tls {
            true => wire::tls_acceptor().map(|(acceptor, pem)| (Some(acceptor), Some(pem)))?,
            false => (None, None),
        };
        let restored =
            options.state.as_deref().map(|path| state::restore(path, &options.outside)).transpose()?.flatten();
        let (kept, key) = match restored {
            Some(restored) => (restored.kept, Some(restored.issuer)),
            None => (Kept { world: options.world.clone(), pending: Vec::new() }, None),
        };
        // Making a key takes a moment of pure computing.
        let issuer = tokio::task::spawn_blocking(move || match key {
            Some(key) => Issuer::with_key(key).map(Arc::new),
            None => Issuer::of_this_process(),
        });
        let issuer = issuer.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        let scheme = if ca_pem.is_some() { "https" } else { "http" };
        let skew = Arc::new(AtomicI64::new(0));
        let clock = skewed(options.now, skew.clone());
        let origin = format!("{scheme}://{addr}");
        let shared = Arc::new(Shared {
            providers: Providers::start(
                clock.clone(),
                format!("{origin}/connect/callback"),
                options.reuse_tokens,
                options.outside,
            )
            .await?,
            state: State::new(kept, options.state, &issuer),
            issuer,
            origin,
            clock,
            skew,
            counts: Mutex::default(),
            received: watch::Sender::new(Vec::new()),
            remember: options.remember,
            faults: Mutex::default(),
        });
        shared.state.saved().await?;
        for script in &options.world.faults {
            shared.script(script).map_err(io::Error::other)?;
        }
        let stop = CancellationToken::new();
        let serving = wire::serve(listener, acceptor, shared.clone(), stop.clone());
        tokio::spawn(serving);
        Ok(Self { addr, ca_pem, shared, _stop: stop.drop_guard() })
    }

    /// Its origin, for `--upstream`.
    pub fn url(&self) -> String {
        self.shared.origin.clone()
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The certificate of its CA, if it speaks TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// A development OIDC token of the world's first project and member, as `vercel env pull` would bring.
    pub fn oidc_token(&self, life: Duration) -> String {
        let subject = self.read(Subject::development);
        self.oidc_token_for(&subject, life)
    }

    /// An OIDC token for anybody, issued now.
    pub fn oidc_token_for(&self, subject: &Subject, life: Duration) -> String {
        self.shared.issuer.issue(subject, self.shared.now(), life)
    }

    /// An env file as `vercel env pull` would have written it `ago`, with a token that has so much life `left` now.
    pub fn env_file(&self, ago: Duration, left: Duration) -> String {
        let subject = self.read(Subject::development);
        admin::env_file(&self.shared.issuer.issue(&subject, self.shared.now() - ago, ago + left))
    }

    /// Looks up who and what there is.
    pub fn read<T>(&self, read: impl FnOnce(&World) -> T) -> T {
        self.shared.state.read(|kept| read(&kept.world))
    }

    /// Changes who and what there is.
    pub fn change(&self, change: impl FnOnce(&mut World)) {
        self.shared.state.change(|kept| change(&mut kept.world));
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

    /// The providers that it asks unless a connector names another.
    pub fn standins(&self) -> &Standins {
        self.shared.providers.standins()
    }

    /// All requests that are remembered, in the order of their arrival.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// How many of them there were for a path that contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.shared.received.borrow().iter().filter(|request| request.target.contains(part)).count()
    }

    /// Returns once there were `count` requests.
    pub async fn wait_for_requests(&self, count: usize) {
        let mut received = self.shared.received.subscribe();
        // The sender lives as long as `self`.
        let _ = received.wait_for(|received| received.last().map_or(0, |last| last.number + 1) >= count).await;
    }
}

/// A clock that is off by some seconds.
fn skewed(clock: Now, skew: Arc<AtomicI64>) -> Now {
    Arc::new(move || {
        let (now, skew) = (clock(), skew.load(Ordering::Relaxed));
        let by = Duration::from_secs(skew.unsigned_abs());
        let skewed = if skew < 0 { now.checked_sub(by) } else { now.checked_add(by) };
        skewed.unwrap_or(now)
    })
}

impl Shared {
    fn now(&self) -> SystemTime {
        (self.clock)()
    }

    fn faults(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a request; its number.
    fn receive(&self, asked: &Asked) -> usize {
        let mut number = 0;
        self.received.send_modify(|received| {
            number = received.last().map_or(0, |last| last.number + 1);
            if received.len() >= self.remember {
                received.remove(0);
            }
            received.push(Received {
                number,
                method: asked.method.clone(),
                target: asked.target.clone(),
                headers: asked.headers.clone(),
                body: asked.body.clone(),
                answered: None,
            });
        });
        number
    }

    fn answered(&self, number: usize, status: StatusCode) {
        self.received.send_modify(|received| {
            if let Some(request) = received.iter_mut().rfind(|request| request.number == number) {
                request.answered = Some(status);
            }
        });
    }

    /// Decides a request, as Vercel would.
    async fn decide(&self, asked: &Asked) -> Given {
        let given = if openapi::has(asked) { self.dispatch(asked).await } else { None };
        given.unwrap_or_else(|| Refusal::new(Kind::NotFound).into())
    }

    /// The answer of the part that a request is for, if it is for one.
    async fn dispatch(&self, asked: &Asked) -> Option<Given> {
        if let Some(given) = consent::decide(self, asked).await {
            return Some(given);
        }
        let decided = connect::decide(self, asked).await;
        let decided = decided.or_else(|| manage::decide(self, asked)).or_else(|| account::decide(self, asked));
        decided.map(|decided| decided.unwrap_or_else(Given::from))
    }

    fn authenticate(&self, asked: &Asked) -> Result<Caller, Refusal> {
        self.state.read(|kept| Caller::authenticate(&kept.world, &self.issuer, self.now(), asked))
    }

    /// Who asks, if they may ask for something of this kind, and not too often.
    fn caller(&self, asked: &Asked, class: Class, permission: Permission) -> Result<Caller, Refusal> {
        let caller = self.authenticate(asked)?;
        let limits = self.state.read(|kept| {
            caller.is_in_team(&kept.world, asked)?;
            caller.may(&kept.world, permission).map(|()| kept.world.limits)
        })?;
        if let Some(limits) = limits {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.count(class, limits, self.now()).map_err(|left| {
                let limit = if class == Class::Read { limits.reads } else { limits.writes };
                let mut refusal = Refusal::about(Kind::RateLimited, limit.to_string());
                refusal.retry_after = limits.retry_after.then(|| left.as_secs() + 1);
                refusal
            })?;
        }
        Ok(caller)
    }

    /// Does what a script says; or says what is wrong with it.
    fn script(&self, script: &Script) -> Result<(), String> {
        match script.effect()? {
            Effect::Fault(fault) => self.faults().push(fault),
            Effect::Skew(seconds) => self.skew.store(seconds, Ordering::Relaxed),
        }
        Ok(())
    }

    /// Nothing goes wrong any more.
    fn clear_faults(&self) {
        self.faults().clear();
        self.skew.store(0, Ordering::Relaxed);
    }

    /// Takes the next fault that concerns a request.
    fn next_fault(&self, target: &str) -> Option<Fault> {
        let mut faults = self.faults();
        let at = faults.iter().position(|fault| fault.concerns(target))?;
        if faults[at].use_up() { Some(faults.remove(at)) } else { Some(faults[at].clone()) }
    }
}
