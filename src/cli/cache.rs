//! `cache`: manages the running sidecar's token cache.

use std::process::ExitCode;

use http::Method;
use serde::Deserialize;

use crate::cli::CommandError;
use crate::config::args::GlobalArgs;
use crate::os::terminal::escaped;

/// Clears the cache, or the entries of one connector, and prints how many tokens were removed.
pub(super) async fn clear(connector: Option<&str>, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize)]
    struct Cleared {
        evicted: usize,
    }
    let query = match connector {
        Some(connector) => format!("?connector={}", super::running::segment(connector)?),
        None => String::new(),
    };
    let (_, client) = super::running::find(global).await?;
    let Cleared { evicted } = client.request_json(Method::DELETE, &format!("/_sidecar/v1/cache{query}"), "").await?;
    let tokens = if evicted == 1 { "token" } else { "tokens" };
    let whose = connector.map(|connector| format!(" of {}", escaped(connector))).unwrap_or_default();
    super::output::print(format!("forgot {evicted} {tokens}{whose}\n")).await?;
    Ok(ExitCode::SUCCESS)
}
