//! Listening addresses: loopback only by default, a unix socket or a network address if configured, and who may connect
//! to each (docs/configuration.md section 2, docs/security.md B, H5 and S).

use std::fs::{self, Permissions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use listeners::SocketState;
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::process::Command;

use crate::support::http::{Reply, Request};
use crate::support::network::{self, OWN_V4, OWN_V6};
use crate::support::process::{Ended, Serving, run};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, Scene, Stage, soon};

const APP: &str = r#"{"subject":{"type":"app"}}"#;
const NETWORK_FLAG: &str = "--dangerously-listen-on-network";
const NETWORK_VARIABLE: &str = "CONNECT_SIDECAR_DANGEROUSLY_LISTEN_ON_NETWORK";

/// A user id other than ours and root's, if the tests may use one.
fn another_user() -> Option<u32> {
    let is_root = Uid::effective().is_root();
    if !is_root {
        crate::support::skipped("only root can connect as another user");
    }
    is_root.then_some(65534)
}

/// Sends bytes over a unix socket and reads until it is closed.
async fn exchange(socket: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = soon("a connection", UnixStream::connect(socket)).await.expect("a connection");
    // A server that refuses may close before it has read everything.
    let _ = soon("the request to be sent", stream.write_all(bytes)).await;
    let mut reply = Vec::new();
    let _ = soon("a reply", stream.read_to_end(&mut reply)).await;
    reply
}

/// Sends a request over a unix socket, for `localhost` unless it has another `Host`.
async fn send_over(socket: &Path, request: &Request) -> Reply {
    Reply::parse(&exchange(socket, &request.bytes()).await)
}

fn curl(socket: &Path, url: &str) -> Command {
    let mut command = Command::new("curl");
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).kill_on_drop(true);
    command.args(["--silent", "--show-error", "--max-time", "20", "--unix-socket"]).arg(socket).arg(url);
    command
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("there").mode() & 0o7777
}

async fn stop(serving: Serving) -> Ended {
    serving.signal(Signal::SIGTERM);
    serving.end().await
}

/// A workspace, and a path for a socket in its home.
async fn desk_and_socket() -> (Workspace, PathBuf) {
    let workspace = Workspace::new().await;
    let socket = workspace.home.path().canonicalize().expect("a directory").join("run/sidecar.sock");
    (workspace, socket)
}

async fn serve_at(workspace: &Workspace, socket: &Path) -> Serving {
    workspace.serve(&["-v", "--unix-socket", socket.to_str().expect("a path")]).await
}

