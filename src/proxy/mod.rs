//! The life of one request to Connect, from the app's bytes to upstream's and back.
//!
//! The order of steps is that of docs/http.md section 1: route and method, connector and query, allowed connectors,
//! content type, body, credential. The gates before it are in [`guard`]; the server applies them to every path.
//! Decrypted or plain, every request takes this one way.

mod admission;
pub mod body;
pub mod cache;
pub mod dialer;
pub mod error;
pub mod guard;
pub mod hosts;
pub mod key;
mod pool;
pub mod relay;
pub mod remediation;
pub mod reply;
pub mod resolver;
pub mod route;
pub mod stats;
pub mod upstream;

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName};
use http::request::Parts;
use hyper::body::Body;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::credential::{Credential, CredentialProblem, Identity, Reloader};
use crate::events::{self, Event, Events, Hit};
use crate::os::clock::{Clock, Timestamp};
use cache::{ByteLookup, Cache, CacheRequest, FetchResult, Fetched, Found, Role};
use error::{Code, RequestError};
use key::{BadJson, Subject};
use relay::Relay;
use remediation::UpstreamError;
use reply::{Answer, OIDC_EXPIRES_IN, Reply};
use route::{Action, Route};
use stats::Stats;
use upstream::{Outgoing, Upstream};

/// As many requests wait for a credential at once: more would leave no place for those that need none.
pub const MOST_WAITING: usize = 128;

/// Names the process that asks (docs/http.md section 1).
pub const SIDECAR_CLIENT: HeaderName = HeaderName::from_static("sidecar-client");

/// Everything that a request meets on its way.
pub struct Proxy {
    /// What is stored.
    pub cache: Cache,
    /// The way to Connect.
    pub upstream: Arc<Upstream>,
    /// The ways to Vercel's other hosts.
    pub relay: Relay,
    /// Who we are.
    pub identity: watch::Receiver<Arc<Identity>>,
    /// Told which credential upstream has accepted.
    pub accepted: watch::Sender<Option<Arc<Credential>>>,
    /// Makes the owner of the identity look at its source again.
    pub reloader: Reloader,
    /// The time.
    pub clock: Clock,
    /// An OIDC token with no more life than this is about to end, which each reply says.
    pub about_to_end: Duration,
    /// If set, all other connectors are refused.
    pub allowed_connectors: Option<BTreeSet<String>>,
    /// What people call the source of the credential.
    pub credential_source: String,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Told of each request.
    pub events: Events,
    /// How long a request that meets no good credential waits for one.
    pub wait: Duration,
    /// Places for those that do, [`MOST_WAITING`]: others are told at once.
    pub waiting: Semaphore,
    /// Ends that waiting.
    pub stopping: CancellationToken,
    /// Where requests to upstream run: a caller that goes away cancels none.
    pub tasks: TaskTracker,
}

impl Proxy {
    /// Answers one request whose head has passed the guard.
    pub async fn handle<B>(self: &Arc<Self>, head: &Parts, body: B) -> Result<Reply, RequestError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: StdError,
    {
        let begun = Instant::now();
        let route = route::parse(&head.method, head.uri.path(), head.uri.query())?;
        let mut outcome = self.answer(&route, head, body, begun).await;
        if let Err(error) = &mut outcome {
            error.oidc_expires_in = self.identity.borrow().seconds_left(self.about_to_end, self.clock.now());
            let code = Some(error.code.as_str().to_owned());
            let (message, remedy) = (Some(error.message.clone()), Some((*error.remedy).clone()));
            let request = self.told(&route, error.status, begun);
            self.events.publish(Event::Request(events::Request { code, message, remedy, ..request }));
            error.is_told = true;
        }
        outcome
    }

    async fn answer<B>(
        self: &Arc<Self>,
        route: &Route,
        head: &Parts,
        body: B,
        begun: Instant,
    ) -> Result<Reply, RequestError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: StdError,
    {
        self.check_allowed(&route.connector)?;
        body::check_content_type(head, &body)?;
        let body = body::read(body).await?;
        match route.action {
            Action::Token => self.token(route, head, body, begun).await,
            action => {
                key::check(&body).map_err(bad_json)?;
                let credential = self.credential().await?;
                let outgoing = self.upstream.outgoing(action, head, body)?;
                self.pass(route, outgoing, credential, begun).await
            }
        }
    }

