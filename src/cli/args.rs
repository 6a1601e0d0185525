//! The command line's structure. Values are taken as text and checked in [`config`](crate::config), which reports all
//! mistakes at once. No flag takes a token.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::config::ConfigError;
use crate::config::args::{GlobalArgs, RefreshArgs};

/// Let apps on this machine get tokens from Vercel Connect without holding a credential
#[derive(Debug, Parser)]
#[command(name = "connect-sidecar", version, max_term_width = 100)]
#[command(after_help = "Every global flag has an environment variable: --env-file is CONNECT_SIDECAR_ENV_FILE.\n\
                        Try `connect-sidecar demo`: it needs no account and no network.")]
pub struct Cli {
    /// The command; `serve` if none is given.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The flags of `serve`.
    #[command(flatten)]
    pub refresh: RefreshArgs,
    /// The flags of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
}

impl Cli {
    /// The flags of every command, with `--refresh` from before or after the command. It is an error if the command
    /// does not use `--refresh`.
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

/// The faults that the emulator can inject. A test checks that the list is complete.
const FAULTS: &str = "\
Faults, set in [[faults]] of the seed or with POST /_emulator/faults. `on` limits a fault to requests whose target
contains this text; `times` is how often it applies (default: until it is cleared):
  latency        respond late: needs `by`, as \"2s\"
  hang           never respond
  reset          reset the connection
  cut            break off the response in the middle
  wrong_json     respond with invalid JSON
  unauthorized   401, as for an expired credential
  rate_limited   429, with `retry_after`, as \"30\"
  revoked_grant  422 no_token, as if the provider had revoked the grant
  status         needs `status`, as 503; takes `code`, `message` and `retry_after`
  clock_skew     set the emulator's clock off: needs `by`, as \"2h\" or \"-5m\"";

/// A command.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serve in the foreground until Ctrl-C (the default)
    Serve(RefreshArgs),
    /// Show what the sidecar does, against an emulator of Vercel Connect; needs no account and no network
    Demo {
        /// Exit after the tour, with code 0 if every step succeeded
        #[arg(long)]
        once: bool,
    },
    /// Run a command that uses the sidecar for Vercel Connect, without a credential and without changes to it
    Run {
        /// Do not set HTTPS_PROXY and certificates; only Node.js and plain HTTP at $CONNECT_SIDECAR_URL work then
        #[arg(long)]
        no_intercept: bool,
        /// Give the command the real VERCEL_OIDC_TOKEN instead of a placeholder
        #[arg(long)]
        expose_token: bool,
        /// The flags of `serve`.
        #[command(flatten)]
        refresh: RefreshArgs,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
        command: Vec<OsString>,
    },
    /// Print the variables that `run` sets, for the project's running sidecar: `eval "$(connect-sidecar env)"`
    Env {
        /// The output format: for a shell, JSON or an env file
        #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
        format: Format,
        /// Do not set HTTPS_PROXY and certificates
        #[arg(long)]
        no_intercept: bool,
    },
    /// Print a provider token on stdout, from the running sidecar or without one
    Token(TokenArgs),
    /// Show the running sidecar's status: token expiry, cached tokens, warnings; exit code 1 if none runs
    Status(StatusArgs),
    /// Check the whole setup and print each problem with its fix; exit code 1 if a request would fail now or soon
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make the running sidecar fetch a new OIDC token with the Vercel CLI now; does not write .env.local
    Refresh,
    /// Manage the running sidecar's token cache
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Print the running sidecar's recent events: requests, rotations, warnings
    Logs {
        /// Keep printing new events
        #[arg(short, long)]
        follow: bool,
        /// Print one JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Manage the sidecar of this project as a systemd or launchd service that starts at login
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Manage the local CA, which only commands of `run` trust, and only for Vercel's hosts
    #[command(subcommand)]
    Ca(CaCommand),
    /// Emulate Vercel Connect for a sidecar, the Vercel CLI and tests; needs no account and no network
    ///
    /// Listens on 127.0.0.1, on port 2775 unless --port is given.
    #[command(after_long_help = FAULTS)]
    Emulate(EmulateArgs),
}

impl Command {
    /// The `--refresh` flag after the command's name; `None` if the command does not use it.
    pub fn refresh(&self) -> Option<&RefreshArgs> {
        match self {
            Self::Serve(refresh) | Self::Run { refresh, .. } | Self::Service(ServiceCommand::Install(refresh)) => {
                Some(refresh)
            }
            _ => None,
        }
    }

    /// Whether it serves requests while it runs.
    pub fn serves(&self) -> bool {
        matches!(self, Self::Serve(_) | Self::Demo { .. } | Self::Run { .. } | Self::Emulate(_))
    }
}

/// How the emulator starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct EmulateArgs {
    /// Read the initial state from this TOML file [default: the demo's team]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub seed: Option<PathBuf>,
    /// Allow the seed to use this environment variable as a connector's secret; repeatable
    #[arg(long, value_name = "NAME")]
    pub secret_from_env: Vec<String>,
    /// Allow the seed to use this issuer, which is not on this machine; repeatable
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub allow_issuer: Vec<String>,
    /// Keep the state in this file across restarts; if the file exists, the seed is not read
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub state: Option<PathBuf>,
    /// Serve over TLS, with a certificate of a temporary CA
    #[arg(long)]
    pub tls: bool,
    /// Print a seed that shows every option, and exit
    #[arg(long)]
    pub example_seed: bool,
}

/// The arguments of `token`. The flags are those of `vercel connect token`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct TokenArgs {
    /// The connector's uid or id, such as slack/acme-slack
    #[arg(value_name = "CONNECTOR")]
    pub connector: String,
    /// The subject of the token: `app` or `user`
    #[arg(long, value_enum, value_name = "SUBJECT")]
    pub subject: Option<SubjectArg>,
    /// The user's id, with --subject user
    #[arg(long, value_name = "ID")]
    pub user_id: Option<String>,
    /// The installation's id
    #[arg(long, value_name = "ID")]
    pub installation_id: Option<String>,
    /// The scopes, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "SCOPES")]
    pub scopes: Vec<String>,
    /// Ask Connect for a new token, even if one is cached
    #[arg(long)]
    pub refresh: bool,
    /// Print {"version":1,"token":…,"expires_at":…}
    #[arg(long)]
    pub json: bool,
}

/// The subject of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SubjectArg {
    /// The app itself.
    App,
    /// One of its users.
    User,
}

/// How the status is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Args)]
#[group(multiple = false)]
pub struct StatusArgs {
    /// Print the status as JSON
    #[arg(long)]
    pub json: bool,
    /// Print one short line, for a prompt or a status bar
    #[arg(long)]
    pub short: bool,
    /// Update every second, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
    /// Open the status page in a browser
    #[arg(long)]
    pub open: bool,
}

/// A command for the token cache.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum CacheCommand {
    /// Remove all cached tokens, or those of one connector
    Clear {
        /// The connector's uid or id
        connector: Option<String>,
    },
}

/// A command for the service.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum ServiceCommand {
    /// Install and start the service with the settings given here; repeat to change them
    Install(RefreshArgs),
    /// Stop and delete the service
    Uninstall,
    /// Show whether the service is installed and runs; exit code 1 if it does not run
    Status,
}

/// A command for the local CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum CaCommand {
    /// Delete the local CA; the next `run` creates another, and running sidecars keep it in memory until they end
    Remove,
}

/// The output format of `env`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For `eval` in sh, bash or zsh.
    #[default]
    Shell,
    /// One object; null for a variable to unset.
    Json,
    /// For an env file.
    Dotenv,
}
