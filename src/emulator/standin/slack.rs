//! Slack: an app is installed in a workspace by OAuth v2, which gives a bot token of that workspace; users give tokens of
//! their own by `user_scope`. Tokens rotate: each lasts twelve hours at Slack, and here as long as the seed says.
//!
//! Errors come with 200 and `"ok": false`. No token can be narrowed. `prompt=none` is this stand-in's own.

use std::time::Duration;

use serde_json::{Value, json};

use super::authorization::{Issued, OAuthError, Rules, Server};
use super::{Call, answer, not_found};
use crate::emulator::exchange::Given;

/// Slack.
#[derive(Debug)]
pub(super) struct Slack {
    pub(super) server: Server,
}

impl Default for Slack {
    fn default() -> Self {
        Self {
            server: Server::new(Rules {
                name: "Slack",
                pkce_required: false,
                takes_assertions: false,
                access_prefix: |who| if is_team(who) { "xoxe.xoxb-1-" } else { "xoxe.xoxp-1-" },
                refresh_prefix: "xoxe-1-",
                refresh_life: Duration::from_secs(365 * 24 * 3600),
                detail_types: &[],
            }),
        }
    }
}

/// Whether a token is a workspace's, and not a user's: ids of workspaces begin with T, those of users with U or W.
fn is_team(who: &str) -> bool {
    who.starts_with('T')
}

impl Slack {
    pub(super) fn answer(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Given {
        match route {
            ("GET", ["oauth", "v2", "authorize"]) => self.server.authorize(call),
            ("POST", ["oauth", "v2", "authorize"]) => self.server.decide(call),
            ("POST", ["api", "oauth.v2.access"]) => reply(self.server.token(call).map(|issued| access(&issued))),
            ("POST", ["api", "auth.test"]) => reply(self.test(call)),
            ("POST", ["api", "auth.revoke"]) => {
                let revoked = call.bearer_or_token().is_some_and(|token| self.server.revoke_grant_of(token));
                reply(if revoked { Ok(json!({"revoked": true})) } else { Err(("invalid_auth", "")) })
            }
            _ => not_found(),
        }
    }

    fn test(&self, call: &Call<'_>) -> Result<Value, OAuthError> {
        let access = call.bearer_or_token().and_then(|token| self.server.access(token, call.now));
        let access = access.ok_or(("token_expired", ""))?;
        Ok(json!({"url": "https://acme.slack.com/", "user_id": access.who, "team_id": access.who}))
    }
}

/// What `oauth.v2.access` answers.
fn access(issued: &Issued) -> Value {
    let Issued { access_token, refresh_token, expires_in, access, .. } = issued;
    let token = json!({"access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in,
        "scope": access.reach.scopes.join(",")});
    let mut answer = if is_team(&access.who) {
        let mut answer = token;
        answer["token_type"] = "bot".into();
        answer["bot_user_id"] = "U0BOT".into();
        answer["team"] = json!({"id": access.who, "name": access.who});
        answer
    } else {
        let mut user = token;
        user["token_type"] = "user".into();
        user["id"] = access.who.clone().into();
        json!({"authed_user": user, "team": {"id": "T0ACME", "name": "acme"}})
    };
    answer["app_id"] = access.client_id.clone().into();
    answer["enterprise"] = Value::Null;
    answer["is_enterprise_install"] = false.into();
    answer
}

fn reply(result: Result<Value, OAuthError>) -> Given {
    let body = match result {
        Ok(mut body) => {
            body["ok"] = true.into();
            body
        }
        // Its own names for what RFC 6749 calls by others.
        Err(("invalid_grant", why)) if why.contains("refresh") || why.contains("grant is over") => {
            json!({"ok": false, "error": "invalid_refresh_token"})
        }
        Err(("invalid_grant", _)) => json!({"ok": false, "error": "invalid_code"}),
        Err(("invalid_client", _)) => json!({"ok": false, "error": "bad_client_secret"}),
        Err((error, _)) => json!({"ok": false, "error": error}),
    };
    answer(200, &body)
}
