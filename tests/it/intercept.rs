//! Interception: requests of a run's programs to Vercel are answered by the sidecar, and all other clients are refused.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::instance::key::Key;
use nix::sys::signal::Signal;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::support::gateway::Gateway;
use crate::support::http::{APP, Reply, Request, next_reply, raw};
use crate::support::process::{Serving, assert_no_slice_of, isolated, raise_descriptor_limit, run};
use crate::support::scripted::{Says, Scripted};
use crate::support::tunnel::{Opened, Run, assert_established, basic, slack};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, Scene, soon};

const API: &str = "api.vercel.com";

/// A server that reads until end of file and then sends everything back.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all).await;
                let _ = stream.write_all(&all).await;
            });
        }
    });
    addr
}

/// Resolves every name to this machine, with the requested port.
fn resolving_to_this_machine() -> Scene {
    Scene::new().resolving(|_| vec![(Ipv4Addr::LOCALHOST, 0).into()])
}

#[tokio::test]
async fn vercels_hosts_are_intercepted_each_with_its_own_certificate() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    for host in [API, "api-iad1.vercel.com", "ai-gateway.vercel.sh"] {
        let opened = run.open(host).await;
        let (_, tls) = opened.stream.get_ref();
        assert_eq!(tls.alpn_protocol(), Some(&b"http/1.1"[..]));
        let certificate = &tls.peer_certificates().expect("certificates")[0];
        let (_, parsed) = X509Certificate::from_der(certificate).expect("a certificate");
        let names = parsed.subject_alternative_name().expect("readable").expect("there");
        assert_eq!(names.value.general_names, [GeneralName::DNSName(host)]);
        let validity = parsed.validity();
        assert!(validity.not_after.timestamp() - validity.not_before.timestamp() <= 24 * 3600);
    }
    assert!(run.open("API.vercel.com").await.host.starts_with("API"), "names are case-insensitive");
}

#[tokio::test]
async fn tokens_are_shared_between_runs_and_plain_clients() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let mut opened = run.open(API).await;
    let request = slack(&opened).header("authorization", &format!("Bearer {}", run.placeholder()));
    let first = opened.send(request).await;
    assert_eq!(first.cache_status(), "connect-sidecar; fwd=uri-miss; stored; ttl=3570", "{}", first.text());
    assert_eq!(stage.token(APP).send().await.token(), first.token(), "also without interception");
    let other = Run::of(&stage).await;
    let mut regional = other.open("api-iad1.vercel.com").await;
    assert_eq!(regional.send(slack(&regional)).await.token(), first.token());
    assert_eq!(stage.emulator.received().len(), 1);
    assert_eq!(stage.logs.count("dropped"), 0, "the placeholder does not count as the app's own credential");
}

#[tokio::test]
async fn a_connection_carries_many_requests() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let mut opened = run.open(API).await;
    let token = opened.send(slack(&opened)).await.token();
    assert_eq!(opened.send(slack(&opened)).await.token(), token, "a client without a cache is served from ours");
    let refused = opened
        .send(opened.request("GET", "/v1/connect/connectors/slack%2Facme-slack").header("host", "x.example"))
        .await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "bad_host"), "not the tunnel's host");
}

#[tokio::test]
async fn an_sdk_with_a_cache_is_one_client_on_all_its_connections() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let [mut first, mut second] = [run.open(API).await, run.open(API).await];
    let sdk = |opened: &Opened| slack(opened).header("user-agent", "vercel-connect/0.2.2 (Python/3.11.7)");
    let token = first.send(sdk(&first)).await.token();
    let again = second.send(sdk(&second)).await;
    assert_eq!(again.cache_status(), "connect-sidecar; fwd=request; stored; ttl=3570", "it has this token already");
    assert_ne!(again.token(), token);
    let named = sdk(&second).header("sidecar-client", "app-1");
    assert_eq!(second.send(named).await.token(), again.token(), "its own client id takes precedence");
}

