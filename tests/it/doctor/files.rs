//! The checks of the token, its copies, the link and file permissions.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::world::World;

use super::{check_up, doctor, git, healthy, link};
use crate::support::workspace::Workspace;
use crate::support::{env_file, write_private};

const HOUR: Duration = Duration::from_secs(3600);

/// A change to a healthy workspace, and the expected finding: severity, code, fix.
type Case = (fn(&Workspace), &'static str, &'static str, Option<&'static str>);

fn put(workspace: &Workspace, name: &str, content: &str) {
    write_private(&workspace.project().join(name), content);
}

fn chmod(workspace: &Workspace, name: &str, mode: u32) {
    fs::set_permissions(workspace.project().join(name), Permissions::from_mode(mode)).expect("a mode");
}

/// A token of the demo's project that expired a minute ago.
fn stale(workspace: &Workspace) -> String {
    let file = workspace.emulator.env_file(DEVELOPMENT_LIFE + Duration::from_secs(60), Duration::ZERO);
    file.lines().find(|line| line.starts_with("VERCEL_OIDC_TOKEN")).expect("a line").to_owned() + "\n"
}

const PULL: Option<&str> = Some("vercel env pull");

const CASES: &[Case] = &[
    (
        |workspace| fs::remove_file(workspace.project().join(".env.local")).expect("removed"),
        "problem",
        "oidc_token_missing",
        Some("vercel link && vercel env pull"),
    ),
    (|workspace| put(workspace, ".env.local", "VERCEL_OIDC_TOKEN=nonsense\n"), "problem", "oidc_token_invalid", PULL),
    (|workspace| put(workspace, ".env.local", &stale(workspace)), "problem", "oidc_token_expired", PULL),
    (
        |workspace| put(workspace, ".env.local", &env_file(&workspace.emulator.oidc_token(HOUR))),
        "problem",
        "oidc_token_expiring",
        PULL,
    ),
    (
        |workspace| {
            let mut subject = Subject::development(&World::demo());
            subject.environment = "production".into();
            put(workspace, ".env.local", &env_file(&workspace.emulator.oidc_token_for(&subject, 2 * HOUR)));
        },
        "warning",
        "not_development",
        Some("vercel env pull --environment=development"),
    ),
    (
        |workspace| put(workspace, ".env.local", &format!("{0}\n{0}\n", env_file(&workspace.token))),
        "warning",
        "duplicate_assignments",
        Some("vercel link --yes"),
    ),
    (
        |workspace| put(workspace, ".env.development.local", &stale(workspace)),
        "problem",
        "stale_copy_wins",
        Some("sed -i -E '/^[[:space:]]*(export[[:space:]]+)?VERCEL_OIDC_TOKEN[[:space:]]*=/d' .env.development.local"),
    ),
    (
        |workspace| put(workspace, ".env", &env_file(&workspace.emulator.oidc_token(HOUR))),
        "warning",
        "copies_differ",
        Some("sed -i -E '/^[[:space:]]*(export[[:space:]]+)?VERCEL_OIDC_TOKEN[[:space:]]*=/d' .env"),
    ),
    (
        |workspace| {
            fs::remove_file(workspace.project().join(".env.local")).expect("removed");
            put(workspace, ".env.development.local", &env_file(&workspace.token));
        },
        "note",
        "token_elsewhere",
        Some("connect-sidecar --env-file .env.development.local"),
    ),
    (|workspace| link(workspace, "prj_other", "team_acme"), "warning", "linked_elsewhere", PULL),
    (
        |workspace| fs::remove_dir_all(workspace.project().join(".vercel")).expect("gone"),
        "note",
        "not_linked",
        Some("vercel link"),
    ),
    (
        |workspace| {
            fs::remove_dir_all(workspace.project().join(".vercel")).expect("gone");
            fs::create_dir(workspace.home.path().join(".git")).expect("a directory");
            fs::create_dir(workspace.home.path().join(".vercel")).expect("a directory");
        },
        "note",
        "not_linked",
        Some("vercel link"),
    ),
    (
        |workspace| chmod(workspace, ".env.local", 0o644),
        "warning",
        "env_file_readable_by_others",
        Some("chmod 600 .env.local"),
    ),
    (|workspace| chmod(workspace, ".env.local", 0o666), "problem", "oidc_token_invalid", Some("chmod 600 .env.local")),
    (
        |workspace| fs::write(workspace.project().join(".gitignore"), "").expect("written"),
        "warning",
        "env_file_not_ignored",
        Some("echo .env.local >> .gitignore"),
    ),
    (
        |workspace| git(workspace, &["add", "--force", ".env.local"]),
        "warning",
        "env_file_tracked",
        Some("git rm --cached .env.local && echo .env.local >> .gitignore"),
    ),
    (
        |workspace| {
            let elsewhere = workspace.home.path().join("shared.env");
            fs::rename(workspace.project().join(".env.local"), &elsewhere).expect("moved");
            symlink(&elsewhere, workspace.project().join(".env.local")).expect("a link");
        },
        "note",
        "env_file_link",
        None,
    ),
    (
        |workspace| {
            let state = workspace.home.path().join(".local/state/connect-sidecar");
            fs::create_dir_all(&state).expect("a directory");
            fs::set_permissions(&state, Permissions::from_mode(0o755)).expect("a mode");
        },
        "warning",
        "state_directory",
        None,
    ),
    (
        |workspace| {
            let ca = workspace.home.path().join(".local/state/connect-sidecar/ca");
            fs::create_dir_all(&ca).expect("a directory");
            fs::set_permissions(&ca, Permissions::from_mode(0o777)).expect("a mode");
        },
        "warning",
        "local_ca",
        Some("connect-sidecar ca remove"),
    ),
];

#[tokio::test]
async fn every_fault_of_files_is_found_with_its_fix() {
    for (number, (spoil, severity, code, fix)) in CASES.iter().enumerate() {
        let workspace = healthy().await;
        spoil(&workspace);
        let checkup = check_up(&workspace, doctor(&workspace)).await;
        let found = checkup.found(severity, code);
        if let Some(fix) = fix {
            assert_eq!(found["fix"], *fix, "case {number}: {found:#?}");
        }
    }
}

#[tokio::test]
async fn a_token_in_the_shell_overrides_every_file() {
    let workspace = healthy().await;
    let with = |name: &str, value: &str| {
        let mut command = doctor(&workspace);
        command.env(name, value);
        command
    };
    let old = stale(&workspace);
    let old = old.trim().trim_start_matches("VERCEL_OIDC_TOKEN=").trim_matches('"');
    let checkup = check_up(&workspace, with("VERCEL_OIDC_TOKEN", old)).await;
    assert_eq!(checkup.found("problem", "stale_copy_wins")["fix"], "unset VERCEL_OIDC_TOKEN");
    let checkup = check_up(&workspace, with("VERCEL_OIDC_TOKEN", &workspace.token)).await;
    assert_eq!(checkup.found("note", "token_copied")["fix"], "unset VERCEL_OIDC_TOKEN");
    let checkup = check_up(&workspace, with("NODE_ENV", "test")).await;
    assert_eq!(checkup.found("warning", "node_env_test")["fix"], "unset NODE_ENV");
}

#[tokio::test]
async fn the_placeholder_of_a_run_is_not_a_copy() {
    let workspace = healthy().await;
    let program = doctor(&workspace).as_std().get_program().to_str().expect("a path").to_owned();
    let mut inside = workspace.sidecar(&["run", "--", &program, "doctor", "--json"]);
    inside.process_group(0);
    let ended = crate::support::process::run(inside).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for code in ["stale_copy_wins", "copies_differ", "token_copied", "proxy_not_used"] {
        assert!(!ended.stdout.contains(code), "{code}: {}", ended.stdout);
    }
    assert!(ended.stdout.contains(r#""code":"instance""#), "{}", ended.stdout);
}

#[tokio::test]
async fn the_fix_for_a_copy_removes_only_the_assignment() {
    let workspace = healthy().await;
    let before = "A=1\n# VERCEL_OIDC_TOKEN=x\nMY_VERCEL_OIDC_TOKEN=y\n";
    put(&workspace, ".env.development.local", &format!("{before} export VERCEL_OIDC_TOKEN = nonsense\nB=2\n"));
    let checkup = check_up(&workspace, doctor(&workspace)).await;
    let fix = checkup.found("problem", "stale_copy_wins")["fix"].as_str().expect("a command").to_owned();
    let status = std::process::Command::new("sh").args(["-c", &fix]).current_dir(workspace.project()).status();
    assert!(status.expect("a shell").success());
    let left = fs::read_to_string(workspace.project().join(".env.development.local")).expect("a file");
    assert_eq!(left, format!("{before}B=2\n"));
    assert!(check_up(&workspace, doctor(&workspace)).await.bad().is_empty());
}

#[tokio::test]
async fn no_program_from_a_repository_or_project_is_run() {
    let workspace = healthy().await;
    let ran = workspace.home.path().join("ran");
    let bin = workspace.project().join("node_modules/.bin");
    fs::create_dir_all(&bin).expect("a directory");
    for name in ["git", "vercel", "hook"] {
        fs::write(bin.join(name), format!("#!/bin/sh\necho {name} >> {}\n", ran.display())).expect("a file");
        fs::set_permissions(bin.join(name), Permissions::from_mode(0o755)).expect("a mode");
    }
    let hook = bin.join("hook").display().to_string();
    git(&workspace, &["config", "core.fsmonitor", &hook]);
    git(&workspace, &["config", "core.hooksPath", &bin.display().to_string()]);
    git(&workspace, &["config", "core.pager", &hook]);
    git(&workspace, &["config", "core.sshCommand", &hook]);
    git(&workspace, &["config", "alias.ls-files", &format!("!{hook}")]);
    // First proves that plain git would run the hook.
    git(&workspace, &["ls-files"]);
    assert!(ran.exists(), "git runs what core.fsmonitor names");
    fs::remove_file(&ran).expect("removed");

    let mut command = doctor(&workspace);
    let path = std::env::var("PATH").expect("a path");
    command.env("PATH", format!("node_modules/.bin:{}:{path}", bin.display()));
    let checkup = check_up(&workspace, command).await;
    assert!(!ran.exists(), "{:?}", fs::read_to_string(&ran));
    assert_eq!(checkup.bad(), [""; 0], "git has answered: {checkup:#?}");
    fs::write(workspace.project().join(".gitignore"), "").expect("written");
    check_up(&workspace, doctor(&workspace)).await.found("warning", "env_file_not_ignored");
    assert!(!ran.exists(), "{:?}", fs::read_to_string(&ran));
}

#[tokio::test]
async fn an_unusable_state_directory_is_found_with_its_fix() {
    type Spoil = fn(&std::path::Path);
    let cases: [(Spoil, &str, Option<&str>); 3] = [
        (
            |state| {
                fs::create_dir(state).expect("a directory");
                fs::set_permissions(state, Permissions::from_mode(0o1777)).expect("a mode");
            },
            "others have access to ",
            Some("chmod 700 STATE"),
        ),
        (|state| fs::write(state, "").expect("a file"), "is not a directory", Some("mv STATE STATE.old")),
        (|state| symlink("/", state).expect("a link"), "is a link", None),
    ];
    for (spoil, title, fix) in cases {
        let workspace = healthy().await;
        let state = workspace.home.path().join(".local/state/connect-sidecar");
        fs::create_dir_all(state.parent().expect("a parent")).expect("a directory");
        spoil(&state);
        let checkup = check_up(&workspace, doctor(&workspace)).await;
        let found = checkup.found("warning", "state_directory");
        assert!(found["title"].as_str().is_some_and(|found| found.contains(title)), "{found}");
        let fix = fix.map(|fix| fix.replace("STATE", state.to_str().expect("a path")));
        assert_eq!(found["fix"].as_str(), fix.as_deref());
        let strict = check_up(&workspace, workspace.sidecar(&["--require-key", "doctor", "--json"])).await;
        strict.found("problem", "state_directory");
        if let Some(fix) = fix {
            let mended = std::process::Command::new("sh").args(["-c", &fix]).status().expect("a shell");
            assert!(mended.success());
            assert_eq!(check_up(&workspace, doctor(&workspace)).await.bad(), [""; 0]);
        }
    }
    let workspace = healthy().await;
    let mut homeless = doctor(&workspace);
    homeless.env_remove("HOME");
    let checkup = check_up(&workspace, homeless).await;
    let found = checkup.found("warning", "state_directory");
    assert!(found["detail"].as_str().is_some_and(|detail| detail.contains("set HOME, or XDG_STATE_HOME")), "{found}");
    let mut relative = doctor(&workspace);
    relative.env("XDG_STATE_HOME", "state");
    let checkup = check_up(&workspace, relative).await;
    assert_eq!(checkup.found("note", "relative_state_home")["fix"], "unset XDG_STATE_HOME");
}

/// Runs `doctor` in a mount namespace, after these mounts. `None` if that is not permitted here.
#[cfg(target_os = "linux")]
async fn check_up_behind(workspace: &Workspace, mount: &str) -> Option<super::Checkup> {
    let probe = std::process::Command::new("unshare").args(["-m", "true"]).output();
    if !nix::unistd::geteuid().is_root() || !probe.is_ok_and(|ended| ended.status.success()) {
        crate::support::skipped("nothing can be mounted here");
        return None;
    }
    let plain = doctor(workspace);
    let plain = plain.as_std();
    let script = format!("export PATH=/usr/sbin:/usr/bin:/sbin:/bin; set -e; {mount}; cd \"$PROJECT\"; exec \"$@\"");
    let mut command = tokio::process::Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("PROJECT", workspace.project()).current_dir(plain.get_current_dir().unwrap_or(&workspace.project()));
    Some(check_up(workspace, command).await)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_env_file_that_is_a_mount_is_found() {
    let workspace = healthy().await;
    let outside = tempfile::tempdir().expect("a directory");
    write_private(&outside.path().join(".env.local"), &env_file(&workspace.token));
    write_private(&outside.path().join("new"), &env_file(&workspace.token));
    let dir = outside.path().display().to_string();
    let mount = format!("mount --bind {dir}/.env.local \"$PROJECT\"/.env.local");
    let Some(checkup) = check_up_behind(&workspace, &mount).await else { return };
    checkup.found("note", "env_file_mounted");
    let replaced = format!("{mount}; mv {dir}/new {dir}/.env.local");
    let checkup = check_up_behind(&workspace, &replaced).await.expect("it could be mounted before");
    checkup.found("warning", "env_file_replaced");
    for code in ["watching", "env_file_mounted"] {
        assert!(!checkup.findings.iter().any(|finding| finding["code"] == code), "{code}: {checkup:#?}");
    }
}

#[tokio::test]
async fn an_empty_variable_in_the_shell_hides_the_token_and_templates_are_no_fault() {
    let workspace = healthy().await;
    let mut command = doctor(&workspace);
    command.env("VERCEL_OIDC_TOKEN", "");
    let checkup = check_up(&workspace, command).await;
    assert_eq!(checkup.found("warning", "empty_variable_wins")["fix"], "unset VERCEL_OIDC_TOKEN");
    put(&workspace, ".env.example", "VERCEL_OIDC_TOKEN=your-token-here\n");
    chmod(&workspace, ".env.example", 0o644);
    assert!(check_up(&workspace, doctor(&workspace)).await.bad().is_empty());
    put(&workspace, "package.json", r#"{"devDependencies":{"vite":"8"}}"#);
    put(&workspace, ".env.local", &format!("export\tVERCEL_OIDC_TOKEN={}\n", workspace.token));
    let found = check_up(&workspace, doctor(&workspace)).await;
    let detail = found.found("warning", "readers_differ")["detail"].as_str().expect("a text").to_owned();
    assert!(detail.starts_with("Vite and `node --env-file` find none; "), "{detail}");
}
