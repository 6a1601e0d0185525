//! Who else could get at what is secret: the env files, git, the state directory, the local CA.
//!
//! A repository may be hostile: nothing that it configures is run by the git that is asked.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::env_files::{EnvFile, Purpose};
use super::finding::{Finding, Severity};
use crate::daemon::intercept::ca;
use crate::os::executable;
use crate::os::private_dir::{self, Problem};
use crate::os::shell_quoting;
use crate::os::subprocess::{self, Limits};

/// Limits of one git command.
const GIT_LIMITS: Limits = Limits { time: Duration::from_secs(2), stdout: 64 * 1024, stderr: 0 };

/// What git makes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracking {
    /// There is no git, no repository, or no answer.
    Unknown,
    /// It is in the index.
    Tracked,
    /// It would go into the next `git add .`.
    Unignored,
    /// It is left out.
    Ignored,
}

/// The git that is asked, and its variables.
pub(super) struct Git {
    program: PathBuf,
    variables: Vec<(&'static str, OsString)>,
}

impl Git {
    /// That of `path`; `home` is where the user's own rules on what to ignore are.
    pub(super) fn find(
        path: &OsStr,
        home: Option<OsString>,
        config_home: Option<OsString>,
        project: &Path,
    ) -> Option<Self> {
        let program = executable::find("git", path, project)?.checked.ok()?;
        let path = executable::trusted_path(path, &program, project);
        let given = [("HOME", home), ("XDG_CONFIG_HOME", config_home), ("PATH", Some(path))];
        let mut variables: Vec<_> = given.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        for (name, value) in [
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_ALLOW_PROTOCOL", "none"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("LC_ALL", "C"),
        ] {
            variables.push((name, value.into()));
        }
        Some(Self { program, variables })
    }

    /// What it makes of a file.
    pub(super) async fn ask(&self, file: &Path) -> Tracking {
        let (Some(dir), Some(name)) = (file.parent(), file.file_name()) else { return Tracking::Unknown };
        // Never a pattern, which a name may look like.
        let name = Path::new(".").join(name);
        let ask = async |arguments: &[&str]| {
            let fixed = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"];
            let mut all: Vec<&OsStr> = fixed.iter().chain(arguments).map(OsStr::new).collect();
            all.extend([OsStr::new("--"), name.as_os_str()]);
            let mut command = Command::new(&self.program);
            command.args(all).env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
            command.current_dir(dir);
            subprocess::run(command, GIT_LIMITS).await.ok()
        };
        match ask(&["--literal-pathspecs", "ls-files", "--cached"]).await {
            Some(ended) if ended.status.success() && !ended.stdout.is_empty() => return Tracking::Tracked,
            Some(ended) if ended.status.success() => {}
            _ => return Tracking::Unknown,
        }
        match ask(&["check-ignore", "--quiet"]).await.and_then(|ended| ended.status.code()) {
            Some(0) => Tracking::Ignored,
            Some(1) => Tracking::Unignored,
            _ => Tracking::Unknown,
        }
    }
}

/// Judges one env file.
pub(super) fn judge(file: &EnvFile, tracking: Tracking, project: &Path) -> Vec<Finding> {
    let (Some(path), true) = (&file.path, file.has_a_value()) else { return Vec::new() };
    let (shown, word) = (&file.shown, shell_quoting::path(&file.shown));
    let ignore = match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) if Path::new(shown).is_absolute() => {
            let (name, rules) = (name.to_string_lossy(), dir.join(".gitignore").display().to_string());
            format!("echo {} >> {}", shell_quoting::word(&name), shell_quoting::path(&rules))
        }
        _ => format!("echo {} >> .gitignore", shell_quoting::word(shown)),
    };
    if file.purpose == Purpose::Template {
        // It is meant to be read, and to be published.
        return Vec::new();
    }
    let mut findings = Vec::new();
    if file.is_readable_by_others {
        let title = format!("other users of this machine can read {shown}");
        let detail = "Whoever has the token acts for the project until it expires.";
        let finding = Finding::new(Severity::Warning, "env_file_readable_by_others", title, detail);
        findings.push(finding.fix(format!("chmod 600 {word}")));
    }
    let published = "The token, and all else that is in it, goes where the repository goes.";
    match tracking {
        Tracking::Tracked => {
            let finding = Finding::new(Severity::Warning, "env_file_tracked", format!("git tracks {shown}"), published);
            findings.push(finding.fix(format!("git rm --cached {word} && {ignore}")));
        }
        Tracking::Unignored => {
            let title = format!("git does not ignore {shown}");
            let finding = Finding::new(Severity::Warning, "env_file_not_ignored", title, published);
            findings.push(finding.fix(ignore));
        }
        Tracking::Ignored | Tracking::Unknown => {}
    }
    let real = path.canonicalize().ok().filter(|real| path.is_symlink() && !real.starts_with(project));
    if let Some(real) = real {
        let title = format!("{shown} is a link to {}, outside the project", real.display());
        let detail = "What writes it changes the token of all who share it.";
        findings.push(Finding::new(Severity::Note, "env_file_link", title, detail));
    }
    findings
}

