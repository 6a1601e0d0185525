//! `service`: a sidecar for one project that systemd or launchd starts at login.
//!
//! `install` writes a service definition that runs this program with the current settings. It contains no secret,
//! replaces no file that another program wrote, and is removed again if the manager refuses it.

mod error;
mod launchd;
mod manager;
pub mod readiness;
mod systemd;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aws_lc_rs::digest;

use crate::cli::{CommandError, current_dir};
use crate::config::args::GlobalArgs;
use crate::config::{self, Auth, Config, ConfigError, PortableSettings};
use crate::instance::Selector;
use crate::instance::client::{self, NotFound};
use crate::os::atomic_file::{self, Durability};
use crate::os::executable;
use crate::os::terminal::{escaped, note};
use crate::os::tls;
pub use error::ServiceError;
use launchd::Launchd;
use manager::{MARK, Manager, Service, ServiceState};
use systemd::Systemd;

/// The variables besides the sidecar's own that it needs and that a manager may not set: paths of its files and of the
/// Vercel CLI's, and certificates. None holds a secret.
const VARIABLES: [&str; 7] = [
    "PATH",
    "XDG_CONFIG_HOME",
    "XDG_STATE_HOME",
    "XDG_DATA_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NODE_EXTRA_CA_CERTS",
];

/// Those that name a file with certificates.
const CERTIFICATES: [&str; 2] = ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"];

/// Why a certificate file cannot be used by a service, if so. Inside a `run` the variables name the run's own files,
/// which are temporary and contain a CA that only the run's command should trust.
fn unusable_certificates(file: &Path) -> Option<&'static str> {
    if tls::holds_local_ca(file) {
        Some("belongs to a `connect-sidecar run`; set it to yours, or install the service outside of that")
    } else {
        (!file.exists()).then_some("is not there")
    }
}

