//! The cache as seen by clients: which requests go to Connect, which do not, and what `Cache-Status` says.

use std::time::{Duration, UNIX_EPOCH};

use connect_sidecar::emulator::fault::{AnswerHold, Fault, FaultKind};

use crate::support::http::{Reply, Request};
use crate::support::{SLACK, SLACK_UID, Scene, Stage};

const APP: &str = r#"{"subject":{"type":"app"}}"#;
const USER: &str = r#"{"subject":{"type":"user","id":"user_ada"}}"#;
const GITHUB: &str = "/v1/connect/token/github%2Facme-github";
const LINEAR: &str = "/v1/connect/token/oauth%2Flinear";
const MISS: &str = "connect-sidecar; fwd=uri-miss; stored; ttl=3570";
const HIT: &str = "connect-sidecar; hit; ttl=3570";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

impl Stage {
    /// Number of token requests that reached upstream.
    fn token_requests(&self) -> usize {
        self.emulator.count("/v1/connect/token/")
    }

    /// Delays the answer to the next token request until the hold is released.
    fn gate_next(&self) -> AnswerHold {
        let hold = AnswerHold::default();
        self.emulator.inject(Fault::once(FaultKind::Hold(hold.clone())).on("/v1/connect/token/"));
        hold
    }

    async fn revoke(&self, connector: &str) -> Reply {
        self.request("DELETE", &format!("/v1/connect/connectors/{connector}/tokens")).send().await
    }
}

fn forced(request: Request) -> Request {
    request.header("cache-control", "no-cache")
}

