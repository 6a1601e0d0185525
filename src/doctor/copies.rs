//! Several copies of the token: who would take which, and what to remove. Pure.
//!
//! `vercel env pull` renews one file; a framework may read another (vercel/vercel#13404). The order in which each reads them
//! is that of connect-contract.md section 6.5.

use super::env_files::EnvFile;
use super::finding::{Finding, Severity};
use crate::clock::{Timestamp, spoken};
use crate::identity::env_file::KEY;
use crate::identity::succession::Observed;
use crate::shell_quoting;

/// Something that loads env files, and which of several it takes: the first that sets the variable.
struct Reader {
    name: &'static str,
    order: &'static [&'static str],
    /// Whether it reads the files of the project without being told to.
    is_framework: bool,
}

const READERS: [Reader; 3] = [
    Reader {
        name: "Next.js",
        order: &[".env.development.local", ".env.local", ".env.development", ".env"],
        is_framework: true,
    },
    Reader {
        name: "Vite",
        order: &[".env.development.local", ".env.development", ".env.local", ".env"],
        is_framework: true,
    },
    Reader { name: "dotenv", order: &[".env"], is_framework: false },
];
/// With `NODE_ENV=test`, Next.js leaves `.env.local` out.
const NEXT_IN_TESTS: &[&str] = &[".env.test.local", ".env.test", ".env"];

/// Judges all copies, at `now`. `node_env` is that of the shell.
pub(super) fn judge<'a>(
    files: impl Iterator<Item = &'a EnvFile>,
    node_env: Option<&str>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let files: Vec<_> = files.collect();
    let source = files.iter().copied().find(|file| file.is_source);
    if node_env == Some("test") && source.is_some_and(|file| file.shown == ".env.local" && file.has_a_value()) {
        let title = "NODE_ENV is `test` in this shell, so Next.js does not read .env.local";
        let detail = "An app that is started here, outside `connect-sidecar run`, finds no token there.";
        findings.push(Finding::new(Severity::Warning, "node_env_test", title, detail).fix("unset NODE_ENV"));
    }
    let copies: Vec<_> = files.into_iter().filter(|file| file.has_a_value()).collect();
    let others: Vec<_> = copies.iter().filter(|file| !file.is_source).copied().collect();
    let Some(first_other) = others.first() else { return findings };
    let Some(source) = source.filter(|file| file.has_a_value()) else {
        // There is none where the sidecar reads: that there is one elsewhere may be all that is wrong.
        if let Some(file) = others.iter().find(|f| f.path.is_some() && f.token().is_some_and(|t| t.is_valid_at(now))) {
            let title = format!("there is a good OIDC token in {}, which the sidecar does not read", file.shown);
            let fix = format!("connect-sidecar --env-file {}", shell_quoting::path(&file.shown));
            findings.push(Finding::new(Severity::Note, "token_elsewhere", title, "").fix(fix));
        }
        return findings;
    };
    let is_same = |a: &EnvFile, b: &EnvFile| match (a.token(), b.token()) {
        (Some(a), Some(b)) => a.is_same_text(b),
        _ => false,
    };
    let pull = format!("`vercel env pull` renews {} alone (vercel/vercel#13404).", source.shown);
    let fix = others.iter().map(|file| removal(file)).collect::<Vec<_>>().join(" && ");
    if others.iter().all(|other| is_same(source, other)) {
        let title = format!("{KEY} is set in {}, the same in each", listed(&copies));
        findings.push(Finding::new(Severity::Note, "token_copied", title, pull).fix(fix));
        return findings;
    }

    let shell = copies.iter().find(|file| file.path.is_none()).copied();
    let mut takers: Vec<(&EnvFile, Vec<&str>)> = Vec::new();
    let (mut is_stale, mut is_framework) = (false, false);
    for reader in &READERS {
        let order = if node_env == Some("test") && reader.name == "Next.js" { NEXT_IN_TESTS } else { reader.order };
        let named = |name: &&str| copies.iter().copied().find(|file| file.path.is_some() && file.shown == *name);
        let Some(taken) = shell.or_else(|| order.iter().find_map(named)) else { continue };
        match takers.iter_mut().find(|(file, _)| std::ptr::eq(*file, taken)) {
            Some((_, names)) => names.push(reader.name),
            None => takers.push((taken, vec![reader.name])),
        }
        if !taken.is_source && !taken.token().is_some_and(|token| token.is_valid_at(now)) {
            is_stale = true;
            is_framework |= reader.is_framework;
        }
    }
    let took = takers.iter().map(|(file, names)| {
        let verb = if names.len() == 1 { "takes" } else { "take" };
        format!("{} {verb} that of {}", names.join(" and "), file.shown)
    });
    let mut who: Vec<_> = took.collect();
    if shell.is_some() {
        who.push("and so do `node --env-file` and the SDK".into());
    } else {
        who.push("`node --env-file` takes that of the file it is given".into());
        who.push("the SDK what either has loaded".into());
    }
    let each: Vec<_> = copies.iter().map(|file| format!("{}: {}", file.shown, described(file, now))).collect();
    let detail = format!("{}. {}; the sidecar takes that of {}. {pull}", each.join("; "), who.join(", "), source.shown);
    let (severity, code) = match (is_stale, is_framework) {
        (true, true) => (Severity::Problem, "stale_copy_wins"),
        (true, false) => (Severity::Warning, "stale_copy_wins"),
        (false, _) => (Severity::Warning, "copies_differ"),
    };
    let title = match others.as_slice() {
        [_] => format!("{KEY} is not the same in {} and {}", source.shown, first_other.shown),
        _ => format!("{KEY} is not the same in {}", listed(&copies)),
    };
    findings.push(Finding::new(severity, code, title, detail).fix(fix));
    findings
}

