//! Fuzz targets, one for each parser of untrusted bytes.
//!
//! `cargo test --example fuzz` runs every target on its seeds and on mutations of them, deterministically and on stable
//! Rust. `fuzz/run` builds this file with libFuzzer, also on stable Rust: `--cfg fuzzing` does what cargo-fuzz needs
//! nightly for. `cargo run --example fuzz TARGET FILE...` runs a target on files. A target asserts what its parser
//! guarantees, with an implementation of its own, and not only that nothing panics. Inputs that have failed become
//! seeds.
//!
//! (bolero cannot be used: it pins an older version of indexmap than `toml` needs.)

#![cfg_attr(fuzzing, no_main)]

mod body_key;
mod config_file;
mod env_file;
mod oidc_token;
mod request;
mod upstream_response;

/// Panics if a guarantee does not hold for these bytes.
type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("body_key", body_key::check),
    ("config_file", config_file::check),
    ("env_file", env_file::check),
    ("oidc_token", oidc_token::check),
    ("request", request::check),
    ("upstream_response", upstream_response::check),
];

fn target(name: &str) -> Target {
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("there is no target {name:?}")).1
}

/// libFuzzer provides `main`. The environment variable `FUZZ_TARGET` selects the target.
#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static SELECTED: std::sync::LazyLock<Target> =
        std::sync::LazyLock::new(|| target(&std::env::var("FUZZ_TARGET").unwrap_or_default()));
    SELECTED(bytes);
});

/// Runs a target on files.
#[cfg(not(any(fuzzing, test)))]
fn main() {
    let mut args = std::env::args().skip(1);
    let check = target(&args.next().unwrap_or_default());
    args.for_each(|file| check(&std::fs::read(&file).unwrap_or_else(|e| panic!("{file}: {e}"))));
}

/// Whether `whole` contains `part`.
fn contains(whole: &[u8], part: &[u8]) -> bool {
    part.is_empty() || whole.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod seeds_and_mutations {
    use std::fmt;
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::sample::{Index, select};
    use proptest::test_runner::{Config, TestRunner};

    /// An input that is printed as a byte string, to be copied into a seed.
    struct Input(Vec<u8>);

    impl fmt::Debug for Input {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "b\"{}\"", self.0.escape_ascii())
        }
    }

    fn seeds(name: &str) -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
        let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths.iter().map(|path| fs::read(path).expect("a seed")).collect()
    }

    /// Overwrites single bytes, or replaces the rest with the end of another seed.
    fn mutated(mut bytes: Vec<u8>, mutations: &[(Index, Option<u8>, Vec<u8>, Index)]) -> Vec<u8> {
        for (at, byte, other, from) in mutations {
            let at = at.index(bytes.len() + 1);
            match byte {
                Some(byte) if at < bytes.len() => bytes[at] = *byte,
                Some(byte) => bytes.push(*byte),
                None => {
                    bytes.truncate(at);
                    bytes.extend(&other[from.index(other.len() + 1)..]);
                }
            }
        }
        bytes
    }

    fn run_target(name: &str) {
        let (seeds, check) = (seeds(name), super::target(name));
        assert!(!seeds.is_empty());
        seeds.iter().for_each(|seed| check(seed));
        let seed = || select(seeds.clone());
        let byte = prop_oneof![3 => any::<u8>().prop_map(Some), 1 => Just(None)];
        let mutations = proptest::collection::vec((any::<Index>(), byte, seed(), any::<Index>()), 1..6);
        let inputs = (seed(), mutations).prop_map(|(seed, mutations)| Input(mutated(seed, &mutations)));
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let rng = proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm);
        TestRunner::new_with_rng(config, rng)
            .run(&inputs, |input| {
                check(&input.0);
                Ok(())
            })
            .unwrap_or_else(|e| panic!("{e}"));
    }

    #[test]
    fn body_key() {
        run_target("body_key");
    }

    #[test]
    fn config_file() {
        run_target("config_file");
    }

    #[test]
    fn env_file() {
        run_target("env_file");
    }

    #[test]
    fn oidc_token() {
        run_target("oidc_token");
    }

    #[test]
    fn request() {
        run_target("request");
    }

    #[test]
    fn upstream_response() {
        run_target("upstream_response");
    }

    #[test]
    fn every_target_has_seeds_and_every_seed_a_target() {
        let dirs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")).expect("a directory");
        let mut dirs: Vec<_> =
            dirs.map(|dir| dir.expect("an entry").file_name().into_string().expect("a name")).collect();
        dirs.sort();
        let targets: Vec<_> = super::TARGETS.iter().map(|(name, _)| *name).collect();
        assert_eq!(dirs, targets);
    }
}
