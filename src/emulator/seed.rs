//! The seed file: a [`World`] in TOML. All mistakes of a file are reported at once, each with its line.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue, Deserializer};

use super::allowlist::Allowlist;
use super::world::{PathStep, Problem, World};

/// An example of a seed with all settings and comments.
pub const EXAMPLE: &str = include_str!("example-seed.toml");

/// A mistake in a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// All mistakes of a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedError(pub Vec<Mistake>);

impl fmt::Display for SeedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Mistake { line, message }) in self.0.iter().enumerate() {
            write!(f, "{}line {line}: {message}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for SeedError {}

/// Parses a seed that may not use any variable or remote issuer.
pub fn read(text: &str) -> Result<World, SeedError> {
    read_with(text, &Allowlist::default())
}

/// Parses a seed that may use what the allowlist permits.
pub fn read_with(text: &str, allowlist: &Allowlist) -> Result<World, SeedError> {
    let line = |span: Range<usize>| text.bytes().take(span.start).filter(|b| *b == b'\n').count() + 1;
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let mistake = |error: &toml::de::Error| Mistake {
            line: line(error.span().unwrap_or_default()),
            message: format!("not TOML: {}", error.message()),
        };
        return Err(SeedError(errors.iter().map(mistake).collect()));
    }
    // serde stops at the first mistake. Its value is removed and the rest parsed again, to find the next one.
    let (mut mistakes, mut rest, mut removed, mut is_complete) = (Vec::new(), document.clone(), Vec::new(), true);
    let world = loop {
        let error = match World::deserialize(Deserializer::from(rest.clone())) {
            Ok(world) => break Some(world),
            Err(error) => error,
        };
        let span = error.span().unwrap_or_default();
        let is_missing = error.message().starts_with("missing field");
        // A field that is missing because it was removed here is not a mistake.
        if !(is_missing && removed.iter().any(|taken: &Range<usize>| is_within(taken, &span))) {
            mistakes.push(Mistake { line: line(span.clone()), message: error.message().into() });
        }
        is_complete &= !is_missing;
        if !remove(rest.get_mut(), &span) {
            break None;
        }
        removed.push(span);
    };
    if let Some(mut world) = world {
        world.complete();
        // If a whole item was removed, references to it would be reported as well.
        if is_complete {
            let problems = world.problems().into_iter().chain(allowlist.problems(&world));
            mistakes.extend(
                problems.map(|Problem { path, message }| Mistake {
                    line: line(span_of(document.get_ref(), &path)),
                    message,
                }),
            );
        }
        if mistakes.is_empty() {
            return Ok(world);
        }
    }
    mistakes.sort_by_key(|mistake| mistake.line);
    Err(SeedError(mistakes))
}

fn is_within(inner: &Range<usize>, outer: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// Removes the entry or item at `span`. Returns whether there was one.
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    let is_at = |key: &Range<usize>, value: &Range<usize>| key == span || value == span;
    let found = table.iter().find(|(key, value)| is_at(&key.span(), &value.span())).map(|(key, _)| key.clone());
    if let Some(key) = found {
        table.remove(&key);
        return true;
    }
    table.iter_mut().any(|(_, value)| remove_within(value, span))
}

fn remove_within(value: &mut Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    match value.get_mut() {
        DeValue::Table(table) => remove(table, span),
        DeValue::Array(items) if items.iter().any(|item| item.span() == *span) => {
            *items = std::mem::replace(items, DeArray::new()).into_iter().filter(|item| item.span() != *span).collect();
            true
        }
        DeValue::Array(items) => items.iter_mut().any(|item| remove_within(item, span)),
        _ => false,
    }
}

/// The span of the value at `path`, or of its closest existing parent.
fn span_of(document: &DeTable<'_>, path: &[PathStep]) -> Range<usize> {
    let mut at = 0..0;
    let mut value: Option<&DeValue<'_>> = None;
    for step in path {
        let next = match (step, value) {
            (PathStep::Key(key), None) => document.get(*key),
            (PathStep::Key(key), Some(value)) => value.as_table().and_then(|table| table.get(*key)),
            (PathStep::Item(index), Some(value)) => value.as_array().and_then(|items| items.get(*index)),
            (PathStep::Item(_), None) => None,
        };
        let Some(next) = next else { break };
        (at, value) = (next.span(), Some(next.get_ref()));
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn mistakes(text: &str) -> Vec<(usize, String)> {
        let error = read(text).expect_err("mistakes");
        error.0.into_iter().map(|mistake| (mistake.line, mistake.message)).collect()
    }

    #[test]
    fn the_example_is_valid_and_complete() {
        let world = read(EXAMPLE).unwrap_or_else(|e| panic!("{e}"));
        assert!(!world.members.is_empty() && !world.connectors.is_empty() && !world.access_tokens.is_empty());
        assert!(!world.sessions.is_empty() && !world.faults.is_empty() && world.limits.is_some());
    }

    #[test]
    fn a_team_is_enough() {
        let world = read("[team]\nslug = \"acme\"").expect("a world");
        assert_eq!((world.team.id.as_str(), world.limits), ("team_acme", None));
    }

    #[test]
    fn absent_ids_are_derived_and_projects_can_be_named() {
        let world = read(
            "[team]\nslug = \"acme\"\n[[projects]]\nname = \"web\"\n[[connectors]]\nuid = \"slack/acme-slack\"\n\
             links = [{ project = \"web\", environments = [\"preview\"] }]",
        )
        .expect("a world");
        let connector = &world.connectors[0];
        assert_eq!((connector.id.as_str(), connector.kind.as_str()), ("scl_slack_acme_slack", "slack"));
        assert_eq!(connector.links[0].project_id, "prj_web");
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_their_lines() {
        let found = mistakes(
            "[team]\nslug = \"acme\"\nname = \"Acme\"\n[[members]]\nid = \"user_ada\"\nrole = \"boss\"\n[[connectors]]\n\
             uid = \"slack/x\"\ntoken_life = \"soon\"\nlinks = [{ project = \"web\", environments = [\"preview\"] }]\n\
             [[sessions]]\ntoken = \"vca_1\"\nuser = \"user_bob\"\n[[faults]]\nkind = \"latency\"\n",
        );
        let expected = [
            (3, "unknown field `name`, expected one of"),
            (6, "expected one of `owner`, `member`, `developer`, `viewer`"),
            (9, "expected a duration"),
            (10, "there is no project `web`"),
            (13, "there is no member `user_bob`; there is: user_ada"),
            (15, "this kind needs `by`"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for ((line, message), (expected_line, part)) in found.iter().zip(expected) {
            assert!(*line == expected_line && message.contains(part), "{line}: {message}, not {expected_line}: {part}");
        }
    }

    #[test]
    fn durations_are_limited_to_ten_years() {
        for (life, is_good) in [("3650days", true), ("3651days", false), ("18446744073709551615s", false)] {
            let seed = read(&format!("[team]\nslug = \"acme\"\noidc_token_life = \"{life}\"\n"));
            assert_eq!(seed.is_ok(), is_good, "{life}");
        }
    }

    #[test]
    fn missing_fields_and_duplicates_are_reported() {
        let found = mistakes("[team]\nslug = \"acme\"\n[[projects]]\nid = \"prj_1\"\n[[connectors]]\nid = \"scl_1\"\n");
        assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 5], "{found:?}");
        assert!(found[0].1.contains("missing field `name`") && found[1].1.contains("missing field `uid`"), "{found:?}");
        let session = "[[sessions]]\ntoken = \"vca_secret\"\nuser = \"user_ada\"\n";
        let found = mistakes(&format!("[team]\nslug = \"a\"\n[[members]]\nid = \"user_ada\"\n{session}{session}"));
        assert_eq!(found, [(9, "another has the token, too".to_owned())]);
    }

    #[test]
    fn a_syntax_error_is_reported_with_its_line() {
        assert_eq!(mistakes("[team]\nslug = acme\n")[0].0, 2);
    }
}
