//! The provider's leg: how Connect gets a token once it has let the caller through. Knows nothing of callers.
//!
//! Every token comes of an exchange with a provider over HTTP: with the stand-ins ([`super::standin`]), or with an
//! issuer elsewhere that a connector's `data` names. What a provider gives that must be kept goes to the connector's
//! `vault`: a refresh token is in no answer, no log line and no error.
//!
//! A grant that the seed states is one that the stand-in has been told of at its console; the first token of it comes
//! by an authorization that asks nobody (`prompt=none`). The state is not locked while a provider is asked, but one
//! grant has one exchange at a time: two refreshes at once would look like a theft.

mod api_key;
mod consent;
mod github;
mod http;
mod oauth;
mod revocation;
mod salesforce;
mod settings;
mod slack;
mod snowflake;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use oauth2::HttpResponse;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Now;
use super::errors::Kind;
use super::flow::Narrowing;
use super::outside::Outside;
use super::standin::{App, Registered, Standins};
use super::state::State;
use super::world::{Connector, Installation, user_key};
use consent::UnderWay;
pub(super) use consent::{Began, begin, begin_device, finish, keep, poll};
use http::{Http, Unreachable};
use oauth::{Endpoints, Party};
pub(super) use revocation::{concerns, revoke};
use settings::Settings;

/// How much life a token has left at least that is handed out a second time, unless the request says otherwise: the
/// SDKs' own default.
const VALIDITY_BUFFER: Duration = Duration::from_secs(30);

/// Whom a token is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Subject {
    /// The app itself.
    App,
    /// A user of the app.
    User {
        /// The app's own id of the user.
        id: String,
        /// Who gave that id.
        issuer: Option<String>,
    },
    /// An assertion that Connect is to sign: `sub`, `iss`, `aud`, `additionalClaims`.
    JwtBearer(Map<String, Value>),
    /// A token that is to be exchanged.
    Exchange(String),
}

/// What a provider is asked for: a grant or an installation is there if the connector needs one.
#[derive(Debug, Clone)]
pub struct Ask {
    /// By which connector, as it was when the caller was let through.
    pub connector: Connector,
    /// For whom.
    pub subject: Subject,
    /// Where.
    pub installation: Option<Installation>,
    /// For a caller of this environment; a person has none.
    pub environment: Option<String>,
    /// How narrow.
    pub narrowing: Narrowing,
    /// How much life the token has left at least.
    pub validity_buffer: Option<Duration>,
    /// The time as the emulator sees it.
    pub now: SystemTime,
}

/// A provider's token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Minted {
    /// The token.
    pub token: String,
    /// Its end.
    pub expires_at: SystemTime,
    /// What the provider calls it.
    pub name: Option<String>,
    /// What the provider calls the subject.
    pub external_subject: Option<String>,
    /// What else the provider says, such as an instance's URL.
    pub metadata: Option<Value>,
    /// The claims of an ID token.
    pub claims: Option<Value>,
}

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProviderError {
    /// The user has to consent, again.
    AuthorizationRequired,
    /// It has to be installed, again.
    InstallationRequired,
    /// The grant is gone or unusable.
    NoToken,
    /// The kind does not know such subjects.
    Unresolved,
}

impl From<ProviderError> for Kind {
    fn from(error: ProviderError) -> Self {
        match error {
            ProviderError::AuthorizationRequired => Self::UserAuthorizationRequired,
            ProviderError::InstallationRequired => Self::InstallationRequired,
            ProviderError::NoToken => Self::NoToken,
            ProviderError::Unresolved => Self::UnresolvedToken,
        }
    }
}

/// A provider, or the way to it, refuses: with an error code of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused(String);

impl Refused {
    /// By a code of the provider's, if it looks like one: it is shown, and could be anything.
    fn new(code: &str) -> Self {
        let is_code = code.len() <= 40 && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        Self(if is_code { code.to_owned() } else { "refused".to_owned() })
    }

