//! `POST /_sidecar/v1/runs`: registers a `run`. It gets a name, a placeholder for the credential, and an intercepting
//! proxy for programs that cannot be pointed at the sidecar otherwise. It never gets the credential itself.

use std::error::Error;

use http::uri::Scheme;
use tokio::sync::{mpsc, oneshot};

use crate::credential::placeholder;
use crate::instance::key::Key;
use crate::instance::run::{Run, RunEnvironment, RunRequest};
use crate::os::env_proxy::EnvProxy;
use crate::proxy::Proxy;
use crate::proxy::error::{Code, RequestError};

/// Asks [`Interception`](crate::daemon::intercept::Interception) to let a run in.
pub struct InterceptionRequest {
    /// The run's name.
    pub run: String,
    /// The proxy of the run's own environment, if the run reported it.
    pub env_proxy: Option<EnvProxy>,
    /// Receives the outcome.
    pub reply: oneshot::Sender<Result<RunProxy, InterceptionError>>,
}

/// The proxy through which a run's programs reach the sidecar. Contains the run's secret.
pub struct RunProxy {
    /// The proxy's URL, with the run's name and secret.
    pub url: String,
    /// The CA certificate that the programs must trust, as PEM.
    pub ca: String,
}

/// Why a run cannot be intercepted.
#[derive(Debug, thiserror::Error)]
pub enum InterceptionError {
    /// The sidecar shuts down.
    #[error("the sidecar is about to end")]
    Stopping,
    /// No randomness for the run's name.
    #[error("could not name the run: {0}")]
    Name(#[source] getrandom::Error),
    /// The port or the CA could not be set up.
    #[error(transparent)]
    Setup(Box<dyn Error + Send + Sync>),
}

impl From<InterceptionError> for RequestError {
    fn from(error: InterceptionError) -> Self {
        Self::new(Code::InterceptionUnavailable, format!("{error}."))
    }
}

/// Sends requests to [`Interception`](crate::daemon::intercept::Interception).
#[derive(Clone)]
pub struct InterceptionHandle(mpsc::Sender<InterceptionRequest>);

impl InterceptionHandle {
    /// A handle, and the receiver of its requests.
    pub fn channel() -> (Self, mpsc::Receiver<InterceptionRequest>) {
        let (sender, receiver) = mpsc::channel(16);
        (Self(sender), receiver)
    }

    async fn admit(&self, run: String, env_proxy: Option<EnvProxy>) -> Result<RunProxy, InterceptionError> {
        let (reply, outcome) = oneshot::channel();
        let request = InterceptionRequest { run, env_proxy, reply };
        self.0.send(request).await.map_err(|_| InterceptionError::Stopping)?;
        outcome.await.map_err(|_| InterceptionError::Stopping)?
    }
}

/// The proxy for a run's requests that are not intercepted.
fn env_proxy(RunEnvironment { https_proxy, no_proxy }: &RunEnvironment) -> EnvProxy {
    EnvProxy::read(&|name| match name {
        "https_proxy" => https_proxy.as_ref().map(Into::into),
        "no_proxy" => no_proxy.as_ref().map(Into::into),
        _ => None,
    })
}

/// Parses the body of a request for a run. Every part of it is optional.
pub(super) fn parse(body: &[u8]) -> Result<RunRequest, RequestError> {
    serde_json::from_slice(if body.is_empty() { b"{}" } else { body }).map_err(|_| {
        let shape = r#"{"intercept":true,"environment":{"https_proxy":"…","no_proxy":"…"}}"#;
        RequestError::new(Code::BadJson, format!("The body is nothing, {shape}, or a part of that."))
            .hint(r#"send {"intercept":true}, {"intercept":false} or no body"#)
    })
}

/// Registers a run, whose requests must send `key` if there is one.
pub(super) async fn register(
    request: &RunRequest,
    proxy: &Proxy,
    interception: &InterceptionHandle,
    key: Option<&Key>,
) -> Result<Run, RequestError> {
    let env_proxy = request.environment.as_ref().map(env_proxy);
    if let Some(unusable) = env_proxy.iter().flat_map(|env_proxy| env_proxy.unusable(&Scheme::HTTPS)).next() {
        let message = format!("{unusable}.");
        return Err(RequestError::new(Code::BadJson, message).command(format!("unset {}", unusable.variable)));
    }
    let run = random_name().map_err(InterceptionError::Name)?;
    let identity = proxy.identity.borrow().clone();
    let claims = identity.oidc().map(|token| &token.claims);
    // The expiry is in local time, since the run's programs compare it with local time.
    let placeholder = placeholder::make(claims, proxy.clock.local().plus(placeholder::LIFETIME));
    let run_proxy = match request.intercept {
        true => Some(interception.admit(run.clone(), env_proxy).await?),
        false => None,
    };
    let bearer_hosts = proxy.relay.hosts.bearers().iter().map(ToString::to_string).collect();
    let (proxy, ca) = run_proxy.map(|proxy| (proxy.url, proxy.ca)).unzip();
    let key = key.map(|key| key.text().to_owned());
    Ok(Run { run, placeholder, proxy, ca, bearer_hosts, key_required: key.is_some(), key })
}

/// A unique name that needs no escaping in a URL.
fn random_name() -> Result<String, getrandom::Error> {
    Ok(format!("run-{:016x}", getrandom::u64()?))
}
