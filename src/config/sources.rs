//! All sources of settings in their order of precedence. Collects mistakes instead of stopping at the first.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use secrecy::SecretString;

use super::file::{self, FILE_NAME};
use super::setting::{Layer, RawValue, SettingValue};
use super::values::InvalidValue;
use super::{ConfigMistake, DEFAULT_ENV_FILE, EnvLookup, config_home, overrides, project};
use crate::config::args::GlobalArgs;
use crate::os::terminal::is_control_or_bidi;

/// Where the Vercel CLI stores the project that a directory is linked to.
const LINK: &str = ".vercel/project.json";

/// All sources of settings.
pub(super) struct Sources<'a> {
    /// The values of each source, the source with the highest precedence first.
    layers: Vec<Layer>,
    environment: EnvLookup<'a>,
    /// The project directory that was named, or the current directory.
    directory: PathBuf,
    /// The project: `directory` or one above it.
    project: PathBuf,
    /// The file that marks `project` as a project, if it is above `directory`.
    project_marker: Option<String>,
    mistakes: Vec<ConfigMistake>,
}

impl<'a> Sources<'a> {
    /// Reads all sources. Relative paths in flags and variables refer to `current_dir`.
    pub(super) fn read(args: &GlobalArgs, environment: EnvLookup<'a>, current_dir: &Path) -> Self {
        let mut this = Self::without_files(args, environment, current_dir);
        let directory = this.directory.clone();
        let explicit = args.config.clone().or_else(|| environment("CONNECT_SIDECAR_CONFIG").map(PathBuf::from));
        let explicit = explicit.map(|path| current_dir.join(path));
        if let Some(path) = &explicit
            && !this.add_file(path, &directory, false)
        {
            this.mistake("--config", format!("{} is not there", path.display()));
        }
        if let Some(dir) = config_home(environment) {
            this.add_file(&dir.join("connect-sidecar").join(FILE_NAME), &directory, false);
        }
        if args.project.is_none() && environment("CONNECT_SIDECAR_PROJECT").is_none() {
            this.find_project();
        }
        if explicit.is_none() {
            let project = this.project.clone();
            this.add_file(&project.join(FILE_NAME), &project, true);
        }
        this
    }

    /// Adds a file's settings as the next layer. Returns whether the file exists.
    fn add_file(&mut self, path: &Path, project: &Path, is_project: bool) -> bool {
        let layer = file::read(path, project, is_project, &mut self.mistakes);
        let exists = layer.is_some();
        self.layers.extend(layer);
        exists
    }

    /// If this directory is no project, makes the nearest directory above that is one the project. An env file given as
    /// a flag, a variable or an absolute path fixes the project to this directory.
    fn find_project(&mut self) {
        let env_file = self.layers.iter().flatten().find(|(key, _)| *key == "env_file").map(|(_, value)| value.clone());
        let env_file = match &env_file {
            None => DEFAULT_ENV_FILE,
            Some(SettingValue { raw: RawValue::Text(path), is_from_file: true, .. })
                if Path::new(path).is_relative() =>
            {
                path
            }
            Some(_) => return,
        };
        let home = (self.environment)("HOME").map(PathBuf::from);
        let names = [env_file, LINK, FILE_NAME];
        let Some((project, name)) = project::above(&self.directory, &names, home.as_deref()) else { return };
        (self.project, self.project_marker) = (project.to_owned(), Some(name.to_owned()));
        // A relative env file in a configuration file refers to the project.
        for (_, value) in
            self.layers.iter_mut().flatten().filter(|(key, value)| *key == "env_file" && value.is_from_file)
        {
            self.project.clone_into(&mut value.base);
        }
    }

