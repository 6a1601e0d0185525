//! Measures complete requests over loopback, relative to other servers in the same run.
//!
//! `cargo bench --bench loopback` prints these sections; names as arguments select some of them:
//!
//! - `hits`: requests per second and server CPU per request of cache hits at 16 and at 128 connections, relative to a
//!   bare hyper server with responses of the same size; resident memory.
//! - `entries`: a cache hit with a thousand entries, relative to one entry.
//! - `misses`: the median latency that forwarding adds.
//! - `herd`: five hundred equal requests at once.
//! - `start`: time from exec to the first answer.
//! - `runs`: time that `run` adds to a command's start.
//!
//! Rounds alternate between the servers, and the median of the ratios is printed, because absolute figures vary on a
//! shared machine. `--quick` only checks that everything runs.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::world::Connector;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The sidecar closes a connection after this many requests. The clients reconnect after as many to every server.
const REQUESTS_A_CONNECTION: u64 = 1000;

const BODY: &str = r#"{"subject":{"type":"app"},"scopes":["chat:write"]}"#;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = args.iter().position(|a| a == "--bare") {
        return bare_server(args[at + 1].parse().unwrap());
    }
    if let Some(at) = args.iter().position(|a| a == "--relay") {
        return relay(args[at + 1].parse().unwrap());
    }
    let quick = args.iter().any(|a| a == "--quick");
    let chosen = |section: &str| args.iter().all(|a| a.starts_with("--")) || args.iter().any(|a| a == section);
    for (name, section) in [
        ("hits", hits as fn(bool)),
        ("entries", entries),
        ("misses", misses),
        ("herd", herd),
        ("start", start),
        ("runs", runs),
    ] {
        if chosen(name) {
            section(quick);
        }
    }
}

/// The reference for hits: a bare hyper server.
fn bare_server(size: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let answer = Bytes::from(vec![b'x'; size]);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("bare listening on http://{}", listener.local_addr().unwrap());
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let answer = answer.clone();
                    async move {
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        assert!(!body.is_empty());
                        let mut response = Response::new(Full::new(answer));
                        response
                            .headers_mut()
                            .insert("content-type", http::HeaderValue::from_static("application/json"));
                        Ok::<_, Infallible>(response)
                    }
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
}

