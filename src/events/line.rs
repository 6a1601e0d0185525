//! Parses a line of `GET /_sidecar/v1/events` into the form of the sidecar's log. `logs` prints it, and `run` prints
//! the problems of a sidecar that it joined.

use serde::Deserialize;
use tracing::Level;

use crate::os::clock::Timestamp;
use crate::remedy::Remedy;

/// An event in the form of a log line.
#[derive(Debug, PartialEq, Eq)]
pub struct EventLine {
    /// The time, in RFC 3339.
    pub at: String,
    /// The level.
    pub level: Level,
    /// The message with the remedy. It contains untrusted text.
    pub message: String,
    /// The code of an error or a warning.
    pub code: Option<String>,
    /// The status of the response.
    pub status: Option<u16>,
    /// What to do about it.
    pub remedy: Option<Remedy>,
    /// All other log fields with their names.
    pub fields: Vec<(&'static str, String)>,
}

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
        message: Option<String>,
        #[serde(flatten)]
        remedy: Option<Remedy>,
        ms: u64,
    },
    Refusal {
        at: String,
        method: Option<String>,
        path: Option<String>,
        status: u16,
        code: String,
        message: String,
        #[serde(flatten)]
        remedy: Option<Remedy>,
    },
    Rotation {
        at: String,
        project: String,
        expires_at: String,
    },
    Warning {
        at: String,
        level: Option<String>,
        code: String,
        message: String,
        #[serde(flatten)]
        remedy: Option<Remedy>,
    },
}

impl EventLine {
    /// Parses a line. `None` if the event is unknown.
    pub fn read(line: &[u8]) -> Option<Self> {
        let with_remedy = |message: String, remedy: &Option<Remedy>| match remedy {
            Some(remedy) => remedy.after(&message),
            None => message,
        };
        let level_of = |status: u16| if status < 400 { Level::INFO } else { Level::WARN };
        Some(match serde_json::from_slice(line).ok()? {
            Line::Request { at, action, connector, subject, cache, status, code, message, remedy, ms } => {
                let message = message.map(|message| format!(": {message}")).unwrap_or_default();
                let message = with_remedy(format!("{action} {connector}{message}"), &remedy);
                let fields = [("subject", subject), ("cache", cache), ("ms", Some(ms.to_string()))];
                let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                Self { at, level: level_of(status), message, code, status: Some(status), remedy, fields }
            }
            Line::Refusal { at, method, path, status, code, message, remedy } => {
                let message = with_remedy(message, &remedy);
                let fields = [("method", method), ("path", path)];
                let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                Self { at, level: Level::WARN, message, code: Some(code), status: Some(status), remedy, fields }
            }
            Line::Rotation { at, project, expires_at } => {
                let life = Timestamp::parse(&expires_at).zip(Timestamp::parse(&at));
                let life = life.map(|(expiry, now)| format!(", {}", expiry.expiry(now))).unwrap_or_default();
                let message = format!("token of {project} refreshed{life}");
                Self { at, level: Level::INFO, message, code: None, status: None, remedy: None, fields: Vec::new() }
            }
            Line::Warning { at, level, code, message, remedy } => {
                let level = if level.as_deref() == Some("ERROR") { Level::ERROR } else { Level::WARN };
                let message = with_remedy(message, &remedy);
                Self { at, level, message, code: Some(code), status: None, remedy, fields: Vec::new() }
            }
        })
    }
}
