//! Fault injection: delayed, wrong, missing or broken responses. Tests build a [`Fault`]; a seed or the admin API
//! describes one by a [`FaultScript`].

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::errors::{Kind, Refusal};

/// The largest clock offset, in seconds. With more, `Date` could get before 1970, which no header can express.
const MAX_SKEW_SECONDS: i64 = 10 * 366 * 24 * 3600;

/// What a fault does to a response.
#[derive(Debug, Clone)]
pub enum FaultKind {
    /// The response is delayed by this much.
    Delay(Duration),
    /// The response is held back until the hold is released.
    Hold(AnswerHold),
    /// No response is ever sent.
    Hang,
    /// The connection is reset instead of a response.
    Reset,
    /// The connection is closed in the middle of the body.
    Truncate,
    /// This response is sent instead.
    Answer {
        /// Status code.
        status: u16,
        /// Content type.
        content_type: &'static str,
        /// Body.
        body: String,
        /// More headers.
        headers: Vec<(&'static str, String)>,
    },
}

/// A fault and the requests that it applies to.
#[derive(Debug, Clone)]
pub struct Fault {
    kind: FaultKind,
    /// Only requests whose target contains this are affected.
    on: String,
    /// How many more requests are affected; `None` for no limit.
    remaining: Option<u32>,
}

impl Fault {
    /// Affects one request.
    pub fn once(kind: FaultKind) -> Self {
        Self { kind, on: String::new(), remaining: Some(1) }
    }

    /// Affects every request.
    pub fn always(kind: FaultKind) -> Self {
        Self { remaining: None, ..Self::once(kind) }
    }

    /// Restricts the fault to requests whose target contains `part`.
    pub fn on(mut self, part: &str) -> Self {
        self.on = part.into();
        self
    }

    /// An error in Vercel's envelope.
    pub fn status(status: u16, code: &str) -> Self {
        let body = serde_json::json!({"error": {"code": code, "message": format!("scripted: {code}")}}).to_string();
        Self::answer(status, "application/json", &body)
    }

    /// A 429 with this `Retry-After`.
    pub fn rate_limited(retry_after: Option<&str>) -> Self {
        let mut fault = Self::status(429, "rate_limited");
        if let FaultKind::Answer { headers, .. } = &mut fault.kind {
            headers.extend(retry_after.map(|value| ("retry-after", value.to_owned())));
        }
        fault
    }

    /// This response instead of the real one.
    pub fn answer(status: u16, content_type: &'static str, body: &str) -> Self {
        Self::once(FaultKind::Answer { status, content_type, body: body.into(), headers: Vec::new() })
    }

    /// A 307 redirect.
    pub fn redirect(to: &str) -> Self {
        let headers = vec![("location", to.to_owned())];
        Self::once(FaultKind::Answer { status: 307, content_type: "application/json", body: "{}".into(), headers })
    }

    pub(super) fn held_by(hold: AnswerHold) -> Self {
        Self::always(FaultKind::Hold(hold))
    }

    pub(super) fn applies_to(&self, target: &str) -> bool {
        let is_released = matches!(&self.kind, FaultKind::Hold(hold) if hold.is_released());
        !is_released && target.contains(&self.on)
    }

    /// Counts an affected request. Returns whether it was the last one.
    pub(super) fn count_use(&mut self) -> bool {
        self.remaining = self.remaining.map(|remaining| remaining.saturating_sub(1));
        self.remaining == Some(0)
    }

    pub(super) fn kind(self) -> FaultKind {
        self.kind
    }
}

/// Holds back responses until it is released.
#[derive(Debug, Clone)]
pub struct AnswerHold(Arc<watch::Sender<bool>>);

impl Default for AnswerHold {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl AnswerHold {
    /// Lets all held responses go, and holds none from now on.
    pub fn release(&self) {
        self.0.send_replace(true);
    }

    fn is_released(&self) -> bool {
        *self.0.borrow()
    }

