//! Decides whether a newly read token replaces the one in use. Pure.
//!
//! `vercel env pull` truncates the file before it writes, so a missing or unusable file counts only after it has lasted
//! for [`GRACE`]. An expired or older token never replaces a valid one of the same principal. A token of another
//! principal always replaces.
//!
//! A token can also be submitted by the refresher, without being in the file. It stays in use while the file goes on
//! holding an older token of the same principal. It is replaced if the file gets a token of another principal, and
//! dropped if the token that was in the file disappears.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::token_file::TokenReading;
use super::{Claims, Credential, OidcToken, Principal, TokenState};
use crate::os::clock::Timestamp;
use crate::os::safe_read::Defect;

/// The last good token stays in use this long after the file became missing, empty or unusable (docs/configuration.md
/// section 3).
pub const GRACE: Duration = Duration::from_secs(10);

/// A value without a closing quote or line end must be unchanged for this long before it replaces a good one.
const SETTLING_TIME: Duration = Duration::from_secs(1);

/// A change to report. Each is returned once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationEvent {
    /// There was no token before.
    Loaded,
    /// A fresh token of the same principal.
    Refreshed,
    /// A token of another principal. Holds the descriptions of the old and the new one.
    PrincipalChanged(String, String),
    /// The file has an expired token, or one older than the token in use, which stays.
    OlderIgnored,
    /// The token is gone.
    Lost,
    /// The file cannot be used.
    Unusable(Defect),
}

/// Why a submitted token is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// It belongs to another principal. Holds the descriptions of both.
    #[error("it is that of {submitted}, not of {current}")]
    OtherPrincipal {
        /// Of the submitted token.
        submitted: String,
        /// Of the token in use.
        current: String,
    },
    /// It is expired, or not valid yet.
    #[error("it is expired or not valid yet")]
    NotValid,
    /// It is not younger than the token in use.
    #[error("it is no fresher than the one in use")]
    NotFresher,
    /// The owner of the identity has ended.
    #[error("the sidecar is about to end")]
    ShuttingDown,
}

/// The token in use and the recent history of the file.
#[derive(Debug, Default)]
pub struct TokenRotation {
    state: TokenState,
    /// Principal and claims of the last token, kept when it is gone to detect a change of principal.
    last_principal: Option<(Principal, Claims)>,
    /// Since when the file has been missing or unusable.
    bad_since: Option<Instant>,
    missing_since: Option<Instant>,
    /// Fingerprint of an open-ended token, and since when the file has held it.
    settling: Option<(String, Instant)>,
    /// Fingerprint of the last token that was reported as [`RotationEvent::OlderIgnored`].
    ignored: Option<String>,
    /// Fingerprint of the last token in the file.
    in_file: Option<String>,
    /// Fingerprint of the last submitted token that was accepted.
    submitted: Option<String>,
    /// The token in use was submitted when the file had none, so a file without a token does not drop it.
    expects_no_file: bool,
}

impl TokenRotation {
    /// The token in use, or why there is none.
    pub fn state(&self) -> &TokenState {
        &self.state
    }

    /// Whether the token in use was submitted and is not in the file.
    pub fn is_submitted(&self) -> bool {
        let TokenState::Loaded(credential) = &self.state else { return false };
        let is_current = |fingerprint: &Option<String>| fingerprint.as_deref() == Some(credential.fingerprint());
        is_current(&self.submitted) && !is_current(&self.in_file)
    }

    /// Whether a decision is pending that another read of the file will settle.
    pub fn is_pending(&self) -> bool {
        self.settling.is_some() || (self.bad_since.is_some() && matches!(self.state, TokenState::Loaded(_)))
    }

    /// Applies one read of the file, made at `at` (monotonic) and `now` (wall clock).
    pub fn apply(&mut self, reading: TokenReading, at: Instant, now: Timestamp) -> Option<RotationEvent> {
        match reading {
            TokenReading::Token { token, open_ended, .. } => {
                self.bad_since = None;
                self.missing_since = None;
                self.expects_no_file = false;
                self.in_file = Some(token.fingerprint().to_owned());
                self.apply_token(token, open_ended, at, now)
            }
            TokenReading::Missing | TokenReading::Invalid(_) if self.expects_no_file => None,
            TokenReading::Missing => {
                let bad = *self.bad_since.get_or_insert(at);
                let missing = *self.missing_since.get_or_insert(at);
                let is_grace_over = at.duration_since(bad.max(missing)) >= GRACE;
                if !is_grace_over || matches!(self.state, TokenState::Missing) {
                    return None;
                }
                self.state = TokenState::Missing;
                Some(RotationEvent::Lost)
            }
            TokenReading::Invalid(reason) => {
                self.missing_since = None;
                let is_grace_over = at.duration_since(*self.bad_since.get_or_insert(at)) >= GRACE;
                let last = match &self.state {
                    TokenState::Loaded(_) if !is_grace_over => return None,
                    TokenState::Loaded(credential) => Some(credential.principal().clone()),
                    TokenState::Invalid { reason: known, .. } if *known == reason => return None,
                    TokenState::Invalid { last, .. } => last.clone(),
                    TokenState::Missing => None,
                };
                self.state = TokenState::Invalid { reason: reason.clone(), last };
                Some(RotationEvent::Unusable(reason))
            }
        }
    }

