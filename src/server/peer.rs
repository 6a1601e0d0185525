//! Who is at the other end of a connection: whether it is this machine, whose process it is, and which.
//!
//! Loopback asks nobody who they are: on a machine with several users the port would be open to all of them
//! (trust-policy.md section 4.8). Root may do everything anyhow, so it may ask.

use std::io;
use std::net::SocketAddr;

use nix::unistd::{Uid, geteuid};

/// The user at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The user that we run as, or root.
    Ours,
    /// Another user of this machine.
    Other,
    /// It cannot be found out.
    Unknown,
}

/// Whose socket is at the other end of the connection that came from `peer` to `local`.
///
/// An error means that there were no descriptors left to find it out, or that the caller has left before it was found
/// out: then it is not for want of an answer that the caller may be let in. Whoever has left misses nothing.
pub fn of(peer: SocketAddr, local: SocketAddr) -> io::Result<Peer> {
    match socket(peer, local) {
        Ok(socket) => Ok(socket.map_or(Peer::Unknown, |(owner, _)| judge(owner, geteuid()))),
        Err(error) if is_out_of_descriptors(&error) || error.kind() == io::ErrorKind::NotConnected => Err(error),
        Err(_) => Ok(Peer::Unknown),
    }
}

fn judge(owner: Uid, ours: Uid) -> Peer {
    if owner == ours || owner.is_root() { Peer::Ours } else { Peer::Other }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE))
}

/// Which process of ours is at the other end, by its id, where that can be found out. To look through the descriptors of
/// all of them takes some milliseconds.
#[cfg(target_os = "linux")]
pub fn process(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let (_, inode) = socket(peer, local).ok()??;
    let link = format!("socket:[{inode}]");
    let ids = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut ids: Vec<u32> = ids.collect();
    // The newest first: it is likely to be one that has just been started.
    ids.sort_unstable_by_key(|id| std::cmp::Reverse(*id));
    ids.into_iter().find(|id| {
        let descriptors = std::fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        let mut links = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
        links.any(|to| to.as_os_str() == link.as_str())
    })
}

/// The same, from the list of all sockets.
#[cfg(not(target_os = "linux"))]
pub fn process(peer: SocketAddr, _: SocketAddr) -> Option<u32> {
    let is_it = |l: &listeners::Listener| l.socket == peer && l.protocol == listeners::Protocol::TCP;
    listeners::get_all().ok()?.into_iter().find(is_it).map(|l| l.process.pid)
}

/// The socket's owner and inode. Asks the kernel for the one socket: 12 µs, where `/proc/net/tcp` lists the whole table, which takes milliseconds.
#[cfg(target_os = "linux")]
fn socket(peer: SocketAddr, local: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    use nix::libc::{AF_NETLINK, NETLINK_SOCK_DIAG};
    use socket2::{Domain, Protocol, Type};
    use std::io::Read;

    let mut kernel =
        socket2::Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    // The answer is there when the question has been taken.
    kernel.set_nonblocking(true)?;
    kernel.send(&sock_diag::question(peer, local))?;
    let mut answer = [0; 512];
    let length = kernel.read(&mut answer)?;
    sock_diag::socket(&answer[..length], peer, local)
}

/// Elsewhere there is no way without unsafe code.
#[cfg(not(target_os = "linux"))]
fn socket(_: SocketAddr, _: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    Ok(None)
}

/// The messages of sock_diag(7), in the machine's byte order but for ports and addresses.
#[cfg(target_os = "linux")]
mod sock_diag {
    use std::io;
    use std::net::{IpAddr, SocketAddr};

    use nix::libc::{AF_INET, AF_INET6, IPPROTO_TCP};
    use nix::unistd::Uid;

    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    /// `struct nlmsghdr`.
    const HEADER: usize = 16;
    /// `struct inet_diag_req_v2`.
    const QUESTION: usize = 56;
    /// In `struct inet_diag_msg`, after the header: the two ports, the user, the inode; and its size.
    const PORTS: usize = 4;
    const USER: usize = 64;
    const INODE: usize = 68;
    const ANSWER: usize = 72;

