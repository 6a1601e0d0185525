//! The emulator's data: a team, its members and projects, its connectors with links, installations and grants, and the
//! members' credentials. The seed file and the state file have this form.
//!
//! References are ids. A seed may refer to a project by name, which [`World::complete`] resolves.

mod demo;
mod validation;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::FaultScript;
use super::limits::Limits;
use super::provider_kind::ProviderKind;
pub(super) use validation::format_path;
pub use validation::{PathStep, Problem};

/// The lifetime of a development OIDC token at Vercel.
pub const DEVELOPMENT_LIFE: Duration = Duration::from_secs(12 * 3600);
/// The environments that every project has.
pub const ENVIRONMENTS: [&str; 3] = ["development", "preview", "production"];

/// A team and everything that belongs to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// The team.
    pub team: Team,
    /// The team's members. Development OIDC tokens are issued to the first, unless another is requested.
    #[serde(default)]
    pub members: Vec<Member>,
    /// The team's projects.
    #[serde(default)]
    pub projects: Vec<Project>,
    /// The team's connectors.
    #[serde(default)]
    pub connectors: Vec<Connector>,
    /// The members' access tokens.
    #[serde(default)]
    pub access_tokens: Vec<AccessToken>,
    /// The members' CLI sessions.
    #[serde(default)]
    pub sessions: Vec<Session>,
    /// The rate limits; none if absent.
    #[serde(default)]
    pub limits: Option<Limits>,
    /// Faults that are active from the start.
    #[serde(default, skip_serializing)]
    pub faults: Vec<FaultScript>,
}

/// A team.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// `team_…`; derived from the slug if absent.
    #[serde(default)]
    pub id: String,
    /// The name in URLs.
    pub slug: String,
    /// The lifetime of development OIDC tokens.
    #[serde(default = "development_life", with = "duration_text")]
    pub oidc_token_life: Duration,
}

impl Default for Team {
    fn default() -> Self {
        Self { id: String::new(), slug: String::new(), oidc_token_life: DEVELOPMENT_LIFE }
    }
}

/// A member of the team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// The id, `user_…`.
    pub id: String,
    /// The role, which determines the permissions.
    #[serde(default)]
    pub role: Role,
    /// The permissions on connectors, instead of the role's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub may: Option<Vec<Permission>>,
}

impl Member {
    /// Whether the member has this permission.
    pub fn may(&self, permission: Permission) -> bool {
        self.may.as_deref().unwrap_or(self.role.permissions()).contains(&permission)
    }
}

/// A role in a team.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// All permissions.
    #[default]
    Owner,
    /// All permissions on connectors.
    Member,
    /// May use connectors, but not change or attach them.
    Developer,
    /// May only view.
    Viewer,
}

impl Role {
    /// The role's permissions. The CLI's help says that attaching and detaching requires an owner or a member; the rest
    /// follows the general description of the roles, as there is no published table for Connect.
    pub fn permissions(self) -> &'static [Permission] {
        use Permission::{Attach, Mutate, Revoke, Token, View};
        match self {
            Self::Owner | Self::Member => &[View, Token, Mutate, Attach, Revoke],
            Self::Developer => &[View, Token],
            Self::Viewer => &[View],
        }
    }
}

/// A permission on connectors. Vercel grants each separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// View connectors.
    View,
    /// Get tokens for the app and for oneself, and revoke one's own.
    Token,
    /// Create, change and delete connectors.
    Mutate,
    /// Attach connectors to projects and detach them.
    Attach,
    /// Revoke the tokens of all subjects.
    Revoke,
}

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// `prj_…`; derived from the name if absent.
    #[serde(default)]
    pub id: String,
    /// The name in URLs.
    pub name: String,
    /// Environment variables, the same in all environments.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// An access token of a member, for one project or the whole team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessToken {
    /// The secret.
    pub token: String,
    /// The member's id.
    pub user: String,
    /// The project that it is restricted to; the whole team if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
}

/// A CLI session of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// The secret.
    pub token: String,
    /// The member's id.
    pub user: String,
}

/// A connector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connector {
    /// `scl_…`; derived from the uid if absent.
    #[serde(default)]
    pub id: String,
    /// The unique name, such as `slack/acme-slack`.
    pub uid: String,
    /// The type, such as `slack`; the part of the uid before the slash if absent.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The service, such as `slack` or `mcp.linear.app`; the type if absent.
    #[serde(default)]
    pub service: String,
    /// The projects and environments that may use it.
    #[serde(default)]
    pub links: Vec<Link>,
    /// Whether it must be installed before it gives tokens; depends on the type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs_installation: Option<bool>,
    /// The installations.
    #[serde(default)]
    pub installations: Vec<Installation>,
    /// The users who have consented, by the app's own ids. They need not be members.
    #[serde(default)]
    pub granted_to: Vec<String>,
    /// The lifetime of its tokens.
    #[serde(default = "token_life", with = "duration_text")]
    pub token_life: Duration,
    /// The provider's settings, such as issuer, client id and secret, or an API key. The keys depend on the type; see
    /// `provider_client::settings`.
    #[serde(default)]
    pub data: BTreeMap<String, Value>,
    /// Tokens and refresh tokens from the provider, by subject. Saved with the state; never part of a response.
    #[serde(default)]
    pub vault: BTreeMap<String, Value>,
    /// Imported tokens, which are returned while they are valid.
    #[serde(default)]
    pub imported: Vec<ImportedToken>,
    /// Destinations of the provider's events; at most three.
    #[serde(default)]
    pub trigger_destinations: Vec<Value>,
    /// `icon`, `backgroundColor` and `accentColor`.
    #[serde(default)]
    pub branding: BTreeMap<String, String>,
    /// Time of creation, in milliseconds since 1970.
    #[serde(default)]
    pub created_at: u64,
    /// Time of the last change, in milliseconds since 1970.
    #[serde(default)]
    pub updated_at: u64,
}

