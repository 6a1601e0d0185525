//! Services as launchd agents, which macOS starts at login.

use std::path::{Path, PathBuf};

use super::ServiceError;
use super::manager::{MARK, Manager, Service, ServiceState, run, succeed};
use crate::os::shell_quoting;

/// The user's launchd domain.
pub(super) struct Launchd {
    launchctl: Option<PathBuf>,
    library: PathBuf,
    /// The domain target of the user's session.
    domain: String,
}

/// How often, and with which pause, to check whether an agent has ended after `bootout`.
const UNLOAD_CHECKS: u32 = 150;
const UNLOAD_CHECK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(100);

impl Launchd {
    pub(super) fn new(launchctl: Option<PathBuf>, home: &Path, uid: u32) -> Self {
        Self { launchctl, library: home.join("Library"), domain: format!("gui/{uid}") }
    }

    fn launchctl(&self) -> Result<&Path, ServiceError> {
        let none = || ServiceError::Unavailable("there is no launchctl on PATH".into());
        self.launchctl.as_deref().ok_or_else(none)
    }

    fn target(&self, name: &str) -> String {
        format!("{}/{}", self.domain, label(name))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.library.join(format!("Logs/{name}.log"))
    }

    async fn is_loaded(&self, name: &str) -> Result<bool, ServiceError> {
        Ok(run(self.launchctl()?, &["print", &self.target(name)]).await?.status.success())
    }
}

impl Manager for Launchd {
    fn file(&self, name: &str) -> PathBuf {
        self.library.join(format!("LaunchAgents/{}.plist", label(name)))
    }

    fn definition(&self, service: &Service) -> String {
        let words: String = service.command.iter().map(|word| format!("    {}\n", string(word))).collect();
        let variables: String = service
            .environment
            .iter()
            .map(|(name, value)| format!("    <key>{}</key>{}\n", escaped(name), string(value)))
            .collect();
        let log = string(&self.log(&service.name).to_string_lossy());
        // launchd cannot tell exit codes apart, so it restarts the agent only after a crash.
        format!(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<!-- {MARK}, which also changes it; `service uninstall` deletes it. -->
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key>{label}
  <key>ProgramArguments</key>
  <array>
{words}  </array>
  <key>EnvironmentVariables</key>
  <dict>
{variables}  </dict>
  <key>RunAtLoad</key><true/>
  <key>KeepAlive</key><dict><key>Crashed</key><true/></dict>
  <key>ExitTimeOut</key><integer>15</integer>
  <key>Umask</key><integer>63</integer>
  <key>StandardOutPath</key>{log}
  <key>StandardErrorPath</key>{log}
</dict>
</plist>
"#,
            label = string(&label(&service.name)),
        )
    }

    async fn check_available(&self) -> Result<(), ServiceError> {
        match succeed(self.launchctl()?, &["print", &self.domain]).await {
            Ok(_) => Ok(()),
            Err(e) => Err(ServiceError::Unavailable(format!(
                "launchd has no session for this user, as over SSH ({e}); run \
                 `connect-sidecar` in a terminal"
            ))),
        }
    }

    async fn load(&self, name: &str) -> Result<(), ServiceError> {
        self.unload(name).await?;
        let file = self.file(name);
        succeed(self.launchctl()?, &["enable", &self.target(name)]).await?;
        succeed(self.launchctl()?, &["bootstrap", &self.domain, &file.to_string_lossy()]).await.map(drop)
    }

    async fn restart(&self, name: &str) -> Result<(), ServiceError> {
        // Loading has already started it, so this only makes sure.
        succeed(self.launchctl()?, &["kickstart", &self.target(name)]).await.map(drop)
    }

    async fn unload(&self, name: &str) -> Result<(), ServiceError> {
        for attempt in 0..UNLOAD_CHECKS {
            if !self.is_loaded(name).await? {
                return Ok(());
            }
            if attempt == 0 {
                // May fail because the operation is in progress.
                run(self.launchctl()?, &["bootout", &self.target(name)]).await?;
            } else {
                tokio::time::sleep(UNLOAD_CHECK_INTERVAL).await;
            }
        }
        Err(ServiceError::NotStopped {
            name: name.to_owned(),
            command: format!("launchctl bootout {}", self.target(name)),
        })
    }

    async fn discard(&self, _: &str) {}

    async fn state(&self, name: &str) -> Result<ServiceState, ServiceError> {
        let printed = run(self.launchctl()?, &["print", &self.target(name)]).await?;
        let printed = String::from_utf8_lossy(&printed.stdout);
        let value = |key: &str| {
            printed.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(" = ")).unwrap_or_default()
        };
        let is_running = value("state") == "running";
        // Such as `3: EX_…` or `(never exited)`. If the agent is running, it is that of an earlier run.
        let exit_code = value("last exit code").split(':').next().and_then(|code| code.parse().ok());
        let exit_code = exit_code.filter(|_| !is_running);
        let activity = if printed.is_empty() { "not loaded" } else { value("state") };
        let code = exit_code.map(|code: i32| format!(", exit code {code}")).unwrap_or_default();
        Ok(ServiceState {
            at_login: !printed.is_empty(),
            activity: format!("{activity}{code}"),
            is_running,
            pid: value("pid").parse().ok(),
            exit_code,
        })
    }

    fn log_command(&self, name: &str) -> String {
        format!("tail -n 20 {}", shell_quoting::path(&self.log(name).to_string_lossy()))
    }

    fn variable_command(&self, variable: &str) -> String {
        format!("`launchctl setenv {variable} …`, at each login")
    }
}