    fn of(answer: &Value) -> Self {
        Self::new(answer["error"].as_str().or(answer["message"].as_str()).unwrap_or("invalid_answer"))
    }

    /// The code.
    pub(super) fn code(&self) -> &str {
        &self.0
    }

    /// What an app is told of it: RFC 6749's codes and what Slack and GitHub call the same.
    fn told(&self, ask: &Ask) -> ProviderError {
        let again = match ask.subject {
            Subject::User { .. } => ProviderError::AuthorizationRequired,
            _ if ask.connector.needs_installation() => ProviderError::InstallationRequired,
            _ => ProviderError::Unresolved,
        };
        match self.code() {
            "invalid_scope"
            | "invalid_target"
            | "invalid_authorization_details"
            | "consent_required"
            | "interaction_required"
            | "login_required"
            | "access_denied" => again,
            "not_installed" => ProviderError::InstallationRequired,
            "unauthorized_client" | "unsupported_grant_type" => ProviderError::Unresolved,
            _ => ProviderError::NoToken,
        }
    }
}

impl From<Unreachable> for Refused {
    fn from(_: Unreachable) -> Self {
        Self::new("unreachable")
    }
}

/// What an exchange brought.
struct Fetched {
    token: String,
    lasts: Option<Duration>,
    refresh_token: Option<String>,
    scopes: Option<Vec<String>>,
    further: Map<String, Value>,
}

/// What is in a vault for one subject.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Held {
    /// By which provider: what an earlier run's stand-ins gave is worth nothing.
    provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refresh_token: Option<String>,
    /// The provider took the grant back; only another consent helps.
    #[serde(default)]
    is_over: bool,
    tokens: Vec<Stored>,
}

/// A token that may be handed out again.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    narrowing: Narrowing,
    environment: Option<String>,
    token: Minted,
}

impl Held {
    fn keep(&mut self, fetched: &mut Fetched) {
        if let Some(token) = fetched.refresh_token.take() {
            self.refresh_token = Some(token);
        }
    }
}

/// The stand-ins, and Connect's ways to them and to other providers.
pub(super) struct Providers {
    standins: Standins,
    http: Http,
    redirect_uri: String,
    reuse_tokens: bool,
    outside: Outside,
    /// Whose turn it is, by connector and vault key.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    under_way: UnderWay,
    /// What discovery found, by issuer.
    found: Mutex<HashMap<String, Endpoints>>,
}

impl Providers {
    /// Starts the stand-ins. Browsers come back to `redirect_uri`.
    pub(super) async fn start(
        now: Now,
        redirect_uri: String,
        reuse_tokens: bool,
        outside: Outside,
    ) -> io::Result<Self> {
        Ok(Self {
            standins: Standins::start(now).await?,
            http: Http::new(),
            redirect_uri,
            reuse_tokens,
            outside,
            turns: Mutex::default(),
            under_way: UnderWay::default(),
            found: Mutex::default(),
        })
    }

    /// The stand-ins.
    pub(super) fn standins(&self) -> &Standins {
        &self.standins
    }

    /// What may be used from outside.
    pub(super) fn outside(&self) -> &Outside {
        &self.outside
    }

    fn turn(&self, connector: &Connector, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(format!("{} {key}", connector.id)).or_default().clone()
    }

    /// Registers the connector's app with its stand-in.
    fn registered(&self, connector: &Connector, settings: &Settings) -> Result<Registered, Refused> {
        let app = App {
            name: connector.id.clone(),
            title: connector.uid.clone(),
            scopes: settings.scopes.clone(),
            resources: settings.resources.clone(),
            redirect_uris: vec![self.redirect_uri.clone()],
            token_life: connector.token_life.as_secs(),
        };
        let console = self.standins.console();
        let registered =
            console.register(provider_of(&connector.kind), &app).map_err(|_| Refused::new("invalid_key"))?;
        if connector.kind == "github" {
            console.offer_github(&registered.client_id, settings.github(connector));
        }
        Ok(registered)
    }

