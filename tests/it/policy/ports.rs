//! 6.10: where it listens, and who gets in.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::support::process::sockets_of;

use super::contract::{Row, Start, row, seconds, start, within};

/// An address of this machine that is not loopback, if it has one. Nothing is sent.
fn other_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

pub fn rows() -> Vec<Row> {
    vec![
        row("tF01", "a taken port is said at once, and the first is left alone", async {
            let first = start().await;
            let second = Start::new().await.args(&[&format!("--port={}", first.addr.port())]);
            let ended = within(seconds(2), "its end", second.end()).await;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
            assert!(ended.stderr.contains(&first.addr.to_string()), "{}", ended.stderr);
            first.alive().await;
        }),
        row("tF02", "so is one that is taken on IPv6 only", async {
            if let Ok(other) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await {
                let address = other.local_addr().expect("an address");
                let ended = Start::new().await.args(&[&format!("--port={}", address.port())]).end().await;
                assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{}", ended.stderr);
                assert!(ended.stderr.contains(&address.to_string()), "{}", ended.stderr);
            }
        }),
        row("tF04", "it listens on loopback only", async {
            let s = start().await;
            let port = s.addr.port();
            for socket in sockets_of(port).into_iter().filter(|socket| socket.is_listening) {
                let loopback = ["0100007F", "00000000000000000000000001000000"].map(|ip| format!("{ip}:{port:04X}"));
                assert!(loopback.contains(&socket.address), "{socket:?}");
            }
            // Seen by the system's administrator only.
            let all = listeners::get_all().expect("sockets").into_iter();
            let own = all.filter(|l| l.process.pid == s.pid() && l.state == listeners::SocketState::Listen);
            for listener in own {
                assert!(listener.socket.ip().is_loopback() && listener.socket.port() == port, "{}", listener.socket);
            }
            if let Some(address) = other_address() {
                let refused = TcpStream::connect(SocketAddr::new(address, port)).await;
                assert_eq!(refused.expect_err("nobody there").kind(), std::io::ErrorKind::ConnectionRefused);
            }
        })
        .on_linux(),
        row("tF07", "nobody can share its port", async {
            let s = start().await;
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_port(true).expect("an option");
            let error = socket.bind(&s.addr.into()).expect_err("it is taken");
            assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
        }),
        row("tF11", "with a key required nothing but health goes without", async {
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
            let file = std::fs::metadata(s.instance().0).expect("a file");
            assert_eq!(file.mode() & 0o777, 0o600);
            s.leaks_nothing(&[]).await;
        }),
        row("tF14", "nor is it at any other loopback address", async {
            let s = start().await;
            let refused = TcpStream::connect(("127.0.0.2", s.addr.port())).await;
            assert_eq!(refused.expect_err("nobody there").kind(), std::io::ErrorKind::ConnectionRefused);
        }),
    ]
}