#[tokio::test]
async fn the_gateway_gets_the_real_token_and_events_are_streamed() {
    let gateway = Gateway::open().await;
    let stage = Scene::new().toml(&gateway.setting()).start().await;
    let run = Run::of(&stage).await;
    let mut opened = run.open("ai-gateway.vercel.sh").await;
    let request = opened.request("POST", "/v3/ai/language-model").json("{}");
    let request = request.header("authorization", &format!("Bearer {}", run.placeholder()));
    opened.stream.write_all(&request.kept_alive()).await.expect("sent");
    let mut call = gateway.call().await;
    let bearer = call.values("authorization")[0].strip_prefix("Bearer ").expect("a bearer").to_owned();
    assert!(fs::read_to_string(stage.env_path()).expect("a file").contains(&bearer), "the real token");
    call.say("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n").await;
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        call.say(format!("{:x}\r\n{event}\r\n", event.len())).await;
        let mut read = Vec::new();
        let reading = async {
            while !read.windows(event.len()).any(|w| w == event.as_bytes()) {
                assert_ne!(opened.stream.read_buf(&mut read).await.expect("an event"), 0);
            }
        };
        soon("the event", reading).await;
    }
}

#[tokio::test]
async fn a_handshake_for_another_name_gets_no_certificate() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    for name in ["github.com", "ai-gateway.vercel.sh", "vercel.com", "127.0.0.1"] {
        let stream = run.tunnel("api.vercel.com:443").await;
        let refused = run.handshake(stream, name, run.ca()).await.expect_err(name);
        assert!(refused.to_string().contains("AccessDenied"), "{name}: {refused}");
    }
    assert!(run.open(API).await.stream.get_ref().1.peer_certificates().is_some());
}

#[tokio::test]
async fn an_untrusted_ca_is_reported_once() {
    let stage = Scene::new().tls().start().await;
    let run = Run::of(&stage).await;
    for _ in 0..2 {
        let stream = run.tunnel("api.vercel.com:443").await;
        let other = stage.emulator.ca_pem().expect("a CA");
        assert!(run.handshake(stream, API, other).await.is_err());
        stage.logs.wait_for("SSL_CERT_FILE").await;
    }
    stage.logs.wait_for("no TLS in a tunnel").await;
    assert_eq!(stage.logs.count("SSL_CERT_FILE"), 1);
}

#[tokio::test]
async fn clients_without_the_secret_get_407() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let credentials = run.proxy().strip_prefix("http://").and_then(|rest| rest.split_once('@')).expect("a URL").0;
    let (name, secret) = credentials.split_once(':').expect("a name and a secret");
    let key = stage.key();
    let own = Key::new(key.clone());
    for authorization in [
        None,
        Some(basic("")),
        Some(basic(name)),
        Some(basic(&format!("{name}:"))),
        Some(basic(&format!("{name}:x{secret}"))),
        Some(basic(&format!("{name}:{}", &secret[..secret.len() - 1]))),
        Some(basic(&format!("other:{secret}"))),
        Some(basic(&format!("{name}:{key}"))),
        Some(basic(&format!("{name}:{}", own.proof(stage.addr.port(), name.as_bytes())))),
        Some(run.authorization.replace("Basic", "Bearer")),
        Some("Basic".into()),
        Some("Basic !".into()),
    ] {
        for target in ["api.vercel.com:443", "github.com:443"] {
            let request = match &authorization {
                Some(value) => run.stranger(target).header("proxy-authorization", value),
                None => run.stranger(target),
            };
            let reply = request.send().await;
            reply.assert_refused(407, "run_secret_required", &format!("{target} {authorization:?}"));
            assert_eq!(reply.header("proxy-authenticate"), Some("Basic realm=\"connect-sidecar\""));
            assert!(!reply.text().contains(secret) && !reply.text().contains(&key));
        }
    }
    assert_no_slice_of([secret, key.as_str()], &stage.logs.lines().join("\n"));
    let reply =
        run.connect("api.vercel.com:443").header("proxy-authorization", &run.authorization.replace("Basic", "bAsIc"));
    assert_eq!(
        Reply::parse(&raw_head(run.addr, &reply.kept_alive()).await).status,
        200,
        "the scheme is case-insensitive"
    );
}

/// Sends these bytes and returns the head of the response.
async fn raw_head(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(to).await.expect("a connection");
    stream.write_all(bytes).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("an answer", stream.read_u8()).await.expect("an answer"));
    }
    head
}

#[tokio::test]
async fn the_secret_may_be_sent_on_the_same_connection_after_a_407() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let mut stream = TcpStream::connect(run.addr).await.expect("a connection");
    stream.write_all(&run.stranger("api.vercel.com:443").kept_alive()).await.expect("sent");
    assert_eq!(next_reply(&mut stream).await.status, 407);
    stream.write_all(&run.connect("api.vercel.com:443").kept_alive()).await.expect("sent");
    assert_established(&mut stream).await;
    assert!(run.handshake(stream, API, run.ca()).await.is_ok());
    assert_eq!(stage.logs.warnings(), 0, "this is normal for some clients");
}

