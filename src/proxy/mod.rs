//! The life of one request to Connect: from the app's request to upstream and back.
//!
//! The order of the steps is that of docs/http.md section 1: route and method, connector and query, allowed connectors,
//! content type, body, credential. The checks before them, which apply to every path, are in [`guard`]. Plain and
//! intercepted requests are handled alike.

mod admission;
pub mod body;
pub mod cache;
pub mod dialer;
pub mod error;
pub mod guard;
pub mod hosts;
pub mod key;
pub mod outcome;
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
use http::header::{self, HeaderMap, HeaderName};
use http::request::Parts;
use hyper::body::Body;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::credential::{Credential, CredentialProblem, Identity, ReloadHandle};
use crate::events::Events;
use crate::os::clock::Clock;
use cache::{ByteLookup, Cache, CacheRequest, FetchResult, Fetched, Found};
use error::{Code, FailedRequest, RequestError};
use key::{BadJson, Subject};
use outcome::{Answered, ConnectRequest, Outcome};
use relay::Relay;
use remediation::UpstreamError;
use reply::{Answer, OIDC_EXPIRES_IN, Reply};
use route::Action;
use stats::{CacheUse, Stats};
use upstream::{Outgoing, Upstream};

/// Maximum number of requests that wait for a credential. Connections are limited, and others need them.
pub const MAX_WAITING: usize = 128;

/// The header that names the client process (docs/http.md section 1).
pub const SIDECAR_CLIENT: HeaderName = HeaderName::from_static("sidecar-client");

/// What requests to Connect need.
pub struct Proxy {
    /// Stored tokens.
    pub cache: Cache,
    /// The client for Connect's API.
    pub upstream: Arc<Upstream>,
    /// The client for Vercel's other hosts.
    pub relay: Relay,
    /// The current credential and its principal.
    pub identity: watch::Receiver<Arc<Identity>>,
    /// Receives each new credential that upstream has accepted.
    pub accepted: watch::Sender<Option<Arc<Credential>>>,
    /// Makes the owner of the identity reread its source.
    pub reloader: ReloadHandle,
    /// The clock.
    pub clock: Clock,
    /// Replies announce the expiry of an OIDC token whose remaining lifetime is at most this.
    pub expiry_notice: Duration,
    /// If set, all other connectors are refused.
    pub allowed_connectors: Option<BTreeSet<String>>,
    /// The name of the credential's source, for messages.
    pub credential_source: String,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Receives an event for each request.
    pub events: Events,
    /// How long a request waits for a credential when there is none or an expired one.
    pub credential_wait: Duration,
    /// [`MAX_WAITING`] permits for such requests. Without a permit, a request fails at once.
    pub waiting: Semaphore,
    /// Ends that wait.
    pub stopping: CancellationToken,
    /// Upstream requests run in these tasks, so that a client disconnect does not cancel them.
    pub tasks: TaskTracker,
}

impl Proxy {
    /// Answers one request whose head has passed the guard. The caller reports an error with [`Proxy::report`].
    pub async fn handle<B>(self: &Arc<Self>, head: &Parts, body: B) -> Result<Reply, RequestError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: StdError,
    {
        let received = Instant::now();
        let route = route::parse(&head.method, head.uri.path(), head.uri.query())?;
        let request = ConnectRequest { route, received };
        let mut result = self.answer(&request, head, body).await;
        if let Err(error) = &mut result {
            error.oidc_expires_in = self.identity.borrow().seconds_left(self.expiry_notice, self.clock.now());
            let ms = request.ms();
            let ConnectRequest { route, .. } = request;
            let failed = FailedRequest { action: route.action.as_str(), connector: route.connector, ms };
            error.request = Some(Box::new(failed));
        }
        result
    }

    async fn answer<B>(self: &Arc<Self>, request: &ConnectRequest, head: &Parts, body: B) -> Result<Reply, RequestError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: StdError,
    {
        self.check_allowed(&request.route.connector)?;
        body::check_content_type(head, &body)?;
        let body = body::read(body).await?;
        match request.route.action {
            Action::Token => self.answer_token(request, head, body).await,
            action => {
                key::check(&body).map_err(bad_json)?;
                let credential = self.credential().await?;
                let outgoing = self.upstream.outgoing(action, head, body)?;
                self.pass_through(request, outgoing, credential).await
            }
        }
    }

