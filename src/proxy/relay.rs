//! Relays a request to one of Vercel's hosts and streams the response back: any method, length and duration.
//!
//! Only hop-by-hop headers and the placeholder are changed. For a bearer host, the placeholder becomes the real OIDC
//! token; such a request loses its cookies and all headers that a server could take for another path, method or origin.
//! Other hosts get the placeholder unchanged, and no host gets another credential of the sidecar, such as an access
//! token. If an upstream is configured, it replaces all of Connect's API. The relay has its own connections, which lead
//! to this machine only if that is configured. WebSocket upgrades are refused.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use http::header::{self, Entry, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Uri, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use lru::LruCache;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::dialer::Dialer;
use super::error::{Code, RequestError};
use super::guard::VIA_NAME;
use super::hosts::{self, Hosts};
use super::pool::{Pool, RequestBody};
use super::reply::{Reply, ReplyBody};
use super::upstream::Upstream;
use super::{Proxy, SIDECAR_CLIENT, route};
use crate::credential::{Credential, placeholder};
use crate::instance::key::KEY_HEADER;
use crate::os::clock::Clock;

/// Maximum number of origins with pooled connections; the least recently used ones are dropped.
const MAX_ORIGINS: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

const CDN_LOOP: HeaderName = HeaderName::from_static("cdn-loop");

/// The hop-by-hop headers (RFC 9110, 7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 7] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers that servers may prefer to the request line for the path, the method or the origin. They are removed from
/// requests with the real token, so that the server sees the same request as the sidecar. An entry that ends with a
/// hyphen is a prefix.
const OVERRIDES: [&str; 21] = [
    "cf-connecting-ip",
    "client-ip",
    "cookie",
    "cookie2",
    "forwarded",
    "true-client-ip",
    "x-client-ip",
    "x-envoy-",
    "x-forwarded-",
    "x-host",
    "x-http-",
    "x-invoke-",
    "x-matched-",
    "x-method-",
    "x-middleware-",
    "x-now-",
    "x-original-",
    "x-proxy-",
    "x-real-ip",
    "x-rewrite-",
    "x-url",
];

/// The client for Vercel's hosts.
pub struct Relay {
    /// Vercel's hosts.
    pub hosts: Hosts,
    dialer: Arc<Dialer>,
    clock: Clock,
    /// By origin and whether it may be on this machine.
    pools: Mutex<LruCache<(Uri, bool), Arc<Pool>>>,
}

impl Relay {
    /// A client for `hosts` that connects and verifies certificates like `upstream`.
    pub fn new(hosts: Hosts, upstream: &Upstream, clock: Clock) -> Self {
        Self { hosts, dialer: upstream.dialer().clone(), clock, pools: Mutex::new(LruCache::new(MAX_ORIGINS)) }
    }

    fn pool(&self, origin: &Uri, may_be_this_machine: bool) -> Arc<Pool> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        let (dialer, clock) = (self.dialer.clone(), self.clock.clone());
        let make = || Arc::new(Pool::new(origin.clone(), may_be_this_machine, dialer, clock));
        pools.get_or_insert((origin.clone(), may_be_this_machine), make).clone()
    }
}

impl Proxy {
    /// The target without its query, if [`Proxy::handle`] can answer a request to `host`: it is for one of Connect's
    /// routes and names no team other than the credential's.
    pub fn handled_target(&self, host: &str, head: &Parts) -> Option<Uri> {
        let (path, query) = (head.uri.path(), head.uri.query());
        let is_route = hosts::is_connect(host) && route::parse(&head.method, path, None).is_ok();
        (is_route && query.is_none_or(|query| self.is_own_team(query))).then(|| path.parse().ok())?
    }

    /// Whether a query only names the team of the credential.
    fn is_own_team(&self, query: &str) -> bool {
        let identity = self.identity.borrow().clone();
        let claims = identity.oidc().map(|token| &token.claims);
        let (id, slug) = (claims.and_then(|c| c.owner_id.as_deref()), claims.and_then(|c| c.owner.as_deref()));
        query.split('&').all(|pair| match pair.split_once('=') {
            Some(("teamId", value)) => [id, self.upstream.team_id()].contains(&Some(value)),
            Some(("slug", value)) => slug == Some(value),
            _ => false,
        })
    }

