//! Notifies the service manager of this process's state with one datagram (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// A manager that does not read must not block this process.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Sends `state`, such as `READY=1`, to the manager's socket, the value of `NOTIFY_SOCKET`. Does nothing without one.
pub fn notify(manager: Option<&OsStr>, state: &str) {
    if let Some(Err(e)) = manager.map(|socket| send(socket, state)) {
        tracing::warn!("could not tell the service manager {state}: {e}");
    }
}

fn send(to: &OsStr, state: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    #[cfg(target_os = "linux")]
    if let Some(name) = std::os::unix::ffi::OsStrExt::as_bytes(to).strip_prefix(b"@") {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        return socket.send_to_addr(state.as_bytes(), &address).map(drop);
    }
    socket.send_to(state.as_bytes(), to).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        socket.set_nonblocking(true).expect("a socket");
        let length = socket.recv(&mut buffer).expect("a datagram");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn a_socket_path_is_notified() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        notify(Some(path.as_os_str()), "READY=1");
        assert_eq!(received(&manager), "READY=1");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_abstract_socket_name_is_notified() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("connect-sidecar-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("a socket");
        notify(Some(format!("@{name}").as_ref()), "STOPPING=1");
        assert_eq!(received(&manager), "STOPPING=1");
    }
}
