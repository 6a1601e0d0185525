//! `run` and `env`: an unmodified app uses the sidecar and holds no credential.
//!
//! [`sidecar`] joins the running sidecar or starts one in this process, as [`joining`] decides, and registers the run.
//! [`files`] writes the files that the variables name. [`environment`] builds the variables of the command, and
//! [`child`] runs it. stdout belongs to the command.

pub mod child;
pub mod environment;
pub mod files;
pub mod joining;
mod problems;
pub mod shell;
pub mod sidecar;

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::CommandError;
use super::flags::{environment, load_for_programs};
use crate::config::args::GlobalArgs;
use crate::config::{Auth, Config, EnvLookup};
use crate::credential::token_file::{self, TokenReading};
use crate::credential::{Identity, TokenState};
use crate::daemon::app::StartupError;
use crate::instance::client::{self, ClientError, NotFound};
use crate::instance::run::{Run, RunRequest};
use crate::os::clock::Clock;
use crate::os::hardening::Inherited;
use crate::os::logging;
use child::{Signals, SpawnError};
use environment::{Interception, RunVariables, Variable};
use files::{Contents, Files};
use joining::{Decision, JoinError, Note};
use problems::ProblemReporter;
use sidecar::Sidecar;
use tracing::warn;

/// Why a command could not run, or why there are no variables for it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No sidecar runs, and none could be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The sidecar refused the run.
    #[error(transparent)]
    ClientError(#[from] ClientError),
    /// There is no token to expose. A sentence.
    #[error("{0}")]
    NoToken(String),
    /// A system call failed.
    #[error("could not {0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// The command could not be started.
    #[error(transparent)]
    Command(#[from] SpawnError),
    /// No sidecar runs for `env`, or the running one does not respond.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The running sidecar cannot be used with the explicit settings.
    #[error(transparent)]
    Join(#[from] JoinError),
}

impl RunError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Startup(error) => error.exit_code(),
            Self::Command(error) => error.exit_code(),
            // `NoInterception`: there is no local CA that is safe to use.
            Self::Join(JoinError::Conflict(_))
            | Self::Join(JoinError::Client(ClientError::NoInterception(_)))
            | Self::ClientError(ClientError::NoInterception(_)) => 2,
            Self::ClientError(_) | Self::Join(_) | Self::NoToken(_) | Self::System(..) | Self::NotFound(_) => 1,
        }
    }
}

/// How a command runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether to intercept programs that honour `HTTPS_PROXY`.
    pub intercept: bool,
    /// Whether the command gets the real token.
    pub expose_token: bool,
    /// Whether to print the problems of a joined sidecar.
    pub report_problems: bool,
}

/// `run`: runs a command through the project's sidecar and ends with its exit code.
pub(super) async fn execute(
    options: Options,
    command: &[OsString],
    global: &GlobalArgs,
    inherited: Inherited,
) -> Result<ExitCode, CommandError> {
    let config = load_for_programs(global, options.intercept)?;
    let _log = logging::start(config.logging);
    Ok(run(config, options, command, &environment, inherited).await?.into())
}

