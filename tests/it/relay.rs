//! Requests that are relayed to Vercel's other hosts with the real OIDC token instead of the placeholder, by the relay
//! endpoint and by interception.

use std::net::SocketAddr;
use std::time::Duration;

use connect_sidecar::credential::placeholder;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::os::clock::Timestamp;
use http::HeaderValue;
use tokio::net::TcpListener;

use crate::support::forwarder::Forwarder;
use crate::support::gateway::Gateway;
use crate::support::http::{KeptAlive, Reply, Request};
use crate::support::{SLACK, Scene, Stage, let_timers_pass, network, soon, tls};

const HOST: &str = "ai-gateway.vercel.sh";
const MODEL: &str = "/_sidecar/v1/relay/ai-gateway.vercel.sh/v3/ai/language-model";
const EVENTS: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// `Authorization` with the placeholder.
fn bearer() -> String {
    format!("Bearer {}", placeholder::make(None, Timestamp::from_millis(u64::MAX)))
}

async fn stage(gateway: &Gateway) -> Stage {
    Scene::new().toml(&gateway.setting()).start().await
}

/// A request to the model host by the relay endpoint.
fn model_request(stage: &Stage) -> Request {
    stage.request("POST", MODEL).header("authorization", &bearer()).json(r#"{"prompt":"x"}"#)
}

fn token_in_env_file(stage: &Stage) -> String {
    let file = std::fs::read_to_string(stage.env_path()).expect("a file");
    file.split("VERCEL_OIDC_TOKEN=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a token").to_owned()
}

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// A port that treats every connection as one intercepted on its way to `host`, without TLS.
async fn intercepted(stage: &Stage, host: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = stage.server.clone();
    tokio::spawn(async move {
        for number in 0_u32.. {
            let (stream, _) = listener.accept().await.expect("a connection");
            let server = server.clone();
            tokio::spawn(async move { server.serve_intercepted(stream, host, &HeaderValue::from(number)).await });
        }
    });
    addr
}

/// A request in a tunnel to `host`.
fn tunnelled(tunnel: SocketAddr, host: &str, method: &str, target: &str) -> Request {
    Request::new(tunnel, method, target).header("host", host)
}

#[tokio::test]
async fn streams_events_and_sends_the_real_token() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let mut app = model_request(&stage)
        .target(&format!("{MODEL}/a%2Fb?x=%2f&y"))
        .header("accept", "text/event-stream")
        .header("x-own", "kept")
        .header("cookie", "of=another-port")
        .header("sidecar-client", "app-1")
        .header("sidecar-key", "k")
        .header("te", "trailers")
        .header("connection", "x-hop, te")
        .header("x-hop", "1")
        .header("proxy-authorization", "Basic c2VjcmV0")
        .begin_kept_alive()
        .await;
    let mut call = gateway.call().await;
    assert!(call.head.starts_with("POST /v3/ai/language-model/a%2Fb?x=%2f&y HTTP/1.1\r\n"), "{}", call.head);
    assert_eq!(call.values("authorization"), [format!("Bearer {}", token_in_env_file(&stage))]);
    for (name, value) in [
        ("host", &*gateway.addr().to_string()),
        ("content-type", "application/json"),
        ("accept", "text/event-stream"),
        ("x-own", "kept"),
        ("te", "trailers"),
        ("content-length", "14"),
        ("cdn-loop", "connect-sidecar"),
    ] {
        assert_eq!(call.values(name), [value], "{name}: {}", call.head);
    }
    assert_eq!(call.head.lines().count(), 1 + 8 + 1, "nothing else: {}", call.head);
    call.hear(r#"{"prompt":"x"}"#).await;

    let lines =
        "set-cookie: a=b\r\nserver: x\r\naccess-control-allow-origin: *\r\ncache-control: public\r\nx-own: kept\r\n";
    call.say(EVENTS.replace("\r\n\r\n", &format!("\r\n{lines}\r\n"))).await;
    let head = app.until("\r\n\r\n").await;
    Reply::parse(head.as_bytes()).assert_safe();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("x-own: kept\r\n"), "{head}");
    assert!(head.contains("content-type: text/event-stream\r\n"), "{head}");
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        call.say(chunk(event)).await;
        app.until(event).await;
    }
    call.say("0\r\n\r\n").await;
    app.until("0\r\n\r\n").await;
    assert_eq!(stage.logs.count("credentials of its own"), 1, "the proxy's, not the placeholder");
}

