//! Which warnings were said of which tokens, also before a restart and by other sidecars of the project.
//!
//! `<state dir>/warned.json` holds fingerprints and steps, no secret; private, and replaced as a whole under the
//! directory's lock. A file that cannot be read or written counts as none: a warning is rather said twice than never.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::os::private_dir;
use crate::os::safe_read;

/// Tokens whose warnings are remembered.
const REMEMBERED_TOKENS: usize = 32;
/// A file system that does not answer for this long is not asked.
const FILE_TIMEOUT: Duration = Duration::from_secs(1);

/// Remembers what was said.
#[derive(Debug, Default)]
pub struct WarningHistory {
    here: Memory,
    file: Option<PathBuf>,
    said_not_kept: bool,
}

impl WarningHistory {
    /// Remembers in this process alone.
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Remembers besides in the state directory, if there is one.
    pub fn kept_in(state_dir: Option<&Path>) -> Self {
        Self { file: state_dir.map(|dir| dir.join("warned.json")), ..Self::default() }
    }

    /// Whether this step before a token's end, zero for the end itself, is still to be said: nobody has said it, or one
    /// that comes after it. From now on it counts as said.
    pub async fn is_news(&mut self, fingerprint: &str, step: Duration) -> bool {
        if !self.here.note(fingerprint, step) {
            return false;
        }
        let Some(file) = self.file.clone() else { return true };
        let _alone = match private_dir::lock(file.parent().unwrap_or(&file)).await {
            Ok(lock) => lock,
            Err(problem) => {
                self.say_not_kept(problem);
                return true;
            }
        };
        let fingerprint = fingerprint.to_owned();
        let noting = tokio::task::spawn_blocking(move || {
            let mut everywhere = Memory::read(&file);
            let is_news = everywhere.note(&fingerprint, step);
            let content = serde_json::to_vec(&everywhere).unwrap_or_default();
            let written = if is_news { private_dir::write(&file, &content) } else { Ok(()) };
            (is_news, written)
        });
        match tokio::time::timeout(FILE_TIMEOUT, noting).await {
            Ok(Ok((is_news, written))) => {
                if let Err(problem) = written {
                    self.say_not_kept(problem);
                }
                is_news
            }
            _ => true,
        }
    }

    fn say_not_kept(&mut self, problem: private_dir::Problem) {
        if !std::mem::replace(&mut self.said_not_kept, true) {
            let hint = problem.command();
            warn!(hint, "what was warned of will be said again by the next start: {}", String::from(problem));
        }
    }
}

/// The last step said of each token, the token looked at last first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    said: VecDeque<Said>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Said {
    fingerprint: String,
    step_ms: u64,
}

impl Memory {
    fn read(file: &Path) -> Self {
        let content = safe_read::read(file).ok();
        content.and_then(|content| serde_json::from_slice(&content.bytes).ok()).unwrap_or_default()
    }

    /// Whether the step was not said yet; it is now.
    fn note(&mut self, fingerprint: &str, step: Duration) -> bool {
        let step_ms = u64::try_from(step.as_millis()).unwrap_or(u64::MAX);
        let known = self.said.iter().position(|said| said.fingerprint == fingerprint);
        let known = known.and_then(|at| self.said.remove(at));
        let is_news = known.as_ref().is_none_or(|known| step_ms < known.step_ms);
        let now = Said { fingerprint: fingerprint.to_owned(), step_ms };
        self.said.push_front(known.filter(|_| !is_news).unwrap_or(now));
        self.said.truncate(REMEMBERED_TOKENS);
        is_news
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
    async fn what_one_process_says_no_other_says_again() {
        let dir = state_dir();
        let warned = || WarningHistory::kept_in(Some(dir.path()));
        let (mut one, mut other) = (warned(), warned());
        assert!(one.is_news("a", HOUR).await);
        assert!(!other.is_news("a", HOUR).await);
        assert!(other.is_news("a", 15 * MINUTE).await);
        assert!(!one.is_news("a", 15 * MINUTE).await);
        assert!(one.is_news("b", HOUR).await, "another token");
        let mut later = warned();
        for step in [HOUR, 30 * MINUTE, 15 * MINUTE] {
            assert!(!later.is_news("a", step).await, "an earlier step, after a restart");
        }
        assert!(later.is_news("a", Duration::ZERO).await);
        let file = fs::metadata(dir.path().join("warned.json")).expect("a file");
        assert_eq!(file.mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_file_that_is_no_good_keeps_no_warning_back() {
        type Spoil = fn(&Path);
        let spoils: [(&str, Spoil); 5] = [
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
        for (what, spoil) in spoils {
            let dir = state_dir();
            spoil(&dir.path().join("warned.json"));
            let mut warned = WarningHistory::kept_in(Some(dir.path()));
            assert!(warned.is_news("a", HOUR).await, "{what}");
            assert!(!warned.is_news("a", HOUR).await, "{what}: still once in this process");
        }
    }

    #[test]
    fn only_so_many_tokens_are_remembered_those_looked_at_last() {
        let mut memory = Memory::default();
        for n in 0..REMEMBERED_TOKENS {
            assert!(memory.note(&n.to_string(), HOUR));
        }
        assert!(!memory.note("0", HOUR), "looked at again");
        assert!(memory.note("new", HOUR));
        assert_eq!(memory.said.len(), REMEMBERED_TOKENS);
        assert!(!memory.note("0", HOUR));
        assert!(memory.note("1", HOUR), "forgotten");
    }
}
