//! Random ids in Vercel's format, and times in its unit.

use std::time::{SystemTime, UNIX_EPOCH};

/// `prefix_` followed by `length` random letters and digits; only the random part if `prefix` is empty.
pub(super) fn random_id(prefix: &str, length: usize) -> String {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut bytes = vec![0; length];
    // If this fails, ids are only less unique.
    let _ = getrandom::fill(&mut bytes);
    let id: String = bytes.iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect();
    if prefix.is_empty() { id } else { format!("{prefix}_{id}") }
}

/// Milliseconds since 1970, as Connect's API has times.
pub(super) fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX / 2))
}
