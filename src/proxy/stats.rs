//! Counters that the proxy increments and `status` reads. They hold numbers, never names or secrets.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counters since the start.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: Counter,)+ }

        /// A snapshot of the counters.
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
    /// Token requests that waited for the upstream request of an equal one.
    collapsed,
    /// Requests sent upstream, of all kinds and including retries.
    upstream_requests,
    /// Upstream's 5xx responses and failed connections.
    upstream_errors,
    /// Time of the last upstream error, in milliseconds since the epoch; 0 without one.
    upstream_failed_at_ms,
    /// Token requests that Connect answered with a token, which it bills.
    granted,
    /// Requests refused by the sidecar itself.
    refused,
    /// Requests answered with an error, upstream's or the sidecar's own.
    failed,
    /// Time of the last failed request, in milliseconds since the epoch; 0 without one.
    failed_at_ms,
    /// Connections accepted although their owner could not be determined.
    unknown_peers,
    /// OIDC token rotations.
    rotations,
}

/// How the cache took part in answering a token request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheUse {
    /// It had an answer.
    Hit,
    /// It had none, and upstream was asked.
    Miss,
    /// A fresh token was requested, and upstream was asked.
    Forced,
    /// The request waited for the fetch of an equal one (`collapsed` in RFC 9211).
    Collapsed,
}

impl CacheUse {
    /// The name in logs and events.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Forced => "forced",
            Self::Collapsed => "collapsed",
        }
    }
}

impl Stats {
    /// Counts a token request.
    pub fn count_cache_use(&self, cache_use: CacheUse) {
        match cache_use {
            CacheUse::Hit => self.hits.count(),
            CacheUse::Miss | CacheUse::Forced => self.misses.count(),
            CacheUse::Collapsed => self.collapsed.count(),
        }
    }
}

impl Counts {
    /// Upstream requests saved by the cache and single flight.
    pub const fn requests_saved(&self) -> u64 {
        self.hits + self.collapsed
    }
}

/// A number that only increases.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Sets the value unless it is already larger.
    pub fn raise_to(&self, number: u64) {
        self.0.fetch_max(number, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