    /// Answers a token request from the cache, from the fetch of an equal request, or from upstream.
    async fn answer_token(
        self: &Arc<Self>,
        request: &ConnectRequest,
        head: &Parts,
        body: Bytes,
    ) -> Result<Reply, RequestError> {
        let identity = self.identity.borrow().clone();
        let connector = &request.route.connector;
        let forced = is_no_cache(&head.headers);
        let client = head.headers.get(SIDECAR_CLIENT).map(|name| self.cache.client(name.as_bytes()));

        let cache_request =
            |token_request| CacheRequest { token_request, connector: connector.clone(), forced, client };

        let mut parsed = None;
        if let Some(principal) = identity.principal() {
            let path = head.uri.path();
            let token_request = match self.cache.find_by_bytes(principal, path, &body, forced, client) {
                ByteLookup::Found(found) => return self.reply_from_cache(request, &identity, found),
                ByteLookup::Parsed(token_request) => token_request,
                ByteLookup::Unknown => {
                    let token_request = key::parse(principal, connector, &body).map_err(bad_json)?;
                    if let Some(found) = self.cache.find(principal, path, &body, &cache_request(token_request)) {
                        return self.reply_from_cache(request, &identity, found);
                    }
                    token_request
                }
            };
            parsed = Some((principal, token_request));
        } else {
            key::check(&body).map_err(bad_json)?;
        }

        // Upstream is needed, and therefore a credential that is valid now.
        let credential = self.credential().await?;
        let principal = credential.principal().clone();
        let token_request = match parsed {
            Some((of, token_request)) if *of == principal => token_request,
            // The principal has changed since.
            _ => key::parse(&principal, connector, &body).map_err(bad_json)?,
        };
        let proxy = self.clone();
        let fetched = self.cache.fetch(cache_request(token_request), &principal, || {
            let outgoing = proxy.upstream.outgoing(Action::Token, head, body);
            async move { proxy.send_with_retry(&outgoing?, credential).await }
        });
        match fetched.await {
            Fetched::Found(found) => self.reply_from_cache(request, &self.identity.borrow().clone(), found),
            Fetched::Upstream(cache_use, fetched) => {
                self.reply_from_upstream(request, token_request.subject, cache_use, fetched)
            }
        }
    }

    /// Handles the other routes, without the cache; a revocation evicts from it.
    async fn pass_through(
        self: &Arc<Self>,
        request: &ConnectRequest,
        outgoing: Outgoing,
        credential: Arc<Credential>,
    ) -> Result<Reply, RequestError> {
        let proxy = self.clone();
        let connector = request.route.connector.clone();
        let sending = self.tasks.spawn(async move {
            let revokes = outgoing.action() == Action::Revoke;
            // Before, so that nothing stale is served meanwhile; after, for what was stored meanwhile.
            if revokes {
                proxy.cache.evict(&connector);
            }
            let result = proxy.send_with_retry(&outgoing, credential).await;
            if revokes {
                proxy.cache.evict(&connector);
            }
            result
        });
        let answer = sending.await.unwrap_or_else(|_| Err(cache::interrupted()))?;
        let at = self.clock.now();
        let (cache_use, cache_status, subject) = (None, "", None);
        self.report(&Outcome::Answered(Answered { request, at, answer: &answer, cache_use, cache_status, subject }));
        Ok(self.with_expiry_notice(answer.reply()))
    }

    /// Sends a request, and once more if upstream rejects the credential and there is a new one by then.
    async fn send_with_retry(&self, outgoing: &Outgoing, credential: Arc<Credential>) -> Result<Answer, RequestError> {
        let result = self.send(outgoing, &credential).await;
        if !rejects_credential(&result) {
            return result;
        }
        self.reloader.reload().await;
        let identity = self.identity.borrow().clone();
        let current = identity.credential(self.clock.now()).ok().cloned();
        match current {
            Some(other) if other.fingerprint() != credential.fingerprint() => self.send(outgoing, &other).await,
            _ => result,
        }
    }

    async fn send(&self, outgoing: &Outgoing, credential: &Arc<Credential>) -> Result<Answer, RequestError> {
        let bearer = credential.bearer().ok_or_else(invalid_bearer)?;
        let permit = self.upstream.admit(outgoing.action()).await?;
        self.stats.upstream_requests.count();
        let result = self.upstream.send(outgoing, bearer, permit).await;
        let status = result.as_ref().map_or_else(|error| error.status, |answer| answer.status);
        if status.is_server_error() {
            self.stats.upstream_errors.count();
            self.stats.upstream_failed_at_ms.raise_to(self.clock.now().as_millis());
        }
        if status.is_success() {
            self.publish_accepted(credential);
            if outgoing.action() == Action::Token {
                self.stats.granted.count();
            }
        }
        result
    }

    /// Publishes a credential that upstream has accepted. Only upstream verifies its signature.
    fn publish_accepted(&self, credential: &Arc<Credential>) {
        self.accepted.send_if_modified(|last| {
            let is_new = last.as_ref().is_none_or(|last| last.fingerprint() != credential.fingerprint());
            if is_new {
                *last = Some(credential.clone());
            }
            is_new
        });
    }

    /// A credential that is valid now. If the clock may be wrong, upstream is asked for the time first. If there is no
    /// valid credential yet, this waits for one for [`Proxy::credential_wait`].
    async fn credential(&self) -> Result<Arc<Credential>, RequestError> {
        if self.identity.borrow().is_outside_validity(self.clock.now()) {
            self.upstream.sync_clock().await;
        }
        let identity = self.identity.borrow().clone();
        match identity.credential(self.clock.now()) {
            Err(CredentialProblem::Missing | CredentialProblem::Expired(_)) if !self.credential_wait.is_zero() => {
                self.wait_for_credential().await
            }
            credential => credential.cloned(),
        }
        .map_err(|problem| self.no_credential(&problem))
    }

