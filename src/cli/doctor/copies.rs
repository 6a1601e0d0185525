//! Several copies of the token, or one that is read in several ways: who would take which, and what to change. Pure.
//!
//! `vercel env pull` renews one file; a framework may read another (vercel/vercel#13404).

use super::env_files::{EnvFile, Oddity, Purpose, Reading};
use super::finding::{Finding, Severity};
use super::readers::{Environment, Reader, Used};
use crate::credential::env_file::KEY;
use crate::credential::token_file::TokenReading;
use crate::os::clock::{Expiry, Timestamp, format_duration};
use crate::os::shell_quoting;

/// Judges all copies, at `now`. `node_env` is that of the shell.
pub(super) fn judge<'a>(
    files: impl Iterator<Item = &'a EnvFile>,
    used: &Used,
    node_env: Option<&str>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (loaded, others): (Vec<_>, Vec<_>) = files.partition(|file| file.purpose == Purpose::Loaded);
    findings.extend(others.into_iter().filter_map(judge_other));
    let source = loaded.iter().copied().find(|file| file.is_source);
    if node_env == Some("test") && source.is_some_and(|file| file.shown == ".env.local" && file.has_a_value()) {
        let title = "NODE_ENV is `test` in this shell, so Next.js and Bun do not read .env.local";
        let detail = "An app that is started here, outside `connect-sidecar run`, finds no token there.";
        findings.push(Finding::new(Severity::Warning, "node_env_test", title, detail).fix("unset NODE_ENV"));
    }
    findings.extend(source.and_then(|file| judge_syntax(file, used, now)));
    let takers = takers(&loaded, used, node_env);
    findings.extend(source.into_iter().flat_map(|source| judge_empty(source, &takers)));
    findings.extend(judge_values(&loaded, &takers, used, now));
    findings
}

/// A file that no program loads.
fn judge_other(file: &EnvFile) -> Option<Finding> {
    let shown = &file.shown;
    let detail = "It is good until it expires, for whoever reads it.";
    match file.purpose {
        Purpose::Loaded => None,
        // It is there to be published.
        Purpose::Template => file.token().map(|_| {
            let title = format!("there is a token in {shown}, which is a template");
            Finding::new(
                Severity::Warning,
                "token_in_template",
                title,
                format!("{detail} Put a placeholder in its place."),
            )
        }),
        Purpose::Backup => file.has_a_value().then(|| {
            let title = format!("there is a copy of the token in {shown}, a backup that no program reads");
            let fix = format!("rm {}", shell_quoting::path(shown));
            Finding::new(Severity::Note, "token_in_backup", title, detail).fix(fix)
        }),
    }
}

/// The readers that find the variable, each with where, those that the project uses first. Nothing tells what a program
/// that is told which file to read is told.
fn takers<'a>(files: &[&'a EnvFile], used: &Used, node_env: Option<&str>) -> Vec<(&'static Reader, &'a EnvFile)> {
    let shell = files.iter().copied().find(|file| file.path.is_none());
    let named = |name: &str| files.iter().copied().find(|file| file.path.is_some() && file.shown == name);
    let taken = |reader: &'static Reader| {
        let order = reader.order("", node_env, |name| named(name).is_some());
        let sets = |file: &&EnvFile| !matches!(file.reading(reader), Reading::Unset);
        let in_file = order.into_iter().filter_map(named).find(sets);
        let file = match reader.environment {
            Environment::Wins => shell.or(in_file),
            Environment::Loses => in_file.or(shell),
            Environment::Unseen => in_file,
        };
        Some((reader, file?))
    };
    used.first().filter_map(taken).collect()
}

/// Each group of readers that take the same.
fn grouped<'a, T>(
    takers: &[(&'static Reader, &'a T)],
    is_same: impl Fn(&T, &T) -> bool,
) -> Vec<(Vec<&'static str>, &'a T)> {
    let mut groups: Vec<(Vec<&'static str>, &T)> = Vec::new();
    for (reader, taken) in takers {
        match groups.iter_mut().find(|(_, other)| is_same(other, taken)) {
            Some((names, _)) => names.push(reader.name),
            None => groups.push((vec![reader.name], taken)),
        }
    }
    groups
}

/// `A`, `A and B`, `A, B and C`.
fn enumerated(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [name] => (*name).to_owned(),
        [names @ .., last] => format!("{} and {last}", names.join(", ")),
    }
}

