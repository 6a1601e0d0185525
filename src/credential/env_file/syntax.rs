//! The env file syntaxes of common loaders. Pure.
//!
//! Variables are expanded by dotenvy only, which is called itself. Its values may contain values of our environment and
//! are for comparison only. As in the loaders, invalid UTF-8 is replaced.

use std::sync::LazyLock;

use regex_lite::Regex;

/// The syntax of a loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// The npm package dotenv 17, used by Next.js, Astro and Nuxt.
    Dotenv,
    /// `util.parseEnv` of Node 22 and 24, used by Vite 8.
    Node,
    /// python-dotenv 1.
    Python,
    /// The crate dotenvy 0.15, which stops at the first line that it cannot parse.
    Dotenvy,
}

impl Syntax {
    /// All values that the text assigns to `key`, in order.
    pub fn values(self, key: &str, text: &str) -> Vec<String> {
        match self {
            Self::Dotenv => dotenv(key, text),
            Self::Node => node(key, text),
            Self::Python => python(key, text),
            Self::Dotenvy => dotenvy(key, text),
        }
    }
}

/// The regular expression of dotenv, with JavaScript's `\s` written out.
static DOTENV_ASSIGNMENT: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r#"(?m)^\s*(?:export\s+)?([\w.-]+)(?:\s*=\s*?|:\s+?)(\s*'(?:\\'|[^'])*'|\s*"(?:\\"|[^"])*"|\s*`(?:\\`|[^`])*`|[^#\r\n]+)?\s*(?:#.*)?$"#;
    let blank = r"[\t\n\x0B\x0C\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}]";
    expression(&pattern.replace(r"\s", blank))
});

fn is_javascript_blank(c: char) -> bool {
    // Unicode whitespace without U+0085, and the byte order mark.
    (c.is_whitespace() && c != '\u{85}') || c == '\u{FEFF}'
}

fn dotenv(key: &str, text: &str) -> Vec<String> {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let assignments = DOTENV_ASSIGNMENT.captures_iter(&text).filter(|captures| &captures[1] == key);
    let values = assignments.map(|captures| {
        let value = captures.get(2).map_or("", |value| value.as_str()).trim_matches(is_javascript_blank);
        let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"' | '`'));
        let inner = quote.and_then(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value);
        match quote {
            Some('"') => inner.replace("\\n", "\n").replace("\\r", "\r"),
            _ => inner.to_owned(),
        }
    });
    values.collect()
}

fn dotenvy(key: &str, text: &str) -> Vec<String> {
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    // The error is dropped, because it contains the line and so maybe the secret.
    let assignments = ::dotenvy::from_read_iter(text.as_bytes()).map_while(Result::ok);
    assignments.filter(|(name, _)| name == key).map(|(_, value)| value).collect()
}

const NODE_BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

fn node(key: &str, text: &str) -> Vec<String> {
    let text = text.replace('\r', "");
    let mut rest = text.trim_matches(NODE_BLANKS);
    let mut values = Vec::new();
    while !rest.is_empty() {
        if rest.starts_with(['\n', '#']) {
            rest = after_line(rest);
            continue;
        }
        let Some(end) = rest.find(['=', '\n']) else { break };
        let (name, tail) = rest.split_at(end);
        if tail.starts_with('\n') {
            rest = tail.trim_start_matches(NODE_BLANKS);
            continue;
        }
        rest = &tail[1..];
        let mut name = name.trim_matches(NODE_BLANKS);
        if name.is_empty() {
            continue;
        }
        if let Some(exported) = name.strip_prefix("export ") {
            name = exported.trim_matches(NODE_BLANKS);
        }
        let value;
        (value, rest) = node_value(rest);
        if name == key {
            values.push(value);
        }
    }
    values
}

/// The value at the start of the text, and the rest after its line.
fn node_value(text: &str) -> (String, &str) {
    if let Some(rest) = text.strip_prefix('\n') {
        return (String::new(), rest);
    }
    let text = text.trim_start_matches(NODE_BLANKS);
    if let Some(quote) = text.chars().next().filter(|c| matches!(c, '\'' | '"' | '`'))
        && let Some((inner, tail)) = text[1..].split_once(quote)
    {
        let inner = if quote == '"' { inner.replace("\\n", "\n") } else { inner.to_owned() };
        return (inner, after_line(tail));
    }
    let line = text.split('\n').next().unwrap_or_default();
    let is_open_quote = line.starts_with(['\'', '"', '`']);
    let value = if is_open_quote { line } else { line.split('#').next().unwrap_or_default() };
    (value.trim_matches(NODE_BLANKS).to_owned(), after_line(text).trim_start_matches(NODE_BLANKS))
}

