//! The running sidecar and the port: whether one runs for this project and what it says, or who has its place.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use http::Method;
use serde::Deserialize;

use super::finding::{Finding, Severity};
use crate::config::{Config, Difference};
use crate::credential::VERCEL_CLI;
use crate::daemon::server::listener;
use crate::instance::client::{self, Client, NotFound, Unresponsive};
use crate::instance::port_owner::{self, Owner};
use crate::instance::state_file::Instance;
use crate::instance::{Selector, Settings};
use crate::remedy::Remedy;

/// What a running sidecar says of itself, of which this is all that is looked at.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    version: String,
    oidc: Oidc,
    warnings: Vec<Warning>,
    settings: Settings,
}

#[derive(Debug, Deserialize)]
struct Oidc {
    state: String,
    source: String,
    fingerprint: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Warning {
    code: String,
    message: String,
    #[serde(flatten)]
    remedy: Option<Remedy>,
}

/// What there is.
#[derive(Debug)]
pub(super) enum Place {
    /// A sidecar runs for the directory and has proven to be that, with what it says or why it says nothing.
    Runs(Instance, Result<State, String>),
    /// One is there and does not answer.
    Unresponsive(Unresponsive),
    /// None runs, and one could.
    Free,
    /// None runs, and none could at this address, for this reason.
    Blocked(SocketAddr, io::Error, Option<Owner>),
}

impl Place {
    /// Whether requests get a good token of the sidecar that runs, whatever the env file holds.
    pub(super) fn has_a_good_token(&self) -> bool {
        matches!(self, Self::Runs(_, Ok(state)) if state.oidc.state == "valid")
    }

    /// Has the settings be those of the sidecar that runs, but for those that were named here; those of them that it has
    /// otherwise.
    pub(super) fn settle(&self, config: &mut Config) -> Vec<Difference> {
        let Self::Runs(instance, Ok(state)) = self else { return Vec::new() };
        let differences = config.differences(&state.settings);
        config.take_settings(&state.settings, &instance.project, true);
        differences
    }
}

/// Looks for it. Takes no port.
pub(super) async fn gather(config: &Config) -> Place {
    // By the project alone: at a port that the user names, another project's may be what is in the way.
    let wanted = Selector { port: None, ..config.wanted() };
    match client::find(&wanted).await {
        Ok((instance, client)) => return Place::Runs(instance, ask(&client).await),
        Err(NotFound::Unresponsive(silent)) => return Place::Unresponsive(silent),
        Err(NotFound::NotRunning(_)) => {}
    }
    if config.port == 0 {
        return Place::Free;
    }
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    for ip in loopback.into_iter().chain(config.network) {
        let address = SocketAddr::new(ip, config.port);
        match listener::try_listen(address) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                let owner = port_owner::find(address, config.state_dir.as_deref()).await;
                return Place::Blocked(address, e, owner);
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Place::Blocked(address, e, None),
            // A machine without IPv6 is served on IPv4 alone.
            _ => {}
        }
    }
    Place::Free
}

async fn ask(client: &Client) -> Result<State, String> {
    client.request_json(Method::GET, "/_sidecar/v1/status", "").await.map_err(|e| e.to_string())
}

/// Judges what was named here otherwise than the sidecar that runs has it.
pub(super) fn judge_differences(differences: &[Difference]) -> impl Iterator<Item = Finding> {
    differences.iter().map(|difference| {
        let detail = "This looks at the former; requests go by the latter.";
        Finding::new(Severity::Warning, "other_setting", difference.to_string(), detail)
    })
}

