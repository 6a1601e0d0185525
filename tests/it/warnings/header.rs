//! The response header `Sidecar-Oidc-Expires-In`.

use std::time::Duration;

use connect_sidecar::emulator::fault::Fault;

use super::MINUTE;
use crate::support::http::{APP, Reply, Request};
use crate::support::tunnel::{Run, slack};
use crate::support::{Scene, Stage, body};

const CONNECTOR: &str = "/v1/connect/connectors/slack%2Facme-slack";

fn left(reply: &Reply) -> Option<&str> {
    reply.header("sidecar-oidc-expires-in")
}

impl Stage {
    /// One request of each kind, those to Connect first, with the number of those.
    fn of_each_kind(&self) -> (Vec<Request>, usize) {
        let to_connect = [
            self.token(APP),
            self.token(&body("another")),
            self.token(APP).header("cache-control", "no-cache"),
            self.token("["),
            self.token(APP).header("content-type", "text/plain"),
            self.request("POST", "/v1/connect/token/salesforce%2Fcrm").json(APP),
            self.request("POST", "/v1/connect/authorize/slack%2Facme-slack").json("{}"),
            self.request("POST", "/v1/connect/install/slack%2Facme-slack").json("{}"),
            self.request("GET", CONNECTOR),
            self.request("DELETE", &format!("{CONNECTOR}/tokens")),
        ];
        let others = ["/healthz", "/readyz", "/metrics", "/_sidecar/v1/status", "/v1/other", "/"];
        let count = to_connect.len();
        (to_connect.into_iter().chain(others.map(|path| self.request("GET", path))).collect(), count)
    }
}

#[tokio::test]
async fn every_connect_response_has_it_from_the_longest_step_on() {
    let stage = Scene::new().token_life(2 * 60 * MINUTE).start().await;
    stage.token(APP).send().await.token();
    for (later, expected) in [
        (Duration::ZERO, None),
        (60 * MINUTE - Duration::from_millis(1), None),
        (Duration::from_millis(1), Some("3600")),
        (Duration::from_millis(1500), Some("3598")),
        (59 * MINUTE, Some("58")),
        (10 * MINUTE, Some("0")),
    ] {
        stage.pass(later);
        let (requests, to_connect) = stage.of_each_kind();
        for (n, request) in requests.into_iter().enumerate() {
            let shown = format!("{request:?} after {later:?}");
            let reply = request.send().await;
            let expected = expected.filter(|_| n < to_connect);
            assert_eq!(left(&reply), expected, "{shown}: {}", reply.text());
        }
    }
}

#[tokio::test]
async fn cache_hits_collapsed_requests_cached_errors_and_intercepted_requests_have_it_too() {
    let stage = Scene::new().token_life(10 * MINUTE).start().await;
    let hold = stage.emulator.hold_answers();
    let leader = stage.under_way(stage.token(APP)).await;
    let joined = stage.token(APP).begin().await;
    stage.caught_up().await;
    hold.release();
    for sent in [leader, joined] {
        assert_eq!(left(&sent.reply().await), Some("600"));
    }
    stage.pass(MINUTE);
    let hit = stage.token(APP).send().await;
    assert!(hit.cache_status().starts_with("connect-sidecar; hit"), "{hit:?}");
    assert_eq!(left(&hit), Some("540"));
    stage.emulator.inject(Fault::rate_limited(Some("60")));
    for _ in 0..2 {
        let limited = stage.token(&body("limited")).send().await;
        assert_eq!((limited.status, left(&limited)), (429, Some("540")));
    }
    let mut opened = Run::of(&stage).await.open("api.vercel.com").await;
    assert_eq!(left(&opened.send(slack(&opened)).await), Some("540"));
}

#[tokio::test]
async fn it_disappears_with_a_fresh_token_and_without_one() {
    let mut stage = Scene::new().token_life(10 * MINUTE).start().await;
    assert_eq!(left(&stage.token(APP).send().await), Some("600"));
    stage.pass(Duration::from_secs(1));
    let fresh = stage.fresh_token(120 * MINUTE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let hit = stage.token(APP).send().await;
    assert!(hit.cache_status().starts_with("connect-sidecar; hit"), "{hit:?}");
    assert_eq!(left(&hit), None);

    let stage = Scene::new().without_env_file().start().await;
    assert_eq!(left(&stage.token(APP).send().await), None, "no token, no expiry");
}