#[tokio::test]
async fn the_placeholder_does_not_count_as_the_apps_own_credential() {
    let stage = Scene::new().start().await;
    assert_eq!(stage.token("{}").header("authorization", &bearer()).send().await.status, 200);
    assert_eq!(stage.logs.count("credentials of its own"), 0);
    assert_eq!(stage.token("{}").header("authorization", "Bearer other").send().await.status, 200);
    assert_eq!(stage.logs.count("credentials of its own"), 1);
}

#[tokio::test]
async fn the_relay_endpoint_takes_only_placeholders_for_listed_hosts() {
    let gateway = Gateway::open().await;
    let stage = Scene::new().toml(&gateway.setting().replace(".sh=", ".sh/v3=")).start().await;
    let path = |target: &str| format!("/_sidecar/v1/relay/{target}");
    for target in [
        "",
        "/",
        "ai-gateway.vercel.sh",
        "ai-gateway.vercel.sh/",
        "ai-gateway.vercel.sh/v2",
        "ai-gateway.vercel.sh/v3/../v2",
        "ai-gateway.vercel.sh/v3/%2e%2e/v2",
        "ai-gateway.vercel.sh?/v3",
        "ai-gateway.vercel.sh:443/v3",
        "x@ai-gateway.vercel.sh/v3",
        "evil.example/v3",
        "api.vercel.com/v1/connect/token/slack%2Facme-slack",
        "127.0.0.1/v3",
    ] {
        let reply = model_request(&stage).target(&path(target)).send().await;
        reply.assert_refused(404, "route_not_found", target);
    }
    let own = bearer();
    let [header, payload, mark] = own.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    for authorization in [
        "Bearer other".to_owned(),
        format!("Basic {}", own.trim_start_matches("Bearer ")),
        format!("{own}x"),
        format!("{header}.{payload}.sig"),
        format!("Bearer e30.{payload}.{mark}"),
        format!("{header}.{payload}.{payload}.{mark}"),
        format!("{own}, {own}"),
    ] {
        let reply = model_request(&stage).header("authorization", &authorization).send().await;
        reply.assert_refused(404, "route_not_found", &authorization);
    }
    let twice = format!("{}\r\nauthorization: {}", bearer(), bearer());
    model_request(&stage).header("authorization", &twice).send().await.assert_refused(404, "route_not_found", "twice");
    model_request(&stage).without("authorization").send().await.assert_refused(404, "route_not_found", "none");

    for (name, value, code) in [
        ("host", "ai-gateway.vercel.sh", "host_not_allowed"),
        ("origin", "https://evil.example", "browser_request_refused"),
        ("x-forwarded-for", "192.0.2.1", "forwarded_request_refused"),
    ] {
        model_request(&stage).header(name, value).send().await.assert_refused(403, code, name);
    }
    let looped = model_request(&stage).header("cdn-loop", "connect-sidecar").send().await;
    looped.assert_refused(508, "loop_detected", "a relayed request");
    let socket = model_request(&stage).header("connection", "upgrade").header("upgrade", "websocket").send().await;
    socket.assert_refused(501, "upgrade_not_supported", "a WebSocket");
    assert!(!gateway.is_called().await);
}

