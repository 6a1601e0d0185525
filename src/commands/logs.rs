//! `logs`: what the running sidecar did lately, and what it does from now on.
//!
//! Hits are told only while somebody follows. No line holds a secret, as no event does.

use std::io;
use std::process::ExitCode;

use serde::Deserialize;

use super::{Interruptions, Reader};
use crate::cli::GlobalArgs;
use crate::client::EventLines;
use crate::clock::{Timestamp, spoken};
use crate::commands::CommandError;
use crate::terminal::{self, Color, Palette, escaped};

/// Prints it, until there is no more: where it is followed, until the sidecar ends, a signal comes or nobody reads.
pub async fn print(follow: bool, json: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let (_, client) = super::find(global).await?;
    let mut interruptions = Interruptions::listen()?;
    let lines = client.events().await?;
    let palette = Palette::of(&io::stdout());
    let shown = |line: &[u8]| match json {
        true => terminal::json_for(&io::stdout(), String::from_utf8_lossy(line).into_owned() + "\n"),
        false => text(line, palette),
    };
    tokio::select! {
        printed = pass_on(lines, follow, shown) => printed?,
        () = interruptions.next() => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn pass_on(mut lines: EventLines, follow: bool, shown: impl Fn(&[u8]) -> String) -> Result<(), CommandError> {
    while let Some(line) = lines.next().await {
        if line.is_empty() && !follow {
            break;
        }
        let reader = if line.is_empty() { super::reader() } else { super::print(shown(&line)).await? };
        if reader == Reader::Gone {
            break;
        }
    }
    Ok(())
}

/// A line of `GET /_sidecar/v1/events`.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line {
    Request {
        at: String,
        action: String,
        connector: String,
        subject: Option<String>,
        cache: Option<String>,
        status: u16,
        code: Option<String>,
        hint: Option<String>,
        ms: u64,
    },
    Rotation {
        at: String,
        project: String,
        expires_at: String,
    },
    Warning {
        at: String,
        message: String,
    },
}

/// An event as a line of the log would have it; nothing for one that is not known.
fn text(line: &[u8], palette: Palette) -> String {
    let Ok(line) = serde_json::from_slice(line) else { return String::new() };
    let (at, is_good, said) = match line {
        Line::Request { at, action, connector, subject, cache, status, code, hint, ms } => {
            let hint = hint.map(|hint| format!(": {hint}")).unwrap_or_default();
            let field = |name: &str, value: Option<String>| value.map(|v| format!(" {name}={v}")).unwrap_or_default();
            let [subject, cache, code] =
                [("subject", subject), ("cache", cache), ("code", code)].map(|(n, v)| field(n, v));
            let said = format!("{action} {connector}{hint}{subject} status={status}{code}{cache} ms={ms}");
            (at, status < 400, said)
        }
        Line::Rotation { at, project, expires_at } => {
            let life =
                Timestamp::parse(&expires_at).zip(Timestamp::parse(&at)).map(|(end, now)| spoken(end.since(now)));
            let life = life.map(|life| format!(", expires in {life}")).unwrap_or_default();
            (at, true, format!("token of {project} refreshed{life}"))
        }
        Line::Warning { at, message } => (at, false, message),
    };
    let level = if is_good { palette.paint(Color::Green, " INFO") } else { palette.paint(Color::Yellow, " WARN") };
    format!("{} {level} {}\n", palette.paint(Color::Dim, &escaped(&at)), escaped(&said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reads_as_a_line_of_the_log() {
        for (event, line) in [
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"slack/acme","subject":"app","cache":"miss","status":200,"ms":12}"#,
                "2026-11-23T09:00:00Z  INFO token slack/acme subject=app status=200 cache=miss ms=12\n",
            ),
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"a\u001b[2J\n","status":403,"code":"forbidden","hint":"run it","ms":1,"new":1}"#,
                "2026-11-23T09:00:00Z  WARN token a\\u{1b}[2J\\u{a}: run it status=403 code=forbidden ms=1\n",
            ),
            (
                r#"{"event":"rotation","at":"2026-11-23T09:00:00Z","project":"acme/web","fingerprint":"0","expires_at":"2026-11-23T21:00:00Z"}"#,
                "2026-11-23T09:00:00Z  INFO token of acme/web refreshed, expires in 12 h\n",
            ),
            (
                r#"{"event":"warning","at":"2026-11-23T09:00:00Z","code":"c","message":"it ends","hint":"h","project":"p"}"#,
                "2026-11-23T09:00:00Z  WARN it ends\n",
            ),
            (r#"{"event":"another","at":"2026-11-23T09:00:00Z"}"#, ""),
            ("no JSON", ""),
        ] {
            assert_eq!(text(event.as_bytes(), Palette::new(false)), line);
        }
    }
}
