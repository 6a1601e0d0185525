//! Connecting to upstream: name resolution, choice of address, and certificate verification. Nothing is sent to any
//! other server (docs/security.md U).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, date_time_ymd};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::support::tls::{authority, listen, server};
use crate::support::{Scene, Stage, is_over, let_timers_pass, soon};

/// A sidecar that trusts this CA.
async fn trusting(pem: &str, upstream: SocketAddr) -> Stage {
    let dir = tempfile::tempdir().expect("a directory");
    let path: PathBuf = dir.path().join("ca.pem");
    std::fs::write(&path, pem).expect("written");
    let path = path.display().to_string();
    Scene::new().env("CONNECT_SIDECAR_UPSTREAM_CA", &path).upstream(&format!("https://{upstream}")).start().await
}

/// Expects a TLS error and returns its hint.
async fn tls_failure(stage: &Stage, what: &str) -> Option<String> {
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_tls"), "{what}: {}", reply.text());
    assert!(reply.text().contains("No TLS with https://127.0.0.1:"), "{what}: {}", reply.text());
    reply.json()["error"]["hint"].as_str().map(str::to_owned)
}

#[tokio::test]
async fn only_a_valid_trusted_certificate_for_the_name_is_accepted() {
    const HERE: &str = "127.0.0.1";
    let (pem, trusted) = authority("Trusted");
    let (_, stranger) = authority("Stranger");
    let (_, impostor) = authority("Trusted");
    type Change = fn(&mut CertificateParams);
    for (what, name, issuer, change, hints_at_ca) in [
        ("a good one", HERE, &trusted, (|_| {}) as Change, None),
        ("another name", "api.vercel.com", &trusted, |_| {}, Some(false)),
        ("another address", "127.0.0.2", &trusted, |_| {}, Some(false)),
        ("expired", HERE, &trusted, |params| params.not_after = date_time_ymd(2020, 1, 1), Some(false)),
        ("not yet valid", HERE, &trusted, |params| params.not_before = date_time_ymd(2100, 1, 1), Some(false)),
        ("an unknown authority", HERE, &stranger, |_| {}, Some(true)),
        ("an unknown authority with the name of a known one", HERE, &impostor, |_| {}, Some(true)),
    ] {
        let (addr, decrypted) = server(V4, name, issuer, change).await;
        let stage = trusting(&pem, addr).await;
        match hints_at_ca {
            None => assert_eq!(stage.token("{}").send().await.token(), "good"),
            Some(hints) => {
                let hint = tls_failure(&stage, what).await;
                assert_eq!(hint.is_some_and(|hint| hint.contains("--upstream-ca")), hints, "{what}");
            }
        }
        assert_eq!(decrypted.borrow().is_empty(), hints_at_ca.is_some(), "{what}");
    }
}

#[tokio::test]
async fn old_tls_versions_are_refused() {
    fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 3, 2, 0, u8::try_from(payload.len()).expect("short")], payload].concat()
    }
    // Version 1.1, an empty session, TLS_RSA_WITH_AES_128_CBC_SHA, no compression.
    let hello = [&[2, 0, 0, 38, 3, 2][..], &[7; 32], &[0, 0, 0x2f, 0]].concat();
    for (what, answer) in [
        ("a hello of TLS 1.1", record(22, &hello)),
        ("an alert about the version", record(21, &[2, 70])),
        ("an alert about the name", record(21, &[2, 112])),
    ] {
        let (sender, received) = watch::channel(Vec::new());
        let sender = Arc::new(sender);
        let addr = listen(V4, move |mut stream| {
            let (sender, answer) = (sender.clone(), answer.clone());
            async move {
                let mut bytes = Vec::new();
                let _ = stream.read_buf(&mut bytes).await;
                let _ = stream.write_all(&answer).await;
                while stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {}
                sender.send_modify(|all| all.push(bytes));
            }
        })
        .await;
        let stage = trusting(&authority("any").0, addr).await;
        tls_failure(&stage, what).await;
        let received = received.borrow().concat();
        for secret in ["POST", "Bearer", "slack"] {
            assert!(!received.windows(secret.len()).any(|w| w == secret.as_bytes()), "{what}: {secret}");
        }
    }
}

