//! Several copies of the token, or one that programs read differently: which program uses which, and how to fix it.
//! Pure.
//!
//! `vercel env pull` updates one file, but a framework may read another (vercel/vercel#13404).

use super::env_files::{EnvFile, Oddity, Purpose, Reading};
use super::finding::{Finding, Severity};
use super::readers::{EnvironmentRule, Reader, UsedReaders};
use crate::credential::env_file::KEY;
use crate::credential::token_file::TokenReading;
use crate::os::clock::{Expiry, Timestamp, format_duration};
use crate::os::shell_quoting;

/// Findings about all copies at `now`. `node_env` is the shell's `NODE_ENV`.
pub(super) fn evaluate<'a>(
    files: impl Iterator<Item = &'a EnvFile>,
    used: &UsedReaders,
    node_env: Option<&str>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (loaded, others): (Vec<_>, Vec<_>) = files.partition(|file| file.purpose == Purpose::Loaded);
    findings.extend(others.into_iter().filter_map(evaluate_unloaded));
    let source = loaded.iter().copied().find(|file| file.is_source);
    if node_env == Some("test") && source.is_some_and(|file| file.shown == ".env.local" && file.has_value()) {
        let title = "NODE_ENV is `test` in this shell, so Next.js and Bun do not read .env.local";
        let detail = "An app that is started in this shell without `connect-sidecar run` finds no token there.";
        findings.push(Finding::new(Severity::Warning, "node_env_test", title, detail).fix("unset NODE_ENV"));
    }
    findings.extend(source.and_then(|file| evaluate_syntax(file, used, now)));
    let uses = uses(&loaded, used, node_env);
    findings.extend(source.into_iter().flat_map(|source| evaluate_empty(source, &uses)));
    findings.extend(evaluate_values(&loaded, &uses, used, now));
    findings
}

/// The finding about a file that no program loads, if it contains a token.
fn evaluate_unloaded(file: &EnvFile) -> Option<Finding> {
    let shown = &file.shown;
    let detail = "Anyone who can read it can use it until it expires.";
    match file.purpose {
        Purpose::Loaded => None,
        Purpose::Template => file.token().map(|_| {
            let title = format!("there is a token in {shown}, which is a template");
            Finding::new(
                Severity::Warning,
                "token_in_template",
                title,
                format!("{detail} Replace it with a placeholder."),
            )
        }),
        Purpose::Backup => file.has_value().then(|| {
            let title = format!("there is a copy of the token in {shown}, a backup that no program reads");
            let fix = format!("rm {}", shell_quoting::path(shown));
            Finding::new(Severity::Note, "token_in_backup", title, detail).fix(fix)
        }),
    }
}

/// The readers that find the variable, each with the file that it uses; those used by the project come first. Readers
/// that get their files on the command line are left out.
fn uses<'a>(files: &[&'a EnvFile], used: &UsedReaders, node_env: Option<&str>) -> Vec<(&'static Reader, &'a EnvFile)> {
    let shell = files.iter().copied().find(|file| file.path.is_none());
    let named = |name: &str| files.iter().copied().find(|file| file.path.is_some() && file.shown == name);
    let use_of = |reader: &'static Reader| {
        let order = reader.order("", node_env, |name| named(name).is_some());
        let sets = |file: &&EnvFile| !matches!(file.reading(reader), Reading::Unset);
        let in_file = order.into_iter().filter_map(named).find(sets);
        let file = match reader.environment {
            EnvironmentRule::OverridesFile => shell.or(in_file),
            EnvironmentRule::OverriddenByFile => in_file.or(shell),
            EnvironmentRule::Ignored => in_file,
        };
        Some((reader, file?))
    };
    used.used_first().filter_map(use_of).collect()
}

