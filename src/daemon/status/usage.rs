//! The month's token requests, as Connect bills them: counted per team, over restarts and over all instances of the user.
//! What an upstream on this machine answers, such as an emulator, is billed by nobody, and not counted.
//!
//! `<state dir>/usage.json`, mode 0600, written whole by a rename under the directory's lock, at most once a minute and
//! at the end. One task reads the counters: no request ever waits for the file. It holds numbers and the ids of teams,
//! nothing else; one that cannot be read starts at zero, and so does a new month.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{self, Write};
use std::ops::{Add, Sub};
use std::os::unix::fs::PermissionsExt;
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
use crate::os::safe_read;
use crate::proxy::stats::{Counts, Stats};

const FILE: &str = "usage.json";
/// Time between two writes.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// Token requests that Connect's Hobby plan includes in a month (docs/vercel.md section 4).
const ALLOWANCE: u64 = 500;
/// What the Pro plan asks for a thousand of them.
const USD_PER_THOUSAND: u64 = 3;

/// What a team's requests of a month come to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    requests: u64,
    saved: u64,
}

impl From<Counts> for Sum {
    fn from(counts: Counts) -> Self {
        Self { requests: counts.granted, saved: counts.requests_saved() }
    }
}

impl Add for Sum {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_add(other.requests), saved: self.saved.saturating_add(other.saved) }
    }
}

impl Sub for Sum {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_sub(other.requests), saved: self.saved.saturating_sub(other.saved) }
    }
}

/// A month's sums by the id of the team, empty where the credential names none.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Month {
    month: String,
    teams: BTreeMap<String, Sum>,
}

impl Month {
    fn add(&mut self, team: &str, sum: Sum) {
        if sum != Sum::default() {
            let before = self.teams.entry(team.to_owned()).or_default();
            *before = *before + sum;
        }
    }

    /// Itself if it is that month, or else that month without anything in it.
    fn or_new(self, month: &str) -> Self {
        if self.month == month { self } else { Self { month: month.to_owned(), teams: BTreeMap::new() } }
    }
}

/// What was known when the counters were last read.
#[derive(Debug, Default)]
struct Ledger {
    /// Of all instances, as far as is known.
    month: Month,
    /// What the counters said.
    read: Sum,
    /// Whom all that they say more is counted for.
    team: String,
}

/// Shows the month so far.
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
        let Sum { requests, saved } = before + (Sum::from(self.stats.counts()) - ledger.read);
        let saved_usd = saved.saturating_mul(USD_PER_THOUSAND) as f64 / 1000.0;
        UsageStatus { month, requests, saved, saved_usd, allowance: ALLOWANCE }
    }
}

/// Adds what this instance counts to the file.
pub struct Keeper {
    is_billed: bool,
    /// `None`: what was counted ends with this process.
    state_dir: Option<PathBuf>,
    stats: Arc<Stats>,
    clock: Clock,
    identity: watch::Receiver<Arc<Identity>>,
    ledger: watch::Sender<Ledger>,
    /// What is not in the file yet.
    unsaved: Month,
    said_unsaved: bool,
}

/// Begins with what is in the file, if upstream is one that bills.
pub fn begin(
    is_billed: bool,
    state_dir: Option<PathBuf>,
    stats: Arc<Stats>,
    clock: Clock,
    mut identity: watch::Receiver<Arc<Identity>>,
) -> (Usage, Keeper) {
    let ledger = watch::Sender::new(Ledger {
        month: state_dir.as_deref().map(read).unwrap_or_default(),
        read: stats.counts().into(),
        team: team_of(&identity.borrow_and_update()).unwrap_or_default(),
    });
    let usage = Usage { is_billed, ledger: ledger.subscribe(), stats: stats.clone(), clock: clock.clone() };
    let unsaved = Month::default();
    (usage, Keeper { is_billed, state_dir, stats, clock, identity, ledger, unsaved, said_unsaved: false })
}

impl Keeper {
    /// Counts until `ended`, and saves what there is then.
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