#[tokio::test]
async fn replies_have_cache_status_and_age() {
    let stage = Scene::new().start().await;
    let expect = async |what: &str, request: Request, status: &str, age: Option<&str>| {
        let reply = request.send().await;
        assert_eq!((reply.cache_status(), reply.header("age")), (status, age), "{what}: {}", reply.text());
        reply
    };
    expect(
        "forced on an empty cache",
        forced(stage.token(APP)),
        "connect-sidecar; fwd=request; stored; ttl=3570",
        None,
    )
    .await;
    let first = expect("another body", stage.token(USER), MISS, None).await;
    let hit = expect("a hit at once", stage.token(USER), HIT, Some("0")).await;
    assert_eq!((hit.status, &hit.body), (200, &first.body));
    stage.pass(Duration::from_millis(10_900));
    let hit = expect("a hit later", stage.token(USER), "connect-sidecar; hit; ttl=3559", Some("10")).await;
    assert_eq!(hit.header("content-type"), first.header("content-type"));
    assert_eq!(hit.header("x-vercel-id"), first.header("x-vercel-id"), "the stored answer");
    expect("forced", forced(stage.token(USER)), "connect-sidecar; fwd=request; stored; ttl=3570", None).await;

    let unstorable = || stage.emulator.inject(Fault::answer(200, "application/json", r#"{"token":"t"}"#));
    unstorable();
    expect("not storable", stage.token("{}"), "connect-sidecar; fwd=uri-miss", None).await;
    unstorable();
    expect("not storable, forced", forced(stage.token("{}")), "connect-sidecar; fwd=request", None).await;
    stage.emulator.inject(Fault::status(404, "not_found"));
    expect("an error of upstream's", stage.token("{}"), "connect-sidecar; fwd=uri-miss", None).await;
    stage.emulator.inject(Fault::redirect("https://example.com"));
    expect("an error of our own from upstream", stage.token("{}"), "none", None).await;
    expect("an error of our own before", stage.token("["), "none", None).await;
    stage.emulator.inject(Fault::rate_limited(None));
    expect("a 429", stage.token("{}"), "connect-sidecar; fwd=uri-miss", None).await;
    expect("a 429, held", stage.token("{}"), "connect-sidecar; hit; detail=429", Some("0")).await;
}

#[tokio::test]
async fn serves_a_token_until_its_buffer_by_the_wall_clock() {
    for (settings, served_for) in [
        ("", 3570),
        ("[cache]\nbuffer = \"10m\"", 3000),
        ("[cache]\nmax_age = \"1m\"", 60),
        ("[cache]\nbuffer = \"10m\"\nmax_age = \"55m\"", 3000),
    ] {
        let stage = Scene::new().toml(settings).start().await;
        let first = stage.token(APP).send().await;
        assert_eq!(first.cache_status(), format!("connect-sidecar; fwd=uri-miss; stored; ttl={served_for}"));
        stage.pass(seconds(served_for) - Duration::from_millis(1));
        let last = stage.token(APP).send().await;
        assert_eq!(last.cache_status(), "connect-sidecar; hit; ttl=0", "{settings}");
        stage.pass(Duration::from_millis(1));
        let next = stage.token(APP).send().await;
        assert_eq!(next.cache_status(), first.cache_status(), "{settings}");
        assert_ne!(next.token(), first.token());
    }
}

#[tokio::test]
async fn a_requests_own_buffer_applies_to_it_alone() {
    let stage = Scene::new().start().await;
    let with_buffer = r#"{"subject":{"type":"app"},"validityBufferMs":600000}"#;
    let first = stage.token(with_buffer).send().await;
    assert_eq!(first.cache_status(), MISS, "the buffer does not change what is stored");
    assert_eq!(stage.emulator.received()[0].body, with_buffer);
    stage.pass(seconds(3000) - Duration::from_millis(1));
    assert_eq!(stage.token(with_buffer).send().await.token(), first.token());
    stage.pass(Duration::from_millis(1));
    assert_eq!(stage.token(APP).send().await.token(), first.token(), "valid for a smaller buffer");
    let fresh = stage.token(with_buffer).send().await;
    assert_eq!(fresh.cache_status(), MISS);
    assert_eq!(stage.token(APP).send().await.token(), fresh.token(), "the fresh token replaces the old one");
}

#[tokio::test]
async fn equivalent_requests_share_a_token() {
    let stage = Scene::new().start().await;
    let details = r#""authorizationDetails":[{"type":"x","repositories":["b","a"]}]"#;
    for (what, spellings) in [
        ("no body", ["", "{}", " {\n} "].map(str::to_owned).to_vec()),
        (
            "keys, blanks and escapes",
            vec![
                r#"{"subject":{"type":"user","id":"user_ada"},"installationId":"inst_scl_slack"}"#.into(),
                "{ \"installationId\" : \"inst_scl_slack\",\n \"subject\":{\"id\":\"user_ada\", \"type\":\"user\"} }"
                    .into(),
                r#"{"subject":{"type":"user","id":"user_\u0061da"},"installationId":"inst\u005fscl_slack"}"#.into(),
            ],
        ),
        (
            "sets",
            vec![
                r#"{"scopes":["a","b"],"audience":["x","y"],"resources":["r","s"]}"#.into(),
                r#"{"resources":["s","r"],"scopes":["b","a","b"],"audience":["y","x","y"]}"#.into(),
            ],
        ),
        (
            "validityBufferMs",
            vec![
                r#"{"scopes":["v"]}"#.into(),
                r#"{"scopes":["v"],"validityBufferMs":1000}"#.into(),
                r#"{"validityBufferMs":30000,"scopes":["v"]}"#.into(),
            ],
        ),
        (
            "authorization details",
            vec![
                format!("{{{details}}}"),
                r#"{"authorizationDetails":[{"repositories":["b","a"],"type":"x"}]}"#.into(),
            ],
        ),
    ] {
        let before = stage.token_requests();
        let first = stage.token(&spellings[0]).send().await;
        assert_eq!(first.cache_status(), MISS, "{what}");
        assert_eq!(stage.emulator.received()[before].body, spellings[0], "upstream gets the body unchanged");
        for spelling in &spellings[1..] {
            let reply = stage.token(spelling).send().await;
            assert_eq!((reply.cache_status(), reply.token()), (HIT, first.token()), "{what}: {spelling}");
        }
        assert_eq!(stage.token_requests(), before + 1, "{what}");
    }
    for segment in ["slack%2facme-slack", "slack%2Facme%2Dslack", "%73lack%2Facme-slack"] {
        let reply = stage.request("POST", &format!("/v1/connect/token/{segment}")).json("{}").send().await;
        assert_eq!(reply.cache_status(), HIT, "{segment}");
    }
}

#[tokio::test]
async fn different_requests_share_nothing() {
    let stage = Scene::new().start().await;
    let bodies = [
        "{}",
        r#"{"scopes":[]}"#,
        r#"{"scopes":["*"]}"#,
        r#"{"scopes":["a"]}"#,
        r#"{"scopes":["a","b"]}"#,
        r#"{"scopes":["ab"]}"#,
        r#"{"scopes":["A"]}"#,
        r#"{"audience":["a"]}"#,
        r#"{"resources":["a"]}"#,
        r#"{"installationId":"*"}"#,
        r#"{"installationId":"inst_scl_slack"}"#,
        APP,
        r#"{"subject":{"type":"user"}}"#,
        USER,
        r#"{"subject":{"type":"user","id":"user_ada","issuer":"x"}}"#,
        r#"{"authorizationDetails":[{"type":"x","repositories":["a","b"]}]}"#,
        r#"{"authorizationDetails":[{"type":"x","repositories":["b","a"]}]}"#,
        r#"{"unknown":1}"#,
        r#"{"unknown":"1"}"#,
        r#"{"unknown":1.0}"#,
    ];
    let others = [
        ("/v1/connect/token/scl_slack", "{}"),
        (GITHUB, "{}"),
        (LINEAR, r#"{"subject":{"type":"jwt-bearer","sub":"a"}}"#),
        (LINEAR, r#"{"subject":{"type":"jwt-bearer","sub":"b"}}"#),
    ];
    for round in [MISS, HIT] {
        for (path, body) in bodies.map(|body| (SLACK, body)).into_iter().chain(others) {
            let reply = stage.request("POST", path).json(body).send().await;
            assert_eq!((reply.status, reply.cache_status()), (200, round), "{path} {body}: {}", reply.text());
        }
    }
    assert_eq!(stage.token_requests(), bodies.len() + others.len());
}

#[tokio::test]
async fn no_cache_fetches_and_replaces() {
    let stage = Scene::new().start().await;
    let old = stage.slack_token().await;
    for (i, directives) in ["no-cache", "No-Cache", "max-age=0, no-cache"].into_iter().enumerate() {
        let fresh = stage.token(APP).header("cache-control", directives).send().await;
        assert_eq!(fresh.cache_status(), "connect-sidecar; fwd=request; stored; ttl=3570", "{directives}");
        assert_ne!(fresh.token(), old);
        assert_eq!(stage.token_requests(), i + 2);
        let hit = stage.token(APP).send().await;
        assert_eq!((hit.cache_status(), hit.token()), (HIT, fresh.token()), "{directives}");
    }
    for directives in ["max-age=0", "no-store", "x-no-cache"] {
        let reply = stage.token(APP).header("cache-control", directives).send().await;
        assert_eq!(reply.cache_status(), HIT, "{directives} is no word for it");
    }
}

#[tokio::test]
async fn a_forced_request_drops_the_old_token_even_if_it_fails() {
    let stage = Scene::new().start().await;
    let old = stage.slack_token().await;
    stage.emulator.inject(Fault::status(500, "internal"));
    assert_eq!(forced(stage.token(APP)).send().await.status, 500);
    let next = stage.token(APP).send().await;
    assert_eq!(next.cache_status(), MISS);
    assert_ne!(next.token(), old);
}

#[tokio::test]
async fn a_forced_request_neither_joins_an_earlier_flight_nor_is_replaced_by_it() {
    let stage = Scene::new().start().await;
    let (earlier_hold, forced_hold) = (stage.gate_next(), stage.gate_next());
    let earlier = stage.under_way(stage.token(APP)).await;
    let forced = stage.under_way(forced(stage.token(APP))).await;
    let joined = stage.token(APP).begin().await;
    stage.caught_up().await;

    forced_hold.release();
    let forced = forced.reply().await;
    assert_eq!(forced.cache_status(), "connect-sidecar; fwd=request; stored; ttl=3570");
    let joined = joined.reply().await;
    assert_eq!(joined.cache_status(), "connect-sidecar; fwd=uri-miss; collapsed");
    assert_eq!(joined.token(), forced.token(), "later requests join the later flight");
    earlier_hold.release();
    let earlier = earlier.reply().await;
    assert_eq!(earlier.cache_status(), "connect-sidecar; fwd=uri-miss", "it lands, but is not stored");
    assert_ne!(earlier.token(), forced.token());

    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), (HIT, forced.token()));
    assert_eq!(stage.token_requests(), 2);
}

#[tokio::test]
async fn an_earlier_answer_is_not_stored_while_a_forced_request_is_in_flight() {
    let stage = Scene::new().start().await;
    let (earlier_hold, forced_hold) = (stage.gate_next(), stage.gate_next());
    let earlier = stage.under_way(stage.token(APP)).await;
    let forced = stage.under_way(forced(stage.token(APP))).await;
    earlier_hold.release();
    assert_eq!(earlier.reply().await.cache_status(), "connect-sidecar; fwd=uri-miss");
    let joined = stage.token(APP).begin().await;
    stage.caught_up().await;
    forced_hold.release();
    let (forced, joined) = (forced.reply().await, joined.reply().await);
    assert_eq!(joined.cache_status(), "connect-sidecar; fwd=uri-miss; collapsed");
    assert_eq!(joined.token(), forced.token());
    assert_eq!(stage.token_requests(), 2);
}

#[tokio::test]
async fn serves_valid_tokens_with_an_expired_credential_unless_forced() {
    let long = seconds(48 * 3600);
    let stage = Scene::new()
        .toml("[cache]\nmax_age = \"48h\"")
        .world(|world| world.connector_mut(SLACK_UID).expect("a connector").token_life = long)
        .start()
        .await;
    let token = stage.slack_token().await;
    stage.pass(seconds(12 * 3600));
    let refused = forced(stage.token(APP)).send().await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "oidc_token_expired"));
    let other = stage.token(USER).send().await;
    assert_eq!((other.status, other.code().as_str()), (503, "oidc_token_expired"));
    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), ("connect-sidecar; hit; ttl=129570", token.clone()));
    let respelled = stage.token(&format!(" {APP}")).send().await;
    assert_eq!((respelled.status, respelled.token()), (200, token));
    assert_eq!(stage.token_requests(), 1);
}

