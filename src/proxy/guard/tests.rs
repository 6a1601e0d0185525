use super::*;
use http::Request;

const LOOPBACK: ListenerKind = ListenerKind::Loopback(2774);

/// A valid request with `extra` headers, which may replace `Host`.
fn request(extra: &[(&str, &str)]) -> Parts {
    let mut builder = Request::post("/v1/connect/token/x");
    if !extra.iter().any(|(name, _)| *name == "host") {
        builder = builder.header("host", "127.0.0.1:2774");
    }
    for (name, value) in extra {
        builder = builder.header(*name, HeaderValue::from_bytes(value.as_bytes()).expect("a value"));
    }
    builder.body(()).expect("a request").into_parts().0
}

fn check_code(parts: &Parts, policy: &Policy) -> &'static str {
    check(parts, LOOPBACK, policy).err().map_or("ok", |e| e.code.as_str())
}

fn default_code(extra: &[(&str, &str)]) -> &'static str {
    check_code(&request(extra), &Policy::default())
}

#[test]
fn accepts_only_loopback_names_with_the_listening_port() {
    for host in ["127.0.0.1:2774", "localhost:2774", "LocalHost:2774", "[::1]:2774"] {
        assert_eq!(default_code(&[("host", host)]), "ok", "{host}");
    }
    for host in [
        "localhost",
        "127.0.0.1",
        "127.0.0.1:2775",
        "0.0.0.0:2774",
        "[::]:2774",
        "127.0.0.2:2774",
        "a.localhost:2774",
        "localhost6:2774",
        "x.local:2774",
        "host.docker.internal:2774",
        "127.0.0.1.nip.io:2774",
        "localhost.evil.com:2774",
        "evil.example:2774",
        "[::ffff:127.0.0.1]:2774",
        "2130706433:2774",
        "0x7f000001:2774",
        "127.1:2774",
    ] {
        assert_eq!(default_code(&[("host", host)]), "host_not_allowed", "{host}");
    }
    for host in [
        "",
        "localhost.:2774",
        "user@localhost:2774",
        "local host:2774",
        "localhost:2774,x",
        "localhost:",
        "localhost:+2774",
        "localhost:99999",
        "localhost:02774",
        "[::1",
        "[]x:2774",
        "[::1]x",
        ":2774",
        "%6c:2774",
        "löcalhost:2774",
    ] {
        assert_eq!(default_code(&[("host", host)]), "bad_host", "{host}");
    }
    assert_eq!(default_code(&[("host", "127.0.0.1:2774"), ("host", "127.0.0.1:2774")]), "bad_host");
    let mut parts = request(&[]);
    parts.headers.remove("host");
    assert_eq!(check_code(&parts, &Policy::default()), "bad_host");
}

#[test]
fn the_port_is_optional_only_for_80() {
    let at_80 = |host| check(&request(&[("host", host)]), ListenerKind::Loopback(80), &Policy::default());
    assert!(at_80("localhost").is_ok() && at_80("localhost:80").is_ok());
}

#[test]
fn allowed_hosts_match_exactly() {
    let host = |name: &str, port| AllowedHost { name: name.into(), port };
    let policy =
        Policy { allowed_hosts: vec![host("dev.test", Some(2774)), host("any.test", None)], ..Policy::default() };
    for (host, expected) in [
        ("dev.test:2774", "ok"),
        ("DEV.test:2774", "ok"),
        ("dev.test", "host_not_allowed"),
        ("x.dev.test:2774", "host_not_allowed"),
        ("any.test", "ok"),
        ("any.test:1", "ok"),
    ] {
        assert_eq!(check_code(&request(&[("host", host)]), &policy), expected, "{host}");
    }
}

#[test]
fn each_listener_has_its_own_hosts() {
    let names = ["dev.test", "localhost", "127.0.0.1"];
    let allowed_hosts = names.map(|name| AllowedHost { name: name.into(), port: None }).into();
    let policy = Policy { allowed_hosts, ..Policy::default() };
    for (host, loopback, network, unix_socket) in [
        ("127.0.0.1:2774", true, false, false),
        ("[::1]:2774", true, false, false),
        ("localhost:2774", true, false, true),
        ("LOCALHOST", true, false, true),
        ("localhost:1", true, false, true),
        ("dev.test", true, true, false),
        ("Dev.Test:2774", true, true, false),
        ("192.0.2.2:2774", false, false, false),
        ("0.0.0.0:2774", false, false, false),
    ] {
        for (listener, is_good) in
            [(LOOPBACK, loopback), (ListenerKind::Network(2774), network), (ListenerKind::UnixSocket, unix_socket)]
        {
            let refusal = check(&request(&[("host", host)]), listener, &policy).err();
            let expected = if is_good { None } else { Some("host_not_allowed") };
            assert_eq!(refusal.map(|e| e.code.as_str()), expected, "{host} on {listener:?}");
        }
    }
    for listener in [ListenerKind::Network(2774), ListenerKind::UnixSocket] {
        for host in ["", "localhost:", "localhost.", "dev.test:x"] {
            let refusal = check(&request(&[("host", host)]), listener, &policy).expect_err("a bad host");
            assert_eq!(refusal.code, Code::BadHost, "{host} on {listener:?}");
        }
    }
}

