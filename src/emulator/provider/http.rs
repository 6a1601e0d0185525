//! How Connect's side asks providers: HTTP/1 to the stand-ins on loopback, HTTPS to a provider that the seed names.
//! Follows no redirect, and shows nothing of what is sent or answered.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::Refused;

/// No provider takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// No answer is longer, in bytes.
const LONGEST_ANSWER: usize = 1024 * 1024;
/// In the name of every local CA.
const LOCAL_CA: &[u8] = b"connect-sidecar local CA";

/// A client.
#[derive(Clone)]
pub(super) struct Http(Arc<OnceLock<Client<HttpsConnector<HttpConnector>, Full<Bytes>>>>);

/// Why there is no answer. Says nothing of the request, which is full of secrets.
#[derive(Debug, thiserror::Error)]
#[error("could not reach the provider")]
pub(super) struct Unreachable;

impl Http {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    pub(super) async fn call(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, Unreachable> {
        let client = self.client()?;
        let (mut head, body) = request.into_parts();
        // GitHub answers nobody who does not say what they are.
        head.headers.insert(USER_AGENT, HeaderValue::from_static("connect-sidecar-emulator"));
        let exchange = async {
            let response = client.request(Request::from_parts(head, body.into())).await.map_err(|_| Unreachable)?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, LONGEST_ANSWER).collect().await.map_err(|_| Unreachable)?;
            Ok(Response::from_parts(head, body.to_bytes().to_vec()))
        };
        tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| Unreachable)?
    }

    /// Asks with an own set of headers; the answer's status and JSON, `null` where it has none.
    pub(super) async fn json(
        &self,
        method: Method,
        url: &str,
        headers: &[(http::HeaderName, String)],
        body: Vec<u8>,
    ) -> Result<(u16, Value), Refused> {
        let mut request = Request::builder().method(method).uri(url).header(ACCEPT, "application/json");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|_| Refused::new("invalid_request"))?;
        let answer = self.call(request).await?;
        Ok((answer.status().as_u16(), serde_json::from_slice(answer.body()).unwrap_or_default()))
    }

    /// Sends a form; the answer's status, JSON, or its text where it is none.
    pub(super) async fn form(&self, url: &str, pairs: &[(&str, &str)]) -> Result<(u16, Value), Refused> {
        let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        let request = Request::post(url)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form.into_bytes())
            .map_err(|_| Refused::new("invalid_request"))?;
        let answer = self.call(request).await?;
        let text = String::from_utf8_lossy(answer.body());
        Ok((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|_| Value::from(text.trim()))))
    }

    fn client(&self) -> Result<&Client<HttpsConnector<HttpConnector>, Full<Bytes>>, Unreachable> {
        if self.0.get().is_none() {
            let connector = hyper_rustls::HttpsConnectorBuilder::new()
                .with_tls_config(tls()?)
                .https_or_http()
                .enable_http1()
                .build();
            let _ = self.0.set(Client::builder(TokioExecutor::new()).build(connector));
        }
        self.0.get().ok_or(Unreachable)
    }
}

/// What this machine trusts. Reading it takes a moment, and is done once for all emulators of this process.
fn tls() -> Result<rustls::ClientConfig, Unreachable> {
    static CONFIG: OnceLock<rustls::ClientConfig> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config.clone());
    }
    let mut roots = rustls::RootCertStore::empty();
    // Inside a `connect-sidecar run`, what the environment names has the local CA, which only its command is to trust.
    let is_local_ca = |der: &[u8]| der.windows(LOCAL_CA.len()).any(|window| window == LOCAL_CA);
    let found = rustls_native_certs::load_native_certs().certs;
    roots.add_parsable_certificates(found.into_iter().filter(|certificate| !is_local_ca(certificate)));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| Unreachable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(CONFIG.get_or_init(|| config).clone())
}
