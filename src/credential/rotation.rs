//! Which token succeeds which: what was observed in the env file, judged against what is in use. Pure.
//!
//! A half-written, empty or missing file is normal (`vercel env pull` truncates, then writes), so nothing bad is
//! believed before it has lasted [`GRACE`]. Never lets an expired or older token of the same principal replace a valid
//! one, and never keeps a token against one of another principal.
//!
//! A token may be offered besides. It is in use for as long as the file says no more against it than it did then: an older
//! token in the file does not replace it, another principal's does, and so does a token that goes missing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Claims, Credential, FileNotes, OidcToken, TokenState};
use crate::os::clock::Timestamp;
use crate::os::safe_read::Flaw;

/// How long the last good token outlives a missing, empty or unusable file (docs/configuration.md section 3).
pub const GRACE: Duration = Duration::from_secs(10);

/// How long a value without closing quote or line end must stay as it is before it succeeds a good one.
const SETTLING: Duration = Duration::from_secs(1);

/// What one look at the file found.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one value at a time, moved on at once")]
pub enum Observation {
    /// A well-formed token.
    Token {
        /// The token.
        token: OidcToken,
        /// Remarks about the file it is in.
        notes: FileNotes,
        /// Its line may not be written to the end yet.
        open_ended: bool,
    },
    /// No file, no assignment or an empty one.
    Missing,
    /// Something that cannot be used.
    Invalid(Flaw),
}

/// What is worth saying about an observation. Each is said once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationEvent {
    /// A token where none was.
    Loaded,
    /// A fresh token of the same principal.
    Refreshed,
    /// A token of somebody else: descriptions of before and now.
    PrincipalChanged(String, String),
    /// A token that was not taken, since it is expired or older than the one in use.
    OlderIgnored,
    /// The token is gone.
    Lost,
    /// What is there is unusable.
    Unusable(Flaw),
}

/// The token in use and what is held against it.
#[derive(Debug)]
pub struct TokenRotation {
    state: TokenState,
    /// The last token's claims and principal, kept when the token is gone, to notice a change of principal.
    last: Option<(super::Principal, Claims)>,
    bad_since: Option<Instant>,
    missing_since: Option<Instant>,
    settling: Option<(String, Instant)>,
    ignored: Option<String>,
    /// Which token the file held last.
    in_file: Option<String>,
    /// Which token was offered and taken last.
    offered: Option<String>,
    /// The token in use was offered while the file held none, and so says nothing against it by holding none.
    stands_alone: bool,
}

impl Default for TokenRotation {
    fn default() -> Self {
        Self {
            state: TokenState::Missing,
            last: None,
            bad_since: None,
            missing_since: None,
            settling: None,
            ignored: None,
            in_file: None,
            offered: None,
            stands_alone: false,
        }
    }
}

impl TokenRotation {
    /// What is in use.
    pub fn state(&self) -> &TokenState {
        &self.state
    }

    /// Whether the token in use was offered, and is not the one that the file holds.
    pub fn is_offered(&self) -> bool {
        let TokenState::Loaded(credential) = &self.state else { return false };
        let is_it = |known: &Option<String>| known.as_deref() == Some(credential.fingerprint());
        is_it(&self.offered) && !is_it(&self.in_file)
    }

    /// Whether an early second look may change something.
    pub fn is_undecided(&self) -> bool {
        self.settling.is_some() || (self.bad_since.is_some() && matches!(self.state, TokenState::Loaded(_)))
    }

