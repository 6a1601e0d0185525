//! Packages from PyPI.

use std::path::PathBuf;
use std::process::Command;

use super::installed::installed;

/// A `python3` that has Connect's SDK.
pub async fn connect_sdk() -> Option<PathBuf> {
    python("vercel-connect", "0.2.2").await
}

/// A `python3` that has schemathesis, which makes requests of an OpenAPI document.
pub async fn schemathesis() -> Option<PathBuf> {
    python("schemathesis", "4.32.5").await
}

/// A `python3` that has the official reader of Prometheus' text.
pub async fn prometheus_client() -> Option<PathBuf> {
    python("prometheus-client", "0.26.0").await
}

/// A `python3` that has a package.
async fn python(package: &str, version: &str) -> Option<PathBuf> {
    let requirement = format!("{package}=={version}");
    let install = move |_: &std::path::Path| {
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv", "venv"]);
        // By the interpreter, as its scripts name the directory that they were made in.
        let mut pip = Command::new("venv/bin/python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", &requirement]);
        vec![venv, pip]
    };
    Some(installed(&format!("python-{package}-{version}"), install).await?.join("venv/bin/python3"))
}
