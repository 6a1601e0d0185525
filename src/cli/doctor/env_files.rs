//! Finds `VERCEL_OIDC_TOKEN` in the env files of the project and in the shell's environment. Only gathers facts.

use std::fs;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use super::readers::{Precedence, Reader};
use crate::credential::env_file::KEY;
use crate::credential::env_file::syntax::Syntax;
use crate::credential::token_file::{self, TokenReading};
use crate::credential::{FileWarnings, OidcToken, placeholder};
use crate::os::safe_read::{self, Defect, ReadError};

/// The most env files that are read.
const MAX_FILES: usize = 64;

/// The value that a program finds in an env file.
#[derive(Debug)]
pub(super) enum Reading {
    /// It does not find the variable.
    Unset,
    /// The variable is empty.
    Empty,
    /// A well-formed token.
    Token(Box<OidcToken>),
    /// Anything else.
    Other,
}

impl Reading {
    fn of(value: &str) -> Self {
        match value.trim_ascii() {
            "" => Self::Empty,
            value => OidcToken::decode(value.to_owned().into()).map_or(Self::Other, |token| Self::Token(token.into())),
        }
    }

    /// Whether both have the same effect on a program. An unset and an empty variable do.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Token(a), Self::Token(b)) => a.is_same_text(b),
            (Self::Unset | Self::Empty, Self::Unset | Self::Empty) | (Self::Other, Self::Other) => true,
            _ => false,
        }
    }
}

/// The purpose of a file, derived from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Loaded by programs.
    Loaded,
    /// Published as an example to copy.
    Template,
    /// A copy made by an editor or a person.
    Backup,
}

impl Purpose {
    fn of(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        let mut parts = name.split(['.', '-', '_']).skip(1);
        let is_swap = name.rsplit_once(".sw").is_some_and(|(_, rest)| rest.len() == 1);
        let backups = ["bak", "old", "orig", "backup", "save", "saved", "copy", "prev", "previous", "tmp", "rej"];
        let templates = ["example", "sample", "template", "tpl", "dist", "default", "defaults", "schema", "tmpl"];
        if name.ends_with(['~', '#']) || is_swap || parts.clone().any(|part| backups.contains(&part)) {
            Self::Backup
        } else if parts.any(|part| templates.contains(&part)) {
            Self::Template
        } else {
            Self::Loaded
        }
    }
}

/// An env file, or the shell's environment.
#[derive(Debug)]
pub(super) struct EnvFile {
    /// `None` for the shell's environment.
    pub(super) path: Option<PathBuf>,
    /// Its name as shown to people.
    pub(super) shown: String,
    /// Whether the sidecar reads it.
    pub(super) is_source: bool,
    pub(super) purpose: Purpose,
    /// What the sidecar reads in it.
    pub(super) found: TokenReading,
    /// What other programs read in it.
    pub(super) readings: Vec<(Syntax, Precedence, Reading)>,
    /// A construct that programs read in different ways.
    pub(super) oddity: Option<Oddity>,
    /// Whether there is whitespace around the token inside its quotes.
    pub(super) is_padded: bool,
    pub(super) is_readable_by_others: bool,
}

/// A construct that programs read in different ways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Oddity {
    ByteOrderMark,
    /// `NAME: value`.
    Colon,
    /// This many assignments.
    Duplicates(usize),
    /// An unclosed quote on this line, counted from 1.
    OpenQuote(usize),
    /// Lines end with a carriage return only.
    CarriageReturns,
}

impl Oddity {
    fn of(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let assignments = Syntax::Dotenv.values(KEY, &text).len().max(Syntax::Node.values(KEY, &text).len());
        let without_mark = text.strip_prefix('\u{FEFF}');
        let is_first = without_mark.is_some_and(|text| text.lines().next().is_some_and(|line| line.contains(KEY)));
        if is_first {
            return Some(Self::ByteOrderMark);
        }
        if !text.contains('\n') && text.trim_end().contains('\r') {
            return Some(Self::CarriageReturns);
        }
        let lines: Vec<_> =
            text.lines().map(|line| line.trim_start().trim_start_matches("export ").trim_start()).collect();
        if lines.iter().any(|line| line.strip_prefix(KEY).is_some_and(|rest| rest.trim_start().starts_with(':'))) {
            return Some(Self::Colon);
        }
        if assignments > 1 {
            return Some(Self::Duplicates(assignments));
        }
        let mut before = lines.iter().take_while(|line| !line.starts_with(KEY));
        let opens = |line: &str| {
            let value = line.split_once('=').map_or("", |(_, value)| value.trim_start());
            let quote = value.chars().next().filter(|c| matches!(c, '"' | '\'' | '`'));
            quote.is_some_and(|quote| value.matches(quote).count() == 1 || value.ends_with(&format!("\\{quote}")))
        };
        let at = before.position(|line| opens(line))?;
        Some(Self::OpenQuote(at + 1))
    }
}

