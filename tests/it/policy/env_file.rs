//! Group E: all forms of `.env.local`, and other files in its place.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Instant;

use tokio::process::Command;

use crate::support::process::{cpu_time, proc_status};
use crate::support::{env_file, fingerprint, write_private};

use super::contract::{Sidecar, Start, at_a_rate_of, fresh_jwt, jwt, ms, seconds, start, stated, within};

/// Sends 20 requests a second while the file is changed: all are answered, with the old token or the fresh one, and 2 s
/// after the change with the fresh one.
async fn rotates(change: impl AsyncFnOnce(&Path, &str)) {
    let s = start().await;
    let fresh = fresh_jwt();
    let asking = at_a_rate_of(20, 90, async |_| assert_eq!(s.req().send().await.status, 200));
    let changing = async {
        change(&s.env_path(), &env_file(&fresh)).await;
        Instant::now()
    };
    let ((), done) = tokio::join!(asking, changing);
    let bearer = |token: &str| format!("Bearer {token}");
    let mut first_fresh = None;
    for seen in s.m.received() {
        let is_fresh = seen.values("authorization") == [bearer(&fresh)];
        assert!(is_fresh || seen.values("authorization") == [bearer(&s.j0)], "half a token went out");
        assert!(is_fresh || first_fresh.is_none(), "the older one came back");
        first_fresh = first_fresh.or(is_fresh.then_some(seen.at));
    }
    let after = first_fresh.expect("the fresh one is used").saturating_duration_since(done);
    assert!(after < seconds(2), "after {after:?}");
}

/// Asserts that nothing is sent with this content of the file.
async fn refuses(content: &str) {
    let s = Start::new().await.env_file(content).serve().await;
    refused(&s).await;
}

async fn refused(s: &Sidecar) {
    let reply = s.deny(s.req(), 503, "oidc_token_invalid").await;
    assert!(reply.text().contains("vercel env pull"), "{}", reply.text());
}

fn assign(token: &str) -> String {
    format!("VERCEL_OIDC_TOKEN=\"{token}\"\n")
}

/// Asserts that the sidecar reports this code for whatever `put` creates instead of the file, and keeps running.
async fn survives(code: &str, put: impl FnOnce(&Path)) {
    let prepared = Start::new().await.without_env_file();
    put(&prepared.project.join(".env.local"));
    let s = prepared.serve().await;
    s.deny(s.req(), 503, code).await;
    let before = cpu_time(s.pid());
    stated(seconds(5)).await;
    let used = cpu_time(s.pid()).saturating_sub(before);
    assert!(used < ms(500), "{used:?} in 5 s");
    within(ms(200), "/healthz", s.healthy()).await;
    assert!(proc_status(s.pid(), "VmRSS") < 64 * 1024);
}

#[tokio::test]
async fn tE01_reads_the_form_that_the_vercel_cli_writes() {
    let s = Start::new().await.env_file("VERCEL_OIDC_TOKEN=\"{J0}\"").serve().await;
    s.pass(s.req()).await;
}

#[tokio::test]
async fn tE02_reads_every_common_form() {
    for content in [
        "VERCEL_OIDC_TOKEN={J0}\n",
        "VERCEL_OIDC_TOKEN='{J0}'\n",
        "export VERCEL_OIDC_TOKEN={J0}\n",
        "  VERCEL_OIDC_TOKEN = \"{J0}\"\n",
        "A=1\r\nVERCEL_OIDC_TOKEN=\"{J0}\"\r\nB=2\r\n",
        "A=1\rVERCEL_OIDC_TOKEN=\"{J0}\"\rB=2",
        "\u{feff}VERCEL_OIDC_TOKEN=\"{J0}\"\n",
        "VERCEL_OIDC_TOKEN=\"{J0}\" # c\n",
        "VERCEL_OIDC_TOKEN={J0}",
    ] {
        let s = Start::new().await.env_file(content).serve().await;
        s.pass(s.req()).await;
    }
}

#[tokio::test]
async fn tE03_uses_a_truncated_and_rewritten_file_within_2_s() {
    let mut s = start().await;
    let fresh = fresh_jwt();
    s.write_env(&fresh);
    within(seconds(2), "the rotation", s.serving.wait_for_log("token refreshed")).await;
    s.assert_uses(&fresh).await;
}

