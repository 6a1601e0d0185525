//! Consents and installations that an app starts and the admin API decides; imported tokens; revocation.

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use serde_json::{Value, json};

use super::{OWNER, SLACK, admin, emulator, refusal, request};
use crate::support::http::APP;

async fn begin(emulator: &Emulator, target: &str, body: &Value) -> Value {
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let reply = request(emulator, &token, "POST", target).json(&body.to_string()).send().await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

async fn result(emulator: &Emulator, verifier: &Value) -> Value {
    let target = format!("/v1/connect/result/{}", verifier.as_str().expect("a verifier"));
    let reply = request(emulator, OWNER, "GET", &target).send().await;
    if reply.status == 404 { json!({"status": 404}) } else { reply.json() }
}

#[tokio::test]
async fn an_approved_consent_gives_a_token() {
    let emulator = emulator("").await;
    let user = json!({"subject": {"type": "user", "id": "app_user_2"}, "returnUrl": "http://localhost:3000/done"});
    let ask = || {
        let token = emulator.oidc_token(DEVELOPMENT_LIFE);
        request(&emulator, &token, "POST", SLACK).json(&user.to_string())
    };
    assert_eq!(refusal(ask()).await.1, "user_authorization_required");
    let begun = begin(&emulator, "/v1/connect/authorize/slack%2Facme-slack", &user).await;
    let url = begun["url"].as_str().expect("a URL");
    assert!(url.starts_with(&format!("{}/api/v1/connect/authorize/slack%2F", emulator.url())), "{url}");
    assert_eq!(begun["connector"]["uid"], "slack/acme-slack");
    assert!(begun["deviceCode"].is_null() && begun["expiresAt"].is_number());
    assert_eq!(result(&emulator, &begun["verifier"]).await["status"], "pending");
    let pending = admin(&emulator, "GET", "consents", "").await.json();
    assert_eq!(pending["consents"][0]["request"], begun["request"]);
    assert!(!pending.to_string().contains(begun["verifier"].as_str().expect("text")), "only its beginner knows it");

    let approved = admin(&emulator, "POST", "consents", &json!({ "url": url }).to_string()).await;
    assert_eq!((approved.status, &approved.json()["status"]), (200, &"success".into()));
    assert_eq!(result(&emulator, &begun["verifier"]).await["status"], "success");
    assert!(ask().send().await.token().starts_with("xoxe.xoxp-"));
    let again = admin(&emulator, "POST", "consents", &json!({ "url": url }).to_string()).await;
    assert_eq!(again.status, 404, "it is decided");
}

#[tokio::test]
async fn a_denied_consent_gives_no_token() {
    let emulator = emulator("").await;
    let user = json!({"subject": {"type": "user", "id": "app_user_2"}, "deviceCode": true});
    let begun = begin(&emulator, "/v1/connect/authorize/slack%2Facme-slack", &user).await;
    assert!(begun["deviceCode"].is_string());
    let denied = json!({"url": begun["url"], "deny": true}).to_string();
    assert_eq!(admin(&emulator, "POST", "consents", &denied).await.json()["status"], "canceled");
    assert_eq!(result(&emulator, &begun["verifier"]).await["status"], "canceled");
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    assert_eq!(request(&emulator, &token, "POST", SLACK).json(&user.to_string()).send().await.status, 422);
    assert_eq!(result(&emulator, &"unknown".into()).await["status"], 404);
    for body in [r#"{"url":"https://vercel.com/x"}"#, r#"{"url":"/api/v1/connect/authorize/slack%2Facme-slack"}"#] {
        assert_eq!(admin(&emulator, "POST", "consents", body).await.status, 400, "{body}");
    }
}

#[tokio::test]
async fn an_installation_is_in_the_requested_tenant() {
    let more =
        "[[connectors]]\nuid = \"github/app\"\nlinks = [{ project = \"web\", environments = [\"development\"] }]";
    let emulator = emulator(more).await;
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let ask = || request(&emulator, &token, "POST", "/v1/connect/token/github%2Fapp").json(APP);
    assert_eq!(refusal(ask()).await.1, "client_installation_required");
    let begun = begin(&emulator, "/v1/connect/install/github%2Fapp", &json!({"tenantId": "acme-org"})).await;
    admin(&emulator, "POST", "consents", &json!({"url": begun["url"], "tenant": "other"}).to_string()).await;
    let told = result(&emulator, &begun["verifier"]).await;
    let given = ask().send().await.json();
    assert_eq!((&given["tenantId"], &given["installationId"]), (&"acme-org".into(), &told["data"]["installationId"]));
}

#[tokio::test]
async fn a_webhook_must_be_https_and_a_subject_a_user() {
    let emulator = emulator("").await;
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let target = "/v1/connect/authorize/slack%2Facme-slack";
    for (body, status) in [
        (r#"{"webhook":"http://localhost/hook","subject":{"type":"user","id":"u"}}"#, 400),
        (r#"{"webhook":"https://app.example/hook","subject":{"type":"user","id":"u"}}"#, 200),
        (r#"{"subject":{"type":"app"}}"#, 422),
        (r#"{"scopes":"chat:write"}"#, 400),
        ("[", 400),
        ("[]", 400),
    ] {
        assert_eq!(request(&emulator, &token, "POST", target).json(body).send().await.status, status, "{body}");
    }
}

#[tokio::test]
async fn imported_tokens_are_returned_until_they_expire_or_are_revoked() {
    let emulator = emulator("").await;
    let (oidc, ends) = (emulator.oidc_token(DEVELOPMENT_LIFE), 4_000_000_000_000_u64);
    let token = |subject: Value, name: &str, environment: &str, ends: u64| json!({"accessToken": name, "expiresAt": ends, "subject": subject, "environment": environment});
    let app = json!({"type": "app"});
    let user = json!({"type": "user", "id": "app_user_9"});
    let tokens = json!({"tokens": [
        token(app.clone(), "over", "development", 1),
        token(app.clone(), "elsewhere", "preview", ends),
        token(app, "imported-app", "development", ends),
        token(user.clone(), "imported-user", "development", ends),
        token(json!({"type": "jwt-bearer"}), "never", "development", ends),
    ]});
    let import = format!("{SLACK}/import");
    assert_eq!(request(&emulator, &oidc, "POST", &import).json(&tokens.to_string()).send().await.status, 403);
    let reply = request(&emulator, OWNER, "POST", &import).json(&tokens.to_string()).send().await.json();
    assert_eq!((&reply["accepted"], &reply["imported"]), (&5.into(), &4.into()));
    assert!(!reply.to_string().contains("imported-"), "no token comes back");

    let ask = async |subject: &Value| {
        let body = json!({ "subject": subject }).to_string();
        request(&emulator, &oidc, "POST", SLACK).json(&body).send().await
    };
    assert_eq!(ask(&json!({"type": "app"})).await.token(), "imported-app");
    assert_eq!(ask(&user).await.token(), "imported-user");
    let body = json!({ "subject": user }).to_string();
    let target = "/v1/connect/connectors/slack%2Facme-slack/tokens";
    let revoked = request(&emulator, &oidc, "DELETE", target).json(&body).send().await.json();
    assert_eq!(revoked["deleted"], 1);
    assert_eq!(ask(&user).await.status, 422);
    assert_eq!(ask(&json!({"type": "app"})).await.token(), "imported-app", "others stay");
}
