//! Authentication and authorization of callers. OIDC tokens identify a project in an environment; access tokens and CLI
//! sessions identify a member of the team.

use std::time::SystemTime;

use super::errors::{Kind, Refusal};
use super::message::Request;
use super::oidc::{Issuer, Rejection};
use super::world::{Connector, Permission, World};

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A project in an environment, with an OIDC token.
    Project {
        /// The project's id.
        project_id: String,
        /// The environment.
        environment: String,
        /// The user that a development token was issued to.
        user: Option<String>,
    },
    /// A team member, with an access token or a CLI session.
    Person {
        /// The member's id.
        user: String,
        /// The project that the credential is restricted to, if it is.
        project_id: Option<String>,
        /// Whether requests must name the team: true for access tokens.
        must_name_team: bool,
    },
}

impl Caller {
    /// Identifies the caller by the bearer token.
    pub fn authenticate(world: &World, issuer: &Issuer, now: SystemTime, request: &Request) -> Result<Self, Refusal> {
        let bearer = request.bearer().ok_or(Refusal::new(Kind::MissingToken))?;
        if let Some(session) = world.sessions.iter().find(|session| session.token == bearer) {
            return Ok(Self::Person { user: session.user.clone(), project_id: None, must_name_team: false });
        }
        if let Some(token) = world.access_tokens.iter().find(|token| token.token == bearer) {
            let (user, project_id) = (token.user.clone(), token.project.clone());
            return Ok(Self::Person { user, project_id, must_name_team: true });
        }
        match issuer.verify(bearer, world, now) {
            Ok(claims) => Ok(Self::Project {
                project_id: claims.project_id,
                environment: claims.environment,
                user: claims.user_id,
            }),
            Err(Rejection::Expired) => Err(Refusal::new(Kind::ExpiredToken)),
            Err(Rejection::Invalid) => Err(Refusal::new(Kind::InvalidToken)),
        }
    }

    /// Checks that the team named by `teamId` or `slug` is the caller's, and that it is named if required.
    pub fn check_team(&self, world: &World, request: &Request) -> Result<(), Refusal> {
        let mut names = ["teamId", "slug"].into_iter().filter_map(|name| request.query(name)).peekable();
        let is_missing = names.peek().is_none() && matches!(self, Self::Person { must_name_team: true, .. });
        match !is_missing && names.all(|name| world.is_team(name)) {
            true => Ok(()),
            false => Err(Refusal::new(Kind::OtherTeam)),
        }
    }

    /// Checks a permission on the team's connectors.
    pub fn check_permission(&self, world: &World, permission: Permission) -> Result<(), Refusal> {
        let verb = match permission {
            Permission::View => "view",
            Permission::Token => "get tokens from",
            Permission::Mutate => "create or change",
            Permission::Attach => "attach or detach",
            Permission::Revoke => "revoke everybody's tokens of",
        };
        match self {
            Self::Project { .. } if matches!(permission, Permission::Mutate | Permission::Attach) => {
                Err(Refusal::new(Kind::PersonRequired))
            }
            Self::Person { user, .. } if !world.member(user).is_some_and(|member| member.may(permission)) => {
                Err(Refusal::about(Kind::NotPermitted, verb))
            }
            Self::Project { .. } | Self::Person { .. } => Ok(()),
        }
    }

    /// Checks that the connector is linked to the caller's project, for its environment. A credential for the whole
    /// team needs no link.
    pub fn check_link(&self, connector: &Connector) -> Result<(), Refusal> {
        let (project_id, environment) = match self {
            Self::Project { project_id, environment, .. } => (project_id, Some(environment)),
            Self::Person { project_id: Some(project_id), .. } => (project_id, None),
            Self::Person { project_id: None, .. } => return Ok(()),
        };
        let link = connector.links.iter().find(|link| link.project_id == *project_id);
        let link = link.ok_or(Refusal::new(Kind::NotLinked))?;
        match environment {
            Some(environment) if !link.environments.contains(environment) => {
                Err(Refusal::about(Kind::NotEnabled, environment))
            }
            _ => Ok(()),
        }
    }

    /// Whether the caller may act in the project with this id.
    pub fn has_project(&self, id: &str) -> bool {
        match self {
            Self::Project { project_id, .. } | Self::Person { project_id: Some(project_id), .. } => project_id == id,
            Self::Person { project_id: None, .. } => true,
        }
    }

    /// The environment of a project's caller.
    pub fn environment(&self) -> Option<&str> {
        match self {
            Self::Project { environment, .. } => Some(environment),
            Self::Person { .. } => None,
        }
    }

    /// The member, or the user that the OIDC token was issued to.
    pub fn user(&self) -> Option<&str> {
        match self {
            Self::Project { user, .. } => user.as_deref(),
            Self::Person { user, .. } => Some(user),
        }
    }

