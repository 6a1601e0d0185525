//! Logs to stderr, as text or JSON lines, without secrets.
//!
//! Logging never blocks a request: a separate thread writes the lines from a bounded buffer, and lines that do not fit
//! are dropped. Other crates log at WARN or above, whatever the level: at lower levels hyper and rustls print headers
//! and keys. Control characters are escaped, so that untrusted text cannot move the cursor.

use std::io::{self, IsTerminal, Write};

use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, fmt};

use crate::os::clock::Clock;
use crate::os::terminal::{Color, Palette, escaped};

/// The number of lines that are buffered for a slow reader.
const BUFFERED_LINES: usize = 4096;

/// The fields of a JSON line, with their meaning. Every line has the first three. The names are stable.
pub const FIELDS: &[(&str, &str)] = &[
    ("timestamp", "when, RFC 3339 in UTC"),
    ("level", "ERROR, WARN, INFO, DEBUG or TRACE"),
    ("message", "what, for people"),
    ("code", "the kind of an error or a warning: as in `error.code` of a reply, or in the state's `warnings`"),
    ("hint", "what to run or change"),
    ("command", "the command that mends it, where one does, to be pasted into a shell"),
    ("project", "the OIDC token's project, as team/name"),
    ("fingerprint", "the first 8 hex digits of the OIDC token's SHA-256"),
    ("source", "where a fresh OIDC token came from"),
    ("action", "what an app asked Connect for: token, authorize, install, connector or revoke"),
    ("connector", "of which connector, as the app wrote it"),
    ("subject", "on whose behalf: app, user and so on"),
    ("cache", "what the cache did, as in `Cache-Status`"),
    ("status", "the status of the reply"),
    ("ms", "how long the app waited, in milliseconds"),
    ("method", "the method of a request that was refused or passed on"),
    ("path", "the path of a request that was refused"),
    ("host", "the host to which a request of a run was passed on"),
    ("offset_ms", "upstream's clock minus this machine's, in milliseconds"),
    ("hidden", "refusals that were too many to show"),
];

/// How to log.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The least severe level that is shown.
    pub level: Level,
    /// Text or JSON.
    pub format: Format,
    /// Whether to use colours if stderr is a terminal.
    pub color: bool,
}

/// The format of a line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// Text for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Writes the buffered lines when dropped.
#[must_use]
pub struct Guard(#[expect(dead_code, reason = "held for its drop")] WorkerGuard);

/// Starts logging to stderr.
pub fn start(options: Options) -> Guard {
    let color = options.color && io::stderr().is_terminal();
    start_with(Options { color, ..options }, io::stderr())
}

/// Starts logging to `writer`. Only the first call in a process has an effect.
pub fn start_with(options: Options, writer: impl Write + Send + 'static) -> Guard {
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(BUFFERED_LINES).thread_name("log").finish(writer);
    let subscriber = Registry::default().with(layer(options, writer));
    // Fails only if logging was started before, which then stays as it is.
    let _ = tracing::subscriber::set_global_default(subscriber);
    std::panic::set_hook(Box::new(|panic| {
        // The payload may contain a secret, so only the location is logged.
        let location = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!("internal error at {location}");
    }));
    Guard(guard)
}

fn layer<S, W>(options: Options, writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let own_level = LevelFilter::from_level(options.level);
    let other_crates_level = own_level.min(LevelFilter::WARN);
    let filter = Targets::new().with_default(other_crates_level).with_target(env!("CARGO_CRATE_NAME"), own_level);
    let base = fmt::layer().with_writer(writer).with_target(false);
    match options.format {
        Format::Text => base
            .fmt_fields(debug_fn(write_field))
            .with_ansi(false)
            .event_format(TextLine { clock: Clock::system(), palette: Palette::new(options.color) })
            .with_filter(filter)
            .boxed(),
        Format::Json => {
            base.json().flatten_event(true).with_current_span(false).with_span_list(false).with_filter(filter).boxed()
        }
    }
}

/// A line for people: local time to the second, level, message. Warnings and errors are coloured.
struct TextLine {
    clock: Clock,
    palette: Palette,
}

impl<S, F> FormatEvent<S, F> for TextLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, F>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let level = *event.metadata().level();
        let mut line = format!("{} {level:>5} ", self.clock.local());
        context.format_fields(Writer::new(&mut line), event)?;
        match level {
            Level::ERROR => writeln!(writer, "{}", self.palette.paint(Color::Red, &line)),
            Level::WARN => writeln!(writer, "{}", self.palette.paint(Color::Yellow, &line)),
            _ => writeln!(writer, "{line}"),
        }
    }
}

/// Writes `message key=value` with control characters escaped. Leaves out fields that the message repeats anyway.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn std::fmt::Debug) -> std::fmt::Result {
    let text = format!("{value:?}");
    match field.name() {
        "message" => write!(writer, "{}", escaped(&text)),
        "hint" | "command" | "action" | "connector" => Ok(()),
        name => {
            let plain = text.trim_matches('"');
            // A value with spaces keeps its quotes.
            write!(writer, " {name}={}", escaped(if plain.contains(' ') { &text } else { plain }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex, PoisonError};

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: Level, format: Format, log: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let options = Options { level, format, color: false };
        let subscriber = Registry::default().with(layer(options, move || writer.clone()));
        tracing::subscriber::with_default(subscriber, log);
        let bytes = captured.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn untrusted_text_cannot_move_the_cursor_or_start_a_line() {
        for format in [Format::Text, Format::Json] {
            let line = logged(Level::INFO, format, || {
                let name = "a\x1b[31m\nINFO fake\r\u{9b}2J\u{202e}";
                tracing::info!(name, "about {name}");
            });
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert!(!line.contains(['\x1b', '\r']), "{line:?}");
        }
    }

    #[test]
    fn other_crates_log_at_warn_whatever_the_level() {
        let lines = logged(Level::TRACE, Format::Text, || {
            tracing::trace!("own");
            tracing::info!(target: "hyper::proto", "other: authorization");
            tracing::warn!(target: "hyper::proto", "other warning");
        });
        assert!(
            lines.contains("own") && lines.contains("other warning") && !lines.contains("authorization"),
            "{lines}"
        );
    }

    #[test]
    fn a_text_line_has_a_date_and_quotes_values_with_spaces() {
        let line = logged(Level::INFO, Format::Text, || {
            tracing::info!(connector = "slack/acme", subject = "app", cache = "hit; ttl=2", hint = "run it", "asked");
        });
        let (date, rest) = line.split_once(' ').expect("a date");
        assert_eq!(date.len(), "2026-11-23T09:00:00Z".len(), "{date}");
        assert_eq!(rest.trim_end(), " INFO asked subject=app cache=\"hit; ttl=2\"");
    }

    #[test]
    fn a_json_line_is_one_flat_object() {
        let line = logged(Level::INFO, Format::Json, || tracing::info!(status = 200_u16, hint = "run it", "done"));
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(
            (&value["status"], &value["message"], &value["hint"]),
            (&200.into(), &"done".into(), &"run it".into())
        );
        assert_eq!(value["level"], "INFO");
    }
}
