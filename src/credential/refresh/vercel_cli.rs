//! Runs the Vercel CLI to get a fresh token (docs/vercel.md section 7).
//!
//! The CLI gets fixed arguments, a short list of variables, a directory that is no project, and a minute. Its output is
//! a secret and its error message is untrusted text: neither leaves this module unprocessed.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use tokio::process::Command;

use crate::os::executable::{self, Found, Untrusted};
use crate::os::subprocess::{self, Limits};

/// The program's name on PATH.
const NAME: &str = "vercel";
/// Limits of one run.
const LIMITS: Limits = Limits { time: Duration::from_secs(60), stdout: 64 * 1024, stderr: 4 * 1024 };
/// The longest excerpt of an error message, in characters.
const MAX_EXCERPT: usize = 200;
/// A longer word in an error message may be a secret.
const MAX_WORD: usize = 20;

/// Variables that are passed on to the CLI. There is no token among them: the CLI has its own login.
const VARIABLES: &str = "HOME XDG_DATA_HOME XDG_CONFIG_HOME XDG_CACHE_HOME XDG_STATE_HOME XDG_RUNTIME_DIR XDG_DATA_DIRS \
    XDG_CONFIG_DIRS LANG LANGUAGE LC_ALL LC_CTYPE LC_MESSAGES";

/// Variables that are passed on if the sidecar itself uses the proxy of the environment.
const PROXY_VARIABLES: &str = "HTTPS_PROXY HTTP_PROXY ALL_PROXY NO_PROXY https_proxy http_proxy all_proxy no_proxy \
    NODE_EXTRA_CA_CERTS";

/// Variables that turn off prompts, colours, update checks and telemetry.
const FIXED_VARIABLES: [(&str, &str); 4] =
    [("CI", "1"), ("NO_COLOR", "1"), ("NO_UPDATE_NOTIFIER", "1"), ("VERCEL_TELEMETRY_DISABLED", "1")];

/// The part of our environment that the CLI gets.
#[derive(Clone, Default)]
pub struct CliEnvironment {
    /// Our PATH, on which the CLI is searched.
    pub path: OsString,
    variables: Vec<(&'static str, OsString)>,
}

impl CliEnvironment {
    /// Selects the variables from our environment, those for a proxy only with `use_env_proxy`.
    pub fn of(environment: &dyn Fn(&str) -> Option<OsString>, use_env_proxy: bool) -> Self {
        let proxy = if use_env_proxy { PROXY_VARIABLES } else { "" };
        let names = VARIABLES.split_ascii_whitespace().chain(proxy.split_ascii_whitespace());
        let variables = names.filter_map(|name| Some((name, environment(name)?))).collect();
        Self { path: environment("PATH").unwrap_or_default(), variables }
    }
}

/// Without the variables: the URL of a proxy may contain a password.
impl fmt::Debug for CliEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CliEnvironment").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The project whose token is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `prj_…`
    pub project_id: String,
    /// `team_…`
    pub owner_id: String,
}

impl Target {
    /// `None` if an id has a character that Vercel's ids do not have, and could be taken for an option or a path.
    pub fn new(project_id: &str, owner_id: &str) -> Option<Self> {
        let is_safe = |id: &str| {
            let is_id_byte = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
            !id.is_empty() && !id.starts_with('-') && id.bytes().all(is_id_byte)
        };
        let [project, owner] = [project_id, owner_id].map(|id| is_safe(id).then(|| id.to_owned()));
        Some(Self { project_id: project?, owner_id: owner? })
    }
}

/// A CLI that may be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cli {
    file: PathBuf,
    /// The PATH that it gets. It must contain `node`, which its first line names.
    path: OsString,
}

/// Why there is no CLI that may be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CliNotUsable {
    /// PATH has none.
    #[error("the Vercel CLI is not on PATH")]
    NotFound,
    /// It is not safe to run.
    #[error("the Vercel CLI at {} is not run: {reason}", file.display())]
    Untrusted {
        /// Its path.
        file: PathBuf,
        /// Why.
        #[source]
        reason: Untrusted,
    },
}

/// Why the CLI gave no token.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// It could not be run to its end.
    #[error("{}", run_failure(file, source))]
    Run {
        /// Its path.
        file: PathBuf,
        /// Why.
        source: subprocess::Error,
    },
    /// It printed more than a token can be.
    #[error("the Vercel CLI printed more than {} KiB", LIMITS.stdout / 1024)]
    TooMuchOutput,
    /// It failed.
    #[error("the Vercel CLI ended with {}{}", exit_description(*status), message.as_ref().map_or(" and said nothing".into(), |m| format!(": {m}")))]
    Failed {
        /// Exit code or signal.
        status: ExitStatus,
        /// An excerpt of its error message.
        message: Option<String>,
    },
    /// It succeeded and printed no token.
    #[error("the Vercel CLI printed something else than a token")]
    NoToken,
}

fn run_failure(file: &Path, error: &subprocess::Error) -> String {
    match error {
        subprocess::Error::Start(e) => format!("the Vercel CLI at {} could not be started: {e}", file.display()),
        subprocess::Error::Wait(e) => format!("the Vercel CLI's end could not be waited for: {e}"),
        subprocess::Error::Timeout(limit) => format!("the Vercel CLI took longer than {} s", limit.as_secs()),
    }
}

