//! Whether the env file's token is valid, now and for a while. Pure.

use std::time::Duration;

use super::env_files::{EnvFile, Oddity};
use super::finding::{Finding, Severity};
use crate::credential::token_file::TokenReading;
use crate::credential::warning;
use crate::os::clock::{Expiry, Timestamp, format_duration};

/// What the findings depend on besides the file.
pub(super) struct Circumstances {
    pub(super) now: Timestamp,
    /// A token that expires within this time is about to expire.
    pub(super) expiring_below: Duration,
    /// Why requests succeed even without a valid token in the file, if so.
    pub(super) covered: Option<&'static str>,
}

/// Findings about the token of the env file.
pub(super) fn evaluate(file: &EnvFile, circumstances: &Circumstances) -> Vec<Finding> {
    let Circumstances { now, expiring_below, covered } = circumstances;
    let source = &file.shown;
    let bad = |code: &'static str, title: String, detail: &str| match covered {
        None => Finding::new(Severity::Problem, code, title, detail),
        Some(why) => Finding::new(Severity::Warning, code, title, *why),
    };
    let refused = "Without a valid token nothing is sent to Connect: requests get 503.";
    let token = match &file.found {
        TokenReading::Missing => {
            let title = match file.oddity {
                Some(Oddity::Duplicates(count)) => {
                    format!("the last of {count} assignments of VERCEL_OIDC_TOKEN in {source} is empty")
                }
                _ => format!("there is no VERCEL_OIDC_TOKEN in {source}"),
            };
            return vec![bad("oidc_token_missing", title, refused).fix("vercel link && vercel env pull")];
        }
        TokenReading::Invalid(defect) => {
            let title = format!("the OIDC token in {source} cannot be used: {defect}");
            return vec![bad("oidc_token_invalid", title, refused).remedy(warning::remedy_for(defect, source))];
        }
        TokenReading::Token { token, .. } => token,
    };
    let project = token.claims.project_name();
    let left = token.expires_at.since(*now);
    let mut findings = Vec::new();
    if left.is_zero() {
        let title = format!("the OIDC token in {source} {}", token.expires_at.expiry(*now));
        findings.push(bad("oidc_token_expired", title, refused).fix("vercel env pull"));
    } else if !token.is_valid_at(*now) {
        let title = format!("the OIDC token in {source} is not valid yet");
        let detail = "Either this machine's clock is slow, or the clock of the machine that issued the token was fast.";
        findings.push(bad("oidc_token_invalid", title, detail).remedy(warning::set_clock()));
    } else if left <= *expiring_below {
        let title = format!("the OIDC token of {project} {}", Expiry::In(left));
        let detail = "After that, requests get 503, except for tokens that are already cached.";
        findings.push(bad("oidc_token_expiring", title, detail).fix("vercel env pull"));
    } else {
        let title = format!("token of {project} in {source} ({}), {} left", token.fingerprint(), format_duration(left));
        findings.push(Finding::ok("credential", title));
    }
    match token.claims.environment.as_deref() {
        Some("development") => {}
        other => {
            let title = format!("the OIDC token is of environment {}, not development", other.unwrap_or("unknown"));
            let detail = "Requests use that environment's connectors and data.";
            findings.push(
                Finding::new(Severity::Warning, "not_development", title, detail)
                    .fix("vercel env pull --environment=development"),
            );
        }
    }
    if let TokenReading::Token { warnings, .. } = &file.found
        && warnings.duplicate_assignments
    {
        let title = format!("{source} assigns VERCEL_OIDC_TOKEN more than once; the last one counts");
        let detail = "A program that writes the file may change a line that is not read; Deno uses the first.";
        findings.push(Finding::new(Severity::Warning, "duplicate_assignments", title, detail).fix("vercel link --yes"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::env_files::fixtures::{NOW, NOW_SECONDS, file, token};
    use crate::os::safe_read::{Defect, DefectCause};

    fn evaluated(found: &str, covered: Option<&'static str>) -> Vec<(Severity, String, Option<String>)> {
        let circumstances = Circumstances { now: NOW, expiring_below: Duration::from_secs(3600), covered };
        let findings = evaluate(&file(".env.local", found), &circumstances);
        findings.into_iter().map(|f| (f.severity, f.code.into_owned(), f.fix)).collect()
    }

    #[test]
    fn every_state_of_the_token_has_a_finding() {
        let of = |left: i64| token("web", left, "development");
        let pull = Some("vercel env pull");
        for (found, severity, code, fix) in [
            (String::new(), Severity::Problem, "oidc_token_missing", Some("vercel link && vercel env pull")),
            ("nonsense".into(), Severity::Problem, "oidc_token_invalid", pull),
            (of(0), Severity::Problem, "oidc_token_expired", pull),
            (of(-60), Severity::Problem, "oidc_token_expired", pull),
            (of(1), Severity::Problem, "oidc_token_expiring", pull),
            (of(3600), Severity::Problem, "oidc_token_expiring", pull),
            (of(3601), Severity::Ok, "credential", None),
        ] {
            let expected = (severity, code.to_owned(), fix.map(str::to_owned));
            assert_eq!(evaluated(&found, None), std::slice::from_ref(&expected), "{found}");
            if severity == Severity::Problem {
                let covered = (Severity::Warning, expected.1, expected.2);
                assert_eq!(evaluated(&found, Some("the sidecar has a token")), [covered]);
            }
        }
    }

    #[test]
    fn further_faults_are_further_findings() {
        let codes = |found: &str| evaluated(found, None).into_iter().map(|(_, code, _)| code).collect::<Vec<_>>();
        assert_eq!(codes(&token("web", 9000, "production")), ["credential", "not_development"]);
        let twice =
            format!("{}\nVERCEL_OIDC_TOKEN={}", token("a", 9000, "development"), token("b", 9000, "development"));
        assert_eq!(codes(&twice), ["credential", "duplicate_assignments"]);
        let early = crate::cli::doctor::env_files::fixtures::with_claims(&serde_json::json!(
            {"exp": NOW_SECONDS + 9000, "nbf": NOW_SECONDS + 120, "environment": "development"}));
        assert_eq!(codes(&early), ["oidc_token_invalid"]);
    }

    #[test]
    fn the_fix_for_a_token_encrypted_by_dotenvx_is_to_decrypt() {
        let fix = Some("npx dotenvx decrypt -f .env.local".to_owned());
        assert_eq!(evaluated("encrypted:BDq", None), [(Severity::Problem, "oidc_token_invalid".into(), fix)]);
    }

    #[test]
    fn the_fix_for_a_world_writable_file_is_chmod() {
        let mut file = file(".env.local", "");
        file.found = TokenReading::Invalid(Defect::new("everybody may write to it", DefectCause::WritableByAll));
        let circumstances = Circumstances { now: NOW, expiring_below: Duration::ZERO, covered: None };
        assert_eq!(evaluate(&file, &circumstances)[0].fix.as_deref(), Some("chmod 600 .env.local"));
    }
}
