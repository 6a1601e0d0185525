//! Scripted faults: how an answer is delayed, spoiled or withheld.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

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