    fn apply_token(
        &mut self,
        token: OidcToken,
        open_ended: bool,
        at: Instant,
        now: Timestamp,
    ) -> Option<RotationEvent> {
        let current = match &self.state {
            TokenState::Loaded(credential) => credential.oidc(),
            TokenState::Invalid { .. } | TokenState::Missing => None,
        };
        if let Some(current) = current {
            if current.is_same_text(&token) {
                self.settling = None;
                return None;
            }
            let is_same_principal = current.principal == token.principal;
            let (is_valid, is_older) = (token.is_valid_at(now), token.is_older_than(current));
            let is_worse = if current.is_valid_at(now) { !is_valid || is_older } else { !is_valid && is_older };
            if is_same_principal && is_worse {
                self.settling = None;
                let is_new = self.ignored.as_deref() != Some(token.fingerprint());
                self.ignored = Some(token.fingerprint().to_owned());
                return is_new.then_some(RotationEvent::OlderIgnored);
            }
            if open_ended {
                match &self.settling {
                    Some((seen, since)) if seen == token.fingerprint() => {
                        if at.duration_since(*since) < SETTLING_TIME {
                            return None;
                        }
                    }
                    _ => {
                        self.settling = Some((token.fingerprint().to_owned(), at));
                        return None;
                    }
                }
            }
        }
        Some(self.replace(token))
    }

    /// Accepts a token that does not come from the file, if it is valid, fresher, and of the same principal.
    pub fn submit(&mut self, token: OidcToken, now: Timestamp) -> Result<RotationEvent, SubmitError> {
        let (current, principal) = match &self.state {
            TokenState::Loaded(credential) => (credential.oidc(), Some(credential.principal())),
            TokenState::Invalid { last, .. } => (None, last.as_ref()),
            TokenState::Missing => (None, None),
        };
        if principal.is_some_and(|principal| *principal != token.principal) {
            let current = self.last_principal.as_ref().map_or(String::new(), |(_, claims)| claims.description());
            return Err(SubmitError::OtherPrincipal { submitted: token.claims.description(), current });
        }
        if !token.is_valid_at(now) {
            return Err(SubmitError::NotValid);
        }
        if current.is_some_and(|current| !current.is_older_than(&token)) {
            return Err(SubmitError::NotFresher);
        }
        if current.is_none() {
            (self.expects_no_file, self.bad_since, self.missing_since) = (true, None, None);
        }
        // The older token that stays in the file is not worth a report.
        self.ignored.clone_from(&self.in_file);
        self.submitted = Some(token.fingerprint().to_owned());
        Ok(self.replace(token))
    }

    fn replace(&mut self, token: OidcToken) -> RotationEvent {
        self.settling = None;
        let event = match self.last_principal.take() {
            Some((principal, before)) if principal != token.principal => {
                RotationEvent::PrincipalChanged(before.description(), token.claims.description())
            }
            Some(_) if matches!(self.state, TokenState::Loaded(_)) => RotationEvent::Refreshed,
            _ => RotationEvent::Loaded,
        };
        self.last_principal = Some((token.principal.clone(), token.claims.clone()));
        self.state = TokenState::Loaded(Arc::new(Credential::Oidc(token)));
        event
    }
}

#[cfg(test)]
mod tests {
    use super::super::FileWarnings;
    use super::super::fixtures::token;
    use super::*;

    const HOUR: u64 = 3600;

    /// A rotation driven by times in seconds.
    struct Bench {
        rotation: TokenRotation,
        start: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { rotation: TokenRotation::default(), start: Instant::now() }
        }

        fn at(&mut self, seconds: u64, reading: TokenReading) -> Option<RotationEvent> {
            let now = Timestamp::from_seconds(seconds as f64);
            self.rotation.apply(reading, self.start + Duration::from_secs(seconds), now)
        }

        fn submit(&mut self, seconds: u64, token: OidcToken) -> Result<RotationEvent, SubmitError> {
            self.rotation.submit(token, Timestamp::from_seconds(seconds as f64))
        }