    pub(super) async fn released(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|released| *released).await;
    }
}

/// A fault as written in a seed or sent to the admin API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultScript {
    /// What goes wrong.
    pub kind: ScriptKind,
    /// Only requests whose target contains this are affected.
    #[serde(default)]
    pub on: String,
    /// How many requests are affected; all until the faults are cleared if absent.
    #[serde(default)]
    pub times: Option<u32>,
    /// A delay (`2s`) or a clock offset (`-5m`).
    #[serde(default)]
    pub by: Option<String>,
    /// The status of the error response.
    #[serde(default)]
    pub status: Option<u16>,
    /// The code of the error response.
    #[serde(default)]
    pub code: Option<String>,
    /// The message of the error response.
    #[serde(default)]
    pub message: Option<String>,
    /// `Retry-After` of the error response, in seconds.
    #[serde(default)]
    pub retry_after: Option<String>,
}

/// What a scripted fault does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScriptKind {
    /// The response is delayed, by `by`.
    Latency,
    /// No response is ever sent.
    Hang,
    /// The connection is reset instead of a response.
    Reset,
    /// The connection is closed in the middle of the body.
    Cut,
    /// The response claims to be JSON and is not.
    WrongJson,
    /// 401, as for an expired credential.
    Unauthorized,
    /// 429, with `retry_after` if given.
    RateLimited,
    /// `no_token`, as if the provider had revoked the grant.
    RevokedGrant,
    /// An error with this `status` and `code`.
    Status,
    /// The emulator's clock is off, by `by`.
    ClockSkew,
}

impl ScriptKind {
    /// Each kind with its name and the parameters that it takes besides `on` and `times`.
    pub const ALL: [(Self, &'static str, &'static str); 10] = [
        (Self::Latency, "latency", "`by` (\"2s\")"),
        (Self::Hang, "hang", ""),
        (Self::Reset, "reset", ""),
        (Self::Cut, "cut", ""),
        (Self::WrongJson, "wrong_json", "`retry_after`"),
        (Self::Unauthorized, "unauthorized", "`retry_after`"),
        (Self::RateLimited, "rate_limited", "`retry_after` (\"30\")"),
        (Self::RevokedGrant, "revoked_grant", "`retry_after`"),
        (Self::Status, "status", "`status` (200 to 599), `code`, `message`, `retry_after`"),
        (Self::ClockSkew, "clock_skew", "`by` (\"2h\", \"-5m\"; at most ten years)"),
    ];
}

/// The effect of a script.
#[derive(Debug, Clone)]
pub enum Effect {
    /// A fault for requests.
    Fault(Fault),
    /// A clock offset, in seconds.
    Skew(i64),
}

/// What is wrong with a script, and what would be right.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ScriptError(String);

impl FaultScript {
    /// Validates the script and builds its effect.
    pub fn effect(&self) -> Result<Effect, ScriptError> {
        let needs = |key: &str, example: &str| {
            let row = ScriptKind::ALL.iter().find(|(kind, ..)| *kind == self.kind);
            let (_, name, takes) = row.copied().unwrap_or((self.kind, "this", ""));
            ScriptError(format!("this kind needs `{key}`, as {example}: {name} takes {takes}, `on` and `times`"))
        };
        let duration = |text: &str| humantime::parse_duration(text).map_err(|_| needs("by", "\"2s\" or \"-5m\""));
        let by = || self.by.as_deref().ok_or_else(|| needs("by", "\"2s\""));
        let kind = match self.kind {
            ScriptKind::ClockSkew => {
                let by = by()?;
                let (sign, length) = by.strip_prefix('-').map_or((1, by), |length| (-1, length));
                let seconds =
                    i64::try_from(duration(length)?.as_secs()).ok().filter(|seconds| *seconds <= MAX_SKEW_SECONDS);
                let seconds = seconds.ok_or_else(|| ScriptError("`by` is at most ten years".into()))?;
                return Ok(Effect::Skew(sign * seconds));
            }
            ScriptKind::Latency => FaultKind::Delay(duration(by()?)?),
            ScriptKind::Hang => FaultKind::Hang,
            ScriptKind::Reset => FaultKind::Reset,
            ScriptKind::Cut => FaultKind::Truncate,
            ScriptKind::WrongJson => Fault::answer(200, "application/json", "{\"token\":").kind,
            ScriptKind::Unauthorized => refusal(Kind::ExpiredToken),
            ScriptKind::RevokedGrant => refusal(Kind::NoToken),
            ScriptKind::RateLimited => Fault::rate_limited(self.retry_after.as_deref()).kind,
            ScriptKind::Status => {
                let status = self.status.filter(|status| (200..600).contains(status));
                let status = status.ok_or_else(|| needs("status", "503, between 200 and 599"))?;
                let code = self.code.as_deref().unwrap_or("scripted");
                let message = self.message.as_deref().unwrap_or("A fault that was injected into the emulator.");
                let body = serde_json::json!({"error": {"code": code, "message": message}}).to_string();
                Fault::answer(status, "application/json", &body).kind
            }
        };
        let kind = match (kind, &self.retry_after) {
            (FaultKind::Answer { status, content_type, body, .. }, Some(after)) => {
                FaultKind::Answer { status, content_type, body, headers: vec![("retry-after", after.clone())] }
            }
            (kind, _) => kind,
        };
        if self.retry_after.as_ref().is_some_and(|after| HeaderValue::from_str(after).is_err()) {
            return Err(ScriptError("`retry_after` must be what a header can hold, as \"30\"".into()));
        }
        if self.times == Some(0) {
            return Err(ScriptError("`times` is 1 or more; leave it out for always".into()));
        }
        Ok(Effect::Fault(Fault { kind, on: self.on.clone(), remaining: self.times }))
    }
}

