//! What a run is given: a name, a stand-in for the credential, and a way in for programs that only know a proxy.
//!
//! The credential itself is never among it.

use http::uri::Scheme;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::credential::placeholder;
use crate::instance::key::Key;
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

/// What is asked of us.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default = "yes")]
    intercept: bool,
    environment: Option<Environment>,
}

/// What of a run's own environment counts for its tunnels. A secret: a password may be in it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Environment {
    /// What the strongest variable for the scheme `https` names.
    https_proxy: Option<String>,
    /// All lists as one.
    no_proxy: Option<String>,
}

impl Environment {
    fn proxy(&self) -> EnvProxy {
        EnvProxy::read(&|name| match name {
            "https_proxy" => self.https_proxy.as_ref().map(Into::into),
            "no_proxy" => self.no_proxy.as_ref().map(Into::into),
            _ => None,
        })
    }
}

fn yes() -> bool {
    true
}

/// What we answer.
#[derive(Serialize)]
struct Given<'a> {
    run: String,
    placeholder: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    bearer_hosts: Vec<String>,
    key_required: bool,
    /// What the run's requests need in the place of the instance key, if they need one.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
}

/// Begins a run, whose requests need `key` if there is one: the answer's body, JSON.
pub(super) async fn begin(
    body: &[u8],
    proxy: &Proxy,
    interception: &Interception,
    key: Option<&Key>,
) -> Result<Vec<u8>, RequestError> {
    let wanted = if body.is_empty() { b"{}" } else { body };
    let wanted: Wanted = serde_json::from_slice(wanted).map_err(|_| {
        let shape = r#"{"intercept":true,"environment":{"https_proxy":"…","no_proxy":"…"}}"#;
        RequestError::new(Code::BadJson, format!("The body is nothing, {shape}, or a part of that."))
            .hint(r#"send {"intercept":true}, {"intercept":false} or no body"#)
    })?;
    let env_proxy = wanted.environment.as_ref().map(Environment::proxy);
    if let Some(unusable) = env_proxy.iter().flat_map(|env_proxy| env_proxy.unusable(&Scheme::HTTPS)).next() {
        let message = format!("{unusable}.");
        return Err(RequestError::new(Code::BadJson, message).command(format!("unset {}", unusable.variable)));
    }
    let unavailable = |reason: String| RequestError::new(Code::InterceptionUnavailable, format!("{reason}."));
    let run = name().map_err(|e| unavailable(format!("could not name the run: {e}")))?;
    let identity = proxy.identity.borrow().clone();
    let claims = identity.oidc().map(|token| &token.claims);
    // By what the machine says, by which the run's programs will go.
    let placeholder = placeholder::make(claims, proxy.clock.local().plus(placeholder::LIFETIME));
    let way_in = match wanted.intercept {
        true => Some(interception.open_to(run.clone(), env_proxy).await.map_err(unavailable)?),
        false => None,
    };
    let bearer_hosts = proxy.relay.hosts.bearers().iter().map(ToString::to_string).collect();
    let (way_in, ca) = way_in.map(|way_in| (way_in.proxy, way_in.ca)).unzip();
    let key = key.map(Key::text);
    // Plain strings can always be written.
    let given = Given { run, placeholder, proxy: way_in, ca, bearer_hosts, key_required: key.is_some(), key };
    Ok(serde_json::to_vec(&given).unwrap_or_default())
}

/// Different for each run, and fit to stand in a URL.
fn name() -> Result<String, getrandom::Error> {
    Ok(format!("run-{:016x}", getrandom::u64()?))
}
