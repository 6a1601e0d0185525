//! Providers to stand in for the real ones: each speaks its protocol over HTTP on loopback, and believes nobody who does
//! not prove what the real one has proved. State is in memory. They know nothing of Connect, but for the console.
//!
//! Below one origin each has a path of its own. [`Console`] is what a developer does by hand at a provider: register an
//! app, and consent as a user whom the seed says has consented. Everything else goes over HTTP. What was asked, and what
//! was proved, can be read off [`Standins::seen`]; it holds no secret.

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
use http::header::AUTHORIZATION;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use github::Grants;

use super::Now;
use super::exchange::{Asked, Given};
use super::gate::{self, Barred, Visitors};
use super::keys::RsaKey;

/// No request to a provider is longer, in bytes.
const LONGEST_BODY: usize = 64 * 1024;

/// The providers, on a port of their own. They stop when this is dropped.
pub struct Standins {
    origin: String,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

struct Shared {
    origin: String,
    now: Now,
    all: Mutex<All>,
    seen: Mutex<Vec<Seen>>,
}

/// Every provider.
#[derive(Debug, Default)]
struct All {
    slack: slack::Slack,
    github: github::GitHub,
    snowflake: snowflake::Snowflake,
    salesforce: salesforce::Salesforce,
    oauth: oauth::OAuth,
}

impl All {
    fn server(&mut self, provider: &str) -> &mut authorization::Server {
        match provider {
            "slack" => &mut self.slack.server,
            "github" => &mut self.github.server,
            "salesforce" => &mut self.salesforce.server,
            _ => &mut self.oauth.server,
        }
    }
}

/// A request that a provider had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The provider, by its path.
    pub provider: String,
    /// What was asked for: method and path.
    pub what: String,
    /// What was proved with it, such as a signature.
    pub proved: Vec<&'static str>,
    /// What was answered.
    pub status: u16,
}

/// A request to a provider.
struct Call<'a> {
    asked: &'a Asked,
    form: Vec<(String, String)>,
    now: SystemTime,
    /// The provider's own base URL.
    base: String,
    proved: RefCell<Vec<&'static str>>,
}

impl Call<'_> {
    /// A parameter of the form; the first of its name.
    fn form(&self, name: &str) -> Option<&str> {
        self.form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Id and secret of `Authorization: Basic`, decoded as RFC 6749 section 2.3.1 has it.
    fn basic(&self) -> Option<(String, String)> {
        use base64::Engine;
        let value = self.asked.headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
        let pair = String::from_utf8(base64::prelude::BASE64_STANDARD.decode(value).ok()?).ok()?;
        let (id, secret) = pair.split_once(':')?;
        let decoded = |text: &str| form_urlencoded::parse(text.as_bytes()).next().map(|(text, _)| text.into_owned());
        Some((decoded(id)?, decoded(secret)?))
    }

    /// The bearer, or the form's `token`.
    fn bearer_or_token(&self) -> Option<&str> {
        self.asked.bearer().or_else(|| self.form("token"))
    }

    fn prove(&self, what: &'static str) {
        self.proved.borrow_mut().push(what);
    }
}

/// JSON with a status.
fn answer(status: u16, body: &Value) -> Given {
    Given::json(StatusCode::from_u16(status).unwrap_or_default(), body)
}

/// What an app is at its provider, from its developer's side.
#[derive(Debug, Clone, Default)]
pub struct App {
    /// The app's name, of which its ids are made.
    pub name: String,
    /// What people are shown; the name if it is empty.
    pub title: String,
    /// What users can consent to at most; anything if it is empty.
    pub scopes: Vec<String>,
    /// What resources and audiences it may name; any if it is empty.
    pub resources: Vec<String>,
    /// Where users are sent back to.
    pub redirect_uris: Vec<String>,
    /// How long its tokens live, in seconds.
    pub token_life: u64,
}

impl App {
    /// What people are shown.
    fn shown(&self) -> &str {
        if self.title.is_empty() { &self.name } else { &self.title }
    }
}

/// What the provider gave for an app.
#[derive(Debug, Clone)]
pub struct Registered {
    /// The client's id.
    pub client_id: String,
    /// Its secret.
    pub client_secret: String,
    /// A private key in PKCS#8 PEM, whose public half the provider has.
    pub private_key: String,
}

