//! Snowflake: a user proves with a key-pair JWT who it is, and exchanges it at the account's token endpoint for an access
//! token that acts in one role, named as scope.
//!
//! The answer is the token as text, as Snowflake gives it. One base serves all accounts.

use std::collections::HashMap;
use std::time::Duration;

use http::StatusCode;
use serde_json::json;

use super::{Call, answer, not_found};
use crate::emulator::exchange::Given;
use crate::emulator::ids::random_id;
use crate::emulator::keys::{RsaKey, seconds};

/// A key-pair JWT may last an hour.
const LONGEST_JWT: u64 = 3600;
/// The grant type of the exchange.
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

/// Snowflake.
#[derive(Debug, Default)]
pub(super) struct Snowflake {
    /// Users by account and name, `ACME.CONNECT`.
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

    pub(super) fn answer(&self, call: &Call<'_>, route: (&str, &[&str])) -> Given {
        match route {
            ("POST", ["oauth", "token"]) => self
                .exchange(call)
                .map(|token| Given::of(StatusCode::OK, "text/plain; charset=utf-8", token))
                .unwrap_or_else(|(error, why)| answer(400, &json!({"error": error, "message": why}))),
            _ => not_found(),
        }
    }

    fn exchange(&self, call: &Call<'_>) -> Result<String, (&'static str, &'static str)> {
        if call.form("grant_type") != Some(JWT_BEARER) {
            return Err(("unsupported_grant_type", "only the exchange of a JWT"));
        }
        let key = RsaKey::of_this_process().map_err(|_| ("server_error", "no key"))?;
        let assertion = call.form("assertion").unwrap_or_default();
        let claims = key.verify(assertion, call.now, LONGEST_JWT).map_err(|why| ("invalid_grant", why))?;
        let subject = claims["sub"].as_str().unwrap_or_default();
        let user = self.users.get(subject).ok_or(("invalid_grant", "no such user in the account"))?;
        // The issuer names the key: the public key that the user has registered.
        if claims["iss"].as_str() != Some(&format!("{subject}.{}", key.fingerprint())) {
            return Err(("invalid_grant", "`iss` names another key than the user's"));
        }
        call.prove("key-pair JWT RS256");
        let scope = call.form("scope").unwrap_or("session:role:PUBLIC");
        let role = scope.split(' ').find_map(|scope| scope.strip_prefix("session:role:"));
        let role = role.ok_or(("invalid_scope", "`session:role:` and a role"))?;
        if !user.roles.is_empty() && !user.roles.iter().any(|granted| granted == role) {
            return Err(("invalid_scope", "a role that the user does not have"));
        }
        let iat = seconds(call.now);
        Ok(key.sign(&json!({"iss": call.base, "sub": subject, "role": role, "iat": iat,
            "exp": seconds(call.now + Duration::from_secs(user.token_life)), "jti": random_id("", 16)})))
    }
}
