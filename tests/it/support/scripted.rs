//! An upstream that says, byte for byte, what a test tells it to: for what no honest server can be made to do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// What a request is answered with.
#[derive(Debug)]
#[must_use]
pub struct Says {
    bytes: Vec<u8>,
    then: Then,
    /// It is said once this has ended.
    held: Option<oneshot::Receiver<()>>,
    after: Duration,
}

impl<B: Into<Vec<u8>>> From<B> for Says {
    /// At once, and the connection stays.
    fn from(bytes: B) -> Self {
        Self { bytes: bytes.into(), then: Then::Keep, held: None, after: Duration::ZERO }
    }
}

impl Says {
    pub fn then(mut self, then: Then) -> Self {
        self.then = then;
        self
    }

    /// Takes its time.
    pub fn after(mut self, after: Duration) -> Self {
        self.after = after;
        self
    }
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Received {
    pub at: Instant,
    /// Request line and headers.
    pub head: String,
    pub body: String,
    /// The body that it is answered with.
    pub answer: Vec<u8>,
}

impl Received {
    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }

    /// The values of all lines of a header.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}

type Responder = Box<dyn Fn(&Received, usize) -> Says + Send + Sync>;

/// A running one. With nothing left to say it gives good tokens.
pub struct Scripted {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<VecDeque<Says>>,
    otherwise: Mutex<Responder>,
    /// All requests, whichever connection they came on.
    received: watch::Sender<Vec<Received>>,
    /// How the connections that are open are to end.
    hang_up: watch::Sender<Then>,
    /// How many connections there are.
    open: watch::Sender<usize>,
    /// How many there ever were.
    accepted: AtomicUsize,
}

impl Scripted {
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await
    }

    pub async fn start_on(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            script: Mutex::default(),
            otherwise: Mutex::new(Box::new(|_, _| good("good").into())),
            received: watch::Sender::new(Vec::new()),
            hang_up: watch::Sender::new(Then::Keep),
            open: watch::Sender::new(0),
            accepted: AtomicUsize::new(0),
        });
        let accepting = shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = accepting.clone();
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                shared.open.send_modify(|open| *open += 1);
                tokio::spawn(async move {
                    talk(stream, &shared).await;
                    shared.open.send_modify(|open| *open -= 1);
                });
            }
        });
        Self { addr, shared }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The next request that is not spoken for is answered with this.
    pub fn say(&self, bytes: impl Into<Vec<u8>>, then: Then) {
        self.will(Says::from(bytes).then(then));
    }

    /// As [`Scripted::say`], but not before what is returned is sent to or dropped.
    pub fn say_when_told(&self, bytes: impl Into<Vec<u8>>, then: Then) -> oneshot::Sender<()> {
        let (tell, told) = oneshot::channel();
        self.will(Says { held: Some(told), ..Says::from(bytes).then(then) });
        tell
    }

    /// As [`Scripted::say`], in full.
    pub fn will(&self, says: impl Into<Says>) {
        self.shared.script.lock().expect("no panic").push_back(says.into());
    }

    /// What it says with nothing left to say, given a request and its number, from 1.
    pub fn otherwise(&self, says: impl Fn(&Received, usize) -> Says + Send + Sync + 'static) {
        *self.shared.otherwise.lock().expect("no panic") = Box::new(says);
    }

    /// All requests so far.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// How many requests there were so far.
    pub fn count(&self) -> usize {
        self.shared.received.borrow().len()
    }

    /// How many connections there ever were.
    pub fn connections(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// The bodies of all requests so far.
    pub fn bodies(&self) -> Vec<String> {
        self.shared.received.borrow().iter().map(|request| request.body.clone()).collect()
    }

    /// Returns once there were this many requests.
    pub async fn asked(&self, times: usize) {
        let mut received = self.shared.received.subscribe();
        soon("a request", received.wait_for(|received| received.len() >= times)).await.expect("it runs");
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
    answer(200, "content-type: application/json\r\n", &format!(r#"{{"token":"{token}","expiresAt":4000000000000}}"#))
}

/// An answer with these header lines and its length.
pub fn answer(status: u16, lines: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} Said\r\n{lines}content-length: {}\r\n\r\n{body}", body.len())
}

async fn talk(mut stream: TcpStream, shared: &Shared) {
    let mut hang_up = shared.hang_up.subscribe();
    let mut read = Vec::new();
    loop {
        let then = tokio::select! {
            request = request(&mut stream, &mut read) => {
                let Some(request) = request else { return };
                let says = shared.take(request);
                if let Some(held) = says.held {
                    let _ = held.await;
                }
                if !says.after.is_zero() {
                    tokio::time::sleep(says.after).await;
                }
                // The other side may have enough before the end.
                let _ = stream.write_all(&says.bytes).await;
                says.then
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

impl Shared {
    /// Notes a request; what it is answered with.
    fn take(&self, mut request: Received) -> Says {
        let number = self.received.borrow().len() + 1;
        let scripted = self.script.lock().expect("no panic").pop_front();
        let says = scripted.unwrap_or_else(|| self.otherwise.lock().expect("no panic")(&request, number));
        request.answer = end_of_head(&says.bytes).map(|end| says.bytes[end..].to_vec()).unwrap_or_default();
        self.received.send_modify(|received| received.push(request));
        says
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

/// The next request; `None` at the end of the connection.
async fn request(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<Received> {
    loop {
        if let Some(end) = end_of_head(read) {
            let head = String::from_utf8_lossy(&read[..end]).into_owned();
            let mut request = Received { at: Instant::now(), head, body: String::new(), answer: Vec::new() };
            let length = request.values("content-length").first().map_or(0, |length| length.parse().expect("a length"));
            if read.len() >= end + length {
                let bytes: Vec<u8> = read.drain(..end + length).collect();
                request.body = String::from_utf8_lossy(&bytes[end..]).into_owned();
                return Some(request);
            }
        }
        if stream.read_buf(read).await.ok()? == 0 {
            return None;
        }
    }
}
