//! Packages from npm.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::installed::installed;
use super::process::isolated;

/// The releases of Node.js that the preload is for.
pub const NODES: [&str; 4] = ["18.20.8", "20.20.2", "22.23.3", "24.21.0"];

/// The architecture, as npm's packages name it.
const ARCH: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "x64" };

/// The real Vercel CLI in a directory, which is its home, too; signed in at an API with a token.
pub fn vercel(cli: &Path, url: &str, token: &str, dir: &Path, args: &[&str]) -> tokio::process::Command {
    let mut command = isolated(cli.to_str().expect("a path"), dir);
    command.args(["--api", url, "--token", token]).args(args);
    command.env("VERCEL_TELEMETRY_DISABLED", "1").env("NO_UPDATE_NOTIFIER", "1");
    command
}

/// The real Vercel CLI's command.
pub async fn vercel_cli() -> Option<PathBuf> {
    // The release of `sandbox` that this CLI asks for cannot be had from every registry; nothing here runs it.
    let manifest = r#"{"private":true,"dependencies":{"vercel":"64.0.2"},"overrides":{"vercel":{"sandbox":"4.5.0"}}}"#;
    Some(manifested("vercel-64.0.2", manifest.into()).await?.join("node_modules/.bin/vercel"))
}

/// The directory of a Node.js's `node`.
pub async fn node(version: &str) -> Option<PathBuf> {
    let package = format!("node-linux-{ARCH}");
    Some(
        packages(&format!("node-{version}"), &[(&package, version)])
            .await?
            .join("node_modules")
            .join(package)
            .join("bin"),
    )
}

/// The directory with Next.js and Connect's SDK in its `node_modules`. What is not below it is not compiled.
pub async fn next() -> Option<PathBuf> {
    let (next, compiler) = ("16.4.6", format!("@next/swc-linux-{ARCH}-gnu"));
    let dependencies = [
        ("@vercel/connect", "2.3.2"),
        ("next", next),
        // Optional, and fetched at run time where it is missing.
        (&compiler, next),
        ("react", "19.2.0"),
        ("react-dom", "19.2.0"),
    ];
    packages(&format!("next-{next}"), &dependencies).await
}

/// The directory that these packages are installed in.
async fn packages(name: &str, packages: &[(&str, &str)]) -> Option<PathBuf> {
    let dependencies: serde_json::Map<_, _> =
        packages.iter().map(|(package, version)| ((*package).to_owned(), (*version).into())).collect();
    manifested(name, serde_json::json!({"private": true, "dependencies": dependencies}).to_string()).await
}

/// The directory that what a `package.json` asks for is installed in.
async fn manifested(name: &str, manifest: String) -> Option<PathBuf> {
    installed(name, move |dir| vec![install(dir, manifest)]).await
}

fn install(dir: &Path, manifest: String) -> Command {
    std::fs::write(dir.join("package.json"), manifest).expect("a file");
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-package-lock", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]);
    npm
}

/// The `node_modules` with what drives Debian's Chromium, if that is there.
pub async fn browser() -> Option<PathBuf> {
    let install = |dir: &Path| {
        let mut chromium = Command::new("/usr/bin/chromium");
        chromium.arg("--version");
        vec![chromium, install(dir, r#"{"private":true,"dependencies":{"playwright-core":"1.65.1"}}"#.into())]
    };
    Some(installed("playwright-core-1.65.1", install).await?.join("node_modules"))
}

/// The script of axe-core, which looks for what shuts people out of a page.
pub async fn axe() -> Option<PathBuf> {
    Some(packages("axe-core-4.14.1", &[("axe-core", "4.14.1")]).await?.join("node_modules/axe-core/axe.min.js"))
}

/// The `node_modules` with `jose` in it.
pub async fn jose() -> Option<PathBuf> {
    Some(packages("jose-6.2.18", &[("jose", "6.2.18")]).await?.join("node_modules"))
}

/// The `node_modules` with a release of Connect's SDK in it.
pub async fn connect_sdk(version: &str) -> Option<PathBuf> {
    Some(packages(&format!("vercel-connect-{version}"), &[("@vercel/connect", version)]).await?.join("node_modules"))
}
