//! `serve`: runs a sidecar in the foreground.

use std::process::ExitCode;

use tracing::{info, warn};

use super::CommandError;
use super::flags::load;
use super::output::print_ready;
use super::service::readiness;
use super::signals::{StopSignals, until_stopped};
use crate::config;
use crate::config::args::GlobalArgs;
use crate::credential::TokenState;
use crate::daemon::app::App;
use crate::os::clock::Clock;
use crate::os::logging;

/// Serves until a signal arrives.
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
    let stops = StopSignals::listen(Some(app.reloader()))?;
    let manager = std::env::var_os("NOTIFY_SOCKET");
    let notify_manager = |state: &str| readiness::notify(manager.as_deref(), state);
    log_hint_without_token(&app);
    print_ready("connect-sidecar", &format!("http://{}", app.addr()));
    notify_manager("READY=1");
    let serve = |stop| async {
        let stop = async {
            Box::pin(stop).await;
            notify_manager("STOPPING=1");
        };
        app.serve(stop).await
    };
    Ok(until_stopped(stops, serve).await)
}

/// If there is no token, logs where requests would go and what works without an account.
fn log_hint_without_token(app: &App) {
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
