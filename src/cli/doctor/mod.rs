//! `doctor`: checks the whole setup and names each problem with its fix.
//!
//! Changes nothing: it writes no file, keeps no port and sends no token; its request to upstream carries no credential.
//! Each area has a file with functions that gather facts, concurrently and with a time limit, and a pure function that
//! turns them into findings.
//!
//! `--json` prints one object:
//!
//! ```json
//! {"version":1,"ok":false,"findings":[
//!   {"severity":"problem","code":"oidc_token_expired","title":"what","detail":"why it matters",
//!    "hint":"vercel env pull","fix":"vercel env pull","command":"vercel env pull"}]}
//! ```
//!
//! `severity` is `problem` (a request would fail, now or soon), `warning`, `note` or `ok`; findings are sorted in that
//! order. `code` is stable. `detail` may be empty. `hint`, `fix` and `command` may be null; `fix` and `command` are
//! equal. `ok` says whether there is no problem.

mod copies;
mod credential;
mod env_files;
mod files;
mod finding;
mod instance;
mod link;
mod network;
mod readers;
mod vercel;
mod watching;

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use secrecy::ExposeSecret;

use self::env_files::EnvFile;
use self::files::{Git, Tracking};
use self::finding::{Finding, Report, Severity};
use self::instance::Availability;
use self::network::{NetworkProbe, ProxyEnvironment};
use self::readers::UsedReaders;
use self::vercel::{Cli, Login};
use self::watching::Watching;
use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::config::{Auth, Config, ConfigMistake, EnvLookup, RefreshMode};
use crate::credential::OidcToken;
use crate::credential::project_link::{self, ProjectLink};
use crate::os::clock::{Clock, Timestamp};
use crate::os::terminal::{self, Palette};

/// How long each area may take to gather its facts.
const LIMIT: Duration = Duration::from_secs(8);
/// How long upstream may take to respond.
const UPSTREAM_LIMIT: Duration = Duration::from_secs(7);

