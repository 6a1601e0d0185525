//! Who may know whom: the direction of dependencies, read off the `crate::` and `super::` paths of `src`.
//!
//! A module may always use what is below it. Everything else stands in [`MAY_USE`]; a new line there is a decision about
//! the architecture. Test code, which stands last in its file, may see what it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use connect_sidecar::logging::FIELDS;

/// Each module with the others that it may use, from the top down. A module without a line has that of its parent;
/// `a::*` is all that is below `a`.
const MAY_USE: &[(&str, &str)] = &[
    (
        "main",
        "app cli client clock commands commands::* config demo doctor emulate emulator hardening identity intercept::ca logging run run::* server::unix_socket service service::readiness terminal",
    ),
    ("commands", "app cli client config proxy::route run::joining status::instance terminal instance_key"),
    (
        "commands::token",
        "cli client clock commands config logging proxy::coach run::child run::joining run::sidecar terminal",
    ),
    (
        "commands::status",
        "cli client clock commands commands::browser commands::report proxy::guard status::instance terminal",
    ),
    ("commands::report", "clock terminal remedy"),
    ("commands::browser", "executable"),
    ("commands::refresh", "cli client commands clock terminal"),
    ("commands::cache", "cli client commands terminal proxy::route"),
    ("commands::logs", "cli client clock commands terminal event_line"),
    ("commands::completions", "cli commands"),
    ("doctor", "cli client clock commands config identity terminal"),
    (
        "doctor::copies",
        "clock doctor::env_files doctor::finding doctor::readers identity::env_file identity::succession shell_quoting",
    ),
    (
        "doctor::credential",
        "clock doctor::env_files doctor::finding identity::succession shell_quoting identity::warning",
    ),
    (
        "doctor::env_files",
        "doctor::readers identity identity::env_file identity::env_file::syntax identity::placeholder identity::succession identity::watch safe_read",
    ),
    (
        "doctor::files",
        "doctor::env_files doctor::finding doctor::program executable intercept::ca private_dir shell_quoting",
    ),
    ("doctor::finding", "terminal remedy"),
    ("doctor::instance", "identity client config doctor::finding port_owner remedy server::listener status::instance"),
    ("doctor::link", "doctor::finding identity safe_read"),
    (
        "doctor::network",
        "clock doctor::finding proxy::env_proxy proxy::error proxy::reply proxy::upstream shell_quoting remedy identity::warning",
    ),
    ("doctor::program", "process_group"),
    ("doctor::readers", "identity::env_file::syntax safe_read"),
    ("doctor::vercel", "clock doctor::finding doctor::program executable safe_read"),
    ("doctor::watching", "doctor::finding"),
    ("service", "cli client commands config executable terminal tls"),
    ("service::systemd", "commands service::manager"),
    ("service::launchd", "commands service::manager shell_quoting"),
    ("service::manager", "commands"),
    ("service::readiness", ""),
    ("run", "app client clock config hardening identity identity::watch"),
    ("run::joining", "client config status::instance terminal"),
    (
        "run::sidecar",
        "app client clock config instance_key private_dir proxy::guard run run::child run::joining server::handover status::instance terminal",
    ),
    ("client", "config remedy instance_key proxy::env_proxy proxy::guard server status::instance"),
    ("run::problems", "client event_line"),
    ("run::files", "private_dir run::environment"),
    ("run::shell", "cli run::environment shell_quoting"),
    ("run::child", "hardening process_group"),
    ("run::environment", "proxy::env_proxy proxy::hosts"),
    ("emulate", "cli config emulator emulator::* proxy::upstream"),
    ("demo", "cli clock config emulator emulator::* terminal"),
    (
        "app",
        "clock config events identity identity::* instance_key intercept port_owner private_dir proxy proxy::* server server::* status status::*",
    ),
    // Settings are read into the options of the parts that they are for.
    (
        "config",
        "cli instance_key logging proxy::cache proxy::env_proxy proxy::guard proxy::hosts proxy::resolver proxy::upstream identity::refresh::vercel_cli",
    ),
    ("config::carried", "cli config config::sources"),
    ("config::sources", "cli config config::project proxy::error safe_read terminal"),
    ("config::settings", "config config::sources config::values proxy::guard proxy::hosts"),
    ("config::project", ""),
    ("config::values", "config::sources logging proxy::guard proxy::hosts tls"),
    (
        "server",
        "clock identity identity::placeholder identity::refresh proxy proxy::* status status::page remedy events",
    ),
    ("server::event_stream", "events proxy::error proxy::reply server::connections"),
    ("server::connections", "server::peer"),
    ("server::handover", "instance_key server::listener server::unix_socket"),
    ("server::listener", "server::unix_socket"),
    ("server::runs", "proxy::env_proxy identity::placeholder instance_key proxy proxy::error"),
    ("server::head", "proxy::error"),
    (
        "server::intercepted",
        "proxy proxy::error proxy::guard proxy::reply server server::connections server::head server::stream",
    ),
    ("server::peer", ""),
    ("server::refresh", "clock identity::refresh proxy::error proxy::reply"),
    ("server::refusals", ""),
    ("server::stream", "server::connections server::peer"),
    ("server::unix_socket", "private_dir"),
    (
        "status",
        "clock events identity identity::refresh proxy::cache proxy::stats identity::expiry identity::warning remedy",
    ),
    ("status::page", "proxy::reply proxy::guard"),
    ("status::usage", "clock identity private_dir proxy::stats safe_read"),
    ("status::instance", "safe_read private_dir"),
    ("status::metrics", "clock proxy::stats"),
    ("status::notices", "clock events identity::warning remedy"),
    ("proxy", "clock events identity remedy"),
    ("event_line", "clock remedy"),
    ("events", "clock remedy"),
    ("executable", "safe_read"),
    (
        "proxy::upstream",
        "clock proxy::admission proxy::coach proxy::dialer proxy::env_proxy proxy::error proxy::guard proxy::pool proxy::reply proxy::resolver proxy::route",
    ),
    (
        "proxy::relay",
        "clock identity identity::placeholder proxy proxy::dialer proxy::error proxy::guard proxy::hosts proxy::pool proxy::reply proxy::route proxy::upstream",
    ),
    ("proxy::pool", "clock proxy::dialer proxy::env_proxy proxy::error proxy::resolver"),
    ("proxy::dialer", "proxy::env_proxy proxy::resolver tls"),
    ("proxy::env_proxy", ""),
    ("proxy::hosts", ""),
    ("proxy::resolver", ""),
    ("proxy::admission", "proxy::error proxy::reply"),
    ("proxy::cache", "clock identity proxy::error proxy::key proxy::reply"),
    ("proxy::cache::grant", "clock proxy::reply"),
    ("proxy::key", "identity"),
    ("proxy::body", "proxy::error proxy::reply"),
    ("proxy::guard", "identity::placeholder instance_key proxy::error shell_quoting"),
    ("proxy::reply", "proxy::error"),
    ("proxy::route", "proxy::error"),
    ("proxy::coach", "shell_quoting remedy"),
    ("proxy::error", "remedy"),
    ("proxy::stats", ""),
    ("identity::watch", "clock identity identity::env_file identity::succession identity::warning safe_read remedy"),
    ("identity::warned", "private_dir safe_read"),
    ("identity::warning", "clock events identity::env_file shell_quoting remedy safe_read"),
    ("identity::placeholder", "clock identity"),
    ("identity::succession", "clock identity safe_read"),
    ("identity::expiry", "clock events identity identity::refresh identity::warned identity::warning remedy"),
    ("identity::refresh", "clock events identity identity::warning identity::watch safe_read remedy"),
    ("identity::refresh::approvals", "identity::refresh::vercel_cli private_dir safe_read"),
    ("identity::refresh::schedule", "clock"),
    ("identity::refresh::turns", "clock identity private_dir safe_read"),
    ("identity::refresh::vercel_cli", "executable process_group"),
    ("identity", "clock remedy safe_read identity::warning"),
    ("identity::env_file", ""),
    ("identity::env_file::cases", "identity::env_file"),
    ("emulator", "emulator emulator::*"),
    ("emulator::gate", "emulator emulator::* server::peer"),
    ("cli", ""),
    ("clock", ""),
    ("hardening", ""),
    ("instance_key", ""),
    ("logging", "clock terminal"),
    (
        "intercept",
        "clock instance_key intercept::* proxy::error proxy::reply proxy::resolver server server::handover server::listener server::peer server::runs server::stream proxy::dialer proxy::env_proxy",
    ),
    ("intercept::ca", "clock private_dir tls"),
    ("intercept::leaf", "clock intercept::ca tls"),
    ("intercept::target", "proxy::error proxy::hosts proxy::resolver"),
    ("intercept::tunnel", "intercept::target proxy::dialer proxy::env_proxy proxy::error proxy::resolver tls"),
    ("port_owner", "client status::instance"),
    ("private_dir", "shell_quoting"),
    ("process_group", ""),
    ("safe_read", "remedy"),
    ("shell_quoting", ""),
    ("remedy", ""),
    ("terminal", ""),
    ("tls", ""),
];

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
    let line = MAY_USE.iter().find(|(name, _)| *name == module);
    match (line, module.rsplit_once("::")) {
        (Some((_, allowed)), _) => allowed.split(' ').any(|allowed| match allowed.strip_suffix('*') {
            Some(below) => used.starts_with(below),
            None => used == allowed,
        }),
        (None, Some((parent, _))) => may_use(parent, used),
        (None, None) => false,
    }
}

