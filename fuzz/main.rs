//! What must hold for bytes that somebody else wrote, whatever they are: a target for each reader of such bytes.
//!
//! `cargo test --example fuzz` runs each target on its seeds and on what is near them, on stable Rust and always the same
//! way. `fuzz/run` builds this very file against libFuzzer and lets it look for itself, again on stable Rust:
//! `--cfg fuzzing` does what cargo-fuzz needs nightly for. `cargo run --example fuzz TARGET FILE...` shows what a file
//! breaks. A target asserts what its reader promises, by means of its own, and not only that nothing panics. What was
//! found becomes a seed.
//!
//! (Not bolero: it pins a version of indexmap that our `toml` has left behind.)

#![cfg_attr(fuzzing, no_main)]

mod body_key;
mod config_file;
mod env_file;
mod oidc_token;
mod request;
mod upstream_response;

/// Panics if a promise is broken for these bytes.
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
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no target is called {name:?}")).1
}

/// libFuzzer has `main`; which target it runs is in `FUZZ_TARGET`.
#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static CHOSEN: std::sync::LazyLock<Target> =
        std::sync::LazyLock::new(|| target(&std::env::var("FUZZ_TARGET").unwrap_or_default()));
    CHOSEN(bytes);
});

/// Runs a target on files.
#[cfg(not(any(fuzzing, test)))]
fn main() {
    let mut args = std::env::args().skip(1);
    let check = target(&args.next().unwrap_or_default());
    args.for_each(|file| check(&std::fs::read(&file).unwrap_or_else(|e| panic!("{file}: {e}"))));
}

/// Whether `part` stands in `whole`.
fn contains(whole: &[u8], part: &[u8]) -> bool {
    part.is_empty() || whole.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod near_their_seeds {
    use std::fmt;
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::sample::{Index, select};
    use proptest::test_runner::{Config, TestRunner};

    /// To be read by people, and copied into a seed.
    struct Shown(Vec<u8>);

    impl fmt::Debug for Shown {
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

    /// A byte overwritten, or everything from there on cut off and another seed's end put in its place.
    fn changed(mut bytes: Vec<u8>, changes: &[(Index, Option<u8>, Vec<u8>, Index)]) -> Vec<u8> {
        for (at, byte, other, from) in changes {
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

    fn holds(name: &str) {
        let (seeds, check) = (seeds(name), super::target(name));
        assert!(!seeds.is_empty());
        seeds.iter().for_each(|seed| check(seed));
        let seed = || select(seeds.clone());
        let byte = prop_oneof![3 => any::<u8>().prop_map(Some), 1 => Just(None)];
        let changes = proptest::collection::vec((any::<Index>(), byte, seed(), any::<Index>()), 1..6);
        let near = (seed(), changes).prop_map(|(seed, changes)| Shown(changed(seed, &changes)));
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let rng = proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm);
        TestRunner::new_with_rng(config, rng)
            .run(&near, |bytes| {
                check(&bytes.0);
                Ok(())
            })
            .unwrap_or_else(|e| panic!("{e}"));
    }

    #[test]
    fn a_body_has_one_key_and_one_reading() {
        holds("body_key");
    }

    #[test]
    fn a_projects_file_redirects_nothing_and_no_mistake_tells_a_value() {
        holds("config_file");
    }

    #[test]
    fn a_token_that_is_found_stands_in_the_file() {
        holds("env_file");
    }

    #[test]
    fn a_token_that_is_taken_is_one_by_any_reading() {
        holds("oidc_token");
    }

    #[test]
    fn a_request_that_is_accepted_is_one_by_any_reading() {
        holds("request");
    }

    #[test]
    fn an_answer_that_is_relayed_or_stored_is_a_proper_one() {
        holds("upstream_response");
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