#[test]
fn refuses_web_pages_of_any_origin() {
    for origin in ["https://evil.example", "null", "", "http://127.0.0.1:2774"] {
        assert_eq!(default_code(&[("origin", origin)]), "browser_request_refused", "{origin}");
    }
    for site in ["cross-site", "same-site", "same-origin", "none"] {
        assert_eq!(default_code(&[("sec-fetch-site", site)]), "browser_request_refused", "{site}");
    }
    for mode in ["navigate", "no-cors", "websocket", "same-origin"] {
        assert_eq!(default_code(&[("sec-fetch-mode", mode)]), "browser_request_refused", "{mode}");
    }
    let mut preflight = request(&[("access-control-request-method", "POST")]);
    preflight.method = Method::OPTIONS;
    assert_eq!(check_code(&preflight, &Policy::default()), "browser_request_refused");
}

#[test]
fn accepts_the_headers_of_nodes_fetch() {
    assert_eq!(default_code(&[("sec-fetch-mode", "cors"), ("accept-language", "*")]), "ok");
}

#[test]
fn allowed_origins_match_exactly() {
    let policy = Policy { allowed_origins: vec!["https://app.example".into()], ..Policy::default() };
    let accepted =
        check(&request(&[("origin", "https://app.example"), ("sec-fetch-site", "cross-site")]), LOOPBACK, &policy);
    assert_eq!(accepted.expect("allowed").origin, Some(HeaderValue::from_static("https://app.example")));
    for origin in ["https://app.example:8443", "http://app.example", "https://app.example.evil.com", "null"] {
        assert_eq!(check_code(&request(&[("origin", origin)]), &policy), "browser_request_refused", "{origin}");
    }
    let twice = request(&[("origin", "https://app.example"), ("origin", "https://app.example")]);
    assert_eq!(check_code(&twice, &policy), "browser_request_refused");
}

#[test]
fn an_allowed_origin_needs_the_key_for_the_sidecars_own_endpoints() {
    let key = Some(Key::new("secret".into()));
    let policy = Policy { allowed_origins: vec!["https://app.example".into()], key, ..Policy::default() };
    let ours = ["/_sidecar/", "/_sidecar/v1/status", "/_sidecar/v1/events", "/_sidecar/v1/cache", "/metrics"];
    let apps = ["/v1/connect/token/x", "/v1/connect/connectors/x", "/healthz", "/readyz"];
    for (path, without_key) in ours.map(|path| (path, "key_required")).into_iter().chain(apps.map(|path| (path, "ok")))
    {
        let ask = |method: Method, extra: &[(&str, &str)]| {
            let from = [("origin", "https://app.example"), ("sec-fetch-site", "cross-site")];
            let mut parts = request(&[&from[..], extra].concat());
            (parts.method, parts.uri) = (method, path.parse().expect("a path"));
            check_code(&parts, &policy)
        };
        assert_eq!(ask(Method::GET, &[]), without_key, "{path}");
        assert_eq!(ask(Method::OPTIONS, &[]), without_key, "{path}");
        assert_eq!(ask(Method::GET, &[("access-control-request-method", "GET")]), without_key, "{path}");
        assert_eq!(ask(Method::GET, &[("sidecar-key", "guessed")]), without_key, "{path}");
        assert_eq!(ask(Method::GET, &[("sidecar-key", "secret")]), "ok", "{path}");
        assert_eq!(ask(Method::OPTIONS, &[("access-control-request-method", "GET")]), "ok", "{path}");
    }
}

#[test]
fn refuses_forwarded_requests_unless_allowed_and_loops_always() {
    let policy = Policy { allow_forwarded: true, ..Policy::default() };
    for name in [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-port",
        "x-real-ip",
        "cf-connecting-ip",
        "tailscale-user-login",
        "via",
    ] {
        let parts = request(&[(name, "x")]);
        assert_eq!(check_code(&parts, &Policy::default()), "forwarded_request_refused", "{name}");
        assert_eq!(check_code(&parts, &policy), "ok", "{name}");
    }
    for (name, value) in [
        ("cdn-loop", "connect-sidecar"),
        ("via", "1.1 p, 1.1 Connect-Sidecar"),
        ("cdn-loop", "a;b,connect-sidecar;v=1"),
    ] {
        assert_eq!(check_code(&request(&[(name, value)]), &policy), "loop_detected", "{name}: {value}");
    }
}

