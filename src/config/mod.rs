//! Flags, environment and files → one validated [`Config`]; and who may set what.
//!
//! Every source is read and every value checked before anything starts, so that all mistakes are reported in one run.
//! A project's own `sidecar.toml` came with a repository that may be hostile: it may tune, but not redirect a credential
//! or widen access (docs/configuration.md section 1, docs/security.md X1 to X4). No value of a file is repeated in a mistake.

pub mod args;
mod portable;
mod project;
mod settings;
mod sources;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use secrecy::SecretString;

use crate::credential::refresh::vercel_cli::CliEnvironment;
use crate::instance::Selector;
use crate::instance::key::Key;
use crate::os::env_proxy::{EnvProxy, Unusable};
use crate::os::logging;
use crate::proxy::cache::Limits;
use crate::proxy::guard::{self, Policy};
use crate::proxy::hosts::Hosts;
use crate::proxy::resolver::Names;
use crate::proxy::upstream;
use args::GlobalArgs;
pub use portable::{PortableSettings, portable_settings};
pub use settings::Difference;
use sources::Sources;
pub use sources::{Environment, config_home, state_dir, unknown_variables};
pub use values::Refresh;

/// The port unless another is asked for.
pub const DEFAULT_PORT: u16 = 2774;
/// The env file in the project unless another is named.
pub const DEFAULT_ENV_FILE: &str = ".env.local";
const DEFAULT_UPSTREAM: &str = "https://api.vercel.com";
const DEFAULT_WARN_BEFORE: [Duration; 3] =
    [Duration::from_secs(3600), Duration::from_secs(900), Duration::from_secs(300)];
const DEFAULT_MAX_ENTRIES: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
const DEFAULT_BUFFER: Duration = Duration::from_secs(30);
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Everything there is to know before the start. Only `app` and `main` see the whole of it.
#[derive(Debug, Clone)]
pub struct Config {
    /// The port on both loopback addresses; 0 for any free one.
    pub port: u16,
    /// The instance key, if it is known already; no setting.
    pub instance_key: Option<Key>,
    /// Whether other commands may find this instance; no setting.
    pub is_announced: bool,
    /// Where to listen besides: a unix socket.
    pub unix_socket: Option<PathBuf>,
    /// Where to listen besides: an address that is not loopback. Set only with a required key and further hosts.
    pub network: Option<IpAddr>,
    /// The directory that the command is for, absolute: the project's, or one below it.
    pub directory: PathBuf,
    /// The project's directory, absolute.
    pub project: PathBuf,
    /// What the project was found by, where it is above that directory.
    pub found_by: Option<String>,
    /// The settings that some source names, each with its place.
    pub named: BTreeMap<&'static str, String>,
    /// Where the credential comes from.
    pub auth: Auth,
    /// When to warn before the token's end.
    pub warn_before: Vec<Duration>,
    /// The cache's limits.
    pub cache: Limits,
    /// If set, all other connectors are refused.
    pub allowed_connectors: Option<BTreeSet<String>>,
    /// The way to Connect.
    pub upstream: upstream::Options,
    /// The hosts that are Vercel's.
    pub hosts: Hosts,
    /// Who may ask; the key is added at the start.
    pub policy: Policy,
    /// Who sees to it that the OIDC token is fresh.
    pub refresh: Refresh,
    /// What the Vercel CLI is given of our environment.
    pub surroundings: CliEnvironment,
    /// How long a request that meets no good credential waits for one.
    pub wait: Duration,
    /// Where the state of running instances is kept, if there is a place.
    pub state_dir: Option<PathBuf>,
    /// Whether warnings are shown as desktop notices, too: where there is a desktop and nobody said no.
    pub desktop_notices: bool,
    /// How to log.
    pub logging: logging::Options,
}

/// Where the credential comes from.
#[derive(Debug, Clone)]
pub enum Auth {
    /// `VERCEL_OIDC_TOKEN` in this file, which people know by this name.
    Oidc {
        /// The file.
        env_file: PathBuf,
        /// What to call it.
        shown: String,
    },
    /// `VERCEL_TOKEN` of our environment.
    AccessToken(SecretString),
}

impl Auth {
    /// What people call the source.
    pub fn name(&self) -> &str {
        match self {
            Self::Oidc { shown, .. } => shown,
            Self::AccessToken(_) => "VERCEL_TOKEN",
        }
    }
}

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Where: a flag, a variable, or a file with its line.
    pub place: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Reads `--port` for a command that is not configured otherwise, and refuses the flags that it has no use for: all but
