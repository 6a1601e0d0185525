//! `logs`: prints the running sidecar's recent events, and follows new ones. Events contain no secrets.

use std::io;
use std::process::ExitCode;

use tracing::Level;

use super::output::Reader;
use super::signals::Interruptions;
use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::events::line::EventLine;
use crate::instance::client::EventLines;
use crate::os::terminal::{self, Color, Palette, escaped};

/// Prints the events. With `follow`, until the sidecar ends, a signal arrives or stdout is closed.
pub(super) async fn print(follow: bool, json: bool, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let (_, client) = super::running::find(global).await?;
    let mut interruptions = Interruptions::listen()?;
    let lines = client.events().await?;
    let palette = Palette::of(&io::stdout());
    let format = |line: &[u8]| match json {
        true => terminal::json_for(&io::stdout(), String::from_utf8_lossy(line).into_owned() + "\n"),
        false => text(line, palette),
    };
    tokio::select! {
        printed = print_lines(lines, follow, format) => printed?,
        () = interruptions.next() => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn print_lines(
    mut lines: EventLines,
    follow: bool,
    format: impl Fn(&[u8]) -> String,
) -> Result<(), CommandError> {
    while let Some(line) = lines.next().await {
        if line.is_empty() && !follow {
            break;
        }
        let reader =
            if line.is_empty() { super::output::reader() } else { super::output::print(format(&line)).await? };
        if reader == Reader::Gone {
            break;
        }
    }
    Ok(())
}

/// An event in the format of the log. Empty for an unknown event.
fn text(line: &[u8], palette: Palette) -> String {
    let Some(EventLine { at, level, message, code, status, remedy: _, fields }) = EventLine::read(line) else {
        return String::new();
    };
    let color = match level {
        Level::ERROR => Color::Red,
        Level::WARN => Color::Yellow,
        _ => Color::Green,
    };
    let known = [("status", status.map(|status| status.to_string())), ("code", code)];
    let known = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let fields: String = known.chain(fields).map(|(name, value)| format!(" {name}={}", escaped(&value))).collect();
    let (at, level) = (palette.paint(Color::Dim, &escaped(&at)), palette.paint(color, &format!("{level:>5}")));
    format!("{at} {level} {}{fields}\n", escaped(&message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_formatted_like_a_log_line() {
        for (event, line) in [
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"slack/acme","subject":"app","cache":"hit","status":200,"ms":12}"#,
                "2026-11-23T09:00:00Z  INFO token slack/acme status=200 subject=app cache=hit ms=12\n",
            ),
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"a\u001b[2J\n","status":403,"code":"forbidden","hint":"run it","ms":1,"new":1}"#,
                "2026-11-23T09:00:00Z  WARN token a\\u{1b}[2J\\u{a}: run it status=403 code=forbidden ms=1\n",
            ),
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"x","status":403,"code":"forbidden","hint":"vercel connect attach x","command":"vercel connect attach x","ms":1}"#,
                "2026-11-23T09:00:00Z  WARN token x: run `vercel connect attach x` status=403 code=forbidden ms=1\n",
            ),
            (
                r#"{"event":"request","at":"2026-11-23T09:00:00Z","action":"token","connector":"x","status":415,"code":"json_required","message":"Send the body as JSON: add -H 'j'.","hint":"-H 'j'","ms":1}"#,
                "2026-11-23T09:00:00Z  WARN token x: Send the body as JSON: add -H 'j'. status=415 code=json_required ms=1\n",
            ),
            (
                r#"{"event":"refusal","at":"2026-11-23T09:00:00Z","method":"GET","path":"/x","status":403,"code":"host_not_allowed","message":"No.","hint":"c h","command":"c h"}"#,
                "2026-11-23T09:00:00Z  WARN No: run `c h` status=403 code=host_not_allowed method=GET path=/x\n",
            ),
            (
                r#"{"event":"rotation","at":"2026-11-23T09:00:00Z","project":"acme/web","fingerprint":"0","expires_at":"2026-11-23T21:00:00Z"}"#,
                "2026-11-23T09:00:00Z  INFO token of acme/web refreshed, expires in 12 h\n",
            ),
            (
                r#"{"event":"warning","at":"2026-11-23T09:00:00Z","level":"WARN","code":"c","message":"It ends.","hint":"h","command":"h","project":"p"}"#,
                "2026-11-23T09:00:00Z  WARN It ends: run `h` code=c\n",
            ),
            (
                r#"{"event":"warning","at":"2026-11-23T09:00:00Z","level":"ERROR","code":"c","message":"It ended.","hint":"h","command":"h","project":"p"}"#,
                "2026-11-23T09:00:00Z ERROR It ended: run `h` code=c\n",
            ),
            (r#"{"event":"another","at":"2026-11-23T09:00:00Z"}"#, ""),
            ("no JSON", ""),
        ] {
            assert_eq!(text(event.as_bytes(), Palette::new(false)), line);
        }
    }
}
