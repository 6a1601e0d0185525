//! A real systemd user session in its own namespaces, if the system permits them.

use std::fs;

use crate::support::process::{isolated, run};
use crate::support::workspace::Workspace;

/// Sets up what a session needs: a runtime directory, control groups, and a system that looks as if systemd had booted
/// it.
const SESSION: &str = r#"
set -u
mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && mkdir /run/systemd/system || exit 77
umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 77
mkdir -m 700 "$XDG_RUNTIME_DIR"
/lib/systemd/systemd --user >&2 &
ready() { systemctl --user show --property=Version >/dev/null 2>&1; }
tries=0
until ready; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] && kill -0 $! 2>/dev/null || exit 77
    sleep 0.05
done
property() { systemctl --user show --property="$1" --value 'connect-sidecar-*'; }
address() { "$SIDECAR" service status | sed -n 's/^  address   //p'; }
"#;

/// Installs, crashes, reinstalls and uninstalls the service.
const SCENARIO: &str = r#"
"$SIDECAR" service install --log-format json || exit 1
echo "asked: $(curl -sS -o /dev/null -w '%{http_code}' "$(address)/v1/connect/token/slack%2Facme-slack" -H 'content-type: application/json' -d '{}')"
before=$(property MainPID)
kill -KILL "$before"
tries=0
until now=$(property MainPID); [ "$now" != 0 ] && [ "$now" != "$before" ] && [ -n "$(address)" ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || exit 1
    sleep 0.05
done
echo "restarted: $(property NRestarts)"
"$SIDECAR" --port "$TAKEN" service install && exit 1
echo "taken: $(property ExecMainStatus), $(property ActiveState)"
"$SIDECAR" service install || exit 1
"$SIDECAR" service uninstall || exit 1
echo "left: $(systemctl --user list-units --all --plain --no-legend 'connect-sidecar-*')"
"#;

#[tokio::test]
async fn a_real_systemd_restarts_after_a_crash_but_not_for_a_taken_port() {
    let workspace = Workspace::new().await;
    let odd = workspace.home.path().join("100% of ${HOME} \"é\" \\x");
    fs::rename(workspace.project(), &odd).expect("renamed");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut session = isolated("unshare", workspace.home.path());
    session.args(["--mount", "--propagation=private", "--cgroup", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    session.args(["sh", "-c", &format!("{SESSION}{SCENARIO}")]).current_dir(&odd);
    session.env("XDG_RUNTIME_DIR", workspace.home.path().join("run"));
    session.env("SIDECAR", env!("CARGO_BIN_EXE_connect-sidecar"));
    session.env("TAKEN", taken.local_addr().expect("an address").port().to_string());
    session.env("CONNECT_SIDECAR_PORT", "0").env("CONNECT_SIDECAR_UPSTREAM", workspace.emulator.url());
    let ended = run(session).await;
    if ended.code == Some(77) || ended.stderr.starts_with("unshare: ") {
        crate::support::skipped(format_args!("no session of systemd can be made here: {}", ended.stderr.trim()));
        return;
    }
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let said: Vec<_> = ended.stdout.lines().filter(|line| line.contains(": ") && !line.contains(" for ")).collect();
    assert_eq!(said, ["asked: 200", "restarted: 1", "taken: 3, failed", "left: "], "{ended:?}");
    assert!(!workspace.home.path().join(".config/systemd/user/default.target.wants").exists(), "{ended:?}");
}
