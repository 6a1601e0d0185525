//! The flags of every command, as text. Values are checked together with those of all other sources. No flag takes a
//! token.

use std::path::PathBuf;

use clap::{Args, ValueHint};

/// The flag `--refresh`. Not a global flag, since `token` has another of this name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct RefreshArgs {
    /// Refresh the OIDC token before it expires: `off` (only warn) or `cli` (run the Vercel CLI) [default: off]
    #[arg(long, value_name = "HOW")]
    pub refresh: Option<String>,
}

/// The flags of every command. Those that widen access come last.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Read this configuration file instead of the project's sidecar.toml
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// The project directory [default: the current directory, or the nearest project above it]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub project: Option<PathBuf>,
    /// The file that holds VERCEL_OIDC_TOKEN [default: .env.local in the project]
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub env_file: Option<String>,
    /// The port to listen on; 0 picks a free one [default: 2774]
    #[arg(long, global = true, value_name = "N")]
    pub port: Option<String>,
    /// The origin of Vercel Connect [default: https://api.vercel.com]
    #[arg(long, global = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub upstream: Option<String>,
    /// Trust the root certificates in this PEM file in addition to the system's
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub upstream_ca: Option<String>,
    /// The source of the credential: `oidc` (the env file) or `access-token` (VERCEL_TOKEN) [default: oidc]
    #[arg(long, global = true, value_name = "SOURCE")]
    pub auth: Option<String>,
    /// The team id to send with every request
    #[arg(long, global = true, value_name = "ID")]
    pub team_id: Option<String>,
    /// Refuse requests without the instance key
    #[arg(long, global = true)]
    pub require_key: bool,
    /// Also listen on this unix socket; only you may have access to its directory
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub unix_socket: Option<String>,
    /// Connect to upstream through the proxy in HTTPS_PROXY or ALL_PROXY
    #[arg(long, global = true)]
    pub use_env_proxy: bool,
    /// The value of [`RefreshArgs`], given before or after the command.
    #[arg(skip)]
    pub refresh: Option<String>,
    /// Hold requests up to this long, at most 40s, while the OIDC token is missing or expired [default: 0s]
    #[arg(long, global = true, value_name = "DURATION")]
    pub wait: Option<String>,
    /// Show warnings as desktop notices too, if there is a desktop: `true` or `false` [default: true]
    #[arg(long, global = true, value_name = "BOOL")]
    pub desktop_notices: Option<String>,
    /// The log format: `text` or `json` [default: text]
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// The log level: error, warn, info, debug or trace [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Log warnings and errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log more; repeat for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Accept this Host in addition to the loopback names; repeatable
    #[arg(long = "allowed-host", global = true, value_name = "NAME[:PORT]")]
    pub allowed_hosts: Vec<String>,
    /// Accept requests from pages of this origin; repeatable
    #[arg(long = "allowed-origin", global = true, value_name = "ORIGIN")]
    pub allowed_origins: Vec<String>,
    /// Replace the placeholder with the OIDC token in requests to this host, reached at ORIGIN if given; repeatable,
    /// replaces the built-in list
    #[arg(long = "bearer-host", global = true, value_name = "HOST[/PATH][=ORIGIN]")]
    pub bearer_hosts: Vec<String>,
    /// Accept requests forwarded by another proxy
    #[arg(long, global = true)]
    pub allow_forwarded: bool,
    /// Also listen on this address of the machine; needs --require-key and --allowed-host
    #[arg(long, global = true, value_name = "ADDR")]
    pub dangerously_listen_on_network: Option<String>,
}