    /// Reads the counters. What is new is the team's whose identity was used so far.
    fn count(&mut self) {
        let month = month_of(self.clock.local());
        let sum = Sum::from(self.stats.counts());
        let team = team_of(&self.identity.borrow_and_update());
        self.ledger.send_modify(|ledger| {
            // Without a token, what is served still is what the one before brought.
            let before = ledger.team.clone();
            ledger.team = team.unwrap_or_else(|| before.clone());
            let new = sum - std::mem::replace(&mut ledger.read, sum);
            for counted in [&mut ledger.month, &mut self.unsaved] {
                *counted = std::mem::take(counted).or_new(&month);
                counted.add(&before, new);
            }
        });
    }

    /// Adds what is new to the file, and learns what others have added.
    async fn save(&mut self) {
        let Some(dir) = &self.state_dir else { return };
        match merge(dir, self.unsaved.clone()).await {
            Ok(month) => {
                self.unsaved.teams.clear();
                self.ledger.send_modify(|ledger| ledger.month = month);
            }
            Err(reason) if !std::mem::replace(&mut self.said_unsaved, true) => {
                warn!("could not save how many token requests there were: {reason}");
            }
            Err(_) => {}
        }
    }
}

/// The file's month with what is new, which is in the file then.
async fn merge(dir: &Path, new: Month) -> Result<Month, String> {
    let lock = if new.teams.is_empty() { None } else { Some(private_dir::lock(dir).await?) };
    let dir = dir.to_owned();
    let merging = tokio::task::spawn_blocking(move || {
        let mut month = read(&dir).or_new(&new.month);
        for (team, sum) in &new.teams {
            month.add(team, *sum);
        }
        if lock.is_some() {
            write(&dir, &month).map_err(|e| format!("could not write {}: {e}", dir.join(FILE).display()))?;
        }
        Ok(month)
    });
    merging.await.unwrap_or_else(|e| Err(e.to_string()))
}

fn read(dir: &Path) -> Month {
    let content = safe_read::read(&dir.join(FILE)).ok();
    content.and_then(|content| serde_json::from_slice(&content.bytes).ok()).unwrap_or_default()
}

fn write(dir: &Path, month: &Month) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".").permissions(Permissions::from_mode(0o600)).tempfile_in(dir)?;
    file.write_all(&serde_json::to_vec(month)?)?;
    file.persist(dir.join(FILE))?;
    Ok(())
}