#[tokio::test]
async fn intercepted_requests_go_to_their_host_unchanged() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let tunnel = intercepted(&stage, HOST).await;
    for (authorization, expected) in [
        (bearer(), format!("Bearer {}", token_in_env_file(&stage))),
        ("Bearer other".to_owned(), "Bearer other".to_owned()),
        (format!("{}x", bearer()), format!("{}x", bearer())),
    ] {
        let app = tunnelled(tunnel, "AI-Gateway.vercel.sh:443", "PATCH", "/v9/x?y")
            .header("authorization", &authorization)
            .header("origin", "https://app.example")
            .header("sec-fetch-site", "cross-site")
            .header("x-forwarded-for", "192.0.2.1")
            .body("{}")
            .begin()
            .await;
        let mut call = gateway.call().await;
        assert!(call.head.starts_with("PATCH /v9/x?y HTTP/1.1\r\n"), "{}", call.head);
        // With the real token, headers that could change the meaning of the request are removed.
        let has_token = expected.contains(&token_in_env_file(&stage));
        assert_eq!(call.values("authorization"), [expected]);
        assert_eq!(call.values("origin"), ["https://app.example"]);
        let forwarded: &[&str] = if has_token { &[] } else { &["192.0.2.1"] };
        assert_eq!(call.values("x-forwarded-for"), forwarded);
        call.hear("{}").await;
        let lines = "set-cookie: a=b\r\nserver: x\r\ncache-control: public\r\naccess-control-allow-origin: *\r\n";
        call.say(format!("HTTP/1.1 418 Teapot\r\n{lines}connection: close\r\ncontent-length: 2\r\n\r\nhi")).await;
        let reply = app.reply().await;
        assert_eq!((reply.status, reply.text().as_str()), (418, "hi"));
        for line in lines.trim_end().split("\r\n") {
            let (name, value) = line.split_once(": ").expect("a header");
            assert_eq!(reply.header(name), Some(value), "{reply:?}");
        }
        assert_eq!(reply.headers.iter().filter(|(name, _)| name.starts_with("x-")).count(), 0, "{reply:?}");
    }
    for (request, status, code) in [
        (tunnelled(tunnel, "api.vercel.com", "GET", "/"), 400, "bad_host"),
        (tunnelled(tunnel, "ai-gateway.vercel.sh:444", "GET", "/"), 400, "bad_host"),
        (tunnelled(tunnel, HOST, "GET", "/").without("host"), 400, "bad_host"),
        (tunnelled(tunnel, HOST, "GET", "http://ai-gateway.vercel.sh/"), 400, "bad_target"),
        (tunnelled(tunnel, HOST, "GET", "/").header("via", "1.1 connect-sidecar"), 508, "loop_detected"),
        (tunnelled(tunnel, HOST, "GET", "/").header("upgrade", "h2c, WebSocket"), 501, "upgrade_not_supported"),
        (tunnelled(tunnel, HOST, "POST", "/").header("transfer-encoding", "gzip, chunked"), 400, "bad_framing"),
    ] {
        request.send().await.assert_refused(status, code, code);
    }
    assert!(!gateway.is_called().await);
    assert_eq!(stage.logs.count("credentials of its own"), 0, "they are for this host");
}

