//! The programs that load env files: which files each reads, in which order and syntax, and which programs a project
//! uses.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::credential::env_file::syntax::Syntax;
use crate::os::safe_read;

/// How a program treats a variable that is both in its environment and in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EnvironmentRule {
    /// The environment overrides the file.
    OverridesFile,
    /// The file overrides the environment.
    OverriddenByFile,
    /// The environment is ignored.
    Ignored,
}

/// Which of several assignments in one file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Precedence {
    First,
    Last,
}

/// A program that loads env files. Of several files it uses the first that sets the variable.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) name: &'static str,
    /// The files that it reads in development, the one with the highest precedence first.
    pub(super) order: &'static [&'static str],
    /// The files that it reads if `NODE_ENV` is `test`, if they differ.
    in_tests: Option<&'static [&'static str]>,
    pub(super) environment: EnvironmentRule,
    pub(super) syntax: Syntax,
    pub(super) precedence: Precedence,
    /// Whether it reads the project's files by default.
    pub(super) is_framework: bool,
    /// What shows that a project uses it.
    signs: &'static [Sign],
}

#[derive(Debug)]
enum Sign {
    Package(&'static str),
    /// A file name; `*.config` matches any extension.
    File(&'static str),
    /// A Python package.
    Python(&'static str),
    /// A crate.
    Crate(&'static str),
}

use Sign::{Crate, File, Package, Python};

const LOCAL_FIRST: &[&str] = &[".env.development.local", ".env.local", ".env.development", ".env"];
const MODE_FIRST: &[&str] = &[".env.development.local", ".env.development", ".env.local", ".env"];
/// Without `.env.local`.
const TESTS: &[&str] = &[".env.test.local", ".env.test", ".env"];
const DEFAULT: Reader = Reader {
    name: "",
    order: &[".env"],
    in_tests: None,
    environment: EnvironmentRule::OverridesFile,
    syntax: Syntax::Dotenv,
    precedence: Precedence::Last,
    is_framework: true,
    signs: &[],
};

/// All known readers. Those that read only files named on their command line come last.
pub(super) const READERS: &[Reader] = &[
    Reader {
        name: "Next.js",
        order: LOCAL_FIRST,
        in_tests: Some(TESTS),
        signs: &[Package("next"), File("next.config")],
        ..DEFAULT
    },
    Reader {
        name: "Vite",
        order: MODE_FIRST,
        syntax: Syntax::Node,
        signs: &[Package("vite"), File("vite.config")],
        ..DEFAULT
    },
    Reader {
        name: "SvelteKit",
        order: MODE_FIRST,
        syntax: Syntax::Node,
        signs: &[Package("@sveltejs/kit"), File("svelte.config")],
        ..DEFAULT
    },
    Reader { name: "Astro", order: MODE_FIRST, signs: &[Package("astro"), File("astro.config")], ..DEFAULT },
    Reader {
        name: "React Router",
        order: MODE_FIRST,
        syntax: Syntax::Node,
        signs: &[Package("@react-router/dev"), File("react-router.config")],
        ..DEFAULT
    },
    Reader { name: "Nuxt", signs: &[Package("nuxt"), File("nuxt.config")], ..DEFAULT },
    Reader { name: "Nest", signs: &[Package("@nestjs/config"), File("nest-cli.json")], ..DEFAULT },
    Reader {
        name: "Bun",
        order: LOCAL_FIRST,
        in_tests: Some(TESTS),
        signs: &[File("bun.lock"), File("bun.lockb"), File("bunfig.toml"), Package("bun"), Package("@types/bun")],
        ..DEFAULT
    },
    Reader { name: "Expo", order: LOCAL_FIRST, syntax: Syntax::Node, signs: &[Package("expo")], ..DEFAULT },
    Reader {
        name: "Nx",
        order: &[".env.dev.local", ".env.dev", ".env.local", ".local.env", ".env"],
        signs: &[Package("nx"), File("nx.json")],
        ..DEFAULT
    },
    Reader {
        name: "Wrangler",
        order: &[".dev.vars", ".env.local", ".env"],
        environment: EnvironmentRule::Ignored,
        signs: &[
            Package("wrangler"),
            File("wrangler.toml"),
            File("wrangler.json"),
            File("wrangler.jsonc"),
            File(".dev.vars"),
        ],
        ..DEFAULT
    },
    Reader {
        name: "Flask",
        order: &[".env", ".flaskenv"],
        syntax: Syntax::Python,
        signs: &[File(".flaskenv"), Python("flask")],
        ..DEFAULT
    },
    Reader {
        name: "direnv",
        order: &[".envrc"],
        environment: EnvironmentRule::OverriddenByFile,
        signs: &[File(".envrc")],
        ..DEFAULT
    },
    Reader { name: "dotenv", is_framework: false, signs: &[Package("dotenv")], ..DEFAULT },
    Reader {
        name: "python-dotenv",
        syntax: Syntax::Python,
        is_framework: false,
        signs: &[Python("python-dotenv")],
        ..DEFAULT
    },
    Reader {
        name: "dotenvy",
        syntax: Syntax::Dotenvy,
        precedence: Precedence::First,
        is_framework: false,
        signs: &[Crate("dotenvy")],
        ..DEFAULT
    },
    Reader { name: "`node --env-file`", order: &[], syntax: Syntax::Node, is_framework: false, ..DEFAULT },
    Reader {
        name: "Deno",
        order: &[],
        syntax: Syntax::Node,
        precedence: Precedence::First,
        is_framework: false,
        signs: &[File("deno.json"), File("deno.jsonc"), File("deno.lock")],
        ..DEFAULT
    },
];

impl Reader {
    /// The files that it reads, the one with the highest precedence first. A reader that gets its files on the command
    /// line is assumed to get `source`.
    pub(super) fn order<'a>(
        &self,
        source: &'a str,
        node_env: Option<&str>,
        exists: impl Fn(&str) -> bool,
    ) -> Vec<&'a str>
    where
        'static: 'a,
    {
        match self.in_tests {
            _ if self.order.is_empty() => vec![source],
            Some(order) if node_env == Some("test") => order.to_vec(),
            // If Wrangler finds its first file, it reads no other.
            _ if self.order[0] == ".dev.vars" && exists(".dev.vars") => vec![".dev.vars"],
            _ => self.order.to_vec(),
        }
    }
}

/// The readers that a project uses, by name.
#[derive(Debug, Default)]
pub(super) struct UsedReaders(BTreeSet<&'static str>);

impl UsedReaders {
    /// Detects them by the project's packages and files.
    pub(super) fn gather(project: &Path) -> Self {
        let read = |name: &str| safe_read::read(&project.join(name)).map(|content| content.bytes).unwrap_or_default();
        let package: Map<String, Value> = serde_json::from_slice(&read("package.json")).unwrap_or_default();
        let packages: BTreeSet<&str> = ["dependencies", "devDependencies", "optionalDependencies"]
            .into_iter()
            .filter_map(|kind| package.get(kind)?.as_object())
            .flat_map(Map::keys)
            .map(String::as_str)
            .collect();
        let names = fs::read_dir(project).into_iter().flatten().flatten();
        let names: BTreeSet<_> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let python = ["requirements.txt", "pyproject.toml", "Pipfile", "uv.lock", "poetry.lock"];
        let python = python.map(|name| String::from_utf8_lossy(&read(name)).to_ascii_lowercase()).join("\n");
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let python: BTreeSet<_> = python.split(|c| !is_word(c)).collect();
        let manifest = String::from_utf8_lossy(&read("Cargo.toml")).into_owned();
        let crates: BTreeSet<_> = manifest.split(|c| !is_word(c)).collect();
        let is_present = |sign: &Sign| match sign {
            Package(name) => packages.contains(name),
            Python(name) => python.contains(name),
            Crate(name) => crates.contains(name),
            File(stem) => {
                names.contains(*stem)
                    || (stem.ends_with(".config") && names.iter().any(|name| name.starts_with(&format!("{stem}."))))
            }
        };
        Self(READERS.iter().filter(|reader| reader.signs.iter().any(is_present)).map(|reader| reader.name).collect())
    }

    /// A project that uses these.
    #[cfg(test)]
    pub(super) fn of(names: &[&'static str]) -> Self {
        Self(names.iter().copied().collect())
    }

    /// Whether the project uses this reader.
    pub(super) fn has(&self, reader: &Reader) -> bool {
        self.0.contains(reader.name)
    }

    /// Whether the token that this reader finds matters. If no framework is detected, every one that reads `.env.local`
    /// does.
    pub(super) fn is_relevant(&self, reader: &Reader) -> bool {
        let is_any_used = || READERS.iter().any(|other| other.is_framework && self.has(other));
        reader.is_framework && (self.has(reader) || (reader.order.contains(&".env.local") && !is_any_used()))
    }

    /// All readers, those that the project uses first.
    pub(super) fn used_first(&self) -> impl Iterator<Item = &'static Reader> {
        let (used, others): (Vec<_>, Vec<_>) = READERS.iter().partition(|reader| self.has(reader));
        used.into_iter().chain(others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(files: &[(&str, &str)]) -> Vec<&'static str> {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, content) in files {
            fs::write(dir.path().join(name), content).expect("a file");
        }
        let used = UsedReaders::gather(dir.path());
        used.used_first().take_while(|reader| used.has(reader)).map(|reader| reader.name).collect()
    }

    #[test]
    fn used_readers_are_detected_by_packages_and_files() {
        let next = r#"{"dependencies":{"next":"16.0.0","nextra":"4"},"devDependencies":{"wrangler":"4"}}"#;
        for (files, expected) in [
            (vec![], vec![]),
            (vec![("package.json", "no JSON")], vec![]),
            (vec![("package.json", r#"{"dependencies":["next"]}"#)], vec![]),
            (vec![("package.json", next)], vec!["Next.js", "Wrangler"]),
            (
                vec![("package.json", r#"{"devDependencies":{"@sveltejs/kit":"2","vite":"8"}}"#)],
                vec!["Vite", "SvelteKit"],
            ),
            (
                vec![("package.json", r#"{"devDependencies":{"astro":"6","nuxt":"4","expo":"55"}}"#)],
                vec!["Astro", "Nuxt", "Expo"],
            ),
            (
                vec![("package.json", r#"{"dependencies":{"@nestjs/config":"4","@react-router/dev":"7"}}"#)],
                vec!["React Router", "Nest"],
            ),
            (vec![("next.config.mjs", ""), ("bun.lock", ""), ("deno.json", "")], vec!["Next.js", "Bun", "Deno"]),
            (vec![("bun.lock.bak", ""), ("my-next.config.js", "")], vec![]),
            (vec![("nx.json", ""), (".envrc", ""), ("wrangler.jsonc", "")], vec!["Nx", "Wrangler", "direnv"]),
            (vec![("requirements.txt", "Flask==3.1.3\n")], vec!["Flask"]),
            (vec![("Cargo.toml", "[dependencies]\ndotenvy = \"0.15\"\n")], vec!["dotenvy"]),
            (vec![("Cargo.toml", "[dependencies]\ndotenvy_macro = \"0.15\"\n")], vec![]),
            (vec![("pyproject.toml", "dependencies = [\"python-dotenv>=1\", \"flask-login\"]")], vec!["python-dotenv"]),
        ] {
            assert_eq!(used(&files), expected, "{files:?}");
        }
    }

    #[test]
    fn wrangler_reads_only_its_own_file_if_it_exists() {
        let wrangler = READERS.iter().find(|reader| reader.name == "Wrangler").expect("it is known");
        assert_eq!(wrangler.order(".env.local", None, |_| true), [".dev.vars"]);
        assert_eq!(wrangler.order(".env.local", None, |name| name != ".dev.vars")[1..], [".env.local", ".env"]);
    }

    #[test]
    fn next_and_bun_do_not_read_the_local_file_in_tests() {
        let without = READERS.iter().filter(|reader| {
            let reads = |node_env| reader.order(".env.local", node_env, |_| false).contains(&".env.local");
            reads(None) && !reads(Some("test"))
        });
        assert_eq!(without.map(|reader| reader.name).collect::<Vec<_>>(), ["Next.js", "Bun"]);
    }
}
