//! An upstream that says, byte for byte, what a test tells it to: for what no honest server can be made to do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

use super::soon;

/// What becomes of the connection after an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Keep,
    Close,
    Reset,
    /// Nothing more comes, and it stays open.
    Stall,
    /// This comes again and again, after so long each time.
    Repeat(&'static str, Duration),
}

/// A running one. With nothing left to say it gives good tokens.
pub struct Scripted {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<VecDeque<Line>>,
    /// The bodies of all requests, whichever connection they came on.
    bodies: watch::Sender<Vec<String>>,
    /// How the connections that are open are to end.
    hang_up: watch::Sender<Then>,
    /// How many connections there are.
    open: watch::Sender<usize>,
}

struct Line {
    bytes: Vec<u8>,
    then: Then,
    /// It is said once this has ended.
    held: Option<oneshot::Receiver<()>>,
}

impl Scripted {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            script: Mutex::default(),
            bodies: watch::Sender::new(Vec::new()),
            hang_up: watch::Sender::new(Then::Keep),
            open: watch::Sender::new(0),
        });
        let accepting = shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = accepting.clone();
                shared.open.send_modify(|open| *open += 1);
                tokio::spawn(async move {
                    talk(stream, &shared).await;
                    shared.open.send_modify(|open| *open -= 1);
                });
            }
        });
        Self { addr, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The next request that is not spoken for is answered with this.
    pub fn say(&self, bytes: impl Into<Vec<u8>>, then: Then) {
        self.line(Line { bytes: bytes.into(), then, held: None });
    }

    /// As [`Scripted::say`], but not before what is returned is sent to or dropped.
    pub fn say_when_told(&self, bytes: impl Into<Vec<u8>>, then: Then) -> oneshot::Sender<()> {
        let (tell, told) = oneshot::channel();
        self.line(Line { bytes: bytes.into(), then, held: Some(told) });
        tell
    }

    fn line(&self, line: Line) {
        self.shared.script.lock().expect("no panic").push_back(line);
    }

    /// The bodies of all requests so far.
    pub fn bodies(&self) -> Vec<String> {
        self.shared.bodies.borrow().clone()
    }

    /// Returns once there were this many requests.
    pub async fn asked(&self, times: usize) {
        let mut bodies = self.shared.bodies.subscribe();
        soon("a request", bodies.wait_for(|bodies| bodies.len() >= times)).await.expect("it runs");
    }

    /// Ends all connections that wait for a request.
    pub fn hang_up(&self, how: Then) {
        self.shared.hang_up.send_replace(how);
    }

    /// Returns once all connections have ended.
    pub async fn all_ended(&self) {
        let mut open = self.shared.open.subscribe();
        soon("the end of all connections", open.wait_for(|open| *open == 0)).await.expect("it runs");
    }
}

/// An answer with a token that is good for long.
pub fn good(token: &str) -> String {
    let body = format!(r#"{{"token":"{token}","expiresAt":4000000000000}}"#);
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

async fn talk(mut stream: TcpStream, shared: &Shared) {
    let mut hang_up = shared.hang_up.subscribe();
    let mut read = Vec::new();
    loop {
        let then = tokio::select! {
            body = request_body(&mut stream, &mut read) => {
                let Some(body) = body else { return };
                shared.bodies.send_modify(|bodies| bodies.push(body));
                let next = shared.script.lock().expect("no panic").pop_front();
                let next = next.unwrap_or_else(|| Line { bytes: good("good").into(), then: Then::Keep, held: None });
                let Line { bytes, then, held } = next;
                if let Some(held) = held {
                    let _ = held.await;
                }
                // The other side may have enough before the end.
                let _ = stream.write_all(&bytes).await;
                then
            }
            Ok(()) = hang_up.changed() => *hang_up.borrow_and_update(),
        };
        match then {
            Then::Keep => continue,
            Then::Close => {}
            Then::Reset => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a socket"),
            Then::Stall => std::future::pending().await,
            Then::Repeat(piece, pause) => {
                while stream.write_all(piece.as_bytes()).await.is_ok() {
                    tokio::time::sleep(pause).await;
                }
            }
        }
        return;
    }
}

/// The body of the next request; `None` at the end of the connection.
async fn request_body(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4) {
            let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if read.len() >= end + length {
                let request: Vec<u8> = read.drain(..end + length).collect();
                return Some(String::from_utf8_lossy(&request[end..]).into_owned());
            }
        }
        if stream.read_buf(read).await.ok()? == 0 {
            return None;
        }
    }
}
