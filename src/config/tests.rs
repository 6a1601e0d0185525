//! The rules of docs/configuration.md section 1: what each source may set, precedence, and messages for mistakes.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;

use clap::{CommandFactory, Parser};
use secrecy::ExposeSecret;
use tempfile::TempDir;

use super::setting::SETTINGS;
use super::*;
use crate::cli::args::Cli;
use crate::config::args::GlobalArgs;

/// A machine with a project, a user's configuration file, a file for `--config`, an environment and a command line.
struct Machine {
    dir: TempDir,
    environment: HashMap<String, String>,
    flags: Vec<String>,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for below in ["web", "config/connect-sidecar"] {
            fs::create_dir_all(dir.path().join(below)).expect("a directory");
        }
        let environment = HashMap::from([("XDG_CONFIG_HOME".into(), dir.path().join("config").display().to_string())]);
        Self { dir, environment, flags: Vec::new() }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().canonicalize().expect("a directory").join(below)
    }

    fn file(self, below: &str, content: &str) -> Self {
        fs::write(self.path(below), content).expect("written");
        self
    }

    fn projects_file(self, toml: &str) -> Self {
        self.file("web/sidecar.toml", toml)
    }

    fn users_file(self, toml: &str) -> Self {
        self.file("config/connect-sidecar/sidecar.toml", toml)
    }

    /// A file given by `--config`.
    fn given_file(self, toml: &str) -> Self {
        let path = self.path("given.toml").display().to_string();
        self.file("given.toml", toml).flags(&["--config", &path])
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
        self
    }

    fn try_load(&self) -> Result<Config, ConfigError> {
        let flags = std::iter::once("connect-sidecar").chain(self.flags.iter().map(String::as_str));
        let cli = Cli::try_parse_from(flags).expect("flags that exist");
        Config::load(&cli.global_args()?, &|name| self.environment.get(name).map(Into::into), &self.path("web"))
    }

    /// The configuration without the locations of its settings.
    fn effect(&self) -> String {
        format!("{:?}", Config { explicit: BTreeMap::new(), ..self.load() })
    }

    fn load(&self) -> Config {
        self.try_load().unwrap_or_else(|e| panic!("{e}"))
    }

    /// The mistakes as the command prints them, without this machine's directory.
    fn mistakes(&self) -> Vec<String> {
        let error = self.try_load().expect_err("a mistake").to_string();
        error.replace(&self.path("").display().to_string(), "").lines().map(Into::into).collect()
    }
}

fn env_file(config: &Config) -> (&Path, &str) {
    match &config.auth {
        Auth::Oidc { env_file, shown } => (env_file, shown),
        Auth::AccessToken(_) => panic!("an access token"),
    }
}

fn minutes(minutes: &[u64]) -> Vec<Duration> {
    minutes.iter().map(|m| Duration::from_secs(m * 60)).collect()
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let machine = Machine::new();
    let config = machine.load();
    assert_eq!((config.port, config.project.as_path()), (2774, machine.path("web").as_path()));
    assert_eq!(env_file(&config), (machine.path("web/.env.local").as_path(), ".env.local"));
    assert_eq!(config.warn_before, minutes(&[60, 15, 5]));
    assert_eq!(config.cache.max_entries.get(), 1024);
    assert_eq!(config.cache.buffer, Duration::from_secs(30));
    assert_eq!(config.cache.max_age, Duration::from_secs(24 * 3600));
    assert_eq!(config.allowed_connectors, None);
    assert_eq!(config.upstream.origin, "https://api.vercel.com");
    assert_eq!((config.upstream.team_id.as_deref(), config.upstream.use_env_proxy), (None, false));
    assert!(config.upstream.extra_roots.is_empty());
    assert_eq!(config.hosts, Hosts::default());
    assert!(config.policy.allowed_hosts.is_empty() && config.policy.allowed_origins.is_empty());
    assert!(!config.policy.allow_forwarded && !config.policy.require_key);
    assert_eq!((config.unix_socket, config.network), (None, None));
    assert_eq!((config.logging.level, config.logging.format), (tracing::Level::INFO, logging::Format::Text));
}

#[test]
fn notices_are_shown_if_there_is_a_desktop_unless_turned_off() {
    let desktop = || Machine::new().variable("DBUS_SESSION_BUS_ADDRESS", "unix:path=/bus");
    for (machine, shown) in [
        (desktop(), true),
        (Machine::new(), cfg!(target_os = "macos")),
        (Machine::new().variable("DBUS_SESSION_BUS_ADDRESS", ""), cfg!(target_os = "macos")),
        (desktop().projects_file("desktop_notices = false"), false),
        (desktop().variable("CONNECT_SIDECAR_DESKTOP_NOTICES", "false"), false),
        (desktop().flags(&["--desktop-notices=true"]).projects_file("desktop_notices = false"), true),
    ] {
        assert_eq!(machine.load().desktop_notices, shown, "{:?} {:?}", machine.flags, machine.environment);
    }
}