fn is_in(module: &str, folder: &str) -> bool {
    module.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[test]
fn dependencies_point_downwards() {
    let wrong: Vec<_> = uses(&sources()).into_iter().filter(|(module, used)| !may_use(module, used)).collect();
    assert!(wrong.is_empty(), "these use what they may not (see MAY_USE): {wrong:#?}");
}

#[test]
fn the_two_journeys_do_not_know_each_other_and_the_emulator_knows_neither() {
    let uses = uses(&sources());
    assert!(uses.len() > 40, "read wrongly: {uses:?}");
    for (module, used) in &uses {
        let from_to = |from, to| is_in(module, from) && is_in(used, to);
        assert!(!from_to("identity", "proxy"), "{module} uses {used}");
        let is_pure = ["identity", "identity::placeholder"].contains(&used.as_str());
        assert!(!from_to("proxy", "identity") || is_pure, "{module} uses {used}: types only");
        let is_shared = used == "server::peer";
        assert!(
            !is_in(module, "emulator") || is_in(used, "emulator") || is_shared,
            "{module} uses {used}: no other code"
        );
        assert!(!is_in(used, "main") && !is_in(used, "lib"), "{module} uses {used}");
    }
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
        pair("proxy", ""),
        pair("identity", "use crate::proxy::Proxy;"),
        pair("identity::watch", "use super::Identity;"),
        pair("proxy::stats", "use crate::identity::{Identity, watch};"),
    ]);
    let wrong: Vec<_> = uses(&sources).into_iter().filter(|(module, used)| !may_use(module, used)).collect();
    let expected = [("identity", "proxy"), ("proxy::stats", "identity"), ("proxy::stats", "identity::watch")];
    assert_eq!(wrong, expected.map(|(module, used)| pair(module, used)));
}
