//! The running sidecar and the port: whether one runs for this project and what it reports, or who holds its port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::finding::{Finding, Severity};
use crate::config::{Config, Difference};
use crate::credential::VERCEL_CLI;
use crate::daemon::server::listener;
use crate::instance::Selector;
use crate::instance::client::{self, ClientError, NotFound, Unresponsive};
use crate::instance::port_owner::{self, Owner};
use crate::instance::state_file::Instance;
use crate::instance::status::{StatusReport, WarningStatus};
use crate::remedy::Remedy;

/// Whether a sidecar runs for the project, and whether one could.
#[derive(Debug)]
pub(super) enum Availability {
    /// One runs and has proven its identity. It has reported its status, or the request for it failed.
    Running(Instance, Result<Box<StatusReport>, ClientError>),
    /// One runs but does not respond.
    Unresponsive(Unresponsive),
    /// None runs, and the port is free.
    Free,
    /// None runs, and none could listen on this address.
    Blocked(SocketAddr, io::Error, Option<Owner>),
}

impl Availability {
    /// Whether the running sidecar has a valid token, so that requests succeed whatever the env file holds.
    pub(super) fn has_valid_token(&self) -> bool {
        matches!(self, Self::Running(_, Ok(status)) if status.oidc.state == "valid")
    }

    /// Applies the running sidecar's settings to `config`, except those set explicitly for this command. Returns the
    /// explicit settings that differ from the running sidecar's.
    pub(super) fn apply_settings(&self, config: &mut Config) -> Vec<Difference> {
        let Self::Running(instance, Ok(status)) = self else { return Vec::new() };
        let differences = config.differences(&status.settings);
        config.adopt_settings(&status.settings, &instance.project, true);
        differences
    }
}

/// Looks for a running sidecar, or else tries whether its port is free. Keeps no port.
pub(super) async fn gather(config: &Config) -> Availability {
    // By the project alone: a sidecar of another project may be what occupies the port.
    let selector = Selector { port: None, ..config.selector() };
    match client::find(&selector).await {
        Ok((instance, client)) => return Availability::Running(instance, client.status().await.map(Box::new)),
        Err(NotFound::Unresponsive(unresponsive)) => return Availability::Unresponsive(unresponsive),
        Err(NotFound::NotRunning(_)) => {}
    }
    if config.port == 0 {
        return Availability::Free;
    }
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    for ip in loopback.into_iter().chain(config.network) {
        let address = SocketAddr::new(ip, config.port);
        match listener::try_listen(address) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                let owner = port_owner::find(address, config.state_dir.as_deref()).await;
                return Availability::Blocked(address, e, owner);
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Availability::Blocked(address, e, None),
            // Without IPv6, the sidecar serves on IPv4 alone.
            _ => {}
        }
    }
    Availability::Free
}

/// Findings about explicit settings that differ from the running sidecar's.
pub(super) fn evaluate_differences(differences: &[Difference]) -> impl Iterator<Item = Finding> {
    differences.iter().map(|difference| {
        let detail = "The doctor checks the former; requests use the latter.";
        Finding::new(Severity::Warning, "other_setting", difference.to_string(), detail)
    })
}

/// Findings about the running sidecar or the port. `fingerprint` is that of the env file's token. A warning of the
/// sidecar is left out if `is_known` says that another finding has its code.
pub(super) fn evaluate(
    availability: &Availability,
    fingerprint: Option<&str>,
    is_known: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    match availability {
        Availability::Unresponsive(unresponsive) => {
            let detail = "Requests to it time out, and no second sidecar is started beside it.";
            let finding = Finding::new(Severity::Problem, "instance_silent", unresponsive.to_string(), detail);
            vec![finding.fix(unresponsive.resume_command())]
        }
        Availability::Free => {
            let title = "no sidecar runs for this project";
            let detail = "Apps get their tokens while one runs.";
            vec![Finding::new(Severity::Note, "not_running", title, detail).fix("connect-sidecar")]
        }
        Availability::Blocked(address, error, owner) => vec![blocked_port(*address, error, owner.as_ref())],
        Availability::Running(_, Err(error)) => {
            let detail = "It runs, but its status could not be read.";
            vec![Finding::new(Severity::Warning, "instance_unanswering", error.to_string(), detail)]
        }
        Availability::Running(instance, Ok(status)) => running_instance(instance, status, fingerprint, is_known),
    }
}

