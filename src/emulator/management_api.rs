//! The management API that the CLI and the dashboard use: connectors and their links (docs/vercel.md section 1.4). The
//! CLI still uses version 1 of lists, where some keys have other names than in version 2.

use std::collections::BTreeMap;

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::allowlist::Allowlist;
use super::caller::Caller;
use super::errors::{Kind, Refusal};
use super::ids::{millis, random_id};
use super::limits::Class;
use super::message::{Request, Response};
use super::provider_kind::ProviderKind;
use super::world::{Connector, ENVIRONMENTS, Link, Permission, World};

/// The connector types of Connect.
const TYPES: [&str; 16] = [
    "api-key",
    "aws-alpha",
    "custom",
    "discord",
    "github",
    "linear",
    "linq",
    "microsoft-entra",
    "microsoft-teams",
    "oauth",
    "photon",
    "salesforce",
    "sendblue",
    "slack",
    "snowflake",
    "snowflake-wif",
];
/// The most trigger destinations that a connector can have.
const MAX_TRIGGER_DESTINATIONS: usize = 3;
const DEFAULT_LIMIT: usize = 20;
const MAX_LIMIT: usize = 100;

/// Handles the management routes; `None` for other routes.
pub(super) fn handle(shared: &Shared, request: &Request) -> Option<Result<Response, Refusal>> {
    use Class::{Read, Write};
    use Permission::{Attach, Mutate, View};
    let (method, path) = request.route();
    let ["v1" | "v2", "connect", path @ ..] = path.as_slice() else { return None };
    let is_v2 = request.target.starts_with("/v2/");
    let authorize = |class, permission| shared.caller(request, class, permission);
    let change = |permission, change: &dyn Fn(&Caller, &mut World, u64) -> Result<Response, Refusal>| {
        let caller = authorize(Write, permission)?;
        let now = millis(shared.now());
        shared.store.change(|contents| change(&caller, &mut contents.world, now))
    };
    let read = |read: &dyn Fn(&Caller, &World) -> Result<Response, Refusal>| {
        let caller = authorize(Read, View)?;
        shared.store.read(|contents| read(&caller, &contents.world))
    };
    Some(match (method, path) {
        ("GET", ["connectors"]) => read(&|caller, world| list(caller, world, request, is_v2)),
        ("POST", ["connectors"] | ["connectors", "managed"]) => {
            change(Mutate, &|caller, world, now| create(caller, world, request, now, shared.providers.allowlist()))
        }
        ("PATCH", ["connectors", name]) => change(Mutate, &|caller, world, now| {
            let updated = update(usable_connector(caller, world, name)?, request, now, shared.providers.allowlist())?;
            Ok(Response::ok(&if is_v2 { json!({ "connector": updated }) } else { updated }))
        }),
        ("DELETE", ["connectors", name]) => change(Mutate, &|caller, world, _| {
            let id = usable_connector(caller, world, name)?.id.clone();
            world.connectors.retain(|connector| connector.id != id);
            Ok(Response::no_content())
        }),
        ("PATCH", ["connectors", name, "trigger-destinations"]) => change(Mutate, &|caller, world, now| {
            replace_destinations(usable_connector(caller, world, name)?, request, now)
        }),
        ("GET", ["connectors", name, "projects"]) => read(&|caller, world| {
            require_person(caller)?;
            let connector = world.connector(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, *name))?;
            let links = connector.links.iter().map(|link| link_json(world, connector, link));
            Ok(Response::ok(&json!({"projects": links.collect::<Vec<_>>(), "pagination": {"next": null}})))
        }),
        ("GET", ["projects", project, "connectors"]) => read(&|caller, world| {
            require_person(caller)?;
            let id = &world.project(project).ok_or(Refusal::new(Kind::NotFound))?.id;
            let links = world.connectors.iter().flat_map(|c| c.links.iter().map(move |link| (c, link)));
            let links = links.filter(|(_, link)| link.project_id == *id).map(|(c, link)| link_json(world, c, link));
            Ok(Response::ok(&json!({"connectors": links.collect::<Vec<_>>(), "pagination": {"next": null}})))
        }),
        ("GET", ["connectors", name, "projects", project]) => read(&|caller, world| {
            require_person(caller)?;
            let connector = world.connector(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, *name))?;
            let id = &world.project(project).ok_or(Refusal::new(Kind::NotFound))?.id;
            let link = connector.links.iter().find(|link| link.project_id == *id);
            link.map(|link| Response::ok(&link_json(world, connector, link))).ok_or(Refusal::new(Kind::NotFound))
        }),
        ("POST", ["connectors", name, "projects", project]) => {
            change(Attach, &|caller, world, now| attach(caller, world, (name, project), request, now))
        }
        ("DELETE", ["connectors", name, "projects", project]) => change(Attach, &|caller, world, now| {
            let id = project_id(caller, world, project)?;
            let connector = usable_connector(caller, world, name)?;
            let before = connector.links.len();
            connector.links.retain(|link| link.project_id != id);
            connector.updated_at = now;
            if connector.links.len() < before { Ok(Response::no_content()) } else { Err(Refusal::new(Kind::NotFound)) }
        }),
        ("GET", ["services", service]) => read(&|_, world| {
            let is_known = TYPES.contains(service) || world.connectors.iter().any(|c| c.service == *service);
            let answer = json!({"service": service, "name": service, "connectionMethods": []});
            is_known.then(|| Response::ok(&answer)).ok_or(Refusal::new(Kind::NotFound))
        }),
        _ => return None,
    })
}

