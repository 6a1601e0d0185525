//! Proxies from the environment, for upstream and for the tunnels of runs: every scheme works, no password is sent in
//! the clear over an `https` proxy, and unsupported settings are refused before anything is sent.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use rcgen::{Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::support::process::{Ended, run};
use crate::support::proxy::{Asked, Speaks, StandIn};
use crate::support::tls::{acceptor, authority, listen, server};
use crate::support::tunnel::{Run, ask};
use crate::support::workspace::Workspace;
use crate::support::{SLACK, Scene, soon};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The password in a URL, and decoded.
const CREDENTIALS: (&str, &str, &str) = ("m%40il:can%3Ary%20of%2Fa-proxy", "m@il", "can:ry of/a-proxy");

fn speaks(scheme: &str, issuer: &Issuer<'static, KeyPair>) -> Speaks {
    match scheme {
        "https" => Speaks::Https(acceptor("127.0.0.1", issuer, |_| {})),
        "socks5" | "socks5h" => Speaks::Socks5,
        _ => Speaks::Http,
    }
}

/// A scene in which every name resolves to an unused address and this authority is trusted.
fn trusting(pem: &str) -> (Scene, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let path: PathBuf = dir.path().join("ca.pem");
    std::fs::write(&path, pem).expect("written");
    let scene = Scene::new().env("CONNECT_SIDECAR_UPSTREAM_CA", &path.display().to_string());
    (scene.resolving(|_| vec![SocketAddr::from(([192, 0, 2, 7], 0))]), dir)
}

/// The target that a proxy receives: a name, or an address resolved by the sidecar.
fn target(scheme: &str, name: &str, port: u16) -> String {
    format!("{}:{port}", if scheme == "socks5" { "192.0.2.7" } else { name })
}

fn credentials() -> Option<(String, String)> {
    Some((CREDENTIALS.1.into(), CREDENTIALS.2.into()))
}

#[tokio::test]
async fn reaches_upstream_through_a_proxy_of_any_scheme() {
    let (pem, issuer) = authority("Trusted");
    let (upstream, decrypted) = server(HERE, "connect.test", &issuer, |_| {}).await;
    for (scheme, variable) in [
        ("http", "HTTPS_PROXY"),
        ("http", "all_proxy"),
        ("HTTP", "https_proxy"),
        ("https", "https_proxy"),
        ("https", "ALL_PROXY"),
        ("socks5", "ALL_PROXY"),
        ("SOCKS5H", "HTTPS_PROXY"),
        ("socks5h", "all_proxy"),
    ] {
        let what = format!("{scheme} in {variable}");
        let spoken = scheme.to_lowercase();
        let proxy = StandIn::start(speaks(&spoken, &issuer), Some(upstream)).await;
        let (scene, _dir) = trusting(&pem);
        let stage = scene
            .upstream(&format!("https://connect.test:{}", upstream.port()))
            .env("CONNECT_SIDECAR_USE_ENV_PROXY", "true")
            .env(variable, &format!("{scheme}://{}@{}", CREDENTIALS.0, proxy.addr))
            .start()
            .await;
        assert_eq!(stage.token("{}").send().await.token(), "good", "{what}");
        let expected = Asked { target: target(&spoken, "connect.test", upstream.port()), credentials: credentials() };
        assert!(!proxy.asked().is_empty() && proxy.asked().iter().all(|asked| *asked == expected), "{what}");
        let in_the_clear =
            proxy.was_sent("CONNECT") || proxy.was_sent("Proxy-Authorization") || proxy.was_sent("Basic ");
        assert_eq!(in_the_clear, spoken == "http", "{what}");
        assert_eq!(proxy.was_sent(CREDENTIALS.2), spoken.starts_with("socks"), "{what}");
        assert!(!proxy.was_sent("Bearer") && !proxy.was_sent("POST"), "{what}: within it there is TLS to upstream");
        assert!(!stage.logs.lines().concat().contains("can:ry"), "{what}");
    }
    assert!(!String::from_utf8_lossy(&decrypted.borrow()).to_lowercase().contains("proxy-auth"));
}

