//! Upstream's error → the command that mends it, for the log line of that request. Pure.
//!
//! Upstream's reply itself is passed on untouched; this only explains it. The codes are those of connect-contract.md
//! section 2.2. Commands are meant to be pasted into a shell, so a connector is quoted.

use http::StatusCode;
use serde::Deserialize;

use crate::shell_quoting;

/// What upstream says went wrong, as far as anyone here looks at it.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct UpstreamError {
    /// `error.code`
    #[serde(default)]
    pub code: String,
    /// `error.message`
    #[serde(default)]
    pub message: String,
    /// The bearer is no good.
    #[serde(default)]
    pub invalid_token: bool,
    /// There was no bearer.
    #[serde(default)]
    pub missing_token: bool,
}

impl UpstreamError {
    /// Reads Vercel's envelope; anything else is an error without a code.
    pub fn read(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Envelope {
            error: UpstreamError,
        }
        serde_json::from_slice::<Envelope>(body).map(|e| e.error).unwrap_or_default()
    }

    /// The code for the log, if it looks like one: an answer could hold anything there, also what was sent with the
    /// request.
    pub fn shown_code(&self) -> Option<&str> {
        let is_code = self.code.len() <= 64 && self.code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        (is_code && !self.code.is_empty()).then_some(&self.code)
    }

    /// Whether upstream rejects the credential rather than the request.
    pub fn rejects_credential(&self, status: StatusCode) -> bool {
        status == StatusCode::UNAUTHORIZED
            || (status == StatusCode::FORBIDDEN && (self.invalid_token || self.missing_token))
    }
}

/// What to do about an error: a command to run, or words where no command helps.
pub fn advice(status: StatusCode, error: &UpstreamError, connector: &str, environment: &str) -> Option<String> {
    if error.rejects_credential(status) {
        return Some("run `vercel env pull`".into());
    }
    let c = shell_quoting::word(connector);
    Some(match error.code.as_str() {
        "forbidden" if says_not_linked(&error.message) => format!("run `vercel connect attach {c}`"),
        "forbidden" if is_environment(environment) => {
            format!("run `vercel connect attach {c} --environment {environment}`")
        }
        "forbidden" => format!("run `vercel connect attach {c}` with the environment of the token as --environment"),
        "client_installation_required" | "connector_installation_required" => {
            format!("run `vercel connect open {c}` and install, or pass an `installationId`")
        }
        "user_authorization_required" => format!(
            "run `vercel connect token {c}`, which walks through the consent; an app calls `POST /v1/connect/authorize/{}`",
            connector.replace('/', "%2F")
        ),
        "no_token" => format!("the grant is gone: run `vercel connect token {c}` to consent again"),
        "unresolved_token" => {
            format!(
                "this connector cannot serve that subject: `vercel connect token {c} --subject app` shows what it can"
            )
        }
        "not_found" => {
            "run `vercel connect list` to see the connectors there are, `vercel connect create` to make one".into()
        }
        "authorization_pending" | "slow_down" => "the consent is not given yet: ask again later, and less often".into(),
        "access_denied" => format!("the consent was denied: run `vercel connect token {c}` to ask again"),
        "expired_token" => format!("the consent came too late: run `vercel connect token {c}` to ask again"),
        "invalid_grant" => format!("the provider revoked the grant: run `vercel connect token {c}` to consent again"),
        _ => match status.as_u16() {
            429 => "the team's limit is 200 reads and 50 writes a minute: wait up to a minute".into(),
            410 => format!("this request is over: run `vercel connect token {c}` to begin anew"),
            _ => return None,
        },
    })
}

fn says_not_linked(message: &str) -> bool {
    message.to_ascii_lowercase().contains("connector is not linked to this project")
}