/// A connector as JSON, without its data and vault.
pub(super) fn connector_json(connector: &Connector) -> Value {
    let Connector { id, uid, kind, service, created_at, updated_at, .. } = connector;
    let tokens = json!({"crossInstallation": false, "supportsRefinement": true});
    let mut connector_json = json!({
        "id": id,
        "uid": uid,
        "name": connector.name(),
        "displayName": connector.name(),
        "type": kind,
        "typeName": kind,
        "service": service,
        "createdAt": created_at,
        "updatedAt": updated_at,
        "supportedSubjectTypes": ["app", "user"],
        "supportsInstallation": connector.needs_installation(),
        "supportsRevocation": true,
        "supportsTriggers": connector.provider() == ProviderKind::Slack,
        "supportsIcon": "maybe",
        "appTokens": tokens,
        "userTokens": tokens,
        "triggers": {"enabled": !connector.trigger_destinations.is_empty()},
        "triggerDestinations": connector.trigger_destinations,
    });
    if let Some(installation) = connector.installations.first() {
        connector_json["defaultInstallationId"] = installation.id.as_str().into();
    }
    for (name, value) in &connector.branding {
        connector_json[name] = value.as_str().into();
    }
    connector_json
}

/// A link as JSON, with the environments under the keys of both versions.
fn link_json(world: &World, connector: &Connector, link: &Link) -> Value {
    json!({
        "connectorId": connector.id,
        "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.name()},
        "project": project_json(world, link),
        "environments": link.environments,
        "enabledEnvironments": link.environments,
        "createdAt": connector.created_at,
        "updatedAt": connector.updated_at,
    })
}

fn project_json(world: &World, link: &Link) -> Value {
    let name = world.project(&link.project_id).map_or(link.project_id.as_str(), |project| &project.name);
    json!({"id": link.project_id, "name": name})
}

/// A connector that the caller may use. A credential for one project can only use connectors that are linked to it.
fn usable_connector<'w>(caller: &Caller, world: &'w mut World, name: &str) -> Result<&'w mut Connector, Refusal> {
    let connector = world.connector_mut(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
    caller.check_link(connector).map(|()| connector)
}

/// Refuses OIDC tokens.
fn require_person(caller: &Caller) -> Result<(), Refusal> {
    if caller.is_person() { Ok(()) } else { Err(Refusal::new(Kind::PersonRequired)) }
}

