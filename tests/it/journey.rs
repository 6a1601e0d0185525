//! One request from the app to upstream and back.

use connect_sidecar::emulator::fault::Fault;

use crate::support::{SLACK, Scene};

#[tokio::test]
async fn a_request_without_a_credential_gets_a_token() {
    let stage = Scene::new().start().await;
    let reply = stage.token(r#"{"subject":{"type":"app"}}"#).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.json()["token"].as_str().expect("a token").starts_with("xoxe.xoxb-"));
    assert_eq!(reply.cache_status(), "connect-sidecar; fwd=uri-miss; stored; ttl=3570");
    assert_eq!(reply.header("age"), None);
}

#[tokio::test]
async fn upstream_gets_only_the_forwarded_parts() {
    let stage = Scene::new().start().await;
    let body = "{ \"subject\" : {\"type\":\"app\"},\n\"scopes\":[\"b\",\"a\"] }";
    let reply = stage
        .token(body)
        .header("authorization", "Bearer CLIENT")
        .header("cookie", "CLIENT")
        .header("proxy-authorization", "CLIENT")
        .header("x-vercel-id", "CLIENT")
        .header("x-custom", "CLIENT")
        .header("accept-encoding", "br")
        .header("user-agent", "CLIENT")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .header("x-request-id", "r-1")
        .send()
        .await;
    assert_eq!(reply.status, 200);
    let received = &stage.emulator.received()[0];
    assert_eq!((received.method.as_str(), received.target.as_str()), ("POST", SLACK));
    assert_eq!(received.body, body, "byte for byte");
    let mut names: Vec<_> = received.headers.keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "accept",
            "accept-encoding",
            "authorization",
            "cdn-loop",
            "content-length",
            "content-type",
            "host",
            "traceparent",
            "user-agent",
            "via",
            "x-request-id",
        ]
    );
    let header = |name: &str| received.headers[name].to_str().expect("text").to_owned();
    assert_eq!(header("host"), stage.emulator.addr().to_string());
    assert_eq!(header("accept-encoding"), "identity");
    assert_eq!(header("content-length"), body.len().to_string());
    assert!(header("authorization").starts_with("Bearer eyJ"));
    assert!(header("user-agent").starts_with("connect-sidecar/"));
    assert!(!format!("{:?}", received.headers).contains("CLIENT"));
    assert_eq!(stage.logs.count("dropped"), 1);
}

