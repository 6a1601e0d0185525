//! `service`: a sidecar for one project that runs from login on, under systemd or launchd.
//!
//! What is written is a file of the manager's that runs this very program with the settings that were given. It never
//! holds a secret, takes the place of no file that is not ours, and is not left behind where the manager will not have it.

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

use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::config::{self, Auth, Config, ConfigError, Mistake, PortableSettings};
use crate::instance::Selector;
use crate::instance::client::{self, NotFound};
use crate::os::atomic_file::{self, Durability};
use crate::os::executable;
use crate::os::terminal::escaped;
use crate::os::tls;
use launchd::Launchd;
use manager::{MARK, Manager, Service, State};
use systemd::Systemd;

/// Besides our own, the variables that a sidecar goes by, none of which holds a secret: where its files and those of the
/// Vercel CLI are, whom to trust. A manager starts it with few of them.
const VARIABLES: [&str; 7] = [
    "PATH",
    "XDG_CONFIG_HOME",
    "XDG_STATE_HOME",
    "XDG_DATA_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NODE_EXTRA_CA_CERTS",
];

/// Those of them that name a file of certificates.
const CERTIFICATES: [&str; 2] = ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"];

/// Why a file of certificates is of no use to a service: inside a `run`, the variables name that run's own, which go with
/// it and hold what only its command is to trust.
fn unfit_for_later(file: &Path) -> Option<&'static str> {
    if tls::holds_local_ca(file) {
        Some("belongs to a `connect-sidecar run`; set it to yours, or install the service outside of that")
    } else {
        (!file.exists()).then_some("is not there")
    }
}