#[tokio::test]
async fn a_client_that_asks_again_for_its_token_gets_a_fresh_one() {
    const FRESH: &str = "connect-sidecar; fwd=request; stored; ttl=3570";
    let stage = Scene::new().start().await;
    let mut last = String::new();
    for (client, status, what) in [
        (Some("a"), MISS, "it has none"),
        (Some("a"), FRESH, "its own cache would have answered"),
        (Some("b"), HIT, "another process has none"),
        (None, HIT, "nobody in particular"),
        (None, HIT, "nobody in particular, again"),
        (Some("b"), FRESH, "now it had"),
        (Some("a"), HIT, "it has an older one"),
        (Some("a"), FRESH, "and now this one"),
    ] {
        let request = stage.token(APP);
        let reply = match client {
            Some(client) => request.header("sidecar-client", client),
            None => request,
        }
        .send()
        .await;
        assert_eq!(reply.cache_status(), status, "{client:?}: {what}");
        assert_eq!(reply.token() == last, status == HIT, "{client:?}: {what}");
        last = reply.token();
    }
    let other = stage.token(USER).header("sidecar-client", "a").send().await;
    assert_eq!(other.cache_status(), MISS, "another token");

    let hold = stage.gate_next();
    let leader = stage.under_way(stage.token("{}").header("sidecar-client", "a")).await;
    let joined = stage.token("{}").header("sidecar-client", "b").begin().await;
    stage.caught_up().await;
    hold.release();
    assert_eq!(leader.reply().await.token(), joined.reply().await.token());
    let again = stage.token("{}").header("sidecar-client", "b").send().await;
    assert_eq!(again.cache_status(), FRESH, "it received the first token by joining");
    assert!(stage.emulator.received().iter().all(|request| !request.headers.contains_key("sidecar-client")));
}