/// `allowed`, for the reason `why`.
pub fn port_of(args: &GlobalArgs, allowed: &[&str], why: &str) -> Result<Option<u16>, ConfigError> {
    let mut flags = sources::flags(args, Path::new(""));
    let mut mistakes = Vec::new();
    let port = flags.iter().find(|(key, _)| *key == "port").and_then(|(_, value)| {
        let port = values::port(value);
        port.map_err(|message| mistakes.push(Mistake { place: value.place.clone(), message })).ok()
    });
    flags.retain(|(key, _)| *key != "port");
    let paths = [("--config", args.config.is_some()), ("--project", args.project.is_some())];
    let paths = paths.into_iter().filter(|(_, is_given)| *is_given).map(|(flag, _)| flag.to_owned());
    let given = paths.chain(flags.into_iter().map(|(_, value)| value.place));
    let useless = given.filter(|flag| !allowed.contains(&flag.as_str()));
    mistakes.extend(useless.map(|place| Mistake { place, message: format!("{why}; leave this out") }));
    if mistakes.is_empty() { Ok(port) } else { Err(ConfigError(mistakes)) }
}

/// The flags of a command that may start a sidecar for itself. The terminal is the command's, and so is the choice of
/// ports: what a file says of both is meant for `serve`.
pub fn of_a_command(args: &GlobalArgs, environment: Environment<'_>) -> GlobalArgs {
    let is_set = |name: &str| environment(name).is_some();
    let wants_log = args.verbose > 0 || args.log_level.is_some() || is_set("CONNECT_SIDECAR_LOG_LEVEL");
    let wants_port = args.port.is_some() || is_set("CONNECT_SIDECAR_PORT");
    GlobalArgs {
        quiet: args.quiet || !wants_log,
        port: if wants_port { args.port.clone() } else { Some("0".to_owned()) },
        ..args.clone()
    }
}

/// Which sidecar a command means that asks a running one. No file counts: what one says of ports is meant for `serve`,
/// and a mistake in one must not hide the state of what runs.
pub fn wanted(args: &GlobalArgs, environment: Environment<'_>, current_dir: &Path) -> Result<Selector, ConfigError> {
    let mut s = Sources::without_files(args, environment, current_dir);
    // Any free port is a port for `serve` to take, and names no instance.
    let port = s.get("port", values::port).filter(|port| *port != 0);
    let wanted = Selector { state_dir: state_dir(environment), directory: s.directory().to_owned(), port };
    match s.mistakes() {
        mistakes if mistakes.is_empty() => Ok(wanted),
        mistakes => Err(ConfigError(mistakes)),
    }
}

/// Whether the command line or the environment names a setting that a running sidecar may have otherwise.
pub fn names_settings(args: &GlobalArgs, environment: Environment<'_>) -> bool {
    let nowhere = Path::new("");
    let named = sources::flags(args, nowhere).into_iter().chain(sources::variables(environment, nowhere));
    named.into_iter().any(|(key, _)| settings::COMPARED.contains(&key))
}

