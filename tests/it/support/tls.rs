//! Servers that speak TLS with a certificate of a test's making.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// A certificate authority of this name.
pub fn authority(name: &str) -> (String, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    (pem, Issuer::new(params, key))
}

/// Accepts TLS with a certificate for `name`, changed.
pub fn acceptor(
    name: &str,
    authority: &Issuer<'static, KeyPair>,
    change: impl FnOnce(&mut CertificateParams),
) -> TlsAcceptor {
    let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
    change(&mut params);
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, authority).expect("a certificate").der().clone();
    let config = rustls::ServerConfig::builder_with_provider(connect_sidecar::os::tls::provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
        .expect("a certificate with its key");
    TlsAcceptor::from(Arc::new(config))
}

/// A server at `ip` with a certificate for `name`, changed; its address, and the bytes it could decrypt.
pub async fn server(
    ip: IpAddr,
    name: &str,
    authority: &Issuer<'static, KeyPair>,
    change: impl FnOnce(&mut CertificateParams),
) -> (SocketAddr, watch::Receiver<Vec<u8>>) {
    let acceptor = acceptor(name, authority, change);
    let (decrypted, read) = watch::channel(Vec::new());
    let decrypted = Arc::new(decrypted);
    let addr = listen(ip, move |stream| {
        let (acceptor, decrypted) = (acceptor.clone(), decrypted.clone());
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut bytes = Vec::new();
            while stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {
                decrypted.send_modify(|all| all.append(&mut bytes));
                let body = r#"{"token":"good","expiresAt":4000000000000}"#;
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        }
    })
    .await;
    (addr, read)
}

/// Serves connections to `ip` with `serve`, each in a task.
pub async fn listen<F>(ip: IpAddr, serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((ip, 0)).await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    addr
}
