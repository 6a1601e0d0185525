//! The way to Connect: name, connection, TLS, proxy, portal, answer, clock; what is wrong is told apart.
//!
//! Goes the way that a request goes, without a credential. A proxy's address is shown without the password that may stand
//! in it.

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

/// What of our environment has to do with the way there.
#[derive(Debug, Clone, Default)]
pub(super) struct Surroundings {
    /// `NODE_EXTRA_CA_CERTS`.
    pub(super) extra_certificates: Option<String>,
    /// This is the environment of a `run` or of what `env` prints, whose proxy is the sidecar.
    pub(super) is_of_a_run: bool,
}

/// What came of asking.
pub(super) struct Asked {
    name: String,
    is_on_loopback: bool,
    uses_env_proxy: bool,
    /// The proxy that our environment names for it.
    proxy: Option<Arc<ProxyServer>>,
    /// What our environment names in place of one for `https`.
    unusable: Vec<Unusable>,
    answer: Result<Answer, RequestError>,
    /// Why the name has no address, if that is so.
    unresolved: Option<String>,
}

/// Asks, for at most `limit`. `clock` learns upstream's time.
pub(super) async fn ask(options: Options, clock: Clock, limit: Duration) -> Asked {
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
    let (answer, unresolved) = tokio::join!(probe, resolve);
    Asked { name, is_on_loopback, uses_env_proxy, proxy, unusable, answer, unresolved }
}

/// Judges what came of it.
pub(super) fn judge(asked: &Asked, surroundings: &Surroundings, offset_ms: i64) -> Vec<Finding> {
    let Surroundings { extra_certificates, is_of_a_run } = surroundings;
    let name = &asked.name;
    let problem = |code, title: String, detail: &str| Finding::new(Severity::Problem, code, title, detail);
    let finding = match &asked.answer {
        _ if asked.uses_env_proxy && asked.proxy.is_some() && *is_of_a_run => {
            let title = "the proxy of this shell is a sidecar, which would be asked to reach Connect through itself";
            problem("proxy_is_a_sidecar", title.into(), "HTTPS_PROXY was set by `connect-sidecar run` or `env`.")
                .remedy(
                    Remedy::advice("unset HTTPS_PROXY and https_proxy, or leave out --use-env-proxy")
                        .with_command("unset HTTPS_PROXY https_proxy"),
                )
        }
        Ok(answer) if answer.status.is_server_error() => {
            let title = format!("{name} answers with status {}", answer.status.as_u16());
            problem("upstream_failing", title, "Connect itself has trouble: only cached tokens are served.")
                .advice("look at https://www.vercel-status.com and try again")
        }
        Ok(_) => Finding::ok("network", format!("{name} answers")),
        Err(error) => {
            // What a run is given, no sidecar is to be told to use.
            let proxy = asked.proxy.as_deref().filter(|_| !is_of_a_run);
            let certificates = extra_certificates.as_deref().filter(|_| !is_of_a_run);
            unanswered(asked, error, proxy, certificates)
        }
    };
    let mut findings = vec![finding];
    // Where the sidecar is to use it, that is a mistake in its configuration.
    for Unusable { variable, reason } in asked.unusable.iter().filter(|_| !asked.uses_env_proxy) {
        let detail = "`connect-sidecar run` does not start with it: what a command sends elsewhere goes by that proxy.";
        let title = format!("{variable}: {reason}");
        let finding = Finding::new(Severity::Warning, "proxy_not_supported", title, detail);
        findings.push(finding.fix(format!("unset {variable}")));
    }
    if offset_ms != 0 {
        let off = format_duration(Duration::from_millis(offset_ms.unsigned_abs()));
        let how = if offset_ms > 0 { "behind" } else { "ahead of" };
        let title = format!("this machine's clock is {off} {how} that of {name}");
        let detail = "The sidecar allows for it; an SDK that judges the token itself does not.";
        findings.push(Finding::new(Severity::Warning, "clock_skew", title, detail).remedy(warning::set_clock()));
    }
    findings
}

