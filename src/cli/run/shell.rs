//! Formats the variables of `connect-sidecar env` for a shell, as JSON or as an env file. Pure.
//!
//! A shell evaluates the output, so values are quoted such that nothing in them is executed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value};

use super::environment::Variable;
use crate::cli::args::Format;
use crate::os::shell_quoting;

/// The variables in this format, with a line end after the last line.
pub fn print(format: Format, variables: &[Variable]) -> Vec<u8> {
    match format {
        Format::Shell => lines(variables, |(name, value)| match value {
            Some(value) => [b"export ", name.as_bytes(), b"=", &shell_quoting::in_quotes(value.as_bytes())].concat(),
            None => format!("unset {name}").into_bytes(),
        }),
        Format::Json => {
            let text = |value: &OsStr| Value::from(value.to_string_lossy().into_owned());
            let entry = |(name, value): &Variable| ((*name).to_owned(), value.as_deref().map_or(Value::Null, text));
            let object = Value::from(variables.iter().map(entry).collect::<Map<_, _>>());
            format!("{object:#}\n").into_bytes()
        }
        // An env file cannot unset a variable.
        Format::Dotenv => lines(variables, |(name, value)| match value {
            Some(value) => [name.as_bytes(), b"=", &dotenv_quoted(value)].concat(),
            None => format!("# {name}: not to be set").into_bytes(),
        }),
    }
}

fn lines(variables: &[Variable], line: impl Fn(&Variable) -> Vec<u8>) -> Vec<u8> {
    variables.iter().map(line).flat_map(|line| line.into_iter().chain([b'\n'])).collect()
}

/// In single quotes, which every reader takes literally. A value with a single quote needs double quotes, in which
/// readers differ.
fn dotenv_quoted(value: &OsStr) -> Vec<u8> {
    let value = value.as_bytes();
    if !value.contains(&b'\'') {
        return [b"'", value, b"'"].concat();
    }
    let mut quoted = vec![b'"'];
    for byte in value {
        if matches!(byte, b'"' | b'\\' | b'$') {
            quoted.push(b'\\');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::process::Command;

    const AWKWARD: [&str; 8] = [
        "",
        "plain",
        "--require \"/a b/p.cjs\" --inspect",
        "it's $HOME `id` $(id) \\ \" !",
        "'",
        "''\\''",
        "two\nlines\n",
        "* ? [a] ~ # ; & | < > é",
    ];

    fn variables() -> Vec<Variable> {
        const NAMES: [&str; 8] = ["V0", "V1", "V2", "V3", "V4", "V5", "V6", "V7"];
        NAMES.into_iter().zip(AWKWARD).map(|(name, value)| (name, Some(OsString::from(value)))).collect()
    }

    #[test]
    fn a_shell_that_evaluates_the_output_gets_the_exact_values() {
        let mut variables = variables();
        variables.push(("REMOVED", None));
        let printed = String::from_utf8(print(Format::Shell, &variables)).expect("UTF-8");
        for shell in ["sh", "bash"] {
            let output = Command::new(shell)
                .args(["-c", "eval \"$PRINTED\"; exec env -0"])
                .env("PRINTED", &printed)
                .env("REMOVED", "x")
                .output()
                .expect("a shell");
            assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
            let all: Vec<_> = output.stdout.split(|byte| *byte == 0).collect();
            for (name, value) in &variables {
                let expected = value.as_ref().map(|value| [name.as_bytes(), b"=", value.as_bytes()].concat());
                let prefix = format!("{name}=").into_bytes();
                let found = all.iter().find(|entry| entry.starts_with(&prefix)).map(|entry| entry.to_vec());
                assert_eq!(found, expected, "{shell}: {name}");
            }
        }
    }

    #[test]
    fn a_reader_of_the_env_file_gets_the_exact_values() {
        let printed = print(Format::Dotenv, &variables());
        let read: Vec<_> = dotenvy::from_read_iter(&*printed).map(|entry| entry.expect("a line").1).collect();
        assert_eq!(read, AWKWARD);
        let removed = print(Format::Dotenv, &[("REMOVED", None)]);
        assert_eq!(dotenvy::from_read_iter(&*removed).count(), 0);
    }

    #[test]
    fn json_is_one_object() {
        let printed = print(Format::Json, &[("A", Some("it's \"x\"".into())), ("B", None)]);
        let read: Value = serde_json::from_slice(&printed).expect("JSON");
        assert_eq!(read, serde_json::json!({"A": "it's \"x\"", "B": null}));
        assert!(printed.ends_with(b"}\n"));
    }
}
