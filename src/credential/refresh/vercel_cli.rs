//! One run of the Vercel CLI that prints a fresh token (docs/vercel.md section 7).
//!
//! Fixed arguments, no shell, a short list of variables, nothing to read, a directory that is no project, a minute. What
//! it prints is a secret, and what it complains of is foreign text: neither gets any further than here as it is. When
//! the run ends, in whatever way, so does every process of its group.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::oneshot;

use crate::os::executable::{self, Found};
use crate::os::process_group;

/// Its name on PATH.
const NAME: &str = "vercel";
/// A run may take this long.
const LIMIT: Duration = Duration::from_secs(60);
/// After the CLI's own end, what it had left to print is waited for this long.
const REST: Duration = Duration::from_secs(1);
/// The most that it may print, in bytes.
const MAX_OUTPUT: u64 = 64 * 1024;
/// What is looked at of its complaints, in bytes.
const MAX_COMPLAINT: u64 = 4 * 1024;
/// What is shown of them, in characters.
const SHOWN: usize = 200;
/// A longer word may be a secret.
const LONGEST_WORD: usize = 20;

/// Variables that the CLI is given as we have them. No token of any kind is among them: it has its own login.
const VARIABLES: [&str; 13] = [
    "HOME",
    "XDG_DATA_HOME",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
    "XDG_DATA_DIRS",
    "XDG_CONFIG_DIRS",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
];

/// Those that lead it through a proxy, and let it trust the proxy's certificates.
const PROXY_VARIABLES: [&str; 9] = [
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "https_proxy",
    "http_proxy",
    "all_proxy",
    "no_proxy",
    "NODE_EXTRA_CA_CERTS",
];

/// What keeps it quiet.
const FIXED: [(&str, &str); 4] =
    [("CI", "1"), ("NO_COLOR", "1"), ("NO_UPDATE_NOTIFIER", "1"), ("VERCEL_TELEMETRY_DISABLED", "1")];

/// What the CLI is given of our environment.
#[derive(Clone, Default)]
pub struct CliEnvironment {
    /// Our PATH, in which it is looked for.
    pub path: OsString,
    variables: Vec<(&'static str, OsString)>,
}

impl CliEnvironment {
    /// Takes from our environment what is on the list, and what leads through a proxy if that is wanted.
    pub fn of(environment: &dyn Fn(&str) -> Option<OsString>, use_env_proxy: bool) -> Self {
        let proxy = if use_env_proxy { &PROXY_VARIABLES[..] } else { &[] };
        let names = VARIABLES.iter().chain(proxy);
        let variables = names.filter_map(|name| Some((*name, environment(name)?))).collect();
        Self { path: environment("PATH").unwrap_or_default(), variables }
    }
}

/// A proxy's URL may hold a password.
impl fmt::Debug for CliEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CliEnvironment").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Which project's token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `prj_…`
    pub project_id: String,
    /// `team_…`
    pub owner_id: String,
}

impl Target {
    /// `None` where an id has characters that none of Vercel's has: it could be taken for an option or a path.
    pub fn new(project_id: &str, owner_id: &str) -> Option<Self> {
        let is_plain = |id: &str| {
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
            !id.is_empty() && !id.starts_with('-') && id.bytes().all(is_plain)
        };
        let [project, owner] = [project_id, owner_id].map(|id| is_plain(id).then(|| id.to_owned()));
        Some(Self { project_id: project?, owner_id: owner? })
    }
}

/// A CLI that may be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cli {
    file: PathBuf,
    /// Where it finds what it runs itself: its first line asks for `node`.
    path: OsString,
}

impl Cli {
    /// The one on `path`, if there is one that no project has put there. An error is the reason for people.
    pub fn find(path: &OsStr, project: &Path) -> Result<Self, String> {
        match executable::find(NAME, path, project) {
            Some(Found { judged: Ok(file), .. }) => Ok(Self { path: executable::trusted(path, &file, project), file }),
            Some(Found { judged: Err(reason), file }) => {
                Err(format!("the Vercel CLI at {} is not run: {reason}", file.display()))
            }
            None => Err("the Vercel CLI is not on PATH".into()),
        }
    }
}

/// Runs it in `directory`; the token that it printed. An error is the reason for people.
pub async fn project_token(
    cli: &Cli,
    target: &Target,
    surroundings: &CliEnvironment,
    directory: &Path,
) -> Result<SecretString, String> {
    let mut command = Command::new(&cli.file);
    command
        // Version managers go by the name that they are called by.
        .arg0(NAME)
        .args(["project", "token", &target.project_id, "--format=json", "--scope", &target.owner_id])
        .env_clear()
        .envs(surroundings.variables.iter().map(|(name, value)| (name, value)))
        .envs(FIXED)
        .env("PATH", &cli.path)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, group) = process_group::spawn(&mut command)
        .map_err(|e| format!("the Vercel CLI at {} could not be started: {e}", cli.file.display()))?;

    let (mut output, mut complaint) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (over, is_over) = oneshot::channel::<()>();
    let waiting = async {
        let status = child.wait().await;
        drop(group);
        drop(over);
        status
    };
    let reading = async {
        // Closed on what is too much.
        let printed = async { drop(read(stdout, MAX_OUTPUT, &mut output).await) };
        let complained = async {
            if let Some(mut rest) = read(stderr, MAX_COMPLAINT, &mut complaint).await {
                // So that it can complain at length.
                let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
            }
        };
        tokio::select! {
            _ = async { tokio::join!(printed, complained) } => {}
            // What has left its group may hold the pipes for ever.
            () = async { let _ = is_over.await; tokio::time::sleep(REST).await } => {}
        }
    };
    let ended = tokio::time::timeout(LIMIT, async { tokio::join!(waiting, reading).0 }).await;
    let status = ended
        .map_err(|_| format!("the Vercel CLI took longer than {} s", LIMIT.as_secs()))?
        .map_err(|e| format!("the Vercel CLI's end could not be waited for: {e}"))?;
    if output.len() as u64 > MAX_OUTPUT {
        return Err(format!("the Vercel CLI printed more than {} KiB", MAX_OUTPUT / 1024));
    }
    if !status.success() {
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("code {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        let complaint = excerpt(&complaint).map_or(" and said nothing".to_owned(), |said| format!(": {said}"));
        return Err(format!("the Vercel CLI ended with {how}{complaint}"));
    }
    token_in(&output).ok_or_else(|| "the Vercel CLI printed something else than a token".into())
}