    /// The app of an OAuth connector, at its stand-in or at the issuer that it names.
    async fn party(&self, connector: &Connector, settings: &Settings) -> Result<Party, Refused> {
        let plain: fn(HttpResponse) -> HttpResponse = |response| response;
        if let Some(issuer) = &settings.issuer {
            if !self.outside.allows_issuer(issuer) {
                return Err(Refused::new("issuer_not_allowed"));
            }
            let client_id = settings.client_id.clone().ok_or(Refused::new("invalid_client"))?;
            let known = self.found.lock().unwrap_or_else(PoisonError::into_inner).get(issuer).cloned();
            let endpoints = match known {
                Some(endpoints) => endpoints,
                None => Endpoints::discover(&self.http, issuer, self.outside.names_issuer(issuer)).await?,
            };
            self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(issuer.clone(), endpoints.clone());
            return Ok(Party {
                endpoints,
                client_id,
                client_secret: settings.client_secret(&self.outside)?,
                redirect_uri: self.redirect_uri.clone(),
                secret_in_form: false,
                dialect: plain,
                http: self.http.clone(),
            });
        }
        let Registered { client_id, client_secret, .. } = self.registered(connector, settings)?;
        let provider = provider_of(&connector.kind);
        let base = self.standins.base(provider);
        let (endpoints, dialect) = match provider {
            "slack" => (slack::endpoints(&base), slack::dialect as fn(_) -> _),
            "github" => (github::endpoints(&base), github::dialect as fn(_) -> _),
            "salesforce" => (salesforce::endpoints(&base), plain),
            _ => (Endpoints::discover(&self.http, &base, false).await?, plain),
        };
        Ok(Party {
            endpoints,
            client_id,
            client_secret: Some(settings.client_secret(&self.outside)?.unwrap_or(client_secret)),
            redirect_uri: self.redirect_uri.clone(),
            secret_in_form: matches!(provider, "github" | "salesforce"),
            dialect,
            http: self.http.clone(),
        })
    }

    /// Who gives a connector's tokens, for what is in its vault.
    fn name(&self, connector: &Connector, settings: &Settings) -> String {
        settings.issuer.clone().unwrap_or_else(|| self.standins.base(provider_of(&connector.kind)))
    }
}

/// The provider that stands in for those of a kind: by its own protocol, or by plain OAuth 2.0.
fn provider_of(kind: &str) -> &'static str {
    match kind {
        "slack" => "slack",
        "github" => "github",
        "salesforce" => "salesforce",
        "snowflake" => "snowflake",
        "api-key" => "api-key",
        _ => "oauth",
    }
}

fn vault_key(ask: &Ask) -> String {
    match (&ask.subject, &ask.installation) {
        (Subject::User { id, .. }, _) => user_key(id),
        // Somebody's token or claims are not kept, not even as a name.
        (subject @ (Subject::JwtBearer(_) | Subject::Exchange(_)), _) => {
            let hash = digest(&SHA256, format!("{subject:?}").as_bytes());
            format!("other:{}", BASE64_URL_SAFE_NO_PAD.encode(hash))
        }
        (_, Some(installation)) => format!("app:{}", installation.id),
        (_, None) => "app".into(),
    }
}

fn held(state: &State, connector: &str, key: &str) -> Held {
    let value = state.read(|kept| kept.world.find(connector)?.vault.get(key).cloned());
    value.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default()
}

fn hold(state: &State, connector: &str, key: &str, held: &Held) {
    state.change(|kept| {
        if let (Some(connector), Ok(value)) = (kept.world.connector(connector), serde_json::to_value(held)) {
            connector.vault.insert(key.to_owned(), value);
        }
    });
}

