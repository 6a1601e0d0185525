//! Who and what there is: a team, its members and projects, its connectors with links, installations and grants, and the
//! credentials that people hold. Data only, in the form of the seed file.
//!
//! References are ids; a seed may name a project by its name, which [`World::complete`] resolves.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::Script;
use super::limits::Limits;

/// How long a development OIDC token lives at Vercel.
pub const DEVELOPMENT_LIFE: Duration = Duration::from_secs(12 * 3600);
/// The environments that every project has.
pub const ENVIRONMENTS: [&str; 3] = ["development", "preview", "production"];

/// A team and all it has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// The team.
    pub team: Team,
    /// Who is in it. The first is who development OIDC tokens are issued to unless another is asked for.
    #[serde(default)]
    pub members: Vec<Member>,
    /// Its projects.
    #[serde(default)]
    pub projects: Vec<Project>,
    /// Its connectors.
    #[serde(default)]
    pub connectors: Vec<Connector>,
    /// Access tokens that its members made.
    #[serde(default)]
    pub access_tokens: Vec<AccessToken>,
    /// CLI sessions of its members.
    #[serde(default)]
    pub sessions: Vec<Session>,
    /// How many requests it may send in a minute; no limit if there is none.
    #[serde(default)]
    pub limits: Option<Limits>,
    /// What goes wrong from the start on.
    #[serde(default, skip_serializing)]
    pub faults: Vec<Script>,
}

/// A team.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// `team_…`; of the slug if it is not given.
    #[serde(default)]
    pub id: String,
    /// As in URLs.
    pub slug: String,
    /// How long a development OIDC token lives.
    #[serde(default = "development_life", with = "spoken")]
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
    /// `user_…`
    pub id: String,
    /// What the member may do.
    #[serde(default)]
    pub role: Role,
    /// Exactly what the member may do with connectors, instead of what comes with the role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub may: Option<Vec<Permission>>,
}

impl Member {
    /// Whether the member may do this.
    pub fn may(&self, permission: Permission) -> bool {
        self.may.as_deref().unwrap_or(self.role.permissions()).contains(&permission)
    }
}

/// A role in a team.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything.
    #[default]
    Owner,
    /// Everything with connectors.
    Member,
    /// Uses connectors, but neither changes nor attaches them.
    Developer,
    /// Looks only.
    Viewer,
}

impl Role {
    /// What comes with the role. The CLI says of attaching and detaching that it takes an owner or a member; the rest is
    /// by the general description of the roles, since no table for Connect is published.
    pub fn permissions(self) -> &'static [Permission] {
        use Permission::{Attach, Mutate, Revoke, Token, View};
        match self {
            Self::Owner | Self::Member => &[View, Token, Mutate, Attach, Revoke],
            Self::Developer => &[View, Token],
            Self::Viewer => &[View],
        }
    }
}

/// What one may be allowed to do with connectors. Vercel permits each separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// See connectors.
    View,
    /// Get tokens, for the app and for oneself, and revoke one's own.
    Token,
    /// Create, change and remove connectors.
    Mutate,
    /// Attach them to projects, and detach them.
    Attach,
    /// Revoke everybody's tokens.
    Revoke,
}

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// `prj_…`; of the name if it is not given.
    #[serde(default)]
    pub id: String,
    /// As in URLs.
    pub name: String,
    /// Its environment variables, for all environments.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// An access token: it stands for a member, within one project or the whole team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessToken {
    /// The secret.
    pub token: String,
    /// Whose it is.
    pub user: String,
    /// Where it may act; everywhere in the team if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
}

/// A member who is signed in with the CLI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// The secret.
    pub token: String,
    /// Whose it is.
    pub user: String,
}

/// A connector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connector {
    /// `scl_…`; of the uid if it is not given.
    #[serde(default)]
    pub id: String,
    /// `slack/acme-slack`
    pub uid: String,
    /// `slack`; the part of the uid before the slash if it is not given.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// What the connector is for, as `slack` or `mcp.linear.app`; the kind if it is not given.
    #[serde(default)]
    pub service: String,
    /// Which projects may use it, and where.
    #[serde(default)]
    pub links: Vec<Link>,
    /// Whether an operator must install it before it gives tokens; as is usual for its kind if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs_installation: Option<bool>,
    /// Where it is installed.
    #[serde(default)]
    pub installations: Vec<Installation>,
    /// Which users have consented: ids of the app's own, which need not be members.
    #[serde(default)]
    pub granted_to: Vec<String>,
    /// How long its tokens live.
    #[serde(default = "token_life", with = "spoken")]
    pub token_life: Duration,
    /// What the provider is to know of it: where it is, client id and secret, an API key. Which keys there are is the
    /// business of its kind.
    #[serde(default)]
    pub data: BTreeMap<String, Value>,
    /// What the provider gave, by whom it is for: refresh tokens and the like. Kept with the state; no answer shows it.
    #[serde(default)]
    pub vault: BTreeMap<String, Value>,
    /// Tokens that were brought in from elsewhere, and are given out while they last.
    #[serde(default)]
    pub imported: Vec<Imported>,
    /// Where what the provider sends goes; three at the most.
    #[serde(default)]
    pub trigger_destinations: Vec<Value>,
    /// How it looks: `icon`, `backgroundColor`, `accentColor`.
    #[serde(default)]
    pub branding: BTreeMap<String, String>,
    /// Since when there is it, in milliseconds.
    #[serde(default)]
    pub created_at: u64,
    /// Since when it is as it is, in milliseconds.
    #[serde(default)]
    pub updated_at: u64,
}

