//! `sidecar.toml`. A project's own file comes from its repository and is not trusted.

use std::fs;

use connect_sidecar::config::args::GlobalArgs;
use connect_sidecar::config::{Auth, Config, ConfigError};
use tempfile::TempDir;

/// Part of the values of forbidden settings.
const CANARY: &str = "canary";

thread_local! {
    static DIR: TempDir = {
        // In memory if possible, because three files are written for each input.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
        ["web", "bare"].iter().for_each(|name| fs::create_dir(dir.path().join(name)).expect("a directory"));
        dir
    };
}

pub(crate) fn check(toml: &[u8]) {
    let as_project_file = load(toml, false);
    let as_named = load(toml, true);
    if let Ok(config) = &as_project_file {
        assert_eq!(config.upstream.origin, "https://api.vercel.com");
        assert!(config.upstream.extra_roots.is_empty() && config.upstream.team_id.is_none());
        assert!(!config.upstream.use_env_proxy && !config.policy.allow_forwarded);
        assert!(config.policy.allowed_hosts.is_empty() && config.policy.allowed_origins.is_empty());
        let Auth::Oidc { env_file, .. } = &config.auth else { panic!("the source of the credential was changed") };
        assert!(env_file.starts_with(&config.project) && !env_file.components().any(|part| part.as_os_str() == ".."));
        assert!(config.cache.max_entries.get() <= 1_000_000 && config.warn_before.iter().all(|step| !step.is_zero()));
        assert!(as_named.is_ok(), "a named file may set whatever a project file may: {as_named:?}");
    }
    let lines = toml.split(|b| *b == b'\n').count();
    for error in [&as_project_file, &as_named].into_iter().filter_map(|loaded| loaded.as_ref().err()) {
        assert!(!error.0.is_empty());
        for mistake in &error.0 {
            let numbers = mistake.location.split(':').filter_map(|part| part.parse::<usize>().ok());
            assert!(numbers.into_iter().all(|line| (1..=lines).contains(&line)), "{mistake:?} of {lines}");
            assert!(!mistake.message.contains(char::is_control), "{mistake:?}");
        }
    }

    // A project's own file never redirects the credential or widens access, whatever else it contains.
    let settings = ["upstream", "upstream_ca", "auth", "team_id", "allowed_hosts", "allow_forwarded", "require_key"];
    let forbidden = settings[toml.len() % settings.len()];
    let hostile = [format!("{forbidden} = \"https://{CANARY}.example\"\n").as_bytes(), toml].concat();
    let error = load(&hostile, false).expect_err(forbidden).to_string();
    assert!(!error.contains(CANARY), "the error shows a value: {error}");
}

/// Loads it as a project's own file, or as one named by `--config`.
fn load(toml: &[u8], is_named: bool) -> Result<Config, ConfigError> {
    DIR.with(|dir| {
        let project = dir.path().join(if is_named { "bare" } else { "web" });
        let path = if is_named { dir.path().join("given.toml") } else { project.join("sidecar.toml") };
        fs::write(&path, toml).expect("written");
        let args =
            GlobalArgs { config: is_named.then_some(path), project: Some(project.clone()), ..GlobalArgs::default() };
        Config::load(&args, &|_| None, &project)
    })
}
