//! Which project the directory is linked to, and whether the token is that project's.
//!
//! Found as the Vercel CLI finds it: `VERCEL_ORG_ID` with `VERCEL_PROJECT_ID`, then `.vercel/project.json` of the
//! directory, then the nearest `.vercel/repo.json` above it; and, as the SDK does, a `project.json` above it.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::finding::{Finding, Severity};
use crate::credential::Claims;
use crate::os::safe_read::{self, Problem};

const PROJECT: &str = ".vercel/project.json";
const REPOSITORY: &str = ".vercel/repo.json";

/// What the directory is linked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    /// Nothing.
    None,
    /// A project.
    Project {
        /// What says so, for people.
        place: String,
        project_id: String,
        owner_id: String,
        name: Option<String>,
    },
    /// A repository of which the directory is none of the linked projects.
    NotInRepository(PathBuf),
    /// A file that says nothing, for this reason.
    Unreadable(PathBuf, String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProjectFile {
    project_id: String,
    org_id: String,
    project_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RepositoryFile {
    org_id: Option<String>,
    #[serde(default)]
    projects: Vec<RepositoryProject>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RepositoryProject {
    id: String,
    name: Option<String>,
    directory: String,
    org_id: Option<String>,
}

/// Finds it. Nothing at `home` or above it counts.
pub(super) fn gather(project: &Path, home: Option<&Path>, ids: (Option<String>, Option<String>)) -> Link {
    if let (Some(owner_id), Some(project_id)) = ids {
        let place = "VERCEL_PROJECT_ID".to_owned();
        return Link::Project { place, project_id, owner_id, name: None };
    }
    let above = || project.ancestors().take_while(|dir| Some(*dir) != home);
    let of = |dir: &Path| of_directory(&dir.join(PROJECT));
    let of_repository = || above().find_map(|dir| of_repository(dir, project));
    let found = of(project).or_else(of_repository).or_else(|| above().skip(1).find_map(of));
    found.unwrap_or(Link::None)
}

fn of_directory(path: &Path) -> Option<Link> {
    Some(match read::<ProjectFile>(path)? {
        Ok(file) => Link::Project {
            place: path.display().to_string(),
            project_id: file.project_id,
            owner_id: file.org_id,
            name: file.project_name,
        },
        Err(reason) => Link::Unreadable(path.to_owned(), reason),
    })
}

fn of_repository(root: &Path, project: &Path) -> Option<Link> {
    let path = root.join(REPOSITORY);
    let file = match read::<RepositoryFile>(&path)? {
        Ok(file) => file,
        Err(reason) => return Some(Link::Unreadable(path, reason)),
    };
    let within = project.strip_prefix(root).unwrap_or(Path::new(""));
    let contains = |p: &RepositoryProject| p.directory == "." || within.starts_with(&p.directory);
    let depth = |p: &RepositoryProject| Path::new(&p.directory).components().filter(|c| c.as_os_str() != ".").count();
    let nearest = file.projects.into_iter().filter(contains).max_by_key(depth);
    let linked = nearest.and_then(|p| Some((p.org_id.or(file.org_id)?, p.id, p.name)));
    Some(match linked {
        Some((owner_id, project_id, name)) => {
            Link::Project { place: path.display().to_string(), project_id, owner_id, name }
        }
        None => Link::NotInRepository(path),
    })
}

/// `None` if it is not there.
fn read<T: DeserializeOwned>(path: &Path) -> Option<Result<T, String>> {
    match safe_read::read(path) {
        Ok(content) => {
            Some(serde_json::from_slice(&content.bytes).map_err(|_| "it is not as the CLI writes it".into()))
        }
        Err(Problem::Missing) => None,
        Err(Problem::Unsafe(flaw)) => Some(Err(flaw.reason)),
    }
}

/// Judges the link, for a token with these claims.
pub(super) fn judge(link: &Link, claims: Option<&Claims>) -> Finding {
    let note = |code, title: String, detail: &str| Finding::new(Severity::Note, code, title, detail);
    let needs_it = "`vercel env pull` and an SDK that refreshes its own token need the link; the sidecar does not.";
    match link {
        Link::None => {
            note("not_linked", "the directory is not linked to a project".into(), needs_it).fix("vercel link")
        }
        Link::NotInRepository(path) => {
            let title = format!("the directory is in none of the projects of {}", path.display());
            note("not_linked", title, needs_it).fix("vercel link --repo")
        }
        Link::Unreadable(path, reason) => {
            let title = format!("{} cannot be used: {reason}", path.display());
            Finding::new(Severity::Warning, "link_unreadable", title, needs_it).fix("vercel link")
        }
        Link::Project { place, project_id, owner_id, name } => {
            let linked = name.as_ref().unwrap_or(project_id);
            let differs = |claimed: &Option<String>, id: &String| claimed.as_ref().is_some_and(|claimed| claimed != id);
            match claims {
                Some(claims) if differs(&claims.project_id, project_id) || differs(&claims.owner_id, owner_id) => {
                    let title =
                        format!("{place} links to {linked} of {owner_id}, the token is of {}", claims.project_name());
                    let detail = "Requests act for the token's project now, and for the linked one after the next \
                                  `vercel env pull`. Where the link is what is wrong: `vercel link`.";
                    Finding::new(Severity::Warning, "linked_elsewhere", title, detail).fix("vercel env pull")
                }
                _ => Finding::ok("link", format!("linked to {linked}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A monorepo in a home, with these files.
    fn linked(files: &[(&str, &str)], ids: (Option<&str>, Option<&str>)) -> String {
        let home = tempfile::tempdir().expect("a directory");
        let project = home.path().join("repo/apps/web");
        fs::create_dir_all(&project).expect("a directory");
        for (path, content) in files {
            let path = home.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, content).expect("a file");
        }
        let ids = (ids.0.map(str::to_owned), ids.1.map(str::to_owned));
        match gather(&project, Some(home.path()), ids) {
            Link::None => "none".into(),
            Link::Project { project_id, owner_id, .. } => format!("{owner_id}/{project_id}"),
            Link::NotInRepository(_) => "not in it".into(),
            Link::Unreadable(..) => "unreadable".into(),
        }
    }

    #[test]
    fn the_link_is_found_as_the_cli_finds_it() {
        let project = r#"{"projectId":"prj_1","orgId":"team_1"}"#;
        let repo = r#"{"orgId":"team_2","projects":[{"id":"prj_root","name":"root","directory":"."},
            {"id":"prj_web","name":"web","directory":"apps/web"},{"id":"prj_we","name":"we","directory":"apps/we"},
            {"id":"prj_apps","name":"apps","directory":"apps","orgId":"team_3"}]}"#;
        let others = r#"{"orgId":"team_2","projects":[{"id":"prj_api","name":"api","directory":"apps/api"}]}"#;
        let apps = r#"{"projects":[{"id":"prj_apps","name":"apps","directory":"apps","orgId":"team_3"}]}"#;
        let none = (None, None);
        for (files, ids, expected) in [
            (vec![], none, "none"),
            (vec![("repo/apps/web/.vercel/project.json", project)], none, "team_1/prj_1"),
            (vec![("repo/.vercel/project.json", project)], none, "team_1/prj_1"),
            (vec![("repo/.vercel/repo.json", repo)], none, "team_2/prj_web"),
            (vec![("repo/.vercel/repo.json", apps)], none, "team_3/prj_apps"),
            (vec![("repo/.vercel/repo.json", others)], none, "not in it"),
            (
                vec![("repo/.vercel/repo.json", repo), ("repo/apps/web/.vercel/project.json", project)],
                none,
                "team_1/prj_1",
            ),
            (vec![("repo/.vercel/repo.json", repo), ("repo/.vercel/project.json", project)], none, "team_2/prj_web"),
            // That of the home is nobody's.
            (vec![(".vercel/project.json", project)], none, "none"),
            (vec![("repo/apps/web/.vercel/project.json", "{}")], none, "unreadable"),
            (vec![("repo/.vercel/repo.json", repo)], (Some("team_9"), Some("prj_9")), "team_9/prj_9"),
            (vec![("repo/.vercel/repo.json", repo)], (Some("team_9"), None), "team_2/prj_web"),
        ] {
            assert_eq!(linked(&files, ids), expected, "{files:?}");
        }
    }

    #[test]
    fn a_link_to_another_project_or_team_than_the_tokens_is_told() {
        let link = |owner: &str, project: &str| Link::Project {
            place: "p".into(),
            project_id: project.into(),
            owner_id: owner.into(),
            name: None,
        };
        let mut claims = Claims::default();
        (claims.project_id, claims.owner_id) = (Some("prj_1".to_owned()), Some("team_1".to_owned()));
        for (link, claims, code) in [
            (link("team_1", "prj_1"), Some(&claims), "link"),
            (link("team_1", "prj_2"), Some(&claims), "linked_elsewhere"),
            (link("team_2", "prj_1"), Some(&claims), "linked_elsewhere"),
            (link("team_2", "prj_2"), Some(&Claims::default()), "link"),
            (link("team_2", "prj_2"), None, "link"),
            (Link::None, Some(&claims), "not_linked"),
        ] {
            assert_eq!(judge(&link, claims).code, code, "{link:?}");
        }
    }
}
