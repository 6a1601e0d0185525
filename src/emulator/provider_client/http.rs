//! The HTTP client for providers: HTTP/1 to the mock providers on loopback, HTTPS to remote issuers. It does not follow
//! redirects.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::ProviderRefusal;

/// The timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The size limit of a response body, in bytes.
const MAX_BODY: usize = 1024 * 1024;
/// Part of the subject of every local CA that the sidecar creates.
const LOCAL_CA: &[u8] = b"connect-sidecar local CA";

/// A client with a connection pool. Clones share it.
#[derive(Clone)]
pub(super) struct HttpClient(Arc<OnceLock<Client<HttpsConnector<HttpConnector>, Full<Bytes>>>>);

/// There was no response. Without details, since the request contains secrets.
#[derive(Debug, thiserror::Error)]
#[error("could not reach the provider")]
pub(super) struct Unreachable;

impl HttpClient {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// Sends a request.
    pub(super) async fn send(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, Unreachable> {
        let client = self.client()?;
        let (mut head, body) = request.into_parts();
        // GitHub requires it.
        head.headers.insert(USER_AGENT, HeaderValue::from_static("connect-sidecar-emulator"));
        let exchange = async {
            let response = client.request(Request::from_parts(head, body.into())).await.map_err(|_| Unreachable)?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_BODY).collect().await.map_err(|_| Unreachable)?;
            Ok(Response::from_parts(head, body.to_bytes().to_vec()))
        };
        tokio::time::timeout(TIMEOUT, exchange).await.map_err(|_| Unreachable)?
    }

    /// Sends a request with these headers. Returns status and JSON body, `null` if the body is not JSON.
    pub(super) async fn json(
        &self,
        method: Method,
        url: &str,
        headers: &[(HeaderName, String)],
        body: Vec<u8>,
    ) -> Result<(u16, Value), ProviderRefusal> {
        let mut request = Request::builder().method(method).uri(url).header(ACCEPT, "application/json");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|_| ProviderRefusal::new("invalid_request"))?;
        let response = self.send(request).await?;
        Ok((response.status().as_u16(), serde_json::from_slice(response.body()).unwrap_or_default()))
    }

    /// Posts a form with these headers. Returns status and JSON body, or a JSON string if the body is other text.
    pub(super) async fn form(
        &self,
        url: &str,
        headers: &[(HeaderName, String)],
        pairs: &[(&str, &str)],
    ) -> Result<(u16, Value), ProviderRefusal> {
        let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        let mut request = Request::post(url)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(form.into_bytes()).map_err(|_| ProviderRefusal::new("invalid_request"))?;
        let response = self.send(request).await?;
        let text = String::from_utf8_lossy(response.body());
        Ok((response.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|_| Value::from(text.trim()))))
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

/// A TLS configuration with the system's root certificates. Loading them is slow, so it is done once per process.
fn tls() -> Result<rustls::ClientConfig, Unreachable> {
    static CONFIG: OnceLock<rustls::ClientConfig> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config.clone());
    }
    let mut roots = rustls::RootCertStore::empty();
    // Inside a `connect-sidecar run`, the environment adds the local CA, which only the command itself is meant to
    // trust.
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
