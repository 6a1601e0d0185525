//! The sources of settings, their order, and who may set what. Collects mistakes instead of stopping at the first.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};

use secrecy::SecretString;
use toml::de::{DeTable, DeValue};

use super::{DEFAULT_ENV_FILE, Mistake, project};
use crate::config::args::GlobalArgs;
use crate::os::safe_read::{self, ReadError};
use crate::os::terminal::is_control_or_bidi;
use crate::proxy::error::excerpt;

/// Looks a variable up in our own process environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The file's name in a project and in the user's configuration directory.
const FILE_NAME: &str = "sidecar.toml";
/// Where the Vercel CLI keeps which project a directory is linked to.
const LINK: &str = ".vercel/project.json";

/// A setting, by its key in a file.
pub(super) struct Setting {
    pub(super) key: &'static str,
    /// May a project's own file set it? Not if it could redirect a credential or widen access.
    pub(super) in_project: bool,
    /// May any file set it?
    pub(super) in_files: bool,
}

const fn setting(key: &'static str, in_project: bool, in_files: bool) -> Setting {
    Setting { key, in_project, in_files }
}

pub(super) const SETTINGS: &[Setting] = &[
    setting("port", true, true),
    setting("env_file", true, true),
    setting("warn_before", true, true),
    setting("log_level", true, true),
    setting("cache.max_entries", true, true),
    setting("cache.buffer", true, true),
    setting("cache.max_age", true, true),
    setting("connectors.allow", true, true),
    setting("upstream", false, true),
    setting("upstream_ca", false, true),
    setting("auth", false, true),
    setting("team_id", false, true),
    setting("allowed_hosts", false, true),
    setting("allowed_origins", false, true),
    setting("bearer_hosts", false, true),
    setting("allow_forwarded", false, true),
    setting("require_key", false, true),
    setting("unix_socket", false, true),
    setting("use_env_proxy", false, true),
    setting("refresh", false, true),
    setting("wait", true, true),
    setting("desktop_notices", true, true),
    setting("dangerously_listen_on_network", false, false),
    setting("log_format", false, false),
];

/// A value before it is checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<String>),
    /// Some other type.
    Other,
}

/// A value and where it comes from.
#[derive(Debug, Clone)]
pub(super) struct Value {
    pub(super) raw: Raw,
    /// For people: `--port`, `CONNECT_SIDECAR_PORT`, `sidecar.toml:3: port`.
    pub(super) place: String,
    /// From a file, where types are as written.
    pub(super) is_file: bool,
    /// From a variable, where a list is written with commas.
    pub(super) is_variable: bool,
    /// From the project's own file.
    is_project: bool,
    /// What a relative path refers to.
    pub(super) base: PathBuf,
}

/// All sources, the strongest first.
pub(super) struct Sources<'a> {
    layers: Vec<Vec<(&'static str, Value)>>,
    environment: Environment<'a>,
    /// Where the command is: the project that was named, or the current directory.
    directory: PathBuf,
    project: PathBuf,
    /// What it was found by, where it is above the directory.
    found_by: Option<String>,
    mistakes: Vec<Mistake>,
}

impl Value {
    /// One as a variable of this name would have it.
    pub(super) fn of_a_variable(raw: Raw, name: &str) -> Self {
        given(raw, name, Path::new(""), true)
    }
}

impl<'a> Sources<'a> {
    pub(super) fn read(args: &GlobalArgs, environment: Environment<'a>, current_dir: &Path) -> Self {
        let mut this = Self::without_files(args, environment, current_dir);
        let directory = this.directory.clone();
        let explicit = args.config.clone().or_else(|| environment("CONNECT_SIDECAR_CONFIG").map(PathBuf::from));
        let explicit = explicit.map(|path| current_dir.join(path));
        if let Some(path) = &explicit {
            let layer = this.file(path, &directory, false);
            if layer.is_none() {
                this.mistake("--config", format!("{} is not there", path.display()));
            }
            this.layers.extend(layer);
        }
        this.user_file(&directory);
        if args.project.is_none() && environment("CONNECT_SIDECAR_PROJECT").is_none() {
            this.find_project();
        }
        if explicit.is_none() {
            let project = this.project.clone();
            let layer = this.file(&project.join(FILE_NAME), &project, true);
            this.layers.extend(layer);
        }
        this
    }