pub async fn tE04_never_uses_a_partially_written_token() {
    rotates(async |path, content| {
        let mut file = File::create(path).expect("truncated");
        let middle = content.len() - 100;
        stated(ms(500)).await;
        file.write_all(&content.as_bytes()[..middle]).expect("written");
        stated(ms(500)).await;
        file.write_all(&content.as_bytes()[middle..]).expect("written");
    })
    .await;
}

pub async fn tE05_no_request_fails_during_a_rename_or_a_recreate() {
    let renamed = rotates(async |path, content| {
        write_private(&path.with_extension("tmp"), content);
        fs::rename(path.with_extension("tmp"), path).expect("renamed");
    });
    let made_anew = rotates(async |path, content| {
        fs::remove_file(path).expect("removed");
        stated(seconds(1)).await;
        write_private(path, content);
    });
    tokio::join!(renamed, made_anew);
}

#[tokio::test]
async fn tE07_accepts_an_editors_way_of_saving() {
    let mut s = start().await;
    let (fresh, dir) = (fresh_jwt(), s.project.clone());
    write_private(&dir.join("4913"), "");
    fs::remove_file(dir.join("4913")).expect("removed");
    write_private(&dir.join(".env.local.swp"), "swap");
    fs::rename(s.env_path(), dir.join(".env.local~")).expect("renamed");
    write_private(&s.env_path(), &env_file(&fresh));
    fs::remove_file(dir.join(".env.local~")).expect("removed");
    for n in 0..50 {
        fs::write(dir.join(".env.local.swp"), n.to_string()).expect("written");
    }
    fs::remove_file(dir.join(".env.local.swp")).expect("removed");
    within(seconds(2), "the rotation", s.serving.wait_for_log("token refreshed")).await;
    s.assert_uses(&fresh).await;
    let log = s.serving.stop().await.stderr;
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[tokio::test]
async fn tE08_ignores_malformed_other_lines() {
    let prepared = Start::new().await;
    let lines = b"this is bad\nA=it's\nB=\"open\nC=C:\\Users\nD=\xe9\nMY-KEY=1\n";
    let content = [&lines[..], assign(&prepared.j0).as_bytes(), b"E='\n"].concat();
    let s = prepared.env_file(content).serve().await;
    s.pass(s.req()).await;
}

#[tokio::test]
async fn tE10_uses_the_last_of_two_assignments_with_one_warning() {
    let (first, last) = (fresh_jwt(), fresh_jwt());
    let mut s = Start::new().await.env_file(assign(&first) + &assign(&last)).serve().await;
    s.j0 = last;
    s.pass(s.req()).await;
    let log = s.serving.stop().await.stderr;
    assert_eq!(log.matches("more than once, the last one is used").count(), 1, "{log}");
}

#[tokio::test]
async fn tE11_expands_nothing() {
    // It would be a valid token.
    let secret = fresh_jwt();
    for value in ["$SECRET", "\"${SECRET}\"", "$(echo $SECRET)", "`echo $SECRET`"] {
        let prepared = Start::new().await.env_file(format!("VERCEL_OIDC_TOKEN={value}\n"));
        let s = prepared.env("SECRET", &secret).serve().await;
        refused(&s).await;
        s.leaks_nothing(&[&secret]).await;
    }
}

#[tokio::test]
async fn tE13_never_sends_what_is_not_a_vercel_token() {
    let good = fresh_jwt();
    let (header, rest) = good.split_once('.').expect("parts");
    let without_exp = jwt(|claims| claims["exp"] = serde_json::Value::Null);
    for value in [
        format!("eyJhbGciOiJub25lIn0.{rest}"),
        rest.to_owned(),
        "a.b.c".into(),
        without_exp,
        jwt(|claims| claims["iss"] = "https://oidc.vercel.com.evil.example".into()),
        format!("{header}.{rest}{}", "x".repeat(20 * 1024)),
        format!("{good}\\r\\nX: 1"),
        "[SENSITIVE]".into(),
    ] {
        refuses(&assign(&value)).await;
    }
}

#[tokio::test]
async fn tE15_uses_a_file_that_is_created_later() {
    let mut s = Start::new().await.without_env_file().serve().await;
    let reply = s.deny(s.req(), 503, "oidc_token_missing").await;
    assert!(reply.text().contains("vercel env pull"), "{}", reply.text());
    write_private(&s.env_path(), &env_file(&s.j0));
    within(seconds(2), "the token", s.serving.wait_for_log("loaded from")).await;
    s.pass(s.req()).await;
}

pub async fn tE16_drops_a_token_missing_for_10_s_and_its_cache() {
    let s = start().await;
    let cached = s.req();
    s.pass(cached.clone()).await;
    fs::remove_file(s.env_path()).expect("removed");
    assert_eq!(cached.clone().send().await.status, 200, "not at once");
    stated(seconds(20)).await;
    s.deny(s.req(), 503, "oidc_token_missing").await;
    s.deny(cached, 503, "oidc_token_missing").await;
    s.healthy().await;
}

pub async fn tE18_survives_any_other_kind_of_file() {
    tokio::join!(
        survives("oidc_token_invalid", |path| fs::create_dir(path).expect("a directory")),
        survives("oidc_token_invalid", |path| {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
        }),
        survives("oidc_token_invalid", |path| symlink("/dev/zero", path).expect("a link")),
        survives("oidc_token_missing", |path| symlink("nowhere", path).expect("a link")),
        survives("oidc_token_invalid", |path| symlink(".env.local", path).expect("a link")),
    );
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tE19_does_not_read_a_huge_file() {
    let prepared = Start::new().await;
    let file = File::create(prepared.project.join(".env.local")).expect("a file");
    file.set_len(64 << 20).expect("grown");
    let s = prepared.serve().await;
    s.deny(s.req(), 503, "oidc_token_invalid").await;
    assert!(proc_status(s.pid(), "VmRSS") < 64 * 1024);
}

#[tokio::test]
async fn tE21_warns_of_a_readable_file_and_refuses_a_writable_one() {
    let readable = Start::new().await;
    let chmod = |s: &Start, mode| {
        fs::set_permissions(s.project.join(".env.local"), Permissions::from_mode(mode)).expect("a mode");
    };
    chmod(&readable, 0o644);
    let mut s = readable.serve().await;
    s.pass(s.req()).await;
    let fresh = fresh_jwt();
    s.write_env(&fresh);
    s.serving.wait_for_log("token refreshed").await;
    s.assert_uses(&fresh).await;
    let log = s.serving.stop().await.stderr;
    assert_eq!(log.lines().filter(|line| line.contains("chmod 600")).count(), 1, "{log}");
    let writable = Start::new().await;
    chmod(&writable, 0o666);
    let s = writable.serve().await;
    let reply = s.deny(s.req(), 503, "oidc_token_invalid").await;
    assert!(reply.text().contains("everybody may write to it"), "{}", reply.text());
}

#[tokio::test]
#[cfg_attr(not(target_os = "linux"), ignore = "looks at the process through /proc")]
async fn tE23_polls_without_file_system_events() {
    // A namespace of its own can be limited to no inotify instances without affecting other processes.
    let own_namespace = ["--user", "--map-root-user"];
    let may = Command::new("unshare").args(own_namespace).arg("true").output().await;
    if may.is_ok_and(|output| output.status.success()) {
        let no_inotify = "echo 0 > /proc/sys/user/max_inotify_instances && exec \"$0\" \"$@\"";
        let args = [&own_namespace[..], &["sh", "-c", no_inotify]].concat();
        let mut s = Start::new().await.through("unshare", &args).serve().await;
        s.pass(s.req()).await;
        for _ in 0..2 {
            let fresh = fresh_jwt();
            s.write_env(&fresh);
            within(seconds(8), "the rotation", s.serving.wait_for_log(&fingerprint(&fresh))).await;
            s.assert_uses(&fresh).await;
        }
        let log = s.serving.stop().await.stderr;
        assert_eq!(log.matches("no file system events").count(), 1, "{log}");
    }
}

#[tokio::test]
async fn tE25_reports_utf_16() {
    let prepared = Start::new().await;
    let text = assign(&prepared.j0);
    let wide: Vec<u8> = std::iter::once(0xFEFF).chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let s = prepared.env_file(wide).serve().await;
    let reply = s.deny(s.req(), 503, "oidc_token_invalid").await;
    assert!(reply.text().contains("UTF-16"), "{}", reply.text());
    s.healthy().await;
}
