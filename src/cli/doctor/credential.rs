//! Whether there is a credential that upstream would take, now and for a while. Pure.

use std::time::Duration;

use super::env_files::{EnvFile, Oddity};
use super::finding::{Finding, Severity};
use crate::credential::token_file::TokenReading;
use crate::credential::warning;
use crate::os::clock::{Expiry, Timestamp, format_duration};

/// What a verdict depends on besides the file.
pub(super) struct Circumstances {
    pub(super) now: Timestamp,
    /// A token with less life than this is about to end.
    pub(super) expiring_below: Duration,
    /// Why a bad token in the file stops no request, if it does not.
    pub(super) covered: Option<&'static str>,
}

/// Judges the token of the env file.
pub(super) fn judge(file: &EnvFile, circumstances: &Circumstances) -> Vec<Finding> {
    let Circumstances { now, expiring_below, covered } = circumstances;
    let source = &file.shown;
    let bad = |code: &'static str, title: String, detail: &str| match covered {
        None => Finding::new(Severity::Problem, code, title, detail),
        Some(why) => Finding::new(Severity::Warning, code, title, *why),
    };
    let refused = "Without a good token nothing is sent to Connect: requests get 503.";
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
        let detail =
            "Either this machine's clock is behind, or that of the machine that the token came from was ahead.";
        findings.push(bad("oidc_token_invalid", title, detail).remedy(warning::set_clock()));
    } else if left <= *expiring_below {
        let title = format!("the OIDC token of {project} {}", Expiry::In(left));
        let detail = "From then on requests get 503, but for tokens that are cached already.";
        findings.push(bad("oidc_token_expiring", title, detail).fix("vercel env pull"));
    } else {
        let title = format!("token of {project} in {source} ({}), {} left", token.fingerprint(), format_duration(left));
        findings.push(Finding::ok("credential", title));
    }
    match token.claims.environment.as_deref() {
        Some("development") => {}
        other => {
            let title = format!("the OIDC token is of environment {}, not development", other.unwrap_or("unknown"));
            let detail = "Requests act there: with its connectors, and on its data.";
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
        let detail = "What writes the file may change another line than the one that is read; Deno takes the first.";
        findings.push(Finding::new(Severity::Warning, "duplicate_assignments", title, detail).fix("vercel link --yes"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::env_files::fixtures::{NOW, NOW_SECONDS, file, token};
    use crate::os::safe_read::{Defect, DefectCause};

    fn judged(found: &str, covered: Option<&'static str>) -> Vec<(Severity, String, Option<String>)> {
        let circumstances = Circumstances { now: NOW, expiring_below: Duration::from_secs(3600), covered };
        let judged = judge(&file(".env.local", found), &circumstances);
        judged.into_iter().map(|f| (f.severity, f.code.into_owned(), f.fix)).collect()
    }

    #[test]
    fn every_state_of_the_token_has_its_verdict() {
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
            assert_eq!(judged(&found, None), std::slice::from_ref(&expected), "{found}");
            if severity == Severity::Problem {
                let covered = (Severity::Warning, expected.1, expected.2);
                assert_eq!(judged(&found, Some("it is fresh elsewhere")), [covered]);
            }
        }
    }

    #[test]
    fn what_is_wrong_besides_is_said_besides() {
        let codes = |found: &str| judged(found, None).into_iter().map(|(_, code, _)| code).collect::<Vec<_>>();
        assert_eq!(codes(&token("web", 9000, "production")), ["credential", "not_development"]);
        let twice =
            format!("{}\nVERCEL_OIDC_TOKEN={}", token("a", 9000, "development"), token("b", 9000, "development"));
        assert_eq!(codes(&twice), ["credential", "duplicate_assignments"]);
        let early = crate::cli::doctor::env_files::fixtures::with_claims(&serde_json::json!(
            {"exp": NOW_SECONDS + 9000, "nbf": NOW_SECONDS + 120, "environment": "development"}));
        assert_eq!(codes(&early), ["oidc_token_invalid"]);
    }

    #[test]
    fn what_dotenvx_has_encrypted_is_decrypted() {
        let fix = Some("npx dotenvx decrypt -f .env.local".to_owned());
        assert_eq!(judged("encrypted:BDq", None), [(Severity::Problem, "oidc_token_invalid".into(), fix)]);
    }

    #[test]
    fn a_file_that_all_may_write_is_closed_and_not_pulled_again() {
        let mut file = file(".env.local", "");
        file.found = TokenReading::Invalid(Defect::new("everybody may write to it", DefectCause::WritableByAll));
        let circumstances = Circumstances { now: NOW, expiring_below: Duration::ZERO, covered: None };
        assert_eq!(judge(&file, &circumstances)[0].fix.as_deref(), Some("chmod 600 .env.local"));
    }
}
