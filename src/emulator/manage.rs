//! The management endpoints, which the CLI and the dashboard use (docs/vercel.md section 1.4): connectors and their
//! links. The CLI still uses version 1 of lists, which differ from version 2 in their names.

use std::collections::BTreeMap;

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::caller::Caller;
use super::errors::{Kind, Refusal};
use super::exchange::{Asked, Given};
use super::ids::{millis, random_id};
use super::limits::Class;
use super::outside::Outside;
use super::world::{Connector, ENVIRONMENTS, Link, Permission, World};

/// The types of connectors that Connect knows.
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
/// More destinations than these are refused.
const MAX_TRIGGER_DESTINATIONS: usize = 3;
const DEFAULT_LIMIT: usize = 20;
const MAX_LIMIT: usize = 100;

/// Answers a request for a management endpoint; `None` if it is for another.
pub(super) fn decide(shared: &Shared, asked: &Asked) -> Option<Result<Given, Refusal>> {
    use Class::{Read, Write};
    use Permission::{Attach, Mutate, View};
    let (method, path) = asked.route();
    let ["v1" | "v2", "connect", path @ ..] = path.as_slice() else { return None };
    let is_v2 = asked.target.starts_with("/v2/");
    let may = |class, permission| shared.caller(asked, class, permission);
    let change = |permission, change: &dyn Fn(&Caller, &mut World, u64) -> Result<Given, Refusal>| {
        let caller = may(Write, permission)?;
        let now = millis(shared.now());
        shared.state.change(|kept| change(&caller, &mut kept.world, now))
    };
    let read = |read: &dyn Fn(&Caller, &World) -> Result<Given, Refusal>| {
        let caller = may(Read, View)?;
        shared.state.read(|kept| read(&caller, &kept.world))
    };
    Some(match (method, path) {
        ("GET", ["connectors"]) => read(&|caller, world| list(caller, world, asked, is_v2)),
        ("POST", ["connectors"] | ["connectors", "managed"]) => {
            change(Mutate, &|caller, world, now| create(caller, world, asked, now, shared.providers.outside()))
        }
        ("PATCH", ["connectors", name]) => change(Mutate, &|caller, world, now| {
            let described = update(of(caller, world, name)?, asked, now, shared.providers.outside())?;
            Ok(Given::ok(&if is_v2 { json!({ "connector": described }) } else { described }))
        }),
        ("DELETE", ["connectors", name]) => change(Mutate, &|caller, world, _| {
            let id = of(caller, world, name)?.id.clone();
            world.connectors.retain(|connector| connector.id != id);
            Ok(Given::no_content())
        }),
        ("PATCH", ["connectors", name, "trigger-destinations"]) => {
            change(Mutate, &|caller, world, now| replace_destinations(of(caller, world, name)?, asked, now))
        }
        ("GET", ["connectors", name, "projects"]) => read(&|caller, world| {
            person(caller)?;
            let connector = world.find(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, *name))?;
            let links = connector.links.iter().map(|link| linked(world, connector, link));
            Ok(Given::ok(&json!({"projects": links.collect::<Vec<_>>(), "pagination": {"next": null}})))
        }),
        ("GET", ["projects", project, "connectors"]) => read(&|caller, world| {
            person(caller)?;
            let id = &world.project(project).ok_or(Refusal::new(Kind::NotFound))?.id;
            let links = world.connectors.iter().flat_map(|c| c.links.iter().map(move |link| (c, link)));
            let links = links.filter(|(_, link)| link.project_id == *id).map(|(c, link)| linked(world, c, link));
            Ok(Given::ok(&json!({"connectors": links.collect::<Vec<_>>(), "pagination": {"next": null}})))
        }),
        ("GET", ["connectors", name, "projects", project]) => read(&|caller, world| {
            person(caller)?;
            let connector = world.find(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, *name))?;
            let id = &world.project(project).ok_or(Refusal::new(Kind::NotFound))?.id;
            let link = connector.links.iter().find(|link| link.project_id == *id);
            link.map(|link| Given::ok(&linked(world, connector, link))).ok_or(Refusal::new(Kind::NotFound))
        }),
        ("POST", ["connectors", name, "projects", project]) => {
            change(Attach, &|caller, world, now| attach(caller, world, (name, project), asked, now))
        }
        ("DELETE", ["connectors", name, "projects", project]) => change(Attach, &|caller, world, now| {
            let id = project_id(caller, world, project)?;
            let connector = of(caller, world, name)?;
            let before = connector.links.len();
            connector.links.retain(|link| link.project_id != id);
            connector.updated_at = now;
            if connector.links.len() < before { Ok(Given::no_content()) } else { Err(Refusal::new(Kind::NotFound)) }
        }),
        ("GET", ["services", service]) => read(&|_, world| {
            let is_known = TYPES.contains(service) || world.connectors.iter().any(|c| c.service == *service);
            let answer = json!({"service": service, "name": service, "connectionMethods": []});
            is_known.then(|| Given::ok(&answer)).ok_or(Refusal::new(Kind::NotFound))
        }),
        _ => return None,
    })
}

