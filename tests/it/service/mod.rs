//! `service` under systemd: the unit, the calls of `systemctl`, and the started sidecar. Mostly with a fake `systemctl`
//! that records its arguments, once with a real one.

mod session;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram as StdDatagram;
use std::path::{Path, PathBuf};

use connect_sidecar::os::terminal::is_control_or_bidi;
use tokio::net::UnixDatagram;
use tokio::process::Command;

use crate::support::http::Request;
use crate::support::installed::program;
use crate::support::process::{Ended, Serving, isolated, run, sidecar};
use crate::support::tls::authority;
use crate::support::workspace::Workspace;
use crate::support::{soon, write_private};

/// A fake `systemctl` that records its arguments, fails if they contain the text in `fails`, and prints the file
/// `shown`.
const SYSTEMCTL: &str = r#"#!/bin/sh
here=${0%/*}
echo "$*" >> "$here/calls"
if [ -e "$here/fails" ] && case $* in *$(cat "$here/fails")*) ;; *) false ;; esac; then
    echo "Failed to do that." >&2
    exit 1
fi
cat "$here/shown" 2>/dev/null || true
"#;

const MARK: &str = "# Written by `connect-sidecar service install`";

/// A workspace with the fake `systemctl`.
pub struct ServiceWorkspace {
    pub workspace: Workspace,
    bin: PathBuf,
}

impl ServiceWorkspace {
    pub async fn new() -> Self {
        let workspace = Workspace::new().await;
        let bin = workspace.home.path().join("bin");
        fs::create_dir(&bin).expect("a directory");
        fs::write(bin.join("systemctl"), SYSTEMCTL).expect("written");
        fs::set_permissions(bin.join("systemctl"), fs::Permissions::from_mode(0o755)).expect("a mode");
        Self { workspace, bin }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.workspace.sidecar(arguments);
        command.env("PATH", format!("{}:/usr/bin:/bin", self.bin.display()));
        command
    }

    async fn run(&self, arguments: &[&str]) -> Ended {
        run(self.command(arguments)).await
    }

    fn set(&self, file: &str, text: &str) {
        fs::write(self.bin.join(file), text).expect("written");
    }

    /// The calls of `systemctl` since the last time, with `UNIT` for the unit's name.
    pub fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.bin.join("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.bin.join("calls"));
        let is_unit = |word: &str| word.starts_with("connect-sidecar-web-") && word.ends_with(".service");
        let anonymous = |word| if is_unit(word) { "UNIT" } else { word };
        calls.lines().map(|line| line.split(' ').map(anonymous).collect::<Vec<_>>().join(" ")).collect()
    }

    fn units(&self) -> PathBuf {
        self.workspace.home.path().join(".config/systemd/user")
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.units()).into_iter().flatten();
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    }

    pub fn unit(&self) -> (PathBuf, String) {
        let files = self.files();
        assert_eq!(files.len(), 1, "{files:?}");
        let path = self.units().join(&files[0]);
        let text = fs::read_to_string(&path).expect("a unit");
        (path, text)
    }
}

/// Parses the words of a line as systemd does. Each word is in double quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut chars = line.chars();
    while chars.by_ref().any(|c| c == '"') {
        let mut word = String::new();
        while let Some(c) = chars.next() {
            match c {
                '"' => break,
                '\\' => word.extend(chars.next()),
                '%' => assert_eq!(chars.next(), Some('%'), "a specifier in {line}"),
                _ => {}
            }
            if c != '\\' {
                word.push(c);
            }
        }
        words.push(word);
    }
    words
}

/// The command that systemd would start for a unit.
fn started_by(unit: &str, home: &Path) -> Command {
    let line = |key: &'static str| unit.lines().filter_map(move |line| line.strip_prefix(key)).map(str::to_owned);
    let command = words(&line("ExecStart=:").next().expect("a command"));
    let mut started = isolated(&command[0], home);
    started.args(&command[1..]).current_dir("/");
    for variable in line("Environment=") {
        let word = words(&variable).remove(0);
        let (name, value) = word.split_once('=').expect("a variable");
        started.env(name, value);
    }
    started
}

#[tokio::test]
async fn an_installed_unit_starts_a_sidecar_with_the_given_settings_and_notifies() {
    let service = ServiceWorkspace::new().await;
    let home = service.workspace.home.path();
    write_private(&home.join("web/other.env"), &fs::read_to_string(home.join("web/.env.local")).expect("a file"));
    fs::remove_file(home.join("web/.env.local")).expect("removed");
    let mut install = service.command(&["service", "install", "--env-file", "other.env", "--use-env-proxy"]);
    install.env("XDG_STATE_HOME", home.join("state"));
    install.env("VERCEL_TOKEN", "vca_secret").env("HTTPS_PROXY", "http://me:secret@proxy.test:1");
    let ended = run(install).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (path, unit) = service.unit();
    assert!(unit.starts_with(MARK) && !unit.contains("secret") && !unit.contains("eyJ"), "{unit}");
    assert!(ended.stdout.contains(path.to_str().expect("a path")) && ended.stdout.contains("journalctl --user -u "));
    assert!(ended.stderr.contains("which the next build replaces"), "{ended:?}");
    assert!(ended.stderr.contains("HTTPS_PROXY is not written into the service"), "{ended:?}");
    let steps = ["show --property=Version", "daemon-reload", "enable UNIT", "reset-failed UNIT", "restart UNIT"];
    assert_eq!(service.calls(), steps.map(|step| format!("--user {step}")));

    let notify = home.join("notify");
    let manager = UnixDatagram::from_std({
        let socket = StdDatagram::bind(&notify).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        socket
    })
    .expect("a socket");
    let notification = async || {
        let mut buffer = [0; 64];
        let length = soon("a notification", manager.recv(&mut buffer)).await.expect("a datagram");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut command = started_by(&unit, home);
    command.env("NOTIFY_SOCKET", &notify);
    let serving = Serving::start(command).await;
    assert_eq!(notification().await, "READY=1");
    let ready = Request::new(serving.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 200, "it has the credential");
    let state = home.join(format!("state/connect-sidecar/{}.json", serving.addr.port()));
    assert!(
        fs::read_to_string(state)
            .expect("a state file")
            .contains(service.workspace.project().to_str().expect("a path"))
    );
    let ended = serving.stop().await;
    assert_eq!((notification().await.as_str(), ended.code), ("STOPPING=1", Some(0)));
}

#[tokio::test]
async fn systemd_accepts_units_for_projects_with_any_name() {
    if !program("systemd-analyze").await {
        return;
    }
    let service = ServiceWorkspace::new().await;
    for project in [
        "plain",
        "with  two spaces ",
        "%h %% 100%",
        "$HOME ${HOME} $$",
        "\"quoted\" 'too'",
        "back\\slash\\",
        "\\x41 \\n",
        "-v; rm # *",
        "日本 é",
        ";",
    ] {
        let project = service.workspace.home.path().canonicalize().expect("a directory").join(project);
        fs::create_dir(&project).expect("a directory");
        let mut install = service.command(&["service", "install", "--unix-socket", "run/%t $x \"s\""]);
        install.current_dir(&project);
        let ended = run(install).await;
        assert_eq!(ended.code, Some(0), "{project:?}: {ended:?}");
        let (path, unit) = service.unit();
        let mut verify = isolated("systemd-analyze", service.workspace.home.path());
        verify.args(["--user", "verify"]).arg(&path).env("XDG_RUNTIME_DIR", service.workspace.home.path());
        let found = run(verify).await;
        assert_eq!((found.code, found.stderr.as_str()), (Some(0), ""), "{unit}");
        let started = started_by(&unit, service.workspace.home.path());
        let given: Vec<_> = started.as_std().get_args().map(|arg| arg.to_str().expect("text")).collect();
        let (flag, socket) = (format!("--project={}", project.display()), project.join("run/%t $x \"s\""));
        assert_eq!(given, ["serve", &flag, &format!("--unix-socket={}", socket.display())]);
        fs::remove_file(path).expect("removed");
    }
}

#[tokio::test]
async fn unsupported_settings_are_refused_before_any_change() {
    let service = ServiceWorkspace::new().await;
    let odd = service.workspace.home.path().join("two\nlines");
    fs::create_dir(&odd).expect("a directory");
    let odd = odd.to_str().expect("a path");
    for (arguments, why) in [
        (["--auth", "access-token"].as_slice(), "service install: `auth = access-token` needs VERCEL_TOKEN"),
        (&["--port", "x", "--refresh", "y"], "--refresh: expected off or cli"),
        (&["--project", odd], "service install: the project's path has a control character"),
        (&["--config", "nowhere.toml"], "--config: "),
    ] {
        let ended = service.run(&[&["service", "install"], arguments].concat()).await;
        assert_eq!((ended.code, service.calls().len()), (Some(2), 0), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains(&format!("error: {why}")), "{ended:?}");
    }
    assert!(!service.units().exists());
}

#[tokio::test]
async fn without_a_systemd_session_nothing_is_left_behind() {
    let service = ServiceWorkspace::new().await;
    service.set("fails", "show");
    let ended = service.run(&["service", "install"]).await;
    assert!(ended.stderr.contains("systemd has no session for this user"), "{ended:?}");
    assert!(ended.stderr.contains("Failed to do that") && ended.code == Some(1), "{ended:?}");

    let mut without = sidecar(service.workspace.home.path());
    without.env("PATH", "bin:relative").current_dir(service.workspace.home.path()).args(["service", "install"]);
    let ended = run(without).await;
    assert!(ended.stderr.contains("there is no systemctl on PATH") && ended.code == Some(1), "{ended:?}");
    assert!(!service.workspace.home.path().join(".config").exists());
}

#[tokio::test]
async fn a_unit_that_systemd_refuses_is_restored() {
    let service = ServiceWorkspace::new().await;
    service.set("fails", "enable");
    let ended = service.run(&["service", "install"]).await;
    assert!(ended.code == Some(1) && ended.stderr.contains("enable"), "{ended:?}");
    assert_eq!(service.files(), [""; 0]);

    service.set("fails", "nothing");
    assert_eq!(service.run(&["service", "install"]).await.code, Some(0));
    let before = service.unit();
    service.set("fails", "enable");
    assert_eq!(service.run(&["service", "install", "--wait", "9s"]).await.code, Some(1));
    assert_eq!(service.unit(), before);
}

#[tokio::test]
async fn a_projects_name_is_escaped() {
    let service = ServiceWorkspace::new().await;
    for (name, commands) in [
        ("\u{202e}bew", &["install", "status", "uninstall", "uninstall"][..]),
        ("\x1b[2J\u{9b}", &["status", "uninstall"]),
    ] {
        let project = service.workspace.home.path().join(name);
        fs::create_dir(&project).expect("a directory");
        for command in commands {
            let mut command = service.command(&["service", command]);
            command.current_dir(&project);
            let ended = run(command).await;
            let said = (ended.stdout.clone() + &ended.stderr).replace('\n', "");
            assert!(ended.stdout.len() > 1 && !said.contains(is_control_or_bidi), "{ended:?}");
        }
    }
}

#[tokio::test]
async fn a_second_install_changes_only_the_given_settings() {
    let service = ServiceWorkspace::new().await;
    let install = async |arguments: &[&str]| {
        let ended = service.run(&[&["service", "install"], arguments].concat()).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        service.unit().1
    };
    let first = install(&[]).await;
    assert_eq!(install(&[]).await, first);
    let changed = install(&["--refresh", "cli"]).await;
    assert_eq!(changed, first.replace("web\"\nEnv", "web\" \"--refresh=cli\"\nEnv"), "{changed}");
    assert_ne!(changed, first);
    assert_eq!(service.calls().iter().filter(|call| *call == "--user restart UNIT").count(), 3);
}

#[tokio::test]
async fn a_foreign_file_is_neither_overwritten_nor_deleted() {
    let service = ServiceWorkspace::new().await;
    assert_eq!(service.run(&["service", "install"]).await.code, Some(0));
    let (path, ours) = service.unit();
    service.calls();
    let elsewhere = service.workspace.home.path().join("elsewhere.service");
    fs::write(&elsewhere, &ours).expect("written");
    for replace in [&|| fs::write(&path, "[Service]\n").expect("written"), &|| {
        fs::remove_file(&path).expect("removed");
        symlink(&elsewhere, &path).expect("a link");
    }] as [&dyn Fn(); 2]
    {
        replace();
        let before = fs::read_to_string(&path).expect("a file");
        for command in ["install", "uninstall", "status"] {
            let ended = service.run(&["service", command]).await;
            assert_eq!((ended.code, service.calls().len()), (Some(1), 0), "{command}: {ended:?}");
            assert!(ended.stderr.contains("was not written by this program"), "{ended:?}");
        }
        assert_eq!(fs::read_to_string(&path).expect("a file"), before);
    }
    assert_eq!(fs::read_to_string(&elsewhere).expect("a file"), ours);
}

#[tokio::test]
async fn status_shows_systemds_state_and_the_address_of_the_sidecar() {
    let service = ServiceWorkspace::new().await;
    let none = service.run(&["service", "status"]).await;
    assert!(none.code == Some(1) && none.stdout.starts_with("no service is installed for "), "{none:?}");

    assert_eq!(service.run(&["service", "install"]).await.code, Some(0));
    let serving = service.workspace.serve(&[]).await;
    let shown = |pid: u32| {
        format!(
            "UnitFileState=enabled\nActiveState=active\nSubState=running\nMainPID={pid}\n\
             StateChangeTimestamp=Tue 2026-11-24 12:00:00 UTC\nExecMainCode=0\nExecMainStatus=0\n"
        )
    };
    service.set("shown", &shown(serving.pid()));
    let running = service.run(&["service", "status", "--port", "1"]).await;
    assert_eq!(running.code, Some(0), "{running:?}");
    for line in [
        "  at login  starts".to_owned(),
        "  now       active (running) since Tue 2026-11-24 12:00:00 UTC".into(),
        format!("  address   http://{}", serving.addr),
        format!("  file      {}", service.unit().0.display()),
    ] {
        assert!(running.stdout.lines().any(|shown| shown == line), "{line}: {}", running.stdout);
    }
    service.set("shown", &shown(serving.pid() + 1));
    assert!(
        !service.run(&["service", "status"]).await.stdout.contains("address"),
        "another sidecar's address is not shown"
    );

    service.set(
        "shown",
        "UnitFileState=disabled\nActiveState=failed\nSubState=failed\nMainPID=0\nExecMainCode=1\nExecMainStatus=3\n",
    );
    let failed = service.run(&["service", "status"]).await;
    assert_eq!(failed.code, Some(1));
    assert!(
        failed.stdout.contains("does not start") && failed.stdout.contains("failed (failed), exit code 3"),
        "{failed:?}"
    );
}

#[tokio::test]
async fn a_service_that_does_not_start_stays_installed_and_the_reason_is_printed() {
    let service = ServiceWorkspace::new().await;
    service.set("fails", "restart");
    service.set("shown", "ActiveState=failed\nExecMainCode=1\nExecMainStatus=3\n");
    let ended = service.run(&["service", "install"]).await;
    assert_eq!((ended.code, service.files().len()), (Some(1), 1));
    assert!(ended.stderr.contains("is installed, but does not run: its port is taken"), "{ended:?}");
    assert!(ended.stderr.contains("journalctl --user -u connect-sidecar-web-"), "{ended:?}");
}

#[tokio::test]
async fn uninstall_removes_everything_and_may_be_repeated() {
    let service = ServiceWorkspace::new().await;
    assert_eq!(service.run(&["service", "install"]).await.code, Some(0));
    service.calls();

    service.set("fails", "disable");
    assert_eq!(service.run(&["service", "uninstall"]).await.code, Some(1));
    assert_eq!(service.files().len(), 1, "the service may still run");

    service.set("fails", "nothing");
    service.calls();
    assert_eq!(service.run(&["service", "uninstall"]).await.code, Some(0));
    assert_eq!(service.files(), [""; 0]);
    let steps = ["show --property=Version", "disable --now UNIT", "daemon-reload", "reset-failed UNIT"];
    assert_eq!(service.calls(), steps.map(|step| format!("--user {step}")));

    let again = service.run(&["service", "uninstall"]).await;
    assert!(again.code == Some(0) && again.stdout.starts_with("no service is installed"), "{again:?}");
    assert_eq!(service.calls(), [""; 0]);
}

#[tokio::test]
async fn variables_set_by_a_run_are_not_written_into_a_unit() {
    let service = ServiceWorkspace::new().await;
    let own = service.workspace.home.path().join("own.pem");
    fs::write(&own, authority("Acme Root").0).expect("written");
    let program = service.command(&[]).as_std().get_program().to_str().expect("a path").to_owned();
    let mut inside = service.command(&["run", "--", &program, "service", "install"]);
    inside.env("SSL_CERT_FILE", &own).process_group(0);
    let ended = run(inside).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (_, unit) = service.unit();
    for name in ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"] {
        assert!(ended.stderr.contains(&format!("note: {name} is not written into the service: ")), "{ended:?}");
        assert!(ended.stderr.contains("belongs to a `connect-sidecar run`"), "{ended:?}");
        assert!(!unit.contains(name), "{unit}");
    }
    for set_by_a_run in ["HTTPS_PROXY", "VERCEL_OIDC_TOKEN", "CONNECT_SIDECAR_URL", "NODE_OPTIONS"] {
        assert!(!unit.contains(set_by_a_run), "{unit}");
    }
    let mut outside = service.command(&["service", "install"]);
    outside.env("SSL_CERT_FILE", &own).env("NODE_EXTRA_CA_CERTS", "/none/of/a/run.pem");
    let ended = run(outside).await;
    let note = "note: NODE_EXTRA_CA_CERTS is not written into the service: /none/of/a/run.pem is not there\n";
    assert!(ended.code == Some(0) && ended.stderr.starts_with(note), "{ended:?}");
    assert_eq!(ended.stderr.matches("is not written into the service").count(), 1, "{ended:?}");
    assert!(service.unit().1.contains(&format!("Environment=\"SSL_CERT_FILE={}\"", own.display())));
}