#[test]
fn no_color_and_a_dumb_terminal_turn_colors_off() {
    for (name, value, color) in
        [("NO_COLOR", "1", false), ("NO_COLOR", "", true), ("TERM", "dumb", false), ("TERM", "xterm", true)]
    {
        assert_eq!(Machine::new().variable(name, value).load().logging.color, color, "{name}={value}");
    }
}

#[test]
fn the_example_sidecar_toml_contains_every_project_setting_with_its_default() {
    let text = include_str!("../../sidecar.toml");
    let machine = Machine::new();
    let defaults = machine.effect();
    assert_eq!(machine.projects_file(text).effect(), defaults);
    for setting in SETTINGS.iter().filter(|setting| setting.in_project) {
        let name = setting.key.rsplit('.').next().expect("a name");
        assert!(text.contains(name), "{name}");
    }
    let uncommented = text.replace("# [connectors]", "[connectors]").replace("# allow", "allow");
    let allowed = Machine::new().projects_file(&uncommented).load().allowed_connectors;
    assert_eq!(allowed, Some(BTreeSet::from(["slack/acme-slack".to_owned()])));
}

#[test]
fn flags_override_variables_and_variables_override_files() {
    let project = || Machine::new().projects_file("port = 5");
    let user = || project().users_file("port = 4");
    let given = || user().given_file("port = 3");
    let variable = || given().variable("CONNECT_SIDECAR_PORT", "2");
    let flag = || variable().flags(&["--port", "1"]);
    let ports = [Machine::new(), project(), user(), given(), variable(), flag()].map(|machine| machine.load().port);
    assert_eq!(ports, [2774, 5, 4, 3, 2, 1]);
}

#[test]
fn a_list_replaces_the_list_of_a_weaker_source() {
    let machine = Machine::new()
        .projects_file("warn_before = [\"3m\"]\n[cache]\nbuffer = \"7s\"\n[connectors]\nallow = [\"a/b\"]")
        .users_file("warn_before = [\"1m\", \"2m\"]\nallowed_hosts = [\"user.test\"]\n[connectors]\nallow = [\"c/d\"]")
        .variable("CONNECT_SIDECAR_ALLOWED_HOST", "one.test, two.test:80")
        .variable("CONNECT_SIDECAR_ALLOWED_ORIGIN", "http://variable.test")
        .flags(&["--allowed-origin", "http://flag.test", "--allowed-origin", "http://flag.test:81"]);
    let config = machine.load();
    assert_eq!(config.warn_before, minutes(&[1, 2]));
    assert_eq!(config.allowed_connectors, Some(BTreeSet::from(["c/d".to_owned()])));
    let hosts: Vec<_> = config.policy.allowed_hosts.iter().map(|host| (host.name.as_str(), host.port)).collect();
    assert_eq!(hosts, [("one.test", None), ("two.test", Some(80))]);
    assert_eq!(config.policy.allowed_origins, ["http://flag.test", "http://flag.test:81"]);
    assert_eq!(config.cache.buffer, Duration::from_secs(7), "another key of the same table is left alone");
}

#[test]
fn a_projects_file_is_not_read_if_config_names_another() {
    for broken in ["port = 5", "port = ", "upstream = \"https://evil.example\"", "unknown = 1"] {
        let machine = Machine::new().projects_file(broken).given_file("");
        assert_eq!(machine.load().port, DEFAULT_PORT, "{broken}");
    }
    let machine = Machine::new().variable("CONNECT_SIDECAR_CONFIG", "none.toml");
    assert_eq!(machine.mistakes(), ["--config: web/none.toml is not there"], "relative to the current directory");
}