impl EnvFile {
    /// The token, if it is well-formed.
    pub(super) fn token(&self) -> Option<&OidcToken> {
        match &self.found {
            TokenReading::Token { token, .. } => Some(token),
            _ => None,
        }
    }

    /// Whether it sets the variable to a non-empty value.
    pub(super) fn has_value(&self) -> bool {
        !matches!(self.found, TokenReading::Missing)
    }

    /// Whether any program finds the variable in it.
    fn is_set(&self) -> bool {
        self.has_value() || self.readings.iter().any(|(_, _, reading)| !matches!(reading, Reading::Unset))
    }

    /// What this reader finds in it.
    pub(super) fn reading(&self, reader: &Reader) -> &Reading {
        let matches_reader = |(syntax, precedence, _): &&(Syntax, Precedence, Reading)| {
            self.path.is_none() || (*syntax == reader.syntax && *precedence == reader.precedence)
        };
        self.readings.iter().find(matches_reader).map_or(&Reading::Unset, |(_, _, reading)| reading)
    }

    fn read(path: PathBuf, shown: String, is_source: bool) -> Self {
        let content = safe_read::read(&path);
        let is_readable_by_others = content.as_ref().is_ok_and(|content| content.readable_by_others);
        let bytes = content.as_ref().map_or(&[][..], |content| &content.bytes);
        let text = String::from_utf8_lossy(bytes);
        let mut readings = Vec::new();
        let mut is_padded = false;
        for syntax in [Syntax::Dotenv, Syntax::Node, Syntax::Python, Syntax::Dotenvy] {
            let values = syntax.values(KEY, &text);
            for (precedence, value) in [(Precedence::First, values.first()), (Precedence::Last, values.last())] {
                readings.push((syntax, precedence, value.map_or(Reading::Unset, |value| Reading::of(value))));
            }
            is_padded |= values.last().is_some_and(|value| value.trim_ascii() != value);
        }
        let oddity = Oddity::of(bytes);
        let found = match content {
            Ok(content) => token_file::parse(&content),
            Err(ReadError::Missing) => TokenReading::Missing,
            Err(ReadError::Unusable(reason)) => TokenReading::Invalid(reason),
        };
        let purpose = match path.file_name() {
            Some(name) if !is_source => Purpose::of(&name.to_string_lossy()),
            _ => Purpose::Loaded,
        };
        Self {
            path: Some(path),
            shown,
            is_source,
            purpose,
            is_padded: is_padded && matches!(found, TokenReading::Token { .. }),
            found,
            readings,
            oddity,
            is_readable_by_others,
        }
    }

    fn of_shell(value: String) -> Self {
        let reading = match value.as_str() {
            "" => Reading::Empty,
            value => {
                OidcToken::decode(value.to_owned().into()).map_or(Reading::Other, |token| Reading::Token(token.into()))
            }
        };
        let found = match value.as_str() {
            "" => TokenReading::Missing,
            _ => match OidcToken::decode(SecretString::from(value)) {
                Ok(token) => TokenReading::Token { token, warnings: FileWarnings::default(), open_ended: false },
                Err(rejection) => TokenReading::Invalid(Defect::in_content(rejection.to_string())),
            },
        };
        Self {
            path: None,
            shown: "the shell's environment".into(),
            is_source: false,
            purpose: Purpose::Loaded,
            found,
            readings: vec![(Syntax::Node, Precedence::Last, reading)],
            oddity: None,
            is_padded: false,
            is_readable_by_others: false,
        }
    }
}

/// All env files that set the variable, even if to an empty value, and always the one that the sidecar reads. The
/// placeholder that `run` sets in its command's environment is ignored.
pub(super) fn gather(project: &Path, source: Option<(PathBuf, String)>, shell: Option<String>) -> Vec<EnvFile> {
    let shell = shell.filter(|value| !placeholder::is_placeholder(value.as_bytes()));
    let mut files: Vec<_> = shell.map(EnvFile::of_shell).into_iter().collect();
    let entries = fs::read_dir(project).into_iter().flatten().flatten();
    let names = entries.map(|entry| PathBuf::from(entry.file_name()));
    // The last two are made by vim and Emacs.
    let prefixes = [".env", ".dev.vars", ".flaskenv", ".local.env", "..env", "#.env"].map(str::as_bytes);
    let is_env_file = |name: &[u8]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let mut names: Vec<_> = names.filter(|name| is_env_file(name.as_os_str().as_encoded_bytes())).collect();
    names.sort();
    names.truncate(MAX_FILES);
    // Written by `vercel pull`.
    names.push(".vercel/.env.development.local".into());
    if let Some((path, shown)) = source {
        names.retain(|name| project.join(name) != path);
        files.push(EnvFile::read(path, shown, true));
    }
    let others = names.iter().map(|name| EnvFile::read(project.join(name), name.display().to_string(), false));
    // A directory such as `.envs` is skipped. A `.dev.vars` matters even if it does not set the variable.
    let is_relevant = |file: &EnvFile| file.is_set() || file.shown == ".dev.vars";
    files.extend(others.filter(|file| is_relevant(file) && file.path.as_ref().is_some_and(|path| path.is_file())));
    files
}

