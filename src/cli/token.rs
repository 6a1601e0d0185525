//! `token`: prints a provider token on stdout, and nothing else.
//!
//! Uses the running sidecar, which may have the token cached, or one in this process if none runs.

use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, HeaderValue};
use http::{Method, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::CommandError;
use crate::cli::args::{SubjectArg, TokenArgs};
use crate::cli::flags::environment;
use crate::cli::run::child::Signals;
use crate::cli::run::joining::{self, Decision, Note};
use crate::cli::run::sidecar::Sidecar;
use crate::config::args::GlobalArgs;
use crate::config::{self, Config, ConfigError};
use crate::instance::client::{self, Client, ClientError, NotFound, Refusal};
use crate::os::clock::Timestamp;
use crate::os::logging;
use crate::os::terminal;
use crate::proxy::remediation::{self, UpstreamError};

/// Longer than the 60 s within which the sidecar answers every request.
const TIMEOUT: Duration = Duration::from_secs(65);

/// Why there is no token. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A signal arrived first.
    #[error("interrupted before there was an answer")]
    Interrupted,
    /// The sidecar or Connect refused the request. The message says why and what to do.
    #[error("{0}")]
    Refused(String),
    /// Connect's response could not be read.
    #[error("Connect's answer holds no token")]
    NoToken(#[source] serde_json::Error),
}

/// Prints the token, or says why there is none and what to do.
pub(super) async fn print(args: &TokenArgs, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let path = format!("/v1/connect/token/{}", super::running::segment(&args.connector)?);
    let request = TokenRequest { connector: &args.connector, path, body: body(args)?, force_refresh: args.refresh };
    let response = match select_sidecar(global).await? {
        SelectedSidecar::Running(client) => request.send(client).await?,
        SelectedSidecar::Own(config) => send_in_process(&request, *config).await?,
    };
    super::output::print(if args.json { response.json() } else { response.token + "\n" }).await?;
    Ok(ExitCode::SUCCESS)
}

/// The sidecar that the request goes to.
enum SelectedSidecar {
    /// The running one.
    Running(Client),
    /// One in this process: none runs, or the running one has another credential than the explicit one.
    Own(Box<Config>),
}

async fn select_sidecar(global: &GlobalArgs) -> Result<SelectedSidecar, CommandError> {
    let found = match client::find(&super::running::selector(global)?).await {
        // A port in the environment may be meant for `serve`; one given as a flag selects a running sidecar.
        Err(NotFound::NotRunning(_)) if global.port.is_none() => None,
        found => Some(found?),
    };
    let global = config::with_command_defaults(global, &environment);
    let (mut config, mistakes) = Config::examine(&global, &environment, &super::current_dir()?);
    if let Some(found) = found {
        match joining::decide(found, &mut config).await? {
            Decision::Join(client, notes) => {
                notes.iter().for_each(Note::print);
                return Ok(SelectedSidecar::Running(client));
            }
            Decision::StartOwn(_, notes) => notes.iter().for_each(Note::print),
        }
    }
    // Mistakes do not matter to a running sidecar.
    if mistakes.is_empty() { Ok(SelectedSidecar::Own(Box::new(config))) } else { Err(ConfigError(mistakes).into()) }
}

async fn send_in_process(request: &TokenRequest<'_>, config: Config) -> Result<TokenResponse, CommandError> {
    let _log = logging::start(config.logging);
    config.project_note().iter().for_each(|note| terminal::note(note));
    let mut signals = Signals::listen().map_err(|e| CommandError::System("listen for signals", e))?;
    let sidecar = Sidecar::start_alone(config).await?;
    let response = tokio::select! {
        response = request.send(sidecar.client()) => response,
        () = signals.end() => Err(TokenError::Interrupted.into()),
    };
    sidecar.stop(&mut signals).await;
    response
}

struct TokenRequest<'a> {
    connector: &'a str,
    path: String,
    body: String,
    force_refresh: bool,
}

/// The fields of the response of Connect's token route that are printed.
#[derive(Deserialize)]
struct TokenResponse {
    token: String,
    /// In milliseconds since the epoch.
    #[serde(rename = "expiresAt")]
    expires_at: Option<f64>,
}

