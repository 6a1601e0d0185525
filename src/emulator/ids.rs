//! Ids that look like Vercel's, random so that nobody can lean on one; and times in its unit.

use std::time::{SystemTime, UNIX_EPOCH};

/// `prefix_` and `length` random letters and digits.
pub(super) fn random_id(prefix: &str, length: usize) -> String {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut bytes = vec![0; length];
    // Without randomness the ids are merely alike.
    let _ = getrandom::fill(&mut bytes);
    let id: String = bytes.iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect();
    if prefix.is_empty() { id } else { format!("{prefix}_{id}") }
}

/// Milliseconds since 1970, as Connect counts.
pub(super) fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX / 2))
}
