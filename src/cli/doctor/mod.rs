//! `doctor`: checks the whole set-up and names each problem with its fix.
//!
//! Changes nothing: no file is written, no port taken, no token sent, and what is asked of upstream is asked without a
//! credential. Facts are gathered at the same time, each for a limited time, and then judged by pure functions, a file for
//! each area.
//!
//! With `--json`, one object:
//!
//! ```json
//! {"version":1,"ok":false,"findings":[
//!   {"severity":"problem","code":"oidc_token_expired","title":"what","detail":"why it matters",
//!    "hint":"vercel env pull","fix":"vercel env pull","command":"vercel env pull"}]}
//! ```
//!
//! `severity` is `problem` (a request would fail, now or soon), `warning`, `note` or `ok`, in that order; `code` is stable;
//! `detail` may be empty; `hint`, `fix` and `command` may be null, and the last two are the same. `ok` tells whether there is
//! no problem.

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

use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use secrecy::ExposeSecret;

use self::env_files::EnvFile;
use self::files::{Git, Tracking};
use self::finding::{Finding, Report, Severity};
use self::network::Surroundings;
use self::readers::Used;
use self::vercel::Login;
use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::config::{Auth, Config, Environment, Mistake, Refresh};
use crate::credential::project_link;
use crate::os::clock::Clock;
use crate::os::terminal;

/// Whatever is not known by then stays unknown.
const LIMIT: Duration = Duration::from_secs(8);
/// Upstream has this long to answer.
const UPSTREAM_LIMIT: Duration = Duration::from_secs(7);

