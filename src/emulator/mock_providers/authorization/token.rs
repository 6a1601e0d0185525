//! The token endpoint and the device authorization endpoint.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use super::{
    AccessToken, AuthorizationRequest, AuthorizationServer, DEVICE_CODE_LIFE, DEVICE_POLL_INTERVAL, Delivery,
    DeviceCode, Grant, OAuthError, RefreshToken, Scope, TokenResponse,
};
use crate::emulator::ids::random_id;
use crate::emulator::keys::RsaKey;
use crate::emulator::mock_providers::Call;

/// The maximum lifetime of an assertion, in seconds.
const MAX_ASSERTION_LIFE: u64 = 3600;

fn invalid_grant(description: &'static str) -> OAuthError {
    ("invalid_grant", description)
}

impl AuthorizationServer {
    /// The token endpoint.
    pub(in crate::emulator::mock_providers) fn token(&mut self, call: &Call<'_>) -> Result<TokenResponse, OAuthError> {
        let client_id = self.authenticate(call)?;
        // Slack's `oauth.v2.access` takes a code without a grant type.
        match call.form("grant_type").unwrap_or("authorization_code") {
            "authorization_code" => self.redeem_code(call, &client_id),
            "refresh_token" => self.redeem_refresh_token(call, &client_id),
            "urn:ietf:params:oauth:grant-type:device_code" => self.redeem_device_code(call, &client_id),
            "client_credentials" => self.issue_without_refresh(call, &client_id, &client_id),
            "urn:ietf:params:oauth:grant-type:jwt-bearer" if self.rules.takes_assertions => {
                let key = RsaKey::of_this_process().map_err(|_| ("server_error", "no key"))?;
                let assertion = call.form("assertion").unwrap_or_default();
                let claims = key.verify(assertion, call.now, MAX_ASSERTION_LIFE).map_err(invalid_grant)?;
                call.record_proof("assertion RS256");
                self.issue_without_refresh(call, &client_id, claims["sub"].as_str().unwrap_or(&client_id))
            }
            "urn:ietf:params:oauth:grant-type:token-exchange" if self.rules.takes_assertions => {
                // Only the token's issuer could verify it. Any token is accepted, and its hash is the subject.
                let token = call.form("subject_token").ok_or(("invalid_request", "subject_token is missing"))?;
                let subject = BASE64_URL_SAFE_NO_PAD.encode(&digest(&SHA256, token.as_bytes()).as_ref()[..6]);
                self.issue_without_refresh(call, &client_id, &subject)
            }
            _ => Err(("unsupported_grant_type", "not supported here")),
        }
    }

    fn issue_without_refresh(
        &mut self,
        call: &Call<'_>,
        client_id: &str,
        subject: &str,
    ) -> Result<TokenResponse, OAuthError> {
        let scope = self.requested_scope(&call.form, &self.clients[client_id].app, None)?;
        let grant = self.add_grant(client_id, subject, scope.clone(), None);
        Ok(self.issue(grant, scope, call.now, false))
    }