/// A project that may use a connector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The project.
    #[serde(rename = "project")]
    pub project_id: String,
    /// In these environments.
    pub environments: Vec<String>,
}

/// An installation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installation {
    /// `inst_…`
    pub id: String,
    /// The provider's own name for where it is installed.
    #[serde(rename = "tenant")]
    pub tenant_id: String,
}

/// A provider's token that was brought in from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Imported {
    /// The token.
    pub token: String,
    /// Its end, in milliseconds.
    pub expires_at: u64,
    /// The user that it is for; the app if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// In this environment.
    pub environment: String,
    /// In this installation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installation: Option<String>,
}

/// One thing that is wrong with a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The keys and indexes that lead to it.
    pub path: Vec<Step>,
    /// What is wrong and what would be right.
    pub message: String,
}

/// A step into a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// To what is under a key.
    Key(&'static str),
    /// To an item of a list.
    Item(usize),
}

impl Connector {
    /// A connector of this uid and id: linked to `project_id` for development, installed, with tokens of an hour.
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

    /// Whether an operator must install it before it gives tokens. Slack and GitHub apps are installed.
    pub fn needs_installation(&self) -> bool {
        self.needs_installation.unwrap_or(matches!(self.kind.as_str(), "slack" | "github"))
    }
}

/// What a vault calls a user.
pub(super) fn user_key(id: &str) -> String {
    format!("user:{id}")
}

impl World {
    /// The world of the demo: one connector that works, and one for each way to be refused.
    pub fn demo() -> Self {
        let project = "prj_web";
        let granted = |mut connector: Connector| {
            connector.granted_to.push("user_ada".into());
            connector
        };
        let links_to =
            |environment: &str| vec![Link { project_id: project.into(), environments: vec![environment.into()] }];
        let mut world = Self {
            team: Team { id: "team_acme".into(), slug: "acme".into(), ..Team::default() },
            members: vec![Member { id: "user_ada".into(), role: Role::Owner, may: None }],
            projects: vec![Project { id: project.into(), name: "web".into(), env: BTreeMap::new() }],
            connectors: vec![
                granted(Connector::new("slack/acme-slack", "scl_slack", project)),
                granted(Connector::new("github/acme-github", "scl_github", project)),
                granted(Connector::new("oauth/linear", "scl_linear", project)),
                Connector { links: Vec::new(), ..Connector::new("salesforce/crm", "scl_unlinked", project) },
                Connector {
                    links: links_to("production"),
                    ..Connector::new("snowflake/warehouse", "scl_production", project)
                },
                Connector {
                    installations: Vec::new(),
                    ..Connector::new("slack/not-installed", "scl_uninstalled", project)
                },
            ],
            access_tokens: vec![AccessToken {
                token: "vcp_demo_access_token".into(),
                user: "user_ada".into(),
                project: Some(project.into()),
            }],
            sessions: vec![Session { token: "vca_demo_session".into(), user: "user_ada".into() }],
            limits: None,
            faults: Vec::new(),
        };
        world.complete();
        world
    }

    /// The connector of this uid or id.
    pub fn connector(&mut self, name: &str) -> Option<&mut Connector> {
        self.connectors.iter_mut().find(|connector| connector.uid == name || connector.id == name)
    }

    /// The same, to look at.
    pub fn find(&self, name: &str) -> Option<&Connector> {
        self.connectors.iter().find(|connector| connector.uid == name || connector.id == name)
    }

    /// The project of this name or id.
    pub fn project(&self, name: &str) -> Option<&Project> {
        self.projects.iter().find(|project| project.id == name || project.name == name)
    }