    /// Takes the nearest directory above for the project, where that is one and this directory is not. Whoever names the
    /// env file means it from this directory.
    fn find_project(&mut self) {
        let env_file = self.layers.iter().flatten().find(|(key, _)| *key == "env_file").map(|(_, value)| value.clone());
        let env_file = match &env_file {
            None => DEFAULT_ENV_FILE,
            Some(Value { raw: Raw::Text(path), is_file: true, .. }) if Path::new(path).is_relative() => path,
            Some(_) => return,
        };
        let home = (self.environment)("HOME").map(PathBuf::from);
        let names = [env_file, LINK, FILE_NAME];
        let Some((project, name)) = project::above(&self.directory, &names, home.as_deref()) else { return };
        (self.project, self.found_by) = (project.to_owned(), Some(name.to_owned()));
        // A file that names an env file means it from the project, whichever that is.
        for (_, value) in self.layers.iter_mut().flatten().filter(|(key, value)| *key == "env_file" && value.is_file) {
            self.project.clone_into(&mut value.base);
        }
    }

    /// Flags and our own environment alone.
    pub(super) fn without_files(args: &GlobalArgs, environment: Environment<'a>, current_dir: &Path) -> Self {
        let layers = vec![flags(args, current_dir), variables(environment, current_dir)];
        let (directory, project, found_by) = (PathBuf::new(), PathBuf::new(), None);
        let mut this = Self { layers, environment, directory, project, found_by, mistakes: Vec::new() };
        let project = args.project.clone().or_else(|| environment("CONNECT_SIDECAR_PROJECT").map(PathBuf::from));
        let project = project.map_or(current_dir.to_owned(), |path| current_dir.join(path));
        this.directory = match project.canonicalize() {
            Ok(project) if project.is_dir() => project,
            _ => {
                this.mistake("--project", format!("{} is not a directory", project.display()));
                project
            }
        };
        this.project = this.directory.clone();
        this
    }

    /// The strongest source's value for `key`, checked by `parse`. Weaker ones are checked, too.
    pub(super) fn get<T>(&mut self, key: &str, parse: impl Fn(&Value) -> Result<T, String>) -> Option<T> {
        let mut strongest = None;
        let mut mistakes = Vec::new();
        for value in self.layers.iter().flatten().filter(|(k, _)| *k == key).map(|(_, value)| value) {
            let checked = parse(value).and_then(|parsed| match key == "env_file" && value.is_project {
                true => self.check_inside_project(value).map(|()| parsed),
                false => Ok(parsed),
            });
            match checked {
                Ok(parsed) => strongest = strongest.or(Some(parsed)),
                Err(message) => mistakes.push(Mistake { place: value.place.clone(), message }),
            }
        }
        self.mistakes.extend(mistakes);
        strongest
    }

    /// A project's own file may name only an env file of the project, also when links are followed, and by a name that is
    /// what it looks like.
    fn check_inside_project(&self, value: &Value) -> Result<(), String> {
        let Raw::Text(text) = &value.raw else { return Ok(()) };
        if text.contains(is_control_or_bidi) {
            return Err(
                "a project's own file may name no file with control characters in its name, nor with such as turn \
                        the direction of text; use --env-file for it"
                    .into(),
            );
        }
        let relative = Path::new(text);
        let plain = relative
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
        let path = self.project.join(relative);
        // A file that is not there yet is judged by its directory.
        let existing = path.canonicalize().or_else(|_| path.parent().unwrap_or(&self.project).canonicalize());
        let is_link = path.is_symlink() && !path.exists();
        if plain && !is_link && existing.is_ok_and(|real| real.starts_with(&self.project)) {
            Ok(())
        } else {
            Err("a project's own file may name only a file inside the project; use --env-file for another".into())
        }
    }

    /// `VERCEL_TOKEN`, or the mistake that it is missing.
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

    /// What the project was found by, where it is above the directory.
    pub(super) fn found_by(&self) -> Option<String> {
        self.found_by.clone()
    }