/// Runs a command through the project's sidecar. Returns its exit code.
pub async fn run(
    config: Config,
    options: Options,
    command: &[OsString],
    environment: EnvLookup<'_>,
    limits: Inherited,
) -> Result<u8, RunError> {
    let mut signals = Signals::listen().map_err(|e| RunError::System("listen for signals", e))?;
    let exposed = if options.expose_token { exposed_token(&config.auth).await? } else { None };
    let remove_access_token = !options.expose_token && matches!(config.auth, Auth::AccessToken(_));
    let state_dir = config.state_dir.clone();
    let mut sidecar = Sidecar::join_or_start(config).await?;
    let outcome = async {
        let run = sidecar.begin_run(options.intercept, environment).await?;
        let files = Files::for_run(state_dir.as_deref(), &Contents::new(environment, run.ca.as_deref()))
            .map_err(|e| RunError::System("write the files that the command needs", e))?;
        let token = exposed.as_deref().unwrap_or(&run.placeholder);
        let variables = variables(environment, sidecar.client().address(), &run, token, &files, remove_access_token);
        let [program, arguments @ ..] = command else { return Ok(0) };
        let set_variables = |command: &mut Command| {
            for (name, value) in &variables {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
        };
        let mut problems = match sidecar.is_joined() && options.report_problems {
            true => Some(ProblemReporter::subscribe(sidecar.client()).await),
            false => None,
        };
        let reporting = async {
            match &mut problems {
                Some(problems) => problems.report().await,
                None => std::future::pending().await,
            }
        };
        let code = tokio::select! {
            never = reporting => match never {},
            code = child::run((program, arguments), set_variables, &mut signals, limits) => code?,
            never = sidecar.keep_available() => match never {},
        };
        if let Some(problems) = &mut problems {
            problems.report_pending().await;
        }
        Ok(code)
    };
    let outcome = outcome.await;
    sidecar.stop(&mut signals).await;
    outcome
}

/// The variables of a command that uses the project's running sidecar. They are valid for as long as that runs.
pub async fn env(mut config: Config, intercept: bool, environment: EnvLookup<'_>) -> Result<Vec<Variable>, RunError> {
    let found = client::find(&config.selector()).await?;
    let client = match joining::decide(found, &mut config).await? {
        Decision::Join(client, notes) => {
            notes.iter().for_each(Note::print);
            client
        }
        Decision::StartOwn(conflict, _) => return Err(JoinError::from(conflict).into()),
    };
    // The sidecar was found in the state directory, so there is one.
    let state_dir = config.state_dir.as_deref().unwrap_or(Path::new(""));
    let run = client.begin_run(&RunRequest::new(intercept, environment)).await?;
    let files = Files::persistent(state_dir, &Contents::new(environment, run.ca.as_deref()))
        .map_err(|e| RunError::System("write the files that the variables name", e))?;
    let remove_access_token = matches!(config.auth, Auth::AccessToken(_));
    Ok(variables(environment, client.address(), &run, &run.placeholder, &files, remove_access_token))
}

fn variables(
    environment: EnvLookup<'_>,
    sidecar: SocketAddr,
    run: &Run,
    oidc_token: &str,
    files: &Files,
    remove_access_token: bool,
) -> Vec<Variable> {
    let (preload, bundle, node_certificates) = (files.preload(), files.bundle(), files.node_certificates());
    let proxy = run.proxy.as_deref().filter(|_| run.ca.is_some());
    if proxy.is_some() {
        warn_about_no_proxy(environment, &run.bearer_hosts);
    }
    let run_variables = RunVariables {
        url: &format!("http://{sidecar}"),
        key: run.key.as_deref(),
        oidc_token,
        bearer_hosts: &run.bearer_hosts,
        preload: &preload,
        interception: proxy.map(|proxy| Interception { proxy, bundle: &bundle, node_certificates: &node_certificates }),
        remove_access_token,
    };
    environment::variables(environment, &run_variables)
}

/// Warns about entries of `NO_PROXY` that are removed because they match Vercel's hosts.
fn warn_about_no_proxy(environment: EnvLookup<'_>, bearer_hosts: &[String]) {
    let removed = environment::removed_exceptions(environment, bearer_hosts).join(",");
    if !removed.is_empty() {
        warn!(
            "NO_PROXY would lead past the sidecar: {removed} is taken out of it for the command, whose other requests \
             there still go without your proxy"
        );
    }
}

/// The real token, read by ourselves: it goes over no connection. None where the credential is an access token, which
/// the command has in its own variable.
async fn exposed_token(auth: &Auth) -> Result<Option<String>, RunError> {
    let Auth::Oidc { env_file, shown } = auth else { return Ok(None) };
    let reading = token_file::read(env_file).await;
    let identity = Identity::first(reading.map_or(TokenState::Missing, TokenReading::into_state));
    let problem = match identity.credential(Clock::system().now()) {
        Ok(credential) => return Ok(credential.oidc().map(|token| token.expose().to_owned())),
        Err(problem) => problem,
    };
    Err(RunError::NoToken(problem.message(shown)))
}
