//! What to do about an error: one type for error responses, events, log lines, the status and `doctor`.
//!
//! The command to paste has its own field, so that it need not be extracted from a sentence.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What to do about an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remedy {
    /// Advice for people. If a command is enough, that command.
    pub hint: Cow<'static, str>,
    /// A command for a shell, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Cow<'static, str>>,
}

impl Remedy {
    /// A command that fixes the error, complete and quoted for a shell.
    pub fn run(command: impl Into<Cow<'static, str>>) -> Self {
        let command = command.into();
        Self { hint: command.clone(), command: Some(command) }
    }

    /// Advice without a command.
    pub fn advice(hint: impl Into<Cow<'static, str>>) -> Self {
        Self { hint: hint.into(), command: None }
    }

    /// Adds the command that the advice is about.
    pub fn with_command(mut self, command: impl Into<Cow<'static, str>>) -> Self {
        self.command = Some(command.into());
        self
    }

    /// An error message followed by the remedy, unless the message contains the command or the advice already.
    pub fn after(&self, message: &str) -> String {
        let Self { hint, command } = self;
        match message.contains(&**command.as_ref().unwrap_or(hint)) {
            true => message.to_owned(),
            false => format!("{}: {self}", message.trim_end_matches('.')),
        }
    }
}

/// The end of a sentence: "run `vercel env pull`", or the advice.
impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.command {
            Some(command) if *command == self.hint => write!(f, "run `{command}`"),
            Some(command) if !self.hint.contains(&**command) => write!(f, "{}: run `{command}`", self.hint),
            _ => f.write_str(&self.hint),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_in_the_message_is_not_repeated() {
        let pull = Remedy::run("vercel env pull");
        for (remedy, message, line) in [
            (&pull, "It expired.", "It expired: run `vercel env pull`"),
            (&pull, "It expired. Run `vercel env pull`.", "It expired. Run `vercel env pull`."),
            (&Remedy::advice("try again"), "It broke off.", "It broke off: try again"),
        ] {
            assert_eq!(remedy.after(message), line);
        }
    }

    #[test]
    fn the_command_is_a_field_of_its_own() {
        for (remedy, json, words) in [
            (
                Remedy::run("vercel env pull"),
                r#"{"hint":"vercel env pull","command":"vercel env pull"}"#,
                "run `vercel env pull`",
            ),
            (Remedy::advice("try again"), r#"{"hint":"try again"}"#, "try again"),
            (
                Remedy::advice("install the app").with_command("vercel connect open x"),
                r#"{"hint":"install the app","command":"vercel connect open x"}"#,
                "install the app: run `vercel connect open x`",
            ),
            (
                Remedy::advice("set the clock, as with `date`").with_command("date"),
                r#"{"hint":"set the clock, as with `date`","command":"date"}"#,
                "set the clock, as with `date`",
            ),
        ] {
            assert_eq!(serde_json::to_string(&remedy).expect("JSON"), json);
            assert_eq!(serde_json::from_str::<Remedy>(json).expect("a remedy"), remedy);
            assert_eq!(remedy.to_string(), words);
        }
    }
}
