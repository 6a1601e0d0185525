//! The settings of this command line and environment in a form that a service can be started with later.
//!
//! Contains no secret: no flag takes one, and only the sidecar's own variables are included.

use std::path::Path;

use super::setting::{RawValue, SettingValue};
use super::{ConfigError, ConfigMistake, EnvLookup, overrides};
use crate::config::args::GlobalArgs;

/// Arguments and variables that give `serve` the settings of this process, with the same precedence. `serve` reads
/// configuration files itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PortableSettings {
    /// Arguments, each with its value in the same argument. Paths are absolute.
    pub flags: Vec<String>,
    /// `CONNECT_SIDECAR_*` variables. Paths are absolute.
    pub variables: Vec<(String, String)>,
}

/// The settings whose values are paths.
const PATH_SETTINGS: [&str; 3] = ["env_file", "upstream_ca", "unix_socket"];

/// Collects the flags and variables, except the project, which the caller adds. Values are not checked.
pub fn portable_settings(
    args: &GlobalArgs,
    environment: EnvLookup<'_>,
    current_dir: &Path,
) -> Result<PortableSettings, ConfigError> {
    let mut mistakes = Vec::new();
    let mut unicode = |location: &str, text: Option<String>| {
        if text.is_none() {
            mistakes.push(ConfigMistake::new(location, "it is not UTF-8"));
        }
        text.unwrap_or_default()
    };
    let absolute = |path: &Path| current_dir.join(path).into_os_string().into_string().ok();

    let mut portable = PortableSettings::default();
    if let Some(path) = &args.config {
        portable.flags.push(format!("--config={}", unicode("--config", absolute(path))));
    }
    for (key, SettingValue { raw, location, .. }) in overrides::flags(args, current_dir) {
        match raw {
            RawValue::Text(path) if PATH_SETTINGS.contains(&key) => {
                portable.flags.push(format!("{location}={}", unicode(&location, absolute(path.as_ref()))));
            }
            RawValue::Text(text) => portable.flags.push(format!("{location}={text}")),
            RawValue::List(items) => portable.flags.extend(items.iter().map(|item| format!("{location}={item}"))),
            RawValue::Integer(_) | RawValue::Boolean(_) | RawValue::Other => portable.flags.push(location),
        }
    }
    portable.flags.extend(args.quiet.then(|| "--quiet".to_owned()));
    portable.flags.extend((0..args.verbose).map(|_| "--verbose".to_owned()));

    if let Some(path) = environment("CONNECT_SIDECAR_CONFIG") {
        let name = "CONNECT_SIDECAR_CONFIG";
        portable.variables.push((name.into(), unicode(name, absolute(path.as_ref()))));
    }
    for (key, SettingValue { raw, location, .. }) in overrides::variables(environment, current_dir) {
        let text = match raw {
            RawValue::Text(path) if PATH_SETTINGS.contains(&key) => absolute(path.as_ref()),
            RawValue::Text(text) => Some(text),
            _ => None,
        };
        let text = unicode(&location, text);
        portable.variables.push((location, text));
    }
    if mistakes.is_empty() { Ok(portable) } else { Err(ConfigError(mistakes)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::ffi::OsString;

    use crate::cli::args::Cli;
    use crate::config::Config;

    const FLAGS: [&str; 23] = [
        "--config=my.toml",
        "--env-file=../env",
        "--port=0",
        "--upstream=http://127.0.0.1:9",
        "--upstream-ca=ca.pem",
        "--auth=oidc",
        "--team-id=team_a",
        "--allowed-host=a.test",
        "--allowed-host=b.test:1",
        "--allowed-origin=http://a.test",
        "--bearer-host=a.test/x=http://127.0.0.1:8",
        "--allow-forwarded",
        "--require-key",
        "--unix-socket=run/s",
        "--dangerously-listen-on-network=192.0.2.1",
        "--use-env-proxy",
        "--desktop-notices=false",
        "--wait=3s",
        "--log-format=json",
        "--log-level=debug",
        "--quiet",
        "--verbose",
        "--verbose",
    ];

    fn global(arguments: &[String]) -> GlobalArgs {
        let cli = Cli::try_parse_from(["connect-sidecar".to_owned()].iter().chain(arguments)).expect("arguments");
        cli.global_args().expect("flags")
    }

    #[test]
    fn every_flag_is_included_and_means_the_same_in_any_directory() {
        let given: Vec<_> = FLAGS.map(str::to_owned).into_iter().chain(["--refresh=cli".into()]).collect();
        let before = global(&given);
        let here = portable_settings(&before, &|_| None, Path::new("/here/now")).expect("portable settings");
        let there = global(&here.flags);
        let expected = GlobalArgs {
            config: Some("/here/now/my.toml".into()),
            env_file: Some("/here/now/../env".into()),
            upstream_ca: Some("/here/now/ca.pem".into()),
            unix_socket: Some("/here/now/run/s".into()),
            ..before
        };
        assert_eq!(format!("{there:?}"), format!("{expected:?}"));
        let known = <Cli as clap::CommandFactory>::command();
        let known = known.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| *flag != "project");
        for flag in known {
            assert!(given.iter().any(|arg| arg[2..].split('=').next() == Some(flag)), "--{flag} is not in this test");
        }
    }

    #[test]
    fn every_variable_is_included_except_the_project_and_those_of_other_programs() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("c.toml"), "").expect("written");
        let environment = |name: &str| -> Option<OsString> {
            Some(match name {
                "CONNECT_SIDECAR_CONFIG" => "c.toml".into(),
                "CONNECT_SIDECAR_ENV_FILE" => "e".into(),
                "CONNECT_SIDECAR_REQUIRE_KEY" => "0".into(),
                "CONNECT_SIDECAR_ALLOWED_HOST" => "a.test,b.test".into(),
                "CONNECT_SIDECAR_PROJECT" => ".".into(),
                "VERCEL_TOKEN" | "HTTPS_PROXY" => "secret".into(),
                _ => return None,
            })
        };
        let portable = portable_settings(&global(&[]), &environment, dir.path()).expect("portable settings");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let expected = [
            ("CONNECT_SIDECAR_CONFIG", at("c.toml")),
            ("CONNECT_SIDECAR_ENV_FILE", at("e")),
            ("CONNECT_SIDECAR_ALLOWED_HOST", "a.test,b.test".into()),
            ("CONNECT_SIDECAR_REQUIRE_KEY", "0".into()),
        ];
        assert_eq!(portable.flags, [""; 0]);
        assert_eq!(portable.variables, expected.map(|(name, value)| (name.to_owned(), value)));
        let elsewhere = |name: &str| {
            portable.variables.iter().find(|(known, _)| known == name).map(|(_, value)| OsString::from(value))
        };
        let config = Config::load(&global(&[]), &elsewhere, Path::new("/")).expect("settings");
        assert_eq!((config.policy.require_key, config.policy.allowed_hosts.len()), (false, 2));
    }

    #[test]
    fn a_path_that_is_not_utf8_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        let args = GlobalArgs { config: Some(OsString::from_vec(b"/\xff".to_vec()).into()), ..GlobalArgs::default() };
        let ConfigError(mistakes) = portable_settings(&args, &|_| None, Path::new("/")).expect_err("refused");
        assert_eq!(mistakes[0].location, "--config");
    }
}
