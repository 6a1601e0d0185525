//! Completing and validating a [`World`].

use std::fmt::Write;

use super::{ENVIRONMENTS, Project, World};

/// An error in the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The keys and indexes that lead to the wrong value.
    pub path: Vec<PathStep>,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// A step of a path into a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathStep {
    /// The value of a key.
    Key(&'static str),
    /// An item of a list, by index.
    Item(usize),
}

impl World {
    /// Fills in ids, types and services that are absent, and replaces names of projects by their ids.
    pub fn complete(&mut self) {
        let derive_id = |id: &mut String, prefix: &str, of: &str| {
            if id.is_empty() {
                *id = format!("{prefix}_{}", of.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
            }
        };
        derive_id(&mut self.team.id, "team", &self.team.slug);
        for project in &mut self.projects {
            derive_id(&mut project.id, "prj", &project.name);
        }
        for connector in &mut self.connectors {
            derive_id(&mut connector.id, "scl", &connector.uid);
            if connector.kind.is_empty() {
                connector.kind = connector.uid.split('/').next().unwrap_or_default().into();
            }
            if connector.service.is_empty() {
                connector.service.clone_from(&connector.kind);
            }
        }
        let resolve = |name: &mut String, projects: &[Project]| {
            if let Some(project) = projects.iter().find(|project| project.name == *name) {
                name.clone_from(&project.id);
            }
        };
        self.connectors.iter_mut().flat_map(|c| &mut c.links).for_each(|l| resolve(&mut l.project_id, &self.projects));
        self.access_tokens.iter_mut().filter_map(|t| t.project.as_mut()).for_each(|p| resolve(p, &self.projects));
    }

    /// Finds missing values, references to members or projects that do not exist, duplicates, and invalid faults.
    pub fn problems(&self) -> Vec<Problem> {
        use PathStep::{Item, Key};
        let mut problems = Vec::new();
        let mut check = |is_valid: bool, path: &[PathStep], message: String| {
            if !is_valid {
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
            let error = fault.effect().err().map(|e| e.to_string()).unwrap_or_default();
            check(error.is_empty(), &[Key("faults"), Item(i), Key("kind")], error);
        }
        let unique: [(&'static str, &'static str, Vec<&str>); 7] = [
            ("members", "id", self.members.iter().map(|m| m.id.as_str()).collect()),
            ("projects", "id", self.projects.iter().map(|p| p.id.as_str()).collect()),
            ("projects", "name", self.projects.iter().map(|p| p.name.as_str()).collect()),
            ("connectors", "id", self.connectors.iter().map(|c| c.id.as_str()).collect()),
            ("connectors", "uid", self.connectors.iter().map(|c| c.uid.as_str()).collect()),
            ("access_tokens", "token", self.access_tokens.iter().map(|t| t.token.as_str()).collect()),
            ("sessions", "token", self.sessions.iter().map(|s| s.token.as_str()).collect()),
        ];
        for (list, key, names) in unique {
            for (i, name) in names.iter().enumerate().filter(|(i, name)| names[..*i].contains(name)) {
                // Tokens are secrets and not shown.
                let shown = if key == "token" { String::new() } else { format!(" `{name}`") };
                check(false, &[Key(list), Item(i), Key(key)], format!("another has the {key}{shown}, too"));
            }
        }
        problems
    }
}

/// Formats a path, such as `connectors[2].links[0].project`.
pub(in crate::emulator) fn format_path(path: &[PathStep]) -> String {
    let mut text = String::new();
    for step in path {
        let _ = match step {
            PathStep::Item(index) => write!(text, "[{index}]"),
            PathStep::Key(key) if text.is_empty() => write!(text, "{key}"),
            PathStep::Key(key) => write!(text, ".{key}"),
        };
    }
    text
}
