//! OAuth 2.0 as Connect speaks it, with the `oauth2` crate: authorization codes with PKCE, refresh, client credentials and
//! device codes. What Slack, GitHub and Salesforce do otherwise is in their own files.
//!
//! A provider elsewhere is found by its discovery document, which is read here: `openidconnect` would bring the `rsa`
//! crate, which has an open advisory. Revocation is a form of our own, since `oauth2` insists on HTTPS for it, and so
//! is the poll with a device code, of which `oauth2` makes a loop that sleeps.

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

use super::http::{Http, Unreachable};
use super::{Fetched, Refused};
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};
use crate::emulator::outside::is_on_this_machine;

/// How long an assertion lasts, in seconds.
const ASSERTION_LIFE: u64 = 300;

/// What of a token's answer the RFC does not name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Further(Map<String, Value>);

impl ExtraTokenFields for Further {}

type Reply = StandardTokenResponse<Further, BasicTokenType>;
type Client = oauth2::Client<
    BasicErrorResponse,
    Reply,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointSet,
>;

/// Where a provider is asked for what.
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

    /// Those of an issuer, by its discovery document: OpenID Connect's, or RFC 8414's. One that is `trusted` may name
    /// others elsewhere.
    pub(super) async fn discover(http: &Http, issuer: &str, trusted: bool) -> Result<Self, Refused> {
        let issuer = issuer.trim_end_matches('/');
        let uri: http::Uri = issuer.parse().map_err(|_| Refused::new("invalid_issuer"))?;
        let (path, origin) = (uri.path().trim_end_matches('/'), issuer.strip_suffix(uri.path()).unwrap_or(issuer));
        let places = [
            format!("{issuer}/.well-known/openid-configuration"),
            format!("{origin}/.well-known/oauth-authorization-server{path}"),
        ];
        for place in places {
            let (status, document) = http.json(Method::GET, &place, &[], Vec::new()).await?;
            if status == 200 {
                let found: Self = serde_json::from_value(document).map_err(|_| Refused::new("invalid_metadata"))?;
                return found.checked(issuer, trusted);
            }
        }
        Err(Refused::new("no_metadata"))
    }

    /// The document must be that of its issuer. Secrets stay on this machine, or go by HTTPS where one that is trusted
    /// says: whatever else listens here may be of the same repository as the seed.
    fn checked(self, issuer: &str, trusted: bool) -> Result<Self, Refused> {
        let is_safe = |url: &str| is_on_this_machine(url) || (trusted && url.starts_with("https://"));
        let urls = [Some(&self.authorize), Some(&self.token), self.revoke.as_ref(), self.device.as_ref()];
        match self.issuer.trim_end_matches('/') == issuer && urls.into_iter().flatten().all(|url| is_safe(url)) {
            true => Ok(self),
            false => Err(Refused::new("invalid_metadata")),
        }
    }
}

/// An app at an authorization server.
pub(super) struct Party {
    pub(super) endpoints: Endpoints,
    pub(super) client_id: String,
    pub(super) client_secret: Option<String>,
    pub(super) redirect_uri: String,
    /// Whether id and secret go with the form and not as Basic.
    pub(super) secret_in_form: bool,
    /// Makes of an answer what the RFC would have.
    pub(super) dialect: fn(HttpResponse) -> HttpResponse,
    pub(super) http: Http,
}

/// An authorization that a browser is sent to.
pub(super) struct Started {
    pub(super) url: String,
    pub(super) state: String,
    pub(super) verifier: String,
}

impl<'c> AsyncHttpClient<'c> for Party {
    type Error = Unreachable;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Unreachable>> + Send + 'c>>;

    fn call(&'c self, request: http::Request<Vec<u8>>) -> Self::Future {
        Box::pin(async move { self.http.call(request).await.map(self.dialect) })
    }
}

impl Party {
    fn client(&self) -> Result<Client, Refused> {
        let wrong = |_| Refused::new("invalid_metadata");
        let client = oauth2::Client::new(ClientId::new(self.client_id.clone()))
            .set_auth_uri(AuthUrl::new(self.endpoints.authorize.clone()).map_err(wrong)?)
            .set_token_uri(TokenUrl::new(self.endpoints.token.clone()).map_err(wrong)?)
            .set_redirect_uri(RedirectUrl::new(self.redirect_uri.clone()).map_err(wrong)?)
            .set_auth_type(if self.secret_in_form { AuthType::RequestBody } else { AuthType::BasicAuth });
        Ok(match &self.client_secret {
            Some(secret) => client.set_client_secret(ClientSecret::new(secret.clone())),
            None => client,
        })
    }