/// Gets a token: one that was given before if it lasts, or else one of an exchange with the provider.
pub(super) async fn mint(state: &State, providers: &Providers, ask: Ask) -> Result<Minted, ProviderError> {
    let key = vault_key(&ask);
    let turn = providers.turn(&ask.connector, &key);
    let _turn = turn.lock().await;
    let settings = Settings::of(&ask.connector).map_err(|refused| refused.told(&ask))?;
    let provider = providers.name(&ask.connector, &settings);
    let mut held = held(state, &ask.connector.id, &key);
    if held.provider != provider {
        held = Held { provider, ..Held::default() };
    }
    let buffer = ask.validity_buffer.unwrap_or(VALIDITY_BUFFER);
    held.tokens.retain(|stored| stored.token.expires_at > ask.now);
    let fits = |stored: &&Stored| {
        stored.narrowing == ask.narrowing
            && (stored.environment.is_none() || stored.environment == ask.environment)
            && stored.token.expires_at > ask.now + buffer
    };
    if let Some(stored) = held.tokens.iter().find(fits).filter(|_| providers.reuse_tokens) {
        return Ok(stored.token.clone());
    }
    if held.is_over {
        return Err(ProviderError::NoToken);
    }
    let fetched = fetch(providers, &ask, &settings, &mut held).await;
    // Also when it failed: a refresh token may be used up.
    let outcome = match fetched {
        Ok(fetched) => {
            let minted = minted(&ask.connector, fetched, ask.now);
            held.tokens.retain(|s| s.narrowing != ask.narrowing || s.environment != ask.environment);
            let (narrowing, environment) = (ask.narrowing.clone(), ask.environment.clone());
            held.tokens.push(Stored { narrowing, environment, token: minted.clone() });
            Ok(minted)
        }
        Err(refused) => {
            tracing::debug!(connector = %ask.connector.uid, code = refused.code(), "the provider refuses");
            let told = refused.told(&ask);
            held.is_over =
                told == ProviderError::NoToken && held.refresh_token.is_some() && refused.code() != "unreachable";
            Err(told)
        }
    };
    hold(state, &ask.connector.id, &key, &held);
    outcome
}

fn minted(connector: &Connector, fetched: Fetched, now: SystemTime) -> Minted {
    let metadata = match provider_of(&connector.kind) {
        "slack" => slack::metadata(&fetched.further),
        "github" => github::metadata(&fetched.further),
        "salesforce" => salesforce::metadata(&fetched.further),
        _ => Value::Null,
    };
    Minted {
        token: fetched.token,
        expires_at: now + fetched.lasts.unwrap_or(connector.token_life),
        name: None,
        external_subject: fetched.further.get("id").and_then(Value::as_str).map(str::to_owned),
        metadata: metadata.as_object().filter(|metadata| !metadata.is_empty()).map(|_| metadata.clone()),
        claims: None,
    }
}

