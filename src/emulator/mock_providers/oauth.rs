//! A provider that follows OAuth 2.0 and OpenID Connect, with discovery documents, required PKCE, rotating refresh
//! tokens, device codes, revocation, introspection, and ID tokens signed with RS256.

use std::time::Duration;

use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;
use serde_json::{Value, json};

use super::authorization::{
    AccessToken, AuthorizationServer, DEVICE_CODE_LIFE, DEVICE_POLL_INTERVAL, OAuthError, ServerRules, TokenResponse,
};
use super::{Call, json_response, not_found};
use crate::emulator::keys::{RsaKey, seconds};
use crate::emulator::message::Response;

/// The mock OAuth provider.
#[derive(Debug)]
pub(super) struct OAuth {
    pub(super) server: AuthorizationServer,
}

impl Default for OAuth {
    fn default() -> Self {
        Self {
            server: AuthorizationServer::new(ServerRules {
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
    pub(super) fn handle(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Response {
        match route {
            ("GET", [".well-known", "openid-configuration" | "oauth-authorization-server"]) => {
                json_response(200, &metadata(&call.base))
            }
            ("GET", ["jwks"]) => match RsaKey::of_this_process() {
                Ok(key) => json_response(200, &json!(key.jwks(&key.fingerprint()))),
                Err(_) => json_response(500, &json!({"error": "server_error"})),
            },
            ("GET", ["authorize"]) => self.server.authorize(call),
            ("GET", ["device"]) => self.server.device_page(call),
            ("POST", ["authorize" | "device"]) => self.server.submit(call),
            ("POST", ["token"]) => reply(self.server.token(call).map(|response| token_json(call, &response))),
            ("POST", ["device_authorization"]) => reply(self.begin_device(call)),
            ("POST", ["revoke"]) => reply(self.server.authenticate(call).map(|_| {
                // RFC 7009: revoking an unknown token succeeds.
                self.server.revoke(call.form("token").unwrap_or_default());
                json!({})
            })),
            ("POST", ["introspect"]) => reply(self.server.authenticate(call).map(|_| {
                let access = self.server.access(call.form("token").unwrap_or_default(), call.now);
                access.map_or_else(|| json!({"active": false}), introspection_json)
            })),
            ("GET", ["userinfo"]) => {
                let access = call.request.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(
                    || json_response(401, &json!({"error": "invalid_token"})),
                    |access| json_response(200, &json!({"sub": access.subject})),
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
            "expires_in": DEVICE_CODE_LIFE.as_secs(), "interval": DEVICE_POLL_INTERVAL.as_secs()}))
    }
}

/// The discovery document of RFC 8414 and OpenID Connect Discovery.
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

/// The body of a token response.
fn token_json(call: &Call<'_>, response: &TokenResponse) -> Value {
    let TokenResponse { access_token, refresh_token, expires_in, access, nonce } = response;
    let mut body = json!({"access_token": access_token, "token_type": "Bearer", "expires_in": expires_in});
    if let Some(token) = refresh_token {
        body["refresh_token"] = token.clone().into();
    }
    if !access.scope.scopes.is_empty() {
        body["scope"] = access.scope.scopes.join(" ").into();
    }
    if !access.scope.details.is_empty() {
        body["authorization_details"] = access.scope.details.clone().into();
    }
    let key = RsaKey::of_this_process().ok().filter(|_| access.scope.scopes.iter().any(|scope| scope == "openid"));
    if let Some(key) = key {
        let mut claims = json!({"iss": call.base, "sub": access.subject, "aud": access.client_id,
            "iat": seconds(call.now), "exp": seconds(call.now) + 600});
        if let Some(nonce) = nonce {
            claims["nonce"] = nonce.clone().into();
        }
        body["id_token"] = key.sign(&claims).into();
    }
    body
}

fn introspection_json(access: &AccessToken) -> Value {
    json!({"active": true, "sub": access.subject, "client_id": access.client_id, "scope": access.scope.scopes.join(" "),
        "aud": access.scope.targets, "authorization_details": access.scope.details, "exp": seconds(access.expires_at)})
}

fn reply(result: Result<Value, OAuthError>) -> Response {
    match result {
        Ok(body) => json_response(200, &body),
        Err((error @ "invalid_client", description)) => {
            let mut response = json_response(401, &json!({"error": error, "error_description": description}));
            response.headers.push((WWW_AUTHENTICATE, HeaderValue::from_static("Basic")));
            response
        }
        Err((error, description)) => json_response(400, &json!({"error": error, "error_description": description})),
    }
}
