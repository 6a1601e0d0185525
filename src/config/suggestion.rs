//! What a user may have meant by an unknown key.

use toml::de::DeValue;

use super::setting::SETTINGS;

/// Names used by other tools, with the keys that they have here.
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

/// Names that are less similar than this (Jaro-Winkler) are not suggested.
const MIN_SIMILARITY: f64 = 0.7;

/// What an unknown key may have meant, as the end of a sentence: a similar key, a key of another table, a table, or the
/// key for a name that other tools use. Empty if nothing is similar.
pub(super) fn for_key(key: &str, value: &DeValue<'_>) -> String {
    let suggestion = || {
        if let DeValue::Table(inner) = value
            && let Some(section) = nearest(key, sections())
        {
            let known = |inner: &str| SETTINGS.iter().find(|known| known.key == format!("{section}.{inner}"));
            let only = inner.iter().next().filter(|_| inner.len() == 1).and_then(|(name, _)| known(name.get_ref()));
            return Some(only.map_or_else(|| format!("`[{section}]`"), |known| format!("`{}`", known.key)));
        }
        let normalized = normalized(key);
        let name = last_part(&normalized);
        if let Some((_, meant)) = OTHER_NAMES.iter().find(|(other, _)| *other == normalized || *other == name) {
            return Some((*meant).to_owned());
        }
        let known = nearest(key, SETTINGS.iter().filter(|known| known.in_files).map(|known| known.key))?;
        let is_misplaced = key.contains('.') && !known.contains('.');
        Some(format!("`{known}`{}", if is_misplaced { " above the first table" } else { "" }))
    };
    suggestion().map(|meant| format!(", did you mean {meant}?")).unwrap_or_default()
}

/// The tables of a file.
pub(super) fn sections() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().filter_map(|setting| Some(setting.key.split_once('.')?.0))
}

/// The name that is most similar to `key`. Names are compared with and without their table, which may be what is wrong.
fn nearest(key: &str, names: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let key = normalized(key);
    most_similar(names, |known| {
        let pairs = [(known, &*key), (last_part(known), &*key), (last_part(known), last_part(&key))];
        pairs.iter().map(|(a, b)| strsim::jaro_winkler(a, b)).fold(0.0, f64::max)
    })
}

/// The name with the highest similarity, if it is above [`MIN_SIMILARITY`].
pub(super) fn most_similar<'a>(
    names: impl Iterator<Item = &'a str>,
    similarity: impl Fn(&str) -> f64,
) -> Option<&'a str> {
    let rated = names.map(|name| (similarity(name), name)).filter(|(similarity, _)| *similarity > MIN_SIMILARITY);
    rated.max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, name)| name)
}

fn last_part(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or_default()
}

/// `logLevel`, `log-level` and `LOG_LEVEL` as `log_level`.
fn normalized(key: &str) -> String {
    let mut normalized = String::with_capacity(key.len() + 4);
    let mut before_is_lower = false;
    for c in key.chars() {
        if c.is_ascii_uppercase() && before_is_lower {
            normalized.push('_');
        }
        before_is_lower = c.is_ascii_lowercase();
        normalized.push(if c == '-' { '_' } else { c.to_ascii_lowercase() });
    }
    normalized
}
