//! The remedies for upstream's errors, for log lines and events. Pure.
//!
//! Upstream's response itself is passed on unchanged. The codes are those of docs/vercel.md section 2.2. Commands can
//! be pasted into a shell, so connectors are quoted.

use http::StatusCode;
use serde::Deserialize;

use crate::os::shell_quoting;
use crate::remedy::Remedy;

/// The fields of upstream's error that the sidecar uses.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct UpstreamError {
    /// `error.code`
    #[serde(default)]
    pub code: String,
    /// `error.message`
    #[serde(default)]
    pub message: String,
    /// The bearer token was rejected.
    #[serde(default)]
    pub invalid_token: bool,
    /// There was no bearer token.
    #[serde(default)]
    pub missing_token: bool,
}

impl UpstreamError {
    /// Parses an error body of Vercel's. Anything else gives an error without a code.
    pub fn read(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Envelope {
            error: UpstreamError,
        }
        serde_json::from_slice::<Envelope>(body).map(|e| e.error).unwrap_or_default()
    }

    /// The code for the log, if it looks like one. A response could contain anything there, even parts of the request.
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

/// The remedy for an upstream error, if it is known. `environment` is that of the OIDC token.
pub fn remedy(status: StatusCode, error: &UpstreamError, connector: &str, environment: &str) -> Option<Remedy> {
    if error.rejects_credential(status) {
        return Some(Remedy::run("vercel env pull"));
    }
    let c = shell_quoting::word(connector);
    let consent = |why: &str| {
        let command = format!("vercel connect token {c}");
        Remedy::advice(format!("{why}: run `{command}` to consent again")).with_command(command)
    };
    Some(match error.code.as_str() {
        "forbidden" if says_not_linked(&error.message) => Remedy::run(format!("vercel connect attach {c}")),
        "forbidden" if is_environment(environment) => {
            Remedy::run(format!("vercel connect attach {c} --environment {environment}"))
        }
        "forbidden" => Remedy::advice(format!(
            "run `vercel connect attach {c}` with the environment of the token as --environment"
        )),
        "client_installation_required" | "connector_installation_required" => {
            let command = format!("vercel connect open {c}");
            Remedy::advice(format!("run `{command}` and install, or pass an `installationId`")).with_command(command)
        }
        "user_authorization_required" => {
            let command = format!("vercel connect token {c}");
            let path = format!("/v1/connect/authorize/{}", connector.replace('/', "%2F"));
            Remedy::advice(format!("run `{command}`, which walks through the consent; an app calls `POST {path}`"))
                .with_command(command)
        }
        "no_token" => consent("the grant is gone"),
        "unresolved_token" => {
            let command = format!("vercel connect token {c} --subject app");
            Remedy::advice(format!("this connector cannot serve that subject: `{command}` shows what it can"))
                .with_command(command)
        }
        "not_found" => Remedy::advice(
            "run `vercel connect list` to see the connectors there are, `vercel connect create` to make one",
        )
        .with_command("vercel connect list"),
        "authorization_pending" | "slow_down" => {
            Remedy::advice("the consent is not given yet: ask again later, and less often")
        }
        "access_denied" => consent("the consent was denied"),
        "expired_token" => consent("the consent came too late"),
        "invalid_grant" => consent("the provider revoked the grant"),
        _ => match status.as_u16() {
            429 => Remedy::advice("the team's limit is 200 reads and 50 writes a minute: wait up to a minute"),
            410 => {
                let command = format!("vercel connect token {c}");
                Remedy::advice(format!("this request is over: run `{command}` to begin anew")).with_command(command)
            }
            _ => return None,
        },
    })
}

fn says_not_linked(message: &str) -> bool {
    message.to_ascii_lowercase().contains("connector is not linked to this project")
}

/// Whether it looks like the name of an environment: a token could contain anything there.
fn is_environment(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && !name.starts_with('-') && name.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remedy_for(status: u16, body: &str) -> Option<Remedy> {
        let status = StatusCode::from_u16(status).expect("a status");
        remedy(status, &UpstreamError::read(body.as_bytes()), "slack/acme-slack", "development")
    }

    #[test]
    fn every_error_code_has_its_remedy() {
        const TOKEN: Option<&str> = Some("vercel connect token slack/acme-slack");
        const OPEN: Option<&str> = Some("vercel connect open slack/acme-slack");
        let forbidden = |message: &str| format!(r#"{{"code":"forbidden","message":"{message}"}}"#);
        let typed = |code: &str| format!(r#"{{"code":"{code}"}}"#);
        for (status, error, hint, command) in [
            (
                403,
                forbidden("The Connector is not linked to this project."),
                "vercel connect attach slack/acme-slack",
                Some("vercel connect attach slack/acme-slack"),
            ),
            (
                403,
                forbidden("other"),
                "vercel connect attach",
                Some("vercel connect attach slack/acme-slack --environment development"),
            ),
            (403, r#"{"code":"forbidden","invalidToken":true}"#.into(), "vercel env pull", Some("vercel env pull")),
            (403, r#"{"code":"forbidden","missingToken":true}"#.into(), "vercel env pull", Some("vercel env pull")),
            (401, typed("anything"), "vercel env pull", Some("vercel env pull")),
            (401, String::new(), "vercel env pull", Some("vercel env pull")),
            (422, typed("client_installation_required"), "install", OPEN),
            (422, typed("connector_installation_required"), "installationId", OPEN),
            (422, typed("user_authorization_required"), "/v1/connect/authorize/slack%2Facme-slack", TOKEN),
            (404, typed("not_found"), "vercel connect create", Some("vercel connect list")),
            (422, typed("no_token"), "the grant is gone", TOKEN),
            (422, typed("unresolved_token"), "subject", Some("vercel connect token slack/acme-slack --subject app")),
            (400, typed("authorization_pending"), "later", None),
            (400, typed("slow_down"), "later", None),
            (400, typed("access_denied"), "denied", TOKEN),
            (400, typed("expired_token"), "too late", TOKEN),
            (400, typed("invalid_grant"), "revoked", TOKEN),
            (429, typed("rate_limited"), "a minute", None),
            (410, "{}".into(), "begin anew", TOKEN),
        ] {
            let remedy = remedy_for(status, &format!(r#"{{"error":{error}}}"#)).expect("a remedy");
            assert!(remedy.hint.contains(hint), "{status} {error}: {remedy}");
            assert_eq!(remedy.command.as_deref(), command, "{status} {error}");
        }
        assert_eq!(remedy_for(500, r#"{"error":{"code":"internal"}}"#), None);
        assert_eq!(remedy_for(403, r#"{"error":{"code":"other"}}"#), None);
    }

    #[test]
    fn shows_only_what_looks_like_a_code() {
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
    fn a_connector_cannot_inject_a_command() {
        let error = UpstreamError { code: "no_token".into(), ..UpstreamError::default() };
        let remedy = remedy(StatusCode::FORBIDDEN, &error, "a;rm -rf ~;'$(id)'", "development").expect("a remedy");
        assert_eq!(remedy.command.as_deref(), Some(r"vercel connect token 'a;rm -rf ~;'\''$(id)'\'''"));
    }

    #[test]
    fn uses_only_what_looks_like_an_environment() {
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
            let remedy = remedy(StatusCode::FORBIDDEN, &error, "x", environment).expect("a remedy");
            let expected = match is_shown {
                true => Some(format!("vercel connect attach x --environment {environment}")),
                false => None,
            };
            assert_eq!(remedy.command, expected.map(Into::into));
            assert!(is_shown || environment.is_empty() || !remedy.hint.contains(environment), "{remedy}");
        }
    }

    #[test]
    fn a_body_in_another_format_gives_an_error_without_a_code() {
        for body in ["", "[]", "{}", r#"{"error":"x"}"#, "<html>", r#"{"error":{"code":7}}"#] {
            assert_eq!(UpstreamError::read(body.as_bytes()), UpstreamError::default(), "{body}");
        }
    }
}
