//! Reads flags, environment and files into one validated [`Config`].
//!
//! Every source is read and every value is checked before anything starts, so all mistakes are reported at once. A
//! project's own `sidecar.toml` may come from a hostile repository: it may tune the sidecar, but not redirect a
//! credential or widen access (docs/configuration.md section 1, docs/security.md X1 to X4). Messages never repeat a
//! value of a file.

pub mod args;
mod directories;
mod file;
mod overrides;
mod portable;
mod project;
mod setting;
mod settings;
mod sources;
mod suggestion;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
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
pub use directories::{config_home, state_dir};
pub use overrides::unknown_variables;
pub use portable::{PortableSettings, portable_settings};
pub use settings::Difference;
use sources::Sources;
pub use values::RefreshMode;

/// Looks up an environment variable.
pub type EnvLookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The port if none is set.
pub const DEFAULT_PORT: u16 = 2774;
/// The env file in the project if none is set.
pub const DEFAULT_ENV_FILE: &str = ".env.local";
const DEFAULT_UPSTREAM: &str = "https://api.vercel.com";
const DEFAULT_WARN_BEFORE: [Duration; 3] =
    [Duration::from_secs(3600), Duration::from_secs(900), Duration::from_secs(300)];
const DEFAULT_MAX_ENTRIES: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
const DEFAULT_BUFFER: Duration = Duration::from_secs(30);
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// All settings of a sidecar. Each part gets only the options that it needs.
#[derive(Debug, Clone)]
pub struct Config {
    /// The port on both loopback addresses; 0 for any free one.
    pub port: u16,
    /// The instance key, if it is already known. Not a setting.
    pub instance_key: Option<Key>,
    /// Whether other commands can find this instance. Not a setting.
    pub is_announced: bool,
    /// An additional unix socket to listen on.
    pub unix_socket: Option<PathBuf>,
    /// An additional, non-loopback address to listen on. Set only with a required key and allowed hosts.
    pub network: Option<IpAddr>,
    /// The directory that the command runs for, absolute: the project's or one below it.
    pub directory: PathBuf,
    /// The project's directory, absolute.
    pub project: PathBuf,
    /// The file that marks `project` as a project, if it is above `directory`.
    pub project_marker: Option<String>,
    /// The settings that any source sets, each with its location.
    pub explicit: BTreeMap<&'static str, String>,
    /// Where the credential comes from.
    pub auth: Auth,
    /// How long before the token expires to warn.
    pub warn_before: Vec<Duration>,
    /// The cache's limits.
    pub cache: Limits,
    /// If set, all other connectors are refused.
    pub allowed_connectors: Option<BTreeSet<String>>,
    /// How to reach Connect.
    pub upstream: upstream::Options,
    /// Vercel's hosts, and those that get the OIDC token.
    pub hosts: Hosts,
    /// Which requests are allowed. The key is added at startup.
    pub policy: Policy,
    /// Who refreshes the OIDC token.
    pub refresh: RefreshMode,
    /// The environment that the Vercel CLI runs with.
    pub cli_environment: CliEnvironment,
    /// How long a request waits for a valid credential if there is none.
    pub wait: Duration,
    /// Where running instances keep their state; `None` without a home directory.
    pub state_dir: Option<PathBuf>,
    /// Whether to show warnings as desktop notices: true if there is a desktop, unless turned off.
    pub desktop_notices: bool,
    /// How to log.
    pub logging: logging::Options,
}

/// Where the credential comes from.
#[derive(Debug, Clone)]
pub enum Auth {
    /// `VERCEL_OIDC_TOKEN` in a file.
    Oidc {
        /// The file.
        env_file: PathBuf,
        /// Its path as shown to people.
        shown: String,
    },
    /// `VERCEL_TOKEN` in the environment.
    AccessToken(SecretString),
}

impl Auth {
    /// The source as shown to people.
    pub fn name(&self) -> &str {
        match self {
            Self::Oidc { shown, .. } => shown,
            Self::AccessToken(_) => "VERCEL_TOKEN",
        }
    }
}