/// Whether it looks like an environment's name: a token could hold anything there.
fn is_environment(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && !name.starts_with('-') && name.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coached(status: u16, body: &str) -> Option<String> {
        let status = StatusCode::from_u16(status).expect("a status");
        advice(status, &UpstreamError::read(body.as_bytes()), "slack/acme-slack", "development")
    }

    #[test]
    fn every_typed_error_has_its_command() {
        for (status, body, expected) in [
            (
                403,
                r#"{"error":{"code":"forbidden","message":"The Connector is not linked to this project."}}"#,
                "vercel connect attach slack/acme-slack`",
            ),
            (
                403,
                r#"{"error":{"code":"forbidden","message":"other"}}"#,
                "vercel connect attach slack/acme-slack --environment development`",
            ),
            (403, r#"{"error":{"code":"forbidden","message":"x","invalidToken":true}}"#, "vercel env pull"),
            (403, r#"{"error":{"code":"forbidden","message":"x","missingToken":true}}"#, "vercel env pull"),
            (401, r#"{"error":{"code":"anything"}}"#, "vercel env pull"),
            (401, "", "vercel env pull"),
            (422, r#"{"error":{"code":"client_installation_required"}}"#, "vercel connect open slack/acme-slack"),
            (422, r#"{"error":{"code":"connector_installation_required"}}"#, "installationId"),
            (422, r#"{"error":{"code":"user_authorization_required"}}"#, "vercel connect token slack/acme-slack"),
            (422, r#"{"error":{"code":"user_authorization_required"}}"#, "/v1/connect/authorize/slack%2Facme-slack"),
            (404, r#"{"error":{"code":"not_found"}}"#, "vercel connect create"),
            (422, r#"{"error":{"code":"no_token"}}"#, "vercel connect token slack/acme-slack"),
            (422, r#"{"error":{"code":"unresolved_token"}}"#, "subject"),
            (400, r#"{"error":{"code":"authorization_pending"}}"#, "later"),
            (400, r#"{"error":{"code":"slow_down"}}"#, "later"),
            (400, r#"{"error":{"code":"access_denied"}}"#, "denied"),
            (400, r#"{"error":{"code":"expired_token"}}"#, "too late"),
            (400, r#"{"error":{"code":"invalid_grant"}}"#, "revoked"),
            (429, r#"{"error":{"code":"rate_limited"}}"#, "a minute"),
            (410, "{}", "begin anew"),
        ] {
            let advice = coached(status, body).unwrap_or_default();
            assert!(advice.contains(expected), "{status} {body}: {advice}");
        }
        assert_eq!(coached(500, r#"{"error":{"code":"internal"}}"#), None);
        assert_eq!(coached(403, r#"{"error":{"code":"other"}}"#), None);
    }

    #[test]
    fn only_what_looks_like_a_code_is_shown() {
        for (code, shown) in [
            ("forbidden", true),
            ("client_installation_required", true),
            ("", false),
            ("xoxb-abc", false),
            ("ghp_0123456789", false),
            ("Bearer", false),
            ("a\nb", false),
            (&"a".repeat(65), false),
        ] {
            let error = UpstreamError { code: code.into(), ..UpstreamError::default() };
            assert_eq!(error.shown_code(), shown.then_some(code));
        }
    }

    #[test]
    fn a_connector_cannot_smuggle_a_command() {
        let error = UpstreamError { code: "no_token".into(), ..UpstreamError::default() };
        let advice = advice(StatusCode::FORBIDDEN, &error, "a;rm -rf ~;'$(id)'", "development").expect("advice");
        assert!(advice.contains(r"vercel connect token 'a;rm -rf ~;'\''$(id)'\'''`"), "{advice}");
    }

    #[test]
    fn an_environment_is_in_a_command_only_where_it_looks_like_one() {
        let error = UpstreamError { code: "forbidden".into(), ..UpstreamError::default() };
        for (environment, is_shown) in [
            ("development", true),
            ("my_env-2.0", true),
            ("", false),
            ("-x", false),
            ("a`vercel rm -rf ~`", false),
            ("a b", false),
            ("a;id", false),
            ("a\u{202e}", false),
        ] {
            let advice = advice(StatusCode::FORBIDDEN, &error, "x", environment).expect("advice");
            assert_eq!(advice.contains(&format!("attach x --environment {environment}`")), is_shown, "{advice}");
            assert_eq!(advice.matches('`').count(), 2, "{advice}");
        }
    }

    #[test]
    fn an_envelope_of_another_shape_is_an_error_without_a_code() {
        for body in ["", "[]", "{}", r#"{"error":"x"}"#, "<html>", r#"{"error":{"code":7}}"#] {
            assert_eq!(UpstreamError::read(body.as_bytes()), UpstreamError::default(), "{body}");
        }
    }
}
