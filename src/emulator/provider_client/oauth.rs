//! Connect's OAuth 2.0 client: authorization codes with PKCE, refresh tokens, client credentials, device codes, assertions
//! and token exchange, all of which are one form to the token endpoint (RFC 6749, 7523, 7636, 8628, 8693). The files of
//! Slack, GitHub and Salesforce have their differences.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use http::Method;
use http::header::{AUTHORIZATION, LOCATION};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::http::HttpClient;
use super::{ProviderRefusal, ProviderToken};
use crate::emulator::allowlist::is_on_this_machine;
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// The lifetime of an assertion, in seconds.
const ASSERTION_LIFE: u64 = 300;

/// The token response of RFC 6749 section 5.1, with what else the provider says.
#[derive(Debug, Deserialize)]
struct TokenResponse {
    access_token: String,
    /// Always a bearer's.
    #[serde(rename = "token_type")]
    _token_type: Option<Value>,
    expires_in: Option<u64>,
    refresh_token: Option<String>,
    scope: Option<String>,
    #[serde(flatten)]
    extra: Map<String, Value>,
}

/// The endpoints of an authorization server.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Endpoints {
    #[serde(default)]
    issuer: String,
    #[serde(rename = "authorization_endpoint")]
    pub(super) authorize: String,
    #[serde(rename = "token_endpoint")]
    pub(super) token: String,
    #[serde(rename = "revocation_endpoint")]
    pub(super) revoke: Option<String>,
    #[serde(rename = "device_authorization_endpoint")]
    pub(super) device: Option<String>,
}

impl Endpoints {
    pub(super) fn new(authorize: String, token: String, revoke: Option<String>) -> Self {
        Self { issuer: String::new(), authorize, token, revoke, device: None }
    }

    /// Fetches an issuer's discovery document, by OpenID Connect Discovery or RFC 8414. Only a `trusted` issuer may
    /// name endpoints on other machines.
    pub(super) async fn discover(http: &HttpClient, issuer: &str, trusted: bool) -> Result<Self, ProviderRefusal> {
        let issuer = issuer.trim_end_matches('/');
        let uri: http::Uri = issuer.parse().map_err(|_| ProviderRefusal::new("invalid_issuer"))?;
        let (path, origin) = (uri.path().trim_end_matches('/'), issuer.strip_suffix(uri.path()).unwrap_or(issuer));
        let urls = [
            format!("{issuer}/.well-known/openid-configuration"),
            format!("{origin}/.well-known/oauth-authorization-server{path}"),
        ];
        for url in urls {
            let (status, document) = http.json(Method::GET, &url, &[], Vec::new()).await?;
            if status == 200 {
                let endpoints: Self =
                    serde_json::from_value(document).map_err(|_| ProviderRefusal::new("invalid_metadata"))?;
                return endpoints.checked(issuer, trusted);
            }
        }
        Err(ProviderRefusal::new("no_metadata"))
    }

    /// Checks that the document belongs to the issuer and that all endpoints are on this machine, or for a trusted
    /// issuer use HTTPS. An untrusted issuer on this machine may come from the same repository as the seed, and must
    /// not send secrets elsewhere.
    fn checked(self, issuer: &str, trusted: bool) -> Result<Self, ProviderRefusal> {
        let is_safe = |url: &str| is_on_this_machine(url) || (trusted && url.starts_with("https://"));
        let urls = [Some(&self.authorize), Some(&self.token), self.revoke.as_ref(), self.device.as_ref()];
        match self.issuer.trim_end_matches('/') == issuer && urls.into_iter().flatten().all(|url| is_safe(url)) {
            true => Ok(self),
            false => Err(ProviderRefusal::new("invalid_metadata")),
        }
    }
}

/// An app's client for an authorization server.
pub(super) struct OAuthClient {
    pub(super) endpoints: Endpoints,
    pub(super) client_id: String,
    pub(super) client_secret: Option<String>,
    pub(super) redirect_uri: String,
    /// Whether client id and secret are sent in the form instead of `Authorization: Basic`.
    pub(super) secret_in_form: bool,
    /// Converts a status and a body to those of RFC 6749.
    pub(super) normalize: fn(u16, Value) -> (u16, Value),
    pub(super) http: HttpClient,
}

/// An authorization URL for a browser, and what is needed to redeem the redirect back.
pub(super) struct AuthorizationUrl {
    pub(super) url: String,
    pub(super) state: String,
    pub(super) verifier: String,
}