    /// Where a browser is to go for a consent.
    pub(super) fn start(
        &self,
        narrowing: &Narrowing,
        scope_name: &'static str,
        further: &[(String, String)],
    ) -> Result<Started, Refused> {
        let client = self.client()?;
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let mut request = client.authorize_url(CsrfToken::new_random).set_pkce_challenge(challenge);
        for (name, value) in pairs(narrowing, scope_name).into_iter().chain(further.iter().cloned()) {
            request = request.add_extra_param(name, value);
        }
        let (url, state) = request.url();
        Ok(Started { url: url.into(), state: state.into_secret(), verifier: verifier.into_secret() })
    }

    /// A consent that was given before, without a browser: `prompt=none`.
    pub(super) async fn silently(
        &self,
        narrowing: &Narrowing,
        scope_name: &'static str,
        who: (&str, &str),
    ) -> Result<Fetched, Refused> {
        let further = [(who.0.to_owned(), who.1.to_owned()), ("prompt".to_owned(), "none".to_owned())];
        let started = self.start(narrowing, scope_name, &further)?;
        let request = http::Request::get(&started.url).body(Vec::new()).map_err(|_| Refused::new("invalid_request"))?;
        let answer = self.http.call(request).await?;
        let location = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
        let query = location.split_once('?').map_or("", |(_, query)| query);
        let query: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        self.finish(&started.state, &started.verifier, &query).await
    }

    /// What came back by the redirect, exchanged for a token.
    pub(super) async fn finish(
        &self,
        state: &str,
        verifier: &str,
        query: &[(String, String)],
    ) -> Result<Fetched, Refused> {
        let of = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        match (of("state"), of("error"), of("code")) {
            (returned, _, _) if returned != Some(state) => Err(Refused::new("invalid_state")),
            (_, Some(error), _) => Err(Refused::new(error)),
            (_, None, Some(code)) => {
                let client = self.client()?;
                let request = client
                    .exchange_code(AuthorizationCode::new(code.to_owned()))
                    .set_pkce_verifier(PkceCodeVerifier::new(verifier.to_owned()));
                fetched(request.request_async(self).await)
            }
            _ => Err(Refused::new("invalid_request")),
        }
    }

    /// A token by a refresh token.
    pub(super) async fn refresh(&self, refresh_token: &str, narrowing: &Narrowing) -> Result<Fetched, Refused> {
        let client = self.client()?;
        let token = RefreshToken::new(refresh_token.to_owned());
        let mut request = client.exchange_refresh_token(&token);
        for (name, value) in pairs(narrowing, "scope") {
            request = request.add_extra_param(name, value);
        }
        fetched(request.request_async(self).await)
    }

    /// A token for the app itself.
    pub(super) async fn for_itself(&self, narrowing: &Narrowing) -> Result<Fetched, Refused> {
        let client = self.client()?;
        let mut request = client.exchange_client_credentials();
        for (name, value) in pairs(narrowing, "scope") {
            request = request.add_extra_param(name, value);
        }
        fetched(request.request_async(self).await)
    }

    /// Ends a token at the provider (RFC 7009). `None` if it has no such endpoint.
    pub(super) async fn revoke(&self, token: &str) -> Option<Result<(), Refused>> {
        let url = self.endpoints.revoke.as_ref()?;
        let mut form = vec![("token", token), ("client_id", &self.client_id)];
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        Some(self.http.form(url, &form).await.and_then(|(status, answer)| match status {
            200..=299 if answer["ok"] != false => Ok(()),
            _ => Err(Refused::of(&answer)),
        }))
    }

    /// Begins with a device code (RFC 8628 section 3.1).
    pub(super) async fn start_device(
        &self,
        narrowing: &Narrowing,
        further: &[(String, String)],
    ) -> Result<DeviceStarted, Refused> {
        let url = self.endpoints.device.as_ref().ok_or(Refused::new("unsupported_grant_type"))?;
        let narrowing = pairs(narrowing, "scope");
        let mut form = vec![("client_id", self.client_id.as_str())];
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        form.extend(narrowing.iter().chain(further).map(|(name, value)| (name.as_ref(), value.as_ref())));
        let (status, answer) = self.http.form(url, &form).await?;
        match status {
            200 => serde_json::from_value(answer).map_err(|_| Refused::new("invalid_answer")),
            _ => Err(Refused::of(&answer)),
        }
    }

    /// Polls once with a device code (RFC 8628 section 3.4).
    pub(super) async fn poll_device(&self, device_code: &str) -> Result<Fetched, Refused> {
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:device_code");
        self.redeem(&[grant, ("device_code", device_code)], &Narrowing::default()).await
    }

