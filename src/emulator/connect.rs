//! The runtime endpoints, which apps call (docs/vercel.md section 1.1): tokens, consents, metadata, revocation.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::caller::Caller;
use super::consent;
use super::errors::{Kind, Refusal};
use super::exchange::{Asked, Given};
use super::flow::{Decision, Flow, Narrowing};
use super::flows;
use super::ids::{millis, random_id};
use super::limits::Class;
use super::manage;
use super::provider::{self, Ask, Minted, Subject};
use super::world::{Connector, Imported, Installation, Permission, World, user_key};

/// Answers a request for a runtime endpoint; `None` if it is for another.
pub(super) async fn decide(shared: &Shared, asked: &Asked) -> Option<Result<Given, Refusal>> {
    Some(match asked.route() {
        ("POST", path) => match path.as_slice() {
            ["v1", "connect", "token", connector] => token(shared, asked, connector).await,
            ["v1", "connect", "token", connector, "import"] => import(shared, asked, connector),
            ["v1", "connect", name @ ("authorize" | "install"), connector] => {
                begin(shared, asked, Decision::named(name)?, connector).await
            }
            ["v1", "connect", "connectors", "managed", "oauth"] => provision(shared, asked),
            _ => return None,
        },
        ("GET", path) => match path.as_slice() {
            ["v1", "connect", "connectors", connector] => metadata(shared, asked, connector),
            ["v1", "connect", "result", verifier] => result(shared, asked, verifier).await,
            _ => return None,
        },
        ("DELETE", path) => match path.as_slice() {
            ["v1", "connect", "connectors", connector, "tokens"] => revoke(shared, asked, connector).await,
            _ => return None,
        },
        _ => return None,
    })
}

/// The body of a token request; those of a consent and an installation have more.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenBody {
    subject: Option<Map<String, Value>>,
    installation_id: Option<String>,
    /// How much life is left in the token at least, in milliseconds.
    validity_buffer_ms: Option<u64>,
    #[serde(flatten)]
    narrowing: Narrowing,
}

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

