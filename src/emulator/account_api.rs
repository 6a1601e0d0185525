//! The account API that the Vercel CLI uses: user, teams, projects and OIDC tokens (docs/vercel.md sections 1.4, 6 and
//! 7), and the issuer's discovery document and keys.

use serde_json::{Value, json};

use super::Shared;
use super::caller::Caller;
use super::errors::{Kind, Refusal};
use super::message::{Request, Response};
use super::oidc::{self, Subject};
use super::world::{Permission, Project, Role, World};

/// Handles the account and issuer routes; `None` for other routes.
pub(super) fn handle(shared: &Shared, request: &Request) -> Option<Result<Response, Refusal>> {
    let (method, path) = request.route();
    let (is_get, is_post) = (method == "GET", method == "POST");
    match path.as_slice() {
        [".well-known", "jwks"] if is_get => return Some(Ok(Response::ok(&json!(shared.issuer.key_set())))),
        [".well-known", "openid-configuration"] if is_get => {
            return Some(Ok(Response::ok(&oidc::discovery(&shared.origin, None))));
        }
        [slug, ".well-known", "openid-configuration"] if is_get => {
            let is_known = shared.store.read(|contents| contents.world.team.slug == *slug);
            let response = is_known.then(|| Response::ok(&oidc::discovery(&shared.origin, Some(slug))));
            return Some(response.ok_or(Refusal::new(Kind::NotFound)));
        }
        _ => {}
    }
    let as_member = |answer: &dyn Fn(&World, &Caller, &str) -> Result<Value, Refusal>| {
        let caller = shared.authenticate(request)?;
        let user = caller.user().filter(|_| caller.is_person()).ok_or(Refusal::new(Kind::PersonRequired))?;
        shared.store.read(|contents| answer(&contents.world, &caller, user)).map(|body| Response::ok(&body))
    };
    let in_project = |name: &str, answer: &dyn Fn(&World, &Project, &str) -> Value| {
        as_member(&|world, caller, user| {
            let project = world.project(name).filter(|project| caller.has_project(&project.id));
            project.map(|project| answer(world, project, user)).ok_or(Refusal::new(Kind::NotFound))
        })
    };
    let secret = |name: &str, answer: &dyn Fn(&World, &Project, &str) -> Value| {
        // A viewer gets no credentials.
        as_member(&|world, caller, _| caller.check_permission(world, Permission::Token).map(|()| Value::Null))?;
        in_project(name, answer)
    };
    let token = |world: &World, project: &Project, user: &str| {
        let subject = Subject::of(world, Some(project), Some(user));
        shared.issuer.issue(&subject, shared.now(), world.team.oidc_token_life)
    };
    Some(match path.as_slice() {
        ["v2", "user"] if is_get => as_member(&|world, _, id| Ok(json!({"user": user(world, id)}))),
        ["v1" | "v2", "teams"] if is_get => as_member(&|world, _, id| {
            let page = json!({"count": 1, "next": null, "prev": null});
            Ok(json!({"teams": [team(world, id)], "pagination": page}))
        }),
        ["teams", name] | ["v2", "teams", name] if is_get => as_member(&|world, _, id| {
            let is_known = world.is_team(name);
            is_known.then(|| team(world, id)).ok_or(Refusal::new(Kind::NotFound))
        }),
        ["v9", "projects", name] if is_get => in_project(
            name,
            &|world, project, _| json!({"id": project.id, "name": project.name, "accountId": world.team.id, "link": null}),
        ),
        ["v3", "env", "pull", name, environment] if is_get => secret(name, &|world, project, user| {
            let mut env = json!(project.env);
            if *environment == "development" {
                env["VERCEL_OIDC_TOKEN"] = token(world, project, user).into();
            }
            json!({"env": env, "buildEnv": {}})
        }),
        ["v10", "projects", name, "env"] if is_get => in_project(name, &|_, _, _| json!({"envs": []})),
        ["projects", name, "token"] | ["v1", "projects", name, "token"] if is_post => {
            secret(name, &|world, project, user| json!({"token": token(world, project, user)}))
        }
        _ => return None,
    })
}

fn user(world: &World, id: &str) -> Value {
    let name = id.trim_start_matches("user_");
    json!({"id": id, "username": name, "name": name, "email": format!("{name}@{}.example", world.team.slug),
        "version": "northstar", "defaultTeamId": world.team.id})
}

fn team(world: &World, user: &str) -> Value {
    let role = match world.member(user).map(|member| member.role) {
        Some(Role::Owner) => "OWNER",
        Some(Role::Member) => "MEMBER",
        Some(Role::Developer) => "DEVELOPER",
        Some(Role::Viewer) | None => "VIEWER",
    };
    json!({"id": world.team.id, "slug": world.team.slug, "name": world.team.slug,
        "membership": {"role": role, "confirmed": true}})
}
