//! Where connections come in: the loopback addresses always, an address in the network or a unix socket where asked for.
//!
//! Never another port than the one asked for, and never one that another process shares.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};

use crate::daemon::server::unix_socket::UnixSocket;

/// What the system holds of what is written to a connection and not taken, in bytes: Linux takes twice as many for its
/// own needs. Otherwise it is megabytes, for each of them.
const SEND_BUFFER: usize = 64 * 1024;

/// Where connections come in.
pub enum Listener {
    /// An address and port.
    Tcp(TcpListener),
    /// A path.
    Unix(UnixSocket),
}

/// A connection that came in.
pub(super) enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer)),
            Self::Unix(socket) => socket.accept().await.map(Accepted::Unix),
        }
    }
}

/// What [`bind`] has bound.
pub struct Bound {
    /// `127.0.0.1` with the port.
    pub loopback: SocketAddr,
    /// All of them.
    pub listeners: Vec<TcpListener>,
    /// Whether `[::1]` is not among them, since the host has no IPv6.
    pub without_ipv6: bool,
}

/// Binds both loopback addresses to one port, and the address in the network if one is given. The unspecified address
/// takes the place of its family's loopback address, which is part of it.
pub fn bind(port: u16, network: Option<IpAddr>) -> Result<Bound, (SocketAddr, io::Error)> {
    /// A port that is free on one address may be taken on another.
    const ATTEMPTS_AT_A_FREE_PORT: u32 = 16;
    let mut attempt = 1;
    loop {
        match bind_once(port, network) {
            Err((_, error))
                if port == 0 && error.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS_AT_A_FREE_PORT =>
            {
                attempt += 1;
            }
            bound => return bound,
        }
    }
}

fn bind_once(port: u16, network: Option<IpAddr>) -> Result<Bound, (SocketAddr, io::Error)> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let all = network.filter(IpAddr::is_unspecified);
    let first = listen((all.filter(IpAddr::is_ipv4).unwrap_or(v4), port).into())?;
    let port = first.local_addr().map_or(port, |addr| addr.port());
    let mut bound = Bound { loopback: (v4, port).into(), listeners: vec![first], without_ipv6: false };
    let all_v6 = all.filter(IpAddr::is_ipv6);
    match listen((all_v6.unwrap_or(v6), port).into()) {
        Ok(second) => bound.listeners.push(second),
        Err((_, error)) if all_v6.is_none() && is_no_ipv6(&error) => bound.without_ipv6 = true,
        Err(failed) => return Err(failed),
    }
    if let Some(address) = network.filter(|address| !address.is_unspecified()) {
        bound.listeners.push(listen((address, port).into())?);
    }
    Ok(bound)
}

fn is_no_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

/// Binds one address. Never with SO_REUSEPORT: two processes must not share the port.
pub fn listen(address: SocketAddr) -> Result<TcpListener, (SocketAddr, io::Error)> {
    bound(address).and_then(|socket| socket.listen(1024)).map_err(|error| (address, error))
}

/// Whether one could listen there now. Nobody else is kept from it meanwhile: nothing is listened to.
pub fn try_listen(address: SocketAddr) -> io::Result<()> {
    bound(address).map(drop)
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let options = SockRef::from(&socket);
    if address.is_ipv6() {
        // Nobody comes in by an address of the other family, in which their own could not be told.
        options.set_only_v6(true)?;
    }
    // What is accepted inherits it: nothing that we send leaves this machine, whoever claims to be on it.
    match address {
        SocketAddr::V4(v4) if v4.ip().is_loopback() => options.set_ttl_v4(1)?,
        SocketAddr::V6(v6) if v6.ip().is_loopback() => options.set_unicast_hops_v6(1)?,
        _ => {}
    }
    options.set_send_buffer_size(SEND_BUFFER)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}
