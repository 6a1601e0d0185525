//! Opens a URL in the user's browser.
//!
//! The URL of the status page carries the instance key in its fragment, and the program that opens it gets the URL as an
//! argument, which other users can see for as long as that program runs. There is no way around: a browser takes a URL from
//! nowhere else, and a file that leads on to the page would make the visit one from another site, which the guard refuses.
//! On Linux it is borne because the key is of no use to them: a sidecar answers its own user alone, whoever has the key.
//! Where it cannot tell whose a connection is, as on macOS, or was told to listen on the network, the key is all that they
//! need. The key is never printed, and no program gets it that the project or another user could have put there.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use crate::os::executable::{self, Found};
use crate::os::subprocess;

/// Who has not failed by then has opened it: a browser that had to be started goes on.
const OPENS_WITHIN: Duration = Duration::from_secs(3);

/// Opens it by `$BROWSER` (programs with colons between them, `%s` is the URL), else by the desktop's own choice. An error
/// says what failed.
pub(super) async fn open(url: &str, project: &Path) -> Result<(), String> {
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
            Err(reason) => failed.push(format!("{program}: {reason}")),
        }
    }
    Err(failed.join("; "))
}

/// The program of a name or at an absolute path.
fn find(program: &str, path: &OsStr, project: &Path) -> Result<PathBuf, String> {
    let checked = match Path::new(program) {
        file if file.is_absolute() => file.exists().then(|| executable::check(file, project)),
        _ => executable::find(program, path, project).map(|Found { checked, .. }| checked),
    };
    checked.ok_or("it is not there")?.map_err(|reason| format!("it is not run: {reason}"))
}

/// Runs the file by the name that it was chosen by. What it runs itself comes from the same places.
async fn run(name: &str, file: &Path, arguments: &[String], path: &OsStr, project: &Path) -> Result<(), String> {
    let mut command = Command::new(file);
    command.arg0(name).args(arguments).env("PATH", executable::trusted_path(path, file, project));
    match subprocess::start_detached(command, OPENS_WITHIN).await {
        Ok(Some(status)) if !status.success() => Err(format!("it ended with {status}")),
        Err(e) => Err(e.to_string()),
        Ok(_) => Ok(()),
    }
}
