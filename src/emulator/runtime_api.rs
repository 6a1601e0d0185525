//! The runtime API that apps call: tokens, consents, metadata and revocation (docs/vercel.md section 1.1).

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::caller::Caller;
use super::consent_pages;
use super::errors::{Kind, Refusal};
use super::flow::{Decision, Flow, Narrowing};
use super::flows;
use super::ids::{millis, random_id};
use super::limits::Class;
use super::management_api;
use super::message::{Request, Response};
use super::provider_client::{self, IssuedToken, ProviderRequest, Subject};
use super::world::{Connector, ImportedToken, Installation, Permission, World, user_key};

/// Handles the runtime routes; `None` for other routes.
pub(super) async fn handle(shared: &Shared, request: &Request) -> Option<Result<Response, Refusal>> {
    Some(match request.route() {
        ("POST", path) => match path.as_slice() {
            ["v1", "connect", "token", connector] => token(shared, request, connector).await,
            ["v1", "connect", "token", connector, "import"] => import(shared, request, connector),
            ["v1", "connect", name @ ("authorize" | "install"), connector] => {
                begin(shared, request, Decision::from_name(name)?, connector).await
            }
            ["v1", "connect", "connectors", "managed", "oauth"] => provision(shared, request),
            _ => return None,
        },
        ("GET", path) => match path.as_slice() {
            ["v1", "connect", "connectors", connector] => metadata(shared, request, connector),
            ["v1", "connect", "result", verifier] => result(shared, request, verifier).await,
            _ => return None,
        },
        ("DELETE", path) => match path.as_slice() {
            ["v1", "connect", "connectors", connector, "tokens"] => revoke(shared, request, connector).await,
            _ => return None,
        },
        _ => return None,
    })
}

/// The body of a token request, which is also part of a [`BeginBody`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenBody {
    subject: Option<Map<String, Value>>,
    installation_id: Option<String>,
    /// The minimum remaining life of the token, in milliseconds.
    validity_buffer_ms: Option<u64>,
    #[serde(flatten)]
    narrowing: Narrowing,
}

/// The body of a request that starts a consent or an installation.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BeginBody {
    #[serde(flatten)]
    token: TokenBody,
    tenant_id: Option<String>,
    return_url: Option<String>,
    webhook: Option<String>,
    #[serde(default)]
    device_code: bool,
    expires_in_ms: Option<u64>,
    prompt: Option<String>,
    additional_params: Option<BTreeMap<String, String>>,
}

async fn token(shared: &Shared, request: &Request, connector: &str) -> Result<Response, Refusal> {
    let caller = shared.caller(request, Class::Read, Permission::Token)?;
    let body: TokenBody = request.json()?;
    let provider_request = shared.store.read(|contents| {
        let connector = find_connector(&contents.world, connector)?;
        caller.check_link(connector)?;
        let installation = installation(connector, body.installation_id.as_deref())?.cloned();
        let subject = subject(&caller, body.subject.as_ref())?;
        let is_imported = |id: &String| connector.imported.iter().any(|token| token.user.as_ref() == Some(id));
        let has_granted = |id: &String| connector.granted_to.contains(id) || is_imported(id);
        match &subject {
            Subject::User { id, .. } if !has_granted(id) => Err(Refusal::new(Kind::UserAuthorizationRequired)),
            _ => Ok(ProviderRequest {
                connector: connector.clone(),
                subject,
                installation,
                environment: caller.environment().map(str::to_owned),
                narrowing: body.narrowing,
                validity_buffer: body.validity_buffer_ms.map(Duration::from_millis),
                now: shared.now(),
            }),
        }
    })?;
    let token = match imported_token(&provider_request) {
        Some(token) => token,
        None => provider_client::obtain_token(&shared.store, &shared.providers, provider_request.clone())
            .await
            .map_err(|e| Refusal::new(e.into()))?,
    };
    Ok(Response::ok(&token_json(&provider_request, token)))
}

