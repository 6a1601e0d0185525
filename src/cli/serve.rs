//! `serve`: a sidecar in the foreground.

use std::process::ExitCode;

use tracing::{info, warn};

use super::CommandError;
use super::flags::load;
use super::output::say_ready;
use super::service::readiness;
use super::signals::{Stops, until_stopped};
use crate::config;
use crate::config::args::GlobalArgs;
use crate::credential::TokenState;
use crate::daemon::app::App;
use crate::os::clock::Clock;
use crate::os::logging;

/// Serves until a signal comes.
pub(super) async fn serve(global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let config = load(global)?;
    let _log = logging::start(config.logging);
    for unknown in config::unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
        warn!("{unknown}");
    }
    if let Some(note) = config.project_note() {
        info!("{note}");
    }
    let app = App::bind(config, Clock::system()).await?;
    let stops = Stops::listen(Some(app.reloader()))?;
    let manager = std::env::var_os("NOTIFY_SOCKET");
    let tell_manager = |state: &str| readiness::tell(manager.as_deref(), state);
    say_first_words(&app);
    say_ready("connect-sidecar", &format!("http://{}", app.addr()));
    tell_manager("READY=1");
    let stopping = |stop| async {
        let stop = async {
            Box::pin(stop).await;
            tell_manager("STOPPING=1");
        };
        app.serve(stop).await
    };
    Ok(until_stopped(stops, stopping).await)
}

/// Whoever begins without a token is told where requests would go, and what can be done without an account.
fn say_first_words(app: &App) {
    if !matches!(app.identity().borrow().state, TokenState::Missing) {
        return;
    }
    let upstream = &app.server().proxy().upstream;
    let upstream = upstream.name();
    info!(
        "requests go to {upstream}; without an account, see `connect-sidecar demo`, or start `connect-sidecar emulate` and \
         name it with --upstream; the status page opens with `connect-sidecar status --open`"
    );
}
