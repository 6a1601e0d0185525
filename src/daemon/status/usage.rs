//! Counts this month's token requests as Connect bills them: per team, across restarts and all instances of the user.
//! Responses of an upstream on this machine, such as the emulator, are not billed and not counted.
//!
//! The counts are in `<state dir>/usage.json`, mode 0600, which is replaced by a rename under the directory's lock, at
//! most once a minute and at the end. A separate task does this, so no request waits for the file. The file contains
//! only numbers and team ids. A new month starts at zero, and so does an unreadable file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::credential::Identity;
use crate::instance::status::UsageStatus;
use crate::os::clock::{Clock, Timestamp};
use crate::os::private_dir;
use crate::proxy::stats::{Counts, Stats};

const FILE: &str = "usage.json";
/// Time between two writes.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// Token requests per month that Connect's Hobby plan includes (docs/vercel.md section 4).
const ALLOWANCE: u64 = 500;
/// Price of 1,000 token requests on the Pro plan, in US dollars.
const USD_PER_THOUSAND: u64 = 3;

/// What a team's requests of a month come to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct TeamUsage {
    requests: u64,
    saved: u64,
}

impl From<Counts> for TeamUsage {
    fn from(counts: Counts) -> Self {
        Self { requests: counts.granted, saved: counts.requests_saved() }
    }
}

impl TeamUsage {
    fn plus(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_add(other.requests), saved: self.saved.saturating_add(other.saved) }
    }

    fn minus(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_sub(other.requests), saved: self.saved.saturating_sub(other.saved) }
    }
}

/// A month's counts by team id, which is empty if the credential names no team.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Month {
    month: String,
    teams: BTreeMap<String, TeamUsage>,
}

impl Month {
    fn add(&mut self, team: &str, usage: TeamUsage) {
        if usage != TeamUsage::default() {
            let before = self.teams.entry(team.to_owned()).or_default();
            *before = before.plus(usage);
        }
    }

    /// Returns `self` if it is for this month, otherwise an empty month.
    fn or_new(self, month: &str) -> Self {
        if self.month == month { self } else { Self { month: month.to_owned(), teams: BTreeMap::new() } }
    }
}

/// State as of the last time the counters were read.
#[derive(Debug, Default)]
struct Ledger {
    /// Counts of all instances, as last read from the file, plus our own.
    month: Month,
    /// Values of our counters.
    read: TeamUsage,
    /// The team to which further counts belong.
    team: String,
}

/// Reports this month's counts.
pub struct Usage {
    is_billed: bool,
    ledger: watch::Receiver<Ledger>,
    stats: Arc<Stats>,
    clock: Clock,
}

impl Usage {
    pub(super) fn report(&self) -> UsageStatus {
        let month = month_of(self.clock.local());
        if !self.is_billed {
            return UsageStatus { month, requests: 0, saved: 0, saved_usd: 0.0, allowance: ALLOWANCE };
        }
        let ledger = self.ledger.borrow();
        let is_current = ledger.month.month == month;
        let before = ledger.month.teams.get(&ledger.team).filter(|_| is_current).copied().unwrap_or_default();
        let TeamUsage { requests, saved } = before.plus(TeamUsage::from(self.stats.counts()).minus(ledger.read));
        let saved_usd = saved.saturating_mul(USD_PER_THOUSAND) as f64 / 1000.0;
        UsageStatus { month, requests, saved, saved_usd, allowance: ALLOWANCE }
    }
}

/// Adds the counts of this instance to the file.
pub struct UsageRecorder {
    is_billed: bool,
    /// Without it, counts are lost when the process ends.
    state_dir: Option<PathBuf>,
    stats: Arc<Stats>,
    clock: Clock,
    identity: watch::Receiver<Arc<Identity>>,
    ledger: watch::Sender<Ledger>,
    /// Counts that are not in the file yet.
    unsaved: Month,
    warned_unsaved: bool,
}

/// Starts with the counts in the file. Records nothing unless upstream is billed.
pub fn start(
    is_billed: bool,
    state_dir: Option<PathBuf>,
    stats: Arc<Stats>,
    clock: Clock,
    mut identity: watch::Receiver<Arc<Identity>>,
) -> (Usage, UsageRecorder) {
    let ledger = watch::Sender::new(Ledger {
        month: state_dir.as_deref().map(read).unwrap_or_default(),
        read: stats.counts().into(),
        team: team_of(&identity.borrow_and_update()).unwrap_or_default(),
    });
    let usage = Usage { is_billed, ledger: ledger.subscribe(), stats: stats.clone(), clock: clock.clone() };
    let unsaved = Month::default();
    (usage, UsageRecorder { is_billed, state_dir, stats, clock, identity, ledger, unsaved, warned_unsaved: false })
}