impl OAuthClient {
    /// Builds the authorization URL.
    pub(super) fn authorization_url(
        &self,
        narrowing: &Narrowing,
        scope_name: &'static str,
        extra: &[(String, String)],
    ) -> Result<AuthorizationUrl, ProviderRefusal> {
        let (state, verifier) = (random_secret()?, random_secret()?);
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes()));
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.client_id)
            .append_pair("state", &state)
            .append_pair("code_challenge", &challenge)
            .append_pair("code_challenge_method", "S256")
            .append_pair("redirect_uri", &self.redirect_uri)
            .extend_pairs(pairs(narrowing, scope_name))
            .extend_pairs(extra)
            .finish();
        let separator = if self.endpoints.authorize.contains('?') { '&' } else { '?' };
        Ok(AuthorizationUrl { url: format!("{}{separator}{query}", self.endpoints.authorize), state, verifier })
    }

    /// Gets a token for an existing consent, without a browser (`prompt=none`).
    pub(super) async fn authorize_without_prompt(
        &self,
        narrowing: &Narrowing,
        scope_name: &'static str,
        hint: (&str, &str),
    ) -> Result<ProviderToken, ProviderRefusal> {
        let extra = [(hint.0.to_owned(), hint.1.to_owned()), ("prompt".to_owned(), "none".to_owned())];
        let authorization = self.authorization_url(narrowing, scope_name, &extra)?;
        let request = http::Request::get(&authorization.url)
            .body(Vec::new())
            .map_err(|_| ProviderRefusal::new("invalid_request"))?;
        let response = self.http.send(request).await?;
        let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
        let query = location.split_once('?').map_or("", |(_, query)| query);
        let query: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        self.redeem_redirect(&authorization.state, &authorization.verifier, &query).await
    }

    /// Exchanges the code in the query of the redirect for a token.
    pub(super) async fn redeem_redirect(
        &self,
        state: &str,
        verifier: &str,
        query: &[(String, String)],
    ) -> Result<ProviderToken, ProviderRefusal> {
        let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        match (parameter("state"), parameter("error"), parameter("code")) {
            (returned, _, _) if returned != Some(state) => Err(ProviderRefusal::new("invalid_state")),
            (_, Some(error), _) => Err(ProviderRefusal::new(error)),
            (_, None, Some(code)) => {
                let grant = [
                    ("grant_type", "authorization_code"),
                    ("code", code),
                    ("redirect_uri", &self.redirect_uri),
                    ("code_verifier", verifier),
                ];
                self.request_token(&grant, &Narrowing::default()).await
            }
            _ => Err(ProviderRefusal::new("invalid_request")),
        }
    }

    /// Gets a token for a refresh token.
    pub(super) async fn refresh(
        &self,
        refresh_token: &str,
        narrowing: &Narrowing,
    ) -> Result<ProviderToken, ProviderRefusal> {
        self.request_token(&[("grant_type", "refresh_token"), ("refresh_token", refresh_token)], narrowing).await
    }

    /// Gets a token for the app itself.
    pub(super) async fn client_credentials(&self, narrowing: &Narrowing) -> Result<ProviderToken, ProviderRefusal> {
        self.request_token(&[("grant_type", "client_credentials")], narrowing).await
    }

    /// Revokes a token (RFC 7009). `None` if the server has no revocation endpoint.
    pub(super) async fn revoke(&self, token: &str) -> Option<Result<(), ProviderRefusal>> {
        let url = self.endpoints.revoke.as_ref()?;
        let mut form = vec![("token", token), ("client_id", &self.client_id)];
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        Some(self.http.form(url, &[], &form).await.and_then(|(status, body)| match status {
            200..=299 if body["ok"] != false => Ok(()),
            _ => Err(ProviderRefusal::from_body(&body)),
        }))
    }

    /// Requests a device code (RFC 8628 section 3.1).
    pub(super) async fn authorize_device(
        &self,
        narrowing: &Narrowing,
        extra: &[(String, String)],
    ) -> Result<DeviceAuthorization, ProviderRefusal> {
        let url = self.endpoints.device.as_ref().ok_or(ProviderRefusal::new("unsupported_grant_type"))?;
        let narrowing = pairs(narrowing, "scope");
        let mut form = vec![("client_id", self.client_id.as_str())];
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        form.extend(narrowing.iter().chain(extra).map(|(name, value)| (name.as_ref(), value.as_ref())));
        let (status, body) = self.http.form(url, &[], &form).await?;
        match status {
            200 => serde_json::from_value(body).map_err(|_| ProviderRefusal::new("invalid_answer")),
            _ => Err(ProviderRefusal::from_body(&body)),
        }
    }

    /// Polls once for a device code (RFC 8628 section 3.4).
    pub(super) async fn poll_device(&self, device_code: &str) -> Result<ProviderToken, ProviderRefusal> {
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:device_code");
        self.request_token(&[grant, ("device_code", device_code)], &Narrowing::default()).await
    }

    /// Gets a token for an assertion (RFC 7523) with these claims, signed with the app's key.
    pub(super) async fn exchange_assertion(
        &self,
        private_key: &str,
        subject: &Map<String, Value>,
        narrowing: &Narrowing,
        now: SystemTime,
    ) -> Result<ProviderToken, ProviderRefusal> {
        let key = RsaKey::from_pem(private_key).map_err(|_| ProviderRefusal::new("invalid_key"))?;
        let mut claims = subject.get("additionalClaims").and_then(Value::as_object).cloned().unwrap_or_default();
        claims.insert("iss".into(), self.client_id.clone().into());
        claims.insert("aud".into(), self.endpoints.token.clone().into());
        claims.extend(
            ["iss", "sub", "aud"].into_iter().filter_map(|name| Some((name.into(), subject.get(name)?.clone()))),
        );
        claims.insert("iat".into(), seconds(now).into());
        claims.insert("exp".into(), (seconds(now) + ASSERTION_LIFE).into());
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer");
        self.request_token(&[grant, ("assertion", &key.sign(&claims))], narrowing).await
    }

    /// Exchanges another token (RFC 8693).
    pub(super) async fn exchange_token(
        &self,
        token: &str,
        narrowing: &Narrowing,
    ) -> Result<ProviderToken, ProviderRefusal> {
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange");
        let kind = ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token");
        self.request_token(&[grant, kind, ("subject_token", token)], narrowing).await
    }

    /// Sends a token request. Id and secret are sent as `Authorization: Basic` (RFC 6749 section 2.3.1) or in the form; a
    /// client without a secret sends its id in the form.
    async fn request_token(
        &self,
        grant: &[(&str, &str)],
        narrowing: &Narrowing,
    ) -> Result<ProviderToken, ProviderRefusal> {
        let narrowing = pairs(narrowing, "scope");
        let mut form = grant.to_vec();
        form.extend(narrowing.iter().map(|(name, value)| (name.as_ref(), value.as_ref())));
        let mut headers = Vec::new();
        match &self.client_secret {
            Some(secret) if !self.secret_in_form => {
                let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
                let basic = BASE64_STANDARD.encode(format!("{}:{}", encoded(&self.client_id), encoded(secret)));
                headers.push((AUTHORIZATION, format!("Basic {basic}")));
            }
            secret => {
                form.push(("client_id", &self.client_id));
                form.extend(secret.as_deref().map(|secret| ("client_secret", secret)));
            }
        }
        let (status, body) = self.http.form(&self.endpoints.token, &headers, &form).await?;
        let (status, body) = (self.normalize)(status, body);
        if status != 200 {
            return Err(ProviderRefusal::from_body(&body));
        }
        let response: TokenResponse =
            serde_json::from_value(body).map_err(|_| ProviderRefusal::new("invalid_answer"))?;
        let scopes = response.scope.map(|scope| scope.split([' ', ',']).map(str::to_owned).collect());
        Ok(ProviderToken {
            token: response.access_token,
            expires_in: response.expires_in.map(Duration::from_secs),
            refresh_token: response.refresh_token,
            scopes,
            extra: response.extra,
        })
    }
}

