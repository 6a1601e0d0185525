//! Bytes of an env file → the text of the one token in it. Pure.
//!
//! Only the line that assigns [`KEY`] is ever looked at; every other line may be broken in any way. The line is found
//! by our own scan, because dotenvy given a whole file loses the token behind an apostrophe or a byte order mark on
//! an earlier line, and hands out values of our own environment for `$NAME`. dotenvy then reads quotes, blanks and
//! comments of that single line. No text of the file may appear in an error.

use secrecy::SecretString;

/// The one variable that is read (interface.md section 5).
pub const KEY: &str = "VERCEL_OIDC_TOKEN";

/// The outcome of a scan.
#[derive(Debug)]
pub enum Finding {
    /// The last assignment of the key has this value.
    Value {
        /// The value, unquoted.
        value: SecretString,
        /// How many lines assign the key.
        assignments: usize,
        /// The line has neither a closing quote nor a line end: its writer may not be done.
        open_ended: bool,
    },
    /// No line assigns the key, or the last one assigns nothing.
    Absent,
    /// The key is assigned in a form that is not taken.
    Refused(Refusal),
}

/// Why an assignment is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The file is UTF-16.
    #[error("the file is UTF-16, save it as UTF-8")]
    Utf16,
    /// A quote is opened and not closed.
    #[error("the value's closing quote is missing")]
    OpenQuote,
    /// The value holds `$`, a backtick or a backslash.
    #[error("the value contains `$`, a backtick or a backslash, nothing is expanded here")]
    Expansion,
    /// Anything else that dotenvy does not read.
    #[error("the assignment cannot be read")]
    Malformed,
}

/// Finds the token: the last assignment wins, as in dotenv, `@next/env`, Node's `--env-file` and python-dotenv.
pub fn find_token(bytes: &[u8]) -> Finding {
    if is_utf16(bytes) {
        return Finding::Refused(Refusal::Utf16);
    }
    let mut last = None;
    let mut assignments = 0;
    for line in Lines(bytes) {
        if let Some(value) = assigned_value(line.text) {
            assignments += 1;
            last = Some((value, line.ended));
        }
    }
    match last {
        None => Finding::Absent,
        Some((raw, ended)) => match read_value(raw) {
            Ok(value) if value.is_empty() => Finding::Absent,
            Ok(value) => {
                let open_ended = !ended && !matches!(raw.first(), Some(b'"' | b'\''));
                Finding::Value { value: value.into(), assignments, open_ended }
            }
            Err(refusal) => Finding::Refused(refusal),
        },
    }
}

fn is_utf16(bytes: &[u8]) -> bool {
    let little: Vec<u8> = KEY.bytes().flat_map(|b| [b, 0]).collect();
    bytes.starts_with(&[0xFF, 0xFE])
        || bytes.starts_with(&[0xFE, 0xFF])
        || bytes.windows(little.len()).any(|w| w == little)
}

struct Line<'a> {
    text: &'a [u8],
    ended: bool,
}

/// Lines ended by LF, CRLF or a lone CR.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        if self.0.is_empty() {
            return None;
        }
        let end = self.0.iter().position(|b| matches!(b, b'\n' | b'\r'));
        let (text, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest.get(1..).unwrap_or_default();
        Some(Line { text, ended: end.is_some() })
    }
}

/// The raw right-hand side if the line assigns [`KEY`], by the Vercel CLI's own grammar: byte order mark, blanks,
/// `export `, the name, blanks, `=`.
fn assigned_value(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line).trim_ascii_start();
    let line = match line.strip_prefix(b"export") {
        Some(rest) if rest.first().is_some_and(u8::is_ascii_whitespace) => rest.trim_ascii_start(),
        _ => line,
    };
    let value = line.strip_prefix(KEY.as_bytes())?.trim_ascii_start().strip_prefix(b"=")?;
    Some(value.trim_ascii())
}

