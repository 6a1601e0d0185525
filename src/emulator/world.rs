//! Who and what there is: a team, its projects and users, its connectors with links, installations and grants. Data only.

use std::time::Duration;

/// A team and all it has.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// The team.
    pub team: Team,
    /// Ids of its users.
    pub users: Vec<String>,
    /// Its projects.
    pub projects: Vec<Project>,
    /// Its connectors.
    pub connectors: Vec<Connector>,
    /// Access tokens that its users made.
    pub access_tokens: Vec<AccessToken>,
    /// Secrets of the CLI sessions of its first user.
    pub cli_sessions: Vec<String>,
}

/// A team.
#[derive(Debug, Clone, Default)]
pub struct Team {
    /// `team_…`
    pub id: String,
    /// As in URLs.
    pub slug: String,
}

/// A project.
#[derive(Debug, Clone)]
pub struct Project {
    /// `prj_…`
    pub id: String,
    /// As in URLs.
    pub name: String,
}

/// An access token: it stands for a user, within one project.
#[derive(Debug, Clone)]
pub struct AccessToken {
    /// The secret.
    pub secret: String,
    /// Whose it is.
    pub user_id: String,
    /// Where it may act.
    pub project_id: String,
}

/// A connector.
#[derive(Debug, Clone)]
pub struct Connector {
    /// `scl_…`
    pub id: String,
    /// `slack/acme-slack`
    pub uid: String,
    /// `slack`
    pub kind: String,
    /// Which projects may use it, and where.
    pub links: Vec<Link>,
    /// Whether an operator must install it before it gives tokens.
    pub needs_installation: bool,
    /// Where it is installed.
    pub installations: Vec<Installation>,
    /// Which users have consented.
    pub granted_to: Vec<String>,
    /// How long its tokens live.
    pub token_life: Duration,
}

/// A project that may use a connector.
#[derive(Debug, Clone)]
pub struct Link {
    /// The project.
    pub project_id: String,
    /// In these environments.
    pub environments: Vec<String>,
}

/// An installation.
#[derive(Debug, Clone)]
pub struct Installation {
    /// `inst_…`
    pub id: String,
    /// The provider's own name for where it is installed.
    pub tenant_id: String,
}

impl Connector {
    /// A connector of this uid and id: linked to `project_id` for development, installed, with tokens of an hour.
    pub fn new(uid: &str, id: &str, project_id: &str) -> Self {
        let kind = uid.split('/').next().unwrap_or_default().to_owned();
        Self {
            id: id.into(),
            uid: uid.into(),
            links: vec![Link { project_id: project_id.into(), environments: vec!["development".into()] }],
            needs_installation: matches!(kind.as_str(), "slack" | "github"),
            installations: vec![Installation { id: format!("inst_{id}"), tenant_id: "T0ACME".into() }],
            granted_to: Vec::new(),
            token_life: Duration::from_secs(3600),
            kind,
        }
    }
}

impl World {
    /// The world of the demo: one connector that works, and one for each way to be refused.
    pub fn demo() -> Self {
        let project = "prj_web";
        let granted = |mut connector: Connector| {
            connector.granted_to.push("user_ada".into());
            connector
        };
        Self {
            team: Team { id: "team_acme".into(), slug: "acme".into() },
            users: vec!["user_ada".into()],
            projects: vec![Project { id: project.into(), name: "web".into() }],
            connectors: vec![
                granted(Connector::new("slack/acme-slack", "scl_slack", project)),
                granted(Connector::new("github/acme-github", "scl_github", project)),
                granted(Connector::new("oauth/linear", "scl_linear", project)),
                Connector { links: Vec::new(), ..Connector::new("salesforce/crm", "scl_unlinked", project) },
                Connector {
                    links: vec![Link { project_id: project.into(), environments: vec!["production".into()] }],
                    ..Connector::new("snowflake/warehouse", "scl_production", project)
                },
                Connector {
                    installations: Vec::new(),
                    ..Connector::new("slack/not-installed", "scl_uninstalled", project)
                },
            ],
            access_tokens: vec![AccessToken {
                secret: "vcp_demo_access_token".into(),
                user_id: "user_ada".into(),
                project_id: project.into(),
            }],
            cli_sessions: vec!["vca_demo_session".into()],
        }
    }

    /// The connector of this uid or id.
    pub fn connector(&mut self, name: &str) -> Option<&mut Connector> {
        self.connectors.iter_mut().find(|connector| connector.uid == name || connector.id == name)
    }
}
