//! The projects that may be refreshed automatically.
//!
//! A project is approved if upstream has accepted a request with its token, or if a person has refreshed it in a
//! directory that is linked to it. The project that a token or a link names is not enough, because both may have come
//! with a repository.
//!
//! `<state dir>/refreshable.json` has ids and hashes of directories, and no secret. It is replaced as a whole under the
//! lock of the directory. Without a usable file, approvals last until this process ends.

use std::collections::VecDeque;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::vercel_cli::Target;
use crate::os::private_dir;

/// The number of approvals of each kind that are kept.
const MAX_APPROVALS: usize = 100;

/// The approvals that count for one upstream and one project directory.
#[derive(Debug)]
pub struct Approvals {
    file: Option<PathBuf>,
    /// The origin. What one upstream accepts means nothing to another.
    upstream: String,
    /// A hash of the directory's path.
    directory: String,
    in_memory: ApprovalList,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Approval {
    /// The upstream that has accepted the project, or the directory in which a person has confirmed it.
    by: String,
    owner_id: String,
    project_id: String,
}

/// The latest approvals first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct ApprovalList {
    #[serde(default)]
    accepted: VecDeque<Approval>,
    #[serde(default)]
    confirmed: VecDeque<Approval>,
}

impl ApprovalList {
    fn read(file: &Path) -> Self {
        // Everybody who can write to the directory could add approvals.
        match file.parent().is_some_and(|dir| private_dir::check(dir).is_ok()) {
            true => private_dir::read_json(file),
            false => Self::default(),
        }
    }

    fn list(&self, kind: Kind) -> &VecDeque<Approval> {
        match kind {
            Kind::Accepted => &self.accepted,
            Kind::Confirmed => &self.confirmed,
        }
    }

    /// Adds the approval, or moves it to the front. Returns whether it is new.
    fn add(&mut self, kind: Kind, approval: &Approval) -> bool {
        let list = match kind {
            Kind::Accepted => &mut self.accepted,
            Kind::Confirmed => &mut self.confirmed,
        };
        let known = list.iter().position(|known| known == approval);
        let is_new = known.and_then(|at| list.remove(at)).is_none();
        list.push_front(approval.clone());
        list.truncate(MAX_APPROVALS);
        is_new
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Accepted,
    Confirmed,
}

impl Approvals {
    /// The approvals for an upstream and a project directory.
    pub fn new(state_dir: Option<&Path>, upstream: &str, project: &Path) -> Self {
        let hash = digest(&SHA256, project.as_os_str().as_bytes());
        Self {
            file: state_dir.map(|dir| dir.join("refreshable.json")),
            upstream: upstream.to_owned(),
            directory: hash.as_ref().iter().map(|b| format!("{b:02x}")).collect(),
            in_memory: ApprovalList::default(),
        }
    }

    /// Upstream has accepted a request for this project.
    pub async fn add_accepted(&mut self, target: &Target) {
        self.add(Kind::Accepted, target).await;
    }

    /// A person has refreshed this project in this directory.
    pub async fn add_confirmed(&mut self, target: &Target) {
        self.add(Kind::Confirmed, target).await;
    }

    /// Whether the project may be refreshed automatically. `linked` is the project that the directory is linked to.
    pub async fn is_approved(&mut self, target: &Target, linked: Option<&Target>) -> bool {
        if self.is_approved_in_memory(target, linked) {
            return true;
        }
        // Another sidecar may have added an approval to the file.
        let Some(file) = self.file.clone() else { return false };
        let read = tokio::task::spawn_blocking(move || ApprovalList::read(&file));
        let Ok(in_file) = read.await else { return false };
        for kind in [Kind::Accepted, Kind::Confirmed] {
            let approval = self.approval(kind, target);
            if in_file.list(kind).contains(&approval) {
                self.in_memory.add(kind, &approval);
            }
        }
        self.is_approved_in_memory(target, linked)
    }

    fn is_approved_in_memory(&self, target: &Target, linked: Option<&Target>) -> bool {
        let has = |kind| self.in_memory.list(kind).contains(&self.approval(kind, target));
        has(Kind::Accepted) || (linked == Some(target) && has(Kind::Confirmed))
    }

