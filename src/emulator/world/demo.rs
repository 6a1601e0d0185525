//! The data of `demo`.

use std::collections::BTreeMap;

use super::{AccessToken, Connector, Link, Member, Project, Role, Session, Team, World};

impl World {
    /// Connectors that work, and one for each documented way to be refused.
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
}
