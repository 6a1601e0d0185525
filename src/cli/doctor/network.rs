//! The network path to Connect: tells apart faults of DNS, connection, TLS, proxy, captive portal, response and clock.
//!
//! The probe takes the path of a normal request, without a credential. A proxy's address is shown without its password.

use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use hyper_util::client::legacy::connect::dns::Name;

use super::finding::{Finding, Severity};
use crate::credential::warning;
use crate::os::clock::{Clock, format_duration};
use crate::os::env_proxy::{ProxyServer, Unusable};
use crate::os::shell_quoting;
use crate::proxy::error::{Code, RequestError};
use crate::proxy::reply::Answer;
use crate::proxy::upstream::{Options, Upstream};
use crate::remedy::Remedy;

/// What the findings depend on in this process's environment.
#[derive(Debug, Clone, Default)]
pub(super) struct ProxyEnvironment {
    /// `NODE_EXTRA_CA_CERTS`.
    pub(super) extra_certificates: Option<String>,
    /// Whether the environment was set by `run` or `env`. Its proxy is then the sidecar itself.
    pub(super) is_inside_run: bool,
}

/// The result of a probe of upstream.
pub(super) struct NetworkProbe {
    name: String,
    is_on_loopback: bool,
    uses_env_proxy: bool,
    /// The environment's proxy for it.
    proxy: Option<Arc<ProxyServer>>,
    /// The environment's proxies for `https` that cannot be used.
    unusable: Vec<Unusable>,
    answer: Result<Answer, RequestError>,
    /// Why the name could not be resolved, if so.
    resolve_error: Option<String>,
}

/// Probes upstream for at most `limit`. `clock` is corrected by the response.
pub(super) async fn probe(options: Options, clock: Clock, limit: Duration) -> NetworkProbe {
    let (name, uses_env_proxy, names) = (options.name(), options.use_env_proxy, options.names.clone());
    let is_on_loopback = options.is_on_loopback();
    let proxy = options.env_proxy.server_for(&options.origin).ok().flatten().cloned();
    let unusable = options.env_proxy.unusable(&Scheme::HTTPS).to_vec();
    let host = options.origin.host().and_then(|host| host.parse::<Name>().ok());
    let upstream = Upstream::new(options, clock);
    let resolve = async {
        let addresses = tokio::time::timeout(limit, names.addresses(host?)).await;
        match addresses {
            Err(_) => Some("no answer".into()),
            Ok(Err(e)) => Some(e.to_string()),
            Ok(Ok(addresses)) => addresses.is_empty().then(|| "it has none".into()),
        }
    };
    let probe = async {
        let too_slow = |_| RequestError::new(Code::UpstreamTimeout, format!("{name} did not answer in time."));
        tokio::time::timeout(limit, upstream.probe()).await.unwrap_or_else(|e| Err(too_slow(e)))
    };
    let (answer, resolve_error) = tokio::join!(probe, resolve);
    NetworkProbe { name, is_on_loopback, uses_env_proxy, proxy, unusable, answer, resolve_error }
}

