//! `emulate`: runs the emulator with a seed or a state file, and prints commands for its first use.
//!
//! The output contains no secrets except those of the seed, which are fake.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tempfile::TempDir;

use super::CommandError;
use super::args::EmulateArgs;
use super::flags::environment;
use super::output::print_ready;
use super::signals::{StopSignals, until_stopped};
use crate::config::args::GlobalArgs;
use crate::config::{self, ConfigError, ConfigMistake, EnvLookup};
use crate::emulator::allowlist::{Allowlist, is_issuer, is_variable};
pub use crate::emulator::seed::EXAMPLE as EXAMPLE_SEED;
use crate::emulator::seed::{self, SeedError};
use crate::emulator::world::World;
use crate::emulator::{Emulator, Options};
use crate::proxy::upstream::EMULATOR_PORT;

/// How many requests the emulator remembers.
const MAX_REMEMBERED: usize = 1000;

/// Why the emulator could not start.
#[derive(Debug, thiserror::Error)]
pub enum EmulateError {
    /// Unused or invalid flags, and mistakes in the seed, one a line. Exit code 2.
    #[error("{}", .0.join("\n"))]
    Mistakes(Vec<String>),
    /// The seed or state file could not be read. Exit code 2.
    #[error("could not read {path}: {1}", path = .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The port is taken. Exit code 3.
    #[error("could not listen on 127.0.0.1:{0}: the port is taken; end what has it, or choose another with --port")]
    PortTaken(u16),
    /// Any other failure.
    #[error("could not {0}: {1}")]
    Setup(&'static str, #[source] io::Error),
}

impl EmulateError {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Mistakes(_) | Self::File(..) => 2,
            Self::PortTaken(_) => 3,
            Self::Setup(..) => 1,
        }
    }
}