fn listed(files: &[&EnvFile]) -> String {
    files.iter().map(|file| file.shown.as_str()).collect::<Vec<_>>().join(", ")
}

fn described(file: &EnvFile, now: Timestamp) -> String {
    match &file.found {
        Observed::Missing => "none".into(),
        Observed::Invalid(flaw) => format!("unusable, {flaw}"),
        Observed::Token { token, .. } => {
            let life = match token.expires_at.since(now).is_zero() {
                true => format!("expired {} ago", spoken(now.since(token.expires_at))),
                false => format!("{} left", spoken(token.expires_at.since(now))),
            };
            format!("{} ({}), {life}", token.claims.project_name(), token.fingerprint())
        }
    }
}

/// The command that removes a copy.
fn removal(file: &EnvFile) -> String {
    // As BSD's sed wants it, or GNU's.
    let in_place = if cfg!(target_os = "macos") { "-i ''" } else { "-i" };
    match file.path {
        None => format!("unset {KEY}"),
        Some(_) => format!(
            "sed {in_place} -E '/^[[:space:]]*(export[[:space:]]+)?{KEY}[[:space:]]*=/d' {}",
            shell_quoting::path(&file.shown)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::env_files::fixtures::{NOW, file, token};

    const SOURCE: &str = ".env.local";
    const SHELL: &str = "";

    fn judged(files: &[(&str, &str)], node_env: Option<&str>) -> Vec<Finding> {
        let files: Vec<_> = files.iter().map(|(name, value)| file(name, value)).collect();
        judge(files.iter(), node_env, NOW)
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
        for said in ["Next.js takes that of .env.local", "Vite takes that of .env.development,", "expired 1 min ago"] {
            assert!(finding.detail.contains(said), "{said}: {}", finding.detail);
        }
        assert!(!finding.detail.contains("dotenv takes"), "there is no .env: {}", finding.detail);
        let finding = &judged(&[(SOURCE, &good), (".env.development.local", &stale)], None)[0];
        assert!(finding.detail.contains("Next.js and Vite take that of .env.development.local"), "{}", finding.detail);
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
}
