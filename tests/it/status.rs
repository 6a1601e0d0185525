//! Readiness, status and metrics: their format and values, and that they contain no secrets.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use connect_sidecar::emulator::fault::{Fault, FaultKind};
use serde_json::{Value, json};

use crate::support::http::Reply;
use crate::support::{SLACK_UID, Scene, Stage, fingerprint};

const APP: &str = r#"{"subject":{"type":"app"}}"#;
const USER: &str = r#"{"subject":{"type":"user","id":"user_ada"}}"#;
const PAGES: [&str; 4] = ["/healthz", "/readyz", "/metrics", "/_sidecar/v1/status"];
const HOUR: Duration = Duration::from_secs(3600);

impl Stage {
    async fn get(&self, path: &str) -> Reply {
        self.request("GET", path).send().await
    }

    async fn metrics(&self) -> BTreeMap<String, f64> {
        samples(&self.get("/metrics").await.text())
    }

    /// Causes three hits, six misses, two joined requests, and eight upstream requests of which two fail.
    async fn make_requests(&self) {
        self.token(APP).send().await.token();
        self.token(APP).send().await.token();
        self.token(USER).send().await.token();
        self.token(APP).header("cache-control", "no-cache").send().await.token();
        for _ in 0..2 {
            self.token(APP).send().await.token();
        }
        let hold = self.emulator.hold_answers();
        let leader = self.under_way(self.token("{}")).await;
        let joined = [self.token("{}").begin().await, self.token("{}").begin().await];
        self.caught_up().await;
        hold.release();
        for sent in joined.into_iter().chain([leader]) {
            sent.reply().await.token();
        }
        for (fault, status) in [(Fault::status(404, "not_found"), 404), (Fault::status(500, "internal"), 500)] {
            self.emulator.inject(fault);
            assert_eq!(self.token(r#"{"scopes":["x"]}"#).send().await.status, status);
        }
        self.emulator.inject(Fault::once(FaultKind::Reset));
        assert_eq!(self.get("/v1/connect/connectors/scl_slack").await.status, 502);
        assert_eq!(self.get("/v1/connect/connectors/scl_slack").await.status, 200);
        // Refused before it reaches upstream.
        assert_eq!(self.token("[").send().await.status, 400);
    }
}

/// The samples of a text, which must conform to Prometheus' text format.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    assert!(text.ends_with('\n'), "the last line ends with a line feed");
    let mut samples = BTreeMap::new();
    let mut described = BTreeSet::new();
    let (mut helped, mut family, mut kind) = ("", "", "");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').expect(line);
            assert!(is_name(name) && !help.is_empty() && described.insert(name), "{line}");
            helped = name;
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            (family, kind) = typed.split_once(' ').expect(line);
            assert!(family == helped && matches!(kind, "counter" | "gauge"), "{line}");
            assert_eq!(kind == "counter", family.ends_with("_total"), "{line}");
        } else {
            let (series, value) = line.rsplit_once(' ').expect(line);
            let value: f64 = value.parse().expect(line);
            assert!(value.is_finite() && (kind == "gauge" || value >= 0.0), "{line}");
            let (name, labels) = series.split_at(series.find('{').unwrap_or(series.len()));
            assert_eq!(name, family, "a sample follows its own description: {line}");
            if !labels.is_empty() {
                let inner = labels.strip_prefix('{').and_then(|l| l.strip_suffix('}')).expect(line);
                for label in inner.split(',') {
                    let (name, value) = label.split_once('=').expect(line);
                    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).expect(line);
                    assert!(is_name(name) && !value.contains(['"', '\\']), "{line}");
                }
            }
            assert!(samples.insert(series.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    samples
}

#[tokio::test]
async fn health_and_readiness() {
    let stage = Scene::new().start().await;
    for (path, body) in [("/healthz", r#"{"status":"ok"}"#), ("/readyz", r#"{"status":"ready"}"#)] {
        let reply = stage.get(path).await;
        assert_eq!((reply.status, reply.text().as_str()), (200, body));
        assert_eq!(reply.header("content-type"), Some("application/json"));
    }
}

#[tokio::test]
async fn readiness_follows_the_credential_and_health_does_not() {
    let assert_unready = async |stage: &Stage, code: &str| {
        let reply = stage.get("/readyz").await;
        assert_eq!((reply.status, reply.code().as_str()), (503, code));
        assert!(reply.text().contains("vercel env pull"), "{}", reply.text());
        assert_eq!(stage.metrics().await["connect_sidecar_ready"], 0.0);
        assert_eq!(stage.get("/healthz").await.status, 200);
    };
    let mut stage = Scene::new().without_env_file().start().await;
    assert_unready(&stage, "oidc_token_missing").await;
    let token = stage.fresh_token(HOUR);
    stage.write_env(&token);
    stage.uses(&token).await;
    assert_eq!(stage.get("/readyz").await.status, 200);
    assert_eq!(stage.metrics().await["connect_sidecar_ready"], 1.0);
    stage.pass(HOUR);
    assert_unready(&stage, "oidc_token_expired").await;

    let stage = Scene::new().env_file("VERCEL_OIDC_TOKEN=not-a-token\n").start().await;
    assert_unready(&stage, "oidc_token_invalid").await;
    assert!(stage.emulator.received().is_empty(), "no upstream request");
}

#[tokio::test]
async fn status_reports_all_counts() {
    let stage = Scene::new().start().await;
    let token = std::fs::read_to_string(stage.env_path()).expect("an env file");
    let token = token.split('"').rev().nth(1).expect("a quoted token");
    stage.make_requests().await;
    stage.pass(Duration::from_millis(12_900));

    let reply = stage.get("/_sidecar/v1/status").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    let mut status = reply.json();
    let order = |token: &Value| token["subject"].to_string();
    status["tokens"].as_array_mut().expect("a list").sort_by_key(order);
    let settings = status.as_object_mut().expect("an object").remove("settings").expect("settings");
    assert_eq!((&settings["upstream"], &settings["auth"]), (&stage.emulator.url().into(), &"oidc".into()));
    let (stored_at, expires_at) = ("2030-03-17T17:46:40Z", "2030-03-17T18:46:40Z");
    assert_eq!(
        status,
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "now": "2030-03-17T17:46:52Z",
            "uptime_seconds": 12,
            "project": "web",
            "oidc": {
                "state": "valid", "source": ".env.local", "configured_source": ".env.local",
                "expires_at": "2030-03-18T05:46:40Z", "expires_in_seconds": 12 * 3600 - 13,
                "lifetime_seconds": 12 * 3600,
                "owner": "acme", "project": "web", "environment": "development",
                "fingerprint": fingerprint(token),
            },
            "refresh": {"mode": "off", "state": "idle", "last_error": null, "next_at": null},
            "cache": {"entries": 3, "hits": 3, "misses": 6, "collapsed": 2, "requests_saved": 5},
            "upstream": {"url": stage.emulator.url(), "requests": 8, "errors": 2,
                         "last_error_at": stored_at},
            "failures": {"count": 4, "last_at": stored_at},
            // An upstream on this machine is not billed.
            "usage": {"month": "2030-03", "requests": 0, "saved": 0, "saved_usd": 0.0, "allowance": 500},
            "tokens": [
                {"connector": SLACK_UID, "subject": "app", "stored_at": stored_at, "expires_at": expires_at, "hits": 2},
                {"connector": SLACK_UID, "subject": "default", "stored_at": stored_at, "expires_at": expires_at, "hits": 0},
                {"connector": SLACK_UID, "subject": "user", "stored_at": stored_at, "expires_at": expires_at, "hits": 0},
            ],
            "warnings": [],
        })
    );
    assert_eq!(stage.emulator.received().len(), 8);
}

#[tokio::test]
async fn status_of_a_fresh_start_has_the_same_shape() {
    let stage = Scene::new().without_env_file().start().await;
    let status = stage.status().await;
    assert_eq!(
        status["oidc"],
        json!({
            "state": "missing", "source": ".env.local", "configured_source": ".env.local",
            "expires_at": null, "expires_in_seconds": null, "lifetime_seconds": null,
            "owner": null, "project": null, "environment": null, "fingerprint": null,
        })
    );
    assert_eq!(status["cache"], json!({"entries": 0, "hits": 0, "misses": 0, "collapsed": 0, "requests_saved": 0}));
    assert_eq!(
        status["upstream"],
        json!({"url": stage.emulator.url(), "requests": 0, "errors": 0, "last_error_at": null})
    );
    assert_eq!(status["failures"], json!({"count": 0, "last_at": null}));
    assert_eq!((&status["tokens"], &status["uptime_seconds"]), (&json!([]), &json!(0)));
}

#[tokio::test]
async fn a_token_requested_by_id_is_listed_by_uid_until_it_expires() {
    let stage = Scene::new().start().await;
    stage.request("POST", "/v1/connect/token/scl_github").json(APP).send().await.token();
    let status = stage.status().await;
    assert_eq!(status["tokens"][0]["connector"], "github/acme-github");
    stage.pass(HOUR - Duration::from_secs(30));
    let status = stage.status().await;
    assert_eq!((&status["tokens"], &status["cache"]["entries"]), (&json!([]), &json!(0)));
    assert_eq!(stage.metrics().await["connect_sidecar_cache_entries"], 0.0);
}

#[tokio::test]
async fn credential_states() {
    let second = Duration::from_secs(1);
    let life = |life| Scene::new().token_life(life);
    let early = || life(3 * HOUR).toml("warn_before = [\"5m\", \"2h\"]");
    for (what, scene, later, state, left) in [
        ("fresh", Scene::new(), Duration::ZERO, "valid", Some(12 * 3600)),
        ("before the first step", life(2 * HOUR), HOUR - second, "valid", Some(3601)),
        ("at the first step", life(2 * HOUR), HOUR, "expiring", Some(3600)),
        ("before a configured step", early(), HOUR - second, "valid", Some(7201)),
        ("at a configured step", early(), HOUR, "expiring", Some(7200)),
        ("at the last second", life(HOUR), HOUR - second, "expiring", Some(1)),
        ("at its end", life(HOUR), HOUR, "expired", Some(0)),
        ("long after", life(HOUR), 9 * HOUR, "expired", Some(0)),
        ("no file", Scene::new().without_env_file(), Duration::ZERO, "missing", None),
        ("no token in it", Scene::new().env_file("A=1\n"), Duration::ZERO, "missing", None),
        ("nonsense", Scene::new().env_file("VERCEL_OIDC_TOKEN=CANARY\n"), Duration::ZERO, "invalid", None),
    ] {
        let stage = scene.start().await;
        stage.pass(later);
        let status = stage.status().await;
        let oidc = &status["oidc"];
        assert_eq!((&oidc["state"], &oidc["expires_in_seconds"]), (&json!(state), &json!(left)), "{what}");
        assert_eq!(oidc["expires_at"].is_string(), left.is_some(), "{what}");
        assert_eq!(oidc.get("reason").is_some_and(Value::is_string), state == "invalid", "{what}: {oidc}");
        let warned: Vec<_> = status["warnings"].as_array().expect("a list").iter().map(|w| w["code"].clone()).collect();
        let expected: &[_] = if state == "valid" { &[] } else { &[json!(format!("oidc_token_{state}"))] };
        assert_eq!(warned, expected, "{what}");
        assert!(!status.to_string().contains("CANARY"), "{what}: {status}");
    }
}

#[tokio::test]
async fn metrics_are_prometheus_text_and_agree_with_status() {
    let mut stage = Scene::new().start().await;
    stage.make_requests().await;
    stage.pass(Duration::from_millis(12_500));
    let fresh = stage.fresh_token(13 * HOUR);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    stage.caught_up().await;

    let reply = stage.get("/metrics").await;
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let metrics = samples(&reply.text());
    let status = stage.status().await;
    let is = |name: &str, expected: &Value| {
        assert_eq!(metrics[&format!("connect_sidecar_{name}")], expected.as_f64().expect("a number"), "{name}");
    };
    is(&format!("build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), &json!(1));
    is("uptime_seconds", &json!(12.5));
    is("token_requests_total{result=\"hit\"}", &status["cache"]["hits"]);
    is("token_requests_total{result=\"miss\"}", &status["cache"]["misses"]);
    is("token_requests_total{result=\"collapsed\"}", &status["cache"]["collapsed"]);
    is("requests_saved_total", &status["cache"]["requests_saved"]);
    is("cache_entries", &status["cache"]["entries"]);
    is("upstream_requests_total", &status["upstream"]["requests"]);
    is("upstream_errors_total", &status["upstream"]["errors"]);
    // The reset and the invalid body.
    is("refused_total", &json!(2));
    // The connection of this request.
    is("connections", &json!(1));
    is("unknown_peers_total", &json!(0));
    is("oidc_rotations_total", &json!(1));
    is("ready", &json!(1));
    is("oidc_expires_at_seconds", &json!(1_900_000_012 + 13 * 3600));
    is("clock_offset_seconds", &json!(0));
    // No warning step was reached, and no event stream is open.
    for step in ["60m", "15m", "5m", "expired"] {
        is(&format!("warnings_total{{step=\"{step}\"}}"), &json!(0));
    }
    is("event_listeners", &json!(0));
    assert_eq!(metrics.len(), 22, "{metrics:?}");
}

#[tokio::test]
async fn metrics_without_a_token_have_no_expiry() {
    let stage = Scene::new().without_env_file().start().await;
    let metrics = stage.metrics().await;
    assert!(!metrics.keys().any(|series| series.contains("expires")), "{metrics:?}");
    assert_eq!(metrics["connect_sidecar_ready"], 0.0);
}

#[tokio::test]
async fn responses_contain_no_secrets() {
    let mut stage = Scene::new().start().await;
    stage.make_requests().await;
    for body in [
        r#"{"subject":{"type":"token","token":"CANARY"}}"#,
        r#"{"subject":{"type":"jwt-bearer","sub":"CANARY","additionalClaims":{"CANARY":1}},"installationId":"*"}"#,
        r#"{"subject":{"type":"CANARY"}}"#,
        r#"{"scopes":["CANARY"],"CANARY":"CANARY"}"#,
        r#"{"CANARY"#,
    ] {
        let request = stage.token(body).header("authorization", "Bearer CANARY").header("cookie", "CANARY");
        request.header("sidecar-client", "CANARY").header("traceparent", "CANARY").send().await;
    }
    let echo = |status| Fault::answer(status, "application/json", r#"{"error":{"code":"x","message":"CANARY"}}"#);
    for status in [200, 400, 500] {
        stage.emulator.inject(echo(status));
        stage.token(r#"{"scopes":["y"]}"#).send().await;
    }
    let token = stage.slack_token().await;
    let first = stage.emulator.received()[0].headers["authorization"].to_str().expect("text").to_owned();
    let fresh = stage.fresh_token(13 * HOUR);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    let key = stage.key();

    let mut secrets = vec!["CANARY", "Bearer", &token, &key];
    secrets.extend([first.trim_start_matches("Bearer "), &fresh].iter().flat_map(|oidc| oidc.split('.').skip(1)));
    for path in PAGES {
        let shown = format!("{:?}{}", stage.get(path).await.headers, stage.get(path).await.text());
        for secret in &secrets {
            assert!(!shown.contains(secret), "{secret} in {path}: {shown}");
        }
    }
}

#[tokio::test]
async fn only_get_and_head_without_a_query_are_accepted() {
    let stage = Scene::new().start().await;
    for path in PAGES {
        let got = stage.get(path).await;
        let head = stage.request("HEAD", path).send().await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
        for name in ["content-type", "content-length", "cache-control", "x-content-type-options"] {
            assert_eq!(head.header(name), got.header(name), "{path} {name}");
            assert!(got.header(name).is_some(), "{path} {name}");
        }
        assert_eq!(got.header("cache-control"), Some("no-store"));
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let reply = stage.request(method, path).json("{}").send().await;
            assert_eq!((reply.status, reply.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
            assert_eq!(reply.header("allow"), Some("GET, HEAD"));
        }
        for query in ["?", "?a=b", "?connector=scl_slack"] {
            let reply = stage.get(&format!("{path}{query}")).await;
            assert_eq!((reply.status, reply.code().as_str()), (400, "query_not_allowed"), "{path}{query}");
        }
        for other in [format!("{path}/"), format!("{path}x"), path.to_uppercase()] {
            let reply = stage.get(&other).await;
            assert_eq!((reply.status, reply.code().as_str()), (404, "route_not_found"), "{other}");
        }
    }
    assert!(stage.emulator.received().is_empty());
}

#[tokio::test]
async fn a_required_key_is_needed_except_for_health_and_readiness() {
    let stage = Scene::new().toml("require_key = true").start().await;
    for (path, open) in PAGES.into_iter().zip([true, true, false, false]) {
        let reply = stage.get(path).await;
        assert_eq!(reply.status, if open { 200 } else { 401 }, "{path}");
        let reply = stage.request("GET", path).header("sidecar-key", &stage.key()).send().await;
        assert_eq!(reply.status, 200, "{path}");
    }
}