/// All that is wrong with the configuration. Ends the process with exit code 2.
#[derive(Debug)]
pub struct ConfigError(pub Vec<Mistake>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Mistake { place, message }) in self.0.iter().enumerate() {
            let end = if i + 1 < self.0.len() { "\n" } else { "" };
            write!(f, "{place}: {message}{end}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Which running sidecar a command with these settings means.
    pub fn wanted(&self) -> Selector {
        let port = self.named.contains_key("port").then_some(self.port).filter(|port| *port != 0);
        Selector { state_dir: self.state_dir.clone(), directory: self.directory.clone(), port }
    }

    /// What people are to know of the project where it is not the directory that they are in.
    pub fn project_note(&self) -> Option<String> {
        let name = self.found_by.as_ref()?;
        Some(format!("the project is {}, the nearest directory above with {name}", self.project.display()))
    }

    /// Reads and checks all sources. `current_dir` is what relative flags refer to.
    pub fn load(args: &GlobalArgs, environment: Environment<'_>, current_dir: &Path) -> Result<Self, ConfigError> {
        checked(Self::examine(args, environment, current_dir))
    }

    /// The same for a command whose programs are intercepted: what they send elsewhere goes by the proxy of the
    /// environment.
    pub fn load_to_intercept(
        args: &GlobalArgs,
        environment: Environment<'_>,
        current_dir: &Path,
    ) -> Result<Self, ConfigError> {
        let (config, mut mistakes) = Self::examine(args, environment, current_dir);
        for mut mistake in mistakes_of(&config.upstream.env_proxy, &Scheme::HTTPS) {
            if !mistakes.contains(&mistake) {
                mistake.message.push_str("; --no-intercept does without the proxy");
                mistakes.push(mistake);
            }
        }
        checked((config, mistakes))
    }

    /// The same with all mistakes, for whoever only looks: what is set by mistake is as if it were not set, and an access
    /// token that is missing is empty.
    pub fn examine(args: &GlobalArgs, environment: Environment<'_>, current_dir: &Path) -> (Self, Vec<Mistake>) {
        let mut s = Sources::read(args, environment, current_dir);

        let origin = s.get("upstream", values::upstream);
        let upstream = upstream::Options {
            may_be_this_machine: origin.is_some(),
            origin: origin.unwrap_or_else(|| Uri::from_static(DEFAULT_UPSTREAM)),
            names: Names::system(),
            extra_roots: s.get("upstream_ca", values::certificates).unwrap_or_default(),
            team_id: s.get("team_id", values::team_id),
            use_env_proxy: s.get("use_env_proxy", values::boolean).unwrap_or_default(),
            env_proxy: EnvProxy::read(environment),
        };
        if upstream.use_env_proxy {
            let scheme = upstream.origin.scheme().unwrap_or(&Scheme::HTTPS);
            mistakes_of(&upstream.env_proxy, scheme).for_each(|mistake| s.mistake(&mistake.place, mistake.message));
        }
        let hosts = s.get("bearer_hosts", values::bearer_hosts).unwrap_or_default();
        let policy = Policy {
            allowed_hosts: s.get("allowed_hosts", values::hosts).unwrap_or_default(),
            allowed_origins: s.get("allowed_origins", values::origins).unwrap_or_default(),
            allow_forwarded: s.get("allow_forwarded", values::boolean).unwrap_or_default(),
            require_key: s.get("require_key", values::boolean).unwrap_or_default(),
            key: None,
            run_key: None,
        };
        let network = s.get("dangerously_listen_on_network", values::network_address);
        if network.is_some() {
            refuse_open_network(&policy, &mut s);
        }
        let cache = Limits {
            max_entries: s.get("cache.max_entries", values::count).unwrap_or(DEFAULT_MAX_ENTRIES),
            buffer: s.get("cache.buffer", values::duration).unwrap_or(DEFAULT_BUFFER),
            max_age: s.get("cache.max_age", values::duration).unwrap_or(DEFAULT_MAX_AGE),
        };
        let level = s.get("log_level", values::level);
        let env_file = s.get("env_file", values::path);
        let auth = match s.get("auth", values::auth) {
            Some(values::AuthSource::AccessToken) => Auth::AccessToken(s.access_token().unwrap_or_default()),
            Some(values::AuthSource::Oidc) | None => {
                let env_file = env_file.unwrap_or_else(|| s.project().join(DEFAULT_ENV_FILE));
                let shown = env_file.strip_prefix(s.project()).unwrap_or(&env_file).display().to_string();
                Auth::Oidc { env_file, shown }
            }
        };
        let config = Self {
            port: s.get("port", values::port).unwrap_or(DEFAULT_PORT),
            instance_key: None,
            is_announced: true,
            unix_socket: s.get("unix_socket", values::path),
            network,
            warn_before: s.get("warn_before", values::durations).unwrap_or_else(|| DEFAULT_WARN_BEFORE.to_vec()),
            allowed_connectors: s.get("connectors.allow", values::names),
            logging: logging::Options {
                level: match (args.quiet, args.verbose) {
                    (true, _) => tracing::Level::WARN,
                    (false, 0) => level.unwrap_or(tracing::Level::INFO),
                    (false, 1) => tracing::Level::DEBUG,
                    (false, _) => tracing::Level::TRACE,
                },
                format: s.get("log_format", values::log_format).unwrap_or_default(),
                color: s.variable("NO_COLOR").is_none_or(|v| v.is_empty())
                    && s.variable("TERM").is_none_or(|terminal| terminal != "dumb"),
            },
            refresh: s.get("refresh", values::refresh).unwrap_or_default(),
            surroundings: CliEnvironment::of(environment, upstream.use_env_proxy),
            wait: s.get("wait", values::wait).unwrap_or_default(),
            desktop_notices: s.get("desktop_notices", values::boolean).unwrap_or(true) && has_desktop(&s),
            state_dir: state_dir(environment),
            directory: s.directory().to_owned(),
            project: s.project().to_owned(),
            found_by: s.found_by(),
            named: s.named(),
            cache,
            upstream,
            hosts,
            policy,
            auth,
        };
        (config, s.mistakes())
    }
}

fn checked((config, mistakes): (Config, Vec<Mistake>)) -> Result<Config, ConfigError> {
    if mistakes.is_empty() { Ok(config) } else { Err(ConfigError(mistakes)) }
}

/// What is wrong with the proxy that the environment names for this scheme.
fn mistakes_of(env_proxy: &EnvProxy, scheme: &Scheme) -> impl Iterator<Item = Mistake> {
    let mistake =
        |unusable: &Unusable| Mistake { place: unusable.variable.into(), message: unusable.reason.to_string() };
    env_proxy.unusable(scheme).iter().map(mistake)
}

/// Whether there is a desktop that could show something. Without the address of its bus, none is looked for.
fn has_desktop(s: &Sources<'_>) -> bool {
    cfg!(target_os = "macos") || s.variable("DBUS_SESSION_BUS_ADDRESS").is_some_and(|address| !address.is_empty())
}

/// The network may only ask with the key, and under a name that is expected: a page that rebinds its own name to the
/// address is stopped by the one, everybody else by the other.
fn refuse_open_network(policy: &Policy, s: &mut Sources<'_>) {
    let place = "--dangerously-listen-on-network";
    if !policy.require_key {
        s.mistake(place, "needs --require-key, too: without the key, the whole network could take tokens".into());
    }
    if policy.allowed_hosts.iter().all(|host| guard::is_loopback_name(host.name.as_bytes())) {
        s.mistake(place, "needs --allowed-host, too, with the name or address that others use for this machine".into());
    }
}

#[cfg(test)]
mod tests;