/// Env files for the unit tests of this directory.
#[cfg(test)]
pub(super) mod fixtures {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::json;

    use super::*;
    use crate::os::clock::Timestamp;

    pub(in crate::cli::doctor) const NOW_SECONDS: u64 = 1_900_000_000;
    pub(in crate::cli::doctor) const NOW: Timestamp = Timestamp::from_millis(NOW_SECONDS * 1000);

    /// A token with these claims.
    pub(in crate::cli::doctor) fn with_claims(claims: &serde_json::Value) -> String {
        let mut all = json!({"iss": "https://oidc.vercel.com/acme"});
        for (name, value) in claims.as_object().expect("an object") {
            all[name] = value.clone();
        }
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.c2ln", part(r#"{"alg":"RS256"}"#), part(&all.to_string()))
    }

    /// A token of this project of team `acme` that expires in `left` seconds.
    pub(in crate::cli::doctor) fn token(project: &str, left: i64, environment: &str) -> String {
        with_claims(&json!({
            "owner": "acme", "owner_id": "team_acme", "project": project, "project_id": format!("prj_{project}"),
            "environment": environment, "user_id": "user_1", "exp": NOW_SECONDS.saturating_add_signed(left),
        }))
    }

    /// An env file that sets the variable to `value`. `.env.local` is the source; the empty name stands for the shell.
    pub(in crate::cli::doctor) fn file(name: &str, value: &str) -> EnvFile {
        if name.is_empty() {
            return EnvFile::of_shell(value.to_owned());
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(name);
        fs::write(&path, format!("VERCEL_OIDC_TOKEN={value}\n")).expect("a file");
        EnvFile::read(path, name.into(), name == ".env.local")
    }

    /// `.env.local` with this content.
    pub(in crate::cli::doctor) fn source(content: &[u8]) -> EnvFile {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(".env.local");
        fs::write(&path, content).expect("a file");
        EnvFile::read(path, ".env.local".into(), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::token;

    #[test]
    fn exactly_the_env_files_of_the_project_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let line = format!("VERCEL_OIDC_TOKEN={}\n", token("web", 60, "development"));
        fs::create_dir_all(dir.path().join(".vercel")).expect("a directory");
        fs::create_dir_all(dir.path().join(".envs")).expect("a directory");
        nix::unistd::mkfifo(&dir.path().join(".env.fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
        for name in [".env", ".env.development.local", ".env.test", ".vercel/.env.development.local", "env", "x.env"] {
            fs::write(dir.path().join(name), &line).expect("a file");
        }
        fs::write(dir.path().join(".env.production"), "A=1\n").expect("a file");
        let source = (dir.path().join(".env.local"), ".env.local".to_owned());
        let names = |shell: Option<&str>| {
            let files = gather(dir.path(), Some(source.clone()), shell.map(str::to_owned));
            files.into_iter().map(|file| file.shown).collect::<Vec<_>>()
        };
        let of_files = [".env.local", ".env", ".env.development.local", ".env.test", ".vercel/.env.development.local"];
        assert_eq!(names(None), of_files);
        assert_eq!(names(Some("x"))[0], "the shell's environment");
        let placeholder = placeholder::make(None, fixtures::NOW);
        assert_eq!(names(Some(&placeholder)), of_files);
        assert_eq!(names(Some(""))[0], "the shell's environment", "an empty variable hides those in files");
    }

    #[test]
    fn the_purpose_of_a_file_follows_from_its_name() {
        use Purpose::{Backup, Loaded, Template};
        for (names, purpose) in [
            (".env .env.local .env.development.local .env.test .env.dev .envrc .dev.vars .env.vault", Loaded),
            (
                ".env.example .env.sample .env.template .env.dist .env.defaults .env.local.example .env.example.local",
                Template,
            ),
            (".env-example .dev.vars.example .env.SAMPLE .env_template", Template),
            (
                ".env.local.bak .env.local~ .env.local.old .env.backup .env.local.orig ..env.local.swp .env.local.save",
                Backup,
            ),
            (".env.bak.local #.env.local# .env.local.swo .env.local-old .env.example.bak", Backup),
        ] {
            for name in names.split(' ') {
                assert_eq!(Purpose::of(name), purpose, "{name}");
            }
        }
    }
}
