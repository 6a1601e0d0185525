//! The client that commands use to talk to a running sidecar, over plain HTTP on loopback.
//!
//! [`find`] finds the sidecar. The key is only sent to an instance that has proven to have it: a state file may outlive
//! its instance, and another program may have taken the port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::{self, Either, join_all};
use futures_util::stream::FuturesOrdered;
use http::header::{CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::Selector;
use super::key::{KEY_HEADER, Key, NONCE_HEADER, PROOF_HEADER};
use super::run::{Run, RunRequest};
use super::state_file::{self, Instance};
use super::status::StatusReport;
use crate::remedy::Remedy;

/// The path of a sidecar's [`StatusReport`].
pub const STATUS_PATH: &str = "/_sidecar/v1/status";
/// The default timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The size limit of a response body, in bytes: the status with some 100,000 tokens.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// Why no sidecar was found.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    /// There is none.
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    /// There is one that does not answer.
    #[error(transparent)]
    Unresponsive(#[from] Unresponsive),
}

/// No sidecar runs for the directory or at the port.
#[derive(Debug, thiserror::Error)]
pub struct NotRunning {
    directory: PathBuf,
    /// The port, if the user named one.
    port: Option<u16>,
    /// Sidecars that run for other projects.
    others: Vec<Instance>,
}

impl std::fmt::Display for NotRunning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some(port) => write!(f, "no sidecar of yours runs at port {port}")?,
            None => write!(f, "no sidecar runs for {}", self.directory.display())?,
        }
        write!(f, ": start one with `connect-sidecar` in another terminal")?;
        for Instance { project, url, .. } in &self.others {
            let port = url.rsplit(':').next().unwrap_or_default();
            write!(f, "\none runs for {}: that is --port {port}", project.display())?;
        }
        Ok(())
    }
}

/// A sidecar does not answer: it is stopped or hangs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sidecar for {}: process {pid} does not answer; if it is stopped: `{}`",
    project.display(),
    self.resume_command()
)]
pub struct Unresponsive {
    /// The process id.
    pub pid: u32,
    /// The project's directory.
    pub project: PathBuf,
}

impl Unresponsive {
    fn of(instance: &Instance) -> Self {
        Self { pid: instance.pid, project: instance.project.clone() }
    }

    /// The command that resumes the process, if it is stopped.
    pub fn resume_command(&self) -> String {
        format!("kill -CONT {}", self.pid)
    }
}

/// Finds the running sidecar at the selected port, or the one for the selected directory or its nearest ancestor. Every
/// instance that is asked has to prove its identity.
pub async fn find(selector: &Selector) -> Result<(Instance, Client), NotFound> {
    find_with_timeout(selector, TIMEOUT).await
}

/// [`find`] with another timeout.
pub async fn find_with_timeout(selector: &Selector, timeout: Duration) -> Result<(Instance, Client), NotFound> {
    let mut running = selector.state_dir.as_deref().map(state_file::all).unwrap_or_default();
    running.retain(Instance::is_running);
    let port_of = |instance: &Instance| instance.address().map(|address| address.port());
    let is_selected = |instance: &Instance| match selector.port {
        Some(port) => port_of(instance) == Some(port),
        None => selector.directory.starts_with(&instance.project),
    };
    // The nearest directory first; of several for one project always the same.
    running.sort_by_key(|instance| (std::cmp::Reverse(instance.project.components().count()), port_of(instance)));
    let (selected, others): (Vec<_>, Vec<_>) = running.into_iter().partition(is_selected);
    let verified_others = async {
        // They are only listed in an error, so the timeout is shorter.
        let probes = join_all(others.iter().map(|other| probe(other, timeout / 4))).await;
        let verified = others.iter().zip(probes).filter(|(_, probe)| matches!(probe, Probe::Verified(_)));
        verified.map(|(other, _)| other.clone()).collect()
    };
    // All are asked at once; the results are taken in order.
    let probes = selected.iter().map(|instance| probe(instance, timeout)).collect::<FuturesOrdered<_>>();
    let chosen = async {
        let mut probes = probes.zip(futures_util::stream::iter(&selected));
        let mut unresponsive: Option<Unresponsive> = None;
        while let Some((probe, instance)) = probes.next().await {
            // An unresponsive instance hides those of ancestor directories, but not others for the same project.
            if let Some(hiding) = unresponsive.take_if(|other| other.project != instance.project) {
                return Err(Some(hiding));
            }
            match probe {
                Probe::Verified(client) => return Ok((instance.clone(), client)),
                Probe::Unresponsive => unresponsive = unresponsive.or_else(|| Some(Unresponsive::of(instance))),
                Probe::NotRunning => {}
            }
        }
        Err(unresponsive)
    };
    match future::select(pin!(chosen), pin!(verified_others)).await {
        Either::Left((Ok(found), _)) => Ok(found),
        Either::Left((Err(Some(unresponsive)), _)) => Err(unresponsive.into()),
        Either::Left((Err(None), others)) => Err(not_running(selector, others.await)),
        Either::Right((others, chosen)) => chosen.await.map_err(|unresponsive| match unresponsive {
            Some(unresponsive) => unresponsive.into(),
            None => not_running(selector, others),
        }),
    }
}