#[test]
fn transfer_encoding_is_chunked_or_absent() {
    assert_eq!(default_code(&[("transfer-encoding", "chunked")]), "ok");
    assert_eq!(default_code(&[("transfer-encoding", "gzip, chunked")]), "bad_framing");
    assert_eq!(default_code(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]), "bad_framing");
    let mut old = request(&[("transfer-encoding", "chunked")]);
    old.version = Version::HTTP_10;
    assert_eq!(check_code(&old, &Policy::default()), "bad_framing");
    assert_eq!(default_code(&[("expect", "100-Continue")]), "ok");
    assert_eq!(default_code(&[("expect", "200-ok")]), "expectation_failed");
}

#[test]
fn requires_a_target_in_origin_form() {
    for (method, target, expected) in [
        (Method::POST, "http://127.0.0.1:2774/v1/connect/token/x", "bad_target"),
        (Method::POST, "//evil/x", "bad_target"),
        (Method::GET, "*", "bad_target"),
        (Method::CONNECT, "api.vercel.com:443", "method_not_allowed"),
        (Method::TRACE, "/v1/connect/token/x", "method_not_allowed"),
    ] {
        let mut parts = request(&[]);
        parts.method = method;
        parts.uri = target.parse().expect("a target");
        assert_eq!(check_code(&parts, &Policy::default()), expected, "{target}");
    }
}