#[tokio::test]
async fn concurrent_equal_requests_send_one_upstream_request() {
    let stage = Scene::new().start().await;
    for round in 1..=2 {
        let hold = stage.gate_next();
        let mut under_way = Vec::new();
        for spelling in [APP, r#"{"subject": {"type": "app"}}"#].iter().cycle().take(200) {
            under_way.push(stage.token(spelling).begin().await);
        }
        stage.caught_up().await;
        assert_eq!(stage.token_requests(), round);
        hold.release();
        let (mut stored, mut collapsed, mut tokens) = (0, 0, Vec::new());
        for sent in under_way {
            let reply = sent.reply().await;
            match reply.cache_status() {
                MISS => stored += 1,
                "connect-sidecar; fwd=uri-miss; collapsed" => collapsed += 1,
                other => panic!("{other}"),
            }
            assert_eq!(reply.header("age"), None);
            tokens.push(reply.token());
        }
        assert_eq!((stored, collapsed), (1, 199));
        tokens.dedup();
        assert_eq!(tokens.len(), 1);
        assert_eq!(stage.token_requests(), round);
        // In the next round, the entry has just expired.
        stage.pass(seconds(3570));
    }
}

#[tokio::test]
async fn client_disconnects_do_not_cancel_the_fetch() {
    let stage = Scene::new().start().await;
    let hold = stage.gate_next();
    let leader = stage.under_way(stage.token(APP)).await;
    let joined = stage.token(APP).begin().await;
    stage.caught_up().await;
    drop((leader, joined));
    stage.caught_up().await;
    let patient = stage.token(APP).begin().await;
    stage.caught_up().await;
    hold.release();
    let reply = patient.reply().await;
    assert_eq!(reply.cache_status(), "connect-sidecar; fwd=uri-miss; collapsed");
    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), (HIT, reply.token()));
    assert_eq!(stage.token_requests(), 1);
}