    /// A token: from the cache, from another caller's request under way, or from upstream.
    async fn token(
        self: &Arc<Self>,
        route: &Route,
        head: &Parts,
        body: Bytes,
        begun: Instant,
    ) -> Result<Reply, RequestError> {
        let identity = self.identity.borrow().clone();
        let forced = is_no_cache(&head.headers);
        let client = head.headers.get(SIDECAR_CLIENT).map(|name| self.cache.client(name.as_bytes()));

        let cache_request = |request| CacheRequest { request, connector: route.connector.clone(), forced, client };

        let mut known = None;
        if let Some(principal) = identity.principal() {
            let path = head.uri.path();
            let request = match self.cache.find_by_bytes(principal, path, &body, forced, client) {
                ByteLookup::Found(found) => return self.reply_found(route, &identity, found, begun),
                ByteLookup::Known(request) => request,
                ByteLookup::Unknown => {
                    let request = key::parse(principal, &route.connector, &body).map_err(bad_json)?;
                    if let Some(found) = self.cache.find(principal, path, &body, &cache_request(request)) {
                        return self.reply_found(route, &identity, found, begun);
                    }
                    request
                }
            };
            known = Some((principal, request));
        } else {
            key::check(&body).map_err(bad_json)?;
        }

        // From here on upstream is needed, and with it a credential that is valid now.
        let credential = self.credential().await?;
        let principal = credential.principal().clone();
        let request = match known {
            Some((known, request)) if *known == principal => request,
            // The principal has changed while this request was read.
            _ => key::parse(&principal, &route.connector, &body).map_err(bad_json)?,
        };
        let proxy = self.clone();
        let fetched = self.cache.fetch(cache_request(request), &principal, || {
            let outgoing = proxy.upstream.outgoing(Action::Token, head, body);
            async move { proxy.exchange(&outgoing?, credential).await }
        });
        match fetched.await {
            Fetched::Found(found) => self.reply_found(route, &self.identity.borrow().clone(), found, begun),
            Fetched::Flight(role, result) => self.reply_fetched(route, request.subject, role, result, begun),
        }
    }

    /// Any other route: no cache, but a revocation evicts.
    async fn pass(
        self: &Arc<Self>,
        route: &Route,
        outgoing: Outgoing,
        credential: Arc<Credential>,
        begun: Instant,
    ) -> Result<Reply, RequestError> {
        let proxy = self.clone();
        let connector = route.connector.clone();
        let sending = self.tasks.spawn(async move {
            let revokes = outgoing.action() == Action::Revoke;
            // Before, so that nothing stale is served while it is under way; after, for what came meanwhile.
            if revokes {
                proxy.cache.evict(&connector);
            }
            let outcome = proxy.exchange(&outgoing, credential).await;
            if revokes {
                proxy.cache.evict(&connector);
            }
            outcome
        });
        let answer = sending.await.unwrap_or_else(|_| Err(cache::broken_off()))?;
        self.log(route, None, None, "", &answer, begun);
        Ok(self.warning_of_the_end(answer.reply()))
    }

    /// Sends, and once more if upstream rejects the credential and another one has come meanwhile.
    async fn exchange(&self, outgoing: &Outgoing, credential: Arc<Credential>) -> Result<Answer, RequestError> {
        let outcome = self.send(outgoing, &credential).await;
        if !rejects_credential(&outcome) {
            return outcome;
        }
        self.reloader.reload().await;
        let identity = self.identity.borrow().clone();
        let now = identity.credential(self.clock.now()).ok().cloned();
        match now {
            Some(other) if other.fingerprint() != credential.fingerprint() => self.send(outgoing, &other).await,
            _ => outcome,
        }
    }

    async fn send(&self, outgoing: &Outgoing, credential: &Arc<Credential>) -> Result<Answer, RequestError> {
        let bearer = credential.bearer().ok_or_else(unsendable)?;
        let place = self.upstream.admit(outgoing.action()).await?;
        self.stats.upstream_requests.count();
        let outcome = self.upstream.send(outgoing, bearer, place).await;
        let status = outcome.as_ref().map_or_else(|error| error.status, |answer| answer.status);
        if status.is_server_error() {
            self.stats.upstream_errors.count();
            self.stats.upstream_failed_at_ms.raise_to(self.clock.now().as_millis());
        }
        if status.is_success() {
            self.tell_accepted(credential);
            if outgoing.action() == Action::Token {
                self.stats.granted.count();
            }
        }
        outcome
    }