async fn token(shared: &Shared, asked: &Asked, connector: &str) -> Result<Given, Refusal> {
    let caller = shared.caller(asked, Class::Read, Permission::Token)?;
    let body: TokenBody = asked.json()?;
    let ask = shared.state.read(|kept| {
        let connector = find(&kept.world, connector)?;
        caller.may_use(connector)?;
        let installation = installation(connector, body.installation_id.as_deref())?.cloned();
        let subject = subject(&caller, body.subject.as_ref())?;
        let is_imported = |id: &String| connector.imported.iter().any(|token| token.user.as_ref() == Some(id));
        let granted = |id: &String| connector.granted_to.contains(id) || is_imported(id);
        match &subject {
            Subject::User { id, .. } if !granted(id) => Err(Refusal::new(Kind::UserAuthorizationRequired)),
            _ => Ok(Ask {
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
    let minted = match imported(&ask) {
        Some(minted) => minted,
        None => {
            provider::mint(&shared.state, &shared.providers, ask.clone()).await.map_err(|e| Refusal::new(e.into()))?
        }
    };
    Ok(Given::ok(&answer(&ask, minted)))
}

/// What an app gets.
fn answer(ask: &Ask, minted: Minted) -> Value {
    let Ask { connector, subject, installation, environment, narrowing, .. } = ask;
    // The tokens of a group are alike in these.
    let group = format!("{}{subject:?}{environment:?}{narrowing:?}", connector.id);
    let group: String = digest(&SHA256, group.as_bytes()).as_ref()[..10].iter().map(|b| format!("{b:02x}")).collect();
    let mut answer = json!({
        "token": minted.token,
        "tokenId": random_id("stk", 20),
        "tokenGroupId": format!("stg_{group}"),
        "expiresAt": millis(minted.expires_at),
        "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind},
    });
    let further = [
        ("installationId", installation.as_ref().map(|i| i.id.as_str().into())),
        ("tenantId", installation.as_ref().map(|i| i.tenant_id.as_str().into())),
        ("name", minted.name.map(Value::from)),
        ("externalSubject", minted.external_subject.map(Value::from)),
        ("metadata", minted.metadata),
        ("claims", minted.claims),
    ];
    for (name, value) in further {
        if let Some(value) = value {
            answer[name] = value;
        }
    }
    answer
}

fn find<'w>(world: &'w World, name: &str) -> Result<&'w Connector, Refusal> {
    world.find(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))
}

/// The installation that is asked for, or the default one.
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

/// Whom a token is asked for. A person may ask for the app and for themselves, and is meant if they say nothing.
fn subject(caller: &Caller, asked: Option<&Map<String, Value>>) -> Result<Subject, Refusal> {
    let bad = |what: &str| Err(Refusal::about(Kind::BadRequest, what));
    let Some(asked) = asked else {
        return Ok(match caller {
            Caller::Person { user, .. } => user_subject(user, None),
            Caller::Project { .. } => Subject::App,
        });
    };
    let text = |name: &str| match asked.get(name) {
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
        Some("jwt-bearer") => Subject::JwtBearer(asked.clone()),
        Some("token") => match text("token")? {
            Some(token) if asked.len() == 2 => Subject::Exchange(token.into()),
            _ => return bad("a `token` subject has a `token` and nothing else"),
        },
        Some(_) => return Err(Refusal::new(Kind::UnresolvedToken)),
    };
    let is_theirs = match &subject {
        Subject::App => true,
        Subject::User { id, .. } => caller.user() == Some(id),
        Subject::JwtBearer(_) | Subject::Exchange(_) => false,
    };
    if caller.is_person() && !is_theirs { Err(Refusal::new(Kind::OtherUser)) } else { Ok(subject) }
}

fn user_subject(id: &str, issuer: Option<&str>) -> Subject {
    Subject::User { id: id.into(), issuer: issuer.map(str::to_owned) }
}

/// A token that was brought in for just this, while it lasts.
fn imported(ask: &Ask) -> Option<Minted> {
    let user = match &ask.subject {
        Subject::App => None,
        Subject::User { id, .. } => Some(id),
        Subject::JwtBearer(_) | Subject::Exchange(_) => return None,
    };
    let found = ask.connector.imported.iter().find(|token| {
        token.user.as_ref() == user
            && ask.environment.as_ref().is_none_or(|environment| token.environment == *environment)
            && token.installation.as_ref().is_none_or(|id| ask.installation.as_ref().is_some_and(|i| i.id == *id))
            && millis(ask.now) < token.expires_at
    })?;
    Some(Minted {
        token: found.token.clone(),
        expires_at: UNIX_EPOCH + Duration::from_millis(found.expires_at),
        name: None,
        external_subject: None,
        metadata: None,
        claims: None,
    })
}

async fn begin(shared: &Shared, asked: &Asked, decision: Decision, connector: &str) -> Result<Given, Refusal> {
    let caller = shared.caller(asked, Class::Write, Permission::Token)?;
    let body: BeginBody = asked.json()?;
    if body.webhook.is_some_and(|url| !url.starts_with("https://")) {
        return Err(Refusal::about(Kind::BadRequest, "`webhook` must be an https URL"));
    }
    let (now, verifier) = (shared.now(), random_id("ver", 43));
    let life = body.expires_in_ms.map_or(flows::LIFE, Duration::from_millis);
    let (pending, mut answer) = shared.state.change(|kept| {
        let connector = find(&kept.world, connector)?;
        caller.may_use(connector)?;
        let user = match (decision, subject(&caller, body.token.subject.as_ref())?) {
            (Decision::Authorize, Subject::User { id, .. }) => Some(id),
            // Without a subject it is whoever decides.
            (Decision::Authorize, _) if body.token.subject.is_some() => {
                return Err(Refusal::new(Kind::UnresolvedToken));
            }
            _ => caller.user().filter(|_| caller.is_person()).map(str::to_owned),
        };
        let mut parameters = body.additional_params.unwrap_or_default();
        parameters.extend(body.prompt.map(|prompt| ("prompt".into(), prompt)));
        let pending = Flow {
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
        let mut answer = json!({
            "url": format!("{}/api/v1/connect/{}/{path}?teamId={}&request_code={}",
                shared.origin, decision.name(), kept.world.team.id, pending.request_code),
            "request": pending.request,
            "verifier": verifier,
            "expiresAt": pending.expires_at,
            "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.name(),
                "displayName": connector.name(), "service": connector.service, "serviceName": connector.service},
        });
        if let Some(code) = &pending.device_code {
            answer["deviceCode"] = code.as_str().into();
        }
        flows::begin(kept, pending.clone(), now);
        Ok((pending, answer))
    })?;
    if pending.device_code.is_some() {
        consent::with_device(shared, &pending, &mut answer).await;
    }
    Ok(Given::ok(&answer))
}

async fn result(shared: &Shared, asked: &Asked, verifier: &str) -> Result<Given, Refusal> {
    // It is polled, and so not counted.
    shared.authenticate(asked)?;
    consent::progress(shared, verifier).await;
    shared.state.read(|kept| flows::result(kept, verifier, shared.now()).map(|result| Given::ok(&result)))
}

fn metadata(shared: &Shared, asked: &Asked, connector: &str) -> Result<Given, Refusal> {
    let caller = shared.caller(asked, Class::Read, Permission::View)?;
    shared.state.read(|kept| {
        let connector = find(&kept.world, connector)?;
        caller.may_use(connector)?;
        Ok(Given::ok(&manage::described(connector)))
    })
}

async fn revoke(shared: &Shared, asked: &Asked, connector: &str) -> Result<Given, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Body {
        subject: Option<Map<String, Value>>,
    }
    let body: Body = asked.json()?;
    let caller = shared.caller(asked, Class::Write, Permission::View)?;
    let (connector, subject, unused, imported) = shared.state.change(|kept| {
        let subject = {
            let connector = find(&kept.world, connector)?;
            caller.may_use(connector)?;
            body.subject.as_ref().map(|asked| subject(&caller, Some(asked))).transpose()
        };
        // One's own takes no more than getting them; everybody's, and another's, does.
        let may_all = caller.may(&kept.world, Permission::Revoke);
        let subject = match subject {
            Err(Refusal { kind: Kind::OtherUser, .. }) => {
                may_all?;
                body.subject.as_ref().and_then(|s| s.get("id")?.as_str()).map(|id| user_subject(id, None))
            }
            Err(refusal) => return Err(refusal),
            Ok(Some(subject @ Subject::User { .. })) => {
                caller.may(&kept.world, Permission::Token).or(may_all)?;
                Some(subject)
            }
            Ok(subject) => {
                may_all?;
                subject
            }
        };
        let name = connector;
        let connector = kept.world.connector(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
        let before = connector.clone();
        let concerns = |user: Option<&str>| provider::concerns(subject.as_ref(), user);
        connector.granted_to.retain(|user| !concerns(Some(user)));
        connector.imported.retain(|token| !concerns(token.user.as_deref()));
        // Of a grant that no token was got by, the provider has nothing to take back.
        let is_unused = |user: &&String| !before.vault.contains_key(&user_key(user));
        let unused = before.granted_to.iter().filter(|user| concerns(Some(user))).filter(is_unused).count();
        let imported = before.imported.len() - connector.imported.len();
        Ok((before, subject, unused, imported))
    })?;
    let at_provider = provider::revoke(&shared.state, &shared.providers, &connector, subject.as_ref()).await;
    let deleted = at_provider.revoked + at_provider.skipped + at_provider.failed + unused + imported;
    Ok(Given::ok(&json!({
        "tokensFound": deleted,
        "deleted": deleted,
        "providerRevoked": at_provider.revoked,
        "providerSkipped": at_provider.skipped + unused + imported,
        "providerFailed": at_provider.failed,
    })))
}

/// What `@vercel/connect` asks for when it meets an MCP server without a connector.
fn provision(shared: &Shared, asked: &Asked) -> Result<Given, Refusal> {
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Body {
        server_url: String,
        uid: String,
    }
    let caller = shared.caller(asked, Class::Write, Permission::View)?;
    if !caller.is_person() {
        return Err(Refusal::new(Kind::ProvisioningNotAllowed));
    }
    let body: Body = asked.json()?;
    let now = millis(shared.now());
    shared.state.change(|kept| {
        caller.may(&kept.world, Permission::Mutate)?;
        match kept.world.find(&body.uid) {
            Some(connector) if connector.kind != "oauth" => Err(Refusal::about(Kind::NotOAuth, &body.uid)),
            Some(connector) => Ok(Given::ok(&manage::described(connector))),
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
                let described = manage::described(&connector);
                kept.world.connectors.push(connector);
                Ok(Given::json(http::StatusCode::CREATED, &described))
            }
        }
    })
}

fn import(shared: &Shared, asked: &Asked, connector: &str) -> Result<Given, Refusal> {
    #[derive(Debug, Deserialize)]
    struct Body {
        tokens: Vec<Brought>,
    }
    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Brought {
        access_token: String,
        expires_at: u64,
        subject: Map<String, Value>,
        environment: String,
        installation_id: Option<String>,
    }
    let caller = shared.caller(asked, Class::Write, Permission::Mutate)?;
    let body: Body = asked.json()?;
    shared.state.change(|kept| {
        let known = kept.world.connector(connector);
        let connector = known.ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, connector))?;
        caller.may_use(connector)?;
        let mut answers = Vec::new();
        for token in body.tokens {
            let user = token.subject.get("id").and_then(Value::as_str);
            let is_known = match token.subject.get("type").and_then(Value::as_str) {
                Some("app") => user.is_none(),
                Some("user") => user.is_some(),
                _ => false,
            };
            answers.push(json!({"subject": token.subject, "environment": token.environment, "succeeded": is_known}));
            if is_known {
                connector.imported.push(Imported {
                    user: user.map(str::to_owned),
                    token: token.access_token,
                    expires_at: token.expires_at,
                    environment: token.environment,
                    installation: token.installation_id,
                });
            }
        }
        let imported = answers.iter().filter(|answer| answer["succeeded"] == true).count();
        Ok(Given::ok(&json!({"accepted": answers.len(), "imported": imported, "tokens": answers})))
    })
}
