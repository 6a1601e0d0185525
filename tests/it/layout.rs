//! Who may know whom: the direction of dependencies, read off the `crate::` and `super::` paths of `src`.
//!
//! What one wing may use of the others stands in [`MAY_USE`]; another word there is a decision about the architecture.
//! Inside a wing, a module may use its siblings, but not in a circle. Test code, which stands last in its file, may see
//! what it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use connect_sidecar::os::logging::FIELDS;

/// Each wing with the others that it may use, from the top down. Inside a wing there is no circle ([`circles`]).
const MAY_USE: [(&str, &str); 10] = [
    ("main", "cli os"),
    ("cli", "config credential daemon emulator events instance os proxy remedy"),
    ("daemon", "config credential events instance os proxy remedy"),
    // Settings are read into the options of the parts that they are for.
    ("config", "credential instance os proxy"),
    ("proxy", "credential events instance os remedy"),
    ("credential", "events os remedy"),
    ("instance", "os remedy"),
    // It shares no rule with what it tests.
    ("emulator", "os"),
    ("events", "os remedy"),
    ("os", "remedy"),
];

/// Of the credential, a request needs what it is, and nothing of how it is kept.
const OF_THE_CREDENTIAL_FOR_REQUESTS: [&str; 2] = ["credential", "credential::placeholder"];

/// Names of drawers for what has no home.
const DRAWERS: [&str; 6] = ["utils", "util", "helpers", "common", "misc", "shared"];

fn sources() -> BTreeMap<String, String> {
    fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                collect(&path, files);
            } else {
                files.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    let module = |file: &Path| {
        let path = file.strip_prefix(&src).expect("below src").with_extension("");
        let parts: Vec<_> = path.iter().map(|part| part.to_str().expect("a name")).filter(|p| *p != "mod").collect();
        parts.join("::")
    };
    files.iter().map(|file| (module(file), fs::read_to_string(file).expect("a source"))).collect()
}

/// Every use of one module by another, but for what is below it.
fn uses(sources: &BTreeMap<String, String>) -> BTreeSet<(String, String)> {
    let mut uses = BTreeSet::new();
    for (module, source) in sources.iter().filter(|(module, _)| !module.contains("::tests")) {
        for path in paths(module, source) {
            let mut used = path.as_str();
            while !sources.contains_key(used) {
                used = used.rsplit_once("::").map_or("lib", |(parent, _)| parent);
            }
            if used != module && !used.starts_with(&format!("{module}::")) {
                uses.insert((module.clone(), used.to_owned()));
            }
        }
    }
    uses
}

/// All paths within the crate that a module's code names, from the crate's root.
fn paths(module: &str, source: &str) -> Vec<String> {
    let code = source.split("\n#[cfg(test)]\n").next().unwrap_or_default();
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let parent = module.rsplit_once("::").map_or(String::new(), |(parent, _)| format!("{parent}::"));
    let mut paths = Vec::new();
    for (root, begins_at) in [("crate::", ""), ("connect_sidecar::", ""), ("super::", parent.as_str())] {
        for (at, _) in code.match_indices(root) {
            if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                leaves(&code[at + root.len()..], begins_at, &mut paths);
            }
        }
    }
    paths
}

/// The paths of a use tree, `a::{self, b::C}` for one; what comes after it.
fn leaves<'a>(tree: &'a str, prefix: &str, paths: &mut Vec<String>) -> &'a str {
    let end = tree.find(|c: char| !(c.is_alphanumeric() || "_:*".contains(c))).unwrap_or(tree.len());
    let (path, mut rest) = (format!("{prefix}{}", &tree[..end]), &tree[end..]);
    if !rest.starts_with('{') {
        paths.push(path);
        return rest;
    }
    while rest.starts_with(['{', ',']) {
        rest = leaves(rest[1..].trim_start(), &path, paths);
        // Past the name after an `as`.
        rest = &rest[rest.find(['{', ',', '}']).unwrap_or(rest.len())..];
    }
    rest.strip_prefix('}').unwrap_or(rest)
}

fn may_use(module: &str, used: &str) -> bool {
    let wing = |path: &str| path.split("::").next().unwrap_or_default().to_owned();
    let (from, to) = (wing(module), wing(used));
    let is_allowed = MAY_USE.iter().any(|(name, allowed)| *name == from && allowed.split(' ').any(|name| name == to));
    from == to
        || (is_allowed && (from != "proxy" || to != "credential" || OF_THE_CREDENTIAL_FOR_REQUESTS.contains(&used)))
}

/// The circles of modules in one folder, each of which stands for all below it. A module may use what is in the `mod.rs`
/// of the folder: that is no circle.
fn circles(uses: &BTreeSet<(String, String)>) -> Vec<String> {
    let mut siblings: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (module, used) in uses {
        let (from, to): (Vec<_>, Vec<_>) = (module.split("::").collect(), used.split("::").collect());
        let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
        if from.len() > common && to.len() > common {
            siblings.entry(from[..=common].join("::")).or_default().insert(to[..=common].join("::"));
        }
    }
    // What uses nothing that is left is in no circle.
    loop {
        let left: BTreeSet<_> = siblings.keys().cloned().collect();
        for used in siblings.values_mut() {
            used.retain(|used| left.contains(used));
        }
        siblings.retain(|_, used| !used.is_empty());
        if siblings.len() == left.len() {
            break;
        }
    }
    siblings.into_iter().map(|(module, used)| format!("{module} uses {}", Vec::from_iter(used).join(", "))).collect()
}