    /// Whether the caller is a single user, who may not get other users' tokens.
    pub fn is_person(&self) -> bool {
        matches!(self, Self::Person { .. })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use bytes::Bytes;
    use http::{HeaderMap, HeaderValue, Method};

    use super::*;
    use crate::emulator::oidc::Subject;
    use crate::emulator::world::{AccessToken, DEVELOPMENT_LIFE, Link, Member, Role};

    fn request(target: &str, bearers: &[&str]) -> Request {
        let mut headers = HeaderMap::new();
        for bearer in bearers {
            headers.append("authorization", HeaderValue::try_from(format!("Bearer {bearer}")).expect("a header"));
        }
        Request::new(Method::GET, target, headers, Bytes::new())
    }

    #[test]
    fn each_kind_of_credential_is_recognized() {
        let (mut world, issuer) = (World::demo(), Issuer::new().expect("a key"));
        let team_wide = AccessToken { token: "vcp_team".into(), user: "user_ada".into(), project: None };
        world.access_tokens.push(team_wide);
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let oidc = issuer.issue(&Subject::development(&world), now, DEVELOPMENT_LIFE);
        let of = |bearers: &[&str]| Caller::authenticate(&world, &issuer, now, &request("/", bearers));
        let person = |project_id: Option<&str>, must_name_team| {
            let project_id = project_id.map(str::to_owned);
            Ok(Caller::Person { user: "user_ada".into(), project_id, must_name_team })
        };
        let project = Caller::Project {
            project_id: "prj_web".into(),
            environment: "development".into(),
            user: Some("user_ada".into()),
        };
        assert_eq!(of(&[&oidc]), Ok(project));
        assert_eq!(of(&["vca_demo_session"]), person(None, false));
        assert_eq!(of(&["vcp_demo_access_token"]), person(Some("prj_web"), true));
        assert_eq!(of(&["vcp_team"]), person(None, true));
        for (bearers, refused) in [
            (&[][..], Kind::MissingToken),
            (&["vcp_team", "vcp_team"], Kind::MissingToken),
            (&["vcp_other"], Kind::InvalidToken),
            (&[""], Kind::InvalidToken),
        ] {
            assert_eq!(of(bearers).map_err(|refusal| refusal.kind), Err(refused), "{bearers:?}");
        }
        let later = Caller::authenticate(&world, &issuer, now + DEVELOPMENT_LIFE, &request("/", &[&oidc]));
        assert_eq!(later.map_err(|refusal| refusal.kind), Err(Kind::ExpiredToken));
    }

    #[test]
    fn a_link_is_for_one_project_in_some_environments() {
        let mut connector = Connector::new("slack/x", "scl_x", "prj_web");
        let person = |project_id: Option<&str>| Caller::Person {
            user: "user_ada".into(),
            project_id: project_id.map(str::to_owned),
            must_name_team: true,
        };
        let project = |id: &str, environment: &str| Caller::Project {
            project_id: id.into(),
            environment: environment.into(),
            user: None,
        };
        connector.links = vec![Link { project_id: "prj_web".into(), environments: vec!["preview".into()] }];
        for (caller, refused) in [
            (project("prj_web", "preview"), None),
            (project("prj_web", "development"), Some(Kind::NotEnabled)),
            (project("prj_api", "preview"), Some(Kind::NotLinked)),
            (person(Some("prj_web")), None),
            (person(Some("prj_api")), Some(Kind::NotLinked)),
            (person(None), None),
        ] {
            assert_eq!(caller.check_link(&connector).err().map(|refusal| refusal.kind), refused, "{caller:?}");
        }
    }

    #[test]
    fn a_named_team_must_match_and_an_access_token_must_name_it() {
        let world = World::demo();
        let person = |must_name_team| Caller::Person { user: "user_ada".into(), project_id: None, must_name_team };
        for (target, session, access_token) in [
            ("/x", true, false),
            ("/x?teamId=team_acme", true, true),
            ("/x?slug=acme", true, true),
            ("/x?teamId=team_other", false, false),
            ("/x?teamId=team_acme&slug=other", false, false),
        ] {
            let is_ok = |must_name_team| person(must_name_team).check_team(&world, &request(target, &[])).is_ok();
            assert_eq!((is_ok(false), is_ok(true)), (session, access_token), "{target}");
        }
    }

    #[test]
    fn permissions_come_with_the_role_and_a_project_cannot_manage_connectors() {
        let mut world = World::demo();
        world.members.push(Member { id: "user_dev".into(), role: Role::Developer, may: None });
        let dev = Caller::Person { user: "user_dev".into(), project_id: None, must_name_team: false };
        let gone = Caller::Person { user: "user_gone".into(), project_id: None, must_name_team: false };
        let project = Caller::Project { project_id: "prj_web".into(), environment: "development".into(), user: None };
        let refused =
            |caller: &Caller, permission| caller.check_permission(&world, permission).err().map(|refusal| refusal.kind);
        assert_eq!(refused(&dev, Permission::Token), None);
        assert_eq!(refused(&dev, Permission::Attach), Some(Kind::NotPermitted));
        assert_eq!(refused(&gone, Permission::View), Some(Kind::NotPermitted));
        assert_eq!(refused(&project, Permission::Revoke), None);
        assert_eq!(refused(&project, Permission::Mutate), Some(Kind::PersonRequired));
    }
}