fn after_line(text: &str) -> &str {
    text.split_once('\n').map_or("", |(_, rest)| rest)
}

fn python(key: &str, text: &str) -> Vec<String> {
    let mut rest = text.strip_prefix('\u{FEFF}').unwrap_or(text).trim_start();
    let mut values = Vec::new();
    while !rest.is_empty() {
        match python_binding(rest) {
            Ok((name, value, tail)) => {
                if name == key {
                    values.push(value);
                }
                rest = tail.trim_start();
            }
            // The rest of a line that cannot be parsed is skipped.
            Err(at) => rest = at.find(['\n', '\r']).map_or("", |end| at[end..].trim_start()),
        }
    }
    values
}

/// A name, its value (empty for a name alone) and the rest; or the position at which parsing failed.
fn python_binding(text: &str) -> Result<(&str, String, &str), &str> {
    let blank = |c: char| c.is_whitespace() && !matches!(c, '\n' | '\r');
    let comment = |text: &'_ str| text.find(['\n', '\r']).unwrap_or(text.len());
    if text.starts_with('#') {
        return Ok(("", String::new(), &text[comment(text)..]));
    }
    let exported = text.strip_prefix("export").filter(|rest| rest.starts_with(blank));
    let text = exported.map_or(text, |rest| rest.trim_start_matches(blank));
    let (name, rest) = match text.strip_prefix('\'') {
        Some(quoted) => quoted.split_once('\'').ok_or(text)?,
        None => text.split_at(text.find(|c: char| c.is_whitespace() || matches!(c, '=' | '#')).unwrap_or(text.len())),
    };
    if name.is_empty() {
        return Err(text);
    }
    let rest = rest.trim_start_matches(blank);
    let (value, rest) = match rest.strip_prefix('=') {
        None => (String::new(), rest),
        Some(raw) => {
            let value = raw.trim_start_matches(blank);
            match value.chars().next() {
                Some('#') if value.len() < raw.len() => (String::new(), value),
                Some(quote @ ('\'' | '"')) => {
                    let end = closing(&value[1..], quote).ok_or(value)?;
                    let (inner, tail) = value[1..].split_at(end);
                    let inner =
                        if quote == '"' { inner.replace("\\n", "\n").replace("\\r", "\r") } else { inner.into() };
                    (inner, &tail[1..])
                }
                _ => {
                    let (line, tail) = value.split_at(comment(value));
                    let hash =
                        line.char_indices().find(|&(at, c)| c == '#' && line[..at].ends_with(char::is_whitespace));
                    (line[..hash.map_or(line.len(), |(at, _)| at)].trim_end().to_owned(), tail)
                }
            }
        }
    };
    let rest = rest.trim_start_matches(blank);
    let rest = if rest.starts_with('#') { &rest[comment(rest)..] } else { rest };
    if rest.is_empty() || rest.starts_with(['\n', '\r']) { Ok((name, value, rest)) } else { Err(rest) }
}

/// The position of the first unescaped quote.
fn closing(text: &str, quote: char) -> Option<usize> {
    let mut is_escaped = false;
    text.char_indices().find_map(|(at, c)| {
        let closes = c == quote && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        closes.then_some(at)
    })
}

fn expression(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap_or_else(|e| unreachable!("{pattern}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::super::KEY;
    use super::super::cases::CASES;
    use super::*;

    #[test]
    fn dotenvy_stops_at_the_first_line_that_it_cannot_parse() {
        for (text, values) in [
            ("K=one\nK=two\n", &["one", "two"][..]),
            ("\u{FEFF}K=\"one\"\n", &["one"]),
            ("A=it's\nK=one\n", &[]),
            ("K=one\nno assignment\nK=two\n", &["one"]),
            ("K: one\n", &[]),
        ] {
            assert_eq!(Syntax::Dotenvy.values("K", text), values, "{text:?}");
        }
    }

    #[test]
    fn each_syntax_reads_what_its_loader_was_observed_to_read() {
        for case in CASES {
            let file = case.file("T1", "T2");
            for (syntax, value) in [Syntax::Dotenv, Syntax::Node, Syntax::Python].into_iter().zip(case.values) {
                let taken = syntax.values(KEY, &file).pop().unwrap_or_default();
                assert_eq!(taken, value.replace("KEY", KEY), "{syntax:?}: {} {file:?}", case.name);
            }
        }
    }
}