#[test]
fn dependencies_point_downwards() {
    let uses = uses(&sources());
    assert!(uses.len() > 40, "read wrongly: {uses:?}");
    let wrong: Vec<_> = uses.into_iter().filter(|(module, used)| !may_use(module, used)).collect();
    assert!(wrong.is_empty(), "these use what they may not (see MAY_USE): {wrong:#?}");
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let found = circles(&uses(&sources()));
    assert!(found.is_empty(), "these use each other, or what does: {found:#?}");
}

#[test]
fn every_page_that_is_cited_is_in_this_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (module, source) in sources() {
        for (at, _) in source.match_indices(".md") {
            let is_of_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
            let begin = source[..at].rfind(|c| !is_of_path(c)).map_or(0, |before| before + 1);
            let page = &source[begin..at + 3];
            assert!(page == ".md" || root.join(page).exists(), "{module} cites {page}");
        }
    }
}

#[test]
fn no_file_is_a_drawer() {
    for module in sources().keys() {
        let drawer = module.split("::").find(|part| DRAWERS.contains(part));
        assert_eq!(drawer, None, "{module}: find the noun that it belongs to");
    }
}

/// The fields that a module's log lines have, but for the message.
fn logged_fields(source: &str) -> BTreeSet<String> {
    let code = source.split("\n#[cfg(test)]\n").next().unwrap_or_default();
    let mut fields = BTreeSet::new();
    for level in ["error!(", "warn!(", "info!(", "debug!(", "trace!("] {
        for (at, _) in code.match_indices(level) {
            let mut rest = code[at + level.len()..].trim_start();
            while !rest.starts_with('"') {
                let name = rest.trim_start_matches(['%', '?']);
                let end = name.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(name.len());
                fields.insert(name[..end].to_owned());
                rest = after_comma(rest);
            }
        }
    }
    fields
}

/// What comes after the first argument.
fn after_comma(arguments: &str) -> &str {
    let (mut depth, mut quoted) = (0, false);
    for (at, c) in arguments.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' | ']' | '}' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => return arguments[at + 1..].trim_start(),
            _ => {}
        }
    }
    panic!("no message: {arguments}");
}

#[test]
fn every_field_of_a_log_line_stands_in_the_table_and_the_table_names_no_other() {
    let logged: BTreeSet<_> = sources().values().flat_map(|source| logged_fields(source)).collect();
    let named: BTreeSet<_> = FIELDS.iter().skip(3).map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(logged, named);
    let source = "warn!(\n code = f(\"a, b\"), %method,\n hint, \"{x}, y\");\n#[cfg(test)]\nmod t { info!(z, \"\"); }";
    assert_eq!(Vec::from_iter(logged_fields(source)), ["code", "hint", "method"]);
}

#[test]
fn uses_are_read_however_they_are_written() {
    let source = "//! [`x`](crate::doc)\nuse crate::a::{self, b::{C, d as e},\n    f::G as H};\nuse super::sibling::*;\n\
        fn f() -> crate::g::I { super::J::K { l: m::super_::n } }\n#[cfg(test)]\nmod tests { use crate::t; }";
    let mut paths = paths("parent::child", source);
    paths.sort();
    assert_eq!(paths, ["a::b::C", "a::b::d", "a::f::G", "a::self", "g::I", "parent::J::K", "parent::sibling::*"]);
    let pair = |module: &str, other: &str| (module.to_owned(), other.to_owned());
    let sources = BTreeMap::from([
        pair("proxy", "use crate::credential::placeholder;"),
        pair("credential", "use crate::proxy::Proxy;"),
        pair("credential::placeholder", "use super::Identity;"),
        pair("credential::watch", "use super::{Identity, placeholder};"),
        pair("proxy::stats", "use crate::credential::{Identity, watch};"),
        pair("os::a", "use super::b::c::D;"),
        pair("os::b", ""),
        pair("os::b::c", "use crate::os::d;"),
        pair("os::d", "use super::a;"),
        pair("os::e", "use super::a;"),
    ]);
    let uses = uses(&sources);
    let wrong: Vec<_> = uses.iter().filter(|(module, used)| !may_use(module, used)).cloned().collect();
    let expected = [("credential", "proxy"), ("proxy::stats", "credential::watch")];
    assert_eq!(wrong, expected.map(|(module, used)| pair(module, used)));
    let expected = [
        "credential uses proxy",
        "os::a uses os::b",
        "os::b uses os::d",
        "os::d uses os::a",
        "os::e uses os::a",
        "proxy uses credential",
    ];
    assert_eq!(circles(&uses), expected);
}