/// By the machine's clock: no answer of anybody's begins another month.
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
    use std::os::unix::fs::MetadataExt;
    use tempfile::TempDir;

    /// A moment in November 2026.
    const NOVEMBER: Timestamp = Timestamp::from_millis(1_795_000_000_000);
    const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);

    struct Bench {
        stats: Arc<Stats>,
        clock: Clock,
        identity: watch::Sender<Arc<Identity>>,
        usage: Usage,
        keeper: Keeper,
    }

    impl Bench {
        fn new(dir: &TempDir) -> Self {
            Self::billed(dir, true)
        }

        fn billed(dir: &TempDir, is_billed: bool) -> Self {
            let (stats, clock) = (Arc::new(Stats::default()), Clock::test(NOVEMBER));
            let identity = watch::Sender::new(Arc::new(of_team("team_a")));
            let dir = Some(dir.path().to_owned());
            let (usage, keeper) = begin(is_billed, dir, stats.clone(), clock.clone(), identity.subscribe());
            Self { stats, clock, identity, usage, keeper }
        }

        fn live(&self, requests: u64, hits: u64) {
            (0..requests).for_each(|_| self.stats.granted.count());
            (0..hits).for_each(|_| self.stats.hits.count());
        }

        async fn save(&mut self) {
            self.keeper.count();
            self.keeper.save().await;
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
    async fn what_was_counted_outlives_the_process_and_is_shared_by_all() {
        let dir = private();
        let mut first = Bench::new(&dir);
        first.live(2, 12);
        assert_eq!(first.shown(), (2, 12), "at once, whatever the file says");
        let report = first.usage.report();
        assert_eq!((report.month.as_str(), report.saved_usd, report.allowance), ("2026-11", 0.036, 500));
        first.save().await;
        let mode = fs::metadata(dir.path().join(FILE)).expect("a file").mode();
        assert_eq!(mode & 0o7777, 0o600);

        let mut second = Bench::new(&dir);
        second.live(1, 0);
        first.live(4, 0);
        second.save().await;
        assert_eq!((first.shown(), second.shown()), ((6, 12), (3, 12)), "each knows what it has read");
        first.save().await;
        second.save().await;
        assert_eq!((first.shown(), second.shown()), ((7, 12), (7, 12)));
    }

    #[tokio::test]
    async fn the_end_saves_what_is_left() {
        let dir = private();
        let Bench { stats, keeper, identity: _identity, .. } = Bench::new(&dir);
        let ended = CancellationToken::new();
        let keeping = tokio::spawn(keeper.run(ended.clone()));
        stats.granted.count();
        ended.cancel();
        keeping.await.expect("no panic");
        assert_eq!(Bench::new(&dir).shown(), (1, 0));
    }

    #[tokio::test]
    async fn what_nobody_bills_is_shown_nowhere_and_saved_nowhere() {
        let dir = private();
        let mut real = Bench::new(&dir);
        real.live(1, 0);
        real.save().await;
        let bench = Bench::billed(&dir, false);
        bench.live(2, 12);
        assert_eq!(bench.shown(), (0, 0), "not those of others either: these stand beside another upstream");
        let ended = CancellationToken::new();
        ended.cancel();
        bench.keeper.run(ended).await;
        assert_eq!(Bench::new(&dir).shown(), (1, 0));
    }

    #[tokio::test]
    async fn each_team_has_its_own() {
        let dir = private();
        let mut bench = Bench::new(&dir);
        bench.live(3, 0);
        bench.identity.send_replace(Arc::new(of_team("team_b")));
        bench.keeper.count();
        assert_eq!(bench.shown(), (0, 0));
        bench.live(1, 0);
        bench.identity.send_replace(Arc::new(Identity::first(TokenState::Missing)));
        bench.save().await;
        assert_eq!(bench.shown(), (1, 0), "without a token it is still the last one's");
        assert_eq!(Bench::new(&dir).shown(), (3, 0));
    }

    #[tokio::test]
    async fn a_month_starts_at_zero_and_so_does_a_broken_file() {
        let dir = private();
        let mut bench = Bench::new(&dir);
        bench.live(3, 1);
        bench.save().await;
        bench.clock.advance(MONTH);
        assert_eq!((bench.usage.report().month.as_str(), bench.shown()), ("2026-12", (0, 0)));
        bench.live(1, 0);
        bench.save().await;
        assert_eq!((bench.shown(), read(dir.path()).month), ((1, 0), "2026-12".to_owned()));
        assert_eq!(Bench::new(&dir).shown(), (0, 0), "it is November there");

        for content in ["", "{", "[]", r#"{"month":7}"#, r#"{"month":"2026-11","teams":{"team_a":{"requests":-1}}}"#] {
            fs::write(dir.path().join(FILE), content).expect("written");
            let mut bench = Bench::new(&dir);
            assert_eq!(bench.shown(), (0, 0), "{content}");
            bench.live(1, 0);
            bench.save().await;
            assert_eq!(Bench::new(&dir).shown(), (1, 0), "{content}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_saved_is_tried_again() {
        let dir = private();
        let mut bench = Bench::new(&dir);
        bench.live(1, 0);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("a mode");
        bench.save().await;
        assert_eq!((bench.shown(), read(dir.path())), ((1, 0), Month::default()), "others could have prepared it");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).expect("a mode");
        bench.save().await;
        assert_eq!((bench.shown(), Bench::new(&dir).shown()), ((1, 0), (1, 0)));
    }

    #[tokio::test]
    async fn nothing_is_written_while_nothing_happens_and_it_is_no_instances_file() {
        let dir = private();
        let mut bench = Bench::new(&dir);
        bench.save().await;
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
        bench.live(1, 0);
        bench.save().await;
        assert_eq!(crate::instance::state_file::all(dir.path()), []);
    }
}
