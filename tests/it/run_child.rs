//! The command of `run` as a job: terminal control, signal forwarding, exit codes, and cleanup of its process group.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;

use crate::support::process::{Running, isolated, run};
use crate::support::soon;
use crate::support::terminal::Terminal;
use crate::support::workspace::Workspace;

/// `run -- sh -c SCRIPT`.
fn script(workspace: &Workspace, script: &str) -> Command {
    let mut command = workspace.sidecar(&["run", "--no-intercept", "--", "sh", "-c", script]);
    // Own group: the tests may run in the foreground of a terminal.
    command.process_group(0);
    command
}

/// A command as a line for a shell.
fn shell_line(command: &Command) -> String {
    let command = command.as_std();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| format!("'{}'", word.to_str().expect("text").replace('\'', "'\\''")));
    quoted.collect::<Vec<_>>().join(" ")
}

fn exists(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

/// `run -- WORDS` in the project.
fn command_of(workspace: &Workspace, words: &[&str]) -> Command {
    let mut command = workspace.sidecar(&["run", "--no-intercept", "--"]);
    command.args(words).process_group(0);
    command
}

/// The exit code of the same command in this shell; `None` if there is no such shell.
async fn code_in(shell: &str, workspace: &Workspace, words: &[&str]) -> Option<i32> {
    let mut command = isolated(shell, workspace.home.path());
    command.args(["-c", "\"$@\"; exit $?", shell]).args(words).current_dir(workspace.project()).process_group(0);
    let status = soon("the shell's end", command.stdout(Stdio::null()).stderr(Stdio::null()).status()).await;
    status.ok()?.code()
}

#[tokio::test]
async fn run_exits_with_the_commands_exit_code() {
    let workspace = Workspace::new().await;
    for (body, code) in
        [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
    {
        let ended = run(script(&workspace, body)).await;
        assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(code), "", ""), "{body}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_command_killed_by_a_signal_gives_the_exit_code_of_shells() {
    let workspace = Workspace::new().await;
    let [ignored, stops, unnamed] = [&[17, 18, 23, 28][..], &[19, 20, 21, 22], &[32, 33]];
    let ending = (1..=64).filter(|signal| ![ignored, stops, unnamed].concat().contains(signal));
    for signal in ending {
        let body = format!("kill -{signal} $$");
        let words = ["sh", "-c", &body];
        let (ended, bash, dash) = tokio::join!(
            run(command_of(&workspace, &words)),
            code_in("bash", &workspace, &words),
            code_in("dash", &workspace, &words)
        );
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(128 + signal), ""), "signal {signal}");
        assert!(bash.is_none_or(|code| code == 128 + signal), "signal {signal} in bash: {bash:?}");
        assert!(dash.is_none_or(|code| code == 128 + signal), "signal {signal} in dash: {dash:?}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_stopped_command_is_continued() {
    let workspace = Workspace::new().await;
    for signal in [Signal::SIGSTOP, Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU] {
        let mut command = script(&workspace, "echo $$; read -r line; exit 7");
        command.stdin(Stdio::piped());
        let mut running = Running::start(command);
        let pid = running.pid().await;
        // Repeated, since `run` continues the command once at its start.
        let stopped = async {
            while !std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there").contains(") T ") {
                kill(pid, signal).expect("sent");
                tokio::task::yield_now().await;
            }
        };
        soon("it to stop", stopped).await;
        kill(pid, Signal::SIGCONT).expect("sent");
        drop(running.sidecar.stdin.take());
        assert_eq!(running.end().await.code, Some(7), "{signal}");
    }
}

#[tokio::test]
async fn in_a_terminal_the_shell_can_continue_a_stopped_command() {
    let workspace = Workspace::new().await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    for signal in ["STOP", "TSTP", "TTIN", "TTOU"] {
        terminal.enter(&shell_line(&script(&workspace, &format!("read -r line; kill -{signal} $$; exit 3")))).await;
        terminal.enter("stop").await;
        terminal.sees("Stopped").await;
        terminal.enter("fg").await;
        assert_eq!(terminal.code().await, 3, "{signal}");
    }
    terminal.close().await;
}

/// The parent's handling of SIGCHLD must not keep `run` from noticing the command's end.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_commands_end_is_noticed_whatever_signals_are_ignored_or_blocked() {
    const WITH: &str = "