#[test]
fn every_flag_has_an_equivalent_variable() {
    let certificate = rcgen::generate_simple_self_signed(["x".into()]).expect("a certificate").cert.pem();
    let cases = [
        ("config", "other.toml"),
        ("project", "."),
        ("env-file", "some/.env"),
        ("port", "0"),
        ("upstream", "http://[::1]:8080"),
        ("upstream-ca", "ca.pem"),
        ("auth", "access-token"),
        ("team-id", "team_1"),
        ("allowed-host", "dev.test:2774"),
        ("allowed-origin", "http://localhost:3000"),
        ("bearer-host", "ai.example=http://127.0.0.1:1"),
        ("allow-forwarded", "1"),
        ("require-key", "true"),
        ("unix-socket", "run/sidecar.sock"),
        ("dangerously-listen-on-network", "192.0.2.1"),
        ("use-env-proxy", "1"),
        ("refresh", "cli"),
        ("wait", "30s"),
        ("desktop-notices", "false"),
        ("log-format", "json"),
        ("log-level", "trace"),
    ];
    let machine = |flag: &str| {
        let machine = Machine::new().file("web/ca.pem", &certificate).file("web/other.toml", "port = 1");
        let machine = machine.variable("VERCEL_TOKEN", "t").variable("DBUS_SESSION_BUS_ADDRESS", "unix:path=/bus");
        match flag {
            "dangerously-listen-on-network" => machine.flags(&["--require-key", "--allowed-host", "dev.test"]),
            _ => machine,
        }
    };
    let shown = |machine: &Machine| machine.effect().replace(&*machine.path("").to_string_lossy(), "");
    for (flag, value) in cases {
        let name = format!("CONNECT_SIDECAR_{}", flag.to_uppercase().replace('-', "_"));
        let is_switch = ["allow-forwarded", "require-key", "use-env-proxy"].contains(&flag);
        let option = format!("--{flag}");
        let flags: &[&str] = if is_switch { &[&option] } else { &[&option, value] };
        let by_flag = shown(&machine(flag).flags(flags));
        assert_eq!(shown(&machine(flag).variable(&name, value)), by_flag, "{name}");
        if flag != "project" {
            assert_ne!(by_flag, shown(&machine(flag)), "--{flag} changes nothing");
        }
    }
    let known: Vec<_> = cases.iter().map(|(flag, _)| *flag).chain(["quiet", "verbose"]).collect();
    for argument in Cli::command().get_arguments() {
        let long = argument.get_long().expect("a long name");
        assert!(known.contains(&long), "--{long} has no variable, or no case here");
    }
}

#[test]
fn settings_that_redirect_credentials_or_widen_access_are_refused_in_a_projects_file_only() {
    let certificate = rcgen::generate_simple_self_signed(["x".into()]).expect("a certificate").cert.pem();
    let cases = [
        ("upstream", "\"https://other.example\""),
        ("upstream_ca", "\"ca.pem\""),
        ("auth", "\"oidc\""),
        ("team_id", "\"team_1\""),
        ("allowed_hosts", "[\"dev.test\"]"),
        ("allowed_origins", "[\"http://localhost:3000\"]"),
        ("bearer_hosts", "[\"ai.example\"]"),
        ("allow_forwarded", "false"),
        ("require_key", "false"),
        ("unix_socket", "\"sidecar.sock\""),
        ("use_env_proxy", "false"),
        ("refresh", "\"off\""),
    ];
    for (key, value) in cases {
        let toml = format!("port = 1\n{key} = {value}");
        let beside = |file: &str| Machine::new().file(file, &certificate);
        let mistakes = Machine::new().projects_file(&toml).mistakes();
        assert_eq!(mistakes.len(), 1, "{mistakes:?}");
        let start = format!("sidecar.toml:2: `{key}` may not be set by a project's own file");
        assert!(mistakes[0].starts_with(&start), "{mistakes:?}");
        assert_eq!(beside("config/connect-sidecar/ca.pem").users_file(&toml).load().port, 1, "{key}");
        assert_eq!(beside("ca.pem").given_file(&toml).load().port, 1, "{key}");
    }
    for setting in SETTINGS.iter().filter(|setting| setting.in_files && !setting.in_project) {
        assert!(cases.iter().any(|(key, _)| *key == setting.key), "{} has no case here", setting.key);
    }
    for key in ["dangerously_listen_on_network", "log_format", "project", "config"] {
        let mistakes = Machine::new().projects_file(&format!("{key} = \"x\"")).mistakes();
        assert!(matches!(&*mistakes, [one] if one.contains(&format!("`{key}`"))), "{mistakes:?}");
    }
}

#[test]
fn a_relative_root_certificate_lies_beside_the_file_that_names_it() {
    let pem = || rcgen::generate_simple_self_signed(["x".into()]).expect("a certificate").cert.pem();
    let setting = "upstream_ca = \"ca.pem\"";
    let beside = Machine::new().users_file(setting).file("config/connect-sidecar/ca.pem", &pem());
    assert_eq!(beside.load().upstream.extra_roots.len(), 1);
    let in_project = Machine::new().users_file(setting).file("web/ca.pem", &pem());
    assert_eq!(in_project.mistakes().len(), 1, "{:?}", in_project.mistakes());
}

#[test]
fn a_relative_unix_socket_lies_beside_the_file_that_names_it() {
    let socket = |machine: Machine| machine.load().unix_socket.map(|path| (path, machine));
    for (machine, expected) in [
        (Machine::new().users_file("unix_socket = \"run/s\""), "config/connect-sidecar/run/s"),
        (Machine::new().given_file("unix_socket = \"run/s\""), "run/s"),
        (Machine::new().flags(&["--unix-socket", "../run/s"]), "web/../run/s"),
        (Machine::new().variable("CONNECT_SIDECAR_UNIX_SOCKET", "@abstract"), "web/@abstract"),
    ] {
        let (path, machine) = socket(machine).expect("a path");
        assert_eq!(path, machine.path("").join(expected));
    }
}

