//! Reports what happened to each request, in one place: counters, log line, event.

use http::request::Parts;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Proxy;
use super::error::{RequestError, excerpt};
use super::key::Subject;
use super::remediation::{self, UpstreamError};
use super::reply::Answer;
use super::route::Route;
use super::stats::CacheUse;
use crate::events::{self, Event, Hit, Refusal};
use crate::os::clock::Timestamp;

/// A request to one of Connect's routes.
pub(super) struct ConnectRequest {
    pub(super) route: Route,
    pub(super) received: Instant,
}

impl ConnectRequest {
    /// Milliseconds since it was received.
    pub(super) fn ms(&self) -> u64 {
        self.received.elapsed().as_millis() as u64
    }
}

/// What happened to a request.
pub enum Outcome<'a> {
    /// Upstream's answer goes back, from the cache or fresh.
    Answered(Answered<'a>),
    /// The sidecar's own error goes back.
    Refused {
        /// The error.
        error: &'a RequestError,
        /// The request's head, if it was read.
        head: Option<&'a Parts>,
        /// Whether to log it: the number of lines per second is limited.
        is_logged: bool,
    },
}

/// A request to Connect that was answered. A cache hit is reported without an allocation unless there are subscribers.
pub struct Answered<'a> {
    pub(super) request: &'a ConnectRequest,
    /// The time of the answer.
    pub(super) at: Timestamp,
    pub(super) answer: &'a Answer,
    /// `None` if the request was passed through without the cache.
    pub(super) cache_use: Option<CacheUse>,
    /// The reply's `Cache-Status`, for the log.
    pub(super) cache_status: &'a str,
    /// `None` if the body was not parsed.
    pub(super) subject: Option<Subject>,
}

impl Proxy {
    /// Counts, logs and publishes what happened to a request.
    pub fn report(&self, outcome: &Outcome<'_>) {
        match outcome {
            Outcome::Answered(answered) => {
                if let Some(cache_use) = answered.cache_use {
                    self.stats.count_cache_use(cache_use);
                }
                match answered.cache_use {
                    Some(cache_use @ (CacheUse::Hit | CacheUse::Collapsed)) => self.report_hit(answered, cache_use),
                    _ => self.report_upstream_answer(answered),
                }
            }
            Outcome::Refused { error, head, is_logged } => self.report_refusal(error, *head, *is_logged),
        }
    }

    /// A request for which upstream was not asked. There may be thousands a second.
    fn report_hit(&self, answered: &Answered<'_>, cache_use: CacheUse) {
        let Answered { request, at, answer, subject, .. } = *answered;
        let (action, connector) = (request.route.action.as_str(), request.route.connector.as_str());
        let (status, subject, cache, ms) =
            (answer.status.as_u16(), subject.map(Subject::as_str), cache_use.as_str(), request.ms());
        debug!(action, connector, subject, status, cache, ms, "{action} {connector}");
        self.events.publish_hit(Hit { at, action, connector, subject, cache, status, ms });
    }

    /// A request that went upstream. An error is reported with its remedy.
    fn report_upstream_answer(&self, answered: &Answered<'_>) {
        let Answered { request, at, answer, cache_use, cache_status: cache, subject } = *answered;
        let (action, connector) = (request.route.action.as_str(), request.route.connector.as_str());
        let (status, subject, ms) = (answer.status.as_u16(), subject.map(Subject::as_str), request.ms());
        let (mut code, mut remedy) = (None, None);
        if answer.status.is_success() {
            info!(action, connector, subject, status, cache, ms, "{action} {connector}");
        } else {
            let error = UpstreamError::read(&answer.body);
            let identity = self.identity.borrow().clone();
            let environment = identity.oidc().and_then(|token| token.claims.environment.as_deref());
            remedy = remediation::remedy(answer.status, &error, connector, environment.unwrap_or("development"));
            code = error.shown_code().map(str::to_owned);
            let code = code.as_deref();
            match &remedy {
                Some(remedy) => {
                    let (hint, command) = (&*remedy.hint, remedy.command.as_deref());
                    let line = format!("{action} {connector}: {remedy}");
                    warn!(action, connector, subject, status, code, cache, ms, hint, command, "{line}");
                }
                None => warn!(action, connector, subject, status, code, cache, ms, "{action} {connector}"),
            }
        }
        self.events.publish(Event::Request(events::Request {
            at,
            action,
            connector: connector.to_owned(),
            subject,
            cache: cache_use.map(CacheUse::as_str),
            status,
            code,
            message: None,
            remedy,
            ms,
        }));
    }

    /// A request that the sidecar answered with an error of its own.
    fn report_refusal(&self, error: &RequestError, head: Option<&Parts>, is_logged: bool) {
        self.stats.refused.count();
        if let Some(cache_use) = error.cache_use {
            self.stats.count_cache_use(cache_use);
        }
        if !is_logged && error.request.is_none() {
            return;
        }
        let shown = |part: fn(&Parts) -> &str| head.map(|head| excerpt(part(head).as_bytes()));
        let (method, path) = (shown(|head| head.method.as_str()), shown(|head| head.uri.path()));
        let (code, status) = (error.code.as_str(), error.status.as_u16());
        if is_logged {
            let (hint, command) = (&*error.remedy.hint, error.remedy.command.as_deref());
            warn!(code, status, method, path, hint, command, "{}", error.line());
        }
        let (at, message, remedy) = (self.clock.now(), error.message.clone(), (*error.remedy).clone());
        match &error.request {
            Some(request) => self.events.publish(Event::Request(events::Request {
                at,
                action: request.action,
                connector: request.connector.clone(),
                subject: None,
                cache: None,
                status,
                code: Some(code.to_owned()),
                message: Some(message),
                remedy: Some(remedy),
                ms: request.ms,
            })),
            None => self.events.publish(Event::Refusal(Refusal { at, method, path, status, code, message, remedy })),
        }
    }
}
