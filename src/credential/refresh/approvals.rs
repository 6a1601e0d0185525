//! For which projects the clock may get tokens: one of which upstream has accepted a request, or one that the directory is
//! linked to and that a person has had refreshed there. A token says by itself which project it is for, and like the
//! link it may have come with a repository: neither is enough.
//!
//! `<state dir>/refreshable.json` holds ids and hashes of directories, no secret; private, bounded, and replaced as a
//! whole under the directory's lock. What cannot be kept there holds until this process ends.

use std::collections::VecDeque;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::vercel_cli::Target;
use crate::os::private_dir;
use crate::os::safe_read;

/// As many of each are remembered.
const REMEMBERED: usize = 100;

/// What is approved, here and in the state directory.
#[derive(Debug)]
pub struct Approvals {
    file: Option<PathBuf>,
    /// Which upstream may accept: one's word is nothing to another.
    upstream: String,
    /// The project's directory, by its hash.
    directory: String,
    here: Memory,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Approval {
    /// The upstream that has accepted it, or the directory in which it was confirmed.
    by: String,
    owner_id: String,
    project_id: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    #[serde(default)]
    accepted: VecDeque<Approval>,
    #[serde(default)]
    confirmed: VecDeque<Approval>,
}

impl Memory {
    fn read(file: &Path) -> Self {
        // Whoever may write there could approve.
        let is_ours = file.parent().is_some_and(|dir| private_dir::check(dir).is_ok());
        let content = safe_read::read(file).ok().filter(|_| is_ours);
        content.and_then(|content| serde_json::from_slice(&content.bytes).ok()).unwrap_or_default()
    }

    fn of(&mut self, kind: Kind) -> &mut VecDeque<Approval> {
        match kind {
            Kind::Accepted => &mut self.accepted,
            Kind::Confirmed => &mut self.confirmed,
        }
    }

    /// Remembers it as the last one; whether it was not known.
    fn note(&mut self, kind: Kind, approval: &Approval) -> bool {
        let list = self.of(kind);
        let known = list.iter().position(|known| known == approval);
        let is_news = known.and_then(|at| list.remove(at)).is_none();
        list.push_front(approval.clone());
        list.truncate(REMEMBERED);
        is_news
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Accepted,
    Confirmed,
}

impl Approvals {
    /// Those for a project's directory and an upstream.
    pub fn new(state_dir: Option<&Path>, upstream: &str, project: &Path) -> Self {
        let hash = digest(&SHA256, project.as_os_str().as_bytes());
        Self {
            file: state_dir.map(|dir| dir.join("refreshable.json")),
            upstream: upstream.to_owned(),
            directory: hash.as_ref().iter().map(|b| format!("{b:02x}")).collect(),
            here: Memory::default(),
        }
    }

    /// Upstream has accepted a request for this project.
    pub async fn accepted(&mut self, target: &Target) {
        self.note(Kind::Accepted, target).await;
    }

    /// A person has had this project's token refreshed here.
    pub async fn confirmed(&mut self, target: &Target) {
        self.note(Kind::Confirmed, target).await;
    }

    /// Whether the clock may have a token of this project got, where the directory is linked to `linked`.
    pub async fn allow(&mut self, target: &Target, linked: Option<&Target>) -> bool {
        if self.allow_here(target, linked) {
            return true;
        }
        // Another sidecar of the project may know more.
        let Some(file) = self.file.clone() else { return false };
        let reading = tokio::task::spawn_blocking(move || Memory::read(&file));
        let Ok(everywhere) = reading.await else { return false };
        for kind in [Kind::Accepted, Kind::Confirmed] {
            let approval = self.approval(kind, target);
            let is_known = match kind {
                Kind::Accepted => everywhere.accepted.contains(&approval),
                Kind::Confirmed => everywhere.confirmed.contains(&approval),
            };
            if is_known {
                self.here.note(kind, &approval);
            }
        }
        self.allow_here(target, linked)
    }

    fn allow_here(&self, target: &Target, linked: Option<&Target>) -> bool {
        self.here.accepted.contains(&self.approval(Kind::Accepted, target))
            || (linked == Some(target) && self.here.confirmed.contains(&self.approval(Kind::Confirmed, target)))
    }

    fn approval(&self, kind: Kind, target: &Target) -> Approval {
        let by = match kind {
            Kind::Accepted => self.upstream.clone(),
            Kind::Confirmed => self.directory.clone(),
        };
        Approval { by, owner_id: target.owner_id.clone(), project_id: target.project_id.clone() }
    }

