//! Clock jumps and sleep: what stays cached, what expires, what is reported (docs/configuration.md section 3). The
//! sidecar uses the wall clock; its timers stop during sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use connect_sidecar::emulator::fault::Fault;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options};
use connect_sidecar::os::clock::{Clock, Timestamp};

use crate::support::http::Request;
use crate::support::moved_clock::MovedClock;
use crate::support::process::{self, Serving};
use crate::support::scripted::{Scripted, answer};
use crate::support::{SLACK, Scene, Stage, env_file, write_private};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const APP: &str = r#"{"subject":{"type":"app"}}"#;

fn lines_about_the_token(stage: &Stage) -> usize {
    stage.logs.count("the OIDC token of")
}

#[tokio::test]
async fn a_clock_jump_of_a_day_is_corrected_before_anything_is_reported_or_dropped() {
    for is_ahead in [true, false] {
        let stage = Scene::new().start().await;
        let token = stage.slack_token().await;
        let (right, fingerprint) = (stage.clock.local(), stage.status().await["oidc"]["fingerprint"].clone());
        stage.clock.set(if is_ahead { right.plus(DAY) } else { right.minus(DAY) });
        // Upstream is queried in the background, without a request.
        let off = if is_ahead { "1 day ahead of" } else { "1 day behind" };
        stage.logs.wait_for(&format!("this machine's clock is {off} {}'s", stage.emulator.url())).await;

        let reply = stage.token(APP).send().await;
        // A token is not kept beyond its expiry by the machine's own clock, even if that is wrong.
        let (status, age) = match is_ahead {
            true => ("connect-sidecar; fwd=uri-miss", None),
            false => ("connect-sidecar; hit; ttl=3570", Some("0")),
        };
        assert_eq!((reply.cache_status(), reply.header("age"), reply.status), (status, age, 200), "{off}");
        assert_eq!(reply.token() == token, !is_ahead, "{off}");
        let oidc = &stage.status().await["oidc"];
        assert_eq!((&oidc["state"], &oidc["fingerprint"]), (&"valid".into(), &fingerprint), "{off}");
        assert_eq!(lines_about_the_token(&stage), 0, "{off}: {:?}", stage.logs.lines());

        stage.clock.set(right);
        assert_eq!(stage.token(r#"{"scopes":["x"]}"#).send().await.status, 200);
        stage.logs.wait_for("agrees with").await;
        if !is_ahead {
            assert_eq!(stage.token(APP).send().await.cache_status(), "connect-sidecar; hit; ttl=3570", "{off}");
        }
        assert_eq!(lines_about_the_token(&stage), 0, "{off}: {:?}", stage.logs.lines());
    }
}

/// The number of clock queries that upstream has received.
fn clock_queries(stage: &Stage) -> usize {
    stage.emulator.received().iter().filter(|request| request.method == "HEAD").count()
}

#[tokio::test]
async fn each_clock_jump_is_checked_at_once() {
    let stage = Scene::new().start().await;
    let right = stage.clock.local();
    let ask = async |name: &str| stage.token(&format!(r#"{{"scopes":["{name}"]}}"#)).send().await;
    for (jump, wrong) in [
        ("back", right.minus(2 * HOUR)),
        ("further back", right.minus(5 * HOUR)),
        ("ahead", right.plus(13 * HOUR)),
        ("back again", right.minus(HOUR)),
    ] {
        let before = clock_queries(&stage);
        stage.clock.set(wrong);
        let reply = ask(jump).await;
        assert_eq!(reply.status, 200, "{jump}: {}", reply.text());
        assert!(clock_queries(&stage) > before, "{jump}");
    }
    // Without another jump, upstream is not queried again within a minute.
    stage.emulator_clock.set(right.plus(13 * HOUR));
    stage.clock.set(right.plus(13 * HOUR));
    assert_eq!(ask("over").await.code(), "oidc_token_expired");
    let before = clock_queries(&stage);
    for _ in 0..3 {
        assert_eq!(ask("over").await.code(), "oidc_token_expired");
    }
    assert_eq!(clock_queries(&stage), before);
}

/// Header lines of a response, by its number.
type Lines = Box<dyn Fn(usize) -> String + Send + Sync>;

/// An upstream with these header lines and this expiry of tokens.
async fn upstream_with(lines: Lines, ends_at_ms: u64) -> Scripted {
    let upstream = Scripted::start().await;
    upstream.otherwise(move |request, number| {
        let (lines, is_head) = (lines(number), request.line().starts_with("HEAD"));
        let body = if is_head { String::new() } else { format!(r#"{{"token":"t{number}","expiresAt":{ends_at_ms}}}"#) };
        answer(200, &format!("content-type: application/json\r\n{lines}"), &body).into()
    });
    upstream
}

fn date(at: Timestamp) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(at.as_millis());
    format!("date: {}\r\n", httpdate::fmt_http_date(at))
}

#[tokio::test]
async fn no_date_header_moves_the_clock_without_limit_or_extends_a_lifetime() {
    let now = Timestamp::from_millis(1_900_000_000_000);
    let minute = Duration::from_secs(60);
    let one_of_three = move |number: usize| if number % 3 == 1 { date(now.plus(2 * DAY)) } else { date(now) };
    let cases: [(&str, Lines, i64); 9] = [
        ("1970", Box::new(|_| date(Timestamp::from_millis(0))), 0),
        ("long ago", Box::new(move |_| date(now.minus(40 * DAY))), 0),
        ("long hence", Box::new(move |_| date(now.plus(3650 * DAY))), 0),
        ("9999", Box::new(|_| "date: Fri, 31 Dec 9999 23:59:59 GMT\r\n".into()), 0),
        ("no date", Box::new(|_| "date: yesterday\r\n".into()), 0),
        ("one wrong date among right ones", Box::new(one_of_three), 0),
        ("all different", Box::new(move |number| date(now.minus(DAY * number as u32))), 0),
        ("a copy", Box::new(move |_| date(now.minus(DAY)) + "age: 86400\r\n"), 0),
        ("a little behind", Box::new(move |_| date(now.minus(Duration::from_secs(50)))), -50_000),
    ];
    for (what, lines, offset_ms) in cases {
        let upstream = upstream_with(lines, now.plus(2 * minute).as_millis()).await;
        let stage = Scene::new().upstream(&upstream.url()).start().await;
        let ask = async |name: &str| stage.token(&format!(r#"{{"scopes":["{name}"]}}"#)).send().await;
        for name in ["a", "b", "c", "d", "e"] {
            let reply = ask(name).await;
            assert_eq!(reply.status, 200, "{what}: {}", reply.text());
            assert!(reply.cache_status().ends_with("stored; ttl=90"), "{what}: {}", reply.cache_status());
        }
        assert_eq!(stage.clock.offset_ms(), offset_ms, "{what}");
        stage.clock.advance(2 * minute);
        assert!(ask("a").await.cache_status().contains("fwd=uri-miss"), "{what}: it has expired");
    }
}

#[tokio::test]
async fn a_clock_jump_that_upstream_confirms_is_accepted() {
    let mut stage = Scene::new().start().await;
    stage.slack_token().await;
    let (here, there) = (stage.clock.local(), stage.emulator_clock.local());
    stage.pass(DAY);
    stage.logs.wait_for("expired 12 h ago").await;
    assert_eq!(stage.token(APP).send().await.code(), "oidc_token_expired");
    assert_eq!(stage.status().await["oidc"]["state"], "expired");

    // And back: the token is valid again, and nothing is reported twice.
    stage.clock.set(here);
    stage.emulator_clock.set(there);
    assert_eq!(stage.token(APP).send().await.status, 200);
    assert_eq!(stage.status().await["oidc"]["state"], "valid");
    stage.pass(DAY);
    assert_eq!(stage.token(APP).send().await.code(), "oidc_token_expired");
    assert_eq!(lines_about_the_token(&stage), 1, "{:?}", stage.logs.lines());
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    assert_eq!(stage.token(APP).send().await.status, 200);
}

#[tokio::test]
async fn after_13_hours_of_sleep_nothing_expired_is_served_and_a_fresh_token_is_used() {
    let mut stage = Scene::new().start().await;
    let old = stage.slack_token().await;
    stage.emulator.inject(Fault::rate_limited(Some("60")));
    let limited = r#"{"scopes":["limited"]}"#;
    assert_eq!(stage.token(limited).send().await.status, 429);

    // The timers have not advanced.
    stage.pass(13 * HOUR);
    let reply = stage.token(APP).send().await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "oidc_token_expired"));
    let message = "The OIDC token in .env.local expired 1 h ago. Run `vercel env pull`.";
    assert_eq!(reply.json()["error"]["message"], message);
    stage.logs.wait_for("expired 1 h ago, run `vercel env pull`").await;
    let status = stage.status().await;
    assert_eq!((&status["oidc"]["state"], &status["tokens"]), (&"expired".into(), &serde_json::json!([])));

    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let new = stage.token(APP).send().await;
    assert_ne!(new.token(), old);
    assert_eq!(new.cache_status(), "connect-sidecar; fwd=uri-miss; stored; ttl=3570");
    assert_eq!(stage.token(limited).send().await.status, 200, "the cached 429 has expired, too");
    assert_eq!(lines_about_the_token(&stage), 1, "{:?}", stage.logs.lines());
    assert_eq!(stage.logs.count("token refreshed, expires in 12 h"), 1);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_program_reports_the_expiry_within_15_s_of_waking_and_uses_a_fresh_token() {
    let home = tempfile::tempdir().expect("a directory");
    let slept = Arc::new(AtomicU32::new(0));
    let (ahead, machine) = (slept.clone(), Clock::system());
    let now = Arc::new(move || {
        UNIX_EPOCH + Duration::from_millis(machine.local().as_millis()) + HOUR * ahead.load(Ordering::Relaxed)
    });
    let emulator = Emulator::start(Options { now, ..Options::default() }).await.expect("an emulator");
    write_private(&home.path().join(".env.local"), &env_file(&emulator.oidc_token(HOUR)));
    let clock = MovedClock::new(home.path());
    let mut command = process::sidecar(home.path());
    command.args(["--port=0", "--upstream", &emulator.url()]);
    clock.of(&mut command);
    let mut sidecar = Serving::start(command).await;
    let ask = async |addr| Request::new(addr, "POST", SLACK).json(APP).send().await;
    let before = ask(sidecar.addr).await.token();

    clock.is_ahead("+13h");
    slept.store(13, Ordering::Relaxed);
    let woken = Instant::now();
    let refused = ask(sidecar.addr).await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "oidc_token_expired"), "{}", refused.text());
    assert!(refused.text().contains("expired 12 h ago"), "{}", refused.text());
    sidecar.wait_for_log("the OIDC token of acme/web expired 12 h ago").await;
    assert!(woken.elapsed() <= Duration::from_secs(16), "{:?}", woken.elapsed());

    write_private(&home.path().join(".env.local"), &env_file(&emulator.oidc_token(DEVELOPMENT_LIFE)));
    sidecar.wait_for_log("token refreshed, expires in 11 h 59 min").await;
    let after = ask(sidecar.addr).await;
    assert!(after.cache_status().starts_with("connect-sidecar; fwd=uri-miss; stored; ttl=35"), "{after:?}");
    assert_ne!(after.token(), before);
}
