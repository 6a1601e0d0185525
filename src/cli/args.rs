//! The command line: structs only. What a value means, and whether it may be set, is decided in [`config`](crate::config),
//! which reports all mistakes at once; so values are taken as text here. No flag takes a token's value.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::config::ConfigError;
use crate::config::args::{GlobalArgs, RefreshArgs};

/// Lets apps on this machine ask Vercel Connect for tokens without holding a credential.
#[derive(Debug, Parser)]
#[command(name = "connect-sidecar", version, max_term_width = 100)]
#[command(after_help = "Every global flag has an environment twin: --env-file is CONNECT_SIDECAR_ENV_FILE.\n\
                        Try `connect-sidecar demo`: it needs no account and no network.")]
pub struct Cli {
    /// What to do; `serve` if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// As for `serve`.
    #[command(flatten)]
    pub refresh: RefreshArgs,
    /// Flags that any command takes.
    #[command(flatten)]
    pub global: GlobalArgs,
}

impl Cli {
    /// The flags that any command takes, and `--refresh` wherever it was given: refused before a command that would drop it.
    pub fn global_args(&self) -> Result<GlobalArgs, ConfigError> {
        let before = self.refresh.refresh.clone();
        let refresh = match self.command.as_ref().map(Command::refresh) {
            Some(None) if before.is_some() => {
                let message = "this command has no use for it: it goes with `serve`, `run` and `service install`";
                return Err(ConfigError::new("--refresh", message));
            }
            Some(Some(after)) => after.refresh.clone().or(before),
            Some(None) | None => before,
        };
        Ok(GlobalArgs { refresh, ..self.global.clone() })
    }
}

/// What the emulator can be told to get wrong; a test holds that all of it is here.
const FAULTS: &str = "\
Faults, in [[faults]] of the seed or by POST /_emulator/faults, each with `on` (only requests whose target contains this)
and `times` (until it is cleared if it is left out):
  latency        the answer comes later: needs `by`, as \"2s\"
  hang           no answer ever comes
  reset          the connection is reset
  cut            the answer breaks off in the middle
  wrong_json     the answer is no JSON
  unauthorized   401, the credential is over
  rate_limited   429, with `retry_after`, as \"30\"
  revoked_grant  422 no_token, the provider took the grant back
  status         needs `status`, as 503; takes `code`, `message` and `retry_after`
  clock_skew     the emulator's clock is off: needs `by`, as \"2h\" or \"-5m\"";

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serve in the foreground until Ctrl-C (the default)
    Serve(RefreshArgs),
    /// Show what it does against an emulator of Vercel Connect, without account or network
    Demo {
        /// End after the tour; the exit code tells whether every step showed what it claims
        #[arg(long)]
        once: bool,
    },
    /// Run a command whose requests to Vercel Connect go through the sidecar: it needs no credential and no change
    Run {
        /// Leave HTTPS_PROXY and certificates alone: only Node.js and plain HTTP at $CONNECT_SIDECAR_URL are served
        #[arg(long)]
        no_intercept: bool,
        /// Give the command the real VERCEL_OIDC_TOKEN instead of a worthless stand-in
        #[arg(long)]
        expose_token: bool,
        /// As for `serve`.
        #[command(flatten)]
        refresh: RefreshArgs,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
        command: Vec<OsString>,
    },
    /// Print the variables that `run` sets, for the project's running sidecar: `eval "$(connect-sidecar env)"`
    Env {
        /// Print them for a shell, as JSON or for an env file
        #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
        format: Format,
        /// Leave HTTPS_PROXY and certificates alone
        #[arg(long)]
        no_intercept: bool,
    },
    /// Print a provider token, and nothing else, on stdout; through the running sidecar, or without one
    Token(TokenArgs),
    /// Say what the running sidecar knows: time left, tokens, warnings; exit code 1 if none runs
    Status(StatusArgs),
    /// Check the whole set-up and name each problem with its fix; exit code 1 if a request would fail now or soon
    Doctor {
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Get a fresh OIDC token for the running sidecar now, by the Vercel CLI; .env.local is not written
    Refresh,
    /// The tokens that the running sidecar keeps
    #[command(subcommand)]
    Cache(CacheCommand),
    /// What the running sidecar did lately: requests, rotations, warnings
    Logs {
        /// Go on with what happens from now on
        #[arg(short, long)]
        follow: bool,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Let the sidecar of this project run from login on, as a service of systemd or launchd
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Print a script that completes the command line in this shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// The local CA, which the commands of `run` trust for Vercel's hosts and nobody else does
    #[command(subcommand)]
    Ca(CaCommand),
    /// Stand in for Vercel Connect: the upstream of a sidecar, of the Vercel CLI and of tests, without account or network
    ///
    /// Listens on 127.0.0.1, on port 2775 unless --port says otherwise.
    #[command(after_long_help = FAULTS)]
    Emulate(EmulateArgs),
}

impl Command {
    /// What was said after its name of refreshing; `None` if it has no use for that.
    pub fn refresh(&self) -> Option<&RefreshArgs> {
        match self {
            Self::Serve(refresh) | Self::Run { refresh, .. } | Self::Service(ServiceCommand::Install(refresh)) => {
                Some(refresh)
            }
            _ => None,
        }
    }

    /// Whether it answers requests for as long as it runs.
    pub fn serves(&self) -> bool {
        matches!(self, Self::Serve(_) | Self::Demo { .. } | Self::Run { .. } | Self::Emulate(_))
    }
}

/// How the emulator starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct EmulateArgs {
    /// Who and what there is at the start, in TOML [default: the demo's team]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub seed: Option<PathBuf>,
    /// Let the seed name this variable of the environment where a connector wants a secret; repeatable
    #[arg(long, value_name = "NAME")]
    pub secret_from_env: Vec<String>,
    /// Let the seed name this provider, which is not on this machine, as an issuer; repeatable
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub allow_issuer: Vec<String>,
    /// Keep everything in this file across restarts; once it is there, the seed is not read any more
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub state: Option<PathBuf>,
    /// Speak TLS, with a certificate of a CA made for this run
    #[arg(long)]
    pub tls: bool,
    /// Print a seed that shows all there is, and end
    #[arg(long)]
    pub example_seed: bool,
}