#[tokio::test]
async fn the_raw_path_is_forwarded_byte_for_byte() {
    let stage = Scene::new().start().await;
    for target in ["/v1/connect/token/slack%2facme-slack", "/v1/connect/token/%73lack%2Facme-slack"] {
        let reply = stage
            .request("POST", target)
            .json(r#"{"subject":{"type":"app"},"scopes":["x"]}"#)
            .header("cache-control", "no-cache")
            .send()
            .await;
        assert_eq!(reply.status, 200);
        assert_eq!(stage.emulator.received().last().expect("a request").target, target);
    }
}

#[tokio::test]
async fn serves_all_five_routes_and_caches_only_tokens() {
    let stage = Scene::new().start().await;
    for (method, target, body) in [
        ("POST", "/v1/connect/authorize/slack%2Facme-slack", Some("{}")),
        ("POST", "/v1/connect/install/slack%2Facme-slack", Some("{}")),
        ("GET", "/v1/connect/connectors/slack%2Facme-slack", None),
        ("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens", Some(r#"{"subject":{"type":"app"}}"#)),
        ("DELETE", "/v1/connect/connectors/slack%2Facme-slack/tokens", None),
    ] {
        let before = stage.emulator.received().len();
        for _ in 0..2 {
            let request = stage.request(method, target);
            let reply = match body {
                Some(body) => request.json(body),
                None => request,
            }
            .send()
            .await;
            assert_eq!(reply.status, 200, "{method} {target}: {}", reply.text());
            assert_eq!(reply.header("cache-status"), None);
        }
        let received = stage.emulator.received();
        assert_eq!(received.len() - before, 2, "{method} {target}");
        let last = received.last().expect("a request");
        assert_eq!((last.method.as_str(), last.target.as_str()), (method, target));
        assert_eq!(last.body, body.unwrap_or_default());
        assert_eq!(last.headers.contains_key("content-type"), body.is_some(), "{method} {target}");
    }
}

#[tokio::test]
async fn replies_are_unchanged_except_for_unlisted_headers() {
    let stage = Scene::new().start().await;
    let body = "{\n  \"odd\" : [1.0, 1e3, \"\\u00e9\"]   }\n";
    stage.emulator.inject(Fault::answer(200, "application/json; charset=utf-8", body));
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.text().as_str()), (200, body));
    assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"));
    assert_eq!(reply.cache_status(), "connect-sidecar; fwd=uri-miss", "there is no token to store");

    let reply = stage.token("{}").send().await;
    assert!(reply.header("x-vercel-id").is_some_and(|id| id.starts_with("dev1::")));
    for name in ["cache-control", "x-content-type-options", "cross-origin-resource-policy"] {
        assert!(reply.header(name).is_some(), "{name}");
    }
    assert_eq!(reply.header("server"), None);
}

#[tokio::test]
async fn errors_pass_through_unchanged_and_the_log_has_their_remedy() {
    let stage = Scene::new().start().await;
    for (connector, body, status, code, advice) in [
        ("salesforce%2Fcrm", "{}", 403, "forbidden", "vercel connect attach salesforce/crm`"),
        (
            "snowflake%2Fwarehouse",
            "{}",
            403,
            "forbidden",
            "vercel connect attach snowflake/warehouse --environment development",
        ),
        ("slack%2Fnot-installed", "{}", 422, "client_installation_required", "vercel connect open slack/not-installed"),
        (
            "slack%2Facme-slack",
            r#"{"subject":{"type":"user","id":"user_other"}}"#,
            422,
            "user_authorization_required",
            "vercel connect token slack/acme-slack",
        ),
        ("slack%2Fnone", "{}", 404, "not_found", "vercel connect create"),
    ] {
        let reply = stage.request("POST", &format!("/v1/connect/token/{connector}")).json(body).send().await;
        assert_eq!(reply.status, status, "{connector}");
        assert_eq!(reply.json()["error"]["code"], code);
        assert_eq!(reply.header("sidecar-error"), None, "it is not the sidecar's error");
        assert_eq!(reply.cache_status(), "connect-sidecar; fwd=uri-miss");
        assert_eq!(stage.logs.count(advice), 1, "{advice}: {:#?}", stage.logs.lines());
    }
}

#[tokio::test]
async fn listens_on_both_loopback_addresses() {
    let stage = Scene::new().start().await;
    let mut v6 = stage.addr;
    v6.set_ip(std::net::Ipv6Addr::LOCALHOST.into());
    if tokio::net::TcpListener::bind("[::1]:0").await.is_err() {
        crate::support::skipped("this machine has no IPv6");
        return;
    }
    let reply = crate::support::http::Request::new(v6, "GET", "/healthz").send().await;
    assert_eq!((reply.status, reply.text().as_str()), (200, r#"{"status":"ok"}"#));
}

#[tokio::test]
async fn an_access_token_is_sent_with_its_team() {
    let stage = Scene::new()
        .toml("auth = \"access-token\"\nteam_id = \"team_acme\"")
        .env("VERCEL_TOKEN", "vcp_demo_access_token")
        .without_env_file()
        .start()
        .await;
    assert!(stage.slack_token().await.starts_with("xoxe.xoxb-"));
    assert_eq!(stage.emulator.received()[0].target, format!("{SLACK}?teamId=team_acme"));
    let other = stage.token(r#"{"subject":{"type":"user","id":"user_other"}}"#).send().await;
    assert_eq!(other.status, 403);
    let own = stage.token(r#"{"subject":{"type":"user","id":"user_ada"}}"#).send().await;
    assert_eq!(own.status, 200);
    let metadata = stage.request("GET", "/v1/connect/connectors/slack%2Facme-slack").send().await;
    assert_eq!(metadata.status, 200);
    assert_eq!(stage.request("GET", "/readyz").send().await.status, 200);
    assert_eq!(stage.status().await["oidc"]["source"], "VERCEL_TOKEN");
}

#[tokio::test]
async fn refuses_connectors_outside_the_list_on_every_route() {
    let stage = Scene::new().toml("[connectors]\nallow = [\"slack/acme-slack\"]").start().await;
    assert_eq!(stage.token("{}").send().await.status, 200);
    for (method, target) in [
        ("POST", "/v1/connect/token/github%2Facme-github"),
        ("POST", "/v1/connect/authorize/github%2Facme-github"),
        ("GET", "/v1/connect/connectors/github%2Facme-github"),
        ("DELETE", "/v1/connect/connectors/github%2Facme-github/tokens"),
    ] {
        let reply = stage.request(method, target).json("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (403, "connector_not_allowed"), "{method} {target}");
    }
    assert_eq!(stage.emulator.received().len(), 1);
}

#[tokio::test]
async fn verifies_upstream_with_the_configured_root() {
    let stage = Scene::new().tls().start().await;
    assert!(stage.slack_token().await.starts_with("xoxe.xoxb-"));
}