    /// Reads flags and environment variables only.
    pub(super) fn without_files(args: &GlobalArgs, environment: EnvLookup<'a>, current_dir: &Path) -> Self {
        let layers = vec![overrides::flags(args, current_dir), overrides::variables(environment, current_dir)];
        let named = args.project.clone().or_else(|| environment("CONNECT_SIDECAR_PROJECT").map(PathBuf::from));
        let named = named.map_or(current_dir.to_owned(), |path| current_dir.join(path));
        let mut mistakes = Vec::new();
        let directory = named.canonicalize().ok().filter(|path| path.is_dir()).unwrap_or_else(|| {
            let message = format!("{} is not a directory", named.display());
            mistakes.push(ConfigMistake::new("--project", message));
            named
        });
        let project = directory.clone();
        Self { layers, environment, directory, project, project_marker: None, mistakes }
    }

    /// The value of the source with the highest precedence for `key`, checked by `parse`. Values of the other sources
    /// are checked too.
    pub(super) fn get<T>(&mut self, key: &str, parse: impl Fn(&SettingValue) -> Result<T, InvalidValue>) -> Option<T> {
        let mut effective = None;
        let mut mistakes = Vec::new();
        for value in self.layers.iter().flatten().filter(|(k, _)| *k == key).map(|(_, value)| value) {
            let checked = parse(value).and_then(|parsed| match key == "env_file" && value.is_from_project {
                true => self.check_inside_project(value).map(|()| parsed),
                false => Ok(parsed),
            });
            match checked {
                Ok(parsed) => effective = effective.or(Some(parsed)),
                Err(e) => mistakes.push(ConfigMistake::new(&value.location, e.to_string())),
            }
        }
        self.mistakes.extend(mistakes);
        effective
    }

    /// A project's own file may name only an env file inside the project, also after following links, and only by a
    /// name without characters that disguise it.
    fn check_inside_project(&self, value: &SettingValue) -> Result<(), InvalidValue> {
        let RawValue::Text(text) = &value.raw else { return Ok(()) };
        if text.contains(is_control_or_bidi) {
            let message = "a project's own file may name no file with control characters or characters that change the \
                           direction of text in its name; use --env-file for it";
            return Err(InvalidValue(message.into()));
        }
        let relative = Path::new(text);
        let stays_below = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let path = self.project.join(relative);
        // For a file that does not exist yet, its directory counts.
        let existing = path.canonicalize().or_else(|_| path.parent().unwrap_or(&self.project).canonicalize());
        let is_link = path.is_symlink() && !path.exists();
        if stays_below && !is_link && existing.is_ok_and(|real| real.starts_with(&self.project)) {
            Ok(())
        } else {
            let message = "a project's own file may name only a file inside the project; use --env-file for another";
            Err(InvalidValue(message.into()))
        }
    }

    /// The access token in `VERCEL_TOKEN`. Adds a mistake if it is missing or malformed.
    pub(super) fn access_token(&mut self) -> Option<SecretString> {
        let token = self.variable("VERCEL_TOKEN").filter(|token| !token.trim().is_empty());
        match token {
            Some(token) if token.trim().bytes().all(|b| b.is_ascii_graphic()) => Some(token.trim().to_owned().into()),
            Some(_) => {
                self.mistake("VERCEL_TOKEN", "it holds characters that no token has".into());
                None
            }
            None => {
                self.mistake(
                    "VERCEL_TOKEN",
                    "set it to a Vercel access token, which `auth = access-token` needs".into(),
                );
                None
            }
        }
    }

    pub(super) fn variable(&self, name: &str) -> Option<String> {
        (self.environment)(name)?.into_string().ok()
    }

    pub(super) fn project(&self) -> &Path {
        &self.project
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn project_marker(&self) -> Option<String> {
        self.project_marker.clone()
    }

    /// The settings that any source sets, each with the location that has the highest precedence.
    pub(super) fn explicit(&self) -> BTreeMap<&'static str, String> {
        let mut explicit = BTreeMap::new();
        for (key, value) in self.layers.iter().flatten() {
            explicit.entry(*key).or_insert_with(|| value.location.clone());
        }
        explicit
    }

    pub(super) fn mistakes(&self) -> Vec<ConfigMistake> {
        self.mistakes.clone()
    }

    pub(super) fn mistake(&mut self, location: &str, message: String) {
        self.mistakes.push(ConfigMistake::new(location, message));
    }
}