    fn redeem_code(&mut self, call: &Call<'_>, client_id: &str) -> Result<TokenResponse, OAuthError> {
        let key = call.form("code").unwrap_or_default();
        let code = self.codes.get(key).ok_or(invalid_grant("unknown code"))?;
        if let Some(grant) = code.grant {
            // A second use may mean that the code was stolen.
            self.grants[grant].is_revoked = true;
            return Err(invalid_grant("the code was used before"));
        }
        let Delivery::Redirect { uri, challenge, .. } = &code.request.delivery else {
            return Err(invalid_grant("unknown code"));
        };
        if code.request.client_id != client_id || call.now >= code.expires_at {
            return Err(invalid_grant("the code has expired or belongs to another client"));
        }
        if call.form("redirect_uri") != Some(uri) {
            return Err(invalid_grant("another redirect_uri than at the authorization"));
        }
        match (challenge, call.form("code_verifier")) {
            (None, None) => {}
            (Some(challenge), Some(verifier)) => {
                if BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes())) != *challenge {
                    return Err(invalid_grant("the code_verifier does not match the code_challenge"));
                }
                call.record_proof("PKCE S256");
            }
            _ => return Err(invalid_grant("code_challenge and code_verifier must be used together")),
        }
        let AuthorizationRequest { subject, scope, nonce, .. } = code.request.clone();
        let grant = self.add_grant(client_id, &subject, scope.clone(), nonce);
        if let Some(code) = self.codes.get_mut(key) {
            code.grant = Some(grant);
        }
        Ok(self.issue(grant, scope, call.now, true))
    }

    fn redeem_refresh_token(&mut self, call: &Call<'_>, client_id: &str) -> Result<TokenResponse, OAuthError> {
        let token = call.form("refresh_token").unwrap_or_default();
        let refresh = self.refresh_tokens.get(token).ok_or(invalid_grant("unknown refresh token"))?;
        let index = refresh.grant;
        let grant = &self.grants[index];
        if grant.client_id != client_id {
            return Err(invalid_grant("the refresh token belongs to another client"));
        }
        if refresh.is_used {
            // A second use means that either it or its successor is in the wrong hands.
            self.grants[index].is_revoked = true;
            return Err(invalid_grant("the refresh token was used before: the grant is revoked"));
        }
        if grant.is_revoked || call.now >= refresh.expires_at {
            return Err(invalid_grant("the refresh token has expired or its grant is revoked"));
        }
        let scope = self.requested_scope(&call.form, &self.clients[client_id].app, Some(&grant.scope))?;
        if let Some(refresh) = self.refresh_tokens.get_mut(token) {
            refresh.is_used = true;
        }
        call.record_proof("refresh token");
        Ok(self.issue(index, scope, call.now, true))
    }

    fn redeem_device_code(&mut self, call: &Call<'_>, client_id: &str) -> Result<TokenResponse, OAuthError> {
        let code = call.form("device_code").unwrap_or_default();
        let device = self.devices.get_mut(code).filter(|device| device.request.client_id == client_id);
        let device = device.ok_or(invalid_grant("unknown device code"))?;
        if call.now >= device.expires_at {
            return Err(("expired_token", "the device code has expired"));
        }
        let is_too_early = device.last_poll.is_some_and(|last| call.now < last + DEVICE_POLL_INTERVAL);
        device.last_poll = Some(call.now);
        match device.decision {
            None if is_too_early => Err(("slow_down", "polled too often")),
            None => Err(("authorization_pending", "the user has not decided yet")),
            Some(false) => Err(("access_denied", "the user denied the request")),
            Some(true) => {
                let AuthorizationRequest { subject, scope, nonce, .. } = device.request.clone();
                self.devices.remove(code);
                call.record_proof("device code");
                let grant = self.add_grant(client_id, &subject, scope.clone(), nonce);
                Ok(self.issue(grant, scope, call.now, true))
            }
        }
    }

    /// Adds a grant and returns its index.
    fn add_grant(&mut self, client_id: &str, subject: &str, scope: Scope, nonce: Option<String>) -> usize {
        let (client_id, subject) = (client_id.to_owned(), subject.to_owned());
        self.grants.push(Grant { client_id, subject, scope, nonce, is_revoked: false });
        self.grants.len() - 1
    }

    fn issue(&mut self, grant: usize, scope: Scope, now: SystemTime, with_refresh: bool) -> TokenResponse {
        let Grant { client_id, subject, nonce, .. } = self.grants[grant].clone();
        let life = self.clients[&client_id].app.token_life;
        let access_token = format!("{}{}", (self.rules.access_prefix)(&subject), random_id("", 40));
        let access = AccessToken { client_id, subject, scope, expires_at: now + Duration::from_secs(life), grant };
        self.access_tokens.insert(access_token.clone(), access.clone());
        let refresh_token = with_refresh.then(|| format!("{}{}", self.rules.refresh_prefix, random_id("", 48)));
        if let Some(token) = &refresh_token {
            let expires_at = now + self.rules.refresh_life;
            self.refresh_tokens.insert(token.clone(), RefreshToken { grant, expires_at, is_used: false });
        }
        TokenResponse { access_token, refresh_token, expires_in: life, access, nonce }
    }

    /// The device authorization endpoint. Returns device code and user code.
    pub(in crate::emulator::mock_providers) fn begin_device(
        &mut self,
        call: &Call<'_>,
    ) -> Result<(String, String), OAuthError> {
        let client_id = self.authenticate(call)?;
        let scope = self.requested_scope(&call.form, &self.clients[&client_id].app, None)?;
        let code = random_id("device", 32);
        let user_code = random_id("", 8).to_uppercase();
        let subject = call.form("login_hint").unwrap_or("user").to_owned();
        let delivery = Delivery::Device { code: code.clone() };
        let request = AuthorizationRequest { client_id, subject, scope, nonce: None, delivery };
        let expires_at = call.now + DEVICE_CODE_LIFE;
        let device = DeviceCode { request, user_code: user_code.clone(), expires_at, last_poll: None, decision: None };
        self.devices.insert(code.clone(), device);
        Ok((code, user_code))
    }
}
