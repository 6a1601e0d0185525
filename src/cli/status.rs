//! `status`: the running sidecar's status as text, JSON or one line, once or repeatedly, or in the browser.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::value::RawValue;
use terminal_size::{Height, terminal_size};

use super::browser;
use super::output::Reader;
use super::signals::Interruptions;
use crate::cli::CommandError;
use crate::cli::args::StatusArgs;
use crate::config::args::GlobalArgs;
use crate::instance::client::{self, Client, ClientError, STATUS_PATH};
use crate::instance::state_file::Instance;
use crate::instance::status::StatusReport;
use crate::os::clock::Clock;
use crate::os::terminal::{self, Palette, escaped};
use crate::proxy::guard::SIDECAR_PREFIX;

/// Time between two updates of `--watch`.
const UPDATE_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of `--short`. Together with the start of the process, a prompt waits at most 300 ms.
const SHORT_LIMIT: Duration = Duration::from_millis(200);

/// Shows the status.
pub(super) async fn show(args: StatusArgs, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    if args.watch {
        return watch(global).await;
    }
    if args.short {
        return short(global).await;
    }
    let (instance, client) = super::running::find(global).await?;
    if args.open {
        return open(&instance).await;
    }
    let json: Box<RawValue> = client.request_json(Method::GET, STATUS_PATH, "").await?;
    super::output::print(match args.json {
        true => terminal::json_for(&io::stdout(), format!("{}\n", json.get())),
        false => parse(&json, &client)?.long(&instance.url, Palette::of(&io::stdout()), Clock::system().local()),
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

/// One line for a prompt, or an error, within [`SHORT_LIMIT`].
async fn short(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let started = Instant::now();
    let (_, client) = client::find_with_timeout(&super::running::selector(global)?, SHORT_LIMIT * 2 / 3).await?;
    let client = client.with_timeout(SHORT_LIMIT.saturating_sub(started.elapsed()));
    let json: Box<RawValue> = client.request_json(Method::GET, STATUS_PATH, "").await?;
    super::output::print(format!("{}\n", parse(&json, &client)?.short())).await?;
    Ok(ExitCode::SUCCESS)
}

fn parse(json: &RawValue, client: &Client) -> Result<StatusReport, ClientError> {
    serde_json::from_str(json.get()).map_err(|e| ClientError::Failed(client.address(), format!("{STATUS_PATH}: {e}")))
}

async fn open(Instance { url, key, project, .. }: &Instance) -> Result<ExitCode, CommandError> {
    let page = format!("{url}{SIDECAR_PREFIX}");
    if let Err(reason) = browser::open(&format!("{page}#key={key}"), project).await {
        let port = url.rsplit(':').next().unwrap_or_default();
        super::output::print(format!("{page}\n")).await?;
        return Err(CommandError::Browser { reason, port: port.to_owned() });
    }
    super::output::print(format!("opened {page}\n")).await?;
    Ok(ExitCode::SUCCESS)
}

/// Shows the status every second, even while no sidecar runs, until a signal arrives or stdout is closed.
async fn watch(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let mut interruptions = Interruptions::listen()?;
    let mut screen = Screen::open().await?;
    let updating = async {
        loop {
            if screen.show(&current_text(global).await?).await? == Reader::Gone {
                return Ok(());
            }
            tokio::time::sleep(UPDATE_INTERVAL).await;
        }
    };
    let watched: Result<(), CommandError> = tokio::select! {
        ended = updating => ended,
        () = interruptions.next() => Ok(()),
    };
    watched.map(|()| ExitCode::SUCCESS)
}

/// The status as text, or why there is none. Returns an error only if another attempt would fail too.
async fn current_text(global: &GlobalArgs) -> Result<String, CommandError> {
    let status = async {
        let (instance, client) = super::running::find(global).await?;
        let json: Box<RawValue> = client.request_json(Method::GET, STATUS_PATH, "").await?;
        let report = parse(&json, &client)?;
        Ok(report.long(&instance.url, Palette::of(&io::stdout()), Clock::system().local()))
    };
    match status.await {
        Err(transient @ (CommandError::NotFound(_) | CommandError::ClientError(_))) => {
            let lines = transient.to_string();
            Ok(lines.lines().map(|line| escaped(line) + "\n").collect())
        }
        result => result,
    }
}

/// The output of `--watch`: on a terminal the alternate screen, otherwise text whenever it changes.
struct Screen {
    is_terminal: bool,
    last_text: String,
}

impl Screen {
    async fn open() -> Result<Self, CommandError> {
        let this = Self { is_terminal: terminal::is_capable(&io::stdout()), last_text: String::new() };
        if this.is_terminal {
            // The alternate screen, no cursor, no line wrapping.
            super::output::print("\x1b[?1049h\x1b[?25l\x1b[?7l").await?;
        }
        Ok(this)
    }

    async fn show(&mut self, text: &str) -> Result<Reader, CommandError> {
        if self.is_terminal {
            let rows = terminal_size().map_or(usize::MAX, |(_, Height(rows))| usize::from(rows));
            let lines = text.lines().take(rows.saturating_sub(1)).map(|line| format!("{line}\x1b[K\n"));
            return super::output::print(format!("\x1b[H{}\x1b[J", lines.collect::<String>())).await;
        }
        if self.last_text == text {
            return Ok(super::output::reader());
        }
        let gap = if self.last_text.is_empty() { "" } else { "\n" };
        text.clone_into(&mut self.last_text);
        super::output::print(format!("{gap}{text}")).await
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.is_terminal {
            let _ = io::stdout().write_all(b"\x1b[?7h\x1b[?25h\x1b[?1049l").and_then(|()| io::stdout().flush());
        }
    }
}
