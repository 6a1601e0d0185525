//! Whether the directory is linked to a project, and whether the token is that project's.

use super::finding::{Finding, Severity};
use crate::credential::Claims;
use crate::credential::project_link::{LinkedProject, ProjectLink};

/// Evaluates the link, for a token with these claims.
pub(super) fn evaluate(link: &ProjectLink, claims: Option<&Claims>) -> Finding {
    let note = |code, title: String, detail: &str| Finding::new(Severity::Note, code, title, detail);
    let detail = "`vercel env pull` and an SDK that refreshes its own token need the link; the sidecar does not.";
    match link {
        ProjectLink::NotLinked => {
            note("not_linked", "the directory is not linked to a project".into(), detail).fix("vercel link")
        }
        ProjectLink::NotInRepository(path) => {
            let title = format!("the directory is in none of the projects of {}", path.display());
            note("not_linked", title, detail).fix("vercel link --repo")
        }
        ProjectLink::Unreadable(path, error) => {
            let title = format!("{} cannot be used: {error}", path.display());
            Finding::new(Severity::Warning, "link_unreadable", title, detail).fix("vercel link")
        }
        ProjectLink::Linked(LinkedProject { source, project_id, owner_id, name }) => {
            let linked = name.as_ref().unwrap_or(project_id);
            let differs = |claimed: &Option<String>, id: &String| claimed.as_ref().is_some_and(|claimed| claimed != id);
            match claims {
                Some(claims) if differs(&claims.project_id, project_id) || differs(&claims.owner_id, owner_id) => {
                    let title =
                        format!("{source} links to {linked} of {owner_id}, the token is of {}", claims.project_name());
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
    use super::*;

    #[test]
    fn a_link_to_another_project_or_team_than_the_tokens_is_reported() {
        let link = |owner: &str, project: &str| {
            let (project_id, owner_id) = (project.into(), owner.into());
            ProjectLink::Linked(LinkedProject { source: "p".into(), project_id, owner_id, name: None })
        };
        let mut claims = Claims::default();
        (claims.project_id, claims.owner_id) = (Some("prj_1".to_owned()), Some("team_1".to_owned()));
        for (link, claims, code) in [
            (link("team_1", "prj_1"), Some(&claims), "link"),
            (link("team_1", "prj_2"), Some(&claims), "linked_elsewhere"),
            (link("team_2", "prj_1"), Some(&claims), "linked_elsewhere"),
            (link("team_2", "prj_2"), Some(&Claims::default()), "link"),
            (link("team_2", "prj_2"), None, "link"),
            (ProjectLink::NotLinked, Some(&claims), "not_linked"),
        ] {
            assert_eq!(evaluate(&link, claims).code, code, "{link:?}");
        }
    }
}
