//! Ids that look like Vercel's. Random, so that nobody can lean on one.

/// `prefix_` and `length` random letters and digits.
pub(super) fn random_id(prefix: &str, length: usize) -> String {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut bytes = vec![0; length];
    // Without randomness the ids are merely alike.
    let _ = getrandom::fill(&mut bytes);
    let id: String = bytes.iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect();
    if prefix.is_empty() { id } else { format!("{prefix}_{id}") }
}