/// Reads up to one byte more than `limit`; gives the pipe back if there may be more.
async fn read<R: AsyncRead + Unpin>(pipe: Option<R>, limit: u64, into: &mut Vec<u8>) -> Option<R> {
    let mut limited = pipe?.take(limit + 1);
    let _ = limited.read_to_end(into).await;
    (limited.limit() == 0).then(|| limited.into_inner())
}

/// `{"token":"…"}`, or the token alone.
fn token_in(output: &[u8]) -> Option<SecretString> {
    #[derive(Deserialize)]
    struct Printed {
        token: String,
    }
    let text = std::str::from_utf8(output).ok()?.trim();
    match text.starts_with('{') {
        true => serde_json::from_str(text).ok().map(|Printed { token }| token.into()),
        false => (!text.is_empty()).then(|| text.into()),
    }
}

/// What a complaint is about, fit to be shown: its first line that speaks of an error, or else the first, without anything
/// that may be a secret.
fn excerpt(complaint: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(complaint);
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.clone().next()?;
    let line = lines.find(|line| line.starts_with("Error")).unwrap_or(first);
    let of_a_word = |c: char| c.is_ascii_alphanumeric() || "-_.=+~".contains(c);
    let mut shown = String::new();
    for part in line.split_inclusive(|c| !of_a_word(c)) {
        let word = part.trim_end_matches(|c| !of_a_word(c));
        let may_be_secret = word.len() > LONGEST_WORD || ["vca_", "vcr_"].iter().any(|prefix| word.contains(prefix));
        shown.push_str(if may_be_secret { "…" } else { word });
        shown.extend(part[word.len()..].chars().filter(|c| !c.is_control()));
    }
    Some(shown.chars().take(SHOWN).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn ids_that_could_be_taken_for_something_else_are_refused() {
        assert!(Target::new("prj_web-1", "team_Acme").is_some());
        for id in ["", "-x", "--cwd=/", "a b", "a/b", "../x", "a;b", "ä", "a\n"] {
            assert_eq!((Target::new(id, "team_1"), Target::new("prj_1", id)), (None, None), "{id:?}");
        }
    }

    #[test]
    fn a_token_is_printed_alone_or_in_an_object() {
        let token = |text: &str| token_in(text.as_bytes()).map(|token| token.expose_secret().to_owned());
        for text in ["a.b.c\n", "{\"token\":\"a.b.c\"}", "{\n  \"token\": \"a.b.c\"\n}\n"] {
            assert_eq!(token(text).as_deref(), Some("a.b.c"), "{text}");
        }
        for text in ["", "\n", "{}", "{\"token\":1}", "{\"token\":\"a\"", "{\"token\":\"a\"}{}"] {
            assert_eq!(token(text), None, "{text}");
        }
        assert!(token_in(b"\xff").is_none());
    }

    #[test]
    fn what_is_shown_of_a_complaint_holds_no_secret_and_no_escape() {
        let of = |text: &str| excerpt(text.as_bytes());
        assert_eq!(of("\n \n"), None);
        assert_eq!(
            of("Vercel CLI 64.0.2\nError: No login, run `vercel login`\nmore").as_deref(),
            Some("Error: No login, run `vercel login`")
        );
        assert_eq!(of("vca_1 \u{1b}[31mvcr_2 (eyJhbGciOiJSUzI1NiJ9.eyJ) end").as_deref(), Some("… [… (…) end"));
        assert_eq!(of(&"ab ".repeat(200)).map(|shown| shown.len()), Some(SHOWN));
    }

    #[test]
    fn variables_are_those_on_the_list_and_the_proxy_only_if_it_is_wanted() {
        let environment = |name: &str| Some(OsString::from(name));
        let names = |use_env_proxy| {
            let surroundings = CliEnvironment::of(&environment, use_env_proxy);
            surroundings.variables.iter().map(|(name, _)| *name).collect::<Vec<_>>()
        };
        assert_eq!(names(false), VARIABLES);
        assert_eq!(names(true), [&VARIABLES[..], &PROXY_VARIABLES].concat());
        assert!(!names(true).iter().any(|name| name.contains("VERCEL") || name.contains("NODE_OPTIONS")));
        let shown = format!("{:?}", CliEnvironment::of(&|_| Some("hunter2".into()), true));
        assert_eq!(shown.matches("hunter2").count(), 1, "PATH alone: {shown}");
    }
}