#[test]
fn network_access_needs_a_key_and_allowed_hosts() {
    const FLAG: &str = "--dangerously-listen-on-network";
    let machine = |flags: &[&str]| Machine::new().flags(&[FLAG, "192.0.2.1"]).flags(flags);
    let (no_key, no_host) = (format!("{FLAG}: needs --require-key"), format!("{FLAG}: needs --allowed-host"));
    for (flags, missing) in [
        (&[][..], &[&no_key, &no_host][..]),
        (&["--require-key"], &[&no_host]),
        (&["--allowed-host", "dev.test"], &[&no_key]),
        (&["--require-key", "--allowed-host", "localhost", "--allowed-host", "[::1]:2774"], &[&no_host]),
        (&["--require-key", "--allowed-host", "localhost", "--allowed-host", "dev.test"], &[]),
    ] {
        let machine = machine(flags);
        match machine.try_load() {
            Ok(config) => {
                assert!(missing.is_empty(), "{flags:?}");
                assert_eq!(config.network, Some("192.0.2.1".parse().expect("an address")));
            }
            Err(_) => {
                let mistakes = machine.mistakes();
                assert_eq!(mistakes.len(), missing.len(), "{mistakes:?}");
                assert!(mistakes.iter().zip(missing).all(|(m, start)| m.starts_with(*start)), "{mistakes:?}");
            }
        }
    }
    let files = "require_key = true\nallowed_hosts = [\"dev.test\"]";
    assert!(machine(&[]).users_file(files).load().network.is_some(), "the other two settings may come from files");
    for (address, expected) in [
        ("192.0.2.1", Ok("192.0.2.1")),
        ("0.0.0.0", Ok("0.0.0.0")),
        ("::", Ok("::")),
        ("2001:db8::1", Ok("2001:db8::1")),
        ("::ffff:192.0.2.1", Ok("192.0.2.1")),
        ("127.0.0.1", Err("this is not needed")),
        ("127.9.9.9", Err("this is not needed")),
        ("::1", Err("this is not needed")),
        ("::ffff:127.0.0.1", Err("this is not needed")),
        ("localhost", Err("expected an IP address")),
        ("192.0.2.1:2774", Err("expected an IP address")),
        ("[2001:db8::1]", Err("expected an IP address")),
        ("3221225985", Err("expected an IP address")),
        ("0", Err("expected an IP address")),
        ("", Err("expected an IP address")),
    ] {
        let machine = Machine::new().flags(&[FLAG, address, "--require-key", "--allowed-host", "dev.test"]);
        match (machine.try_load(), expected) {
            (Ok(config), Ok(expected)) => assert_eq!(config.network, Some(expected.parse().expect("an address"))),
            (Err(error), Err(reason)) => assert_eq!(error.to_string().find(reason), Some(FLAG.len() + 2), "{error}"),
            (loaded, _) => panic!("{address}: {:?}", loaded.map(|config| config.network)),
        }
    }
}

#[test]
fn an_address_given_as_port_names_the_flag_for_addresses() {
    let flag = "--dangerously-listen-on-network";
    for (port, names_flag) in
        [("0.0.0.0:2774", true), ("[::]:2774", true), (":2774", true), ("0:2774", true), ("192.0.2.1:2774", true)]
            .into_iter()
            .chain([("0.0.0.0", true), ("::", true), ("2774x", false), ("", false), ("65536", false)])
    {
        for machine in [
            Machine::new().flags(&["--port", port]),
            Machine::new().variable("CONNECT_SIDECAR_PORT", port),
            Machine::new().projects_file(&format!("port = {port:?}")),
        ] {
            let mistakes = machine.mistakes();
            assert!(matches!(&*mistakes, [one] if one.contains(flag) == names_flag), "{port}: {mistakes:?}");
        }
    }
}