/// Judges where the state of running sidecars and the local CA are kept, if there is a place. Reads. `xdg` is
/// `XDG_STATE_HOME`; with `require_key` no sidecar starts without it.
pub(super) fn judge_state(
    state_dir: Option<&Path>,
    xdg: Option<OsString>,
    require_key: bool,
    project: &Path,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if xdg.is_some_and(|xdg| !xdg.is_empty() && Path::new(&xdg).is_relative()) {
        let title = "XDG_STATE_HOME is a relative path, which does not count";
        let detail = "State is kept below HOME: in ~/.local/state/connect-sidecar.";
        findings.push(Finding::new(Severity::Note, "relative_state_home", title, detail).fix("unset XDG_STATE_HOME"));
    }
    if let Err(problem) = state_dir.map_or(Err(Problem::NoStateDir), private_dir::examine) {
        let severity = if require_key { Severity::Problem } else { Severity::Warning };
        let lost = "What runs is not found by `status`, `run` and all other commands, and what is warned of and counted \
                    is forgotten.";
        let advice = problem.advice().map_or_else(String::new, |advice| format!(" What to do: {advice}."));
        let finding = Finding::new(severity, "state_directory", problem.to_string(), format!("{lost}{advice}"));
        findings.push(match problem.command() {
            Some(command) => finding.fix(command),
            None => finding,
        });
    }
    let Some(state_dir) = state_dir else { return findings };
    if let Err(unfit) = ca::exists(state_dir, project) {
        let detail = "`connect-sidecar run` intercepts nothing with it.";
        let finding = Finding::new(Severity::Warning, "local_ca", unfit.to_string(), detail);
        findings.push(finding.fix("connect-sidecar ca remove"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::env_files::fixtures::{file, token};

    #[test]
    fn what_lies_open_is_told_with_what_closes_it() {
        let good = token("web", 9000, "development");
        let codes = |tracking, is_readable_by_others, value: &str| {
            let file = EnvFile { is_readable_by_others, ..file(".env.local", value) };
            let judged = judge(&file, tracking, Path::new("/web"));
            judged.into_iter().map(|f| (f.code.into_owned(), f.fix.expect("a fix"))).collect::<Vec<_>>()
        };
        let pair = |code: &str, fix: &str| (code.to_owned(), fix.to_owned());
        let readable = pair("env_file_readable_by_others", "chmod 600 .env.local");
        let unignored = pair("env_file_not_ignored", "echo .env.local >> .gitignore");
        let tracked = pair("env_file_tracked", "git rm --cached .env.local && echo .env.local >> .gitignore");
        assert!(codes(Tracking::Ignored, false, &good).is_empty());
        assert!(codes(Tracking::Unknown, false, &good).is_empty());
        assert_eq!(codes(Tracking::Unignored, true, &good), [readable, unignored]);
        assert_eq!(codes(Tracking::Tracked, false, &good), [tracked]);
        assert!(codes(Tracking::Tracked, true, "").is_empty(), "there is nothing to lose");
    }

    #[test]
    fn a_template_is_there_to_be_published() {
        let good = token("web", 9000, "development");
        for (name, count) in
            [(".env.example", 0), (".env.local.sample", 0), (".env.local.bak", 2), (".env.development", 2)]
        {
            let file = EnvFile { is_readable_by_others: true, ..file(name, &good) };
            assert_eq!(judge(&file, Tracking::Tracked, Path::new("/web")).len(), count, "{name}");
        }
    }
}
