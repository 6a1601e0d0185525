//! `GET /_sidecar/v1/events`: recent and live events, without secrets (docs/http.md section 5).

use std::time::Duration;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use nix::sys::signal::Signal;

use crate::command::get;
use crate::support::http::Sent;
use crate::support::workspace::Workspace;
use crate::support::{Scene, Stage, fingerprint, soon};

const APP: &str = r#"{"subject":{"type":"app"}}"#;

/// Opens a stream and reads its past events.
async fn subscribe(stage: &Stage) -> (Sent, String) {
    let mut stream = stage.request("GET", "/_sidecar/v1/events").begin().await;
    // An empty line ends the past events.
    let past = soon("the past events", stream.until("\n\n\r\n")).await;
    (stream, past)
}

/// The next event.
async fn next(stream: &mut Sent) -> serde_json::Value {
    let read = soon("an event", stream.until("}\n")).await;
    events(&read).pop().expect("an event")
}

/// Parses the events, in order.
fn events(read: &str) -> Vec<serde_json::Value> {
    read.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn past_events_come_first_and_then_live_ones() {
    let mut stage = Scene::new().start().await;
    let token = stage.slack_token().await;
    stage.slack_token().await;
    let (mut stream, past) = subscribe(&stage).await;
    let past = events(&past);
    let caches: Vec<_> = past.iter().map(|event| event["cache"].as_str().unwrap_or_default()).collect();
    assert_eq!(caches, ["miss", "hit"], "also a hit without subscribers: {past:?}");
    assert_eq!(
        (&past[0]["event"], &past[0]["cache"], &past[0]["status"]),
        (&"request".into(), &"miss".into(), &200.into())
    );
    assert_eq!((&past[0]["connector"], &past[0]["subject"]), (&"slack/acme-slack".into(), &"app".into()));

    assert_eq!(stage.slack_token().await, token);
    let hit = next(&mut stream).await;
    assert_eq!((&hit["cache"], &hit["status"]), (&"hit".into(), &200.into()));
    stage.token(APP).header("cache-control", "no-cache").send().await.token();
    assert_eq!(next(&mut stream).await["cache"], "forced");
    stage.request("POST", "/v1/connect/token/slack%2Fnone").json("{}").send().await;
    let error = next(&mut stream).await;
    assert_eq!((&error["status"], &error["code"]), (&404.into(), &"not_found".into()));
    assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("vercel connect create")), "{error}");
    assert_eq!(error["command"], "vercel connect list");

    stage.pass(DEVELOPMENT_LIFE);
    let fresh = stage.fresh_token(Duration::from_secs(600));
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let mut kinds = Vec::new();
    while kinds.len() < 2 || !kinds.contains(&"rotation".to_owned()) {
        let event = next(&mut stream).await;
        assert_eq!(event["project"], "acme/web");
        kinds.push(event["event"].as_str().unwrap_or_default().to_owned());
    }
    assert!(kinds.contains(&"warning".to_owned()), "{kinds:?}");
}

#[tokio::test]
async fn a_first_token_is_published_but_not_counted_as_rotation() {
    let mut stage = Scene::new().without_env_file().start().await;
    let (mut stream, past) = subscribe(&stage).await;
    assert_eq!(events(&past).len(), 0, "{past}");
    let first = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&first);
    let event = next(&mut stream).await;
    assert_eq!((&event["event"], &event["fingerprint"]), (&"rotation".into(), &fingerprint(&first).into()));
    let rotations = async |stage: &Stage| {
        let metrics = stage.request("GET", "/metrics").send().await.text();
        let line = metrics.lines().find(|line| line.starts_with("connect_sidecar_oidc_rotations_total"));
        line.and_then(|line| line.split(' ').next_back()).expect("a number").to_owned()
    };
    assert_eq!(rotations(&stage).await, "0");
    stage.pass(Duration::from_secs(1));
    let second = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&second);
    stage.uses(&second).await;
    let event = next(&mut stream).await;
    assert_eq!((&event["event"], &event["fingerprint"]), (&"rotation".into(), &fingerprint(&second).into()));
    assert_eq!(rotations(&stage).await, "1");

    let stage = Scene::new().start().await;
    stage.reloader.reload().await;
    let (_, past) = subscribe(&stage).await;
    assert_eq!(events(&past).len(), 0, "the token present at the start is not an event: {past}");
    assert_eq!(rotations(&stage).await, "0");
}

#[tokio::test]
async fn an_error_of_the_sidecar_is_published_with_its_code() {
    let stage = Scene::new().without_env_file().start().await;
    assert_eq!(stage.token(APP).send().await.status, 503);
    let (_, past) = subscribe(&stage).await;
    let past = events(&past);
    assert_eq!(past.last().map(|event| &event["code"]), Some(&"oidc_token_missing".into()), "{past:?}");
    let last = past.last().expect("an event");
    assert_eq!((&last["hint"], &last["command"]), (&"vercel env pull".into(), &"vercel env pull".into()));
    assert_eq!(last["message"], "There is no OIDC token in .env.local. Run `vercel env pull`.");
}

