//! GitHub: an app proves with a JWT of its key who it is, and gets tokens of its installations, of an hour each; users
//! give tokens of their own by the web flow, which last eight hours and are refreshed.
//!
//! One base for what are github.com and api.github.com. The web flow's errors come with 200.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::authorization::{Issued, OAuthError, Rules, Server, redirect};
use super::{Call, answer, not_found};
use crate::emulator::exchange::Given;
use crate::emulator::ids::random_id;
use crate::emulator::keys::RsaKey;
use crate::emulator::pages::{self, Question};

/// An app's JWT may last ten minutes.
const LONGEST_JWT: u64 = 600;

/// GitHub.
#[derive(Debug)]
pub(super) struct GitHub {
    pub(super) server: Server,
    installations: Vec<Installation>,
    tokens: HashMap<String, (u64, SystemTime)>,
    /// Who is asked to install an app, by the form's CSRF token.
    questions: HashMap<String, Install>,
    /// What installations of an app give it.
    offers: HashMap<String, Grants>,
}

/// What an installation gives an app.
#[derive(Debug, Clone, Default)]
pub struct Grants {
    /// The permissions with their levels; any if there is none.
    pub permissions: BTreeMap<String, String>,
    /// The repositories by name; all, and any name, if there is none.
    pub repositories: Vec<String>,
    /// How long its tokens live, in seconds; an hour at GitHub.
    pub token_life: u64,
}

#[derive(Debug)]
struct Installation {
    number: u64,
    client_id: String,
    account: String,
    is_over: bool,
}

/// An installation that somebody is asked for.
#[derive(Debug)]
struct Install {
    client_id: String,
    account: String,
    state: String,
}

/// What a token is to be narrowed to.
#[derive(Debug, Default, Deserialize)]
struct Narrowing {
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
            server: Server::new(Rules {
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
            offers: HashMap::new(),
        }
    }
}

impl GitHub {
    pub(super) fn answer(&mut self, call: &Call<'_>, route: (&str, &[&str])) -> Given {
        match route {
            ("GET", ["login", "oauth", "authorize"]) => self.server.authorize(call),
            ("POST", ["login", "oauth", "authorize"]) => self.server.decide(call),
            ("POST", ["login", "oauth", "access_token"]) => reply(self.server.token(call)),
            ("GET", ["apps", app, "installations", "new"]) => self.ask_to_install(call, app),
            ("POST", ["apps", _, "installations", "new"]) => self.decide_to_install(call),
            ("POST", ["app", "installations", number, "access_tokens"]) => {
                self.installation_token(call, number).unwrap_or_else(|refused| refused)
            }
            ("DELETE", ["installation", "token"]) => {
                let token = call.asked.bearer().unwrap_or_default();
                if self.tokens.remove(token).is_some() { Given::no_content() } else { message(401, "Bad credentials") }
            }
            ("GET", ["installation", "repositories"]) => self.repositories(call),
            ("GET", ["user"]) => {
                let access = call.asked.bearer().and_then(|token| self.server.access(token, call.now));
                access.map_or_else(|| message(401, "Bad credentials"), |a| answer(200, &json!({"login": a.who})))
            }
            ("DELETE", ["applications", client_id, "grant" | "token"]) => self.forget(call, client_id),
            _ => not_found(),
        }
    }

    pub(super) fn offer(&mut self, client_id: &str, grants: Grants) {
        self.offers.insert(client_id.to_owned(), grants);
    }

    pub(super) fn install(&mut self, client_id: &str, account: &str) -> u64 {
        let is = |i: &&Installation| i.client_id == client_id && i.account == account;
        if let Some(installation) = self.installations.iter().find(is) {
            return installation.number;
        }
        let number = 1_000_001 + self.installations.len() as u64;
        let (client_id, account) = (client_id.to_owned(), account.to_owned());
        self.installations.push(Installation { number, client_id, account, is_over: false });
        number
    }

    fn ask_to_install(&mut self, call: &Call<'_>, client_id: &str) -> Given {
        let Some(app) = self.server.app(client_id) else { return not_found() };
        let account = call.asked.query("target").unwrap_or("acme").to_owned();
        let state = call.asked.query("state").unwrap_or_default().to_owned();
        let csrf = random_id("", 32);
        let given = pages::question(&Question {
            who: "GitHub",
            asks: format!("Install {} on {account}?", app.shown()),
            list: Vec::new(),
            csrf: &csrf,
        });
        self.questions.insert(csrf, Install { client_id: client_id.to_owned(), account, state });
        given
    }

    fn decide_to_install(&mut self, call: &Call<'_>) -> Given {
        let csrf = pages::csrf_of(&call.asked.headers, &call.form);
        let Some(install) = csrf.and_then(|csrf| self.questions.remove(csrf)) else {
            return pages::sentence(StatusCode::BAD_REQUEST, "GitHub", "This form was not shown here.", None);
        };
        let Install { client_id, account, state } = install;
        let Some(setup) = self.server.app(&client_id).and_then(|app| app.redirect_uris.first().cloned()) else {
            return not_found();
        };
        if call.form("decision") != Some("approve") {
            // GitHub leaves the user where they are; a test of the denial needs a way back.
            return redirect(&setup, &[("error", "access_denied"), ("state", &state)]);
        }
        let number = self.install(&client_id, &account);
        self.installations.iter_mut().filter(|i| i.number == number).for_each(|i| i.is_over = false);
        let number = number.to_string();
        redirect(&setup, &[("installation_id", &number), ("setup_action", "install"), ("state", &state)])
    }

