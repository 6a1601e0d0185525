//! The Vercel CLI: whether it is there, what its release does wrong, and how long its login lasts.
//!
//! What each release does is in docs/vercel.md sections 6 and 7. Of the login's file only its end is looked at.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use super::finding::{Finding, Severity};
use crate::os::clock::{Timestamp, format_duration};
use crate::os::executable::{self, Found};
use crate::os::safe_read;
use crate::os::subprocess::{self, Limits};

/// Limits of `vercel --version`.
const VERSION_LIMITS: Limits = Limits { time: Duration::from_secs(5), stdout: 64 * 1024, stderr: 0 };
/// A login that ends sooner is about to.
const LOGIN_ENDS_SOON: Duration = Duration::from_secs(3600);
const UPDATE: &str = "npm install --global vercel@latest";

type Version = (u64, u64, u64);

/// `project token` says its token on stdout, as JSON.
const PROJECT_TOKEN: Version = (53, 3, 0);
/// And for other teams than the default one.
const PROJECT_TOKEN_OF_ANY_TEAM: Version = (54, 0, 0);
/// `env pull` keeps what is not Vercel's.
const PULL_KEEPS_LOCAL_KEYS: Version = (56, 0, 0);

/// The CLI.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cli {
    program: Found,
    /// Its release, if it says which.
    version: Option<Version>,
}

/// Its login.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Login {
    /// `VERCEL_TOKEN` takes its place.
    Replaced,
    /// In the system's keyring, which is not looked into.
    InKeyring,
    /// There is none.
    Missing,
    /// One that ends then, if that is said.
    Ends {
        at: Option<Timestamp>,
        /// Whether the CLI can renew it by itself.
        is_renewable: bool,
    },
}

/// Finds the CLI on a `PATH`. It is asked only where its package does not tell.
pub(super) async fn find(path: &OsStr, project: &Path) -> Option<Cli> {
    let program = executable::find("vercel", path, project)?;
    let file = program.file.clone();
    let mut version = tokio::task::spawn_blocking(move || packaged_version(&file)).await.ok().flatten();
    if version.is_none() && program.checked.is_ok() {
        version = asked_version(&program.file, executable::trusted_path(path, &program.file, project)).await;
    }
    Some(Cli { program, version })
}

/// The version in the package that a program is of.
fn packaged_version(program: &Path) -> Option<Version> {
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
    }
    let real = program.canonicalize().ok()?;
    let packages = real.ancestors().skip(1).take(4).filter_map(|dir| {
        serde_json::from_slice::<Package>(&safe_read::read(&dir.join("package.json")).ok()?.bytes).ok()
    });
    packages.into_iter().find(|package| package.name == "vercel").and_then(|package| version_in(&package.version))
}

/// Its home is no directory, so that it can leave nothing there.
async fn asked_version(program: &Path, path: OsString) -> Option<Version> {
    let variables: [(&str, OsString); 4] = [
        ("PATH", path),
        ("HOME", "/dev/null".into()),
        ("NO_UPDATE_NOTIFIER", "1".into()),
        ("VERCEL_TELEMETRY_DISABLED", "1".into()),
    ];
    let mut command = Command::new(program);
    command.arg("--version").env_clear().envs(variables).current_dir("/");
    let asked = subprocess::run(command, VERSION_LIMITS).await.ok()?;
    version_in(std::str::from_utf8(&asked.stdout).ok()?)
}

/// The first `1.2.3` in a text.
fn version_in(text: &str) -> Option<Version> {
    text.split(|c: char| !c.is_ascii_digit() && c != '.').find_map(|word| {
        let mut numbers = word.split('.').map(|number| number.parse().ok());
        Some((numbers.next()??, numbers.next()??, numbers.next()??))
    })
}

/// Where the CLI keeps its login.
pub(super) fn directory(data_home: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let below_home = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/share" };
    let data = data_home.filter(|dir| !dir.is_empty()).map(PathBuf::from);
    Some(data.or_else(|| Some(Path::new(&home?).join(below_home)))?.join("com.vercel.cli"))
}

