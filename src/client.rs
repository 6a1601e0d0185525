//! What a command of ours asks a running sidecar, over plain loopback HTTP.
//!
//! [`find`] tells which of them is meant. The key goes to nobody who has not proven to hold it already: a state file may outlive its instance, and another
//! program may have its port by now.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

use crate::config::Wanted;
use crate::instance_key::Key;
use crate::proxy::guard::KEY_HEADER;
use crate::server::{NONCE_HEADER, PROOF_HEADER};
use crate::status::instance::{self, Instance};

/// Whoever does not answer by then is no sidecar that could serve an app.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The largest answer, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

/// There is no sidecar of that kind.
#[derive(Debug, thiserror::Error)]
pub struct NoneRuns {
    wanted: Wanted,
    /// Those that run, for other projects.
    others: Vec<Instance>,
}

impl std::fmt::Display for NoneRuns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.wanted.port {
            Some(port) => write!(f, "no sidecar of yours runs at port {port}")?,
            None => write!(f, "no sidecar runs for {}", self.wanted.project.display())?,
        }
        write!(f, ": start one with `connect-sidecar` in another terminal")?;
        for Instance { project, url, .. } in &self.others {
            let port = url.rsplit(':').next().unwrap_or_default();
            write!(f, "\none runs for {project}: that is --port {port}")?;
        }
        Ok(())
    }
}

/// The running sidecar that is meant: the one at the port, or else the one of the project or of the nearest directory
/// above it. Each that is asked has to prove what it is.
pub async fn find(wanted: &Wanted) -> Result<(Instance, Client), NoneRuns> {
    let mut running = wanted.state_dir.as_deref().map(instance::all).unwrap_or_default();
    running.retain(Instance::is_running);
    let port_of = |instance: &Instance| instance.address().map(|address| address.port());
    let is_meant = |instance: &Instance| match wanted.port {
        Some(port) => port_of(instance) == Some(port),
        None => wanted.project.starts_with(&instance.project),
    };
    // The nearest first, and of one project always the same.
    running.sort_by_key(|instance| {
        (std::cmp::Reverse(Path::new(&instance.project).components().count()), port_of(instance))
    });
    let (meant, others): (Vec<_>, Vec<_>) = running.into_iter().partition(is_meant);
    for instance in meant {
        if let Some(client) = Client::to(&instance).await {
            return Ok((instance, client));
        }
    }
    Err(NoneRuns { wanted: wanted.clone(), others })
}

/// A way to one instance.
pub struct Client {
    address: SocketAddr,
    key: Key,
}

/// What a command needs to go through the sidecar: the answer of `POST /_sidecar/v1/runs`.
#[derive(Deserialize)]
pub struct Run {
    /// The worthless stand-in for the OIDC token.
    pub placeholder: String,
    /// The proxy that opens Vercel's hosts, with the run's secret in its URL; absent without interception.
    pub proxy: Option<String>,
    /// The certificate that vouches for it, PEM.
    pub ca: Option<String>,
    /// Hosts to which a request with the placeholder goes with the real token.
    #[serde(default)]
    pub bearer_hosts: Vec<String>,
    /// Whether every request needs the instance key.
    #[serde(default)]
    pub key_required: bool,
}

/// Of the state, what tells whether it is a sidecar as we would start one.
#[derive(Debug, Deserialize)]
pub struct State {
    /// Where Connect is.
    pub upstream: Upstream,
    /// The credential.
    pub oidc: Source,
}

/// Part of [`State`].
#[derive(Debug, Deserialize)]
pub struct Upstream {
    /// Its origin.
    pub url: String,
}

/// Part of [`State`].
#[derive(Debug, Deserialize)]
pub struct Source {
    /// What people call it.
    pub source: String,
}

/// Why there is no answer. Without a secret, for people.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// It cannot intercept, in its own words.
    #[error("could not intercept: {0} Or run without that, by --no-intercept")]
    NoInterception(String),
    /// It said no, in its own words.
    #[error("the sidecar refused: {0}")]
    Refused(String),
    /// There was no answer, or it was none of a sidecar of this version.
    #[error("the sidecar at {0} did not answer as one of this version: {1}; end it and try again")]
    Failed(SocketAddr, String),
}