#[tokio::test]
async fn an_answer_is_stored_even_if_all_clients_have_disconnected() {
    let stage = Scene::new().start().await;
    let hold = stage.gate_next();
    let only = stage.under_way(stage.token(APP)).await;
    drop(only);
    stage.caught_up().await;
    hold.release();
    // This joins the flight if it has not ended yet.
    let token = stage.slack_token().await;
    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), (HIT, token));
    assert_eq!(stage.token_requests(), 1);
}

#[tokio::test]
async fn an_error_is_shared_by_waiting_requests_only() {
    let stage = Scene::new().start().await;
    let target = "/v1/connect/token/salesforce%2Fcrm";
    let hold = stage.gate_next();
    let mut under_way = Vec::new();
    for _ in 0..5 {
        under_way.push(stage.request("POST", target).json("{}").begin().await);
    }
    stage.caught_up().await;
    hold.release();
    let mut statuses = Vec::new();
    for sent in under_way {
        let reply = sent.reply().await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (403, Some("forbidden")));
        statuses.push(reply.cache_status().to_owned());
    }
    statuses.sort_unstable();
    assert_eq!(statuses[0], "connect-sidecar; fwd=uri-miss");
    assert!(statuses[1..].iter().all(|status| status == "connect-sidecar; fwd=uri-miss; collapsed"), "{statuses:?}");
    assert_eq!(stage.token_requests(), 1);

    stage.emulator.change(|world| {
        let links = world.connector(SLACK_UID).expect("a connector").links.clone();
        world.connector_mut("salesforce/crm").expect("a connector").links = links;
    });
    assert_eq!(stage.request("POST", target).json("{}").send().await.cache_status(), MISS);
}

