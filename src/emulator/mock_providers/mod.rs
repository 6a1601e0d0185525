//! Mock providers: each speaks a real provider's protocol over HTTP on loopback, and verifies credentials and
//! signatures as the real one does. Their state is in memory. They know nothing of Connect.
//!
//! Each has its own path below one origin. [`Console`] does what a developer does by hand at a provider: registering an
//! app, and granting the consents that the seed contains. Everything else goes over HTTP. [`MockProviders::requests`]
//! lists what was requested and which proofs were verified, without secrets.

mod authorization;
mod github;
mod oauth;
mod salesforce;
mod slack;
mod snowflake;

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use http::StatusCode;
use http::header::AUTHORIZATION;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use github::InstallationGrants;

use super::Clock;
use super::access::{self, AccessDenied, Audience};
use super::keys::{KeyError, RsaKey};
use super::message::{Request, Response};
use super::provider_kind::ProviderKind;

/// The size limit of a request body, in bytes.
const MAX_BODY: usize = 64 * 1024;

/// The mock providers, on their own port. Dropping this stops them.
pub struct MockProviders {
    origin: String,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

struct Shared {
    origin: String,
    clock: Clock,
    providers: Mutex<Providers>,
    requests: Mutex<Vec<RecordedRequest>>,
}

#[derive(Debug, Default)]
struct Providers {
    slack: slack::Slack,
    github: github::GitHub,
    snowflake: snowflake::Snowflake,
    salesforce: salesforce::Salesforce,
    oauth: oauth::OAuth,
}

impl Providers {
    /// The authorization server that an app of this kind is registered with.
    fn server(&mut self, kind: ProviderKind) -> &mut authorization::AuthorizationServer {
        match kind {
            ProviderKind::Slack => &mut self.slack.server,
            ProviderKind::GitHub => &mut self.github.server,
            ProviderKind::Salesforce => &mut self.salesforce.server,
            ProviderKind::Snowflake | ProviderKind::ApiKey | ProviderKind::OAuth => &mut self.oauth.server,
        }
    }
}

/// A request that a mock provider received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedRequest {
    /// The provider's name, which is its path.
    pub provider: String,
    /// Method and path below the provider's.
    pub route: String,
    /// The proofs that were verified, such as signatures.
    pub proofs: Vec<&'static str>,
    /// The status of the response.
    pub status: u16,
}

/// A request to a mock provider, with what handlers need.
struct Call<'a> {
    request: &'a Request,
    form: Vec<(String, String)>,
    now: SystemTime,
    /// The provider's base URL.
    base: String,
    proofs: RefCell<Vec<&'static str>>,
}

impl Call<'_> {
    /// The first form parameter of this name.
    fn form(&self, name: &str) -> Option<&str> {
        self.form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Client id and secret of `Authorization: Basic`, decoded as in RFC 6749 section 2.3.1.
    fn basic(&self) -> Option<(String, String)> {
        use base64::Engine;
        let value = self.request.headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
        let pair = String::from_utf8(base64::prelude::BASE64_STANDARD.decode(value).ok()?).ok()?;
        let (id, secret) = pair.split_once(':')?;
        let decoded = |text: &str| form_urlencoded::parse(text.as_bytes()).next().map(|(text, _)| text.into_owned());
        Some((decoded(id)?, decoded(secret)?))
    }

    /// The bearer token, or the form's `token`.
    fn bearer_or_token(&self) -> Option<&str> {
        self.request.bearer().or_else(|| self.form("token"))
    }

    /// Whether this is a token request with a refresh token.
    fn is_refresh(&self) -> bool {
        self.form("grant_type") == Some("refresh_token")
    }

    fn record_proof(&self, proof: &'static str) {
        self.proofs.borrow_mut().push(proof);
    }
}

/// A JSON response.
fn json_response(status: u16, body: &Value) -> Response {
    Response::json(StatusCode::from_u16(status).unwrap_or_default(), body)
}

/// An app's registration at a provider, as its developer enters it.
#[derive(Debug, Clone, Default)]
pub struct App {
    /// The name, from which the client id is derived.
    pub name: String,
    /// The name on pages; `name` if empty.
    pub title: String,
    /// The scopes that users can grant; any if empty.
    pub scopes: Vec<String>,
    /// The resources and audiences that tokens can be for; any if empty.
    pub resources: Vec<String>,
    /// The URIs that users may be redirected to.
    pub redirect_uris: Vec<String>,
    /// The lifetime of tokens, in seconds.
    pub token_life: u64,
}

impl App {
    fn display_name(&self) -> &str {
        if self.title.is_empty() { &self.name } else { &self.title }
    }
}

/// The credentials of a registered app.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The client id.
    pub client_id: String,
    /// The client secret.
    pub client_secret: String,
    /// A private key in PKCS#8 PEM, whose public key the provider has.
    pub private_key: String,
}

