//! Who is at the other end of a connection: whether it is this machine, whose process it is, and which.
//!
//! Loopback asks nobody who they are: on a machine with several users the port would be open to all of them
//! (docs/security.md S4). Root may do everything anyhow, so it may ask.

use std::io;
use std::net::SocketAddr;

use nix::unistd::{Uid, geteuid};
use tokio::net::TcpStream;

/// The user at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The user that we run as, or root.
    Ours,
    /// Another user of this machine.
    Other,
    /// The system does not say.
    Unknown,
    /// Not asked: something else decides who may come this way.
    NotAsked,
}

impl Peer {
    /// Whether it may ask. Where the system can tell whose each connection is, one of which it does not is refused.
    pub fn may_ask(self) -> bool {
        match self {
            Self::Ours | Self::NotAsked => true,
            Self::Other => false,
            Self::Unknown => !cfg!(target_os = "linux"),
        }
    }
}

/// Whose socket is at the other end of this connection, which came from `from` to `local`. To be asked before anything is
/// read from it.
///
/// An error means that the caller has left, or that there were no descriptors left to find it out. Whoever has left
/// misses nothing, and nothing of what it sent may be taken: its owner cannot be told any more.
pub fn of(stream: &TcpStream, from: SocketAddr, local: SocketAddr) -> io::Result<Peer> {
    let found = socket(from, local);
    // What was reset while we asked is gone, and its address may be somebody else's by now.
    stream.peer_addr()?;
    let found = match found {
        Err(error) if is_out_of_descriptors(&error) || error.kind() == io::ErrorKind::NotConnected => {
            return Err(error);
        }
        // A kernel or a sandbox without sock_diag(7) says the same as one without such a socket.
        Err(_) | Ok(None) => listed(from, local)?,
        Ok(found) => found,
    };
    Ok(found.map_or(Peer::Unknown, |(owner, _)| judge(owner, geteuid())))
}