    /// Waits for a credential, within the limits of time and number.
    async fn wait_for_credential(&self) -> Result<Arc<Credential>, CredentialProblem> {
        let permit = self.waiting.try_acquire();
        let wait = if permit.is_ok() { self.credential_wait } else { Duration::ZERO };
        let mut identity = self.identity.clone();
        let is_decided = |identity: &Arc<Identity>| {
            let credential = identity.credential(self.clock.now());
            !matches!(credential, Err(CredentialProblem::Missing | CredentialProblem::Expired(_)))
        };
        let decided = tokio::time::timeout(wait, identity.wait_for(is_decided));
        let _ = self.stopping.run_until_cancelled(decided).await;
        let identity = self.identity.borrow().clone();
        identity.credential(self.clock.now()).cloned()
    }

    /// Counts a request that was answered with an error, upstream's or the sidecar's own.
    pub fn count_failure(&self) {
        self.stats.failed.count();
        self.stats.failed_at_ms.raise_to(self.clock.now().as_millis());
    }

    /// The error for a request that needs a credential when there is none.
    pub fn no_credential(&self, problem: &CredentialProblem) -> RequestError {
        let code = match problem {
            CredentialProblem::Missing => Code::OidcTokenMissing,
            CredentialProblem::Expired(_) => Code::OidcTokenExpired,
            CredentialProblem::Invalid(_) => Code::OidcTokenInvalid,
        };
        let source = &self.credential_source;
        RequestError::new(code, problem.message(source)).remedy(problem.remedy(source))
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

    /// Adds the remaining lifetime of the OIDC token to a reply, if it is short.
    fn with_expiry_notice(&self, mut reply: Reply) -> Reply {
        if let Some(left) = self.identity.borrow().seconds_left(self.expiry_notice, self.clock.now()) {
            reply.headers_mut().insert(OIDC_EXPIRES_IN, left.into());
        }
        reply
    }

    fn reply_from_cache(
        &self,
        request: &ConnectRequest,
        identity: &Identity,
        found: Found,
    ) -> Result<Reply, RequestError> {
        let cache_use = Some(CacheUse::Hit);
        let (answer, mut headers, at) = match found {
            // The time of the lookup is reused: reading the clock costs more than adding the header.
            Found::Hit { answer, headers, at } => (answer, HeaderMap::clone(&headers), at),
            Found::RateLimited { result, age, left } => {
                let retry_after = reply::retry_after(left);
                let answer = result.map_err(|error| RequestError {
                    retry_after: Some(retry_after.clone()),
                    cache_use,
                    ..error
                })?;
                let mut headers = answer.headers_with_cache_status("hit; detail=429", Some(age));
                headers.insert(header::RETRY_AFTER, retry_after);
                (answer, headers, self.clock.now())
            }
        };
        if let Some(left) = identity.seconds_left(self.expiry_notice, at) {
            headers.insert(OIDC_EXPIRES_IN, left.into());
        }
        let (cache_status, subject) = ("", None);
        self.report(&Outcome::Answered(Answered { request, at, answer: &answer, cache_use, cache_status, subject }));
        Ok(answer.reply_with(headers))
    }

    fn reply_from_upstream(
        &self,
        request: &ConnectRequest,
        subject: Subject,
        cache_use: CacheUse,
        fetched: FetchResult,
    ) -> Result<Reply, RequestError> {
        let forwarded = match cache_use {
            CacheUse::Forced => "fwd=request",
            _ if !self.cache.is_on() => "fwd=bypass",
            _ => "fwd=uri-miss",
        };
        let answer = fetched.result.map_err(|error| RequestError { cache_use: Some(cache_use), ..error })?;
        let cache_status = match (cache_use, fetched.stored_for) {
            (CacheUse::Collapsed, _) => format!("{forwarded}; collapsed"),
            (_, Some(ttl)) => format!("{forwarded}; stored; ttl={}", ttl.as_secs()),
            (_, None) => forwarded.to_owned(),
        };
        self.report(&Outcome::Answered(Answered {
            request,
            at: self.clock.now(),
            answer: &answer,
            cache_use: Some(cache_use),
            cache_status: &cache_status,
            subject: Some(subject),
        }));
        Ok(self.with_expiry_notice(answer.reply_with(answer.headers_with_cache_status(&cache_status, None))))
    }
}

/// Whether upstream rejected the credential, even if its response is not passed on.
fn rejects_credential(result: &Result<Answer, RequestError>) -> bool {
    match result {
        Ok(answer) if answer.status.is_success() => false,
        Ok(answer) => UpstreamError::read(&answer.body).rejects_credential(answer.status),
        Err(error) => error.upstream_status.is_some_and(|status| UpstreamError::default().rejects_credential(status)),
    }
}

fn invalid_bearer() -> RequestError {
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