fn refusal(kind: Kind) -> FaultKind {
    let refusal = Refusal::new(kind);
    let body = refusal.body().to_string();
    Fault::answer(refusal.status().as_u16(), "application/json", &body).kind
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(script: &str) -> Result<Effect, String> {
        serde_json::from_str::<FaultScript>(script).map_err(|e| e.to_string())?.effect().map_err(|e| e.to_string())
    }

    #[test]
    fn an_incomplete_script_is_refused_with_what_is_missing() {
        for (script, expected) in [
            (r#"{"kind":"latency"}"#, "`by`"),
            (r#"{"kind":"latency","by":"soon"}"#, "\"2s\""),
            (r#"{"kind":"status","status":99}"#, "between 200 and 599"),
            (r#"{"kind":"hang","times":0}"#, "1 or more"),
            (r#"{"kind":"clock_skew","by":"-60years"}"#, "ten years"),
            (r#"{"kind":"clock_skew","by":"18446744073709551615s"}"#, "ten years"),
            (r#"{"kind":"rate_limited","retry_after":"1\n2"}"#, "a header can hold"),
            (r#"{"kind":"sleep"}"#, "`latency`"),
            (r#"{"kind":"hang","for":"2s"}"#, "unknown field `for`"),
        ] {
            let error = effect(script).expect_err(script);
            assert!(error.contains(expected), "{script}: {error}");
        }
        let error = effect(r#"{"kind":"latency"}"#).expect_err("`by` is missing");
        assert_eq!(error, r#"this kind needs `by`, as "2s": latency takes `by` ("2s"), `on` and `times`"#);
    }

    #[test]
    fn each_kind_is_documented_by_its_serialized_name() {
        for (kind, name, ..) in ScriptKind::ALL {
            assert_eq!(serde_json::to_value(kind).expect("JSON"), name);
        }
        let unknown = effect(r#"{"kind":"x"}"#).expect_err("no such kind");
        assert_eq!(ScriptKind::ALL.len(), unknown.matches('`').count() / 2 - 1, "{unknown}");
        let seed = include_str!("example-seed.toml");
        assert!(ScriptKind::ALL.iter().all(|(_, name, ..)| seed.contains(name)));
    }

    #[test]
    fn a_script_applies_to_matching_requests_as_often_as_it_says() {
        let Ok(Effect::Fault(mut fault)) = effect(r#"{"kind":"unauthorized","on":"/token/","times":2}"#) else {
            panic!("a fault")
        };
        assert!(fault.applies_to("/v1/connect/token/x") && !fault.applies_to("/v1/connect/connectors/x"));
        assert!(!fault.count_use() && fault.count_use());
        assert!(matches!(effect(r#"{"kind":"clock_skew","by":"-5m"}"#), Ok(Effect::Skew(-300))));
    }
}