/// Judges it. `fingerprint` is that of the token in the env file; what the sidecar warns of is left out where a finding
/// `is_known` by its code.
pub(super) fn judge(place: &Place, fingerprint: Option<&str>, is_known: impl Fn(&str) -> bool) -> Vec<Finding> {
    let (Instance { url, project, .. }, state) = match place {
        Place::Unresponsive(silent) => {
            let detail = "Requests to it wait in vain, and no other is started beside it.";
            let finding = Finding::new(Severity::Problem, "instance_silent", silent.to_string(), detail);
            return vec![finding.fix(silent.resume_command())];
        }
        Place::Free => {
            let title = "no sidecar runs for this project";
            let detail = "Apps get their tokens while one runs.";
            return vec![Finding::new(Severity::Note, "not_running", title, detail).fix("connect-sidecar")];
        }
        Place::Blocked(address, error, owner) => {
            let finding = |code, title: String, detail| Finding::new(Severity::Problem, code, title, detail);
            return vec![match (error.kind(), owner) {
                (io::ErrorKind::AddrInUse, owner) => {
                    let by = owner.as_ref().map_or("somebody else".to_owned(), ToString::to_string);
                    let detail = "No sidecar can start there, and apps that ask there are asking somebody else.";
                    finding("port_taken", format!("{address} is taken by {by}"), detail).remedy(
                        Remedy::advice("end that process, or choose another port")
                            .with_command("connect-sidecar --port 0"),
                    )
                }
                _ => finding("port_not_permitted", format!("could not listen on {address}: {error}"), "")
                    .fix("connect-sidecar --port 2774"),
            }];
        }
        Place::Runs(instance, state) => (instance, state),
    };
    let state = match state {
        Ok(state) => state,
        Err(reason) => {
            let detail = "It runs, but cannot be asked.";
            return vec![Finding::new(Severity::Warning, "instance_unanswering", reason, detail)];
        }
    };
    let mut findings = vec![Finding::ok("instance", format!("a sidecar runs at {url} for {}", project.display()))];
    let version = env!("CARGO_PKG_VERSION");
    if state.version != version {
        let title = format!("the sidecar that runs is version {}, this is {version}", state.version);
        let finding = Finding::new(Severity::Note, "other_version", title, "");
        findings.push(finding.advice("end it and start it again"));
    }
    if let (Some(used), Some(in_file)) = (&state.oidc.fingerprint, fingerprint)
        && used != in_file
    {
        let title = format!("the sidecar that runs uses another token ({used}) than the env file's ({in_file})");
        let detail = match state.oidc.source.as_str() {
            VERCEL_CLI => "The Vercel CLI got it, which writes no file.",
            _ => "A fresher one of the same project, or another env file.",
        };
        findings.push(Finding::new(Severity::Note, "other_token", title, detail));
    }
    for Warning { code, message, remedy } in state.warnings.iter().filter(|warning| !is_known(&warning.code)) {
        let finding = Finding::new(Severity::Warning, code.clone(), message.clone(), "The sidecar that runs says so.");
        findings.push(match remedy {
            Some(remedy) => finding.remedy(remedy.clone()),
            None => finding,
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(fingerprint: &str, warnings: &[&str]) -> Place {
        let warnings: Vec<_> = warnings.iter().map(|code| serde_json::json!({"code": code, "message": "m"})).collect();
        let state = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"), "oidc": {"state": "valid", "source": ".env.local", "fingerprint": fingerprint},
            "warnings": warnings, "settings": {}, "more": 1,
        });
        Place::Runs(running(), Ok(serde_json::from_value(state).expect("a state")))
    }

    fn running() -> Instance {
        let url = "http://127.0.0.1:2774".into();
        Instance { pid: 7, url, key: String::new(), project: "/p".into(), began: None }
    }

    #[test]
    fn who_is_in_the_place_decides() {
        let taken = || io::Error::from(io::ErrorKind::AddrInUse);
        let address: SocketAddr = "127.0.0.1:2774".parse().expect("an address");
        let process = Owner::Process { pid: 7, name: "node".into() };
        for (place, codes, said) in [
            (Place::Free, vec!["not_running"], "no sidecar runs"),
            (Place::Blocked(address, taken(), Some(process)), vec!["port_taken"], "by node (process 7)"),
            (Place::Blocked(address, taken(), None), vec!["port_taken"], "somebody else"),
            (
                Place::Blocked(address, io::ErrorKind::PermissionDenied.into(), None),
                vec!["port_not_permitted"],
                "permission",
            ),
            (Place::Runs(running(), Err("no".into())), vec!["instance_unanswering"], "no"),
            (
                Place::Unresponsive(Unresponsive { pid: 7, project: "/p".into() }),
                vec!["instance_silent"],
                "kill -CONT 7",
            ),
            (state("f", &[]), vec!["instance"], "http://127.0.0.1:2774"),
            (state("f", &["known", "other"]), vec!["instance", "other"], "runs"),
            (state("g", &[]), vec!["instance", "other_token"], "runs"),
        ] {
            let judged = judge(&place, Some("f"), |code| code == "known");
            assert_eq!(judged.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), codes, "{place:?}");
            assert!(judged[0].title.contains(said), "{}", judged[0].title);
        }
    }
}
