//! Scripted faults: how an answer is delayed, spoiled or withheld; as tests inject them, and as people write them
//! ([`Script`]).

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::errors::{Kind as Refused, Refusal};

/// The clock is off no further, in seconds: a time before 1970 cannot be said in a header.
const MOST_SKEW: i64 = 10 * 366 * 24 * 3600;

/// What goes wrong.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// The answer comes this much later.
    Delay(Duration),
    /// The answer is held until the gate is opened.
    Held(Gate),
    /// No answer ever comes.
    Hang,
    /// The connection is reset instead of an answer.
    Reset,
    /// The answer breaks off in the middle of its body.
    Truncate,
    /// This is answered instead, with `Retry-After` if one is given.
    Answer {
        /// Status code.
        status: u16,
        /// Content type.
        content_type: &'static str,
        /// Body.
        body: String,
        /// Further headers.
        headers: Vec<(&'static str, String)>,
    },
}

/// A fault, for the next requests that it concerns.
#[derive(Debug, Clone)]
pub struct Fault {
    trouble: Trouble,
    /// Only requests whose target contains this.
    on: String,
    /// How often it strikes; `None` for always.
    left: Option<u32>,
}

impl Fault {
    /// Strikes the next request.
    pub fn once(trouble: Trouble) -> Self {
        Self { trouble, on: String::new(), left: Some(1) }
    }

    /// Strikes every request.
    pub fn always(trouble: Trouble) -> Self {
        Self { left: None, ..Self::once(trouble) }
    }

    /// Strikes only requests whose target contains `part`.
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
        if let Trouble::Answer { headers, .. } = &mut fault.trouble {
            headers.extend(retry_after.map(|value| ("retry-after", value.to_owned())));
        }
        fault
    }

    /// Any answer.
    pub fn answer(status: u16, content_type: &'static str, body: &str) -> Self {
        Self::once(Trouble::Answer { status, content_type, body: body.into(), headers: Vec::new() })
    }

    /// A redirect.
    pub fn redirect(to: &str) -> Self {
        let headers = vec![("location", to.to_owned())];
        Self::once(Trouble::Answer { status: 307, content_type: "application/json", body: "{}".into(), headers })
    }

    pub(super) fn held_by(gate: Gate) -> Self {
        Self::always(Trouble::Held(gate))
    }

    pub(super) fn concerns(&self, target: &str) -> bool {
        let over = matches!(&self.trouble, Trouble::Held(gate) if gate.is_open());
        !over && target.contains(&self.on)
    }

    /// Counts a strike; tells whether it was the last.
    pub(super) fn use_up(&mut self) -> bool {
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.left == Some(0)
    }

    pub(super) fn trouble(self) -> Trouble {
        self.trouble
    }
}

/// Holds answers until it is opened.
#[derive(Debug, Clone)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Gate {
    /// Lets all held answers go, and stops holding.
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    fn is_open(&self) -> bool {
        *self.0.borrow()
    }

    pub(super) async fn opened(&self) {
        // The sender is held by `self`.
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// A fault as it is written in a seed, or sent to the emulator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// What goes wrong.
    pub kind: Kind,
    /// Only requests whose target contains this.
    #[serde(default)]
    pub on: String,
    /// How often; until it is cleared if it is not given.
    #[serde(default)]
    pub times: Option<u32>,
    /// How much later, or how far off the clock is: `2s`, `-5m`.
    #[serde(default)]
    pub by: Option<String>,
    /// The status of what is answered instead.
    #[serde(default)]
    pub status: Option<u16>,
    /// Its error code.
    #[serde(default)]
    pub code: Option<String>,
    /// Its message.
    #[serde(default)]
    pub message: Option<String>,
    /// Its `Retry-After`.
    #[serde(default)]
    pub retry_after: Option<String>,
}

/// What goes wrong, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The answer comes later, `by` so much.
    Latency,
    /// No answer ever comes.
    Hang,
    /// The connection is reset instead of an answer.
    Reset,
    /// The answer breaks off in the middle of its body.
    Cut,
    /// The answer says it is JSON and is not.
    WrongJson,
    /// 401, as for a credential that is over.
    Unauthorized,
    /// 429, with `retry_after` if it is given.
    RateLimited,
    /// The provider took the grant back: `no_token`.
    RevokedGrant,
    /// An error with this `status` and `code`.
    Status,
    /// The emulator's clock is off, `by` so much.
    ClockSkew,
}

impl Kind {
    /// Each kind with its name, what goes wrong, and which parameters it takes besides `on` and `times`.
    pub const ALL: [(Self, &'static str, &'static str, &'static str); 10] = [
        (Self::Latency, "latency", "the answer comes later", "`by` (\"2s\")"),
        (Self::Hang, "hang", "no answer ever comes", ""),
        (Self::Reset, "reset", "the connection is reset", ""),
        (Self::Cut, "cut", "the answer breaks off in the middle", ""),
        (Self::WrongJson, "wrong_json", "the answer is no JSON", "`retry_after`"),
        (Self::Unauthorized, "unauthorized", "401, the credential is over", "`retry_after`"),
        (Self::RateLimited, "rate_limited", "429", "`retry_after` (\"30\")"),
        (Self::RevokedGrant, "revoked_grant", "422 `no_token`, the provider took the grant back", "`retry_after`"),
        (Self::Status, "status", "this status is answered", "`status` (200 to 599), `code`, `message`, `retry_after`"),
        (Self::ClockSkew, "clock_skew", "the emulator's clock is off", "`by` (\"2h\", \"-5m\"; ten years at the most)"),
    ];
}

/// What a script does.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Requests go wrong.
    Fault(Fault),
    /// The clock is off by this many seconds.
    Skew(i64),
}