#[tokio::test]
async fn only_loopback_is_listened_on_by_default_and_the_port_cannot_be_shared() {
    if !network::is_own("listening::only_loopback_is_listened_on_by_default_and_the_port_cannot_be_shared") {
        return;
    }
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let port = serving.addr.port();
    let has_v6 = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let mut expected: Vec<SocketAddr> = vec![(Ipv4Addr::LOCALHOST, port).into()];
    expected.extend(has_v6.then_some(SocketAddr::from((Ipv6Addr::LOCALHOST, port))));
    // Only root may list a sidecar's sockets.
    if Uid::effective().is_root() {
        let all = listeners::get_all().expect("sockets");
        let own = all.into_iter().filter(|l| l.state == SocketState::Listen && l.process.pid == serving.pid());
        let mut own: Vec<_> = own.map(|l| l.socket).collect();
        own.sort();
        assert_eq!(own, expected);
    }

    for address in [OWN_V4, OWN_V6, [127, 0, 0, 2].into()] {
        let error = TcpStream::connect((address, port)).await.expect_err("nobody listens there");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }

    for address in expected.into_iter().chain([(Ipv4Addr::UNSPECIFIED, port).into()]) {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.expect("a socket");
        socket.set_reuseport(true).expect("a socket");
        socket.set_reuseaddr(true).expect("a socket");
        let error = socket.bind(address).and_then(|()| socket.listen(1)).expect_err("the port is taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
    }
    assert_eq!(stop(serving).await.code, Some(0));
}

#[tokio::test]
async fn a_non_loopback_peer_is_closed_without_a_response() {
    if !network::is_own("listening::a_non_loopback_peer_is_closed_without_a_response") {
        return;
    }
    let stage = Scene::new().start().await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((OWN_V4, 0).into()).expect("our own address");
    let mut stream = socket.connect(stage.addr).await.expect("a connection");
    let _ = stream.write_all(&stage.request("GET", "/healthz").bytes()).await;
    let mut reply = Vec::new();
    let _ = soon("the end", stream.read_to_end(&mut reply)).await;
    assert_eq!(String::from_utf8_lossy(&reply), "");
    stage.logs.wait_for("which is not this machine").await;
    stage.slack_token().await;
}

#[tokio::test]
async fn an_address_as_port_exits_with_2_and_names_the_right_flag() {
    let workspace = Workspace::new().await;
    for port in ["0.0.0.0:2774", "[::]:2774", ":2774", "0:2774", "192.0.2.1:2774"] {
        let ended = run(workspace.sidecar(&["--port", port])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{port}");
        assert!(ended.stderr.contains(NETWORK_FLAG), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn a_unix_socket_serves_tokens_and_is_removed_at_the_end() {
    let (workspace, socket) = desk_and_socket().await;
    let serving = serve_at(&workspace, &socket).await;
    let dir = socket.parent().expect("a directory");
    assert_eq!((mode(dir), mode(&socket)), (0o700, 0o600));
    let loopback = format!("connect-sidecar listening on http://127.0.0.1:{}", serving.addr.port());
    assert_eq!(serving.ready_line, loopback);
    let mut command = curl(&socket, &format!("http://localhost{SLACK}"));
    command.args(["-H", "content-type: application/json", "-d", APP]);
    let ended = run(command).await;
    assert!(ended.code == Some(0) && ended.stdout.contains("\"token\":\"xoxe.xoxb-"), "{ended:?}");
    let reply = Request::new(serving.addr, "POST", SLACK).json(APP).send().await;
    assert!(reply.cache_status().starts_with("connect-sidecar; hit"), "both share one cache: {reply:?}");
    let ended = stop(serving).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    assert!(!socket.exists() && dir.exists());
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced_and_one_in_use_exits_with_3() {
    let (workspace, socket) = desk_and_socket().await;
    let serving = serve_at(&workspace, &socket).await;
    serving.signal(Signal::SIGKILL);
    assert_eq!(serving.end().await.code, None);
    assert!(socket.exists());

    let serving = serve_at(&workspace, &socket).await;
    let path = socket.to_str().expect("a path");
    let ended = run(workspace.sidecar(&["--unix-socket", path])).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains(path) && ended.stderr.contains("already running"), "{}", ended.stderr);
    let healthy = Request::new(serving.addr, "GET", "/healthz").header("host", "localhost");
    assert_eq!(send_over(&socket, &healthy).await.status, 200, "the first still serves");
    assert_eq!(stop(serving).await.code, Some(0));
    assert!(!socket.exists());
}

#[tokio::test]
async fn an_unusable_unix_socket_path_exits_with_2() {
    let (workspace, socket) = desk_and_socket().await;
    let dir = socket.parent().expect("a directory");
    fs::create_dir(dir).expect("a directory");
    let refused = async |what: &str, hint: &str| {
        let ended = run(workspace.sidecar(&["--unix-socket", socket.to_str().expect("a path")])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{what}: {}", ended.stderr);
        let start = format!("error: --unix-socket {}: ", socket.display());
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with(&start) && last.contains(hint), "{what}: {}", ended.stderr);
    };
    fs::set_permissions(dir, Permissions::from_mode(0o755)).expect("a mode");
    refused("a directory that others may enter", "chmod 700").await;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).expect("a mode");
    fs::write(&socket, "precious").expect("written");
    refused("a file", "move it away").await;
    assert_eq!(fs::read_to_string(&socket).expect("a file"), "precious");
    assert_eq!(workspace.emulator.received().len(), 0);
}

#[tokio::test]
async fn other_users_are_kept_from_the_unix_socket_by_permissions_and_by_user_id() {
    let Some(other) = another_user() else { return };
    let (workspace, socket) = desk_and_socket().await;
    fs::set_permissions(workspace.home.path(), Permissions::from_mode(0o755)).expect("a mode");
    let mut serving = serve_at(&workspace, &socket).await;
    let as_other = || {
        let mut command = curl(&socket, "http://localhost/healthz");
        command.arg("--verbose").uid(other).gid(other);
        command
    };
    let ended = run(as_other()).await;
    assert_eq!(ended.code, Some(7), "{ended:?}");
    assert!(ended.stderr.contains("ermission denied"), "{ended:?}");

    // Even if the permissions are relaxed afterwards.
    fs::set_permissions(socket.parent().expect("a directory"), Permissions::from_mode(0o755)).expect("a mode");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).expect("a mode");
    let ended = run(as_other()).await;
    assert!(ended.code != Some(0) && ended.stdout.is_empty(), "no reply: {ended:?}");
    assert!(!ended.stderr.contains("ermission denied"), "it was refused by the sidecar: {ended:?}");
    serving.wait_for_log(&format!("closed a connection from user {other} to the unix socket")).await;
    assert_eq!(run(curl(&socket, "http://localhost/healthz")).await.stdout, r#"{"status":"ok"}"#);
    stop(serving).await;
}

#[tokio::test]
async fn root_and_the_user_may_use_the_unix_socket() {
    let Some(other) = another_user() else { return };
    let (workspace, socket) = desk_and_socket().await;
    for path in [workspace.home.path(), &workspace.project(), &workspace.project().join(".env.local")] {
        chown(path, Some(other), Some(other)).expect("given away");
    }
    let mut command = workspace.sidecar(&["--unix-socket", socket.to_str().expect("a path")]);
    command.uid(other).gid(other);
    // The build directory may be inaccessible to the other user.
    match command.spawn() {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return,
        started => drop(started.expect("a process")),
    }
    let serving = Serving::start(command).await;
    assert_eq!(fs::metadata(&socket).expect("a socket").uid(), other);
    assert_eq!(run(curl(&socket, "http://localhost/healthz")).await.stdout, r#"{"status":"ok"}"#);
    let mut as_user = curl(&socket, "http://localhost/healthz");
    as_user.uid(other).gid(other);
    assert_eq!(run(as_user).await.stdout, r#"{"status":"ok"}"#);
    stop(serving).await;
}

/// A sidecar with a unix socket.
async fn with_socket(scene: Scene) -> (Stage, PathBuf) {
    let stage = scene.toml("unix_socket = \"run/s\"").start().await;
    let socket = stage.dir().join("run/s");
    (stage, socket)
}

#[tokio::test]
async fn the_unix_socket_accepts_only_localhost_as_host_and_all_other_checks_apply() {
    let (stage, socket) = with_socket(Scene::new().toml("allowed_hosts = [\"dev.test\"]")).await;
    let token = stage.token(APP).header("host", "localhost");
    for host in ["localhost", "LOCALHOST", "localhost:80", "localhost:1", &format!("localhost:{}", stage.addr.port())] {
        assert_eq!(send_over(&socket, &token.clone().header("host", host)).await.status, 200, "{host}");
    }
    let before = stage.emulator.received().len();
    for (name, value, status, code) in [
        ("host", "127.0.0.1", 403, "host_not_allowed"),
        ("host", &stage.addr.to_string(), 403, "host_not_allowed"),
        ("host", "dev.test", 403, "host_not_allowed"),
        ("host", "", 400, "bad_host"),
        ("origin", "https://evil.example", 403, "browser_request_refused"),
        ("x-forwarded-for", "192.0.2.1", 403, "forwarded_request_refused"),
        ("cdn-loop", "connect-sidecar", 508, "loop_detected"),
        ("content-type", "text/plain", 415, "json_required"),
    ] {
        let reply = send_over(&socket, &token.clone().header(name, value)).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{name}: {value}");
    }
    let large = token.clone().body(vec![b' '; 200_000]);
    assert_eq!(send_over(&socket, &large).await.code(), "body_too_large", "and the body is read");
    assert_eq!(stage.emulator.received().len(), before);

    let request = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let twice = format!("{request}{}", request.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n"));
    let replies = Reply::parse_all(&exchange(&socket, twice.as_bytes()).await);
    assert_eq!(replies.iter().map(|reply| reply.status).collect::<Vec<_>>(), [200, 200]);
}

#[tokio::test]
async fn a_required_key_is_needed_on_the_unix_socket_too() {
    let (stage, socket) = with_socket(Scene::new().toml("require_key = true")).await;
    let token = stage.token(APP).header("host", "localhost");
    assert_eq!(send_over(&socket, &token).await.code(), "key_required");
    assert_eq!(send_over(&socket, &token.header("sidecar-key", &stage.key())).await.status, 200);
}

/// A sidecar that listens on a network address and accepts `dev.test` as host.
async fn on_network(address: IpAddr) -> Stage {
    let scene = Scene::new().toml("require_key = true\nallowed_hosts = [\"dev.test\", \"localhost\"]");
    scene.env(NETWORK_VARIABLE, &address.to_string()).start().await
}

/// A token request to this address of the sidecar, with the key.
fn token_at(address: impl Into<IpAddr>, stage: &Stage, host: &str) -> Request {
    let to = SocketAddr::new(address.into(), stage.addr.port());
    Request::new(to, "POST", SLACK).header("host", host).header("sidecar-key", &stage.key()).json(APP)
}

/// Checks a sidecar that listens on `listening`, which includes the address `own`.
async fn assert_guarded(listening: IpAddr, own: IpAddr) {
    let stage = on_network(listening).await;
    let port = stage.addr.port();
    assert!(stage.addr.ip() == IpAddr::from(Ipv4Addr::LOCALHOST), "{}", stage.addr);
    let warnings = stage.logs.lines().into_iter().filter(|line| line.starts_with("WARN")).collect::<Vec<_>>();
    let loud = format!("LISTENING ON THE NETWORK at {}", SocketAddr::new(listening, port));
    assert!(matches!(&*warnings, [one] if one.contains(&loud)), "{warnings:#?}");

    assert_eq!(token_at(own, &stage, "dev.test").send().await.status, 200, "{listening}");
    let before = stage.emulator.received().len();
    for (name, value, status, code) in [
        ("host", &*SocketAddr::new(own, port).to_string(), 403, "host_not_allowed"),
        ("host", &format!("localhost:{port}"), 403, "host_not_allowed"),
        ("host", "localhost", 403, "host_not_allowed"),
        ("host", &format!("127.0.0.1:{port}"), 403, "host_not_allowed"),
        ("host", &format!("[::1]:{port}"), 403, "host_not_allowed"),
        ("host", "evil.example", 403, "host_not_allowed"),
        ("host", "", 400, "bad_host"),
        ("sidecar-key", "guessed", 401, "key_required"),
        ("origin", "http://dev.test", 403, "browser_request_refused"),
        ("x-forwarded-for", "192.0.2.1", 403, "forwarded_request_refused"),
    ] {
        let reply = token_at(own, &stage, "dev.test").header(name, value).send().await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{name}: {value}");
    }
    let health = Request::new(SocketAddr::new(own, port), "GET", "/healthz");
    assert_eq!(health.clone().send().await.code(), "host_not_allowed", "health needs an allowed host");
    assert_eq!(health.header("host", "dev.test").send().await.status, 200);
    assert_eq!(stage.emulator.received().len(), before);

    // Loopback works as always, except that the key is required.
    for host in [format!("127.0.0.1:{port}"), format!("localhost:{port}"), "dev.test".into()] {
        assert_eq!(token_at(Ipv4Addr::LOCALHOST, &stage, &host).send().await.status, 200, "{host}");
    }
    if own.is_ipv4() {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((own, 0).into()).expect("our own address");
        let mut stream = socket.connect(stage.addr).await.expect("a connection");
        let _ = stream.write_all(&token_at(own, &stage, "dev.test").bytes()).await;
        let mut reply = Vec::new();
        let _ = soon("the end", stream.read_to_end(&mut reply)).await;
        assert_eq!(String::from_utf8_lossy(&reply), "", "a non-loopback peer is refused there");
    }
}

#[tokio::test]
async fn network_requests_need_the_key_and_an_allowed_host() {
    if !network::is_own("listening::network_requests_need_the_key_and_an_allowed_host") {
        return;
    }
    for own in [OWN_V4, OWN_V6] {
        assert_guarded(own, own).await;
    }
}

#[tokio::test]
async fn an_unspecified_address_covers_its_own_family_only() {
    if !network::is_own("listening::an_unspecified_address_covers_its_own_family_only") {
        return;
    }
    let unspecified = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
    for (all, own, other) in [(unspecified[0], OWN_V4, OWN_V6), (unspecified[1], OWN_V6, OWN_V4)] {
        assert_guarded(all, own).await;
        let stage = on_network(all).await;
        assert_eq!(token_at(Ipv6Addr::LOCALHOST, &stage, "dev.test").send().await.status, 200);
        let error = TcpStream::connect((other, stage.addr.port())).await.expect_err("nobody listens there");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{other}");
    }
}

#[tokio::test]
async fn a_network_address_needs_key_and_host_and_must_be_usable() {
    let workspace = Workspace::new().await;
    let lines = async |arguments: &[&str]| {
        let ended = run(workspace.sidecar(arguments)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
        ended.stderr.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let missing = lines(&[NETWORK_FLAG, "0.0.0.0"]).await;
    assert_eq!(missing.len(), 2, "{missing:?}");
    for (line, what) in missing.iter().zip(["--require-key", "--allowed-host"]) {
        assert!(line.starts_with(&format!("error: {NETWORK_FLAG}: needs {what}")), "{missing:?}");
    }
    let guards = ["--require-key", "--allowed-host", "dev.test"];
    let needless = lines(&[&[NETWORK_FLAG, "::ffff:127.0.0.1"], &guards[..]].concat()).await;
    assert!(matches!(&*needless, [one] if one.contains("not needed")), "{needless:?}");
    // An address reserved for documentation.
    let foreign = lines(&[&[NETWORK_FLAG, "203.0.113.77"], &guards[..]].concat()).await;
    assert!(foreign.last().is_some_and(|line| line.contains("203.0.113.77")), "{foreign:?}");
}

#[tokio::test]
async fn the_ready_line_shows_the_loopback_address() {
    if !network::is_own("listening::the_ready_line_shows_the_loopback_address") {
        return;
    }
    let workspace = Workspace::new().await;
    for address in [Ipv4Addr::UNSPECIFIED.into(), OWN_V4] {
        let arguments = [NETWORK_FLAG, &address.to_string(), "--require-key", "--allowed-host", "dev.test", "-q"];
        let serving = workspace.serve(&arguments).await;
        let expected = format!("connect-sidecar listening on http://127.0.0.1:{}", serving.addr.port());
        assert_eq!(serving.ready_line, expected);
        let ended = stop(serving).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""));
        assert_eq!(ended.stderr.matches("LISTENING ON THE NETWORK").count(), 1, "{}", ended.stderr);
    }
}