/// Runs the emulator until a signal arrives.
pub(super) async fn emulate(args: &EmulateArgs, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    if args.example_seed {
        let _ = io::stdout().write_all(EXAMPLE_SEED.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    let stops = StopSignals::listen(None)?;
    let emulation = Emulation::start(args, global, &environment).await?;
    if !global.quiet {
        let _ = io::stderr().write_all(emulation.first_use().as_bytes());
    }
    print_ready("connect-sidecar emulator", &emulation.url());
    Ok(until_stopped(stops, |stop| async {
        stop.await;
        true
    })
    .await)
}

/// A running emulator. Its temporary files are removed when this is dropped.
pub struct Emulation {
    emulator: Emulator,
    /// With TLS, a temporary directory and in it the certificate of the CA.
    ca: Option<(TempDir, PathBuf)>,
    /// Where its state comes from, as shown to people.
    source: String,
}

impl Emulation {
    /// Reads the seed and starts the emulator. Reads only the environment variables that flags allow.
    pub async fn start(
        args: &EmulateArgs,
        global: &GlobalArgs,
        environment: EnvLookup<'_>,
    ) -> Result<Self, EmulateError> {
        let why = "the emulator reads no configuration, only its seed";
        let mut mistakes = Vec::new();
        let port = config::port_only(global, &[], why).unwrap_or_else(|ConfigError(found)| {
            mistakes.extend(found.iter().map(|ConfigMistake { location, message }| format!("{location}: {message}")));
            None
        });
        let port = port.unwrap_or(EMULATOR_PORT);
        let allowlist = allowlist(args, environment, &mut mistakes);
        let saved = args.state.as_ref().filter(|state| state.exists());
        let (mut world, source) = match (saved, &args.seed) {
            (Some(state), _) => (World::demo(), format!("as it was kept in {}", state.display())),
            (None, Some(path)) => {
                let world = read_seed(path, &allowlist, &mut mistakes)?;
                (world, format!("as seeded by {}", path.display()))
            }
            (None, None) => (World::demo(), "as in the demo".into()),
        };
        if !mistakes.is_empty() {
            return Err(EmulateError::Mistakes(mistakes));
        }
        world.limits.get_or_insert_default();
        let (tls, state) = (args.tls, args.state.clone());
        let options = Options { port, tls, world, allowlist, state, remember: MAX_REMEMBERED, ..Options::default() };
        let emulator = Emulator::start(options).await.map_err(|e| match (e.kind(), &args.state) {
            (ErrorKind::AddrInUse, _) => EmulateError::PortTaken(port),
            (ErrorKind::InvalidData, Some(state)) => EmulateError::File(state.clone(), e),
            _ => EmulateError::Setup("start the emulator", e),
        })?;
        let ca = emulator.ca_pem().map(private_file).transpose();
        let ca = ca.map_err(|e| EmulateError::Setup("write the certificate of its CA", e))?;
        Ok(Self { emulator, ca, source })
    }

    /// The emulator's URL.
    pub fn url(&self) -> String {
        self.emulator.url()
    }

    /// Commands for its first use.
    pub fn first_use(&self) -> String {
        let (url, ca) = (self.url(), self.ca.as_ref().map(|(_, path)| path.display().to_string()));
        let with_ca = |text: &str| ca.as_ref().map_or(String::new(), |path| text.replace("{}", path));
        let (team, project, session) = self.emulator.read(|world| {
            let project = world.projects.first().map(|project| (project.id.clone(), project.name.clone()));
            (world.team.clone(), project, world.sessions.first().map(|session| session.token.clone()))
        });
        let mut text = format!("A stand-in for Vercel Connect, {}: team {}.\n", self.source, team.slug);
        let mut line = |label: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {label:<22} {value}");
        };
        if let Some(path) = &ca {
            line("its CA", path.clone());
        }
        if let Some(token) = session {
            let trust = with_ca("NODE_EXTRA_CA_CERTS={} ");
            line("the Vercel CLI", format!("{trust}vercel --api {url} --token {token} connect list"));
        }
        if let Some((id, _)) = project {
            line(".vercel/project.json", format!(r#"{{"projectId":"{id}","orgId":"{}"}}"#, team.id));
            let trust = with_ca(" --cacert {}");
            line("an env file", format!("(umask 077; curl -sS{trust} '{url}/_emulator/env.local' -o .env.local)"));
        }
        line("the sidecar", format!("connect-sidecar --upstream {url}{}", with_ca(" --upstream-ca {}")));
        text
    }
}

fn read_seed(path: &Path, allowlist: &Allowlist, mistakes: &mut Vec<String>) -> Result<World, EmulateError> {
    let text = std::fs::read_to_string(path).map_err(|e| EmulateError::File(path.to_owned(), e))?;
    Ok(seed::read_with(&text, allowlist).unwrap_or_else(|SeedError(found)| {
        mistakes.extend(found.iter().map(|found| format!("{}:{}: {}", path.display(), found.line, found.message)));
        World::demo()
    }))
}

/// The environment variables and issuers that flags allow the seed to use.
fn allowlist(args: &EmulateArgs, environment: EnvLookup<'_>, mistakes: &mut Vec<String>) -> Allowlist {
    let mut secrets = BTreeMap::new();
    for name in &args.secret_from_env {
        let value = Some(name).filter(|name| is_variable(name)).and_then(|name| environment(name)?.into_string().ok());
        if value.is_none() {
            mistakes.push(format!("--secret-from-env {name}: there is no such variable in the environment"));
        }
        // Added even if missing, so that the seed's use of it is not reported as a second mistake.
        secrets.insert(name.clone(), value.unwrap_or_default().into());
    }
    for url in args.allow_issuer.iter().filter(|url| !is_issuer(url)) {
        mistakes.push(format!("--allow-issuer {url}: expected an https URL, or one of this machine"));
    }
    Allowlist::new(secrets, args.allow_issuer.clone())
}

fn private_file(pem: &str) -> io::Result<(TempDir, PathBuf)> {
    let dir = tempfile::Builder::new()
        .prefix("connect-sidecar-emulator-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()?;
    let path = dir.path().join("ca.pem");
    std::fs::write(&path, pem)?;
    Ok((dir, path))
}