impl TokenRequest<'_> {
    async fn send(&self, client: Client) -> Result<TokenResponse, CommandError> {
        let client = client.with_timeout(TIMEOUT);
        let mut request = client
            .request(Method::POST, &self.path, &self.body)
            .map_err(|reason| ClientError::Failed(client.address(), reason.to_string()))?;
        if self.force_refresh {
            request.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        let response = client.send(request).await?;
        if !response.status().is_success() {
            return Err(TokenError::Refused(failure_message(&client, self.connector, &response).await).into());
        }
        serde_json::from_slice(response.body()).map_err(|e| TokenError::NoToken(e).into())
    }
}

impl TokenResponse {
    fn json(self) -> String {
        #[derive(Serialize)]
        struct Output {
            version: u32,
            token: String,
            expires_at: Option<String>,
        }
        let expires_at = self.expires_at.map(|ms| Timestamp::from_millis(ms as u64).to_string());
        let output = Output { version: 1, token: self.token, expires_at };
        // Serializing strings and numbers cannot fail.
        serde_json::to_string(&output).unwrap_or_default() + "\n"
    }
}

/// What went wrong, and the command that fixes it.
async fn failure_message(client: &Client, connector: &str, response: &Response<Bytes>) -> String {
    let error = UpstreamError::read(response.body());
    if response.headers().contains_key("sidecar-error") {
        return Refusal::read(response.body()).map_or(error.message, |refusal| refusal.line());
    }
    let environment = client.status().await.ok().and_then(|status| status.oidc.environment);
    let environment = environment.as_deref().unwrap_or("development");
    let remedy = remediation::remedy(response.status(), &error, connector, environment);
    let remedy = remedy.map(|remedy| format!(": {remedy}")).unwrap_or_default();
    let UpstreamError { code, message, .. } = &error;
    format!("Connect answered {} {code} ({message}){remedy}", response.status().as_u16())
}

/// The body that `vercel connect token` would send. Without a subject it is for the app, since there is no session of a
/// user.
fn body(args: &TokenArgs) -> Result<String, ConfigError> {
    let TokenArgs { subject, user_id, installation_id, scopes, .. } = args;
    let subject = match (subject, user_id) {
        (Some(SubjectArg::App), Some(_)) => {
            return Err(ConfigError::new(
                "--user-id",
                "names a user, and --subject app is none; leave one of them out",
            ));
        }
        (Some(SubjectArg::App) | None, None) => json!({"type": "app"}),
        (Some(SubjectArg::User), None) => json!({"type": "user"}),
        (_, Some(id)) => json!({"type": "user", "id": id}),
    };
    let scopes: Vec<_> = scopes.iter().flat_map(|scope| scope.split_whitespace()).collect();
    let mut body = json!({
        "subject": subject,
        "scopes": if scopes.is_empty() { vec!["*"] } else { scopes },
    });
    if let Some(id) = installation_id {
        body["installationId"] = json!(id);
    }
    Ok(body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn body_of(flags: &str) -> Result<String, String> {
        let line = format!("connect-sidecar token slack/acme {flags}");
        match Cli::try_parse_from(line.split(' ').filter(|word| !word.is_empty())).map(|cli| cli.command) {
            Ok(Some(Command::Token(args))) => body(&args).map_err(|e| e.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_body_is_the_same_as_the_vercel_clis() {
        for (flags, expected) in [
            ("", r#"{"scopes":["*"],"subject":{"type":"app"}}"#),
            ("--subject app --scopes a,b", r#"{"scopes":["a","b"],"subject":{"type":"app"}}"#),
            ("--subject user", r#"{"scopes":["*"],"subject":{"type":"user"}}"#),
            ("--user-id user_ada", r#"{"scopes":["*"],"subject":{"id":"user_ada","type":"user"}}"#),
            ("--subject user --user-id u", r#"{"scopes":["*"],"subject":{"id":"u","type":"user"}}"#),
            ("--installation-id i1", r#"{"installationId":"i1","scopes":["*"],"subject":{"type":"app"}}"#),
        ] {
            assert_eq!(body_of(flags).as_deref(), Ok(expected), "{flags}");
        }
        assert!(body_of("--subject app --user-id u").is_err_and(|e| e.contains("--user-id")));
    }
}
