//! Output to a terminal: colours, and escaping of untrusted text, which must not move the cursor, start a line or
//! reorder the text around it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};

/// Whether output is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Palette {
    is_colored: bool,
}

/// How text is highlighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// Titles.
    Bold,
    /// Secondary text.
    Dim,
    /// Errors.
    Red,
    /// Success.
    Green,
    /// Warnings.
    Yellow,
    /// Labels of errors.
    BoldRed,
    /// Labels of success.
    BoldGreen,
    /// Labels of warnings.
    BoldYellow,
    /// Labels of notes.
    BoldCyan,
}

impl Color {
    /// The parameters of its SGR sequence (ECMA-48).
    const fn sgr(self) -> &'static str {
        match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Red => "31",
            Self::Green => "32",
            Self::Yellow => "33",
            Self::BoldRed => "1;31",
            Self::BoldGreen => "1;32",
            Self::BoldYellow => "1;33",
            Self::BoldCyan => "1;36",
        }
    }
}

impl Palette {
    /// A palette with or without colours.
    pub fn new(is_colored: bool) -> Self {
        Self { is_colored }
    }

    /// Colours if the stream is a terminal that supports them and `NO_COLOR` is not set (no-color.org).
    pub fn of(stream: &impl IsTerminal) -> Self {
        Self::new(is_capable(stream) && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()))
    }

    /// The text in this colour, if there are colours.
    pub fn paint(self, color: Color, text: &str) -> String {
        if self.is_colored { format!("\x1b[{}m{text}\x1b[0m", color.sgr()) } else { text.to_owned() }
    }
}

/// Whether the stream is a terminal that supports escape sequences.
pub fn is_capable(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// The text with control and bidirectional formatting characters escaped.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if is_control_or_bidi(c) => {
                let _ = write!(out, "{}", c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out
}

/// Prints a warning to stderr. A closed stderr is ignored.
pub fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "warning: {}", escaped(text));
}

/// Prints a note to stderr. A closed stderr is ignored.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "note: {}", escaped(text));
}

/// JSON for this stream. On a terminal, the characters that [`escaped`] would escape are written as `\uXXXX`, which
/// does not change the value.
pub fn json_for(stream: &impl IsTerminal, json: String) -> String {
    if stream.is_terminal() { escaped_json(&json) } else { json }
}

fn escaped_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            // Whitespace between values. In strings it is already escaped.
            '\n' => out.push(c),
            c if is_control_or_bidi(c) => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// Whether it is a control character or a bidirectional formatting character.
pub fn is_control_or_bidi(c: char) -> bool {
    c.is_control() || is_bidi(c)
}

fn is_bidi(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrusted_text_is_escaped() {
        assert_eq!(escaped("slack/acme é"), "slack/acme é");
        assert_eq!(escaped("a\x1b[2J\r\n\u{9b}\u{202e}\u{61c}"), r"a\u{1b}[2J\u{d}\u{a}\u{9b}\u{202e}\u{61c}");
    }

    #[test]
    fn json_for_a_terminal_has_the_same_value() {
        let value = serde_json::json!({"a\u{9b}31m": "\u{1b}\n\u{7f}\u{202e}\u{61c} é 😀"});
        let shown = escaped_json(&format!("{value}\n"));
        assert_eq!(shown, "{\"a\\u009b31m\":\"\\u001b\\n\\u007f\\u202e\\u061c é 😀\"}\n");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), value);
    }

    #[test]
    fn text_is_coloured_only_with_colours() {
        assert_eq!(Palette::new(true).paint(Color::Red, "x"), "\x1b[31mx\x1b[0m");
        assert_eq!(Palette::new(false).paint(Color::Red, "x"), "x");
    }
}
