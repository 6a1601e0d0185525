//! Settings given as flags or environment variables.

use std::ffi::OsString;
use std::path::Path;

use super::EnvLookup;
use super::setting::{Layer, RawValue, SettingValue};
use super::suggestion;
use crate::config::args::GlobalArgs;
use crate::proxy::error::excerpt;

const PREFIX: &str = "CONNECT_SIDECAR_";

/// Each setting that has a flag: its key, the flag, and the flag's value if given.
fn flag_values(args: &GlobalArgs) -> impl Iterator<Item = (&'static str, &'static str, Option<RawValue>)> + use<> {
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
}

/// The settings given as flags. Relative paths refer to `current_dir`.
pub(super) fn flags(args: &GlobalArgs, current_dir: &Path) -> Layer {
    let given = flag_values(args).filter_map(|(key, flag, raw)| Some((key, flag, raw?)));
    given.map(|(key, flag, raw)| (key, SettingValue::from_flag(raw, flag, current_dir))).collect()
}

/// Each setting that has a variable, with the variable's name after the prefix: `ENV_FILE` for `--env-file`.
fn variable_names() -> impl Iterator<Item = (&'static str, String)> {
    let name = |flag: &str| flag.trim_start_matches('-').replace('-', "_").to_uppercase();
    flag_values(&GlobalArgs::default()).map(move |(key, flag, _)| (key, name(flag)))
}

/// The settings given as environment variables. Relative paths refer to `current_dir`.
pub(super) fn variables(environment: EnvLookup<'_>, current_dir: &Path) -> Layer {
    let set = variable_names().filter_map(|(key, name)| {
        let name = format!("{PREFIX}{name}");
        let text = environment(&name)?.into_string().map_or(RawValue::Other, RawValue::Text);
        Some((key, SettingValue::from_variable(text, &name, current_dir)))
    });
    set.collect()
}

/// A message for each variable with the sidecar's prefix that is unknown, with a suggestion if a known name is similar.
pub fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    let settable: Vec<_> =
        variable_names().map(|(_, name)| name).chain(["CONFIG", "PROJECT"].map(String::from)).collect();
    // `run` sets the others for its command.
    let is_known =
        |name: &str| settable.iter().any(|known| known == name) || ["URL", "KEY", "BEARER_HOSTS"].contains(&name);
    let mut unknown: Vec<_> = names
        .filter_map(|name| Some(name.to_str()?.strip_prefix(PREFIX)?.to_owned()))
        .filter(|name| !is_known(name))
        .map(|name| {
            let similarity = |known: &str| strsim::jaro_winkler(known, &name);
            let suggestion = suggestion::most_similar(settable.iter().map(String::as_str), similarity)
                .map(|known| format!(", did you mean {PREFIX}{known}?"))
                .unwrap_or_default();
            format!("unknown variable {PREFIX}{}{suggestion}", excerpt(name.as_bytes()))
        })
        .collect();
    unknown.sort();
    unknown
}
