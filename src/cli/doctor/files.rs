//! Whether secrets are exposed: permissions of the env files, git, the state directory, the local CA.
//!
//! A repository may be hostile: git is run such that nothing configured in the repository is executed.

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

/// How long each git command may take.
const GIT_LIMITS: Limits = Limits { time: Duration::from_secs(2), stdout: 64 * 1024, stderr: 0 };

/// Whether git tracks or ignores a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracking {
    /// There is no git, no repository, or no answer.
    Unknown,
    /// In the index.
    Tracked,
    /// The next `git add .` would add it.
    Unignored,
    /// Ignored.
    Ignored,
}

/// The git program and the variables that it is run with.
pub(super) struct Git {
    program: PathBuf,
    variables: Vec<(&'static str, OsString)>,
}

impl Git {
    /// Finds git on the `PATH` value `path`. `home` and `config_home` contain the user's own ignore rules.
    pub(super) fn find(
        path: &OsStr,
        home: Option<OsString>,
        config_home: Option<OsString>,
        project: &Path,
    ) -> Option<Self> {
        let program = executable::find("git", path, project)?.checked.ok()?;
        let path = executable::trusted_path(path, &program, project);
        let user_variables = [("HOME", home), ("XDG_CONFIG_HOME", config_home), ("PATH", Some(path))];
        let mut variables: Vec<_> =
            user_variables.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
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

    /// Whether git tracks or ignores a file.
    pub(super) async fn tracking(&self, file: &Path) -> Tracking {
        let (Some(dir), Some(name)) = (file.parent(), file.file_name()) else { return Tracking::Unknown };
        // With a leading `./` the name is not taken for an option or pathspec magic.
        let name = Path::new(".").join(name);
        let run = async |arguments: &[&str]| {
            let fixed = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"];
            let mut all: Vec<&OsStr> = fixed.iter().chain(arguments).map(OsStr::new).collect();
            all.extend([OsStr::new("--"), name.as_os_str()]);
            let mut command = Command::new(&self.program);
            command.args(all).env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
            command.current_dir(dir);
            subprocess::run(command, GIT_LIMITS).await.ok()
        };
        match run(&["--literal-pathspecs", "ls-files", "--cached"]).await {
            Some(ended) if ended.status.success() && !ended.stdout.is_empty() => return Tracking::Tracked,
            Some(ended) if ended.status.success() => {}
            _ => return Tracking::Unknown,
        }
        match run(&["check-ignore", "--quiet"]).await.and_then(|ended| ended.status.code()) {
            Some(0) => Tracking::Ignored,
            Some(1) => Tracking::Unignored,
            _ => Tracking::Unknown,
        }
    }
}

/// Findings about one env file.
pub(super) fn evaluate(file: &EnvFile, tracking: Tracking, project: &Path) -> Vec<Finding> {
    let (Some(path), true) = (&file.path, file.has_value()) else { return Vec::new() };
    let (shown, word) = (&file.shown, shell_quoting::path(&file.shown));
    let ignore = match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) if Path::new(shown).is_absolute() => {
            let (name, rules) = (name.to_string_lossy(), dir.join(".gitignore").display().to_string());
            format!("echo {} >> {}", shell_quoting::word(&name), shell_quoting::path(&rules))
        }
        _ => format!("echo {} >> .gitignore", shell_quoting::word(shown)),
    };
    if file.purpose == Purpose::Template {
        // A template is meant to be published.
        return Vec::new();
    }
    let mut findings = Vec::new();
    if file.is_readable_by_others {
        let title = format!("other users of this machine can read {shown}");
        let detail = "Anyone who has the token can act for the project until it expires.";
        let finding = Finding::new(Severity::Warning, "env_file_readable_by_others", title, detail);
        findings.push(finding.fix(format!("chmod 600 {word}")));
    }
    let published = "The token and everything else in the file is published with the repository.";
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
        let detail = "Writing to it changes the token of every project that shares it.";
        findings.push(Finding::new(Severity::Note, "env_file_link", title, detail));
    }
    findings
}

/// Findings about the state directory and the local CA in it. `xdg` is `XDG_STATE_HOME`. With `require_key`, no sidecar
/// starts without a state directory.
pub(super) fn evaluate_state_dir(
    state_dir: Option<&Path>,
    xdg: Option<OsString>,
    require_key: bool,
    project: &Path,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if xdg.is_some_and(|xdg| !xdg.is_empty() && Path::new(&xdg).is_relative()) {
        let title = "XDG_STATE_HOME is a relative path and is ignored";
        let detail = "State is stored in ~/.local/state/connect-sidecar instead.";
        findings.push(Finding::new(Severity::Note, "relative_state_home", title, detail).fix("unset XDG_STATE_HOME"));
    }
    if let Err(problem) = state_dir.map_or(Err(Problem::NoStateDir), private_dir::examine) {
        let severity = if require_key { Severity::Problem } else { Severity::Warning };
        let lost = "`status`, `run` and all other commands cannot find a running sidecar, and its warnings and usage \
                    counts are lost when it ends.";
        let advice = problem.advice().map_or_else(String::new, |advice| format!(" What to do: {advice}."));
        let finding = Finding::new(severity, "state_directory", problem.to_string(), format!("{lost}{advice}"));
        findings.push(problem.command().into_iter().fold(finding, Finding::fix));
    }
    let Some(state_dir) = state_dir else { return findings };
    if let Err(unfit) = ca::exists(state_dir, project) {
        let detail = "`connect-sidecar run` cannot intercept requests with it.";
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
    fn an_exposed_file_has_a_fix() {
        let good = token("web", 9000, "development");
        let codes = |tracking, is_readable_by_others, value: &str| {
            let file = EnvFile { is_readable_by_others, ..file(".env.local", value) };
            let findings = evaluate(&file, tracking, Path::new("/web"));
            findings.into_iter().map(|f| (f.code.into_owned(), f.fix.expect("a fix"))).collect::<Vec<_>>()
        };
        let pair = |code: &str, fix: &str| (code.to_owned(), fix.to_owned());
        let readable = pair("env_file_readable_by_others", "chmod 600 .env.local");
        let unignored = pair("env_file_not_ignored", "echo .env.local >> .gitignore");
        let tracked = pair("env_file_tracked", "git rm --cached .env.local && echo .env.local >> .gitignore");
        assert!(codes(Tracking::Ignored, false, &good).is_empty());
        assert!(codes(Tracking::Unknown, false, &good).is_empty());
        assert_eq!(codes(Tracking::Unignored, true, &good), [readable, unignored]);
        assert_eq!(codes(Tracking::Tracked, false, &good), [tracked]);
        assert!(codes(Tracking::Tracked, true, "").is_empty(), "there is no secret in it");
    }

    #[test]
    fn a_template_may_be_published() {
        let good = token("web", 9000, "development");
        for (name, count) in
            [(".env.example", 0), (".env.local.sample", 0), (".env.local.bak", 2), (".env.development", 2)]
        {
            let file = EnvFile { is_readable_by_others: true, ..file(name, &good) };
            assert_eq!(evaluate(&file, Tracking::Tracked, Path::new("/web")).len(), count, "{name}");
        }
    }
}