/// A connector as it is shown. Nothing of its data or its vault is.
pub(super) fn described(connector: &Connector) -> Value {
    let Connector { id, uid, kind, service, created_at, updated_at, .. } = connector;
    let tokens = json!({"crossInstallation": false, "supportsRefinement": true});
    let mut described = json!({
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
        "supportsTriggers": kind == "slack",
        "supportsIcon": "maybe",
        "appTokens": tokens,
        "userTokens": tokens,
        "triggers": {"enabled": !connector.trigger_destinations.is_empty()},
        "triggerDestinations": connector.trigger_destinations,
    });
    if let Some(installation) = connector.installations.first() {
        described["defaultInstallationId"] = installation.id.as_str().into();
    }
    for (name, value) in &connector.branding {
        described[name] = value.as_str().into();
    }
    described
}

/// A link as it is shown; version 1 and version 2 have different names for its environments.
fn linked(world: &World, connector: &Connector, link: &Link) -> Value {
    json!({
        "connectorId": connector.id,
        "connector": {"id": connector.id, "uid": connector.uid, "type": connector.kind, "name": connector.name()},
        "project": project(world, link),
        "environments": link.environments,
        "enabledEnvironments": link.environments,
        "createdAt": connector.created_at,
        "updatedAt": connector.updated_at,
    })
}

fn project(world: &World, link: &Link) -> Value {
    let name = world.project(&link.project_id).map_or(link.project_id.as_str(), |project| &project.name);
    json!({"id": link.project_id, "name": name})
}

/// A connector that the caller may use: a credential for one project reaches what is linked to that alone.
fn of<'w>(caller: &Caller, world: &'w mut World, name: &str) -> Result<&'w mut Connector, Refusal> {
    let connector = world.connector(name).ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
    caller.may_use(connector).map(|()| connector)
}

/// Lists are for people.
fn person(caller: &Caller) -> Result<(), Refusal> {
    if caller.is_person() { Ok(()) } else { Err(Refusal::new(Kind::PersonRequired)) }
}

/// A project that the caller may act in.
fn project_id(caller: &Caller, world: &World, name: &str) -> Result<String, Refusal> {
    let project = world.project(name).filter(|project| caller.is_in_project(&project.id));
    project.map(|project| project.id.clone()).ok_or(Refusal::new(Kind::NotFound))
}

