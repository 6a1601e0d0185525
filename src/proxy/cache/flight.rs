//! Single flight: one upstream request for any number of equal token requests, in a task of its own.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;

use super::store::{Entry, Flight, Miss};
use super::{Cache, CacheRequest, FetchResult, Found};
use crate::credential::Principal;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::key::TokenRequest;
use crate::proxy::reply::Answer;
use crate::proxy::stats::CacheUse;

impl Cache {
    /// The cached answer; else the flight to wait for, which may be that of an equal request. Of a request that joins a
    /// flight, nothing of `upstream` is kept while it waits.
    pub(super) fn join_or_start<F>(
        &self,
        request: CacheRequest,
        principal: &Principal,
        upstream: impl FnOnce() -> F,
    ) -> Result<Found, (CacheUse, watch::Receiver<Option<FetchResult>>)>
    where
        F: Future<Output = Result<Answer, RequestError>> + Send + 'static,
    {
        let CacheRequest { token_request: TokenRequest { key, validity_buffer, .. }, client, .. } = request;
        let buffer = self.limits.buffer.max(validity_buffer);
        let now = self.clock.latest();
        let mut store = self.lock();
        let forced = match store.lookup(&request.token_request, request.forced, client, now) {
            Ok(found) => return Ok(found),
            Err(Miss { forced }) => forced,
        };
        if let Some(flight) = store.flights.get_mut(&key)
            && !forced
            && flight.buffer >= buffer
        {
            flight.clients.extend(client);
            return Err((CacheUse::Collapsed, flight.result.clone()));
        }
        let replaced = if forced { store.remove(&key) } else { None };
        let cache_use = if forced { CacheUse::Forced } else { CacheUse::Miss };
        store.last_flight_id += 1;
        let id = store.last_flight_id;
        let (sender, result) = watch::channel(None);
        if store.principal.as_ref() == Some(principal) {
            let (connector, clients) = (request.connector.clone(), client.into_iter().collect());
            // Replaces an earlier flight, whose answer still goes to its own requests but is not stored.
            store.flights.insert(key, Flight { id, connector, buffer, result: result.clone(), clients });
        }
        let mut guard = FlightGuard { cache: self.clone(), id, request, replaced, sender };
        let upstream = upstream();
        self.tasks.spawn(async move {
            let result = upstream.await;
            guard.finish(result);
        });
        Err((cache_use, result))
    }
}

/// Ends a flight with its result, even if its task panics.
struct FlightGuard {
    cache: Cache,
    id: u64,
    request: CacheRequest,
    /// The entry that a forced request has removed.
    replaced: Option<Entry>,
    sender: watch::Sender<Option<FetchResult>>,
}

impl FlightGuard {
    fn finish(&mut self, result: Result<Answer, RequestError>) {
        let result = result.map(Arc::new);
        let mut store = self.cache.lock();
        let key = self.request.token_request.key;
        let is_registered = store.flights.get(&key).is_some_and(|flight| flight.id == self.id);
        let mut stored_for = None;
        if is_registered && let Some(flight) = store.flights.remove(&key) {
            let now = self.cache.clock.latest();
            if let Ok(answer) = &result {
                stored_for = store.store(&self.request, answer, flight.clients, now);
            }
            store.store_rate_limit(key, &result, now);
            // A request that was never sent replaces nothing.
            if result.as_ref().is_err_and(RequestError::is_unsent)
                && let Some(entry) = self.replaced.take()
            {
                store.insert(key, entry);
            }
        }
        // Sent under the lock, so that a later lookup finds either the flight or what it has stored.
        self.sender.send_replace(Some(FetchResult { result, stored_for }));
    }
}

impl Drop for FlightGuard {
    fn drop(&mut self) {
        if self.sender.borrow().is_none() {
            self.finish(Err(interrupted()));
        }
    }
}

/// The error for a request whose task ended without a result.
pub fn interrupted() -> RequestError {
    RequestError::new(Code::UpstreamInvalidResponse, "The request to Connect broke off in the sidecar. Try again.")
}