#[tokio::test]
async fn a_429_is_held_for_its_key_as_long_as_it_asks() {
    let stage = Scene::new().start().await;
    let date = httpdate::fmt_http_date(UNIX_EPOCH + seconds(stage.clock.now().as_seconds() + 7));
    for (retry_after, held_for) in [
        (Some(date.as_str()), 7),
        (Some("7"), 7),
        (None, 1),
        (Some("soon"), 1),
        (Some("-3"), 1),
        (Some("3600"), 60),
        (Some("99999999999999999999"), 60),
    ] {
        let body = crate::support::body(&format!("{retry_after:?}"));
        let ask = async || stage.token(&body).send().await;
        let before = stage.token_requests();
        stage.emulator.inject(Fault::rate_limited(retry_after));
        let first = ask().await;
        assert_eq!((first.status, first.header("retry-after")), (429, retry_after), "unchanged");
        assert_eq!(first.cache_status(), "connect-sidecar; fwd=uri-miss");

        stage.pass(seconds(held_for) - Duration::from_millis(500));
        let repeated = ask().await;
        assert_eq!((repeated.status, &repeated.body), (429, &first.body), "{retry_after:?}");
        assert_eq!(repeated.cache_status(), "connect-sidecar; hit; detail=429");
        assert_eq!(repeated.header("age"), Some((held_for - 1).to_string().as_str()));
        assert_eq!(repeated.header("retry-after"), Some("1"), "the remaining time");
        assert_eq!(stage.token_requests(), before + 1);
        assert_eq!(stage.token(USER).send().await.status, 200, "another key is not affected");

        stage.pass(Duration::from_millis(500));
        assert_eq!(ask().await.cache_status(), MISS, "{retry_after:?}");
    }
}