impl Standins {
    /// Starts them on any free port of loopback.
    pub async fn start(now: Now) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let origin = format!("http://{}", listener.local_addr()?);
        let shared = Arc::new(Shared { origin: origin.clone(), now, all: Mutex::default(), seen: Mutex::default() });
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, shared.clone(), stop.clone()));
        Ok(Self { origin, shared, _stop: stop.drop_guard() })
    }

    /// A provider's base URL.
    pub fn base(&self, provider: &str) -> String {
        format!("{}/{provider}", self.origin)
    }

    /// What the providers were asked so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen().clone()
    }

    /// The console of the providers.
    pub fn console(&self) -> Console<'_> {
        Console(&self.shared)
    }
}

/// What is done by hand at a provider, as its developer or user. Each is done once for all; to do it again changes it.
pub struct Console<'a>(&'a Shared);

impl Console<'_> {
    /// Registers an app; the same name is the same app.
    pub fn register(&self, provider: &str, app: &App) -> Result<Registered, String> {
        let (client_id, client_secret) = self.0.all().server(provider).register(app);
        Ok(Registered { client_id, client_secret, private_key: RsaKey::of_this_process()?.pem().to_owned() })
    }

    /// Somebody consents to an app: a user, or whoever may speak for a workspace.
    pub fn consent(&self, provider: &str, client_id: &str, who: &str) {
        self.0.all().server(provider).consent(client_id, who);
    }

    /// Somebody takes all back that an app was given by `who`; by everybody if it is `None`.
    pub fn withdraw(&self, provider: &str, client_id: &str, who: Option<&str>) {
        let mut all = self.0.all();
        all.server(provider).withdraw(client_id, who);
        if provider == "github" {
            all.github.uninstall(client_id, who);
        }
    }

    /// What installations of a GitHub app give it.
    pub fn offer_github(&self, client_id: &str, grants: Grants) {
        self.0.all().github.offer(client_id, grants);
    }

    /// A GitHub app is installed on an account; the number of the installation. One that was uninstalled since is not
    /// installed again.
    pub fn install_github(&self, client_id: &str, account: &str) -> u64 {
        self.0.all().github.install(client_id, account)
    }

    /// A Snowflake user, `ACCOUNT.USER`, has the public key of the app and these roles; any role if there is none.
    pub fn add_snowflake_user(&self, user: &str, roles: Vec<String>, token_life: u64) {
        self.0.all().snowflake.add_user(user, roles, token_life);
    }
}

impl Shared {
    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, asked: &Asked) -> Given {
        let (method, mut path) = asked.route();
        // RFC 8414 puts its document before the issuer's path, OpenID Connect after it.
        if let [".well-known", document, provider] = path[..] {
            path = vec![provider, ".well-known", document];
        }
        let [provider, path @ ..] = &path[..] else { return not_found() };
        let form = form_urlencoded::parse(&asked.body).into_owned().collect();
        let call = Call {
            asked,
            form,
            now: (self.now)(),
            base: format!("{}/{provider}", self.origin),
            proved: RefCell::default(),
        };
        let mut all = self.all();
        let given = match *provider {
            "slack" => all.slack.answer(&call, (method, path)),
            "github" => all.github.answer(&call, (method, path)),
            "snowflake" => all.snowflake.answer(&call, (method, path)),
            "salesforce" => all.salesforce.answer(&call, (method, path)),
            "oauth" => all.oauth.answer(&call, (method, path)),
            _ => not_found(),
        };
        drop(all);
        self.seen().push(Seen {
            provider: (*provider).to_owned(),
            what: format!("{method} /{}", path.join("/")),
            proved: call.proved.into_inner(),
            status: given.status.as_u16(),
        });
        given
    }
}

fn not_found() -> Given {
    answer(404, &json!({"error": "not_found"}))
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    while let Some(Ok((stream, from))) = stop.run_until_cancelled(listener.accept()).await {
        let Some(standing) = gate::let_in(&stream, from) else { continue };
        let shared = shared.clone();
        let connection = async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move { Ok::<_, http::Error>(respond(request, &shared, standing).await) }
            });
            // Callers may hang up at any time.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(connection));
    }
}

async fn respond(request: Request<Incoming>, shared: &Shared, standing: Result<(), Barred>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    // A browser is led to any of them; what is for apps takes the app's secret.
    let given = match standing.and_then(|()| gate::check(&head, Visitors::People)) {
        Err(barred) => barred.into(),
        Ok(()) => match Limited::new(body, LONGEST_BODY).collect().await {
            Ok(body) => shared.answer(&Asked::new(head.method, target, head.headers, body.to_bytes())),
            Err(_) => answer(413, &json!({"error": "invalid_request"})),
        },
    };
    let mut response = Response::new(Full::new(given.body.unwrap_or_default()));
    *response.status_mut() = given.status;
    response.headers_mut().extend(given.headers);
    response
}
