//! `refresh`: makes the running sidecar fetch a new OIDC token now.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use http::Method;
use serde::Deserialize;

use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::os::clock::Expiry;
use crate::os::terminal::escaped;

/// Longer than the minute that the Vercel CLI may take.
const TIMEOUT: Duration = Duration::from_secs(65);

/// Refreshes the token and prints when the new one expires.
pub(super) async fn refresh(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize)]
    struct Refreshed {
        project: String,
        expires_in_seconds: u64,
    }
    let (_, client) = super::running::find(global).await?;
    let client = client.with_timeout(TIMEOUT);
    let Refreshed { project, expires_in_seconds } =
        client.request_json(Method::POST, "/_sidecar/v1/refresh", "").await?;
    let expiry = Expiry::In(Duration::from_secs(expires_in_seconds));
    // A closed stdout is ignored.
    let _ = writeln!(io::stdout(), "refreshed: {}, {expiry}", escaped(&project));
    Ok(ExitCode::SUCCESS)
}