/// The readers grouped by what they find.
fn grouped<'a, T>(
    uses: &[(&'static Reader, &'a T)],
    is_same: impl Fn(&T, &T) -> bool,
) -> Vec<(Vec<&'static str>, &'a T)> {
    let mut groups: Vec<(Vec<&'static str>, &T)> = Vec::new();
    for (reader, found) in uses {
        match groups.iter_mut().find(|(_, other)| is_same(other, found)) {
            Some((names, _)) => names.push(reader.name),
            None => groups.push((vec![reader.name], found)),
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

/// The finding about the source if programs read it differently.
fn evaluate_syntax(source: &EnvFile, used: &UsedReaders, now: Timestamp) -> Option<Finding> {
    let shown = &source.shown;
    // Of the readers that the project does not use, the two that the others are based on.
    let may_read =
        |reader: &&Reader| reader.order.is_empty() || !reader.is_framework || reader.order.contains(&shown.as_str());
    let is_basic = |reader: &Reader| matches!(reader.name, "dotenv" | "`node --env-file`");
    let is_concerned = |reader: &&Reader| used.has(reader) || used.is_relevant(reader) || is_basic(reader);
    let readers: Vec<_> = used.used_first().filter(may_read).filter(is_concerned).collect();
    let readings: Vec<_> = readers.into_iter().map(|reader| (reader, source.reading(reader))).collect();
    let is_sidecars = |reading: &Reading| match (&source.found, reading) {
        (TokenReading::Token { token, .. }, Reading::Token(other)) => token.is_same_text(other),
        (TokenReading::Missing, Reading::Unset | Reading::Empty) | (TokenReading::Invalid(_), Reading::Other) => true,
        _ => false,
    };
    if readings.iter().all(|(_, reading)| is_sidecars(reading)) {
        return source.is_padded.then(|| {
            let title = format!("there is whitespace around the token inside the quotes of {KEY} in {shown}");
            let detail = "The sidecar removes it; the requests of a program that does not may be refused.";
            Finding::new(Severity::Note, "token_padded", title, detail).fix("vercel env pull")
        });
    }
    let readers = grouped(&readings, Reading::is_same_as).into_iter().map(|(names, reading)| {
        let (uses, find) = if names.len() == 1 { ("uses", "finds") } else { ("use", "find") };
        let names = enumerated(&names);
        match reading {
            Reading::Unset | Reading::Empty => format!("{names} {find} none"),
            Reading::Other => format!("{names} {find} something that is no token"),
            Reading::Token(token) => {
                format!("{names} {uses} that of {} ({})", token.claims.project_name(), token.fingerprint())
            }
        }
    });
    let readers = readers.collect::<Vec<_>>().join("; ");
    let (change, fix) = remedy(source);
    let detail = format!("{readers}; the sidecar has: {}. {change}.", described(source, now));
    let title = format!("programs that read {shown} find different values of {KEY}");
    let finding = Finding::new(Severity::Warning, "readers_differ", title, detail);
    Some(finding.fix(fix))
}

/// What to change, and a command that does it.
fn remedy(source: &EnvFile) -> (String, String) {
    let file = shell_quoting::path(&source.shown);
    let pull = || "vercel env pull".to_owned();
    match source.oddity {
        Some(Oddity::ByteOrderMark) => (
            "The file starts with a byte order mark, which some programs take for a part of the name: save it without"
                .into(),
            format!("sed {IN_PLACE} $'1s/^\\xEF\\xBB\\xBF//' {file}"),
        ),
        Some(Oddity::Colon) => (
            format!("Write `{KEY}=` instead of `{KEY}:`"),
            format!("sed {IN_PLACE} -E 's/^([[:space:]]*(export[[:space:]]+)?{KEY})[[:space:]]*:/\\1=/' {file}"),
        ),
        Some(Oddity::Duplicates(count)) => (format!("Keep one of the {count} assignments"), pull()),
        Some(Oddity::OpenQuote(line)) => (format!("Close the quote that line {line} opens"), pull()),
        Some(Oddity::CarriageReturns) => (
            "Lines end with a carriage return only: save the file with line feeds".into(),
            format!("perl -pi -e 's/\\r/\\n/g' {file}"),
        ),
        None => (format!("Write it as `{KEY}=\"...\"`, on a line of its own"), pull()),
    }
}

/// Findings about empty values that hide the source's token.
fn evaluate_empty(source: &EnvFile, uses: &[(&'static Reader, &EnvFile)]) -> Vec<Finding> {
    if source.token().is_none() {
        return Vec::new();
    }
    let is_hidden =
        |(reader, file): &&(&Reader, &EnvFile)| !file.is_source && matches!(file.reading(reader), Reading::Empty);
    let hidden: Vec<_> = uses.iter().filter(is_hidden).map(|(reader, file)| (*reader, *file)).collect();
    let groups = grouped(&hidden, |a, b| std::ptr::eq(a, b));
    let findings = groups.into_iter().map(|(names, file)| {
        let (code, title) = match file.path {
            None => ("empty_variable_wins", format!("{KEY} is empty in this shell")),
            Some(_) => ("empty_value_wins", format!("{} sets {KEY} to an empty value", file.shown)),
        };
        let find = if names.len() == 1 { "finds" } else { "find" };
        let names = enumerated(&names);
        let detail = format!("It overrides the token in {}: {names} {find} none.", source.shown);
        Finding::new(Severity::Warning, code, title, detail).fix(removal(file))
    });
    findings.collect()
}

/// The finding about several values, or about one in a file that the sidecar does not read.
fn evaluate_values(
    loaded: &[&EnvFile],
    uses: &[(&'static Reader, &EnvFile)],
    used: &UsedReaders,
    now: Timestamp,
) -> Option<Finding> {
    let copies: Vec<_> = loaded.iter().copied().filter(|file| file.has_value()).collect();
    let others: Vec<_> = copies.iter().filter(|file| !file.is_source).copied().collect();
    let first_other = others.first()?;
    let source = loaded.iter().copied().find(|file| file.is_source);
    let Some(source) = source.filter(|file| file.has_value()) else {
        let file = others.iter().find(|f| f.path.is_some() && f.token().is_some_and(|t| t.is_valid_at(now)))?;
        let title = format!("there is a valid OIDC token in {}, which the sidecar does not read", file.shown);
        let fix = format!("connect-sidecar --env-file {}", shell_quoting::path(&file.shown));
        return Some(Finding::new(Severity::Note, "token_elsewhere", title, "").fix(fix));
    };
    let is_same = |a: &EnvFile, b: &EnvFile| match (a.token(), b.token()) {
        (Some(a), Some(b)) => a.is_same_text(b),
        _ => false,
    };
    let pull = format!("`vercel env pull` updates only {} (vercel/vercel#13404).", source.shown);
    let fix = others.iter().map(|file| removal(file)).collect::<Vec<_>>().join(" && ");
    if others.iter().all(|other| is_same(source, other)) {
        let title = format!("{KEY} is set in {}, the same in each", listed(&copies));
        return Some(Finding::new(Severity::Note, "token_copied", title, pull).fix(fix));
    }
    let uses: Vec<_> = uses.iter().filter(|(_, file)| file.has_value()).copied().collect();
    let stale =
        |(_, file): &&(&Reader, &EnvFile)| !file.is_source && !file.token().is_some_and(|token| token.is_valid_at(now));
    let is_stale_used = uses.iter().any(|used| stale(&used));
    let is_relevant = uses.iter().filter(stale).any(|(reader, _)| used.is_relevant(reader));
    let mut readers: Vec<_> = grouped(&uses, |a, b| std::ptr::eq(a, b))
        .into_iter()
        .map(|(names, file)| {
            let verb = if names.len() == 1 { "uses" } else { "use" };
            format!("{} {verb} that of {}", enumerated(&names), file.shown)
        })
        .collect();
    if copies.iter().any(|file| file.path.is_none()) {
        readers.push("`node --env-file`, Deno and the SDK use that of the shell".into());
    } else {
        readers.push("`node --env-file` and Deno use that of the file they are given".into());
        readers.push("the SDK uses what the app has loaded".into());
    }
    let each: Vec<_> = copies.iter().map(|file| format!("{}: {}", file.shown, described(file, now))).collect();
    let detail =
        format!("{}. {}; the sidecar uses that of {}. {pull}", each.join("; "), readers.join("; "), source.shown);
    let (severity, code) = match (is_stale_used, is_relevant) {
        (true, true) => (Severity::Problem, "stale_copy_wins"),
        (true, false) => (Severity::Warning, "stale_copy_wins"),
        (false, _) => (Severity::Warning, "copies_differ"),
    };
    let title = match others.as_slice() {
        [_] => format!("{KEY} differs between {} and {}", source.shown, first_other.shown),
        _ => format!("{KEY} differs between {}", listed(&copies)),
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

/// The option for editing in place of BSD's or GNU's sed.
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

    fn evaluated(files: &[(&str, &str)], node_env: Option<&str>) -> Vec<Finding> {
        let files: Vec<_> = files.iter().map(|(name, value)| file(name, value)).collect();
        evaluate(files.iter(), &UsedReaders::default(), node_env, NOW)
    }

    #[test]
    fn the_severity_of_several_copies_depends_on_the_readers() {
        let (good, other) = (token("web", 9000, "development"), token("api", 9000, "development"));
        let stale = token("web", -60, "development");
        let (good, other, stale) = (good.as_str(), other.as_str(), stale.as_str());
        use Severity::{Note, Problem, Warning};
        for (files, expected) in [
            (vec![(SOURCE, good)], None),
            (vec![(SOURCE, good), (".env", good)], Some((Note, "token_copied"))),
            (vec![(SOURCE, good), (SHELL, good)], Some((Note, "token_copied"))),
            // The environment wins everywhere.
            (vec![(SHELL, stale), (SOURCE, good)], Some((Problem, "stale_copy_wins"))),
            (vec![(SHELL, "nonsense"), (SOURCE, good)], Some((Problem, "stale_copy_wins"))),
            (vec![(SHELL, other), (SOURCE, good)], Some((Warning, "copies_differ"))),
            (vec![(SOURCE, good), (".env.development.local", stale)], Some((Problem, "stale_copy_wins"))),
            // Used by Vite.
            (vec![(SOURCE, good), (".env.development", stale)], Some((Problem, "stale_copy_wins"))),
            // Used by dotenv only.
            (vec![(SOURCE, good), (".env", stale)], Some((Warning, "stale_copy_wins"))),
            // Used by no reader.
            (vec![(SOURCE, good), (".env.production", stale)], Some((Warning, "copies_differ"))),
            // `vercel env pull` would update only the stale one.
            (vec![(SOURCE, stale), (".env.development.local", good)], Some((Warning, "copies_differ"))),
            (vec![(".env.development.local", good)], Some((Note, "token_elsewhere"))),
            (vec![(".env.development.local", stale)], None),
            (vec![(SHELL, good)], None),
        ] {
            let findings = evaluated(&files, None);
            let found: Vec<_> = findings.iter().map(|f| (f.severity, f.code.as_ref())).collect();
            let names: Vec<_> = files.iter().map(|(name, _)| name).collect();
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{names:?}");
        }
    }

    #[test]
    fn the_detail_names_readers_and_the_fix_removes_copies() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        let finding = &evaluated(&[(SOURCE, &good), (".env.development", &stale)], None)[0];
        for text in [
            "Next.js, Bun, Expo, Nx and Wrangler use that of .env.local;",
            "Vite, SvelteKit, Astro and React Router use that of .env.development;",
            "expired 1 min ago",
        ] {
            assert!(finding.detail.contains(text), "{text}: {}", finding.detail);
        }
        assert!(!finding.detail.contains("dotenv uses"), "there is no .env: {}", finding.detail);
        let finding = &evaluated(&[(SOURCE, &good), (".env.development.local", &stale)], None)[0];
        assert!(
            finding.detail.contains(
                "Next.js, Vite, SvelteKit, Astro, React Router, Bun and Expo use that of .env.development.local;"
            ),
            "{}",
            finding.detail
        );
        let finding = &evaluated(&[(SHELL, &stale), (SOURCE, &good), (".env", &stale)], None)[0];
        let fix = finding.fix.as_deref().expect("a fix");
        assert!(fix.starts_with("unset VERCEL_OIDC_TOKEN && sed ") && fix.ends_with(" .env"), "{fix}");
    }

    #[test]
    fn node_env_test_is_reported_since_next_ignores_the_local_file() {
        let good = token("web", 9000, "development");
        let codes = |node_env| {
            let found = evaluated(&[(SOURCE, &good)], node_env);
            found.into_iter().map(|f| f.code.into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(codes(Some("test")), ["node_env_test"]);
        assert!(codes(Some("development")).is_empty());
        let stale = token("web", -60, "development");
        let files = [(SOURCE, good.as_str()), (".env.test", stale.as_str())];
        assert_eq!(evaluated(&files, Some("test"))[1].severity, Severity::Problem);
        assert_eq!(evaluated(&files, None)[0].severity, Severity::Warning);
    }

    #[test]
    fn every_syntax_case_has_the_expected_findings() {
        use crate::cli::doctor::credential;
        let (t1, t2) = (token("web", 9000, "development"), token("api", 9000, "development"));
        for case in crate::credential::env_file::cases::CASES {
            let file = source(case.file(&t1, &t2).as_bytes());
            let circumstances =
                credential::Circumstances { now: NOW, expiring_below: std::time::Duration::ZERO, covered: None };
            let mut findings = credential::evaluate(&file, &circumstances);
            findings.extend(evaluate([&file].into_iter(), &UsedReaders::default(), None, NOW));
            let codes = findings.iter().filter(|f| f.severity != Severity::Ok).map(|f| f.code.as_ref());
            assert_eq!(codes.collect::<Vec<_>>().join(" "), case.codes, "{}: {findings:#?}", case.name);
        }
    }

    #[test]
    fn if_readers_differ_the_detail_names_them_and_the_change() {
        let (t1, t2) = (token("web", 9000, "development"), token("api", 9000, "development"));
        let found = |content: String, used: &UsedReaders| {
            let mut found = evaluate([&source(content.as_bytes())].into_iter(), used, None, NOW);
            found.pop().map(|finding| format!("{} {}", finding.detail, finding.fix.unwrap_or_default()))
        };
        for (content, texts) in [
            (
                format!("{KEY}: {t1}\n"),
                &[
                    "Next.js, Astro, Bun, Nx, Wrangler and dotenv use that of acme/web (",
                    "find none; the sidecar has: none",
                    "Write `VERCEL_OIDC_TOKEN=`",
                    "sed ",
                ][..],
            ),
            (
                format!("{KEY}={t1}\n{KEY}: {t2}\n"),
                &["use that of acme/api", "use that of acme/web", "Write `VERCEL_OIDC_TOKEN=`"],
            ),
            (
                format!("\u{feff}{KEY}={t1}\n"),
                &["Vite, SvelteKit, React Router, Expo and `node --env-file` find none", "byte order mark"],
            ),
            (format!("A=1\n{KEY}={t1}\rB=2\n"), &["a line of its own"]),
            (format!("A=1\nB='x\n{KEY}={t1}\nC='y'\n"), &["the quote that line 2 opens"]),
            (format!("{KEY}=\"{t1}\";\n"), &["something that is no token", "a line of its own"]),
        ] {
            let found =
                found(content.clone(), &UsedReaders::default()).unwrap_or_else(|| panic!("nothing: {content:?}"));
            for text in texts {
                assert!(found.contains(text), "{text}: {found}");
            }
        }
        let twice = format!("{KEY}={t1}\n{KEY}={t2}\n");
        assert_eq!(found(twice.clone(), &UsedReaders::default()), None, "only Deno differs");
        let deno = found(twice, &UsedReaders::of(&["Deno"])).expect("it is used");
        assert!(deno.starts_with("Deno uses that of acme/web (") && deno.contains("one of the 2"), "{deno}");
        let backticks = format!("{KEY}=`{t1}`\n");
        assert_eq!(found(backticks.clone(), &UsedReaders::default()), None, "only Python differs");
        assert!(
            found(backticks, &UsedReaders::of(&["python-dotenv"]))
                .expect("it is used")
                .starts_with("python-dotenv finds something")
        );
        let padded = evaluate(
            [&source(format!("{KEY}=\"{t1}\n\"\n").as_bytes())].into_iter(),
            &UsedReaders::default(),
            None,
            NOW,
        );
        assert_eq!(padded[0].code, "token_padded");
    }

    #[test]
    fn an_empty_value_hides_the_token_from_some_readers() {
        let good = token("web", 9000, "development");
        for (name, code, affected, unaffected) in [
            (SHELL, "empty_variable_wins", "Next.js, Vite", "Wrangler"),
            (".env.development", "empty_value_wins", "Vite, SvelteKit, Astro and React Router find none", "Next.js"),
            (".env.development.local", "empty_value_wins", "Next.js, Vite", "Nuxt"),
            (".env", "empty_value_wins", "dotenv", "Next.js"),
        ] {
            let found = evaluated(&[(name, ""), (SOURCE, &good)], None);
            let finding = found.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("{name}: {found:#?}"));
            assert!(
                finding.detail.contains(affected) && !finding.detail.contains(unaffected),
                "{name}: {}",
                finding.detail
            );
            assert_eq!(finding.severity, Severity::Warning);
            assert!(finding.fix.as_deref().is_some_and(|fix| fix.ends_with(KEY) || fix.ends_with(name)), "{finding:?}");
        }
        assert!(evaluated(&[(SHELL, "")], None).is_empty(), "there is no token to hide");
        assert!(evaluated(&[(".env.production", ""), (SOURCE, &good)], None).is_empty(), "no reader reads it");
    }

    #[test]
    fn readers_used_by_the_project_come_first_and_determine_the_severity() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        let files = [file(SOURCE, &good), file(".env.development", &stale)];
        let of = |used: &[&'static str]| evaluate(files.iter(), &UsedReaders::of(used), None, NOW).remove(0);
        let vite = of(&["Vite"]);
        assert_eq!(vite.severity, Severity::Problem);
        assert!(vite.detail.contains(". Vite, SvelteKit"), "{}", vite.detail);
        let next = of(&["Next.js"]);
        assert_eq!(next.severity, Severity::Warning, "Next.js uses the valid one");
        assert!(next.detail.contains(". Next.js, Bun"), "{}", next.detail);
        let bun = of(&["Bun"]);
        assert!(bun.detail.contains(". Bun, Next.js"), "{}", bun.detail);
        let files = [file(SOURCE, &good), file(".env", &stale)];
        let nuxt = evaluate(files.iter(), &UsedReaders::of(&["Nuxt"]), None, NOW).remove(0);
        assert_eq!((nuxt.severity, nuxt.code.as_ref()), (Severity::Problem, "stale_copy_wins"));
    }

    #[test]
    fn tokens_in_templates_and_backups_are_reported() {
        let (good, stale) = (token("web", 9000, "development"), token("web", -60, "development"));
        for (name, value, expected) in [
            (".env.example", "your-token-here", None),
            (".env.local.example", stale.as_str(), Some("token_in_template")),
            (".env.local.bak", stale.as_str(), Some("token_in_backup")),
            (".env.local~", "nonsense", Some("token_in_backup")),
            (".env.old", "", None),
        ] {
            let found = evaluated(&[(SOURCE, &good), (name, value)], None);
            assert_eq!(found.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), Vec::from_iter(expected), "{name}");
            let fix = found.first().and_then(|finding| finding.fix.clone());
            assert_eq!(fix.is_some(), expected == Some("token_in_backup"), "a template is not deleted: {fix:?}");
        }
    }
}
