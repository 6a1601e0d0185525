//! What a run is given: a name, a stand-in for the credential, and a way in for programs that only know a proxy.
//!
//! The credential itself is never among it.

use http::uri::Scheme;
use tokio::sync::{mpsc, oneshot};

use crate::credential::placeholder;
use crate::instance::key::Key;
use crate::instance::run::{Run, RunEnvironment, RunRequest};
use crate::os::env_proxy::EnvProxy;
use crate::proxy::Proxy;
use crate::proxy::error::{Code, RequestError};

/// Asks for a way in for a run of this name.
pub struct Asked {
    /// The run's name.
    pub run: String,
    /// The proxy of the run's own environment, if it said what that is.
    pub env_proxy: Option<EnvProxy>,
    /// Takes the way in, or why there is none: what is wrong and what to do.
    pub answer: oneshot::Sender<Result<WayIn, String>>,
}

/// How a run's programs get here by their proxy settings. A secret: the run's is in it.
pub struct WayIn {
    /// The proxy, with the run's name and secret.
    pub proxy: String,
    /// The certificate, PEM, that they have to trust.
    pub ca: String,
}

/// Reaches the owner of interception, if there is one.
#[derive(Clone, Default)]
pub struct Interception(Option<mpsc::Sender<Asked>>);

impl Interception {
    /// A way to ask, and where the questions come out.
    pub fn channel() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(16);
        (Self(Some(sender)), receiver)
    }

    async fn open_to(&self, run: String, env_proxy: Option<EnvProxy>) -> Result<WayIn, String> {
        let (answer, answered) = oneshot::channel();
        let ended = || "the sidecar is about to end".to_owned();
        let owner = self.0.as_ref().ok_or_else(ended)?;
        owner.send(Asked { run, env_proxy, answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
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

/// Begins a run. Its requests need `key`, if there is one.
pub(super) async fn begin(
    request: &RunRequest,
    proxy: &Proxy,
    interception: &Interception,
    key: Option<&Key>,
) -> Result<Run, RequestError> {
    let env_proxy = request.environment.as_ref().map(env_proxy);
    if let Some(unusable) = env_proxy.iter().flat_map(|env_proxy| env_proxy.unusable(&Scheme::HTTPS)).next() {
        let message = format!("{unusable}.");
        return Err(RequestError::new(Code::BadJson, message).command(format!("unset {}", unusable.variable)));
    }
    let unavailable = |reason: String| RequestError::new(Code::InterceptionUnavailable, format!("{reason}."));
    let run = name().map_err(|e| unavailable(format!("could not name the run: {e}")))?;
    let identity = proxy.identity.borrow().clone();
    let claims = identity.oidc().map(|token| &token.claims);
    // The expiry is in local time, since the run's programs compare it with local time.
    let placeholder = placeholder::make(claims, proxy.clock.local().plus(placeholder::LIFE));
    let way_in = match request.intercept {
        true => Some(interception.open_to(run.clone(), env_proxy).await.map_err(unavailable)?),
        false => None,
    };
    let bearer_hosts = proxy.relay.hosts.bearers().iter().map(ToString::to_string).collect();
    let (proxy, ca) = way_in.map(|way_in| (way_in.proxy, way_in.ca)).unzip();
    let key = key.map(|key| key.text().to_owned());
    Ok(Run { run, placeholder, proxy, ca, bearer_hosts, key_required: key.is_some(), key })
}

/// Different for each run, and fit to stand in a URL.
fn name() -> Result<String, getrandom::Error> {
    Ok(format!("run-{:016x}", getrandom::u64()?))
}
