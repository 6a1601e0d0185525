//! The Vercel project that a directory is linked to: reads `.vercel/project.json` and `.vercel/repo.json`
//! (docs/vercel.md section 7). What they say is unverified: they may have come with a repository.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::os::safe_read::{self, Defect, ReadError};

const PROJECT_FILE: &str = ".vercel/project.json";
const REPOSITORY_FILE: &str = ".vercel/repo.json";

/// What a directory is linked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProjectLink {
    /// Nothing.
    NotLinked,
    /// A project.
    Linked(LinkedProject),
    /// A repository, none of whose linked projects contains the directory. Holds the path of its file.
    NotInRepository(PathBuf),
    /// The file at this path cannot be used.
    Unreadable(PathBuf, LinkError),
}

/// A project that a directory is linked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedProject {
    /// The file or variable that names the project, for people.
    pub source: String,
    /// `prj_…`
    pub project_id: String,
    /// `team_…`
    pub owner_id: String,
    /// The project's name, if it is known.
    pub name: Option<String>,
}

/// Why a link file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] Defect),
    /// It does not have the expected JSON.
    #[error("it is not as the CLI writes it")]
    Format,
}

/// Looks for the link in the order of the Vercel CLI: `ids` (`VERCEL_ORG_ID` and `VERCEL_PROJECT_ID`), the directory's
/// own `project.json`, the nearest `repo.json` at or above it; then, like the SDK, a `project.json` above it. Stops
/// below `home`.
pub fn find(project: &Path, home: Option<&Path>, ids: (Option<String>, Option<String>)) -> ProjectLink {
    if let (Some(owner_id), Some(project_id)) = ids {
        let source = "VERCEL_PROJECT_ID".to_owned();
        return ProjectLink::Linked(LinkedProject { source, project_id, owner_id, name: None });
    }
    let ancestors = || project.ancestors().take_while(|dir| Some(*dir) != home);
    let found = of_directory(project)
        .or_else(|| ancestors().find_map(|dir| of_repository(dir, project)))
        .or_else(|| ancestors().skip(1).find_map(of_directory));
    found.unwrap_or(ProjectLink::NotLinked)
}

/// The link in the directory's own `.vercel/project.json`; `None` if there is no such file.
pub fn of_directory(dir: &Path) -> Option<ProjectLink> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct ProjectFile {
        project_id: String,
        org_id: String,
        project_name: Option<String>,
    }
    let path = dir.join(PROJECT_FILE);
    Some(match read::<ProjectFile>(&path)? {
        Ok(file) => ProjectLink::Linked(LinkedProject {
            source: path.display().to_string(),
            project_id: file.project_id,
            owner_id: file.org_id,
            name: file.project_name,
        }),
        Err(error) => ProjectLink::Unreadable(path, error),
    })
}

/// The link of `project` in the `repo.json` of `root`; `None` if there is no such file. Of nested projects, the
/// innermost one that contains the directory.
fn of_repository(root: &Path, project: &Path) -> Option<ProjectLink> {
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
    let path = root.join(REPOSITORY_FILE);
    let file = match read::<RepositoryFile>(&path)? {
        Ok(file) => file,
        Err(error) => return Some(ProjectLink::Unreadable(path, error)),
    };
    let relative = project.strip_prefix(root).unwrap_or(Path::new(""));
    let contains = |p: &RepositoryProject| p.directory == "." || relative.starts_with(&p.directory);
    let depth = |p: &RepositoryProject| Path::new(&p.directory).components().filter(|c| c.as_os_str() != ".").count();
    let innermost = file.projects.into_iter().filter(contains).max_by_key(depth);
    let linked = innermost.and_then(|p| Some((p.org_id.or(file.org_id)?, p.id, p.name)));
    Some(match linked {
        Some((owner_id, project_id, name)) => {
            ProjectLink::Linked(LinkedProject { source: path.display().to_string(), project_id, owner_id, name })
        }
        None => ProjectLink::NotInRepository(path),
    })
}

/// `None` if the file does not exist.
fn read<T: DeserializeOwned>(path: &Path) -> Option<Result<T, LinkError>> {
    match safe_read::read(path) {
        Ok(content) => Some(serde_json::from_slice(&content.bytes).map_err(|_| LinkError::Format)),
        Err(ReadError::Missing) => None,
        Err(ReadError::Unusable(defect)) => Some(Err(defect.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The link of `repo/apps/web` in a home directory with these files.
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
        match find(&project, Some(home.path()), ids) {
            ProjectLink::NotLinked => "none".into(),
            ProjectLink::Linked(linked) => format!("{}/{}", linked.owner_id, linked.project_id),
            ProjectLink::NotInRepository(_) => "not in it".into(),
            ProjectLink::Unreadable(..) => "unreadable".into(),
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
            // The home directory is not searched.
            (vec![(".vercel/project.json", project)], none, "none"),
            (vec![("repo/apps/web/.vercel/project.json", "{}")], none, "unreadable"),
            (vec![("repo/.vercel/repo.json", repo)], (Some("team_9"), Some("prj_9")), "team_9/prj_9"),
            (vec![("repo/.vercel/repo.json", repo)], (Some("team_9"), None), "team_2/prj_web"),
        ] {
            assert_eq!(linked(&files, ids), expected, "{files:?}");
        }
    }
}