/// Writes the service of the project, or what it has become, and starts it anew.
pub async fn install(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let current_dir = current_dir()?;
    // Whether there is an access token now says nothing about later.
    let environment = |name: &str| if name == "VERCEL_TOKEN" { Some("none".into()) } else { std::env::var_os(name) };
    let config = Config::load(global, &environment, &current_dir)?;
    let refused = |message: &str| {
        let mistake = Mistake { place: "service install".into(), message: message.into() };
        CommandError::from(ConfigError(vec![mistake]))
    };
    if let Auth::AccessToken(_) = config.auth {
        return Err(refused(
            "`auth = access-token` needs VERCEL_TOKEN, which would have to stand in a file for a service: use the OIDC \
             token of the env file, or run `connect-sidecar` where the variable is set",
        ));
    }
    let executable = std::env::current_exe().map_err(|e| CommandError::System("find this program's path", e))?;
    let carried = config::portable_settings(global, &environment, &current_dir)?;
    let left_out = CERTIFICATES.into_iter().filter_map(|name| {
        let file = PathBuf::from(environment(name)?);
        Some((name, format!("{name} is not written into the service: {} {}", file.display(), unfit_for_later(&file)?)))
    });
    let left_out: BTreeMap<_, _> = left_out.collect();
    let environment = |name: &str| environment(name).filter(|_| !left_out.contains_key(name));
    let service = describe(&config.project, &executable, carried, &environment).map_err(|what| {
        refused(&format!("{what} has a control character or is not UTF-8, so no service can be told of it"))
    })?;
    left_out.values().for_each(|text| note(text));
    match Native::find(&config.project)? {
        Native::Systemd(manager) => put(&manager, &service, &config).await?,
        Native::Launchd(manager) => put(&manager, &service, &config).await?,
    }
    if executable.ancestors().any(|dir| dir.join("CACHEDIR.TAG").exists()) {
        note(&format!(
            "the service runs {}, which the next build replaces: better `cargo install` it first",
            executable.display()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Says whether the project's service is there and runs.
pub async fn status(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let wanted = config::wanted(global, &|name| std::env::var_os(name), &current_dir()?)?;
    match Native::find(&wanted.directory)? {
        Native::Systemd(manager) => show(&manager, &wanted).await,
        Native::Launchd(manager) => show(&manager, &wanted).await,
    }
}

/// Stops the project's service and deletes it; fine where there is none.
pub async fn uninstall(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let wanted = config::wanted(global, &|name| std::env::var_os(name), &current_dir()?)?;
    match Native::find(&wanted.directory)? {
        Native::Systemd(manager) => remove(&manager, &wanted.directory).await,
        Native::Launchd(manager) => remove(&manager, &wanted.directory).await,
    }
}

/// The manager of this system.
enum Native {
    Systemd(Systemd),
    Launchd(Launchd),
}

impl Native {
    fn find(project: &Path) -> Result<Self, CommandError> {
        let environment = |name: &str| std::env::var_os(name);
        let program = |name| executable::find(name, &environment("PATH")?, project)?.checked.ok();
        let home = || CommandError::Other("neither HOME nor XDG_CONFIG_HOME says where a service could be put".into());
        if cfg!(target_os = "macos") {
            let home = environment("HOME").map(PathBuf::from).filter(|home| home.is_absolute()).ok_or_else(home)?;
            Ok(Self::Launchd(Launchd::new(program("launchctl"), &home, nix::unistd::Uid::effective().as_raw())))
        } else {
            let config_home = config::config_home(&environment).ok_or_else(home)?;
            Ok(Self::Systemd(Systemd::new(program("systemctl"), &config_home)))
        }
    }
}

/// The project's service: this program with these settings. An error is what cannot be written down.
fn describe(
    project: &Path,
    executable: &Path,
    carried: PortableSettings,
    environment: config::Environment<'_>,
) -> Result<Service, String> {
    let text = |what: &str, text: OsString| match text.into_string() {
        Ok(text) if !text.contains(char::is_control) => Ok(text),
        _ => Err(what.to_owned()),
    };
    let shown = text("the project's path", project.into())?;
    let mut command =
        vec![text("this program's path", executable.into())?, "serve".into(), format!("--project={shown}")];
    for flag in carried.flags {
        command.push(text(flag.split('=').next().unwrap_or_default(), flag.clone().into())?);
    }
    let given = VARIABLES.into_iter().filter_map(|name| Some((name.to_owned(), environment(name)?)));
    let ours = carried.variables.into_iter().map(|(name, value)| (name, value.into()));
    let checked = given.chain(ours).map(|(name, value)| text(&name, value).map(|value| (name, value)));
    let environment = checked.collect::<Result<_, _>>()?;
    Ok(Service { name: name_of(project), project: shown, command, environment })
}

/// One name for each project, by which it is known again.
fn name_of(project: &Path) -> String {
    let hash = digest::digest(&digest::SHA256, project.as_os_str().as_bytes());
    let hash: String = hash.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let dir = project.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let words: String = dir.chars().map(plain).take(40).collect();
    let words: Vec<_> = words.split('-').filter(|word| !word.is_empty()).chain([hash.as_str()]).collect();
    format!("connect-sidecar-{}", words.join("-"))
}

async fn put(manager: &impl Manager, service: &Service, config: &Config) -> Result<(), CommandError> {
    let Service { name, project, .. } = service;
    let file = manager.file(name);
    let before = read_own(&file)?;
    manager.reach().await?;
    write(&file, &manager.definition(service))?;
    if let Err(e) = manager.load(name).await {
        match before {
            Some(before) => write(&file, &before)?,
            None => fs::remove_file(&file).map_err(|e| CommandError::System("delete it again", e))?,
        }
        manager.forget(name).await;
        return Err(e);
    }
    if let Err(e) = manager.start(name).await {
        let state = manager.state(name).await?;
        let why = match state.exit_code {
            Some(2) => "its settings are wrong".to_owned(),
            Some(3) => "its port is taken: end what has it, or give the service another with --port".to_owned(),
            _ => e.to_string(),
        };
        return Err(CommandError::Other(format!(
            "{name} is installed, but does not run: {why}\nits log: {}\nthen `connect-sidecar service install` again, or \
             `connect-sidecar service uninstall`",
            manager.log_command(name)
        )));
    }
    let at = if config.port == 0 { String::new() } else { format!(" at http://127.0.0.1:{}", config.port) };
    say(&[
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

async fn show(manager: &impl Manager, wanted: &Selector) -> Result<ExitCode, CommandError> {
    let Some((project, name)) = installed(manager, &wanted.directory)? else {
        say(&[format!(
            "no service is installed for {}: `connect-sidecar service install` does that",
            wanted.directory.display()
        )]);
        return Ok(ExitCode::FAILURE);
    };
    let file = manager.file(&name);
    manager.reach().await?;
    let State { at_login, activity, is_running, pid, .. } = manager.state(&name).await?;
    let mut lines = vec![
        format!("{name} for {}", project.display()),
        format!("  file      {}", file.display()),
        format!("  at login  {}", if at_login { "starts" } else { "does not start" }),
        format!("  now       {activity}"),
    ];
    // Whatever port the user may have set: it is the service's that counts, and no other sidecar of the project.
    let at_any_port = Selector { port: None, directory: project.to_owned(), ..wanted.clone() };
    lines.extend(match client::find(&at_any_port).await {
        Ok((instance, _)) if Some(instance.pid) == pid => Some(format!("  address   {}", instance.url)),
        Err(NotFound::Unresponsive(silent)) if Some(silent.pid) == pid => Some(format!("  answers   no: {silent}")),
        _ => None,
    });
    lines.push(format!("  log       {}", manager.log_command(&name)));
    say(&lines);
    Ok(if is_running { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The project of the directory or of the nearest above it for which a service is installed, and its name.
fn installed<'d>(manager: &impl Manager, directory: &'d Path) -> Result<Option<(&'d Path, String)>, CommandError> {
    for project in directory.ancestors() {
        let name = name_of(project);
        if read_own(&manager.file(&name))?.is_some() {
            return Ok(Some((project, name)));
        }
    }
    Ok(None)
}

async fn remove(manager: &impl Manager, directory: &Path) -> Result<ExitCode, CommandError> {
    let Some((_, name)) = installed(manager, directory)? else {
        say(&[format!("no service is installed for {}", directory.display())]);
        return Ok(ExitCode::SUCCESS);
    };
    let file = manager.file(&name);
    manager.reach().await?;
    manager.unload(&name).await?;
    fs::remove_file(&file).map_err(|e| CommandError::System("delete the service's file", e))?;
    manager.forget(&name).await;
    say(&[format!("removed {name}")]);
    Ok(ExitCode::SUCCESS)
}

/// The file of ours, if there is one; whatever else is in its place is an error.
fn read_own(path: &Path) -> Result<Option<String>, CommandError> {
    let foreign = || {
        let path = path.display();
        CommandError::Other(format!("{path} was not written by this program: move it away first, if it is not needed"))
    };
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

fn current_dir() -> Result<PathBuf, CommandError> {
    std::env::current_dir().map_err(|e| CommandError::System("find the current directory", e))
}

/// A closed stdout is no reason to fail.
fn say(lines: &[String]) {
    let lines: String = lines.iter().map(|line| escaped(line) + "\n").collect();
    let _ = io::stdout().write_all(lines.as_bytes());
}

fn note(text: &str) {
    let _ = writeln!(io::stderr(), "note: {}", escaped(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(project: &str, flags: &[&str]) -> Result<Service, String> {
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        describe(project.as_ref(), "/bin/x".as_ref(), PortableSettings { flags, variables: Vec::new() }, &|_| None)
    }

    #[test]
    fn a_name_tells_the_project_and_is_its_alone() {
        for (project, begins) in [
            ("/home/me/Web Shop", "connect-sidecar-web-shop-"),
            ("/home/me/%h$x\"é", "connect-sidecar-h-x-"),
            ("/home/me/日本", "connect-sidecar-"),
            ("/", "connect-sidecar-"),
        ] {
            let name = name_of(Path::new(project));
            let hash = name.strip_prefix(begins).expect(&name);
            assert!(hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
        }
        assert_ne!(name_of(Path::new("/a/web")), name_of(Path::new("/b/web")));
        assert!(name_of(Path::new(&format!("/{}", "x".repeat(255)))).len() < 80);
    }

    #[test]
    fn what_cannot_be_written_down_is_refused_by_its_name() {
        use std::os::unix::ffi::OsStringExt;
        assert_eq!(service("/a\nb", &[]).err().as_deref(), Some("the project's path"));
        assert_eq!(service("/a", &["--config=/b\n--require-key"]).err().as_deref(), Some("--config"));
        let bad = |name: &str| (name == "PATH").then(|| OsString::from_vec(b"/\xff".to_vec()));
        let refused = describe("/a".as_ref(), "/bin/x".as_ref(), PortableSettings::default(), &bad);
        assert_eq!(refused.err().as_deref(), Some("PATH"));
    }
}