    /// The settings that some source names, each with the strongest one's place.
    pub(super) fn named(&self) -> BTreeMap<&'static str, String> {
        let mut named = BTreeMap::new();
        for (key, value) in self.layers.iter().flatten() {
            named.entry(*key).or_insert_with(|| value.place.clone());
        }
        named
    }

    pub(super) fn mistakes(&self) -> Vec<Mistake> {
        self.mistakes.clone()
    }

    pub(super) fn mistake(&mut self, place: &str, message: String) {
        self.mistakes.push(Mistake { place: place.into(), message });
    }

    fn user_file(&mut self, project: &Path) {
        if let Some(dir) = config_home(self.environment) {
            let layer = self.file(&dir.join("connect-sidecar").join(FILE_NAME), project, false);
            self.layers.extend(layer);
        }
    }

    /// The settings in a file; `None` if it is not there.
    fn file(&mut self, path: &Path, project: &Path, is_project: bool) -> Option<Vec<(&'static str, Value)>> {
        let shown = match is_project {
            true => FILE_NAME.to_owned(),
            false => path.display().to_string(),
        };
        let text = match safe_read::read(path) {
            Ok(content) => String::from_utf8(content.bytes),
            Err(ReadError::Missing) => return None,
            Err(ReadError::Unusable(reason)) => {
                self.mistake(&shown, format!("could not read it: {reason}"));
                return Some(Vec::new());
            }
        };
        let Ok(text) = text else {
            self.mistake(&shown, "it is not UTF-8".into());
            return Some(Vec::new());
        };
        let line = |span: Range<usize>| text.bytes().take(span.start).filter(|b| *b == b'\n').count() + 1;
        let (table, errors) = DeTable::parse_recoverable(&text);
        for error in errors {
            let line = line(error.span().unwrap_or_default());
            self.mistake(&format!("{shown}:{line}"), format!("not TOML: {}", error.message()));
        }
        // An env file is a project's; anything else lies beside the file that names it, where no project can put it.
        let own_dir = path.parent().unwrap_or(project);
        let base = |key| if key == "env_file" { project } else { own_dir };
        let mut values = Vec::new();
        for (key, at, value) in entries(table.get_ref()) {
            let place = format!("{shown}:{}", line(at));
            match SETTINGS.iter().find(|setting| setting.key == key && setting.in_files) {
                None if is_section(&key) => {
                    let keys =
                        SETTINGS.iter().filter(|known| known.key.split('.').next() == Some(&key) && known.in_files);
                    let keys: Vec<_> = keys.map(|known| format!("`{}`", known.key)).collect();
                    self.mistake(&place, format!("`{key}` is a table, with {}", keys.join(", ")));
                }
                None if SETTINGS.iter().any(|setting| setting.key == key) => {
                    let flag = key.replace('_', "-");
                    self.mistake(&place, format!("`{key}` may be set by no file; use --{flag}"));
                }
                None => {
                    let meant = meant(&key, value);
                    self.mistake(&place, format!("unknown key `{}`{meant}", excerpt(key.as_bytes())));
                }
                Some(setting) if is_project && !setting.in_project => self.mistake(
                    &place,
                    format!(
                        "`{key}` may not be set by a project's own file, since it could redirect a credential or widen \
                         access; use the flag, its environment variable, your own configuration file, or --config"
                    ),
                ),
                Some(setting) => values.push((
                    setting.key,
                    Value {
                        raw: raw(value),
                        place: format!("{place}: {key}"),
                        is_file: true,
                        is_variable: false,
                        is_project,
                        base: base(setting.key).to_owned(),
                    },
                )),
            }
        }
        Some(values)
    }
}

/// Where the state of running instances and the local CA are kept, if there is a place: `$XDG_STATE_HOME/connect-sidecar`.
pub fn state_dir(environment: Environment<'_>) -> Option<PathBuf> {
    Some(home_dir(environment, "XDG_STATE_HOME", ".local/state")?.join("connect-sidecar"))
}

/// Where the user's programs have their settings, if there is a place: `$XDG_CONFIG_HOME`.
pub fn config_home(environment: Environment<'_>) -> Option<PathBuf> {
    home_dir(environment, "XDG_CONFIG_HOME", ".config")
}

fn home_dir(environment: Environment<'_>, variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |path: OsString| Some(PathBuf::from(path)).filter(|path| path.is_absolute());
    environment(variable).and_then(absolute).or_else(|| Some(environment("HOME").and_then(absolute)?.join(below_home)))
}

/// The values of a file: dotted key, place in the text, value. Tables that are no section of ours are values.
fn entries<'t>(table: &'t DeTable<'t>) -> Vec<(String, Range<usize>, &'t DeValue<'t>)> {
    let mut entries = Vec::new();
    for (name, value) in table {
        match value.get_ref() {
            DeValue::Table(section) if is_section(name.get_ref()) => {
                let inner = section
                    .iter()
                    .map(|(key, value)| (format!("{}.{}", name.get_ref(), key.get_ref()), key.span(), value.get_ref()));
                entries.extend(inner);
            }
            value => entries.push((name.get_ref().to_string(), name.span(), value)),
        }
    }
    entries
}

fn is_section(name: &str) -> bool {
    sections().any(|section| section == name)
}

fn sections() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().filter_map(|setting| Some(setting.key.split_once('.')?.0))
}

