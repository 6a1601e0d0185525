//! What a command of ours asks a running sidecar, over plain loopback HTTP.
//!
//! [`find`] tells which of them is meant. The key goes to nobody who has not proven to hold it already: a state file may
//! outlive its instance, and another program may have its port by now.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::{self, Either, join_all};
use futures_util::stream::FuturesOrdered;
use http::header::{CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, Response};
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

/// Whoever does not answer by then does not answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The largest answer, in bytes: the state of some 100,000 tokens.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// The path of a sidecar's [`StatusReport`].
pub const STATUS_PATH: &str = "/_sidecar/v1/status";

/// Why there is no sidecar to ask.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    /// None is there.
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    /// One is, and does not answer.
    #[error(transparent)]
    Unresponsive(#[from] Unresponsive),
}

/// There is no sidecar of that kind.
#[derive(Debug, thiserror::Error)]
pub struct NotRunning {
    directory: PathBuf,
    /// The port, if the user named one.
    port: Option<u16>,
    /// Those that run, for other projects.
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

/// A sidecar is there and does not answer: it is stopped, or hangs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the sidecar for {}: process {pid} does not answer; if it is stopped: `{}`", project.display(), self.remedy())]
pub struct Unresponsive {
    /// Its process.
    pub pid: u32,
    /// Its project.
    pub project: PathBuf,
}

impl Unresponsive {
    fn of(instance: &Instance) -> Self {
        Self { pid: instance.pid, project: PathBuf::from(&instance.project) }
    }

    /// The command that lets it go on, if it is stopped.
    pub fn remedy(&self) -> String {
        format!("kill -CONT {}", self.pid)
    }
}

/// The running sidecar that is meant: the one at the port, or else the one of the directory or of the nearest above it.
/// Each that is asked has to prove what it is.
pub async fn find(wanted: &Selector) -> Result<(Instance, Client), NotFound> {
    find_within(wanted, TIMEOUT).await
}

/// The same for who cannot wait: whoever does not answer within `patience` does not answer.
pub async fn find_within(wanted: &Selector, patience: Duration) -> Result<(Instance, Client), NotFound> {
    let mut running = wanted.state_dir.as_deref().map(state_file::all).unwrap_or_default();
    running.retain(Instance::is_running);
    let port_of = |instance: &Instance| instance.address().map(|address| address.port());
    let is_meant = |instance: &Instance| match wanted.port {
        Some(port) => port_of(instance) == Some(port),
        None => wanted.directory.starts_with(&instance.project),
    };
    // The nearest first, and of one project always the same.
    running.sort_by_key(|instance| (std::cmp::Reverse(instance.project.components().count()), port_of(instance)));
    let (meant, others): (Vec<_>, Vec<_>) = running.into_iter().partition(is_meant);
    let others_are_asked = async {
        // They are only told of, and not waited for as long.
        let asked = others.iter().map(|other| ask(other, patience / 4));
        let proven = join_all(asked).await.into_iter().map(|answer| matches!(answer, Answer::Proven(_)));
        others.iter().cloned().zip(proven).filter_map(|(other, is_proven)| is_proven.then_some(other)).collect()
    };
    // All are asked at once, and heard in their order.
    let asked = meant.iter().map(|instance| ask(instance, patience)).collect::<FuturesOrdered<_>>();
    let chosen = async {
        let mut answers = asked.zip(futures_util::stream::iter(&meant));
        let mut silent: Option<Unresponsive> = None;
        while let Some((answer, instance)) = answers.next().await {
            // One that does not answer hides those of the directories above it, but no other of its own.
            if let Some(silent) = silent.take_if(|silent| silent.project != instance.project) {
                return Err(Some(silent));
            }
            match answer {
                Answer::Proven(client) => return Ok((instance.clone(), client)),
                Answer::Silence => silent = silent.or_else(|| Some(Unresponsive::of(instance))),
                Answer::OfAnother => {}
            }
        }
        Err(silent)
    };
    let chosen = pin!(chosen);
    let others_are_asked = pin!(others_are_asked);
    match future::select(chosen, others_are_asked).await {
        Either::Left((Ok(found), _)) => Ok(found),
        Either::Left((Err(Some(silent)), _)) => Err(silent.into()),
        Either::Left((Err(None), others)) => Err(not_running(wanted, others.await)),
        Either::Right((others, chosen)) => chosen.await.map_err(|silent| match silent {
            Some(silent) => silent.into(),
            None => not_running(wanted, others),
        }),
    }
}

fn not_running(wanted: &Selector, others: Vec<Instance>) -> NotFound {
    NotRunning { directory: wanted.directory.clone(), port: wanted.port, others }.into()
}

/// Whether an instance is there and does not answer.
pub async fn is_silent(instance: &Instance) -> bool {
    matches!(ask(instance, TIMEOUT).await, Answer::Silence)
}

/// What comes of asking an instance who it is.
enum Answer {
    /// It is the one.
    Proven(Client),
    /// There is none, of the process that the file tells of.
    Silence,
    /// Nobody is there, or somebody else.
    OfAnother,
}

async fn ask(instance: &Instance, patience: Duration) -> Answer {
    let asked = match instance.is_stopped() {
        true => Err(Failure::TooLong),
        false => Client::to(instance, patience).await,
    };
    match asked {
        Ok(Some(client)) => Answer::Proven(client),
        Err(Failure::TooLong) if instance.may_be_its_process() => Answer::Silence,
        Ok(None) | Err(_) => Answer::OfAnother,
    }
}

/// A way to one instance.
pub struct Client {
    address: SocketAddr,
    key: Key,
    patience: Duration,
    /// What is to be said if it does not answer, where it is known which process it is.
    silent: Option<Unresponsive>,
}

/// An error of the sidecar's own, as it answers with.
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