    /// Tells that upstream has taken this credential for good: it alone verifies them.
    fn tell_accepted(&self, credential: &Arc<Credential>) {
        self.accepted.send_if_modified(|last| {
            let is_news = last.as_ref().is_none_or(|last| last.fingerprint() != credential.fingerprint());
            if is_news {
                *last = Some(credential.clone());
            }
            is_news
        });
    }

    /// A credential that may be sent now. Where the clock may be to blame, upstream is asked for the time first; where it
    /// is only that a fresh one has not come yet, that is waited for, if so wanted.
    async fn credential(&self) -> Result<Arc<Credential>, RequestError> {
        if self.identity.borrow().looks_out_of_time(self.clock.now()) {
            self.upstream.ask_clock().await;
        }
        let identity = self.identity.borrow().clone();
        match identity.credential(self.clock.now()) {
            Err(CredentialProblem::Missing | CredentialProblem::Expired(_)) if !self.wait.is_zero() => {
                self.credential_to_come().await
            }
            credential => credential.cloned(),
        }
        .map_err(|problem| self.no_credential(&problem))
    }

    /// The credential that comes while there is time to wait for one, and else why there is none.
    async fn credential_to_come(&self) -> Result<Arc<Credential>, CredentialProblem> {
        let place = self.waiting.try_acquire();
        let wait = if place.is_ok() { self.wait } else { Duration::ZERO };
        let mut identity = self.identity.clone();
        let is_decided = |identity: &Arc<Identity>| {
            let credential = identity.credential(self.clock.now());
            !matches!(credential, Err(CredentialProblem::Missing | CredentialProblem::Expired(_)))
        };
        let coming = tokio::time::timeout(wait, identity.wait_for(is_decided));
        let _ = self.stopping.run_until_cancelled(coming).await;
        let identity = self.identity.borrow().clone();
        identity.credential(self.clock.now()).cloned()
    }

    /// Counts a request that was answered with an error.
    pub fn count_failure(&self) {
        self.stats.failed.count();
        self.stats.failed_at_ms.raise_to(self.clock.now().as_millis());
    }

    /// The reply for a request that needs a credential when there is none.
    pub fn no_credential(&self, problem: &CredentialProblem) -> RequestError {
        let code = match problem {
            CredentialProblem::Missing => Code::OidcTokenMissing,
            CredentialProblem::Expired(_) => Code::OidcTokenExpired,
            CredentialProblem::Invalid(_) => Code::OidcTokenInvalid,
        };
        let source = &self.credential_source;
        RequestError::new(code, problem.in_words(source)).remedy(problem.remedy(source))
    }

    fn check_allowed(&self, connector: &str) -> Result<(), RequestError> {
        match &self.allowed_connectors {
            Some(allowed) if !allowed.contains(connector) => Err(RequestError::new(
                Code::ConnectorNotAllowed,
                "This connector is not on the list `connectors.allow` in sidecar.toml.",
            )),
            _ => Ok(()),
        }
    }

    /// A reply that says how long the OIDC token has left, if that is not long.
    fn warning_of_the_end(&self, mut reply: Reply) -> Reply {
        if let Some(left) = self.identity.borrow().seconds_left(self.about_to_end, self.clock.now()) {
            reply.headers_mut().insert(OIDC_EXPIRES_IN, left.into());
        }
        reply
    }

    fn reply_found(
        &self,
        route: &Route,
        identity: &Identity,
        found: Found,
        begun: Instant,
    ) -> Result<Reply, RequestError> {
        self.stats.hits.count();
        let (answer, mut headers, now) = match found {
            // Not another look at the clock: it would cost more than all that is done for the header.
            Found::Hit { answer, headers, at } => (answer, HeaderMap::clone(&headers), at),
            Found::Held { outcome, age, left } => {
                let answer = outcome.map_err(|mut error| {
                    error.retry_after = Some(reply::retry_after(left));
                    error
                })?;
                let mut headers = answer.headers_saying("hit; detail=429", Some(age));
                headers.insert(header::RETRY_AFTER, reply::retry_after(left));
                (answer, headers, self.clock.now())
            }
        };
        if let Some(left) = identity.seconds_left(self.about_to_end, now) {
            headers.insert(OIDC_EXPIRES_IN, left.into());
        }
        self.tell_hit(route, None, "hit", &answer, now, begun);
        Ok(answer.reply_with(headers))
    }

