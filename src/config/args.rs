//! The flags that any command takes, as text: what a value means, and whether it may be set, is decided with all other
//! sources. No flag takes a token's value.

use std::path::PathBuf;

use clap::{Args, ValueHint};

/// What a sidecar that serves takes besides. No global flag: `token` has another of this name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct RefreshArgs {
    /// Who sees to it that the OIDC token is fresh: `off` (you, who are warned) or `cli` (the Vercel CLI, run in time)
    #[arg(long, value_name = "HOW")]
    pub refresh: Option<String>,
}

/// Flags that any command takes, those that let more in last.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Read this configuration file instead of the project's sidecar.toml
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// The project directory [default: the current directory, or the nearest above that is a project's]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub project: Option<PathBuf>,
    /// The file that holds VERCEL_OIDC_TOKEN [default: .env.local in the project]
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub env_file: Option<String>,
    /// The port to listen on; 0 picks a free one [default: 2774]
    #[arg(long, global = true, value_name = "N")]
    pub port: Option<String>,
    /// Where Connect is [default: https://api.vercel.com]
    #[arg(long, global = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub upstream: Option<String>,
    /// PEM file with root certificates to trust besides the system's
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub upstream_ca: Option<String>,
    /// Where the credential comes from: `oidc` (the env file) or `access-token` (VERCEL_TOKEN)
    #[arg(long, global = true, value_name = "SOURCE")]
    pub auth: Option<String>,
    /// The team to name in every request
    #[arg(long, global = true, value_name = "ID")]
    pub team_id: Option<String>,
    /// Refuse requests without the instance key
    #[arg(long, global = true)]
    pub require_key: bool,
    /// Listen on this unix socket, too; nobody else may enter its directory
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub unix_socket: Option<String>,
    /// Reach Connect through the proxy that HTTPS_PROXY or ALL_PROXY names
    #[arg(long, global = true)]
    pub use_env_proxy: bool,
    /// As in [`RefreshArgs`], wherever it was given.
    #[arg(skip)]
    pub refresh: Option<String>,
    /// Hold a request that meets an expired or missing OIDC token this long, at most 40s, for a fresh one [default: 0s]
    #[arg(long, global = true, value_name = "DURATION")]
    pub wait: Option<String>,
    /// Show warnings as desktop notices, too, where there is a desktop: `true` or `false` [default: true]
    #[arg(long, global = true, value_name = "BOOL")]
    pub desktop_notices: Option<String>,
    /// How to log: `text` or `json`
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// How much to log: error, warn, info, debug or trace [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Log warnings and errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log more; twice for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Accept this Host besides the loopback names; repeatable
    #[arg(long = "allowed-host", global = true, value_name = "NAME[:PORT]")]
    pub allowed_hosts: Vec<String>,
    /// Accept requests from pages of this origin; repeatable
    #[arg(long = "allowed-origin", global = true, value_name = "ORIGIN")]
    pub allowed_origins: Vec<String>,
    /// Pass the OIDC token on to this host, for apps that have only a placeholder; ORIGIN says where it is; repeatable,
    /// replaces the built-in list
    #[arg(long = "bearer-host", global = true, value_name = "HOST[/PATH][=ORIGIN]")]
    pub bearer_hosts: Vec<String>,
    /// Accept requests that another proxy passes on
    #[arg(long, global = true)]
    pub allow_forwarded: bool,
    /// Listen on this address of the machine, too; needs --require-key and --allowed-host
    #[arg(long, global = true, value_name = "ADDR")]
    pub dangerously_listen_on_network: Option<String>,
}
