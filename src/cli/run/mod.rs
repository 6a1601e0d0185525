//! `run` and `env`: an unmodified app works through the sidecar and holds no credential.
//!
//! [`sidecar`] joins the running one or starts one in this process, as [`joining`] has it; [`client`](crate::instance::client) registers the run with it;
//! [`files`] writes what the variables name; [`environment`] is what the command is given; [`child`] is the command.
//! stdout belongs to the command alone.

pub mod child;
pub mod environment;
pub mod files;
pub mod joining;
mod problems;
pub mod shell;
pub mod sidecar;

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::CommandError;
use super::flags::{environment, load_for_programs};
use crate::config::args::GlobalArgs;
use crate::config::{Auth, Config};
use crate::credential::token_file::{self, TokenReading};
use crate::credential::{Identity, TokenState};
use crate::daemon::app::StartupError;
use crate::instance::client::{self, Client, ClientError, NotFound, Run};
use crate::os::clock::Clock;
use crate::os::hardening::Inherited;
use crate::os::logging;
use child::{CannotStart, Signals};
use environment::{Given, Interception, Lookup, Variable};
use files::{Contents, Files};
use joining::{Differs, Joined, Note};
use problems::Problems;
use sidecar::Sidecar;
use tracing::warn;

/// Why a command does not run, or has no variables.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no sidecar, and none could be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The sidecar takes no run.
    #[error(transparent)]
    ClientError(#[from] ClientError),
    /// There is no token to expose. A sentence.
    #[error("{0}")]
    NoToken(String),
    /// The system would not have it.
    #[error("could not {0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// The command.
    #[error(transparent)]
    Command(#[from] CannotStart),
    /// `env` starts no sidecar, and nothing starts a second one beside one that does not answer.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The sidecar that runs has other settings than were named.
    #[error(transparent)]
    Differs(#[from] Differs),
}

impl RunError {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Startup(error) => error.exit_code(),
            Self::Command(error) => error.exit_code(),
            // Without a local CA that is safe to use.
            Self::Differs(_) | Self::ClientError(ClientError::NoInterception(_)) => 2,
            Self::ClientError(_) | Self::NoToken(_) | Self::System(..) | Self::NotFound(_) => 1,
        }
    }
}

/// How a command is to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether what honours `HTTPS_PROXY` is intercepted.
    pub intercept: bool,
    /// Whether the command gets the real token.
    pub expose_token: bool,
    /// Whether what goes wrong in a sidecar that was joined is said here.
    pub tells_problems: bool,
}

/// `run`: a command through the project's sidecar. Ends with its exit code.
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

/// Runs a command through the project's sidecar; its exit code.
pub async fn run(
    config: Config,
    options: Options,
    command: &[OsString],
    environment: Lookup<'_>,
    limits: Inherited,
) -> Result<u8, RunError> {
    let mut signals = Signals::listen().map_err(|e| RunError::System("listen for signals", e))?;
    let exposed = if options.expose_token { exposed_token(&config.auth).await? } else { None };
    let hides_access_token = !options.expose_token && matches!(config.auth, Auth::AccessToken(_));
    let state_dir = config.state_dir.clone();
    let mut sidecar = Sidecar::join_or_start(config).await?;
    let outcome = async {
        let run = sidecar.client().begin_run(options.intercept, environment).await?;
        let files = Files::for_run(state_dir.as_deref(), &Contents::new(environment, run.ca.as_deref()))
            .map_err(|e| RunError::System("write the files that the command needs", e))?;
        let token = exposed.as_deref().unwrap_or(&run.placeholder);
        let variables = variables(environment, &sidecar.client(), &run, token, &files, hides_access_token);
        let [program, arguments @ ..] = command else { return Ok(0) };
        let set = |command: &mut Command| {
            for (name, value) in &variables {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
        };
        let mut problems = match sidecar.is_joined() && options.tells_problems {
            true => Some(Problems::of(sidecar.client()).await),
            false => None,
        };
        let telling = async {
            match &mut problems {
                Some(problems) => problems.say().await,
                None => std::future::pending().await,
            }
        };
        let code = tokio::select! {
            never = telling => match never {},
            code = child::run((program, arguments), set, &mut signals, limits) => code?,
            never = sidecar.keep() => match never {},
        };
        if let Some(problems) = &mut problems {
            problems.say_the_rest().await;
        }
        Ok(code)
    };
    let outcome = outcome.await;
    sidecar.end(&mut signals).await;
    outcome
}

/// The variables of a command that goes through the project's running sidecar. They are good for as long as that runs.
pub async fn env(mut config: Config, intercept: bool, environment: Lookup<'_>) -> Result<Vec<Variable>, RunError> {
    let found = client::find(&config.wanted()).await?;
    let client = match joining::join(found, &mut config).await?? {
        Joined::Through(client, notes) => {
            notes.iter().for_each(Note::tell);
            client
        }
        Joined::OtherCredential(differs, _) => return Err(differs.into()),
    };
    // There is one, since the sidecar was found in it.
    let state_dir = config.state_dir.as_deref().unwrap_or(Path::new(""));
    let run = client.begin_run(intercept, environment).await?;
    let files = Files::lasting(state_dir, &Contents::new(environment, run.ca.as_deref()))
        .map_err(|e| RunError::System("write the files that the variables name", e))?;
    let hides_access_token = matches!(config.auth, Auth::AccessToken(_));
    Ok(variables(environment, &client, &run, &run.placeholder, &files, hides_access_token))
}

fn variables(
    environment: Lookup<'_>,
    sidecar: &Client,
    run: &Run,
    oidc_token: &str,
    files: &Files,
    hides_access_token: bool,
) -> Vec<Variable> {
    let (preload, bundle, node_certificates) = (files.preload(), files.bundle(), files.node_certificates());
    let proxy = run.proxy.as_deref().filter(|_| run.ca.is_some());
    if proxy.is_some() {
        say_what_is_taken_out(environment, &run.bearer_hosts);
    }
    let given = Given {
        url: &format!("http://{}", sidecar.address()),
        key: run.key.as_deref(),
        oidc_token,
        bearer_hosts: &run.bearer_hosts,
        preload: &preload,
        interception: proxy.map(|proxy| Interception { proxy, bundle: &bundle, node_certificates: &node_certificates }),
        hides_access_token,
    };
    environment::variables(environment, &given)
}

/// Tells whoever set `NO_PROXY` that it does not count for Vercel's hosts.
fn say_what_is_taken_out(environment: Lookup<'_>, bearer_hosts: &[String]) {
    let taken_out = environment::taken_out(environment, bearer_hosts).join(",");
    if !taken_out.is_empty() {
        warn!(
            "NO_PROXY would lead past the sidecar: {taken_out} is taken out of it for the command, whose other requests \
             there still go without your proxy"
        );
    }
}

/// The real token, read from the env file and not from the sidecar, so that it crosses no connection. `None` if the
/// credential is an access token, which the command has in its own variable.
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
