//! A client that shows what is on the wire: one connection for each request, nothing added but what is asked for.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{SLACK, soon};

/// A plain body of a token request.
pub const APP: &str = r#"{"subject":{"type":"app"}}"#;

/// A request, written out by hand.
#[derive(Debug, Clone)]
#[must_use]
pub struct Request {
    to: SocketAddr,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Request {
    pub fn new(to: SocketAddr, method: &str, target: &str) -> Self {
        Self {
            to,
            method: method.into(),
            target: target.into(),
            headers: vec![("host".into(), to.to_string())],
            body: None,
        }
    }

    /// Sets a header, replacing any of that name.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Takes a header away.
    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self
    }

    /// Replaces the target.
    pub fn target(mut self, target: &str) -> Self {
        self.target = target.into();
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Some(body.into());
        self
    }

    pub fn without_body(mut self) -> Self {
        self.body = None;
        self
    }

    pub fn json(self, body: &str) -> Self {
        self.header("content-type", "application/json").body(body)
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.clone().header("connection", "close").kept_alive()
    }

    /// The same, and the connection stays open.
    pub fn kept_alive(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(body) = &self.body {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        let mut bytes = head.into_bytes();
        bytes.extend(b"\r\n");
        bytes.extend(self.body.as_deref().unwrap_or_default());
        bytes
    }

    pub async fn send(self) -> Reply {
        Reply::parse(&raw(self.to, &self.bytes()).await)
    }

    /// As [`Request::begin`], and the connection stays open.
    pub async fn begin_kept_alive(self) -> Sent {
        Sent::to(self.to, &self.kept_alive()).await
    }

    /// Sends it and leaves the reply for later.
    pub async fn begin(self) -> Sent {
        Sent::to(self.to, &self.bytes()).await
    }
}

/// A request under way. To drop it is to hang up.
#[must_use]
pub struct Sent(TcpStream);

impl Sent {
    async fn to(to: SocketAddr, bytes: &[u8]) -> Self {
        let mut stream = soon("a connection", TcpStream::connect(to)).await.expect("a connection");
        // A server that refuses may close before it has read everything.
        let _ = soon("the request to be taken", stream.write_all(bytes)).await;
        Self(stream)
    }

    /// Sends more of it.
    pub async fn send(&mut self, bytes: &[u8]) {
        soon("the request to be taken", self.0.write_all(bytes)).await.expect("an open connection");
    }

    /// What comes until the text has come.
    pub async fn until(&mut self, text: &str) -> String {
        let mut read = Vec::new();
        let reading = async {
            while !read.windows(text.len()).any(|w| w == text.as_bytes()) {
                match self.0.read_u8().await {
                    Ok(byte) => read.push(byte),
                    Err(_) => panic!("it ended without {text:?}: {}", read.escape_ascii()),
                }
            }
        };
        soon(text, reading).await;
        String::from_utf8(read).expect("text")
    }

    /// What comes until the connection ends.
    pub async fn rest(self) -> String {
        String::from_utf8(soon("the end", self.bytes()).await).expect("text")
    }

    pub async fn reply(self) -> Reply {
        soon("a reply", self.reply_at_last()).await
    }

    /// For a test that lets more time pass than [`soon`] would wait.
    pub async fn reply_at_last(self) -> Reply {
        Reply::parse(&self.bytes().await)
    }

    async fn bytes(mut self) -> Vec<u8> {
        let mut reply = Vec::new();
        let _ = self.0.read_to_end(&mut reply).await;
        reply
    }
}

/// A connection for one request after the other. Another one takes its place where a reply says that it closes.
pub struct KeptAlive {
    to: SocketAddr,
    stream: TcpStream,
}

impl KeptAlive {
    pub async fn to(to: SocketAddr) -> Self {
        let stream = soon("a connection", TcpStream::connect(to)).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        Self { to, stream }
    }

    pub async fn send(&mut self, request: &Request) -> Reply {
        soon("the request to be taken", self.stream.write_all(&request.kept_alive()))
            .await
            .expect("an open connection");
        let reply = next_reply(&mut self.stream).await;
        if reply.header("connection") == Some("close") {
            *self = Self::to(self.to).await;
        }
        reply
    }
}

/// The next reply on a connection that stays open; it names its length.
pub async fn next_reply(stream: &mut (impl AsyncRead + Unpin)) -> Reply {
    let mut read = Vec::new();
    let reading = async {
        loop {
            assert_ne!(stream.read_buf(&mut read).await.expect("a reply"), 0, "closed instead of a reply");
            if read.windows(4).any(|w| w == b"\r\n\r\n") {
                let reply = Reply::parse(&read);
                let length: usize = reply.header("content-length").expect("a length").parse().expect("a number");
                if reply.body.len() == length {
                    return reply;
                }
            }
        }
    };
    soon("a reply", reading).await
}

/// Sends bytes and reads until the other side closes.
pub async fn raw(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    soon("a reply", Sent::to(to, bytes).await.bytes()).await
}

/// The head of a token request as bytes, with these further header lines; `{P}` stands for the sidecar's port.
pub fn token_head(version: &str, lines: &str) -> String {
    format!("POST {SLACK} HTTP/{version}\r\nHost: 127.0.0.1:{{P}}\r\nContent-Type: application/json\r\n{lines}\r\n")
}

/// A whole token request as bytes.
pub fn token_request(version: &str, lines: &str) -> String {
    token_head(version, &format!("{lines}Content-Length: {}\r\n", APP.len())) + APP
}

/// Sends these bytes on one connection; `{P}` is the port. All replies until it closes.
pub async fn exchange(to: SocketAddr, bytes: &str) -> Vec<Reply> {
    Reply::parse_all(&raw(to, bytes.replace("{P}", &to.port().to_string()).as_bytes()).await)
}

pub fn statuses(replies: &[Reply]) -> Vec<u16> {
    replies.iter().map(|reply| reply.status).collect()
}

/// A connection that has had a reply and stays open.
pub async fn kept_alive(addr: SocketAddr) -> TcpStream {
    let mut stream = soon("a connection", TcpStream::connect(addr)).await.expect("a connection");
    assert!(is_answered(&mut stream, addr).await, "it answers");
    stream
}

/// Asks for the sidecar's health on an open connection, and leaves it open; whether there is a reply.
pub async fn is_answered(stream: &mut TcpStream, addr: SocketAddr) -> bool {
    let request = format!("GET /healthz HTTP/1.1\r\nhost: {addr}\r\n\r\n");
    let mut reply = Vec::new();
    let asking = async {
        stream.write_all(request.as_bytes()).await?;
        while !reply.ends_with(br#"{"status":"ok"}"#) {
            if stream.read_buf(&mut reply).await? == 0 {
                return Ok(false);
            }
        }
        Ok::<_, std::io::Error>(true)
    };
    soon("a reply or the connection's end", asking).await.unwrap_or(false)
}

/// Returns once the other side has closed.
pub async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    soon("the connection's end", stream.read_to_end(&mut rest)).await.expect("a plain end");
    assert_eq!(rest, b"");
}

