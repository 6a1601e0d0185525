//! Connect's side of a consent that a person gives: which page of which provider, what comes back, and what is kept of it.
//!
//! Under way are at most as many as fit; what a browser brings back must have the `state` that it was sent with, and the
//! code is worth nothing without the PKCE verifier, which stays here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::oauth::{Party, Started};
use super::settings::Settings;
use super::{Fetched, Held, Minted, Providers, Refused, Stored, hold, minted, provider_of, salesforce};
use crate::emulator::flow::{Decision, Flow, Status};
use crate::emulator::ids::random_id;
use crate::emulator::state::State;
use crate::emulator::world::{Connector, user_key};

/// More than these are not under way at once; the oldest go.
const MOST: usize = 100;

/// Where a consent goes on.
pub(in crate::emulator) enum Began {
    /// On the provider's page.
    Elsewhere(String),
    /// With a question of our own.
    Here,
}

/// A consent that a browser is away for.
#[derive(Clone)]
pub(in crate::emulator) struct Away {
    state: String,
    verifier: String,
    /// Which flow it is of.
    pub(in crate::emulator) request_code: String,
    /// Where to install.
    pub(in crate::emulator) tenant: Option<String>,
    connector: Connector,
    /// There is no code to come back: a GitHub app is merely installed.
    is_bare: bool,
}

