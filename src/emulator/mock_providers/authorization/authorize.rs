//! The parts that a browser sees: the authorization endpoint, the question, and the page for device codes.

use std::time::{Duration, SystemTime};

use http::StatusCode;

use super::{AuthorizationCode, AuthorizationRequest, AuthorizationServer, Client, Delivery, DeviceCode, OAuthError};
use crate::emulator::ids::random_id;
use crate::emulator::message::Response;
use crate::emulator::mock_providers::Call;
use crate::emulator::pages::{self, Question};

/// The lifetime of an authorization code.
const CODE_LIFE: Duration = Duration::from_secs(60);

impl AuthorizationServer {
    /// The authorization endpoint: shows the question, redirects at once (`prompt=none`), or shows an error.
    pub(in crate::emulator::mock_providers) fn authorize(&mut self, call: &Call<'_>) -> Response {
        let query = |name| call.request.query(name);
        let Some(client) = query("client_id").and_then(|id| self.clients.get(id)) else {
            return self.error_page("There is no such client_id.");
        };
        // Never redirect to a URI that the client has not registered.
        let Some(uri) = query("redirect_uri").filter(|uri| client.app.redirect_uris.iter().any(|r| r == uri)) else {
            return self.error_page("This redirect_uri is not registered.");
        };
        let state = query("state").unwrap_or_default();
        let refuse = |(error, description)| {
            redirect(uri, &[("error", error), ("error_description", description), ("state", state)])
        };
        let request = match self.authorization_request(call, client, uri, state) {
            Ok(request) => request,
            Err(error) => return refuse(error),
        };
        if query("prompt") == Some("none") {
            let has_consented = self.consents.contains(&(request.client_id.clone(), request.subject.clone()));
            return match has_consented {
                true => self.decide(request, true, call.now),
                false => refuse(("consent_required", "the user has not consented")),
            };
        }
        self.ask(request)
    }

    fn authorization_request(
        &self,
        call: &Call<'_>,
        client: &Client,
        uri: &str,
        state: &str,
    ) -> Result<AuthorizationRequest, OAuthError> {
        let query = |name| call.request.query(name);
        if query("response_type") != Some("code") {
            return Err(("unsupported_response_type", "only `code`"));
        }
        let challenge = match (query("code_challenge"), query("code_challenge_method")) {
            (Some(challenge), Some("S256")) if challenge.len() == 43 => Some(challenge.to_owned()),
            (None, None) if !self.rules.pkce_required => None,
            (None, _) => return Err(("invalid_request", "PKCE is required: code_challenge is missing")),
            _ => return Err(("invalid_request", "the PKCE method must be S256")),
        };
        Ok(AuthorizationRequest {
            client_id: query("client_id").unwrap_or_default().to_owned(),
            subject: query("team").or(query("login_hint")).unwrap_or("user").to_owned(),
            scope: self.requested_scope(call.request.query_pairs(), &client.app, None)?,
            nonce: query("nonce").map(str::to_owned),
            delivery: Delivery::Redirect { uri: uri.to_owned(), state: state.to_owned(), challenge },
        })
    }

    /// Shows the question.
    fn ask(&mut self, request: AuthorizationRequest) -> Response {
        let csrf = random_id("", 32);
        let app = self.clients.get(&request.client_id).map_or("An app", |client| client.app.display_name());
        let page = pages::question(&Question {
            title: self.rules.name,
            question: format!("{app} asks for access as {}.", request.subject),
            items: request.scope.scopes.iter().chain(&request.scope.targets).cloned().collect(),
            csrf: &csrf,
        });
        self.questions.insert(csrf, request);
        page
    }

    /// The form of the question.
    pub(in crate::emulator::mock_providers) fn submit(&mut self, call: &Call<'_>) -> Response {
        let request = pages::csrf_of(&call.request.headers, &call.form).and_then(|csrf| self.questions.remove(csrf));
        let Some(request) = request else {
            return self.error_page("This form was not shown here, or was sent before.");
        };
        self.decide(request, call.form("decision") == Some("approve"), call.now)
    }

    fn decide(&mut self, request: AuthorizationRequest, approved: bool, now: SystemTime) -> Response {
        if approved {
            self.consents.insert((request.client_id.clone(), request.subject.clone()));
        }
        match &request.delivery {
            Delivery::Device { code } => {
                if let Some(device) = self.devices.get_mut(code) {
                    device.decision = Some(approved);
                }
                let sentence = if approved { "Approved. You can close this window." } else { "Denied." };
                pages::sentence(StatusCode::OK, self.rules.name, sentence, None)
            }
            Delivery::Redirect { uri, state, .. } if !approved => {
                let description = "the user denied the request";
                redirect(uri, &[("error", "access_denied"), ("error_description", description), ("state", state)])
            }
            Delivery::Redirect { uri, state, .. } => {
                let code = random_id("code", 32);
                let response = redirect(uri, &[("code", &code), ("state", state)]);
                self.codes.insert(code, AuthorizationCode { request, expires_at: now + CODE_LIFE, grant: None });
                response
            }
        }
    }

    /// The page for a user code.
    pub(in crate::emulator::mock_providers) fn device_page(&mut self, call: &Call<'_>) -> Response {
        let code = call.request.query("user_code").unwrap_or_default();
        let is_open = |device: &&DeviceCode| {
            device.user_code == code && device.decision.is_none() && call.now < device.expires_at
        };
        match self.devices.values().find(is_open).map(|device| device.request.clone()) {
            Some(request) => self.ask(request),
            None => self.error_page("There is no such code, or it has expired."),
        }
    }

    fn error_page(&self, sentence: &str) -> Response {
        pages::sentence(StatusCode::BAD_REQUEST, self.rules.name, sentence, None)
    }
}

/// Redirects to `uri` with the parameters that are not empty.
pub(in crate::emulator::mock_providers) fn redirect(uri: &str, parameters: &[(&str, &str)]) -> Response {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(parameters.iter().filter(|(_, value)| !value.is_empty()));
    let separator = if uri.contains('?') { '&' } else { '?' };
    Response::see_other(&format!("{uri}{separator}{}", query.finish()))
}