/// A connector's link to a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The project.
    #[serde(rename = "project")]
    pub project_id: String,
    /// The environments in which the project may use the connector.
    pub environments: Vec<String>,
}

/// An installation of a connector at a provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installation {
    /// The id, `inst_…`.
    pub id: String,
    /// The provider's name for the workspace or account.
    #[serde(rename = "tenant")]
    pub tenant_id: String,
}

/// An imported token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportedToken {
    /// The token.
    pub token: String,
    /// The expiry, in milliseconds since 1970.
    pub expires_at: u64,
    /// The user that it is for; the app if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The environment that it is for.
    pub environment: String,
    /// The installation that it is for; any if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installation: Option<String>,
}

impl Connector {
    /// An installed connector that is linked to `project_id` for development, with a token lifetime of an hour.
    pub fn new(uid: &str, id: &str, project_id: &str) -> Self {
        let kind = uid.split('/').next().unwrap_or_default().to_owned();
        Self {
            id: id.into(),
            uid: uid.into(),
            service: kind.clone(),
            links: vec![Link { project_id: project_id.into(), environments: vec!["development".into()] }],
            needs_installation: None,
            installations: vec![Installation { id: format!("inst_{id}"), tenant_id: "T0ACME".into() }],
            granted_to: Vec::new(),
            token_life: token_life(),
            data: BTreeMap::new(),
            vault: BTreeMap::new(),
            imported: Vec::new(),
            trigger_destinations: Vec::new(),
            branding: BTreeMap::new(),
            created_at: 0,
            updated_at: 0,
            kind,
        }
    }

    /// The part of the uid after the slash.
    pub fn name(&self) -> &str {
        self.uid.split_once('/').map_or(&self.uid, |(_, name)| name)
    }

    /// The provider of its tokens.
    pub fn provider(&self) -> ProviderKind {
        ProviderKind::of_type(&self.kind)
    }

    /// Whether it must be installed before it gives tokens. By default that holds for Slack and GitHub.
    pub fn needs_installation(&self) -> bool {
        self.needs_installation.unwrap_or(matches!(self.provider(), ProviderKind::Slack | ProviderKind::GitHub))
    }
}

/// The vault key of a user.
pub(super) fn user_key(id: &str) -> String {
    format!("user:{id}")
}

impl World {
    /// The connector with this uid or id.
    pub fn connector(&self, name: &str) -> Option<&Connector> {
        self.connectors.iter().find(|connector| connector.uid == name || connector.id == name)
    }

    /// The connector with this uid or id, mutably.
    pub fn connector_mut(&mut self, name: &str) -> Option<&mut Connector> {
        self.connectors.iter_mut().find(|connector| connector.uid == name || connector.id == name)
    }

    /// The project with this name or id.
    pub fn project(&self, name: &str) -> Option<&Project> {
        self.projects.iter().find(|project| project.id == name || project.name == name)
    }

    /// The member with this id.
    pub fn member(&self, id: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// Whether this is the team's id or slug.
    pub fn is_team(&self, name: &str) -> bool {
        name == self.team.id || name == self.team.slug
    }
}

fn development_life() -> Duration {
    DEVELOPMENT_LIFE
}

fn token_life() -> Duration {
    Duration::from_secs(3600)
}

/// Serializes durations as text, such as `1h 30m`.
pub(super) mod duration_text {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::emulator) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*duration))
    }

    pub(in crate::emulator) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        /// Keeps the current time plus any duration within the range of a date.
        const MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
        let text = String::deserialize(from)?;
        let expected = "expected a duration of ten years at the most, as \"90s\" or \"12h\"";
        let duration = humantime::parse_duration(&text).ok().filter(|duration| *duration <= MAX);
        duration.ok_or_else(|| D::Error::custom(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_valid_and_survives_serialization() {
        let world = World::demo();
        assert_eq!(world.problems(), []);
        let json = serde_json::to_string(&world).expect("JSON");
        assert_eq!(serde_json::from_str::<World>(&json).expect("a world"), world);
    }

    #[test]
    fn each_permission_is_granted_separately() {
        let member = |role, may| Member { id: "user_x".into(), role, may };
        let all = [Permission::View, Permission::Token, Permission::Mutate, Permission::Attach, Permission::Revoke];
        for (role, may) in [
            (Role::Owner, [true; 5]),
            (Role::Member, [true; 5]),
            (Role::Developer, [true, true, false, false, false]),
            (Role::Viewer, [true, false, false, false, false]),
        ] {
            assert_eq!(all.map(|permission| member(role, None).may(permission)), may, "{role:?}");
        }
        for only in all {
            let member = member(Role::Viewer, Some(vec![only]));
            assert_eq!(all.map(|permission| member.may(permission)), all.map(|other| other == only));
        }
    }
}