/// What people look for under another name, and the keys that it is here.
const OTHER_NAMES: &[(&str, &str)] = &[
    ("listen", "`port` or `unix_socket`"),
    ("bind", "`port` or `unix_socket`"),
    ("address", "`port` or `unix_socket`"),
    ("host", "`port` or `allowed_hosts`"),
    ("socket", "`unix_socket`"),
    ("proxy", "`use_env_proxy`"),
    ("https_proxy", "`use_env_proxy`"),
    ("ca", "`upstream_ca`"),
    ("key", "`require_key`"),
    ("cors", "`allowed_origins`"),
    ("ttl", "`cache.max_age`"),
    ("timeout", "`wait`"),
    ("verbose", "`log_level`"),
    ("debug", "`log_level`"),
    ("url", "`upstream`"),
    ("notifications", "`desktop_notices`"),
];

/// What was meant by a key that is not known, as the end of a sentence, if something is like it: a key, a key of another
/// table, a table, or what is called otherwise elsewhere.
fn meant(key: &str, value: &DeValue<'_>) -> String {
    let suggestion = || {
        if let DeValue::Table(inner) = value {
            let (likeness, section) = nearest(key, sections())?;
            let known = |inner: &str| SETTINGS.iter().find(|known| known.key == format!("{section}.{inner}"));
            let only = inner.iter().next().filter(|_| inner.len() == 1).and_then(|(name, _)| known(name.get_ref()));
            let meant = only.map_or_else(|| format!("`[{section}]`"), |known| format!("`{}`", known.key));
            if likeness > ALIKE {
                return Some(meant);
            }
        }
        let plain = plain(key);
        let name = plain.rsplit('.').next().unwrap_or_default();
        if let Some((_, meant)) = OTHER_NAMES.iter().find(|(other, _)| *other == plain || *other == name) {
            return Some((*meant).to_owned());
        }
        let (likeness, known) = nearest(key, SETTINGS.iter().filter(|known| known.in_files).map(|known| known.key))?;
        let is_misplaced = key.contains('.') && !known.contains('.');
        let place = if is_misplaced { " above the first table" } else { "" };
        (likeness > ALIKE).then(|| format!("`{known}`{place}"))
    };
    suggestion().map(|meant| format!(", did you mean {meant}?")).unwrap_or_default()
}

/// Names that are less alike than this are not taken for each other.
const ALIKE: f64 = 0.7;

/// The most alike of some names, and how much it is: as a whole or without its table, which may be what is wrong.
fn nearest(key: &str, names: impl Iterator<Item = &'static str>) -> Option<(f64, &'static str)> {
    let key = plain(key);
    let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        let alike = |a: &str, b: &str| strsim::jaro_winkler(a, b);
        alike(known, &key).max(alike(&name(known), &key)).max(alike(&name(known), &name(&key)))
    };
    names.map(|known| (likeness(known), known)).max_by(|(a, _), (b, _)| a.total_cmp(b))
}

/// `logLevel`, `log-level` and `LOG_LEVEL` as `log_level`.
fn plain(key: &str) -> String {
    let mut plain = String::with_capacity(key.len() + 4);
    let mut before_is_lower = false;
    for c in key.chars() {
        if c.is_ascii_uppercase() && before_is_lower {
            plain.push('_');
        }
        before_is_lower = c.is_ascii_lowercase();
        plain.push(if c == '-' { '_' } else { c.to_ascii_lowercase() });
    }
    plain
}

/// Variables of the environment that begin as ours and are none, each with what was meant by it.
pub fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    const PREFIX: &str = "CONNECT_SIDECAR_";
    // Some are what `run` gives its command.
    const OTHERS: [&str; 5] = ["CONFIG", "PROJECT", "URL", "KEY", "BEARER_HOSTS"];
    let known =
        |name: &str| OTHERS.contains(&name) || VARIABLES.iter().any(|(_, known)| &known[PREFIX.len()..] == name);
    let mut unknown: Vec<_> = names
        .filter_map(|name| Some(name.to_str()?.strip_prefix(PREFIX)?.to_owned()))
        .filter(|name| !known(name))
        .map(|name| {
            let names = VARIABLES.iter().map(|(_, known)| &known[PREFIX.len()..]).chain(["CONFIG", "PROJECT"]);
            let near = names
                .map(|known| (strsim::jaro_winkler(known, &name), known))
                .max_by(|(a, _), (b, _)| a.total_cmp(b))
                .filter(|(likeness, _)| *likeness > ALIKE);
            let meant = near.map(|(_, known)| format!(", did you mean {PREFIX}{known}?")).unwrap_or_default();
            format!("unknown variable {PREFIX}{}{meant}", excerpt(name.as_bytes()))
        })
        .collect();
    unknown.sort();
    unknown
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(Raw::Other, Raw::Integer)
        }
        DeValue::Boolean(yes) => Raw::Boolean(*yes),
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>().map_or(Raw::Other, Raw::List)
        }
        _ => Raw::Other,
    }
}