#[tokio::test]
async fn intercepted_requests_for_connects_routes_use_the_cache() {
    let stage = Scene::new().start().await;
    let tunnel = intercepted(&stage, "api.vercel.com").await;
    let ask = |target: &str| tunnelled(tunnel, "api.vercel.com", "POST", target).json(r#"{"subject":{"type":"app"}}"#);
    let first = ask(SLACK).header("authorization", &bearer()).send().await;
    let token = first.token();
    assert_eq!(stage.logs.count("credentials of its own"), 0);
    for query in ["?teamId=team_acme", "?slug=acme", "?slug=acme&teamId=team_acme"] {
        let again = ask(&format!("{SLACK}{query}")).header("authorization", "Bearer cli").send().await;
        assert_eq!((again.token(), again.cache_status()), (token.clone(), "connect-sidecar; hit; ttl=3570"), "{query}");
    }
    assert_eq!(stage.logs.count("credentials of its own"), 1);
    assert_eq!(stage.emulator.received().len(), 1, "one cache for both");
    for (method, target) in [
        ("POST", &*format!("{SLACK}?teamId=team_other")),
        ("POST", &format!("{SLACK}?slug=other")),
        ("POST", &format!("{SLACK}?teamId=team_acme&x=1")),
        ("POST", &format!("{SLACK}?")),
        ("GET", SLACK),
        ("POST", "/v1/connect/token/slack/acme-slack"),
        ("POST", "/v1/connect/token/slack%2Facme-slack/import"),
        ("GET", "/v9/projects"),
    ] {
        let before = stage.emulator.received().len();
        tunnelled(tunnel, "api.vercel.com", method, target)
            .header("authorization", "Bearer own")
            .json("{}")
            .send()
            .await;
        let received = stage.emulator.received();
        let [passed_on] = &received[before..] else { panic!("{target}: {received:?}") };
        assert_eq!((passed_on.method.as_str(), &*passed_on.target), (method, target));
        assert_eq!(passed_on.headers["authorization"], "Bearer own", "{target}");
    }
}

#[tokio::test]
async fn a_configured_upstream_replaces_the_api_but_a_regional_one_does_not() {
    let stage = Scene::new().resolving(|emulator| vec![emulator]).start().await;
    for host in ["api.vercel.com", "api-iad1.vercel.com"] {
        let tunnel = intercepted(&stage, host).await;
        let user = tunnelled(tunnel, host, "GET", "/v2/user");
        let own = user.clone().header("authorization", "Bearer vca_demo_session").send().await;
        assert_eq!((own.status, &own.json()["user"]["id"]), (200, &"user_ada".into()), "{host}: {}", own.text());
        let placeholder = user.header("authorization", &bearer()).send().await;
        assert_eq!(placeholder.status, 403, "it is no credential there: {}", placeholder.text());
        let other = intercepted(&stage, HOST).await;
        let reply = tunnelled(other, HOST, "GET", "/v2/user").header("authorization", &bearer()).send().await;
        reply.assert_refused(508, "loop_detected", "other hosts are not replaced");
    }
    for upstream in ["https://api-iad1.vercel.com", "https://api.vercel.com"] {
        let scene = Scene::new().default_upstream().toml(&format!("upstream = \"{upstream}\""));
        let stage = scene.resolving(|emulator| vec![emulator]).start().await;
        let tunnel = intercepted(&stage, "api.vercel.com").await;
        let reply = tunnelled(tunnel, "api.vercel.com", "GET", "/v2/user").send().await;
        // This one is not configured to be on this machine.
        reply.assert_refused(508, "loop_detected", upstream);
        assert!(reply.text().contains("of https://api.vercel.com"), "{}", reply.text());
    }
}

#[tokio::test]
async fn a_repeated_request_of_an_sdk_forces_a_refresh_and_that_of_another_program_does_not() {
    let stage = Scene::new().start().await;
    let tunnel = intercepted(&stage, "api-iad1.vercel.com").await;
    let plain = tunnelled(tunnel, "api-iad1.vercel.com", "POST", SLACK).json(r#"{"subject":{"type":"app"}}"#);
    let request = plain.clone().header("user-agent", "vercel-connect/0.2.2 (Python/3.11.7)");
    let mut sdk = KeptAlive::to(tunnel).await;
    let first = sdk.send(&request).await.token();
    let second = sdk.send(&request).await;
    assert_ne!(second.token(), first);
    assert_eq!(second.cache_status(), "connect-sidecar; fwd=request; stored; ttl=3570");
    assert_eq!(request.clone().send().await.token(), second.token(), "another client");
    for _ in 0..2 {
        assert_eq!(sdk.send(&plain).await.token(), second.token(), "a program without a cache of its own");
    }
    for status in ["hit; ttl=3570", "fwd=request; stored; ttl=3570"] {
        let named = sdk.send(&request.clone().header("sidecar-client", "sdk-7")).await;
        assert_eq!(
            named.cache_status(),
            format!("connect-sidecar; {status}"),
            "a client that names itself keeps its name"
        );
    }
}

#[tokio::test]
async fn a_reused_connection_sends_the_current_token() {
    let gateway = Gateway::open().await;
    let mut stage = stage(&gateway).await;
    let app = model_request(&stage).begin().await;
    let mut call = gateway.call().await;
    assert_eq!(call.values("authorization"), [format!("Bearer {}", token_in_env_file(&stage))]);
    call.hear("}").await;
    call.heard.clear();
    call.say(EMPTY).await;
    assert_eq!(app.reply().await.status, 200);

    stage.pass(Duration::from_secs(2));
    let fresh = stage.fresh_token(DEVELOPMENT_LIFE);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let app = model_request(&stage).begin().await;
    call.next().await;
    assert_eq!(call.values("authorization"), [format!("Bearer {fresh}")]);
    call.hear("}").await;
    call.say("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ntill the end").await;
    drop(call);
    assert_eq!(app.reply().await.text(), "C\r\ntill the end\r\n0\r\n\r\n");
}

#[tokio::test]
async fn sends_nothing_without_a_valid_oidc_token() {
    let gateway = Gateway::open().await;
    let setting = gateway.setting();
    let expired = stage(&gateway).await;
    expired.pass(Duration::from_secs(13 * 3600));
    let access_token = Scene::new().toml(&setting).toml("auth = \"access-token\"").env("VERCEL_TOKEN", "vcp_1");
    let scenes = [
        (expired, "oidc_token_expired", "vercel env pull"),
        (Scene::new().toml(&setting).without_env_file().start().await, "oidc_token_missing", "vercel env pull"),
        (access_token.start().await, "oidc_token_missing", "connect-sidecar --auth oidc"),
    ];
    for (stage, code, hint) in scenes {
        let tunnel = intercepted(&stage, HOST).await;
        let inside = tunnelled(tunnel, HOST, "GET", "/").header("authorization", &bearer());
        for reply in [model_request(&stage).send().await, inside.send().await] {
            reply.assert_refused(503, code, code);
            assert_eq!(reply.json()["error"]["hint"], hint);
        }
    }
    assert!(!gateway.is_called().await);
}

#[tokio::test]
async fn an_unreachable_host_is_an_error() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("an address")
    };
    let stage = Scene::new().toml(&format!("bearer_hosts = [\"{HOST}=http://{closed}\"]")).start().await;
    let reply = model_request(&stage).target(&format!("{MODEL}?CANARY")).header("x-own", "CANARY").send().await;
    reply.assert_refused(502, "upstream_unreachable", "a closed port");
    assert!(reply.text().contains(&format!("Nothing listens at http://{closed}")), "{}", reply.text());
    assert_eq!(stage.logs.count("CANARY"), 0);
    assert_eq!(stage.logs.count("WARN"), 1, "{:?}", stage.logs.lines());

    let gateway = Gateway::open().await;
    let stage = Scene::new().toml(&gateway.setting().replace("http:", "https:")).start().await;
    let (reply, ()) = tokio::join!(model_request(&stage).send(), async {
        let mut stream = gateway.connection().await;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("written");
    });
    reply.assert_refused(502, "upstream_tls", "no TLS");

    let stage = self::stage(&gateway).await;
    let app = model_request(&stage).begin().await;
    drop(gateway.call().await);
    app.reply().await.assert_refused(502, "upstream_invalid_response", "no answer");
}