#[test]
fn a_projects_file_may_name_only_an_env_file_inside_the_project() {
    let machine = Machine::new().file("outside.env", "");
    fs::create_dir_all(machine.path("web/sub")).expect("a directory");
    for (target, link) in [
        ("outside.env", "web/link"),
        ("", "web/up"),
        ("nowhere", "web/dangling"),
        ("web/sub", "web/inner"),
        ("web/loop", "web/loop"),
    ] {
        symlink(machine.path(target), machine.path(link)).expect("a link");
    }
    let absolute = machine.path("outside.env").display().to_string();
    for (name, is_inside) in [
        (".env", true),
        ("./.env", true),
        ("sub/.env", true),
        ("inner/.env", true),
        ("../outside.env", false),
        ("sub/../../outside.env", false),
        ("/dev/zero", false),
        (absolute.as_str(), false),
        ("link", false),
        ("up/outside.env", false),
        ("up/not-there", false),
        ("dangling", false),
        ("loop", false),
    ] {
        let toml = format!("env_file = {name:?}");
        fs::write(machine.path("web/sidecar.toml"), &toml).expect("written");
        match machine.try_load() {
            Ok(config) => {
                assert!(is_inside, "{name}");
                assert_eq!(env_file(&config).0, machine.path("web").join(name));
            }
            Err(error) => {
                assert!(!is_inside, "{name}: {error}");
                let start = "sidecar.toml:1: env_file: a project's own file may name only a file inside the project";
                assert!(error.to_string().starts_with(start), "{error}");
            }
        }
        for trusted in [
            Machine::new().users_file(&toml),
            Machine::new().given_file(&toml),
            Machine::new().flags(&["--env-file", name]),
            Machine::new().variable("CONNECT_SIDECAR_ENV_FILE", name),
        ] {
            assert_eq!(env_file(&trusted.load()).0, trusted.path("web").join(name), "{name}");
        }
    }
}

#[test]
fn a_projects_file_may_not_name_an_env_file_with_a_disguised_name() {
    for name in [".env\n", ".env\u{1b}[2J", ".env\u{7f}", ".env\u{9b}", "\u{202e}vne.", "\u{61c}.env", "\u{2066}.env"] {
        let escaped: String = name.chars().map(|c| format!("\\u{:04x}", u32::from(c))).collect();
        let toml = format!("env_file = \"{escaped}\"");
        let mistakes = Machine::new().projects_file(&toml).mistakes();
        let start = "sidecar.toml:1: env_file: a project's own file may name no file with control characters";
        assert!(matches!(&*mistakes, [one] if one.starts_with(start)), "{name:?}: {mistakes:?}");
        assert_eq!(env_file(&Machine::new().users_file(&toml).load()).1, name);
    }
}

#[test]
fn a_duration_is_a_string_with_a_unit() {
    for (value, expected) in [
        ("\"30s\"", Some(30_000)),
        ("\"15m\"", Some(900_000)),
        ("\"1h\"", Some(3_600_000)),
        ("\"1h 30m\"", Some(5_400_000)),
        ("\"500ms\"", Some(500)),
        ("\"0s\"", Some(0)),
        ("30", None),
        ("\"30\"", None),
        ("0", None),
        ("\"0\"", None),
        ("1.5", None),
        ("\"-1s\"", None),
        ("\"s\"", None),
        ("\"\"", None),
        ("\"1 fortnight\"", None),
        ("\"99999999999999999999h\"", None),
        ("true", None),
        ("12:00:00", None),
    ] {
        let machine = Machine::new().projects_file(&format!("[cache]\nmax_age = {value}"));
        match machine.try_load() {
            Ok(config) => assert_eq!(Some(config.cache.max_age.as_millis()), expected, "{value}"),
            Err(error) => {
                assert_eq!(expected, None, "{value}: {error}");
                let start = "sidecar.toml:2: cache.max_age: expected a duration with its unit";
                assert!(error.to_string().starts_with(start), "{error}");
            }
        }
    }
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    for (toml, expected) in [
        ("\nprot = 1", "sidecar.toml:2: unknown key `prot`, did you mean `port`?"),
        ("envfile = \"x\"", "sidecar.toml:1: unknown key `envfile`, did you mean `env_file`?"),
        ("warn-before = []", "sidecar.toml:1: unknown key `warn-before`, did you mean `warn_before`?"),
        ("max_age = \"1h\"", "sidecar.toml:1: unknown key `max_age`, did you mean `cache.max_age`?"),
        (
            "[cache]\n# none\nmax_entrys = 1",
            "sidecar.toml:3: unknown key `cache.max_entrys`, did you mean `cache.max_entries`?",
        ),
        (
            "[connectors]\nallowed = []",
            "sidecar.toml:2: unknown key `connectors.allowed`, did you mean `connectors.allow`?",
        ),
        ("[connector]\nallow = []", "sidecar.toml:1: unknown key `connector`, did you mean `connectors.allow`?"),
        ("[chache]\nmax_age = \"1h\"", "sidecar.toml:1: unknown key `chache`, did you mean `cache.max_age`?"),
        ("chache.max_age = \"1h\"", "sidecar.toml:1: unknown key `chache`, did you mean `cache.max_age`?"),
        ("[chache]\nmax_age = 1\nbuffer = 1", "sidecar.toml:1: unknown key `chache`, did you mean `[cache]`?"),
        ("[chache]", "sidecar.toml:1: unknown key `chache`, did you mean `[cache]`?"),
        ("[cache]\nport = 1", "sidecar.toml:2: unknown key `cache.port`, did you mean `port` above the first table?"),
        ("[cache]\nallow = []", "sidecar.toml:2: unknown key `cache.allow`, did you mean `connectors.allow`?"),
        ("cache = 5", "sidecar.toml:1: `cache` is a table, with `cache.max_entries`, `cache.buffer`, `cache.max_age`"),
        ("listen = \"x\"", "sidecar.toml:1: unknown key `listen`, did you mean `port` or `unix_socket`?"),
        ("[listen]\nport = 1", "sidecar.toml:1: unknown key `listen`, did you mean `port` or `unix_socket`?"),
        ("logLevel = \"info\"", "sidecar.toml:1: unknown key `logLevel`, did you mean `log_level`?"),
        ("log_format = \"json\"", "sidecar.toml:1: `log_format` may be set by no file; use --log-format"),
        ("zzz = 1", "sidecar.toml:1: unknown key `zzz`"),
        ("\"a\\u001b[31m\" = 1", "sidecar.toml:1: unknown key `a\\x1b[31m`"),
    ] {
        assert_eq!(Machine::new().projects_file(toml).mistakes(), [expected]);
    }
    let machine = Machine::new().users_file("prot = 1").given_file("prot = 1");
    assert_eq!(
        machine.mistakes(),
        [
            "given.toml:1: unknown key `prot`, did you mean `port`?",
            "config/connect-sidecar/sidecar.toml:1: unknown key `prot`, did you mean `port`?"
        ]
    );
}