/// Checks and prints; exit code 1 if a request would fail now or soon.
pub async fn examine(json: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let current_dir = std::env::current_dir().map_err(|e| CommandError::System("find the current directory", e))?;
    let environment = |name: &str| std::env::var_os(name);
    let report = Report::new(findings(global, &environment, &current_dir).await);
    let mut stdout = io::stdout();
    let color = stdout.is_terminal() && environment("NO_COLOR").is_none_or(|value| value.is_empty());
    let said = if json { terminal::json_for(&stdout, report.json()) } else { report.text(color) };
    // Who does not listen is told by the exit code.
    let _ = stdout.write_all(said.as_bytes());
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn findings(global: &GlobalArgs, environment: Environment<'_>, current_dir: &Path) -> Vec<Finding> {
    let (mut config, mistakes) = Config::examine(global, environment, current_dir);
    let mut findings = judge_configuration(&mistakes);
    if !config.project.is_dir() {
        // Of nothing, nothing can be said.
        return findings;
    }
    // What is looked at is what the sidecar that runs goes by.
    let place = within(instance::gather(&config)).await;
    let differences = place.as_ref().map(|place| place.settle(&mut config)).unwrap_or_default();
    findings.extend(instance::judge_differences(&differences));
    let above = config.project_note();
    findings.extend(above.map(|note| Finding::new(Severity::Note, "project_above", note, "")));
    let text = |name: &str| environment(name)?.into_string().ok().filter(|value| !value.is_empty());
    let project = config.project.clone();
    let home = environment("HOME");
    let path = environment("PATH").unwrap_or_default();
    let git = Git::find(&path, home.clone(), environment("XDG_CONFIG_HOME"), &project);
    let source = match &config.auth {
        Auth::Oidc { env_file, shown } => Some((env_file.clone(), shown.clone())),
        Auth::AccessToken(_) => None,
    };
    let clock = Clock::system();
    let surroundings = Surroundings {
        extra_certificates: text("NODE_EXTRA_CA_CERTS"),
        is_of_a_run: text("CONNECT_SIDECAR_URL").is_some(),
    };

    // One that is set to nothing hides what the files say.
    let shell = environment("VERCEL_OIDC_TOKEN").map(|value| value.to_string_lossy().into_owned());
    let ids = (text("VERCEL_ORG_ID"), text("VERCEL_PROJECT_ID"));
    let (has_token, storage) = (text("VERCEL_TOKEN").is_some(), text("VERCEL_TOKEN_STORAGE"));
    let cli_directory = vercel::directory(environment("XDG_DATA_HOME"), home.clone());
    let (copies, linked, login, watching, cli, asked) = tokio::join!(
        within(look_at_files(project.clone(), source.clone(), shell, git)),
        within(blocking({
            let (project, home) = (project.clone(), home.map(PathBuf::from));
            move || project_link::find(&project, home.as_deref(), ids)
        })),
        within(blocking(move || match cli_directory {
            _ if has_token => Login::Replaced,
            Some(dir) => vercel::login(&dir, storage.as_deref()),
            None => Login::Missing,
        })),
        within(blocking({
            let file = source.as_ref().map(|(file, _)| file.clone());
            let dir = file.as_deref().and_then(Path::parent).unwrap_or(&project).to_owned();
            move || watching::gather(&dir, file.as_deref())
        })),
        within(vercel::find(&path, &project)),
        within(network::ask(config.upstream.clone(), clock.clone(), UPSTREAM_LIMIT)),
    );
    // What was learned of upstream's clock counts.
    let now = clock.now();

    findings.extend(match &asked {
        Some(asked) => network::judge(asked, &surroundings, clock.offset_ms()),
        None => vec![undecided("the network")],
    });
    let mut token = None;
    match &copies {
        Some((copies, used)) => {
            let files = copies.iter().map(|(file, _)| file);
            let source = files.clone().find(|file| file.is_source);
            token = source.and_then(EnvFile::token);
            let circumstances = credential::Circumstances {
                now,
                expiring_below: config.warn_before.iter().max().copied().unwrap_or_default(),
                covered: covered(place.as_ref(), &config),
            };
            findings.extend(source.into_iter().flat_map(|file| credential::judge(file, &circumstances)));
            if source.is_some() {
                findings.extend(copies::judge(files, used, text("NODE_ENV").as_deref(), now));
            }
            findings.extend(copies.iter().flat_map(|(file, tracking)| files::judge(file, *tracking, &project)));
        }
        None => findings.push(undecided("the env files")),
    }
    if let Auth::AccessToken(token) = &config.auth
        && !token.expose_secret().is_empty()
    {
        findings.push(Finding::ok("credential", "an access token is set, which does not say when it ends"));
    }
    findings.extend(files::judge_state(
        config.state_dir.as_deref(),
        environment("XDG_STATE_HOME"),
        config.policy.require_key,
        &project,
    ));
    findings.push(match &linked {
        Some(linked) => link::evaluate(linked, token.map(|token| &token.claims)),
        None => undecided("the link"),
    });
    findings.extend(match (&cli, &login) {
        (Some(cli), Some(login)) => vercel::judge(cli.as_ref(), login, config.refresh == Refresh::Cli, now),
        _ => vec![undecided("the Vercel CLI")],
    });
    findings.push(watching.map_or_else(|| undecided("watching"), |watching| watching::judge(&watching)));
    let said = match &place {
        Some(place) => {
            let fingerprint = token.map(crate::credential::OidcToken::fingerprint);
            instance::judge(place, fingerprint, |code| findings.iter().any(|finding| finding.code == code))
        }
        None => vec![undecided("the port")],
    };
    findings.extend(said);
    findings
}

/// All that is wrong with the configuration, and that nothing is.
fn judge_configuration(mistakes: &[Mistake]) -> Vec<Finding> {
    let detail = "No sidecar starts before this is mended.";
    let finding = |Mistake { place, message }: &Mistake| {
        Finding::new(Severity::Problem, "configuration", format!("{place}: {message}"), detail)
    };
    match mistakes {
        [] => vec![Finding::ok("configuration", "configuration")],
        mistakes => mistakes.iter().map(finding).collect(),
    }
}

/// Why a bad token in the env file stops no request, if it does not.
fn covered(place: Option<&instance::Place>, config: &Config) -> Option<&'static str> {
    if place.is_some_and(instance::Place::has_a_good_token) {
        Some("The sidecar that runs has a good token; one that starts now would not.")
    } else if config.refresh == Refresh::Cli {
        Some("A sidecar has the Vercel CLI get another, by --refresh cli.")
    } else {
        None
    }
}

/// The env files, each with what git makes of it, and the programs that read them.
async fn look_at_files(
    project: PathBuf,
    source: Option<(PathBuf, String)>,
    shell: Option<String>,
    git: Option<Git>,
) -> (Vec<(EnvFile, Tracking)>, Used) {
    let gathered = blocking(move || (env_files::gather(&project, source, shell), Used::gather(&project)));
    let (files, used) = gathered.await;
    let asked = files.iter().map(async |file| match (&git, &file.path) {
        (Some(git), Some(path)) if file.has_a_value() => git.ask(path).await,
        _ => Tracking::Unknown,
    });
    let tracking = futures_util::future::join_all(asked).await;
    (files.into_iter().zip(tracking).collect(), used)
}

/// Work that may wait for a file system.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
}

/// What comes of it in time.
async fn within<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(LIMIT, work).await.ok()
}

fn undecided(area: &str) -> Finding {
    let title = format!("{area} could not be checked within {} s", LIMIT.as_secs());
    Finding::new(Severity::Warning, "undecided", title, "Something that it depends on does not answer.")
}
