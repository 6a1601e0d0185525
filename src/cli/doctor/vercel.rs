//! The Vercel CLI: whether it is installed, known faults of its version, and when its login expires.
//!
//! docs/vercel.md sections 6 and 7 describe what each version does. Of the login file only the expiry is used.

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

/// How long `vercel --version` may take.
const VERSION_LIMITS: Limits = Limits { time: Duration::from_secs(5), stdout: 64 * 1024, stderr: 0 };
/// A login that expires within this time is about to expire.
const LOGIN_EXPIRES_SOON: Duration = Duration::from_secs(3600);
const UPDATE: &str = "npm install --global vercel@latest";

type Version = (u64, u64, u64);

/// From here on `project token` prints its token on stdout, as JSON.
const PROJECT_TOKEN: Version = (53, 3, 0);
/// From here on `project token` works for teams other than the default one.
const PROJECT_TOKEN_OF_ANY_TEAM: Version = (54, 0, 0);
/// From here on `env pull` keeps variables that are not from Vercel.
const PULL_KEEPS_LOCAL_KEYS: Version = (56, 0, 0);

/// An installed Vercel CLI.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cli {
    program: Found,
    /// Its version, if known.
    version: Option<Version>,
}

/// The login of the Vercel CLI.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Login {
    /// `VERCEL_TOKEN` is used instead.
    Replaced,
    /// In the system's keyring, which is not read.
    InKeyring,
    /// Not logged in.
    Missing,
    /// Logged in until `at`, if known.
    Expires {
        at: Option<Timestamp>,
        /// Whether the CLI can renew it.
        is_renewable: bool,
    },
}

/// Finds the CLI on a `PATH`. It is run only if its version cannot be read from its package.
pub(super) async fn find(path: &OsStr, project: &Path) -> Option<Cli> {
    let program = executable::find("vercel", path, project)?;
    let file = program.file.clone();
    let mut version = tokio::task::spawn_blocking(move || packaged_version(&file)).await.ok().flatten();
    if version.is_none() && program.checked.is_ok() {
        version = reported_version(&program.file, executable::trusted_path(path, &program.file, project)).await;
    }
    Some(Cli { program, version })
}

/// The version in the `package.json` of the package that contains the program.
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

/// The version that the program prints. Its home is no directory, so it can write nothing there.
async fn reported_version(program: &Path, path: OsString) -> Option<Version> {
    let variables = [
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

/// The directory in which the CLI stores its login.
pub(super) fn directory(data_home: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let below_home = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/share" };
    let data = data_home.filter(|dir| !dir.is_empty()).map(PathBuf::from);
    Some(data.or_else(|| Some(Path::new(&home?).join(below_home)))?.join("com.vercel.cli"))
}

/// Reads the login in the CLI's directory. `storage` is `VERCEL_TOKEN_STORAGE`.
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
        return Login::Expires { at, is_renewable: session.refresh_token.is_some() };
    }
    let settings: Settings = read(&dir.join("config.json"));
    match storage.or(settings.cred_storage.as_deref()) {
        Some("keyring" | "auto") => Login::InKeyring,
        _ => Login::Missing,
    }
}

