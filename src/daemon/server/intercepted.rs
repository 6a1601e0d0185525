//! Serves decrypted connections: requests of apps to Vercel's hosts that were intercepted.
//!
//! The client opened its tunnel with the secret of a run, so the checks against web pages and forwarding do not apply.
//! Connect's routes are handled like any other request; everything else is relayed to the host unchanged.

use std::sync::Arc;

use http::Request;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use hyper::body::Incoming;

use super::connections::Activity;
use super::stream::Connection;
use super::{Server, head, overloaded};
use crate::proxy::error::RequestError;
use crate::proxy::reply::Reply;
use crate::proxy::{SIDECAR_CLIENT, guard};

impl Server {
    /// Serves a decrypted connection to `host`, one of Vercel's, until it ends. It counts as one of the server's
    /// connections, with the same limits. `client_id` identifies the program that sends on it.
    pub async fn serve_intercepted<S>(&self, stream: S, host: &str, client_id: &HeaderValue)
    where
        S: Connection,
    {
        let Some(open) = self.connections.open().await else { return };
        open.attach_task().await;
        let activity = &open.activity;
        let answer = |request: Request<Incoming>| async move {
            let (mut head, body) = request.into_parts();
            let outcome = self.route_intercepted(&mut head, body, host, client_id, activity).await;
            self.finish(outcome, &head)
        };
        self.serve_http(stream, activity, Some(head::MAX_RELAYED_HEADERS), answer).await;
    }

    async fn route_intercepted(
        &self,
        head: &mut Parts,
        body: Incoming,
        host: &str,
        client_id: &HeaderValue,
        activity: &Arc<Activity>,
    ) -> Result<Reply, RequestError> {
        let admitted = guard::check_intercepted(head, host)?;
        if self.connections.is_over_limit(activity) {
            return Err(overloaded());
        }
        let Some(target) = self.proxy.handled_target(host, head) else {
            let target = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
            return self.proxy.relay(host, target, head, body, activity.begin_relay()).await;
        };
        // The limits of relayed requests are the host's.
        head::check(head)?;
        self.warn_of_dropped_credentials(&admitted);
        head.uri = target;
        if has_own_cache(&head.headers) {
            head.headers.entry(SIDECAR_CLIENT).or_insert_with(|| client_id.clone());
        }
        self.proxy.handle(head, body).await
    }
}

/// Whether the client is Connect's Python SDK, which requests a token again before its expiry only if it needs another
/// one (docs/vercel.md section 3.2). Clients without a cache request it every time, and are answered from ours.
fn has_own_cache(headers: &HeaderMap) -> bool {
    let user_agent = headers.get(header::USER_AGENT);
    user_agent.is_some_and(|user_agent| user_agent.as_bytes().starts_with(b"vercel-connect/"))
}
