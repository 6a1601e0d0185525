//! Consents and installations in a browser: the pages that authorize and install lead to. They drive the provider's own
//! flow and settle what is pending with what comes of it.
//!
//! The page at `/api/v1/connect/{authorize,install}/{connector}` sends the browser on to the provider; who approves or
//! denies does so there. The provider sends it back to `/connect/callback`. A kind whose provider asks nobody, such as an
//! API key, is asked about here. With a device code the person goes to the provider by themselves, and whoever polls for
//! the result makes Connect poll the provider.

use http::StatusCode;
use serde_json::Value;

use super::Shared;
use super::errors::Refusal;
use super::exchange::{Asked, Given};
use super::flow::{Decision, Flow, Status};
use super::flows;
use super::gate::Visitors;
use super::pages::{self, Question};
use super::provider::{self, Began};

/// Who asks on these pages.
const WHO: &str = "Connect (emulated)";

/// Who comes to a path: people come to those that [`decide`] answers.
pub(super) fn visitors(path: &str) -> Visitors {
    match path == "/connect/callback" || path.starts_with("/api/v1/connect/") {
        true => Visitors::People,
        false => Visitors::Programs,
    }
}

/// Answers a browser's request; `None` if it is for another.
pub(super) async fn decide(shared: &Shared, asked: &Asked) -> Option<Given> {
    let (method, path) = asked.route();
    let given = match (method, path.as_slice()) {
        ("GET", ["api", "v1", "connect", name, connector]) => {
            page(shared, asked, Decision::named(name)?, connector).await
        }
        ("POST", ["api", "v1", "connect", name, connector]) => {
            answered(shared, asked, Decision::named(name)?, connector)
        }
        ("GET", ["connect", "callback"]) => callback(shared, asked).await,
        _ => return None,
    };
    Some(given.unwrap_or_else(|refusal| pages::sentence(refusal.status(), WHO, &refusal.message(), None)))
}

fn pending(shared: &Shared, asked: &Asked, decision: Decision, connector: &str) -> Result<Flow, Refusal> {
    let now = shared.now();
    shared.state.change(|kept| flows::open(kept, decision, connector, asked.query_pairs(), now).cloned())
}

/// What people call a connector, which goes by its id, too.
fn uid(shared: &Shared, connector: &str) -> String {
    let known = shared.state.read(|kept| kept.world.find(connector).map(|connector| connector.uid.clone()));
    known.unwrap_or_else(|| connector.to_owned())
}

/// The first page: on to the provider, or a question of our own.
async fn page(shared: &Shared, asked: &Asked, decision: Decision, connector: &str) -> Result<Given, Refusal> {
    let pending = pending(shared, asked, decision, connector)?;
    if pending.status != Status::Pending {
        return Ok(concluded(&pending));
    }
    match provider::begin(&shared.state, &shared.providers, &pending).await {
        Ok(Began::Elsewhere(url)) => Ok(Given::see_other(&url)),
        Ok(Began::Here) => Ok(pages::question(&Question {
            who: WHO,
            asks: format!("{} asks for your approval.", uid(shared, connector)),
            list: pending.narrowing.scopes.clone().unwrap_or_default(),
            // Only who was led here has the request code.
            csrf: &shared.providers.csrf(&pending.request_code),
        })),
        Err(refused) => settle(shared, &pending.request_code, Err(refused.code())),
    }
}

/// The answer to our own question.
fn answered(shared: &Shared, asked: &Asked, decision: Decision, connector: &str) -> Result<Given, Refusal> {
    let pending = pending(shared, asked, decision, connector)?;
    let form: Vec<(String, String)> = form_urlencoded::parse(&asked.body).into_owned().collect();
    let is_ours = pages::csrf_of(&asked.headers, &form) == Some(&shared.providers.csrf(&pending.request_code));
    if !is_ours {
        return Ok(pages::sentence(StatusCode::FORBIDDEN, WHO, "This form was not shown here.", None));
    }
    let approved = form.iter().any(|(name, value)| name == "decision" && value == "approve");
    settle(shared, &pending.request_code, if approved { Ok(None) } else { Err("access_denied") })
}

/// Back from the provider.
async fn callback(shared: &Shared, asked: &Asked) -> Result<Given, Refusal> {
    let now = shared.now();
    let Some(back) = shared.providers.back(asked.query_pairs()) else {
        let said = "This page belongs to no consent that is under way.";
        return Ok(pages::sentence(StatusCode::BAD_REQUEST, WHO, said, None));
    };
    match provider::finish(&shared.providers, &back, asked.query_pairs(), now).await {
        Ok(brought) => {
            let given = settle(shared, &back.request_code, Ok(back.tenant.as_deref()))?;
            // After the settlement, which makes room for it.
            provider::keep(&shared.state, &shared.providers, &back.request_code, brought, now);
            Ok(given)
        }
        Err(refused) => settle(shared, &back.request_code, Err(refused.code())),
    }
}

/// Settles a flow by what came of it at the provider: `Ok` with the tenant if that is known, or an error code.
fn settle(shared: &Shared, request_code: &str, came: Result<Option<&str>, &str>) -> Result<Given, Refusal> {
    let now = shared.now();
    let settled = shared.state.change(|kept| match came {
        Ok(tenant) => flows::approve(kept, request_code, None, tenant, now),
        Err("access_denied") => flows::deny(kept, request_code, now),
        Err(code) => flows::fail(kept, request_code, code, now),
    })?;
    Ok(concluded(&settled))
}

/// The last page. It has a link back to the app and does not go there by itself, since that is another's page.
fn concluded(pending: &Flow) -> Given {
    let said = match &pending.status {
        Status::Success { .. } => "Approved. You can close this window.",
        Status::Canceled => "Denied. Nothing was given.",
        _ => "It did not work: the provider refused.",
    };
    pages::sentence(StatusCode::OK, WHO, said, pending.return_url.as_deref().filter(|url| is_web(url)))
}

fn is_web(url: &str) -> bool {
    url.starts_with("https://") || url.starts_with("http://")
}

/// Asks the provider how far a device code is, if the flow of a verifier has one; then settles it.
pub(super) async fn progress(shared: &Shared, verifier: &str) {
    let (code, now) = (flows::request_code(verifier), shared.now());
    match provider::poll(&shared.providers, &code).await {
        Some(Ok(brought)) if settle(shared, &code, Ok(None)).is_ok() => {
            provider::keep(&shared.state, &shared.providers, &code, brought, now);
        }
        Some(Err(refused)) if !matches!(refused.code(), "authorization_pending" | "slow_down" | "unreachable") => {
            let _ = settle(shared, &code, Err(refused.code()));
        }
        _ => {}
    }
}

/// Begins with a device code, if the provider has them: where the person goes, and the code to type there.
pub(super) async fn with_device(shared: &Shared, pending: &Flow, answer: &mut Value) {
    if let Some((url, user_code)) = provider::begin_device(&shared.state, &shared.providers, pending).await {
        answer["url"] = url.into();
        answer["deviceCode"] = user_code.into();
    }
}
