//! Finds the token in the bytes of an env file. Pure.
//!
//! The value must be the one that the app reads. If dotenv (used by Next.js) and Node (used by Vite) read the same
//! value, it is that. Otherwise it is the value of the last line that plainly assigns [`KEY`], if one of them reads the
//! same. The rest of the file may be malformed. Nothing is expanded, because that could send values of our own
//! environment. Errors contain no text of the file.

#[cfg(test)]
pub(crate) mod cases;
pub mod syntax;

use secrecy::SecretString;

use self::syntax::Syntax;

/// The variable that is read.
pub const KEY: &str = "VERCEL_OIDC_TOKEN";

/// The result of [`find_token`].
#[derive(Debug)]
pub enum Finding {
    /// The last assignment of the key has this value.
    Value {
        /// The value without quotes, and without surrounding whitespace, which would not be valid in a header.
        value: SecretString,
        /// How many times the key is assigned.
        assignments: usize,
        /// Its line has neither a closing quote nor a line end, so it may not be completely written.
        open_ended: bool,
    },
    /// The key is not assigned, or the last assignment is empty.
    Absent,
    /// The key is assigned in a form that is not accepted.
    Refused(Refusal),
}

/// Why an assignment is not accepted.
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
    /// The value is encrypted by dotenvx.
    #[error("the value is encrypted by dotenvx, decrypt it or pull the file anew")]
    Encrypted,
    /// The value is `[SENSITIVE]`, which `vercel env pull` writes for values that it must not show.
    #[error("its value was withheld by `vercel env pull`")]
    Withheld,
    /// dotenv and Node read different values, and neither is that of the last plain line.
    #[error("programs that read the file take different values for it")]
    Ambiguous,
    /// The value is not a plain word for another reason.
    #[error("the assignment cannot be read")]
    Malformed,
}

/// Finds the token. The last assignment counts, as in dotenv, `@next/env`, Node's `--env-file` and python-dotenv.
pub fn find_token(bytes: &[u8]) -> Finding {
    if is_utf16(bytes) {
        return Finding::Refused(Refusal::Utf16);
    }
    if !bytes.windows(KEY.len()).any(|window| window == KEY.as_bytes()) {
        return Finding::Absent;
    }
    let text = String::from_utf8_lossy(bytes);
    let (dotenv, node) = (Syntax::Dotenv.values(KEY, &text), Syntax::Node.values(KEY, &text));
    let last = |values: &[String]| values.last().map_or(String::new(), |value| value.trim_ascii().to_owned());
    let readers = [last(&dotenv), last(&node)];
    let value = match &readers {
        [one, other] if one == other => plain(one),
        _ => last_plain_line(bytes).and_then(|value| match value.is_empty() || readers.contains(&value) {
            true => Ok(value),
            false => Err(Refusal::Ambiguous),
        }),
    };
    match value {
        Ok(value) if value.is_empty() => Finding::Absent,
        Ok(value) => Finding::Value {
            value: value.into(),
            assignments: dotenv.len().max(node.len()),
            open_ended: is_open_ended(bytes),
        },
        Err(refusal) => Finding::Refused(refusal),
    }
}

fn is_utf16(bytes: &[u8]) -> bool {
    let little: Vec<u8> = KEY.bytes().flat_map(|b| [b, 0]).collect();
    bytes.starts_with(&[0xFF, 0xFE])
        || bytes.starts_with(&[0xFE, 0xFF])
        || bytes.windows(little.len()).any(|w| w == little)
}

/// The lines, separated by LF, CRLF or CR.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|b| matches!(b, b'\n' | b'\r'))
}

/// Whether the last line assigns the key an unquoted value, which may not be completely written.
fn is_open_ended(bytes: &[u8]) -> bool {
    let value = lines(bytes).last().and_then(assigned_value);
    value.is_some_and(|value| !matches!(value.first(), None | Some(b'"' | b'\'' | b'`')))
}

/// The value of the last line that assigns the key, without regard to the lines around it.
fn last_plain_line(bytes: &[u8]) -> Result<String, Refusal> {
    lines(bytes).filter_map(assigned_value).last().map_or(Ok(String::new()), read_value)
}

/// The raw right-hand side if the line assigns [`KEY`], by the grammar of the Vercel CLI: byte order mark, whitespace,
/// `export `, the name, whitespace, `=`.
fn assigned_value(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line).trim_ascii_start();
    let line = match line.strip_prefix(b"export") {
        Some(rest) if rest.first().is_some_and(u8::is_ascii_whitespace) => rest.trim_ascii_start(),
        _ => line,
    };
    let value = line.strip_prefix(KEY.as_bytes())?.trim_ascii_start().strip_prefix(b"=")?;
    Some(value.trim_ascii())
}

/// Unquotes the right-hand side of an assignment.
fn read_value(raw: &[u8]) -> Result<String, Refusal> {
    let (inner, rest) = match raw.first() {
        Some(&quote @ (b'"' | b'\'' | b'`')) => {
            let inner = &raw[1..];
            let end = inner.iter().position(|&b| b == quote).ok_or(Refusal::OpenQuote)?;
            (&inner[..end], &inner[end + 1..])
        }
        _ => raw.split_at(raw.iter().position(|b| b.is_ascii_whitespace() || *b == b'#').unwrap_or(raw.len())),
    };
    let value = plain(str::from_utf8(inner).map_err(|_| Refusal::Malformed)?.trim_ascii())?;
    if matches!(rest.trim_ascii_start().first(), None | Some(b'#')) { Ok(value) } else { Err(Refusal::Malformed) }
}