fn not_running(selector: &Selector, others: Vec<Instance>) -> NotFound {
    NotRunning { directory: selector.directory.clone(), port: selector.port, others }.into()
}

/// Whether an instance runs but does not answer.
pub async fn is_unresponsive(instance: &Instance) -> bool {
    matches!(probe(instance, TIMEOUT).await, Probe::Unresponsive)
}

/// The result of asking an instance for a proof of its identity.
enum Probe {
    /// It has proven its identity.
    Verified(Client),
    /// Its process runs but does not answer.
    Unresponsive,
    /// It does not run: nobody listens at its port, or another program does.
    NotRunning,
}

async fn probe(instance: &Instance, timeout: Duration) -> Probe {
    let result = match instance.is_stopped() {
        true => Err(ExchangeError::Timeout),
        false => Client::verified(instance, timeout).await,
    };
    match result {
        Ok(Some(client)) => Probe::Verified(client),
        Err(ExchangeError::Timeout) if instance.may_be_its_process() => Probe::Unresponsive,
        Ok(None) | Err(_) => Probe::NotRunning,
    }
}

/// A client for one instance.
pub struct Client {
    address: SocketAddr,
    key: Key,
    timeout: Duration,
    /// The error for a timeout, if the process is known.
    unresponsive: Option<Unresponsive>,
}

/// The body of an error response of the sidecar.
#[derive(Debug, Deserialize)]
pub struct Refusal {
    code: String,
    message: String,
    #[serde(flatten)]
    remedy: Option<Remedy>,
}

impl Refusal {
    /// The refusal of a request by this process's own sidecar.
    pub fn new(code: &str, message: String, remedy: Remedy) -> Self {
        Self { code: code.to_owned(), message, remedy: Some(remedy) }
    }

    /// Parses a response body.
    pub fn read(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Envelope {
            error: Refusal,
        }
        serde_json::from_slice::<Envelope>(body).ok().map(|envelope| envelope.error)
    }

    /// Message and remedy in one line.
    pub fn line(&self) -> String {
        self.remedy.as_ref().map_or_else(|| self.message.clone(), |remedy| remedy.after(&self.message))
    }
}

/// Why a request failed. Contains no secret.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Interception is not available; the sidecar's message.
    #[error("could not intercept: {0} Or run without that, by --no-intercept")]
    NoInterception(String),
    /// The sidecar refused the request; its message.
    #[error("the sidecar refused: {0}")]
    Refused(String),
    /// The sidecar does not answer any more.
    #[error(transparent)]
    Unresponsive(#[from] Unresponsive),
    /// There was no response, or not one of this version.
    #[error("the sidecar at {0} did not answer as one of this version: {1}; end it and try again")]
    Failed(SocketAddr, String),
}

/// Why there is no usable response.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error("it takes too long")]
    Timeout,
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Request(#[from] http::Error),
    /// The body could not be read, or is too large.
    #[error("{0}")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{path} gave status {status}")]
    Status { path: String, status: StatusCode },
}

impl From<Refusal> for ClientError {
    fn from(refusal: Refusal) -> Self {
        match &*refusal.code {
            "interception_unavailable" => Self::NoInterception(refusal.message),
            _ => Self::Refused(refusal.line()),
        }
    }
}

impl Client {
    /// A client for an instance whose identity is known.
    pub fn new(address: SocketAddr, key: Key) -> Self {
        Self { address, key, timeout: TIMEOUT, unresponsive: None }
    }

    /// The same client with another timeout, for responses that the sidecar gets from elsewhere.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// A client for the instance of a state file, if it proves its identity within `timeout`.
    async fn verified(instance: &Instance, timeout: Duration) -> Result<Option<Self>, ExchangeError> {
        let Some(address) = instance.address() else { return Ok(None) };
        let client = Self::new(address, Key::new(instance.key.clone())).with_timeout(timeout);
        let nonce = Key::random()?;
        let request = client.request_without_key(Method::GET, "/healthz").header(NONCE_HEADER, nonce.text());
        let response = client.exchange(request.body(Full::default())?).await?;
        let is_valid = |proof: &HeaderValue| {
            client.key.verify_proof(client.address.port(), nonce.text().as_bytes(), proof.as_bytes())
        };
        let is_verified = response.headers().get(PROOF_HEADER).is_some_and(is_valid);
        let unresponsive = Some(Unresponsive::of(instance));
        Ok(is_verified.then_some(Self { unresponsive, timeout: TIMEOUT, ..client }))
    }

