//! Group L: secrets leave the process only towards upstream and the app that requested them.

use std::fs;
use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;

use crate::support::http::{exchange, raw, token_head};
use crate::support::process::assert_no_slice_of;
use crate::support::scripted::{Then, answer};
use crate::support::soon;

use super::contract::{Sidecar, Start, fresh_jwt, json_answer, jwt, start};
use super::token_life::UNAUTHORIZED;

const THEIRS: &str = "CANARYBODY-of-a-third-party-0123456789";

/// A shell command that enables core dumps, if possible.
const WITH_CORES: [&str; 2] = ["-c", "ulimit -c unlimited 2>&-; exec \"$0\" \"$@\""];

/// Causes the failures of other tests in one process: malformed lines, invalid tokens, upstream's pages, truncated
/// answers, a rejected token, a miss and a hit.
async fn troubles(mut s: Sidecar) -> String {
    let request = s.req();
    s.pass(request.clone()).await;
    assert_eq!(request.send().await.status, 200);
    s.ask(&format!("{{{THEIRS:?}:1,{THEIRS:?}:2}}")).send().await;
    let page = format!("<script>{THEIRS}</script>");
    for says in [
        answer(500, "Content-Type: text/html\r\n", &page),
        answer(200, "Content-Type: text/html\r\n", &page),
        answer(302, &format!("Location: http://evil.example/{THEIRS}\r\n"), ""),
        json_answer(401, "", UNAUTHORIZED),
        json_answer(403, "", &format!(r#"{{"error":{{"code":"{THEIRS}","message":"{THEIRS}"}}}}"#)),
        json_answer(429, &format!("Retry-After: {THEIRS}\r\n"), UNAUTHORIZED),
    ] {
        s.m.say(says, Then::Keep);
        s.req().send().await;
    }
    s.m.say(format!("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{{\"token\":\"{THEIRS}"), Then::Close);
    s.req().send().await;
    s.req().header("authorization", &format!("Bearer {THEIRS}")).header("cookie", THEIRS).send().await;

    let mut secrets = vec![THEIRS.to_owned()];
    let unsigned = format!("eyJhbGciOiJub25lIn0{}", &s.j0[s.j0.find('.').expect("parts")..]);
    for value in [unsigned, jwt(|claims| claims["exp"] = "soon".into()), format!("${}", fresh_jwt()), fresh_jwt()] {
        let lines = b"this is bad\nA=it's\nB=\"open\nD=\xe9\n";
        fs::write(s.env_path(), [&lines[..], format!("VERCEL_OIDC_TOKEN={value}\n").as_bytes()].concat())
            .expect("written");
        s.serving.signal(Signal::SIGHUP);
        secrets.push(value);
    }
    s.serving.wait_for_log("token refreshed").await;
    s.assert_uses(&secrets[4]).await;
    s.leaks_nothing(&secrets.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test]
async fn tL01_leaks_no_secret_at_the_default_log_level() {
    let shown = troubles(start().await).await;
    assert!(shown.contains("upstream_invalid_response") && shown.contains("bad_json"), "there was much to see");
}

#[tokio::test]
async fn tL02_leaks_no_secret_at_any_log_level() {
    let prepared = Start::new().await.args(&["-vv", "--log-level", "trace"]);
    let shown = troubles(prepared.env("RUST_LOG", "trace").env("RUST_BACKTRACE", "full").serve().await).await;
    assert!(shown.contains("upstream_invalid_response"), "there was much to see");
}

#[tokio::test]
async fn tL04_does_not_log_a_body_that_upstream_echoes() {
    let s = start().await;
    let body =
        format!(r#"{{"subject":{{"type":"token","token":"{THEIRS}"}},"additionalClaims":{{"{THEIRS}":"{THEIRS}"}}}}"#);
    s.m.say(json_answer(400, "", &body), Then::Keep);
    let reply = s.ask(&body).send().await;
    assert_eq!((reply.status, reply.text()), (400, body.clone()));
    s.leaks_nothing(&[THEIRS, &body]).await;
}

#[tokio::test]
async fn tL05_writes_no_control_characters_and_one_line_for_a_refusal() {
    let token = jwt(|claims| claims["project"] = "\x1b]0;pwn\x07".into());
    let mut s = Start::new().await.env_file(format!("VERCEL_OIDC_TOKEN={token}\n")).serve().await;
    s.j0 = token;
    let head = |host: &str| format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let _ = raw(s.addr, head("\x1b]0;pwn\x07").as_bytes()).await;
    let refused = [
        s.req().target("/v1/connect/token/%1b%5b31m"),
        s.req().target("/%1b%5b31m%0aerror"),
        s.req().header("host", "evil%1b.example"),
        s.req().header("host", "evil.example"),
    ];
    let count = refused.len();
    for request in refused {
        assert!(request.send().await.status >= 400);
    }
    let traced = token_head("1.1", "X-Request-Id: \x1b[31m\r\nConnection: close\r\nContent-Length: 0\r\n");
    assert!(exchange(s.addr, &traced).await.iter().all(|reply| reply.status == 400), "no value has that");
    s.pass(s.req().header("user-agent", "a\tb").header("x-request-id", "a\tb")).await;
    assert!(s.m.received()[0].values("x-request-id").is_empty());
    s.m.say(json_answer(400, "", r#"{"error":{"code":"\u001b[31m","message":"\u001b[31m"}}"#), Then::Keep);
    assert_eq!(s.req().send().await.status, 400);
    let log = s.serving.stop().await.stderr;
    assert!(log.contains("pwn"), "there was something to escape: {log}");
    assert!(!log.contains('\x1b') && !log.contains('\x07'), "{log:?}");
    let lines = log.lines().filter(|line| line.contains("status=4")).count();
    assert_eq!(lines, count + 1, "those, and upstream's: {log}");
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tL06_has_no_token_in_arguments_or_environment_and_no_core_dumps() {
    let s = Start::new().await.through("sh", &WITH_CORES).serve().await;
    let proc = |file: &str| fs::read(format!("/proc/{}/{file}", s.pid()));
    let limits = String::from_utf8(proc("limits").expect("limits")).expect("text");
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(line.split_whitespace().nth(4), Some("0"), "{line}");
    let mut shown = proc("cmdline").expect("arguments");
    // Only root may read it.
    shown.extend(proc("environ").unwrap_or_default());
    let status = fs::metadata(format!("/proc/{}/environ", s.pid())).expect("it runs");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&status), 0, "closed to other processes of the user");
    assert_no_slice_of([s.j0.as_str(), &s.key()], &String::from_utf8_lossy(&shown));
}

#[tokio::test]
async fn tL08_dumps_no_core_however_it_dies() {
    let mut s = Start::new().await.through("sh", &WITH_CORES).serve().await;
    s.pass(s.req()).await;
    s.serving.signal(Signal::SIGABRT);
    let status = soon("its end", s.serving.child.wait()).await.expect("a status");
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));
    let names = fs::read_dir(&s.project).expect("a directory").map(|entry| entry.expect("an entry").file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with("core")));
}
