//! A network of a test's own: addresses that are not loopback, and nobody else who could reach them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

use tokio::net::TcpListener;

/// The addresses there that are not loopback; both are for documentation.
pub const OWN_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub const OWN_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// Set where the test runs in its own network.
const INSIDE: &str = "TEST_IN_OWN_NETWORK";

/// Whether this is the network of its own that the test named `test` wants. If not, runs the test there, and it is done;
/// where the system makes no such network for us, it says so.
pub fn is_own(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let set_up = format!("ip link set lo up && ip address add {OWN_V4} dev lo && ip address add {OWN_V6} dev lo nodad");
    // With a user namespace of its own it needs no privilege.
    let in_namespaces = |flags: &str, script: &str| {
        let mut command = Command::new("unshare");
        command.args([flags, "sh", "-c", script, "sh"]).env(INSIDE, "1");
        command
    };
    let flags = if nix::unistd::Uid::effective().is_root() { "-n" } else { "-rn" };
    match in_namespaces(flags, &set_up).output() {
        Ok(output) if output.status.success() => {}
        tried => {
            super::skipped(format_args!("no network namespace can be made (unshare {flags}): {tried:?}"));
            return false;
        }
    }
    let binary = std::env::current_exe().expect("this test binary");
    let mut command = in_namespaces(flags, &format!("{set_up} && exec \"$@\""));
    let ended = command.arg(binary).args(["--exact", test, "--nocapture"]).output().expect("a process");
    let (stdout, stderr) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success() && stdout.contains("1 passed"), "in its own network:\n{stdout}\n{stderr}");
    false
}

/// A port that is taken on IPv6 and by nobody on IPv4, if there is IPv6 here. It is none that the system would choose for
/// a test beside this one: that test's port 0 may become the same number on IPv4 at any moment.
pub async fn taken_on_ipv6_only() -> Option<TcpListener> {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.ok()?;
    for port in 20_000..20_100 {
        let Ok(v6) = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).await else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
            return Some(v6);
        }
    }
    panic!("a hundred ports are all taken")
}