/// Runs all checks and prints the findings. Exit code 1 if a request would fail now or soon.
pub async fn examine(json: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let current_dir = crate::cli::current_dir()?;
    let environment = |name: &str| std::env::var_os(name);
    let report = Report::new(findings(global, &environment, &current_dir).await);
    let mut stdout = io::stdout();
    let output = match json {
        true => terminal::json_for(&stdout, report.json()),
        false => report.text(Palette::of(&stdout)),
    };
    // If stdout is closed, the exit code still tells the result.
    let _ = stdout.write_all(output.as_bytes());
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn findings(global: &GlobalArgs, environment: EnvLookup<'_>, current_dir: &Path) -> Vec<Finding> {
    let (mut config, mistakes) = Config::examine(global, environment, current_dir);
    let mut findings = evaluate_configuration(&mistakes);
    if !config.project.is_dir() {
        return findings;
    }
    // The checks use the settings of the running sidecar, since requests do.
    let availability = within_limit(instance::gather(&config)).await;
    let differences = availability.as_ref().map(|found| found.apply_settings(&mut config)).unwrap_or_default();
    findings.extend(instance::evaluate_differences(&differences));
    let note = config.project_note();
    findings.extend(note.map(|note| Finding::new(Severity::Note, "project_above", note, "")));
    let facts = Facts::gather(&config, availability, environment).await;
    findings.extend(facts.evaluate(&config, environment));
    findings
}

/// What was found out about each area. `None`: not within the time limit.
struct Facts {
    availability: Option<Availability>,
    env_files: Option<(Vec<(EnvFile, Tracking)>, UsedReaders)>,
    link: Option<ProjectLink>,
    login: Option<Login>,
    watching: Option<Watching>,
    /// The inner `None`: there is no Vercel CLI.
    cli: Option<Option<Cli>>,
    network: Option<NetworkProbe>,
    /// By upstream's clock if it responded.
    now: Timestamp,
    clock_offset_ms: i64,
}

impl Facts {
    async fn gather(config: &Config, availability: Option<Availability>, environment: EnvLookup<'_>) -> Self {
        let text = |name: &str| non_empty(environment, name);
        let project = config.project.clone();
        let home = environment("HOME");
        let path = environment("PATH").unwrap_or_default();
        let git = Git::find(&path, home.clone(), environment("XDG_CONFIG_HOME"), &project);
        let source = match &config.auth {
            Auth::Oidc { env_file, shown } => Some((env_file.clone(), shown.clone())),
            Auth::AccessToken(_) => None,
        };
        // An empty variable counts too: it hides the token in the files.
        let shell = environment("VERCEL_OIDC_TOKEN").map(|value| value.to_string_lossy().into_owned());
        let ids = (text("VERCEL_ORG_ID"), text("VERCEL_PROJECT_ID"));
        let clock = Clock::system();
        let (env_files, link, login, watching, cli, network) = tokio::join!(
            within_limit(gather_env_files(project.clone(), source.clone(), shell, git)),
            within_limit(blocking({
                let (project, home) = (project.clone(), home.clone().map(PathBuf::from));
                move || project_link::find(&project, home.as_deref(), ids)
            })),
            within_limit(gather_login(text, environment("XDG_DATA_HOME"), home)),
            within_limit(blocking({
                let file = source.as_ref().map(|(file, _)| file.clone());
                let dir = file.as_deref().and_then(Path::parent).unwrap_or(&project).to_owned();
                move || watching::gather(&dir, file.as_deref())
            })),
            within_limit(vercel::find(&path, &project)),
            within_limit(network::probe(config.upstream.clone(), clock.clone(), UPSTREAM_LIMIT)),
        );
        let (now, clock_offset_ms) = (clock.now(), clock.offset_ms());
        Self { availability, env_files, link, login, watching, cli, network, now, clock_offset_ms }
    }

    fn evaluate(&self, config: &Config, environment: EnvLookup<'_>) -> Vec<Finding> {
        let mut findings = match &self.network {
            Some(probe) => {
                let proxy_environment = ProxyEnvironment {
                    extra_certificates: non_empty(environment, "NODE_EXTRA_CA_CERTS"),
                    is_inside_run: non_empty(environment, "CONNECT_SIDECAR_URL").is_some(),
                };
                network::evaluate(probe, &proxy_environment, self.clock_offset_ms)
            }
            None => vec![undecided("the network")],
        };
        findings.extend(self.evaluate_credential(config, environment));
        findings.extend(files::evaluate_state_dir(
            config.state_dir.as_deref(),
            environment("XDG_STATE_HOME"),
            config.policy.require_key,
            &config.project,
        ));
        let token = self.source().and_then(EnvFile::token);
        findings.push(match &self.link {
            Some(link) => link::evaluate(link, token.map(|token| &token.claims)),
            None => undecided("the link"),
        });
        findings.extend(match (&self.cli, &self.login) {
            (Some(cli), Some(login)) => {
                vercel::evaluate(cli.as_ref(), login, config.refresh == RefreshMode::Cli, self.now)
            }
            _ => vec![undecided("the Vercel CLI")],
        });
        findings.push(self.watching.as_ref().map_or_else(|| undecided("watching"), watching::evaluate));
        let of_instance = match &self.availability {
            Some(availability) => {
                let is_known = |code: &str| findings.iter().any(|finding| finding.code == code);
                instance::evaluate(availability, token.map(OidcToken::fingerprint), is_known)
            }
            None => vec![undecided("the port")],
        };
        findings.extend(of_instance);
        findings
    }

    /// Findings about the env files, or about the access token.
    fn evaluate_credential(&self, config: &Config, environment: EnvLookup<'_>) -> Vec<Finding> {
        let mut findings = Vec::new();
        match &self.env_files {
            Some((tracked_files, used)) => {
                let files = tracked_files.iter().map(|(file, _)| file);
                if let Some(source) = self.source() {
                    let circumstances = credential::Circumstances {
                        now: self.now,
                        expiring_below: config.warn_before.iter().max().copied().unwrap_or_default(),
                        covered: covered(self.availability.as_ref(), config),
                    };
                    findings.extend(credential::evaluate(source, &circumstances));
                    let node_env = non_empty(environment, "NODE_ENV");
                    findings.extend(copies::evaluate(files, used, node_env.as_deref(), self.now));
                }
                let of_file =
                    |(file, tracking): &(EnvFile, Tracking)| files::evaluate(file, *tracking, &config.project);
                findings.extend(tracked_files.iter().flat_map(of_file));
            }
            None => findings.push(undecided("the env files")),
        }
        if let Auth::AccessToken(token) = &config.auth
            && !token.expose_secret().is_empty()
        {
            findings.push(Finding::ok("credential", "an access token is set; when it expires is unknown"));
        }
        findings
    }

    /// The env file that the sidecar reads.
    fn source(&self) -> Option<&EnvFile> {
        let (files, _) = self.env_files.as_ref()?;
        files.iter().map(|(file, _)| file).find(|file| file.is_source)
    }
}

fn evaluate_configuration(mistakes: &[ConfigMistake]) -> Vec<Finding> {
    let detail = "No sidecar starts until this is fixed.";
    let finding = |ConfigMistake { location, message }: &ConfigMistake| {
        Finding::new(Severity::Problem, "configuration", format!("{location}: {message}"), detail)
    };
    match mistakes {
        [] => vec![Finding::ok("configuration", "configuration")],
        mistakes => mistakes.iter().map(finding).collect(),
    }
}

/// Why requests succeed even if the env file has no valid token, or `None` if they fail.
fn covered(availability: Option<&Availability>, config: &Config) -> Option<&'static str> {
    if availability.is_some_and(Availability::has_valid_token) {
        Some("The running sidecar has a valid token; one started now would not.")
    } else if config.refresh == RefreshMode::Cli {
        Some("With --refresh cli, a sidecar runs the Vercel CLI to get a new one.")
    } else {
        None
    }
}