/// 32 random bytes in base64url, 43 characters as RFC 7636 section 4.1 recommends.
fn random_secret() -> Result<String, ProviderRefusal> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|_| ProviderRefusal::new("no_randomness"))?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

/// The response to a device authorization request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DeviceAuthorization {
    pub(super) device_code: String,
    pub(super) user_code: String,
    pub(super) verification_uri: String,
    pub(super) verification_uri_complete: Option<String>,
}

/// The restrictions as request parameters. `*` stands for all scopes, which is the same as no scope parameter.
fn pairs(narrowing: &Narrowing, scope_name: &'static str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let scopes = narrowing.named_scopes();
    if !scopes.is_empty() {
        pairs.push((scope_name.to_owned(), scopes.join(" ")));
    }
    for (name, values) in [("audience", &narrowing.audience), ("resource", &narrowing.resources)] {
        pairs.extend(values.iter().flatten().map(|value| (name.to_owned(), value.clone())));
    }
    if let Some(details) = narrowing.authorization_details.as_ref().filter(|details| !details.is_empty()) {
        pairs.push(("authorization_details".to_owned(), serde_json::json!(details).to_string()));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untrusted_issuer_may_only_name_endpoints_on_this_machine() {
        let here = "http://127.0.0.1:9/oauth";
        let elsewhere = "https://login.example";
        for (issuer, token, trusted, is_valid) in [
            (here, "http://127.0.0.1:9/oauth/token", false, true),
            (here, "http://localhost:8/token", false, true),
            (here, "https://evil.example/token", false, false),
            (here, "https://evil.example/token", true, true),
            (here, "http://127.0.0.1@evil.example/token", false, false),
            (elsewhere, "https://oauth2.example/token", true, true),
            (elsewhere, "http://oauth2.example/token", true, false),
        ] {
            let url = |url: &str| Some(url.to_owned());
            let valid = Endpoints {
                issuer: issuer.into(),
                authorize: here.into(),
                token: here.into(),
                revoke: url(here),
                device: url(here),
            };
            let each = [
                Endpoints { authorize: token.into(), ..valid.clone() },
                Endpoints { token: token.into(), ..valid.clone() },
                Endpoints { revoke: url(token), ..valid.clone() },
                Endpoints { device: url(token), ..valid.clone() },
            ];
            for endpoints in each {
                let checked = endpoints.clone().checked(issuer, trusted);
                assert_eq!(checked.is_ok(), is_valid, "{endpoints:?}, trusted: {trusted}");
                assert!(endpoints.checked("https://another.example", trusted).is_err());
            }
        }
    }
}