    pub(super) fn question(of: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let family = if of.is_ipv4() { AF_INET } else { AF_INET6 } as u8;
        let mut message = Vec::with_capacity(HEADER + QUESTION);
        message.extend(((HEADER + QUESTION) as u32).to_ne_bytes());
        message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.extend(NLM_F_REQUEST.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([family, IPPROTO_TCP as u8, 0, 0]);
        // In any state.
        message.extend([0xff; 4]);
        message.extend(ports(of, to));
        message.extend(address(of));
        message.extend(address(to));
        // On any interface, and no cookie.
        message.extend([0; 4]);
        message.extend([0xff; 8]);
        message
    }

    /// The owner and the inode of the socket which is at `of` and connected to `to`. One that its process has left is
    /// nobody's, which is not to say root's: an error.
    pub(super) fn socket(answer: &[u8], of: SocketAddr, to: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
        let is_answer = answer.len() >= HEADER + ANSWER && answer[4..6] == SOCK_DIAG_BY_FAMILY.to_ne_bytes();
        // Where the socket is gone, the kernel may name one that listens there.
        let is_it = |found: &&[u8]| is_answer && found[PORTS..PORTS + 4] == ports(of, to);
        let Some(found) = answer.get(HEADER..).filter(is_it) else { return Ok(None) };
        let number = |at: usize| found[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
        match (Uid::from_raw(number(USER)), number(INODE)) {
            (owner, 0) if owner.is_root() => Err(io::ErrorKind::NotConnected.into()),
            (owner, inode) => Ok(Some((owner, inode))),
        }
    }

    fn ports(of: SocketAddr, to: SocketAddr) -> [u8; 4] {
        let ([a, b], [c, d]) = (of.port().to_be_bytes(), to.port().to_be_bytes());
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
    fn our_own_user_and_root_may_ask() {
        for (owner, ours, expected) in
            [(1000, 1000, Peer::Ours), (0, 1000, Peer::Ours), (1001, 1000, Peer::Other), (1000, 0, Peer::Other)]
        {
            assert_eq!(judge(Uid::from_raw(owner), Uid::from_raw(ours)), expected, "{owner} asks {ours}");
        }
    }

    /// Both ends of a connection, the caller's first.
    #[cfg(target_os = "linux")]
    fn connected(to: std::net::IpAddr) -> Option<[std::net::TcpStream; 2]> {
        let listener = std::net::TcpListener::bind((to, 0)).ok()?;
        let caller = std::net::TcpStream::connect(listener.local_addr().ok()?).ok()?;
        Some([caller, listener.accept().ok()?.0])
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernel_says_whose_socket_is_at_the_other_end() {
        use std::net::{Ipv4Addr, Ipv6Addr};
        for to in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let Some([caller, accepted]) = connected(to) else {
                assert!(to.is_ipv6(), "no IPv4");
                continue;
            };
            let from = accepted.peer_addr().expect("an address");
            let local = accepted.local_addr().expect("an address");
            let found = socket(from, local).expect("an answer");
            assert_eq!(found.map(|(owner, _)| owner), Some(geteuid()), "{to}");
            assert_eq!(process(from, local), Some(std::process::id()), "{to}");
            assert_eq!(of(from, local).expect("an answer"), Peer::Ours, "{to}");
            // Not that of a listener at the same address, once the caller is gone.
            drop((caller, accepted));
            let listener = std::net::TcpListener::bind((to, 0)).expect("a listener");
            let gone = listener.local_addr().expect("an address");
            assert_eq!(socket(gone, local).expect("an answer"), None, "{to}");
            assert_eq!(process(gone, local), None, "{to}");
            assert_eq!(of(gone, local).expect("an answer"), Peer::Unknown, "{to}");
        }
    }

    /// Or anybody could have a request sent by hanging up at once.
    #[cfg(target_os = "linux")]
    #[test]
    fn whoever_has_left_already_is_not_let_in_as_unknown() {
        let [caller, accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).expect("IPv4");
        let (from, local) = (accepted.peer_addr().expect("an address"), accepted.local_addr().expect("an address"));
        drop(caller);
        let found = of(from, local);
        assert!(!matches!(found, Ok(Peer::Unknown)), "{found:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_answer_that_is_none_names_nobody() {
        let (of, to) = ("127.0.0.1:258".parse().expect("an address"), "127.0.0.1:772".parse().expect("an address"));
        let mut good = vec![0; 16 + 72];
        good[4] = 20;
        good[16 + 4..16 + 8].copy_from_slice(&[1, 2, 3, 4]);
        good[16 + 68] = 1;
        let inode = u32::from_ne_bytes([1, 0, 0, 0]);
        let socket = |answer: &[u8]| sock_diag::socket(answer, of, to).map_err(|e| e.kind());
        assert_eq!(socket(&good), Ok(Some((Uid::from_raw(0), inode))));
        for (what, at, value, expected) in [
            ("an error", 4, 2, Ok(None)),
            ("another socket", 16 + 7, 5, Ok(None)),
            ("one that was left", 16 + 68, 0, Err(io::ErrorKind::NotConnected)),
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
