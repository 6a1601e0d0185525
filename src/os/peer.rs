//! The process at the other end of a TCP connection on this machine.
//!
//! A loopback port is open to every user of the machine (docs/security.md S4), so the owner of each connection is
//! looked up. Root is allowed: it can do everything anyway.

use std::io;
use std::net::SocketAddr;

use nix::unistd::{Uid, geteuid};
use tokio::net::TcpStream;

/// The user at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Our own user, or root.
    SameUser,
    /// Another user of this machine.
    OtherUser,
    /// The system does not tell.
    Unknown,
    /// Not looked up: access is controlled by other means.
    NotChecked,
}

impl Peer {
    /// Whether it may send requests. An unknown user is refused on Linux, where every connection has a known owner.
    pub fn is_allowed(self) -> bool {
        match self {
            Self::SameUser | Self::NotChecked => true,
            Self::OtherUser => false,
            Self::Unknown => !cfg!(target_os = "linux"),
        }
    }
}

/// Looks up the user at the other end of an accepted connection from `from` to `local`. Call it before reading from the
/// stream.
///
/// Fails if the client has disconnected, or if there are no file descriptors left for the look-up. Nothing that a
/// disconnected client has sent may be used, because its owner cannot be determined any more.
pub fn identify(stream: &TcpStream, from: SocketAddr, local: SocketAddr) -> io::Result<Peer> {
    let found = socket(from, local);
    // If the connection was reset meanwhile, another process may have got its address.
    stream.peer_addr()?;
    let found = match found {
        Err(error) if is_out_of_descriptors(&error) || error.kind() == io::ErrorKind::NotConnected => {
            return Err(error);
        }
        // A kernel or sandbox without sock_diag(7) gives the same result as one without such a socket.
        Err(_) | Ok(None) => listed(from, local)?,
        Ok(found) => found,
    };
    Ok(found.map_or(Peer::Unknown, |(owner, _)| classify(owner, geteuid())))
}

/// Whether a process still has the other end of a connection from `peer` to `local`.
pub(crate) fn is_connected(peer: SocketAddr, local: SocketAddr) -> bool {
    #[cfg(target_os = "linux")]
    let is_connected = matches!(socket(peer, local), Ok(Some(_)));
    #[cfg(not(target_os = "linux"))]
    let is_connected = process(peer, local).is_some();
    is_connected
}

fn classify(owner: Uid, own: Uid) -> Peer {
    if owner == own || owner.is_root() { Peer::SameUser } else { Peer::OtherUser }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE))
}

/// The id of the process of ours at the other end, if it can be found. Takes some milliseconds: it searches the file
/// descriptors of all processes.
#[cfg(target_os = "linux")]
pub fn process(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let (_, inode) = socket(peer, local).ok()??;
    let link = format!("socket:[{inode}]");
    let ids = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut ids: Vec<u32> = ids.collect();
    // The newest first: the process has probably just been started.
    ids.sort_unstable_by_key(|id| std::cmp::Reverse(*id));
    ids.into_iter().find(|id| {
        let descriptors = std::fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        let mut targets = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
        targets.any(|target| target.as_os_str() == link.as_str())
    })
}

/// The id of the process at the other end, from the list of all sockets.
#[cfg(not(target_os = "linux"))]
pub fn process(peer: SocketAddr, _: SocketAddr) -> Option<u32> {
    let is_peer = |l: &listeners::Listener| l.socket == peer && l.protocol == listeners::Protocol::TCP;
    listeners::get_all().ok()?.into_iter().find(is_peer).map(|l| l.process.pid)
}

/// Owner and inode of the peer's socket. Asks the kernel for this one socket, which takes 12 µs. `/proc/net/tcp` lists
/// all sockets, which takes milliseconds.
#[cfg(target_os = "linux")]
fn socket(peer: SocketAddr, local: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    sock_diag::socket(&query(peer, local)?, peer, local)
}

/// The kernel's response about the socket at `own` that is connected to `other`.
#[cfg(target_os = "linux")]
fn query(own: SocketAddr, other: SocketAddr) -> io::Result<Vec<u8>> {
    use nix::libc::{AF_NETLINK, NETLINK_SOCK_DIAG};
    use socket2::{Domain, Protocol, Type};
    use std::io::Read;

    let mut kernel =
        socket2::Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    // The response is available as soon as `send` returns.
    kernel.set_nonblocking(true)?;
    kernel.send(&sock_diag::request(own, other))?;
    let mut response = vec![0; 512];
    let length = kernel.read(&mut response)?;
    response.truncate(length);
    Ok(response)
}

/// Other systems have no way to find it without unsafe code.
#[cfg(not(target_os = "linux"))]
fn socket(_: SocketAddr, _: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    Ok(None)
}