#[tokio::test]
async fn refuses_a_host_that_resolves_to_this_machine() {
    let stage = Scene::new().resolving(|emulator| vec![emulator]).start().await;
    for target in ["ai-gateway.vercel.sh/v3/ai", "iad1.vercel-queue.com/", "vercel.com/api/blob?pathname=x"] {
        let reply = model_request(&stage).target(&format!("/_sidecar/v1/relay/{target}")).send().await;
        reply.assert_refused(508, "loop_detected", target);
        assert!(reply.json()["error"]["hint"].as_str().is_some_and(|hint| hint.contains("--bearer-host")));
    }
    assert_eq!(stage.emulator.received().len(), 0);
}

#[tokio::test]
async fn other_hosts_get_the_placeholder_unchanged() {
    if !network::is_own("relay::other_hosts_get_the_placeholder_unchanged") {
        return;
    }
    let (pem, authority) = tls::authority("Trusted");
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("ca.pem"), pem).expect("written");
    let ca = dir.path().join("ca.pem").display().to_string();
    for (host, target, is_bearer) in [
        ("api.vercel.com", "/v9/projects", false),
        ("api.vercel.com", "/v1/connect/connectors", false),
        ("vercel.com", "/api/v9/projects", false),
        ("vercel.com", "/api/blob?pathname=x%2F..%2Fy", true),
        (HOST, "/v3/ai", true),
    ] {
        let (addr, decrypted_there) = tls::server(network::OWN_V4, host, &authority, |_| {}).await;
        let scene = Scene::new().default_upstream().env("CONNECT_SIDECAR_UPSTREAM_CA", &ca);
        let stage = scene.resolving(move |_| vec![addr]).start().await;
        let tunnel = intercepted(&stage, host).await;
        let reply = tunnelled(tunnel, host, "GET", target).header("authorization", &bearer()).send().await;
        assert_eq!(reply.status, 200, "{host}{target}: {}", reply.text());
        let seen = String::from_utf8(decrypted_there.borrow().clone()).expect("text");
        let expected = if is_bearer { format!("Bearer {}", token_in_env_file(&stage)) } else { bearer() };
        assert!(seen.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{seen}");
        assert!(seen.contains(&format!("\r\nauthorization: {expected}\r\n")), "{host}{target}: {seen}");
        assert!(seen.contains(&format!("\r\nhost: {host}\r\n")), "{seen}");
    }
}