/// Whether there still is a process at the other end of a connection that came from `peer` to `local`.
pub(crate) fn is_there(peer: SocketAddr, local: SocketAddr) -> bool {
    #[cfg(target_os = "linux")]
    let is_there = matches!(socket(peer, local), Ok(Some(_)));
    #[cfg(not(target_os = "linux"))]
    let is_there = process(peer, local).is_some();
    is_there
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

/// The socket's owner and inode. Asks the kernel for the one socket: 12 µs, where `/proc/net/tcp` lists the whole table,
/// which takes milliseconds.
#[cfg(target_os = "linux")]
fn socket(peer: SocketAddr, local: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    sock_diag::socket(&ask(peer, local)?, peer, local)
}

/// What the kernel says of the socket which is at `of` and connected to `to`.
#[cfg(target_os = "linux")]
fn ask(of: SocketAddr, to: SocketAddr) -> io::Result<Vec<u8>> {
    use nix::libc::{AF_NETLINK, NETLINK_SOCK_DIAG};
    use socket2::{Domain, Protocol, Type};
    use std::io::Read;

    let mut kernel =
        socket2::Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    // The answer is there when the question has been taken.
    kernel.set_nonblocking(true)?;
    kernel.send(&sock_diag::question(of, to))?;
    let mut answer = vec![0; 512];
    let length = kernel.read(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

/// Elsewhere there is no way without unsafe code.
#[cfg(not(target_os = "linux"))]
fn socket(_: SocketAddr, _: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
    Ok(None)
}

/// How many bytes of what was written at `local` have not been taken at `peer`: those that are still here, and those that
/// wait there to be read. `None` if the system does not say.
pub(crate) fn not_taken(peer: SocketAddr, local: SocketAddr) -> Option<(u64, u64)> {
    #[cfg(target_os = "linux")]
    {
        let here = sock_diag::queues(&ask(local, peer).ok()?, local, peer)?;
        // Of one that is not on this machine nothing is known.
        let there = ask(peer, local).ok().and_then(|answer| sock_diag::queues(&answer, peer, local));
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

/// The lists of proc_pid_net(5).
#[cfg(target_os = "linux")]
mod proc_net {
    use std::net::{IpAddr, SocketAddr};

    use nix::unistd::Uid;

    /// The owner and the inode of the socket which is at `of` and connected to `to`, and which a process has.
    pub(crate) fn socket(list: &str, of: SocketAddr, to: SocketAddr) -> Option<(Uid, u32)> {
        let (of, to) = (written(of), written(to));
        let fields = list.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let mut of_socket = fields.filter(|fields| fields.get(1..3) == Some(&[of.as_str(), to.as_str()]));
        let found = of_socket.next()?;
        let (owner, inode) = (found.get(7)?.parse().ok()?, found.get(9)?.parse().ok()?);
        (inode != 0).then_some((Uid::from_raw(owner), inode))
    }

    /// Each four bytes of the address as a number of the machine's.
    fn written(address: SocketAddr) -> String {
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
    /// In `struct inet_diag_msg`, after the header: the state, the two ports, the queues, the user, the inode; and its
    /// size.
    const STATE: usize = 1;
    const PORTS: usize = 4;
    const UNREAD: usize = 56;
    const UNSENT: usize = 60;
    const USER: usize = 64;
    const INODE: usize = 68;
    const ANSWER: usize = 72;

    pub(crate) fn question(of: SocketAddr, to: SocketAddr) -> Vec<u8> {
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

    /// `enum tcp_states`: established, and closed by one end (FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT).
    const CONNECTED: [u8; 4] = [1, 4, 5, 8];

    /// The owner and the inode of the socket which is at `of` and connected to `to`. One that its process has left is
    /// nobody's, whoever is named as its owner: an error. So is one that is not connected, such as one that has taken the
    /// address since.
    pub(crate) fn socket(answer: &[u8], of: SocketAddr, to: SocketAddr) -> io::Result<Option<(Uid, u32)>> {
        let Some(found) = found(answer, of, to) else { return Ok(None) };
        match number(found, INODE) {
            0 => Err(io::ErrorKind::NotConnected.into()),
            _ if !CONNECTED.contains(&found[STATE]) => Err(io::ErrorKind::NotConnected.into()),
            inode => Ok(Some((Uid::from_raw(number(found, USER)), inode))),
        }
    }

    /// What a connected socket holds, in bytes.
    pub(crate) struct Queues {
        /// What has come and was not read.
        pub(crate) unread: u64,
        /// What was written and has not arrived.
        pub(crate) unsent: u64,
    }

    /// What the socket holds which is at `of` and connected to `to`.
    pub(crate) fn queues(answer: &[u8], of: SocketAddr, to: SocketAddr) -> Option<Queues> {
        let found = found(answer, of, to).filter(|found| CONNECTED.contains(&found[STATE]))?;
        Some(Queues { unread: number(found, UNREAD).into(), unsent: number(found, UNSENT).into() })
    }

    /// The `struct inet_diag_msg`, if it is that of the socket that was meant.
    fn found(answer: &[u8], of: SocketAddr, to: SocketAddr) -> Option<&[u8]> {
        let is_answer = answer.len() >= HEADER + ANSWER && answer[4..6] == SOCK_DIAG_BY_FAMILY.to_ne_bytes();
        // Where the socket is gone, the kernel may name one that listens there.
        answer.get(HEADER..).filter(|found| is_answer && found[PORTS..PORTS + 4] == ports(of, to))
    }

    fn number(found: &[u8], at: usize) -> u32 {
        found[at..at + 4].try_into().map_or(0, u32::from_ne_bytes)
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

    #[test]
    fn whose_connection_cannot_be_told_is_refused_where_others_can() {
        for (peer, may_ask) in [
            (Peer::Ours, true),
            (Peer::NotAsked, true),
            (Peer::Other, false),
            (Peer::Unknown, !cfg!(target_os = "linux")),
        ] {
            assert_eq!(peer.may_ask(), may_ask, "{peer:?}");
        }
    }

    /// Both ends of a connection, the caller's first.
    #[cfg(target_os = "linux")]
    async fn connected(to: std::net::IpAddr) -> Option<[TcpStream; 2]> {
        let listener = tokio::net::TcpListener::bind((to, 0)).await.ok()?;
        let caller = TcpStream::connect(listener.local_addr().ok()?).await.ok()?;
        Some([caller, listener.accept().await.ok()?.0])
    }

    /// Where a connection came from, and where to.
    #[cfg(target_os = "linux")]
    fn ends(accepted: &TcpStream) -> (SocketAddr, SocketAddr) {
        (accepted.peer_addr().expect("an address"), accepted.local_addr().expect("an address"))
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_says_whose_socket_is_at_the_other_end() {
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
            assert_eq!(of(&accepted, from, local).expect("an answer"), Peer::Ours, "{to}");
            assert_eq!(listed(from, local).expect("a list"), found, "{to}: where the kernel cannot be asked");
            assert!(is_there(from, local), "{to}");
            // Not that of a listener at the same address.
            let listener = std::net::TcpListener::bind((to, 0)).expect("a listener");
            let gone = listener.local_addr().expect("an address");
            assert_eq!(socket(gone, local).expect("an answer"), None, "{to}");
            assert_eq!(listed(gone, local).expect("a list"), None, "{to}");
            assert_eq!(process(gone, local), None, "{to}");
            assert_eq!(of(&accepted, gone, local).expect("an answer"), Peer::Unknown, "{to}");
            assert!(!is_there(gone, local), "{to}");
            drop(caller);
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn what_was_written_and_not_read_is_counted_on_both_sides() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let [mut caller, mut accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
        let (from, local) = ends(&accepted);
        let waiting = || not_taken(from, local).map(|(_, there)| there);
        assert_eq!(not_taken(from, local), Some((0, 0)));
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
        // What has arrived and is not acknowledged yet is on both sides.
        let untaken = not_taken(from, local).map(|(here, there)| here + there);
        assert!(untaken >= Some(written), "{untaken:?} of {written}");
        drop(caller);
        assert_eq!(not_taken(from, local).map(|(_, there)| there), None, "it was reset");
    }

    /// Or anybody could have a request sent by hanging up at once.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn whoever_has_left_already_is_nobody() {
        use socket2::SockRef;
        use tokio::io::AsyncWriteExt;
        for (how, linger) in [("closed", None), ("reset", Some(std::time::Duration::ZERO))] {
            let [mut caller, accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
            let (from, local) = ends(&accepted);
            caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("sent");
            SockRef::from(&caller).set_linger(linger).expect("an option");
            drop(caller);
            let found = of(&accepted, from, local);
            assert!(found.is_err(), "{how}: {found:?}");
            assert!(!is_there(from, local), "{how}");
        }
    }

    /// A caller that has said all that it has to say is there still.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn whoever_has_closed_its_half_is_there() {
        use tokio::io::AsyncWriteExt;
        let [mut caller, accepted] = connected(std::net::Ipv4Addr::LOCALHOST.into()).await.expect("IPv4");
        let (from, local) = ends(&accepted);
        caller.shutdown().await.expect("half closed");
        assert_eq!(of(&accepted, from, local).expect("an answer"), Peer::Ours);
        assert!(is_there(from, local));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_answer_that_is_none_names_nobody() {
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
            ("one that was left", 16 + 68, 0, Err(io::ErrorKind::NotConnected)),
            ("one that is about to connect", 16 + 1, 2, Err(io::ErrorKind::NotConnected)),
            ("one that waits for its time to be over", 16 + 1, 6, Err(io::ErrorKind::NotConnected)),
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
