//! The command of `run` as a job: the terminal is its own, signals reach it once, its exit code is ours, and nothing of it
//! stays behind.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;

use crate::support::desk::Desk;
use crate::support::process::{Running, run};
use crate::support::soon;
use crate::support::terminal::Terminal;

/// `run -- sh -c SCRIPT`.
fn script(desk: &Desk, script: &str) -> Command {
    let mut command = desk.sidecar(&["run", "--no-intercept", "--", "sh", "-c", script]);
    // Not in the foreground of the terminal that these tests may run in.
    command.process_group(0);
    command
}

/// A command as one would type it.
fn shell_line(command: &Command) -> String {
    let command = command.as_std();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| format!("'{}'", word.to_str().expect("text").replace('\'', "'\\''")));
    quoted.collect::<Vec<_>>().join(" ")
}

fn is_there(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

#[tokio::test]
async fn its_exit_code_is_ours() {
    let desk = Desk::new().await;
    for (body, code) in
        [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
    {
        let ended = run(script(&desk, body)).await;
        assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(code), "", ""), "{body}");
    }
}

#[tokio::test]
async fn a_command_that_cannot_be_run_is_told_as_shells_do_with_what_to_do() {
    let desk = Desk::new().await;
    std::fs::write(desk.project().join("script"), "#!/bin/sh\n").expect("written");
    for (program, code, advice) in [
        ("no-such-command", 127, "could not find no-such-command on PATH"),
        ("./none", 127, "it is not there"),
        ("./script", 126, "`chmod +x`"),
        ("/", 126, "not an executable file"),
    ] {
        let ended = run(desk.sidecar(&["run", "--no-intercept", "--", program])).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{program}");
        assert!(ended.stderr.contains(advice) && ended.stderr.lines().count() == 1, "{program}: {}", ended.stderr);
    }
    let nothing = run(desk.sidecar(&["run"])).await;
    assert_eq!(nothing.code, Some(2), "{}", nothing.stderr);
}

