//! What Connect answers: the five routes, who may use them, and the typed errors (connect-contract.md sections 1 and 2).

use std::time::{SystemTime, UNIX_EPOCH};

use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use super::ids::random_id;
use super::oidc::{Issuer, Rejection};
use super::world::{Connector, World};

/// A request.
pub struct Asked<'a> {
    /// Method.
    pub method: &'a Method,
    /// The raw request target.
    pub target: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// Raw body.
    pub body: &'a [u8],
}

/// An answer: a status and JSON, or no content.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    /// The status.
    pub status: StatusCode,
    /// `None` for 204.
    pub body: Option<Value>,
}

/// Who asks.
struct Caller {
    project_id: String,
    environment: Option<String>,
    /// An access token speaks for one user only; an OIDC token for the whole project.
    only_user: Option<String>,
}

type Refused = Given;

fn refused(status: u16, code: &str, message: impl Into<String>) -> Refused {
    error(status, &json!({"code": code, "message": message.into()}))
}

fn error(status: u16, error: &Value) -> Refused {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Given { status, body: Some(json!({ "error": error })) }
}

fn ok(body: Value) -> Given {
    Given { status: StatusCode::OK, body: Some(body) }
}

/// Decides a request at `now`.
pub fn decide(world: &mut World, issuer: &Issuer, now: SystemTime, asked: &Asked<'_>) -> Given {
    try_decide(world, issuer, now, asked).unwrap_or_else(|refused| refused)
}

fn try_decide(world: &mut World, issuer: &Issuer, now: SystemTime, asked: &Asked<'_>) -> Result<Given, Refused> {
    let (path, query) = asked.target.split_once('?').unwrap_or((asked.target, ""));
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let route = match (asked.method.as_str(), parts.as_slice()) {
        ("POST", ["v1", "connect", route @ ("token" | "authorize" | "install"), connector]) => (*route, *connector),
        ("GET", ["v1", "connect", "connectors", connector]) => ("metadata", *connector),
        ("DELETE", ["v1", "connect", "connectors", connector, "tokens"]) => ("revoke", *connector),
        _ => return Err(refused(404, "not_found", "The requested resource was not found.")),
    };
    let caller = authenticate(world, issuer, now, asked.headers, query)?;
    let body: Value = match asked.body {
        [] => json!({}),
        body => serde_json::from_slice(body).map_err(|_| refused(400, "bad_request", "Invalid JSON"))?,
    };
    let name = percent_decode(route.1);
    let connector =
        world.connector(&name).ok_or_else(|| refused(404, "not_found", format!("Connector {name} was not found.")))?;
    authorize_caller(&caller, connector)?;
    match route.0 {
        "token" => give_token(connector, &caller, &body, now),
        "authorize" | "install" => Ok(ok(json!({
            "url": format!("https://vercel.com/api/v1/connect/{}/{}?request_code={}", route.0, route.1, random_id("code", 16)),
            "request": random_id("req", 16),
            "verifier": random_id("ver", 24),
            "expiresAt": millis(now) + 600_000,
            "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.uid},
        }))),
        "metadata" => Ok(ok(json!({
            "id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.uid,
            "service": connector.kind, "createdAt": 1, "updatedAt": 2, "supportedSubjectTypes": ["app", "user"],
            "supportsInstallation": connector.needs_installation, "supportsRevocation": true,
        }))),
        _ => Ok(revoke(connector, &body)),
    }
}

fn authenticate(
    world: &World,
    issuer: &Issuer,
    now: SystemTime,
    headers: &HeaderMap,
    query: &str,
) -> Result<Caller, Refused> {
    let values: Vec<_> = headers.get_all(AUTHORIZATION).iter().collect();
    let bearer = match values.as_slice() {
        [one] => one.to_str().ok().and_then(|value| value.strip_prefix("Bearer ")),
        _ => None,
    };
    let not_authorized =
        |flag: &str| error(403, &json!({"code": "forbidden", "message": "Not authorized", flag: true}));
    let bearer = bearer.ok_or_else(|| not_authorized("missingToken"))?;
    if let Some(token) = world.access_tokens.iter().find(|token| token.secret == bearer) {
        let names_team = query == format!("teamId={}", world.team.id);
        return match names_team {
            true => Ok(Caller {
                project_id: token.project_id.clone(),
                environment: None,
                only_user: Some(token.user_id.clone()),
            }),
            false => Err(refused(403, "forbidden", "The access token needs the team in `teamId`.")),
        };
    }
    match issuer.verify(bearer, world, now) {
        Ok(claims) => {
            Ok(Caller { project_id: claims.project_id, environment: Some(claims.environment), only_user: None })
        }
        Err(Rejection::Expired) => Err(refused(401, "unauthorized", "The OIDC token has expired.")),
        Err(Rejection::Invalid) => Err(not_authorized("invalidToken")),
    }
}

