//! The HTTP server for apps: accepts connections, checks each request against the access rules, answers the sidecar's
//! own paths, and passes requests for tokens to the [`Proxy`].
//!
//! It speaks HTTP/1.1 and 1.0 only, without upgrades, CONNECT or TLS. A client disconnect ends the request but not the
//! upstream fetch, which runs in a task of the proxy.

mod accept;
mod connections;
mod event_stream;
pub mod handover;
mod head;
mod intercepted;
pub mod listener;
mod refresh;
mod refusals;
mod routes;
pub mod runs;
pub mod stream;
pub mod unix_socket;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::request::Parts;
use tokio::sync::Semaphore;
use tracing::warn;

use crate::credential::refresh::RefreshHandle;
use crate::daemon::status::Status;
use crate::instance::run::{Run, RunRequest};
use crate::os::peer::Peer;
use crate::proxy::Proxy;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::guard::{self, Accepted, ListenerKind, Policy};
use crate::proxy::outcome::Outcome;
use crate::proxy::reply::{self, Reply};
use connections::{Activity, Connections};
use refusals::RefusalLog;
use runs::InterceptionHandle;

/// Time between two checks of all connections.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Answers requests.
pub struct Server {
    proxy: Arc<Proxy>,
    policy: Policy,
    status: Status,
    refresh: RefreshHandle,
    interception: InterceptionHandle,
    connections: Arc<Connections>,
    /// Permits for streams of all events.
    event_streams: Arc<Semaphore>,
    /// Permits for streams of problems, which `run` reads.
    problem_streams: Arc<Semaphore>,
    refusal_log: RefusalLog,
    warned_of_dropped_credentials: AtomicBool,
}

/// The client of a request and its connection.
#[derive(Clone, Copy)]
struct Client<'a> {
    entrance: ListenerKind,
    peer: Peer,
    activity: &'a Arc<Activity>,
}

impl Server {
    /// A server that sends token requests to `proxy`, shows `status`, refreshes the OIDC token through `refresh`, and
    /// registers runs with `interception`. `policy` says who may send requests.
    pub fn new(
        proxy: Arc<Proxy>,
        policy: Policy,
        status: Status,
        refresh: RefreshHandle,
        interception: InterceptionHandle,
    ) -> Self {
        Self {
            proxy,
            policy,
            status,
            refresh,
            interception,
            connections: Arc::new(Connections::new()),
            event_streams: Arc::new(Semaphore::new(event_stream::MAX_STREAMS)),
            problem_streams: Arc::new(Semaphore::new(event_stream::MAX_STREAMS)),
            refusal_log: RefusalLog::default(),
            warned_of_dropped_credentials: AtomicBool::new(false),
        }
    }

    /// Handles token requests and relayed ones.
    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// Enforces the time limits of connections and the rate limit of the log. Never returns.
    pub async fn enforce_limits(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.connections.enforce_timeouts();
            self.refusal_log.end_second();
        }
    }

    /// Registers a run, as `POST /_sidecar/v1/runs` does.
    pub async fn begin_run(&self, request: &RunRequest) -> Result<Run, RequestError> {
        runs::register(request, &self.proxy, &self.interception, self.policy.required_run_key()).await
    }

    /// Tells all connections to close after their current request.
    pub fn drain(&self) {
        self.connections.drain();
    }

    /// Warns once that credentials of apps are dropped.
    fn warn_of_dropped_credentials(&self, admitted: &Accepted) {
        if admitted.has_credentials && !self.warned_of_dropped_credentials.swap(true, Ordering::Relaxed) {
            warn!("an app sends credentials of its own: they are dropped, the sidecar's are used instead");
        }
    }

    /// Turns a request's outcome into a response. Counts every error response, including upstream's.
    fn finish(&self, outcome: Result<Reply, RequestError>, head: &Parts) -> Reply {
        let reply = outcome.unwrap_or_else(|error| self.refuse(&error, Some(head)));
        // A health check that reports "not ready" is not a failed request.
        if reply.status().as_u16() >= 400 && !guard::is_health(head.uri.path()) {
            self.proxy.count_failure();
        }
        reply
    }

    /// The response for an error of the sidecar's own. Counts the error, logs it and publishes it as an event.
    pub fn refuse(&self, error: &RequestError, head: Option<&Parts>) -> Reply {
        let is_logged = self.refusal_log.should_log();
        self.proxy.report(&Outcome::Refused { error, head, is_logged });
        match head {
            // A person reads this in a browser window.
            Some(head) if error.code == Code::HeadTooLarge && guard::is_browser_window(&head.headers) => {
                reply::error_as_text(error)
            }
            _ => reply::error(error),
        }
    }
}

/// The error for a request over the limit of concurrent requests.
pub fn overloaded() -> RequestError {
    let message = "Too many requests are under way. Ask again in a second.";
    let mut error = RequestError::new(Code::Overloaded, message).closing();
    error.retry_after = Some(reply::retry_after(Duration::from_secs(1)));
    error
}
