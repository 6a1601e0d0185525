//! Any other provider: OAuth 2.0 and OpenID Connect by the book, found by its discovery documents. PKCE is required,
//! refresh tokens rotate, there are device codes, revocation and introspection, and ID tokens signed with RS256.

use std::time::Duration;

use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;
use serde_json::{Value, json};

use super::authorization::{Access, DEVICE_INTERVAL, DEVICE_LIFE, Issued, OAuthError, Rules, Server};
use super::{Call, answer, not_found};
use crate::emulator::exchange::Given;
use crate::emulator::keys::{RsaKey, seconds};

/// The provider.
#[derive(Debug)]
pub(super) struct OAuth {
    pub(super) server: Server,
}

impl Default for OAuth {
    fn default() -> Self {
        Self {
            server: Server::new(Rules {
                name: "Example provider",
                pkce_required: true,
                takes_assertions: true,
                access_prefix: |_| "at_",
                refresh_prefix: "rt_",
                refresh_life: Duration::from_secs(90 * 24 * 3600),
                detail_types: &["resource_access"],
            }),
        }
    }
}

impl OAuth {
    pub(super) fn answer(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Given {
        match route {
            ("GET", [".well-known", "openid-configuration" | "oauth-authorization-server"]) => {
                answer(200, &metadata(&call.base))
            }
            ("GET", ["jwks"]) => match RsaKey::of_this_process() {
                Ok(key) => answer(200, &key.jwks()),
                Err(_) => answer(500, &json!({"error": "server_error"})),
            },
            ("GET", ["authorize"]) => self.server.authorize(call),
            ("GET", ["device"]) => self.server.device_page(call),
            ("POST", ["authorize" | "device"]) => self.server.decide(call),
            ("POST", ["token"]) => reply(self.server.token(call).map(|issued| access(call, &issued))),
            ("POST", ["device_authorization"]) => reply(self.begin_device(call)),
            ("POST", ["revoke"]) => reply(self.server.client(call).map(|_| {
                // RFC 7009: a token that is not known is as good as revoked.
                self.server.revoke(call.form("token").unwrap_or_default());
                json!({})
            })),
            ("POST", ["introspect"]) => reply(self.server.client(call).map(|_| {
                let access = self.server.access(call.form("token").unwrap_or_default(), call.now);
                access.map_or_else(|| json!({"active": false}), introspected)
            })),
            ("GET", ["userinfo"]) => {
                let access = call.asked.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(
                    || answer(401, &json!({"error": "invalid_token"})),
                    |access| answer(200, &json!({"sub": access.who})),
                )
            }
            _ => not_found(),
        }
    }

    fn begin_device(&mut self, call: &Call<'_>) -> Result<Value, OAuthError> {
        let (device_code, user_code) = self.server.begin_device(call)?;
        let page = format!("{}/device", call.base);
        Ok(json!({"device_code": device_code, "user_code": user_code, "verification_uri": page,
            "verification_uri_complete": format!("{page}?user_code={user_code}"),
            "expires_in": DEVICE_LIFE.as_secs(), "interval": DEVICE_INTERVAL.as_secs()}))
    }
}

/// What RFC 8414 and OpenID Connect Discovery have a client find here.
fn metadata(base: &str) -> Value {
    let at = |path: &str| format!("{base}/{path}");
    json!({
        "issuer": base,
        "authorization_endpoint": at("authorize"),
        "token_endpoint": at("token"),
        "device_authorization_endpoint": at("device_authorization"),
        "revocation_endpoint": at("revoke"),
        "introspection_endpoint": at("introspect"),
        "userinfo_endpoint": at("userinfo"),
        "jwks_uri": at("jwks"),
        "response_types_supported": ["code"],
        "grant_types_supported": ["authorization_code", "refresh_token", "client_credentials",
            "urn:ietf:params:oauth:grant-type:device_code", "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "urn:ietf:params:oauth:grant-type:token-exchange"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "code_challenge_methods_supported": ["S256"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
        "prompt_values_supported": ["none", "consent"],
        "authorization_details_types_supported": ["resource_access"],
    })
}

/// What the token endpoint answers.
fn access(call: &Call<'_>, issued: &Issued) -> Value {
    let Issued { access_token, refresh_token, expires_in, access, nonce } = issued;
    let mut answer = json!({"access_token": access_token, "token_type": "Bearer", "expires_in": expires_in});
    if let Some(token) = refresh_token {
        answer["refresh_token"] = token.clone().into();
    }
    if !access.reach.scopes.is_empty() {
        answer["scope"] = access.reach.scopes.join(" ").into();
    }
    if !access.reach.details.is_empty() {
        answer["authorization_details"] = access.reach.details.clone().into();
    }
    let key = RsaKey::of_this_process().ok().filter(|_| access.reach.scopes.iter().any(|scope| scope == "openid"));
    if let Some(key) = key {
        let mut claims = json!({"iss": call.base, "sub": access.who, "aud": access.client_id,
            "iat": seconds(call.now), "exp": seconds(call.now) + 600});
        if let Some(nonce) = nonce {
            claims["nonce"] = nonce.clone().into();
        }
        answer["id_token"] = key.sign(&claims).into();
    }
    answer
}

fn introspected(access: &Access) -> Value {
    json!({"active": true, "sub": access.who, "client_id": access.client_id, "scope": access.reach.scopes.join(" "),
        "aud": access.reach.targets, "authorization_details": access.reach.details, "exp": seconds(access.ends)})
}

fn reply(result: Result<Value, OAuthError>) -> Given {
    match result {
        Ok(body) => answer(200, &body),
        Err((error @ "invalid_client", why)) => {
            let mut given = answer(401, &json!({"error": error, "error_description": why}));
            given.headers.push((WWW_AUTHENTICATE, HeaderValue::from_static("Basic")));
            given
        }
        Err((error, why)) => answer(400, &json!({"error": error, "error_description": why})),
    }
}