/// The exchange.
async fn fetch(providers: &Providers, ask: &Ask, settings: &Settings, held: &mut Held) -> Result<Fetched, Refused> {
    let Ask { connector, subject, installation, narrowing, now, .. } = ask;
    let http = &providers.http;
    let is_user = matches!(subject, Subject::User { .. });
    let provider = provider_of(&connector.kind);
    match subject {
        Subject::JwtBearer(claims) if provider == "oauth" => {
            let party = providers.party(connector, settings).await?;
            let key = match settings.private_key(&providers.outside)? {
                Some(key) => key,
                None => providers.registered(connector, settings)?.private_key,
            };
            return party.by_assertion(&key, claims, narrowing, *now).await;
        }
        Subject::Exchange(token) if provider == "oauth" => {
            return providers.party(connector, settings).await?.by_exchange(token, narrowing).await;
        }
        // Snowflake's way is one of assertions: another user of the account, who has the same key.
        Subject::JwtBearer(_) if provider == "snowflake" => {}
        Subject::JwtBearer(_) | Subject::Exchange(_) => return Err(Refused::new("unsupported_grant_type")),
        Subject::App | Subject::User { .. } => {}
    }
    match provider {
        "api-key" if !is_user => return api_key::attach(settings, narrowing, &providers.outside),
        "snowflake" if !is_user => {
            let named = if let Subject::JwtBearer(claims) = subject { claims.get("sub") } else { None };
            let user = settings.snowflake_user(connector, named.and_then(Value::as_str));
            providers.standins.console().add_snowflake_user(
                &user,
                settings.roles.clone(),
                connector.token_life.as_secs(),
            );
            let key = providers.registered(connector, settings)?.private_key;
            let key = settings.private_key(&providers.outside)?.unwrap_or(key);
            return snowflake::exchange(http, &providers.standins.base(provider), (&user, &key), narrowing, *now).await;
        }
        "github" if !is_user => {
            let Registered { client_id, private_key, .. } = providers.registered(connector, settings)?;
            let account = &installation.as_ref().ok_or(Refused::new("not_installed"))?.tenant_id;
            let number = providers.standins.console().install_github(&client_id, account);
            let key = settings.private_key(&providers.outside)?.unwrap_or(private_key);
            let base = providers.standins.base(provider);
            return github::installation_token(http, &base, (&client_id, &key), number, narrowing, *now).await;
        }
        "api-key" | "snowflake" => return Err(Refused::new("unsupported_grant_type")),
        _ => {}
    }
    let party = providers.party(connector, settings).await?;
    let mut fetched = match &held.refresh_token {
        Some(token) => party.refresh(token, &wire_narrowing(provider, narrowing)).await?,
        None if provider == "oauth" && !is_user => party.for_itself(narrowing).await?,
        None if settings.issuer.is_some() => return Err(Refused::new("consent_required")),
        None => first(providers, &party, ask, held).await?,
    };
    held.keep(&mut fetched);
    if provider == "slack" {
        slack::reaches(&fetched, narrowing)?;
    }
    match provider {
        "salesforce" => salesforce::with_end(&party, fetched, *now).await,
        _ => Ok(fetched),
    }
}

/// What of a narrowing goes with a refresh: Slack and GitHub know nothing of it.
fn wire_narrowing(provider: &str, narrowing: &Narrowing) -> Narrowing {
    if provider == "slack" { Narrowing::default() } else { narrowing.clone() }
}

/// The first token of a grant that the seed states.
async fn first(providers: &Providers, party: &Party, ask: &Ask, held: &mut Held) -> Result<Fetched, Refused> {
    let provider = provider_of(&ask.connector.kind);
    let tenant = ask.installation.as_ref().map_or("app", |installation| installation.tenant_id.as_str());
    let (who, scopes) = match &ask.subject {
        Subject::User { id, .. } => {
            (("login_hint", id.as_str()), if provider == "slack" { "user_scope" } else { "scope" })
        }
        _ if provider == "slack" => (("team", tenant), "scope"),
        _ => (("login_hint", tenant), "scope"),
    };
    providers.standins.console().consent(provider, &party.client_id, who.1);
    let mut fetched = party.silently(&Narrowing::default(), scopes, who).await?;
    held.keep(&mut fetched);
    match (&held.refresh_token, ask.narrowing.is_any() || provider == "slack") {
        // The grant is as wide as it can be; the token is narrowed from it.
        (Some(token), false) => party.refresh(token, &ask.narrowing).await,
        _ => Ok(fetched),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_provider_says_is_shown_only_if_it_is_a_code() {
        for (said, shown) in [
            (json!({"error": "invalid_grant"}), "invalid_grant"),
            (json!({"error": "rt_S3CRET"}), "refused"),
            (json!({"message": "Bad credentials"}), "refused"),
            (json!({"error": "x".repeat(41)}), "refused"),
            (json!("text"), "invalid_answer"),
        ] {
            assert_eq!(Refused::of(&said).code(), shown, "{said}");
        }
    }
}