fn unanswered(asked: &Asked, error: &RequestError, proxy: Option<&ProxyServer>, certificates: Option<&str>) -> Finding {
    let name = &asked.name;
    let problem = |code, title: String, detail: &str| Finding::new(Severity::Problem, code, title, detail);
    let message = error.message.trim_end_matches('.').to_owned();
    let fails = "Every request that is not cached fails with this.";
    match error.code {
        Code::UpstreamUnreachable => match (proxy, &asked.unresolved) {
            _ if asked.uses_env_proxy => {
                let detail = match proxy {
                    Some(server) => format!("--use-env-proxy is set, and {} names {}.", server.variable, server.name()),
                    None => format!("--use-env-proxy is set, and no variable names a proxy for {name}."),
                };
                problem("upstream_unreachable", message, &detail).remedy((*error.remedy).clone())
            }
            (Some(server), _) if !asked.is_on_loopback => {
                let (variable, server) = (server.variable, server.name());
                let detail = format!("{variable} names {server}, which the sidecar does not use unless told to.");
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
            let detail = "Whoever answers has not proven to be Connect: a proxy of your company, or somebody else.";
            let finding = problem("upstream_tls", message, detail);
            // What Node.js is told to trust is the company's, most likely.
            let is_explained = *error.remedy != error.code.remedy();
            match certificates.filter(|_| is_explained) {
                Some(file) => finding.fix(format!("connect-sidecar --upstream-ca {}", shell_quoting::path(file))),
                None => finding.remedy((*error.remedy).clone()),
            }
        }
        Code::UpstreamRedirect | Code::UpstreamInvalidResponse => match error.upstream_status {
            Some(status) if status.is_server_error() => {
                problem("upstream_failing", message, "Connect itself, or a proxy before it, has trouble.")
                    .advice("look at https://www.vercel-status.com and try again")
            }
            None if error.code == Code::UpstreamInvalidResponse => {
                problem("upstream_broken_off", message, fails).advice("try again; check the VPN or proxy in between")
            }
            _ => {
                let detail = "That is no answer of Connect's: a portal of this network that wants you to sign in, most \
                              likely.";
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

    fn judged(asked: &Asked, surroundings: &Surroundings) -> (String, String) {
        let finding = judge(asked, surroundings, 0).remove(0);
        (finding.code.into_owned(), finding.hint.unwrap_or_default() + " | " + &finding.detail)
    }

    fn asked(answer: Result<Answer, RequestError>) -> Asked {
        Asked {
            name: "https://api.vercel.com".into(),
            is_on_loopback: false,
            uses_env_proxy: false,
            proxy: None,
            unusable: Vec::new(),
            answer,
            unresolved: None,
        }
    }

    fn failed(code: Code, status: Option<u16>, hint: Option<&str>) -> Asked {
        let mut error = RequestError::new(code, "It failed.");
        error.upstream_status = status.map(|status| StatusCode::from_u16(status).expect("a status"));
        asked(Err(match hint {
            Some(hint) => error.hint(hint.to_owned()),
            None => error,
        }))
    }

    #[test]
    fn what_is_wrong_with_the_network_is_told_apart() {
        let surroundings = Surroundings::default();
        for (asked, code) in [
            (failed(Code::UpstreamUnreachable, None, None), "upstream_unreachable"),
            (failed(Code::UpstreamTls, None, None), "upstream_tls"),
            (failed(Code::UpstreamRedirect, None, None), "captive_portal"),
            (failed(Code::UpstreamInvalidResponse, Some(200), None), "captive_portal"),
            (failed(Code::UpstreamInvalidResponse, Some(502), None), "upstream_failing"),
            (failed(Code::UpstreamInvalidResponse, None, None), "upstream_broken_off"),
            (failed(Code::UpstreamTimeout, None, None), "upstream_timeout"),
            (failed(Code::LoopDetected, None, None), "loop_detected"),
        ] {
            assert_eq!(judged(&asked, &surroundings).0, code);
        }
        for (status, code) in [(200, "network"), (401, "network"), (403, "network"), (503, "upstream_failing")] {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(judged(&asked(Ok(Answer::new(status, &HeaderMap::new(), b"{}"))), &surroundings).0, code);
        }
        let unresolved = Some("unknown".to_owned());
        let nowhere = Asked { unresolved, ..failed(Code::UpstreamUnreachable, None, None) };
        assert_eq!(judged(&nowhere, &surroundings).0, "dns_failed");
    }

    fn environment(https_proxy: &str) -> EnvProxy {
        EnvProxy::read(&|name| (name == "HTTPS_PROXY").then(|| https_proxy.into()))
    }

    #[test]
    fn a_proxy_is_named_without_its_password() {
        let origin = Uri::from_static("https://api.vercel.com");
        let environment = environment("socks5h://user:hunter2@proxy.corp");
        let proxy = environment.server_for(&origin).expect("usable").cloned();
        let unreachable = || Asked { proxy: proxy.clone(), ..failed(Code::UpstreamUnreachable, None, None) };
        let through = || Asked { uses_env_proxy: true, ..unreachable() };
        let (users, of_a_run) =
            (Surroundings::default(), Surroundings { is_of_a_run: true, ..Surroundings::default() });
        for (asked, expected) in [(unreachable(), "proxy_not_used"), (through(), "upstream_unreachable")] {
            let (code, said) = judged(&asked, &users);
            assert_eq!(code, expected);
            assert!(
                said.contains("HTTPS_PROXY names socks5h://proxy.corp:1080") && !said.contains("hunter2"),
                "{said}"
            );
        }
        assert_eq!(judged(&through(), &of_a_run).0, "proxy_is_a_sidecar");
        assert_eq!(judged(&unreachable(), &of_a_run).0, "upstream_unreachable");
        assert_eq!(judged(&failed(Code::UpstreamUnreachable, None, None), &users).0, "upstream_unreachable");
        let on_loopback = Asked { is_on_loopback: true, ..unreachable() };
        assert_eq!(judged(&on_loopback, &users).0, "upstream_unreachable", "no proxy leads there");
    }

    #[test]
    fn a_proxy_that_is_not_supported_is_a_warning_where_it_is_for_runs_alone() {
        let unusable = environment("socks4://user:hunter2@proxy.corp").unusable(&Scheme::HTTPS).to_vec();
        let answered = || asked(Ok(Answer::new(StatusCode::FORBIDDEN, &HeaderMap::new(), b"{}")));
        let judged = |asked: &Asked| judge(asked, &Surroundings::default(), 0);
        let findings = judged(&Asked { unusable: unusable.clone(), ..answered() });
        assert_eq!((findings.len(), &*findings[1].code), (2, "proxy_not_supported"));
        assert!(findings[1].title.contains("HTTPS_PROXY: a proxy of scheme socks4 "), "{}", findings[1].title);
        assert_eq!(findings[1].fix.as_deref(), Some("unset HTTPS_PROXY"));
        assert_eq!(judged(&Asked { unusable, uses_env_proxy: true, ..answered() }).len(), 1);
    }

    #[test]
    fn a_company_s_certificate_that_node_knows_is_the_one_to_pass() {
        let surroundings =
            Surroundings { extra_certificates: Some("/etc/corp ca.pem".into()), ..Surroundings::default() };
        let unknown_issuer = failed(Code::UpstreamTls, None, Some("--upstream-ca FILE"));
        assert!(
            judged(&unknown_issuer, &surroundings).1.starts_with("connect-sidecar --upstream-ca '/etc/corp ca.pem'")
        );
        assert!(judged(&unknown_issuer, &Surroundings::default()).1.starts_with("--upstream-ca FILE"));
        assert!(judged(&failed(Code::UpstreamTls, None, None), &surroundings).1.contains("`date`"), "another flaw");
    }

    #[test]
    fn a_clock_that_differs_is_told_which_way() {
        let answered = || asked(Ok(Answer::new(StatusCode::FORBIDDEN, &HeaderMap::new(), b"{}")));
        for (offset, said) in [(90_000, "1 min behind"), (-90_000, "1 min ahead of")] {
            let finding = judge(&answered(), &Surroundings::default(), offset).remove(1);
            assert_eq!(finding.code, "clock_skew");
            assert!(finding.title.contains(said), "{}", finding.title);
        }
        assert_eq!(judge(&answered(), &Surroundings::default(), 0).len(), 1);
    }
}