/// The one file, read in several ways.
fn judge_syntax(source: &EnvFile, used: &Used, now: Timestamp) -> Option<Finding> {
    let shown = &source.shown;
    // Of those that the project does not use, the two of which all others are made.
    let may_read =
        |reader: &&Reader| reader.order.is_empty() || !reader.is_framework || reader.order.contains(&shown.as_str());
    let is_usual = |reader: &Reader| matches!(reader.name, "dotenv" | "`node --env-file`");
    let concerned = |reader: &&Reader| used.has(reader) || used.matters(reader) || is_usual(reader);
    let readers: Vec<_> = used.first().filter(may_read).filter(concerned).collect();
    let readings: Vec<_> = readers.into_iter().map(|reader| (reader, source.reading(reader))).collect();
    let is_ours = |reading: &Reading| match (&source.found, reading) {
        (TokenReading::Token { token, .. }, Reading::Token(other)) => token.is_same_text(other),
        (TokenReading::Missing, Reading::Unset | Reading::Empty) | (TokenReading::Invalid(_), Reading::Other) => true,
        _ => false,
    };
    if readings.iter().all(|(_, reading)| is_ours(reading)) {
        return source.is_padded.then(|| {
            let title = format!("blanks or a line end stand inside the quotes of {KEY} in {shown}");
            let detail = "The sidecar leaves them out; a program that sends the value as it is may be refused.";
            Finding::new(Severity::Note, "token_padded", title, detail).fix("vercel env pull")
        });
    }
    let who = grouped(&readings, Reading::is_same_as).into_iter().map(|(names, reading)| {
        let (take, find) = if names.len() == 1 { ("takes", "finds") } else { ("take", "find") };
        let names = enumerated(&names);
        match reading {
            Reading::Unset | Reading::Empty => format!("{names} {find} none"),
            Reading::Other => format!("{names} {find} something that is no token"),
            Reading::Token(token) => {
                format!("{names} {take} that of {} ({})", token.claims.project_name(), token.fingerprint())
            }
        }
    });
    let who = who.collect::<Vec<_>>().join("; ");
    let (change, fix) = remedy(source);
    let detail = format!("{who}; the sidecar has: {}. {change}.", described(source, now));
    let title = format!("programs that read {shown} take different values of {KEY}");
    let finding = Finding::new(Severity::Warning, "readers_differ", title, detail);
    Some(finding.fix(fix))
}

/// What to change, and a command that changes it.
fn remedy(source: &EnvFile) -> (String, String) {
    let file = shell_quoting::path(&source.shown);
    let pull = || "vercel env pull".to_owned();
    match source.oddity {
        Some(Oddity::ByteOrderMark) => (
            "The file starts with a byte order mark, which some take for a part of the name: save it without".into(),
            format!("sed {IN_PLACE} $'1s/^\\xEF\\xBB\\xBF//' {file}"),
        ),
        Some(Oddity::Colon) => (
            format!("Write `{KEY}=` for `{KEY}:`"),
            format!("sed {IN_PLACE} -E 's/^([[:space:]]*(export[[:space:]]+)?{KEY})[[:space:]]*:/\\1=/' {file}"),
        ),
        Some(Oddity::Duplicates(count)) => (format!("Keep one of the {count} assignments"), pull()),
        Some(Oddity::OpenQuote(line)) => (format!("Close the quote that line {line} opens"), pull()),
        Some(Oddity::CarriageReturns) => (
            "Lines end in a carriage return alone: save the file with line feeds".into(),
            format!("perl -pi -e 's/\\r/\\n/g' {file}"),
        ),
        None => (format!("Write it as `{KEY}=\"...\"`, on a line of its own"), pull()),
    }
}

