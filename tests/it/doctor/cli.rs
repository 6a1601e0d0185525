//! The checks of the Vercel CLI, real and fake, and of its login.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use connect_sidecar::os::clock::Clock;
use tokio::process::Command;

use super::{check_up, doctor, healthy};
use crate::support::npm;
use crate::support::workspace::Workspace;

fn with_cli_in(workspace: &Workspace, bin: &Path) -> Command {
    let mut command = doctor(workspace);
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").expect("a path")));
    command
}

/// Writes an executable that only this user can change.
fn write_program(path: &Path, script: &str) {
    let dir = path.parent().expect("a parent");
    fs::create_dir_all(dir).expect("a directory");
    fs::write(path, script).expect("a file");
    for path in [dir, path] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).expect("a mode");
    }
}

/// Installs a package of this version as npm does globally. Returns the directory of its command.
fn install_version(workspace: &Workspace, version: &str) -> PathBuf {
    let package = workspace.home.path().join("lib/node_modules/vercel");
    write_program(&package.join("dist/vc.js"), "#!/bin/sh\nexit 1\n");
    fs::write(package.join("package.json"), format!(r#"{{"name":"vercel","version":"{version}"}}"#)).expect("a file");
    let bin = workspace.home.path().join("bin");
    write_program(&bin.join("other"), "");
    let _ = symlink(package.join("dist/vc.js"), bin.join("vercel"));
    bin
}

#[tokio::test]
async fn the_real_clis_version_is_found_by_package_or_by_running_it() {
    let Some(cli) = npm::vercel_cli().await else { return };
    let workspace = healthy().await;
    let cli = cli.canonicalize().expect("a file");
    let bin = workspace.home.path().join("bin");
    write_program(&bin.join("other"), "");
    symlink(&cli, bin.join("vercel")).expect("a link");
    let packaged = check_up(&workspace, with_cli_in(&workspace, &bin)).await;
    assert_eq!(packaged.found("ok", "cli")["title"], "the Vercel CLI is version 64.0.2");
    // A script that belongs to no package, like those of pnpm and volta.
    let bin = workspace.home.path().join("shims");
    write_program(&bin.join("vercel"), &format!("#!/bin/sh\nexec {} \"$@\"\n", cli.display()));
    let asked = check_up(&workspace, with_cli_in(&workspace, &bin)).await;
    assert_eq!(asked.found("ok", "cli")["title"], "the Vercel CLI is version 64.0.2");
}

#[tokio::test]
async fn a_faulty_version_is_reported_and_a_missing_cli_is_a_note() {
    let workspace = healthy().await;
    for (version, found) in [
        ("53.2.0", [("note", "cli_too_old"), ("warning", "cli_pull_deletes_keys")].as_slice()),
        ("53.5.0", &[("note", "cli_too_old"), ("warning", "cli_pull_deletes_keys")]),
        ("55.0.0", &[("warning", "cli_pull_deletes_keys")]),
        ("56.0.0", &[("ok", "cli")]),
    ] {
        let bin = install_version(&workspace, version);
        let checkup = check_up(&workspace, with_cli_in(&workspace, &bin)).await;
        for (severity, code) in found {
            checkup.found(severity, code);
        }
    }
    let mut without = doctor(&workspace);
    without.env("PATH", "/nowhere");
    let checkup = check_up(&workspace, without).await;
    checkup.found("note", "cli_missing");
    assert!(checkup.bad().is_empty(), "{checkup:#?}");
    let mut needed = doctor(&workspace);
    needed.env("PATH", "/nowhere").env("CONNECT_SIDECAR_REFRESH", "cli");
    check_up(&workspace, needed).await.found("warning", "cli_missing");
}

#[tokio::test]
async fn a_cli_that_others_could_have_replaced_is_not_run() {
    let workspace = healthy().await;
    let bin = install_version(&workspace, "64.0.2");
    fs::set_permissions(&bin, Permissions::from_mode(0o777)).expect("a mode");
    let checkup = check_up(&workspace, with_cli_in(&workspace, &bin)).await;
    checkup.found("note", "cli_refused");
    checkup.found("ok", "cli");
    let shims = workspace.home.path().join("shims");
    let ran = tempfile::NamedTempFile::new().expect("a file");
    let has_run = || !fs::read_to_string(ran.path()).expect("a file").is_empty();
    write_program(&shims.join("vercel"), &format!("#!/bin/sh\necho 64.0.2 | tee {}\n", ran.path().display()));
    fs::set_permissions(&shims, Permissions::from_mode(0o777)).expect("a mode");
    check_up(&workspace, with_cli_in(&workspace, &shims)).await.found("note", "cli_version_unknown");
    assert!(!has_run());
    fs::set_permissions(&shims, Permissions::from_mode(0o755)).expect("a mode");
    check_up(&workspace, with_cli_in(&workspace, &shims)).await.found("ok", "cli");
    assert!(has_run());
}

#[tokio::test]
async fn a_cli_with_other_output_has_an_unknown_version() {
    let workspace = healthy().await;
    let bin = workspace.home.path().join("bin");
    write_program(&bin.join("vercel"), "#!/bin/sh\necho hello\n");
    check_up(&workspace, with_cli_in(&workspace, &bin)).await.found("note", "cli_version_unknown");
}

#[tokio::test]
async fn an_expiring_login_is_reported_without_its_token() {
    let workspace = healthy().await;
    let bin = install_version(&workspace, "64.0.2");
    let dir = workspace.home.path().join(".local/share/com.vercel.cli");
    fs::create_dir_all(&dir).expect("a directory");
    let now = Clock::system().local().as_seconds();
    for (ends, renewable, severity, fix) in [
        (now + 8 * 3600, false, "ok", None),
        (now + 600, false, "note", Some("vercel login")),
        (now - 600, false, "note", Some("vercel login")),
        (now - 600, true, "note", Some("vercel whoami")),
    ] {
        let mut login = serde_json::json!({"token": "vca_canary_of_a_login", "expiresAt": ends});
        if renewable {
            login["refreshToken"] = "vcr_canary_of_a_login".into();
        }
        fs::write(dir.join("auth.json"), login.to_string()).expect("a file");
        let checkup = check_up(&workspace, with_cli_in(&workspace, &bin)).await;
        assert_eq!(checkup.found(severity, "cli_login")["fix"].as_str(), fix);
        assert!(!format!("{checkup:?}").contains("canary"), "{checkup:#?}");
    }
}
