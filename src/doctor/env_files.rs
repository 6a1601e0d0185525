//! Where `VERCEL_OIDC_TOKEN` is set: in the env files of the project and in the shell's environment. Reads, judges nothing.

use std::fs;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use crate::identity::succession::Observed;
use crate::identity::{FileNotes, OidcToken, placeholder, watch};
use crate::safe_read::{self, Problem};

/// More env files than this are not looked at.
const MOST_FILES: usize = 64;

/// An env file, or the shell's environment.
#[derive(Debug)]
pub(super) struct EnvFile {
    /// `None`: the shell's environment.
    pub(super) path: Option<PathBuf>,
    /// What people call it.
    pub(super) shown: String,
    /// Whether it is the one that the sidecar reads.
    pub(super) is_source: bool,
    pub(super) found: Observed,
    pub(super) is_readable_by_others: bool,
}

impl EnvFile {
    /// The token, if it is well-formed.
    pub(super) fn token(&self) -> Option<&OidcToken> {
        match &self.found {
            Observed::Token { token, .. } => Some(token),
            _ => None,
        }
    }

    /// Whether it sets the variable at all.
    pub(super) fn has_a_value(&self) -> bool {
        !matches!(self.found, Observed::Missing)
    }

    fn read(path: PathBuf, shown: String, is_source: bool) -> Self {
        let content = safe_read::read(&path);
        let is_readable_by_others = content.as_ref().is_ok_and(|content| content.readable_by_others);
        let found = match content {
            Ok(content) => watch::scan(&content),
            Err(Problem::Missing) => Observed::Missing,
            Err(Problem::Unsafe(reason)) => Observed::Invalid(reason),
        };
        Self { path: Some(path), shown, is_source, found, is_readable_by_others }
    }

    fn of_shell(value: SecretString) -> Self {
        let found = match OidcToken::decode(value) {
            Ok(token) => Observed::Token { token, notes: FileNotes::default(), open_ended: false },
            Err(rejection) => Observed::Invalid(rejection.to_string().into()),
        };
        Self {
            path: None,
            shown: "the shell's environment".into(),
            is_source: false,
            found,
            is_readable_by_others: false,
        }
    }
}

/// All of them that set the variable, and the one that the sidecar reads in any case. The stand-in that `run` gives its
/// command is no token.
pub(super) fn gather(project: &Path, source: Option<(PathBuf, String)>, shell: Option<String>) -> Vec<EnvFile> {
    let shell = shell.filter(|value| !value.is_empty() && !placeholder::is_placeholder(value.as_bytes()));
    let mut files: Vec<_> = shell.map(|value| EnvFile::of_shell(value.into())).into_iter().collect();
    let entries = fs::read_dir(project).into_iter().flatten().flatten();
    let names = entries.map(|entry| PathBuf::from(entry.file_name()));
    let mut names: Vec<_> = names.filter(|name| name.as_os_str().as_encoded_bytes().starts_with(b".env")).collect();
    names.sort();
    names.truncate(MOST_FILES);
    // Written by `vercel pull`.
    names.push(".vercel/.env.development.local".into());
    if let Some((path, shown)) = source {
        names.retain(|name| project.join(name) != path);
        files.push(EnvFile::read(path, shown, true));
    }
    let others = names.iter().map(|name| EnvFile::read(project.join(name), name.display().to_string(), false));
    // A directory such as `.envs` is none.
    files.extend(others.filter(|file| file.has_a_value() && file.path.as_ref().is_some_and(|path| path.is_file())));
    files
}

/// Makes env files for the unit tests of this folder.
#[cfg(test)]
pub(super) mod fixtures {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::json;

    use super::*;
    use crate::clock::Timestamp;

    pub(in crate::doctor) const NOW_SECONDS: u64 = 1_900_000_000;
    pub(in crate::doctor) const NOW: Timestamp = Timestamp::from_millis(NOW_SECONDS * 1000);

    /// A token with these claims.
    pub(in crate::doctor) fn with_claims(claims: &serde_json::Value) -> String {
        let mut all = json!({"iss": "https://oidc.vercel.com/acme"});
        for (name, value) in claims.as_object().expect("an object") {
            all[name] = value.clone();
        }
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.c2ln", part(r#"{"alg":"RS256"}"#), part(&all.to_string()))
    }

    /// A token of this project of team `acme`, with so many seconds left.
    pub(in crate::doctor) fn token(project: &str, left: i64, environment: &str) -> String {
        with_claims(&json!({
            "owner": "acme", "owner_id": "team_acme", "project": project, "project_id": format!("prj_{project}"),
            "environment": environment, "user_id": "user_1", "exp": NOW_SECONDS.saturating_add_signed(left),
        }))
    }

    /// An env file that sets the variable to this; `.env.local` is the source, and the empty name the shell.
    pub(in crate::doctor) fn file(name: &str, value: &str) -> EnvFile {
        if name.is_empty() {
            return EnvFile::of_shell(value.to_owned().into());
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(name);
        fs::write(&path, format!("VERCEL_OIDC_TOKEN={value}\n")).expect("a file");
        EnvFile::read(path, name.into(), name == ".env.local")
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
        fs::write(dir.path().join(".env.example"), "VERCEL_OIDC_TOKEN=\n").expect("a file");
        let source = (dir.path().join(".env.local"), ".env.local".to_owned());
        let names = |shell: Option<&str>| {
            let files = gather(dir.path(), Some(source.clone()), shell.map(str::to_owned));
            files.into_iter().map(|file| file.shown).collect::<Vec<_>>()
        };
        let of_files = [".env.local", ".env", ".env.development.local", ".env.test", ".vercel/.env.development.local"];
        assert_eq!(names(None), of_files);
        assert_eq!(names(Some("x"))[0], "the shell's environment");
        let stand_in = placeholder::make(None, fixtures::NOW);
        assert_eq!((names(Some(&stand_in)), names(Some(""))), (of_files.map(str::to_owned).to_vec(), names(None)));
    }
}