fn authorize_caller(caller: &Caller, connector: &Connector) -> Result<(), Refused> {
    let link = connector
        .links
        .iter()
        .find(|link| link.project_id == caller.project_id)
        .ok_or_else(|| refused(403, "forbidden", "The Connector is not linked to this project."))?;
    match &caller.environment {
        Some(environment) if !link.environments.contains(environment) => {
            Err(refused(403, "forbidden", format!("The Connector is not enabled for the {environment} environment.")))
        }
        _ => Ok(()),
    }
}

fn give_token(connector: &Connector, caller: &Caller, body: &Value, now: SystemTime) -> Result<Given, Refused> {
    let subject = body.get("subject");
    let kind = subject.and_then(|s| s.get("type")).and_then(Value::as_str).unwrap_or("app");
    let user = subject.and_then(|s| s.get("id")).and_then(Value::as_str);
    let installation = match body.get("installationId").and_then(Value::as_str) {
        None | Some("*") => connector.installations.first(),
        Some(id) => connector.installations.iter().find(|installation| installation.id == id),
    };
    if connector.needs_installation && installation.is_none() {
        return Err(refused(422, "client_installation_required", "The connector must be installed first."));
    }
    match (kind, &caller.only_user) {
        ("app" | "jwt-bearer" | "token", _) => {}
        ("user", Some(only)) if user.is_some_and(|user| user != only) => {
            return Err(refused(403, "forbidden", "An access token can only request its own user."));
        }
        ("user", _) => {
            if !connector.granted_to.iter().any(|granted| user.is_none_or(|user| user == granted)) {
                return Err(refused(422, "user_authorization_required", "The user has not authorized the connector."));
            }
        }
        _ => return Err(refused(422, "unresolved_token", "The connector cannot serve this subject.")),
    }
    let prefix = match (connector.kind.as_str(), kind) {
        ("slack", "user") => "xoxp",
        ("slack", _) => "xoxb",
        ("github", "user") => "ghu",
        ("github", _) => "ghs",
        _ => "tok",
    };
    let separator = if connector.kind == "slack" { "-" } else { "_" };
    let mut given = json!({
        "token": format!("{prefix}{separator}{}", random_id("", 36)),
        "tokenId": random_id("stk", 20),
        "expiresAt": millis(now) + u64::try_from(connector.token_life.as_millis()).unwrap_or(u64::MAX / 2),
        "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind},
    });
    if let Some(installation) = installation {
        given["installationId"] = json!(installation.id);
        given["tenantId"] = json!(installation.tenant_id);
    }
    Ok(ok(given))
}

fn revoke(connector: &mut Connector, body: &Value) -> Given {
    let user = body.pointer("/subject/id").and_then(Value::as_str);
    let before = connector.granted_to.len();
    match (body.pointer("/subject/type").and_then(Value::as_str), user) {
        (Some("app"), _) => {}
        (_, Some(user)) => connector.granted_to.retain(|granted| granted != user),
        (_, None) => connector.granted_to.clear(),
    }
    let deleted = before - connector.granted_to.len();
    ok(
        json!({"tokensFound": deleted, "deleted": deleted, "providerRevoked": deleted, "providerSkipped": 0, "providerFailed": 0}),
    )
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX / 2))
}

fn percent_decode(segment: &str) -> String {
    let mut bytes = segment.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let mut hex = || bytes.next().and_then(|b| char::from(b).to_digit(16));
        decoded.push(match byte {
            b'%' => match (hex(), hex()) {
                (Some(high), Some(low)) => u8::try_from(high * 16 + low).unwrap_or_default(),
                _ => b'?',
            },
            byte => byte,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