        fn in_use(&self) -> Option<u64> {
            match &self.rotation.state {
                TokenState::Loaded(credential) => credential.oidc().map(|t| t.expires_at.as_seconds()),
                _ => None,
            }
        }
    }

    fn complete(token: OidcToken) -> TokenReading {
        TokenReading::Token { token, warnings: FileWarnings::default(), open_ended: false }
    }

    fn invalid(reason: &str) -> TokenReading {
        TokenReading::Invalid(Defect::in_content(reason))
    }

    fn unterminated(token: OidcToken) -> TokenReading {
        TokenReading::Token { token, warnings: FileWarnings::default(), open_ended: true }
    }

    #[test]
    fn the_first_token_is_used_at_once_and_a_fresh_one_is_reported_once() {
        let mut bench = Bench::new();
        assert_eq!(bench.at(0, TokenReading::Missing), None);
        assert_eq!(bench.at(0, unterminated(token("web", 0, HOUR))), Some(RotationEvent::Loaded));
        assert_eq!(bench.at(1, complete(token("web", 0, HOUR))), None);
        assert_eq!(bench.at(2, complete(token("web", 2, 2 * HOUR))), Some(RotationEvent::Refreshed));
        assert_eq!(bench.at(3, complete(token("web", 2, 2 * HOUR))), None);
        assert_eq!(bench.in_use(), Some(2 * HOUR));
    }

    #[test]
    fn a_token_counts_as_submitted_until_the_file_has_it() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        assert!(!bench.rotation.is_submitted());
        let submitted = || token("web", 3000, 2 * HOUR);
        bench.submit(3000, submitted()).expect("taken");
        assert!(bench.rotation.is_submitted());
        bench.at(3001, complete(token("web", 0, HOUR)));
        assert!(bench.rotation.is_submitted(), "the file holds an older one");
        bench.at(3002, complete(submitted()));
        assert!(!bench.rotation.is_submitted(), "the file has it as well");
        bench.at(3003, complete(token("web", 3003, 3 * HOUR)));
        bench.at(3004, complete(token("web", 0, HOUR)));
        assert!(!bench.rotation.is_submitted(), "an older one in the file does not make it so");
    }

    #[test]
    fn a_gap_shorter_than_the_grace_period_is_ignored() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        assert_eq!(bench.at(1, TokenReading::Missing), None);
        assert_eq!(bench.at(10, invalid("torn")), None);
        assert!(bench.rotation.is_pending());
        assert_eq!(bench.at(10, complete(token("web", 0, HOUR))), None);
        assert_eq!(bench.at(12, TokenReading::Missing), None, "the grace period starts again");
        assert_eq!(bench.in_use(), Some(HOUR));
    }

    #[test]
    fn a_bad_file_counts_after_the_grace_period_and_is_reported_once() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        bench.at(1, TokenReading::Missing);
        assert_eq!(bench.at(11, TokenReading::Missing), Some(RotationEvent::Lost));
        assert_eq!(bench.at(12, TokenReading::Missing), None);

        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        bench.at(1, invalid("a"));
        assert_eq!(bench.at(11, invalid("a")), Some(RotationEvent::Unusable(Defect::in_content("a"))));
        assert_eq!(bench.at(12, invalid("a")), None);
        assert!(matches!(&bench.rotation.state, TokenState::Invalid { last: Some(_), .. }));
    }

    #[test]
    fn a_missing_file_counts_only_after_missing_for_the_whole_grace_period() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        bench.at(1, invalid("a"));
        bench.at(11, invalid("a"));
        assert_eq!(bench.at(12, TokenReading::Missing), None);
        assert_eq!(bench.at(21, TokenReading::Missing), None);
        assert_eq!(bench.at(22, TokenReading::Missing), Some(RotationEvent::Lost));
    }

    #[test]
    fn neither_an_expired_nor_an_older_token_replaces_a_valid_one_of_the_same_principal() {
        let mut bench = Bench::new();
        bench.at(100, complete(token("web", 100, HOUR)));
        assert_eq!(bench.at(200, complete(token("web", 150, 180))), Some(RotationEvent::OlderIgnored), "expired");
        assert_eq!(bench.at(201, complete(token("web", 50, 2 * HOUR))), Some(RotationEvent::OlderIgnored), "older");
        assert_eq!(bench.at(202, complete(token("web", 50, 2 * HOUR))), None, "reported once");
        assert_eq!(bench.in_use(), Some(HOUR));
        assert_eq!(
            bench.at(203, complete(token("web", 203, 600))),
            Some(RotationEvent::Refreshed),
            "issued later, ends sooner"
        );
        assert_eq!(
            bench.at(700, complete(token("web", 50, 2 * HOUR))),
            Some(RotationEvent::Refreshed),
            "the other has ended"
        );
    }

    #[test]
    fn a_token_of_another_principal_always_replaces() {
        let mut bench = Bench::new();
        bench.at(100, complete(token("web", 100, HOUR)));
        let changed = |from: &str, to: &str| {
            let name = |project: &str| format!("acme/{project} (development, user_1)");
            Some(RotationEvent::PrincipalChanged(name(from), name(to)))
        };
        assert_eq!(bench.at(200, complete(token("shop", 0, 150))), changed("web", "shop"));
        bench.at(201, TokenReading::Missing);
        bench.at(300, TokenReading::Missing);
        assert_eq!(bench.at(301, complete(token("web", 0, HOUR))), changed("shop", "web"), "also over a gap");
    }

    #[test]
    fn a_submitted_token_stays_in_use_while_the_file_has_an_older_one() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        assert_eq!(bench.submit(3000, token("web", 3000, 2 * HOUR)), Ok(RotationEvent::Refreshed));
        assert_eq!(bench.at(3001, complete(token("web", 0, HOUR))), None, "already reported");
        assert_eq!(bench.at(3002, complete(token("web", 1, HOUR))), Some(RotationEvent::OlderIgnored));
        assert_eq!(bench.submit(7000, token("web", 7000, 3 * HOUR)), Ok(RotationEvent::Refreshed));
        assert_eq!(bench.at(7001, complete(token("web", 1, HOUR))), None);
        assert_eq!(bench.at(4 * HOUR, complete(token("web", 1, HOUR))), None, "both have ended");
        assert_eq!(bench.in_use(), Some(3 * HOUR));
        assert!(matches!(
            bench.at(4 * HOUR, complete(token("shop", 0, HOUR))),
            Some(RotationEvent::PrincipalChanged(..))
        ));
    }

    #[test]
    fn a_submitted_token_is_dropped_with_the_token_in_the_file_but_not_if_there_was_none() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        assert_eq!(bench.submit(1, token("web", 1, 2 * HOUR)), Ok(RotationEvent::Refreshed));
        bench.at(2, TokenReading::Missing);
        assert_eq!(bench.at(12, TokenReading::Missing), Some(RotationEvent::Lost));
        assert_eq!(bench.submit(13, token("web", 13, 2 * HOUR)), Ok(RotationEvent::Loaded));
        for seconds in [14, 1000] {
            assert_eq!(bench.at(seconds, TokenReading::Missing), None);
            assert_eq!(bench.at(seconds, invalid("torn")), None);
        }
        assert!(!bench.rotation.is_pending());
        bench.at(1001, complete(token("web", 0, HOUR)));
        bench.at(1002, TokenReading::Missing);
        assert_eq!(bench.at(1012, TokenReading::Missing), Some(RotationEvent::Lost), "this time the file had one");
    }

    #[test]
    fn a_submitted_token_must_be_fresher_and_of_the_same_principal() {
        let mut bench = Bench::new();
        bench.at(100, complete(token("web", 100, HOUR)));
        for (submitted, reason) in [
            (token("shop", 200, 2 * HOUR), "that of acme/shop (development, user_1), not of acme/web"),
            (token("web", 99, 2 * HOUR), "no fresher"),
            (token("web", 100, HOUR), "no fresher"),
            (token("web", 150, 200), "expired"),
        ] {
            let refusal = bench.submit(200, submitted).expect_err(reason).to_string();
            assert!(refusal.contains(reason), "{refusal}");
        }
        assert_eq!(bench.in_use(), Some(HOUR));
        bench.at(201, invalid("torn"));
        bench.at(211, invalid("torn"));
        assert!(bench.submit(212, token("shop", 212, HOUR)).is_err(), "the last principal still counts");
        assert_eq!(bench.submit(212, token("web", 212, HOUR)), Ok(RotationEvent::Loaded));
    }

    #[test]
    fn an_open_ended_value_is_used_once_it_has_settled() {
        let mut bench = Bench::new();
        bench.at(0, complete(token("web", 0, HOUR)));
        assert_eq!(bench.at(1, unterminated(token("web", 1, 2 * HOUR))), None);
        assert!(bench.rotation.is_pending());
        assert_eq!(bench.at(1, unterminated(token("web", 1, 2 * HOUR))), None);
        assert_eq!(bench.at(2, unterminated(token("web", 1, 3 * HOUR))), None, "it has changed again");
        assert_eq!(bench.at(3, unterminated(token("web", 1, 3 * HOUR))), Some(RotationEvent::Refreshed));
        assert_eq!(bench.in_use(), Some(3 * HOUR));
    }
}
