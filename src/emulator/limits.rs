//! A team's rate limits (docs/vercel.md section 4). Reads and writes are counted separately, each in a window that
//! starts with the first request and lasts a minute.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// The length of a window.
pub const WINDOW: Duration = Duration::from_secs(60);

/// The number of requests allowed per window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Token requests and other reads.
    pub reads: u32,
    /// Requests that change something or start a consent.
    pub writes: u32,
    /// Whether a 429 has `Retry-After`, which Vercel does not promise.
    pub retry_after: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { reads: 200, writes: 50, retry_after: false }
    }
}

/// The limit that a request counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// [`Limits::reads`]
    Read,
    /// [`Limits::writes`]
    Write,
}

/// The requests counted in the current windows.
#[derive(Debug, Default)]
pub struct Counts {
    reads: Option<Window>,
    writes: Option<Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    start: SystemTime,
    count: u32,
}

impl Counts {
    /// Counts a request. If the limit is reached, returns the time left in the window.
    pub fn count(&mut self, class: Class, limits: Limits, now: SystemTime) -> Result<(), Duration> {
        let (window, limit) = match class {
            Class::Read => (&mut self.reads, limits.reads),
            Class::Write => (&mut self.writes, limits.writes),
        };
        let is_current = |window: &Window| now >= window.start && now < window.start + WINDOW;
        let mut current = window.filter(is_current).unwrap_or(Window { start: now, count: 0 });
        if current.count >= limit {
            return Err((current.start + WINDOW).duration_since(now).unwrap_or_default());
        }
        current.count += 1;
        *window = Some(current);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn reads_and_writes_are_counted_separately_in_windows_of_a_minute() {
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
