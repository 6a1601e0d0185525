//! A program of a run that goes by its proxy settings: CONNECT with the run's secret, TLS that trusts the run's CA.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use connect_sidecar::os::clock::Timestamp;
use connect_sidecar::os::tls;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::http::{APP, Reply, Request, next_reply};
use super::{SLACK, Stage, soon};

/// What a run was given.
#[derive(Debug, Clone)]
pub struct Run {
    /// As it was answered.
    pub json: Value,
    /// Where the proxy is.
    pub addr: SocketAddr,
    /// What proves that one belongs to the run.
    pub authorization: String,
    now: Timestamp,
}

impl Run {
    /// A run of this sidecar, which says that it is `now`.
    pub async fn begin(sidecar: SocketAddr, key: &str, now: Timestamp) -> Self {
        Self::begin_with("{}", sidecar, key, now).await
    }

    async fn begin_with(body: &str, sidecar: SocketAddr, key: &str, now: Timestamp) -> Self {
        let reply = ask(sidecar, key).json(body).send().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let json = reply.json();
        let proxy = json["proxy"].as_str().expect("a proxy");
        let (credentials, addr) =
            proxy.strip_prefix("http://").and_then(|rest| rest.split_once('@')).expect("a proxy with credentials");
        let authorization = basic(credentials);
        Self { addr: addr.parse().expect("an address"), authorization, now, json }
    }

    pub async fn of(stage: &Stage) -> Self {
        Self::begin(stage.addr, &stage.key(), stage.clock.local()).await
    }

    /// A run whose own environment names this proxy, and these hosts that it is not for.
    pub async fn behind(stage: &Stage, https_proxy: Option<&str>, no_proxy: &str) -> Self {
        let body = json!({"environment": {"https_proxy": https_proxy, "no_proxy": no_proxy}}).to_string();
        Self::begin_with(&body, stage.addr, &stage.key(), stage.clock.local()).await
    }

    /// The proxy with the run's credentials.
    pub fn proxy(&self) -> &str {
        self.json["proxy"].as_str().expect("a proxy")
    }

    pub fn placeholder(&self) -> &str {
        self.json["placeholder"].as_str().expect("a placeholder")
    }

    pub fn ca(&self) -> &str {
        self.json["ca"].as_str().expect("a certificate")
    }

    /// A CONNECT without credentials.
    pub fn stranger(&self, target: &str) -> Request {
        Request::new(self.addr, "CONNECT", target).header("host", target)
    }

    /// A CONNECT with the run's credentials.
    pub fn connect(&self, target: &str) -> Request {
        self.stranger(target).header("proxy-authorization", &self.authorization)
    }

    /// A tunnel.
    pub async fn tunnel(&self, target: &str) -> TcpStream {
        let mut stream = soon("a connection", TcpStream::connect(self.addr)).await.expect("a connection");
        stream.write_all(&self.connect(target).kept_alive()).await.expect("taken");
        assert_established(&mut stream).await;
        stream
    }

    /// A tunnel to one of Vercel's hosts, with the TLS of a program that trusts the run's CA.
    pub async fn open(&self, host: &str) -> Opened {
        let stream = self.tunnel(&format!("{host}:443")).await;
        let stream = self.handshake(stream, host, self.ca()).await.unwrap_or_else(|e| panic!("{host}: {e}"));
        Opened { stream, host: host.into() }
    }

    /// TLS that trusts this CA, and asks for this name.
    pub async fn handshake(&self, stream: TcpStream, name: &str, ca: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).expect("PEM")).expect("a root");
        let mut config = ClientConfig::builder_with_details(tls::provider(), Arc::new(Standing(self.now)))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        soon("TLS", TlsConnector::from(Arc::new(config)).connect(name, stream)).await
    }
}

/// Asks for a run, with this key.
pub fn ask(sidecar: SocketAddr, key: &str) -> Request {
    Request::new(sidecar, "POST", "/_sidecar/v1/runs").header("sidecar-key", key)
}

/// `Proxy-Authorization` for these.
pub fn basic(credentials: &str) -> String {
    format!("Basic {}", STANDARD.encode(credentials))
}

/// Reads the answer to a CONNECT: not a byte more, the rest is the tunnel's.
pub async fn assert_established(stream: &mut TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("an answer", stream.read_u8()).await.expect("an answer"));
    }
    let reply = Reply::parse(&head);
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-length"), None, "{reply:?}");
}

/// An opened tunnel.
pub struct Opened {
    pub stream: TlsStream<TcpStream>,
    pub host: String,
}

impl Opened {
    /// A request to the host.
    pub fn request(&self, method: &str, target: &str) -> Request {
        Request::new(self.stream.get_ref().0.peer_addr().expect("an address"), method, target)
            .header("host", &self.host)
    }

    pub async fn send(&mut self, request: Request) -> Reply {
        self.stream.write_all(&request.kept_alive()).await.expect("taken");
        next_reply(&mut self.stream).await
    }
}

/// A token request as an SDK sends it.
pub fn slack(opened: &Opened) -> Request {
    opened.request("POST", SLACK).json(APP)
}

/// A clock that stands still.
#[derive(Debug)]
struct Standing(Timestamp);

impl TimeProvider for Standing {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.as_seconds())))
    }
}