#[tokio::test]
async fn removes_headers_that_override_a_request_with_the_real_token() {
    const OVERRIDES: [&str; 26] = [
        "x-original-url",
        "x-original-uri",
        "x-original-host",
        "x-original-method",
        "x-rewrite-url",
        "x-http-method-override",
        "x-http-method",
        "x-method-override",
        "x-matched-path",
        "x-invoke-path",
        "x-middleware-subrequest",
        "x-now-route-matches",
        "x-envoy-original-path",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-prefix",
        "x-forwarded-uri",
        "forwarded",
        "x-real-ip",
        "x-client-ip",
        "true-client-ip",
        "cookie",
        "x_original_url",
        "x_http_method_override",
        "X-HTTP_Method-Override",
        "x-proxy-url",
    ];
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let tunnel = intercepted(&stage, HOST).await;
    for (authorization, travels) in [(bearer(), false), ("Bearer own".to_owned(), true)] {
        let request =
            tunnelled(tunnel, HOST, "GET", "/v3").header("authorization", &authorization).header("x-own", "1");
        let request = OVERRIDES.iter().fold(request, |request, name| request.header(name, "/v9/projects"));
        let app = request.header("x-original", "1").header("x-urls", "1").begin().await;
        let mut call = gateway.call().await;
        for name in OVERRIDES {
            assert_eq!(!call.values(name).is_empty(), travels, "{name}: {}", call.head);
        }
        for name in ["x-own", "x-original", "x-urls"] {
            assert_eq!(call.values(name), ["1"], "{name}");
        }
        call.say("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(app.reply().await.status, 200);
    }
}

#[tokio::test]
async fn refuses_ambiguous_paths_where_only_some_take_the_token() {
    let gateway = Gateway::open().await;
    let stage = Scene::new().toml(&gateway.setting().replace(".sh=", ".sh/v3=")).start().await;
    let tunnel = intercepted(&stage, HOST).await;
    for path in [
        "/v3/%2e%2e/v9",
        "/v3/../v9",
        "/v3//v9",
        "/v3/a%2fb",
        "/v3/a;b",
        "/v3/%252e",
        "/v3/a%5cb",
        "/x/../v3",
        "/v3/%c3%a9",
    ] {
        let request = tunnelled(tunnel, HOST, "GET", path);
        let reply = request.clone().header("authorization", &bearer()).send().await;
        reply.assert_refused(400, "bad_target", path);
    }
    assert!(!gateway.is_called().await);
}

#[tokio::test]
async fn relayed_requests_have_the_limits_of_their_host() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let tunnel = intercepted(&stage, HOST).await;
    let (query, value) = ("q".repeat(20_000), "v".repeat(60_000));
    for (request, lines) in [
        (model_request(&stage).target(&format!("{MODEL}?{query}")), 90),
        (tunnelled(tunnel, HOST, "GET", &format!("/?{query}")), 200),
    ] {
        let request = request.header("authorization", &bearer()).header("x-long", &value).without("expect");
        let app = (0..lines).fold(request, |request, n| request.header(&format!("x-{n}"), "1")).begin().await;
        let mut call = gateway.call().await;
        assert!(call.head.lines().next().is_some_and(|line| line.contains(&query)), "{lines}");
        assert_eq!(call.values("x-long"), [value.as_str()], "{lines}");
        assert_eq!(call.values(&format!("x-{}", lines - 1)), ["1"], "{lines}");
        call.say("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(app.reply().await.status, 200, "{lines}");
    }
    // Requests that the sidecar answers have its own limits, intercepted or not.
    let connect = intercepted(&stage, "api.vercel.com").await;
    let own = tunnelled(connect, "api.vercel.com", "POST", SLACK).header("x-long", &value).json("{}").send().await;
    own.assert_refused(431, "head_too_large", "a route of Connect's");
}

#[tokio::test]
async fn a_client_disconnect_ends_the_relayed_request() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let tunnel = intercepted(&stage, HOST).await;
    let ways: [fn(&Stage, SocketAddr) -> Request; 2] =
        [|stage, _| model_request(stage), |_, tunnel| tunnelled(tunnel, HOST, "POST", "/").body("{}")];
    for way in ways {
        let app = way(&stage, tunnel).begin().await;
        let call = gateway.call().await;
        drop(app);
        call.ended().await;

        let mut app = way(&stage, tunnel).begin().await;
        let mut call = gateway.call().await;
        call.say(format!("{EVENTS}{}", chunk("data: 1\n\n"))).await;
        app.until("data: 1").await;
        drop(app);
        call.ended().await;
    }

    let mut app = model_request(&stage).begin().await;
    let mut call = gateway.call().await;
    call.say(format!("{EVENTS}{}", chunk("data: 1\n\n"))).await;
    app.until("data: 1\n\n\r\n").await;
    drop(call);
    assert_eq!(app.rest().await, "", "cut, not ended");
    stage.logs.wait_for("broke off its answer").await;
}