/// The response body of a token request.
fn token_json(provider_request: &ProviderRequest, token: IssuedToken) -> Value {
    let ProviderRequest { connector, subject, installation, environment, narrowing, .. } = provider_request;
    // Tokens with the same connector, subject, environment and restrictions form a group.
    let group = format!("{}{subject:?}{environment:?}{narrowing:?}", connector.id);
    let group: String = digest(&SHA256, group.as_bytes()).as_ref()[..10].iter().map(|b| format!("{b:02x}")).collect();
    let mut answer = json!({
        "token": token.token,
        "tokenId": random_id("stk", 20),
        "tokenGroupId": format!("stg_{group}"),
        "expiresAt": millis(token.expires_at),
        "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind},
    });
    let optional = [
        ("installationId", installation.as_ref().map(|i| i.id.as_str().into())),
        ("tenantId", installation.as_ref().map(|i| i.tenant_id.as_str().into())),
        ("name", token.name.map(Value::from)),
        ("externalSubject", token.external_subject.map(Value::from)),
        ("metadata", token.metadata),
        ("claims", token.claims),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            answer[name] = value;
        }
    }
    answer
}

fn find_connector<'w>(world: &'w World, name: &str) -> Result<&'w Connector, Refusal> {
    world.connector(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))
}

/// The requested installation, or the default one.
fn installation<'c>(connector: &'c Connector, id: Option<&str>) -> Result<Option<&'c Installation>, Refusal> {
    let found = match id {
        None | Some("*") => connector.installations.first(),
        Some(id) => connector.installations.iter().find(|installation| installation.id == id),
    };
    match found {
        None if connector.needs_installation() => Err(Refusal::new(Kind::InstallationRequired)),
        found => Ok(found),
    }
}

/// The subject of a token request. Without one, it is the member whose credential is used, or the app for a project. A
/// member may only request tokens for the app and for themselves.
fn subject(caller: &Caller, requested: Option<&Map<String, Value>>) -> Result<Subject, Refusal> {
    let bad = |what: &str| Err(Refusal::about(Kind::BadRequest, what));
    let Some(requested) = requested else {
        return Ok(match caller {
            Caller::Person { user, .. } => user_subject(user, None),
            Caller::Project { .. } => Subject::App,
        });
    };
    let text = |name: &str| match requested.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(Refusal::about(Kind::BadRequest, format!("`subject.{name}` must be a string"))),
    };
    let subject = match text("type")? {
        None => return bad("`subject` needs a `type`"),
        Some("app") => Subject::App,
        Some("user") => {
            let Some(id) = text("id")?.or(caller.user()) else {
                return bad("a `user` subject needs an `id`: the OIDC token was issued to no user");
            };
            user_subject(id, text("issuer")?)
        }
        Some("jwt-bearer") => Subject::JwtBearer(requested.clone()),
        Some("token") => match text("token")? {
            Some(token) if requested.len() == 2 => Subject::Exchange(token.into()),
            _ => return bad("a `token` subject has a `token` and nothing else"),
        },
        Some(_) => return Err(Refusal::new(Kind::UnresolvedToken)),
    };
    let is_own = match &subject {
        Subject::App => true,
        Subject::User { id, .. } => caller.user() == Some(id),
        Subject::JwtBearer(_) | Subject::Exchange(_) => false,
    };
    if caller.is_person() && !is_own { Err(Refusal::new(Kind::OtherUser)) } else { Ok(subject) }
}

fn user_subject(id: &str, issuer: Option<&str>) -> Subject {
    Subject::User { id: id.into(), issuer: issuer.map(str::to_owned) }
}

/// A valid imported token that fits the request.
fn imported_token(provider_request: &ProviderRequest) -> Option<IssuedToken> {
    let user = match &provider_request.subject {
        Subject::App => None,
        Subject::User { id, .. } => Some(id),
        Subject::JwtBearer(_) | Subject::Exchange(_) => return None,
    };
    let found = provider_request.connector.imported.iter().find(|token| {
        token.user.as_ref() == user
            && provider_request.environment.as_ref().is_none_or(|environment| token.environment == *environment)
            && token
                .installation
                .as_ref()
                .is_none_or(|id| provider_request.installation.as_ref().is_some_and(|i| i.id == *id))
            && millis(provider_request.now) < token.expires_at
    })?;
    Some(IssuedToken {
        token: found.token.clone(),
        expires_at: UNIX_EPOCH + Duration::from_millis(found.expires_at),
        name: None,
        external_subject: None,
        metadata: None,
        claims: None,
    })
}

