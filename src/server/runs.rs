//! What a run is given: a name, a stand-in for the credential, and a way in for programs that only know a proxy.
//!
//! The credential itself is never among it.

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::identity::placeholder;
use crate::proxy::Proxy;
use crate::proxy::error::{Code, RequestError};

/// Asks for a way in for a run of this name.
pub struct Asked {
    /// The run's name.
    pub run: String,
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

    async fn open_to(&self, run: String) -> Result<WayIn, String> {
        let (answer, answered) = oneshot::channel();
        let ended = || "the sidecar is about to end".to_owned();
        let owner = self.0.as_ref().ok_or_else(ended)?;
        owner.send(Asked { run, answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }
}

/// What is asked of us.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default = "yes")]
    intercept: bool,
}

fn yes() -> bool {
    true
}

/// What we answer.
#[derive(Serialize)]
struct Given {
    run: String,
    placeholder: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    bearer_hosts: Vec<String>,
    key_required: bool,
}

/// Begins a run: the answer's body, JSON.
pub(super) async fn begin(
    body: &[u8],
    proxy: &Proxy,
    interception: &Interception,
    key_required: bool,
) -> Result<Vec<u8>, RequestError> {
    let wanted = if body.is_empty() { b"{}" } else { body };
    let wanted: Wanted = serde_json::from_slice(wanted).map_err(|_| {
        RequestError::new(Code::BadJson, r#"The body is nothing, or {"intercept":true} or {"intercept":false}."#)
            .hint(r#"send {"intercept":true}, {"intercept":false} or no body"#)
    })?;
    let unavailable = |reason: String| RequestError::new(Code::InterceptionUnavailable, format!("{reason}."));
    let run = name().map_err(|e| unavailable(format!("could not name the run: {e}")))?;
    let identity = proxy.identity.borrow().clone();
    let claims = identity.oidc().map(|token| &token.claims);
    // By what the machine says, by which the run's programs will go.
    let placeholder = placeholder::make(claims, proxy.clock.local().plus(placeholder::LIFE));
    let way_in = match wanted.intercept {
        true => Some(interception.open_to(run.clone()).await.map_err(unavailable)?),
        false => None,
    };
    let bearer_hosts = proxy.relay.hosts.bearers().iter().map(ToString::to_string).collect();
    let (way_in, ca) = way_in.map(|way_in| (way_in.proxy, way_in.ca)).unzip();
    // Plain strings can always be written.
    Ok(serde_json::to_vec(&Given { run, placeholder, proxy: way_in, ca, bearer_hosts, key_required })
        .unwrap_or_default())
}

/// Different for each run, and fit to stand in a URL.
fn name() -> Result<String, getrandom::Error> {
    Ok(format!("run-{:016x}", getrandom::u64()?))
}