#[tokio::test]
async fn a_failing_proxy_is_named_without_its_password_and_not_bypassed() {
    let (pem, issuer) = authority("Trusted");
    let (upstream, decrypted) = server(HERE, "connect.test", &issuer, |_| {}).await;
    let closed = std::net::TcpListener::bind((HERE, 0)).expect("a port").local_addr().expect("an address");
    for (scheme, is_there, code, said) in [
        ("http", true, "upstream_unreachable", "unsuccessful"),
        ("https", true, "upstream_unreachable", "unsuccessful"),
        ("socks5", true, "upstream_unreachable", "not allowed"),
        ("socks5h", true, "upstream_unreachable", "not allowed"),
        ("http", false, "upstream_unreachable", "refused"),
        ("socks5h", false, "upstream_unreachable", "refused"),
    ] {
        let proxy = StandIn::start(speaks(scheme, &issuer), None).await;
        let addr = if is_there { proxy.addr } else { closed };
        let (scene, _dir) = trusting(&pem);
        let stage = scene
            .upstream(&format!("https://connect.test:{}", upstream.port()))
            .env("CONNECT_SIDECAR_USE_ENV_PROXY", "true")
            .env("HTTPS_PROXY", &format!("{scheme}://{}@{addr}", CREDENTIALS.0))
            .start()
            .await;
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (502, code), "{scheme}: {}", reply.text());
        let error = &reply.json()["error"];
        let message = error["message"].as_str().expect("a message");
        let names = format!("through the proxy {scheme}://{addr}: ");
        assert!(message.contains(&names) && message.contains(said), "{message}");
        assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("HTTPS_PROXY")), "{error}");
        assert!(!reply.text().contains("ry%20") && !reply.text().contains("can:ry"), "{}", reply.text());
    }
    assert!(decrypted.borrow().is_empty());
}

#[tokio::test]
async fn sends_nothing_to_a_proxy_with_an_untrusted_certificate() {
    let (pem, _) = authority("Trusted");
    let (_, stranger) = authority("Stranger");
    let proxy = StandIn::start(speaks("https", &stranger), None).await;
    let (scene, _dir) = trusting(&pem);
    let stage = scene
        .upstream("https://connect.test")
        .env("CONNECT_SIDECAR_USE_ENV_PROXY", "true")
        .env("ALL_PROXY", &format!("https://{}@{}", CREDENTIALS.0, proxy.addr))
        .start()
        .await;
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "upstream_tls"), "{}", reply.text());
    let error = &reply.json()["error"];
    assert!(error["message"].as_str().is_some_and(|said| said.contains("the proxy https://127.0.0.1:")), "{error}");
    assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("--upstream-ca")), "{error}");
    assert!(proxy.was_called() && !proxy.was_sent("CONNECT") && proxy.asked().is_empty());
}

#[tokio::test]
async fn a_locally_resolved_name_of_this_machine_is_refused_with_a_proxy_too() {
    let proxy = StandIn::start(Speaks::Socks5, None).await;
    let stage = Scene::new()
        .default_upstream()
        .resolving(|_| vec![SocketAddr::from(([127, 8, 8, 8], 0))])
        .env("CONNECT_SIDECAR_USE_ENV_PROXY", "true")
        .env("ALL_PROXY", &format!("socks5://{}", proxy.addr))
        .start()
        .await;
    let reply = stage.token("{}").send().await;
    assert_eq!((reply.status, reply.code().as_str()), (508, "loop_detected"), "{}", reply.text());
    assert!(proxy.asked().is_empty());
}

#[tokio::test]
async fn uses_no_proxy_unless_enabled_and_respects_no_proxy() {
    let (pem, issuer) = authority("Trusted");
    let (upstream, _) = server(HERE, "connect.test", &issuer, |_| {}).await;
    let port = upstream.port();
    for (use_env_proxy, no_proxy, is_asked) in [
        ("true", String::new(), true),
        ("false", String::new(), false),
        ("true", "*".into(), false),
        ("true", ".TEST".into(), false),
        ("true", format!("a.example,connect.test:{port}"), false),
        ("true", "connect.test:443".into(), true),
    ] {
        let proxy = StandIn::start(Speaks::Http, Some(upstream)).await;
        let (scene, _dir) = trusting(&pem);
        let stage = scene
            .upstream(&format!("https://connect.test:{port}"))
            .resolving(move |_| vec![SocketAddr::from((HERE, port))])
            .env("CONNECT_SIDECAR_USE_ENV_PROXY", use_env_proxy)
            .env("HTTPS_PROXY", &format!("http://{}", proxy.addr))
            .env("NO_PROXY", &no_proxy)
            .start()
            .await;
        assert_eq!(stage.token("{}").send().await.token(), "good", "{no_proxy}");
        assert_eq!(!proxy.asked().is_empty(), is_asked, "{use_env_proxy} {no_proxy}");
    }
}