#[tokio::test]
async fn drops_the_least_recently_used_token() {
    let stage = Scene::new().toml("[cache]\nmax_entries = 2").start().await;
    let ask = async |scope: &str| stage.token(&format!(r#"{{"scopes":["{scope}"]}}"#)).send().await;
    for (scope, status) in
        [("a", MISS), ("b", MISS), ("a", HIT), ("c", MISS), ("a", HIT), ("c", HIT), ("b", MISS), ("a", MISS)]
    {
        assert_eq!(ask(scope).await.cache_status(), status, "{scope}");
    }
    assert_eq!(stage.status().await["cache"]["entries"], 2);
}

#[tokio::test]
async fn does_not_store_token_exchanges() {
    let stage = Scene::new().start().await;
    let body = r#"{"subject":{"type":"token","token":"ya29.CANARY"}}"#;
    for paid in 1..=2 {
        let reply = stage.request("POST", LINEAR).json(body).send().await;
        assert_eq!((reply.status, reply.cache_status()), (200, "connect-sidecar; fwd=uri-miss"));
        assert_eq!(stage.token_requests(), paid);
    }
    assert_eq!(stage.status().await["cache"]["entries"], 0);
}

#[tokio::test]
async fn a_revocation_evicts_a_connector_by_either_name_and_no_other() {
    for revoked in ["slack%2Facme-slack", "slack%2facme-slack", "scl_slack"] {
        let stage = Scene::new().start().await;
        let ask = async |path| stage.request("POST", path).json(APP).send().await;
        let paths = [SLACK, "/v1/connect/token/scl_slack"];
        for path in paths.into_iter().chain([GITHUB]) {
            assert_eq!(ask(path).await.cache_status(), MISS);
        }
        assert_eq!(stage.token(USER).send().await.cache_status(), MISS);
        assert_eq!(stage.revoke(revoked).await.status, 200);
        for path in paths {
            assert_eq!(ask(path).await.cache_status(), MISS, "{path} after {revoked}");
        }
        assert_eq!(stage.token(USER).send().await.status, 422, "the grant was revoked");
        assert_eq!(ask(GITHUB).await.cache_status(), HIT, "another connector");
    }
}

#[tokio::test]
async fn a_revocation_that_was_sent_evicts_whatever_its_answer() {
    let stage = Scene::new().start().await;
    for (fault, status) in [
        (Fault::answer(204, "application/json", ""), 204),
        (Fault::status(500, "internal"), 500),
        (Fault::status(404, "not_found"), 404),
        (Fault::rate_limited(Some("9")), 429),
        (Fault::once(FaultKind::Reset), 502),
        (Fault::answer(200, "text/html", "<html>"), 502),
    ] {
        let old = stage.slack_token().await;
        stage.emulator.inject(fault);
        let reply = stage.revoke("slack%2Facme-slack").await;
        assert_eq!((reply.status, reply.header("cache-status")), (status, None));
        assert_ne!(stage.slack_token().await, old, "{status}");
    }

    let old = stage.slack_token().await;
    let refused = stage.request("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens?all").send().await;
    assert_eq!(refused.code(), "query_not_allowed");
    assert_eq!(stage.slack_token().await, old, "a revocation that was not sent evicts nothing");
}

#[tokio::test]
async fn an_answer_in_flight_during_a_revocation_is_not_stored() {
    let stage = Scene::new().start().await;
    for (asked, revoked) in [
        (SLACK, "slack%2Facme-slack"),
        (SLACK, "scl_slack"),
        ("/v1/connect/token/scl_slack", "slack%2Facme-slack"),
        ("/v1/connect/token/scl_slack", "scl_slack"),
    ] {
        stage.revoke(revoked).await;
        let hold = stage.gate_next();
        let before = stage.under_way(stage.request("POST", asked).json(APP)).await;
        assert_eq!(stage.revoke(revoked).await.status, 200);
        let after = stage.request("POST", asked).json(APP).send().await;
        assert_eq!(after.cache_status(), MISS, "it does not join a flight from before the revocation");
        hold.release();
        let before = before.reply().await;
        assert_eq!(before.cache_status(), "connect-sidecar; fwd=uri-miss", "{asked}, {revoked}");
        assert_ne!(before.token(), after.token());
        let hit = stage.request("POST", asked).json(APP).send().await;
        assert_eq!((hit.cache_status(), hit.token()), (HIT, after.token()));
    }
}

#[tokio::test]
async fn an_answer_stored_during_a_revocation_is_evicted() {
    let stage = Scene::new().start().await;
    let hold = AnswerHold::default();
    stage.emulator.inject(Fault::once(FaultKind::Hold(hold.clone())).on("/tokens"));
    let before = stage.slack_token().await;
    let revocation = stage.under_way(stage.request("DELETE", "/v1/connect/connectors/scl_slack/tokens")).await;
    let meanwhile = stage.slack_token().await;
    assert_ne!(meanwhile, before, "the old token is dropped when the revocation is sent");
    hold.release();
    assert_eq!(revocation.reply().await.status, 200);
    assert_ne!(stage.slack_token().await, meanwhile);
}

#[tokio::test]
async fn a_change_of_principal_empties_the_cache() {
    let mut stage = Scene::new().start().await;
    let first = stage.slack_token().await;
    stage.token(USER).send().await;
    let [ada, bob] = ["user_ada", "user_bob"].map(|user| stage.token_of(|subject| subject.user_id = Some(user.into())));
    stage.write_env(&bob);
    stage.uses(&bob).await;
    assert_eq!(stage.status().await["cache"]["entries"], 0, "even before the next request");
    let second = stage.token(APP).send().await;
    assert_eq!(second.cache_status(), MISS);
    assert_ne!(second.token(), first);

    stage.write_env(&ada);
    stage.uses(&ada).await;
    assert_eq!(stage.token(APP).send().await.cache_status(), MISS, "nothing is kept for a change back");
}

#[tokio::test]
async fn an_answer_in_flight_for_another_principal_is_neither_stored_nor_shared() {
    let mut stage = Scene::new().start().await;
    let hold = stage.gate_next();
    let before = stage.under_way(stage.token(APP)).await;
    let bob = stage.token_of(|subject| subject.user_id = Some("user_bob".into()));
    stage.write_env(&bob);
    stage.uses(&bob).await;

    let after = stage.token(APP).send().await;
    assert_eq!(after.cache_status(), MISS, "not collapsed");
    hold.release();
    let before = before.reply().await;
    assert_eq!(before.cache_status(), "connect-sidecar; fwd=uri-miss", "not stored");
    assert_ne!(before.token(), after.token());
    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), (HIT, after.token()));
    let bearers: Vec<_> = stage.emulator.received().iter().map(|r| r.headers["authorization"].clone()).collect();
    assert_ne!(bearers[0], bearers[1]);
}