/// The env files with their tracking by git, and the programs of the project that read env files.
async fn gather_env_files(
    project: PathBuf,
    source: Option<(PathBuf, String)>,
    shell: Option<String>,
    git: Option<Git>,
) -> (Vec<(EnvFile, Tracking)>, UsedReaders) {
    let gathered = blocking(move || (env_files::gather(&project, source, shell), UsedReaders::gather(&project)));
    let (files, used) = gathered.await;
    let tracking = files.iter().map(async |file| match (&git, &file.path) {
        (Some(git), Some(path)) if file.has_value() => git.tracking(path).await,
        _ => Tracking::Unknown,
    });
    let tracking = futures_util::future::join_all(tracking).await;
    (files.into_iter().zip(tracking).collect(), used)
}

async fn gather_login(
    text: impl Fn(&str) -> Option<String>,
    data_home: Option<OsString>,
    home: Option<OsString>,
) -> Login {
    let storage = text("VERCEL_TOKEN_STORAGE");
    match vercel::directory(data_home, home) {
        _ if text("VERCEL_TOKEN").is_some() => Login::Replaced,
        Some(dir) => blocking(move || vercel::login(&dir, storage.as_deref())).await,
        None => Login::Missing,
    }
}

/// A variable, if it is set to non-empty UTF-8.
fn non_empty(environment: EnvLookup<'_>, name: &str) -> Option<String> {
    environment(name)?.into_string().ok().filter(|value| !value.is_empty())
}

/// Runs file system work on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
}

/// The result of `work`, or `None` after [`LIMIT`].
async fn within_limit<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(LIMIT, work).await.ok()
}

fn undecided(area: &str) -> Finding {
    let title = format!("{area} could not be checked within {} s", LIMIT.as_secs());
    Finding::new(Severity::Warning, "undecided", title, "Something that the check depends on does not respond.")
}