/// A mistake in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMistake {
    /// A flag, a variable, or a file with its line.
    pub location: String,
    /// What is wrong and what is expected.
    pub message: String,
}

impl ConfigMistake {
    /// A mistake at this location.
    pub fn new(location: &str, message: impl Into<String>) -> Self {
        Self { location: location.to_owned(), message: message.into() }
    }
}

/// Reads `--port` for a command that takes no other settings. Refuses all flags except `--port` and `allowed`, with the
/// reason `why`.
pub fn port_only(args: &GlobalArgs, allowed: &[&str], why: &str) -> Result<Option<u16>, ConfigError> {
    let mut flags = overrides::flags(args, Path::new(""));
    let mut mistakes = Vec::new();
    let port = flags.iter().find(|(key, _)| *key == "port").and_then(|(_, value)| {
        let port = values::port(value);
        port.map_err(|e| mistakes.push(ConfigMistake::new(&value.location, e.to_string()))).ok()
    });
    flags.retain(|(key, _)| *key != "port");
    let paths = [("--config", args.config.is_some()), ("--project", args.project.is_some())];
    let paths = paths.into_iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag.to_owned());
    let flags = paths.chain(flags.into_iter().map(|(_, value)| value.location));
    let unused = flags.filter(|flag| !allowed.contains(&flag.as_str()));
    mistakes.extend(unused.map(|flag| ConfigMistake::new(&flag, format!("{why}; leave this out"))));
    checked((port, mistakes))
}

/// The flags of a command that may start its own sidecar. It logs only warnings and takes any free port, unless flags
/// or variables say otherwise: what files say about both is meant for `serve`.
pub fn with_command_defaults(args: &GlobalArgs, environment: EnvLookup<'_>) -> GlobalArgs {
    let is_set = |name: &str| environment(name).is_some();
    let wants_log = args.verbose > 0 || args.log_level.is_some() || is_set("CONNECT_SIDECAR_LOG_LEVEL");
    let wants_port = args.port.is_some() || is_set("CONNECT_SIDECAR_PORT");
    GlobalArgs {
        quiet: args.quiet || !wants_log,
        port: if wants_port { args.port.clone() } else { Some("0".to_owned()) },
        ..args.clone()
    }
}

/// Selects the running sidecar that a command asks. Reads no files: their port is meant for `serve`, and a mistake in
/// one must not keep the command from reaching a running sidecar.
pub fn selector(args: &GlobalArgs, environment: EnvLookup<'_>, current_dir: &Path) -> Result<Selector, ConfigError> {
    let mut s = Sources::without_files(args, environment, current_dir);
    // Port 0 tells `serve` to take any free port; it names no instance.
    let port = s.get("port", values::port).filter(|port| *port != 0);
    let selector = Selector { state_dir: state_dir(environment), directory: s.directory().to_owned(), port };
    checked((selector, s.mistakes()))
}

/// Whether a flag or a variable sets a setting that is compared with the running sidecar's.
pub fn sets_compared_setting(args: &GlobalArgs, environment: EnvLookup<'_>) -> bool {
    let base = Path::new("");
    let set = overrides::flags(args, base).into_iter().chain(overrides::variables(environment, base));
    set.into_iter().any(|(key, _)| settings::COMPARED_SETTINGS.contains(&key))
}

/// Everything that is wrong with the configuration, one mistake a line. Exit code 2.
#[derive(Debug, thiserror::Error)]
pub struct ConfigError(pub Vec<ConfigMistake>);

impl ConfigError {
    /// A single mistake at this location.
    pub fn new(location: &str, message: impl Into<String>) -> Self {
        Self(vec![ConfigMistake::new(location, message)])
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, ConfigMistake { location, message }) in self.0.iter().enumerate() {
            let end = if i + 1 < self.0.len() { "\n" } else { "" };
            write!(f, "{location}: {message}{end}")?;
        }
        Ok(())
    }
}