#[tokio::test]
async fn a_relayed_answer_may_take_minutes() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let silence = async || {
        for _ in 0..10 {
            let_timers_pass(Duration::from_secs(30)).await;
            stage.caught_up().await;
        }
    };
    let mut app = model_request(&stage).begin().await;
    let mut call = gateway.call().await;
    silence().await;
    call.say(EVENTS).await;
    app.until("\r\n\r\n").await;
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        silence().await;
        call.say(chunk(event)).await;
        app.until(event).await;
    }
    call.say("0\r\n\r\n").await;
    app.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_client_connection_is_idle_after_a_relayed_answer() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let mut call = None;
    for (answer, end) in [
        (format!("{EVENTS}{}0\r\n\r\n", chunk("data: 1\n\n")), "\n\n\r\n0\r\n\r\n"),
        (EMPTY.replace(": 0", ": 2") + "hi", "\r\n\r\nhi"),
        (EMPTY.into(), "\r\n\r\n"),
    ] {
        let mut app = model_request(&stage).begin_kept_alive().await;
        let current = match &mut call {
            None => call.insert(gateway.call().await),
            Some(call) => {
                call.next().await;
                call
            }
        };
        current.hear("}").await;
        current.heard.clear();
        current.say(&answer).await;
        app.until(end).await;
        for _ in 0..25 {
            stage.clock.advance(Duration::from_secs(1));
            let_timers_pass(Duration::from_secs(1)).await;
            stage.caught_up().await;
        }
        assert_eq!(app.rest().await, "", "the connection has ended");
    }
}

#[tokio::test]
async fn closes_a_client_that_does_not_read() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let _app = model_request(&stage).begin().await;
    let mut call = gateway.call().await;
    call.say(EVENTS).await;
    let flood = tokio::spawn(async move {
        let data = chunk(&"x".repeat(64 * 1024));
        while call.try_say(&data).await {}
    });
    for _ in 0..30 {
        let_timers_pass(Duration::from_secs(1)).await;
        stage.caught_up().await;
    }
    soon("the call to end", flood).await.expect("no panic");
}

#[tokio::test]
async fn streams_request_bodies_of_any_length() {
    const PIECE: usize = 64 * 1024;
    const PIECES: usize = 80;
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let request =
        model_request(&stage).without_body().header("transfer-encoding", "chunked").header("expect", "100-continue");
    let mut app = request.begin().await;
    let mut call = gateway.call().await;
    assert_eq!(call.values("transfer-encoding"), ["chunked"]);
    assert!(call.values("expect").is_empty() && call.values("content-length").is_empty(), "{}", call.head);
    app.until("HTTP/1.1 100 Continue\r\n\r\n").await;
    let piece = chunk(&"x".repeat(PIECE));
    for _ in 0..PIECES {
        app.send(piece.as_bytes()).await;
        call.swallow(b'x', PIECE).await;
    }
    app.send(b"0\r\n\r\n").await;
    call.hear("0\r\n\r\n").await;
    call.say(EMPTY).await;
    app.until("HTTP/1.1 200").await;
}