/// The bytes written at `local` that the peer has not read: those that have not arrived, and those that wait in the
/// peer's receive queue. `None` if the system does not tell.
pub(crate) fn unread_bytes(peer: SocketAddr, local: SocketAddr) -> Option<(u64, u64)> {
    #[cfg(target_os = "linux")]
    {
        let here = sock_diag::queues(&query(local, peer).ok()?, local, peer)?;
        // Nothing is known about a peer on another machine.
        let there = query(peer, local).ok().and_then(|response| sock_diag::queues(&response, peer, local));
        Some((here.unsent, there.map_or(0, |there| there.unread)))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (peer, local);
        None
    }
}

/// The same as [`socket`], from the list of all sockets.
#[cfg(target_os = "linux")]
fn listed(peer: SocketAddr, local: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    let file = if peer.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    match std::fs::read_to_string(file) {
        Ok(list) => Ok(proc_net::socket(&list, peer, local)),
        Err(error) if is_out_of_descriptors(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

#[cfg(not(target_os = "linux"))]
fn listed(_: SocketAddr, _: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    Ok(None)
}

/// The socket tables of proc_pid_net(5).
#[cfg(target_os = "linux")]
mod proc_net {
    use std::net::{IpAddr, SocketAddr};

    use nix::unistd::Uid;

    /// Owner and inode of the socket at `own` that is connected to `other`, if a process has it. Columns of a line: 1
    /// and 2 are the addresses, 7 is the user id, 9 the inode.
    pub(crate) fn socket(list: &str, own: SocketAddr, other: SocketAddr) -> Option<(Uid, u32)> {
        let (own, other) = (in_hex(own), in_hex(other));
        let lines = list.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let mut matches = lines.filter(|columns| columns.get(1..3) == Some(&[own.as_str(), other.as_str()]));
        let columns = matches.next()?;
        let (owner, inode) = (columns.get(7)?.parse().ok()?, columns.get(9)?.parse().ok()?);
        (inode != 0).then_some((Uid::from_raw(owner), inode))
    }

    /// The notation of the tables: every four bytes of the address as one number in host byte order.
    fn in_hex(address: SocketAddr) -> String {
        let words = |bytes: &[u8]| {
            let words = bytes.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_ne_bytes));
            words.map(|word| format!("{word:08X}")).collect::<String>()
        };
        let ip = match address.ip() {
            IpAddr::V4(ip) => words(&ip.octets()),
            IpAddr::V6(ip) => words(&ip.octets()),
        };
        format!("{ip}:{:04X}", address.port())
    }
}

/// Messages of sock_diag(7) for one TCP socket. All numbers are in host byte order, ports and addresses in network
/// order.
///
/// A message is a 16-byte `struct nlmsghdr` (length u32, type u16, flags u16, sequence u32, port u32), followed by
///
/// - in a request: `struct inet_diag_req_v2` (family u8, protocol u8, extensions u8, padding u8, states u32, socket
///   id);
/// - in a response: `struct inet_diag_msg` (family u8, state u8, timer u8, retransmits u8, socket id, expires u32,
///   receive queue u32, send queue u32, user id u32, inode u32).
///
/// The socket id is a 48-byte `struct inet_diag_sockid`: source port u16, destination port u16, source address [u8;
/// 16], destination address [u8; 16], interface u32, cookie [u32; 2].
#[cfg(target_os = "linux")]
mod sock_diag {
    use std::io;
    use std::net::{IpAddr, SocketAddr};

    use nix::libc::{AF_INET, AF_INET6, IPPROTO_TCP};
    use nix::unistd::Uid;

    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const ALL_STATES: u32 = u32::MAX;
    const ANY_INTERFACE: u32 = 0;
    const NO_COOKIE: [u8; 8] = [0xff; 8];
    /// Size of `struct nlmsghdr`, and the offset of its type.
    const HEADER_SIZE: usize = 16;
    const TYPE: usize = 4;
    /// Size of `struct inet_diag_req_v2`.
    const REQUEST_SIZE: usize = 56;
    /// Size of `struct inet_diag_msg`, and offsets in it.
    const RESPONSE_SIZE: usize = 72;
    const STATE: usize = 1;
    const PORTS: usize = 4;
    const RECEIVE_QUEUE: usize = 56;
    const SEND_QUEUE: usize = 60;
    const USER_ID: usize = 64;
    const INODE: usize = 68;

    /// A request for the socket at `own` that is connected to `other`.
    pub(crate) fn request(own: SocketAddr, other: SocketAddr) -> Vec<u8> {
        let family = if own.is_ipv4() { AF_INET } else { AF_INET6 } as u8;
        let mut message = Vec::with_capacity(HEADER_SIZE + REQUEST_SIZE);
        message.extend(((HEADER_SIZE + REQUEST_SIZE) as u32).to_ne_bytes());
        message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.extend(NLM_F_REQUEST.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([family, IPPROTO_TCP as u8, 0, 0]);
        message.extend(ALL_STATES.to_ne_bytes());
        message.extend(ports(own, other));
        message.extend(address(own));
        message.extend(address(other));
        message.extend(ANY_INTERFACE.to_ne_bytes());
        message.extend(NO_COOKIE);
        message
    }

    /// Those of `enum tcp_states` in which a socket has a peer: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
    const CONNECTED: [u8; 4] = [1, 4, 5, 8];

    /// Owner and inode of the socket at `own` that is connected to `other`. Fails with `NotConnected` if its process
    /// has closed it, in which case the owner in the response means nothing, or if it is in another state, such as a
    /// new socket that has taken the address since.
    pub(crate) fn socket(response: &[u8], own: SocketAddr, other: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
        let Some(found) = find(response, own, other) else { return Ok(None) };
        match number(found, INODE) {
            0 => Err(io::ErrorKind::NotConnected.into()),
            _ if !CONNECTED.contains(&found[STATE]) => Err(io::ErrorKind::NotConnected.into()),
            inode => Ok(Some((Uid::from_raw(number(found, USER_ID)), inode))),
        }
    }

    /// Bytes in the queues of a connected socket.
    pub(crate) struct Queues {
        /// Received and not read.
        pub(crate) unread: u64,
        /// Written and not acknowledged.
        pub(crate) unsent: u64,
    }

    /// The queues of the socket at `own` that is connected to `other`.
    pub(crate) fn queues(response: &[u8], own: SocketAddr, other: SocketAddr) -> Option<Queues> {
        let found = find(response, own, other).filter(|found| CONNECTED.contains(&found[STATE]))?;
        Some(Queues { unread: number(found, RECEIVE_QUEUE).into(), unsent: number(found, SEND_QUEUE).into() })
    }

    /// The `struct inet_diag_msg` in a response, if it is about the right socket: if that is closed, the kernel may
    /// return one that listens at its address.
    fn find(response: &[u8], own: SocketAddr, other: SocketAddr) -> Option<&[u8]> {
        let is_response = response.len() >= HEADER_SIZE + RESPONSE_SIZE
            && response[TYPE..TYPE + 2] == SOCK_DIAG_BY_FAMILY.to_ne_bytes();
        response.get(HEADER_SIZE..).filter(|found| is_response && found[PORTS..PORTS + 4] == ports(own, other))
    }

    fn number(found: &[u8], offset: usize) -> u32 {
        found[offset..offset + 4].try_into().map_or(0, u32::from_ne_bytes)
    }

    fn ports(source: SocketAddr, destination: SocketAddr) -> [u8; 4] {
        let ([a, b], [c, d]) = (source.port().to_be_bytes(), destination.port().to_be_bytes());
        [a, b, c, d]
    }

    fn address(of: SocketAddr) -> [u8; 16] {
        let mut bytes = [0; 16];
        match of.ip() {
            IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes = ip.octets(),
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_user_and_root_are_allowed() {
        for (owner, own, expected) in [
            (1000, 1000, Peer::SameUser),
            (0, 1000, Peer::SameUser),
            (1001, 1000, Peer::OtherUser),
            (1000, 0, Peer::OtherUser),
        ] {
            assert_eq!(classify(Uid::from_raw(owner), Uid::from_raw(own)), expected, "{owner} to {own}");
        }
    }

    #[test]
    fn unknown_peers_are_refused_on_linux() {
        for (peer, is_allowed) in [
            (Peer::SameUser, true),
            (Peer::NotChecked, true),
            (Peer::OtherUser, false),
            (Peer::Unknown, !cfg!(target_os = "linux")),
        ] {
            assert_eq!(peer.is_allowed(), is_allowed, "{peer:?}");
        }
    }

    /// Both ends of a connection, the client's first.
    #[cfg(target_os = "linux")]
    async fn connected(to: std::net::IpAddr) -> Option<[TcpStream; 2]> {
        let listener = tokio::net::TcpListener::bind((to, 0)).await.ok()?;
        let caller = TcpStream::connect(listener.local_addr().ok()?).await.ok()?;
        Some([caller, listener.accept().await.ok()?.0])
    }

    /// Peer and local address.
    #[cfg(target_os = "linux")]
    fn ends(accepted: &TcpStream) -> (SocketAddr, SocketAddr) {
        (accepted.peer_addr().expect("an address"), accepted.local_addr().expect("an address"))
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_tells_the_owner_of_a_peer() {
        use std::net::{Ipv4Addr, Ipv6Addr};
        for to in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let Some([caller, accepted]) = connected(to).await else {
                assert!(to.is_ipv6(), "no IPv4");
                continue;
            };
            let (from, local) = ends(&accepted);
            let found = socket(from, local).expect("an answer");
            assert_eq!(found.map(|(owner, _)| owner), Some(geteuid()), "{to}");
            assert_eq!(process(from, local), Some(std::process::id()), "{to}");
            assert_eq!(identify(&accepted, from, local).expect("an answer"), Peer::SameUser, "{to}");
            assert_eq!(listed(from, local).expect("a list"), found, "{to}: without sock_diag");
            assert!(is_connected(from, local), "{to}");
            // A listener at the same address does not count.
            let listener = std::net::TcpListener::bind((to, 0)).expect("a listener");
            let gone = listener.local_addr().expect("an address");
            assert_eq!(socket(gone, local).expect("an answer"), None, "{to}");
            assert_eq!(listed(gone, local).expect("a list"), None, "{to}");
            assert_eq!(process(gone, local), None, "{to}");
            assert_eq!(identify(&accepted, gone, local).expect("an answer"), Peer::Unknown, "{to}");
            assert!(!is_connected(gone, local), "{to}");
            drop(caller);
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn unread_bytes_are_counted_on_both_sides() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let [mut caller, mut accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
        let (from, local) = ends(&accepted);
        let waiting = || unread_bytes(from, local).map(|(_, there)| there);
        assert_eq!(unread_bytes(from, local), Some((0, 0)));
        accepted.write_all(&[0; 1000]).await.expect("written");
        caller.readable().await.expect("readable");
        assert_eq!(waiting(), Some(1000));
        caller.read_exact(&mut [0; 600]).await.expect("read");
        assert_eq!(waiting(), Some(400));
        caller.read_exact(&mut [0; 400]).await.expect("read");
        assert_eq!(waiting(), Some(0));
        let mut written = 0;
        while let Ok(count) = accepted.try_write(&[0; 65_536]) {
            written += count as u64;
        }
        // Bytes that have arrived and are not acknowledged yet count twice.
        let untaken = unread_bytes(from, local).map(|(here, there)| here + there);
        assert!(untaken >= Some(written), "{untaken:?} of {written}");
        drop(caller);
        assert_eq!(unread_bytes(from, local).map(|(_, there)| there), None, "it was reset");
    }

    /// Otherwise other users could send requests by disconnecting at once.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_disconnected_peer_has_no_owner() {
        use socket2::SockRef;
        use tokio::io::AsyncWriteExt;
        for (how, linger) in [("closed", None), ("reset", Some(std::time::Duration::ZERO))] {
            let [mut caller, accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
            let (from, local) = ends(&accepted);
            caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("sent");
            SockRef::from(&caller).set_linger(linger).expect("an option");
            drop(caller);
            let found = identify(&accepted, from, local);
            assert!(found.is_err(), "{how}: {found:?}");
            assert!(!is_connected(from, local), "{how}");
        }
    }

    /// A client may shut down its sending side after the request.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_half_closed_peer_is_connected() {
        use tokio::io::AsyncWriteExt;
        let [mut caller, accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
        let (from, local) = ends(&accepted);
        caller.shutdown().await.expect("half closed");
        assert_eq!(identify(&accepted, from, local).expect("an answer"), Peer::SameUser);
        assert!(is_connected(from, local));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_bad_response_names_nobody() {
        let (of, to) = ("127.0.0.1:258".parse().expect("an address"), "127.0.0.1:772".parse().expect("an address"));
        let mut good = vec![0; 16 + 72];
        good[4] = 20;
        good[16 + 1] = 1;
        good[16 + 4..16 + 8].copy_from_slice(&[1, 2, 3, 4]);
        good[16 + 68] = 1;
        let inode = u32::from_ne_bytes([1, 0, 0, 0]);
        let socket = |answer: &[u8]| sock_diag::socket(answer, of, to).map_err(|e| e.kind());
        assert_eq!(socket(&good), Ok(Some((Uid::from_raw(0), inode))));
        for (what, at, value, expected) in [
            ("an error", 4, 2, Ok(None)),
            ("another socket", 16 + 7, 5, Ok(None)),
            ("a closed socket", 16 + 68, 0, Err(io::ErrorKind::NotConnected)),
            ("SYN_SENT", 16 + 1, 2, Err(io::ErrorKind::NotConnected)),
            ("TIME_WAIT", 16 + 1, 6, Err(io::ErrorKind::NotConnected)),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(socket(&bad), expected, "{what}");
        }
        for length in [0, 15, 16, 87] {
            assert_eq!(socket(&good[..length]), Ok(None), "{length}");
        }
    }
}
