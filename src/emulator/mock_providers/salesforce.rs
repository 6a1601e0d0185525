//! Salesforce: OAuth 2.0 with code and refresh token, and an instance URL at which the token is used.
//!
//! The token response has no lifetime; introspection does. Refresh tokens always rotate, which at the real Salesforce
//! is a setting of the app.

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::authorization::{AuthorizationServer, OAuthError, ServerRules, TokenResponse};
use super::{Call, json_response, not_found};
use crate::emulator::keys::seconds;
use crate::emulator::message::Response;

/// The mock Salesforce.
#[derive(Debug)]
pub(super) struct Salesforce {
    pub(super) server: AuthorizationServer,
}

impl Default for Salesforce {
    fn default() -> Self {
        Self {
            server: AuthorizationServer::new(ServerRules {
                name: "Salesforce",
                pkce_required: false,
                takes_assertions: false,
                access_prefix: |_| "00D0ACME!AQ",
                refresh_prefix: "5Aep861",
                refresh_life: Duration::from_secs(365 * 24 * 3600),
                detail_types: &[],
            }),
        }
    }
}

impl Salesforce {
    pub(super) fn handle(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Response {
        match route {
            ("GET", ["services", "oauth2", "authorize"]) => self.server.authorize(call),
            ("POST", ["services", "oauth2", "authorize"]) => self.server.submit(call),
            ("POST", ["services", "oauth2", "token"]) => {
                let secret = call.form("client_secret").unwrap_or_default().to_owned();
                reply(self.server.token(call).map(|response| token_json(call, &response, &secret)))
            }
            ("POST", ["services", "oauth2", "introspect"]) => reply(self.introspect(call)),
            ("POST", ["services", "oauth2", "revoke"]) => {
                match self.server.revoke(call.form("token").unwrap_or_default()) {
                    true => json_response(200, &json!({})),
                    false => reply(Err(("unsupported_token_type", "this token type is not supported"))),
                }
            }
            ("GET", ["services", "oauth2", "userinfo"]) => {
                let access = call.request.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(
                    || json_response(403, &json!({"error": "Bad_OAuth_Token"})),
                    |access| json_response(200, &json!({"user_id": access.subject, "organization_id": "00D0ACME"})),
                )
            }
            _ => not_found(),
        }
    }

    fn introspect(&self, call: &Call<'_>) -> Result<Value, OAuthError> {
        self.server.authenticate(call)?;
        let access = self.server.access(call.form("token").unwrap_or_default(), call.now);
        Ok(access.map_or_else(
            || json!({"active": false}),
            |access| {
                json!({"active": true, "scope": access.scope.scopes.join(" "), "client_id": access.client_id,
                    "username": access.subject, "token_type": "access_token", "exp": seconds(access.expires_at)})
            },
        ))
    }
}

/// The body of a token response.
fn token_json(call: &Call<'_>, response: &TokenResponse, secret: &str) -> Value {
    let TokenResponse { access_token, refresh_token, access, .. } = response;
    let id = format!("{}/id/00D0ACME/{}", call.base, access.subject);
    let issued_at = call.now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis()).to_string();
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let signature = BASE64_STANDARD.encode(hmac::sign(&key, format!("{id}{issued_at}").as_bytes()));
    json!({"access_token": access_token, "refresh_token": refresh_token, "signature": signature,
        "scope": access.scope.scopes.join(" "), "instance_url": format!("{}/instance", call.base), "id": id,
        "token_type": "Bearer", "issued_at": issued_at})
}

fn reply(result: Result<Value, OAuthError>) -> Response {
    match result {
        Ok(body) => json_response(200, &body),
        Err((error, description)) => json_response(400, &json!({"error": error, "error_description": description})),
    }
}