fn label(name: &str) -> String {
    format!("dev.connect-sidecar.{}", name.trim_start_matches("connect-sidecar-"))
}

fn string(text: &str) -> String {
    format!("<string>{}</string>", escaped(text))
}

/// A text for XML. It must not have control characters.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    /// A fake `launchctl` that records its arguments. An agent stays loaded until the second check after `bootout`.
    const LAUNCHCTL: &str = r#"#!/bin/sh
here=${0%/*}
echo "$*" >> "$here/calls"
case $1 in
    bootstrap) touch "$here/loaded" ;;
    bootout) mv "$here/loaded" "$here/ending"; exit 36 ;;
    print)
        case $2 in */*/*) ;; *) exit 0 ;; esac
        if [ -e "$here/ending" ]; then rm "$here/ending"; exit 0; fi
        [ -e "$here/loaded" ] || { echo "Could not find service" >&2; exit 113; }
        printf '%s = {\n\tstate = running\n\tpid = 4711\n\tlast exit code = 3\n}\n' "$2"
        ;;
esac
"#;

    fn service() -> Service {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Service {
            name: "connect-sidecar-web-00000000".into(),
            project: "/p".into(),
            command: texts(&["/Applications/x & y/bin", "serve", "--project=/p <1> \"é\" ]]> $HOME"]),
            environment: vec![("PATH".into(), "/usr/bin:/<b>".into())],
        }
    }

    #[test]
    fn pythons_property_list_reader_finds_the_exact_values() {
        let launchd = Launchd::new(None, Path::new("/Users/a&b"), 501);
        let service = service();
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("agent.plist");
        fs::write(&file, launchd.definition(&service)).expect("written");
        let script = "import json, plistlib, sys; print(json.dumps(plistlib.load(open(sys.argv[1], 'rb'))))";
        let read = Command::new("python3").args(["-c", script]).arg(&file).output().expect("python3");
        assert!(read.status.success(), "{read:?}");
        let read: serde_json::Value = serde_json::from_slice(&read.stdout).expect("JSON");
        let log = "/Users/a&b/Library/Logs/connect-sidecar-web-00000000.log";
        let expected = serde_json::json!({
            "Label": "dev.connect-sidecar.web-00000000",
            "ProgramArguments": service.command,
            "EnvironmentVariables": { "PATH": "/usr/bin:/<b>" },
            "RunAtLoad": true,
            "KeepAlive": { "Crashed": true },
            "ExitTimeOut": 15,
            "Umask": 0o077,
            "StandardOutPath": log,
            "StandardErrorPath": log,
        });
        assert_eq!(read, expected);
        let path = launchd.file(&service.name);
        assert_eq!(path, Path::new("/Users/a&b/Library/LaunchAgents/dev.connect-sidecar.web-00000000.plist"));
    }

    #[tokio::test]
    async fn an_agent_is_loaded_again_once_the_old_one_has_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let launchctl = dir.path().join("launchctl");
        fs::write(&launchctl, LAUNCHCTL).expect("written");
        fs::set_permissions(&launchctl, fs::Permissions::from_mode(0o755)).expect("a mode");
        let launchd = Launchd::new(Some(launchctl), dir.path(), 501);
        let calls = || {
            let calls = fs::read_to_string(dir.path().join("calls")).unwrap_or_default();
            let _ = fs::remove_file(dir.path().join("calls"));
            calls.lines().map(|line| line.replace("gui/501/dev.connect-sidecar.a-0", "AGENT")).collect::<Vec<_>>()
        };
        let name = "connect-sidecar-a-0";
        let file = launchd.file(name).display().to_string();
        let bootstrap = format!("bootstrap gui/501 {file}");

        launchd.check_available().await.expect("a session");
        assert_eq!(calls(), ["print gui/501"]);
        launchd.load(name).await.expect("loaded");
        launchd.restart(name).await.expect("started");
        assert_eq!(calls(), ["print AGENT", "enable AGENT", &bootstrap, "kickstart AGENT"]);
        launchd.load(name).await.expect("loaded");
        assert_eq!(calls(), ["print AGENT", "bootout AGENT", "print AGENT", "print AGENT", "enable AGENT", &bootstrap]);
        let state = launchd.state(name).await.expect("a state");
        let running = ServiceState {
            at_login: true,
            activity: "running".into(),
            is_running: true,
            pid: Some(4711),
            exit_code: None,
        };
        assert_eq!(state, running);
        launchd.unload(name).await.expect("unloaded");
        let state = launchd.state(name).await.expect("a state");
        assert_eq!((state.at_login, state.is_running, state.activity.as_str()), (false, false, "not loaded"));
    }
}
