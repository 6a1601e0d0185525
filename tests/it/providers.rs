//! Provider tokens: every token comes from an exchange that the mock provider has verified. Covers expiry, narrowing,
//! revocation and theft, with the real protocols over HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use connect_sidecar::emulator::keys::RsaKey;
use connect_sidecar::emulator::mock_providers::{App, RecordedRequest};
use connect_sidecar::emulator::provider_kind::ProviderKind;
use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::world::{Connector, World};
use connect_sidecar::emulator::{Emulator, Options};
use serde_json::{Value, json};

use crate::support::http::{Reply, Request};
use crate::support::logs::Logs;

const APP: &str = r#"{"subject":{"type":"app"}}"#;
const USER: &str = r#"{"subject":{"type":"user","id":"user_ada"}}"#;
const HOUR: Duration = Duration::from_secs(3600);

/// An emulator with a connector of each type, all linked, installed and granted by one user, and its clock.
struct Workspace {
    emulator: Emulator,
    clock: Arc<std::sync::Mutex<SystemTime>>,
}

impl Workspace {
    async fn new(change: impl FnOnce(&mut World)) -> Self {
        let mut world = World::demo();
        world.connectors.clear();
        for kind in ["slack", "github", "snowflake", "salesforce", "oauth", "api-key"] {
            let mut connector = Connector::new(&format!("{kind}/acme"), &format!("scl_{kind}"), "prj_web");
            connector.granted_to.push("user_ada".into());
            world.connectors.push(connector);
        }
        change(&mut world);
        let clock = Arc::new(std::sync::Mutex::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000)));
        let now = clock.clone();
        let now = Arc::new(move || *now.lock().expect("a clock"));
        let emulator = Emulator::start(Options { world, now, ..Options::default() }).await.expect("an emulator");
        Self { emulator, clock }
    }

    fn pass(&self, time: Duration) {
        *self.clock.lock().expect("a clock") += time;
    }

    async fn call(&self, method: &str, target: &str, body: &str) -> Reply {
        let bearer = format!("Bearer {}", self.emulator.oidc_token(DEVELOPMENT_LIFE));
        Request::new(self.emulator.addr(), method, target).header("authorization", &bearer).json(body).send().await
    }

    async fn ask(&self, kind: &str, body: &str) -> Reply {
        self.call("POST", &format!("/v1/connect/token/{kind}%2Facme"), body).await
    }

    async fn token(&self, kind: &str, body: &str) -> String {
        let reply = self.ask(kind, body).await;
        assert_eq!(reply.status, 200, "{kind} {body}: {}", reply.text());
        reply.token()
    }

    fn vault(&self, kind: &str) -> BTreeMap<String, Value> {
        self.emulator.read(|world| world.connector(&format!("{kind}/acme")).expect("a connector").vault.clone())
    }

    fn set_vault(&self, kind: &str, vault: BTreeMap<String, Value>) {
        self.emulator.change(|world| world.connector_mut(&format!("{kind}/acme")).expect("a connector").vault = vault);
    }

    fn requests(&self, kind: &str) -> Vec<RecordedRequest> {
        self.emulator.mock_providers().requests().into_iter().filter(|request| request.provider == kind).collect()
    }

    fn proofs(&self, kind: &str) -> Vec<&'static str> {
        self.requests(kind).into_iter().flat_map(|request| request.proofs).collect()
    }

    /// Sends a request with a token to its provider. Returns whether the provider accepts it.
    async fn use_token(&self, kind: &str, token: &str) -> bool {
        let (method, path) = match kind {
            "slack" => ("POST", "api/auth.test"),
            "github" if token.starts_with("ghs_") => ("GET", "installation/repositories"),
            "github" => ("GET", "user"),
            "salesforce" => ("GET", "services/oauth2/userinfo"),
            _ => ("GET", "userinfo"),
        };
        let url = format!("{}/{path}", self.emulator.mock_providers().base(ProviderKind::of_type(kind)));
        let reply = Browser::default().send(method, &url, &[("authorization", &format!("Bearer {token}"))], None).await;
        reply.status == 200 && reply.json()["ok"] != false
    }
}