/// Findings about the CLI and its login at `now`. `is_needed`: the sidecar is configured to run the CLI.
pub(super) fn evaluate(cli: Option<&Cli>, login: &Login, is_needed: bool, now: Timestamp) -> Vec<Finding> {
    let severity_if_needed = if is_needed { Severity::Warning } else { Severity::Note };
    let Some(Cli { program, version }) = cli else {
        let detail = "It fetches new OIDC tokens, run by hand or by the sidecar with --refresh cli.";
        return vec![
            Finding::new(severity_if_needed, "cli_missing", "there is no Vercel CLI on PATH", detail).fix(UPDATE),
        ];
    };
    let mut findings = Vec::new();
    if let Err(reason) = &program.checked {
        let title = format!("the Vercel CLI at {} is not run: {reason}", program.file.display());
        let detail = "You may use it by hand; --refresh cli does not use it.";
        findings.push(Finding::new(severity_if_needed, "cli_refused", title, detail).fix(UPDATE));
    }
    match version {
        None => {
            let title = format!("{} does not print its version", program.file.display());
            findings.push(Finding::new(Severity::Note, "cli_version_unknown", title, "").fix("vercel --version"));
        }
        Some(version) => {
            let (major, minor, patch) = version;
            let title = format!("the Vercel CLI is version {major}.{minor}.{patch}");
            let lacks = if *version < PROJECT_TOKEN {
                Some("Its `project token` cannot be used to refresh; that needs 53.3.0.")
            } else if *version < PROJECT_TOKEN_OF_ANY_TEAM {
                Some("Its `project token` works for the default team only; other teams need 54.0.0.")
            } else {
                None
            };
            let pull = "Its `env pull` deletes variables that you added to .env.local; 56.0.0 keeps them.";
            let deletes = (*version < PULL_KEEPS_LOCAL_KEYS).then_some(pull);
            let faults =
                [(severity_if_needed, "cli_too_old", lacks), (Severity::Warning, "cli_pull_deletes_keys", deletes)];
            let faults: Vec<_> = faults
                .into_iter()
                .filter_map(|(severity, code, why)| Some(Finding::new(severity, code, title.clone(), why?).fix(UPDATE)))
                .collect();
            findings.extend(if faults.is_empty() { vec![Finding::ok("cli", title)] } else { faults });
        }
    }
    let logged_out =
        |title: String, detail: &str| Finding::new(severity_if_needed, "cli_login", title, detail).fix("vercel login");
    let needs_it = "`vercel env pull` and --refresh cli need the login.";
    match login {
        Login::Replaced | Login::Expires { at: None, .. } => {}
        Login::InKeyring => {
            let title = "the CLI's login is in the keyring, which is not read";
            findings.push(Finding::new(Severity::Note, "cli_login_in_keyring", title, "").fix("vercel whoami"));
        }
        Login::Missing => findings.push(logged_out("the Vercel CLI is not logged in".into(), needs_it)),
        Login::Expires { at: Some(at), is_renewable } => {
            let left = at.since(now);
            let title = match left.is_zero() {
                true => format!("the CLI's login expired {} ago", format_duration(now.since(*at))),
                false => format!("the CLI's login expires in {}", format_duration(left)),
            };
            if left > LOGIN_EXPIRES_SOON {
                findings.push(Finding::ok("cli_login", title));
            } else if *is_renewable {
                let detail =
                    "The next command of the CLI renews it. An SDK that tries to renew it while offline deletes it.";
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
        evaluate(Some(&cli(Some((64, 0, 2)), false)), login, is_needed, NOW)
    }

    #[test]
    fn each_version_has_its_faults() {
        for (version, codes) in [
            ((50, 25, 0), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((53, 2, 9), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((53, 3, 0), vec!["cli_too_old", "cli_pull_deletes_keys"]),
            ((54, 0, 0), vec!["cli_pull_deletes_keys"]),
            ((55, 99, 99), vec!["cli_pull_deletes_keys"]),
            ((56, 0, 0), vec!["cli"]),
            ((64, 0, 2), vec!["cli"]),
        ] {
            let findings = evaluate(Some(&cli(Some(version), false)), &Login::Replaced, false, NOW);
            assert_eq!(findings.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), codes, "{version:?}");
        }
        let team = evaluate(Some(&cli(Some((53, 3, 0)), false)), &Login::Replaced, true, NOW);
        assert_eq!(team[0].severity, Severity::Warning);
        assert!(team[0].detail.contains("default team"), "{}", team[0].detail);
    }

    #[test]
    fn a_missing_cli_is_a_note_unless_the_sidecar_needs_it() {
        for (is_needed, severity) in [(false, Severity::Note), (true, Severity::Warning)] {
            let findings = evaluate(None, &Login::Missing, is_needed, NOW);
            assert_eq!((findings.len(), findings[0].severity), (1, severity));
            let refused = cli(None, true);
            let findings = evaluate(Some(&refused), &Login::Replaced, is_needed, NOW);
            assert_eq!((findings[0].severity, findings[0].code.as_ref()), (severity, "cli_refused"));
            assert_eq!(findings[1].code, "cli_version_unknown");
        }
    }

    #[test]
    fn an_expiring_login_is_reported() {
        let expires = |left: i64, is_renewable| {
            let at = Timestamp::from_seconds(NOW_SECONDS.saturating_add_signed(left) as f64);
            Login::Expires { at: Some(at), is_renewable }
        };
        for (login, severity, fix) in [
            (expires(3601, false), Severity::Ok, None),
            (expires(3600, false), Severity::Note, Some("vercel login")),
            (expires(-1, false), Severity::Note, Some("vercel login")),
            (expires(-1, true), Severity::Note, Some("vercel whoami")),
            (Login::Missing, Severity::Note, Some("vercel login")),
            (Login::InKeyring, Severity::Note, Some("vercel whoami")),
        ] {
            let findings = of_login(&login, false);
            assert_eq!((findings[1].severity, findings[1].fix.as_deref()), (severity, fix), "{login:?}");
        }
        assert_eq!(of_login(&Login::Replaced, false).len(), 1);
        assert_eq!(of_login(&expires(0, false), true)[1].severity, Severity::Warning);
    }

    #[test]
    fn a_login_is_read_in_the_format_of_the_cli() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("a file");
        assert_eq!(login(dir.path(), None), Login::Missing);
        assert_eq!(login(dir.path(), Some("keyring")), Login::InKeyring);
        write("config.json", r#"{"credStorage":"keyring"}"#);
        assert_eq!(login(dir.path(), None), Login::InKeyring);
        assert_eq!(login(dir.path(), Some("file")), Login::Missing);
        write("auth.json", r#"{"token":"vca_1","refreshToken":"vcr_1","expiresAt":1900000000,"userId":"u"}"#);
        assert_eq!(login(dir.path(), None), Login::Expires { at: Some(NOW), is_renewable: true });
        write("auth.json", r#"{"token":"vca_1"}"#);
        assert_eq!(login(dir.path(), None), Login::Expires { at: None, is_renewable: false });
        // An SDK that could not renew the login leaves this.
        write("auth.json", "{}");
        assert_eq!(login(dir.path(), Some("file")), Login::Missing);
    }

    #[test]
    fn a_version_is_found_anywhere_in_a_text() {
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
