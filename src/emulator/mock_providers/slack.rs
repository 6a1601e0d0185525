//! Slack: OAuth v2 installs an app in a workspace and returns a bot token; users consent with `user_scope`. Tokens
//! rotate; their lifetime is twelve hours at the real Slack, and the connector's `token_life` here.
//!
//! Errors have status 200 and `"ok": false`. Tokens cannot be narrowed. The real Slack has no `prompt=none`.

use std::time::Duration;

use serde_json::{Value, json};

use super::authorization::{AuthorizationServer, OAuthError, ServerRules, TokenResponse};
use super::{Call, json_response, not_found};
use crate::emulator::message::Response;

/// The mock Slack.
#[derive(Debug)]
pub(super) struct Slack {
    pub(super) server: AuthorizationServer,
}

impl Default for Slack {
    fn default() -> Self {
        Self {
            server: AuthorizationServer::new(ServerRules {
                name: "Slack",
                pkce_required: false,
                takes_assertions: false,
                access_prefix: |subject| if is_team(subject) { "xoxe.xoxb-1-" } else { "xoxe.xoxp-1-" },
                refresh_prefix: "xoxe-1-",
                refresh_life: Duration::from_secs(365 * 24 * 3600),
                detail_types: &[],
            }),
        }
    }
}

/// Whether a subject is a workspace and not a user: ids of workspaces begin with T, those of users with U or W.
fn is_team(subject: &str) -> bool {
    subject.starts_with('T')
}

impl Slack {
    pub(super) fn handle(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Response {
        match route {
            ("GET", ["oauth", "v2", "authorize"]) => self.server.authorize(call),
            ("POST", ["oauth", "v2", "authorize"]) => self.server.submit(call),
            ("POST", ["api", "oauth.v2.access"]) => {
                reply(call, self.server.token(call).map(|response| token_json(&response)))
            }
            ("POST", ["api", "auth.test"]) => reply(call, self.auth_test(call)),
            ("POST", ["api", "auth.revoke"]) => {
                let revoked = call.bearer_or_token().is_some_and(|token| self.server.revoke_grants_of(token));
                reply(call, if revoked { Ok(json!({"revoked": true})) } else { Err(("invalid_auth", "")) })
            }
            _ => not_found(),
        }
    }

    fn auth_test(&self, call: &Call<'_>) -> Result<Value, OAuthError> {
        let access = call.bearer_or_token().and_then(|token| self.server.access(token, call.now));
        let access = access.ok_or(("token_expired", ""))?;
        Ok(json!({"url": "https://acme.slack.com/", "user_id": access.subject, "team_id": access.subject}))
    }
}

/// The body of `oauth.v2.access`.
fn token_json(response: &TokenResponse) -> Value {
    let TokenResponse { access_token, refresh_token, expires_in, access, .. } = response;
    let token = json!({"access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in,
        "scope": access.scope.scopes.join(",")});
    let mut body = if is_team(&access.subject) {
        let mut bot = token;
        bot["token_type"] = "bot".into();
        bot["bot_user_id"] = "U0BOT".into();
        bot["team"] = json!({"id": access.subject, "name": access.subject});
        bot
    } else {
        let mut user = token;
        user["token_type"] = "user".into();
        user["id"] = access.subject.clone().into();
        json!({"authed_user": user, "team": {"id": "T0ACME", "name": "acme"}})
    };
    body["app_id"] = access.client_id.clone().into();
    body["enterprise"] = Value::Null;
    body["is_enterprise_install"] = false.into();
    body
}

/// A response with Slack's names for the errors of RFC 6749.
fn reply(call: &Call<'_>, result: Result<Value, OAuthError>) -> Response {
    let body = match result {
        Ok(mut body) => {
            body["ok"] = true.into();
            body
        }
        Err(("invalid_grant", _)) if call.is_refresh() => json!({"ok": false, "error": "invalid_refresh_token"}),
        Err(("invalid_grant", _)) => json!({"ok": false, "error": "invalid_code"}),
        Err(("invalid_client", _)) => json!({"ok": false, "error": "bad_client_secret"}),
        Err((error, _)) => json!({"ok": false, "error": error}),
    };
    json_response(200, &body)
}
