//! The env file: it came with a repository, or a tool is writing it just now.

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
        assert!(contains(file, value.as_bytes()), "made up: {value:?}");
        assert!(!value.is_empty() && !value.contains(['$', '`', '\\', '\n', '\r']), "expanded or empty: {value:?}");
        let named = |file: &[u8]| file.windows(KEY.len()).filter(|window| *window == KEY.as_bytes()).count();
        // Node drops every carriage return, also within a name.
        let joined: Vec<u8> = file.iter().copied().filter(|byte| *byte != b'\r').collect();
        let names = named(file).max(named(&joined));
        assert!((1..=names).contains(&assignments), "{assignments} of {names}");
        // Written as the CLI writes it, or as people do, it is the same.
        for quote in ['"', '\''] {
            if !value.contains(quote) {
                assert_eq!(value_in(format!("{KEY}={quote}{value}{quote}\n").as_bytes()).as_deref(), Some(value));
            }
        }
        // What is in front of the file and is no assignment changes nothing.
        assert_eq!(value_in(&[b"A=it's\n", file].concat()).as_deref(), Some(value));
    }

    // However broken the rest is, the last line is found, but for a quote or a name that takes it in.
    if file.iter().any(|b| b"\"'`:".contains(b)) {
        return;
    }
    let longer = [file, b"\nVERCEL_OIDC_TOKEN=\"a.b.c\"\n"].concat();
    match find_token(&longer) {
        Finding::Value { value, .. } => assert_eq!(value.expose_secret(), "a.b.c"),
        Finding::Refused(Refusal::Utf16) => assert!(says_utf16 || contains(&longer, b"V\0E\0R\0C\0E\0L\0")),
        other => panic!("the last line is lost: {other:?}"),
    }
}
