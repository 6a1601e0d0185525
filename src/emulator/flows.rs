//! Operations on consents and installations in progress. An app or the CLI starts a flow, a person decides it in a
//! browser or through the admin API, and the caller polls the result (`GET /v1/connect/result/{verifier}`).
//!
//! A flow is identified by its request code: the SHA-256 of a verifier that only the caller knows.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::errors::{Kind, Refusal};
use super::flow::{Decision, Flow, Status};
use super::ids::{millis, random_id};
use super::state::Contents;
use super::world::{Installation, user_key};

/// How long a flow is valid unless the caller asks for another time.
pub const LIFE: Duration = Duration::from_secs(600);

/// The request code of a verifier.
pub fn request_code(verifier: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes()))
}

/// Adds a flow and removes expired ones.
pub fn begin(contents: &mut Contents, flow: Flow, now: SystemTime) {
    contents.pending.retain(|flow| millis(now) < flow.expires_at);
    contents.pending.push(flow);
}

/// The flow of the page with this query. The CLI prints the page's URL without starting a flow first, so an unknown
/// request code starts one, with `scopes` and `installationId` from the query.
pub fn open<'c>(
    contents: &'c mut Contents,
    decision: Decision,
    connector: &str,
    query: &[(String, String)],
    now: SystemTime,
) -> Result<&'c mut Flow, Refusal> {
    let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let code = parameter("request_code").filter(|code| !code.is_empty());
    let code = code.ok_or_else(|| Refusal::about(Kind::BadRequest, "the URL has no `request_code`"))?;
    let connector = contents.world.connector(connector).map(|connector| connector.id.clone());
    let connector = connector.ok_or(Refusal::about(Kind::ConnectorNotFound, "of this URL"))?;
    if !contents.pending.iter().any(|flow| flow.request_code == code) {
        let mut flow = Flow::new(decision, &connector, &code, now, LIFE);
        flow.narrowing.scopes = parameter("scopes").map(|scopes| scopes.split(',').map(str::to_owned).collect());
        flow.installation = parameter("installationId");
        begin(contents, flow, now);
    }
    let matches = |flow: &&mut Flow| {
        flow.request_code == code
            && flow.connector == connector
            && flow.decision == decision
            && millis(now) < flow.expires_at
    };
    contents.pending.iter_mut().find(matches).ok_or(Refusal::new(Kind::NotFound))
}

/// The status of a flow, for the caller who knows its verifier.
pub fn result(contents: &Contents, verifier: &str, now: SystemTime) -> Result<Value, Refusal> {
    let code = request_code(verifier);
    let flow = contents.pending.iter().find(|flow| flow.request_code == code && millis(now) < flow.expires_at);
    flow.map(|flow| json!(flow.status)).ok_or(Refusal::new(Kind::NotFound))
}

/// Approves a flow. `user` and `tenant` are used if the flow does not name its own.
pub fn approve(
    contents: &mut Contents,
    request_code: &str,
    user: Option<&str>,
    tenant: Option<&str>,
    now: SystemTime,
) -> Result<Flow, Refusal> {
    let flow = undecided(contents, request_code, now)?.clone();
    let first_member = contents.world.members.first().map(|member| member.id.clone());
    let connector = contents
        .world
        .connector_mut(&flow.connector)
        .ok_or_else(|| Refusal::about(Kind::ConnectorNotFound, &flow.connector))?;
    let data = match flow.decision {
        Decision::Authorize => {
            let user = flow.user.as_deref().or(user).map(str::to_owned).or(first_member);
            let user = user.ok_or_else(|| Refusal::about(Kind::BadRequest, "`user` is missing: who consents"))?;
            // Tokens of an earlier consent are replaced.
            connector.vault.remove(&user_key(&user));
            if !connector.granted_to.contains(&user) {
                connector.granted_to.push(user);
            }
            json!({"connector": connector.id})
        }
        Decision::Install => {
            let tenant_id = flow.tenant.as_deref().or(tenant).unwrap_or("T0ACME").to_owned();
            let known = connector.installations.iter().find(|known| known.tenant_id == tenant_id);
            let id = known.map(|known| known.id.clone()).or(flow.installation).unwrap_or_else(|| random_id("inst", 16));
            connector.vault.remove(&format!("app:{id}"));
            if !connector.installations.iter().any(|known| known.id == id) {
                connector.installations.push(Installation { id: id.clone(), tenant_id });
            }
            json!({"connector": connector.id, "installationId": id})
        }
    };
    set_status(contents, request_code, Status::Success { data }, now)
}

