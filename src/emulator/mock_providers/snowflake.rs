//! Snowflake: a user exchanges a key-pair JWT at the account's token endpoint for an access token with one role, which
//! is requested as a scope.
//!
//! The response is the token as text. One base URL serves all accounts.

use std::collections::HashMap;
use std::time::Duration;

use http::StatusCode;
use serde_json::json;

use super::{Call, json_response, not_found};
use crate::emulator::ids::random_id;
use crate::emulator::keys::{RsaKey, seconds};
use crate::emulator::message::Response;

/// The maximum lifetime of a key-pair JWT, in seconds.
const MAX_JWT_LIFE: u64 = 3600;
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

/// The mock Snowflake.
#[derive(Debug, Default)]
pub(super) struct Snowflake {
    /// Users by `ACCOUNT.USER`.
    users: HashMap<String, User>,
}

#[derive(Debug)]
struct User {
    roles: Vec<String>,
    token_life: u64,
}

impl Snowflake {
    pub(super) fn add_user(&mut self, user: &str, roles: Vec<String>, token_life: u64) {
        self.users.insert(user.to_owned(), User { roles, token_life });
    }

    pub(super) fn handle(&self, call: &Call<'_>, route: (&str, &[&str])) -> Response {
        match route {
            ("POST", ["oauth", "token"]) => {
                self.exchange(call).map(|token| Response::text(StatusCode::OK, token)).unwrap_or_else(
                    |(error, description)| json_response(400, &json!({"error": error, "message": description})),
                )
            }
            _ => not_found(),
        }
    }

    fn exchange(&self, call: &Call<'_>) -> Result<String, (&'static str, &'static str)> {
        if call.form("grant_type") != Some(JWT_BEARER) {
            return Err(("unsupported_grant_type", "only JWT bearer"));
        }
        let key = RsaKey::of_this_process().map_err(|_| ("server_error", "no key"))?;
        let assertion = call.form("assertion").unwrap_or_default();
        let claims =
            key.verify(assertion, call.now, MAX_JWT_LIFE).map_err(|description| ("invalid_grant", description))?;
        let subject = claims["sub"].as_str().unwrap_or_default();
        let user = self.users.get(subject).ok_or(("invalid_grant", "no such user in the account"))?;
        // `iss` ends with the fingerprint of the user's registered public key.
        if claims["iss"].as_str() != Some(&format!("{subject}.{}", key.fingerprint())) {
            return Err(("invalid_grant", "`iss` does not name the user's key"));
        }
        call.record_proof("key-pair JWT RS256");
        let scope = call.form("scope").unwrap_or("session:role:PUBLIC");
        let role = scope.split(' ').find_map(|scope| scope.strip_prefix("session:role:"));
        let role = role.ok_or(("invalid_scope", "the scope must be `session:role:` and a role"))?;
        if !user.roles.is_empty() && !user.roles.iter().any(|granted| granted == role) {
            return Err(("invalid_scope", "the user does not have this role"));
        }
        let iat = seconds(call.now);
        Ok(key.sign(&json!({"iss": call.base, "sub": subject, "role": role, "iat": iat,
            "exp": seconds(call.now + Duration::from_secs(user.token_life)), "jti": random_id("", 16)})))
    }
}