#[test]
fn a_value_of_the_wrong_type_is_answered_with_what_is_expected() {
    for (toml, expected) in [
        ("port = \"2774\"", "port: expected a port number"),
        ("port = 65536", "port: expected a port number"),
        ("port = -1", "port: expected a port number"),
        ("port = 2774.0", "port: expected a port number"),
        ("port = [1]", "port: expected a port number"),
        ("env_file = 1", "env_file: expected a string"),
        ("env_file = \"\"", "env_file: expected a path"),
        ("warn_before = \"60m\"", "warn_before: expected a list of durations"),
        ("warn_before = [60]", "warn_before: expected a list of durations"),
        ("warn_before = [\"60\"]", "warn_before: expected a duration with its unit"),
        ("warn_before = [\"0s\"]", "warn_before: expected durations above zero"),
        ("log_level = \"loud\"", "log_level: expected error, warn, info, debug or trace"),
        ("log_level = 1", "log_level: expected a string"),
        ("cache.max_entries = 0", "cache.max_entries: expected a number from 1"),
        ("cache.max_entries = \"1\"", "cache.max_entries: expected a number from 1"),
        ("connectors.allow = \"slack/a\"", "connectors.allow: expected a list of strings"),
        ("connectors.allow = [1]", "connectors.allow: expected a list of strings"),
        ("upstream = 1", "upstream: expected a string"),
        ("auth = \"none\"", "auth: expected oidc or access-token"),
        ("team_id = \"a&b\"", "team_id: expected a team id"),
        ("allowed_hosts = [\"*\"]", "allowed_hosts: expected a host"),
        ("allowed_hosts = [\"a:b\"]", "allowed_hosts: expected a host"),
        ("allowed_hosts = [\"\"]", "allowed_hosts: expected a host"),
        ("allowed_origins = [\"*\"]", "allowed_origins: expected an origin"),
        ("allowed_origins = [\"null\"]", "allowed_origins: expected an origin"),
        ("allowed_origins = [\"http://a/\"]", "allowed_origins: expected an origin"),
        ("bearer_hosts = [\"vercel.com\"]", "bearer_hosts: expected a host such as"),
        ("bearer_hosts = [\"a.b=http://c.d\"]", "bearer_hosts: expected https"),
        ("allow_forwarded = \"true\"", "allow_forwarded: expected true or false"),
        ("require_key = 1", "require_key: expected true or false"),
        ("unix_socket = true", "unix_socket: expected a string"),
        ("unix_socket = \"\"", "unix_socket: expected a path"),
        ("unix_socket = \"\\u0000abstract\"", "unix_socket: expected a path"),
    ] {
        let mistakes = Machine::new().given_file(toml).mistakes();
        assert_eq!(mistakes.len(), 1, "{toml}: {mistakes:?}");
        assert!(mistakes[0].starts_with(&format!("given.toml:1: {expected}")), "{toml}: {mistakes:?}");
    }
}

