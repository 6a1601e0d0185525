//! A user unit of systemd.
//!
//! Everything in it that is not ours is quoted so that systemd takes it as it is: no specifier, no variable, no second
//! word, no further line.

use std::path::{Path, PathBuf};

use super::manager::{MARK, Manager, Service, State, run, succeed};
use crate::cli::CommandError;

/// What holds for every project. After a crash it is back before a command that had joined it takes its place, and its
/// port (`run` looks twice a second); five crashes in five minutes are enough. The Vercel CLI may be run in it, so what Node.js needs stays open: code
/// that it writes itself (no MemoryDenyWriteExecute), and netlink, which tells it the machine's addresses. What needs a
/// mount namespace is not to be had in every user's session.
const FIXED: &str = "\
# Wrong settings and a taken port do not mend themselves.
RestartPreventExitStatus=2 3
Restart=on-failure
RestartSec=0
TimeoutStartSec=30s
# Requests under way get 10 s.
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

/// systemd, as it is for this user.
pub(super) struct Systemd {
    systemctl: Option<PathBuf>,
    units: PathBuf,
}

impl Systemd {
    pub(super) fn new(systemctl: Option<PathBuf>, config_home: &Path) -> Self {
        Self { systemctl, units: config_home.join("systemd/user") }
    }

    fn systemctl(&self) -> Result<&Path, CommandError> {
        self.systemctl.as_deref().ok_or_else(|| {
            CommandError::Other(
                "no service is possible here: there is no systemctl on PATH; run `connect-sidecar` in a terminal"
                    .into(),
            )
        })
    }

    async fn ask(&self, arguments: &[&str]) -> Result<String, CommandError> {
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
        // The colon: no variable is expanded.
        format!(
            "# {MARK}, which also changes it; `service uninstall` deletes it.\n\
             [Unit]\nDescription=Vercel Connect for {} (connect-sidecar)\n\
             StartLimitIntervalSec=5min\nStartLimitBurst=5\n\n\
             [Service]\nType=notify\nExecStart=:{}\n{variables}{FIXED}",
            literal(&service.project),
            words.join(" "),
        )
    }

    async fn reach(&self) -> Result<(), CommandError> {
        let systemctl = self.systemctl()?;
        match succeed(systemctl, &["--user", "show", "--property=Version"]).await {
            Ok(_) => Ok(()),
            Err(e) => Err(CommandError::Other(format!(
                "no service is possible here: systemd has no session for this user, as in a container or under sudo \
                 ({e}); run `connect-sidecar` in a terminal"
            ))),
        }
    }

    async fn load(&self, name: &str) -> Result<(), CommandError> {
        self.ask(&["daemon-reload"]).await?;
        self.ask(&["enable", &unit(name)]).await.map(drop)
    }

    async fn start(&self, name: &str) -> Result<(), CommandError> {
        // What failed too often is not started any more, whatever it has become.
        self.ask(&["reset-failed", &unit(name)]).await.ok();
        self.ask(&["restart", &unit(name)]).await.map(drop)
    }

    async fn unload(&self, name: &str) -> Result<(), CommandError> {
        self.ask(&["disable", "--now", &unit(name)]).await.map(drop)
    }

    async fn forget(&self, name: &str) {
        let Ok(systemctl) = self.systemctl() else { return };
        for arguments in [&["--user", "daemon-reload"][..], &["--user", "reset-failed", &unit(name)]] {
            let _ = run(systemctl, arguments).await;
        }
    }

    async fn state(&self, name: &str) -> Result<State, CommandError> {
        let properties =
            "--property=UnitFileState,ActiveState,SubState,StateChangeTimestamp,MainPID,ExecMainCode,ExecMainStatus";
        let shown = self.ask(&["show", properties, &unit(name)]).await?;
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
        Ok(State {
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

/// One word, whatever is in it, but for control characters: none gets here.
fn quoted(text: &str) -> String {
    format!("\"{}\"", literal(&text.replace('\\', r"\\").replace('"', "\\\"")))
}

/// Text without specifiers.
fn literal(text: &str) -> String {
    text.replace('%', "%%")
}
