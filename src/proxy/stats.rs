//! Counters that the proxy increments and `status` reads. They hold numbers, never names or secrets.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counts since the start.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: Counter,)+ }

        /// The counts at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)+ }

        impl Stats {
            /// Reads all counters.
            pub fn counts(&self) -> Counts {
                Counts { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Token requests answered from the cache.
    hits,
    /// Token requests that led to an upstream request.
    misses,
    /// Token requests that joined another caller's.
    collapsed,
    /// Requests sent upstream, of any kind, retries included.
    upstream_requests,
    /// Upstream's 5xx and failed connections.
    upstream_errors,
    /// When the last of these was, in milliseconds since the epoch; 0 without one.
    upstream_failed_at_ms,
    /// Token requests that Connect answered with a token: what it bills.
    granted,
    /// Requests refused by the sidecar itself.
    refused,
    /// Requests that were answered with an error, upstream's or our own.
    failed,
    /// When the last of these was, in milliseconds since the epoch; 0 without one.
    failed_at_ms,
    /// Connections let in although it could not be found out whose they are.
    unknown_peers,
    /// Fresh tokens picked up from the env file.
    rotations,
}

impl Counts {
    /// Upstream requests that an app without the sidecar would have made.
    pub const fn requests_saved(&self) -> u64 {
        self.hits + self.collapsed
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// At least so many.
    pub fn raise_to(&self, number: u64) {
        self.0.fetch_max(number, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