/// The code of an error response.
fn code(reply: &Reply) -> String {
    reply.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

/// A minimal browser, which keeps cookies and can follow redirects.
#[derive(Default)]
struct Browser {
    cookies: BTreeMap<String, String>,
}

impl Browser {
    async fn send(&mut self, method: &str, url: &str, headers: &[(&str, &str)], form: Option<&str>) -> Reply {
        let rest = url.strip_prefix("http://").expect("a URL");
        let (host, path) = rest.split_at(rest.find('/').expect("a path"));
        let mut request = Request::new(host.parse().expect("an address"), method, path);
        if let Some(cookie) = self.cookies.get(host) {
            request = request.header("cookie", cookie);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(form) = form {
            let origin = format!("http://{host}");
            request = request.header("origin", &origin).header("content-type", "application/x-www-form-urlencoded");
            request = request.body(form);
        }
        let reply = request.send().await;
        if let Some(cookie) = reply.header("set-cookie") {
            self.cookies.insert(host.into(), cookie.split(';').next().expect("a cookie").into());
        }
        reply
    }

    /// Opens a page and follows redirects. Returns the last URL and response.
    async fn open(&mut self, url: &str) -> (String, Reply) {
        let (mut url, mut left) = (url.to_owned(), 5);
        loop {
            let reply = self.send("GET", &url, &[], None).await;
            match reply.header("location") {
                Some(to) if left > 0 => (url, left) = (to.to_owned(), left - 1),
                _ => return (url, reply),
            }
        }
    }

    /// Submits the form of a page with this decision.
    async fn decide(&mut self, (url, page): (String, Reply), decision: &str) -> (String, Reply) {
        let text = page.text();
        let csrf = text.split_once("name=\"csrf\" value=\"").and_then(|(_, rest)| rest.split_once('"'));
        let (csrf, _) = csrf.unwrap_or_else(|| panic!("no form on {url}: {text}"));
        let form = format!("csrf={csrf}&decision={decision}");
        let reply = self.send("POST", &url, &[], Some(&form)).await;
        match reply.header("location") {
            Some(to) => self.open(to).await,
            None => (url, reply),
        }
    }
}

#[tokio::test]
async fn every_token_comes_from_an_exchange_that_the_provider_verified() {
    for (kind, body, proofs, prefix) in [
        ("slack", APP, &["client secret", "PKCE S256"][..], "xoxe.xoxb-"),
        ("slack", USER, &["client secret", "PKCE S256"], "xoxe.xoxp-"),
        ("github", APP, &["app JWT RS256"], "ghs_"),
        ("github", USER, &["client secret", "PKCE S256"], "ghu_"),
        ("snowflake", APP, &["key-pair JWT RS256"], "eyJ"),
        ("salesforce", APP, &["client secret", "PKCE S256"], "00D"),
        ("salesforce", USER, &["client secret", "PKCE S256"], "00D"),
        ("oauth", APP, &["client secret"], "at_"),
        ("oauth", USER, &["client secret", "PKCE S256"], "at_"),
        ("oauth", r#"{"subject":{"type":"jwt-bearer","sub":"u1"}}"#, &["client secret", "assertion RS256"], "at_"),
        ("api-key", APP, &[], "key_"),
    ] {
        let workspace = Workspace::new(|_| {}).await;
        let reply = workspace.ask(kind, body).await;
        assert_eq!(reply.status, 200, "{kind} {body}: {}", reply.text());
        assert!(reply.token().starts_with(prefix), "{kind} {body}: {}", reply.text());
        let proved = workspace.proofs(kind);
        assert!(proofs.iter().all(|proof| proved.contains(proof)), "{kind} {body}: {:?}", workspace.requests(kind));
        assert_eq!(proved.is_empty(), proofs.is_empty(), "{kind} {body}: {:?}", workspace.requests(kind));
        if kind == "salesforce" {
            assert!(reply.json()["metadata"]["instanceUrl"].is_string(), "{}", reply.text());
        }
    }
}

#[tokio::test]
async fn a_token_is_reused_until_its_buffer_and_then_refreshed() {
    let workspace = Workspace::new(|_| {}).await;
    for (kind, body, proof) in [
        ("slack", APP, "refresh token"),
        ("slack", USER, "refresh token"),
        ("github", APP, "app JWT RS256"),
        ("github", USER, "refresh token"),
        ("snowflake", APP, "key-pair JWT RS256"),
        ("salesforce", USER, "refresh token"),
        ("oauth", USER, "refresh token"),
        ("oauth", APP, "client secret"),
    ] {
        let first = workspace.token(kind, body).await;
        let before = workspace.requests(kind).len();
        workspace.pass(HOUR - Duration::from_secs(31));
        assert_eq!(workspace.token(kind, body).await, first, "{kind}");
        assert_eq!(workspace.requests(kind).len(), before, "{kind}: the provider is not asked");
        let sooner = format!("{{\"validityBufferMs\":31000,{}", &body[1..]);
        let second = workspace.token(kind, &sooner).await;
        assert_ne!(second, first, "{kind}: the buffer decides");
        assert!(workspace.requests(kind)[before..].iter().any(|request| request.proofs.contains(&proof)), "{kind}");
        workspace.pass(HOUR - Duration::from_secs(30));
        assert_ne!(workspace.token(kind, body).await, second, "{kind}: the default buffer is 30 s");
    }
}

#[tokio::test]
async fn reuse_of_a_refresh_token_revokes_the_grant() {
    for kind in ["slack", "github", "salesforce", "oauth"] {
        let workspace = Workspace::new(|_| {}).await;
        workspace.token(kind, USER).await;
        let stolen = workspace.vault(kind);
        workspace.pass(HOUR);
        let good = workspace.token(kind, USER).await;
        assert!(workspace.use_token(kind, &good).await, "{kind}");
        let kept = workspace.vault(kind);
        assert_ne!(
            stolen["user:user_ada"]["refresh_token"], kept["user:user_ada"]["refresh_token"],
            "{kind}: it rotates"
        );

        workspace.pass(HOUR / 2);
        let mut replayed = stolen;
        replayed.get_mut("user:user_ada").expect("held")["tokens"] = json!([]);
        workspace.set_vault(kind, replayed);
        assert_eq!(code(&workspace.ask(kind, USER).await), "no_token", "{kind}");
        assert!(!workspace.use_token(kind, &good).await, "{kind}: what came of it ends, too");
        workspace.set_vault(kind, kept);
        workspace.pass(HOUR);
        let reply = workspace.ask(kind, USER).await;
        assert_eq!((reply.status, &*code(&reply)), (422, "no_token"), "{kind}: nor does the new one help");
    }
}

#[tokio::test]
async fn a_revocation_reaches_the_provider() {
    for (kind, body) in
        [("slack", APP), ("slack", USER), ("github", APP), ("github", USER), ("salesforce", USER), ("oauth", USER)]
    {
        let workspace = Workspace::new(|_| {}).await;
        let token = workspace.token(kind, body).await;
        assert!(workspace.use_token(kind, &token).await, "{kind}");
        let reply = workspace.call("DELETE", &format!("/v1/connect/connectors/{kind}%2Facme/tokens"), body).await;
        assert_eq!(reply.json()["providerRevoked"], 1, "{kind} {body}: {}", reply.text());
        assert!(!workspace.use_token(kind, &token).await, "{kind} {body}");
        assert!(workspace.vault(kind).is_empty(), "{kind}");
    }
    let workspace = Workspace::new(|_| {}).await;
    workspace.token("api-key", APP).await;
    let reply = workspace.call("DELETE", "/v1/connect/connectors/api-key%2Facme/tokens", APP).await;
    assert_eq!(reply.json()["providerSkipped"], 1, "{}", reply.text());
}

#[tokio::test]
async fn a_grant_withdrawn_at_the_provider_gives_no_token_until_the_next_consent() {
    for kind in ["slack", "github", "salesforce", "oauth"] {
        let workspace = Workspace::new(|_| {}).await;
        workspace.token(kind, USER).await;
        workspace.emulator.mock_providers().console().withdraw(
            ProviderKind::of_type(kind),
            &format!("client-scl_{kind}"),
            None,
        );
        workspace.pass(HOUR);
        for _ in 0..2 {
            let reply = workspace.ask(kind, USER).await;
            assert_eq!((reply.status, &*code(&reply)), (422, "no_token"), "{kind}");
        }
        consent(&workspace, kind, "approve").await;
        workspace.token(kind, USER).await;
    }
    let workspace = Workspace::new(|_| {}).await;
    workspace.token("github", APP).await;
    workspace.emulator.mock_providers().console().withdraw(ProviderKind::GitHub, "client-scl_github", None);
    workspace.pass(HOUR);
    assert_eq!(code(&workspace.ask("github", APP).await), "client_installation_required");
}

/// Runs a consent in a browser from the start to the result.
async fn consent(workspace: &Workspace, kind: &str, decision: &str) -> (Value, Value) {
    begin(workspace, "authorize", kind, USER, decision).await
}

async fn begin(workspace: &Workspace, what: &str, kind: &str, body: &str, decision: &str) -> (Value, Value) {
    let begun = workspace.call("POST", &format!("/v1/connect/{what}/{kind}%2Facme"), body).await.json();
    let verifier = begun["verifier"].as_str().unwrap_or_else(|| panic!("{begun}"));
    let result = format!("/v1/connect/result/{verifier}");
    assert_eq!(workspace.call("GET", &result, "").await.json()["status"], "pending", "{kind}");
    let mut browser = Browser::default();
    let page = browser.open(begun["url"].as_str().expect("a URL")).await;
    assert_eq!(page.1.status, 200, "{kind}: {}", page.1.text());
    let policy = page.1.header("content-security-policy").unwrap_or_default();
    assert!(policy.starts_with("default-src 'none'"), "{kind}: {policy}");
    let (_, last) = browser.decide(page, decision).await;
    assert_eq!(last.status, 200, "{kind}: {}", last.text());
    let result = workspace.call("GET", &result, "").await.json();
    (begun, result)
}

#[tokio::test]
async fn a_person_approves_or_denies_in_a_browser() {
    let new = r#"{"subject":{"type":"user","id":"user_new"}}"#;
    for kind in ["slack", "github", "salesforce", "oauth"] {
        let workspace = Workspace::new(|_| {}).await;
        assert_eq!(code(&workspace.ask(kind, new).await), "user_authorization_required", "{kind}");
        let (_, result) = begin(&workspace, "authorize", kind, new, "deny").await;
        assert_eq!(result["status"], "canceled", "{kind}: {result}");
        assert_eq!(code(&workspace.ask(kind, new).await), "user_authorization_required", "{kind}");
        let (_, result) = begin(&workspace, "authorize", kind, new, "approve").await;
        assert_eq!(result["status"], "success", "{kind}: {result}");
        let at_once = workspace.requests(kind).len();
        let token = workspace.token(kind, new).await;
        assert!(workspace.use_token(kind, &token).await, "{kind}");
        let refreshed =
            workspace.requests(kind)[at_once..].iter().any(|request| request.proofs.contains(&"refresh token"));
        assert!(refreshed, "{kind}: by what the browser brought, {:?}", workspace.requests(kind));
    }
}

#[tokio::test]
async fn an_operator_installs_in_a_browser() {
    let tenant = r#"{"tenantId":"T0NEW"}"#;
    for kind in ["slack", "github", "salesforce", "api-key", "snowflake"] {
        let workspace = Workspace::new(|world| world.connectors.iter_mut().for_each(|c| c.installations.clear())).await;
        let (_, result) = begin(&workspace, "install", kind, tenant, "approve").await;
        assert_eq!(result["status"], "success", "{kind}: {result}");
        let reply = workspace.ask(kind, APP).await;
        assert_eq!((reply.status, &reply.json()["tenantId"]), (200, &json!("T0NEW")), "{kind}: {}", reply.text());
    }
}

#[tokio::test]
async fn a_consent_requires_the_csrf_cookie_and_the_state() {
    let workspace = Workspace::new(|_| {}).await;
    let begun = workspace.call("POST", "/v1/connect/authorize/oauth%2Facme", USER).await.json();
    let mut browser = Browser::default();
    let (url, page) = browser.open(begun["url"].as_str().expect("a URL")).await;
    let mut other = Browser::default();
    let refused = other.decide((url.clone(), page.clone()), "approve").await.1;
    assert_eq!(refused.status, 400, "without the cookie: {}", refused.text());

    let forged = format!("{}/connect/callback?code=x&state=y", workspace.emulator.url());
    assert_eq!(browser.open(&forged).await.1.status, 400);
    assert_eq!(browser.decide((url.clone(), page.clone()), "approve").await.1.status, 200);
    let again = browser.decide((url, page), "approve").await.1;
    assert_eq!(again.status, 400, "once only: {}", again.text());
}

#[tokio::test]
async fn polling_for_the_result_polls_the_device_code() {
    for (decision, status) in [("approve", "success"), ("deny", "canceled")] {
        let workspace = Workspace::new(|_| {}).await;
        let body = r#"{"subject":{"type":"user","id":"user_new"},"deviceCode":true}"#;
        let begun = workspace.call("POST", "/v1/connect/authorize/oauth%2Facme", body).await.json();
        let (code, url) = (begun["deviceCode"].as_str().expect("a code"), begun["url"].as_str().expect("a URL"));
        assert!(url.ends_with(&format!("/oauth/device?user_code={code}")), "{begun}");
        let result = format!("/v1/connect/result/{}", begun["verifier"].as_str().expect("a verifier"));
        for _ in 0..2 {
            // The second poll is too early for the provider, which changes nothing.
            assert_eq!(workspace.call("GET", &result, "").await.json()["status"], "pending");
        }
        let mut browser = Browser::default();
        let page = browser.open(url).await;
        assert_eq!(browser.decide(page, decision).await.1.status, 200);
        assert_eq!(workspace.call("GET", &result, "").await.json()["status"], status);
        let reply = workspace.ask("oauth", r#"{"subject":{"type":"user","id":"user_new"}}"#).await;
        assert_eq!(reply.status == 200, decision == "approve", "{}", reply.text());
    }
    let workspace = Workspace::new(|_| {}).await;
    let body = r#"{"subject":{"type":"user","id":"user_new"},"deviceCode":true,"expiresInMs":3600000}"#;
    let begun = workspace.call("POST", "/v1/connect/authorize/oauth%2Facme", body).await.json();
    workspace.pass(Duration::from_secs(600));
    let result = format!("/v1/connect/result/{}", begun["verifier"].as_str().expect("a verifier"));
    let result = workspace.call("GET", &result, "").await.json();
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!("expired_token")), "{result}");
}

#[tokio::test]
async fn a_token_can_be_narrowed_but_not_exceed_the_grant() {
    let workspace = Workspace::new(|world| {
        for connector in &mut world.connectors {
            let data = json!({
                "scopes": ["read", "write"], "resources": ["https://api.example/"], "roles": ["ANALYST"],
                "permissions": {"contents": "read"}, "repositories": ["web"],
            });
            connector.data = data.as_object().expect("an object").clone().into_iter().collect();
        }
    })
    .await;
    let details = |repository: &str, permission: &str| {
        format!(
            r#""authorizationDetails":[{{"type":"github_app_installation","repositories":["{repository}"],"permissions":["{permission}"]}}]"#
        )
    };
    let resource = |uri: &str| format!(r#""resources":["{uri}"]"#);
    let scope = |scope: &str| format!(r#""scopes":["{scope}"]"#);
    for (kind, subject, narrower, refusal) in [
        ("slack", APP, scope("read"), None),
        ("slack", APP, scope("*"), None),
        ("slack", APP, scope("admin"), Some("client_installation_required")),
        ("slack", USER, scope("admin"), Some("user_authorization_required")),
        ("github", APP, details("acme/web", "contents:read"), None),
        ("github", APP, details("acme/secret", "contents:read"), Some("client_installation_required")),
        ("github", APP, details("acme/web", "contents:write"), Some("client_installation_required")),
        ("github", APP, scope("issues:read"), Some("client_installation_required")),
        ("snowflake", APP, scope("session:role:ANALYST"), None),
        ("snowflake", APP, scope("session:role:ADMIN"), Some("unresolved_token")),
        ("salesforce", USER, scope("read"), None),
        ("salesforce", USER, scope("admin"), Some("user_authorization_required")),
        ("oauth", USER, scope("read"), None),
        ("oauth", USER, scope("admin"), Some("user_authorization_required")),
        ("oauth", USER, resource("https://api.example/"), None),
        ("oauth", USER, resource("https://evil.example/"), Some("user_authorization_required")),
        ("oauth", USER, resource("not-a-uri"), Some("user_authorization_required")),
        ("oauth", USER, r#""authorizationDetails":[{"type":"resource_access"}]"#.into(), None),
        ("oauth", USER, r#""authorizationDetails":[{"type":"x"}]"#.into(), Some("user_authorization_required")),
        ("oauth", APP, scope("read"), None),
        ("oauth", APP, scope("admin"), Some("unresolved_token")),
        ("api-key", APP, scope("read"), None),
        ("api-key", APP, scope("admin"), Some("unresolved_token")),
        ("api-key", USER, scope("read"), Some("unresolved_token")),
        ("snowflake", USER, scope("*"), Some("unresolved_token")),
    ] {
        if refusal.is_none() && subject == USER {
            workspace.token(kind, USER).await;
        }
        let body = format!("{{{narrower},{}", &subject[1..]);
        let reply = workspace.ask(kind, &body).await;
        match refusal {
            None => assert_eq!(reply.status, 200, "{kind} {body}: {}", reply.text()),
            Some(refusal) => {
                assert_eq!((reply.status, &*code(&reply)), (422, refusal), "{kind} {body}: {}", reply.text());
            }
        }
        // A refused request does not affect other tokens.
        if subject == USER && !matches!(kind, "api-key" | "snowflake") {
            workspace.token(kind, USER).await;
        }
    }
}

#[tokio::test]
async fn a_wrong_key_or_secret_is_refused_by_the_provider() {
    let key = RsaKey::new().expect("a key");
    for (kind, body, data) in [
        ("github", APP, json!({"private_key": key.pem()})),
        ("snowflake", APP, json!({"private_key": key.pem()})),
        ("slack", APP, json!({"client_secret": "wrong"})),
        ("github", USER, json!({"client_secret": "wrong"})),
        ("salesforce", USER, json!({"client_secret": "wrong"})),
        ("oauth", USER, json!({"client_secret": "wrong"})),
        ("api-key", APP, json!({"api_key_env": "CONNECT_SIDECAR_TEST_NO_SUCH_VARIABLE"})),
    ] {
        let workspace = Workspace::new(|world| {
            let connector = world.connector_mut(&format!("{kind}/acme")).expect("a connector");
            connector.data = data.as_object().expect("an object").clone().into_iter().collect();
        })
        .await;
        let reply = workspace.ask(kind, body).await;
        assert_eq!((reply.status, &*code(&reply)), (422, "no_token"), "{kind}: {}", reply.text());
        assert_eq!(workspace.proofs(kind), Vec::<&str>::new(), "{kind}");
    }
}

#[tokio::test]
async fn a_remote_provider_is_discovered_by_its_issuer() {
    let theirs = Workspace::new(|_| {}).await;
    let issuer = theirs.emulator.mock_providers().base(ProviderKind::OAuth);
    let workspace = Workspace::new(|world| {
        let connector = world.connector_mut("oauth/acme").expect("a connector");
        connector.granted_to.clear();
        connector.data = [("issuer".to_owned(), json!(issuer)), ("client_id".to_owned(), json!("client-ours"))].into();
    })
    .await;
    let app = App {
        name: "ours".into(),
        redirect_uris: vec![format!("{}/connect/callback", workspace.emulator.url())],
        token_life: 3600,
        ..App::default()
    };
    let registered =
        theirs.emulator.mock_providers().console().register(ProviderKind::OAuth, &app).expect("registered");
    workspace.emulator.change(|world| {
        let data = &mut world.connector_mut("oauth/acme").expect("a connector").data;
        data.insert("client_secret".into(), registered.client_secret.into());
    });
    for document in [
        format!("{issuer}/.well-known/openid-configuration"),
        format!("{}/.well-known/oauth-authorization-server/oauth", issuer.trim_end_matches("/oauth")),
    ] {
        let found = Browser::default().send("GET", &document, &[], None).await.json();
        assert_eq!(found["issuer"], *issuer, "{document}");
    }
    let (_, result) = consent(&workspace, "oauth", "approve").await;
    assert_eq!(result["status"], "success", "{result}");
    let token = workspace.token("oauth", USER).await;
    assert_eq!(workspace.requests("oauth"), [], "the own mock provider is not used");
    assert!(theirs.use_token("oauth", &token).await && !workspace.use_token("oauth", &token).await);
    theirs.pass(HOUR);
    workspace.pass(HOUR);
    let second = workspace.token("oauth", USER).await;
    assert!(second != token && theirs.use_token("oauth", &second).await);
}

/// A client of the OAuth provider that can send invalid requests.
struct Client {
    base: String,
    secret: String,
}

const REDIRECT: &str = "http://127.0.0.1:1/cb";
const VERIFIER: &str = "a-verifier-that-nobody-guesses-a-verifier-that";

impl Client {
    fn new(workspace: &Workspace) -> Self {
        let console = workspace.emulator.mock_providers().console();
        let app = App { name: "x".into(), redirect_uris: vec![REDIRECT.into()], token_life: 60, ..App::default() };
        let secret = console.register(ProviderKind::OAuth, &app).expect("registered").client_secret;
        console.consent(ProviderKind::OAuth, "client-x", "ada");
        Self { base: workspace.emulator.mock_providers().base(ProviderKind::OAuth), secret }
    }

    /// Status and redirect parameters of the authorization endpoint, with these parameters changed.
    async fn authorize(&self, change: &[(&str, &str)]) -> (u16, BTreeMap<String, String>) {
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, VERIFIER.as_bytes()));
        let usual = [
            ("client_id", "client-x"),
            ("redirect_uri", REDIRECT),
            ("response_type", "code"),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
            ("prompt", "none"),
            ("login_hint", "ada"),
            ("scope", "openid"),
            ("nonce", "n"),
        ];
        let url = format!("{}/authorize?{}", self.base, pairs(&usual, change));
        let reply = Browser::default().send("GET", &url, &[], None).await;
        let query = reply.header("location").and_then(|to| to.split_once('?')).map_or("", |(_, query)| query);
        let query = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        (reply.status, query)
    }

    /// The response of the token endpoint to a code, with these parameters changed.
    async fn redeem(&self, code: &str, change: &[(&str, &str)]) -> Value {
        let usual = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", REDIRECT),
            ("code_verifier", VERIFIER),
            ("client_id", "client-x"),
            ("client_secret", &self.secret),
        ];
        let url = format!("{}/token", self.base);
        Browser::default().send("POST", &url, &[], Some(&pairs(&usual, change))).await.json()
    }
}

/// Encodes parameters with changes. A parameter that is changed to an empty value is left out.
fn pairs(usual: &[(&str, &str)], change: &[(&str, &str)]) -> String {
    let changed = |name: &str| change.iter().find(|(changed, _)| *changed == name).map(|(_, value)| *value);
    let mut text = form_urlencoded::Serializer::new(String::new());
    text.extend_pairs(
        usual.iter().map(|(name, value)| (name, changed(name).unwrap_or(value))).filter(|(_, v)| !v.is_empty()),
    );
    text.finish()
}

#[tokio::test]
async fn the_mock_provider_refuses_what_the_rfcs_refuse() {
    let workspace = Workspace::new(|_| {}).await;
    let client = Client::new(&workspace);
    for (change, error) in [
        (("code_challenge", ""), "invalid_request"),
        (("code_challenge_method", "plain"), "invalid_request"),
        (("code_challenge", "short"), "invalid_request"),
        (("response_type", "token"), "unsupported_response_type"),
        (("login_hint", "eve"), "consent_required"),
    ] {
        let (status, query) = client.authorize(&[change]).await;
        assert_eq!((status, query.get("error").map(String::as_str)), (303, Some(error)), "{change:?}");
    }
    for change in [("redirect_uri", "http://evil.example/"), ("client_id", "client-y")] {
        let (status, query) = client.authorize(&[change]).await;
        assert_eq!((status, query.len()), (400, 0), "nobody is sent there: {change:?}");
    }
    for (change, error) in [
        (("code_verifier", "another-verifier-that-nobody-guesses-another-one"), "invalid_grant"),
        (("code_verifier", ""), "invalid_grant"),
        (("redirect_uri", "http://127.0.0.1:1/other"), "invalid_grant"),
        (("client_secret", "wrong"), "invalid_client"),
        (("grant_type", "password"), "unsupported_grant_type"),
    ] {
        let code = client.authorize(&[]).await.1["code"].clone();
        assert_eq!(client.redeem(&code, &[change]).await["error"], error, "{change:?}");
    }
    let code = client.authorize(&[]).await.1["code"].clone();
    workspace.pass(Duration::from_secs(60));
    assert_eq!(client.redeem(&code, &[]).await["error"], "invalid_grant", "over");
    let code = client.authorize(&[]).await.1["code"].clone();
    let token = client.redeem(&code, &[]).await["access_token"].as_str().expect("a token").to_owned();
    assert!(workspace.use_token("oauth", &token).await);
    assert_eq!(client.redeem(&code, &[]).await["error"], "invalid_grant", "a code is for once");
    assert!(!workspace.use_token("oauth", &token).await, "and its second use ends what came of the first");
}

#[tokio::test]
async fn an_id_token_is_verified_by_the_published_keys() {
    let workspace = Workspace::new(|_| {}).await;
    let client = Client::new(&workspace);
    let code = client.authorize(&[]).await.1["code"].clone();
    let answer = client.redeem(&code, &[]).await;
    let keys = Browser::default().send("GET", &format!("{}/jwks", client.base), &[], None).await.json();
    let jwk = serde_json::from_value(keys["keys"][0].clone()).expect("a JWK");
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::RS256);
    validation.set_audience(&["client-x"]);
    validation.set_issuer(&[&client.base]);
    let key = jsonwebtoken::DecodingKey::from_jwk(&jwk).expect("a key");
    let id_token = answer["id_token"].as_str().expect("an ID token");
    let claims = jsonwebtoken::decode::<Value>(id_token, &key, &validation).expect("verified").claims;
    assert_eq!((&claims["sub"], &claims["nonce"]), (&json!("ada"), &json!("n")));
}

#[tokio::test]
async fn polling_a_device_code_too_often_is_refused_with_slow_down() {
    let workspace = Workspace::new(|_| {}).await;
    let client = Client::new(&workspace);
    let form = pairs(&[("client_id", "client-x"), ("client_secret", &client.secret)], &[]);
    let url = format!("{}/device_authorization", client.base);
    let begun = Browser::default().send("POST", &url, &[], Some(&form)).await.json();
    let grant = "urn:ietf:params:oauth:grant-type:device_code";
    let form = format!("{form}&grant_type={grant}&device_code={}", begun["device_code"].as_str().expect("a code"));
    let url = format!("{}/token", client.base);
    for (passed, error) in
        [(0, "authorization_pending"), (4, "slow_down"), (5, "authorization_pending"), (600, "expired_token")]
    {
        workspace.pass(Duration::from_secs(passed));
        let reply = Browser::default().send("POST", &url, &[], Some(&form)).await;
        assert_eq!((reply.status, &reply.json()["error"]), (400, &json!(error)), "after {passed} s");
    }
}

#[tokio::test]
async fn refresh_tokens_and_client_secrets_never_leave_the_emulator() {
    let logs = Logs::capture();
    let workspace = Workspace::new(|_| {}).await;
    let mut shown = String::new();
    for kind in ["slack", "github", "salesforce", "oauth"] {
        consent(&workspace, kind, "approve").await;
        for body in [APP, USER] {
            shown += &workspace.ask(kind, body).await.text();
        }
        shown += &workspace.call("GET", &format!("/v1/connect/connectors/{kind}%2Facme"), "").await.text();
        shown += &workspace.call("GET", "/v1/connect/connectors", "").await.text();
    }
    for admin in ["requests", "consents"] {
        let reply = Request::new(workspace.emulator.addr(), "GET", &format!("/_emulator/{admin}")).send().await;
        assert_eq!(reply.status, 200);
        shown += &reply.text();
    }
    shown += &format!("{:?}", workspace.emulator.mock_providers().requests());
    shown += &logs.lines().concat();
    let mut secrets = 0;
    for kind in ["slack", "github", "salesforce", "oauth"] {
        for held in workspace.vault(kind).values() {
            if let Some(secret) = held["refresh_token"].as_str() {
                assert!(!shown.contains(secret), "{kind}");
                secrets += 1;
            }
        }
        let app = App { name: format!("scl_{kind}"), ..App::default() };
        let registered = workspace
            .emulator
            .mock_providers()
            .console()
            .register(ProviderKind::of_type(kind), &app)
            .expect("registered");
        assert!(!shown.contains(&registered.client_secret) && !shown.contains(&registered.private_key), "{kind}");
    }
    assert_eq!(secrets, 6, "there was something to see");
}