#[tokio::test]
async fn a_rotated_token_of_the_same_principal_keeps_the_cache_and_the_flights() {
    let mut stage = Scene::new().start().await;
    let token = stage.slack_token().await;
    let hold = stage.gate_next();
    let in_flight = stage.under_way(stage.token(USER)).await;
    stage.pass(seconds(60));
    let fresh = stage.fresh_token(seconds(12 * 3600));
    stage.write_env(&fresh);
    stage.uses(&fresh).await;

    let hit = stage.token(APP).send().await;
    assert_eq!((hit.cache_status(), hit.token()), ("connect-sidecar; hit; ttl=3510", token));
    let joined = stage.token(USER).begin().await;
    stage.caught_up().await;
    hold.release();
    assert_eq!(joined.reply().await.token(), in_flight.reply().await.token());
    assert_eq!(stage.token_requests(), 2);
}

#[tokio::test]
async fn single_flight_works_with_the_cache_off() {
    let stage = Scene::new().toml("[cache]\nmax_age = \"0s\"").start().await;
    for (paid, request, status) in [
        (1, stage.token(APP), "connect-sidecar; fwd=bypass"),
        (2, stage.token(APP), "connect-sidecar; fwd=bypass"),
        (3, forced(stage.token(APP)), "connect-sidecar; fwd=request"),
    ] {
        let reply = request.send().await;
        assert_eq!((reply.status, reply.cache_status(), reply.header("age")), (200, status, None));
        assert_eq!(stage.token_requests(), paid);
    }
    let hold = stage.gate_next();
    let mut under_way = Vec::new();
    for _ in 0..20 {
        under_way.push(stage.token(APP).begin().await);
    }
    stage.caught_up().await;
    hold.release();
    let mut tokens = Vec::new();
    for sent in under_way {
        tokens.push(sent.reply().await.token());
    }
    tokens.dedup();
    assert_eq!((tokens.len(), stage.token_requests()), (1, 4));
    assert_eq!(stage.status().await["cache"]["entries"], 0);
}

#[tokio::test]
async fn the_cache_endpoint_evicts_with_the_key() {
    let stage = Scene::new().start().await;
    let cache = "/_sidecar/v1/cache";
    let ask = async |path| stage.request("POST", path).json(APP).send().await.cache_status().to_owned();
    for path in [SLACK, "/v1/connect/token/scl_slack", GITHUB] {
        assert_eq!(ask(path).await, MISS);
    }

    for (request, status, code) in [
        (stage.request("DELETE", cache), 401, "key_required"),
        (stage.request("DELETE", cache).header("sidecar-key", "wrong"), 401, "key_required"),
        (stage.request("DELETE", &format!("{cache}?connector=scl_slack")), 401, "key_required"),
        (stage.request("GET", cache).header("sidecar-key", &stage.key()), 405, "method_not_allowed"),
        (
            stage.request("DELETE", &format!("{cache}?connector=")).header("sidecar-key", &stage.key()),
            400,
            "bad_connector",
        ),
    ] {
        let reply = request.send().await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code));
    }
    assert_eq!(ask(SLACK).await, HIT, "none of these emptied the cache");

    let empty = async |query: &str| {
        let reply =
            stage.request("DELETE", &format!("{cache}{query}")).header("sidecar-key", &stage.key()).send().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    empty("?connector=slack%2Facme-slack").await;
    assert_eq!(ask(GITHUB).await, HIT);
    assert_eq!(ask(SLACK).await, MISS);
    assert_eq!(ask("/v1/connect/token/scl_slack").await, MISS, "under the other name, too");
    empty("?connector=scl_github").await;
    assert_eq!(ask(SLACK).await, HIT);
    assert_eq!(ask(GITHUB).await, MISS);

    let hold = stage.gate_next();
    let in_flight = stage.under_way(stage.token(USER)).await;
    empty("").await;
    hold.release();
    assert_eq!(
        in_flight.reply().await.cache_status(),
        "connect-sidecar; fwd=uri-miss",
        "the answer in flight is not stored, either"
    );
    assert_eq!(stage.status().await["cache"]["entries"], 0);
    for path in [SLACK, "/v1/connect/token/scl_slack", GITHUB] {
        assert_eq!(ask(path).await, MISS);
    }
    assert_eq!(stage.emulator.count("/_sidecar/"), 0);
}
