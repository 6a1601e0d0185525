//! An emulator of Vercel Connect on loopback, for `demo`, `emulate` and the tests.
//!
//! It signs development OIDC tokens with its own key and verifies them as any relying party would; it keeps teams,
//! projects, connectors, links, installations and grants as data ([`world`]); and it refuses requests with the statuses
//! and codes of docs/vercel.md section 2.2. Faults can be injected ([`fault`]). It shares no code with the proxy and
//! the credential, so that a mistake there cannot be repeated here.
//!
//! A request passes [`access`] and then goes to the first API that knows its route: `admin_api`, `consent_pages`,
//! `runtime_api`, `management_api`, `account_api`. Tokens come from [`provider_client`], which talks to providers:
//! those in [`mock_providers`], or real ones.

mod access;
mod account_api;
mod admin_api;
pub mod allowlist;
pub mod caller;
mod consent_pages;
pub mod errors;
pub mod fault;
pub mod flow;
pub mod flows;
mod ids;
pub mod keys;
pub mod limits;
mod management_api;
pub mod message;
pub mod mock_providers;
pub mod oidc;
mod openapi;
mod pages;
pub mod provider_client;
pub mod provider_kind;
mod runtime_api;
pub mod seed;
mod server;
pub mod state;
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

use allowlist::Allowlist;
use caller::Caller;
use errors::{Kind, Refusal};
use fault::{AnswerHold, Effect, Fault, FaultScript, ScriptError};
use limits::{Class, Counts};
use message::{Request, Response};
use mock_providers::MockProviders;
use oidc::{Issuer, Subject};
use provider_client::ProviderClient;
use state::{Contents, Store};
use world::{Permission, World};

/// Returns the emulator's current time.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How to start an emulator.
pub struct Options {
    /// The port; 0 picks a free one.
    pub port: u16,
    /// Whether to serve TLS, with a certificate from a CA created for this emulator.
    pub tls: bool,
    /// The initial data, unless the file `state` exists.
    pub world: World,
    /// Environment variables and remote issuers that connectors may use.
    pub allowlist: Allowlist,
    /// The file that keeps the data across restarts.
    pub state: Option<PathBuf>,
    /// The number of most recent requests to keep.
    pub remember: usize,
    /// Whether to return a provider's token again while it is valid, as Connect does, instead of a new one each time.
    pub reuse_tokens: bool,
    /// The clock.
    pub now: Clock,
}

impl Default for Options {
    fn default() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the emulator is another machine, with a clock of its own")]
        let now = Arc::new(SystemTime::now);
        Self {
            port: 0,
            tls: false,
            world: World::demo(),
            allowlist: Allowlist::default(),
            state: None,
            remember: usize::MAX,
            reuse_tokens: true,
            now,
        }
    }
}

/// A request that the emulator received.
#[derive(Debug, Clone)]
pub struct ReceivedRequest {
    /// Sequence number, from 0.
    pub number: usize,
    /// The method.
    pub method: Method,
    /// The request target as sent.
    pub target: String,
    /// The headers, in order.
    pub headers: HeaderMap,
    /// The body as sent.
    pub body: Bytes,
    /// The status of the response, once there is one.
    pub answered: Option<StatusCode>,
}