impl MockProviders {
    /// Starts the providers on a free loopback port.
    pub async fn start(clock: Clock) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let origin = format!("http://{}", listener.local_addr()?);
        let shared =
            Arc::new(Shared { origin: origin.clone(), clock, providers: Mutex::default(), requests: Mutex::default() });
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, shared.clone(), stop.clone()));
        Ok(Self { origin, shared, _stop: stop.drop_guard() })
    }

    /// The base URL of a provider.
    pub fn base(&self, kind: ProviderKind) -> String {
        format!("{}/{}", self.origin, kind.name())
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.shared.requests().clone()
    }

    /// The providers' console.
    pub fn console(&self) -> Console<'_> {
        Console(&self.shared)
    }
}

/// What a developer or a user does by hand at a provider. Every operation may be repeated.
pub struct Console<'a>(&'a Shared);

impl Console<'_> {
    /// Registers an app, or updates the one of the same name.
    pub fn register(&self, kind: ProviderKind, app: &App) -> Result<Registration, KeyError> {
        let (client_id, client_secret) = self.0.providers().server(kind).register(app);
        Ok(Registration { client_id, client_secret, private_key: RsaKey::of_this_process()?.pem().to_owned() })
    }

    /// Grants an app the consent of a user or a workspace.
    pub fn consent(&self, kind: ProviderKind, client_id: &str, subject: &str) {
        self.0.providers().server(kind).consent(client_id, subject);
    }

    /// Revokes everything that `subject` has granted to an app; for `None`, everything of all subjects.
    pub fn withdraw(&self, kind: ProviderKind, client_id: &str, subject: Option<&str>) {
        let mut providers = self.0.providers();
        providers.server(kind).withdraw(client_id, subject);
        if kind == ProviderKind::GitHub {
            providers.github.uninstall(client_id, subject);
        }
    }

    /// Sets what installations of a GitHub app grant.
    pub fn set_github_grants(&self, client_id: &str, grants: InstallationGrants) {
        self.0.providers().github.set_grants(client_id, grants);
    }

    /// Installs a GitHub app on an account and returns the installation's number. An installation that was removed
    /// stays removed.
    pub fn install_github(&self, client_id: &str, account: &str) -> u64 {
        self.0.providers().github.install(client_id, account)
    }

    /// Adds a Snowflake user, `ACCOUNT.USER`, with the app's public key and these roles; any role if empty.
    pub fn add_snowflake_user(&self, user: &str, roles: Vec<String>, token_life: u64) {
        self.0.providers().snowflake.add_user(user, roles, token_life);
    }
}

impl Shared {
    fn providers(&self) -> MutexGuard<'_, Providers> {
        self.providers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requests(&self) -> MutexGuard<'_, Vec<RecordedRequest>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, request: &Request) -> Response {
        let (method, mut path) = request.route();
        // RFC 8414 inserts `.well-known` before the issuer's path, OpenID Connect Discovery appends it.
        if let [".well-known", document, provider] = path[..] {
            path = vec![provider, ".well-known", document];
        }
        let [provider, path @ ..] = &path[..] else { return not_found() };
        let form = form_urlencoded::parse(&request.body).into_owned().collect();
        let base = format!("{}/{provider}", self.origin);
        let call = Call { request, form, now: (self.clock)(), base, proofs: RefCell::default() };
        let mut providers = self.providers();
        let response = match *provider {
            "slack" => providers.slack.handle(&call, (method, path)),
            "github" => providers.github.handle(&call, (method, path)),
            "snowflake" => providers.snowflake.handle(&call, (method, path)),
            "salesforce" => providers.salesforce.handle(&call, (method, path)),
            "oauth" => providers.oauth.handle(&call, (method, path)),
            _ => not_found(),
        };
        drop(providers);
        self.requests().push(RecordedRequest {
            provider: (*provider).to_owned(),
            route: format!("{method} /{}", path.join("/")),
            proofs: call.proofs.into_inner(),
            status: response.status.as_u16(),
        });
        response
    }
}

fn not_found() -> Response {
    json_response(404, &json!({"error": "not_found"}))
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    while let Some(Ok((stream, from))) = stop.run_until_cancelled(listener.accept()).await {
        let Some(peer_check) = access::check_peer(&stream, from) else { continue };
        let shared = shared.clone();
        let connection = async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move { Ok::<_, http::Error>(respond(request, &shared, peer_check).await) }
            });
            // Clients may disconnect at any time.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(connection));
    }
}

async fn respond(
    request: http::Request<Incoming>,
    shared: &Shared,
    peer_check: Result<(), AccessDenied>,
) -> http::Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    // Browsers may navigate to any path; the endpoints for apps require the client secret.
    let response = match peer_check.and_then(|()| access::check_head(&head, Audience::Browsers)) {
        Err(denied) => denied.into(),
        Ok(()) => match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => shared.handle(&Request::new(head.method, target, head.headers, body.to_bytes())),
            Err(_) => json_response(413, &json!({"error": "invalid_request"})),
        },
    };
    response.into_http(|body| Full::new(body.unwrap_or_default()))
}
