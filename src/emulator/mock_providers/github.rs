//! GitHub: an app authenticates with a JWT signed by its key and gets tokens for its installations; users consent by
//! the web flow, whose tokens can be refreshed.
//!
//! github.com and api.github.com share one base URL. Errors of the web flow have status 200.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::authorization::{AuthorizationServer, OAuthError, ServerRules, TokenResponse, redirect};
use super::{Call, json_response, not_found};
use crate::emulator::ids::random_id;
use crate::emulator::keys::RsaKey;
use crate::emulator::message::Response;
use crate::emulator::pages::{self, Question};

/// The maximum lifetime of an app's JWT, in seconds.
const MAX_JWT_LIFE: u64 = 600;

/// The mock GitHub.
#[derive(Debug)]
pub(super) struct GitHub {
    pub(super) server: AuthorizationServer,
    installations: Vec<Installation>,
    /// Installation tokens, with installation number and expiry.
    tokens: HashMap<String, (u64, SystemTime)>,
    /// Installations that are being asked for, by the form's CSRF token.
    questions: HashMap<String, InstallRequest>,
    /// What installations grant, by client id.
    grants: HashMap<String, InstallationGrants>,
}

/// What installations grant an app.
#[derive(Debug, Clone, Default)]
pub struct InstallationGrants {
    /// The permissions with their levels; any if empty.
    pub permissions: BTreeMap<String, String>,
    /// The repositories by name; any if empty.
    pub repositories: Vec<String>,
    /// The lifetime of tokens, in seconds; an hour at the real GitHub.
    pub token_life: u64,
}

#[derive(Debug)]
struct Installation {
    number: u64,
    client_id: String,
    account: String,
    is_removed: bool,
}

/// An installation that a page asks for.
#[derive(Debug)]
struct InstallRequest {
    client_id: String,
    account: String,
    state: String,
}

/// The body of a request for an installation token.
#[derive(Debug, Default, Deserialize)]
struct TokenRestrictions {
    #[serde(default)]
    repositories: Vec<String>,
    #[serde(default)]
    repository_ids: Vec<u64>,
    #[serde(default)]
    permissions: BTreeMap<String, String>,
}

impl Default for GitHub {
    fn default() -> Self {
        Self {
            server: AuthorizationServer::new(ServerRules {
                name: "GitHub",
                pkce_required: false,
                takes_assertions: false,
                access_prefix: |_| "ghu_",
                refresh_prefix: "ghr_",
                refresh_life: Duration::from_secs(15_897_600),
                detail_types: &[],
            }),
            installations: Vec::new(),
            tokens: HashMap::new(),
            questions: HashMap::new(),
            grants: HashMap::new(),
        }
    }
}