    /// A token for an assertion (RFC 7523) of these claims, signed with the app's key.
    pub(super) async fn by_assertion(
        &self,
        private_key: &str,
        given: &Map<String, Value>,
        narrowing: &Narrowing,
        now: SystemTime,
    ) -> Result<Fetched, Refused> {
        let key = RsaKey::from_pem(private_key).map_err(|_| Refused::new("invalid_key"))?;
        let mut claims = given.get("additionalClaims").and_then(Value::as_object).cloned().unwrap_or_default();
        let given =
            ["iss", "sub", "aud"].iter().filter_map(|name| Some(((*name).to_owned(), given.get(*name)?.clone())));
        claims.insert("iss".into(), self.client_id.clone().into());
        claims.insert("aud".into(), self.endpoints.token.clone().into());
        claims.extend(given);
        claims.insert("iat".into(), seconds(now).into());
        claims.insert("exp".into(), (seconds(now) + ASSERTION_LIFE).into());
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer");
        self.redeem(&[grant, ("assertion", &key.sign(&claims))], narrowing).await
    }

    /// A token for another token (RFC 8693).
    pub(super) async fn by_exchange(&self, token: &str, narrowing: &Narrowing) -> Result<Fetched, Refused> {
        let grant = ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange");
        let kind = ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token");
        self.redeem(&[grant, kind, ("subject_token", token)], narrowing).await
    }

    /// A grant that the `oauth2` crate does not know.
    async fn redeem(&self, grant: &[(&str, &str)], narrowing: &Narrowing) -> Result<Fetched, Refused> {
        let narrowing = pairs(narrowing, "scope");
        let mut form = grant.to_vec();
        form.push(("client_id", &self.client_id));
        form.extend(self.client_secret.as_deref().map(|secret| ("client_secret", secret)));
        form.extend(narrowing.iter().map(|(name, value)| (name.as_ref(), value.as_ref())));
        let (status, answer) = self.http.form(&self.endpoints.token, &form).await?;
        match status {
            200 => serde_json::from_value::<Reply>(answer)
                .map(|reply| taken(&reply))
                .map_err(|_| Refused::new("invalid_answer")),
            _ => Err(Refused::of(&answer)),
        }
    }
}

/// What a device is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DeviceStarted {
    pub(super) device_code: String,
    pub(super) user_code: String,
    pub(super) verification_uri: String,
    pub(super) verification_uri_complete: Option<String>,
}

/// What narrows a token, as parameters. `*` is everything that there can be, which is what comes of no scope at all.
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

fn fetched(result: Result<Reply, RequestTokenError<Unreachable, BasicErrorResponse>>) -> Result<Fetched, Refused> {
    match result {
        Ok(reply) => Ok(taken(&reply)),
        Err(RequestTokenError::ServerResponse(error)) => Err(Refused::new(error.error().as_ref())),
        Err(RequestTokenError::Request(unreachable)) => Err(unreachable.into()),
        Err(_) => Err(Refused::new("invalid_answer")),
    }
}

fn taken(reply: &Reply) -> Fetched {
    let split = |scope: &Scope| scope.split(',').map(str::to_owned).collect::<Vec<_>>();
    Fetched {
        token: reply.access_token().secret().clone(),
        lasts: reply.expires_in(),
        refresh_token: reply.refresh_token().map(|token| token.secret().clone()),
        scopes: reply.scopes().map(|scopes| scopes.iter().flat_map(split).collect()),
        further: reply.extra_fields().0.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_issuer_of_this_machine_says_keeps_secrets_on_it_unless_the_command_line_names_that() {
        let here = "http://127.0.0.1:9/oauth";
        let elsewhere = "https://login.example";
        for (issuer, token, trusted, is_good) in [
            (here, "http://127.0.0.1:9/oauth/token", false, true),
            (here, "http://localhost:8/token", false, true),
            (here, "https://evil.example/token", false, false),
            (here, "https://evil.example/token", true, true),
            (here, "http://127.0.0.1@evil.example/token", false, false),
            (elsewhere, "https://oauth2.example/token", true, true),
            (elsewhere, "http://oauth2.example/token", true, false),
        ] {
            let url = |url: &str| Some(url.to_owned());
            let good = Endpoints {
                issuer: issuer.into(),
                authorize: here.into(),
                token: here.into(),
                revoke: url(here),
                device: url(here),
            };
            let each = [
                Endpoints { authorize: token.into(), ..good.clone() },
                Endpoints { token: token.into(), ..good.clone() },
                Endpoints { revoke: url(token), ..good.clone() },
                Endpoints { device: url(token), ..good.clone() },
            ];
            for endpoints in each {
                let checked = endpoints.clone().checked(issuer, trusted);
                assert_eq!(checked.is_ok(), is_good, "{endpoints:?}, trusted: {trusted}");
                assert!(endpoints.checked("https://another.example", trusted).is_err());
            }
        }
    }
}
