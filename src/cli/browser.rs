//! Opens a URL in the user's browser.
//!
//! The URL of the status page has the instance key in its fragment, and is an argument of the program that opens it, which
//! other users can see while that program runs. Browsers take a URL in no other way, and a file that redirects to the page
//! would make the visit cross-site, which the guard refuses. On Linux this is acceptable, because the key is useless to
//! other users: a sidecar answers its own user only. Where it cannot identify the user of a connection, as on macOS, or
//! listens on the network, the key is enough. The key is never printed, and no program gets it that the project or another
//! user could have put there.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::Command;

use crate::os::executable::{self, Found, Untrusted};
use crate::os::subprocess;

/// A program that has not failed by then has opened the URL: a browser that had to be started keeps running.
const OPENS_WITHIN: Duration = Duration::from_secs(3);

/// Why a program did not open the URL.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("it is not there")]
    NotFound,
    #[error("it is not run: {0}")]
    Untrusted(#[from] Untrusted),
    #[error(transparent)]
    Start(#[from] io::Error),
    #[error("it ended with {0}")]
    Failed(ExitStatus),
}

/// No program opened the URL: the name and the error of each that was tried.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(|(program, error)| format!("{program}: {error}")).collect::<Vec<_>>().join("; "))]
pub struct BrowserError(Vec<(String, OpenError)>);

/// Opens the URL with `$BROWSER` (programs separated by colons, `%s` is the URL), else with the desktop's default.
pub(super) async fn open(url: &str, project: &Path) -> Result<(), BrowserError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let desktop = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let chosen = std::env::var("BROWSER").unwrap_or_default();
    if !cfg!(target_os = "linux") {
        let seen = "note: other users of this machine can see the page's key while the program that opens it runs";
        let _ = writeln!(io::stderr(), "{seen}");
    }
    let mut failed = Vec::new();
    for command in chosen.split(':').chain([desktop]) {
        let mut words = command.split_whitespace();
        let Some(program) = words.next() else { continue };
        let last = (!command.contains("%s")).then(|| url.to_owned());
        let arguments: Vec<_> = words.map(|word| word.replace("%s", url)).chain(last).collect();
        let opened = async { run(program, &find(program, &path, project)?, &arguments, &path, project).await };
        match opened.await {
            Ok(()) => return Ok(()),
            Err(error) => failed.push((program.to_owned(), error)),
        }
    }
    Err(BrowserError(failed))
}

/// Finds a program by its name or absolute path.
fn find(program: &str, path: &OsStr, project: &Path) -> Result<PathBuf, OpenError> {
    let checked = match Path::new(program) {
        file if file.is_absolute() => file.exists().then(|| executable::check(file, project)),
        _ => executable::find(program, path, project).map(|Found { checked, .. }| checked),
    };
    Ok(checked.ok_or(OpenError::NotFound)??)
}

/// Runs the file under this name. Programs that it runs come from trusted directories, too.
async fn run(name: &str, file: &Path, arguments: &[String], path: &OsStr, project: &Path) -> Result<(), OpenError> {
    let mut command = Command::new(file);
    command.arg0(name).args(arguments).env("PATH", executable::trusted_path(path, file, project));
    match subprocess::start_detached(command, OPENS_WITHIN).await? {
        Some(status) if !status.success() => Err(OpenError::Failed(status)),
        _ => Ok(()),
    }
}
