//! The caller's leg: who asks, and what they may ask for. Three kinds of credential are known: OIDC tokens, which stand for
//! a project in an environment; access tokens and CLI sessions, which stand for a member of the team.

use std::time::SystemTime;

use super::errors::{Kind, Refusal};
use super::exchange::Asked;
use super::oidc::{Issuer, Rejection};
use super::world::{Connector, Permission, World};

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A project in an environment, by its OIDC token.
    Project {
        /// The project.
        project_id: String,
        /// The environment.
        environment: String,
        /// Whom a development token was issued to.
        user: Option<String>,
    },
    /// A member, by an access token or a CLI session.
    Person {
        /// The member.
        user: String,
        /// The only project in which the credential may act.
        project_id: Option<String>,
        /// Whether it is an access token, which has to name its team.
        names_team: bool,
    },
}

impl Caller {
    /// Finds out who asks at `now`.
    pub fn authenticate(world: &World, issuer: &Issuer, now: SystemTime, asked: &Asked) -> Result<Self, Refusal> {
        let bearer = asked.bearer().ok_or(Refusal::new(Kind::MissingToken))?;
        if let Some(session) = world.sessions.iter().find(|session| session.token == bearer) {
            return Ok(Self::Person { user: session.user.clone(), project_id: None, names_team: false });
        }
        if let Some(token) = world.access_tokens.iter().find(|token| token.token == bearer) {
            let (user, project_id) = (token.user.clone(), token.project.clone());
            return Ok(Self::Person { user, project_id, names_team: true });
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

    /// Whether the team that the query names is theirs, and named if it has to be.
    pub fn is_in_team(&self, world: &World, asked: &Asked) -> Result<(), Refusal> {
        let mut named = ["teamId", "slug"].into_iter().filter_map(|name| asked.query(name)).peekable();
        let is_missing = named.peek().is_none() && matches!(self, Self::Person { names_team: true, .. });
        match !is_missing && named.all(|name| world.is_team(name)) {
            true => Ok(()),
            false => Err(Refusal::new(Kind::OtherTeam)),
        }
    }

    /// Whether they may do this with connectors.
    pub fn may(&self, world: &World, permission: Permission) -> Result<(), Refusal> {
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

    /// Whether a link lets them use the connector. A credential for the whole team needs none.
    pub fn may_use(&self, connector: &Connector) -> Result<(), Refusal> {
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

    /// Whether they may act in a project.
    pub fn is_in_project(&self, id: &str) -> bool {
        match self {
            Self::Project { project_id, .. } | Self::Person { project_id: Some(project_id), .. } => project_id == id,
            Self::Person { project_id: None, .. } => true,
        }
    }

    /// The environment, if there is one.
    pub fn environment(&self) -> Option<&str> {
        match self {
            Self::Project { environment, .. } => Some(environment),
            Self::Person { .. } => None,
        }
    }

    /// The user that they are, or that their token was issued to.
    pub fn user(&self) -> Option<&str> {
        match self {
            Self::Project { user, .. } => user.as_deref(),
            Self::Person { user, .. } => Some(user),
        }
    }

    /// Whether they are one user, and so may ask for no other's tokens.
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

    fn asked(target: &str, bearers: &[&str]) -> Asked {
        let mut headers = HeaderMap::new();
        for bearer in bearers {
            headers.append("authorization", HeaderValue::try_from(format!("Bearer {bearer}")).expect("a header"));
        }
        Asked::new(Method::GET, target, headers, Bytes::new())
    }

    #[test]
    fn each_credential_is_known_for_what_it_is() {
        let (mut world, issuer) = (World::demo(), Issuer::new().expect("a key"));
        let team_wide = AccessToken { token: "vcp_team".into(), user: "user_ada".into(), project: None };
        world.access_tokens.push(team_wide);
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let oidc = issuer.issue(&Subject::development(&world), now, DEVELOPMENT_LIFE);
        let of = |bearers: &[&str]| Caller::authenticate(&world, &issuer, now, &asked("/", bearers));
        let person = |project_id: Option<&str>, names_team| {
            let project_id = project_id.map(str::to_owned);
            Ok(Caller::Person { user: "user_ada".into(), project_id, names_team })
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
        let later = Caller::authenticate(&world, &issuer, now + DEVELOPMENT_LIFE, &asked("/", &[&oidc]));
        assert_eq!(later.map_err(|refusal| refusal.kind), Err(Kind::ExpiredToken));
    }

    #[test]
    fn links_bind_a_project_and_its_environment() {
        let mut connector = Connector::new("slack/x", "scl_x", "prj_web");
        let person = |project_id: Option<&str>| Caller::Person {
            user: "user_ada".into(),
            project_id: project_id.map(str::to_owned),
            names_team: true,
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
            assert_eq!(caller.may_use(&connector).err().map(|refusal| refusal.kind), refused, "{caller:?}");
        }
    }

    #[test]
    fn a_team_is_named_rightly_or_not_at_all_and_by_an_access_token_always() {
        let world = World::demo();
        let person = |names_team| Caller::Person { user: "user_ada".into(), project_id: None, names_team };
        for (target, session, access_token) in [
            ("/x", true, false),
            ("/x?teamId=team_acme", true, true),
            ("/x?slug=acme", true, true),
            ("/x?teamId=team_other", false, false),
            ("/x?teamId=team_acme&slug=other", false, false),
        ] {
            let is_in = |names_team| person(names_team).is_in_team(&world, &asked(target, &[])).is_ok();
            assert_eq!((is_in(false), is_in(true)), (session, access_token), "{target}");
        }
    }

    #[test]
    fn a_role_permits_and_a_project_is_no_person() {
        let mut world = World::demo();
        world.members.push(Member { id: "user_dev".into(), role: Role::Developer, may: None });
        let dev = Caller::Person { user: "user_dev".into(), project_id: None, names_team: false };
        let gone = Caller::Person { user: "user_gone".into(), project_id: None, names_team: false };
        let project = Caller::Project { project_id: "prj_web".into(), environment: "development".into(), user: None };
        let refused = |caller: &Caller, permission| caller.may(&world, permission).err().map(|refusal| refusal.kind);
        assert_eq!(refused(&dev, Permission::Token), None);
        assert_eq!(refused(&dev, Permission::Attach), Some(Kind::NotPermitted));
        assert_eq!(refused(&gone, Permission::View), Some(Kind::NotPermitted));
        assert_eq!(refused(&project, Permission::Revoke), None);
        assert_eq!(refused(&project, Permission::Mutate), Some(Kind::PersonRequired));
    }
}