    async fn note(&mut self, kind: Kind, target: &Target) {
        let approval = self.approval(kind, target);
        if !self.here.note(kind, &approval) {
            return;
        }
        let Some(file) = self.file.clone() else { return };
        if let Err(reason) = keep(file, kind, approval).await {
            debug!("could not remember which project may be refreshed: {reason}");
        }
    }
}

async fn keep(file: PathBuf, kind: Kind, approval: Approval) -> Result<(), String> {
    let lock = private_dir::lock(file.parent().unwrap_or(&file)).await?;
    let keeping = tokio::task::spawn_blocking(move || {
        let _alone = lock;
        let mut everywhere = Memory::read(&file);
        everywhere.note(kind, &approval);
        let bytes = serde_json::to_vec(&everywhere).map_err(|e| e.to_string())?;
        private_dir::write(&file, &bytes).map_err(|e| format!("could not write {}: {e}", file.display()))
    });
    keeping.await.unwrap_or_else(|e| Err(e.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    const CONNECT: &str = "https://api.vercel.com";

    fn target(project_id: &str) -> Target {
        Target::new(project_id, "team_acme").expect("ids")
    }

    fn private() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().expect("a directory")
    }

    #[tokio::test]
    async fn what_upstream_has_accepted_is_allowed_also_later_and_elsewhere_but_not_for_another_upstream() {
        let state = private();
        let of = |upstream: &str, project: &str| Approvals::new(Some(state.path()), upstream, Path::new(project));
        let mut approvals = of(CONNECT, "/a");
        assert!(!approvals.allow(&target("prj_1"), Some(&target("prj_1"))).await, "a link alone");
        let mut running = of(CONNECT, "/c");
        approvals.accepted(&target("prj_1")).await;
        for (upstream, project, asked, is_allowed) in [
            (CONNECT, "/a", "prj_1", true),
            (CONNECT, "/b", "prj_1", true),
            (CONNECT, "/a", "prj_2", false),
            ("http://127.0.0.1:2775", "/a", "prj_1", false),
        ] {
            let allowed = of(upstream, project).allow(&target(asked), None).await;
            assert_eq!(allowed, is_allowed, "{upstream} {project} {asked}");
        }
        assert!(running.allow(&target("prj_1"), None).await, "one that runs already");
        let file = fs::metadata(state.path().join("refreshable.json")).expect("a file");
        assert_eq!(file.mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn what_a_person_has_confirmed_is_allowed_there_while_the_link_says_the_same() {
        let state = private();
        let of = |project: &str| Approvals::new(Some(state.path()), CONNECT, Path::new(project));
        of("/a").confirmed(&target("prj_1")).await;
        for (project, asked, linked, is_allowed) in [
            ("/a", "prj_1", Some("prj_1"), true),
            ("/a", "prj_1", None, false),
            ("/a", "prj_1", Some("prj_2"), false),
            ("/a", "prj_2", Some("prj_2"), false),
            ("/b", "prj_1", Some("prj_1"), false),
        ] {
            let allowed = of(project).allow(&target(asked), linked.map(target).as_ref()).await;
            assert_eq!(allowed, is_allowed, "{project} {asked} {linked:?}");
        }
    }

    #[tokio::test]
    async fn a_file_that_others_could_have_written_approves_nothing() {
        let state = private();
        let mut approvals = Approvals::new(Some(state.path()), CONNECT, Path::new("/a"));
        approvals.accepted(&target("prj_1")).await;
        let mode = |path: &Path, bits| fs::set_permissions(path, Permissions::from_mode(bits)).expect("a mode");
        let allowed =
            async || Approvals::new(Some(state.path()), CONNECT, Path::new("/a")).allow(&target("prj_1"), None).await;
        assert!(allowed().await);
        mode(state.path(), 0o777);
        assert!(!allowed().await);
        mode(state.path(), 0o700);
        mode(&state.path().join("refreshable.json"), 0o666);
        assert!(!allowed().await);
        assert!(approvals.allow(&target("prj_1"), None).await, "what this process has seen holds");
    }

    #[test]
    fn only_so_many_are_remembered_the_last_ones() {
        let mut memory = Memory::default();
        let approval =
            |n: usize| Approval { by: CONNECT.into(), owner_id: "team_acme".into(), project_id: format!("prj_{n}") };
        for n in 0..=REMEMBERED {
            assert!(memory.note(Kind::Accepted, &approval(n)));
        }
        assert_eq!(memory.accepted.len(), REMEMBERED);
        assert!(memory.note(Kind::Accepted, &approval(0)), "forgotten");
        assert!(!memory.note(Kind::Accepted, &approval(REMEMBERED)));
    }
}