fn blocked_port(address: SocketAddr, error: &io::Error, owner: Option<&Owner>) -> Finding {
    let finding = |code, title: String, detail| Finding::new(Severity::Problem, code, title, detail);
    if error.kind() != io::ErrorKind::AddrInUse {
        return finding("port_not_permitted", format!("could not listen on {address}: {error}"), "")
            .fix("connect-sidecar --port 2774");
    }
    let owner = owner.map_or("another program".to_owned(), ToString::to_string);
    let detail = "No sidecar can start there, and apps that use this port talk to another program.";
    finding("port_taken", format!("{address} is taken by {owner}"), detail)
        .remedy(Remedy::advice("end that process, or choose another port").with_command("connect-sidecar --port 0"))
}

fn running_instance(
    Instance { url, project, .. }: &Instance,
    status: &StatusReport,
    fingerprint: Option<&str>,
    is_known: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("instance", format!("a sidecar runs at {url} for {}", project.display()))];
    let version = env!("CARGO_PKG_VERSION");
    if status.version != version {
        let title = format!("the sidecar that runs is version {}, this is {version}", status.version);
        let finding = Finding::new(Severity::Note, "other_version", title, "");
        findings.push(finding.advice("end it and start it again"));
    }
    if let (Some(used), Some(in_file)) = (&status.oidc.fingerprint, fingerprint)
        && used != in_file
    {
        let title = format!("the sidecar that runs uses another token ({used}) than the env file's ({in_file})");
        let detail = match status.oidc.source.as_str() {
            VERCEL_CLI => "The Vercel CLI fetched it; the CLI writes no file.",
            _ => "It is a newer one of the same project, or from another env file.",
        };
        findings.push(Finding::new(Severity::Note, "other_token", title, detail));
    }
    let unknown = status.warnings.iter().filter(|warning| !is_known(&warning.code));
    findings.extend(unknown.map(|WarningStatus { code, message, remedy }| {
        let detail = "The running sidecar reports this.";
        let finding = Finding::new(Severity::Warning, code.clone(), message.clone(), detail);
        remedy.iter().cloned().fold(finding, Finding::remedy)
    }));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::status::OidcStatus;

    fn reporting(fingerprint: &str, warnings: &[&str]) -> Availability {
        let warning = |code: &&str| WarningStatus { code: (*code).to_owned(), message: "m".to_owned(), remedy: None };
        let status = StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            oidc: OidcStatus {
                state: "valid".to_owned(),
                source: ".env.local".to_owned(),
                fingerprint: Some(fingerprint.to_owned()),
                ..OidcStatus::default()
            },
            warnings: warnings.iter().map(warning).collect(),
            ..StatusReport::default()
        };
        Availability::Running(running(), Ok(Box::new(status)))
    }

    fn running() -> Instance {
        let url = "http://127.0.0.1:2774".into();
        Instance { pid: 7, url, key: String::new(), project: "/p".into(), began: None }
    }

    #[test]
    fn findings_follow_from_who_holds_the_port() {
        let taken = || io::Error::from(io::ErrorKind::AddrInUse);
        let address: SocketAddr = "127.0.0.1:2774".parse().expect("an address");
        let process = Owner::Process { pid: 7, name: "node".into() };
        for (availability, codes, title) in [
            (Availability::Free, vec!["not_running"], "no sidecar runs"),
            (Availability::Blocked(address, taken(), Some(process)), vec!["port_taken"], "by node (process 7)"),
            (Availability::Blocked(address, taken(), None), vec!["port_taken"], "another program"),
            (
                Availability::Blocked(address, io::ErrorKind::PermissionDenied.into(), None),
                vec!["port_not_permitted"],
                "permission",
            ),
            (
                Availability::Running(running(), Err(ClientError::Refused("no".into()))),
                vec!["instance_unanswering"],
                "no",
            ),
            (
                Availability::Unresponsive(Unresponsive { pid: 7, project: "/p".into() }),
                vec!["instance_silent"],
                "kill -CONT 7",
            ),
            (reporting("f", &[]), vec!["instance"], "http://127.0.0.1:2774"),
            (reporting("f", &["known", "other"]), vec!["instance", "other"], "runs"),
            (reporting("g", &[]), vec!["instance", "other_token"], "runs"),
        ] {
            let findings = evaluate(&availability, Some("f"), |code| code == "known");
            assert_eq!(findings.iter().map(|f| f.code.as_ref()).collect::<Vec<_>>(), codes, "{availability:?}");
            assert!(findings[0].title.contains(title), "{}", findings[0].title);
        }
    }
}
