//! The browser pages for consents and installations. They run the provider's own flow and decide the pending flow with
//! its outcome.
//!
//! The page at `/api/v1/connect/{authorize,install}/{connector}` redirects the browser to the provider, where the
//! person approves or denies. The provider redirects it back to `/connect/callback`. If the provider has no such page,
//! as for API keys, the question is shown here. With a device code, the person opens the provider's page themselves,
//! and each poll for the result polls the provider.

use http::StatusCode;
use serde_json::Value;

use super::Shared;
use super::access::Audience;
use super::errors::Refusal;
use super::flow::{Decision, Flow, Status};
use super::flows;
use super::message::{Request, Response};
use super::pages::{self, Question};
use super::provider_client::{self, ConsentPage};

/// The heading of these pages.
const TITLE: &str = "Connect (emulated)";

/// Who may use a path: browsers may only use those that [`handle`] handles.
pub(super) fn audience(path: &str) -> Audience {
    match path == "/connect/callback" || path.starts_with("/api/v1/connect/") {
        true => Audience::Browsers,
        false => Audience::Programs,
    }
}

/// Handles the pages; `None` for other routes.
pub(super) async fn handle(shared: &Shared, request: &Request) -> Option<Response> {
    let (method, path) = request.route();
    let response = match (method, path.as_slice()) {
        ("GET", ["api", "v1", "connect", name, connector]) => {
            page(shared, request, Decision::from_name(name)?, connector).await
        }
        ("POST", ["api", "v1", "connect", name, connector]) => {
            submit(shared, request, Decision::from_name(name)?, connector)
        }
        ("GET", ["connect", "callback"]) => callback(shared, request).await,
        _ => return None,
    };
    Some(response.unwrap_or_else(|refusal| pages::sentence(refusal.status(), TITLE, &refusal.message(), None)))
}

fn open_flow(shared: &Shared, request: &Request, decision: Decision, connector: &str) -> Result<Flow, Refusal> {
    let now = shared.now();
    shared.store.change(|contents| flows::open(contents, decision, connector, request.query_pairs(), now).cloned())
}

/// The uid of a connector that is named by uid or id.
fn uid(shared: &Shared, connector: &str) -> String {
    let known =
        shared.store.read(|contents| contents.world.connector(connector).map(|connector| connector.uid.clone()));
    known.unwrap_or_else(|| connector.to_owned())
}

/// The first page: redirects to the provider or shows the question.
async fn page(shared: &Shared, request: &Request, decision: Decision, connector: &str) -> Result<Response, Refusal> {
    let flow = open_flow(shared, request, decision, connector)?;
    if flow.status != Status::Pending {
        return Ok(last_page(&flow));
    }
    match provider_client::begin(&shared.store, &shared.providers, &flow).await {
        Ok(ConsentPage::AtProvider(url)) => Ok(Response::see_other(&url)),
        Ok(ConsentPage::Local) => Ok(pages::question(&Question {
            title: TITLE,
            question: format!("{} asks for your approval.", uid(shared, connector)),
            items: flow.narrowing.scopes.clone().unwrap_or_default(),
            csrf: &shared.providers.csrf(&flow.request_code),
        })),
        Err(refusal) => decide(shared, &flow.request_code, Err(refusal.code())),
    }
}

/// The form of the question.
fn submit(shared: &Shared, request: &Request, decision: Decision, connector: &str) -> Result<Response, Refusal> {
    let flow = open_flow(shared, request, decision, connector)?;
    let form: Vec<(String, String)> = form_urlencoded::parse(&request.body).into_owned().collect();
    let is_valid = pages::csrf_of(&request.headers, &form) == Some(&shared.providers.csrf(&flow.request_code));
    if !is_valid {
        return Ok(pages::sentence(StatusCode::FORBIDDEN, TITLE, "This form was not shown here.", None));
    }
    let approved = form.iter().any(|(name, value)| name == "decision" && value == "approve");
    decide(shared, &flow.request_code, if approved { Ok(None) } else { Err("access_denied") })
}

/// The redirect back from the provider.
async fn callback(shared: &Shared, request: &Request) -> Result<Response, Refusal> {
    let now = shared.now();
    let Some(redirect) = shared.providers.take_redirect(request.query_pairs()) else {
        let sentence = "This page does not belong to a consent in progress.";
        return Ok(pages::sentence(StatusCode::BAD_REQUEST, TITLE, sentence, None));
    };
    match provider_client::finish(&shared.providers, &redirect, request.query_pairs(), now).await {
        Ok(result) => {
            let response = decide(shared, &redirect.request_code, Ok(redirect.tenant.as_deref()))?;
            // Only now: the approval removes the tokens of an earlier consent.
            provider_client::store_consent(&shared.store, &shared.providers, &redirect.request_code, result, now);
            Ok(response)
        }
        Err(refusal) => decide(shared, &redirect.request_code, Err(refusal.code())),
    }
}

/// Decides a flow by the provider's outcome: `Ok` with the tenant if known, or an error code.
fn decide(shared: &Shared, request_code: &str, outcome: Result<Option<&str>, &str>) -> Result<Response, Refusal> {
    let now = shared.now();
    let flow = shared.store.change(|contents| match outcome {
        Ok(tenant) => flows::approve(contents, request_code, None, tenant, now),
        Err("access_denied") => flows::deny(contents, request_code, now),
        Err(code) => flows::fail(contents, request_code, code, now),
    })?;
    Ok(last_page(&flow))
}

/// The last page. It links to the return URL instead of redirecting, since that is another site.
fn last_page(flow: &Flow) -> Response {
    let sentence = match &flow.status {
        Status::Success { .. } => "Approved. You can close this window.",
        Status::Canceled => "Denied. No access was granted.",
        _ => "The provider refused the request.",
    };
    pages::sentence(StatusCode::OK, TITLE, sentence, flow.return_url.as_deref().filter(|url| is_web(url)))
}

fn is_web(url: &str) -> bool {
    url.starts_with("https://") || url.starts_with("http://")
}

/// Polls the provider for the flow of a verifier, if it has a device code, and decides the flow by the outcome.
pub(super) async fn poll_device(shared: &Shared, verifier: &str) {
    let (code, now) = (flows::request_code(verifier), shared.now());
    match provider_client::poll(&shared.providers, &code).await {
        Some(Ok(result)) if decide(shared, &code, Ok(None)).is_ok() => {
            provider_client::store_consent(&shared.store, &shared.providers, &code, result, now);
        }
        Some(Err(refusal)) if !refusal.is_temporary() => {
            let _ = decide(shared, &code, Err(refusal.code()));
        }
        _ => {}
    }
}

/// Requests a device code, if the provider supports them, and adds the provider's URL and user code to the response.
pub(super) async fn begin_device(shared: &Shared, flow: &Flow, response_body: &mut Value) {
    if let Some((url, user_code)) = provider_client::begin_device(&shared.store, &shared.providers, flow).await {
        response_body["url"] = url.into();
        response_body["deviceCode"] = user_code.into();
    }
}