impl GitHub {
    pub(super) fn handle(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Response {
        match route {
            ("GET", ["login", "oauth", "authorize"]) => self.server.authorize(call),
            ("POST", ["login", "oauth", "authorize"]) => self.server.submit(call),
            ("POST", ["login", "oauth", "access_token"]) => reply(call, self.server.token(call)),
            ("GET", ["apps", app, "installations", "new"]) => self.ask_to_install(call, app),
            ("POST", ["apps", _, "installations", "new"]) => self.decide_to_install(call),
            ("POST", ["app", "installations", number, "access_tokens"]) => {
                self.installation_token(call, number).unwrap_or_else(|error| error)
            }
            ("DELETE", ["installation", "token"]) => {
                let token = call.request.bearer().unwrap_or_default();
                if self.tokens.remove(token).is_some() {
                    Response::no_content()
                } else {
                    message(401, "Bad credentials")
                }
            }
            ("GET", ["installation", "repositories"]) => self.repositories(call),
            ("GET", ["user"]) => {
                let access = call.request.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(
                    || message(401, "Bad credentials"),
                    |a| json_response(200, &json!({"login": a.subject})),
                )
            }
            ("DELETE", ["applications", client_id, "grant" | "token"]) => self.revoke_user(call, client_id),
            _ => not_found(),
        }
    }

    pub(super) fn set_grants(&mut self, client_id: &str, grants: InstallationGrants) {
        self.grants.insert(client_id.to_owned(), grants);
    }

    pub(super) fn install(&mut self, client_id: &str, account: &str) -> u64 {
        let matches = |i: &&Installation| i.client_id == client_id && i.account == account;
        if let Some(installation) = self.installations.iter().find(matches) {
            return installation.number;
        }
        let number = 1_000_001 + self.installations.len() as u64;
        let (client_id, account) = (client_id.to_owned(), account.to_owned());
        self.installations.push(Installation { number, client_id, account, is_removed: false });
        number
    }

    fn ask_to_install(&mut self, call: &Call<'_>, client_id: &str) -> Response {
        let Some(app) = self.server.app(client_id) else { return not_found() };
        let account = call.request.query("target").unwrap_or("acme").to_owned();
        let state = call.request.query("state").unwrap_or_default().to_owned();
        let csrf = random_id("", 32);
        let response = pages::question(&Question {
            title: "GitHub",
            question: format!("Install {} on {account}?", app.display_name()),
            items: Vec::new(),
            csrf: &csrf,
        });
        self.questions.insert(csrf, InstallRequest { client_id: client_id.to_owned(), account, state });
        response
    }

    fn decide_to_install(&mut self, call: &Call<'_>) -> Response {
        let csrf = pages::csrf_of(&call.request.headers, &call.form);
        let Some(install) = csrf.and_then(|csrf| self.questions.remove(csrf)) else {
            return pages::sentence(StatusCode::BAD_REQUEST, "GitHub", "This form was not shown here.", None);
        };
        let InstallRequest { client_id, account, state } = install;
        let Some(setup) = self.server.app(&client_id).and_then(|app| app.redirect_uris.first().cloned()) else {
            return not_found();
        };
        if call.form("decision") != Some("approve") {
            // The real GitHub does not redirect after a denial. Here it does, so that apps can test it.
            return redirect(&setup, &[("error", "access_denied"), ("state", &state)]);
        }
        let number = self.install(&client_id, &account);
        self.installations.iter_mut().filter(|i| i.number == number).for_each(|i| i.is_removed = false);
        let number = number.to_string();
        redirect(&setup, &[("installation_id", &number), ("setup_action", "install"), ("state", &state)])
    }

    pub(super) fn uninstall(&mut self, client_id: &str, account: Option<&str>) {
        let matches = |i: &&mut Installation| i.client_id == client_id && account.is_none_or(|a| a == i.account);
        self.installations.iter_mut().filter(matches).for_each(|installation| installation.is_removed = true);
    }

    fn installation_token(&mut self, call: &Call<'_>, number: &str) -> Result<Response, Response> {
        let jwt = call.request.bearer().ok_or_else(|| message(401, "A JSON web token could not be decoded"))?;
        let key = RsaKey::of_this_process().map_err(|_| message(500, "no key"))?;
        let claims = key.verify(jwt, call.now, MAX_JWT_LIFE).map_err(|description| message(401, description))?;
        call.record_proof("app JWT RS256");
        let app = claims["iss"].as_str().unwrap_or_default();
        let matches = |i: &&Installation| i.number.to_string() == number && i.client_id == app && !i.is_removed;
        let installation = self.installations.iter().find(matches).ok_or_else(|| message(404, "Not Found"))?;
        let body: TokenRestrictions = match call.request.body.as_ref() {
            [] => TokenRestrictions::default(),
            body => serde_json::from_slice(body).map_err(|_| message(400, "Problems parsing JSON"))?,
        };
        let InstallationGrants { permissions, repositories, token_life } =
            self.grants.get(app).cloned().unwrap_or_default();
        let is_permitted = |(name, level): (&String, &String)| {
            let rank = |level: &str| ["read", "write", "admin"].iter().position(|known| *known == level);
            permissions.is_empty() || permissions.get(name).is_some_and(|granted| rank(level) <= rank(granted))
        };
        if !body.permissions.iter().all(is_permitted) {
            return Err(message(422, "The permissions requested are not granted to this installation."));
        }
        let is_available = |name: &String| repositories.is_empty() || repositories.contains(name);
        let has_id = |id: &u64| usize::try_from(*id).is_ok_and(|id| (1..=repositories.len()).contains(&id));
        if !body.repositories.iter().all(is_available) || !body.repository_ids.iter().all(has_id) {
            return Err(message(422, "There is at least one repository that does not exist or is not accessible."));
        }
        let expires_at = call.now + Duration::from_secs(token_life);
        let is_selected = !body.repositories.is_empty() || !body.repository_ids.is_empty();
        let chosen: Vec<_> = body.repositories.iter().map(|name| json!({"name": name})).collect();
        let token = format!("ghs_{}", random_id("", 36));
        let response = json!({
            "token": token,
            "expires_at": humantime::format_rfc3339_seconds(expires_at).to_string(),
            "permissions": if body.permissions.is_empty() { &permissions } else { &body.permissions },
            "repository_selection": if is_selected { "selected" } else { "all" },
            "repositories": chosen,
        });
        self.tokens.insert(token, (installation.number, expires_at));
        Ok(json_response(201, &response))
    }

    fn repositories(&self, call: &Call<'_>) -> Response {
        let token = call
            .request
            .bearer()
            .and_then(|token| self.tokens.get(token))
            .filter(|(_, expires_at)| call.now < *expires_at);
        let found =
            token.and_then(|(number, _)| self.installations.iter().find(|i| i.number == *number && !i.is_removed));
        match found {
            Some(found) => {
                let set_grants = self.grants.get(&found.client_id).cloned().unwrap_or_default();
                json_response(200, &json!({"repositories": set_grants.repositories, "account": found.account}))
            }
            None => message(401, "Bad credentials"),
        }
    }

    fn revoke_user(&mut self, call: &Call<'_>, client_id: &str) -> Response {
        let body: Value = serde_json::from_slice(&call.request.body).unwrap_or_default();
        let token = body["access_token"].as_str().unwrap_or_default();
        match self.server.authenticate(call) {
            Ok(id) if id == client_id && self.server.revoke_grants_of(token) => Response::no_content(),
            Ok(_) => message(422, "Validation Failed"),
            Err(_) => message(401, "Bad credentials"),
        }
    }
}

/// The response of the web flow's token endpoint, with GitHub's names for errors.
fn reply(call: &Call<'_>, result: Result<TokenResponse, OAuthError>) -> Response {
    let body = match result {
        Ok(TokenResponse { access_token, refresh_token, expires_in, .. }) => json!({
            "access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in,
            "refresh_token_expires_in": 15_897_600, "token_type": "bearer", "scope": "",
        }),
        Err(("invalid_grant", description)) if call.is_refresh() => {
            json!({"error": "bad_refresh_token", "error_description": description})
        }
        Err(("invalid_grant", description)) => {
            json!({"error": "bad_verification_code", "error_description": description})
        }
        Err(("invalid_client", description)) => {
            json!({"error": "incorrect_client_credentials", "error_description": description})
        }
        Err((error, description)) => json!({"error": error, "error_description": description}),
    };
    json_response(200, &body)
}

fn message(status: u16, message: &str) -> Response {
    json_response(status, &json!({"message": message}))
}