/// The reference for misses: a relay that only copies bytes.
fn relay(to: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("relay listening on http://{}", listener.local_addr().unwrap());
        loop {
            let (mut from, _) = listener.accept().await.unwrap();
            let mut to = tokio::net::TcpStream::connect(to).await.unwrap();
            from.set_nodelay(true).unwrap();
            to.set_nodelay(true).unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
}

/// Starts this program in another role.
fn start_role(role: &str, argument: &str) -> Server {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([role, argument]);
    Server::start(command)
}

/// A server process.
struct Server {
    child: Child,
    addr: SocketAddr,
    _stdout: BufReader<std::process::ChildStdout>,
}

impl Server {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let (_, addr) = line.trim_end().split_once("http://").unwrap_or_else(|| panic!("not ready: {line:?}"));
        Self { addr: addr.parse().unwrap(), child, _stdout: stdout }
    }

    /// CPU time used so far, in clock ticks.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default().to_owned();
        let fields: Vec<u64> = after_name.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0)
    }

    /// Resident memory in KiB.
    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0 kB");
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(addr: SocketAddr, target: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {target} HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Reads one response with a content length and returns its total length.
async fn read_response(stream: &mut tokio::net::TcpStream, buffer: &mut Vec<u8>) -> usize {
    buffer.clear();
    loop {
        assert!(stream.read_buf(buffer).await.unwrap() > 0, "closed");
        if let Some(total) = response_length(buffer)
            && buffer.len() >= total
        {
            return total;
        }
    }
}

fn response_length(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: "))?;
    Some(end + length.trim().parse::<usize>().ok()?)
}

/// Sends requests over `connections` keep-alive connections. Returns requests per second and their number.
fn load(addr: SocketAddr, target: &str, connections: usize, time: Duration) -> (f64, u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let start = Instant::now();
        let bytes = request(addr, target, BODY);
        let tasks: Vec<_> = (0..connections)
            .map(|_| {
                let bytes = bytes.clone();
                tokio::spawn(async move {
                    let connect = async || {
                        let stream = tokio::net::TcpStream::connect(addr).await.unwrap();
                        stream.set_nodelay(true).unwrap();
                        stream
                    };
                    let mut stream = connect().await;
                    let mut buffer = Vec::with_capacity(4096);
                    stream.write_all(&bytes).await.unwrap();
                    let length = read_response(&mut stream, &mut buffer).await;
                    let mut count = 1_u64;
                    // The number of digits of `Age` may change, so the length is only compared roughly.
                    while start.elapsed() < time {
                        if count.is_multiple_of(REQUESTS_A_CONNECTION) {
                            stream = connect().await;
                        }
                        stream.write_all(&bytes).await.unwrap();
                        let mut got = 0;
                        while got + 64 < length {
                            buffer.clear();
                            let n = stream.read_buf(&mut buffer).await.unwrap();
                            assert!(n > 0, "closed");
                            got += n;
                        }
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        let mut total = 0;
        for task in tasks {
            total += task.await.unwrap();
        }
        (total as f64 / start.elapsed().as_secs_f64(), total)
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Latencies of sequential requests, in microseconds.
fn latencies(addr: SocketAddr, requests: impl Iterator<Item = Vec<u8>>) -> Vec<f64> {
    let mut connection = Forwarded::new(addr);
    requests.map(|bytes| connection.exchange(&bytes)).collect()
}

struct Sandbox {
    dir: tempfile::TempDir,
    /// Outside the project, where no CA would be stored.
    state: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    emulator: Emulator,
}

impl Sandbox {
    fn new(tls: bool) -> Self {
        let [dir, state] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut options = Options { tls, ..Options::default() };
        for n in 0..2000 {
            options.world.connectors.push(Connector::new(&format!("oauth/c{n}"), &format!("scl_c{n}"), "prj_web"));
        }
        let emulator = runtime.block_on(Emulator::start(options)).unwrap();
        let token = emulator.oidc_token(DEVELOPMENT_LIFE);
        std::fs::write(dir.path().join(".env.local"), format!("VERCEL_OIDC_TOKEN=\"{token}\"\n")).unwrap();
        if let Some(pem) = emulator.ca_pem() {
            std::fs::write(dir.path().join("ca.pem"), pem).unwrap();
        }
        Self { dir, state, _runtime: runtime, emulator }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_connect-sidecar"));
        command
            .args(["--port", "0", "--quiet", "--upstream", &self.emulator.url()])
            .current_dir(self.dir.path())
            .env("HOME", self.state.path())
            .stderr(Stdio::null());
        if self.emulator.ca_pem().is_some() {
            command.arg("--upstream-ca").arg(self.dir.path().join("ca.pem"));
        }
        command
    }

    fn sidecar(&self) -> Server {
        Server::start(self.command())
    }
}

/// Cache hits, relative to a bare server.
fn hits(quick: bool) {
    let rounds = if quick { 2 } else { 41 };
    let time = if quick { Duration::from_millis(200) } else { Duration::from_millis(500) };
    let sandbox = Sandbox::new(false);
    let sidecar = sandbox.sidecar();
    let idle = sidecar.resident();
    let slack = "/v1/connect/token/slack%2Facme-slack";
    let _ = latencies(sidecar.addr, std::iter::once(request(sidecar.addr, slack, BODY)));
    let size = answer_size(sidecar.addr, slack);
    let bare = start_role("--bare", &size.to_string());

    println!("a cached hit against a bare hyper server with a body of the same {size} bytes");
    for connections in [16, 128] {
        let (mut rates, mut cpus) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let once = |server: &Server| {
                let before = server.ticks();
                let (rate, count) = load(server.addr, slack, connections, time);
                (rate, (server.ticks() - before) as f64 / count as f64)
            };
            // The order alternates.
            let (ours, theirs) = if round % 2 == 0 {
                let theirs = once(&bare);
                (once(&sidecar), theirs)
            } else {
                let ours = once(&sidecar);
                (ours, once(&bare))
            };
            rates.push(ours.0 / theirs.0);
            cpus.push(ours.1 / theirs.1);
        }
        println!(
            "  {connections:>4} connections: rate {:.3}, server CPU per request {:.3}",
            median(&mut rates),
            median(&mut cpus)
        );
    }
    println!("  upstream requests for all of that: {}", sandbox.emulator.count(slack));
    println!(
        "resident memory: {:.1} MiB idle, {:.1} MiB afterwards",
        idle as f64 / 1024.0,
        sidecar.resident() as f64 / 1024.0
    );
}

fn answer_size(addr: SocketAddr, target: &str) -> usize {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(&request(addr, target, BODY)).unwrap();
    let mut buffer = vec![0; 8192];
    let mut got = 0;
    loop {
        got += stream.read(&mut buffer[got..]).unwrap();
        if let Some(total) = response_length(&buffer[..got]) {
            let head = buffer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            return total - head;
        }
    }
}

/// This many requests may be sent upstream at once, and again after this time, within the sidecar's own rate limit.
const BURST: usize = 40;
const REFILL: Duration = Duration::from_millis(2050);

/// Keeps upstream requests within the rate limit; called before each one with the number of those before it. Bursts
/// with pauses are used because an even pace would leave the CPU caches cold for every request.
fn wait_for_rate_limit(sent: usize) {
    if sent > 0 && sent.is_multiple_of(BURST) {
        std::thread::sleep(REFILL);
    }
}

/// A cache hit with a thousand entries, relative to one entry.
fn entries(quick: bool) {
    let sandbox = Sandbox::new(false);
    let (one, many) = (sandbox.sidecar(), sandbox.sidecar());
    let slack = "/v1/connect/token/slack%2Facme-slack";
    let n = if quick { BURST } else { 1000 };
    let fill = (0..n).map(|n| {
        wait_for_rate_limit(n);
        request(many.addr, &format!("/v1/connect/token/oauth%2Fc{n}"), BODY)
    });
    let _ = latencies(many.addr, fill);
    std::thread::sleep(REFILL);
    let count = if quick { 200 } else { 3000 };
    let mut ratios = Vec::new();
    for _ in 0..(if quick { 1 } else { 7 }) {
        let hits = |server: &Server| {
            let mut times = latencies(server.addr, (0..count).map(|_| request(server.addr, slack, BODY)));
            median(&mut times)
        };
        let single = hits(&one);
        ratios.push(hits(&many) / single);
    }
    println!("a hit among {n} entries against one among 1: latency {:.3}", median(&mut ratios));
}

/// The latency that forwarding adds to a direct keep-alive request, with and without TLS, and the latency that the
/// copying relay adds, which is the machine's share. All alternate.
fn misses(quick: bool) {
    for tls in [false, true] {
        let sandbox = Sandbox::new(tls);
        let sidecar = sandbox.sidecar();
        let relay = start_role("--relay", &sandbox.emulator.addr().to_string());
        let token = sandbox.emulator.oidc_token(DEVELOPMENT_LIFE);
        let mut direct = Direct::new(&sandbox, sandbox.emulator.addr());
        let mut relayed = Direct::new(&sandbox, relay.addr);
        let mut forwarded = Forwarded::new(sidecar.addr);
        let mut times = [const { Vec::new() }; 3];
        for n in 0..(if quick { BURST } else { 520 }) {
            wait_for_rate_limit(n);
            let body = format!(r#"{{"subject":{{"type":"app"}},"scopes":["s{n}"]}}"#);
            times[0].push(direct.latency(&token, &body));
            times[1].push(relayed.latency(&token, &body));
            times[2].push(forwarded.latency(&body));
        }
        let [direct, relayed, forwarded] = times.map(|mut times| median(&mut times));
        println!(
            "a miss forwarded {}: adds {:.0} µs at the median to a direct {direct:.0} µs; a mere relay adds {:.0} µs",
            if tls { "over TLS" } else { "in plain" },
            forwarded - direct,
            relayed - direct,
        );
    }
}

/// A keep-alive connection to the sidecar, replaced after its last request.
struct Forwarded {
    stream: TcpStream,
    addr: SocketAddr,
    count: u64,
}

impl Forwarded {
    fn new(addr: SocketAddr) -> Self {
        Self { stream: Self::connect(addr), addr, count: 0 }
    }

    fn connect(addr: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    fn latency(&mut self, body: &str) -> f64 {
        let bytes = request(self.addr, "/v1/connect/token/slack%2Facme-slack", body);
        self.exchange(&bytes)
    }

    fn exchange(&mut self, request: &[u8]) -> f64 {
        if self.count == REQUESTS_A_CONNECTION {
            *self = Self::new(self.addr);
        }
        self.count += 1;
        exchange(&mut self.stream, request)
    }
}

/// Sends a request and returns the time until the last byte of the response, in microseconds.
fn exchange(stream: &mut (impl Read + Write + ?Sized), request: &[u8]) -> f64 {
    let mut buffer = [0; 8192];
    let start = Instant::now();
    stream.write_all(request).unwrap();
    stream.flush().unwrap();
    let mut got = 0;
    loop {
        let n = stream.read(&mut buffer[got..]).unwrap();
        assert!(n > 0, "closed");
        got += n;
        if response_length(&buffer[..got]).is_some_and(|total| got >= total) {
            return start.elapsed().as_secs_f64() * 1e6;
        }
    }
}

/// A direct keep-alive connection to the emulator.
struct Direct {
    stream: Box<dyn ReadWrite>,
    addr: SocketAddr,
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

impl Direct {
    fn new(sandbox: &Sandbox, addr: SocketAddr) -> Self {
        let tcp = TcpStream::connect(addr).unwrap();
        tcp.set_nodelay(true).unwrap();
        let stream: Box<dyn ReadWrite> = if sandbox.emulator.ca_pem().is_some() {
            let roots = connect_sidecar::os::tls::read_certificates(&sandbox.dir.path().join("ca.pem")).unwrap();
            let config = connect_sidecar::os::tls::client_config(roots).unwrap();
            let name = rustls::pki_types::ServerName::from(addr.ip());
            let connection = rustls::ClientConnection::new(config.into(), name).unwrap();
            Box::new(rustls::StreamOwned::new(connection, tcp))
        } else {
            Box::new(tcp)
        };
        Self { stream, addr }
    }

    fn latency(&mut self, token: &str, body: &str) -> f64 {
        let bytes = format!(
            "POST /v1/connect/token/slack%2Facme-slack HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.addr,
            body.len()
        );
        exchange(&mut *self.stream, bytes.as_bytes())
    }
}

/// Many equal requests at once, with an upstream that takes 50 ms, and again when the answer is cached.
fn herd(quick: bool) {
    let count = if quick { 100 } else { 500 };
    // Each request needs two file descriptors.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 8192, 8192);
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    let mut upstream = 0;
    for _ in 0..(if quick { 1 } else { 7 }) {
        let sandbox = Sandbox::new(false);
        let sidecar = sandbox.sidecar();
        sandbox.emulator.inject(Fault::always(FaultKind::Delay(Duration::from_millis(50))));
        cold.push(all_at_once(sidecar.addr, count));
        warm.push(all_at_once(sidecar.addr, count));
        upstream = upstream.max(sandbox.emulator.count("token"));
    }
    println!(
        "{count} equal requests at once, upstream 50 ms: {upstream} upstream, the last answered after {:.0} ms; \
         {:.0} ms when it is cached",
        median(&mut cold),
        median(&mut warm)
    );
}

/// Sends one request on each of `count` open connections. Returns the milliseconds until the last response.
fn all_at_once(addr: SocketAddr, count: usize) -> f64 {
    let bytes = request(addr, "/v1/connect/token/slack%2Facme-slack", BODY);
    let mut streams: Vec<_> = (0..count).map(|_| TcpStream::connect(addr).unwrap()).collect();
    // Once the last connection has had a response, all are accepted.
    let health = format!("GET /healthz HTTP/1.1\r\nhost: {addr}\r\n\r\n");
    exchange(streams.last_mut().unwrap(), health.as_bytes());
    let start = Instant::now();
    for stream in &mut streams {
        stream.write_all(&bytes).unwrap();
    }
    let mut buffer = [0; 8192];
    for stream in &mut streams {
        let mut got = 0;
        while response_length(&buffer[..got]).is_none_or(|total| got < total) {
            let n = stream.read(&mut buffer[got..]).unwrap();
            assert!(n > 0, "closed");
            got += n;
        }
    }
    start.elapsed().as_secs_f64() * 1e3
}

/// The time from exec to the first answer.
fn start(quick: bool) {
    let sandbox = Sandbox::new(false);
    let mut times = Vec::new();
    for _ in 0..(if quick { 2 } else { 15 }) {
        let start = Instant::now();
        let server = sandbox.sidecar();
        let mut stream = TcpStream::connect(server.addr).unwrap();
        write!(stream, "GET /healthz HTTP/1.1\r\nhost: {}\r\n\r\n", server.addr).unwrap();
        let mut buffer = [0; 512];
        assert!(stream.read(&mut buffer).unwrap() > 0);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    println!("exec to first answer: {:.1} ms", median(&mut times));
}

/// The time that `run` adds to a command's start, relative to the command alone.
fn runs(quick: bool) {
    let sandbox = Sandbox::new(false);
    for (sidecar, is_running) in [("of its own", false), ("that it joins", true)] {
        let _sidecar = is_running.then(|| sandbox.sidecar());
        for (how, flags) in [("with", &["run", "--"][..]), ("without", &["run", "--no-intercept", "--"])] {
            let mut added = Vec::new();
            for round in 0..(if quick { 2 } else { 42 }) {
                let alone = || first_output(Command::new("sh"));
                let through = || {
                    let mut command = sandbox.command();
                    command.args(flags).arg("sh");
                    first_output(command)
                };
                let (alone, through) = if round % 2 == 0 {
                    let alone = alone();
                    (alone, through())
                } else {
                    let through = through();
                    (alone(), through)
                };
                // The first round creates the CA.
                if round > 0 {
                    added.push(through - alone);
                }
            }
            println!(
                "run with a sidecar {sidecar}, {how} interception: +{:.1} ms to a command's start",
                median(&mut added)
            );
        }
    }
}

/// The time from exec to a shell's first output, in milliseconds.
fn first_output(mut command: Command) -> f64 {
    command.args(["-c", "echo"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    let read = child.stdout.take().unwrap().read(&mut [0]).unwrap();
    let took = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!(read, 1, "no output");
    assert!(child.wait().unwrap().success());
    took
}