    /// Judges what a look at the file at `at` (`now` by the wall clock) found, and takes it or not.
    pub fn observe(&mut self, observed: Observation, at: Instant, now: Timestamp) -> Option<RotationEvent> {
        match observed {
            Observation::Token { token, open_ended, .. } => {
                self.bad_since = None;
                self.missing_since = None;
                self.stands_alone = false;
                self.in_file = Some(token.fingerprint().to_owned());
                self.observe_token(token, open_ended, at, now)
            }
            Observation::Missing | Observation::Invalid(_) if self.stands_alone => None,
            Observation::Missing => {
                let bad = *self.bad_since.get_or_insert(at);
                let missing = *self.missing_since.get_or_insert(at);
                let lasted = at.duration_since(bad.max(missing)) >= GRACE;
                match self.state {
                    TokenState::Missing => None,
                    _ if !lasted => None,
                    _ => {
                        self.state = TokenState::Missing;
                        Some(RotationEvent::Lost)
                    }
                }
            }
            Observation::Invalid(reason) => {
                self.missing_since = None;
                let lasted = at.duration_since(*self.bad_since.get_or_insert(at)) >= GRACE;
                let last = match &self.state {
                    TokenState::Loaded(_) if !lasted => return None,
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

    fn observe_token(
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
            let same_principal = current.principal == token.principal;
            let (is_valid, is_older) = (token.is_valid_at(now), token.is_older_than(current));
            let is_worse = if current.is_valid_at(now) { !is_valid || is_older } else { !is_valid && is_older };
            if same_principal && is_worse {
                self.settling = None;
                let news = self.ignored.as_deref() != Some(token.fingerprint());
                self.ignored = Some(token.fingerprint().to_owned());
                return news.then_some(RotationEvent::OlderIgnored);
            }
            if open_ended {
                match &self.settling {
                    Some((seen, since)) if seen == token.fingerprint() => {
                        if at.duration_since(*since) < SETTLING {
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
        Some(self.take(token))
    }

    /// Judges a token that came by other means than the file. An error is the reason for people.
    pub fn offer(&mut self, token: OidcToken, now: Timestamp) -> Result<RotationEvent, String> {
        let (current, principal) = match &self.state {
            TokenState::Loaded(credential) => (credential.oidc(), Some(credential.principal())),
            TokenState::Invalid { last, .. } => (None, last.as_ref()),
            TokenState::Missing => (None, None),
        };
        if principal.is_some_and(|principal| *principal != token.principal) {
            let mine = self.last.as_ref().map_or(String::new(), |(_, claims)| claims.description());
            return Err(format!("it is that of {}, not of {mine}", token.claims.description()));
        }
        if !token.is_valid_at(now) {
            return Err("it is expired or not valid yet".into());
        }
        if current.is_some_and(|current| !current.is_older_than(&token)) {
            return Err("it is no fresher than the one in use".into());
        }
        if current.is_none() {
            (self.stands_alone, self.bad_since, self.missing_since) = (true, None, None);
        }
        // That the file goes on holding it is nothing new.
        self.ignored.clone_from(&self.in_file);
        self.offered = Some(token.fingerprint().to_owned());
        Ok(self.take(token))
    }

    fn take(&mut self, token: OidcToken) -> RotationEvent {
        self.settling = None;
        let news = match self.last.take() {
            Some((principal, before)) if principal != token.principal => {
                RotationEvent::PrincipalChanged(before.description(), token.claims.description())
            }
            Some(_) if matches!(self.state, TokenState::Loaded(_)) => RotationEvent::Refreshed,
            _ => RotationEvent::Loaded,
        };
        self.last = Some((token.principal.clone(), token.claims.clone()));
        self.state = TokenState::Loaded(Arc::new(Credential::Oidc(token)));
        news
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::token;
    use super::*;

    const HOUR: u64 = 3600;

    /// A succession with a fake sense of time, in seconds.
    struct Story {
        succession: TokenRotation,
        began: Instant,
    }

    impl Story {
        fn new() -> Self {
            Self { succession: TokenRotation::default(), began: Instant::now() }
        }

        fn at(&mut self, seconds: u64, observed: Observation) -> Option<RotationEvent> {
            let now = Timestamp::from_seconds(seconds as f64);
            self.succession.observe(observed, self.began + Duration::from_secs(seconds), now)
        }

        fn offer(&mut self, seconds: u64, token: OidcToken) -> Result<RotationEvent, String> {
            self.succession.offer(token, Timestamp::from_seconds(seconds as f64))
        }

        fn in_use(&self) -> Option<u64> {
            match &self.succession.state {
                TokenState::Loaded(credential) => credential.oidc().map(|t| t.expires_at.as_seconds()),
                _ => None,
            }
        }
    }

    fn whole(token: OidcToken) -> Observation {
        Observation::Token { token, notes: FileNotes::default(), open_ended: false }
    }

    fn cut(token: OidcToken) -> Observation {
        Observation::Token { token, notes: FileNotes::default(), open_ended: true }
    }

    #[test]
    fn the_first_token_is_taken_at_once_and_a_fresh_one_is_announced_once() {
        let mut story = Story::new();
        assert_eq!(story.at(0, Observation::Missing), None);
        assert_eq!(story.at(0, cut(token("web", 0, HOUR))), Some(RotationEvent::Loaded));
        assert_eq!(story.at(1, whole(token("web", 0, HOUR))), None);
        assert_eq!(story.at(2, whole(token("web", 2, 2 * HOUR))), Some(RotationEvent::Refreshed));
        assert_eq!(story.at(3, whole(token("web", 2, 2 * HOUR))), None);
        assert_eq!(story.in_use(), Some(2 * HOUR));
    }

    #[test]
    fn a_token_is_an_offered_one_until_the_file_holds_it() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        assert!(!story.succession.is_offered());
        let offered = || token("web", 3000, 2 * HOUR);
        story.offer(3000, offered()).expect("taken");
        assert!(story.succession.is_offered());
        story.at(3001, whole(token("web", 0, HOUR)));
        assert!(story.succession.is_offered(), "the file holds an older one");
        story.at(3002, whole(offered()));
        assert!(!story.succession.is_offered(), "it was pulled, too");
        story.at(3003, whole(token("web", 3003, 3 * HOUR)));
        story.at(3004, whole(token("web", 0, HOUR)));
        assert!(!story.succession.is_offered(), "an older one in the file does not make it so");
    }

    #[test]
    fn a_gap_shorter_than_the_grace_goes_unnoticed() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        assert_eq!(story.at(1, Observation::Missing), None);
        assert_eq!(story.at(10, Observation::Invalid("torn".into())), None);
        assert!(story.succession.is_undecided());
        assert_eq!(story.at(10, whole(token("web", 0, HOUR))), None);
        assert_eq!(story.at(12, Observation::Missing), None, "the grace begins anew");
        assert_eq!(story.in_use(), Some(HOUR));
    }

    #[test]
    fn what_stays_bad_for_the_grace_is_believed_once() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        story.at(1, Observation::Missing);
        assert_eq!(story.at(11, Observation::Missing), Some(RotationEvent::Lost));
        assert_eq!(story.at(12, Observation::Missing), None);

        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        story.at(1, Observation::Invalid("a".into()));
        assert_eq!(story.at(11, Observation::Invalid("a".into())), Some(RotationEvent::Unusable("a".into())));
        assert_eq!(story.at(12, Observation::Invalid("a".into())), None);
        assert!(matches!(&story.succession.state, TokenState::Invalid { last: Some(_), .. }));
    }

    #[test]
    fn missing_is_believed_only_after_missing_for_the_grace() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        story.at(1, Observation::Invalid("a".into()));
        story.at(11, Observation::Invalid("a".into()));
        assert_eq!(story.at(12, Observation::Missing), None);
        assert_eq!(story.at(21, Observation::Missing), None);
        assert_eq!(story.at(22, Observation::Missing), Some(RotationEvent::Lost));
    }

    #[test]
    fn neither_an_expired_nor_an_older_token_replaces_a_valid_one_of_the_same_principal() {
        let mut story = Story::new();
        story.at(100, whole(token("web", 100, HOUR)));
        assert_eq!(story.at(200, whole(token("web", 150, 180))), Some(RotationEvent::OlderIgnored), "expired");
        assert_eq!(story.at(201, whole(token("web", 50, 2 * HOUR))), Some(RotationEvent::OlderIgnored), "older");
        assert_eq!(story.at(202, whole(token("web", 50, 2 * HOUR))), None, "said once");
        assert_eq!(story.in_use(), Some(HOUR));
        assert_eq!(
            story.at(203, whole(token("web", 203, 600))),
            Some(RotationEvent::Refreshed),
            "issued later, ends sooner"
        );
        assert_eq!(
            story.at(700, whole(token("web", 50, 2 * HOUR))),
            Some(RotationEvent::Refreshed),
            "the other has ended"
        );
    }

    #[test]
    fn a_token_of_another_principal_always_replaces_and_both_are_named() {
        let mut story = Story::new();
        story.at(100, whole(token("web", 100, HOUR)));
        let changed = |from: &str, to: &str| {
            let name = |project: &str| format!("acme/{project} (development, user_1)");
            Some(RotationEvent::PrincipalChanged(name(from), name(to)))
        };
        assert_eq!(story.at(200, whole(token("shop", 0, 150))), changed("web", "shop"));
        story.at(201, Observation::Missing);
        story.at(300, Observation::Missing);
        assert_eq!(story.at(301, whole(token("web", 0, HOUR))), changed("shop", "web"), "also over a gap");
    }

    #[test]
    fn an_offered_token_is_in_use_whatever_older_one_the_file_goes_on_holding() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        assert_eq!(story.offer(3000, token("web", 3000, 2 * HOUR)), Ok(RotationEvent::Refreshed));
        assert_eq!(story.at(3001, whole(token("web", 0, HOUR))), None, "known");
        assert_eq!(story.at(3002, whole(token("web", 1, HOUR))), Some(RotationEvent::OlderIgnored));
        assert_eq!(story.offer(7000, token("web", 7000, 3 * HOUR)), Ok(RotationEvent::Refreshed));
        assert_eq!(story.at(7001, whole(token("web", 1, HOUR))), None);
        assert_eq!(story.at(4 * HOUR, whole(token("web", 1, HOUR))), None, "both have ended");
        assert_eq!(story.in_use(), Some(3 * HOUR));
        assert!(matches!(story.at(4 * HOUR, whole(token("shop", 0, HOUR))), Some(RotationEvent::PrincipalChanged(..))));
    }

    #[test]
    fn an_offered_token_goes_with_the_one_in_the_file_but_not_for_want_of_one_that_never_was() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        assert_eq!(story.offer(1, token("web", 1, 2 * HOUR)), Ok(RotationEvent::Refreshed));
        story.at(2, Observation::Missing);
        assert_eq!(story.at(12, Observation::Missing), Some(RotationEvent::Lost));
        assert_eq!(story.offer(13, token("web", 13, 2 * HOUR)), Ok(RotationEvent::Loaded));
        for seconds in [14, 1000] {
            assert_eq!(story.at(seconds, Observation::Missing), None);
            assert_eq!(story.at(seconds, Observation::Invalid("torn".into())), None);
        }
        assert!(!story.succession.is_undecided());
        story.at(1001, whole(token("web", 0, HOUR)));
        story.at(1002, Observation::Missing);
        assert_eq!(story.at(1012, Observation::Missing), Some(RotationEvent::Lost), "now it was there");
    }

    #[test]
    fn an_offered_token_is_of_the_same_principal_and_fresher_or_refused() {
        let mut story = Story::new();
        story.at(100, whole(token("web", 100, HOUR)));
        for (offered, reason) in [
            (token("shop", 200, 2 * HOUR), "that of acme/shop (development, user_1), not of acme/web"),
            (token("web", 99, 2 * HOUR), "no fresher"),
            (token("web", 100, HOUR), "no fresher"),
            (token("web", 150, 200), "expired"),
        ] {
            let refusal = story.offer(200, offered).expect_err(reason);
            assert!(refusal.contains(reason), "{refusal}");
        }
        assert_eq!(story.in_use(), Some(HOUR));
        story.at(201, Observation::Invalid("torn".into()));
        story.at(211, Observation::Invalid("torn".into()));
        assert!(story.offer(212, token("shop", 212, HOUR)).is_err(), "whose cached tokens are still served");
        assert_eq!(story.offer(212, token("web", 212, HOUR)), Ok(RotationEvent::Loaded));
    }

    #[test]
    fn a_value_that_may_be_cut_succeeds_only_once_it_has_settled() {
        let mut story = Story::new();
        story.at(0, whole(token("web", 0, HOUR)));
        assert_eq!(story.at(1, cut(token("web", 1, 2 * HOUR))), None);
        assert!(story.succession.is_undecided());
        assert_eq!(story.at(1, cut(token("web", 1, 2 * HOUR))), None);
        assert_eq!(story.at(2, cut(token("web", 1, 3 * HOUR))), None, "it has changed again");
        assert_eq!(story.at(3, cut(token("web", 1, 3 * HOUR))), Some(RotationEvent::Refreshed));
        assert_eq!(story.in_use(), Some(3 * HOUR));
    }
}
