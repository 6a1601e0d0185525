//! The env file, which may come from a repository or may be incompletely written.

use connect_sidecar::credential::env_file::{Finding, KEY, Refusal, find_token};
use secrecy::ExposeSecret;

use crate::contains;

fn value_in(file: &[u8]) -> Option<String> {
    match find_token(file) {
        Finding::Value { value, .. } => Some(value.expose_secret().to_owned()),
        Finding::Absent | Finding::Refused(_) => None,
    }
}

pub(crate) fn check(file: &[u8]) {
    let finding = find_token(file);
    let says_utf16 = matches!(finding, Finding::Refused(Refusal::Utf16));
    if let Finding::Value { value, assignments, .. } = finding {
        let value = value.expose_secret();
        assert!(contains(file, value.as_bytes()), "not in the file: {value:?}");
        assert!(!value.is_empty() && !value.contains(['$', '`', '\\', '\n', '\r']), "expanded or empty: {value:?}");
        let count_names = |file: &[u8]| file.windows(KEY.len()).filter(|window| *window == KEY.as_bytes()).count();
        // Node.js drops all carriage returns, even within a name.
        let joined: Vec<u8> = file.iter().copied().filter(|byte| *byte != b'\r').collect();
        let names = count_names(file).max(count_names(&joined));
        assert!((1..=names).contains(&assignments), "{assignments} of {names}");
        // The value is the same in either kind of quotes.
        for quote in ['"', '\''] {
            if !value.contains(quote) {
                assert_eq!(value_in(format!("{KEY}={quote}{value}{quote}\n").as_bytes()).as_deref(), Some(value));
            }
        }
        // Text before it that is not an assignment of the variable changes nothing.
        assert_eq!(value_in(&[b"A=it's\n", file].concat()).as_deref(), Some(value));
    }

    // The last line is found however malformed the rest is, unless a quote or a name includes it.
    if file.iter().any(|b| b"\"'`:".contains(b)) {
        return;
    }
    let longer = [file, b"\nVERCEL_OIDC_TOKEN=\"a.b.c\"\n"].concat();
    match find_token(&longer) {
        Finding::Value { value, .. } => assert_eq!(value.expose_secret(), "a.b.c"),
        Finding::Refused(Refusal::Utf16) => assert!(says_utf16 || contains(&longer, b"V\0E\0R\0C\0E\0L\0")),
        other => panic!("the last line is not found: {other:?}"),
    }
}
