//! Salesforce: OAuth 2.0 with a code and a refresh token, and an instance URL to use the token at.
//!
//! A token's end is not told with it: only introspection knows. The refresh token does not rotate at Salesforce unless the
//! app wants it; here it does.

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::authorization::{Issued, OAuthError, Rules, Server};
use super::{Call, answer, not_found};
use crate::emulator::exchange::Given;
use crate::emulator::keys::seconds;

/// Salesforce.
#[derive(Debug)]
pub(super) struct Salesforce {
    pub(super) server: Server,
}

impl Default for Salesforce {
    fn default() -> Self {
        Self {
            server: Server::new(Rules {
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
    pub(super) fn answer(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Given {
        match route {
            ("GET", ["services", "oauth2", "authorize"]) => self.server.authorize(call),
            ("POST", ["services", "oauth2", "authorize"]) => self.server.decide(call),
            ("POST", ["services", "oauth2", "token"]) => {
                let secret = call.form("client_secret").unwrap_or_default().to_owned();
                reply(self.server.token(call).map(|issued| access(call, &issued, &secret)))
            }
            ("POST", ["services", "oauth2", "introspect"]) => reply(self.introspect(call)),
            ("POST", ["services", "oauth2", "revoke"]) => {
                match self.server.revoke(call.form("token").unwrap_or_default()) {
                    true => answer(200, &json!({})),
                    false => reply(Err(("unsupported_token_type", "this token type is not supported"))),
                }
            }
            ("GET", ["services", "oauth2", "userinfo"]) => {
                let access = call.asked.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(
                    || answer(403, &json!({"error": "Bad_OAuth_Token"})),
                    |access| answer(200, &json!({"user_id": access.who, "organization_id": "00D0ACME"})),
                )
            }
            _ => not_found(),
        }
    }

    fn introspect(&self, call: &Call<'_>) -> Result<Value, OAuthError> {
        self.server.client(call)?;
        let access = self.server.access(call.form("token").unwrap_or_default(), call.now);
        Ok(access.map_or_else(
            || json!({"active": false}),
            |access| {
                json!({"active": true, "scope": access.reach.scopes.join(" "), "client_id": access.client_id,
                    "username": access.who, "token_type": "access_token", "exp": seconds(access.ends)})
            },
        ))
    }
}

/// What the token endpoint answers.
fn access(call: &Call<'_>, issued: &Issued, secret: &str) -> Value {
    let Issued { access_token, refresh_token, access, .. } = issued;
    let id = format!("{}/id/00D0ACME/{}", call.base, access.who);
    let issued_at = call.now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis()).to_string();
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let signature = BASE64_STANDARD.encode(hmac::sign(&key, format!("{id}{issued_at}").as_bytes()));
    json!({"access_token": access_token, "refresh_token": refresh_token, "signature": signature,
        "scope": access.reach.scopes.join(" "), "instance_url": format!("{}/instance", call.base), "id": id,
        "token_type": "Bearer", "issued_at": issued_at})
}

fn reply(result: Result<Value, OAuthError>) -> Given {
    match result {
        Ok(body) => answer(200, &body),
        Err((error, why)) => answer(400, &json!({"error": error, "error_description": why})),
    }
}
