//! Which expiry warnings were given for which tokens, shared with other sidecars of this user and kept over restarts.
//!
//! `<state dir>/warned.json` has fingerprints and steps, and no secret. It is replaced as a whole under the lock of the
//! directory. If it cannot be read or written, a warning may be repeated; none is lost.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::os::private_dir;

/// The number of tokens whose warnings are remembered.
const MAX_TOKENS: usize = 32;
/// An update of the file, including at most a second for its lock, that takes longer is abandoned.
const FILE_TIMEOUT: Duration = Duration::from_secs(2);

/// Remembers which warnings were given.
#[derive(Debug, Default)]
pub struct WarningHistory {
    in_memory: WarnedTokens,
    file: Option<PathBuf>,
    has_reported_failure: bool,
}

impl WarningHistory {
    /// A history of this process alone.
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// A history that is also kept in the state directory, if there is one.
    pub fn kept_in(state_dir: Option<&Path>) -> Self {
        Self { file: state_dir.map(|dir| dir.join("warned.json")), ..Self::default() }
    }

    /// Records the warning for a step (the time before the expiry, zero for the expiry itself). Returns whether it has
    /// to be given: neither this step nor a later one was recorded for the token.
    pub async fn record(&mut self, fingerprint: &str, step: Duration) -> bool {
        if !self.in_memory.record(fingerprint, step) {
            return false;
        }
        let Some(file) = self.file.clone() else { return true };
        let fingerprint = fingerprint.to_owned();
        let update =
            private_dir::update_json(&file, move |in_file: &mut WarnedTokens| in_file.record(&fingerprint, step));
        match tokio::time::timeout(FILE_TIMEOUT, update).await {
            Ok(Ok(is_new)) => is_new,
            Ok(Err(problem)) => {
                self.report_failure(problem);
                true
            }
            Err(_) => true,
        }
    }

    fn report_failure(&mut self, problem: private_dir::Problem) {
        if !std::mem::replace(&mut self.has_reported_failure, true) {
            let hint = problem.command();
            warn!(hint, "what was warned of will be said again by the next start: {}", String::from(problem));
        }
    }
}

/// The latest step recorded for each token, the most recently used token first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct WarnedTokens {
    #[serde(rename = "said")]
    tokens: VecDeque<WarnedToken>,
}

#[derive(Debug, Serialize, Deserialize)]
struct WarnedToken {
    fingerprint: String,
    step_ms: u64,
}

impl WarnedTokens {
    /// Records the step and returns whether it is later than the one recorded before.
    fn record(&mut self, fingerprint: &str, step: Duration) -> bool {
        let step_ms = u64::try_from(step.as_millis()).unwrap_or(u64::MAX);
        let known = self.tokens.iter().position(|token| token.fingerprint == fingerprint);
        let known = known.and_then(|at| self.tokens.remove(at));
        let is_new = known.as_ref().is_none_or(|known| step_ms < known.step_ms);
        let updated = WarnedToken { fingerprint: fingerprint.to_owned(), step_ms };
        self.tokens.push_front(known.filter(|_| !is_new).unwrap_or(updated));
        self.tokens.truncate(MAX_TOKENS);
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    const HOUR: Duration = Duration::from_secs(3600);
    const MINUTE: Duration = Duration::from_secs(60);

    fn state_dir() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    #[tokio::test]
    async fn processes_share_the_history() {
        let dir = state_dir();
        let history = || WarningHistory::kept_in(Some(dir.path()));
        let (mut one, mut other) = (history(), history());
        assert!(one.record("a", HOUR).await);
        assert!(!other.record("a", HOUR).await);
        assert!(other.record("a", 15 * MINUTE).await);
        assert!(!one.record("a", 15 * MINUTE).await);
        assert!(one.record("b", HOUR).await, "another token");
        let mut later = history();
        for step in [HOUR, 30 * MINUTE, 15 * MINUTE] {
            assert!(!later.record("a", step).await, "an earlier step, after a restart");
        }
        assert!(later.record("a", Duration::ZERO).await);
        let file = fs::metadata(dir.path().join("warned.json")).expect("a file");
        assert_eq!(file.mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_bad_file_suppresses_no_warning() {
        type Damage = fn(&Path);
        let cases: [(&str, Damage); 5] = [
            ("garbage", |file| fs::write(file, "{\"said\":[{}]}").expect("written")),
            ("a directory", |file| fs::create_dir(file).expect("made")),
            ("a link loop", |file| std::os::unix::fs::symlink(file, file).expect("a link")),
            ("everybody may write it", |file| {
                fs::write(file, r#"{"said":[{"fingerprint":"a","step_ms":0}]}"#).expect("written");
                fs::set_permissions(file, fs::Permissions::from_mode(0o666)).expect("a mode");
            }),
            ("a directory open to others", |file| {
                let dir = file.parent().expect("a directory");
                fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("a mode");
            }),
        ];
        for (what, damage) in cases {
            let dir = state_dir();
            damage(&dir.path().join("warned.json"));
            let mut history = WarningHistory::kept_in(Some(dir.path()));
            assert!(history.record("a", HOUR).await, "{what}");
            assert!(!history.record("a", HOUR).await, "{what}: still once in this process");
        }
    }

    #[test]
    fn the_least_recently_used_tokens_are_forgotten() {
        let mut tokens = WarnedTokens::default();
        for n in 0..MAX_TOKENS {
            assert!(tokens.record(&n.to_string(), HOUR));
        }
        assert!(!tokens.record("0", HOUR), "used again");
        assert!(tokens.record("new", HOUR));
        assert_eq!(tokens.tokens.len(), MAX_TOKENS);
        assert!(!tokens.record("0", HOUR));
        assert!(tokens.record("1", HOUR), "forgotten");
    }
}