#[tokio::test]
async fn a_refusal_is_published_once_and_counted() {
    let stage = Scene::new().start().await;
    stage.request("GET", "/healthz").header("host", "evil.example").send().await;
    stage.request("GET", "/nowhere").send().await;
    stage.token("not JSON").send().await;
    let (_, past) = subscribe(&stage).await;
    let fields = |event: &serde_json::Value| {
        ["event", "code", "method", "path", "command"].map(|field| event[field].as_str().unwrap_or_default().to_owned())
    };
    let expected = [
        ["refusal", "host_not_allowed", "GET", "/healthz", "connect-sidecar --allowed-host evil.example"],
        ["refusal", "route_not_found", "GET", "/nowhere", ""],
        ["request", "bad_json", "", "", ""],
    ];
    assert_eq!(events(&past).iter().map(fields).collect::<Vec<_>>(), expected.map(|line| line.map(str::to_owned)));
    assert!(events(&past).iter().all(|event| event["hint"].is_string() && event["message"].is_string()), "{past}");
    // A refused health check is not a failure.
    assert_eq!(stage.status().await["failures"]["count"], 2);
}

#[tokio::test]
async fn only_problems_from_then_on_are_sent_on_request() {
    let stage = Scene::new().start().await;
    stage.token("not JSON").send().await;
    let mut stream = stage.request("GET", "/_sidecar/v1/events?only=problems").begin().await;
    let past = soon("the past events", stream.until("\n\r\n")).await;
    assert_eq!(events(&past), [serde_json::Value::Null; 0]);
    stage.slack_token().await;
    stage.slack_token().await;
    stage.request("POST", "/v1/connect/token/slack%2Fnone").json("{}").send().await;
    assert_eq!(next(&mut stream).await["code"], "not_found");
    stage.request("GET", "/nowhere").send().await;
    assert_eq!(next(&mut stream).await["code"], "route_not_found");
    assert!(!stage.server.proxy().events.has_subscribers(), "hits are not published for this stream");
}

#[tokio::test]
async fn events_contain_no_secrets() {
    let stage = Scene::new().start().await;
    let (mut stream, _) = subscribe(&stage).await;
    let body = r#"{"subject":{"type":"user","id":"CANARYUSER"},"scopes":["CANARYSCOPE"]}"#;
    stage.token(body).header("x-canary", "CANARYHEADER").send().await;
    let token = stage.slack_token().await;
    stage.slack_token().await;
    let read = soon("all events", stream.until(r#""cache":"hit""#)).await;
    assert!(!read.contains("CANARY") && !read.contains(&token), "{read}");
}

#[tokio::test]
async fn browsers_need_the_key_and_only_get_is_accepted() {
    let stage = Scene::new().start().await;
    let from_page = stage.request("GET", "/_sidecar/v1/events").header("sec-fetch-site", "same-origin");
    from_page.clone().send().await.assert_refused(401, "key_required", "a page without the key");
    let mut stream = from_page.header("sidecar-key", &stage.key()).begin().await;
    soon("the stream", stream.until("application/x-ndjson")).await;
    for (method, target, status, code) in [
        ("POST", "/_sidecar/v1/events", 405, "method_not_allowed"),
        ("HEAD", "/_sidecar/v1/events", 405, "method_not_allowed"),
        ("GET", "/_sidecar/v1/events?since=0", 400, "query_not_allowed"),
    ] {
        let reply = stage.request(method, target).send().await;
        assert_eq!((reply.status, reply.header("sidecar-error")), (status, Some(code)), "{method} {target}");
    }
}

#[tokio::test]
async fn open_streams_do_not_delay_the_shutdown() {
    let workspace = Workspace::new().await;
    let serving = workspace.serve(&[]).await;
    let mut stream = get(&serving, "/_sidecar/v1/events").begin().await;
    soon("the stream", stream.until("application/x-ndjson")).await;
    serving.signal(Signal::SIGTERM);
    let ended = serving.end().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(!ended.stderr.contains("did not end within"), "{}", ended.stderr);
    soon("the stream's end", stream.rest()).await;
}

#[tokio::test]
async fn streams_are_limited_and_do_not_block_token_requests() {
    let stage = Scene::new().start().await;
    let mut streams = Vec::new();
    for _ in 0..16 {
        streams.push(subscribe(&stage).await);
    }
    let one_more = stage.request("GET", "/_sidecar/v1/events");
    one_more.clone().send().await.assert_refused(503, "overloaded", "one too many");
    assert_eq!(stage.token(APP).send().await.status, 200);
    drop(streams.pop());
    let accepted = async {
        while one_more.clone().begin().await.until("\r\n").await.contains("503") {
            tokio::task::yield_now().await;
        }
    };
    soon("a free slot", accepted).await;
}