/// Writes or rewrites the project's service and starts it.
pub async fn install(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let current_dir = current_dir()?;
    // The access token need not be set now.
    let environment = |name: &str| if name == "VERCEL_TOKEN" { Some("none".into()) } else { std::env::var_os(name) };
    let config = Config::load(global, &environment, &current_dir)?;
    let refused = |message: String| ConfigError::new("service install", message);
    if let Auth::AccessToken(_) = config.auth {
        return Err(refused(
            "`auth = access-token` needs VERCEL_TOKEN, which would have to stand in a file for a service: use the OIDC \
             token of the env file, or run `connect-sidecar` where the variable is set"
                .into(),
        )
        .into());
    }
    let executable = std::env::current_exe().map_err(|e| CommandError::System("find this program's path", e))?;
    let portable = config::portable_settings(global, &environment, &current_dir)?;
    let omitted = CERTIFICATES.into_iter().filter_map(|name| {
        let file = PathBuf::from(environment(name)?);
        Some((
            name,
            format!("{name} is not written into the service: {} {}", file.display(), unusable_certificates(&file)?),
        ))
    });
    let omitted: BTreeMap<_, _> = omitted.collect();
    let environment = |name: &str| environment(name).filter(|_| !omitted.contains_key(name));
    let service =
        definition(&config.project, &executable, portable, &environment).map_err(|e| refused(e.to_string()))?;
    omitted.values().for_each(|text| note(text));
    match NativeManager::find(&config.project)? {
        NativeManager::Systemd(manager) => install_with(&manager, &service, &config).await?,
        NativeManager::Launchd(manager) => install_with(&manager, &service, &config).await?,
    }
    if executable.ancestors().any(|dir| dir.join("CACHEDIR.TAG").exists()) {
        note(&format!(
            "the service runs {}, which the next build replaces: better `cargo install` it first",
            executable.display()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the state of the project's service. Exit code 1 if it does not run.
pub async fn status(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let selector = config::selector(global, &|name| std::env::var_os(name), &current_dir()?)?;
    match NativeManager::find(&selector.directory)? {
        NativeManager::Systemd(manager) => print_status(&manager, &selector).await,
        NativeManager::Launchd(manager) => print_status(&manager, &selector).await,
    }
}

/// Stops and deletes the project's service, if there is one.
pub async fn uninstall(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let selector = config::selector(global, &|name| std::env::var_os(name), &current_dir()?)?;
    match NativeManager::find(&selector.directory)? {
        NativeManager::Systemd(manager) => remove(&manager, &selector.directory).await,
        NativeManager::Launchd(manager) => remove(&manager, &selector.directory).await,
    }
}

/// The service manager of this system.
enum NativeManager {
    Systemd(Systemd),
    Launchd(Launchd),
}

impl NativeManager {
    fn find(project: &Path) -> Result<Self, ServiceError> {
        let environment = |name: &str| std::env::var_os(name);
        let program = |name| executable::find(name, &environment("PATH")?, project)?.checked.ok();
        if cfg!(target_os = "macos") {
            let home = environment("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
            let home = home.ok_or(ServiceError::NoDirectory)?;
            Ok(Self::Launchd(Launchd::new(program("launchctl"), &home, nix::unistd::Uid::effective().as_raw())))
        } else {
            let config_home = config::config_home(&environment).ok_or(ServiceError::NoDirectory)?;
            Ok(Self::Systemd(Systemd::new(program("systemctl"), &config_home)))
        }
    }
}

/// A value that cannot be part of a service definition. Holds what it is, such as a variable's name.
#[derive(Debug, thiserror::Error)]
#[error("{0} has a control character or is not UTF-8, so no service can be told of it")]
struct UnsupportedValue(String);

/// The project's service: this program with these settings.
fn definition(
    project: &Path,
    executable: &Path,
    settings: PortableSettings,
    environment: config::EnvLookup<'_>,
) -> Result<Service, UnsupportedValue> {
    let text = |what: &str, text: OsString| match text.into_string() {
        Ok(text) if !text.contains(char::is_control) => Ok(text),
        _ => Err(UnsupportedValue(what.to_owned())),
    };
    let shown = text("the project's path", project.into())?;
    let mut command =
        vec![text("this program's path", executable.into())?, "serve".into(), format!("--project={shown}")];
    for flag in settings.flags {
        command.push(text(flag.split('=').next().unwrap_or_default(), flag.clone().into())?);
    }
    let general = VARIABLES.into_iter().filter_map(|name| Some((name.to_owned(), environment(name)?)));
    let own = settings.variables.into_iter().map(|(name, value)| (name, value.into()));
    let checked = general.chain(own).map(|(name, value)| text(&name, value).map(|value| (name, value)));
    let environment = checked.collect::<Result<_, _>>()?;
    Ok(Service { name: service_name(project), project: shown, command, environment })
}

/// The service name of a project, unique by a hash of its path.
fn service_name(project: &Path) -> String {
    let hash = digest::digest(&digest::SHA256, project.as_os_str().as_bytes());
    let hash: String = hash.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let dir = project.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let words: String = dir.chars().map(plain).take(40).collect();
    let words: Vec<_> = words.split('-').filter(|word| !word.is_empty()).chain([hash.as_str()]).collect();
    format!("connect-sidecar-{}", words.join("-"))
}

async fn install_with(manager: &impl Manager, service: &Service, config: &Config) -> Result<(), CommandError> {
    let Service { name, project, .. } = service;
    let file = manager.file(name);
    let previous = read_own(&file)?;
    manager.check_available().await?;
    write(&file, &manager.definition(service))?;
    if let Err(e) = manager.load(name).await {
        match previous {
            Some(previous) => write(&file, &previous)?,
            None => fs::remove_file(&file).map_err(|e| CommandError::System("delete it again", e))?,
        }
        manager.discard(name).await;
        return Err(e.into());
    }
    if let Err(e) = manager.restart(name).await {
        let state = manager.state(name).await?;
        let reason = match state.exit_code {
            Some(2) => "its settings are wrong".to_owned(),
            Some(3) => "its port is taken: end what has it, or give the service another with --port".to_owned(),
            _ => e.to_string(),
        };
        let log_command = manager.log_command(name);
        return Err(ServiceError::NotStarted { name: name.clone(), reason, log_command }.into());
    }
    let at = if config.port == 0 { String::new() } else { format!(" at http://127.0.0.1:{}", config.port) };
    print_lines(&[
        format!("{name} runs{at}, now and from each login on, for {project}"),
        format!("  file  {}", file.display()),
        format!("  log   {}", manager.log_command(name)),
    ]);
    if config.upstream.use_env_proxy {
        note(&format!(
            "HTTPS_PROXY is not written into the service, as it may hold a password: set it by {}",
            manager.variable_command("HTTPS_PROXY")
        ));
    }
    Ok(())
}

async fn print_status(manager: &impl Manager, selector: &Selector) -> Result<ExitCode, CommandError> {
    let Some((project, name)) = installed(manager, &selector.directory)? else {
        print_lines(&[format!(
            "no service is installed for {}: `connect-sidecar service install` does that",
            selector.directory.display()
        )]);
        return Ok(ExitCode::FAILURE);
    };
    let file = manager.file(&name);
    manager.check_available().await?;
    let ServiceState { at_login, activity, is_running, pid, .. } = manager.state(&name).await?;
    let mut lines = vec![
        format!("{name} for {}", project.display()),
        format!("  file      {}", file.display()),
        format!("  at login  {}", if at_login { "starts" } else { "does not start" }),
        format!("  now       {activity}"),
    ];
    // Searched by project, since the port set for this command may not be the service's; then compared by process.
    let at_any_port = Selector { port: None, directory: project.to_owned(), ..selector.clone() };
    lines.extend(match client::find(&at_any_port).await {
        Ok((instance, _)) if Some(instance.pid) == pid => Some(format!("  address   {}", instance.url)),
        Err(NotFound::Unresponsive(error)) if Some(error.pid) == pid => Some(format!("  answers   no: {error}")),
        _ => None,
    });
    lines.push(format!("  log       {}", manager.log_command(&name)));
    print_lines(&lines);
    Ok(if is_running { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The nearest directory, at or above `directory`, that has a service, and the service's name.
fn installed<'d>(manager: &impl Manager, directory: &'d Path) -> Result<Option<(&'d Path, String)>, CommandError> {
    for project in directory.ancestors() {
        let name = service_name(project);
        if read_own(&manager.file(&name))?.is_some() {
            return Ok(Some((project, name)));
        }
    }
    Ok(None)
}

async fn remove(manager: &impl Manager, directory: &Path) -> Result<ExitCode, CommandError> {
    let Some((_, name)) = installed(manager, directory)? else {
        print_lines(&[format!("no service is installed for {}", directory.display())]);
        return Ok(ExitCode::SUCCESS);
    };
    let file = manager.file(&name);
    manager.check_available().await?;
    manager.unload(&name).await?;
    fs::remove_file(&file).map_err(|e| CommandError::System("delete the service's file", e))?;
    manager.discard(&name).await;
    print_lines(&[format!("removed {name}")]);
    Ok(ExitCode::SUCCESS)
}

/// Reads a service definition, if it exists. Fails if this program did not write it.
fn read_own(path: &Path) -> Result<Option<String>, CommandError> {
    let foreign = || CommandError::from(ServiceError::ForeignFile(path.to_owned()));
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Ok(meta) if !meta.is_file() => return Err(foreign()),
        _ => {}
    }
    let bytes = fs::read(path).map_err(|e| CommandError::System("read the service's file", e))?;
    let text = String::from_utf8(bytes).map_err(|_| foreign())?;
    if text.contains(MARK) { Ok(Some(text)) } else { Err(foreign()) }
}

/// Writes it whole or not at all.
fn write(path: &Path, text: &str) -> Result<(), CommandError> {
    let write = || {
        let dir = path.parent().unwrap_or(path);
        fs::create_dir_all(dir)?;
        atomic_file::write(path, text.as_bytes(), 0o644, Durability::Process)
    };
    write().map_err(|e: io::Error| CommandError::System("write the service's file", e))
}

/// Prints lines to stdout. Ignores a closed stdout.
fn print_lines(lines: &[String]) {
    let lines: String = lines.iter().map(|line| escaped(line) + "\n").collect();
    let _ = io::stdout().write_all(lines.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(project: &str, flags: &[&str]) -> Result<Service, UnsupportedValue> {
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        definition(project.as_ref(), "/bin/x".as_ref(), PortableSettings { flags, variables: Vec::new() }, &|_| None)
    }

    #[test]
    fn a_service_name_is_readable_and_unique() {
        for (project, begins) in [
            ("/home/me/Web Shop", "connect-sidecar-web-shop-"),
            ("/home/me/%h$x\"é", "connect-sidecar-h-x-"),
            ("/home/me/日本", "connect-sidecar-"),
            ("/", "connect-sidecar-"),
        ] {
            let name = service_name(Path::new(project));
            let hash = name.strip_prefix(begins).expect(&name);
            assert!(hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
        }
        assert_ne!(service_name(Path::new("/a/web")), service_name(Path::new("/b/web")));
        assert!(service_name(Path::new(&format!("/{}", "x".repeat(255)))).len() < 80);
    }

    #[test]
    fn an_unsupported_value_is_refused_by_name() {
        use std::os::unix::ffi::OsStringExt;
        let refused = |result: Result<Service, UnsupportedValue>| result.err().map(|UnsupportedValue(what)| what);
        assert_eq!(refused(service("/a\nb", &[])).as_deref(), Some("the project's path"));
        assert_eq!(refused(service("/a", &["--config=/b\n--require-key"])).as_deref(), Some("--config"));
        let bad = |name: &str| (name == "PATH").then(|| OsString::from_vec(b"/\xff".to_vec()));
        let with_bad_path = definition("/a".as_ref(), "/bin/x".as_ref(), PortableSettings::default(), &bad);
        assert_eq!(refused(with_bad_path).as_deref(), Some("PATH"));
    }
}