/// The id of a project that the caller may act in.
fn project_id(caller: &Caller, world: &World, name: &str) -> Result<String, Refusal> {
    let project = world.project(name).filter(|project| caller.has_project(&project.id));
    project.map(|project| project.id.clone()).ok_or(Refusal::new(Kind::NotFound))
}

fn list(caller: &Caller, world: &World, request: &Request, is_v2: bool) -> Result<Response, Refusal> {
    require_person(caller)?;
    let number = |name: &str| {
        let bad = |_| Refusal::about(Kind::BadRequest, format!("`{name}` must be a number"));
        request.query(name).map(|text| text.parse::<usize>().map_err(bad)).transpose()
    };
    let limit = number("limit")?.unwrap_or(DEFAULT_LIMIT).clamp(1, MAX_LIMIT);
    let start = number("cursor")?.unwrap_or(0);
    let one_of =
        |name: &str, value: &str| request.query(name).is_none_or(|list| list.split(',').any(|item| item == value));
    let in_project = match request.query("projectId") {
        Some(name) => Some(project_id(caller, world, name)?),
        None => None,
    };
    let mut found: Vec<&Connector> = world.connectors.iter().filter(|c| caller.check_link(c).is_ok()).collect();
    found.retain(|c| one_of("type", &c.kind));
    found.retain(|c| one_of("service", &c.service) && request.query("search").is_none_or(|text| c.uid.contains(text)));
    found.retain(|c| in_project.as_ref().is_none_or(|id| c.links.iter().any(|link| link.project_id == *id)));
    match request.query("sort") {
        None | Some("createdAt") => found.sort_by_key(|c| c.created_at),
        Some("updatedAt") => found.sort_by_key(|c| c.updated_at),
        Some("name") => found.sort_by_key(|c| c.name()),
        Some(_) => return Err(Refusal::about(Kind::BadRequest, "`sort` must be name, createdAt or updatedAt")),
    }
    let next = (start.saturating_add(limit) < found.len()).then(|| (start + limit).to_string());
    let with_projects = request.query("include") == Some("projects");
    let page = found.into_iter().skip(start).take(limit).map(|connector| {
        let mut item = connector_json(connector);
        if with_projects {
            let links = connector.links.iter().map(|link| json!({"project": project_json(world, link)}));
            item["includes"] = json!({"projects": {"items": links.collect::<Vec<_>>(), "hasMore": false}});
        }
        item
    });
    let page: Vec<_> = page.collect();
    Ok(Response::ok(&match is_v2 {
        true => json!({"connectors": page, "pagination": {"next": next}}),
        false => match next {
            Some(next) => json!({"clients": page, "cursor": next}),
            None => json!({"clients": page}),
        },
    }))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CreateBody {
    service: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<String>,
    uid: Option<String>,
    project_id: Option<String>,
    environments: Option<Vec<String>>,
    data: Option<BTreeMap<String, Value>>,
    #[serde(flatten)]
    branding: Branding,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Branding {
    icon: Option<String>,
    background_color: Option<String>,
    accent_color: Option<String>,
}

impl Branding {
    fn apply_to(self, connector: &mut Connector) {
        let values =
            [("icon", self.icon), ("backgroundColor", self.background_color), ("accentColor", self.accent_color)];
        let values = values.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        connector.branding.extend(values);
    }
}

/// Creates a connector without the visit to the provider that Vercel may require. It has no installations yet.
fn create(
    caller: &Caller,
    world: &mut World,
    request: &Request,
    now: u64,
    allowlist: &Allowlist,
) -> Result<Response, Refusal> {
    let body: CreateBody = request.json()?;
    let bad = |what: &str| Refusal::about(Kind::BadRequest, what);
    let service = body.service.or(body.kind.clone()).filter(|service| !service.is_empty());
    let service = service.ok_or_else(|| bad("`service` or `type` is needed"))?;
    let kind = match body.kind {
        Some(kind) if TYPES.contains(&kind.as_str()) => kind,
        Some(_) => return Err(bad(&format!("`type` must be one of {}", TYPES.join(", ")))),
        None if TYPES.contains(&service.as_str()) => service.clone(),
        None => "oauth".into(),
    };
    let name = body.name.unwrap_or_else(|| "connector".into());
    let slug: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let uid = body.uid.unwrap_or_else(|| format!("{service}/{slug}"));
    if uid.is_empty() || world.connector(&uid).is_some() {
        return Err(Refusal::about(Kind::Conflict, uid));
    }
    let links = match body.project_id {
        None => Vec::new(),
        Some(project) => {
            let environments = body.environments.unwrap_or(ENVIRONMENTS.map(str::to_owned).into());
            vec![Link { project_id: project_id(caller, world, &project)?, environments }]
        }
    };
    let data = body.data.unwrap_or_default();
    allowlist.check_update(&data, &BTreeMap::new()).map_err(|e| bad(&e.to_string()))?;
    let mut connector = Connector {
        kind,
        service,
        links,
        installations: Vec::new(),
        data,
        created_at: now,
        updated_at: now,
        ..Connector::new(&uid, &random_id("scl", 16), "")
    };
    body.branding.apply_to(&mut connector);
    let created = connector_json(&connector);
    world.connectors.push(connector);
    Ok(Response::json(StatusCode::CREATED, &created))
}

fn update(connector: &mut Connector, request: &Request, now: u64, allowlist: &Allowlist) -> Result<Value, Refusal> {
    #[derive(Debug, Deserialize)]
    struct UpdateBody {
        data: Option<BTreeMap<String, Value>>,
        #[serde(flatten)]
        branding: Branding,
    }
    let body: UpdateBody = request.json()?;
    let data = body.data.unwrap_or_default();
    allowlist.check_update(&data, &connector.data).map_err(|e| Refusal::about(Kind::BadRequest, e.to_string()))?;
    body.branding.apply_to(connector);
    connector.data.extend(data);
    connector.updated_at = now;
    Ok(connector_json(connector))
}

fn attach(
    caller: &Caller,
    world: &mut World,
    (name, project): (&str, &str),
    request: &Request,
    now: u64,
) -> Result<Response, Refusal> {
    #[derive(Debug, Deserialize)]
    struct AttachBody {
        environments: Vec<String>,
    }
    let body: AttachBody = request.json()?;
    if body.environments.is_empty() {
        return Err(Refusal::about(Kind::BadRequest, "`environments` must have at least one entry"));
    }
    let project_id = project_id(caller, world, project)?;
    let known = world.connector_mut(name);
    let connector = known.ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
    let link = Link { project_id, environments: body.environments };
    connector.links.retain(|other| other.project_id != link.project_id);
    connector.links.push(link.clone());
    connector.updated_at = now;
    let connector = connector.clone();
    Ok(Response::ok(&link_json(world, &connector, &link)))
}

fn replace_destinations(connector: &mut Connector, request: &Request, now: u64) -> Result<Response, Refusal> {
    #[derive(Debug, Deserialize)]
    struct DestinationsBody {
        destinations: Vec<Map<String, Value>>,
    }
    let destinations = request.json::<DestinationsBody>()?.destinations;
    let is_project = |destination: &Map<String, Value>| destination.get("projectId").is_some_and(Value::is_string);
    if destinations.len() > MAX_TRIGGER_DESTINATIONS || !destinations.iter().all(is_project) {
        let what = format!("`destinations` has at most {MAX_TRIGGER_DESTINATIONS} entries, each with a `projectId`");
        return Err(Refusal::about(Kind::BadRequest, what));
    }
    connector.trigger_destinations = destinations.into_iter().map(Value::Object).collect();
    connector.updated_at = now;
    Ok(Response::ok(&connector_json(connector)))
}
