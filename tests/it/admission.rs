//! Limits on concurrent upstream requests and their rate. Requests beyond them are refused unsent and do not affect
//! others (docs/security.md L1).

use std::time::Duration;

use connect_sidecar::emulator::fault::{Fault, FaultKind};

use crate::support::http::Reply;
use crate::support::{Scene, Stage, body, is_over, let_timers_pass, let_upstream_recover, soon};

/// Sends `count` different token requests at once.
async fn flood(stage: &Stage, count: usize) -> Vec<Reply> {
    let requests: Vec<_> = (0..count).map(|n| tokio::spawn(stage.token(&body(&n.to_string())).send())).collect();
    let mut replies = Vec::new();
    for request in requests {
        replies.push(soon("a reply", request).await.expect("no panic"));
    }
    replies
}

fn assert_refused(reply: &Reply, status: u16, code: &str) {
    assert_eq!((reply.status, reply.code().as_str()), (status, code), "{}", reply.text());
    assert_eq!((reply.header("retry-after"), reply.cache_status()), (Some("1"), "none"), "{reply:?}");
}

#[tokio::test]
async fn sixteen_fetches_run_at_once_and_the_rest_wait() {
    let stage = Scene::new().start().await;
    let hold = stage.emulator.hold_answers();
    let mut requests = Vec::new();
    for n in 0..18 {
        for _ in 0..3 {
            requests.push(stage.token(&body(&n.to_string())).begin().await);
        }
    }
    soon("the first", stage.emulator.wait_for_requests(16)).await;
    for _ in 0..5 {
        stage.caught_up().await;
    }
    assert_eq!(stage.emulator.received().len(), 16, "requests for one key share a slot");
    hold.release();
    for request in requests {
        assert_eq!(request.reply().await.status, 200);
    }
    assert_eq!(stage.emulator.received().len(), 18);
}

#[tokio::test]
async fn waiting_5_s_for_a_slot_fails_and_cached_tokens_need_none() {
    let stage = Scene::new().start().await;
    let cached = stage.slack_token().await;
    let hold = stage.emulator.hold_answers();
    let mut under_way = Vec::new();
    for n in 0..16 {
        under_way.push(stage.under_way(stage.token(&body(&n.to_string()))).await);
    }
    let revocation = stage.request("DELETE", "/v1/connect/connectors/github%2Facme-github/tokens");
    let forced = stage.token(r#"{"subject":{"type":"app"}}"#).header("cache-control", "no-cache");
    let mut waiting = Vec::new();
    for request in [stage.token("{}"), stage.token("{}"), forced, revocation] {
        waiting.push(request.begin().await);
    }
    stage.caught_up().await;
    let replies = tokio::spawn(async {
        let mut replies = Vec::new();
        for request in waiting {
            replies.push(request.reply_at_last().await);
        }
        replies
    });
    let_timers_pass(Duration::from_millis(4900)).await;
    assert!(!is_over(&replies, &stage).await);
    let_timers_pass(Duration::from_millis(100)).await;
    for reply in soon("the replies", replies).await.expect("no panic") {
        assert_refused(&reply, 503, "overloaded");
    }
    assert_eq!(stage.slack_token().await, cached, "an unsent forced request does not replace it");
    let upstream = &stage.status().await["upstream"];
    assert_eq!(
        (&upstream["requests"], &upstream["errors"]),
        (&17.into(), &0.into()),
        "these are not upstream's errors"
    );

    hold.release();
    for request in under_way {
        assert_eq!(request.reply().await.status, 200);
    }
    assert_eq!(stage.token("{}").send().await.status, 200);
    assert_eq!(stage.emulator.received().len(), 18);
}

#[tokio::test]
async fn a_slot_is_released_however_its_request_ends() {
    let stage = Scene::new().start().await;
    for trouble in [FaultKind::Reset, FaultKind::Truncate, FaultKind::Hang] {
        let hangs = matches!(trouble, FaultKind::Hang);
        stage.emulator.inject(Fault::always(trouble).on("github"));
        let mut requests = Vec::new();
        for n in 0..16 {
            let request = stage.request("POST", "/v1/connect/token/github%2Facme-github").json(&body(&n.to_string()));
            requests.push(stage.under_way(request).await);
        }
        if hangs {
            let_timers_pass(Duration::from_secs(20)).await;
        }
        for request in requests {
            assert!(request.reply().await.status >= 502);
        }
        assert_eq!(stage.token(&body("next")).send().await.status, 200);
        let_upstream_recover().await;
    }
}

#[tokio::test]
async fn bursts_over_40_and_20_per_second_are_refused_and_refusals_are_not_cached() {
    let stage = Scene::new().start().await;
    let cached = stage.slack_token().await;
    let replies = flood(&stage, 200).await;
    let answered = replies.iter().filter(|reply| reply.status == 200).count();
    // More than 39 if it took longer.
    assert!((39..200).contains(&answered), "{answered}");
    let refused: Vec<_> = (0..200).filter(|n| replies[*n].status != 200).collect();
    for n in &refused {
        assert_refused(&replies[*n], 429, "local_rate_limit");
    }
    assert_eq!(stage.emulator.received().len(), 1 + answered);
    let upstream = &stage.status().await["upstream"];
    assert_eq!((&upstream["requests"], &upstream["errors"]), (&(1 + answered).into(), &0.into()), "unsent, not failed");
    assert_eq!(stage.slack_token().await, cached);

    let_upstream_recover().await;
    let again = stage.token(&body(&refused[0].to_string())).send().await;
    assert_eq!((again.status, again.cache_status()), (200, "connect-sidecar; fwd=uri-miss; stored; ttl=3570"));
}

#[tokio::test]
async fn revocations_are_never_refused_but_count() {
    let stage = Scene::new().start().await;
    let revocation = stage.request("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens");
    let mut revoked = 0;
    loop {
        for reply in stage.at_once(50, revocation.clone()).await {
            assert_eq!(reply.status, 200, "{}", reply.text());
            revoked += 1;
        }
        let reply = stage.token(&body(&revoked.to_string())).send().await;
        if reply.status == 429 {
            break assert_refused(&reply, 429, "local_rate_limit");
        }
        assert!(revoked < 1000, "revocations do not count");
    }
    assert_eq!(revocation.send().await.status, 200);
}