pub(super) fn flags(args: &GlobalArgs, current_dir: &Path) -> Vec<(&'static str, Value)> {
    let text = |value: &Option<String>| value.clone().map(Raw::Text);
    let list = |items: &[String]| (!items.is_empty()).then(|| Raw::List(items.to_vec()));
    let yes = |flag: bool| flag.then_some(Raw::Boolean(true));
    [
        ("env_file", "--env-file", text(&args.env_file)),
        ("port", "--port", text(&args.port)),
        ("upstream", "--upstream", text(&args.upstream)),
        ("upstream_ca", "--upstream-ca", text(&args.upstream_ca)),
        ("auth", "--auth", text(&args.auth)),
        ("team_id", "--team-id", text(&args.team_id)),
        ("allowed_hosts", "--allowed-host", list(&args.allowed_hosts)),
        ("allowed_origins", "--allowed-origin", list(&args.allowed_origins)),
        ("bearer_hosts", "--bearer-host", list(&args.bearer_hosts)),
        ("allow_forwarded", "--allow-forwarded", yes(args.allow_forwarded)),
        ("require_key", "--require-key", yes(args.require_key)),
        ("unix_socket", "--unix-socket", text(&args.unix_socket)),
        ("dangerously_listen_on_network", "--dangerously-listen-on-network", text(&args.dangerously_listen_on_network)),
        ("use_env_proxy", "--use-env-proxy", yes(args.use_env_proxy)),
        ("refresh", "--refresh", text(&args.refresh)),
        ("wait", "--wait", text(&args.wait)),
        ("desktop_notices", "--desktop-notices", text(&args.desktop_notices)),
        ("log_format", "--log-format", text(&args.log_format)),
        ("log_level", "--log-level", text(&args.log_level)),
    ]
    .into_iter()
    .filter_map(|(key, flag, raw)| Some((key, given(raw?, flag, current_dir, false))))
    .collect()
}

/// The variables that set something, each with the key of what it sets.
const VARIABLES: &[(&str, &str)] = &[
    ("env_file", "CONNECT_SIDECAR_ENV_FILE"),
    ("port", "CONNECT_SIDECAR_PORT"),
    ("upstream", "CONNECT_SIDECAR_UPSTREAM"),
    ("upstream_ca", "CONNECT_SIDECAR_UPSTREAM_CA"),
    ("auth", "CONNECT_SIDECAR_AUTH"),
    ("team_id", "CONNECT_SIDECAR_TEAM_ID"),
    ("allowed_hosts", "CONNECT_SIDECAR_ALLOWED_HOST"),
    ("allowed_origins", "CONNECT_SIDECAR_ALLOWED_ORIGIN"),
    ("bearer_hosts", "CONNECT_SIDECAR_BEARER_HOST"),
    ("allow_forwarded", "CONNECT_SIDECAR_ALLOW_FORWARDED"),
    ("require_key", "CONNECT_SIDECAR_REQUIRE_KEY"),
    ("unix_socket", "CONNECT_SIDECAR_UNIX_SOCKET"),
    ("dangerously_listen_on_network", "CONNECT_SIDECAR_DANGEROUSLY_LISTEN_ON_NETWORK"),
    ("use_env_proxy", "CONNECT_SIDECAR_USE_ENV_PROXY"),
    ("refresh", "CONNECT_SIDECAR_REFRESH"),
    ("wait", "CONNECT_SIDECAR_WAIT"),
    ("desktop_notices", "CONNECT_SIDECAR_DESKTOP_NOTICES"),
    ("log_format", "CONNECT_SIDECAR_LOG_FORMAT"),
    ("log_level", "CONNECT_SIDECAR_LOG_LEVEL"),
];

pub(super) fn variables(environment: Environment<'_>, current_dir: &Path) -> Vec<(&'static str, Value)> {
    let set = VARIABLES.iter().filter_map(|(key, name)| {
        let text = environment(name)?.into_string().map_or(Raw::Other, Raw::Text);
        Some((*key, given(text, name, current_dir, true)))
    });
    set.collect()
}

fn given(raw: Raw, place: &str, base: &Path, is_variable: bool) -> Value {
    let base = base.to_owned();
    Value { raw, place: place.into(), is_file: false, is_variable, is_project: false, base }
}
