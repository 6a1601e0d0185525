//! Decrypted connections: requests that an app sends to one of Vercel's hosts and that interception has opened.
//!
//! Whoever sends them has opened a tunnel with the secret of a run: the gates against web pages and forwarding stand
//! there. What is asked of Connect's routes takes the way of all requests; everything else goes on to the host, and comes
//! back, as it is.

use std::sync::Arc;

use http::Request;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use hyper::body::Incoming;

use super::connections::Place;
use super::stream::Connection;
use super::{Lines, Server, head, overloaded};
use crate::proxy::error::RequestError;
use crate::proxy::reply::Reply;
use crate::proxy::{SIDECAR_CLIENT, guard};

impl Server {
    /// Answers the requests of one decrypted connection to `host`, which is one of Vercel's, until it ends. It counts as
    /// one of the server's, with their limits, and ends with them. `client` names whoever sends on it.
    pub async fn serve_intercepted<S>(&self, stream: S, host: &str, client: &HeaderValue)
    where
        S: Connection,
    {
        let Some(open) = self.connections.open().await else { return };
        open.serve_here().await;
        let answer = |request| self.answer_intercepted(request, host, client, &open.place);
        self.converse(stream, &open.place, Lines::Many, answer).await;
    }

    async fn answer_intercepted(
        &self,
        request: Request<Incoming>,
        host: &str,
        client: &HeaderValue,
        place: &Arc<Place>,
    ) -> Reply {
        let (mut head, body) = request.into_parts();
        let outcome = self.route_intercepted(&mut head, body, host, client, place).await;
        self.reply(outcome, &head)
    }

    async fn route_intercepted(
        &self,
        head: &mut Parts,
        body: Incoming,
        host: &str,
        client: &HeaderValue,
        place: &Arc<Place>,
    ) -> Result<Reply, RequestError> {
        let admitted = guard::check_intercepted(head, host)?;
        if self.connections.is_overloaded_by(place) {
            return Err(overloaded());
        }
        let Some(target) = self.proxy.handled_target(host, head) else {
            let target = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
            return self.proxy.relay(host, target, head, body, place.relay()).await;
        };
        // Those of what is passed on are its host's.
        head::check(head)?;
        self.notice_credentials(&admitted);
        head.uri = target;
        if has_own_cache(&head.headers) {
            head.headers.entry(SIDECAR_CLIENT).or_insert_with(|| client.clone());
        }
        self.proxy.handle(head, body).await
    }
}

/// Whether it is Connect's SDK for Python, which asks again for a good token that it was given only if it wants another
/// (docs/vercel.md section 3.2). A program without a cache asks each time, and is to be served from ours.
fn has_own_cache(headers: &HeaderMap) -> bool {
    let user_agent = headers.get(header::USER_AGENT);
    user_agent.is_some_and(|user_agent| user_agent.as_bytes().starts_with(b"vercel-connect/"))
}