#[tokio::test]
async fn no_tunnel_leads_to_this_machine() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let (plain, own) = (stage.addr.port(), run.addr.port());
    for target in [
        &format!("127.0.0.1:{plain}"),
        &format!("127.0.0.1:{own}"),
        &format!("[::1]:{plain}"),
        &format!("localhost:{plain}"),
        "localhost:22",
        "app.localhost:443",
        "0.0.0.0:443",
        "127.1:443",
        "169.254.169.254:80",
        "[fe80::1]:443",
        "api.vercel.com:80",
        "api.vercel.com.evil:443",
    ] {
        run.connect(target).send().await.assert_refused(403, "host_not_allowed", target);
        run.stranger(target).send().await.assert_refused(403, "host_not_allowed", target);
    }
}

#[tokio::test]
async fn names_may_not_resolve_to_own_ports_or_link_local_addresses() {
    let stage = resolving_to_this_machine().start().await;
    let run = Run::of(&stage).await;
    for port in [stage.addr.port(), run.addr.port()] {
        let target = format!("me.example:{port}");
        run.connect(&target).send().await.assert_refused(403, "host_not_allowed", &target);
    }
    for address in ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254"] {
        let address: IpAddr = address.parse().expect("an address");
        let stage = Scene::new().resolving(move |_| vec![(Ipv4Addr::LOCALHOST, 0).into(), (address, 0).into()]);
        let stage = stage.start().await;
        let run = Run::of(&stage).await;
        run.connect("metadata.example:80").send().await.assert_refused(403, "host_not_allowed", &address.to_string());
    }
}

#[tokio::test]
async fn other_tunnels_are_forwarded_and_either_side_may_close_first() {
    let stage = resolving_to_this_machine().start().await;
    let run = Run::of(&stage).await;
    let echo = echo().await;
    let mut stream = run.tunnel(&format!("db.example:{}", echo.port())).await;
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    stream.write_all(&sent).await.expect("sent");
    stream.shutdown().await.expect("half closed");
    let mut back = Vec::new();
    soon("all of it", stream.read_to_end(&mut back)).await.expect("read");
    assert!(back == sent, "{} bytes", back.len());

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let target = format!("smtp.example:{}", listener.local_addr().expect("an address").port());
    let (mut client, accepted) = tokio::join!(run.tunnel(&target), listener.accept());
    let (mut server, _) = accepted.expect("a connection");
    server.write_all(b"220 hello").await.expect("sent");
    server.shutdown().await.expect("half closed");
    let mut greeting = Vec::new();
    soon("the greeting", client.read_to_end(&mut greeting)).await.expect("read");
    assert_eq!(greeting, b"220 hello");
    client.write_all(b"QUIT").await.expect("sent");
    client.shutdown().await.expect("closed");
    let mut rest = Vec::new();
    soon("the rest", server.read_to_end(&mut rest)).await.expect("read");
    assert_eq!(rest, b"QUIT");
}

#[tokio::test]
async fn a_forwarded_tunnel_shows_the_servers_own_certificate() {
    let stage = resolving_to_this_machine().start().await;
    let run = Run::of(&stage).await;
    let other = Emulator::start(Options { tls: true, ..Options::default() }).await.expect("a server");
    let target = format!("other.example:{}", other.addr().port());
    let intercepted = run.handshake(run.tunnel(&target).await, "localhost", run.ca()).await;
    assert!(intercepted.is_err(), "the certificate is not ours");
    let stream = run.handshake(run.tunnel(&target).await, "localhost", other.ca_pem().expect("a CA")).await;
    let mut opened = Opened { stream: stream.expect("TLS"), host: "localhost".into() };
    assert!(opened.send(opened.request("GET", "/nowhere")).await.status >= 400);
    assert_eq!(other.received().len(), 1);
}

#[tokio::test]
async fn an_unreachable_destination_is_reported_to_the_client_without_a_warning() {
    let stage = resolving_to_this_machine().start().await;
    let run = Run::of(&stage).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let reply = run.connect(&format!("gone.example:{}", closed.port())).send().await;
    reply.assert_refused(502, "upstream_unreachable", "a closed port");
    assert!(reply.text().contains("gone.example"), "{}", reply.text());
    assert_eq!(stage.logs.warnings(), 0);
}

