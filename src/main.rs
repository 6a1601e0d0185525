//! The command: parses, starts the log, runs, and maps an error to stderr and an exit code.

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use connect_sidecar::app::{App, StartupError};
use connect_sidecar::cli::{CaCommand, CacheCommand, Cli, Command, EmulateArgs, Format, GlobalArgs, ServiceCommand};
use connect_sidecar::client::Unanswered;
use connect_sidecar::clock::Clock;
use connect_sidecar::commands::{self, CommandError};
use connect_sidecar::config::{self, Config, ConfigError};
use connect_sidecar::demo::{Demo, DemoError};
use connect_sidecar::emulate::{self, EmulateError, Emulation};
use connect_sidecar::hardening::Inherited;
use connect_sidecar::identity::{Reloader, State};
use connect_sidecar::intercept::ca;
use connect_sidecar::run::{self, RunError, shell};
use connect_sidecar::server::unix_socket::Problem;
use connect_sidecar::service::{self, readiness};
use connect_sidecar::terminal::escaped;
use connect_sidecar::{doctor, hardening, logging};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const FAILED: u8 = 1;
const BAD_CONFIGURATION: u8 = 2;
const PORT_TAKEN: u8 = 3;

/// What ends the process with another code than 0.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Startup(#[from] StartupError),
    #[error(transparent)]
    Demo(#[from] DemoError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Emulate(#[from] EmulateError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("could not {0}: {1}")]
    System(&'static str, io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Demo(DemoError::Config(_)) | Self::Command(CommandError::Config(_)) => {
                BAD_CONFIGURATION
            }
            Self::Emulate(EmulateError::Mistakes(_) | EmulateError::File(..)) => BAD_CONFIGURATION,
            Self::Emulate(EmulateError::PortTaken(_)) => PORT_TAKEN,
            Self::Startup(error) | Self::Run(RunError::Startup(error)) => exit_code(error),
            Self::Run(RunError::Command(error)) => error.exit_code(),
            Self::Run(RunError::Differs(_)) | Self::Command(CommandError::Differs(_)) => BAD_CONFIGURATION,
            // A local CA that is not safe to use.
            Self::Run(RunError::Unanswered(Unanswered::NoInterception(_))) => BAD_CONFIGURATION,
            Self::Run(_)
            | Self::Command(_)
            | Self::Demo(DemoError::Setup(..))
            | Self::Emulate(EmulateError::Setup(..))
            | Self::System(..) => FAILED,
        }
    }
}

fn exit_code(error: &StartupError) -> u8 {
    match error {
        StartupError::PortTaken { .. } | StartupError::UnixSocket(_, Problem::InUse) => PORT_TAKEN,
        StartupError::UnixSocket(_, Problem::Unfit(_)) => BAD_CONFIGURATION,
        // An address of another machine.
        StartupError::Listen(_, e) if e.kind() == io::ErrorKind::AddrNotAvailable => BAD_CONFIGURATION,
        _ => FAILED,
    }
}

