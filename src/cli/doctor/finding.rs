//! One thing that was found out, and all of them as text or JSON.
//!
//! Foreign text (names of projects, files, processes, what a server said) is escaped when it is printed. Nothing secret may
//! stand in a finding: of a token only its fingerprint.

use std::borrow::Cow;
use std::fmt::Write;

use serde::Serialize;

use crate::os::terminal::escaped;
use crate::remedy::Remedy;

/// How much it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// A request would fail, now or soon.
    Problem,
    /// Something is not as it should be.
    Warning,
    /// Good to know.
    Note,
    /// It was checked and is well.
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

    /// SGR parameters.
    const fn color(self) -> &'static str {
        match self {
            Self::Problem => "1;31",
            Self::Warning => "1;33",
            Self::Note => "1;36",
            Self::Ok => "1;32",
        }
    }
}

/// One thing that was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// Stable: scripts go by it.
    pub(super) code: Cow<'static, str>,
    /// What.
    pub(super) title: String,
    /// Why it matters.
    pub(super) detail: String,
    /// What to run or change.
    pub(super) hint: Option<String>,
    /// The command that mends it.
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

    /// All is well there.
    pub(super) fn ok(code: &'static str, title: impl Into<String>) -> Self {
        Self::new(Severity::Ok, code, title, "")
    }

    /// The command that mends it.
    pub(super) fn fix(self, command: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::run(command))
    }

    /// What mends it, in words.
    pub(super) fn advice(self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.remedy(Remedy::advice(hint))
    }

    /// What mends it.
    pub(super) fn remedy(mut self, Remedy { hint, command }: Remedy) -> Self {
        self.hint = Some(hint.into_owned());
        self.fix = command.map(Cow::into_owned);
        self
    }
}

/// All findings, the worst first.
pub(super) struct Report(Vec<Finding>);

impl Report {
    pub(super) fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.severity);
        Self(findings)
    }

    /// Whether requests would be served, now and soon.
    pub(super) fn is_ok(&self) -> bool {
        self.count(Severity::Problem) == 0
    }

    fn count(&self, severity: Severity) -> usize {
        self.0.iter().filter(|finding| finding.severity == severity).count()
    }

    /// One object on one line.
    pub(super) fn json(&self) -> String {
        #[derive(Serialize)]
        struct Shape<'a> {
            version: u32,
            ok: bool,
            findings: Vec<Shown<'a>>,
        }
        #[derive(Serialize)]
        struct Shown<'a> {
            #[serde(flatten)]
            finding: &'a Finding,
            /// `fix` by the name that it has everywhere else.
            command: Option<&'a str>,
        }
        let shown = |finding| Shown { finding, command: finding.fix.as_deref() };
        let shape = Shape { version: 1, ok: self.is_ok(), findings: self.0.iter().map(shown).collect() };
        // Texts can always be written.
        serde_json::to_string(&shape).unwrap_or_default() + "\n"
    }

    /// A block for each finding, one for all that is well, and a last line that counts.
    pub(super) fn text(&self, color: bool) -> String {
        let label = |severity: Severity| {
            let name = format!("{:<8}", severity.name());
            if color { format!("\x1b[{}m{name}\x1b[0m", severity.color()) } else { name }
        };
        let mut text = String::new();
        for finding in self.0.iter().filter(|finding| finding.severity != Severity::Ok) {
            let _ = writeln!(text, "{} {}", label(finding.severity), indented(&escaped(&finding.title)));
            if !finding.detail.is_empty() {
                let _ = writeln!(text, "{:9}{}", "", indented(&escaped(&finding.detail)));
            }
            if let Some(hint) = finding.hint.as_ref().filter(|hint| finding.fix.as_ref() != Some(hint)) {
                let _ = writeln!(text, "{:9}{}", "", indented(&escaped(hint)));
            }
            if let Some(fix) = &finding.fix {
                let _ = writeln!(text, "{:9}fix: {}", "", escaped(fix));
            }
            text.push('\n');
        }
        let well: Vec<_> = self.0.iter().filter(|f| f.severity == Severity::Ok).map(|f| escaped(&f.title)).collect();
        if !well.is_empty() {
            let _ = writeln!(text, "{} {}\n", label(Severity::Ok), indented(&well.join("; ")));
        }
        let counted = |severity: Severity| {
            let (count, name) = (self.count(severity), severity.name());
            format!("{count} {name}{}", if count == 1 { "" } else { "s" })
        };
        let _ = writeln!(text, "{}", [Severity::Problem, Severity::Warning, Severity::Note].map(counted).join(", "));
        text
    }
}

/// In lines of at most 90 characters where words permit, all but the first indented to stand below it.
fn indented(text: &str) -> String {
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
    fn the_worst_comes_first_and_what_is_well_is_summed_up() {
        let text = report().text(false);
        let expected = "problem  d\n         fix: mend 'd'\n\nnote     b\\u{1b}[2J\\u{202e}\n         why\n         try\\u{a}again\n\n\
                        ok       all of a; c\n\n1 problem, 0 warnings, 1 note\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn color_is_about_the_labels_alone() {
        let plain: String = report().text(false);
        let mut colored = report().text(true);
        for code in ["\x1b[1;31m", "\x1b[1;33m", "\x1b[1;36m", "\x1b[1;32m", "\x1b[0m"] {
            colored = colored.replace(code, "");
        }
        assert_eq!(colored, plain);
        assert_ne!(report().text(true), plain);
    }

    #[test]
    fn json_has_every_field_of_every_finding() {
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