#[test]
fn a_toml_syntax_error_has_its_line() {
    for (toml, line) in [
        ("port = 1\nport", 2),
        ("port = 1\n\nport = 2", 3),
        ("log_level = info", 1),
        ("env_file = \"x", 1),
        ("[cache", 1),
        ("port = 1 2", 1),
    ] {
        let mistakes = Machine::new().projects_file(toml).mistakes();
        assert!(mistakes[0].starts_with(&format!("sidecar.toml:{line}: not TOML: ")), "{toml}: {mistakes:?}");
    }
}

#[test]
fn a_file_that_is_not_safe_to_read_is_a_mistake() {
    let machine = Machine::new();
    fs::create_dir(machine.path("web/sidecar.toml")).expect("a directory");
    assert_eq!(machine.mistakes(), ["sidecar.toml: could not read it: it is a directory"]);
    let machine = Machine::new().given_file("");
    fs::write(machine.path("given.toml"), b"port = 1\n\xff").expect("written");
    assert_eq!(machine.mistakes(), ["given.toml: it is not UTF-8"]);
    let machine = Machine::new().flags(&["--project", "none"]);
    assert_eq!(machine.mistakes(), ["--project: web/none is not a directory"]);
}

#[test]
fn all_mistakes_of_all_sources_are_reported_at_once() {
    let machine = Machine::new()
        .projects_file("prot = 1\nupstream = \"https://evil.example\"\nenv_file = \"../x\"\n[cache]\nbuffer = 30\n]")
        .users_file("port = \"x\"\nupstream = \"http://example.com\"\n")
        .variable("CONNECT_SIDECAR_PORT", "many")
        .variable("CONNECT_SIDECAR_AUTH", "access-token")
        .variable("CONNECT_SIDECAR_REQUIRE_KEY", "perhaps")
        .flags(&["--port", "99999", "--log-format", "xml", "--allowed-host", "*", "--upstream-ca", "none.pem"]);
    let mut mistakes = machine.mistakes();
    mistakes.sort();
    let users = "config/connect-sidecar/sidecar.toml";
    let expected = [
        "--allowed-host: expected a host",
        "--log-format: expected text or json",
        "--port: expected a port number",
        "--upstream-ca: expected a file with PEM certificates",
        "CONNECT_SIDECAR_PORT: expected a port number",
        "CONNECT_SIDECAR_REQUIRE_KEY: expected true or false",
        "VERCEL_TOKEN: set it to a Vercel access token",
        &format!("{users}:1: port: expected a port number"),
        &format!("{users}:2: upstream: expected https"),
        "sidecar.toml:1: unknown key `prot`",
        "sidecar.toml:2: `upstream` may not be set",
        "sidecar.toml:3: env_file: a project's own file",
        "sidecar.toml:5: cache.buffer: expected a duration",
        "sidecar.toml:6: not TOML",
    ];
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (mistake, expected) in mistakes.iter().zip(expected) {
        assert!(mistake.starts_with(expected), "{mistake:?}, not {expected:?}");
    }
}

#[test]
fn no_value_is_repeated_in_a_mistake() {
    const CANARY: &str = "CANARY";
    let keys: Vec<_> = SETTINGS.iter().map(|setting| setting.key).chain(["unknown", "VERCEL_OIDC_TOKEN"]).collect();
    for value in ["\"CANARY\"", "\"/CANARY:\\u0000\"", "[\"CANARY *\"]", "CANARY", "\"CANARY", "{ CANARY = 1 }"] {
        for key in &keys {
            let toml = format!("{key} = {value}");
            for machine in [Machine::new().projects_file(&toml), Machine::new().given_file(&toml)] {
                if let Err(error) = machine.try_load() {
                    assert!(!error.to_string().contains(CANARY), "{toml}: {error}");
                }
            }
        }
    }
    let machine = Machine::new().file("secret.pem", "-----BEGIN CANARY\nCANARY\n");
    let toml = format!("upstream_ca = {:?}", machine.path("secret.pem"));
    assert!(!machine.given_file(&toml).mistakes()[0].contains(CANARY), "the content of another file is not repeated");
    let machine = Machine::new().variable("VERCEL_TOKEN", "CANARY\n1").flags(&["--auth", "access-token"]);
    assert_eq!(machine.mistakes(), ["VERCEL_TOKEN: it holds characters that no token has"]);
}