    /// Relays a request to `host`, which is one of Vercel's, with this `target` instead of that of `head`. `guard` is
    /// dropped with the response body.
    pub async fn relay<G: Send + 'static>(
        &self,
        host: &str,
        target: &str,
        head: &Parts,
        body: Incoming,
        guard: G,
    ) -> Result<Reply, RequestError> {
        let received = Instant::now();
        if head.headers.get_all(header::UPGRADE).iter().any(|protocol| has_member(protocol, "websocket")) {
            let message = "WebSockets cannot pass through the sidecar.";
            return Err(RequestError::new(Code::UpgradeNotSupported, message).closing());
        }
        let bad_target = |_| RequestError::new(Code::BadTarget, "The request target cannot be passed on.");
        let target = PathAndQuery::try_from(target).map_err(bad_target)?;
        if has_placeholder(&head.headers) && self.relay.hosts.is_ambiguous(host, target.path()) {
            let message =
                "The path could be read as another one, which may not take the token. Send it in its plain form.";
            return Err(RequestError::new(Code::BadTarget, message).closing());
        }
        let bearer_host = self.relay.hosts.bearer(host, target.path());
        let configured = match bearer_host.and_then(|bearer_host| bearer_host.origin.as_ref()) {
            None if hosts::is_connect(host) => self.connect_replacement(),
            origin => origin,
        };
        let may_be_this_machine = configured.is_some();
        let origin = configured
            .map_or_else(|| Uri::try_from(format!("https://{host}")), |origin| Ok(origin.clone()))
            .map_err(bad_target)?;

        let mut headers = head.headers.clone();
        let accepts_trailers = headers.get_all(header::TE).iter().any(|coding| has_member(coding, "trailers"));
        remove_hop_by_hop(&mut headers);
        if accepts_trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        // These are for the sidecar. Its server sends `100 Continue` itself.
        for name in [header::EXPECT, KEY_HEADER, SIDECAR_CLIENT] {
            headers.remove(name);
        }
        let authority = origin.authority().map(|authority| HeaderValue::from_str(authority.as_str()));
        if let Some(Ok(authority)) = authority {
            headers.insert(header::HOST, authority);
        }
        headers.append(CDN_LOOP, HeaderValue::from_static(VIA_NAME));
        if bearer_host.is_some() && has_placeholder(&headers) {
            remove_overrides(&mut headers);
            headers.insert(header::AUTHORIZATION, self.oidc_bearer().await?);
        }

        let mut request = Request::new(RequestBody::Right(body));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = target.into();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = headers;
        let pool = self.relay.pool(&origin, may_be_this_machine);
        let explain = |failure| pool.explain(failure, hosts::is_connect(host));
        let pooled = pool.send(request).await.map_err(explain)?;
        let mut reply = pooled.stream(&pool).await;
        remove_hop_by_hop(reply.headers_mut());

        let (method, status, host) = (head.method.clone(), reply.status().as_u16(), host.to_owned());
        debug!(host, %method, status, ms = received.elapsed().as_millis() as u64, "relayed {method} to {host}");
        Ok(reply.map(|body| {
            let body = body.map_err(move |error| {
                let _dropped_with_the_body = &guard;
                let ms = received.elapsed().as_millis() as u64;
                warn!(host, %method, status, ms, "{host} broke off its answer");
                error
            });
            ReplyBody::Right(body.boxed_unsync())
        }))
    }

    /// The configured origin that replaces Connect's API. A regional host of Connect does not replace the others.
    fn connect_replacement(&self) -> Option<&Uri> {
        self.upstream.configured_origin().filter(|origin| !origin.host().is_some_and(hosts::is_connect))
    }

    /// `Authorization` with the OIDC token.
    async fn oidc_bearer(&self) -> Result<HeaderValue, RequestError> {
        match &*self.credential().await? {
            Credential::AccessToken { .. } => {
                let message = "There is no OIDC token to pass on: the sidecar was started with an access token.";
                Err(RequestError::new(Code::OidcTokenMissing, message).command("connect-sidecar --auth oidc"))
            }
            credential => credential.bearer().ok_or_else(super::invalid_bearer),
        }
    }
}

/// Whether a request has exactly one `Authorization`, with the placeholder.
pub fn has_placeholder(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    matches!((values.next(), values.next()), (Some(value), None) if placeholder::is_bearer(value))
}

/// Whether a list header has this member.
fn has_member(value: &HeaderValue, member: &str) -> bool {
    value.as_bytes().split(|b| *b == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(member.as_bytes()))
}

fn remove_overrides(headers: &mut HeaderMap) {
    let is_override = |name: &&HeaderName| {
        // Some servers do not distinguish `_` from `-`.
        let name = name.as_str().replace('_', "-");
        OVERRIDES.iter().any(|known| name == *known || (known.ends_with('-') && name.starts_with(known)))
    };
    let found: Vec<_> = headers.keys().filter(is_override).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    // With a transfer encoding, the length is invalid. The body is encoded again.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    if let Entry::Occupied(connection) = headers.entry(header::CONNECTION) {
        let (_, values) = connection.remove_entry_mult();
        let named: Vec<_> = values.collect();
        let named = named.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        let named: Vec<HeaderName> = named.filter_map(|name| name.trim().parse().ok()).collect();
        for name in named {
            // These are needed even if `Connection` names them.
            if name != header::CONTENT_LENGTH && name != header::HOST {
                headers.remove(name);
            }
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}