fn main() -> ExitCode {
    let limits = hardening::apply();
    let cli = Cli::parse();
    match run(&cli, limits) {
        Ok(code) => code,
        Err(failure) => {
            for line in failure.to_string().lines() {
                let _ = writeln!(io::stderr(), "error: {}", escaped(line));
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: &Cli, limits: Inherited) -> Result<ExitCode, Failure> {
    let mut runtime = match cli.command.as_ref().is_none_or(Command::serves) {
        true => tokio::runtime::Builder::new_multi_thread(),
        // What asks one thing is done before threads would have started.
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = runtime
        // One core in two at the most: the rest is for the apps, and waking another core costs more than it saves.
        .worker_threads((cores / 2).clamp(1, 4))
        .enable_all()
        .build()
        .map_err(|e| Failure::System("start the runtime", e))?;
    let code = runtime.block_on(async {
        let global = &config::flags_of(cli)?;
        match cli.command.as_ref() {
            None | Some(Command::Serve(_)) => serve(global).await,
            Some(Command::Demo { once }) => demo(global, *once).await,
            Some(Command::Run { no_intercept, expose_token, command, .. }) => {
                let options = run::Options {
                    intercept: !no_intercept,
                    expose_token: *expose_token,
                    tells_problems: !global.quiet,
                };
                run_command(global, options, command, limits).await
            }
            Some(Command::Env { format, no_intercept }) => print_env(global, *format, !no_intercept).await,
            Some(Command::Token(args)) => commands::token::print(args, global).await.map_err(Failure::from),
            Some(Command::Status(args)) => commands::status::show(*args, global).await.map_err(Failure::from),
            Some(Command::Doctor { json }) => doctor::examine(*json, global).await.map_err(Failure::from),
            Some(Command::Refresh) => commands::refresh::refresh(global).await.map_err(Failure::from),
            Some(Command::Cache(CacheCommand::Clear { connector })) => {
                commands::cache::clear(connector.as_deref(), global).await.map_err(Failure::from)
            }
            Some(Command::Logs { follow, json }) => {
                commands::logs::print(*follow, *json, global).await.map_err(Failure::from)
            }
            Some(Command::Service(ServiceCommand::Install(_))) => service::install(global).await.map_err(Failure::from),
            Some(Command::Service(ServiceCommand::Status)) => service::status(global).await.map_err(Failure::from),
            Some(Command::Service(ServiceCommand::Uninstall)) => {
                service::uninstall(global).await.map_err(Failure::from)
            }
            Some(Command::Completions { shell }) => commands::completions::print(*shell).await.map_err(Failure::from),
            Some(Command::Ca(CaCommand::Remove)) => remove_ca(),
            Some(Command::Emulate(args)) => emulate(args, global).await,
        }
    });
    // A file system that does not answer must not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

fn load(args: &GlobalArgs) -> Result<Config, Failure> {
    Ok(Config::load(args, &|name| std::env::var_os(name), &current_dir()?)?)
}

/// For a command whose environment is to lead to the sidecar.
fn load_for_programs(args: &GlobalArgs, intercept: bool) -> Result<Config, Failure> {
    let environment: config::Environment<'_> = &|name| std::env::var_os(name);
    let args = config::of_a_command(args, environment);
    Ok(match intercept {
        true => Config::load_to_intercept(&args, environment, &current_dir()?)?,
        false => Config::load(&args, environment, &current_dir()?)?,
    })
}

fn current_dir() -> Result<PathBuf, Failure> {
    std::env::current_dir().map_err(|e| Failure::System("find the current directory", e))
}

async fn serve(args: &GlobalArgs) -> Result<ExitCode, Failure> {
    let config = load(args)?;
    let _log = logging::start(config.logging);
    for unknown in config::unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
        warn!("{unknown}");
    }
    if let Some(note) = config.project_note() {
        info!("{note}");
    }
    let app = App::bind(config, Clock::system()).await?;
    let stops = Stops::listen(Some(app.reloader()))?;
    let manager = std::env::var_os("NOTIFY_SOCKET");
    let tell_manager = |state: &str| readiness::tell(manager.as_deref(), state);
    say_first_words(&app);
    say_ready("connect-sidecar", &format!("http://{}", app.addr()));
    tell_manager("READY=1");
    let stopping = |stop| async {
        let stop = async {
            Box::pin(stop).await;
            tell_manager("STOPPING=1");
        };
        app.serve(stop).await
    };
    Ok(until_stopped(stops, stopping).await)
}

/// Whoever begins without a token is told where requests would go, and what can be done without an account.
fn say_first_words(app: &App) {
    if !matches!(app.identity().borrow().state, State::Missing) {
        return;
    }
    let upstream = &app.server().proxy().upstream;
    let upstream = upstream.name();
    info!(
        "requests go to {upstream}; without an account, see `connect-sidecar demo`, or start `connect-sidecar emulate` and \
         name it with --upstream; the status page opens with `connect-sidecar status --open`"
    );
}

fn remove_ca() -> Result<ExitCode, Failure> {
    let removed = match config::state_dir(&|name| std::env::var_os(name)) {
        Some(dir) => ca::remove(&dir).map_err(|e| Failure::System("remove the local CA", e))?,
        None => None,
    };
    let said = match removed {
        Some(dir) => format!("removed the local CA in {}", dir.display()),
        None => "there is no local CA".to_owned(),
    };
    // A closed stdout is no reason to fail.
    let _ = writeln!(io::stdout(), "{}", escaped(&said));
    Ok(ExitCode::SUCCESS)
}

async fn demo(args: &GlobalArgs, once: bool) -> Result<ExitCode, Failure> {
    let (demo, config) = Demo::prepare(args, &|name| std::env::var_os(name)).await?;
    let color = config.logging.color;
    let _log = logging::start_with(logging::Options { color: false, ..config.logging }, demo.log());
    let app = App::bind(config, Clock::system()).await?;
    let stops = Stops::listen(Some(app.reloader()))?;
    let addr = app.addr();
    say_ready("connect-sidecar", &format!("http://{addr}"));
    let code = until_stopped(stops, |stop| async {
        let stopping = CancellationToken::new();
        let touring = stopping.run_until_cancelled(async {
            let convinced = demo.tour(addr, color, once).await;
            if once {
                stopping.cancel();
            }
            convinced
        });
        let serving = app.serve(async {
            tokio::select! {
                () = stop => stopping.cancel(),
                () = stopping.cancelled() => {}
            }
        });
        let (drained, convinced) = tokio::join!(serving, touring);
        drained && convinced.unwrap_or(true)
    });
    Ok(code.await)
}

async fn run_command(
    args: &GlobalArgs,
    options: run::Options,
    command: &[OsString],
    limits: Inherited,
) -> Result<ExitCode, Failure> {
    let config = load_for_programs(args, options.intercept)?;
    let _log = logging::start(config.logging);
    Ok(run::run(config, options, command, &|name| std::env::var_os(name), limits).await?.into())
}

async fn print_env(args: &GlobalArgs, format: Format, intercept: bool) -> Result<ExitCode, Failure> {
    let config = load_for_programs(args, intercept)?;
    let _log = logging::start(config.logging);
    let variables = run::env(config, intercept, &|name| std::env::var_os(name)).await?;
    io::stdout().write_all(&shell::print(format, &variables)).map_err(|e| Failure::System("print the variables", e))?;
    Ok(ExitCode::SUCCESS)
}

async fn emulate(args: &EmulateArgs, global: &GlobalArgs) -> Result<ExitCode, Failure> {
    if args.example_seed {
        let _ = io::stdout().write_all(emulate::EXAMPLE_SEED.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    let stops = Stops::listen(None)?;
    let emulation = Emulation::start(args, global, &|name| std::env::var_os(name)).await?;
    if !global.quiet {
        let _ = io::stderr().write_all(emulation.first_use().as_bytes());
    }
    say_ready("connect-sidecar emulator", &emulation.url());
    Ok(until_stopped(stops, |stop| async {
        stop.await;
        true
    })
    .await)
}

/// The one line on stdout. A closed stdout is no reason to stop.
fn say_ready(what: &str, url: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{what} listening on {url}").and_then(|()| stdout.flush());
}

/// Serves until a signal, then lets it drain; a second signal ends at once.
async fn until_stopped<F>(
    mut stops: Stops,
    serve: impl FnOnce(std::pin::Pin<Box<dyn Future<Output = ()>>>) -> F,
) -> ExitCode
where
    F: Future<Output = bool>,
{
    let mut first = stops.count.clone();
    let first = Box::pin(async move {
        let _ = first.wait_for(|count| *count >= 1).await;
    });
    tokio::select! {
        drained = serve(first) => if drained { ExitCode::SUCCESS } else { ExitCode::from(FAILED) },
        _ = stops.count.wait_for(|count| *count >= 2) => ExitCode::from(FAILED),
    }
}

/// SIGINT and SIGTERM, counted; SIGHUP reads the env file again, or is one of them where there is none.
struct Stops {
    count: watch::Receiver<u32>,
}

impl Stops {
    fn listen(reloader: Option<Reloader>) -> Result<Self, Failure> {
        let on = |kind| signal(kind).map_err(|e| Failure::System("listen for signals", e));
        let (mut interrupt, mut terminate, mut hangup): (Signal, Signal, Signal) =
            (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?);
        let (counter, count) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => counter.send_modify(|count| *count += 1),
                    _ = terminate.recv() => counter.send_modify(|count| *count += 1),
                    _ = hangup.recv() => match &reloader {
                        Some(reloader) => reloader.reload().await,
                        None => counter.send_modify(|count| *count += 1),
                    },
                }
            }
        });
        Ok(Self { count })
    }
}