/// Findings about the probe. `offset_ms`: upstream's clock minus this machine's.
pub(super) fn evaluate(probe: &NetworkProbe, environment: &ProxyEnvironment, offset_ms: i64) -> Vec<Finding> {
    let ProxyEnvironment { extra_certificates, is_inside_run } = environment;
    let name = &probe.name;
    let problem = |code, title: String, detail: &str| Finding::new(Severity::Problem, code, title, detail);
    let finding = match &probe.answer {
        _ if probe.uses_env_proxy && probe.proxy.is_some() && *is_inside_run => {
            let title = "the proxy of this shell is a sidecar, which cannot reach Connect through itself";
            problem("proxy_is_a_sidecar", title.into(), "HTTPS_PROXY was set by `connect-sidecar run` or `env`.")
                .remedy(
                    Remedy::advice("unset HTTPS_PROXY and https_proxy, or leave out --use-env-proxy")
                        .with_command("unset HTTPS_PROXY https_proxy"),
                )
        }
        Ok(answer) if answer.status.is_server_error() => {
            let title = format!("{name} answers with status {}", answer.status.as_u16());
            problem("upstream_failing", title, "Connect itself has a problem: only cached tokens are served.")
                .advice("look at https://www.vercel-status.com and try again")
        }
        Ok(_) => Finding::ok("network", format!("{name} answers")),
        Err(error) => {
            // The values set by `run` are of no use to a sidecar.
            let proxy = probe.proxy.as_deref().filter(|_| !is_inside_run);
            let certificates = extra_certificates.as_deref().filter(|_| !is_inside_run);
            failed_probe(probe, error, proxy, certificates)
        }
    };
    let mut findings = vec![finding];
    // If the sidecar uses the proxy itself, this is reported as a configuration mistake.
    for Unusable { variable, reason } in probe.unusable.iter().filter(|_| !probe.uses_env_proxy) {
        let detail =
            "`connect-sidecar run` does not start with it: requests of a command to other hosts use that proxy.";
        let title = format!("{variable}: {reason}");
        let finding = Finding::new(Severity::Warning, "proxy_not_supported", title, detail);
        findings.push(finding.fix(format!("unset {variable}")));
    }
    if offset_ms != 0 {
        let off = format_duration(Duration::from_millis(offset_ms.unsigned_abs()));
        let how = if offset_ms > 0 { "behind" } else { "ahead of" };
        let title = format!("this machine's clock is {off} {how} that of {name}");
        let detail = "The sidecar corrects for it; an SDK that checks the token itself does not.";
        findings.push(Finding::new(Severity::Warning, "clock_skew", title, detail).remedy(warning::set_clock()));
    }
    findings
}

