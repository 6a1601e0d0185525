//! What a command of ours asks a running sidecar, over plain loopback HTTP.
//!
//! [`find`] tells which of them is meant. The key goes to nobody who has not proven to hold it already: a state file may
//! outlive its instance, and another program may have its port by now.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Wanted;
use crate::instance_key::Key;
use crate::proxy::guard::KEY_HEADER;
use crate::server::{NONCE_HEADER, PROOF_HEADER};
use crate::status::instance::{self, Instance};

/// Whoever does not answer by then is no sidecar that could serve an app.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The largest answer, in bytes: the state of some 100,000 tokens.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// There is no sidecar of that kind.
#[derive(Debug, thiserror::Error)]
pub struct NoneRuns {
    project: PathBuf,
    /// The port, if the user named one.
    port: Option<u16>,
    /// Those that run, for other projects.
    others: Vec<Instance>,
}

impl NoneRuns {
    /// None that is as this project would have it.
    pub fn for_project(project: &Path) -> Self {
        Self { project: project.to_owned(), port: None, others: Vec::new() }
    }
}

impl std::fmt::Display for NoneRuns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some(port) => write!(f, "no sidecar of yours runs at port {port}")?,
            None => write!(f, "no sidecar runs for {}", self.project.display())?,
        }
        write!(f, ": start one with `connect-sidecar` in another terminal")?;
        for Instance { project, url, .. } in &self.others {
            let port = url.rsplit(':').next().unwrap_or_default();
            write!(f, "\none runs for {}: that is --port {port}", project.display())?;
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
    running.sort_by_key(|instance| (std::cmp::Reverse(instance.project.components().count()), port_of(instance)));
    let (meant, others): (Vec<_>, Vec<_>) = running.into_iter().partition(is_meant);
    for instance in meant {
        if let Some(client) = Client::to(&instance).await {
            return Ok((instance, client));
        }
    }
    let proven = join_all(others.iter().map(Client::to)).await;
    let others = others.into_iter().zip(proven).filter_map(|(other, client)| client.and(Some(other))).collect();
    Err(NoneRuns { port: wanted.port, others, ..NoneRuns::for_project(&wanted.project) })
}

/// A way to one instance.
pub struct Client {
    address: SocketAddr,
    key: Key,
    patience: Duration,
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
    /// What people call the place where it is looked for.
    pub configured_source: String,
    /// Of what it is, where it says so.
    pub environment: Option<String>,
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
        Self { address, key, patience: TIMEOUT }
    }

    /// The same, for answers that may take this long: those that the sidecar has to get from elsewhere.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// A way to the instance that a state file tells of, once it has proven to be that.
    pub async fn to(instance: &Instance) -> Option<Self> {
        let this = Self::new(instance.address()?, Key::new(instance.key.clone()));
        let nonce = Key::random().ok()?;
        let request = this.unkeyed(Method::GET, "/healthz").header(NONCE_HEADER, nonce.text());
        let reply = this.exchange(request.body(Full::default()).ok()?).await.ok()?;
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

    /// What happened lately and what happens from now on.
    pub async fn events(&self) -> Result<EventLines, Unanswered> {
        let path = "/_sidecar/v1/events";
        let begin = async {
            let (reply, connection) = self.begin(self.request(Method::GET, path, "")?).await?;
            match reply.status().is_success() {
                true => Ok(EventLines { body: reply.into_body(), read: BytesMut::new(), _connection: connection }),
                false => Err(format!("{path} gave status {}", reply.status())),
            }
        };
        self.in_time(begin).await.map_err(|reason| self.failed(reason))
    }

    /// Asks for something of ours: JSON, both ways. No body if it is empty.
    pub async fn ask<T: for<'a> Deserialize<'a>>(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<T, Unanswered> {
        let request = self.request(method, path, body).map_err(|reason| self.failed(reason))?;
        let reply = self.send(request).await?;
        if reply.status().is_success() {
            return serde_json::from_slice(reply.body()).map_err(|e| self.failed(format!("{path}: {e}")));
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
            _ => Err(self.failed(format!("{path} gave status {}", reply.status()))),
        }
    }

    /// A request with the key, for [`Client::send`]: JSON if it has a body. An error says what is wrong with the path.
    pub fn request(&self, method: Method, path: &str, body: &str) -> Result<Request<Full<Bytes>>, String> {
        let mut request = self.unkeyed(method, path).header(KEY_HEADER, self.key.text());
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::from(body.to_owned())).map_err(|e| e.to_string())
    }

    /// Sends a request; whatever comes back.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, Unanswered> {
        self.exchange(request).await.map_err(|reason| self.failed(reason))
    }

    fn unkeyed(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header(HOST, self.address.to_string())
    }

    fn failed(&self, reason: String) -> Unanswered {
        Unanswered::Failed(self.address, reason)
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, String> {
        let exchange = async {
            let (reply, _connection) = self.begin(request).await?;
            let (head, body) = reply.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|e| e.to_string())?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        self.in_time(exchange).await
    }

    /// Sends a request on a connection of its own, which lasts as long as what is returned beside the reply's head.
    async fn begin(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), String> {
        let stream = TcpStream::connect(self.address).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // Who reads the reply is told what went wrong.
            let _ = connection.await;
        }));
        let reply = sender.send_request(request).await.map_err(|e| e.to_string())?;
        Ok((reply, connection))
    }

    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        tokio::time::timeout(self.patience, answer).await.unwrap_or_else(|_| Err("it takes too long".into()))
    }
}

/// What a sidecar tells of what happens, line by line.
pub struct EventLines {
    body: Incoming,
    /// Of the next line.
    read: BytesMut,
    _connection: AbortOnDropHandle<()>,
}

impl EventLines {
    /// The next line, without its end: an event as JSON. An empty one comes after the past, and whenever it is quiet for
    /// 10 s. `None` once the sidecar has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(end + 1).freeze();
                return Some(line.slice(..end));
            }
            let frame = self.body.frame().await?.ok()?;
            self.read.extend_from_slice(frame.data_ref().map_or(b"".as_slice(), Bytes::as_ref));
        }
    }
}