impl Script {
    /// What it does; or what is wrong with it, and what would be right.
    pub fn effect(&self) -> Result<Effect, String> {
        let needs = |key: &str, example: &str| {
            let takes = Kind::ALL.iter().find(|(kind, ..)| *kind == self.kind);
            let (_, name, _, takes) = takes.copied().unwrap_or((self.kind, "this", "", ""));
            format!("this kind needs `{key}`, as {example}: {name} takes {takes}, `on` and `times`")
        };
        let duration = |text: &str| humantime::parse_duration(text).map_err(|_| needs("by", "\"2s\" or \"-5m\""));
        let by = || self.by.as_deref().ok_or_else(|| needs("by", "\"2s\""));
        let trouble = match self.kind {
            Kind::ClockSkew => {
                let by = by()?;
                let (sign, length) = by.strip_prefix('-').map_or((1, by), |length| (-1, length));
                let seconds = i64::try_from(duration(length)?.as_secs()).ok().filter(|seconds| *seconds <= MOST_SKEW);
                let seconds = seconds.ok_or_else(|| "`by` is ten years at the most".to_owned())?;
                return Ok(Effect::Skew(sign * seconds));
            }
            Kind::Latency => Trouble::Delay(duration(by()?)?),
            Kind::Hang => Trouble::Hang,
            Kind::Reset => Trouble::Reset,
            Kind::Cut => Trouble::Truncate,
            Kind::WrongJson => Fault::answer(200, "application/json", "{\"token\":").trouble,
            Kind::Unauthorized => refusal(&Refusal::new(Refused::ExpiredToken)),
            Kind::RevokedGrant => refusal(&Refusal::new(Refused::NoToken)),
            Kind::RateLimited => Fault::rate_limited(self.retry_after.as_deref()).trouble,
            Kind::Status => {
                let status = self.status.filter(|status| (200..600).contains(status));
                let status = status.ok_or_else(|| needs("status", "503, between 200 and 599"))?;
                let code = self.code.as_deref().unwrap_or("scripted");
                let message = self.message.as_deref().unwrap_or("A fault that the emulator was told to show.");
                let body = serde_json::json!({"error": {"code": code, "message": message}}).to_string();
                Fault::answer(status, "application/json", &body).trouble
            }
        };
        let trouble = match (trouble, &self.retry_after) {
            (Trouble::Answer { status, content_type, body, .. }, Some(after)) => {
                Trouble::Answer { status, content_type, body, headers: vec![("retry-after", after.clone())] }
            }
            (trouble, _) => trouble,
        };
        if self.retry_after.as_ref().is_some_and(|after| HeaderValue::from_str(after).is_err()) {
            return Err("`retry_after` must be what a header can hold, as \"30\"".into());
        }
        if self.times == Some(0) {
            return Err("`times` is 1 or more; leave it out for always".into());
        }
        Ok(Effect::Fault(Fault { trouble, on: self.on.clone(), left: self.times }))
    }
}

fn refusal(refusal: &Refusal) -> Trouble {
    let body = refusal.body().to_string();
    Fault::answer(refusal.status().as_u16(), "application/json", &body).trouble
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(script: &str) -> Result<Effect, String> {
        serde_json::from_str::<Script>(script).map_err(|e| e.to_string())?.effect()
    }

    #[test]
    fn a_script_that_lacks_something_says_what() {
        for (script, says) in [
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
            let wrong = effect(script).expect_err(script);
            assert!(wrong.contains(says), "{script}: {wrong}");
        }
        let wrong = effect(r#"{"kind":"latency"}"#).expect_err("`by` is missing");
        assert_eq!(wrong, r#"this kind needs `by`, as "2s": latency takes `by` ("2s"), `on` and `times`"#);
    }

    #[test]
    fn each_kind_is_documented_by_the_name_that_it_has_on_the_wire() {
        for (kind, name, ..) in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).expect("JSON"), name);
        }
        let unknown = effect(r#"{"kind":"x"}"#).expect_err("no such kind");
        assert_eq!(Kind::ALL.len(), unknown.matches('`').count() / 2 - 1, "{unknown}");
        let seed = include_str!("example-seed.toml");
        assert!(Kind::ALL.iter().all(|(_, name, ..)| seed.contains(name)));
    }

    #[test]
    fn a_script_strikes_as_often_as_it_says() {
        let Ok(Effect::Fault(mut fault)) = effect(r#"{"kind":"unauthorized","on":"/token/","times":2}"#) else {
            panic!("a fault")
        };
        assert!(fault.concerns("/v1/connect/token/x") && !fault.concerns("/v1/connect/connectors/x"));
        assert!(!fault.use_up() && fault.use_up());
        assert!(matches!(effect(r#"{"kind":"clock_skew","by":"-5m"}"#), Ok(Effect::Skew(-300))));
    }
}
