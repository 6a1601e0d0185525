//! An OAuth 2.0 authorization server, without its wire: who may have what, and for how long. The providers put it on the
//! wire, each in its way.
//!
//! RFC 6749 with PKCE (7636), refresh tokens that rotate and whose reuse ends the grant (9700 section 4.14), revocation
//! (7009), introspection (7662), device codes (8628), resources (8707) and authorization details (9396).

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::StatusCode;
use serde_json::Value;

use super::{App, Call};
use crate::emulator::exchange::Given;
use crate::emulator::ids::random_id;
use crate::emulator::keys::RsaKey;
use crate::emulator::pages::{self, Question};

/// How long a code can be redeemed.
const CODE_LIFE: Duration = Duration::from_secs(60);
/// How long a device code can be redeemed.
pub(super) const DEVICE_LIFE: Duration = Duration::from_secs(600);
/// How long one waits between polls with a device code.
pub(super) const DEVICE_INTERVAL: Duration = Duration::from_secs(5);

/// An assertion may last an hour, in seconds.
const LONGEST_ASSERTION: u64 = 3600;

/// What differs between providers.
#[derive(Debug)]
pub(super) struct Rules {
    /// What users call it.
    pub name: &'static str,
    /// Whether an authorization without PKCE is refused. With it, S256 is the only method.
    pub pkce_required: bool,
    /// Whether assertions (RFC 7523) and others' tokens (RFC 8693) are exchanged.
    pub takes_assertions: bool,
    /// What its access tokens begin with, by who they are for.
    pub access_prefix: fn(&str) -> &'static str,
    /// What its refresh tokens begin with.
    pub refresh_prefix: &'static str,
    /// How long a refresh token lasts without use.
    pub refresh_life: Duration,
    /// The types of authorization details that it knows.
    pub detail_types: &'static [&'static str],
}

/// An authorization server's state.
#[derive(Debug)]
pub(super) struct Server {
    rules: Rules,
    clients: HashMap<String, Client>,
    /// Who has consented to which client.
    consents: HashSet<(String, String)>,
    /// What people are being asked, by the form's CSRF token.
    questions: HashMap<String, Wanted>,
    codes: HashMap<String, Code>,
    grants: Vec<Grant>,
    refresh: HashMap<String, Refresh>,
    access: HashMap<String, Access>,
    devices: HashMap<String, Device>,
}

#[derive(Debug)]
struct Client {
    app: App,
    secret: String,
}

/// What a client wants.
#[derive(Debug, Clone)]
struct Wanted {
    client_id: String,
    who: String,
    reach: Reach,
    nonce: Option<String>,
    back: Back,
}

/// How the client learns of the decision.
#[derive(Debug, Clone)]
enum Back {
    Redirect { uri: String, state: String, challenge: Option<String> },
    Device { code: String },
}

/// How far a token reaches.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reach {
    /// Scopes; everything that the client may have if it is empty.
    pub scopes: Vec<String>,
    /// Resources and audiences.
    pub targets: Vec<String>,
    /// Authorization details.
    pub details: Vec<Value>,
}

#[derive(Debug)]
struct Code {
    wanted: Wanted,
    ends: SystemTime,
    /// The grant that it was redeemed for.
    used: Option<usize>,
}

/// A consent in force.
#[derive(Debug, Clone)]
struct Grant {
    client_id: String,
    who: String,
    reach: Reach,
    nonce: Option<String>,
    is_over: bool,
}

#[derive(Debug)]
struct Refresh {
    grant: usize,
    ends: SystemTime,
    is_used: bool,
}

/// A token that was issued.
#[derive(Debug, Clone)]
pub(super) struct Access {
    pub client_id: String,
    pub who: String,
    pub reach: Reach,
    pub ends: SystemTime,
    grant: usize,
}

#[derive(Debug)]
struct Device {
    wanted: Wanted,
    user_code: String,
    ends: SystemTime,
    polled: Option<SystemTime>,
    decision: Option<bool>,
}

/// What a token request got.
#[derive(Debug)]
pub(super) struct Issued {
    pub access_token: String,
    pub refresh_token: Option<String>,
    pub expires_in: u64,
    pub access: Access,
    /// The `nonce` of the authorization.
    pub nonce: Option<String>,
}

/// An error code and what it means here.
pub(super) type OAuthError = (&'static str, &'static str);