#[tokio::test]
async fn drops_the_content_length_of_a_chunked_body() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let request =
        model_request(&stage).without_body().header("transfer-encoding", "chunked").header("content-length", "1");
    let mut app = request.begin().await;
    app.send(b"2\r\nhi\r\n0\r\n\r\n").await;
    let mut call = gateway.call().await;
    call.hear("2\r\nhi\r\n0\r\n\r\n").await;
    assert!(call.values("content-length").is_empty(), "{}", call.head);
    let both = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    call.say(both).await;
    let reply = app.reply().await;
    assert_eq!((reply.header("content-length"), reply.text().as_str()), (None, "2\r\nhi\r\n0\r\n\r\n"));
}

#[tokio::test]
async fn relays_every_form_of_response() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let gzip = "\x1f\u{8b}not touched";
    for (method, answer, status, headers, body) in [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", 200, &["content-length: 5"][..], ""),
        ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", 200, &[], ""),
        ("DELETE", "HTTP/1.1 204 No Content\r\n\r\n", 204, &[], ""),
        ("GET", "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n", 304, &["etag: \"x\""], ""),
        ("GET", "HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", 302, &["location: /x"], ""),
        ("GET", "HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nno", 500, &[], "no"),
        (
            "GET",
            &format!("HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n{gzip}", gzip.len()),
            200,
            &["content-encoding: gzip"],
            gzip,
        ),
        (
            "GET",
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            &[],
            "ok",
        ),
        (
            "GET",
            "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n",
            200,
            &["trailer: x-sum"],
            "2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n",
        ),
    ] {
        let request = stage.request(method, MODEL).header("authorization", &bearer()).header("te", "trailers");
        let app = request.begin().await;
        let mut call = gateway.call().await;
        assert!(call.head.starts_with(method), "{}", call.head);
        call.say(answer).await;
        let reply = app.reply().await;
        assert_eq!((reply.status, reply.text().as_str()), (status, body), "{answer}");
        for line in headers {
            let (name, value) = line.split_once(": ").expect("a header");
            assert_eq!(reply.header(name), Some(value), "{answer}: {reply:?}");
        }
    }
}

#[tokio::test]
async fn logs_relayed_requests_at_debug_without_their_content() {
    let gateway = Gateway::open().await;
    let stage = stage(&gateway).await;
    let app = model_request(&stage).target(&format!("{MODEL}/CANARY?CANARY")).header("x-own", "CANARY").begin().await;
    gateway.call().await.say(EMPTY).await;
    assert_eq!(app.reply().await.status, 200);
    let said = stage.logs.lines().into_iter().find(|line| line.contains("relayed")).expect("a line");
    for part in [
        "DEBUG relayed POST to ai-gateway.vercel.sh",
        "host=\"ai-gateway.vercel.sh\"",
        "method=POST",
        "status=200",
        "ms=",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(stage.logs.count("CANARY"), 0);
    assert_eq!(stage.emulator.received().len(), 0);
    assert_eq!(stage.status().await["upstream"]["requests"], 0, "they are not Connect's");
}

#[tokio::test]
async fn does_not_reuse_dead_connections_while_a_request_waits() {
    let gateway = Gateway::open().await;
    let forwarder = Forwarder::to(gateway.addr()).await;
    let setting = format!("bearer_hosts = [\"{HOST}={}\"]", forwarder.url());
    let stage = Scene::new().toml(&setting).start().await;
    let sent = [(); 3].map(|()| tokio::spawn(model_request(&stage).send()));
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(gateway.call().await);
    }
    for call in &mut calls {
        call.say(EMPTY).await;
    }
    for sent in sent {
        assert_eq!(soon("a reply", sent).await.expect("no panic").status, 200);
    }
    forwarder.forget();
    let _silent = model_request(&stage).begin().await;
    stage.caught_up().await;
    let_timers_pass(Duration::from_secs(3)).await;
    let next = tokio::spawn(model_request(&stage).send());
    gateway.call().await.say(EMPTY).await;
    assert_eq!(soon("a reply", next).await.expect("no panic").status, 200);
}