impl UsageRecorder {
    /// Counts until `ended`, then saves the rest.
    pub async fn run(mut self, ended: CancellationToken) {
        if !self.is_billed {
            return;
        }
        let mut ticker = self.clock.ticker();
        loop {
            tokio::select! {
                () = ended.cancelled() => break,
                changed = self.identity.changed() => {
                    if changed.is_err() {
                        ended.cancelled().await;
                        break;
                    }
                    self.count();
                }
                () = ticker.tick(SAVE_EVERY) => {
                    self.count();
                    self.save().await;
                }
            }
        }
        self.count();
        self.save().await;
    }

    /// Reads the counters and adds the difference to the team that was in use until now.
    fn count(&mut self) {
        let month = month_of(self.clock.local());
        let counts = TeamUsage::from(self.stats.counts());
        let team = team_of(&self.identity.borrow_and_update());
        self.ledger.send_modify(|ledger| {
            // Without a token, the requests still served belong to the last team.
            let before = ledger.team.clone();
            ledger.team = team.unwrap_or_else(|| before.clone());
            let new = counts.minus(std::mem::replace(&mut ledger.read, counts));
            for counted in [&mut ledger.month, &mut self.unsaved] {
                *counted = std::mem::take(counted).or_new(&month);
                counted.add(&before, new);
            }
        });
    }

    /// Adds unsaved counts to the file, and reads those of other instances.
    async fn save(&mut self) {
        let Some(dir) = &self.state_dir else { return };
        match merge(dir, self.unsaved.clone()).await {
            Ok(month) => {
                self.unsaved.teams.clear();
                self.ledger.send_modify(|ledger| ledger.month = month);
            }
            Err(error) if !std::mem::replace(&mut self.warned_unsaved, true) => {
                warn!("could not save how many token requests there were: {error}");
            }
            Err(_) => {}
        }
    }
}

