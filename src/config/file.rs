//! Reads one configuration file.

use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::ConfigMistake;
use super::setting::{Layer, RawValue, SETTINGS, SettingValue};
use super::suggestion;
use crate::os::safe_read::{self, ReadError};
use crate::proxy::error::excerpt;

/// The file's name in a project and in the user's configuration directory.
pub(super) const FILE_NAME: &str = "sidecar.toml";

/// Reads the settings of a file and adds what is wrong to `mistakes`. `None` if the file does not exist. `is_project`
/// says that it is the project's own file, which may not set everything.
pub(super) fn read(path: &Path, project: &Path, is_project: bool, mistakes: &mut Vec<ConfigMistake>) -> Option<Layer> {
    let shown = if is_project { FILE_NAME.to_owned() } else { path.display().to_string() };
    let mut mistake = |location: String, message: String| mistakes.push(ConfigMistake { location, message });
    let text = match safe_read::read(path) {
        Ok(content) => String::from_utf8(content.bytes),
        Err(ReadError::Missing) => return None,
        Err(ReadError::Unusable(reason)) => {
            mistake(shown, format!("could not read it: {reason}"));
            return Some(Layer::new());
        }
    };
    let Ok(text) = text else {
        mistake(shown, "it is not UTF-8".into());
        return Some(Layer::new());
    };
    let line = |span: Range<usize>| text.bytes().take(span.start).filter(|b| *b == b'\n').count() + 1;
    let (table, errors) = DeTable::parse_recoverable(&text);
    for error in errors {
        let line = line(error.span().unwrap_or_default());
        mistake(format!("{shown}:{line}"), format!("not TOML: {}", error.message()));
    }
    // An env file belongs to the project; other files lie beside the configuration file, where no project can put them.
    let own_dir = path.parent().unwrap_or(project);
    let base = |key| if key == "env_file" { project } else { own_dir };
    let mut values = Layer::new();
    for (key, at, value) in entries(table.get_ref()) {
        let location = format!("{shown}:{}", line(at));
        match SETTINGS.iter().find(|setting| setting.key == key && setting.in_files) {
            Some(setting) if !is_project || setting.in_project => values.push((
                setting.key,
                SettingValue {
                    raw: raw_value(value),
                    location: format!("{location}: {key}"),
                    is_from_file: true,
                    is_from_variable: false,
                    is_from_project: is_project,
                    base: base(setting.key).to_owned(),
                },
            )),
            Some(_) => mistake(
                location,
                format!(
                    "`{key}` may not be set by a project's own file, since it could redirect a credential or widen \
                     access; use the flag, its environment variable, your own configuration file, or --config"
                ),
            ),
            None => mistake(location, why_not_a_setting(&key, value)),
        }
    }
    Some(values)
}

fn why_not_a_setting(key: &str, value: &DeValue<'_>) -> String {
    if is_section(key) {
        let keys = SETTINGS.iter().filter(|known| known.key.split('.').next() == Some(key) && known.in_files);
        let keys: Vec<_> = keys.map(|known| format!("`{}`", known.key)).collect();
        format!("`{key}` is a table, with {}", keys.join(", "))
    } else if SETTINGS.iter().any(|setting| setting.key == key) {
        format!("`{key}` may be set by no file; use --{}", key.replace('_', "-"))
    } else {
        format!("unknown key `{}`{}", excerpt(key.as_bytes()), suggestion::for_key(key, value))
    }
}

/// The values of a file: dotted key, span of the key in the text, value. An unknown table is a value.
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
    suggestion::sections().any(|section| section == name)
}

fn raw_value(value: &DeValue<'_>) -> RawValue {
    match value {
        DeValue::String(text) => RawValue::Text(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(RawValue::Other, RawValue::Integer)
        }
        DeValue::Boolean(yes) => RawValue::Boolean(*yes),
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>().map_or(RawValue::Other, RawValue::List)
        }
        _ => RawValue::Other,
    }
}
