//! Group F: where the sidecar listens, and who may connect.

use std::fs::{self, Permissions};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::clients::curl;
use crate::support::SLACK;
use crate::support::http::APP;
use crate::support::network::taken_on_ipv6_only;
use crate::support::process::sockets_of;

use super::contract::{Start, seconds, start, within};

/// A non-loopback address of this machine, if it has one. Nothing is sent.
fn other_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

#[tokio::test]
async fn tF01_reports_a_taken_port_and_leaves_its_owner_alone() {
    let first = start().await;
    let second = Start::new().await.args(&[&format!("--port={}", first.addr.port())]);
    let ended = within(seconds(2), "its end", second.end()).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains(&first.addr.to_string()), "{}", ended.stderr);
    first.alive().await;
}

#[tokio::test]
async fn tF02_reports_a_port_taken_on_ipv6_only() {
    if let Some(other) = taken_on_ipv6_only().await {
        let address = other.local_addr().expect("an address");
        let ended = Start::new().await.args(&[&format!("--port={}", address.port())]).end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
        assert!(ended.stderr.contains(&address.to_string()), "{}", ended.stderr);
    }
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tF04_listens_on_loopback_only() {
    let s = start().await;
    let port = s.addr.port();
    for socket in sockets_of(port).into_iter().filter(|socket| socket.is_listening) {
        let loopback = ["0100007F", "00000000000000000000000001000000"].map(|ip| format!("{ip}:{port:04X}"));
        assert!(loopback.contains(&socket.address), "{socket:?}");
    }
    // Only root can see the process.
    let all = listeners::get_all().expect("sockets").into_iter();
    let own = all.filter(|l| l.process.pid == s.pid() && l.state == listeners::SocketState::Listen);
    for listener in own {
        assert!(listener.socket.ip().is_loopback() && listener.socket.port() == port, "{}", listener.socket);
    }
    if let Some(address) = other_address() {
        let refused = TcpStream::connect(SocketAddr::new(address, port)).await;
        assert_eq!(refused.expect_err("nobody there").kind(), std::io::ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn tF05_listens_on_the_network_only_with_all_required_flags() {
    const FLAG: &str = "--dangerously-listen-on-network";
    let (key, host) = ("--require-key", "--allowed-host=dev.test");
    for address in ["0.0.0.0", "::"] {
        for lacking in [&[][..], &[key], &[host]] {
            let ended = Start::new().await.args(&[FLAG, address]).args(lacking).end().await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{lacking:?}: {}", ended.stderr);
            assert!(ended.stderr.contains(FLAG), "{}", ended.stderr);
        }
    }
    for no_address in ["", "0", ":1", "0.0.0.0:1", "dev.test"] {
        let ended = Start::new().await.args(&[&format!("{FLAG}={no_address}"), key, host]).end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{no_address}: {}", ended.stderr);
        assert!(ended.stderr.contains(FLAG), "{}", ended.stderr);
    }
    for no_port in ["0.0.0.0:2774", "[::]:2774", ":2774", "0:2774", "192.0.2.1:2774"] {
        let ended = Start::new().await.args(&["--port", no_port]).end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{no_port}: {}", ended.stderr);
        assert!(ended.stderr.contains(FLAG), "{}", ended.stderr);
    }
    let in_file = "dangerously_listen_on_network = \"0.0.0.0\"\n";
    assert_eq!(Start::new().await.toml(in_file).end().await.code, Some(2));
}

#[tokio::test]
async fn tF07_nobody_can_share_its_port() {
    let s = start().await;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_port(true).expect("an option");
    let error = socket.bind(&s.addr.into()).expect_err("it is taken");
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn tF08_the_unix_socket_is_private_to_its_user() {
    let prepared = Start::new().await;
    // The parent directories are open to all; only the socket's own directory is not.
    for dir in [prepared.home.path(), &prepared.project] {
        fs::set_permissions(dir, Permissions::from_mode(0o755)).expect("a mode");
    }
    let (dir, path) = (prepared.home.path().join("run"), prepared.home.path().join("run/x.sock"));
    let socket = path.to_str().expect("a path").to_owned();
    let s = prepared.args(&["--unix-socket", &socket]).serve().await;
    let mode = |path: &Path| fs::symlink_metadata(path).expect("it is there").mode() & 0o777;
    assert_eq!((mode(&dir), mode(&path)), (0o700, 0o600));
    let url = format!("http://localhost{SLACK}");
    let json = ["-H", "content-type: application/json", "-d", APP];
    let answered = curl(&[&["--unix-socket", &socket], &json[..], &[&url]].concat()).await;
    assert_eq!((answered.status, s.m.count()), (200, 1), "{answered:?}");
    assert_eq!(answered.body.as_bytes(), s.m.received()[0].answer);
    for (host, status) in [("localhost:1", 200), ("evil.example", 403), ("127.0.0.1.nip.io", 403)] {
        let url = format!("http://{host}{SLACK}");
        let answered = curl(&[&["--unix-socket", &socket], &json[..], &[&url]].concat()).await;
        assert_eq!(answered.status, status, "{host}: {answered:?}");
    }
    if nix::unistd::Uid::effective().is_root() {
        let other = ["--reuid=65534", "--regid=65534", "--clear-groups", "curl", "--silent", "--unix-socket"];
        let refused = Command::new("setpriv").args(other).args([&socket, &url]).output().await.expect("setpriv");
        assert_eq!(refused.status.code(), Some(7), "no connection: {refused:?}");
    }
    assert_eq!(s.serving.stop().await.code, Some(0));
    assert!(!path.exists(), "it goes with its process");
}

#[tokio::test]
async fn tF11_require_key_exempts_only_the_health_endpoints() {
    let s = Start::new().await.args(&["--require-key"]).serve().await;
    let key = s.key();
    for wrong in [None, Some(""), Some("guessed"), Some(&key[1..])] {
        for request in [s.req(), s.get("/metrics"), s.get("/_sidecar/v1/status"), s.get("/none")] {
            let request = match wrong {
                Some(wrong) => request.header("sidecar-key", wrong),
                None => request,
            };
            s.deny(request, 401, "key_required").await;
        }
    }
    s.pass(s.req().header("sidecar-key", &key)).await;
    assert!(!s.m.received()[0].head.contains(&key));
    let file = fs::metadata(s.instance().0).expect("a file");
    assert_eq!(file.mode() & 0o777, 0o600);
    s.leaks_nothing(&[]).await;
}

#[tokio::test]
async fn tF14_does_not_listen_on_other_loopback_addresses() {
    let s = start().await;
    let refused = TcpStream::connect(("127.0.0.2", s.addr.port())).await;
    assert_eq!(refused.expect_err("nobody there").kind(), std::io::ErrorKind::ConnectionRefused);
}
