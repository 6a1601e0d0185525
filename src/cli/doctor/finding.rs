//! Findings, and the report of all findings as text or JSON.
//!
//! Foreign text (names of projects, files and processes, messages of servers) is escaped when it is printed. A finding
//! contains no secret; a token is named by its fingerprint.

use std::borrow::Cow;
use std::fmt::Write;

use serde::Serialize;

use crate::os::terminal::{Color, Palette, escaped};
use crate::remedy::Remedy;

/// How severe a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// A request would fail, now or soon.
    Problem,
    /// Something is wrong, but requests succeed.
    Warning,
    /// Good to know.
    Note,
    /// The check passed.
    Ok,
}

impl Severity {
    const fn name(self) -> &'static str {
        match self {
            Self::Problem => "problem",
            Self::Warning => "warning",
            Self::Note => "note",
            Self::Ok => "ok",
        }
    }

    const fn color(self) -> Color {
        match self {
            Self::Problem => Color::BoldRed,
            Self::Warning => Color::BoldYellow,
            Self::Note => Color::BoldCyan,
            Self::Ok => Color::BoldGreen,
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// Stable; scripts may rely on it.
    pub(super) code: Cow<'static, str>,
    /// What was found.
    pub(super) title: String,
    /// Why it matters.
    pub(super) detail: String,
    /// What to run or change.
    pub(super) hint: Option<String>,
    /// The command that fixes it.
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn new(
        severity: Severity,
        code: impl Into<Cow<'static, str>>,
        title: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        Self { severity, code: code.into(), title: title.into(), detail: detail.into(), hint: None, fix: None }
    }

    /// A check that passed.
    pub(super) fn ok(code: &'static str, title: impl Into<String>) -> Self {
        Self::new(Severity::Ok, code, title, "")
    }

    /// Adds the command that fixes it.
    pub(super) fn fix(self, command: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::run(command))
    }

    /// Adds what to do about it, in words.
    pub(super) fn advice(self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::advice(hint))
    }

    /// Adds what to do about it.
    pub(super) fn remedy(mut self, Remedy { hint, command }: Remedy) -> Self {
        self.hint = Some(hint.into_owned());
        self.fix = command.map(Cow::into_owned);
        self
    }
}

/// All findings, the most severe first.
pub(super) struct Report(Vec<Finding>);

impl Report {
    pub(super) fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.severity);
        Self(findings)
    }

    /// Whether there is no problem.
    pub(super) fn is_ok(&self) -> bool {
        self.count(Severity::Problem) == 0
    }

    fn count(&self, severity: Severity) -> usize {
        self.0.iter().filter(|finding| finding.severity == severity).count()
    }

    /// One object on one line.
    pub(super) fn json(&self) -> String {
        #[derive(Serialize)]
        struct JsonReport<'a> {
            version: u32,
            ok: bool,
            findings: Vec<JsonFinding<'a>>,
        }
        #[derive(Serialize)]
        struct JsonFinding<'a> {
            #[serde(flatten)]
            finding: &'a Finding,
            /// `fix` under the name used in all other JSON.
            command: Option<&'a str>,
        }
        let finding = |finding| JsonFinding { finding, command: finding.fix.as_deref() };
        let report = JsonReport { version: 1, ok: self.is_ok(), findings: self.0.iter().map(finding).collect() };
        // Serializing strings cannot fail.
        serde_json::to_string(&report).unwrap_or_default() + "\n"
    }

    /// A block for each finding, one for all passed checks, and a line with the counts.
    pub(super) fn text(&self, palette: Palette) -> String {
        let label = |severity: Severity| palette.paint(severity.color(), &format!("{:<8}", severity.name()));
        let mut text = String::new();
        for finding in self.0.iter().filter(|finding| finding.severity != Severity::Ok) {
            let _ = writeln!(text, "{} {}", label(finding.severity), wrapped(&escaped(&finding.title)));
            if !finding.detail.is_empty() {
                let _ = writeln!(text, "{:9}{}", "", wrapped(&escaped(&finding.detail)));
            }
            if let Some(hint) = finding.hint.as_ref().filter(|hint| finding.fix.as_ref() != Some(hint)) {
                let _ = writeln!(text, "{:9}{}", "", wrapped(&escaped(hint)));
            }
            if let Some(fix) = &finding.fix {
                let _ = writeln!(text, "{:9}fix: {}", "", escaped(fix));
            }
            text.push('\n');
        }
        let passed: Vec<_> = self.0.iter().filter(|f| f.severity == Severity::Ok).map(|f| escaped(&f.title)).collect();
        if !passed.is_empty() {
            let _ = writeln!(text, "{} {}\n", label(Severity::Ok), wrapped(&passed.join("; ")));
        }
        let counted = |severity: Severity| {
            let (count, name) = (self.count(severity), severity.name());
            format!("{count} {name}{}", if count == 1 { "" } else { "s" })
        };
        let _ = writeln!(text, "{}", [Severity::Problem, Severity::Warning, Severity::Note].map(counted).join(", "));
        text
    }
}

/// Wraps a text into lines of at most 90 characters, all but the first indented to the column of the first.
fn wrapped(text: &str) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > 90 {
            out.push_str("\n         ");
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += width;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn report() -> Report {
        Report::new(vec![
            Finding::ok("a", "all of a"),
            Finding::new(Severity::Note, "b", "b\x1b[2J\u{202e}", "why").advice("try\nagain"),
            Finding::ok("c", "c"),
            Finding::new(Severity::Problem, "d", "d", "").fix("mend 'd'"),
        ])
    }

    #[test]
    fn the_most_severe_comes_first_and_passed_checks_are_one_block() {
        let text = report().text(Palette::new(false));
        let expected = "problem  d\n         fix: mend 'd'\n\nnote     b\\u{1b}[2J\\u{202e}\n         why\n         try\\u{a}again\n\n\
                        ok       all of a; c\n\n1 problem, 0 warnings, 1 note\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn only_labels_are_colored() {
        let plain: String = report().text(Palette::new(false));
        let mut colored = report().text(Palette::new(true));
        for code in ["\x1b[1;31m", "\x1b[1;33m", "\x1b[1;36m", "\x1b[1;32m", "\x1b[0m"] {
            colored = colored.replace(code, "");
        }
        assert_eq!(colored, plain);
        assert_ne!(report().text(Palette::new(true)), plain);
    }

    #[test]
    fn json_has_all_fields_of_every_finding() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).expect("JSON");
        assert_eq!((&json["version"], &json["ok"]), (&1.into(), &false.into()));
        let first = serde_json::json!(
            {"severity": "problem", "code": "d", "title": "d", "detail": "", "hint": "mend 'd'", "fix": "mend 'd'",
            "command": "mend 'd'"});
        assert_eq!(json["findings"][0], first);
        let b = &json["findings"][1];
        assert_eq!((&b["hint"], &b["fix"], &b["command"]), (&"try\nagain".into(), &Value::Null, &Value::Null));
        assert!(Report::new(vec![Finding::ok("a", "a")]).is_ok());
    }
}