    fn reply_fetched(
        &self,
        route: &Route,
        subject: Subject,
        role: Role,
        result: FetchResult,
        begun: Instant,
    ) -> Result<Reply, RequestError> {
        match role {
            Role::Collapsed => self.stats.collapsed.count(),
            Role::Led | Role::Forced => self.stats.misses.count(),
        }
        let forwarded = match role {
            Role::Forced => "fwd=request",
            _ if !self.cache.is_on() => "fwd=bypass",
            _ => "fwd=uri-miss",
        };
        let answer = result.outcome?;
        let what = match (role, result.stored) {
            (Role::Collapsed, _) => format!("{forwarded}; collapsed"),
            (_, Some(ttl)) => format!("{forwarded}; stored; ttl={}", ttl.as_secs()),
            (_, None) => forwarded.to_owned(),
        };
        match role {
            Role::Collapsed => self.tell_hit(route, Some(subject), "collapsed", &answer, self.clock.now(), begun),
            Role::Led => self.log(route, Some(subject), Some("miss"), &what, &answer, begun),
            Role::Forced => self.log(route, Some(subject), Some("forced"), &what, &answer, begun),
        }
        Ok(self.warning_of_the_end(answer.reply_with(answer.headers_saying(&what, None))))
    }

    /// What is told of a request that Connect was not asked for. There may be very many.
    fn tell_hit(
        &self,
        route: &Route,
        subject: Option<Subject>,
        cache: &'static str,
        answer: &Answer,
        at: Timestamp,
        begun: Instant,
    ) {
        let (action, connector, status) = (route.action.as_str(), route.connector.as_str(), answer.status.as_u16());
        let (subject, ms) = (subject.map(Subject::as_str), begun.elapsed().as_millis() as u64);
        debug!(action, connector, subject, status, cache, ms, "{action} {connector}");
        self.events.publish_hit(Hit { at, action, connector, subject, cache, status, ms });
    }

    /// What is told of any request that was answered.
    fn told(&self, route: &Route, status: StatusCode, begun: Instant) -> events::Request {
        events::Request {
            at: self.clock.now(),
            action: route.action.as_str(),
            connector: route.connector.clone(),
            subject: None,
            cache: None,
            status: status.as_u16(),
            code: None,
            message: None,
            remedy: None,
            ms: begun.elapsed().as_millis() as u64,
        }
    }

    /// One line and one event for each request that went upstream, with the command that mends an error.
    fn log(
        &self,
        route: &Route,
        subject: Option<Subject>,
        outcome: Option<&'static str>,
        cache: &str,
        answer: &Answer,
        begun: Instant,
    ) {
        let subject = subject.map(Subject::as_str);
        let mut told = events::Request { subject, cache: outcome, ..self.told(route, answer.status, begun) };
        let events::Request { action, status, ms, .. } = told;
        let connector = route.connector.as_str();
        if answer.status.is_success() {
            info!(action, connector, subject, status, cache, ms, "{action} {connector}");
            return self.events.publish(Event::Request(told));
        }
        let error = UpstreamError::read(&answer.body);
        let identity = self.identity.borrow().clone();
        let environment = identity.oidc().and_then(|token| token.claims.environment.as_deref());
        told.remedy = remediation::remedy(answer.status, &error, connector, environment.unwrap_or("development"));
        told.code = error.shown_code().map(str::to_owned);
        let code = told.code.as_deref();
        match &told.remedy {
            Some(remedy) => {
                let (hint, command) = (&*remedy.hint, remedy.command.as_deref());
                let line = format!("{action} {connector}: {remedy}");
                warn!(action, connector, subject, status, code, cache, ms, hint, command, "{line}");
            }
            None => warn!(action, connector, subject, status, code, cache, ms, "{action} {connector}"),
        }
        self.events.publish(Event::Request(told));
    }
}

/// Whether upstream said that the credential is no good, be it in words that are not passed on.
fn rejects_credential(outcome: &Result<Answer, RequestError>) -> bool {
    match outcome {
        Ok(answer) if answer.status.is_success() => false,
        Ok(answer) => UpstreamError::read(&answer.body).rejects_credential(answer.status),
        Err(error) => error.upstream_status.is_some_and(|status| UpstreamError::default().rejects_credential(status)),
    }
}

fn unsendable() -> RequestError {
    RequestError::new(Code::OidcTokenInvalid, "The credential cannot stand in a header. Run `vercel env pull`.")
        .command("vercel env pull")
}

fn bad_json(reason: BadJson) -> RequestError {
    RequestError::new(Code::BadJson, reason.to_string())
}

fn is_no_cache(headers: &HeaderMap) -> bool {
    let directives = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    directives.flat_map(|value| value.split(',')).any(|directive| directive.trim().eq_ignore_ascii_case("no-cache"))
}