async fn begin(shared: &Shared, request: &Request, decision: Decision, connector: &str) -> Result<Response, Refusal> {
    let caller = shared.caller(request, Class::Write, Permission::Token)?;
    let body: BeginBody = request.json()?;
    if body.webhook.is_some_and(|url| !url.starts_with("https://")) {
        return Err(Refusal::about(Kind::BadRequest, "`webhook` must be an https URL"));
    }
    let (now, verifier) = (shared.now(), random_id("ver", 43));
    let life = body.expires_in_ms.map_or(flows::LIFE, Duration::from_millis);
    let (flow, mut response_body) = shared.store.change(|contents| {
        let connector = find_connector(&contents.world, connector)?;
        caller.check_link(connector)?;
        let user = match (decision, subject(&caller, body.token.subject.as_ref())?) {
            (Decision::Authorize, Subject::User { id, .. }) => Some(id),
            // Without a subject, the flow is for whoever decides it.
            (Decision::Authorize, _) if body.token.subject.is_some() => {
                return Err(Refusal::new(Kind::UnresolvedToken));
            }
            _ => caller.user().filter(|_| caller.is_person()).map(str::to_owned),
        };
        let mut parameters = body.additional_params.unwrap_or_default();
        parameters.extend(body.prompt.map(|prompt| ("prompt".into(), prompt)));
        let flow = Flow {
            user,
            installation: body.token.installation_id.filter(|id| id != "*"),
            tenant: body.tenant_id,
            narrowing: body.token.narrowing,
            return_url: body.return_url,
            parameters,
            device_code: body.device_code.then(|| random_id("", 40)),
            ..Flow::new(decision, &connector.id, &flows::request_code(&verifier), now, life)
        };
        let path = percent_encoding::utf8_percent_encode(&connector.uid, percent_encoding::NON_ALPHANUMERIC);
        let mut response_body = json!({
            "url": format!("{}/api/v1/connect/{}/{path}?teamId={}&request_code={}",
                shared.origin, decision.name(), contents.world.team.id, flow.request_code),
            "request": flow.request,
            "verifier": verifier,
            "expiresAt": flow.expires_at,
            "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.name(),
                "displayName": connector.name(), "service": connector.service, "serviceName": connector.service},
        });
        if let Some(code) = &flow.device_code {
            response_body["deviceCode"] = code.as_str().into();
        }
        flows::begin(contents, flow.clone(), now);
        Ok((flow, response_body))
    })?;
    if flow.device_code.is_some() {
        consent_pages::begin_device(shared, &flow, &mut response_body).await;
    }
    Ok(Response::ok(&response_body))
}

async fn result(shared: &Shared, request: &Request, verifier: &str) -> Result<Response, Refusal> {
    // Polling does not count against the rate limit.
    shared.authenticate(request)?;
    consent_pages::poll_device(shared, verifier).await;
    shared.store.read(|contents| flows::result(contents, verifier, shared.now()).map(|result| Response::ok(&result)))
}

fn metadata(shared: &Shared, request: &Request, connector: &str) -> Result<Response, Refusal> {
    let caller = shared.caller(request, Class::Read, Permission::View)?;
    shared.store.read(|contents| {
        let connector = find_connector(&contents.world, connector)?;
        caller.check_link(connector)?;
        Ok(Response::ok(&management_api::connector_json(connector)))
    })
}