#[test]
fn require_key_exempts_health_checks_and_the_page() {
    let policy = Policy { require_key: true, key: Some(Key::new("secret".into())), ..Policy::default() };
    assert_eq!(check_code(&request(&[]), &policy), "key_required");
    assert_eq!(check_code(&request(&[("sidecar-key", "secre")]), &policy), "key_required");
    assert_eq!(check_code(&request(&[("sidecar-key", "secret")]), &policy), "ok");
    for path in ["/healthz", "/readyz", "/_sidecar/"] {
        let mut parts = request(&[]);
        parts.uri = path.parse().expect("a path");
        assert_eq!(check_code(&parts, &policy), "ok", "{path}");
    }
    let allowed_hosts = vec![AllowedHost { name: "dev.test".into(), port: None }];
    let mut from_network = request(&[]);
    from_network.headers.insert("host", HeaderValue::from_static("dev.test"));
    from_network.uri = "/_sidecar/".parse().expect("a path");
    let from_network_result =
        check(&from_network, ListenerKind::Network(2774), &Policy { allowed_hosts, ..policy.clone() });
    assert_eq!(from_network_result.expect_err("refused").code, Code::KeyRequired);
    let typed = [("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    for (extra, expected) in [(&[][..], "key_required"), (&typed, "ok"), (&[("accept", "text/html,*/*;q=0.8")], "ok")] {
        let mut parts = request(extra);
        (parts.method, parts.uri) = (Method::GET, "/".parse().expect("a path"));
        assert_eq!(check_code(&parts, &policy), expected, "{extra:?}");
    }
    let no_key = Policy { require_key: true, ..Policy::default() };
    assert_eq!(check_code(&request(&[("sidecar-key", "")]), &no_key), "key_required", "a missing key must not match");
}

#[test]
fn only_the_status_page_may_send_requests_with_the_key() {
    let policy = Policy { key: Some(Key::new("secret".into())), ..Policy::default() };
    let (key, own) = (("sidecar-key", "secret"), ("sec-fetch-site", "same-origin"));
    for (path, extra, expected) in [
        ("/_sidecar/v1/status", &[own, key][..], "ok"),
        ("/_sidecar/v1/status", &[own], "key_required"),
        ("/_sidecar/v1/status", &[("sec-fetch-site", "cross-site"), key], "browser_request_refused"),
        ("/_sidecar/v1/status", &[own, own, key], "browser_request_refused"),
        ("/_sidecar/v1/cache", &[own, key, ("origin", "http://127.0.0.1:2774")], "ok"),
        ("/_sidecar/v1/cache", &[own, ("origin", "http://127.0.0.1:2774")], "key_required"),
        ("/_sidecar/v1/cache", &[key, ("origin", "http://127.0.0.1:2774")], "browser_request_refused"),
        ("/_sidecar/v1/cache", &[own, key, ("origin", "http://localhost:2774")], "browser_request_refused"),
        ("/_sidecar/v1/cache", &[own, key, ("origin", "https://127.0.0.1:2774")], "browser_request_refused"),
        ("/_sidecar/v1/cache", &[own, key, ("origin", "http://127.0.0.1:3000")], "browser_request_refused"),
        ("/_sidecar/v1/cache", &[own, key, ("origin", "null")], "browser_request_refused"),
        ("/v1/connect/token/x", &[own, key, ("origin", "http://127.0.0.1:2774")], "browser_request_refused"),
        ("/v1/connect/token/x", &[own, key], "browser_request_refused"),
    ] {
        let mut parts = request(extra);
        parts.uri = path.parse().expect("a path");
        assert_eq!(check_code(&parts, &policy), expected, "{path} {extra:?}");
    }
}

#[test]
fn the_page_opens_in_a_window_but_not_from_a_link() {
    let (navigate, document) = (("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"));
    let site = |site| ("sec-fetch-site", site);
    for (method, path, extra, expected) in [
        (Method::GET, "/_sidecar/", [site("none"), navigate, document], "ok"),
        (Method::GET, "/_sidecar/", [site("same-origin"), navigate, document], "ok"),
        (Method::GET, "/_sidecar/", [site("same-site"), navigate, document], "browser_request_refused"),
        (Method::GET, "/_sidecar/", [site("cross-site"), navigate, document], "browser_request_refused"),
        (Method::GET, "/_sidecar/", [site("none"), navigate, ("sec-fetch-dest", "iframe")], "browser_request_refused"),
        (Method::GET, "/_sidecar/", [site("none"), ("sec-fetch-mode", "no-cors"), document], "browser_request_refused"),
        (Method::POST, "/_sidecar/", [site("none"), navigate, document], "browser_request_refused"),
        (Method::GET, "/_sidecar/v1/status", [site("none"), navigate, document], "browser_request_refused"),
        (Method::GET, "/metrics", [site("none"), navigate, document], "browser_request_refused"),
        (Method::GET, "/", [site("none"), navigate, document], "ok"),
        (Method::GET, "/_sidecar", [site("same-origin"), navigate, document], "ok"),
        (Method::GET, "/", [site("same-site"), navigate, document], "browser_request_refused"),
        (Method::GET, "/", [site("cross-site"), navigate, document], "browser_request_refused"),
        (Method::GET, "/", [site("none"), navigate, ("sec-fetch-dest", "iframe")], "browser_request_refused"),
        (Method::GET, "/", [site("none"), ("sec-fetch-mode", "no-cors"), document], "browser_request_refused"),
        (Method::POST, "/", [site("none"), navigate, document], "browser_request_refused"),
    ] {
        let mut parts = request(&extra);
        (parts.method, parts.uri) = (method, path.parse().expect("a path"));
        assert_eq!(check_code(&parts, &Policy::default()), expected, "{} {path} {extra:?}", parts.method);
    }
}

#[test]
fn a_browser_window_elsewhere_gets_a_hint_to_the_page() {
    const FROM_ELSEWHERE: &str = "ask from a server or a script, or start the sidecar with --allowed-origin";
    let typed = [("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    for (path, extra, hint) in [
        ("/healthz", &typed[..], "connect-sidecar status --open"),
        ("/_sidecar/v1/", &typed, "connect-sidecar status --open"),
        ("/healthz", &[("sec-fetch-site", "cross-site"), typed[1], typed[2]], FROM_ELSEWHERE),
        ("/healthz", &typed[..1], FROM_ELSEWHERE),
    ] {
        let mut parts = request(extra);
        (parts.method, parts.uri) = (Method::GET, path.parse().expect("a path"));
        let refusal = check(&parts, LOOPBACK, &Policy::default()).expect_err("refused");
        assert_eq!((refusal.code, &*refusal.remedy.hint), (Code::BrowserRequestRefused, hint), "{path} {extra:?}");
    }
}

#[test]
fn recognises_preflights() {
    let ask = ("access-control-request-method", "POST");
    for (method, extra, expected) in [
        (Method::OPTIONS, &[ask][..], "browser_request_refused"),
        (Method::OPTIONS, &[], "ok"),
        (Method::POST, &[ask], "ok"),
    ] {
        let mut parts = request(extra);
        parts.method = method;
        assert_eq!(check_code(&parts, &Policy::default()), expected, "{} {extra:?}", parts.method);
    }
}

#[test]
fn detects_the_apps_own_credentials() {
    let has =
        |extra: &[(&str, &str)]| check(&request(extra), LOOPBACK, &Policy::default()).expect("good").has_credentials;
    for name in ["authorization", "cookie", "proxy-authorization"] {
        assert!(has(&[(name, "x")]), "{name}");
    }
    assert!(!has(&[("accept", "x")]));
}

#[test]
fn the_first_failing_check_decides() {
    let all_wrong = [("transfer-encoding", "gzip"), ("host", "evil:1"), ("origin", "null"), ("via", "x")];
    let expected = ["bad_framing", "host_not_allowed", "browser_request_refused", "forwarded_request_refused"];
    for (skip, expected) in expected.into_iter().enumerate() {
        assert_eq!(default_code(&all_wrong[skip..]), expected);
    }
}