    /// The instance's loopback address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The instance's key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The instance's status.
    pub async fn status(&self) -> Result<StatusReport, ClientError> {
        self.request_json(Method::GET, STATUS_PATH, "").await
    }

    /// Registers a run, whose requests go through the sidecar from now on.
    pub async fn begin_run(&self, request: &RunRequest) -> Result<Run, ClientError> {
        let body = serde_json::to_string(request).map_err(|e| self.failed(e.to_string()))?;
        self.request_json(Method::POST, "/_sidecar/v1/runs", &body).await
    }

    /// The most recent events and all from now on.
    pub async fn events(&self) -> Result<EventLines, ClientError> {
        self.stream("/_sidecar/v1/events").await
    }

    /// The errors and warnings from now on.
    pub async fn problems(&self) -> Result<EventLines, ClientError> {
        self.stream("/_sidecar/v1/events?only=problems").await
    }

    async fn stream(&self, path: &str) -> Result<EventLines, ClientError> {
        let begin = async {
            let (response, connection) = self.begin(self.request(Method::GET, path, "")?).await?;
            match response.status() {
                status if status.is_success() => {
                    Ok(EventLines { body: response.into_body(), buffer: BytesMut::new(), _connection: connection })
                }
                status => Err(ExchangeError::Status { path: path.to_owned(), status }),
            }
        };
        self.in_time(begin).await.map_err(|error| self.error(&error))
    }

    /// Sends a request of the sidecar's own API and parses the response. Both bodies are JSON; an empty `body` is not
    /// sent.
    pub async fn request_json<T: for<'a> Deserialize<'a>>(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<T, ClientError> {
        let request = self.request(method, path, body).map_err(|e| self.failed(e.to_string()))?;
        let response = self.send(request).await?;
        if response.status().is_success() {
            return serde_json::from_slice(response.body()).map_err(|e| self.failed(format!("{path}: {e}")));
        }
        match Refusal::read(response.body()) {
            Some(refusal) if refusal.code != "route_not_found" => Err(refusal.into()),
            _ => Err(self.error(&ExchangeError::Status { path: path.to_owned(), status: response.status() })),
        }
    }

    /// Builds a request with the key for [`Client::send`]. A body that is not empty is JSON. Fails if the path is
    /// invalid.
    pub fn request(&self, method: Method, path: &str, body: &str) -> Result<Request<Full<Bytes>>, http::Error> {
        let mut request = self.request_without_key(method, path).header(KEY_HEADER, self.key.text());
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::from(body.to_owned()))
    }

    /// Sends a request and returns the response, whatever its status.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, ClientError> {
        self.exchange(request).await.map_err(|error| self.error(&error))
    }

    fn request_without_key(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header(HOST, self.address.to_string())
    }

    fn failed(&self, reason: String) -> ClientError {
        ClientError::Failed(self.address, reason)
    }

    fn error(&self, error: &ExchangeError) -> ClientError {
        match (error, &self.unresponsive) {
            (ExchangeError::Timeout, Some(unresponsive)) => unresponsive.clone().into(),
            (error, _) => self.failed(error.to_string()),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, ExchangeError> {
        let exchange = async {
            let (response, _connection) = self.begin(request).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_BODY).collect().await.map_err(ExchangeError::Body)?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        self.in_time(exchange).await
    }

    /// Sends a request on a new connection, which is closed when the returned handle is dropped.
    async fn begin(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), ExchangeError> {
        let stream = TcpStream::connect(self.address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // Errors also show when the response is read.
            let _ = connection.await;
        }));
        Ok((sender.send_request(request).await?, connection))
    }

    async fn in_time<T>(&self, exchange: impl Future<Output = Result<T, ExchangeError>>) -> Result<T, ExchangeError> {
        tokio::time::timeout(self.timeout, exchange).await.unwrap_or(Err(ExchangeError::Timeout))
    }
}

/// The lines of an event stream.
pub struct EventLines {
    body: Incoming,
    /// Received data that is not yet a complete line.
    buffer: BytesMut,
    _connection: AbortOnDropHandle<()>,
}

impl EventLines {
    /// The next line without its end: an event as JSON. An empty line follows the past events, and is sent after every
    /// 10 s without an event. `None` once the sidecar has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1).freeze();
                return Some(line.slice(..end));
            }
            let frame = self.body.frame().await?.ok()?;
            self.buffer.extend_from_slice(frame.data_ref().map_or(b"".as_slice(), Bytes::as_ref));
        }
    }
}
