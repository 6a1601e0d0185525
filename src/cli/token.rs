//! `token`: a provider token on stdout, and nothing else.
//!
//! By the running sidecar, which may have it already; by one in this process where none runs.

use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, HeaderValue};
use http::{Method, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::CommandError;
use crate::cli::args::{SubjectArg, TokenArgs};
use crate::cli::run::child::Signals;
use crate::cli::run::joining::{self, Joined, Note};
use crate::cli::run::sidecar::Sidecar;
use crate::config::args::GlobalArgs;
use crate::config::{self, Config, ConfigError, Mistake};
use crate::instance::client::{self, Client, NotFound, Refusal};
use crate::os::clock::Timestamp;
use crate::os::logging;
use crate::os::terminal;
use crate::proxy::remediation::{self, UpstreamError};

/// The sidecar answers every request within 60 s.
const PATIENCE: Duration = Duration::from_secs(65);

/// Prints it, or says why there is none and what to do.
pub(super) async fn print(args: &TokenArgs, global: &GlobalArgs) -> Result<ExitCode, CommandError> {
    let path = format!("/v1/connect/token/{}", super::running::segment(&args.connector)?);
    let ask = Ask { connector: &args.connector, path, body: body(args)?, is_forced: args.refresh };
    let answer = match way(global).await? {
        Way::Running(client) => ask.by(client).await?,
        Way::Own(config) => ask_without_sidecar(&ask, *config).await?,
    };
    super::output::print(if args.json { answer.json() } else { answer.token + "\n" }).await?;
    Ok(ExitCode::SUCCESS)
}

/// Who is asked.
enum Way {
    /// The running sidecar that is meant.
    Running(Client),
    /// One in this process: none runs, or none by the credential that was named.
    Own(Box<Config>),
}

async fn way(global: &GlobalArgs) -> Result<Way, CommandError> {
    let found = match client::find(&super::running::wanted(global)?).await {
        // A port in the environment may be meant for `serve`.
        Err(NotFound::NotRunning(_)) if global.port.is_none() => None,
        found => Some(found?),
    };
    let environment = |name: &str| std::env::var_os(name);
    let global = config::of_a_command(global, &environment);
    let (mut config, mistakes) = Config::examine(&global, &environment, &super::current_dir()?);
    if let Some(found) = found {
        match joining::join(found, &mut config).await?? {
            Joined::Through(client, notes) => {
                notes.iter().for_each(Note::tell);
                return Ok(Way::Running(client));
            }
            Joined::OtherCredential(_, notes) => notes.iter().for_each(Note::tell),
        }
    }
    // They are none of one that runs.
    if mistakes.is_empty() { Ok(Way::Own(Box::new(config))) } else { Err(ConfigError(mistakes).into()) }
}

async fn ask_without_sidecar(ask: &Ask<'_>, config: Config) -> Result<Answer, CommandError> {
    let system = |what| move |e| CommandError::System(what, e);
    let _log = logging::start(config.logging);
    config.project_note().iter().for_each(|note| terminal::note(note));
    let mut signals = Signals::listen().map_err(system("listen for signals"))?;
    let sidecar = Sidecar::start_alone(config).await?;
    let answer = tokio::select! {
        answer = ask.by(sidecar.client()) => answer,
        () = signals.end() => Err(CommandError::Other("interrupted before there was an answer".into())),
    };
    sidecar.end(&mut signals).await;
    answer
}

/// What is asked for.
struct Ask<'a> {
    connector: &'a str,
    path: String,
    body: String,
    is_forced: bool,
}

/// Of the answer of Connect's token route, what is printed.
#[derive(Deserialize)]
struct Answer {
    token: String,
    /// In milliseconds since the epoch.
    #[serde(rename = "expiresAt")]
    expires_at: Option<f64>,
}

impl Ask<'_> {
    async fn by(&self, client: Client) -> Result<Answer, CommandError> {
        let client = client.with_timeout(PATIENCE);
        let mut request =
            client.request(Method::POST, &self.path, &self.body).map_err(|e| CommandError::Other(e.to_string()))?;
        if self.is_forced {
            request.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        let reply = client.send(request).await?;
        if !reply.status().is_success() {
            return Err(CommandError::Other(why_not(&client, self.connector, &reply).await));
        }
        serde_json::from_slice(reply.body()).map_err(|_| CommandError::Other("Connect's answer holds no token".into()))
    }
}

impl Answer {
    fn json(self) -> String {
        #[derive(Serialize)]
        struct Printed {
            version: u32,
            token: String,
            expires_at: Option<String>,
        }
        let expires_at = self.expires_at.map(|ms| Timestamp::from_millis(ms as u64).to_string());
        let printed = Printed { version: 1, token: self.token, expires_at };
        // Plain strings and numbers can always be written.
        serde_json::to_string(&printed).unwrap_or_default() + "\n"
    }
}

/// What went wrong, and the command that mends it.
async fn why_not(client: &Client, connector: &str, reply: &Response<Bytes>) -> String {
    let error = UpstreamError::read(reply.body());
    if reply.headers().contains_key("sidecar-error") {
        return Refusal::read(reply.body()).map_or(error.message, |refusal| refusal.line());
    }
    let environment = client.status().await.ok().and_then(|state| state.oidc.environment);
    let environment = environment.as_deref().unwrap_or("development");
    let remedy = remediation::remedy(reply.status(), &error, connector, environment);
    let remedy = remedy.map(|remedy| format!(": {remedy}")).unwrap_or_default();
    let UpstreamError { code, message, .. } = &error;
    format!("Connect answered {} {code} ({message}){remedy}", reply.status().as_u16())
}

/// The body that `vercel connect token` would send, for the app where no subject is named: we have no session of a user.
fn body(args: &TokenArgs) -> Result<String, ConfigError> {
    let TokenArgs { subject, user_id, installation_id, scopes, .. } = args;
    let subject = match (subject, user_id) {
        (Some(SubjectArg::App), Some(_)) => {
            let message = "names a user, and --subject app is none; leave one of them out".to_owned();
            return Err(ConfigError(vec![Mistake { place: "--user-id".into(), message }]));
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
    fn the_body_is_that_of_the_cli() {
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