impl Server {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            clients: HashMap::new(),
            consents: HashSet::new(),
            questions: HashMap::new(),
            codes: HashMap::new(),
            grants: Vec::new(),
            refresh: HashMap::new(),
            access: HashMap::new(),
            devices: HashMap::new(),
        }
    }

    pub(super) fn register(&mut self, app: &App) -> (String, String) {
        let id = format!("client-{}", app.name);
        let client = self
            .clients
            .entry(id.clone())
            .or_insert_with(|| Client { app: app.clone(), secret: random_id("secret", 32) });
        client.app = app.clone();
        (id, client.secret.clone())
    }

    pub(super) fn app(&self, client_id: &str) -> Option<&App> {
        self.clients.get(client_id).map(|client| &client.app)
    }

    pub(super) fn consent(&mut self, client_id: &str, who: &str) {
        self.consents.insert((client_id.to_owned(), who.to_owned()));
    }

    pub(super) fn withdraw(&mut self, client_id: &str, who: Option<&str>) {
        let concerns = |client: &str, of: &str| client == client_id && who.is_none_or(|who| who == of);
        self.consents.retain(|(client, of)| !concerns(client, of));
        self.grants.iter_mut().filter(|g| concerns(&g.client_id, &g.who)).for_each(|grant| grant.is_over = true);
    }

    /// The authorization endpoint in a browser: a question, an immediate redirect (`prompt=none`), or an error page.
    pub(super) fn authorize(&mut self, call: &Call<'_>) -> Given {
        let query = |name| call.asked.query(name);
        let Some(client) = query("client_id").and_then(|id| self.clients.get(id)) else {
            return self.error_page("There is no such client_id.");
        };
        // Nobody is sent where the client did not say before.
        let Some(uri) = query("redirect_uri").filter(|uri| client.app.redirect_uris.iter().any(|r| r == uri)) else {
            return self.error_page("This redirect_uri is not registered.");
        };
        let state = query("state").unwrap_or_default();
        let refuse = |(error, description)| {
            redirect(uri, &[("error", error), ("error_description", description), ("state", state)])
        };
        let wanted = match self.wanted(call, client, uri, state) {
            Ok(wanted) => wanted,
            Err(error) => return refuse(error),
        };
        if query("prompt") == Some("none") {
            let has_consented = self.consents.contains(&(wanted.client_id.clone(), wanted.who.clone()));
            return match has_consented {
                true => self.decided(wanted, true, call.now),
                false => refuse(("consent_required", "nobody has consented")),
            };
        }
        self.ask(wanted)
    }

    fn wanted(&self, call: &Call<'_>, client: &Client, uri: &str, state: &str) -> Result<Wanted, OAuthError> {
        let query = |name| call.asked.query(name);
        if query("response_type") != Some("code") {
            return Err(("unsupported_response_type", "only `code`"));
        }
        let challenge = match (query("code_challenge"), query("code_challenge_method")) {
            (Some(challenge), Some("S256")) if challenge.len() == 43 => Some(challenge.to_owned()),
            (None, None) if !self.rules.pkce_required => None,
            (None, _) => return Err(("invalid_request", "PKCE is required: code_challenge is missing")),
            _ => return Err(("invalid_request", "PKCE is by S256 alone")),
        };
        let pairs = call.asked.query_pairs();
        let reach = self.reach(pairs, &client.app, None)?;
        Ok(Wanted {
            client_id: query("client_id").unwrap_or_default().to_owned(),
            who: query("team").or(query("login_hint")).unwrap_or("user").to_owned(),
            reach,
            nonce: query("nonce").map(str::to_owned),
            back: Back::Redirect { uri: uri.to_owned(), state: state.to_owned(), challenge },
        })
    }

    /// How far a request wants a token to reach, which may not be further than the client may, nor than what it is based
    /// on.
    fn reach(&self, pairs: &[(String, String)], app: &App, granted: Option<&Reach>) -> Result<Reach, OAuthError> {
        let all = |names: &'static [&str]| {
            pairs.iter().filter(|(name, _)| names.contains(&name.as_str())).map(|(_, value)| value.clone())
        };
        let scopes: Vec<String> = all(&["scope", "user_scope"])
            .flat_map(|scopes| scopes.split([' ', ',']).map(str::to_owned).collect::<Vec<_>>())
            .filter(|scope| !scope.is_empty())
            .collect();
        let within = |wanted: &[String], allowed: &[String]| {
            allowed.is_empty() || wanted.iter().all(|wanted| allowed.contains(wanted))
        };
        let none = Reach::default();
        let granted = granted.unwrap_or(&none);
        if !within(&scopes, &app.scopes) || !within(&scopes, &granted.scopes) {
            return Err(("invalid_scope", "more scopes than there can be"));
        }
        let targets: Vec<String> = all(&["resource", "audience"]).collect();
        let is_absolute =
            |uri: String| uri.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some()) && !uri.contains('#');
        if !all(&["resource"]).all(is_absolute)
            || !within(&targets, &app.resources)
            || !within(&targets, &granted.targets)
        {
            return Err(("invalid_target", "not a resource that there can be a token for"));
        }
        let mut details = Vec::new();
        for text in all(&["authorization_details"]) {
            let Ok(Value::Array(list)) = serde_json::from_str(&text) else {
                return Err(("invalid_authorization_details", "not an array"));
            };
            details.extend(list);
        }
        let known =
            |detail: &Value| detail["type"].as_str().is_some_and(|kind| self.rules.detail_types.contains(&kind));
        let is_granted = |detail: &Value| granted.details.is_empty() || granted.details.contains(detail);
        if !details.iter().all(|detail| known(detail) && is_granted(detail)) {
            return Err(("invalid_authorization_details", "a type that is not known here, or more than was granted"));
        }
        let or_granted = |wanted: Vec<String>, granted: &[String], allowed: &[String]| match (&*wanted, granted) {
            ([], []) => allowed.to_vec(),
            ([], granted) => granted.to_vec(),
            _ => wanted,
        };
        Ok(Reach {
            scopes: or_granted(scopes, &granted.scopes, &app.scopes),
            targets: or_granted(targets, &granted.targets, &[]),
            details: if details.is_empty() { granted.details.clone() } else { details },
        })
    }

    fn ask(&mut self, wanted: Wanted) -> Given {
        let csrf = random_id("", 32);
        let client = self.clients.get(&wanted.client_id).map_or("An app", |client| client.app.shown());
        let given = pages::question(&Question {
            who: self.rules.name,
            asks: format!("{client} asks for access as {}.", wanted.who),
            list: wanted.reach.scopes.iter().chain(&wanted.reach.targets).cloned().collect(),
            csrf: &csrf,
        });
        self.questions.insert(csrf, wanted);
        given
    }

    /// The answer to a question, from its form.
    pub(super) fn decide(&mut self, call: &Call<'_>) -> Given {
        let wanted = pages::csrf_of(&call.asked.headers, &call.form).and_then(|csrf| self.questions.remove(csrf));
        let Some(wanted) = wanted else {
            return self.error_page("This form is not from a page that was shown here, or was sent before.");
        };
        self.decided(wanted, call.form("decision") == Some("approve"), call.now)
    }

    fn decided(&mut self, wanted: Wanted, approved: bool, now: SystemTime) -> Given {
        if approved {
            self.consents.insert((wanted.client_id.clone(), wanted.who.clone()));
        }
        match &wanted.back {
            Back::Device { code } => {
                if let Some(device) = self.devices.get_mut(code) {
                    device.decision = Some(approved);
                }
                let said = if approved { "Approved. You can close this window." } else { "Denied." };
                pages::sentence(StatusCode::OK, self.rules.name, said, None)
            }
            Back::Redirect { uri, state, .. } if !approved => {
                let description = "the user said no";
                redirect(uri, &[("error", "access_denied"), ("error_description", description), ("state", state)])
            }
            Back::Redirect { uri, state, .. } => {
                let code = random_id("code", 32);
                let given = redirect(uri, &[("code", &code), ("state", state)]);
                self.codes.insert(code, Code { wanted, ends: now + CODE_LIFE, used: None });
                given
            }
        }
    }

    fn error_page(&self, sentence: &str) -> Given {
        pages::sentence(StatusCode::BAD_REQUEST, self.rules.name, sentence, None)
    }

    /// Authenticates the client by Basic or by the form; not by both.
    pub(super) fn client(&self, call: &Call<'_>) -> Result<String, OAuthError> {
        let invalid = ("invalid_client", "no such client, or not its secret");
        let (id, secret) = match (call.basic(), call.form("client_secret")) {
            (Some(pair), None) => pair,
            (None, Some(secret)) => (call.form("client_id").unwrap_or_default().to_owned(), secret.to_owned()),
            _ => return Err(invalid),
        };
        let client = self.clients.get(&id).ok_or(invalid)?;
        verify_slices_are_equal(client.secret.as_bytes(), secret.as_bytes()).map_err(|_| invalid)?;
        call.prove("client secret");
        Ok(id)
    }

    /// The token endpoint.
    pub(super) fn token(&mut self, call: &Call<'_>) -> Result<Issued, OAuthError> {
        let client_id = self.client(call)?;
        // `oauth.v2.access` takes a code without a grant type.
        match call.form("grant_type").unwrap_or("authorization_code") {
            "authorization_code" => self.redeem_code(call, &client_id),
            "refresh_token" => self.redeem_refresh_token(call, &client_id),
            "urn:ietf:params:oauth:grant-type:device_code" => self.redeem_device_code(call, &client_id),
            "client_credentials" => self.issue_once(call, &client_id, &client_id),
            "urn:ietf:params:oauth:grant-type:jwt-bearer" if self.rules.takes_assertions => {
                let key = RsaKey::of_this_process().map_err(|_| ("server_error", "no key"))?;
                let assertion = call.form("assertion").unwrap_or_default();
                let claims =
                    key.verify(assertion, call.now, LONGEST_ASSERTION).map_err(|why| ("invalid_grant", why))?;
                call.prove("assertion RS256");
                self.issue_once(call, &client_id, claims["sub"].as_str().unwrap_or(&client_id))
            }
            "urn:ietf:params:oauth:grant-type:token-exchange" if self.rules.takes_assertions => {
                // Whose token it is only its issuer could say; here everybody's is good, and is told by its hash.
                let token = call.form("subject_token").ok_or(("invalid_request", "subject_token is missing"))?;
                let who = BASE64_URL_SAFE_NO_PAD.encode(&digest(&SHA256, token.as_bytes()).as_ref()[..6]);
                self.issue_once(call, &client_id, &who)
            }
            _ => Err(("unsupported_grant_type", "not here")),
        }
    }

    /// A token without a refresh token.
    fn issue_once(&mut self, call: &Call<'_>, client_id: &str, who: &str) -> Result<Issued, OAuthError> {
        let reach = self.reach(&call.form, &self.clients[client_id].app, None)?;
        let grant = self.grant(client_id, who, reach.clone(), None);
        Ok(self.issue(grant, reach, call.now, false))
    }

    fn redeem_code(&mut self, call: &Call<'_>, client_id: &str) -> Result<Issued, OAuthError> {
        let invalid = |why| ("invalid_grant", why);
        let code = call.form("code").and_then(|code| self.codes.get_mut(code)).ok_or(invalid("no such code"))?;
        if let Some(grant) = code.used {
            // Whoever has it a second time may have stolen it.
            self.grants[grant].is_over = true;
            return Err(invalid("the code was used before"));
        }
        let Back::Redirect { uri, challenge, .. } = &code.wanted.back else { return Err(invalid("no such code")) };
        if code.wanted.client_id != client_id || call.now >= code.ends {
            return Err(invalid("another client's code, or over"));
        }
        if call.form("redirect_uri") != Some(uri) {
            return Err(invalid("another redirect_uri than at the authorization"));
        }
        match (challenge, call.form("code_verifier")) {
            (None, None) => {}
            (Some(challenge), Some(verifier)) => {
                if BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes())) != *challenge {
                    return Err(invalid("the code_verifier is not that of the code_challenge"));
                }
                call.prove("PKCE S256");
            }
            _ => return Err(invalid("code_challenge and code_verifier go together")),
        }
        let wanted = code.wanted.clone();
        let key = call.form("code").unwrap_or_default();
        let grant = self.grant(client_id, &wanted.who, wanted.reach.clone(), wanted.nonce.clone());
        if let Some(code) = self.codes.get_mut(key) {
            code.used = Some(grant);
        }
        Ok(self.issue(grant, wanted.reach, call.now, true))
    }

    fn redeem_refresh_token(&mut self, call: &Call<'_>, client_id: &str) -> Result<Issued, OAuthError> {
        let invalid = |why| ("invalid_grant", why);
        let token = call.form("refresh_token").unwrap_or_default();
        let refresh = self.refresh.get(token).ok_or(invalid("no such refresh token"))?;
        let grant = &self.grants[refresh.grant];
        if grant.client_id != client_id {
            return Err(invalid("another client's refresh token"));
        }
        let number = refresh.grant;
        if refresh.is_used {
            // Whoever has it a second time may have stolen it; the one who rotated it as well.
            self.grants[number].is_over = true;
            return Err(invalid("the refresh token was used before: the grant is over"));
        }
        if grant.is_over || call.now >= refresh.ends {
            return Err(invalid("the grant is over"));
        }
        let reach = self.reach(&call.form, &self.clients[client_id].app, Some(&grant.reach))?;
        if let Some(refresh) = self.refresh.get_mut(token) {
            refresh.is_used = true;
        }
        call.prove("refresh token");
        Ok(self.issue(number, reach, call.now, true))
    }

    fn redeem_device_code(&mut self, call: &Call<'_>, client_id: &str) -> Result<Issued, OAuthError> {
        let code = call.form("device_code").unwrap_or_default();
        let device = self.devices.get_mut(code).filter(|device| device.wanted.client_id == client_id);
        let device = device.ok_or(("invalid_grant", "no such device code"))?;
        if call.now >= device.ends {
            return Err(("expired_token", "nobody decided in time"));
        }
        let too_early = device.polled.is_some_and(|polled| call.now < polled + DEVICE_INTERVAL);
        device.polled = Some(call.now);
        match device.decision {
            None if too_early => Err(("slow_down", "polled too often")),
            None => Err(("authorization_pending", "nobody has decided yet")),
            Some(false) => Err(("access_denied", "the user said no")),
            Some(true) => {
                let wanted = device.wanted.clone();
                self.devices.remove(code);
                call.prove("device code");
                let grant = self.grant(client_id, &wanted.who, wanted.reach.clone(), wanted.nonce);
                Ok(self.issue(grant, wanted.reach, call.now, true))
            }
        }
    }

    fn grant(&mut self, client_id: &str, who: &str, reach: Reach, nonce: Option<String>) -> usize {
        let (client_id, who) = (client_id.to_owned(), who.to_owned());
        self.grants.push(Grant { client_id, who, reach, nonce, is_over: false });
        self.grants.len() - 1
    }

    fn issue(&mut self, number: usize, reach: Reach, now: SystemTime, can_refresh: bool) -> Issued {
        let Grant { client_id, who, nonce, .. } = self.grants[number].clone();
        let life = self.clients[&client_id].app.token_life;
        let access_token = format!("{}{}", (self.rules.access_prefix)(&who), random_id("", 40));
        let access = Access { client_id, who, reach, ends: now + Duration::from_secs(life), grant: number };
        self.access.insert(access_token.clone(), access.clone());
        let refresh_token = can_refresh.then(|| format!("{}{}", self.rules.refresh_prefix, random_id("", 48)));
        if let Some(token) = &refresh_token {
            let ends = now + self.rules.refresh_life;
            self.refresh.insert(token.clone(), Refresh { grant: number, ends, is_used: false });
        }
        Issued { access_token, refresh_token, expires_in: life, access, nonce }
    }

    /// An access token in force.
    pub(super) fn access(&self, token: &str, now: SystemTime) -> Option<&Access> {
        self.access.get(token).filter(|access| now < access.ends && !self.grants[access.grant].is_over)
    }

    /// Ends a token; with a refresh token, all of its grant. Tells whether there was anything to end.
    pub(super) fn revoke(&mut self, token: &str) -> bool {
        let grant = self.refresh.get(token).map(|refresh| refresh.grant);
        if let Some(number) = grant {
            let Grant { client_id, who, .. } = self.grants[number].clone();
            self.consents.remove(&(client_id, who));
            self.grants[number].is_over = true;
        }
        self.access.remove(token).is_some() || grant.is_some()
    }

    /// Ends all that a token's owner has given to a client.
    pub(super) fn revoke_grant_of(&mut self, token: &str) -> bool {
        let access = self.access.get(token).map(|access| (access.client_id.clone(), access.who.clone()));
        if let Some((client_id, who)) = &access {
            self.withdraw(client_id, Some(who));
        }
        access.is_some()
    }

    /// The device authorization endpoint: a device code and a user code.
    pub(super) fn begin_device(&mut self, call: &Call<'_>) -> Result<(String, String), OAuthError> {
        let client_id = self.client(call)?;
        let reach = self.reach(&call.form, &self.clients[&client_id].app, None)?;
        let code = random_id("device", 32);
        let user_code = random_id("", 8).to_uppercase();
        let who = call.form("login_hint").unwrap_or("user").to_owned();
        let wanted = Wanted { client_id, who, reach, nonce: None, back: Back::Device { code: code.clone() } };
        let ends = call.now + DEVICE_LIFE;
        let device = Device { wanted, user_code: user_code.clone(), ends, polled: None, decision: None };
        self.devices.insert(code.clone(), device);
        Ok((code, user_code))
    }

    /// The page for a user code.
    pub(super) fn device_page(&mut self, call: &Call<'_>) -> Given {
        let code = call.asked.query("user_code").unwrap_or_default();
        let open = |device: &&Device| device.user_code == code && device.decision.is_none() && call.now < device.ends;
        match self.devices.values().find(open).map(|device| device.wanted.clone()) {
            Some(wanted) => self.ask(wanted),
            None => self.error_page("There is no such code, or it is over."),
        }
    }
}

/// Back to the client.
pub(super) fn redirect(uri: &str, pairs: &[(&str, &str)]) -> Given {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(pairs.iter().filter(|(_, value)| !value.is_empty()));
    let separator = if uri.contains('?') { '&' } else { '?' };
    Given::see_other(&format!("{uri}{separator}{}", query.finish()))
}