/// Where nothing hides a token.
fn judge_empty(source: &EnvFile, takers: &[(&'static Reader, &EnvFile)]) -> Vec<Finding> {
    if source.token().is_none() {
        return Vec::new();
    }
    let is_hidden =
        |(reader, file): &&(&Reader, &EnvFile)| !file.is_source && matches!(file.reading(reader), Reading::Empty);
    let hidden: Vec<_> = takers.iter().filter(is_hidden).map(|(reader, file)| (*reader, *file)).collect();
    let groups = grouped(&hidden, |a, b| std::ptr::eq(a, b));
    let findings = groups.into_iter().map(|(names, file)| {
        let (code, title) = match file.path {
            None => ("empty_variable_wins", format!("{KEY} is set in this shell, to nothing")),
            Some(_) => ("empty_value_wins", format!("{} sets {KEY} to nothing", file.shown)),
        };
        let find = if names.len() == 1 { "finds" } else { "find" };
        let names = enumerated(&names);
        let detail = format!("It counts more than the token in {}: {names} {find} none.", source.shown);
        Finding::new(Severity::Warning, code, title, detail).fix(removal(file))
    });
    findings.collect()
}

/// Several values.
fn judge_values(
    loaded: &[&EnvFile],
    takers: &[(&'static Reader, &EnvFile)],
    used: &Used,
    now: Timestamp,
) -> Option<Finding> {
    let copies: Vec<_> = loaded.iter().copied().filter(|file| file.has_a_value()).collect();
    let others: Vec<_> = copies.iter().filter(|file| !file.is_source).copied().collect();
    let first_other = others.first()?;
    let source = loaded.iter().copied().find(|file| file.is_source);
    let Some(source) = source.filter(|file| file.has_a_value()) else {
        // There is none where the sidecar reads: that there is one elsewhere may be all that is wrong.
        let file = others.iter().find(|f| f.path.is_some() && f.token().is_some_and(|t| t.is_valid_at(now)))?;
        let title = format!("there is a good OIDC token in {}, which the sidecar does not read", file.shown);
        let fix = format!("connect-sidecar --env-file {}", shell_quoting::path(&file.shown));
        return Some(Finding::new(Severity::Note, "token_elsewhere", title, "").fix(fix));
    };
    let is_same = |a: &EnvFile, b: &EnvFile| match (a.token(), b.token()) {
        (Some(a), Some(b)) => a.is_same_text(b),
        _ => false,
    };
    let pull = format!("`vercel env pull` renews {} alone (vercel/vercel#13404).", source.shown);
    let fix = others.iter().map(|file| removal(file)).collect::<Vec<_>>().join(" && ");
    if others.iter().all(|other| is_same(source, other)) {
        let title = format!("{KEY} is set in {}, the same in each", listed(&copies));
        return Some(Finding::new(Severity::Note, "token_copied", title, pull).fix(fix));
    }
    let takers: Vec<_> = takers.iter().filter(|(_, file)| file.has_a_value()).copied().collect();
    let stale =
        |(_, file): &&(&Reader, &EnvFile)| !file.is_source && !file.token().is_some_and(|token| token.is_valid_at(now));
    let is_stale = takers.iter().any(|taker| stale(&taker));
    let matters = takers.iter().filter(stale).any(|(reader, _)| used.matters(reader));
    let mut who: Vec<_> = grouped(&takers, |a, b| std::ptr::eq(a, b))
        .into_iter()
        .map(|(names, file)| {
            let verb = if names.len() == 1 { "takes" } else { "take" };
            format!("{} {verb} that of {}", enumerated(&names), file.shown)
        })
        .collect();
    if copies.iter().any(|file| file.path.is_none()) {
        who.push("`node --env-file`, Deno and the SDK that of the shell".into());
    } else {
        who.push("`node --env-file` and Deno take that of the file they are given".into());
        who.push("the SDK what any has loaded".into());
    }
    let each: Vec<_> = copies.iter().map(|file| format!("{}: {}", file.shown, described(file, now))).collect();
    let detail = format!("{}. {}; the sidecar takes that of {}. {pull}", each.join("; "), who.join("; "), source.shown);
    let (severity, code) = match (is_stale, matters) {
        (true, true) => (Severity::Problem, "stale_copy_wins"),
        (true, false) => (Severity::Warning, "stale_copy_wins"),
        (false, _) => (Severity::Warning, "copies_differ"),
    };
    let title = match others.as_slice() {
        [_] => format!("{KEY} is not the same in {} and {}", source.shown, first_other.shown),
        _ => format!("{KEY} is not the same in {}", listed(&copies)),
    };
    Some(Finding::new(severity, code, title, detail).fix(fix))
}

fn listed(files: &[&EnvFile]) -> String {
    files.iter().map(|file| file.shown.as_str()).collect::<Vec<_>>().join(", ")
}

fn described(file: &EnvFile, now: Timestamp) -> String {
    match &file.found {
        TokenReading::Missing => "none".into(),
        TokenReading::Invalid(defect) => format!("unusable, {defect}"),
        TokenReading::Token { token, .. } => {
            let life = match token.expires_at.expiry(now) {
                Expiry::In(left) => format!("{} left", format_duration(left)),
                ago => ago.to_string(),
            };
            format!("{} ({}), {life}", token.claims.project_name(), token.fingerprint())
        }
    }
}

/// As BSD's sed wants it, or GNU's.
const IN_PLACE: &str = if cfg!(target_os = "macos") { "-i ''" } else { "-i" };

/// The command that removes a copy.
fn removal(file: &EnvFile) -> String {
    match file.path {
        None => format!("unset {KEY}"),
        Some(_) => format!(
            "sed {IN_PLACE} -E '/^[[:space:]]*(export[[:space:]]+)?{KEY}[[:space:]]*=/d' {}",
            shell_quoting::path(&file.shown)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::env_files::fixtures::{NOW, file, source, token};

    const SOURCE: &str = ".env.local";
    const SHELL: &str = "";

    fn judged(files: &[(&str, &str)], node_env: Option<&str>) -> Vec<Finding> {
        let files: Vec<_> = files.iter().map(|(name, value)| file(name, value)).collect();
        judge(files.iter(), &Used::default(), node_env, NOW)
    }

    #[test]
    fn what_several_copies_mean_depends_on_who_takes_which() {
        let (good, other) = (token("web", 9000, "development"), token("api", 9000, "development"));
        let stale = token("web", -60, "development");
        let (good, other, stale) = (good.as_str(), other.as_str(), stale.as_str());
        use Severity::{Note, Problem, Warning};
        for (files, expected) in [
            (vec![(SOURCE, good)], None),
            (vec![(SOURCE, good), (".env", good)], Some((Note, "token_copied"))),
            (vec![(SOURCE, good), (SHELL, good)], Some((Note, "token_copied"))),
            // It wins everywhere.
            (vec![(SHELL, stale), (SOURCE, good)], Some((Problem, "stale_copy_wins"))),
            (vec![(SHELL, "nonsense"), (SOURCE, good)], Some((Problem, "stale_copy_wins"))),
            (vec![(SHELL, other), (SOURCE, good)], Some((Warning, "copies_differ"))),
            (vec![(SOURCE, good), (".env.development.local", stale)], Some((Problem, "stale_copy_wins"))),
            // In Vite.
            (vec![(SOURCE, good), (".env.development", stale)], Some((Problem, "stale_copy_wins"))),
            // With dotenv alone.
            (vec![(SOURCE, good), (".env", stale)], Some((Warning, "stale_copy_wins"))),
            // Nobody takes it.
            (vec![(SOURCE, good), (".env.production", stale)], Some((Warning, "copies_differ"))),
            // A fresh pull would mend this one alone.
            (vec![(SOURCE, stale), (".env.development.local", good)], Some((Warning, "copies_differ"))),
            (vec![(".env.development.local", good)], Some((Note, "token_elsewhere"))),
            (vec![(".env.development.local", stale)], None),
            (vec![(SHELL, good)], None),
        ] {
            let judged = judged(&files, None);
            let found: Vec<_> = judged.iter().map(|f| (f.severity, f.code.as_ref())).collect();
            let names: Vec<_> = files.iter().map(|(name, _)| name).collect();
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{names:?}");
        }
    }

    #[test]
    fn it_is_said_who_takes_which_and_what_to_remove() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        let finding = &judged(&[(SOURCE, &good), (".env.development", &stale)], None)[0];
        for said in [
            "Next.js, Bun, Expo, Nx and Wrangler take that of .env.local;",
            "Vite, SvelteKit, Astro and React Router take that of .env.development;",
            "expired 1 min ago",
        ] {
            assert!(finding.detail.contains(said), "{said}: {}", finding.detail);
        }
        assert!(!finding.detail.contains("dotenv takes"), "there is no .env: {}", finding.detail);
        let finding = &judged(&[(SOURCE, &good), (".env.development.local", &stale)], None)[0];
        assert!(
            finding.detail.contains(
                "Next.js, Vite, SvelteKit, Astro, React Router, Bun and Expo take that of .env.development.local;"
            ),
            "{}",
            finding.detail
        );
        let finding = &judged(&[(SHELL, &stale), (SOURCE, &good), (".env", &stale)], None)[0];
        let fix = finding.fix.as_deref().expect("a fix");
        assert!(fix.starts_with("unset VERCEL_OIDC_TOKEN && sed ") && fix.ends_with(" .env"), "{fix}");
    }

    #[test]
    fn in_tests_next_does_not_read_the_local_file() {
        let good = token("web", 9000, "development");
        let codes = |node_env| {
            let found = judged(&[(SOURCE, &good)], node_env);
            found.into_iter().map(|f| f.code.into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(codes(Some("test")), ["node_env_test"]);
        assert!(codes(Some("development")).is_empty());
        let stale = token("web", -60, "development");
        let files = [(SOURCE, good.as_str()), (".env.test", stale.as_str())];
        assert_eq!(judged(&files, Some("test"))[1].severity, Severity::Problem);
        assert_eq!(judged(&files, None)[0].severity, Severity::Warning);
    }

    #[test]
    fn each_way_to_write_the_file_is_judged_by_who_takes_what() {
        use crate::cli::doctor::credential;
        let (t1, t2) = (token("web", 9000, "development"), token("api", 9000, "development"));
        for case in crate::credential::env_file::cases::CASES {
            let file = source(case.file(&t1, &t2).as_bytes());
            let circumstances =
                credential::Circumstances { now: NOW, expiring_below: std::time::Duration::ZERO, covered: None };
            let mut findings = credential::judge(&file, &circumstances);
            findings.extend(judge([&file].into_iter(), &Used::default(), None, NOW));
            let codes = findings.iter().filter(|f| f.severity != Severity::Ok).map(|f| f.code.as_ref());
            assert_eq!(codes.collect::<Vec<_>>().join(" "), case.codes, "{}: {findings:#?}", case.name);
        }
    }

    #[test]
    fn where_readers_differ_it_is_said_who_takes_what_and_what_to_change() {
        let (t1, t2) = (token("web", 9000, "development"), token("api", 9000, "development"));
        let found = |content: String, used: &Used| {
            let mut found = judge([&source(content.as_bytes())].into_iter(), used, None, NOW);
            found.pop().map(|finding| format!("{} {}", finding.detail, finding.fix.unwrap_or_default()))
        };
        for (content, said) in [
            (
                format!("{KEY}: {t1}\n"),
                &[
                    "Next.js, Astro, Bun, Nx, Wrangler and dotenv take that of acme/web (",
                    "find none; the sidecar has: none",
                    "Write `VERCEL_OIDC_TOKEN=`",
                    "sed ",
                ][..],
            ),
            (
                format!("{KEY}={t1}\n{KEY}: {t2}\n"),
                &["take that of acme/api", "take that of acme/web", "Write `VERCEL_OIDC_TOKEN=`"],
            ),
            (
                format!("\u{feff}{KEY}={t1}\n"),
                &["Vite, SvelteKit, React Router, Expo and `node --env-file` find none", "byte order mark"],
            ),
            (format!("A=1\n{KEY}={t1}\rB=2\n"), &["a line of its own"]),
            (format!("A=1\nB='x\n{KEY}={t1}\nC='y'\n"), &["the quote that line 2 opens"]),
            (format!("{KEY}=\"{t1}\";\n"), &["something that is no token", "a line of its own"]),
        ] {
            let found = found(content.clone(), &Used::default()).unwrap_or_else(|| panic!("nothing: {content:?}"));
            for said in said {
                assert!(found.contains(said), "{said}: {found}");
            }
        }
        let twice = format!("{KEY}={t1}\n{KEY}={t2}\n");
        assert_eq!(found(twice.clone(), &Used::default()), None, "only Deno minds");
        let deno = found(twice, &Used::of(&["Deno"])).expect("it is used");
        assert!(deno.starts_with("Deno takes that of acme/web (") && deno.contains("one of the 2"), "{deno}");
        let backticks = format!("{KEY}=`{t1}`\n");
        assert_eq!(found(backticks.clone(), &Used::default()), None, "only Python minds");
        assert!(
            found(backticks, &Used::of(&["python-dotenv"]))
                .expect("it is used")
                .starts_with("python-dotenv finds something")
        );
        let padded =
            judge([&source(format!("{KEY}=\"{t1}\n\"\n").as_bytes())].into_iter(), &Used::default(), None, NOW);
        assert_eq!(padded[0].code, "token_padded");
    }

    #[test]
    fn an_empty_value_hides_the_token_from_whoever_it_counts_more_for() {
        let good = token("web", 9000, "development");
        for (name, code, who, spared) in [
            (SHELL, "empty_variable_wins", "Next.js, Vite", "Wrangler"),
            (".env.development", "empty_value_wins", "Vite, SvelteKit, Astro and React Router find none", "Next.js"),
            (".env.development.local", "empty_value_wins", "Next.js, Vite", "Nuxt"),
            (".env", "empty_value_wins", "dotenv", "Next.js"),
        ] {
            let found = judged(&[(name, ""), (SOURCE, &good)], None);
            let finding = found.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("{name}: {found:#?}"));
            assert!(finding.detail.contains(who) && !finding.detail.contains(spared), "{name}: {}", finding.detail);
            assert_eq!(finding.severity, Severity::Warning);
            assert!(finding.fix.as_deref().is_some_and(|fix| fix.ends_with(KEY) || fix.ends_with(name)), "{finding:?}");
        }
        assert!(judged(&[(SHELL, "")], None).is_empty(), "there is nothing to hide");
        assert!(judged(&[(".env.production", ""), (SOURCE, &good)], None).is_empty(), "nobody reads it");
    }

    #[test]
    fn what_the_project_uses_comes_first_and_matters() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        let files = [file(SOURCE, &good), file(".env.development", &stale)];
        let of = |used: &[&'static str]| judge(files.iter(), &Used::of(used), None, NOW).remove(0);
        let vite = of(&["Vite"]);
        assert_eq!(vite.severity, Severity::Problem);
        assert!(vite.detail.contains(". Vite, SvelteKit"), "{}", vite.detail);
        let next = of(&["Next.js"]);
        assert_eq!(next.severity, Severity::Warning, "Next.js takes the good one");
        assert!(next.detail.contains(". Next.js, Bun"), "{}", next.detail);
        let bun = of(&["Bun"]);
        assert!(bun.detail.contains(". Bun, Next.js"), "{}", bun.detail);
        let files = [file(SOURCE, &good), file(".env", &stale)];
        let nuxt = judge(files.iter(), &Used::of(&["Nuxt"]), None, NOW).remove(0);
        assert_eq!((nuxt.severity, nuxt.code.as_ref()), (Severity::Problem, "stale_copy_wins"));
    }

    #[test]
    fn a_template_is_no_copy_and_a_backup_is_called_one() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        for (name, value, expected) in [
            (".env.example", "your-token-here", None),
            (".env.local.example", stale.as_str(), Some("token_in_template")),
            (".env.local.bak", stale.as_str(), Some("token_in_backup")),
            (".env.local~", "nonsense", Some("token_in_backup")),
            (".env.old", "", None),
        ] {
            let found = judged(&[(SOURCE, &good), (name, value)], None);
            assert_eq!(found.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), Vec::from_iter(expected), "{name}");
            let fix = found.first().and_then(|finding| finding.fix.clone());
            assert_eq!(fix.is_some(), expected == Some("token_in_backup"), "a template stays: {fix:?}");
        }
    }
}