/// A running emulator. Dropping it stops the server.
pub struct Emulator {
    addr: SocketAddr,
    ca_pem: Option<String>,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

/// What all connections share.
struct Shared {
    store: Store,
    issuer: Arc<Issuer>,
    /// The emulator's own origin.
    origin: String,
    providers: ProviderClient,
    clock: Clock,
    /// The offset of the clock, in seconds.
    skew: Arc<AtomicI64>,
    counts: Mutex<Counts>,
    received: watch::Sender<Vec<ReceivedRequest>>,
    remember: usize,
    faults: Mutex<Vec<Fault>>,
}

impl Emulator {
    /// Starts an emulator on 127.0.0.1. An error of kind `InvalidData` means that the state file is not usable.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", options.port)).await?;
        let addr = listener.local_addr()?;
        let (acceptor, ca_pem) = match options.tls {
            true => server::tls_acceptor().map(|(acceptor, pem)| (Some(acceptor), Some(pem)))?,
            false => (None, None),
        };
        let restored =
            options.state.as_deref().map(|path| state::restore(path, &options.allowlist)).transpose()?.flatten();
        let (contents, key) = match restored {
            Some(restored) => (restored.contents, Some(restored.issuer)),
            None => (Contents { world: options.world.clone(), pending: Vec::new() }, None),
        };
        // Generating a key is CPU-bound.
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
            providers: ProviderClient::start(
                clock.clone(),
                format!("{origin}/connect/callback"),
                options.reuse_tokens,
                options.allowlist,
            )
            .await?,
            store: Store::new(contents, options.state, &issuer),
            issuer,
            origin,
            clock,
            skew,
            counts: Mutex::default(),
            received: watch::Sender::new(Vec::new()),
            remember: options.remember,
            faults: Mutex::default(),
        });
        shared.store.saved().await?;
        for script in &options.world.faults {
            shared.apply_script(script).map_err(io::Error::other)?;
        }
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(listener, acceptor, shared.clone(), stop.clone()));
        Ok(Self { addr, ca_pem, shared, _stop: stop.drop_guard() })
    }

    /// The origin, for `--upstream`.
    pub fn url(&self) -> String {
        self.shared.origin.clone()
    }

    /// The listening address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The CA certificate in PEM, if the emulator serves TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// A development OIDC token for the first project and member, as `vercel env pull` fetches it.
    pub fn oidc_token(&self, life: Duration) -> String {
        let subject = self.read(Subject::development);
        self.oidc_token_for(&subject, life)
    }

    /// An OIDC token for any subject, issued now.
    pub fn oidc_token_for(&self, subject: &Subject, life: Duration) -> String {
        self.shared.issuer.issue(subject, self.shared.now(), life)
    }

    /// An env file as `vercel env pull` would have written it `ago`, with a token that expires in `left`.
    pub fn env_file(&self, ago: Duration, left: Duration) -> String {
        let subject = self.read(Subject::development);
        admin_api::env_file(&self.shared.issuer.issue(&subject, self.shared.now() - ago, ago + left))
    }

    /// Reads the data.
    pub fn read<T>(&self, read: impl FnOnce(&World) -> T) -> T {
        self.shared.store.read(|contents| read(&contents.world))
    }

    /// Changes the data.
    pub fn change(&self, change: impl FnOnce(&mut World)) {
        self.shared.store.change(|contents| change(&mut contents.world));
    }

    /// Adds a fault, which applies to the next requests that match it.
    pub fn inject(&self, fault: Fault) {
        self.shared.faults().push(fault);
    }

    /// Holds back all responses until the returned hold is released. Requests are still received and processed.
    pub fn hold_answers(&self) -> AnswerHold {
        let hold = AnswerHold::default();
        self.inject(Fault::held_by(hold.clone()));
        hold
    }

    /// The mock providers, which serve all connectors that do not name an issuer of their own.
    pub fn mock_providers(&self) -> &MockProviders {
        self.shared.providers.mocks()
    }

    /// The most recent requests, in order of arrival.
    pub fn received(&self) -> Vec<ReceivedRequest> {
        self.shared.received.borrow().clone()
    }

    /// How many of the [`received`](Self::received) requests have `part` in their target.
    pub fn count(&self, part: &str) -> usize {
        self.shared.received.borrow().iter().filter(|request| request.target.contains(part)).count()
    }

    /// Waits until `count` requests have arrived since the start.
    pub async fn wait_for_requests(&self, count: usize) {
        let mut received = self.shared.received.subscribe();
        // The sender lives as long as `self`.
        let _ = received.wait_for(|received| received.last().map_or(0, |last| last.number + 1) >= count).await;
    }
}

/// A clock that is offset by `skew` seconds.
fn skewed(clock: Clock, skew: Arc<AtomicI64>) -> Clock {
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

    /// Records a request and returns its number. The oldest record makes room if the limit is reached.
    fn record(&self, request: &Request) -> usize {
        let mut number = 0;
        self.received.send_modify(|received| {
            number = received.last().map_or(0, |last| last.number + 1);
            if received.len() >= self.remember {
                received.remove(0);
            }
            received.push(ReceivedRequest {
                number,
                method: request.method.clone(),
                target: request.target.clone(),
                headers: request.headers.clone(),
                body: request.body.clone(),
                answered: None,
            });
        });
        number
    }

    fn record_status(&self, number: usize, status: StatusCode) {
        self.received.send_modify(|received| {
            if let Some(request) = received.iter_mut().rfind(|request| request.number == number) {
                request.answered = Some(status);
            }
        });
    }

    /// Handles a request as Vercel would.
    async fn handle(&self, request: &Request) -> Response {
        let response = if openapi::has(request) { self.dispatch(request).await } else { None };
        response.unwrap_or_else(|| Refusal::new(Kind::NotFound).into())
    }

    /// The response of the API that has this route.
    async fn dispatch(&self, request: &Request) -> Option<Response> {
        if let Some(response) = consent_pages::handle(self, request).await {
            return Some(response);
        }
        let result = runtime_api::handle(self, request).await;
        let result =
            result.or_else(|| management_api::handle(self, request)).or_else(|| account_api::handle(self, request));
        result.map(|result| result.unwrap_or_else(Response::from))
    }

    fn authenticate(&self, request: &Request) -> Result<Caller, Refusal> {
        self.store.read(|contents| Caller::authenticate(&contents.world, &self.issuer, self.now(), request))
    }

    /// Authenticates the caller, checks team and permission, and counts the request against the rate limit.
    fn caller(&self, request: &Request, class: Class, permission: Permission) -> Result<Caller, Refusal> {
        let caller = self.authenticate(request)?;
        let limits = self.store.read(|contents| {
            caller.check_team(&contents.world, request)?;
            caller.check_permission(&contents.world, permission).map(|()| contents.world.limits)
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

    fn apply_script(&self, script: &FaultScript) -> Result<(), ScriptError> {
        match script.effect()? {
            Effect::Fault(fault) => self.faults().push(fault),
            Effect::Skew(seconds) => self.skew.store(seconds, Ordering::Relaxed),
        }
        Ok(())
    }

    /// Removes all faults and resets the clock.
    fn clear_faults(&self) {
        self.faults().clear();
        self.skew.store(0, Ordering::Relaxed);
    }

    /// The next fault for a request, if there is one. Counts it as applied.
    fn next_fault(&self, target: &str) -> Option<Fault> {
        let mut faults = self.faults();
        let index = faults.iter().position(|fault| fault.applies_to(target))?;
        if faults[index].count_use() { Some(faults.remove(index)) } else { Some(faults[index].clone()) }
    }
}