#[tokio::test]
async fn stdin_and_arguments_reach_it_untouched_whatever_they_look_like() {
    let desk = Desk::new().await;
    let mut command = desk.sidecar(&[
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
        .stdin(Stdio::from(std::fs::File::open(desk.project().join(".env.local")).expect("a file")));
    let ended = run(command).await;
    assert_eq!(ended.stdout, std::fs::read_to_string(desk.project().join(".env.local")).expect("text"));
    assert_eq!(ended.stderr, "<-v><--><--port><>");
}

/// A server that starts daemons would fill the table of processes otherwise.
#[tokio::test]
async fn its_orphans_are_waited_for_while_it_goes_on() {
    let desk = Desk::new().await;
    let line = "(sh -c 'echo $$ > id' &); while [ ! -s id ]; do :; done; while [ -e /proc/$(cat id) ]; do :; done";
    let ended = run(desk.sidecar(&["run", "--no-intercept", "--", "sh", "-c", line])).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

/// Says which signals it gets, and ends at SIGUSR2.
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

fn listener(desk: &Desk) -> Command {
    let mut command = desk.sidecar(&["run", "--no-intercept", "--", "python3", "-c", LISTENER]);
    command.process_group(0);
    command
}

#[tokio::test]
async fn signals_that_reach_us_reach_it_once() {
    let desk = Desk::new().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1] {
        let mut running = Running::start(listener(&desk));
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
async fn a_second_signal_ends_a_command_that_does_not_heed_the_first() {
    let desk = Desk::new().await;
    for (first, second) in [(Signal::SIGTERM, Signal::SIGTERM), (Signal::SIGINT, Signal::SIGTERM)] {
        let mut running = Running::start(listener(&desk));
        running.pid().await;
        running.signal(first);
        running.line().await;
        running.signal(second);
        let ended = running.end().await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(137), ""));
    }
}

#[tokio::test]
async fn a_command_that_does_not_heed_a_signal_has_ten_seconds() {
    let desk = Desk::new().await;
    // The terminal is gone, and so is whoever could ask twice.
    let mut running = Running::start(listener(&desk));
    running.pid().await;
    let sent = Instant::now();
    running.signal(Signal::SIGHUP);
    running.line().await;
    // This ends nothing, and takes nothing off.
    running.signal(Signal::SIGUSR1);
    assert_eq!(running.end().await.code, Some(137));
    let took = sent.elapsed();
    assert!(took >= Duration::from_secs(10), "{took:?}");
}

#[tokio::test]
async fn a_stopped_command_is_ended_too() {
    let desk = Desk::new().await;
    let mut running = Running::start(script(&desk, "echo $$; exec sleep 60"));
    let pid = running.pid().await;
    kill(pid, Signal::SIGSTOP).expect("sent");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.end().await.code, Some(143));
}

#[tokio::test]
async fn what_it_leaves_behind_in_its_group_is_ended_and_what_left_its_group_is_not() {
    let desk = Desk::new().await;
    let body = "sleep 60 & echo $!; (trap '' TERM; echo ignoring; sleep 60) & echo $!; setsid sh -c 'echo $$; exec sleep 60' & read -r _ <begun";
    let fifo = desk.project().join("begun");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    for signal in [None, Some(Signal::SIGTERM)] {
        let mut running = Running::start(script(&desk, body));
        let mut lines = Vec::new();
        for _ in 0..4 {
            lines.push(running.line().await);
        }
        lines.retain(|line| line != "ignoring");
        let pids: Vec<_> = lines.iter().map(|line| Pid::from_raw(line.parse().expect("a process id"))).collect();
        let [plain, ignoring, daemon] = pids[..] else { panic!("{pids:?}") };
        assert!(pids.iter().all(|pid| is_there(*pid)));
        match signal {
            // Its end comes by itself.
            None => std::fs::write(&fifo, "\n").expect("written"),
            Some(signal) => running.signal(signal),
        }
        let status = soon("its end", running.sidecar.wait()).await.expect("a status");
        assert_eq!(status.code(), Some(if signal.is_some() { 143 } else { 0 }));
        assert!(!is_there(plain) && !is_there(ignoring), "{signal:?}");
        assert!(is_there(daemon), "{signal:?}");
        kill(daemon, Signal::SIGKILL).expect("sent");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn it_has_the_limits_and_the_signals_that_it_would_have_without_us() {
    let desk = Desk::new().await;
    let shown =
        "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; grep -E '^(SigBlk|SigIgn):' /proc/self/status | cut -c 17-";
    let sidecar = desk.sidecar(&[]);
    for before in ["", "ulimit -Sn 500; ulimit -Sc 0;", "ulimit -Sn 100; ulimit -Hn 1000;", "trap '' HUP INT;"] {
        let mut shells = ["", "\"$0\" run --no-intercept -- "].map(|prefix| {
            let mut shell = crate::support::process::isolated("sh", desk.home.path());
            shell
                .args(["-c", &format!("{before} {prefix}sh -c \"$1\"")])
                .arg(sidecar.as_std().get_program())
                .arg(shown);
            shell.envs(sidecar.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
            shell.current_dir(desk.project()).process_group(0);
            Some(shell)
        });
        let [direct, through_us] = [0, 1].map(|index| shells[index].take().expect("a shell"));
        let (direct, through_us) = (run(direct).await, run(through_us).await);
        assert_eq!(direct.stdout.lines().count(), 6, "{direct:?}");
        assert_eq!(direct.stdout, through_us.stdout, "{before} {}", through_us.stderr);
    }
}

#[tokio::test]
async fn control_c_in_a_terminal_reaches_the_command_once_and_not_us() {
    let desk = Desk::new().await;
    let mut terminal = Terminal::like(&listener(&desk)).await;
    terminal.enter(&shell_line(&listener(&desk))).await;
    terminal.sees_a_number().await;
    for (key, signal) in [("\x03", "SIGINT"), ("\x1c", "SIGQUIT"), ("\x03", "SIGINT")] {
        terminal.press(key).await;
        let before = terminal.sees(signal).await;
        assert_eq!(before.matches("got").count(), 1, "{before:?}");
    }
    // Had we heard of it, the second SIGINT would have been its end.
    terminal.press("\x1a").await;
    terminal.sees("Stopped").await;
    terminal.enter("kill -USR2 %1; fg").await;
    terminal.sees("got SIGUSR2").await;
    assert_eq!(terminal.code().await, 5);
    terminal.close().await;
}

#[tokio::test]
async fn the_terminal_is_the_commands_from_the_start_and_the_shells_at_the_end() {
    let desk = Desk::new().await;
    let mut terminal = Terminal::like(&desk.sidecar(&[])).await;
    // To change its settings is refused to whoever is not in the foreground.
    let line = shell_line(&script(&desk, "stty -echo && read -r line && echo \"read $line\""));
    for word in ["a", "b", "c"] {
        terminal.enter(&line).await;
        terminal.enter(word).await;
        terminal.sees(&format!("read {word}\r\n")).await;
        assert_eq!(terminal.code().await, 0);
    }
    // A script's shell does not take it back by itself.
    let line = shell_line(&script(&desk, "exit 3"));
    let lines = format!("{line}; echo \"code $?\"; read -r line; echo \"after $line\"");
    terminal.enter(&format!("sh -c '{}'", lines.replace('\'', "'\\''"))).await;
    terminal.sees("code 3").await;
    terminal.enter("it").await;
    terminal.sees("after it").await;
    terminal.close().await;
}

#[tokio::test]
async fn started_in_the_background_it_waits_for_the_terminal_there() {
    let desk = Desk::new().await;
    let mut terminal = Terminal::like(&desk.sidecar(&[])).await;
    let line = shell_line(&script(&desk, "echo begun; read -r line; echo \"read $line\""));
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
async fn in_a_pipeline_the_other_parts_have_the_terminal_too() {
    let desk = Desk::new().await;
    let mut terminal = Terminal::like(&desk.sidecar(&[])).await;
    let line = shell_line(&script(&desk, "echo piped; exec sleep 60"));
    let pager = "sh -c 'read -r line; read -r key </dev/tty; echo \"$line $key\"; cat'";
    terminal.enter(&format!("{line} | {pager}")).await;
    terminal.enter("key").await;
    terminal.sees("piped key").await;
    terminal.press("\x03").await;
    terminal.enter("echo ${PIPESTATUS[0]}").await;
    terminal.sees("130\r\n").await;
    terminal.close().await;
}