/// A server that echoes.
async fn echo() -> SocketAddr {
    listen(HERE, |mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await
}

async fn assert_echoes(run: &Run, target: &str) {
    let mut tunnel = run.tunnel(target).await;
    tunnel.write_all(b"hello").await.expect("taken");
    let mut echoed = [0; 5];
    soon("the echo", tunnel.read_exact(&mut echoed)).await.expect("five bytes");
    assert_eq!(&echoed, b"hello", "{target}");
}

#[tokio::test]
async fn tunnels_use_the_proxy_of_the_run_or_else_of_the_sidecar() {
    let (pem, issuer) = authority("Trusted");
    let there = echo().await;
    for (scheme, is_of_the_run) in
        [("http", true), ("http", false), ("https", true), ("https", false), ("socks5", true), ("socks5h", false)]
    {
        let proxy = StandIn::start(speaks(scheme, &issuer), Some(there)).await;
        let url = format!("{scheme}://{}@{}", CREDENTIALS.0, proxy.addr);
        let (scene, _dir) = trusting(&pem);
        let run = match is_of_the_run {
            true => {
                let stage = scene.env("ALL_PROXY", "http://127.0.0.1:1").start().await;
                let run = Run::behind(&stage, Some(&url), "").await;
                assert_echoes(&run, "github.com:443").await;
                run
            }
            false => {
                let stage = scene.env("ALL_PROXY", &url).start().await;
                let run = Run::of(&stage).await;
                assert_echoes(&run, "github.com:443").await;
                run
            }
        };
        let expected = Asked { target: target(scheme, "github.com", 443), credentials: credentials() };
        assert_eq!(proxy.asked(), [expected], "{scheme}, of the run: {is_of_the_run}");
        let in_the_clear = proxy.was_sent("CONNECT") || proxy.was_sent("Basic ");
        assert_eq!(in_the_clear, scheme == "http", "{scheme}");
        drop(run);
    }
}

#[tokio::test]
async fn tunnels_respect_the_no_proxy_of_the_run() {
    let there = echo().await;
    let proxy = StandIn::start(Speaks::Http, None).await;
    let url = format!("http://{}", proxy.addr);
    let stage = Scene::new().resolving(move |_| vec![there]).env("NO_PROXY", "sidecars.test").start().await;
    let port = there.port();
    for (no_proxy, host, is_direct) in [
        ("", "direct.test", false),
        (".test", "direct.test", true),
        ("*", "direct.test", true),
        ("direct.test.", "direct.test", true),
        ("vercel.com, direct.test", "direct.test", true),
        ("other.test", "direct.test", false),
        // The run's own list replaces the sidecar's.
        ("", "sidecars.test", false),
    ] {
        let run = Run::behind(&stage, Some(&url), no_proxy).await;
        let before = proxy.asked().len();
        let target = format!("{host}:{port}");
        match is_direct {
            true => assert_echoes(&run, &target).await,
            false => run.connect(&target).send().await.assert_refused(502, "upstream_unreachable", no_proxy),
        }
        assert_eq!(proxy.asked().len() - before, usize::from(!is_direct), "{no_proxy} {host}");
    }
    let run = Run::behind(&stage, Some(&url), "10.0.0.0/8").await;
    run.connect("192.0.2.1:443").send().await.assert_refused(502, "upstream_unreachable", "another network");
    assert_eq!(proxy.targets().last().map(String::as_str), Some("192.0.2.1:443"));
    let direct = Run::behind(&stage, None, "").await;
    assert_echoes(&direct, &format!("direct.test:{port}")).await;
}

#[tokio::test]
async fn refuses_a_run_with_an_unsupported_proxy() {
    let stage = Scene::new().start().await;
    let asking = ask(stage.addr, &stage.key());
    for (https_proxy, said) in [("socks4://u:canary@h", "scheme socks4 "), ("not a url canary", "expected the URL")] {
        let body = serde_json::json!({"environment": {"https_proxy": https_proxy}}).to_string();
        let reply = asking.clone().json(&body).send().await;
        reply.assert_refused(400, "bad_json", https_proxy);
        assert!(reply.text().contains(said) && !reply.text().contains("canary"), "{}", reply.text());
    }
    let unknown = asking.json(r#"{"environment":{"http_proxy":"x"}}"#).send().await;
    unknown.assert_refused(400, "bad_json", "an unknown variable");
}

async fn starts(workspace: &Workspace, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command = workspace.sidecar(arguments);
    command.env("CONNECT_SIDECAR_UPSTREAM", "https://connect.invalid").envs(environment.iter().copied());
    command.process_group(0);
    run(command).await
}

#[tokio::test]
async fn reports_all_unsupported_proxy_settings_at_the_start() {
    const USE: &str = "--use-env-proxy";
    let workspace = Workspace::new().await;
    let plain_run: &[&str] = &["run", "--", "true"];
    for (arguments, environment, said) in [
        (&[USE][..], &[("HTTPS_PROXY", "socks4://u:canary@h:1")][..], &["HTTPS_PROXY: ", "scheme socks4 "][..]),
        (&[USE], &[("https_proxy", "socks4a://h")], &["https_proxy: ", "scheme socks4a "]),
        (&[USE], &[("ALL_PROXY", "ftp://h")], &["ALL_PROXY: ", "scheme ftp "]),
        (&[USE], &[("all_proxy", "not a url")], &["all_proxy: expected the URL of a proxy"]),
        (
            &[USE, "--wait=x", "--log-level=x"],
            &[("HTTPS_PROXY", "ftp://h"), ("ALL_PROXY", "not a url")],
            &["HTTPS_PROXY: ", "ALL_PROXY: ", "--wait: ", "--log-level: "],
        ),
        (plain_run, &[("ALL_PROXY", "socks4://u:canary@h")], &["ALL_PROXY: ", "scheme socks4 ", "--no-intercept"]),
        (&["run", USE, "--", "true"], &[("ALL_PROXY", "socks4://h")], &["ALL_PROXY: "]),
        (&["env"], &[("https_proxy", "not a url")], &["https_proxy: expected"]),
    ] {
        let ended = starts(&workspace, arguments, environment).await;
        assert_eq!(ended.code, Some(2), "{arguments:?} {environment:?}: {ended:?}");
        for said in said {
            assert_eq!(ended.stderr.matches(said).count(), 1, "{arguments:?} {said}: {}", ended.stderr);
        }
        assert!(!ended.stderr.contains("canary"), "{}", ended.stderr);
    }
    for (arguments, environment) in [
        (plain_run, &[("HTTPS_PROXY", "http://127.0.0.1:1"), ("ALL_PROXY", "socks4://h")][..]),
        (&["run", "--no-intercept", "--", "true"], &[("ALL_PROXY", "socks4://h")]),
    ] {
        let ended = starts(&workspace, arguments, environment).await;
        assert_eq!(ended.code, Some(0), "what is not used may be what it likes: {ended:?}");
    }
}

/// `run -- curl URL` for a token.
fn curl(workspace: &Workspace, environment: &[(&str, &str)]) -> Command {
    let mut command = workspace.sidecar(&["run", "--", "curl", "--silent", "--show-error", "--max-time", "20"]);
    command.args(["-H", "content-type: application/json", "-d", r#"{"subject":{"type":"app"}}"#]);
    command.arg(format!("https://api.vercel.com{SLACK}")).envs(environment.iter().copied());
    command.process_group(0);
    command
}

#[tokio::test]
async fn no_proxy_does_not_bypass_the_sidecar_and_the_run_warns() {
    let workspace = Workspace::new().await;
    let proxy = StandIn::start(Speaks::Http, None).await;
    let url = format!("http://{}", proxy.addr);
    for (variable, list, taken_out) in [
        ("NO_PROXY", ".vercel.com", Some(".vercel.com")),
        ("no_proxy", "corp.test, *", Some("*")),
        ("NO_PROXY", "api.vercel.com:443", Some("api.vercel.com:443")),
        ("NO_PROXY", "corp.test,10.0.0.0/8", None),
    ] {
        let ended = run(curl(&workspace, &[(variable, list), ("ALL_PROXY", &url)])).await;
        assert_eq!(ended.code, Some(0), "{list}: {ended:?}");
        assert!(ended.stdout.contains("\"token\""), "{list}: {ended:?}");
        let lines: Vec<_> = ended.stderr.lines().filter(|line| line.contains("NO_PROXY")).collect();
        assert_eq!(lines.len(), usize::from(taken_out.is_some()), "{list}: {}", ended.stderr);
        if let Some(taken_out) = taken_out {
            assert!(lines[0].contains(&format!(": {taken_out} is taken out")), "{}", lines[0]);
        }
    }
    assert!(proxy.asked().is_empty(), "intercepted requests go to the sidecar");
}

#[tokio::test]
async fn a_joining_command_and_a_nested_run_use_their_own_proxy() {
    let workspace = Workspace::new().await;
    let _serving = workspace.serve(&[]).await;
    let proxy = StandIn::start(Speaks::Socks5, None).await;
    let url = format!("socks5h://{}@{}", CREDENTIALS.0, proxy.addr);
    let ask =
        "curl --silent --max-time 20 https://elsewhere.test/; curl --silent --max-time 20 https://exempt.test/; true";
    let program = env!("CARGO_BIN_EXE_connect-sidecar");
    for nested in [false, true] {
        let before = proxy.asked().len();
        let mut command = workspace.sidecar(&["run", "--", "sh", "-c"]);
        match nested {
            false => command.arg(ask),
            true => command.args(["exec \"$0\" run -- sh -c \"$1\"", program, ask]),
        };
        command.env("ALL_PROXY", &url).env("NO_PROXY", "exempt.test").process_group(0);
        let ended = run(command).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let expected = Asked { target: "elsewhere.test:443".into(), credentials: credentials() };
        assert_eq!(proxy.asked()[before..], [expected], "nested: {nested}");
        assert!(!ended.stderr.contains("can:ry") && !ended.stderr.contains("can%3Ary"), "{ended:?}");
    }
}