/// What is under way.
#[derive(Default)]
pub(super) struct UnderWay {
    away: Mutex<Vec<Away>>,
    /// Device codes by request code.
    devices: Mutex<HashMap<String, (String, Connector)>>,
    /// CSRF tokens of our own questions, by request code.
    questions: Mutex<HashMap<String, String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Providers {
    /// The CSRF token of the question about a flow.
    pub(in crate::emulator) fn csrf(&self, request_code: &str) -> String {
        let mut questions = lock(&self.under_way.questions);
        if questions.len() >= MOST {
            questions.clear();
        }
        questions.entry(request_code.to_owned()).or_insert_with(|| random_id("", 32)).clone()
    }

    /// The consent that a browser comes back for. It comes back once.
    pub(in crate::emulator) fn back(&self, query: &[(String, String)]) -> Option<Away> {
        let state = query.iter().find(|(name, _)| name == "state").map(|(_, value)| value)?;
        let mut away = lock(&self.under_way.away);
        let at = away.iter().position(|away| away.state == *state)?;
        Some(away.remove(at))
    }
}

fn connector_of(state: &State, pending: &Flow) -> Option<Connector> {
    state.read(|kept| kept.world.find(&pending.connector).cloned())
}

/// Sends a browser to the provider.
pub(in crate::emulator) async fn begin(state: &State, providers: &Providers, pending: &Flow) -> Result<Began, Refused> {
    let connector = connector_of(state, pending).ok_or(Refused::new("no_connector"))?;
    let settings = Settings::of(&connector)?;
    let provider = provider_of(&connector.kind);
    let tenant = (pending.decision == Decision::Install).then(|| tenant(&connector, pending));
    if matches!(provider, "snowflake" | "api-key") {
        return Ok(Began::Here);
    }
    let (url, started, is_bare) = match (provider, &tenant) {
        ("github", Some(tenant)) => {
            let registered = providers.registered(&connector, &settings)?;
            let state = random_id("", 32);
            let query = form_urlencoded::Serializer::new(String::new())
                .extend_pairs([("state", state.as_str()), ("target", tenant)])
                .finish();
            let base = providers.standins.base(provider);
            let url = format!("{base}/apps/{}/installations/new?{query}", registered.client_id);
            (url.clone(), Started { url, state, verifier: String::new() }, true)
        }
        _ => {
            let party = providers.party(&connector, &settings).await?;
            let (scope_name, who) = match (&tenant, provider) {
                (Some(tenant), "slack") => ("scope", ("team", tenant.clone())),
                (Some(tenant), _) => ("scope", ("login_hint", tenant.clone())),
                (None, "slack") => ("user_scope", ("login_hint", user(state, pending))),
                (None, _) => ("scope", ("login_hint", user(state, pending))),
            };
            let mut further = vec![(who.0.to_owned(), who.1)];
            // Who asks for no prompt would get a consent that nobody gave.
            let wanted = pending.parameters.iter().filter(|(name, value)| *name != "prompt" || *value != "none");
            further.extend(wanted.map(|(name, value)| (name.clone(), value.clone())));
            let started = party.start(&pending.narrowing, scope_name, &further)?;
            (started.url.clone(), started, false)
        }
    };
    let Started { state, verifier, .. } = started;
    let mut away = lock(&providers.under_way.away);
    if away.len() >= MOST {
        away.remove(0);
    }
    away.push(Away { state, verifier, request_code: pending.request_code.clone(), tenant, connector, is_bare });
    Ok(Began::Elsewhere(url))
}

fn user(state: &State, pending: &Flow) -> String {
    let first = state.read(|kept| kept.world.members.first().map(|member| member.id.clone()));
    pending.user.clone().or(first).unwrap_or_else(|| "user".into())
}

fn tenant(connector: &Connector, pending: &Flow) -> String {
    let named = pending.installation.as_ref();
    let known = connector.installations.iter().find(|known| Some(&known.id) == named);
    let tenant = pending.tenant.clone().or(known.map(|known| known.tenant_id.clone()));
    tenant.unwrap_or_else(|| "T0ACME".into())
}

/// What a consent brought.
pub(in crate::emulator) struct Brought(Option<Fetched>, Connector);

/// Exchanges what a browser brought back.
pub(in crate::emulator) async fn finish(
    providers: &Providers,
    away: &Away,
    query: &[(String, String)],
    now: SystemTime,
) -> Result<Brought, Refused> {
    let of = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    if away.is_bare {
        return match (of("installation_id"), of("error")) {
            (Some(_), None) => Ok(Brought(None, away.connector.clone())),
            (_, error) => Err(Refused::new(error.unwrap_or("invalid_request"))),
        };
    }
    let party = party(providers, &away.connector).await?;
    let mut fetched = party.finish(&away.state, &away.verifier, query).await?;
    if provider_of(&away.connector.kind) == "salesforce" {
        fetched = salesforce::with_end(&party, fetched, now).await?;
    }
    Ok(Brought(Some(fetched), away.connector.clone()))
}

async fn party(providers: &Providers, connector: &Connector) -> Result<Party, Refused> {
    let settings = Settings::of(connector)?;
    providers.party(connector, &settings).await
}

/// Keeps what a consent brought, for the subject that the flow was settled for.
pub(in crate::emulator) fn keep(
    state: &State,
    providers: &Providers,
    request_code: &str,
    brought: Brought,
    now: SystemTime,
) {
    let Brought(Some(mut fetched), connector) = brought else { return };
    let Ok(settings) = Settings::of(&connector) else { return };
    let flow = state.read(|kept| kept.pending.iter().find(|flow| flow.request_code == request_code).cloned());
    let Some(flow) = flow else { return };
    let key = match (&flow.status, flow.decision) {
        (Status::Success { data }, Decision::Install) => {
            format!("app:{}", data["installationId"].as_str().unwrap_or_default())
        }
        (Status::Success { .. }, Decision::Authorize) => user_key(&user(state, &flow)),
        _ => return,
    };
    let mut held = Held { provider: providers.name(&connector, &settings), ..Held::default() };
    held.keep(&mut fetched);
    if held.refresh_token.is_none() {
        // There will be no other: it is given out as long as it lasts.
        let token: Minted = minted(&connector, fetched, now);
        held.tokens.push(Stored { narrowing: flow.narrowing, environment: None, token });
    }
    hold(state, &connector.id, &key, &held);
}

/// Begins with a device code: where the person goes, and the code to type there. `None` if the provider has none.
pub(in crate::emulator) async fn begin_device(
    state: &State,
    providers: &Providers,
    pending: &Flow,
) -> Option<(String, String)> {
    let connector = connector_of(state, pending).filter(|connector| provider_of(&connector.kind) == "oauth")?;
    let party = party(providers, &connector).await.ok()?;
    let who = [("login_hint".to_owned(), user(state, pending))];
    let started = party.start_device(&pending.narrowing, &who).await.ok()?;
    let mut devices = lock(&providers.under_way.devices);
    if devices.len() >= MOST {
        devices.clear();
    }
    devices.insert(pending.request_code.clone(), (started.device_code, connector));
    Some((started.verification_uri_complete.unwrap_or(started.verification_uri), started.user_code))
}

/// Asks the provider once how far a device code is. `None` if the flow has none.
pub(in crate::emulator) async fn poll(providers: &Providers, request_code: &str) -> Option<Result<Brought, Refused>> {
    let (device_code, connector) = lock(&providers.under_way.devices).get(request_code).cloned()?;
    let party = match party(providers, &connector).await {
        Ok(party) => party,
        Err(refused) => return Some(Err(refused)),
    };
    let polled = party.poll_device(&device_code).await;
    if !matches!(&polled, Err(refused) if matches!(refused.code(), "authorization_pending" | "slow_down" | "unreachable"))
    {
        lock(&providers.under_way.devices).remove(request_code);
    }
    Some(polled.map(|fetched| Brought(Some(fetched), connector)))
}