/// Denies a flow on behalf of the person.
pub fn deny(contents: &mut Contents, request_code: &str, now: SystemTime) -> Result<Flow, Refusal> {
    set_status(contents, request_code, Status::Canceled, now)
}

/// Ends a flow with an error code of the provider.
pub fn fail(contents: &mut Contents, request_code: &str, code: &str, now: SystemTime) -> Result<Flow, Refusal> {
    let error = json!({"code": code, "message": format!("The provider refused: {code}")});
    set_status(contents, request_code, Status::Error { error }, now)
}

fn set_status(contents: &mut Contents, request_code: &str, status: Status, now: SystemTime) -> Result<Flow, Refusal> {
    let flow = undecided(contents, request_code, now)?;
    flow.status = status;
    Ok(flow.clone())
}

fn undecided<'c>(contents: &'c mut Contents, request_code: &str, now: SystemTime) -> Result<&'c mut Flow, Refusal> {
    let matches = |flow: &&mut Flow| {
        flow.request_code == request_code && flow.status == Status::Pending && millis(now) < flow.expires_at
    };
    contents.pending.iter_mut().find(matches).ok_or(Refusal::new(Kind::NotFound))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::emulator::world::World;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn contents() -> Contents {
        Contents { world: World::demo(), pending: Vec::new() }
    }

    fn query(verifier: &str) -> Vec<(String, String)> {
        vec![("request_code".into(), request_code(verifier)), ("scopes".into(), "a,b".into())]
    }

    #[test]
    fn a_flow_started_by_its_url_is_decided_once_and_reported_to_the_holder_of_the_verifier() {
        let (mut contents, now) = (contents(), UNIX_EPOCH + NOW);
        let refused = |result: Result<Value, Refusal>| result.expect_err("nothing there").kind;
        assert_eq!(refused(result(&contents, "v", now)), Kind::NotFound);
        let flow = open(&mut contents, Decision::Install, "slack/not-installed", &query("v"), now).expect("a flow");
        assert_eq!(flow.narrowing.scopes.as_deref(), Some(&["a".to_owned(), "b".to_owned()][..]));
        assert_eq!(result(&contents, "v", now), Ok(json!({"status": "pending"})));

        let code = request_code("v");
        approve(&mut contents, &code, None, Some("T1"), now).expect("approved");
        let status = result(&contents, "v", now).expect("a result");
        let connector = contents.world.connector("slack/not-installed").expect("it is there");
        assert_eq!(status["data"]["installationId"], connector.installations[0].id);
        assert_eq!((status["status"].as_str(), &*connector.installations[0].tenant_id), (Some("success"), "T1"));
        assert!(deny(&mut contents, &code, now).is_err(), "it is decided");
        assert_eq!(refused(result(&contents, &code, now)), Kind::NotFound, "the code is not the verifier");
    }

    #[test]
    fn a_consent_is_for_the_requested_user_and_expires() {
        let (mut contents, now) = (contents(), UNIX_EPOCH + NOW);
        for (verifier, user) in [("1", Some("user_app")), ("2", None)] {
            let mut flow = Flow::new(Decision::Authorize, "scl_linear", &request_code(verifier), now, LIFE);
            flow.user = user.map(str::to_owned);
            begin(&mut contents, flow, now);
            approve(&mut contents, &request_code(verifier), Some("user_browser"), None, now).expect("approved");
        }
        let granted = &contents.world.connector("scl_linear").expect("it is there").granted_to;
        assert_eq!(granted, &["user_ada", "user_app", "user_browser"]);

        open(&mut contents, Decision::Authorize, "scl_linear", &query("late"), now).expect("a flow");
        let late = now + LIFE;
        assert!(approve(&mut contents, &request_code("late"), None, None, late).is_err());
        assert!(result(&contents, "late", late).is_err());
        assert!(open(&mut contents, Decision::Install, "scl_linear", &query("2"), now).is_err(), "another decision");
    }
}