fn list(caller: &Caller, world: &World, asked: &Asked, is_v2: bool) -> Result<Given, Refusal> {
    person(caller)?;
    let number = |name: &str| {
        let bad = |_| Refusal::about(Kind::BadRequest, format!("`{name}` must be a number"));
        asked.query(name).map(|text| text.parse::<usize>().map_err(bad)).transpose()
    };
    let limit = number("limit")?.unwrap_or(DEFAULT_LIMIT).clamp(1, MAX_LIMIT);
    let start = number("cursor")?.unwrap_or(0);
    let one_of =
        |name: &str, value: &str| asked.query(name).is_none_or(|list| list.split(',').any(|item| item == value));
    let in_project = match asked.query("projectId") {
        Some(name) => Some(project_id(caller, world, name)?),
        None => None,
    };
    let mut found: Vec<&Connector> = world.connectors.iter().filter(|c| caller.may_use(c).is_ok()).collect();
    found.retain(|c| one_of("type", &c.kind));
    found.retain(|c| one_of("service", &c.service) && asked.query("search").is_none_or(|text| c.uid.contains(text)));
    found.retain(|c| in_project.as_ref().is_none_or(|id| c.links.iter().any(|link| link.project_id == *id)));
    match asked.query("sort") {
        None | Some("createdAt") => found.sort_by_key(|c| c.created_at),
        Some("updatedAt") => found.sort_by_key(|c| c.updated_at),
        Some("name") => found.sort_by_key(|c| c.name()),
        Some(_) => return Err(Refusal::about(Kind::BadRequest, "`sort` must be name, createdAt or updatedAt")),
    }
    let next = (start.saturating_add(limit) < found.len()).then(|| (start + limit).to_string());
    let with_projects = asked.query("include") == Some("projects");
    let page = found.into_iter().skip(start).take(limit).map(|connector| {
        let mut item = described(connector);
        if with_projects {
            let links = connector.links.iter().map(|link| json!({"project": project(world, link)}));
            item["includes"] = json!({"projects": {"items": links.collect::<Vec<_>>(), "hasMore": false}});
        }
        item
    });
    let page: Vec<_> = page.collect();
    Ok(Given::ok(&match is_v2 {
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
    fn put_on(self, connector: &mut Connector) {
        let given =
            [("icon", self.icon), ("backgroundColor", self.background_color), ("accentColor", self.accent_color)];
        let given = given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        connector.branding.extend(given);
    }
}

/// Makes a connector, whether or not Vercel would send a browser to the provider first; what has to be installed is not
/// installed yet.
fn create(caller: &Caller, world: &mut World, asked: &Asked, now: u64, outside: &Outside) -> Result<Given, Refusal> {
    let body: CreateBody = asked.json()?;
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
    if uid.is_empty() || world.find(&uid).is_some() {
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
    outside.judge(&data, &BTreeMap::new()).map_err(|wrong| bad(&wrong))?;
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
    body.branding.put_on(&mut connector);
    let described = described(&connector);
    world.connectors.push(connector);
    Ok(Given::json(StatusCode::CREATED, &described))
}

fn update(connector: &mut Connector, asked: &Asked, now: u64, outside: &Outside) -> Result<Value, Refusal> {
    #[derive(Debug, Deserialize)]
    struct Body {
        data: Option<BTreeMap<String, Value>>,
        #[serde(flatten)]
        branding: Branding,
    }
    let body: Body = asked.json()?;
    let data = body.data.unwrap_or_default();
    outside.judge(&data, &connector.data).map_err(|wrong| Refusal::about(Kind::BadRequest, wrong))?;
    body.branding.put_on(connector);
    connector.data.extend(data);
    connector.updated_at = now;
    Ok(described(connector))
}

fn attach(
    caller: &Caller,
    world: &mut World,
    (name, project): (&str, &str),
    asked: &Asked,
    now: u64,
) -> Result<Given, Refusal> {
    #[derive(Debug, Deserialize)]
    struct Body {
        environments: Vec<String>,
    }
    let body: Body = asked.json()?;
    if body.environments.is_empty() {
        return Err(Refusal::about(Kind::BadRequest, "`environments` must name one at least"));
    }
    let project_id = project_id(caller, world, project)?;
    let known = world.connector(name);
    let connector = known.ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, name))?;
    let link = Link { project_id, environments: body.environments };
    connector.links.retain(|other| other.project_id != link.project_id);
    connector.links.push(link.clone());
    connector.updated_at = now;
    let connector = connector.clone();
    Ok(Given::ok(&linked(world, &connector, &link)))
}

fn replace_destinations(connector: &mut Connector, asked: &Asked, now: u64) -> Result<Given, Refusal> {
    #[derive(Debug, Deserialize)]
    struct Body {
        destinations: Vec<Map<String, Value>>,
    }
    let destinations = asked.json::<Body>()?.destinations;
    let is_project = |destination: &Map<String, Value>| destination.get("projectId").is_some_and(Value::is_string);
    if destinations.len() > MAX_TRIGGER_DESTINATIONS || !destinations.iter().all(is_project) {
        let what = format!("`destinations` are {MAX_TRIGGER_DESTINATIONS} at the most, each with a `projectId`");
        return Err(Refusal::about(Kind::BadRequest, what));
    }
    connector.trigger_destinations = destinations.into_iter().map(Value::Object).collect();
    connector.updated_at = now;
    Ok(Given::ok(&described(connector)))
}
