//! Upstream faults: invalid responses never reach an app, a request that may have been received is never resent, and
//! the next request succeeds.

use std::time::Duration;

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use connect_sidecar::emulator::{Emulator, Options};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::support::forwarder::Forwarder;
use crate::support::http::{Reply, Request};
use crate::support::process::{self, Serving};
use crate::support::scripted::{Scripted, Then, good};
use crate::support::{
    SLACK, Scene, Stage, body, env_file, is_over, let_timers_pass, let_upstream_recover, soon, write_private,
};

const MISS: &str = "connect-sidecar; fwd=uri-miss; stored; ttl=3570";

fn answer_with(status: u16, body: &str, headers: &[(&'static str, &str)]) -> Fault {
    let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Fault::once(FaultKind::Answer { status, content_type: "text/html", body: body.into(), headers })
}

#[tokio::test]
async fn invalid_responses_become_errors_that_are_not_cached() {
    const PAGE: &str = "<html><script>CANARY</script></html>";
    const LARGE: usize = 2 * 1024 * 1024;
    let stage = Scene::new().start().await;
    let json = |body: &str| Fault::answer(200, "application/json", body);
    let invalid = |status| (502, "upstream_invalid_response", format!("(status {status})"));
    for (what, fault, (status, code, message), retry_after) in [
        ("a captive portal", Fault::answer(200, "text/html", PAGE), invalid(200), None),
        ("one that says it is JSON", json(PAGE), invalid(200), None),
        ("nothing", json(""), invalid(200), None),
        ("no content", Fault::answer(204, "application/json", ""), invalid(204), None),
        ("no object", json("[]"), invalid(200), None),
        ("text", json(r#""CANARY""#), invalid(200), None),
        ("a byte order mark", json("\u{feff}{}"), invalid(200), None),
        ("no number", json(r#"{"expiresAt":NaN}"#), invalid(200), None),
        ("more than one", json("{}{}"), invalid(200), None),
        ("too much", json(&format!(r#"{{"x":"{}"}}"#, "x".repeat(LARGE))), invalid(200), None),
        ("a cut answer", Fault::once(FaultKind::Truncate), invalid(200), None),
        ("a page with 400", Fault::answer(400, "text/html", PAGE), invalid(400), None),
        ("a page with 401", Fault::answer(401, "text/html", PAGE), invalid(401), None),
        ("a page with 404", Fault::answer(404, "text/html", PAGE), invalid(404), None),
        ("a page with 500", Fault::answer(500, "text/html", PAGE), invalid(500), None),
        ("nothing with 502", Fault::answer(502, "text/html", ""), invalid(502), None),
        (
            "a page with 503",
            answer_with(503, PAGE, &[("retry-after", "17")]),
            (503, "upstream_invalid_response", "(status 503)".into()),
            Some("17"),
        ),
        (
            "a page with 429",
            answer_with(429, PAGE, &[("retry-after", "7")]),
            (429, "upstream_invalid_response", "(status 429)".into()),
            Some("7"),
        ),
        ("a reset", Fault::once(FaultKind::Reset), (502, "upstream_invalid_response", "broke off".into()), None),
        ("a redirect", Fault::redirect("/CANARY"), (502, "upstream_redirect", "(307)".into()), None),
    ] {
        let before = stage.emulator.received().len();
        stage.emulator.inject(fault);
        let reply = stage.token(&body(what)).send().await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{what}");
        assert!(reply.text().contains(&message), "{what}: {}", reply.text());
        assert!(reply.text().contains(&stage.emulator.url()), "{what} names upstream: {}", reply.text());
        assert_eq!(reply.header("retry-after"), retry_after, "{what}");
        assert_eq!((reply.header("content-type"), reply.cache_status()), (Some("application/json"), "none"), "{what}");
        assert!(!format!("{reply:?}{:?}", stage.logs.lines()).contains("CANARY"), "{what}");
        assert_eq!(stage.emulator.received().len(), before + 1, "{what}: sent once");

        if status == 429 {
            stage.pass(Duration::from_secs(7));
        }
        stage.caught_up().await;
        let again = stage.token(&body(what)).send().await;
        assert_eq!((again.status, again.cache_status()), (200, MISS), "{what}: {}", again.text());
    }
}

#[tokio::test]
async fn a_429_without_json_is_held_like_any_other() {
    let stage = Scene::new().start().await;
    stage.emulator.inject(answer_with(429, "<html>", &[("retry-after", "7")]));
    assert_eq!(stage.token("{}").send().await.status, 429);
    stage.pass(Duration::from_secs(3));
    let repeated = stage.token("{}").send().await;
    assert_eq!((repeated.status, repeated.code().as_str()), (429, "upstream_invalid_response"));
    assert_eq!(repeated.header("retry-after"), Some("4"));
    assert_eq!(stage.emulator.received().len(), 1);
    assert_eq!(stage.status().await["upstream"]["errors"], 0, "not counted as a failure");
}

#[tokio::test]
async fn upstreams_errors_pass_through_unchanged() {
    let stage = Scene::new().start().await;
    let spelled = "{ \"error\" : {\"code\":\"c\",\"message\":\"m \\u00e9\", \"more\":[1.0]} }\n";
    for status in [400, 401, 402, 403, 404, 409, 418, 422, 429, 500, 502, 503, 504, 508] {
        let what = body(&status.to_string());
        let headers = [("retry-after", "7"), ("x-vercel-id", "v"), ("set-cookie", "CANARY"), ("location", "CANARY")];
        stage.emulator.inject(answer_with(status, spelled, &headers));
        let reply = stage.token(&what).send().await;
        assert_eq!((reply.status, reply.text().as_str()), (status, spelled));
        assert_eq!(reply.header("content-type"), Some("application/json"), "whatever upstream calls it");
        assert_eq!((reply.header("retry-after"), reply.header("x-vercel-id")), (Some("7"), Some("v")));
        assert_eq!(reply.header("sidecar-error"), None, "not the sidecar's own");
        assert!(!format!("{reply:?}").contains("CANARY"), "{reply:?}");
        stage.pass(Duration::from_secs(7));
        assert_eq!(stage.token(&what).send().await.cache_status(), MISS, "after {status}");
    }
}

#[tokio::test]
async fn token_answers_without_a_valid_expiry_pass_through_and_are_not_stored() {
    let stage = Scene::new().start().await;
    let deep = format!(r#"{{"token":"t","expiresAt":1900003600000,"x":{}{}}}"#, "[".repeat(50_000), "]".repeat(50_000));
    for odd in [
        r#"{"token":"t"}"#,
        r#"{"token":"t","expiresAt":null}"#,
        r#"{"token":"t","expiresAt":"1900003600000"}"#,
        r#"{"token":"t","expiresAt":1900003600}"#,
        r#"{"token":"t","expiresAt":1899999999999}"#,
        r#"{"token":"t","expiresAt":1900000030000}"#,
        r#"{"token":"t","expiresAt":-1}"#,
        r#"{"token":"t","expiresAt":1e400}"#,
        r#"{"token":"t","expiresAt":-1e400}"#,
        r#"{"token":"","expiresAt":1900003600000}"#,
        r#"{"token":1,"expiresAt":1900003600000}"#,
        r#"{"token":["t"],"expiresAt":1900003600000}"#,
        r#"{"expiresAt":1900003600000}"#,
        r#"{"error":"odd with 200"}"#,
        "{}",
        &deep,
    ] {
        for _ in 0..2 {
            stage.emulator.inject(Fault::answer(200, "application/json", odd));
            let reply = stage.token("{}").send().await;
            let shown = &odd[..odd.len().min(80)];
            assert_eq!((reply.status, reply.cache_status()), (200, "connect-sidecar; fwd=uri-miss"), "{shown}");
            assert!(reply.text() == odd, "{shown}");
        }
    }
    for huge in ["9007199254740993", "1e300", "1900003600000.5"] {
        let body = body(huge);
        let odd = format!(r#"{{"token":"t","expiresAt":{huge}}}"#);
        stage.emulator.inject(Fault::answer(200, "application/json", &odd));
        assert_eq!(stage.token(&body).send().await.text(), odd);
        let hit = stage.token(&body).send().await;
        assert!(hit.cache_status().contains("; hit; "), "{huge} is a number: {}", hit.cache_status());
        assert_eq!(hit.text(), odd);
    }
}

#[tokio::test]
async fn other_routes_require_json_and_a_revocation_may_have_no_content() {
    let stage = Scene::new().start().await;
    for (method, target) in [
        ("POST", "/v1/connect/authorize/scl_slack"),
        ("POST", "/v1/connect/install/scl_slack"),
        ("GET", "/v1/connect/connectors/scl_slack"),
        ("DELETE", "/v1/connect/connectors/scl_slack/tokens"),
    ] {
        let ask = async |fault| {
            stage.emulator.inject(fault);
            let request = stage.request(method, target);
            if method == "POST" { request.json("{}") } else { request }.send().await
        };
        for fault in [Fault::answer(200, "text/html", "<html>"), Fault::answer(200, "application/json", "")] {
            let reply = ask(fault).await;
            assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_invalid_response"), "{method} {target}");
        }
        let list = ask(Fault::answer(200, "application/json", "[1]")).await;
        assert_eq!((list.status, list.text().as_str()), (200, "[1]"), "{method} {target}");
        let empty = ask(Fault::answer(204, "application/json", "")).await;
        if method == "DELETE" {
            assert_eq!((empty.status, empty.body.len(), empty.header("content-type")), (204, 0, None));
        } else {
            assert_eq!((empty.status, empty.code().as_str()), (502, "upstream_invalid_response"), "{method} {target}");
        }
    }
}

#[tokio::test]
async fn a_redirect_is_never_followed() {
    let elsewhere = Emulator::start(Options::default()).await.expect("an emulator");
    let stage = Scene::new().start().await;
    let to = [format!("{}{SLACK}", elsewhere.url()), format!("{}{SLACK}", stage.emulator.url()), SLACK.to_owned()];
    for (status, to) in [300, 301, 302, 303, 304, 307, 308].into_iter().flat_map(|s| to.iter().map(move |to| (s, to))) {
        let before = stage.emulator.received().len();
        let location = [("location", to.as_str())];
        stage.emulator.inject(answer_with(status, if status == 304 { "" } else { "{}" }, &location));
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_redirect"), "{status}");
        assert_eq!(reply.header("location"), None);
        assert!(!reply.text().contains(SLACK), "{}", reply.text());
        assert_eq!(stage.emulator.received().len(), before + 1, "{status} {to}");
    }
    assert!(elsewhere.received().is_empty());
    assert_eq!(stage.token("{}").send().await.status, 200);
}

#[tokio::test]
async fn an_upstream_that_does_not_listen_is_unreachable_until_it_does() {
    // Bound but not listening: the port is reserved and connections are refused.
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let url = format!("http://{}", socket.local_addr().expect("an address"));
    let stage = Scene::new().upstream(&url).start().await;
    for _ in 0..2 {
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_unreachable"));
        let error = &reply.json()["error"];
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(&url) && message.contains("refused"), "{message}");
        // On this machine, upstream is probably the emulator; network and proxy do not matter.
        let port = socket.local_addr().expect("an address").port();
        assert_eq!(error["hint"], format!("connect-sidecar emulate --port {port}"));
    }
    stage.caught_up().await;

    let listener = socket.listen(16).expect("it listens");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(good("t").as_bytes()).await;
        }
    });
    assert_eq!(stage.token("{}").send().await.token(), "t");
}

#[tokio::test]
async fn sends_nothing_without_trusted_tls() {
    let untrusted = Emulator::start(Options { tls: true, ..Options::default() }).await.expect("an emulator");
    for (what, scene) in [("not known to the system", Scene::new()), ("not of the given root", Scene::new().tls())] {
        let stage = scene.upstream(&untrusted.url()).start().await;
        for _ in 0..2 {
            let reply = stage.token("{}").send().await;
            assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_tls"), "{what}: {}", reply.text());
            let hint = &reply.json()["error"]["hint"];
            assert!(hint.as_str().is_some_and(|hint| hint.contains("--upstream-ca")), "{what}: {hint}");
        }
        stage.caught_up().await;
    }
    assert!(untrusted.received().is_empty());

    let plain = Emulator::start(Options::default()).await.expect("an emulator");
    let stage = Scene::new().tls().upstream(&plain.url().replace("http:", "https:")).start().await;
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_tls"), "{}", reply.text());
    assert!(plain.received().is_empty(), "no fallback to http");
}

#[tokio::test]
async fn a_protocol_violation_is_an_error_and_the_request_is_not_resent() {
    let upstream = Scripted::start().await;
    let stage = Scene::new().upstream(&upstream.url()).start().await;
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let large_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\n{{}}", "x".repeat(100 * 1024));
    for on_a_kept_connection in [false, true] {
        for (what, bytes, then) in [
            ("nothing, closed", String::new(), Then::Close),
            ("nothing, reset", String::new(), Then::Reset),
            ("half a head", "HTTP/1.1 200 OK\r\ncontent-ty".into(), Then::Close),
            ("half a head, reset", "HTTP/1.1 200 OK\r\ncontent-ty".into(), Then::Reset),
            ("no HTTP", "SSH-2.0-OpenSSH_9.9\r\n\r\n".into(), Then::Keep),
            ("another version", "HTTP/9.9 200 OK\r\n\r\n".into(), Then::Close),
            ("too large a head", large_head.clone(), Then::Keep),
            ("half a body", good("CANARY").replace("}", ""), Then::Close),
            ("half a body, reset", good("CANARY").replace("}", ""), Then::Reset),
            ("a bad chunk", format!("{chunked}zz\r\n{{}}\r\n0\r\n\r\n"), Then::Keep),
            ("no last chunk", format!("{chunked}2\r\n{{}}\r\n"), Then::Close),
            ("two lengths", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}".into(), Then::Close),
            ("another protocol", "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n".into(), Then::Close),
        ] {
            let_upstream_recover().await;
            if on_a_kept_connection {
                stage.token(&body(&format!("before {what}"))).send().await.token();
            }
            upstream.say(bytes, then);
            let asked = body(&format!("{what}, {on_a_kept_connection}"));
            let reply = stage.token(&asked).send().await;
            assert_eq!(reply.status, 502, "{what}: {}", reply.text());
            assert_eq!(reply.code(), "upstream_invalid_response", "{what}");
            assert!(!reply.text().contains("CANARY"), "{what}");
            let sent = upstream.bodies().iter().filter(|body| **body == asked).count();
            assert_eq!(sent, 1, "{what}: it may have been received");
            stage.caught_up().await;
            assert_eq!(stage.token(&asked).send().await.token(), "good", "{what}");
        }
    }
}

#[tokio::test]
async fn ignores_interim_responses() {
    let upstream = Scripted::start().await;
    let stage = Scene::new().upstream(&upstream.url()).start().await;
    let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n".repeat(100);
    upstream.say(interim + &good("final"), Then::Keep);
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.token().as_str(), reply.header("link")), ("final", None));
    assert_eq!(stage.token(&body("next")).send().await.token(), "good");
}

#[tokio::test]
async fn reconnects_when_upstream_has_closed_an_idle_connection() {
    for (with_the_answer, how) in [(true, Then::Close), (true, Then::Reset), (false, Then::Close), (false, Then::Reset)]
    {
        let upstream = Scripted::start().await;
        let stage = Scene::new().upstream(&upstream.url()).start().await;
        for i in 0..20 {
            upstream.say(good(&format!("t{i}")), if with_the_answer { how } else { Then::Keep });
            let reply = stage.token(&body(&i.to_string())).send().await;
            assert_eq!(reply.status, 200, "{how:?}, {with_the_answer}, {i}: {}", reply.text());
            assert_eq!(reply.token(), format!("t{i}"));
            upstream.hang_up(how);
            upstream.all_ended().await;
        }
        let expected: Vec<_> = (0..20).map(|i| body(&i.to_string())).collect();
        assert_eq!(upstream.bodies(), expected, "each is received once");
        assert_eq!(stage.status().await["upstream"]["errors"], 0);
    }
}

#[tokio::test]
async fn discards_unsolicited_data_on_an_idle_connection() {
    let upstream = Scripted::start().await;
    let stage = Scene::new().upstream(&upstream.url()).start().await;
    for unasked in [good("UNASKED"), "HTTP/1.1 100 Continue\r\n\r\n".into(), "noise".into()] {
        upstream.say(good("first") + &unasked, Then::Keep);
        assert_eq!(stage.token(&body(&unasked)).send().await.token(), "first");
        assert_eq!(stage.token(&body(&format!("after {unasked}"))).send().await.token(), "good");
    }
}

#[tokio::test]
async fn an_upstream_that_does_not_answer_costs_each_caller_20_s_and_nobody_else_anything() {
    let stage = Scene::new().start().await;
    stage.emulator.inject(Fault::once(FaultKind::Hang));
    let leader = stage.under_way(stage.token("{}")).await;
    let joined = stage.token("{}").begin().await;
    stage.caught_up().await;
    assert_eq!(stage.token(&body("another")).send().await.status, 200);

    let replies = tokio::spawn(async { (leader.reply_at_last().await, joined.reply_at_last().await) });
    let_timers_pass(Duration::from_secs(19)).await;
    assert!(!is_over(&replies, &stage).await);
    let_timers_pass(Duration::from_secs(1)).await;
    assert!(is_over(&replies, &stage).await);
    let (leader, joined) = soon("both replies", replies).await.expect("no panic");
    for reply in [leader, joined] {
        assert_eq!((reply.status, reply.code().as_str()), (504, "upstream_timeout"), "{}", reply.text());
    }
    assert_eq!(stage.emulator.received().iter().filter(|request| request.body == "{}").count(), 1);
    assert_eq!(stage.token("{}").send().await.cache_status(), MISS);
}

/// A sidecar with this many connections to an upstream behind a forwarder, which drops them silently after they have
/// been idle for this long.
async fn with_dead_connections(connections: usize, idle: Duration) -> (Scripted, Forwarder, Stage) {
    let upstream = Scripted::start().await;
    let forwarder = Forwarder::to(upstream.addr()).await;
    let stage = Scene::new().upstream(&forwarder.url()).start().await;
    let gates: Vec<_> = (0..connections).map(|_| upstream.say_when_told(good("good"), Then::Keep)).collect();
    let ask = |n: usize| tokio::spawn(stage.token(&body(&format!("before {n}"))).send());
    let sent: Vec<_> = (0..connections).map(ask).collect();
    upstream.asked(connections).await;
    drop(gates);
    for sent in sent {
        assert_eq!(soon("a reply", sent).await.expect("no panic").token(), "good");
    }
    advance(&stage, idle).await;
    forwarder.forget();
    (upstream, forwarder, stage)
}

/// Advances the sidecar's timers and its clock.
async fn advance(stage: &Stage, time: Duration) {
    stage.pass(time);
    let_timers_pass(time).await;
}

/// Advances the time until requests to upstream time out.
async fn advance_to_timeout(stage: &Stage) {
    for _ in 0..25 {
        stage.caught_up().await;
        advance(stage, Duration::from_secs(1)).await;
    }
}

#[tokio::test]
async fn of_several_dead_connections_only_one_fails_a_request() {
    for idle in [0, 10] {
        let (upstream, forwarder, stage) = with_dead_connections(3, Duration::from_secs(idle)).await;
        let slow = tokio::spawn(stage.token(&body("slow")).begin().await.reply_at_last());
        advance_to_timeout(&stage).await;
        let slow = soon("the reply", slow).await.expect("no panic");
        assert_eq!((slow.status, slow.code().as_str()), (504, "upstream_timeout"), "{}", slow.text());
        let before = forwarder.connections();
        for name in ["a", "b", "c"] {
            assert_eq!(stage.token(&body(name)).send().await.token(), "good", "idle for {idle} s");
        }
        assert_eq!(forwarder.connections(), before + 1, "one was opened, which is alive");
        assert!(!upstream.bodies().contains(&body("slow")), "it may have been received and is not resent");
    }
}

#[tokio::test]
async fn concurrent_requests_try_only_one_idle_connection() {
    let (upstream, _forwarder, stage) = with_dead_connections(3, Duration::from_secs(10)).await;
    let before = upstream.count();
    let mut sent = Vec::new();
    for name in ["a", "b", "c"] {
        sent.push(tokio::spawn(stage.token(&body(name)).begin().await.reply_at_last()));
    }
    upstream.asked(before + 2).await;
    advance_to_timeout(&stage).await;
    let mut statuses = Vec::new();
    for sent in sent {
        statuses.push(soon("a reply", sent).await.expect("no panic").status);
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 504]);
}

#[tokio::test]
async fn does_not_reuse_older_connections_while_one_is_silent() {
    let upstream = Scripted::start().await;
    let stage = Scene::new().upstream(&upstream.url()).start().await;
    let gates: Vec<_> = (0..3).map(|_| upstream.say_when_told(good("good"), Then::Keep)).collect();
    let sent = ["a", "b", "c"].map(|name| tokio::spawn(stage.token(&body(name)).send()));
    upstream.asked(3).await;
    drop(gates);
    for sent in sent {
        assert_eq!(soon("a reply", sent).await.expect("no panic").status, 200);
    }
    let slow = upstream.say_when_told(good("slow"), Then::Keep);
    let waiting = tokio::spawn(stage.token(&body("slow")).send());
    upstream.asked(4).await;
    let before = upstream.connections();
    assert_eq!(stage.token(&body("at once")).send().await.token(), "good");
    assert_eq!(upstream.connections(), before, "nothing is suspect yet");
    advance(&stage, Duration::from_secs(3)).await;
    // The connection used since then is not suspect.
    let gates = upstream.say_when_told(good("good"), Then::Keep);
    let first = tokio::spawn(stage.token(&body("d")).send());
    upstream.asked(6).await;
    assert_eq!(stage.token(&body("e")).send().await.token(), "good");
    assert_eq!(upstream.connections(), before + 1, "the other old connection is not reused");
    drop((gates, slow));
    for waiting in [waiting, first] {
        assert_eq!(soon("a reply", waiting).await.expect("no panic").status, 200);
    }
}

#[tokio::test]
async fn an_answer_must_be_whole_within_30_s() {
    let upstream = Scripted::start().await;
    let stage = Scene::new().upstream(&upstream.url()).start().await;
    upstream.say(good("CANARY").replace("}", ""), Then::Stall);
    let sent = stage.token("{}").begin().await;
    upstream.asked(1).await;
    // The response head has arrived before the next request is answered.
    stage.caught_up().await;
    let reply = tokio::spawn(sent.reply_at_last());
    let_timers_pass(Duration::from_secs(29)).await;
    assert!(!is_over(&reply, &stage).await);
    let_timers_pass(Duration::from_secs(1)).await;
    assert!(is_over(&reply, &stage).await);
    let reply = soon("the reply", reply).await.expect("no panic");
    assert_eq!((reply.status, reply.code().as_str()), (504, "upstream_timeout"), "{}", reply.text());
    assert_eq!(stage.token("{}").send().await.token(), "good");
    assert_eq!(upstream.bodies(), ["{}", "{}"]);
}

#[tokio::test]
async fn bounds_trickling_bodies_and_endless_interim_responses() {
    const INTERIM: &str = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    const SECOND: Duration = Duration::from_secs(1);
    let large_chunks = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1000\r\n";
    for (what, begins, goes_on, pause, limit) in [
        ("a head by the byte", "HTTP/1.1 200 OK\r\nx: ", "x", SECOND, 20),
        ("a storm of interim answers", "", INTERIM, Duration::ZERO, 20),
        ("an interim answer a second", "", INTERIM, SECOND, 20),
        ("a body by the byte", "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", " ", SECOND, 30),
        ("a chunk by the byte", large_chunks, " ", SECOND, 30),
    ] {
        let upstream = Scripted::start().await;
        let stage = Scene::new().upstream(&upstream.url()).start().await;
        upstream.say(begins, Then::Repeat(goes_on, pause));
        let sent = stage.token("{}").begin().await;
        upstream.asked(1).await;
        stage.caught_up().await;
        let reply = tokio::spawn(sent.reply_at_last());
        for second in 1..limit {
            let_timers_pass(SECOND).await;
            if second % 5 == 0 {
                assert_eq!(stage.token(&body(&second.to_string())).send().await.token(), "good", "{what}: another key");
            }
        }
        assert!(!is_over(&reply, &stage).await, "{what}");
        let_timers_pass(SECOND).await;
        let reply = soon("the reply", reply).await.expect("no panic");
        assert_eq!((reply.status, reply.code().as_str()), (504, "upstream_timeout"), "{what}: {}", reply.text());
        assert_eq!(upstream.bodies().iter().filter(|body| *body == "{}").count(), 1, "{what}: sent once");
    }
}

#[tokio::test]
async fn a_connection_must_be_there_within_5_s() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("https://{}", silent.local_addr().expect("an address"));
    let hellos = watch::Sender::new(0);
    let mut heard = hellos.subscribe();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = silent.accept().await {
            let _ = stream.read(&mut [0; 16]).await;
            hellos.send_modify(|count| *count += 1);
            open.push(stream);
        }
    });
    let stage = Scene::new().tls().upstream(&url).start().await;
    let sent = stage.token("{}").begin().await;
    // The sidecar has opened one in advance.
    soon("both to begin with TLS", heard.wait_for(|count| *count == 2)).await.expect("it runs");
    let reply = tokio::spawn(sent.reply_at_last());
    let_timers_pass(Duration::from_secs(4)).await;
    assert!(!is_over(&reply, &stage).await);
    let_timers_pass(Duration::from_secs(1)).await;
    assert!(is_over(&reply, &stage).await);
    let reply = soon("the reply", reply).await.expect("no panic");
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_unreachable"), "{}", reply.text());
}

#[tokio::test]
async fn retries_a_rejected_token_only_with_a_new_one() {
    let mut stage = Scene::new().start().await;
    let slug = |stage: &Stage, slug: &str| stage.emulator.change(|world| world.team.slug = slug.into());
    let bearers = |stage: &Stage| -> Vec<_> {
        stage
            .emulator
            .received()
            .iter()
            .map(|r| r.headers["authorization"].to_str().expect("text").to_owned())
            .collect()
    };

    slug(&stage, "renamed");
    let rejected = stage.token("{}").send().await;
    assert_eq!((rejected.status, &rejected.json()["error"]["invalidToken"]), (403, &true.into()));
    assert_eq!(bearers(&stage).len(), 1, "the same token is not retried");

    let hold = stage.emulator.hold_answers();
    let sent = stage.under_way(stage.token("{}")).await;
    slug(&stage, "acme");
    stage.pass(Duration::from_secs(60));
    let fresh = stage.fresh_token(Duration::from_secs(3600 * 12));
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    hold.release();
    let reply = sent.reply().await;
    assert_eq!((reply.status, reply.cache_status()), (200, MISS), "{}", reply.text());
    let bearers = bearers(&stage);
    assert_eq!(bearers.len(), 3);
    assert_eq!(bearers[1], bearers[0]);
    assert_eq!(bearers[2], format!("Bearer {fresh}"));

    stage.emulator.inject(Fault::status(500, "internal"));
    assert_eq!(stage.token(&body("x")).send().await.status, 500);
    assert_eq!(stage.emulator.received().len(), 4, "nothing else is resent");
}

#[tokio::test]
async fn a_401_is_about_the_credential_whatever_its_body_and_a_403_only_if_it_says_so() {
    let page = |status: &str| {
        let body = "<html>CANARY</html>";
        format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let cut = "HTTP/1.1 401 x\r\ncontent-length: 9\r\n\r\n{".to_owned();
    for (what, says, then, has_another, asked, status) in [
        ("a page with 401", page("401"), Then::Keep, true, 2, 200),
        ("a 401 that breaks off", cut, Then::Close, true, 2, 200),
        ("the same token", page("401"), Then::Keep, false, 1, 502),
        ("a page with 403", page("403"), Then::Keep, true, 1, 502),
        ("a page with 500", page("500"), Then::Keep, true, 1, 502),
    ] {
        let upstream = Scripted::start().await;
        let stage = Scene::new().upstream(&upstream.url()).start().await;
        let hold = upstream.say_when_told(says, then);
        let sent = stage.token("{}").begin().await;
        upstream.asked(1).await;
        if has_another {
            stage.pass(Duration::from_secs(1));
            stage.write_env(&stage.fresh_token(Duration::from_secs(3600 * 12)));
        }
        drop(hold);
        let reply = sent.reply().await;
        assert_eq!((reply.status, upstream.bodies().len()), (status, asked), "{what}: {}", reply.text());
        if status != 200 {
            assert_eq!(reply.code(), "upstream_invalid_response", "{what}");
            let hint = reply.json()["error"]["hint"].as_str().map(str::to_owned);
            assert_eq!(hint.as_deref() == Some("vercel env pull"), !has_another, "{what}: {hint:?}");
        }
    }
}

#[tokio::test]
async fn a_sidecar_that_is_its_own_upstream_detects_the_loop() {
    // Bound but not listening, it reserves the port for the sidecar.
    let reserved = TcpSocket::new_v4().expect("a socket");
    reserved.set_reuseaddr(true).expect("a socket");
    reserved.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let port = reserved.local_addr().expect("an address").port();
    let itself = format!("http://127.0.0.1:{port}");
    let stage = Scene::new().upstream(&itself).env("CONNECT_SIDECAR_PORT", &port.to_string()).start().await;
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (508, &"loop_detected".into()), "{}", reply.text());
    let upstream = &stage.status().await["upstream"];
    assert_eq!((&upstream["url"], &upstream["requests"]), (&itself.into(), &1.into()), "one round");
}

/// A proxy that answers CONNECT with this status and, after a 200, connects to the target. Publishes the targets.
async fn connect_proxy(says: &'static str) -> (String, watch::Receiver<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://user:secret@{}", listener.local_addr().expect("an address"));
    let (targets, seen) = watch::channel(Vec::new());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && client.read_buf(&mut head).await.is_ok_and(|n| n > 0) {}
            let head = String::from_utf8_lossy(&head).into_owned();
            let line = head.lines().next().unwrap_or_default().to_owned();
            let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
            assert!(head.to_lowercase().contains("proxy-authorization: basic "), "{head}");
            targets.send_modify(|targets| targets.push(line));
            tokio::spawn(async move {
                let _ = client.write_all(format!("HTTP/1.1 {says}\r\n\r\n").as_bytes()).await;
                if says.starts_with("200")
                    && let Ok(mut server) = TcpStream::connect(target).await
                {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    (url, seen)
}

#[tokio::test]
async fn uses_the_environments_proxy_only_if_enabled() {
    let emulator = Emulator::start(Options { tls: true, ..Options::default() }).await.expect("an emulator");
    let home = tempfile::tempdir().expect("a directory");
    std::fs::write(home.path().join("ca.pem"), emulator.ca_pem().expect("it speaks TLS")).expect("written");
    write_private(&home.path().join(".env.local"), &env_file(&emulator.oidc_token(Duration::from_secs(3600))));
    let (open, seen) = connect_proxy("200 OK").await;
    let (closed, refused) = connect_proxy("403 Forbidden").await;
    let ask = async |arguments: &[&str], environment: &[(&str, &str)]| -> Reply {
        let mut command = process::sidecar(home.path());
        command.args(["--port=0", "--upstream", &emulator.url(), "--upstream-ca=ca.pem"]).args(arguments);
        let serving = Serving::start({
            command.envs(environment.iter().copied());
            command
        })
        .await;
        Request::new(serving.addr, "POST", SLACK).json("{}").send().await
    };

    let through = format!("CONNECT {} HTTP/1.1", emulator.addr());
    let reply = ask(&["--use-env-proxy"], &[("HTTPS_PROXY", &open)]).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(!seen.borrow().is_empty() && seen.borrow().iter().all(|target| *target == through), "{:?}", seen.borrow());
    assert!(emulator.received().iter().all(|request| !request.headers.contains_key("proxy-authorization")));

    let before = seen.borrow().len();
    assert_eq!(ask(&[], &[("HTTPS_PROXY", &open)]).await.status, 200);
    assert_eq!(ask(&["--use-env-proxy"], &[("HTTPS_PROXY", &open), ("NO_PROXY", "127.0.0.1")]).await.status, 200);
    assert_eq!(seen.borrow().len(), before);

    let received = emulator.received().len();
    let reply = ask(&["--use-env-proxy"], &[("HTTPS_PROXY", &closed)]).await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_unreachable"), "{}", reply.text());
    assert!(!reply.text().contains("secret"), "{}", reply.text());
    assert!(!refused.borrow().is_empty());
    assert_eq!(emulator.received().len(), received, "the proxy is not bypassed");
}