impl Config {
    /// Selects the running sidecar that a command with these settings uses.
    pub fn selector(&self) -> Selector {
        let port = self.explicit.contains_key("port").then_some(self.port).filter(|port| *port != 0);
        Selector { state_dir: self.state_dir.clone(), directory: self.directory.clone(), port }
    }

    /// A note on which directory is the project, if it is above the command's directory.
    pub fn project_note(&self) -> Option<String> {
        let name = self.project_marker.as_ref()?;
        Some(format!("the project is {}, the nearest directory above with {name}", self.project.display()))
    }

    /// Reads and checks all sources. Relative paths in flags and variables refer to `current_dir`.
    pub fn load(args: &GlobalArgs, environment: EnvLookup<'_>, current_dir: &Path) -> Result<Self, ConfigError> {
        checked(Self::examine(args, environment, current_dir))
    }

    /// Like [`Config::load`], for a command whose programs are intercepted: their requests to other hosts use the proxy
    /// of the environment, so that is checked too.
    pub fn load_to_intercept(
        args: &GlobalArgs,
        environment: EnvLookup<'_>,
        current_dir: &Path,
    ) -> Result<Self, ConfigError> {
        let (config, mut mistakes) = Self::examine(args, environment, current_dir);
        for mut mistake in proxy_mistakes(&config.upstream.env_proxy, &Scheme::HTTPS) {
            if !mistakes.contains(&mistake) {
                mistake.message.push_str("; --no-intercept does without the proxy");
                mistakes.push(mistake);
            }
        }
        checked((config, mistakes))
    }

    /// The configuration with its mistakes, for commands that only inspect. Invalid values are ignored, and a missing
    /// access token is empty.
    pub fn examine(args: &GlobalArgs, environment: EnvLookup<'_>, current_dir: &Path) -> (Self, Vec<ConfigMistake>) {
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
            proxy_mistakes(&upstream.env_proxy, scheme)
                .for_each(|mistake| s.mistake(&mistake.location, mistake.message));
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
            check_network_access(&policy, &mut s);
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
            cli_environment: CliEnvironment::of(environment, upstream.use_env_proxy),
            wait: s.get("wait", values::wait).unwrap_or_default(),
            desktop_notices: s.get("desktop_notices", values::boolean).unwrap_or(true) && has_desktop(&s),
            state_dir: state_dir(environment),
            directory: s.directory().to_owned(),
            project: s.project().to_owned(),
            project_marker: s.project_marker(),
            explicit: s.explicit(),
            cache,
            upstream,
            hosts,
            policy,
            auth,
        };
        (config, s.mistakes())
    }
}

fn checked<T>((value, mistakes): (T, Vec<ConfigMistake>)) -> Result<T, ConfigError> {
    if mistakes.is_empty() { Ok(value) } else { Err(ConfigError(mistakes)) }
}

/// What is wrong with the environment's proxy for this scheme.
fn proxy_mistakes(env_proxy: &EnvProxy, scheme: &Scheme) -> impl Iterator<Item = ConfigMistake> {
    let mistake = |unusable: &Unusable| ConfigMistake::new(unusable.variable, unusable.reason.to_string());
    env_proxy.unusable(scheme).iter().map(mistake)
}

/// Whether there is a desktop to show notices: on Linux, whether the address of its message bus is set.
fn has_desktop(s: &Sources<'_>) -> bool {
    cfg!(target_os = "macos") || s.variable("DBUS_SESSION_BUS_ADDRESS").is_some_and(|address| !address.is_empty())
}

/// Network access needs both the key, which stops other machines, and allowed hosts, which stop DNS rebinding.
fn check_network_access(policy: &Policy, s: &mut Sources<'_>) {
    let flag = "--dangerously-listen-on-network";
    if !policy.require_key {
        s.mistake(flag, "needs --require-key, too: without the key, the whole network could take tokens".into());
    }
    if policy.allowed_hosts.iter().all(|host| guard::is_loopback_name(host.name.as_bytes())) {
        s.mistake(flag, "needs --allowed-host, too, with the name or address that others use for this machine".into());
    }
}

#[cfg(test)]
mod tests;