#[tokio::test]
async fn the_port_accepts_only_connect() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    for (method, target) in [
        ("GET", "/"),
        ("GET", "/healthz"),
        ("GET", "http://api.vercel.com/v1/connect/connectors/x"),
        ("POST", SLACK),
        ("POST", "/_sidecar/v1/runs"),
        ("OPTIONS", "*"),
    ] {
        let request = Request::new(run.addr, method, target).header("proxy-authorization", &run.authorization);
        let reply = request.header("sidecar-key", &stage.key()).send().await;
        reply.assert_refused(405, "method_not_allowed", target);
        assert_eq!(reply.header("allow"), Some("CONNECT"));
    }
    run.connect("github.com").send().await.assert_refused(400, "bad_target", "no port");
    run.connect("user@github.com:443").send().await.assert_refused(400, "bad_target", "a user");
    assert_eq!(stage.emulator.received().len(), 0);
}

#[tokio::test]
async fn garbage_closes_only_its_own_connection() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let mut open = run.open(API).await;
    let connect = run.connect("api.vercel.com:443").kept_alive();
    for garbage in [&b"\x16\x03\x01\x02\x00"[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 40_000]] {
        let mut stream = TcpStream::connect(run.addr).await.expect("a connection");
        stream.write_all(&[&connect, garbage].concat()).await.expect("sent");
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = soon("its end", stream.read_to_end(&mut answer)).await;
        assert!(!answer.windows(8).any(|w| w == b"\"token\":"), "{}", answer.escape_ascii());
    }
    let answer = raw(run.addr, &[0xff; 1000]).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", answer.escape_ascii());
    assert_eq!(open.send(slack(&open)).await.status, 200);
}

#[tokio::test]
async fn early_data_after_connect_is_forwarded() {
    let stage = resolving_to_this_machine().start().await;
    let run = Run::of(&stage).await;
    let echo = echo().await;
    let mut stream = TcpStream::connect(run.addr).await.expect("a connection");
    let connect = run.connect(&format!("db.example:{}", echo.port())).kept_alive();
    stream.write_all(&[&connect, &b"early"[..]].concat()).await.expect("sent");
    assert_established(&mut stream).await;
    stream.write_all(b" and late").await.expect("sent");
    stream.shutdown().await.expect("closed");
    let mut back = Vec::new();
    soon("all of it", stream.read_to_end(&mut back)).await.expect("read");
    assert_eq!(back, b"early and late");
}

#[tokio::test]
async fn a_connection_over_the_limit_gets_503() {
    raise_descriptor_limit();
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let mut idle = Vec::new();
    for _ in 0..512 {
        idle.push(TcpStream::connect(run.addr).await.expect("a connection"));
    }
    let reply = run.connect("api.vercel.com:443").send().await;
    reply.assert_refused(503, "overloaded", "all connections are in use");
    assert!(reply.header("retry-after").is_some());
    drop(idle);
    // Succeeds once the dropped connections are noticed.
    let served = async {
        while Reply::parse(&raw_head(run.addr, &run.connect("api.vercel.com:443").kept_alive()).await).status != 200 {
            tokio::task::yield_now().await;
        }
    };
    soon("room", served).await;
}

#[tokio::test]
async fn shutdown_waits_for_requests_but_not_for_idle_or_forwarded_tunnels() {
    let workspace = Workspace::new().await;
    let proxy = Scripted::start().await;
    proxy.will(Says::from("HTTP/1.1 200 OK\r\n\r\n"));
    let mut command = workspace.sidecar(&[]);
    command.env("HTTPS_PROXY", proxy.url());
    let serving = Serving::start(command).await;
    let run = workspace.begin_run(&serving).await;
    let idle = run.open(API).await;
    let silent = TcpStream::connect(run.addr).await.expect("a connection");
    let without_tls = run.tunnel("api.vercel.com:443").await;
    let mut forwarded = run.tunnel("github.com:443").await;
    let hold = workspace.emulator.hold_answers();
    let mut busy = run.open(API).await;
    let request = slack(&busy);
    busy.stream.write_all(&request.kept_alive()).await.expect("sent");
    soon("the upstream request", workspace.emulator.wait_for_requests(1)).await;
    serving.signal(Signal::SIGTERM);
    let closed = async {
        while TcpStream::connect(run.addr).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon("the port to close", closed).await;
    hold.release();
    assert_eq!(next_reply(&mut busy.stream).await.status, 200);
    let ended = serving.end().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let mut rest = Vec::new();
    assert_eq!(soon("its end", forwarded.read_to_end(&mut rest)).await.unwrap_or(0), 0);
    drop((idle, silent, without_tls));
}

/// A program configured by its environment.
fn program(workspace: &Workspace, run: &Run, name: &str, arguments: &[&str]) -> Command {
    let bundle = workspace.home.path().join("bundle.pem");
    fs::write(&bundle, run.ca()).expect("written");
    let mut command = isolated(name, workspace.home.path());
    for variable in ["HTTPS_PROXY", "https_proxy"] {
        command.env(variable, run.proxy());
    }
    for variable in ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"] {
        command.env(variable, &bundle);
    }
    command.env("NO_PROXY", "localhost,127.0.0.1,::1").args(arguments);
    command
}