impl Run {
    /// The port of the proxy.
    pub fn proxy_port(&self) -> Option<u16> {
        self.proxy.as_deref()?.parse::<Uri>().ok()?.port_u16()
    }
}

impl Client {
    /// A way to an instance that is known to be itself.
    pub fn new(address: SocketAddr, key: Key) -> Self {
        Self { address, key }
    }

    /// A way to the instance that a state file tells of, once it has proven to be that.
    pub async fn to(instance: &Instance) -> Option<Self> {
        let this = Self::new(instance.address()?, Key::new(instance.key.clone()));
        let nonce = Key::random().ok()?;
        let request = this.request(Method::GET, "/healthz").header(NONCE_HEADER, nonce.text());
        let reply = this.exchange(request.body(Full::default()).ok()?, TIMEOUT).await.ok()?;
        let proof = reply.headers().get(PROOF_HEADER)?;
        this.key.is_proven_by(this.address.port(), nonce.text().as_bytes(), proof.as_bytes()).then_some(this)
    }

    /// Where it listens, on loopback.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The instance's state.
    pub async fn state(&self) -> Result<State, Unanswered> {
        self.ask(Method::GET, "/_sidecar/v1/status", "").await
    }

    /// Lets a command go through the sidecar from now on.
    pub async fn begin_run(&self, intercept: bool) -> Result<Run, Unanswered> {
        self.ask(Method::POST, "/_sidecar/v1/runs", &format!(r#"{{"intercept":{intercept}}}"#)).await
    }

    fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header(HOST, self.address.to_string())
    }

    /// Asks for something of ours, with the key: JSON, both ways. No body if it is empty.
    pub async fn ask<T: for<'a> Deserialize<'a>>(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<T, Unanswered> {
        self.ask_patiently(method, path, body, TIMEOUT).await
    }

    /// The same of what may take up to `limit`.
    pub async fn ask_patiently<T: for<'a> Deserialize<'a>>(
        &self,
        method: Method,
        path: &str,
        body: &str,
        limit: Duration,
    ) -> Result<T, Unanswered> {
        let failed = |reason: String| Unanswered::Failed(self.address, reason);
        let mut request = self.request(method, path).header(KEY_HEADER, self.key.text());
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::from(body.to_owned())).map_err(|e| failed(e.to_string()))?;
        let reply = self.exchange(request, limit).await.map_err(failed)?;
        if reply.status().is_success() {
            return serde_json::from_slice(reply.body()).map_err(|e| failed(format!("{path}: {e}")));
        }
        #[derive(Deserialize)]
        struct Refusal {
            error: Reason,
        }
        #[derive(Deserialize)]
        struct Reason {
            code: String,
            message: String,
        }
        match serde_json::from_slice(reply.body()) {
            Ok(Refusal { error: Reason { code, message } }) if code == "interception_unavailable" => {
                Err(Unanswered::NoInterception(message))
            }
            Ok(Refusal { error: Reason { code, message } }) if code != "route_not_found" => {
                Err(Unanswered::Refused(message))
            }
            _ => Err(failed(format!("{path} gave status {}", reply.status()))),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>, limit: Duration) -> Result<Response<Bytes>, String> {
        let exchange = async {
            let stream = TcpStream::connect(self.address).await.map_err(|e| e.to_string())?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
            let answer = async {
                let (head, body) = sender.send_request(request).await.map_err(|e| e.to_string())?.into_parts();
                let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|e| e.to_string())?.to_bytes();
                Ok(Response::from_parts(head, body))
            };
            let mut answer = std::pin::pin!(answer);
            tokio::select! {
                answer = &mut answer => answer,
                // What was received before the connection ended is still to be read.
                _ = connection => answer.await,
            }
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| Err("it takes too long".into()))
    }
}