/// Looks at the login in the CLI's directory. `storage` is `VERCEL_TOKEN_STORAGE`.
pub(super) fn login(dir: &Path, storage: Option<&str>) -> Login {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Settings {
        cred_storage: Option<String>,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Session {
        token: Option<serde::de::IgnoredAny>,
        refresh_token: Option<serde::de::IgnoredAny>,
        expires_at: Option<f64>,
    }
    fn read<T: Default + for<'a> Deserialize<'a>>(path: &Path) -> T {
        safe_read::read(path).ok().and_then(|file| serde_json::from_slice(&file.bytes).ok()).unwrap_or_default()
    }
    let session: Session = read(&dir.join("auth.json"));
    if session.token.is_some() {
        let at = session.expires_at.map(Timestamp::from_seconds);
        return Login::Ends { at, is_renewable: session.refresh_token.is_some() };
    }
    let settings: Settings = read(&dir.join("config.json"));
    match storage.or(settings.cred_storage.as_deref()) {
        Some("keyring" | "auto") => Login::InKeyring,
        _ => Login::Missing,
    }
}

/// Judges both, at `now`. `is_needed`: the sidecar is to run the CLI by itself.
pub(super) fn judge(cli: Option<&Cli>, login: &Login, is_needed: bool, now: Timestamp) -> Vec<Finding> {
    let relied_on = if is_needed { Severity::Warning } else { Severity::Note };
    let Some(Cli { program, version }) = cli else {
        let detail = "It gets a fresh OIDC token, by hand or by --refresh cli.";
        return vec![Finding::new(relied_on, "cli_missing", "there is no Vercel CLI on PATH", detail).fix(UPDATE)];
    };
    let mut findings = Vec::new();
    if let Err(reason) = &program.checked {
        let title = format!("the Vercel CLI at {} is not run: {reason}", program.file.display());
        let detail = "By hand it may be used, --refresh cli does not use it.";
        findings.push(Finding::new(relied_on, "cli_refused", title, detail).fix(UPDATE));
    }
    match version {
        None => {
            let title = format!("{} does not say its version", program.file.display());
            findings.push(Finding::new(Severity::Note, "cli_version_unknown", title, "").fix("vercel --version"));
        }
        Some(version) => {
            let (major, minor, patch) = version;
            let title = format!("the Vercel CLI is version {major}.{minor}.{patch}");
            let lacks = if *version < PROJECT_TOKEN {
                Some("Its `project token` cannot be used to refresh: that needs 53.3.0.")
            } else if *version < PROJECT_TOKEN_OF_ANY_TEAM {
                Some("Its `project token` is that of the default team only: that of any needs 54.0.0.")
            } else {
                None
            };
            let pull = "Its `env pull` deletes what you have added to .env.local: 56.0.0 keeps it.";
            let deletes = (*version < PULL_KEEPS_LOCAL_KEYS).then_some(pull);
            let faults = [(relied_on, "cli_too_old", lacks), (Severity::Warning, "cli_pull_deletes_keys", deletes)];
            let faults: Vec<_> = faults
                .into_iter()
                .filter_map(|(severity, code, why)| Some(Finding::new(severity, code, title.clone(), why?).fix(UPDATE)))
                .collect();
            findings.extend(if faults.is_empty() { vec![Finding::ok("cli", title)] } else { faults });
        }
    }
    let logged_out =
        |title: String, detail: &str| Finding::new(relied_on, "cli_login", title, detail).fix("vercel login");
    let needs_it = "`vercel env pull`, and --refresh cli, need the login.";
    match login {
        Login::Replaced | Login::Ends { at: None, .. } => {}
        Login::InKeyring => {
            let title = "the CLI's login is in the keyring, and is not looked at";
            findings.push(Finding::new(Severity::Note, "cli_login_in_keyring", title, "").fix("vercel whoami"));
        }
        Login::Missing => findings.push(logged_out("the Vercel CLI is not logged in".into(), needs_it)),
        Login::Ends { at: Some(at), is_renewable } => {
            let left = at.since(now);
            let title = match left.is_zero() {
                true => format!("the CLI's login ended {} ago", format_duration(now.since(*at))),
                false => format!("the CLI's login ends in {}", format_duration(left)),
            };
            if left > LOGIN_ENDS_SOON {
                findings.push(Finding::ok("cli_login", title));
            } else if *is_renewable {
                let detail = "The next command of the CLI renews it. An SDK that tries to while offline deletes it.";
                findings.push(Finding::new(Severity::Note, "cli_login", title, detail).fix("vercel whoami"));
            } else {
                findings.push(logged_out(title, needs_it));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::env_files::fixtures::{NOW, NOW_SECONDS};
    use std::fs;

    fn cli(version: Option<Version>, is_refused: bool) -> Cli {
        let checked = if is_refused { Err(executable::Untrusted::InProject) } else { Ok("/bin/vercel".into()) };
        Cli { program: Found { file: "/bin/vercel".into(), checked }, version }
    }

    fn of_login(login: &Login, is_needed: bool) -> Vec<Finding> {
        judge(Some(&cli(Some((64, 0, 2)), false)), login, is_needed, NOW)
    }

    #[test]
    fn each_release_has_its_faults() {
        for (version, codes) in [
            ((50, 25, 0), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((53, 2, 9), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((53, 3, 0), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((54, 0, 0), vec!["cli_pull_deletes_keys"]),
            ((55, 99, 99), vec!["cli_pull_deletes_keys"]),
            ((56, 0, 0), vec!["cli"]),
            ((64, 0, 2), vec!["cli"]),
        ] {
            let judged = judge(Some(&cli(Some(version), false)), &Login::Replaced, false, NOW);
            assert_eq!(judged.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), codes, "{version:?}");
        }
        let team = judge(Some(&cli(Some((53, 3, 0)), false)), &Login::Replaced, true, NOW);
        assert_eq!(team[0].severity, Severity::Warning);
        assert!(team[0].detail.contains("default team"), "{}", team[0].detail);
    }

    #[test]
    fn one_that_is_missing_is_a_note_unless_the_sidecar_is_to_run_it() {
        for (is_needed, severity) in [(false, Severity::Note), (true, Severity::Warning)] {
            let judged = judge(None, &Login::Missing, is_needed, NOW);
            assert_eq!((judged.len(), judged[0].severity), (1, severity));
            let refused = cli(None, true);
            let judged = judge(Some(&refused), &Login::Replaced, is_needed, NOW);
            assert_eq!((judged[0].severity, judged[0].code.as_ref()), (severity, "cli_refused"));
            assert_eq!(judged[1].code, "cli_version_unknown");
        }
    }

    #[test]
    fn a_login_is_told_before_it_ends() {
        let ends = |left: i64, is_renewable| {
            let at = Timestamp::from_seconds(NOW_SECONDS.saturating_add_signed(left) as f64);
            Login::Ends { at: Some(at), is_renewable }
        };
        for (login, severity, fix) in [
            (ends(3601, false), Severity::Ok, None),
            (ends(3600, false), Severity::Note, Some("vercel login")),
            (ends(-1, false), Severity::Note, Some("vercel login")),
            (ends(-1, true), Severity::Note, Some("vercel whoami")),
            (Login::Missing, Severity::Note, Some("vercel login")),
            (Login::InKeyring, Severity::Note, Some("vercel whoami")),
        ] {
            let judged = of_login(&login, false);
            assert_eq!((judged[1].severity, judged[1].fix.as_deref()), (severity, fix), "{login:?}");
        }
        assert_eq!(of_login(&Login::Replaced, false).len(), 1);
        assert_eq!(of_login(&ends(0, false), true)[1].severity, Severity::Warning);
    }

    #[test]
    fn a_login_is_read_as_the_cli_writes_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("a file");
        assert_eq!(login(dir.path(), None), Login::Missing);
        assert_eq!(login(dir.path(), Some("keyring")), Login::InKeyring);
        put("config.json", r#"{"credStorage":"keyring"}"#);
        assert_eq!(login(dir.path(), None), Login::InKeyring);
        assert_eq!(login(dir.path(), Some("file")), Login::Missing);
        put("auth.json", r#"{"token":"vca_1","refreshToken":"vcr_1","expiresAt":1900000000,"userId":"u"}"#);
        assert_eq!(login(dir.path(), None), Login::Ends { at: Some(NOW), is_renewable: true });
        put("auth.json", r#"{"token":"vca_1"}"#);
        assert_eq!(login(dir.path(), None), Login::Ends { at: None, is_renewable: false });
        // What an SDK leaves that could not renew it.
        put("auth.json", "{}");
        assert_eq!(login(dir.path(), Some("file")), Login::Missing);
    }

    #[test]
    fn a_version_is_found_wherever_it_stands() {
        for (text, expected) in [
            ("64.0.2\n", Some((64, 0, 2))),
            ("Vercel CLI 53.10.1-canary.2", Some((53, 10, 1))),
            ("v1.2", None),
            ("", None),
            ("99999999999999999999.0.0", None),
        ] {
            assert_eq!(version_in(text), expected, "{text}");
        }
    }
}
