//! Packages from npm, installed once below the build directory. Needs the registry the first time only.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::process::isolated;

/// The real Vercel CLI in a directory, which is its home, too; signed in at an API with a token.
pub async fn vercel(url: &str, token: &str, dir: &Path, args: &[&str]) -> tokio::process::Command {
    let cli = tokio::task::spawn_blocking(vercel_cli).await.expect("a CLI");
    let mut command = isolated(cli.to_str().expect("a path"), dir);
    command.args(["--api", url, "--token", token]).args(args);
    command.env("VERCEL_TELEMETRY_DISABLED", "1").env("NO_UPDATE_NOTIFIER", "1");
    command
}

/// The real Vercel CLI's command.
fn vercel_cli() -> PathBuf {
    static CLI: OnceLock<PathBuf> = OnceLock::new();
    // The release of `sandbox` that this CLI asks for cannot be had from every registry; nothing here runs it.
    let manifest = r#"{"private":true,"dependencies":{"vercel":"64.0.2"},"overrides":{"vercel":{"sandbox":"4.5.0"}}}"#;
    CLI.get_or_init(|| install("vercel-64.0.2", manifest)).join("node_modules/.bin/vercel")
}

/// Installs what a `package.json` asks for; the directory that it is in.
fn install(name: &str, manifest: &str) -> PathBuf {
    let done = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if done.is_dir() {
        return done;
    }
    let parent = done.parent().expect("a parent");
    std::fs::create_dir_all(parent).expect("a directory");
    // Moved into its place when it is whole: another run may be doing the same.
    let making = tempfile::tempdir_in(parent).expect("a directory");
    std::fs::write(making.path().join("package.json"), manifest).expect("a file");
    let npm = Command::new("npm")
        .args(["install", "--no-package-lock", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"])
        .current_dir(making.path())
        .output()
        .unwrap_or_else(|e| panic!("could not run npm, which comes with Node.js: {e}"));
    assert!(npm.status.success(), "npm could not install {name}:\n{}", String::from_utf8_lossy(&npm.stderr));
    let _ = std::fs::rename(making.keep(), &done);
    done
}