async fn revoke(shared: &Shared, request: &Request, connector: &str) -> Result<Response, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct RevokeBody {
        subject: Option<Map<String, Value>>,
    }
    let body: RevokeBody = request.json()?;
    let caller = shared.caller(request, Class::Write, Permission::View)?;
    let (connector, subject, unused, imported) = shared.store.change(|contents| {
        let subject = {
            let connector = find_connector(&contents.world, connector)?;
            caller.check_link(connector)?;
            body.subject.as_ref().map(|requested| subject(&caller, Some(requested))).transpose()
        };
        // Revoking one's own tokens requires the permission to get them; revoking any other, `Revoke`.
        let may_revoke = caller.check_permission(&contents.world, Permission::Revoke);
        let subject = match subject {
            Err(Refusal { kind: Kind::OtherUser, .. }) => {
                may_revoke?;
                body.subject.as_ref().and_then(|s| s.get("id")?.as_str()).map(|id| user_subject(id, None))
            }
            Err(refusal) => return Err(refusal),
            Ok(Some(subject @ Subject::User { .. })) => {
                caller.check_permission(&contents.world, Permission::Token).or(may_revoke)?;
                Some(subject)
            }
            Ok(subject) => {
                may_revoke?;
                subject
            }
        };
        let name = connector;
        let connector =
            contents.world.connector_mut(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
        let before = connector.clone();
        let applies_to = |user: Option<&str>| provider_client::applies_to(subject.as_ref(), user);
        connector.granted_to.retain(|user| !applies_to(Some(user)));
        connector.imported.retain(|token| !applies_to(token.user.as_deref()));
        // A grant from which no token was obtained has nothing to revoke at the provider.
        let is_unused = |user: &&String| !before.vault.contains_key(&user_key(user));
        let unused = before.granted_to.iter().filter(|user| applies_to(Some(user))).filter(is_unused).count();
        let imported = before.imported.len() - connector.imported.len();
        Ok((before, subject, unused, imported))
    })?;
    let at_provider = provider_client::revoke(&shared.store, &shared.providers, &connector, subject.as_ref()).await;
    let deleted = at_provider.revoked + at_provider.skipped + at_provider.failed + unused + imported;
    Ok(Response::ok(&json!({
        "tokensFound": deleted,
        "deleted": deleted,
        "providerRevoked": at_provider.revoked,
        "providerSkipped": at_provider.skipped + unused + imported,
        "providerFailed": at_provider.failed,
    })))
}

/// Creates an OAuth connector for an MCP server, as `@vercel/connect` requests for a server without a connector.
fn provision(shared: &Shared, request: &Request) -> Result<Response, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct ProvisionBody {
        server_url: String,
        uid: String,
    }
    let caller = shared.caller(request, Class::Write, Permission::View)?;
    if !caller.is_person() {
        return Err(Refusal::new(Kind::ProvisioningNotAllowed));
    }
    let body: ProvisionBody = request.json()?;
    let now = millis(shared.now());
    shared.store.change(|contents| {
        caller.check_permission(&contents.world, Permission::Mutate)?;
        match contents.world.connector(&body.uid) {
            Some(connector) if connector.kind != "oauth" => Err(Refusal::about(Kind::NotOAuth, &body.uid)),
            Some(connector) => Ok(Response::ok(&management_api::connector_json(connector))),
            None => {
                let connector = Connector {
                    kind: "oauth".into(),
                    links: Vec::new(),
                    installations: Vec::new(),
                    data: [("serverUrl".to_owned(), body.server_url.into())].into(),
                    created_at: now,
                    updated_at: now,
                    ..Connector::new(&body.uid, &random_id("scl", 16), "")
                };
                let json = management_api::connector_json(&connector);
                contents.world.connectors.push(connector);
                Ok(Response::json(http::StatusCode::CREATED, &json))
            }
        }
    })
}

fn import(shared: &Shared, request: &Request, connector: &str) -> Result<Response, Refusal> {
    #[derive(Debug, Deserialize)]
    struct ImportBody {
        tokens: Vec<TokenToImport>,
    }
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct TokenToImport {
        access_token: String,
        expires_at: u64,
        subject: Map<String, Value>,
        environment: String,
        installation_id: Option<String>,
    }
    let caller = shared.caller(request, Class::Write, Permission::Mutate)?;
    let body: ImportBody = request.json()?;
    shared.store.change(|contents| {
        let known = contents.world.connector_mut(connector);
        let connector = known.ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, connector))?;
        caller.check_link(connector)?;
        let mut results = Vec::new();
        for token in body.tokens {
            let user = token.subject.get("id").and_then(Value::as_str);
            let is_known = match token.subject.get("type").and_then(Value::as_str) {
                Some("app") => user.is_none(),
                Some("user") => user.is_some(),
                _ => false,
            };
            results.push(json!({"subject": token.subject, "environment": token.environment, "succeeded": is_known}));
            if is_known {
                connector.imported.push(ImportedToken {
                    user: user.map(str::to_owned),
                    token: token.access_token,
                    expires_at: token.expires_at,
                    environment: token.environment,
                    installation: token.installation_id,
                });
            }
        }
        let imported = results.iter().filter(|result| result["succeeded"] == true).count();
        Ok(Response::ok(&json!({"accepted": results.len(), "imported": imported, "tokens": results})))
    })
}
