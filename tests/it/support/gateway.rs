//! A host of Vercel's that a test plays itself: it hears what comes, and says what it likes when it likes.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::soon;

/// Waits for calls.
pub struct Gateway(TcpListener);

impl Gateway {
    pub async fn open() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.expect("a port"))
    }

    pub fn addr(&self) -> SocketAddr {
        self.0.local_addr().expect("an address")
    }

    /// The setting by which it is the AI Gateway.
    pub fn setting(&self) -> String {
        format!("bearer_hosts = [\"ai-gateway.vercel.sh=http://{}\"]", self.addr())
    }

    /// The next connection, with the head of its first request.
    pub async fn call(&self) -> Call {
        let mut call = Call { stream: self.connection().await, head: String::new(), heard: Vec::new() };
        call.next().await;
        call
    }

    pub async fn connection(&self) -> TcpStream {
        soon("a call", self.0.accept()).await.expect("a connection").0
    }

    /// Whether somebody has called meanwhile.
    pub async fn is_called(&self) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, self.0.accept()).await.is_ok()
    }
}

/// A connection.
pub struct Call {
    stream: TcpStream,
    /// Request line and headers of the last request.
    pub head: String,
    /// What came after it.
    pub heard: Vec<u8>,
}

impl Call {
    /// The head of the next request on the connection.
    pub async fn next(&mut self) {
        self.hear("\r\n\r\n").await;
        let end = find(&self.heard, "\r\n\r\n").expect("it was heard") + 4;
        self.head = String::from_utf8(self.heard.drain(..end).collect()).expect("text");
    }

    /// Returns once this text was heard.
    pub async fn hear(&mut self, text: &str) {
        let mut checked = 0;
        let hearing = async {
            while find(&self.heard[checked..], text).is_none() {
                checked = self.heard.len().saturating_sub(text.len());
                assert_ne!(self.stream.read_buf(&mut self.heard).await.expect("bytes"), 0, "hung up before {text:?}");
            }
        };
        soon(text, hearing).await;
    }

    /// Returns once this character was heard so often, and forgets all that was heard.
    pub async fn swallow(&mut self, character: u8, times: usize) {
        let hearing = async {
            let mut left = times;
            loop {
                left -= self.heard.drain(..).filter(|b| *b == character).count();
                if left == 0 {
                    return;
                }
                assert_ne!(self.stream.read_buf(&mut self.heard).await.expect("bytes"), 0, "hung up");
            }
        };
        soon("more of it", hearing).await;
    }

    /// Whether the other side still hears it.
    pub async fn try_say(&mut self, bytes: &str) -> bool {
        self.stream.write_all(bytes.as_bytes()).await.is_ok()
    }

    pub async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        soon("it to be heard", self.stream.write_all(bytes.as_ref())).await.expect("an open connection");
    }

    /// Returns once the other side has hung up.
    pub async fn ended(mut self) {
        let hearing = async { while self.stream.read_buf(&mut self.heard).await.is_ok_and(|n| n > 0) {} };
        soon("the end of the call", hearing).await;
    }

    /// The values of all lines of a header.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}

fn find(bytes: &[u8], text: &str) -> Option<usize> {
    bytes.windows(text.len()).position(|w| w == text.as_bytes())
}
