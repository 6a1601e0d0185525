//! What the Vercel CLI asks of an account: who the user is, teams, projects, and fresh OIDC tokens (connect-contract.md
//! sections 1.5, 6 and 7).

use std::time::SystemTime;

use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use super::connect::{Asked, Given};
use super::oidc::{DEVELOPMENT_LIFE, Issuer, Subject};
use super::world::{Project, World};

/// Answers a request for an account route; `None` if it is for another.
pub(super) fn decide(world: &World, issuer: &Issuer, now: SystemTime, asked: &Asked<'_>) -> Option<Given> {
    let path = asked.target.split('?').next().unwrap_or_default();
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let project = |name: &str| world.projects.iter().find(|project| project.id == name || project.name == name);
    let token = |project: &Project| {
        let subject =
            Subject { project: project.name.clone(), project_id: project.id.clone(), ..Subject::development(world) };
        issuer.issue(&subject, now, DEVELOPMENT_LIFE)
    };
    let answer = match (asked.method, parts.as_slice()) {
        (&Method::GET, ["v2", "user"]) => Some(json!({"user": user(world)})),
        (&Method::GET, ["v1" | "v2", "teams"]) => {
            Some(json!({"teams": [team(world)], "pagination": {"count": 1, "next": null, "prev": null}}))
        }
        (&Method::GET, ["teams", name] | ["v2", "teams", name]) => {
            (*name == world.team.id || *name == world.team.slug).then(|| team(world))
        }
        (&Method::GET, ["v9", "projects", name]) => {
            project(name).map(|p| json!({"id": p.id, "name": p.name, "accountId": world.team.id, "link": null}))
        }
        (&Method::GET, ["v3", "env", "pull", name, "development"]) => {
            project(name).map(|p| json!({"env": {"VERCEL_OIDC_TOKEN": token(p)}, "buildEnv": {}}))
        }
        (&Method::GET, ["v10", "projects", name, "env"]) => project(name).map(|_| json!({"envs": []})),
        (&Method::POST, ["projects", name, "token"] | ["v1", "projects", name, "token"]) => {
            project(name).map(|p| json!({"token": token(p)}))
        }
        _ => return None,
    };
    Some(match (is_signed_in(world, asked.headers), answer) {
        (false, _) => error(
            StatusCode::FORBIDDEN,
            &json!({"code": "forbidden", "message": "Not authorized", "invalidToken": true}),
        ),
        (true, None) => error(StatusCode::NOT_FOUND, &json!({"code": "not_found", "message": "Not found"})),
        (true, Some(body)) => Given { status: StatusCode::OK, body: Some(body) },
    })
}

fn error(status: StatusCode, error: &Value) -> Given {
    Given { status, body: Some(json!({ "error": error })) }
}

fn is_signed_in(world: &World, headers: &HeaderMap) -> bool {
    let bearer = headers.get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    bearer.is_some_and(|bearer| world.cli_sessions.iter().any(|session| session == bearer))
}

fn user(world: &World) -> Value {
    let id = world.users.first().map_or("user", String::as_str);
    let name = id.trim_start_matches("user_");
    json!({"id": id, "username": name, "name": name, "email": format!("{name}@acme.example"),
        "version": "northstar", "defaultTeamId": world.team.id})
}

fn team(world: &World) -> Value {
    json!({"id": world.team.id, "slug": world.team.slug, "name": world.team.slug,
        "membership": {"role": "OWNER", "confirmed": true}})
}
