//! Binds the listening sockets: always both loopback addresses, and a network address or a unix socket if configured.
//!
//! Never uses another port than the configured one, and never shares a port with another process.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};

use crate::daemon::server::unix_socket::UnixSocket;

/// Send buffer per connection, in bytes. Linux reserves twice as much. The default is megabytes per connection.
const SEND_BUFFER: usize = 64 * 1024;

/// A listening socket.
pub enum Listener {
    /// A TCP socket.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixSocket),
}

/// An accepted connection.
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

/// The TCP sockets that [`bind`] has bound.
pub struct BoundSockets {
    /// `127.0.0.1` and the port.
    pub loopback: SocketAddr,
    /// All sockets.
    pub listeners: Vec<TcpListener>,
    /// `[::1]` is missing because the host has no IPv6.
    pub without_ipv6: bool,
}

/// Binds both loopback addresses at one port, and the network address if there is one. An unspecified network address
/// includes the loopback address of its family and replaces it.
pub fn bind(port: u16, network: Option<IpAddr>) -> Result<BoundSockets, (SocketAddr, io::Error)> {
    /// The system picks a port that is free on the first address and may be taken on the second.
    const MAX_FREE_PORT_ATTEMPTS: u32 = 16;
    let mut attempt = 1;
    loop {
        match bind_once(port, network) {
            Err((_, error))
                if port == 0 && error.kind() == io::ErrorKind::AddrInUse && attempt < MAX_FREE_PORT_ATTEMPTS =>
            {
                attempt += 1;
            }
            bound => return bound,
        }
    }
}

fn bind_once(port: u16, network: Option<IpAddr>) -> Result<BoundSockets, (SocketAddr, io::Error)> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let all = network.filter(IpAddr::is_unspecified);
    let first = listen((all.filter(IpAddr::is_ipv4).unwrap_or(v4), port).into())?;
    let port = first.local_addr().map_or(port, |addr| addr.port());
    let mut bound = BoundSockets { loopback: (v4, port).into(), listeners: vec![first], without_ipv6: false };
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

/// Listens at one address, without SO_REUSEPORT: two processes must not share the port.
pub fn listen(address: SocketAddr) -> Result<TcpListener, (SocketAddr, io::Error)> {
    bind_socket(address).and_then(|socket| socket.listen(1024)).map_err(|error| (address, error))
}

/// Whether the address could be bound now. The check does not listen, so it does not block other processes.
pub fn try_listen(address: SocketAddr) -> io::Result<()> {
    bind_socket(address).map(drop)
}

fn bind_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let options = SockRef::from(&socket);
    if address.is_ipv6() {
        // IPv4 clients must not arrive as mapped IPv6 addresses, for which their user cannot be looked up.
        options.set_only_v6(true)?;
    }
    // Accepted sockets inherit this: responses cannot leave this machine, even for a spoofed loopback address.
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