/// Why the counts could not be saved.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error("{}", .0.with_advice())]
    Directory(#[from] private_dir::Problem),
    #[error("could not encode the usage: {0}")]
    Encode(#[from] serde_json::Error),
    #[error(transparent)]
    Interrupted(#[from] tokio::task::JoinError),
}

/// Adds `new` to the file and returns the result.
async fn merge(dir: &Path, new: Month) -> Result<Month, SaveError> {
    let lock = if new.teams.is_empty() { None } else { Some(private_dir::lock(dir).await?) };
    let dir = dir.to_owned();
    let merging = tokio::task::spawn_blocking(move || {
        let mut month = read(&dir).or_new(&new.month);
        for (team, usage) in &new.teams {
            month.add(team, *usage);
        }
        if lock.is_some() {
            private_dir::write(&dir.join(FILE), &serde_json::to_vec(&month)?)?;
        }
        Ok(month)
    });
    merging.await?
}

fn read(dir: &Path) -> Month {
    private_dir::read_json(&dir.join(FILE))
}

/// By the machine's clock, so that no upstream response can start another month.
fn month_of(now: Timestamp) -> String {
    now.to_string().chars().take("2026-11".len()).collect()
}

fn team_of(identity: &Identity) -> Option<String> {
    let claims = &identity.oidc()?.claims;
    claims.owner_id.clone().or_else(|| claims.owner.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::{Credential, TokenState};
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use std::fs;
    use std::fs::Permissions;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    /// A moment in November 2026.
    const NOVEMBER: Timestamp = Timestamp::from_millis(1_795_000_000_000);
    const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);

    struct Instance {
        stats: Arc<Stats>,
        clock: Clock,
        identity: watch::Sender<Arc<Identity>>,
        usage: Usage,
        recorder: UsageRecorder,
    }

    impl Instance {
        fn new(dir: &TempDir) -> Self {
            Self::billed(dir, true)
        }

        fn billed(dir: &TempDir, is_billed: bool) -> Self {
            let (stats, clock) = (Arc::new(Stats::default()), Clock::test(NOVEMBER));
            let identity = watch::Sender::new(Arc::new(of_team("team_a")));
            let dir = Some(dir.path().to_owned());
            let (usage, recorder) = start(is_billed, dir, stats.clone(), clock.clone(), identity.subscribe());
            Self { stats, clock, identity, usage, recorder }
        }

        fn live(&self, requests: u64, hits: u64) {
            (0..requests).for_each(|_| self.stats.granted.count());
            (0..hits).for_each(|_| self.stats.hits.count());
        }

        async fn save(&mut self) {
            self.recorder.count();
            self.recorder.save().await;
        }

        fn shown(&self) -> (u64, u64) {
            let UsageStatus { requests, saved, .. } = self.usage.report();
            (requests, saved)
        }
    }

    fn of_team(team: &str) -> Identity {
        let claims = format!(r#"{{"iss":"https://oidc.vercel.com","owner_id":"{team}","exp":1900000000}}"#);
        let token = format!("{}.{}.e30", URL_SAFE_NO_PAD.encode(r#"{"alg":"RS256"}"#), URL_SAFE_NO_PAD.encode(claims));
        let token = crate::credential::OidcToken::decode(token.into()).expect("a token");
        Identity::first(TokenState::Loaded(Arc::new(Credential::Oidc(token))))
    }

    fn private() -> TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    #[tokio::test]
    async fn counts_survive_restarts_and_are_shared_by_all_instances() {
        let dir = private();
        let mut first = Instance::new(&dir);
        first.live(2, 12);
        assert_eq!(first.shown(), (2, 12), "before they are saved");
        let report = first.usage.report();
        assert_eq!((report.month.as_str(), report.saved_usd, report.allowance), ("2026-11", 0.036, 500));
        first.save().await;
        let mode = fs::metadata(dir.path().join(FILE)).expect("a file").mode();
        assert_eq!(mode & 0o7777, 0o600);

        let mut second = Instance::new(&dir);
        second.live(1, 0);
        first.live(4, 0);
        second.save().await;
        assert_eq!((first.shown(), second.shown()), ((6, 12), (3, 12)), "each knows the file as it last read it");
        first.save().await;
        second.save().await;
        assert_eq!((first.shown(), second.shown()), ((7, 12), (7, 12)));
    }

    #[tokio::test]
    async fn unsaved_counts_are_saved_at_the_end() {
        let dir = private();
        let Instance { stats, recorder, identity: _identity, .. } = Instance::new(&dir);
        let ended = CancellationToken::new();
        let keeping = tokio::spawn(recorder.run(ended.clone()));
        stats.granted.count();
        ended.cancel();
        keeping.await.expect("no panic");
        assert_eq!(Instance::new(&dir).shown(), (1, 0));
    }

    #[tokio::test]
    async fn unbilled_requests_are_neither_shown_nor_saved() {
        let dir = private();
        let mut real = Instance::new(&dir);
        real.live(1, 0);
        real.save().await;
        let instance = Instance::billed(&dir, false);
        instance.live(2, 12);
        assert_eq!(instance.shown(), (0, 0), "nor are the counts of billed instances shown");
        let ended = CancellationToken::new();
        ended.cancel();
        instance.recorder.run(ended).await;
        assert_eq!(Instance::new(&dir).shown(), (1, 0));
    }

    #[tokio::test]
    async fn each_team_has_its_own_counts() {
        let dir = private();
        let mut instance = Instance::new(&dir);
        instance.live(3, 0);
        instance.identity.send_replace(Arc::new(of_team("team_b")));
        instance.recorder.count();
        assert_eq!(instance.shown(), (0, 0));
        instance.live(1, 0);
        instance.identity.send_replace(Arc::new(Identity::first(TokenState::Missing)));
        instance.save().await;
        assert_eq!(instance.shown(), (1, 0), "without a token they belong to the last team");
        assert_eq!(Instance::new(&dir).shown(), (3, 0));
    }

    #[tokio::test]
    async fn a_new_month_and_a_broken_file_start_at_zero() {
        let dir = private();
        let mut instance = Instance::new(&dir);
        instance.live(3, 1);
        instance.save().await;
        instance.clock.advance(MONTH);
        assert_eq!((instance.usage.report().month.as_str(), instance.shown()), ("2026-12", (0, 0)));
        instance.live(1, 0);
        instance.save().await;
        assert_eq!((instance.shown(), read(dir.path()).month), ((1, 0), "2026-12".to_owned()));
        assert_eq!(Instance::new(&dir).shown(), (0, 0), "that instance is still in November");

        for content in ["", "{", "[]", r#"{"month":7}"#, r#"{"month":"2026-11","teams":{"team_a":{"requests":-1}}}"#] {
            fs::write(dir.path().join(FILE), content).expect("written");
            let mut instance = Instance::new(&dir);
            assert_eq!(instance.shown(), (0, 0), "{content}");
            instance.live(1, 0);
            instance.save().await;
            assert_eq!(Instance::new(&dir).shown(), (1, 0), "{content}");
        }
    }

    #[tokio::test]
    async fn failed_saves_are_retried() {
        let dir = private();
        let mut instance = Instance::new(&dir);
        instance.live(1, 0);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("a mode");
        instance.save().await;
        assert_eq!(
            (instance.shown(), read(dir.path())),
            ((1, 0), Month::default()),
            "others could have prepared the directory"
        );
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).expect("a mode");
        instance.save().await;
        assert_eq!((instance.shown(), Instance::new(&dir).shown()), ((1, 0), (1, 0)));
    }

    #[tokio::test]
    async fn nothing_is_written_without_requests_and_the_file_is_not_an_instance_file() {
        let dir = private();
        let mut instance = Instance::new(&dir);
        instance.save().await;
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
        instance.live(1, 0);
        instance.save().await;
        assert_eq!(crate::instance::state_file::all(dir.path()), []);
    }
}