#[tokio::test]
async fn curl_and_python_get_a_token_with_proxy_variables_alone() {
    const PYTHON: &str = "import sys, urllib.request as u\n\
        r = u.Request(sys.argv[1], sys.argv[2].encode(), {'content-type': 'application/json'})\n\
        print(u.urlopen(r, timeout=20).read().decode())";
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let running = workspace.begin_run(&serving).await;
    let url = format!("https://api.vercel.com{SLACK}");
    let curl =
        ["--silent", "--show-error", "--max-time", "20", "-H", "content-type: application/json", "-d", APP, &url];
    let mut tokens = Vec::new();
    for (name, arguments) in [("curl", &curl[..]), ("python3", &["-c", PYTHON, &url, APP]), ("curl", &curl)] {
        let ended = run(program(&workspace, &running, name, arguments)).await;
        assert_eq!(ended.code, Some(0), "{name}: {ended:?}");
        let json: serde_json::Value =
            serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{name}: {e}: {ended:?}"));
        tokens.push(json["token"].as_str().expect("a token").to_owned());
    }
    let plain = Request::new(serving.addr, "POST", SLACK).json(APP).send().await;
    assert_eq!(plain.cache_status().split(';').nth(1), Some(" hit"));
    tokens.push(plain.token());
    tokens.dedup();
    assert_eq!((tokens.len(), workspace.emulator.count("acme-slack")), (1, 1), "they share one token");
    assert_eq!(serving.stop().await.code, Some(0));
}

#[tokio::test]
async fn tunnels_use_the_proxy_of_the_sidecars_environment() {
    let workspace = Workspace::new().await;
    let proxy = Scripted::start().await;
    proxy.will(Says::from("HTTP/1.1 200 OK\r\n\r\n"));
    let mut command = workspace.sidecar(&[]);
    command.env("HTTPS_PROXY", format!("http://user:pass@{}", proxy.addr())).env("NO_PROXY", "direct.invalid");
    let serving = Serving::start(command).await;
    let run = workspace.begin_run(&serving).await;
    let _tunnel = run.tunnel("github.com:443").await;
    let requests = proxy.received();
    assert_eq!(requests[0].line(), "CONNECT github.com:443 HTTP/1.1");
    assert_eq!(requests[0].values("proxy-authorization"), [basic("user:pass")]);
    run.connect("direct.invalid:443").send().await.assert_refused(502, "upstream_unreachable", "not through the proxy");
    let mut opened = run.open(API).await;
    assert_eq!(opened.send(slack(&opened)).await.status, 200);
    assert_eq!(proxy.received().len(), 1, "upstream requests do not use that proxy by default");
}

#[tokio::test]
async fn the_upstream_client_does_not_trust_the_ca() {
    let stage = Scene::new().start().await;
    let run = Run::of(&stage).await;
    let config = connect_sidecar::os::tls::client_config(Vec::new()).expect("roots");
    let stream = run.tunnel("api.vercel.com:443").await;
    let name = ServerName::try_from(API).expect("a name");
    let connecting = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config)).connect(name, stream);
    assert!(soon("a refusal", connecting).await.is_err());
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn other_users_are_refused_even_with_the_secret() {
    if !nix::unistd::geteuid().is_root() {
        crate::support::skipped("only root can connect as another user");
        return;
    }
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let running = workspace.begin_run(&serving).await;
    for (uid, expected) in [(65_534, "000"), (0, "200")] {
        let mut curl = isolated("curl", std::path::Path::new("/"));
        curl.args(["--silent", "--max-time", "20", "--insecure", "--output", "/dev/null"]);
        curl.args(["--write-out", "%{http_connect}", "--proxy", running.proxy(), "https://api.vercel.com/"]);
        assert_eq!(
            run({
                curl.uid(uid).gid(uid);
                curl
            })
            .await
            .stdout,
            expected,
            "{uid}"
        );
    }
}
