//! A line of `GET /_sidecar/v1/events`, as the log of that sidecar has it: what `logs` prints, and what a `run` says of a
//! sidecar that it joined. Pure.

use serde::Deserialize;
use tracing::Level;

use crate::os::clock::Timestamp;
use crate::remedy::Remedy;

/// What an event says.
#[derive(Debug, PartialEq, Eq)]
pub struct EventLine {
    /// When it was.
    pub at: String,
    /// How bad.
    pub level: Level,
    /// What, and what mends it. Foreign text is part of it.
    pub message: String,
    /// The kind of an error or a warning.
    pub code: Option<String>,
    /// The status of a reply.
    pub status: Option<u16>,
    /// What mends it.
    pub remedy: Option<Remedy>,
    /// All other fields of the log, with their names.
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
    /// Reads it; `None` for an event that is not known.
    pub fn read(line: &[u8]) -> Option<Self> {
        let with = |what: String, remedy: &Option<Remedy>| match remedy {
            Some(remedy) => remedy.after(&what),
            None => what,
        };
        let level_of = |status: u16| if status < 400 { Level::INFO } else { Level::WARN };
        Some(match serde_json::from_slice(line).ok()? {
            Line::Request { at, action, connector, subject, cache, status, code, message, remedy, ms } => {
                let message = message.map(|message| format!(": {message}")).unwrap_or_default();
                let message = with(format!("{action} {connector}{message}"), &remedy);
                let fields = [("subject", subject), ("cache", cache), ("ms", Some(ms.to_string()))];
                let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                Self { at, level: level_of(status), message, code, status: Some(status), remedy, fields }
            }
            Line::Refusal { at, method, path, status, code, message, remedy } => {
                let message = with(message, &remedy);
                let fields = [("method", method), ("path", path)];
                let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                Self { at, level: Level::WARN, message, code: Some(code), status: Some(status), remedy, fields }
            }
            Line::Rotation { at, project, expires_at } => {
                let life = Timestamp::parse(&expires_at).zip(Timestamp::parse(&at));
                let life = life.map(|(end, now)| format!(", {}", end.expiry(now))).unwrap_or_default();
                let message = format!("token of {project} refreshed{life}");
                Self { at, level: Level::INFO, message, code: None, status: None, remedy: None, fields: Vec::new() }
            }
            Line::Warning { at, level, code, message, remedy } => {
                let level = if level.as_deref() == Some("ERROR") { Level::ERROR } else { Level::WARN };
                let message = with(message, &remedy);
                Self { at, level, message, code: Some(code), status: None, remedy, fields: Vec::new() }
            }
        })
    }
}
