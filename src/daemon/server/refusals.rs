//! Rate limit for log lines about refused requests: the first few of each second, then a count of the others. A client
//! that floods the sidecar must not fill the disk or hide other log lines.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::warn;

/// Refusals logged per second.
const MAX_PER_SECOND: u64 = 5;

/// Counts the refusals of the current second.
#[derive(Default)]
pub(super) struct RefusalLog(AtomicU64);

impl RefusalLog {
    /// Counts a refusal and returns whether to log it.
    pub(super) fn should_log(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) < MAX_PER_SECOND
    }

    /// Logs how many refusals of this second were not logged, and starts the next second.
    pub(super) fn end_second(&self) {
        let hidden = self.0.swap(0, Ordering::Relaxed).saturating_sub(MAX_PER_SECOND);
        if hidden > 0 {
            warn!(hidden, "too many refusals to log: {hidden} more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_five_of_each_second_are_logged() {
        let log = RefusalLog::default();
        for _ in 0..2 {
            let logged = (0..20).filter(|_| log.should_log()).count();
            assert_eq!(logged, 5);
            log.end_second();
        }
    }
}