/// A reply as it came.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .unwrap_or_else(|| panic!("no head in {:?}", String::from_utf8_lossy(bytes)));
        let head = String::from_utf8(bytes[..end].to_vec()).expect("a head in ASCII");
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
        let headers = lines
            .map(|line| {
                line.split_once(": ").map_or((line.to_owned(), String::new()), |(n, v)| (n.to_lowercase(), v.into()))
            })
            .collect();
        Self { status, headers, body: bytes[end + 4..].to_vec() }
    }

    /// All replies of one connection, in their order; each names its length.
    pub fn parse_all(mut bytes: &[u8]) -> Vec<Self> {
        let mut replies = Vec::new();
        while !bytes.is_empty() {
            let mut reply = Self::parse(bytes);
            let length = reply.header("content-length").map_or(0, |length| length.parse().expect("a length"));
            let rest = reply.body.len().checked_sub(length).expect("a whole body");
            bytes = &bytes[bytes.len() - rest..];
            reply.body.truncate(length);
            replies.push(reply);
        }
        replies
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// `error.code` of an error of the sidecar's own.
    pub fn code(&self) -> String {
        let json = self.json();
        assert_eq!(json["error"]["source"], "connect-sidecar", "{json}");
        assert_eq!(self.header("sidecar-error"), json["error"]["code"].as_str());
        json["error"]["code"].as_str().expect("a code").to_owned()
    }

    /// The provider token in it.
    pub fn token(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()["token"].as_str().expect("a token").to_owned()
    }

    /// Every reply that we build has these headers and none that would open it to web pages.
    #[track_caller]
    pub fn assert_safe(&self) {
        for (name, value) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(self.header(name), Some(value), "{name}: {self:?}");
        }
        self.assert_closed_to_other_pages();
        let opens =
            |name: &str| matches!(name, "server" | "set-cookie" | "location") || name.starts_with("access-control-");
        assert!(!self.headers.iter().any(|(name, _)| opens(name)), "{self:?}");
    }

    /// What a browser shows as a document is neither framed nor reaches anything. JSON is no document.
    #[track_caller]
    fn assert_closed_to_other_pages(&self) {
        if self.header("content-type").is_none_or(|content_type| content_type.starts_with("application/json")) {
            return;
        }
        for (name, value) in [("referrer-policy", "no-referrer"), ("x-frame-options", "DENY")] {
            assert_eq!(self.header(name), Some(value), "{name}: {self:?}");
        }
        let policy = self.header("content-security-policy").unwrap_or_default();
        let (nothing, framed) = ("default-src 'none'; ", "frame-ancestors 'none'; base-uri 'none'; form-action 'none'");
        let own = policy.strip_prefix(nothing).and_then(|rest| rest.strip_suffix(framed));
        match self.header("content-type") {
            // The page has a script and a style of its own, which are those that it came with.
            Some("text/html; charset=utf-8") => {
                let own: Vec<_> = own.unwrap_or("none").split_terminator("; ").collect();
                let is_known =
                    |part: &&str| part.starts_with("script-src 'sha256-") || part.starts_with("style-src 'sha256-");
                assert!(own.len() == 3 && own[..2].iter().all(is_known) && own[2] == "connect-src 'self'", "{policy}");
                assert!(!policy.contains("unsafe"), "{policy}");
            }
            _ => assert_eq!(own, Some(""), "{self:?}"),
        }
    }

    /// It is this refusal of the sidecar's own.
    #[track_caller]
    pub fn assert_refused(&self, status: u16, code: &str, what: &str) {
        assert_eq!((self.status, self.code().as_str()), (status, code), "{what}: {}", self.text());
        assert_eq!(self.header("content-type"), Some("application/json"), "{what}");
        assert!(self.json()["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{what}");
        assert_eq!(self.header("allow").is_some(), status == 405, "{what}");
        self.assert_safe();
    }

    pub fn cache_status(&self) -> &str {
        self.header("cache-status").unwrap_or("none")
    }
}