fn exit_description(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

impl Cli {
    /// Finds the CLI on `path`, outside the project.
    pub fn find(path: &OsStr, project: &Path) -> Result<Self, CliNotUsable> {
        let Found { file, checked } = executable::find(NAME, path, project).ok_or(CliNotUsable::NotFound)?;
        match checked {
            Ok(file) => Ok(Self { path: executable::trusted_path(path, &file, project), file }),
            Err(reason) => Err(CliNotUsable::Untrusted { file, reason }),
        }
    }
}

/// Runs `vercel project token` in `directory` and returns the token that it prints.
pub async fn project_token(
    cli: &Cli,
    target: &Target,
    environment: &CliEnvironment,
    directory: &Path,
) -> Result<SecretString, CliError> {
    let mut command = Command::new(&cli.file);
    command
        // Version managers select the program by this name.
        .arg0(NAME)
        .args(["project", "token", &target.project_id, "--format=json", "--scope", &target.owner_id])
        .env_clear()
        .envs(environment.variables.iter().map(|(name, value)| (name, value)))
        .envs(FIXED_VARIABLES)
        .env("PATH", &cli.path)
        .current_dir(directory);
    let output = subprocess::run(command, LIMITS).await;
    let output = output.map_err(|source| CliError::Run { file: cli.file.clone(), source })?;
    if output.is_truncated {
        return Err(CliError::TooMuchOutput);
    }
    if !output.status.success() {
        return Err(CliError::Failed { status: output.status, message: excerpt(&output.stderr) });
    }
    parse_token(&output.stdout).ok_or(CliError::NoToken)
}

/// Reads `{"token":"…"}`, or the token alone.
fn parse_token(output: &[u8]) -> Option<SecretString> {
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

/// The first line of an error message that starts with "Error", or else the first line; without control characters and
/// without words that may be secrets.
fn excerpt(message: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(message);
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.clone().next()?;
    let line = lines.find(|line| line.starts_with("Error")).unwrap_or(first);
    let is_word_char = |c: char| c.is_ascii_alphanumeric() || "-_.=+~".contains(c);
    let mut shown = String::new();
    for part in line.split_inclusive(|c| !is_word_char(c)) {
        let word = part.trim_end_matches(|c| !is_word_char(c));
        let may_be_secret = word.len() > MAX_WORD || ["vca_", "vcr_"].iter().any(|prefix| word.contains(prefix));
        shown.push_str(if may_be_secret { "…" } else { word });
        shown.extend(part[word.len()..].chars().filter(|c| !c.is_control()));
    }
    Some(shown.chars().take(MAX_EXCERPT).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn ids_that_could_be_options_or_paths_are_refused() {
        assert!(Target::new("prj_web-1", "team_Acme").is_some());
        for id in ["", "-x", "--cwd=/", "a b", "a/b", "../x", "a;b", "ä", "a\n"] {
            assert_eq!((Target::new(id, "team_1"), Target::new("prj_1", id)), (None, None), "{id:?}");
        }
    }

    #[test]
    fn a_token_is_printed_alone_or_in_an_object() {
        let token = |text: &str| parse_token(text.as_bytes()).map(|token| token.expose_secret().to_owned());
        for text in ["a.b.c\n", "{\"token\":\"a.b.c\"}", "{\n  \"token\": \"a.b.c\"\n}\n"] {
            assert_eq!(token(text).as_deref(), Some("a.b.c"), "{text}");
        }
        for text in ["", "\n", "{}", "{\"token\":1}", "{\"token\":\"a\"", "{\"token\":\"a\"}{}"] {
            assert_eq!(token(text), None, "{text}");
        }
        assert!(parse_token(b"\xff").is_none());
    }

    #[test]
    fn excerpts_contain_no_secrets_and_no_escapes() {
        let of = |text: &str| excerpt(text.as_bytes());
        assert_eq!(of("\n \n"), None);
        assert_eq!(
            of("Vercel CLI 64.0.2\nError: No login, run `vercel login`\nmore").as_deref(),
            Some("Error: No login, run `vercel login`")
        );
        assert_eq!(of("vca_1 \u{1b}[31mvcr_2 (eyJhbGciOiJSUzI1NiJ9.eyJ) end").as_deref(), Some("… [… (…) end"));
        assert_eq!(of(&"ab ".repeat(200)).map(|shown| shown.len()), Some(MAX_EXCERPT));
    }

    #[test]
    fn only_listed_variables_are_passed_on_and_those_of_a_proxy_on_demand() {
        let all = |name: &str| Some(OsString::from(name));
        let names = |use_env_proxy| {
            let environment = CliEnvironment::of(&all, use_env_proxy);
            environment.variables.iter().map(|(name, _)| *name).collect::<Vec<_>>()
        };
        assert_eq!(names(false).join(" "), VARIABLES);
        assert_eq!(names(true).join(" "), format!("{VARIABLES} {PROXY_VARIABLES}"));
        assert!(!names(true).iter().any(|name| name.contains("VERCEL") || name.contains("NODE_OPTIONS")));
        let shown = format!("{:?}", CliEnvironment::of(&|_| Some("hunter2".into()), true));
        assert_eq!(shown.matches("hunter2").count(), 1, "PATH alone: {shown}");
    }
}
