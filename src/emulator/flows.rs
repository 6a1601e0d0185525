//! Consents and installations under way: begun by an app or by the CLI, decided by a person in a browser or by the admin
//! route, polled for by whoever began them (`GET /v1/connect/result/{verifier}`).
//!
//! A flow is named by its request code, which is the SHA-256 of a verifier that only the beginner knows.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::errors::{Kind, Refusal};
use super::flow::{Decision, Flow, Status};
use super::ids::{millis, random_id};
use super::state::Kept;
use super::world::{Installation, user_key};

/// How long a flow may take unless its beginner says otherwise.
pub const LIFE: Duration = Duration::from_secs(600);

/// The request code of a verifier.
pub fn request_code(verifier: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, verifier.as_bytes()))
}

/// Adds a flow; those whose time is over go.
pub fn begin(kept: &mut Kept, pending: Flow, now: SystemTime) {
    kept.pending.retain(|flow| millis(now) < flow.expires_at);
    kept.pending.push(pending);
}

/// The flow that the page of a request code is about. The CLI prints the page's address without asking first, so a code
/// that is new begins a flow, with what the address says: `scopes`, `installationId`.
pub fn open<'k>(
    kept: &'k mut Kept,
    decision: Decision,
    connector: &str,
    query: &[(String, String)],
    now: SystemTime,
) -> Result<&'k mut Flow, Refusal> {
    let of = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let code = of("request_code").filter(|code| !code.is_empty());
    let code = code.ok_or_else(|| Refusal::about(Kind::BadRequest, "the address has no `request_code`"))?;
    let connector = kept.world.connector(connector).map(|connector| connector.id.clone());
    let connector = connector.ok_or(Refusal::about(Kind::ConnectorNotFound, "of this address"))?;
    if !kept.pending.iter().any(|flow| flow.request_code == code) {
        let mut pending = Flow::new(decision, &connector, &code, now, LIFE);
        pending.narrowing.scopes = of("scopes").map(|scopes| scopes.split(',').map(str::to_owned).collect());
        pending.installation = of("installationId");
        begin(kept, pending, now);
    }
    let is_it = |flow: &&mut Flow| {
        flow.request_code == code
            && flow.connector == connector
            && flow.decision == decision
            && millis(now) < flow.expires_at
    };
    kept.pending.iter_mut().find(is_it).ok_or(Refusal::new(Kind::NotFound))
}

/// What the beginner is told.
pub fn result(kept: &Kept, verifier: &str, now: SystemTime) -> Result<Value, Refusal> {
    let code = request_code(verifier);
    let flow = kept.pending.iter().find(|flow| flow.request_code == code && millis(now) < flow.expires_at);
    flow.map(|flow| json!(flow.status)).ok_or(Refusal::new(Kind::NotFound))
}

/// Settles a flow: `user` and `tenant` are who and where it is, unless its beginner has said so.
pub fn approve(
    kept: &mut Kept,
    request_code: &str,
    user: Option<&str>,
    tenant: Option<&str>,
    now: SystemTime,
) -> Result<Flow, Refusal> {
    let flow = undecided(kept, request_code, now)?.clone();
    let first = kept.world.members.first().map(|member| member.id.clone());
    let connector =
        kept.world.connector(&flow.connector).ok_or(Refusal::about(Kind::ConnectorNotFound, &flow.connector))?;
    let data = match flow.decision {
        Decision::Authorize => {
            let user = flow.user.as_deref().or(user).map(str::to_owned).or(first);
            let user = user.ok_or_else(|| Refusal::about(Kind::BadRequest, "say which `user` consents"))?;
            // What an earlier consent brought is over.
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
    settle(kept, request_code, Status::Success { data }, now)
}

/// Ends a flow without a grant.
pub fn deny(kept: &mut Kept, request_code: &str, now: SystemTime) -> Result<Flow, Refusal> {
    settle(kept, request_code, Status::Canceled, now)
}

/// Ends a flow with the provider's error.
pub fn fail(kept: &mut Kept, request_code: &str, code: &str, now: SystemTime) -> Result<Flow, Refusal> {
    let error = json!({"code": code, "message": format!("The provider refused: {code}")});
    settle(kept, request_code, Status::Error { error }, now)
}

fn settle(kept: &mut Kept, request_code: &str, status: Status, now: SystemTime) -> Result<Flow, Refusal> {
    let flow = undecided(kept, request_code, now)?;
    flow.status = status;
    Ok(flow.clone())
}

fn undecided<'k>(kept: &'k mut Kept, request_code: &str, now: SystemTime) -> Result<&'k mut Flow, Refusal> {
    let is_it = |flow: &&mut Flow| {
        flow.request_code == request_code && flow.status == Status::Pending && millis(now) < flow.expires_at
    };
    kept.pending.iter_mut().find(is_it).ok_or(Refusal::new(Kind::NotFound))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::emulator::world::World;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn kept() -> Kept {
        Kept { world: World::demo(), pending: Vec::new() }
    }

    fn address(verifier: &str) -> Vec<(String, String)> {
        vec![("request_code".into(), request_code(verifier)), ("scopes".into(), "a,b".into())]
    }

    #[test]
    fn what_the_cli_begins_by_an_address_is_decided_once_and_told_to_who_knows_the_verifier() {
        let (mut kept, now) = (kept(), UNIX_EPOCH + NOW);
        let refused = |result: Result<Value, Refusal>| result.expect_err("nothing there").kind;
        assert_eq!(refused(result(&kept, "v", now)), Kind::NotFound);
        let flow = open(&mut kept, Decision::Install, "slack/not-installed", &address("v"), now).expect("a flow");
        assert_eq!(flow.narrowing.scopes.as_deref(), Some(&["a".to_owned(), "b".to_owned()][..]));
        assert_eq!(result(&kept, "v", now), Ok(json!({"status": "pending"})));

        let code = request_code("v");
        approve(&mut kept, &code, None, Some("T1"), now).expect("approved");
        let told = result(&kept, "v", now).expect("a result");
        let connector = kept.world.connector("slack/not-installed").expect("it is there");
        assert_eq!(told["data"]["installationId"], connector.installations[0].id);
        assert_eq!((told["status"].as_str(), &*connector.installations[0].tenant_id), (Some("success"), "T1"));
        assert!(deny(&mut kept, &code, now).is_err(), "it is decided");
        assert_eq!(refused(result(&kept, &code, now)), Kind::NotFound, "the code is no verifier");
    }

    #[test]
    fn a_consent_is_for_the_user_that_was_asked_for_and_in_time() {
        let (mut kept, now) = (kept(), UNIX_EPOCH + NOW);
        for (verifier, user) in [("1", Some("user_app")), ("2", None)] {
            let mut pending = Flow::new(Decision::Authorize, "scl_linear", &request_code(verifier), now, LIFE);
            pending.user = user.map(str::to_owned);
            begin(&mut kept, pending, now);
            approve(&mut kept, &request_code(verifier), Some("user_browser"), None, now).expect("approved");
        }
        let granted = &kept.world.connector("scl_linear").expect("it is there").granted_to;
        assert_eq!(granted, &["user_ada", "user_app", "user_browser"]);

        open(&mut kept, Decision::Authorize, "scl_linear", &address("late"), now).expect("a flow");
        let late = now + LIFE;
        assert!(approve(&mut kept, &request_code("late"), None, None, late).is_err());
        assert!(result(&kept, "late", late).is_err());
        assert!(open(&mut kept, Decision::Install, "scl_linear", &address("2"), now).is_err(), "another decision");
    }
}
