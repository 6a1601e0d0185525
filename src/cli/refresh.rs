//! `refresh`: a fresh OIDC token now.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use http::Method;
use serde::Deserialize;

use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::os::clock::Expiry;
use crate::os::terminal::escaped;

/// The Vercel CLI may take a minute, and a request may, too.
const LIMIT: Duration = Duration::from_secs(65);

/// Has the running sidecar get one, and says how long it is good for.
pub(super) async fn refresh(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize)]
    struct Refreshed {
        project: String,
        expires_in_seconds: u64,
    }
    let (_, client) = super::running::find(global).await?;
    let client = client.with_timeout(LIMIT);
    let Refreshed { project, expires_in_seconds } =
        client.request_json(Method::POST, "/_sidecar/v1/refresh", "").await?;
    let expiry = Expiry::In(Duration::from_secs(expires_in_seconds));
    // A closed stdout is no reason to fail.
    let _ = writeln!(io::stdout(), "refreshed: {}, {expiry}", escaped(&project));
    Ok(ExitCode::SUCCESS)
}
