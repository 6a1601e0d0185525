//! One read of the env file, from its bytes to a decoded token.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::env_file::{self, Finding, Refusal};
use super::{Credential, FileWarnings, OidcToken, TokenState};
use crate::os::safe_read::{self, Content, Defect, DefectCause, ReadError};
use crate::remedy::Remedy;

/// A read that the file system has not answered by then is abandoned.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before a file that changed while it was read is read again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// A file that keeps changing is used as it is after this many reads.
const MAX_READS: u32 = 20;

/// The result of one read.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one value at a time, moved on at once")]
pub enum TokenReading {
    /// A well-formed token.
    Token {
        /// The token.
        token: OidcToken,
        /// What to warn of about the file.
        warnings: FileWarnings,
        /// Its line has neither a closing quote nor a line end, so it may not be completely written.
        open_ended: bool,
    },
    /// There is no file, no assignment, or an empty one.
    Missing,
    /// The file or the value cannot be used.
    Invalid(Defect),
}

impl TokenReading {
    /// The state of a sidecar that has read nothing but this.
    pub fn into_state(self) -> TokenState {
        match self {
            Self::Token { token, .. } => TokenState::Loaded(Arc::new(Credential::Oidc(token))),
            Self::Missing => TokenState::Missing,
            Self::Invalid(reason) => TokenState::Invalid { reason, last: None },
        }
    }
}

/// Reads and parses the file, several times if it changes meanwhile. `None` if the file system does not answer.
pub async fn read(path: &Path) -> Option<TokenReading> {
    for attempt in 1.. {
        let file = path.to_owned();
        let reading = tokio::task::spawn_blocking(move || safe_read::read(&file));
        match tokio::time::timeout(READ_TIMEOUT, reading).await.ok()?.ok()? {
            Ok(content) if content.has_changed && attempt < MAX_READS => tokio::time::sleep(RETRY_INTERVAL).await,
            Ok(content) => return Some(parse(&content)),
            Err(ReadError::Missing) => return Some(TokenReading::Missing),
            Err(ReadError::Unusable(defect)) => return Some(TokenReading::Invalid(defect)),
        }
    }
    None
}

/// Finds and decodes the token in the file's content.
pub fn parse(content: &Content) -> TokenReading {
    match env_file::find_token(&content.bytes) {
        Finding::Absent => TokenReading::Missing,
        Finding::Refused(refusal) => {
            let cause = match &refusal {
                Refusal::Encrypted => DefectCause::Encrypted,
                Refusal::Withheld => DefectCause::Known(Remedy::run("vercel env pull --environment=development")),
                _ => DefectCause::Content,
            };
            TokenReading::Invalid(Defect::new(refusal.to_string(), cause))
        }
        Finding::Value { value, assignments, open_ended } => {
            let warnings = FileWarnings {
                readable_by_others: content.readable_by_others,
                duplicate_assignments: assignments > 1,
                is_stale_mount: content.is_stale_mount,
            };
            match OidcToken::decode(value) {
                Ok(token) => TokenReading::Token { token, warnings, open_ended },
                Err(rejection) => TokenReading::Invalid(Defect::in_content(rejection.to_string())),
            }
        }
    }
}
