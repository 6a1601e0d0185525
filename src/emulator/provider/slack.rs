//! Slack, from Connect's side.

use http::StatusCode;
use oauth2::HttpResponse;
use serde_json::{Map, Value};

use super::oauth::Endpoints;
use super::{Fetched, Refused};
use crate::emulator::flow::Narrowing;

pub(super) fn endpoints(base: &str) -> Endpoints {
    Endpoints::new(
        format!("{base}/oauth/v2/authorize"),
        format!("{base}/api/oauth.v2.access"),
        Some(format!("{base}/api/auth.revoke")),
    )
}

/// Slack refuses with 200 and `"ok": false`, and puts a user's token beside the answer's own.
pub(super) fn dialect(response: HttpResponse) -> HttpResponse {
    let (mut head, body) = response.into_parts();
    let Ok(Value::Object(mut answer)) = serde_json::from_slice::<Value>(&body) else {
        return HttpResponse::from_parts(head, body);
    };
    if answer.get("ok") == Some(&Value::Bool(false)) {
        head.status = StatusCode::BAD_REQUEST;
    } else if !answer.contains_key("access_token")
        && let Some(Value::Object(user)) = answer.remove("authed_user")
    {
        answer.extend(user);
    }
    HttpResponse::from_parts(head, Value::Object(answer).to_string().into_bytes())
}

/// A token of Slack's cannot be narrowed: it reaches as far as the app was allowed to. Whether that is as far as asked; its
/// only audience and resource is Slack's API, and authorization details mean nothing there.
pub(super) fn reaches(fetched: &Fetched, narrowing: &Narrowing) -> Result<(), Refused> {
    let granted = fetched.scopes.as_deref().unwrap_or_default();
    let granted: Vec<&str> = granted.iter().map(String::as_str).filter(|scope| !scope.is_empty()).collect();
    let is_granted = |scope: &&str| granted.is_empty() || granted.contains(scope);
    match narrowing.named_scopes().iter().all(is_granted) {
        true => Ok(()),
        false => Err(Refused::new("invalid_scope")),
    }
}

/// What an app is told besides the token.
pub(super) fn metadata(further: &Map<String, Value>) -> Value {
    ["team", "bot_user_id", "app_id"]
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), further.get(*key)?.clone())))
        .collect()
}
