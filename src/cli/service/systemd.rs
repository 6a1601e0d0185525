//! Services as user units of systemd.
//!
//! All foreign text in a unit is quoted: systemd expands no specifier or variable in it and splits no words or lines.

use std::path::{Path, PathBuf};

use super::ServiceError;
use super::manager::{MARK, Manager, Service, ServiceState, run, succeed};

/// The settings that are the same for every project. It restarts at once after a crash, before a joined command
/// replaces it and takes its port (`run` tries twice a second), but at most five times in five minutes. The Vercel CLI
/// may run in it, so what Node.js needs is allowed: generated code (no MemoryDenyWriteExecute), and netlink for the
/// machine's addresses. Options that need a mount namespace are left out, since not every user session permits one.
const COMMON_SETTINGS: &str = "\
# A restart does not help against wrong settings (2) or a taken port (3).
RestartPreventExitStatus=2 3
Restart=on-failure
RestartSec=0
TimeoutStartSec=30s
# Requests in flight get 10 s to finish.
TimeoutStopSec=15s
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native

[Install]
WantedBy=default.target
";

/// The user's systemd instance.
pub(super) struct Systemd {
    systemctl: Option<PathBuf>,
    units: PathBuf,
}

impl Systemd {
    pub(super) fn new(systemctl: Option<PathBuf>, config_home: &Path) -> Self {
        Self { systemctl, units: config_home.join("systemd/user") }
    }

    fn systemctl(&self) -> Result<&Path, ServiceError> {
        self.systemctl.as_deref().ok_or_else(|| {
            ServiceError::Unavailable("there is no systemctl on PATH; run `connect-sidecar` in a terminal".into())
        })
    }

    async fn systemctl_user(&self, arguments: &[&str]) -> Result<String, ServiceError> {
        succeed(self.systemctl()?, &[&["--user"], arguments].concat()).await
    }
}

impl Manager for Systemd {
    fn file(&self, name: &str) -> PathBuf {
        self.units.join(unit(name))
    }

    fn definition(&self, service: &Service) -> String {
        let words: Vec<_> = service.command.iter().map(|word| quoted(word)).collect();
        let variables: String = service
            .environment
            .iter()
            .map(|(name, value)| format!("Environment={}\n", quoted(&format!("{name}={value}"))))
            .collect();
        // The colon in `ExecStart=:` turns off variable expansion.
        format!(
            "# {MARK}, which also changes it; `service uninstall` deletes it.\n\
             [Unit]\nDescription=Vercel Connect for {} (connect-sidecar)\n\
             StartLimitIntervalSec=5min\nStartLimitBurst=5\n\n\
             [Service]\nType=notify\nExecStart=:{}\n{variables}{COMMON_SETTINGS}",
            literal(&service.project),
            words.join(" "),
        )
    }

    async fn check_available(&self) -> Result<(), ServiceError> {
        let systemctl = self.systemctl()?;
        match succeed(systemctl, &["--user", "show", "--property=Version"]).await {
            Ok(_) => Ok(()),
            Err(e) => Err(ServiceError::Unavailable(format!(
                "systemd has no session for this user, as in a container or under sudo \
                 ({e}); run `connect-sidecar` in a terminal"
            ))),
        }
    }

    async fn load(&self, name: &str) -> Result<(), ServiceError> {
        self.systemctl_user(&["daemon-reload"]).await?;
        self.systemctl_user(&["enable", &unit(name)]).await.map(drop)
    }

    async fn restart(&self, name: &str) -> Result<(), ServiceError> {
        // A unit that failed too often is not started until this.
        self.systemctl_user(&["reset-failed", &unit(name)]).await.ok();
        self.systemctl_user(&["restart", &unit(name)]).await.map(drop)
    }

    async fn unload(&self, name: &str) -> Result<(), ServiceError> {
        self.systemctl_user(&["disable", "--now", &unit(name)]).await.map(drop)
    }

    async fn discard(&self, name: &str) {
        let Ok(systemctl) = self.systemctl() else { return };
        for arguments in [&["--user", "daemon-reload"][..], &["--user", "reset-failed", &unit(name)]] {
            let _ = run(systemctl, arguments).await;
        }
    }

    async fn state(&self, name: &str) -> Result<ServiceState, ServiceError> {
        let properties =
            "--property=UnitFileState,ActiveState,SubState,StateChangeTimestamp,MainPID,ExecMainCode,ExecMainStatus";
        let shown = self.systemctl_user(&["show", properties, &unit(name)]).await?;
        let property = |name: &str| {
            let value = shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default()
        };
        let since = match property("StateChangeTimestamp") {
            "" => String::new(),
            time => format!(" since {time}"),
        };
        // 1 is CLD_EXITED.
        let ended = (property("ExecMainCode") == "1").then(|| property("ExecMainStatus").parse().ok()).flatten();
        let code = ended.map(|code: i32| format!(", exit code {code}")).unwrap_or_default();
        Ok(ServiceState {
            at_login: property("UnitFileState") == "enabled",
            activity: format!("{} ({}){since}{code}", property("ActiveState"), property("SubState")),
            is_running: property("ActiveState") == "active",
            pid: property("MainPID").parse().ok().filter(|pid| *pid != 0),
            exit_code: ended,
        })
    }

    fn log_command(&self, name: &str) -> String {
        format!("journalctl --user -u {name} -n 20")
    }

    fn variable_command(&self, variable: &str) -> String {
        format!("a line {variable}=… in ~/.config/environment.d/proxy.conf, and log in anew")
    }
}

fn unit(name: &str) -> String {
    format!("{name}.service")
}

/// A text as one word. It must not have control characters.
fn quoted(text: &str) -> String {
    format!("\"{}\"", literal(&text.replace('\\', r"\\").replace('"', "\\\"")))
}

/// A text with specifiers escaped.
fn literal(text: &str) -> String {
    text.replace('%', "%%")
}
