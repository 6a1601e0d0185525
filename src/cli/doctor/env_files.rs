//! Where `VERCEL_OIDC_TOKEN` is set: in the env files of the project and in the shell's environment. Reads, judges nothing.

use std::fs;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use super::readers::{Counts, Reader};
use crate::credential::env_file::KEY;
use crate::credential::env_file::syntax::Syntax;
use crate::credential::token_file::{self, TokenReading};
use crate::credential::{FileWarnings, OidcToken, placeholder};
use crate::os::safe_read::{self, Defect, ReadError};

/// More env files than this are not looked at.
const MOST_FILES: usize = 64;

/// What a program makes of an env file.
#[derive(Debug)]
pub(super) enum Reading {
    /// It does not find the variable there.
    Unset,
    /// The variable is set, to nothing.
    Empty,
    /// A well-formed token.
    Token(Box<OidcToken>),
    /// Something else.
    Other,
}

impl Reading {
    fn of(value: &str) -> Self {
        match value.trim_ascii() {
            "" => Self::Empty,
            value => OidcToken::decode(value.to_owned().into()).map_or(Self::Other, |token| Self::Token(token.into())),
        }
    }

    /// Whether a program would use the same of both: nothing is nothing.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Token(a), Self::Token(b)) => a.is_same_text(b),
            (Self::Unset | Self::Empty, Self::Unset | Self::Empty) | (Self::Other, Self::Other) => true,
            _ => false,
        }
    }
}

/// What a file is there for, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Programs load it.
    Loaded,
    /// It is published, for people to copy it.
    Template,
    /// An editor or a person has put it aside.
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
    /// `None`: the shell's environment.
    pub(super) path: Option<PathBuf>,
    /// What people call it.
    pub(super) shown: String,
    /// Whether it is the one that the sidecar reads.
    pub(super) is_source: bool,
    pub(super) purpose: Purpose,
    /// What the sidecar makes of it.
    pub(super) found: TokenReading,
    /// What others make of it.
    pub(super) readings: Vec<(Syntax, Counts, Reading)>,
    /// What in it is read in different ways.
    pub(super) oddity: Option<Oddity>,
    /// Blanks or line ends stand in the quotes around the token.
    pub(super) is_padded: bool,
    pub(super) is_readable_by_others: bool,
}

/// What in a file is read in different ways, as far as it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Oddity {
    ByteOrderMark,
    /// `NAME: value`.
    Colon,
    /// So many assignments.
    Duplicates(usize),
    /// This line, counted from 1, opens a quote that it does not close.
    OpenQuote(usize),
    /// Lines end in a lone carriage return.
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

    /// Whether it sets the variable to something.
    pub(super) fn has_a_value(&self) -> bool {
        !matches!(self.found, TokenReading::Missing)
    }

    /// Whether anybody finds the variable in it.
    fn is_set(&self) -> bool {
        self.has_a_value() || self.readings.iter().any(|(_, _, reading)| !matches!(reading, Reading::Unset))
    }

    /// What a reader makes of it.
    pub(super) fn reading(&self, reader: &Reader) -> &Reading {
        let as_it_does = |(syntax, counts, _): &&(Syntax, Counts, Reading)| {
            self.path.is_none() || (*syntax == reader.syntax && *counts == reader.counts)
        };
        self.readings.iter().find(as_it_does).map_or(&Reading::Unset, |(_, _, reading)| reading)
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
            for (counts, value) in [(Counts::First, values.first()), (Counts::Last, values.last())] {
                readings.push((syntax, counts, value.map_or(Reading::Unset, |value| Reading::of(value))));
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
            readings: vec![(Syntax::Node, Counts::Last, reading)],
            oddity: None,
            is_padded: false,
            is_readable_by_others: false,
        }
    }
}

/// All of them that set the variable, be it to nothing, and the one that the sidecar reads in any case. The stand-in that
/// `run` gives its command is no token.
pub(super) fn gather(project: &Path, source: Option<(PathBuf, String)>, shell: Option<String>) -> Vec<EnvFile> {
    let shell = shell.filter(|value| !placeholder::is_placeholder(value.as_bytes()));
    let mut files: Vec<_> = shell.map(EnvFile::of_shell).into_iter().collect();
    let entries = fs::read_dir(project).into_iter().flatten().flatten();
    let names = entries.map(|entry| PathBuf::from(entry.file_name()));
    // The last are of vim's and Emacs's making.
    let starts = [".env", ".dev.vars", ".flaskenv", ".local.env", "..env", "#.env"].map(str::as_bytes);
    let is_one = |name: &[u8]| starts.iter().any(|start| name.starts_with(start));
    let mut names: Vec<_> = names.filter(|name| is_one(name.as_os_str().as_encoded_bytes())).collect();
    names.sort();
    names.truncate(MOST_FILES);
    // Written by `vercel pull`.
    names.push(".vercel/.env.development.local".into());
    if let Some((path, shown)) = source {
        names.retain(|name| project.join(name) != path);
        files.push(EnvFile::read(path, shown, true));
    }
    let others = names.iter().map(|name| EnvFile::read(project.join(name), name.display().to_string(), false));
    // A directory such as `.envs` is none. That there is a `.dev.vars` matters in itself.
    let counts = |file: &EnvFile| file.is_set() || file.shown == ".dev.vars";
    files.extend(others.filter(|file| counts(file) && file.path.as_ref().is_some_and(|path| path.is_file())));
    files
}

/// Makes env files for the unit tests of this folder.
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

    /// A token of this project of team `acme`, with so many seconds left.
    pub(in crate::cli::doctor) fn token(project: &str, left: i64, environment: &str) -> String {
        with_claims(&json!({
            "owner": "acme", "owner_id": "team_acme", "project": project, "project_id": format!("prj_{project}"),
            "environment": environment, "user_id": "user_1", "exp": NOW_SECONDS.saturating_add_signed(left),
        }))
    }

    /// An env file that sets the variable to this; `.env.local` is the source, and the empty name the shell.
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
    fn every_env_file_of_the_project_is_found_and_nothing_else() {
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
        let stand_in = placeholder::make(None, fixtures::NOW);
        assert_eq!(names(Some(&stand_in)), of_files);
        assert_eq!(names(Some(""))[0], "the shell's environment", "an empty one hides what the files say");
    }

    #[test]
    fn a_files_name_tells_what_it_is_for() {
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
