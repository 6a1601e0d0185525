//! Packages from PyPI.

use std::path::PathBuf;
use std::process::Command;

use super::installed::installed;

/// A `python3` that has Connect's SDK.
pub async fn connect_sdk() -> Option<PathBuf> {
    let install = |_: &std::path::Path| {
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv", "venv"]);
        // By the interpreter, as its scripts name the directory that they were made in.
        let mut pip = Command::new("venv/bin/python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "vercel-connect==0.2.2"]);
        vec![venv, pip]
    };
    Some(installed("python-vercel-connect-0.2.2", install).await?.join("venv/bin/python3"))
}
