//! How many refusals are worth a line of the log: the first few of each second, then how many more there were.
//!
//! Whoever hammers at the gates must not fill a disk, nor push what matters out of sight.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::warn;

/// Lines that are shown of one second.
const SHOWN: u64 = 5;

/// The refusals of this second.
#[derive(Default)]
pub(super) struct Refusals(AtomicU64);

impl Refusals {
    /// Counts one; whether it is to be shown.
    pub(super) fn show_next(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) < SHOWN
    }

    /// Ends the second: says how many were not shown.
    pub(super) fn sum_up(&self) {
        let hidden = self.0.swap(0, Ordering::Relaxed).saturating_sub(SHOWN);
        if hidden > 0 {
            warn!(hidden, "too many refusals to show: {hidden} more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_five_of_each_second_are_shown() {
        let refusals = Refusals::default();
        for _ in 0..2 {
            let shown = (0..20).filter(|_| refusals.show_next()).count();
            assert_eq!(shown, 5);
            refusals.sum_up();
        }
    }
}
