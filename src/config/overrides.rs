//! Settings given as flags or environment variables.

use std::ffi::OsString;
use std::path::Path;

use super::EnvLookup;
use super::setting::{Layer, RawValue, SettingValue};
use super::suggestion;
use crate::config::args::GlobalArgs;
use crate::proxy::error::excerpt;

/// The settings given as flags. Relative paths refer to `current_dir`.
pub(super) fn flags(args: &GlobalArgs, current_dir: &Path) -> Layer {
    let text = |value: &Option<String>| value.clone().map(RawValue::Text);
    let list = |items: &[String]| (!items.is_empty()).then(|| RawValue::List(items.to_vec()));
    let switch = |flag: bool| flag.then_some(RawValue::Boolean(true));
    [
        ("env_file", "--env-file", text(&args.env_file)),
        ("port", "--port", text(&args.port)),
        ("upstream", "--upstream", text(&args.upstream)),
        ("upstream_ca", "--upstream-ca", text(&args.upstream_ca)),
        ("auth", "--auth", text(&args.auth)),
        ("team_id", "--team-id", text(&args.team_id)),
        ("allowed_hosts", "--allowed-host", list(&args.allowed_hosts)),
        ("allowed_origins", "--allowed-origin", list(&args.allowed_origins)),
        ("bearer_hosts", "--bearer-host", list(&args.bearer_hosts)),
        ("allow_forwarded", "--allow-forwarded", switch(args.allow_forwarded)),
        ("require_key", "--require-key", switch(args.require_key)),
        ("unix_socket", "--unix-socket", text(&args.unix_socket)),
        ("dangerously_listen_on_network", "--dangerously-listen-on-network", text(&args.dangerously_listen_on_network)),
        ("use_env_proxy", "--use-env-proxy", switch(args.use_env_proxy)),
        ("refresh", "--refresh", text(&args.refresh)),
        ("wait", "--wait", text(&args.wait)),
        ("desktop_notices", "--desktop-notices", text(&args.desktop_notices)),
        ("log_format", "--log-format", text(&args.log_format)),
        ("log_level", "--log-level", text(&args.log_level)),
    ]
    .into_iter()
    .filter_map(|(key, flag, raw)| Some((key, SettingValue::from_flag(raw?, flag, current_dir))))
    .collect()
}

/// The environment variable of each setting that has one.
const VARIABLES: &[(&str, &str)] = &[
    ("env_file", "CONNECT_SIDECAR_ENV_FILE"),
    ("port", "CONNECT_SIDECAR_PORT"),
    ("upstream", "CONNECT_SIDECAR_UPSTREAM"),
    ("upstream_ca", "CONNECT_SIDECAR_UPSTREAM_CA"),
    ("auth", "CONNECT_SIDECAR_AUTH"),
    ("team_id", "CONNECT_SIDECAR_TEAM_ID"),
    ("allowed_hosts", "CONNECT_SIDECAR_ALLOWED_HOST"),
    ("allowed_origins", "CONNECT_SIDECAR_ALLOWED_ORIGIN"),
    ("bearer_hosts", "CONNECT_SIDECAR_BEARER_HOST"),
    ("allow_forwarded", "CONNECT_SIDECAR_ALLOW_FORWARDED"),
    ("require_key", "CONNECT_SIDECAR_REQUIRE_KEY"),
    ("unix_socket", "CONNECT_SIDECAR_UNIX_SOCKET"),
    ("dangerously_listen_on_network", "CONNECT_SIDECAR_DANGEROUSLY_LISTEN_ON_NETWORK"),
    ("use_env_proxy", "CONNECT_SIDECAR_USE_ENV_PROXY"),
    ("refresh", "CONNECT_SIDECAR_REFRESH"),
    ("wait", "CONNECT_SIDECAR_WAIT"),
    ("desktop_notices", "CONNECT_SIDECAR_DESKTOP_NOTICES"),
    ("log_format", "CONNECT_SIDECAR_LOG_FORMAT"),
    ("log_level", "CONNECT_SIDECAR_LOG_LEVEL"),
];

/// The settings given as environment variables. Relative paths refer to `current_dir`.
pub(super) fn variables(environment: EnvLookup<'_>, current_dir: &Path) -> Layer {
    let set = VARIABLES.iter().filter_map(|(key, name)| {
        let text = environment(name)?.into_string().map_or(RawValue::Other, RawValue::Text);
        Some((*key, SettingValue::from_variable(text, name, current_dir)))
    });
    set.collect()
}

/// A message for each variable with the sidecar's prefix that is unknown, with a suggestion if a known name is similar.
pub fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    const PREFIX: &str = "CONNECT_SIDECAR_";
    // Those that select files, and those that `run` sets for its command.
    const OTHERS: [&str; 5] = ["CONFIG", "PROJECT", "URL", "KEY", "BEARER_HOSTS"];
    let is_known =
        |name: &str| OTHERS.contains(&name) || VARIABLES.iter().any(|(_, known)| &known[PREFIX.len()..] == name);
    let mut unknown: Vec<_> = names
        .filter_map(|name| Some(name.to_str()?.strip_prefix(PREFIX)?.to_owned()))
        .filter(|name| !is_known(name))
        .map(|name| {
            let names = VARIABLES.iter().map(|(_, known)| &known[PREFIX.len()..]).chain(["CONFIG", "PROJECT"]);
            let suggestion = suggestion::most_similar(names, |known| strsim::jaro_winkler(known, &name))
                .map(|known| format!(", did you mean {PREFIX}{known}?"))
                .unwrap_or_default();
            format!("unknown variable {PREFIX}{}{suggestion}", excerpt(name.as_bytes()))
        })
        .collect();
    unknown.sort();
    unknown
}