import os, signal, sys
exec(sys.argv[1])
os.execvp(sys.argv[2], sys.argv[2:])
";
    let workspace = Workspace::new().await;
    for before in [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    ] {
        // `grep` prints the blocked signals and exits with 2 because of the missing file.
        let blocked = ["grep", "-s", "SigBlk", "/proc/self/status", "/none"];
        let program = workspace.sidecar(&[]).as_std().get_program().to_owned();
        let mut ends = Vec::new();
        for prefix in [&[program.to_str().expect("text"), "run", "--no-intercept", "--"][..], &[]] {
            let mut command = isolated("python3", workspace.home.path());
            command.args(["-c", WITH, before]).args(prefix).args(blocked);
            command.envs(workspace.sidecar(&[]).as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
            command.current_dir(workspace.project()).process_group(0);
            let ended = run(command).await;
            ends.push((ended.code, ended.stdout));
        }
        assert_eq!(ends[0].0, Some(2), "{before}");
        assert_eq!(ends[0], ends[1], "{before}: the same as without `run`");
    }
}

#[tokio::test]
async fn a_command_that_cannot_be_run_has_the_exit_code_of_shells_and_advice() {
    let workspace = Workspace::new().await;
    std::fs::write(workspace.project().join("script"), "#!/bin/sh\n").expect("written");
    for (program, code, advice) in [
        ("no-such-command", 127, "could not find no-such-command on PATH"),
        ("./none", 127, "it is not there"),
        ("./script", 126, "`chmod +x`"),
        ("/", 126, "not an executable file"),
    ] {
        let ended = run(workspace.sidecar(&["run", "--no-intercept", "--", program])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{program}");
        assert!(ended.stderr.contains(advice) && ended.stderr.lines().count() == 1, "{program}: {}", ended.stderr);
    }
    let nothing = run(workspace.sidecar(&["run"])).await;
    assert_eq!(nothing.code, Some(2), "{}", nothing.stderr);
}

/// Creates files that a shell handles differently. A child process writes them, since a file that is open for writing
/// in this process could not be executed.
fn create_files(dir: &std::path::Path, files: &[(&str, u32, &str)]) {
    for (name, mode, content) in files {
        let file = dir.join(name);
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("made");
        let mut writing = std::process::Command::new("/bin/sh");
        writing.args(["-c", "printf \"$2\" >\"$0\" && chmod \"$1\" \"$0\""]);
        let written = writing.arg(&file).args([format!("{mode:o}"), (*content).to_owned()]).status();
        assert!(written.expect("a shell").success(), "{name}");
    }
}

#[tokio::test]
async fn files_that_cannot_be_executed_are_handled_like_in_bash() {
    let workspace = Workspace::new().await;
    let dir = workspace.project();
    create_files(
        &dir,
        &[
            ("no-first-line", 0o755, "echo $0 $1; exit 5\n"),
            ("a-comment", 0o755, "# \"no first line\"\nexit 6\n"),
            ("-x/option", 0o755, "exit 8\n"),
            ("empty", 0o755, ""),
            ("newline", 0o755, "\n"),
            ("no-right", 0o644, "exit 9\n"),
            ("unreadable", 0o111, "exit 9\n"),
            ("missing-interpreter", 0o755, "#!/no/such/interpreter\n"),
            ("closed-interpreter", 0o755, "#!./no-right\n"),
            ("directory-as-interpreter", 0o755, "#!/\n"),
            ("another-machine", 0o755, "\\177ELF\\002\\001\\001garbage"),
            ("a-nul", 0o755, "exit 0\\000\n"),
            ("a-late-nul", 0o755, "exit 4\n\\000\n"),
            ("bin/1/tool/file", 0o755, ""),
            ("bin/2/tool", 0o644, "exit 1\n"),
            ("bin/3/tool", 0o755, "#!/bin/sh\nexit 31\n"),
            ("bin/4/tool", 0o755, "exit 41\n"),
            ("closed/tool", 0o755, "exit 1\n"),
        ],
    );
    std::os::unix::fs::symlink("loop", dir.join("loop")).expect("a link");
    let long = "x".repeat(300);
    let long_path = format!("./{long}");
    let everywhere = "/usr/bin:/bin";
    for (path, words, code) in [
        ("", &["./no-first-line", "argument"][..], 5),
        ("", &["./a-comment"], 6),
        ("", &["./-x/option"], 8),
        ("", &["./empty"], 0),
        ("", &["./newline"], 0),
        ("", &["./no-right"], 126),
        ("", &["./missing-interpreter"], 127),
        ("", &["./closed-interpreter"], 126),
        ("", &["./directory-as-interpreter"], 126),
        ("", &["./another-machine"], 126),
        ("", &["./a-nul"], 126),
        ("", &["./a-late-nul"], 4),
        ("", &["./loop"], 126),
        ("", &["./bin"], 126),
        ("", &["bin/1"], 126),
        ("", &["./no-right/below"], 126),
        ("", &["./none/below"], 127),
        ("", &[long_path.as_str()], 126),
        ("", &[long.as_str()], 127),
        ("", &[""], 127),
        ("bin/1", &["tool"], 127),
        ("bin/1:bin/2", &["tool"], 127),
        ("bin/2:bin/1", &["tool"], 126),
        ("bin/1:bin/2:bin/3", &["tool"], 31),
        ("bin/4:bin/3", &["tool"], 41),
        ("bin/none:no-right", &["tool"], 127),
        ("", &["a-comment"], 127),
        (":/nowhere", &["a-comment"], 6),
        ("/nowhere:", &["a-comment"], 6),
    ] {
        let path = if path.is_empty() { everywhere.to_owned() } else { format!("{path}:{everywhere}") };
        let mut command = command_of(&workspace, words);
        command.env("PATH", &path);
        let ended = run(command).await;
        let context = format!("{words:?} on {path}: {ended:?}");
        assert_eq!(ended.code, Some(code), "{context}");
        assert_eq!(ended.stderr.lines().count(), usize::from(code > 125), "{context}");
        let mut bash = isolated("bash", workspace.home.path());
        bash.args(["-c", "PATH=$0; \"$@\"; exit $?", &path]).args(words).current_dir(&dir).process_group(0);
        if let Ok(bash) = bash.output().await {
            let code = bash.status.code().expect("an exit code");
            assert_eq!(ended.code, Some(code), "{context} {}", String::from_utf8_lossy(&bash.stderr));
            assert_eq!(ended.stdout, String::from_utf8_lossy(&bash.stdout), "{context}");
        }
    }
    // File modes do not apply to root.
    if !nix::unistd::Uid::effective().is_root() {
        use std::os::unix::fs::PermissionsExt;
        let closed = |mode| std::fs::set_permissions(dir.join("closed"), PermissionsExt::from_mode(mode));
        closed(0o600).expect("a mode");
        for (words, code) in [(["./closed/tool"], 126), (["./unreadable"], 126)] {
            let ended = run(command_of(&workspace, &words)).await;
            assert_eq!((ended.code, code_in("bash", &workspace, &words).await), (Some(code), Some(code)), "{words:?}");
        }
        closed(0o700).expect("a mode");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn too_long_an_environment_or_a_busy_file_fails_like_in_a_shell() {
    let workspace = Workspace::new().await;
    // With the preload's option added, one variable exceeds the system's limit.
    let mut command = command_of(&workspace, &["true"]);
    command.env("NODE_OPTIONS", "x".repeat(131_000));
    let ended = run(command).await;
    assert_eq!(ended.code, Some(126), "{}", ended.stderr);
    assert!(ended.stderr.contains("Argument list too long"), "{}", ended.stderr);

    let program = workspace.project().join("program");
    std::fs::copy("/bin/true", &program).expect("copied");
    let writing = std::fs::File::options().append(true).open(&program).expect("open");
    let ended = run(command_of(&workspace, &["./program"])).await;
    assert_eq!((ended.code, code_in("bash", &workspace, &["./program"]).await), (Some(126), Some(126)), "{ended:?}");
    drop(writing);
}

#[tokio::test]
async fn stdin_and_arguments_reach_the_command_unchanged() {
    let workspace = Workspace::new().await;
    let mut command = workspace.sidecar(&[
        "run",
        "--no-intercept",
        "sh",
        "-c",
        "cat; printf '<%s>' \"$@\" >&2",
        "sh",
        "-v",
        "--",
        "--port",
        "",
    ]);
    command
        .process_group(0)
        .stdin(Stdio::from(std::fs::File::open(workspace.project().join(".env.local")).expect("a file")));
    let ended = run(command).await;
    assert_eq!(ended.stdout, std::fs::read_to_string(workspace.project().join(".env.local")).expect("text"));
    assert_eq!(ended.stderr, "<-v><--><--port><>");
}

/// Otherwise a server that starts daemons would fill the process table.
#[tokio::test]
async fn orphans_of_the_command_are_reaped_while_it_runs() {
    let workspace = Workspace::new().await;
    let line = "(sh -c 'echo $$ > id' &); while [ ! -s id ]; do :; done; while [ -e /proc/$(cat id) ]; do :; done";
    let ended = run(workspace.sidecar(&["run", "--no-intercept", "--", "sh", "-c", line])).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

/// Prints the signals that it receives, and exits on SIGUSR2.
const LISTENER: &str = "
import os, signal
signals = [getattr(signal, \"SIG\" + name) for name in (\"INT\", \"TERM\", \"HUP\", \"QUIT\", \"USR1\", \"USR2\")]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print(os.getpid(), flush=True)
while True:
    got = signal.Signals(signal.sigwait(signals))
    print(\"got\", got.name, flush=True)
    if got == signal.SIGUSR2: exit(5)
";

fn listener(workspace: &Workspace) -> Command {
    let mut command = workspace.sidecar(&["run", "--no-intercept", "--", "python3", "-c", LISTENER]);
    command.process_group(0);
    command
}

#[tokio::test]
async fn signals_are_forwarded_once() {
    let workspace = Workspace::new().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1] {
        let mut running = Running::start(listener(&workspace));
        running.pid().await;
        running.signal(signal);
        assert_eq!(running.line().await, format!("got {signal}"));
        running.signal(Signal::SIGUSR2);
        assert_eq!(running.line().await, "got SIGUSR2");
        let ended = running.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(5), ""), "{signal}");
    }
}

#[tokio::test]
async fn a_second_signal_kills_a_command_that_ignores_the_first() {
    let workspace = Workspace::new().await;
    for (first, second) in [(Signal::SIGTERM, Signal::SIGTERM), (Signal::SIGINT, Signal::SIGTERM)] {
        let mut running = Running::start(listener(&workspace));
        running.pid().await;
        running.signal(first);
        running.line().await;
        running.signal(second);
        let ended = running.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(137), ""));
    }
}

#[tokio::test]
async fn a_command_that_ignores_a_signal_is_killed_after_ten_seconds() {
    let workspace = Workspace::new().await;
    // SIGHUP: the terminal is gone, so nobody can send a second signal.
    let mut running = Running::start(listener(&workspace));
    running.pid().await;
    let sent = Instant::now();
    running.signal(Signal::SIGHUP);
    running.line().await;
    // This neither ends the command nor shortens the time limit.
    running.signal(Signal::SIGUSR1);
    assert_eq!(running.end().await.code, Some(137));
    let took = sent.elapsed();
    assert!(took >= Duration::from_secs(10), "{took:?}");
}

#[tokio::test]
async fn a_stopped_command_is_terminated() {
    let workspace = Workspace::new().await;
    let mut running = Running::start(script(&workspace, "echo $$; exec sleep 60"));
    let pid = running.pid().await;
    kill(pid, Signal::SIGSTOP).expect("sent");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.end().await.code, Some(143));
}

#[tokio::test]
async fn processes_left_in_the_commands_group_are_terminated_and_daemons_are_not() {
    let workspace = Workspace::new().await;
    let body = "sleep 60 & echo $!; (trap '' TERM; echo ignoring; sleep 60) & echo $!; setsid sh -c 'echo $$; exec sleep 60' & read -r _ <begun";
    let fifo = workspace.project().join("begun");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    for signal in [None, Some(Signal::SIGTERM)] {
        let mut running = Running::start(script(&workspace, body));
        let mut lines = Vec::new();
        for _ in 0..4 {
            lines.push(running.line().await);
        }
        lines.retain(|line| line != "ignoring");
        let pids: Vec<_> = lines.iter().map(|line| Pid::from_raw(line.parse().expect("a process id"))).collect();
        let [plain, ignoring, daemon] = pids[..] else { panic!("{pids:?}") };
        assert!(pids.iter().all(|pid| exists(*pid)));
        match signal {
            // The command ends by itself.
            None => std::fs::write(&fifo, "\n").expect("written"),
            Some(signal) => running.signal(signal),
        }
        let status = soon("its end", running.sidecar.wait()).await.expect("a status");
        assert_eq!(status.code(), Some(if signal.is_some() { 143 } else { 0 }));
        assert!(!exists(plain) && !exists(ignoring), "{signal:?}");
        assert!(exists(daemon), "{signal:?}");
        kill(daemon, Signal::SIGKILL).expect("sent");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_command_has_the_limits_and_signals_of_the_shell() {
    let workspace = Workspace::new().await;
    let shown =
        "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; grep -E '^(SigBlk|SigIgn):' /proc/self/status | cut -c 17-";
    let sidecar = workspace.sidecar(&[]);
    for before in ["", "ulimit -Sn 500; ulimit -Sc 0;", "ulimit -Sn 100; ulimit -Hn 1000;", "trap '' HUP INT;"] {
        let mut shells = ["", "\"$0\" run --no-intercept -- "].map(|prefix| {
            let mut shell = isolated("sh", workspace.home.path());
            shell
                .args(["-c", &format!("{before} {prefix}sh -c \"$1\"")])
                .arg(sidecar.as_std().get_program())
                .arg(shown);
            shell.envs(sidecar.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
            shell.current_dir(workspace.project()).process_group(0);
            Some(shell)
        });
        let [direct, through_us] = [0, 1].map(|index| shells[index].take().expect("a shell"));
        let (direct, through_us) = (run(direct).await, run(through_us).await);
        assert_eq!(direct.stdout.lines().count(), 6, "{direct:?}");
        assert_eq!(direct.stdout, through_us.stdout, "{before} {}", through_us.stderr);
    }
}

#[tokio::test]
async fn control_c_in_a_terminal_reaches_only_the_command() {
    let workspace = Workspace::new().await;
    let mut terminal = Terminal::like(&listener(&workspace)).await;
    terminal.enter(&shell_line(&listener(&workspace))).await;
    terminal.sees_a_number().await;
    for (key, signal) in [("\x03", "SIGINT"), ("\x1c", "SIGQUIT"), ("\x03", "SIGINT")] {
        terminal.press(key).await;
        let before = terminal.sees(signal).await;
        assert_eq!(before.matches("got").count(), 1, "{before:?}");
    }
    // If `run` had received them, the second SIGINT would have killed the command.
    terminal.press("\x1a").await;
    terminal.sees("Stopped").await;
    terminal.enter("kill -USR2 %1; fg").await;
    terminal.sees("got SIGUSR2").await;
    assert_eq!(terminal.code().await, 5);
    terminal.close().await;
}

#[tokio::test]
async fn the_command_has_the_terminal_and_the_shell_gets_it_back() {
    let workspace = Workspace::new().await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    // Only a foreground process may change the terminal's settings.
    let line = shell_line(&script(&workspace, "stty -echo && read -r line && echo \"read $line\""));
    for word in ["a", "b", "c"] {
        terminal.enter(&line).await;
        terminal.enter(word).await;
        terminal.sees(&format!("read {word}\r\n")).await;
        assert_eq!(terminal.code().await, 0);
    }
    // A non-interactive shell does not take the terminal back by itself.
    let line = shell_line(&script(&workspace, "exit 3"));
    let lines = format!("{line}; echo \"code $?\"; read -r line; echo \"after $line\"");
    terminal.enter(&format!("sh -c '{}'", lines.replace('\'', "'\\''"))).await;
    terminal.sees("code 3").await;
    terminal.enter("it").await;
    terminal.sees("after it").await;
    terminal.close().await;
}

#[tokio::test]
async fn a_background_command_waits_for_the_terminal() {
    let workspace = Workspace::new().await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    let line = shell_line(&script(&workspace, "echo begun; read -r line; echo \"read $line\""));
    terminal.enter(&format!("{line} &")).await;
    terminal.sees("begun").await;
    terminal.enter("wait").await;
    terminal.enter("jobs -s").await;
    terminal.sees("Stopped").await;
    terminal.enter("fg").await;
    terminal.enter("typed").await;
    terminal.sees("read typed").await;
    assert_eq!(terminal.code().await, 0);
    terminal.close().await;
}

#[tokio::test]
async fn in_a_pipeline_the_other_commands_have_the_terminal_too() {
    let workspace = Workspace::new().await;
    let mut terminal = Terminal::like(&workspace.sidecar(&[])).await;
    let line = shell_line(&script(&workspace, "echo piped; exec sleep 60"));
    let pager = "sh -c 'read -r line; read -r key </dev/tty; echo \"$line $key\"; cat'";
    terminal.enter(&format!("{line} | {pager}")).await;
    terminal.enter("key").await;
    terminal.sees("piped key").await;
    terminal.press("\x03").await;
    terminal.enter("echo ${PIPESTATUS[0]}").await;
    terminal.sees("130\r\n").await;
    terminal.close().await;
}