    fn approval(&self, kind: Kind, target: &Target) -> Approval {
        let by = match kind {
            Kind::Accepted => self.upstream.clone(),
            Kind::Confirmed => self.directory.clone(),
        };
        Approval { by, owner_id: target.owner_id.clone(), project_id: target.project_id.clone() }
    }

    async fn add(&mut self, kind: Kind, target: &Target) {
        let approval = self.approval(kind, target);
        if !self.in_memory.add(kind, &approval) {
            return;
        }
        let Some(file) = &self.file else { return };
        let update = private_dir::update_json(file, move |in_file: &mut ApprovalList| {
            in_file.add(kind, &approval);
            true
        });
        if let Err(problem) = update.await {
            debug!("could not remember which project may be refreshed: {}", problem.with_advice());
        }
    }
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
    async fn an_accepted_project_is_approved_everywhere_but_only_for_that_upstream() {
        let state = private();
        let of = |upstream: &str, project: &str| Approvals::new(Some(state.path()), upstream, Path::new(project));
        let mut approvals = of(CONNECT, "/a");
        assert!(!approvals.is_approved(&target("prj_1"), Some(&target("prj_1"))).await, "a link alone");
        let mut running = of(CONNECT, "/c");
        approvals.add_accepted(&target("prj_1")).await;
        for (upstream, project, asked, is_allowed) in [
            (CONNECT, "/a", "prj_1", true),
            (CONNECT, "/b", "prj_1", true),
            (CONNECT, "/a", "prj_2", false),
            ("http://127.0.0.1:2775", "/a", "prj_1", false),
        ] {
            let allowed = of(upstream, project).is_approved(&target(asked), None).await;
            assert_eq!(allowed, is_allowed, "{upstream} {project} {asked}");
        }
        assert!(running.is_approved(&target("prj_1"), None).await, "one that runs already");
        let file = fs::metadata(state.path().join("refreshable.json")).expect("a file");
        assert_eq!(file.mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_confirmed_project_is_approved_in_that_directory_while_it_is_linked() {
        let state = private();
        let of = |project: &str| Approvals::new(Some(state.path()), CONNECT, Path::new(project));
        of("/a").add_confirmed(&target("prj_1")).await;
        for (project, asked, linked, is_allowed) in [
            ("/a", "prj_1", Some("prj_1"), true),
            ("/a", "prj_1", None, false),
            ("/a", "prj_1", Some("prj_2"), false),
            ("/a", "prj_2", Some("prj_2"), false),
            ("/b", "prj_1", Some("prj_1"), false),
        ] {
            let allowed = of(project).is_approved(&target(asked), linked.map(target).as_ref()).await;
            assert_eq!(allowed, is_allowed, "{project} {asked} {linked:?}");
        }
    }

    #[tokio::test]
    async fn a_file_that_others_can_write_approves_nothing() {
        let state = private();
        let mut approvals = Approvals::new(Some(state.path()), CONNECT, Path::new("/a"));
        approvals.add_accepted(&target("prj_1")).await;
        let mode = |path: &Path, bits| fs::set_permissions(path, Permissions::from_mode(bits)).expect("a mode");
        let allowed = async || {
            Approvals::new(Some(state.path()), CONNECT, Path::new("/a")).is_approved(&target("prj_1"), None).await
        };
        assert!(allowed().await);
        mode(state.path(), 0o777);
        assert!(!allowed().await);
        mode(state.path(), 0o700);
        mode(&state.path().join("refreshable.json"), 0o666);
        assert!(!allowed().await);
        assert!(approvals.is_approved(&target("prj_1"), None).await, "what this process has seen stays approved");
    }

    #[test]
    fn the_oldest_approvals_are_forgotten() {
        let mut list = ApprovalList::default();
        let approval =
            |n: usize| Approval { by: CONNECT.into(), owner_id: "team_acme".into(), project_id: format!("prj_{n}") };
        for n in 0..=MAX_APPROVALS {
            assert!(list.add(Kind::Accepted, &approval(n)));
        }
        assert_eq!(list.accepted.len(), MAX_APPROVALS);
        assert!(list.add(Kind::Accepted, &approval(0)), "forgotten");
        assert!(!list.add(Kind::Accepted, &approval(MAX_APPROVALS)));
    }
}