/// The value, if it is a plain word that needs no interpretation.
fn plain(value: &str) -> Result<String, Refusal> {
    if value.starts_with("encrypted:") {
        return Err(Refusal::Encrypted);
    }
    if value == "[SENSITIVE]" {
        return Err(Refusal::Withheld);
    }
    // The readers keep an opening quote only if there is no closing one.
    if value.starts_with(['"', '\'', '`']) && value.matches(|c| value.starts_with(c)).count() == 1 {
        return Err(Refusal::OpenQuote);
    }
    if value.contains(['$', '`', '\\']) {
        return Err(Refusal::Expansion);
    }
    let is_plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'"' | b'\'');
    if value.bytes().all(is_plain) { Ok(value.to_owned()) } else { Err(Refusal::Malformed) }
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
        let file = include_bytes!("../../../tests/it/wire/env.local.example");
        assert_eq!(value_in(file).as_deref(), Some("eyJhbGciOiJSUzI1NiJ9.eyJleHAiOjE4MDAwMDAwMDB9.c2ln"));
    }

    #[test]
    fn reads_every_usual_form_of_the_line() {
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
    fn other_lines_may_be_malformed() {
        let file =
            b"this is bad\nA=it's\nB=\"open\nC=C:\\Users\nD=\xe9\0\nMY-KEY=1\n=\nVERCEL_OIDC_TOKEN=\"a.b.c\"\nE='";
        assert_eq!(value_in(file).as_deref(), Some("a.b.c"));
    }

    #[test]
    fn the_last_assignment_counts_and_duplicates_are_counted() {
        match find_token(b"VERCEL_OIDC_TOKEN=a\n#VERCEL_OIDC_TOKEN=c\nVERCEL_OIDC_TOKEN=b\n") {
            Finding::Value { value, assignments: 2, .. } => assert_eq!(value.expose_secret(), "b"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn similar_lines_are_no_assignments() {
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
        for value in ["$HOME", "\"${HOME}\"", "$(id)", "a`id`", "\"a\\b\"", "'$HOME'", "'a\\n'"] {
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
    fn utf16_is_detected_with_and_without_a_byte_order_mark() {
        let wide: Vec<u8> = "X=1\nVERCEL_OIDC_TOKEN=a".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(refusal_of(&wide), Some(Refusal::Utf16));
        assert_eq!(refusal_of(b"\xff\xfeX\0"), Some(Refusal::Utf16));
        assert_eq!(refusal_of(b"\xfe\xff\0X"), Some(Refusal::Utf16));
    }

    #[test]
    fn only_an_unquoted_value_at_the_end_of_the_file_is_open_ended() {
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

    #[test]
    fn each_case_has_the_expected_result() {
        for case in cases::CASES {
            let taken = match find_token(case.file("T1", "T2").as_bytes()) {
                Finding::Value { value, .. } if matches!(value.expose_secret(), "T1" | "T2") => {
                    value.expose_secret().to_owned()
                }
                // A value that is not a token.
                Finding::Value { .. } | Finding::Refused(_) => "invalid".into(),
                Finding::Absent => "missing".into(),
            };
            assert_eq!(taken, case.taken, "{}", case.name);
        }
    }

    #[test]
    fn a_value_that_no_reader_reads_is_refused() {
        // Only dotenv reads the first assignment. The second is part of a value.
        let file = format!("{KEY}: a.b.1\nNOTE=\"x\n{KEY}=a.b.2\ny\"\n");
        assert_eq!(refusal_of(file.as_bytes()), Some(Refusal::Ambiguous));
        for (value, refusal) in [("encrypted:BDq", Refusal::Encrypted), ("[SENSITIVE]", Refusal::Withheld)] {
            assert_eq!(refusal_of(format!("{KEY}=\"{value}\"\n").as_bytes()), Some(refusal));
        }
    }

    /// Files made of random pieces.
    fn file_of_pieces() -> impl Strategy<Value = String> {
        let pieces = [
            KEY,
            "=",
            "\"",
            "'",
            "`",
            "\n",
            "\r\n",
            "\r",
            "#",
            " ",
            "\t",
            "\\",
            "a.b.1",
            "a.b.2",
            "export ",
            ": ",
            "A",
            "\nA=",
            "\u{feff}",
            "\u{a0}",
            "$",
            "\nVERCEL_OIDC_TOKEN=a.b.1\n",
            "\nVERCEL_OIDC_TOKEN=\"a.b.2\"\n",
        ];
        proptest::collection::vec(proptest::sample::select(pieces.to_vec()), 0..24).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn a_token_that_all_readers_read_is_accepted_and_one_that_none_reads_is_not(file in file_of_pieces()) {
            let last = |syntax: Syntax| syntax.values(KEY, &file).pop().unwrap_or_default().trim_ascii().to_owned();
            let readers = [last(Syntax::Dotenv), last(Syntax::Node)];
            let taken = value_in(file.as_bytes());
            if readers[0] == readers[1] && matches!(readers[0].as_str(), "a.b.1" | "a.b.2") {
                prop_assert_eq!(taken.as_ref(), Some(&readers[0]));
            }
            prop_assert!(taken.is_none_or(|taken| readers.contains(&taken)));
        }

        #[test]
        fn a_well_formed_line_is_found_whatever_surrounds_it(
            before in proptest::collection::vec(any::<u8>(), 0..200),
            after in proptest::collection::vec(any::<u8>(), 0..200),
            token in "[A-Za-z0-9_-]{1,40}\\.[A-Za-z0-9_-]{1,40}\\.[A-Za-z0-9_-]{1,40}",
        ) {
            // These could make the line part of another assignment.
            let before: Vec<u8> = before.into_iter().filter(|b| !b"\"'`:".contains(b)).collect();
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
