//! Access control on each route of the emulator and the mock providers: programs of the same user are allowed; web
//! pages and other users are not.

use std::net::SocketAddr;

use connect_sidecar::emulator::Emulator;
use connect_sidecar::emulator::provider_kind::ProviderKind;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;

use super::{OWNER, SLACK, admin, emulator, request};
use crate::support::http::{APP, Reply, Request};
use crate::support::process::run;

/// Every route of the emulator with its parameters filled in, and some of the mock providers.
async fn routes(emulator: &Emulator) -> Vec<(SocketAddr, String, String)> {
    let document = admin(emulator, "GET", "openapi.json", "").await.json();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let item = item["$ref"].as_str().and_then(|to| document.pointer(to.trim_start_matches('#'))).unwrap_or(item);
        let methods = item.as_object().expect("methods").keys().filter(|key| *key != "parameters");
        let target = path.replace("{connector}", "slack%2Facme-slack").replace(['{', '}'], "");
        routes.extend(methods.map(|method| (emulator.addr(), method.to_uppercase(), target.clone())));
    }
    assert!(routes.len() > 50, "{routes:?}");
    let providers = emulator.mock_providers().base(ProviderKind::OAuth);
    let providers = providers.trim_start_matches("http://").split('/').next().expect("an address").parse();
    let providers: SocketAddr = providers.expect("an address");
    for (method, path) in [
        ("GET", "/oauth/authorize"),
        ("POST", "/oauth/authorize"),
        ("POST", "/oauth/token"),
        ("GET", "/oauth/userinfo"),
        ("POST", "/slack/api/oauth.v2.access"),
        ("GET", "/oauth/.well-known/openid-configuration"),
        ("GET", "/"),
    ] {
        routes.push((providers, method.into(), path.into()));
    }
    routes
}

fn code(reply: &Reply) -> String {
    reply.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn web_pages_cannot_reach_any_route() {
    let emulator = emulator("").await;
    let routes = routes(&emulator).await;
    for (addr, method, target) in &routes {
        for (name, value, says) in [
            ("host", "rebound.example", "host_not_allowed"),
            ("host", &*format!("rebound.example:{}", addr.port()), "host_not_allowed"),
            ("origin", "https://evil.example", "browser_request_refused"),
            ("origin", "null", "browser_request_refused"),
            ("origin", "http://localhost:3000", "browser_request_refused"),
            ("sec-fetch-site", "cross-site", "browser_request_refused"),
            ("sec-fetch-site", "same-site", "browser_request_refused"),
        ] {
            // With a valid credential.
            let ask = Request::new(*addr, method, target).header("authorization", &format!("Bearer {OWNER}"));
            let reply = ask.header(name, value).send().await;
            assert_eq!((reply.status, &*code(&reply)), (403, says), "{method} {target} {name}: {value}");
        }
        let without_host = Request::new(*addr, method, target).without("host").send().await;
        assert!(matches!(without_host.status, 400 | 403), "{method} {target}: {}", without_host.status);
    }
    assert_eq!(emulator.received().len(), 0, "no refused request is recorded");
    assert_eq!(emulator.mock_providers().requests(), []);
}

#[tokio::test]
async fn a_browser_may_navigate_to_pages_only() {
    let emulator = emulator("").await;
    let led = |addr, target: &str| {
        let ask = Request::new(addr, "GET", target).header("sec-fetch-site", "cross-site");
        ask.header("sec-fetch-mode", "navigate").header("sec-fetch-dest", "document")
    };
    for (addr, _, target) in routes(&emulator).await.into_iter().filter(|(_, method, _)| method == "GET") {
        let reply = led(addr, &target).send().await;
        let is_page =
            addr != emulator.addr() || target.starts_with("/api/v1/connect/") || target == "/connect/callback";
        assert_eq!(reply.status != 403 || code(&reply) != "browser_request_refused", is_page, "{target}");
        let framed = led(addr, &target).header("sec-fetch-dest", "iframe").send().await;
        assert_eq!(code(&framed), "browser_request_refused", "{target}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
#[allow(clippy::print_stderr, reason = "a test that cannot be run says so")]
async fn another_user_of_this_machine_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        crate::support::skipped("only root can connect as another user");
        return;
    }
    const NOBODY: u32 = 65_534;
    let emulator = emulator("").await;
    let bearer = format!("authorization: Bearer {}", emulator.oidc_token(DEVELOPMENT_LIFE));
    let provider = format!("{}/.well-known/openid-configuration", emulator.mock_providers().base(ProviderKind::OAuth));
    let ours = |path: &str| format!("{}{path}", emulator.url());
    for url in
        [ours("/_emulator/env.local"), ours("/_emulator/requests"), ours(SLACK), ours("/connect/callback"), provider]
    {
        let ask = async |uid: u32| {
            let mut curl = tokio::process::Command::new("curl");
            curl.args(["--silent", "--include", "--max-time", "20", "--header", "content-type: application/json"]);
            curl.args(if url.ends_with(SLACK) { &["--data", APP][..] } else { &[] }).args(["--header", &bearer, &url]);
            curl.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
            curl.uid(uid).gid(uid).kill_on_drop(true);
            Reply::parse(run(curl).await.stdout.as_bytes())
        };
        let reply = ask(NOBODY).await;
        assert_eq!((reply.status, &*code(&reply)), (403, "peer_uid_mismatch"), "{url}");
        let own = ask(0).await;
        assert_eq!(own.status, if url.ends_with("/callback") { 400 } else { 200 }, "{url}");
    }
    assert_eq!(emulator.count(SLACK), 1, "nobody's is not among them");
    let plain = request(&emulator, OWNER, "GET", "/v1/connect/connectors/slack%2Facme-slack");
    assert_eq!(plain.send().await.status, 200);
}