    /// The member of this id.
    pub fn member(&self, id: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// Whether a query names this team, by id or slug.
    pub fn is_team(&self, name: &str) -> bool {
        name == self.team.id || name == self.team.slug
    }

    /// Fills in what follows from the rest.
    pub fn complete(&mut self) {
        let made = |id: &mut String, prefix: &str, of: &str| {
            if id.is_empty() {
                *id = format!("{prefix}_{}", of.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
            }
        };
        made(&mut self.team.id, "team", &self.team.slug);
        for project in &mut self.projects {
            made(&mut project.id, "prj", &project.name);
        }
        for connector in &mut self.connectors {
            made(&mut connector.id, "scl", &connector.uid);
            if connector.kind.is_empty() {
                connector.kind = connector.uid.split('/').next().unwrap_or_default().into();
            }
            if connector.service.is_empty() {
                connector.service.clone_from(&connector.kind);
            }
        }
        let id_of = |name: &mut String, projects: &[Project]| {
            if let Some(project) = projects.iter().find(|project| project.name == *name) {
                name.clone_from(&project.id);
            }
        };
        self.connectors.iter_mut().flat_map(|c| &mut c.links).for_each(|l| id_of(&mut l.project_id, &self.projects));
        self.access_tokens.iter_mut().filter_map(|t| t.project.as_mut()).for_each(|p| id_of(p, &self.projects));
    }

    /// What does not fit together: references to what is not there, and what is there twice.
    pub fn problems(&self) -> Vec<Problem> {
        use Step::{Item, Key};
        let mut problems = Vec::new();
        let mut check = |is_right: bool, path: &[Step], message: String| {
            if !is_right {
                problems.push(Problem { path: path.to_vec(), message });
            }
        };
        let list = |names: Vec<&str>| if names.is_empty() { "none".into() } else { names.join(", ") };
        let members = list(self.members.iter().map(|m| m.id.as_str()).collect());
        let projects = list(self.projects.iter().map(|p| p.name.as_str()).collect());
        let no_member = |id: &str| format!("there is no member `{id}`; there is: {members}");
        let no_project = |id: &str| format!("there is no project `{id}`; there is: {projects}");
        check(!self.team.slug.is_empty(), &[Key("team"), Key("slug")], "a team needs a slug, as `acme`".into());
        for (i, connector) in self.connectors.iter().enumerate() {
            let at = |key| [Key("connectors"), Item(i), Key(key)];
            check(!connector.uid.is_empty(), &at("uid"), "a connector needs a uid, as `slack/acme-slack`".into());
            for (j, link) in connector.links.iter().enumerate() {
                let at = |key| [Key("connectors"), Item(i), Key("links"), Item(j), Key(key)];
                check(self.project(&link.project_id).is_some(), &at("project"), no_project(&link.project_id));
                let is_any = !link.environments.is_empty();
                check(is_any, &at("environments"), format!("name one at least of {}", ENVIRONMENTS.join(", ")));
            }
        }
        for (i, token) in self.access_tokens.iter().enumerate() {
            let at = |key| [Key("access_tokens"), Item(i), Key(key)];
            check(self.member(&token.user).is_some(), &at("user"), no_member(&token.user));
            let project = token.project.as_deref();
            check(
                project.is_none_or(|p| self.project(p).is_some()),
                &at("project"),
                no_project(project.unwrap_or_default()),
            );
        }
        for (i, session) in self.sessions.iter().enumerate() {
            let at = [Key("sessions"), Item(i), Key("user")];
            check(self.member(&session.user).is_some(), &at, no_member(&session.user));
        }
        for (i, fault) in self.faults.iter().enumerate() {
            let wrong = fault.effect().err().unwrap_or_default();
            check(wrong.is_empty(), &[Key("faults"), Item(i), Key("kind")], wrong);
        }
        let named: [(&'static str, &'static str, Vec<&str>); 7] = [
            ("members", "id", self.members.iter().map(|m| m.id.as_str()).collect()),
            ("projects", "id", self.projects.iter().map(|p| p.id.as_str()).collect()),
            ("projects", "name", self.projects.iter().map(|p| p.name.as_str()).collect()),
            ("connectors", "id", self.connectors.iter().map(|c| c.id.as_str()).collect()),
            ("connectors", "uid", self.connectors.iter().map(|c| c.uid.as_str()).collect()),
            ("access_tokens", "token", self.access_tokens.iter().map(|t| t.token.as_str()).collect()),
            ("sessions", "token", self.sessions.iter().map(|s| s.token.as_str()).collect()),
        ];
        for (list, key, names) in named {
            for (i, name) in names.iter().enumerate().filter(|(i, name)| names[..*i].contains(name)) {
                // A secret is not repeated.
                let shown = if key == "token" { String::new() } else { format!(" `{name}`") };
                check(false, &[Key(list), Item(i), Key(key)], format!("another has the {key}{shown}, too"));
            }
        }
        problems
    }
}

/// A path as people write it, such as `connectors[2].links[0].project`.
pub(super) fn shown(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        let _ = match step {
            Step::Item(index) => write!(text, "[{index}]"),
            Step::Key(key) if text.is_empty() => write!(text, "{key}"),
            Step::Key(key) => write!(text, ".{key}"),
        };
    }
    text
}

fn development_life() -> Duration {
    DEVELOPMENT_LIFE
}

fn token_life() -> Duration {
    Duration::from_secs(3600)
}

/// Durations as people write them, such as `1h 30m`.
pub(super) mod spoken {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::emulator) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*duration))
    }

    pub(in crate::emulator) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        /// No time that anything lasts is beyond what a date can say.
        const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
        let text = String::deserialize(from)?;
        let expected = "expected a duration of ten years at the most, as \"90s\" or \"12h\"";
        let duration = humantime::parse_duration(&text).ok().filter(|duration| *duration <= LONGEST);
        duration.ok_or_else(|| D::Error::custom(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_fits_together_and_survives_being_written_down() {
        let world = World::demo();
        assert_eq!(world.problems(), []);
        let json = serde_json::to_string(&world).expect("JSON");
        assert_eq!(serde_json::from_str::<World>(&json).expect("a world"), world);
    }

    #[test]
    fn each_permission_is_given_separately() {
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
