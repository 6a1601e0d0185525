//! How many requests a team may send in a minute (docs/vercel.md section 4): reads and writes each have a window that
//! begins with the first request and ends a minute later. Knows nothing of who asks.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// How long a window lasts.
pub const WINDOW: Duration = Duration::from_secs(60);

/// What may be sent within a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Token requests and whatever else only reads.
    pub reads: u32,
    /// What changes something, or starts a consent.
    pub writes: u32,
    /// Whether a refusal says when to come back. Vercel does not promise that.
    pub retry_after: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { reads: 200, writes: 50, retry_after: false }
    }
}

/// What a request counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Against [`Limits::reads`].
    Read,
    /// Against [`Limits::writes`].
    Write,
}

/// The requests that were counted.
#[derive(Debug, Default)]
pub struct Counts {
    reads: Option<Window>,
    writes: Option<Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    begun: SystemTime,
    count: u32,
}

impl Counts {
    /// Counts a request; if it is one too many, how long the window lasts.
    pub fn count(&mut self, class: Class, limits: Limits, now: SystemTime) -> Result<(), Duration> {
        let (window, limit) = match class {
            Class::Read => (&mut self.reads, limits.reads),
            Class::Write => (&mut self.writes, limits.writes),
        };
        let lasts = |window: &Window| now >= window.begun && now < window.begun + WINDOW;
        let mut open = window.filter(lasts).unwrap_or(Window { begun: now, count: 0 });
        if open.count >= limit {
            return Err((open.begun + WINDOW).duration_since(now).unwrap_or_default());
        }
        open.count += 1;
        *window = Some(open);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn reads_and_writes_are_counted_apart_and_a_window_ends_after_a_minute() {
        let limits = Limits { reads: 2, writes: 1, retry_after: false };
        let (mut counts, start) = (Counts::default(), UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let second = Duration::from_secs(1);
        assert_eq!(counts.count(Class::Read, limits, start), Ok(()));
        assert_eq!(counts.count(Class::Read, limits, start + second), Ok(()));
        assert_eq!(counts.count(Class::Read, limits, start + second * 20), Err(second * 40));
        assert_eq!(counts.count(Class::Write, limits, start + second * 20), Ok(()));
        assert_eq!(counts.count(Class::Write, limits, start + second * 20), Err(WINDOW));
        assert_eq!(counts.count(Class::Read, limits, start + WINDOW), Ok(()));
        assert_eq!(counts.count(Class::Write, limits, start + WINDOW), Err(second * 20));
    }
}
