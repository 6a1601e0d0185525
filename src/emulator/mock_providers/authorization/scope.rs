//! What a token may be used for, and how a request may restrict it.

use serde_json::Value;

use super::{AuthorizationServer, OAuthError};
use crate::emulator::mock_providers::App;

/// What a token may be used for.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::emulator::mock_providers) struct Scope {
    /// Scopes; if empty, all of the client.
    pub scopes: Vec<String>,
    /// Resources and audiences.
    pub targets: Vec<String>,
    /// Authorization details.
    pub details: Vec<Value>,
}

impl AuthorizationServer {
    /// The scope in request parameters. It may not exceed what the app may get, nor what was already `granted`.
    pub(super) fn requested_scope(
        &self,
        parameters: &[(String, String)],
        app: &App,
        granted: Option<&Scope>,
    ) -> Result<Scope, OAuthError> {
        let values = |names: &'static [&str]| {
            parameters.iter().filter(|(name, _)| names.contains(&name.as_str())).map(|(_, value)| value.clone())
        };
        let scopes: Vec<String> = values(&["scope", "user_scope"])
            .flat_map(|scopes| scopes.split([' ', ',']).map(str::to_owned).collect::<Vec<_>>())
            .filter(|scope| !scope.is_empty())
            .collect();
        let is_within = |requested: &[String], allowed: &[String]| {
            allowed.is_empty() || requested.iter().all(|requested| allowed.contains(requested))
        };
        let nothing = Scope::default();
        let granted = granted.unwrap_or(&nothing);
        if !is_within(&scopes, &app.scopes) || !is_within(&scopes, &granted.scopes) {
            return Err(("invalid_scope", "a scope that is not available"));
        }
        let targets: Vec<String> = values(&["resource", "audience"]).collect();
        let is_absolute =
            |uri: String| uri.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some()) && !uri.contains('#');
        if !values(&["resource"]).all(is_absolute)
            || !is_within(&targets, &app.resources)
            || !is_within(&targets, &granted.targets)
        {
            return Err(("invalid_target", "a resource that is not available"));
        }
        let mut details = Vec::new();
        for text in values(&["authorization_details"]) {
            let Ok(Value::Array(list)) = serde_json::from_str(&text) else {
                return Err(("invalid_authorization_details", "not an array"));
            };
            details.extend(list);
        }
        let is_known =
            |detail: &Value| detail["type"].as_str().is_some_and(|kind| self.rules.detail_types.contains(&kind));
        let is_granted = |detail: &Value| granted.details.is_empty() || granted.details.contains(detail);
        if !details.iter().all(|detail| is_known(detail) && is_granted(detail)) {
            return Err(("invalid_authorization_details", "an unknown type, or more than was granted"));
        }
        let or_granted = |requested: Vec<String>, granted: &[String], allowed: &[String]| match (&*requested, granted) {
            ([], []) => allowed.to_vec(),
            ([], granted) => granted.to_vec(),
            _ => requested,
        };
        Ok(Scope {
            scopes: or_granted(scopes, &granted.scopes, &app.scopes),
            targets: or_granted(targets, &granted.targets, &[]),
            details: if details.is_empty() { granted.details.clone() } else { details },
        })
    }
}
