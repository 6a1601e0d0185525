//! A proxy that a test plays itself: HTTP CONNECT, with or without TLS, or SOCKS5. It notes what it is asked and what
//! came over the wire, and leads everybody to one place.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::tls::listen;

/// How it is spoken to.
#[derive(Clone)]
pub enum Speaks {
    Http,
    Https(TlsAcceptor),
    Socks5,
}

/// What it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Host and port as they were written; an IPv6 address without brackets.
    pub target: String,
    /// User and password.
    pub credentials: Option<(String, String)>,
}

/// A running one.
pub struct StandIn {
    pub addr: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    wire: Arc<Mutex<Vec<u8>>>,
}

impl StandIn {
    /// Leads to `there`, or refuses.
    pub async fn start(speaks: Speaks, there: Option<SocketAddr>) -> Self {
        let (asked, wire) = (Arc::<Mutex<Vec<Asked>>>::default(), Arc::<Mutex<Vec<u8>>>::default());
        let (noting, recording) = (asked.clone(), wire.clone());
        let addr = listen(Ipv4Addr::LOCALHOST.into(), move |stream| {
            let (speaks, asked) = (speaks.clone(), noting.clone());
            let stream = Recorded { stream, wire: recording.clone() };
            async move {
                // Whoever hangs up has reasons of his own.
                let _ = match speaks {
                    Speaks::Http => connect(stream, &asked, there).await,
                    Speaks::Https(acceptor) => match acceptor.accept(stream).await {
                        Ok(stream) => connect(stream, &asked, there).await,
                        Err(e) => Err(e),
                    },
                    Speaks::Socks5 => socks5(stream, &asked, there).await,
                };
            }
        })
        .await;
        Self { addr, asked, wire }
    }

    /// All that it was asked for so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no panic").clone()
    }

    /// The targets of that.
    pub fn targets(&self) -> Vec<String> {
        self.asked().into_iter().map(|asked| asked.target).collect()
    }

    /// Whether this came over the wire as it is.
    pub fn was_sent(&self, text: &str) -> bool {
        self.wire.lock().expect("no panic").windows(text.len()).any(|window| window == text.as_bytes())
    }

    /// Whether anything came.
    pub fn was_called(&self) -> bool {
        !self.wire.lock().expect("no panic").is_empty()
    }
}

async fn connect(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    asked: &Mutex<Vec<Asked>>,
    there: Option<SocketAddr>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).expect("text");
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).expect("a CONNECT");
    let credentials = head.lines().find_map(|line| line.strip_prefix("Proxy-Authorization: Basic ")).map(|encoded| {
        let decoded = String::from_utf8(STANDARD.decode(encoded).expect("base64")).expect("text");
        let (user, password) = decoded.split_once(':').expect("both");
        (user.to_owned(), password.to_owned())
    });
    asked.lock().expect("no panic").push(Asked { target: target.to_owned(), credentials });
    match there {
        Some(there) => {
            stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
            lead(stream, there).await
        }
        None => stream.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await,
    }
}

/// RFC 1928, and RFC 1929 where that is offered.
async fn socks5(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    asked: &Mutex<Vec<Asked>>,
    there: Option<SocketAddr>,
) -> std::io::Result<()> {
    assert_eq!(stream.read_u8().await?, 5, "the version");
    let mut methods = vec![0; stream.read_u8().await?.into()];
    stream.read_exact(&mut methods).await?;
    let has_credentials = methods.contains(&2);
    stream.write_all(&[5, if has_credentials { 2 } else { 0 }]).await?;
    let mut credentials = None;
    if has_credentials {
        assert_eq!(stream.read_u8().await?, 1, "the version");
        credentials = Some((text(&mut stream).await?, text(&mut stream).await?));
        stream.write_all(&[1, 0]).await?;
    }
    let mut request = [0; 4];
    stream.read_exact(&mut request).await?;
    assert_eq!(request[..3], [5, 1, 0], "a CONNECT");
    let host = match request[3] {
        1 => Ipv4Addr::from_bits(stream.read_u32().await?).to_string(),
        3 => text(&mut stream).await?,
        4 => Ipv6Addr::from_bits(stream.read_u128().await?).to_string(),
        other => panic!("an address of kind {other}"),
    };
    let target = format!("{host}:{}", stream.read_u16().await?);
    asked.lock().expect("no panic").push(Asked { target, credentials });
    let status = if there.is_some() { 0 } else { 2 };
    stream.write_all(&[5, status, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    match there {
        Some(there) => lead(stream, there).await,
        None => Ok(()),
    }
}

/// Text with its length before it.
async fn text(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<String> {
    let mut bytes = vec![0; stream.read_u8().await?.into()];
    stream.read_exact(&mut bytes).await?;
    Ok(String::from_utf8(bytes).expect("text"))
}

async fn lead(mut stream: impl AsyncRead + AsyncWrite + Unpin, there: SocketAddr) -> std::io::Result<()> {
    let mut server = TcpStream::connect(there).await?;
    tokio::io::copy_bidirectional(&mut stream, &mut server).await.map(drop)
}

/// A connection of which all that comes is written down.
struct Recorded {
    stream: TcpStream,
    wire: Arc<Mutex<Vec<u8>>>,
}

impl AsyncRead for Recorded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.wire.lock().expect("no panic").extend_from_slice(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Recorded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