#[test]
fn plain_http_upstream_is_accepted_for_a_loopback_address_only() {
    for (url, is_accepted) in [
        ("https://api.vercel.com", true),
        ("https://api.vercel.com/", true),
        ("https://connect.internal:8443", true),
        ("http://127.0.0.1:8080", true),
        ("http://127.9.9.9", true),
        ("http://[::1]:8080", true),
        ("http://localhost:8080", false),
        ("http://127.1", false),
        ("http://0.0.0.0:8080", false),
        ("http://127.0.0.1.evil.example", false),
        ("http://evil@127.0.0.1", false),
        ("http://192.168.0.1", false),
        ("http://[::ffff:127.0.0.1]", false),
        ("http://api.vercel.com", false),
        ("ftp://127.0.0.1", false),
        ("127.0.0.1:8080", false),
        ("https://user:secret@api.vercel.com", false),
        ("https://api.vercel.com/v1", false),
        ("https://api.vercel.com?x=1", false),
        ("https://", false),
        ("", false),
    ] {
        let machine = Machine::new().flags(&["--upstream", url]);
        match machine.try_load() {
            Ok(_) => assert!(is_accepted, "{url}"),
            Err(error) => {
                assert!(!is_accepted, "{url}: {error}");
                assert!(error.to_string().starts_with("--upstream: expected "), "{error}");
            }
        }
    }
}

#[test]
fn bearer_hosts_replace_the_default_list_and_their_origins_follow_the_rules_of_upstream() {
    let machine = || Machine::new().given_file("bearer_hosts = [\"given.example\"]");
    let variable = machine().variable("CONNECT_SIDECAR_BEARER_HOST", "AI.example/v1=http://[::1]:8, *.queue.example");
    let flags = machine().flags(&["--bearer-host", "a.example=https://b.example", "--bearer-host", "c.example"]);
    let none = machine().variable("CONNECT_SIDECAR_BEARER_HOST", "");
    for (machine, expected) in [
        (machine(), &[("given.example", None)][..]),
        (variable, &[("ai.example/v1", Some("http://[::1]:8/")), ("*.queue.example", None)]),
        (flags, &[("a.example", Some("https://b.example/")), ("c.example", None)]),
        (none, &[]),
    ] {
        let hosts = machine.load().hosts;
        let hosts: Vec<_> =
            hosts.bearers().iter().map(|host| (host.to_string(), host.origin.as_ref().map(Uri::to_string))).collect();
        let hosts: Vec<_> = hosts.iter().map(|(host, origin)| (host.as_str(), origin.as_deref())).collect();
        assert_eq!(hosts, expected);
    }
    for origin in ["http://localhost:8", "http://a.example", "https://a.example/v1", "https://u@a.example", "a.example"]
    {
        let machine = Machine::new().flags(&["--bearer-host", &format!("ai.example={origin}")]);
        assert!(matches!(&*machine.mistakes(), [one] if one.starts_with("--bearer-host: expected ")), "{origin}");
    }
}

#[test]
fn an_access_token_comes_from_vercel_token_and_needs_no_team() {
    let machine = || Machine::new().flags(&["--auth", "access-token"]);
    for nothing in [machine(), machine().variable("VERCEL_TOKEN", ""), machine().variable("VERCEL_TOKEN", "  ")] {
        assert_eq!(
            nothing.mistakes(),
            ["VERCEL_TOKEN: set it to a Vercel access token, which `auth = access-token` needs"]
        );
    }
    match machine().variable("VERCEL_TOKEN", " vcp_1\n").load().auth {
        Auth::AccessToken(secret) => assert_eq!(secret.expose_secret(), "vcp_1"),
        Auth::Oidc { .. } => panic!("no access token"),
    }
    let oidc = Machine::new().variable("VERCEL_TOKEN", "vcp_1").load();
    assert!(matches!(oidc.auth, Auth::Oidc { .. }), "the token is not used by default");
}

#[test]
fn quiet_and_verbose_override_the_log_level() {
    let level =
        |flags: &[&str]| Machine::new().projects_file("log_level = \"error\"").flags(flags).load().logging.level;
    assert_eq!(level(&[]), tracing::Level::ERROR);
    assert_eq!(level(&["-q"]), tracing::Level::WARN);
    assert_eq!(level(&["-v"]), tracing::Level::DEBUG);
    assert_eq!(level(&["-vv"]), tracing::Level::TRACE);
}

#[test]
fn port_0_selects_no_running_sidecar() {
    let args = |port: &str| GlobalArgs { port: Some(port.into()), ..GlobalArgs::default() };
    let port = |port: &str| selector(&args(port), &|_| None, &Machine::new().path("web")).expect("no mistake").port;
    assert_eq!((port("0"), port("2774")), (None, Some(2774)));
}

#[test]
fn an_unknown_variable_is_reported_with_a_suggestion() {
    let names = ["CONNECT_SIDECAR_PROT", "CONNECT_SIDECAR_PORT", "CONNECT_SIDECAR_KEY", "CONNECT_SIDECAR_ZZZ", "PROT"];
    let named = unknown_variables(names.into_iter().map(OsString::from));
    let expected = [
        "unknown variable CONNECT_SIDECAR_PROT, did you mean CONNECT_SIDECAR_PORT?",
        "unknown variable CONNECT_SIDECAR_ZZZ",
    ];
    assert_eq!(named, expected);
}
