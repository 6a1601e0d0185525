//! Checks each request and routes it by path: health, metrics, the page, the administrative API, the relay, the proxy.

use std::ops::RangeInclusive;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;

use super::connections::Activity;
use super::event_stream::{self, Filter};
use super::{Client, Server, head, overloaded, refresh, runs};
use crate::daemon::status::page;
use crate::instance::key::{NONCE_HEADER, PROOF_HEADER};
use crate::os::peer::Peer;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::guard::{self, Accepted, ListenerKind};
use crate::proxy::reply::{self, Reply};
use crate::proxy::{body, relay, route};

/// The path prefix of relayed requests, followed by `{host}/{raw path}`.
const RELAY: &str = "/_sidecar/v1/relay/";
/// Length of an acceptable nonce, in bytes.
const NONCE_BYTES: RangeInclusive<usize> = 16..=64;

impl Server {
    /// Answers one request.
    pub(super) async fn answer(&self, request: Request<Incoming>, client: Client<'_>) -> Reply {
        let (head, body) = request.into_parts();
        let (admitted, outcome) = match self.admit(&head, client) {
            Ok(admitted) => {
                let outcome = self.route(&head, body, &admitted, client).await;
                (admitted, outcome)
            }
            Err(refusal) => (Accepted::default(), Err(refusal)),
        };
        let mut reply = self.finish(outcome, &head);
        if let Some(origin) = admitted.origin {
            reply.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            reply.headers_mut().insert(header::VARY, HeaderValue::from_static("Origin"));
        }
        reply
    }

    /// Whether this client may send this request.
    fn admit(&self, head: &Parts, client: Client<'_>) -> Result<Accepted, RequestError> {
        check_peer(client.peer)?;
        // The size limits do not apply to relayed requests.
        if !head.uri.path().starts_with(RELAY) {
            head::check(head)?;
        }
        let admitted = guard::check(head, client.entrance, &self.policy)?;
        self.warn_of_dropped_credentials(&admitted);
        Ok(admitted)
    }

