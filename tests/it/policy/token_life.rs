//! Group T: warnings before the OIDC token expires, and requests afterwards.

use crate::support::scripted::Says;

use super::contract::{
    Start, at_a_rate_of, fresh_jwt, json_answer, jwt, ms, now_ms, seconds, start, stated, token_answer,
};

/// M's response to a rejected token.
pub const UNAUTHORIZED: &str = r#"{"error":{"code":"unauthorized","message":"m"}}"#;

/// A sidecar whose token expires in this many seconds.
pub async fn with_life(seconds: i64) -> Start {
    let token = jwt(|claims| claims["exp"] = (now_ms() / 1000).saturating_add_signed(seconds).into());
    let mut prepared = Start::new().await.env_file(format!("VERCEL_OIDC_TOKEN=\"{token}\"\n"));
    prepared.j0 = token;
    prepared
}

pub async fn tT01_warns_once_in_the_last_hour() {
    let s = with_life(59 * 60).await.serve().await;
    stated(seconds(60)).await;
    s.pass(s.req()).await;
    let log = s.serving.stop().await.stderr;
    assert_eq!(log.matches("run `vercel env pull`").count(), 1, "{log}");
    assert!(log.contains("the OIDC token of acme/web expires in 5"), "{log}");
}

#[tokio::test]
async fn tT02_does_not_warn_before_the_last_hour() {
    let s = with_life(11 * 3600).await.serve().await;
    s.pass(s.req()).await;
    let log = s.serving.stop().await.stderr;
    assert!(!log.contains("vercel env pull"), "{log}");
}

pub async fn tT03_does_not_send_an_expired_token() {
    let s = with_life(-300).await.serve().await;
    s.m.otherwise(|_, _| json_answer(401, "", UNAUTHORIZED).into());
    at_a_rate_of(4, 20, async |_| {
        let reply = s.req().send().await;
        reply.assert_refused(503, "oidc_token_expired", "an expired token");
        assert!(reply.text().contains("vercel env pull"), "{}", reply.text());
    })
    .await;
    // One clock check, without a credential.
    let seen = s.m.received();
    assert!(seen.len() <= 1 && seen.iter().all(|seen| seen.values("authorization").is_empty()), "{seen:?}");
}

pub async fn tT05_retries_once_with_a_fresh_token() {
    let s = start().await;
    let fresh = fresh_jwt();
    let bearer = format!("Bearer {fresh}");
    s.m.otherwise(move |seen, n| match seen.values("authorization") == [bearer.as_str()] {
        true => token_answer(n).into(),
        false => Says::from(json_answer(401, "", UNAUTHORIZED)).after(seconds(1)),
    });
    let changing = async {
        stated(ms(300)).await;
        s.write_env(&fresh);
    };
    let (reply, ()) = tokio::join!(s.req().send(), changing);
    assert_eq!(reply.status, 200, "{}", reply.text());
    let bearers: Vec<_> = s.m.received().iter().map(|seen| seen.values("authorization").concat()).collect();
    assert_eq!(bearers, [format!("Bearer {}", s.j0), format!("Bearer {fresh}")]);
}
