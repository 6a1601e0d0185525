//! `status`: what the running sidecar knows, as text, as JSON, in one line, again and again, or as its page.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::value::RawValue;
use terminal_size::{Height, terminal_size};

use super::browser;
use super::output::Reader;
use super::report::Report;
use super::signals::Interruptions;
use crate::cli::CommandError;
use crate::cli::args::StatusArgs;
use crate::config::args::GlobalArgs;
use crate::instance::client::{self, Client, ClientError};
use crate::instance::state_file::Instance;
use crate::os::clock::Clock;
use crate::os::terminal::{self, Palette, escaped};
use crate::proxy::guard::SIDECAR_PREFIX;

/// Time between two looks of `--watch`.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// With what the start of the process takes, a prompt is there within 300 ms.
const SHORT_LIMIT: Duration = Duration::from_millis(200);

/// Shows it.
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
    let state: Box<RawValue> = client.request_json(Method::GET, PATH, "").await?;
    super::output::print(match args.json {
        true => terminal::json_for(&io::stdout(), format!("{}\n", state.get())),
        false => read(&state, &client)?.long(&instance.url, Palette::of(&io::stdout()), Clock::system().local()),
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}

/// One line for a prompt, which waits for it: within `SHORT_LIMIT`, or not at all.
async fn short(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let begun = Instant::now();
    let (_, client) = client::find_with_timeout(&super::running::wanted(global)?, SHORT_LIMIT * 2 / 3).await?;
    let client = client.with_timeout(SHORT_LIMIT.saturating_sub(begun.elapsed()));
    let state: Box<RawValue> = client.request_json(Method::GET, PATH, "").await?;
    super::output::print(format!("{}\n", read(&state, &client)?.short())).await?;
    Ok(ExitCode::SUCCESS)
}

const PATH: &str = "/_sidecar/v1/status";

fn read(state: &RawValue, client: &Client) -> Result<Report, ClientError> {
    serde_json::from_str(state.get()).map_err(|e| ClientError::Failed(client.address(), format!("{PATH}: {e}")))
}

async fn open(Instance { url, key, project, .. }: &Instance) -> Result<ExitCode, CommandError> {
    let page = format!("{url}{SIDECAR_PREFIX}");
    if let Err(reason) = browser::open(&format!("{page}#key={key}"), project).await {
        let port = url.rsplit(':').next().unwrap_or_default();
        super::output::print(format!("{page}\n")).await?;
        return Err(CommandError::Other(format!(
            "could not open it in a browser ({reason}): open it by hand, with `#key=` and the `key` in \
             $XDG_STATE_HOME/connect-sidecar/{port}.json (or ~/.local/state/…) behind it"
        )));
    }
    super::output::print(format!("opened {page}\n")).await?;
    Ok(ExitCode::SUCCESS)
}

/// Shows it anew every second, also while none runs, until a signal comes or nobody reads.
async fn watch(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let mut interruptions = Interruptions::listen()?;
    let mut screen = Screen::open().await?;
    let watching = async {
        loop {
            if screen.show(&look(global).await?).await? == Reader::Gone {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let watched: Result<(), CommandError> = tokio::select! {
        ended = watching => ended,
        () = interruptions.next() => Ok(()),
    };
    watched.map(|()| ExitCode::SUCCESS)
}

/// The state as text, or why there is none; an error is one that another look would not mend.
async fn look(global: &GlobalArgs) -> Result<String, CommandError> {
    let looked = async {
        let (instance, client) = super::running::find(global).await?;
        let state: Box<RawValue> = client.request_json(Method::GET, PATH, "").await?;
        let report = read(&state, &client)?;
        Ok(report.long(&instance.url, Palette::of(&io::stdout()), Clock::system().local()))
    };
    match looked.await {
        Err(passing @ (CommandError::NotFound(_) | CommandError::ClientError(_))) => {
            let lines = passing.to_string();
            Ok(lines.lines().map(|line| escaped(line) + "\n").collect())
        }
        looked => looked,
    }
}

/// Where the state is shown again and again: on a terminal, in one place of its own; else as text whenever it changes.
struct Screen {
    is_terminal: bool,
    shown: String,
}

impl Screen {
    async fn open() -> Result<Self, CommandError> {
        let this = Self { is_terminal: terminal::is_capable(&io::stdout()), shown: String::new() };
        if this.is_terminal {
            // Another screen, no cursor, no wrapping of lines.
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
        if self.shown == text {
            return Ok(super::output::reader());
        }
        let gap = if self.shown.is_empty() { "" } else { "\n" };
        text.clone_into(&mut self.shown);
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