/// Unquotes the right-hand side of the assignment.
fn read_value(raw: &[u8]) -> Result<String, Refusal> {
    let inner = match raw.first() {
        Some(&quote @ (b'"' | b'\'')) => {
            let inner = &raw[1..];
            let end = inner.iter().position(|&b| b == quote).ok_or(Refusal::OpenQuote)?;
            &inner[..end]
        }
        _ => raw.split(|b| b.is_ascii_whitespace() || *b == b'#').next().unwrap_or_default(),
    };
    if inner.iter().any(|b| matches!(b, b'$' | b'`' | b'\\')) {
        return Err(Refusal::Expansion);
    }
    let line = [KEY.as_bytes(), b"=", raw, b"\n"].concat();
    match dotenvy::from_read_iter(line.as_slice()).next() {
        // It joins what is quoted in parts: only what stands in the line as it is counts.
        Some(Ok((_, value))) if value.as_bytes() == inner => Ok(value),
        // dotenvy's error prints the line, which is the secret: it ends here.
        _ => Err(Refusal::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    fn value_in(file: &[u8]) -> Option<String> {
        match find_token(file) {
            Finding::Value { value, .. } => Some(value.expose_secret().to_owned()),
            _ => None,
        }
    }

    fn refusal_of(file: &[u8]) -> Option<Refusal> {
        match find_token(file) {
            Finding::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    #[test]
    fn reads_the_form_that_the_vercel_cli_writes() {
        let file = include_bytes!("../../tests/it/wire/env.local.example");
        assert_eq!(value_in(file).as_deref(), Some("eyJhbGciOiJSUzI1NiJ9.eyJleHAiOjE4MDAwMDAwMDB9.c2ln"));
    }

    #[test]
    fn reads_every_usual_way_to_write_the_line() {
        for line in [
            "VERCEL_OIDC_TOKEN=a.b.c",
            "VERCEL_OIDC_TOKEN=\"a.b.c\"\n",
            "VERCEL_OIDC_TOKEN='a.b.c'\n",
            "export VERCEL_OIDC_TOKEN=a.b.c\n",
            "  \texport \t VERCEL_OIDC_TOKEN = \"a.b.c\" \n",
            "VERCEL_OIDC_TOKEN=\"a.b.c\"\r\nX=1\r\n",
            "X=1\rVERCEL_OIDC_TOKEN=\"a.b.c\"\rY=2",
            "\u{feff}VERCEL_OIDC_TOKEN=\"a.b.c\"\n",
            "VERCEL_OIDC_TOKEN=\"a.b.c\" # costs $5\n",
            "VERCEL_OIDC_TOKEN=a.b.c # costs $5",
            "VERCEL_OIDC_TOKEN=\"a.b.c\"  ",
        ] {
            assert_eq!(value_in(line.as_bytes()).as_deref(), Some("a.b.c"), "{line:?}");
        }
    }

    #[test]
    fn other_lines_may_be_broken_in_any_way() {
        let file =
            b"this is bad\nA=it's\nB=\"open\nC=C:\\Users\nD=\xe9\0\nMY-KEY=1\n=\nVERCEL_OIDC_TOKEN=\"a.b.c\"\nE='";
        assert_eq!(value_in(file).as_deref(), Some("a.b.c"));
    }

    #[test]
    fn the_last_assignment_wins_and_duplicates_are_counted() {
        match find_token(b"VERCEL_OIDC_TOKEN=a\n#VERCEL_OIDC_TOKEN=c\nVERCEL_OIDC_TOKEN=b\n") {
            Finding::Value { value, assignments: 2, .. } => assert_eq!(value.expose_secret(), "b"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_that_merely_looks_like_the_key_is_taken() {
        for file in [
            "",
            "VERCEL_OIDC_TOKEN",
            "VERCEL_OIDC_TOKEN=",
            "VERCEL_OIDC_TOKEN=\"\"\n",
            "VERCEL_OIDC_TOKEN= # none\n",
            "VERCEL_OIDC_TOKEN_OLD=a.b.c",
            "MY_VERCEL_OIDC_TOKEN=a.b.c",
            "exportVERCEL_OIDC_TOKEN=a.b.c",
            "# VERCEL_OIDC_TOKEN=a.b.c",
            "vercel_oidc_token=a.b.c",
        ] {
            assert!(matches!(find_token(file.as_bytes()), Finding::Absent), "{file:?}");
        }
    }

    #[test]
    fn nothing_is_expanded_or_guessed() {
        for value in ["$HOME", "\"${HOME}\"", "$(id)", "`id`", "\"a\\nb\"", "'$HOME'"] {
            let file = format!("VERCEL_OIDC_TOKEN={value}\n");
            assert_eq!(refusal_of(file.as_bytes()), Some(Refusal::Expansion), "{value}");
        }
        assert_eq!(refusal_of(b"VERCEL_OIDC_TOKEN=\"a.b.c"), Some(Refusal::OpenQuote));
        for value in ["a.b.c d", "a.'b'.c", "'a.b'\".c\"", "\"a.b.c\"d"] {
            let file = format!("VERCEL_OIDC_TOKEN={value}\n");
            assert_eq!(refusal_of(file.as_bytes()), Some(Refusal::Malformed), "{value}");
        }
        assert_eq!(refusal_of(b"VERCEL_OIDC_TOKEN=\xff\xfe\n"), Some(Refusal::Malformed));
    }

    #[test]
    fn utf16_is_named_whether_or_not_it_is_marked() {
        let wide: Vec<u8> = "X=1\nVERCEL_OIDC_TOKEN=a".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(refusal_of(&wide), Some(Refusal::Utf16));
        assert_eq!(refusal_of(b"\xff\xfeX\0"), Some(Refusal::Utf16));
        assert_eq!(refusal_of(b"\xfe\xff\0X"), Some(Refusal::Utf16));
    }

    #[test]
    fn only_a_bare_value_at_the_very_end_is_open_ended() {
        for (file, expected) in [
            ("VERCEL_OIDC_TOKEN=a.b.c", true),
            ("VERCEL_OIDC_TOKEN=a.b.c\n", false),
            ("VERCEL_OIDC_TOKEN=\"a.b.c\"", false),
            ("VERCEL_OIDC_TOKEN='a.b.c'", false),
        ] {
            match find_token(file.as_bytes()) {
                Finding::Value { open_ended, .. } => assert_eq!(open_ended, expected, "{file:?}"),
                other => panic!("{other:?}"),
            }
        }
    }

    proptest! {
        #[test]
        fn never_loses_a_well_formed_line_whatever_surrounds_it(
            before in proptest::collection::vec(any::<u8>(), 0..200),
            after in proptest::collection::vec(any::<u8>(), 0..200),
            token in "[A-Za-z0-9_-]{1,40}\\.[A-Za-z0-9_-]{1,40}\\.[A-Za-z0-9_-]{1,40}",
        ) {
            let line = format!("\nVERCEL_OIDC_TOKEN=\"{token}\"\n");
            let file = [before.as_slice(), line.as_bytes(), after.as_slice()].concat();
            prop_assume!(!is_utf16(&file));
            prop_assume!(!after.windows(KEY.len()).any(|w| w == KEY.as_bytes()));
            prop_assert_eq!(value_in(&file), Some(token));
        }

        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = find_token(&bytes);
        }
    }
}