    pub(super) fn uninstall(&mut self, client_id: &str, account: Option<&str>) {
        let concerns = |i: &&mut Installation| i.client_id == client_id && account.is_none_or(|a| a == i.account);
        self.installations.iter_mut().filter(concerns).for_each(|installation| installation.is_over = true);
    }

    fn installation_token(&mut self, call: &Call<'_>, number: &str) -> Result<Given, Given> {
        let jwt = call.asked.bearer().ok_or_else(|| message(401, "A JSON web token could not be decoded"))?;
        let key = RsaKey::of_this_process().map_err(|_| message(500, "no key"))?;
        let claims = key.verify(jwt, call.now, LONGEST_JWT).map_err(|why| message(401, why))?;
        call.prove("app JWT RS256");
        let app = claims["iss"].as_str().unwrap_or_default();
        let is = |i: &&Installation| i.number.to_string() == number && i.client_id == app && !i.is_over;
        let installation = self.installations.iter().find(is).ok_or_else(|| message(404, "Not Found"))?;
        let body: Narrowing = match call.asked.body.as_ref() {
            [] => Narrowing::default(),
            body => serde_json::from_slice(body).map_err(|_| message(400, "Problems parsing JSON"))?,
        };
        let Grants { permissions, repositories, token_life } = self.offers.get(app).cloned().unwrap_or_default();
        let is_permitted = |(name, level): (&String, &String)| {
            let rank = |level: &str| ["read", "write", "admin"].iter().position(|known| *known == level);
            permissions.is_empty() || permissions.get(name).is_some_and(|granted| rank(level) <= rank(granted))
        };
        if !body.permissions.iter().all(is_permitted) {
            return Err(message(422, "The permissions requested are not granted to this installation."));
        }
        let is_there = |name: &String| repositories.is_empty() || repositories.contains(name);
        let has_id = |id: &u64| usize::try_from(*id).is_ok_and(|id| (1..=repositories.len()).contains(&id));
        if !body.repositories.iter().all(is_there) || !body.repository_ids.iter().all(has_id) {
            return Err(message(422, "There is at least one repository that does not exist or is not accessible."));
        }
        let ends = call.now + Duration::from_secs(token_life);
        let narrowed = !body.repositories.is_empty() || !body.repository_ids.is_empty();
        let chosen: Vec<_> = body.repositories.iter().map(|name| json!({"name": name})).collect();
        let token = format!("ghs_{}", random_id("", 36));
        let given = json!({
            "token": token,
            "expires_at": humantime::format_rfc3339_seconds(ends).to_string(),
            "permissions": if body.permissions.is_empty() { &permissions } else { &body.permissions },
            "repository_selection": if narrowed { "selected" } else { "all" },
            "repositories": chosen,
        });
        self.tokens.insert(token, (installation.number, ends));
        Ok(answer(201, &given))
    }

    fn repositories(&self, call: &Call<'_>) -> Given {
        let token = call.asked.bearer().and_then(|token| self.tokens.get(token)).filter(|(_, ends)| call.now < *ends);
        let found = token.and_then(|(number, _)| self.installations.iter().find(|i| i.number == *number && !i.is_over));
        match found {
            Some(found) => {
                let offer = self.offers.get(&found.client_id).cloned().unwrap_or_default();
                answer(200, &json!({"repositories": offer.repositories, "account": found.account}))
            }
            None => message(401, "Bad credentials"),
        }
    }

    fn forget(&mut self, call: &Call<'_>, client_id: &str) -> Given {
        let body: Value = serde_json::from_slice(&call.asked.body).unwrap_or_default();
        let token = body["access_token"].as_str().unwrap_or_default();
        match self.server.client(call) {
            Ok(id) if id == client_id && self.server.revoke_grant_of(token) => Given::no_content(),
            Ok(_) => message(422, "Validation Failed"),
            Err(_) => message(401, "Bad credentials"),
        }
    }
}

fn reply(result: Result<Issued, OAuthError>) -> Given {
    let body = match result {
        Ok(Issued { access_token, refresh_token, expires_in, .. }) => json!({
            "access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in,
            "refresh_token_expires_in": 15_897_600, "token_type": "bearer", "scope": "",
        }),
        Err(("invalid_grant", why)) if why.contains("refresh") || why.contains("grant is over") => {
            json!({"error": "bad_refresh_token", "error_description": why})
        }
        Err(("invalid_grant", why)) => json!({"error": "bad_verification_code", "error_description": why}),
        Err(("invalid_client", why)) => json!({"error": "incorrect_client_credentials", "error_description": why}),
        Err((error, why)) => json!({"error": error, "error_description": why}),
    };
    answer(200, &body)
}

fn message(status: u16, message: &str) -> Given {
    answer(status, &json!({"message": message}))
}