fn failed_probe(
    probe: &NetworkProbe,
    error: &RequestError,
    proxy: Option<&ProxyServer>,
    certificates: Option<&str>,
) -> Finding {
    let name = &probe.name;
    let problem = |code, title: String, detail: &str| Finding::new(Severity::Problem, code, title, detail);
    let message = error.message.trim_end_matches('.').to_owned();
    let fails = "Every request that is not cached fails with this error.";
    match error.code {
        Code::UpstreamUnreachable => match (proxy, &probe.resolve_error) {
            _ if probe.uses_env_proxy => {
                let detail = match proxy {
                    Some(server) => format!("--use-env-proxy is set, and {} names {}.", server.variable, server.name()),
                    None => format!("--use-env-proxy is set, and no variable names a proxy for {name}."),
                };
                problem("upstream_unreachable", message, &detail).remedy((*error.remedy).clone())
            }
            (Some(server), _) if !probe.is_on_loopback => {
                let (variable, server) = (server.variable, server.name());
                let detail = format!("{variable} names {server}, which the sidecar does not use by default.");
                problem("proxy_not_used", message, &detail).fix("connect-sidecar --use-env-proxy")
            }
            (_, Some(reason)) => {
                let title = format!("the name of {name} has no address: {reason}");
                problem("dns_failed", title, "This machine is offline, or its resolver does not know the name.")
                    .advice("check the network, VPN and resolver; behind a proxy: connect-sidecar --use-env-proxy")
            }
            (_, None) => problem("upstream_unreachable", message, fails).remedy((*error.remedy).clone()),
        },
        Code::UpstreamTls => {
            let detail = "The server has not proven to be Connect. It may be a proxy of your company, or an attacker.";
            let finding = problem("upstream_tls", message, detail);
            // What Node.js is told to trust is most likely the company's certificate.
            let has_specific_remedy = *error.remedy != error.code.remedy();
            match certificates.filter(|_| has_specific_remedy) {
                Some(file) => finding.fix(format!("connect-sidecar --upstream-ca {}", shell_quoting::path(file))),
                None => finding.remedy((*error.remedy).clone()),
            }
        }
        Code::UpstreamRedirect | Code::UpstreamInvalidResponse => match error.upstream_status {
            Some(status) if status.is_server_error() => {
                problem("upstream_failing", message, "Connect itself, or a proxy in front of it, has a problem.")
                    .advice("look at https://www.vercel-status.com and try again")
            }
            None if error.code == Code::UpstreamInvalidResponse => {
                problem("upstream_broken_off", message, fails).advice("try again; check the VPN or proxy in between")
            }
            _ => {
                let detail = "The response is not from Connect: most likely this network has a captive portal.";
                problem("captive_portal", message, detail).advice("open http://example.com in a browser and sign in")
            }
        },
        Code::UpstreamTimeout => {
            problem("upstream_timeout", message, fails).advice("try again; check the VPN or proxy")
        }
        code => problem(code.as_str(), message, fails).remedy((*error.remedy).clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::env_proxy::EnvProxy;
    use http::{HeaderMap, StatusCode, Uri};

    fn first_finding(probe: &NetworkProbe, environment: &ProxyEnvironment) -> (String, String) {
        let finding = evaluate(probe, environment, 0).remove(0);
        (finding.code.into_owned(), finding.hint.unwrap_or_default() + " | " + &finding.detail)
    }

    fn probe_with(answer: Result<Answer, RequestError>) -> NetworkProbe {
        NetworkProbe {
            name: "https://api.vercel.com".into(),
            is_on_loopback: false,
            uses_env_proxy: false,
            proxy: None,
            unusable: Vec::new(),
            answer,
            resolve_error: None,
        }
    }

    fn failed(code: Code, status: Option<u16>, hint: Option<&str>) -> NetworkProbe {
        let mut error = RequestError::new(code, "It failed.");
        error.upstream_status = status.map(|status| StatusCode::from_u16(status).expect("a status"));
        probe_with(Err(match hint {
            Some(hint) => error.hint(hint.to_owned()),
            None => error,
        }))
    }

    #[test]
    fn network_faults_are_told_apart() {
        let environment = ProxyEnvironment::default();
        for (probe, code) in [
            (failed(Code::UpstreamUnreachable, None, None), "upstream_unreachable"),
            (failed(Code::UpstreamTls, None, None), "upstream_tls"),
            (failed(Code::UpstreamRedirect, None, None), "captive_portal"),
            (failed(Code::UpstreamInvalidResponse, Some(200), None), "captive_portal"),
            (failed(Code::UpstreamInvalidResponse, Some(502), None), "upstream_failing"),
            (failed(Code::UpstreamInvalidResponse, None, None), "upstream_broken_off"),
            (failed(Code::UpstreamTimeout, None, None), "upstream_timeout"),
            (failed(Code::LoopDetected, None, None), "loop_detected"),
        ] {
            assert_eq!(first_finding(&probe, &environment).0, code);
        }
        for (status, code) in [(200, "network"), (401, "network"), (403, "network"), (503, "upstream_failing")] {
            let status = StatusCode::from_u16(status).expect("a status");
            let probe = probe_with(Ok(Answer::new(status, &HeaderMap::new(), b"{}")));
            assert_eq!(first_finding(&probe, &environment).0, code);
        }
        let resolve_error = Some("unknown".to_owned());
        let unresolved = NetworkProbe { resolve_error, ..failed(Code::UpstreamUnreachable, None, None) };
        assert_eq!(first_finding(&unresolved, &environment).0, "dns_failed");
    }

    fn proxies(https_proxy: &str) -> EnvProxy {
        EnvProxy::read(&|name| (name == "HTTPS_PROXY").then(|| https_proxy.into()))
    }

    #[test]
    fn a_proxy_is_named_without_its_password() {
        let origin = Uri::from_static("https://api.vercel.com");
        let proxies = proxies("socks5h://user:hunter2@proxy.corp");
        let proxy = proxies.server_for(&origin).expect("usable").cloned();
        let unreachable = || NetworkProbe { proxy: proxy.clone(), ..failed(Code::UpstreamUnreachable, None, None) };
        let through = || NetworkProbe { uses_env_proxy: true, ..unreachable() };
        let (outside, inside_run) =
            (ProxyEnvironment::default(), ProxyEnvironment { is_inside_run: true, ..ProxyEnvironment::default() });
        for (probe, expected) in [(unreachable(), "proxy_not_used"), (through(), "upstream_unreachable")] {
            let (code, text) = first_finding(&probe, &outside);
            assert_eq!(code, expected);
            assert!(
                text.contains("HTTPS_PROXY names socks5h://proxy.corp:1080") && !text.contains("hunter2"),
                "{text}"
            );
        }
        assert_eq!(first_finding(&through(), &inside_run).0, "proxy_is_a_sidecar");
        assert_eq!(first_finding(&unreachable(), &inside_run).0, "upstream_unreachable");
        assert_eq!(first_finding(&failed(Code::UpstreamUnreachable, None, None), &outside).0, "upstream_unreachable");
        let on_loopback = NetworkProbe { is_on_loopback: true, ..unreachable() };
        assert_eq!(first_finding(&on_loopback, &outside).0, "upstream_unreachable", "a proxy is not used for loopback");
    }

    #[test]
    fn an_unsupported_proxy_is_a_warning_if_only_runs_use_it() {
        let unusable = proxies("socks4://user:hunter2@proxy.corp").unusable(&Scheme::HTTPS).to_vec();
        let answered = || probe_with(Ok(Answer::new(StatusCode::FORBIDDEN, &HeaderMap::new(), b"{}")));
        let evaluated = |probe: &NetworkProbe| evaluate(probe, &ProxyEnvironment::default(), 0);
        let findings = evaluated(&NetworkProbe { unusable: unusable.clone(), ..answered() });
        assert_eq!((findings.len(), &*findings[1].code), (2, "proxy_not_supported"));
        assert!(findings[1].title.contains("HTTPS_PROXY: a proxy of scheme socks4 "), "{}", findings[1].title);
        assert_eq!(findings[1].fix.as_deref(), Some("unset HTTPS_PROXY"));
        assert_eq!(evaluated(&NetworkProbe { unusable, uses_env_proxy: true, ..answered() }).len(), 1);
    }

    #[test]
    fn the_certificate_that_node_trusts_is_proposed_for_upstream_ca() {
        let environment =
            ProxyEnvironment { extra_certificates: Some("/etc/corp ca.pem".into()), ..ProxyEnvironment::default() };
        let unknown_issuer = failed(Code::UpstreamTls, None, Some("--upstream-ca FILE"));
        assert!(
            first_finding(&unknown_issuer, &environment)
                .1
                .starts_with("connect-sidecar --upstream-ca '/etc/corp ca.pem'")
        );
        assert!(first_finding(&unknown_issuer, &ProxyEnvironment::default()).1.starts_with("--upstream-ca FILE"));
        assert!(
            first_finding(&failed(Code::UpstreamTls, None, None), &environment).1.contains("`date`"),
            "another flaw"
        );
    }

    #[test]
    fn clock_skew_has_a_direction() {
        let answered = || probe_with(Ok(Answer::new(StatusCode::FORBIDDEN, &HeaderMap::new(), b"{}")));
        for (offset, text) in [(90_000, "1 min behind"), (-90_000, "1 min ahead of")] {
            let finding = evaluate(&answered(), &ProxyEnvironment::default(), offset).remove(1);
            assert_eq!(finding.code, "clock_skew");
            assert!(finding.title.contains(text), "{}", finding.title);
        }
        assert_eq!(evaluate(&answered(), &ProxyEnvironment::default(), 0).len(), 1);
    }
}
