//! Opens a URL in the user's browser.
//!
//! The URL of the status page carries the instance key in its fragment, and the program that opens it gets the URL as an
//! argument, which other users can see for as long as that program runs. There is no way around: a browser takes a URL from
//! nowhere else, and a file that leads on to the page would make the visit one from another site, which the guard refuses.
//! It is borne because the key is of no use to them: a sidecar answers its own user alone, whoever has the key, but for
//! one that was told to listen on the network. The key is never printed.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Who has not failed by then has opened it: a browser that had to be started goes on.
const OPENS_WITHIN: Duration = Duration::from_secs(3);

/// Opens it by `$BROWSER` (programs with colons between them, `%s` is the URL), else by the desktop's own choice. An error
/// says what failed.
pub(super) async fn open(url: &str) -> Result<(), String> {
    let desktop = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let chosen = std::env::var("BROWSER").unwrap_or_default();
    let mut failed = Vec::new();
    for command in chosen.split(':').chain([desktop]).filter(|command| !command.trim().is_empty()) {
        let words = command.split_whitespace().map(|word| word.replace("%s", url));
        let url = (!command.contains("%s")).then(|| url.to_owned());
        let words: Vec<_> = words.chain(url).collect();
        let program = command.split_whitespace().next().unwrap_or_default();
        match run(&words).await {
            Ok(()) => return Ok(()),
            Err(reason) => failed.push(format!("{program}: {reason}")),
        }
    }
    Err(failed.join("; "))
}

async fn run(words: &[String]) -> Result<(), String> {
    let [program, arguments @ ..] = words else { return Ok(()) };
    let mut command = Command::new(program);
    // In a group of its own, so that Ctrl-C here does not end a browser.
    command.args(arguments).process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => "it is not there".to_owned(),
        _ => e.to_string(),
    })?;
    match tokio::time::timeout(OPENS_WITHIN, child.wait()).await {
        Ok(Ok(status)) if !status.success() => Err(format!("it ended with {status}")),
        Ok(Err(e)) => Err(e.to_string()),
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}
