//! GitHub, from Connect's side: a JWT of the app's key for a token of an installation, and the web flow for users.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::AUTHORIZATION;
use http::{Method, StatusCode};
use oauth2::HttpResponse;
use serde_json::{Map, Value, json};

use super::http::Http;
use super::oauth::{Endpoints, Party};
use super::{Fetched, Refused};
use crate::emulator::flow::Narrowing;
use crate::emulator::keys::{RsaKey, seconds};

/// How long the app's JWT lasts: within GitHub's ten minutes, whatever the clocks say.
const JWT_LIFE: u64 = 540;
/// For clocks that do not agree, as GitHub advises.
const BACKDATED: u64 = 60;

pub(super) fn endpoints(base: &str) -> Endpoints {
    Endpoints::new(format!("{base}/login/oauth/authorize"), format!("{base}/login/oauth/access_token"), None)
}

/// GitHub refuses with 200 and an `error`.
pub(super) fn dialect(mut response: HttpResponse) -> HttpResponse {
    let answer: Value = serde_json::from_slice(response.body()).unwrap_or_default();
    if answer.get("error").is_some() {
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    response
}

/// A token of an installation.
pub(super) async fn installation_token(
    http: &Http,
    base: &str,
    (client_id, private_key): (&str, &str),
    installation: u64,
    narrowing: &Narrowing,
    now: SystemTime,
) -> Result<Fetched, Refused> {
    let key = RsaKey::from_pem(private_key).map_err(|_| Refused::new("invalid_key"))?;
    let now = seconds(now);
    let jwt = key.sign(&json!({"iss": client_id, "iat": now - BACKDATED, "exp": now + JWT_LIFE}));
    let url = format!("{base}/app/installations/{installation}/access_tokens");
    let body = narrowed(narrowing)?;
    let headers = [(AUTHORIZATION, format!("Bearer {jwt}"))];
    let body = Value::Object(body).to_string().into_bytes();
    let (status, answer) = http.json(Method::POST, &url, &headers, body).await?;
    match (status, answer["token"].as_str()) {
        (201, Some(token)) => {
            let ends = answer["expires_at"].as_str().and_then(|time| humantime::parse_rfc3339_weak(time).ok());
            let lasts = ends.map(|ends| Duration::from_secs(seconds(ends).saturating_sub(now)));
            let further = answer.as_object().cloned().unwrap_or_default();
            Ok(Fetched { token: token.to_owned(), lasts, refresh_token: None, scopes: None, further })
        }
        (401, _) => Err(Refused::new("invalid_client")),
        (404, _) => Err(Refused::new("not_installed")),
        (403 | 422, _) => Err(Refused::new("invalid_scope")),
        _ => Err(Refused::new("invalid_answer")),
    }
}

/// What narrows a token of an installation: `authorizationDetails` of the type `github_app_installation` with
/// `repositories`, such as `acme/web`, and `permissions`, such as `contents:read`, and scopes that are written so. GitHub
/// apps have no scopes otherwise, and their tokens no audience but GitHub's API.
fn narrowed(narrowing: &Narrowing) -> Result<Map<String, Value>, Refused> {
    let (mut repositories, mut permissions) = (Vec::new(), Map::new());
    let mut permit = |text: &str| {
        let pair = text.split_once(':').filter(|(_, level)| ["read", "write", "admin"].contains(level));
        permissions.extend(pair.map(|(name, level)| (name.to_owned(), level.into())));
    };
    narrowing.named_scopes().into_iter().for_each(&mut permit);
    for details in narrowing.authorization_details.iter().flatten() {
        if details.get("type").and_then(Value::as_str) != Some("github_app_installation") {
            return Err(Refused::new("invalid_authorization_details"));
        }
        let list =
            |name: &str| details.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        list("permissions").for_each(&mut permit);
        let name = |repository: &str| repository.rsplit('/').next().unwrap_or_default().to_owned();
        repositories.extend(list("repositories").map(name));
    }
    let mut body = Map::new();
    if !repositories.is_empty() {
        body.insert("repositories".into(), repositories.into());
    }
    if !permissions.is_empty() {
        body.insert("permissions".into(), permissions.into());
    }
    Ok(body)
}

/// What an app is told besides an installation's token.
pub(super) fn metadata(further: &Map<String, Value>) -> Value {
    ["permissions", "repository_selection", "repositories"]
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), further.get(*key)?.clone())))
        .collect()
}

/// Ends a user's consent.
pub(super) async fn revoke_user(party: &Party, base: &str, access_token: &str) -> Result<(), Refused> {
    let secret = party.client_secret.as_deref().unwrap_or_default();
    let basic = BASE64_STANDARD.encode(format!("{}:{secret}", party.client_id));
    let url = format!("{base}/applications/{}/grant", party.client_id);
    let body = json!({"access_token": access_token}).to_string().into_bytes();
    match party.http.json(Method::DELETE, &url, &[(AUTHORIZATION, format!("Basic {basic}"))], body).await? {
        (204, _) => Ok(()),
        (_, answer) => Err(Refused::of(&answer)),
    }
}

/// Ends an installation's token.
pub(super) async fn revoke_installation_token(http: &Http, base: &str, token: &str) -> Result<(), Refused> {
    let url = format!("{base}/installation/token");
    match http.json(Method::DELETE, &url, &[(AUTHORIZATION, format!("Bearer {token}"))], Vec::new()).await? {
        (204, _) => Ok(()),
        (_, answer) => Err(Refused::of(&answer)),
    }
}