    /// Reads the body of an answer.
    pub fn read(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Envelope {
            error: Refusal,
        }
        serde_json::from_slice::<Envelope>(body).ok().map(|envelope| envelope.error)
    }

    /// What is wrong and what mends it.
    pub fn line(&self) -> String {
        self.remedy.as_ref().map_or_else(|| self.message.clone(), |remedy| remedy.after(&self.message))
    }
}

/// Why there is no answer. Without a secret, for people.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot intercept, in its own words.
    #[error("could not intercept: {0} Or run without that, by --no-intercept")]
    NoInterception(String),
    /// It said no, in its own words.
    #[error("the sidecar refused: {0}")]
    Refused(String),
    /// It has become silent.
    #[error(transparent)]
    Unresponsive(#[from] Unresponsive),
    /// There was no answer, or it was none of a sidecar of this version.
    #[error("the sidecar at {0} did not answer as one of this version: {1}; end it and try again")]
    Failed(SocketAddr, String),
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
    /// A way to an instance that is known to be itself.
    pub fn new(address: SocketAddr, key: Key) -> Self {
        Self { address, key, patience: TIMEOUT, silent: None }
    }

    /// The same, for answers that may take this long: those that the sidecar has to get from elsewhere.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// A way to the instance that a state file tells of, if it proves to be that within `patience`.
    async fn to(instance: &Instance, patience: Duration) -> Result<Option<Self>, Failure> {
        let Some(address) = instance.address() else { return Ok(None) };
        let this = Self::new(address, Key::new(instance.key.clone())).with_patience(patience);
        let nonce = Key::random().map_err(|e| Failure::Other(e.to_string()))?;
        let request = this.unkeyed(Method::GET, "/healthz").header(NONCE_HEADER, nonce.text());
        let request = request.body(Full::default()).map_err(|e| Failure::Other(e.to_string()))?;
        let reply = this.exchange(request).await?;
        let is_proven =
            |proof: &HeaderValue| this.key.is_proven_by(this.address.port(), nonce.text().as_bytes(), proof.as_bytes());
        let is_proven = reply.headers().get(PROOF_HEADER).is_some_and(is_proven);
        Ok(is_proven.then(|| Self { silent: Some(Unresponsive::of(instance)), patience: TIMEOUT, ..this }))
    }

    /// Where it listens, on loopback.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The sidecar's status.
    pub async fn status(&self) -> Result<StatusReport, ClientError> {
        self.ask(Method::GET, STATUS_PATH, "").await
    }

    /// Registers a run, whose requests go through the sidecar from now on.
    pub async fn begin_run(&self, request: &RunRequest) -> Result<Run, ClientError> {
        let body = serde_json::to_string(request).map_err(|e| self.failed(e.to_string()))?;
        self.ask(Method::POST, "/_sidecar/v1/runs", &body).await
    }

    /// What happened lately and what happens from now on.
    pub async fn events(&self) -> Result<EventLines, ClientError> {
        self.follow("/_sidecar/v1/events").await
    }

    /// What goes wrong from now on.
    pub async fn problems(&self) -> Result<EventLines, ClientError> {
        self.follow("/_sidecar/v1/events?only=problems").await
    }

    async fn follow(&self, path: &str) -> Result<EventLines, ClientError> {
        let begin = async {
            let (reply, connection) = self.begin(self.request(Method::GET, path, "")?).await?;
            match reply.status().is_success() {
                true => Ok(EventLines { body: reply.into_body(), read: BytesMut::new(), _connection: connection }),
                false => Err(format!("{path} gave status {}", reply.status())),
            }
        };
        self.in_time(begin).await.map_err(|failure| self.unanswered(failure))
    }

    /// Asks for something of ours: JSON, both ways. No body if it is empty.
    pub async fn ask<T: for<'a> Deserialize<'a>>(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<T, ClientError> {
        let request = self.request(method, path, body).map_err(|reason| self.failed(reason))?;
        let reply = self.send(request).await?;
        if reply.status().is_success() {
            return serde_json::from_slice(reply.body()).map_err(|e| self.failed(format!("{path}: {e}")));
        }
        match Refusal::read(reply.body()) {
            Some(refusal) if refusal.code != "route_not_found" => Err(refusal.into()),
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
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, ClientError> {
        self.exchange(request).await.map_err(|failure| self.unanswered(failure))
    }

    fn unkeyed(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header(HOST, self.address.to_string())
    }

    fn failed(&self, reason: String) -> ClientError {
        ClientError::Failed(self.address, reason)
    }

    fn unanswered(&self, failure: Failure) -> ClientError {
        match (failure, &self.silent) {
            (Failure::TooLong, Some(silent)) => silent.clone().into(),
            (Failure::TooLong, None) => self.failed("it takes too long".into()),
            (Failure::Other(reason), _) => self.failed(reason),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, Failure> {
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

    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, String>>) -> Result<T, Failure> {
        let answer = tokio::time::timeout(self.patience, answer).await;
        answer.map_err(|_| Failure::TooLong)?.map_err(Failure::Other)
    }
}

/// Why an exchange came to nothing.
enum Failure {
    TooLong,
    /// For people.
    Other(String),
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
