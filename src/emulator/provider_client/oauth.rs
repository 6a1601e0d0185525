//! Connect's OAuth 2.0 client, based on the `oauth2` crate: authorization codes with PKCE, refresh tokens, client
//! credentials and device codes. The files of Slack, GitHub and Salesforce have their differences.
//!
//! Discovery documents are parsed here, since `openidconnect` depends on the `rsa` crate, which has an open advisory.
//! Revocation is sent directly, since `oauth2` requires HTTPS for it, and so are polls for device codes, for which
//! `oauth2` only has a loop that sleeps.

use std::pin::Pin;
use std::time::SystemTime;

use http::Method;
use http::header::LOCATION;
use oauth2::basic::{
    BasicErrorResponse, BasicRevocationErrorResponse, BasicTokenIntrospectionResponse, BasicTokenType,
};
use oauth2::{
    AsyncHttpClient, AuthType, AuthUrl, AuthorizationCode, ClientId, ClientSecret, CsrfToken, EndpointNotSet,
    EndpointSet, ExtraTokenFields, HttpResponse, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, RefreshToken,
    RequestTokenError, Scope, StandardRevocableToken, StandardTokenResponse, TokenResponse, TokenUrl,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::http::{HttpClient, Unreachable};
use super::{ProviderRefusal, ProviderToken};
use crate::emulator::allowlist::is_on_this_machine;
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// The lifetime of an assertion, in seconds.
const ASSERTION_LIFE: u64 = 300;

/// Fields of a token response that RFC 6749 does not define.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct ExtraFields(Map<String, Value>);

impl ExtraTokenFields for ExtraFields {}

type OAuthResponse = StandardTokenResponse<ExtraFields, BasicTokenType>;
type Client = oauth2::Client<
    BasicErrorResponse,
    OAuthResponse,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointSet,
>;

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
    /// Converts a response to the form of RFC 6749.
    pub(super) normalize: fn(HttpResponse) -> HttpResponse,
    pub(super) http: HttpClient,
}

/// An authorization URL for a browser, and what is needed to redeem the redirect back.
pub(super) struct AuthorizationUrl {
    pub(super) url: String,
    pub(super) state: String,
    pub(super) verifier: String,
}

impl<'c> AsyncHttpClient<'c> for OAuthClient {
    type Error = Unreachable;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Unreachable>> + Send + 'c>>;

    fn call(&'c self, request: http::Request<Vec<u8>>) -> Self::Future {
        Box::pin(async move { self.http.send(request).await.map(self.normalize) })
    }
}

impl OAuthClient {
    fn client(&self) -> Result<Client, ProviderRefusal> {
        let invalid = |_| ProviderRefusal::new("invalid_metadata");
        let client = oauth2::Client::new(ClientId::new(self.client_id.clone()))
            .set_auth_uri(AuthUrl::new(self.endpoints.authorize.clone()).map_err(invalid)?)
            .set_token_uri(TokenUrl::new(self.endpoints.token.clone()).map_err(invalid)?)
            .set_redirect_uri(RedirectUrl::new(self.redirect_uri.clone()).map_err(invalid)?)
            .set_auth_type(if self.secret_in_form { AuthType::RequestBody } else { AuthType::BasicAuth });
        Ok(match &self.client_secret {
            Some(secret) => client.set_client_secret(ClientSecret::new(secret.clone())),
            None => client,
        })
    }

    /// Builds the authorization URL.
    pub(super) fn authorization_url(
        &self,
        narrowing: &Narrowing,
        scope_name: &'static str,
        extra: &[(String, String)],
    ) -> Result<AuthorizationUrl, ProviderRefusal> {
        let client = self.client()?;
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let mut request = client.authorize_url(CsrfToken::new_random).set_pkce_challenge(challenge);
        for (name, value) in pairs(narrowing, scope_name).into_iter().chain(extra.iter().cloned()) {
            request = request.add_extra_param(name, value);
        }
        let (url, state) = request.url();
        Ok(AuthorizationUrl { url: url.into(), state: state.into_secret(), verifier: verifier.into_secret() })
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
                let client = self.client()?;
                let request = client
                    .exchange_code(AuthorizationCode::new(code.to_owned()))
                    .set_pkce_verifier(PkceCodeVerifier::new(verifier.to_owned()));
                token_result(request.request_async(self).await)
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
        let client = self.client()?;
        let token = RefreshToken::new(refresh_token.to_owned());
        let mut request = client.exchange_refresh_token(&token);
        for (name, value) in pairs(narrowing, "scope") {
            request = request.add_extra_param(name, value);
        }
        token_result(request.request_async(self).await)
    }

    /// Gets a token for the app itself.
    pub(super) async fn client_credentials(&self, narrowing: &Narrowing) -> Result<ProviderToken, ProviderRefusal> {
        let client = self.client()?;
        let mut request = client.exchange_client_credentials();
        for (name, value) in pairs(narrowing, "scope") {
            request = request.add_extra_param(name, value);
        }
        token_result(request.request_async(self).await)
    }

    /// Revokes a token (RFC 7009). `None` if the server has no revocation endpoint.
    pub(super) async fn revoke(&self, token: &str) -> Option<Result<(), ProviderRefusal>> {
        let url = self.endpoints.revoke.as_ref()?;
        let mut form = vec![("token", token), ("client_id", &self.client_id)];
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        Some(self.http.form(url, &form).await.and_then(|(status, body)| match status {
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
        let (status, body) = self.http.form(url, &form).await?;
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

    /// Sends a token request with a grant type that the `oauth2` crate does not support.
    async fn request_token(
        &self,
        grant: &[(&str, &str)],
        narrowing: &Narrowing,
    ) -> Result<ProviderToken, ProviderRefusal> {
        let narrowing = pairs(narrowing, "scope");
        let mut form = grant.to_vec();
        form.push(("client_id", &self.client_id));
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        form.extend(narrowing.iter().map(|(name, value)| (name.as_ref(), value.as_ref())));
        let (status, body) = self.http.form(&self.endpoints.token, &form).await?;
        match status {
            200 => serde_json::from_value::<OAuthResponse>(body)
                .map(|response| provider_token(&response))
                .map_err(|_| ProviderRefusal::new("invalid_answer")),
            _ => Err(ProviderRefusal::from_body(&body)),
        }
    }
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

fn token_result(
    result: Result<OAuthResponse, RequestTokenError<Unreachable, BasicErrorResponse>>,
) -> Result<ProviderToken, ProviderRefusal> {
    match result {
        Ok(response) => Ok(provider_token(&response)),
        Err(RequestTokenError::ServerResponse(error)) => Err(ProviderRefusal::new(error.error().as_ref())),
        Err(RequestTokenError::Request(unreachable)) => Err(unreachable.into()),
        Err(_) => Err(ProviderRefusal::new("invalid_answer")),
    }
}

fn provider_token(response: &OAuthResponse) -> ProviderToken {
    let split = |scope: &Scope| scope.split(',').map(str::to_owned).collect::<Vec<_>>();
    ProviderToken {
        token: response.access_token().secret().clone(),
        expires_in: response.expires_in(),
        refresh_token: response.refresh_token().map(|token| token.secret().clone()),
        scopes: response.scopes().map(|scopes| scopes.iter().flat_map(split).collect()),
        extra: response.extra_fields().0.clone(),
    }
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
