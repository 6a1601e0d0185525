//! Callers: the three kinds of credentials, links, permissions and rate limits.

use std::time::Duration;

use connect_sidecar::emulator::errors;
use connect_sidecar::emulator::oidc::Subject;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::os::clock::Clock;

use super::{OWNER, SLACK, admin, emulator, refusal, request};
use crate::support::http::{APP, Request};

const OTHER: &str = r#"{"subject":{"type":"user","id":"app_user_1"}}"#;
const OWN: &str = r#"{"subject":{"type":"user","id":"user_ada"}}"#;
const JWT: &str = r#"{"subject":{"type":"jwt-bearer","sub":"x"}}"#;

#[tokio::test]
async fn an_oidc_token_authorizes_its_project_in_its_environment() {
    let emulator = emulator("").await;
    let token = |change: &dyn Fn(&mut Subject)| {
        let mut subject = emulator.read(Subject::development);
        change(&mut subject);
        emulator.oidc_token_for(&subject, DEVELOPMENT_LIFE)
    };
    let (web, production, preview, worker) = (
        token(&|_| {}),
        token(&|s| s.environment = "production".into()),
        token(&|s| s.environment = "preview".into()),
        token(&|s| s.project_id = "prj_worker".into()),
    );
    let expired = emulator.oidc_token(Duration::ZERO);
    let foreign = token(&|s| s.owner = "evil".into());
    for (bearer, body, status, says) in [
        (&web, APP, 200, ""),
        (&web, OTHER, 200, ""),
        (&web, JWT, 422, "cannot serve"),
        (&production, APP, 200, ""),
        (&web, r#"{"subject":{"type":"user","id":"nobody"}}"#, 422, "has not authorized"),
        (&web, r#"{"subject":{"type":"spirit"}}"#, 422, "cannot serve"),
        (&web, r#"{"subject":{"id":"user_ada"}}"#, 400, "needs a `type`"),
        (&web, r#"{"subject":{"type":"token","token":"t","more":1}}"#, 400, "nothing else"),
        (&web, r#"{"installationId":"inst_other"}"#, 422, "must be installed"),
        (&preview, APP, 403, "not enabled for the preview environment"),
        (&worker, APP, 403, "not linked to this project"),
        (&expired, APP, 401, "expired"),
        (&foreign, APP, 403, "Not authorized"),
    ] {
        let (given, code, message) = refusal(request(&emulator, bearer, "POST", SLACK).json(body)).await;
        assert!(given == status && message.contains(says), "{body}: {given} {code}: {message}");
    }
    let mine = request(&emulator, &web, "POST", SLACK).json(r#"{"subject":{"type":"user"}}"#).send().await;
    assert!(mine.token().starts_with("xoxe.xoxp-"), "the user that the token was issued to");
    let unlinked = request(&emulator, &web, "POST", "/v1/connect/token/oauth%2Flinear").json(APP);
    assert_eq!(refusal(unlinked).await.0, 403);
    for (method, target) in [
        ("GET", "/v2/connect/connectors"),
        ("GET", "/v1/connect/connectors"),
        ("POST", "/v1/connect/connectors"),
        ("DELETE", "/v1/connect/connectors/slack%2Facme-slack"),
        ("POST", "/v1/connect/connectors/slack%2Facme-slack/projects/worker"),
        ("GET", "/v2/user"),
        ("GET", "/v3/env/pull/web/development"),
    ] {
        let (status, _, message) = refusal(request(&emulator, &web, method, target).json("{}")).await;
        assert!(status == 403 && message.contains("OIDC token stands for a project"), "{method} {target}: {message}");
    }
    let provisioning = request(&emulator, &web, "POST", "/v1/connect/connectors/managed/oauth")
        .json(r#"{"serverUrl":"https://mcp.example","uid":"oauth/x"}"#);
    let (status, _, message) = refusal(provisioning).await;
    assert_eq!((status, message.as_str()), (403, "Project OIDC connector provisioning is not allowed."));
}

#[tokio::test]
async fn a_connector_of_another_environment_is_refused() {
    let of = |environment: &str| {
        let links = format!("links = [{{ project = \"web\", environments = [\"{environment}\"] }}]");
        format!("[[connectors]]\nuid = \"oauth/crm-{environment}\"\n{links}\ngranted_to = [\"user_ada\"]\n")
    };
    let environments = ["development", "preview", "production"];
    let emulator = emulator(&environments.map(of).concat()).await;
    for calling in environments {
        let mut subject = emulator.read(Subject::development);
        subject.environment = calling.into();
        let token = emulator.oidc_token_for(&subject, DEVELOPMENT_LIFE);
        for environment in environments {
            let path = format!("oauth%2Fcrm-{environment}");
            let is_its_own = calling == environment;
            for (method, target, body) in [
                ("POST", format!("/v1/connect/token/{path}"), OWN),
                ("POST", format!("/v1/connect/authorize/{path}"), OWN),
                ("GET", format!("/v1/connect/connectors/{path}"), ""),
                ("DELETE", format!("/v1/connect/connectors/{path}/tokens"), OWN),
            ] {
                let (status, _, message) = refusal(request(&emulator, &token, method, &target).json(body)).await;
                let due = if is_its_own { 200 } else { 403 };
                assert_eq!(status, due, "{calling}: {method} {target}: {message}");
            }
        }
    }
}

#[tokio::test]
async fn an_oidc_token_expires_and_is_limited_to_its_project_unlike_an_access_token() {
    let worker = "[[connectors]]\nuid = \"oauth/queue\"\n\
                  links = [{ project = \"worker\", environments = [\"development\"] }]";
    let emulator = emulator(worker).await;
    let oidc = emulator.oidc_token(DEVELOPMENT_LIFE);
    let ask = async |bearer: &str, connector: &str| {
        let target = format!("/v1/connect/token/{connector}?teamId=team_acme");
        request(&emulator, bearer, "POST", &target).json(APP).send().await.status
    };
    for (bearer, own, other) in [(&*oidc, 200, 403), ("vcp_team", 200, 200)] {
        assert_eq!(ask(bearer, "slack%2Facme-slack").await, own, "{bearer}");
        assert_eq!(ask(bearer, "oauth%2Fqueue").await, other, "{bearer}");
    }
    assert_eq!(admin(&emulator, "POST", "faults", r#"{"kind":"clock_skew","by":"13h"}"#).await.status, 204);
    assert_eq!((ask(&oidc, "slack%2Facme-slack").await, ask("vcp_team", "slack%2Facme-slack").await), (401, 200));
}

#[tokio::test]
async fn an_access_token_authorizes_one_user_within_its_scope() {
    let emulator = emulator("").await;
    for (bearer, query, body, status, says) in [
        ("vcp_web", "?teamId=team_acme", APP, 200, ""),
        ("vcp_web", "?slug=acme", OWN, 200, ""),
        ("vcp_web", "?teamId=team_acme", OTHER, 403, "takes an OIDC token"),
        ("vcp_web", "?teamId=team_acme", JWT, 403, "takes an OIDC token"),
        ("vcp_web", "", APP, 403, "needs one of them"),
        ("vcp_web", "?teamId=team_other", APP, 403, "not for the team"),
        ("vcp_worker", "?teamId=team_acme", APP, 403, "not linked to this project"),
        ("vcp_team", "?teamId=team_acme", APP, 200, ""),
        ("vcp_team", "?teamId=team_acme", OTHER, 403, "takes an OIDC token"),
        ("vcp_unknown", "?teamId=team_acme", APP, 403, "Not authorized"),
    ] {
        let (given, _, message) =
            refusal(request(&emulator, bearer, "POST", &format!("{SLACK}{query}")).json(body)).await;
        assert!(given == status && message.contains(says), "{bearer} {query} {body}: {given}: {message}");
    }
    for (bearer, target, status) in [
        ("vcp_worker", "/v1/connect/connectors/slack%2Facme-slack?teamId=team_acme", 403),
        ("vcp_web", "/v9/projects/web", 200),
        ("vcp_web", "/v9/projects/worker", 404),
        ("vcp_web", "/v3/env/pull/worker/development", 404),
        ("vcp_team", "/v3/env/pull/worker/development", 200),
    ] {
        assert_eq!(request(&emulator, bearer, "GET", target).send().await.status, status, "{bearer} {target}");
    }
    for (bearer, listed) in [("vcp_web", 1), ("vcp_worker", 0), ("vcp_team", 2)] {
        let reply = request(&emulator, bearer, "GET", "/v2/connect/connectors?teamId=team_acme").send().await;
        assert_eq!(reply.json()["connectors"].as_array().map(Vec::len), Some(listed), "{bearer}");
        let remove = request(&emulator, bearer, "DELETE", "/v1/connect/connectors/oauth%2Flinear?teamId=team_acme");
        assert_eq!(remove.send().await.status == 204, bearer == "vcp_team", "{bearer}");
    }
}

/// Requests that each require one permission, in an order in which they can be sent.
const PERMITTED: [(&str, &str, &str); 7] = [
    ("GET", "/v1/connect/connectors/slack%2Facme-slack", ""),
    ("GET", "/v2/connect/connectors", ""),
    ("POST", SLACK, APP),
    ("POST", "/v1/connect/connectors/slack%2Facme-slack/projects/worker", r#"{"environments":["preview"]}"#),
    ("PATCH", "/v1/connect/connectors/slack%2Facme-slack", r##"{"accentColor":"#112233"}"##),
    ("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens", r#"{"subject":{"type":"user","id":"app_user_1"}}"#),
    ("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens", "{}"),
];

#[tokio::test]
async fn each_permission_on_connectors_is_checked_separately() {
    for (session, permitted) in [
        (OWNER, [true; 7]),
        ("vca_member", [true; 7]),
        ("vca_developer", [true, true, true, false, false, false, false]),
        ("vca_viewer", [true, true, false, false, false, false, false]),
        ("vca_security", [true, true, false, false, false, true, true]),
    ] {
        let emulator = emulator("").await;
        for ((method, target, body), permitted) in PERMITTED.into_iter().zip(permitted) {
            let (status, code, message) = refusal(request(&emulator, session, method, target).json(body)).await;
            match permitted {
                true => assert!(status < 300, "{session}: {method} {target}: {status} {message}"),
                false => assert!(
                    (status, code.as_str()) == (403, "forbidden") && message.contains("permission"),
                    "{session}: {method} {target}: {status} {message}"
                ),
            }
        }
    }
    let emulator = emulator("").await;
    let own = r#"{"subject":{"type":"user","id":"user_dev"}}"#;
    let target = "/v1/connect/connectors/slack%2Facme-slack/tokens";
    let reply = request(&emulator, "vca_developer", "DELETE", target).json(own).send().await;
    assert_eq!((reply.status, &reply.json()["deleted"]), (200, &1.into()), "one's own takes no more than getting them");
    for target in ["/v3/env/pull/web/development", "/v10/projects/web/env"] {
        let reply = request(&emulator, "vca_viewer", "GET", target).send().await;
        assert_eq!(reply.status, if target.starts_with("/v3") { 403 } else { 200 }, "{target}");
    }
}

#[tokio::test]
async fn every_documented_error_matches_its_row() {
    let more = "[[connectors]]\nuid = \"github/none\"\nlinks = [{ project = \"web\", environments = [\"development\"] }]\n\
                [[connectors]]\nuid = \"snowflake/dw\"\nlinks = [{ project = \"web\", environments = [\"production\"] }]\n\
                [[faults]]\nkind = \"revoked_grant\"\non = \"user-gone\"";
    let emulator = emulator(more).await;
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let user = r#"{"subject":{"type":"user","id":"nobody"}}"#;
    let mut shown = Vec::new();
    for (name, target, body) in [
        ("ClientNotLinkedToProjectError", "/v1/connect/token/oauth%2Flinear", APP),
        ("ClientNotEnabledForEnvironmentError", "/v1/connect/token/snowflake%2Fdw", APP),
        ("ConnectorInstallationRequiredError", "/v1/connect/token/github%2Fnone", APP),
        ("UserAuthorizationRequiredError", SLACK, user),
        ("ConnectorNotFoundError", "/v1/connect/token/slack%2Fnone", APP),
        ("NoValidTokenError", "/v1/connect/token/slack%2Facme-slack?user-gone", APP),
    ] {
        let row = errors::TABLE.iter().find(|row| row.documented == Some(name)).expect(name);
        let (status, code, message) = refusal(request(&emulator, &token, "POST", target).json(body)).await;
        assert_eq!((status, code.as_str()), (row.status, row.code), "{name}: {message}");
        let start = row.message.split("{}").next().expect("a start");
        assert!(message.starts_with(start), "{name}: {message}");
        shown.push(name);
    }
    let documented: Vec<_> = errors::TABLE.iter().filter_map(|row| row.documented).collect();
    assert_eq!(shown, documented, "and there is no other");
}

#[tokio::test]
async fn reads_and_writes_are_rate_limited_per_team() {
    for (retry_after, header) in [(false, false), (true, true)] {
        let emulator = emulator(&format!("[limits]\nreads = 3\nwrites = 1\nretry_after = {retry_after}")).await;
        let oidc = emulator.oidc_token(DEVELOPMENT_LIFE);
        let metadata = "/v1/connect/connectors/slack%2Facme-slack";
        for bearer in ["unknown", "unknown", "unknown", "unknown"] {
            assert_eq!(request(&emulator, bearer, "GET", metadata).send().await.status, 403, "it is nobody's");
        }
        assert_eq!(request(&emulator, &oidc, "POST", SLACK).json(APP).send().await.status, 200);
        assert_eq!(request(&emulator, OWNER, "GET", metadata).send().await.status, 200);
        assert_eq!(request(&emulator, OWNER, "GET", "/v1/connect/connectors").send().await.status, 200);
        let over = request(&emulator, &oidc, "POST", SLACK).json(APP).send().await;
        assert_eq!((over.status, &over.json()["error"]["code"]), (429, &"rate_limited".into()));
        assert_eq!(over.header("retry-after").is_some(), header);
        let revoke = || request(&emulator, OWNER, "DELETE", "/v1/connect/connectors/oauth%2Flinear/tokens").json("{}");
        assert_eq!((revoke().send().await.status, revoke().send().await.status), (200, 429), "writes apart");
        assert_eq!(request(&emulator, OWNER, "GET", "/v2/user").send().await.status, 200, "an account is not limited");

        // The rate limit's window follows the emulator's clock.
        assert_eq!(admin(&emulator, "POST", "faults", r#"{"kind":"clock_skew","by":"60s"}"#).await.status, 204);
        assert_eq!(request(&emulator, OWNER, "GET", metadata).send().await.status, 200);
    }
}

#[tokio::test]
async fn the_issuer_publishes_the_keys_for_its_tokens() {
    let emulator = emulator("").await;
    let get = async |path: &str| Request::new(emulator.addr(), "GET", path).send().await.json();
    let discovery = get("/acme/.well-known/openid-configuration").await;
    assert_eq!(discovery["issuer"], "https://oidc.vercel.com/acme");
    assert_eq!(discovery["jwks_uri"], format!("{}/.well-known/jwks", emulator.url()));
    assert_eq!(get("/.well-known/openid-configuration").await["issuer"], "https://oidc.vercel.com");
    let keys: jsonwebtoken::jwk::JwkSet = serde_json::from_value(get("/.well-known/jwks").await).expect("keys");
    let token = emulator.oidc_token(DEVELOPMENT_LIFE);
    let kid = jsonwebtoken::decode_header(&token).expect("a header").kid.expect("an id");
    let key = jsonwebtoken::DecodingKey::from_jwk(keys.find(&kid).expect("the key")).expect("a key");
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::RS256);
    validation.set_audience(&["https://vercel.com/acme"]);
    validation.set_issuer(&[discovery["issuer"].as_str().expect("text")]);
    let claims = jsonwebtoken::decode::<serde_json::Value>(&token, &key, &validation).expect("verified").claims;
    assert_eq!(claims["sub"], "owner:acme:project:web:environment:development");
}

#[tokio::test]
async fn an_env_file_is_issued_for_the_requested_project_and_user() {
    let emulator = emulator("").await;
    let claims = async |query: &str| {
        let reply = admin(&emulator, "GET", &format!("env.local{query}"), "").await;
        let token = reply.text().split('"').nth(1).unwrap_or_default().to_owned();
        let payload = jsonwebtoken::dangerous::insecure_decode::<serde_json::Value>(&token).expect("a token").claims;
        let life = payload["exp"].as_u64().expect("a time") - payload["iat"].as_u64().expect("a time");
        let age = Clock::system().local().as_seconds() - payload["iat"].as_u64().expect("a time");
        (payload["project"].clone(), payload["user_id"].clone(), life, age / 60)
    };
    assert_eq!(claims("").await, ("web".into(), "user_ada".into(), 12 * 3600, 0));
    let asked = "?life=4m&age=3m&project=worker&user=user_dev";
    assert_eq!(claims(asked).await, ("worker".into(), "user_dev".into(), 240, 3));
    for (query, status) in [("?life=4", 400), ("?age=x", 400), ("?project=none", 404), ("?user=none", 404)] {
        assert_eq!(admin(&emulator, "GET", &format!("env.local{query}"), "").await.status, status, "{query}");
    }
}