#[tokio::test]
async fn the_default_upstream_may_not_resolve_to_this_machine_but_a_configured_one_may() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    for addresses in [
        &["127.0.0.1"][..],
        &["127.8.8.8"],
        &["0.0.0.0"],
        &["::1"],
        &["::"],
        &["169.254.169.254"],
        &["fe80::1"],
        &["::ffff:127.0.0.1"],
        &["192.0.2.1", "127.0.0.1"],
    ] {
        let all: Vec<SocketAddr> =
            addresses.iter().map(|address| (address.parse::<IpAddr>().expect("an address"), port).into()).collect();
        let stage = Scene::new().default_upstream().resolving(|_| all).start().await;
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (508, "loop_detected"), "{addresses:?}: {}", reply.text());
        let error = &reply.json()["error"];
        let expected = format!(
            "The name of https://api.vercel.com resolves to this machine ({}): nothing was sent there.",
            addresses.last().expect("one")
        );
        assert_eq!(error["message"], expected);
        assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("/etc/hosts")), "{error}");
        assert_eq!(stage.status().await["upstream"]["errors"], 1);
    }
    let connected = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(connected.is_err(), "no connection was made");

    let stage = Scene::new().tls().upstream("https://localhost").resolving(|emulator| vec![emulator]).start().await;
    assert_eq!(stage.token("{}").send().await.status, 200);
}

/// An address that does not answer: a listener with a full backlog that never accepts.
struct BlackHole {
    addr: SocketAddr,
    _sockets: Vec<Socket>,
}

impl BlackHole {
    fn at(ip: IpAddr) -> Self {
        let addr = SocketAddr::from((ip, 0));
        let socket = || Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("a socket");
        let listening = socket();
        listening.bind(&addr.into()).expect("a port");
        listening.listen(0).expect("it listens");
        let addr = listening.local_addr().expect("an address").as_socket().expect("an address");
        let mut sockets = vec![listening];
        for _ in 0..4 {
            let connecting = socket();
            connecting.set_nonblocking(true).expect("a socket");
            let _ = connecting.connect(&addr.into());
            sockets.push(connecting);
        }
        Self { addr, _sockets: sockets }
    }
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn has_v6() -> bool {
    std::net::TcpListener::bind((V6, 0)).is_ok()
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_does_not_answer() {
    for (what, ip, tried_after) in [
        ("of the same family", IpAddr::from([127, 0, 0, 2]), Duration::from_millis(2000)),
        ("of the other family", V6, Duration::from_millis(300)),
    ] {
        if ip == V6 && !has_v6() {
            continue;
        }
        let hole = BlackHole::at(ip);
        let dead = hole.addr;
        let addresses = move |emulator| vec![dead, emulator];
        let stage = Scene::new().tls().upstream("https://localhost").resolving(addresses).start().await;
        let sent = stage.token("{}").begin().await;
        stage.caught_up().await;
        let reply = tokio::spawn(sent.reply_at_last());
        let_timers_pass(tried_after - Duration::from_millis(200)).await;
        assert!(!is_over(&reply, &stage).await, "{what}");
        let_timers_pass(Duration::from_millis(300)).await;
        let reply = soon("the reply", reply).await.expect("no panic");
        assert_eq!(reply.status, 200, "{what}: {}", reply.text());
        drop(hole);
    }
}

#[tokio::test]
async fn no_answering_address_is_reported_within_5_s() {
    let holes = [IpAddr::from([127, 0, 0, 2]), IpAddr::from([127, 0, 0, 3]), V6];
    let holes: Vec<_> = holes.into_iter().filter(|ip| *ip != V6 || has_v6()).map(BlackHole::at).collect();
    let addresses = holes.iter().map(|hole| hole.addr).collect();
    let stage = Scene::new().tls().upstream("https://localhost").resolving(|_| addresses).start().await;
    let sent = stage.token("{}").begin().await;
    stage.caught_up().await;
    let reply = tokio::spawn(sent.reply_at_last());
    for _ in 0..5 {
        let_timers_pass(Duration::from_secs(1)).await;
        stage.caught_up().await;
    }
    let reply = soon("the reply", reply).await.expect("no panic");
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_unreachable"), "{}", reply.text());
}

#[tokio::test]
async fn one_working_address_is_enough() {
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let closed_v6 = SocketAddr::from((V6, closed.port()));
    for first in [closed, closed_v6] {
        let addresses = move |emulator| vec![first, emulator];
        let stage = Scene::new().tls().upstream("https://localhost").resolving(addresses).start().await;
        assert_eq!(stage.token("{}").send().await.status, 200, "{first}");
    }
    let nowhere = Scene::new().tls().upstream("https://localhost").resolving(|_| Vec::new()).start().await;
    assert_eq!(nowhere.token("{}").send().await.code(), "upstream_unreachable");
}