/// Which token. The flags are those of `vercel connect token`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct TokenArgs {
    /// The connector, by its uid or id, such as slack/acme-slack
    #[arg(value_name = "CONNECTOR")]
    pub connector: String,
    /// On whose behalf: `app` or `user`
    #[arg(long, value_enum, value_name = "SUBJECT")]
    pub subject: Option<SubjectArg>,
    /// The user's id, with --subject user
    #[arg(long, value_name = "ID")]
    pub user_id: Option<String>,
    /// The installation
    #[arg(long, value_name = "ID")]
    pub installation_id: Option<String>,
    /// The scopes, with commas between them
    #[arg(long, value_delimiter = ',', value_name = "SCOPES")]
    pub scopes: Vec<String>,
    /// Ask Connect for another token, whatever is kept
    #[arg(long)]
    pub refresh: bool,
    /// Print {"version":1,"token":…,"expires_at":…}
    #[arg(long)]
    pub json: bool,
}

/// Whom a token acts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SubjectArg {
    /// The app itself.
    App,
    /// One of its users.
    User,
}

/// How the state is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Args)]
#[group(multiple = false)]
pub struct StatusArgs {
    /// Print the state as JSON
    #[arg(long)]
    pub json: bool,
    /// Print one short line, for a prompt or a status bar
    #[arg(long)]
    pub short: bool,
    /// Show it anew every second, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
    /// Open the status page in the browser
    #[arg(long)]
    pub open: bool,
}

/// What to do with the tokens that are kept.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum CacheCommand {
    /// Forget them all, or those of one connector
    Clear {
        /// The connector, by its uid or id
        connector: Option<String>,
    },
}

/// What to do with the service.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum ServiceCommand {
    /// Write it for this project, with the settings given here, and start it; again, to change them
    Install(RefreshArgs),
    /// Stop and delete it
    Uninstall,
    /// Say whether it is there and runs; exit code 1 if it does not
    Status,
}

/// What to do with the local CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum CaCommand {
    /// Delete it; the next `run` makes another, and what runs now keeps it in memory until it ends
    Remove,
}

/// How variables are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For `eval` in sh, bash or zsh.
    #[default]
    Shell,
    /// One object; null for a variable that is to be taken away.
    Json,
    /// For an env file.
    Dotenv,
}