    async fn route(
        &self,
        head: &Parts,
        body: Incoming,
        admitted: &Accepted,
        client: Client<'_>,
    ) -> Result<Reply, RequestError> {
        if self.connections.is_over_limit(client.activity) && !guard::is_health(head.uri.path()) {
            return Err(overloaded());
        }
        if head.method == Method::OPTIONS && admitted.origin.is_some() {
            return Ok(preflight(&head.headers));
        }
        match head.uri.path() {
            path if path.starts_with("/v1/") => self.proxy.handle(head, body).await,
            "/healthz" => {
                require_read(head)?;
                let mut reply = json(r#"{"status":"ok"}"#);
                reply.headers_mut().extend(self.proof(head, client.entrance).map(|proof| (PROOF_HEADER, proof)));
                Ok(reply)
            }
            "/readyz" => {
                require_read(head)?;
                self.status.readiness().map_err(|problem| self.proxy.no_credential(&problem))?;
                Ok(json(r#"{"status":"ready"}"#))
            }
            guard::METRICS => {
                require_read(head)?;
                let text = self.status.metrics(self.connections.count());
                Ok(reply::own(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text))
            }
            "/_sidecar/v1/status" => {
                require_read(head)?;
                Ok(json(self.status.json()))
            }
            "/_sidecar/v1/events" => self.events(head, client.activity),
            guard::SIDECAR_PREFIX => {
                require_read(head)?;
                Ok(page::reply())
            }
            _ if guard::is_page_redirect(head) => {
                require_no_query(head)?;
                Ok(page::redirect())
            }
            path if guard::PAGE_REDIRECTS.contains(&path) => {
                let message = format!("Nothing is answered here. The status page is at {}.", guard::SIDECAR_PREFIX);
                Err(RequestError::new(Code::RouteNotFound, message).hint("connect-sidecar status --open"))
            }
            // Boxed, since every request's future would otherwise have room for this rare one.
            path if path.starts_with(RELAY) => Box::pin(self.relay(head, body, client.activity)).await,
            "/_sidecar/v1/cache" => {
                self.require_key(head, "DELETE")?;
                let evicted = match connector_in_query(head.uri.query())? {
                    None => self.proxy.cache.clear(),
                    Some(connector) => self.proxy.cache.evict(&connector),
                };
                Ok(json(format!(r#"{{"evicted":{evicted}}}"#)))
            }
            "/_sidecar/v1/refresh" => {
                self.require_key(head, "POST")?;
                require_no_query(head)?;
                Ok(json(refresh::refresh(&self.refresh, &self.proxy.clock).await?))
            }
            "/_sidecar/v1/runs" => {
                self.require_key(head, "POST")?;
                require_no_query(head)?;
                body::check_content_type(head, &body)?;
                let body = body::read(body).await?;
                let run = self.begin_run(&runs::parse(&body)?).await?;
                // Strings always serialize.
                Ok(json(serde_json::to_vec(&run).unwrap_or_default()))
            }
            // The proxy answers unknown paths.
            _ => self.proxy.handle(head, body).await,
        }
    }

    /// Requires this method and the instance key.
    fn require_key(&self, head: &Parts, method: &'static str) -> Result<(), RequestError> {
        require_method(head, method)?;
        guard::require_key(&head.headers, &self.policy)
    }

    /// The response to the client's nonce, which proves that we hold the instance key (docs/security.md S5).
    fn proof(&self, head: &Parts, entrance: ListenerKind) -> Option<HeaderValue> {
        let (ListenerKind::Loopback(port), Some(key)) = (entrance, &self.policy.key) else { return None };
        let nonce = head.headers.get(NONCE_HEADER)?.as_bytes();
        NONCE_BYTES.contains(&nonce.len()).then(|| key.proof(port, nonce))?.try_into().ok()
    }

    fn events(&self, head: &Parts, activity: &Arc<Activity>) -> Result<Reply, RequestError> {
        require_method(head, "GET")?;
        let (filter, permits) = match head.uri.query() {
            Some("only=problems") => (Filter::Problems, &self.problem_streams),
            _ => {
                require_no_query(head)?;
                (Filter::All, &self.event_streams)
            }
        };
        event_stream::reply(&self.status.events, filter, permits, activity.begin_relay())
    }

    /// Relays a request to `{host}/{raw path}?{query}` after the prefix.
    async fn relay(&self, head: &Parts, body: Incoming, activity: &Arc<Activity>) -> Result<Reply, RequestError> {
        let target = head.uri.path_and_query().map_or("", PathAndQuery::as_str);
        let target = target.strip_prefix(RELAY).unwrap_or_default();
        let (host, target) = target.split_at(target.find('/').unwrap_or(target.len()));
        let path = target.split('?').next().unwrap_or_default();
        if !relay::has_placeholder(&head.headers) || self.proxy.relay.hosts.bearer(host, path).is_none() {
            let message = "Only requests with the placeholder for the OIDC token are passed on here, and only to hosts that \
                           take the real one.";
            return Err(RequestError::new(Code::RouteNotFound, message));
        }
        let mut reply = self.proxy.relay(host, target, head, body, activity.begin_relay()).await?;
        reply::add_security_headers(reply.headers_mut());
        Ok(reply)
    }
}

/// Refuses clients of other users.
fn check_peer(peer: Peer) -> Result<(), RequestError> {
    if peer.is_allowed() {
        return Ok(());
    }
    let message = match peer {
        Peer::Unknown => {
            "The system does not say whose connection this is. Ask from this machine itself, or use --unix-socket."
        }
        _ => "This sidecar answers the user that started it, and no other user of this machine.",
    };
    Err(RequestError::new(Code::PeerUidMismatch, message).closing())
}

fn require_method(head: &Parts, method: &'static str) -> Result<(), RequestError> {
    if head.method == method { Ok(()) } else { Err(RequestError::method_not_allowed(method)) }
}

/// GET or HEAD, without a query.
fn require_read(head: &Parts) -> Result<(), RequestError> {
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Err(RequestError::method_not_allowed("GET, HEAD"));
    }
    require_no_query(head)
}

fn require_no_query(head: &Parts) -> Result<(), RequestError> {
    match head.uri.query() {
        None => Ok(()),
        Some(_) => Err(RequestError::new(Code::QueryNotAllowed, "This path takes no query string.")),
    }
}

/// The connector of `connector=slack%2Facme-slack`; `None` without a query.
fn connector_in_query(query: Option<&str>) -> Result<Option<String>, RequestError> {
    let Some(query) = query else { return Ok(None) };
    let connector = query.strip_prefix("connector=").and_then(route::decode);
    match connector {
        Some(connector) => Ok(Some(connector)),
        None => Err(RequestError::new(Code::BadConnector, "The one parameter is `connector=`, percent-encoded.")),
    }
}

/// A response with a JSON body.
fn json(body: impl Into<Bytes>) -> Reply {
    reply::own(StatusCode::OK, "application/json", body)
}

/// The response to a CORS preflight from an allowed origin.
fn preflight(request_headers: &HeaderMap) -> Reply {
    let mut reply = reply::own(StatusCode::NO_CONTENT, "application/json", "");
    let headers = reply.headers_mut();
    headers.remove(header::CONTENT_TYPE);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    if request_headers.contains_key(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        let allowed = "cache-control, content-type, sidecar-client, sidecar-key, traceparent, tracestate, x-request-id";
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
    }
    reply
}
