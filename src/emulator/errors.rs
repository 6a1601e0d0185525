//! Every way in which the emulator refuses, in one table: what Vercel's documentation calls it, and what is on the wire
//! (docs/vercel.md section 2.2). Nothing else of the emulator makes an error answer, but for the
//! gate that keeps others out.

use std::fmt::Write;

use http::StatusCode;
use serde_json::{Value, json};

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No link for the calling project.
    NotLinked,
    /// A link, but not for the calling environment.
    NotEnabled,
    /// Nobody has installed it there.
    InstallationRequired,
    /// The user has not consented.
    UserAuthorizationRequired,
    /// No such connector in the team.
    ConnectorNotFound,
    /// The grant is gone or unusable.
    NoToken,
    /// The connector cannot serve that subject.
    UnresolvedToken,
    /// No bearer.
    MissingToken,
    /// A bearer that is not known here, or that we did not sign.
    InvalidToken,
    /// An OIDC token that is over, or not begun.
    ExpiredToken,
    /// Another user's subject, asked for with a person's credential.
    OtherUser,
    /// A role that does not permit it.
    NotPermitted,
    /// A credential of another team, or one that has to name its team.
    OtherTeam,
    /// An OIDC token where it takes a person.
    PersonRequired,
    /// A project's OIDC token may not create connectors.
    ProvisioningNotAllowed,
    /// An API client that is no OAuth connector.
    NotOAuth,
    /// A uid that is taken.
    Conflict,
    /// A body or query that is not as it should be.
    BadRequest,
    /// Nothing there.
    NotFound,
    /// Too many requests.
    RateLimited,
    /// Polled too early.
    AuthorizationPending,
    /// Polled too often.
    SlowDown,
    /// The user said no.
    AccessDenied,
    /// The consent was not given in time.
    AuthorizationExpired,
    /// The provider refuses the grant.
    InvalidGrant,
}

/// A kind of refusal, documented and on the wire.
#[derive(Debug)]
pub struct Row {
    /// The kind.
    pub kind: Kind,
    /// What the documentation calls it, if it does.
    pub documented: Option<&'static str>,
    /// The status.
    pub status: u16,
    /// `error.code`
    pub code: &'static str,
    /// `error.message`; `{}` stands for what it is about.
    pub message: &'static str,
    /// What leads to it.
    pub cause: &'static str,
}

const fn row(
    kind: Kind,
    documented: Option<&'static str>,
    (status, code): (u16, &'static str),
    message: &'static str,
    cause: &'static str,
) -> Row {
    Row { kind, documented, status, code, message, cause }
}

/// All of them; the documented ones first.
pub const TABLE: &[Row] = &[
    row(
        Kind::NotLinked,
        Some("ClientNotLinkedToProjectError"),
        (403, "forbidden"),
        "The Connector is not linked to this project.",
        "no link for the calling project",
    ),
    row(
        Kind::NotEnabled,
        Some("ClientNotEnabledForEnvironmentError"),
        (403, "forbidden"),
        "The Connector is not enabled for the {} environment.",
        "the link is not for the calling environment",
    ),
    row(
        Kind::InstallationRequired,
        Some("ConnectorInstallationRequiredError"),
        (422, "client_installation_required"),
        "The connector must be installed first.",
        "no installation, or not the one that is asked for",
    ),
    row(
        Kind::UserAuthorizationRequired,
        Some("UserAuthorizationRequiredError"),
        (422, "user_authorization_required"),
        "The user has not authorized the connector.",
        "a `user` subject without a grant",
    ),
    row(
        Kind::ConnectorNotFound,
        Some("ConnectorNotFoundError"),
        (404, "not_found"),
        "Connector {} was not found.",
        "no connector of that uid or id in the team",
    ),
    row(
        Kind::NoToken,
        Some("NoValidTokenError"),
        (422, "no_token"),
        "There is no valid token for this subject.",
        "the provider took the grant back",
    ),
    row(
        Kind::UnresolvedToken,
        None,
        (422, "unresolved_token"),
        "The connector cannot serve this subject.",
        "a subject that the connector's kind does not know",
    ),
    row(Kind::MissingToken, None, (403, "forbidden"), "Not authorized", "no bearer; `missingToken` is true"),
    row(Kind::InvalidToken, None, (403, "forbidden"), "Not authorized", "an unknown bearer; `invalidToken` is true"),
    row(
        Kind::ExpiredToken,
        None,
        (401, "unauthorized"),
        "The OIDC token has expired.",
        "an OIDC token outside its `nbf` and `exp`",
    ),
    row(
        Kind::OtherUser,
        None,
        (403, "forbidden"),
        "This credential stands for one user and can only request `app` or that user. Another user's token takes an OIDC \
         token, which stands for the project.",
        "another user's subject with an access token or a CLI session",
    ),
    row(
        Kind::NotPermitted,
        None,
        (403, "forbidden"),
        "You don't have permission to {} connectors on this team.",
        "a role without that permission",
    ),
    row(
        Kind::OtherTeam,
        None,
        (403, "forbidden"),
        "The credential is not for the team in `teamId` or `slug`; an access token needs one of them.",
        "another team, or an access token without a team",
    ),
    row(
        Kind::PersonRequired,
        None,
        (403, "forbidden"),
        "An OIDC token stands for a project and cannot do this; use an access token or a CLI session.",
        "an OIDC token on a management endpoint",
    ),
    row(
        Kind::ProvisioningNotAllowed,
        None,
        (403, "forbidden"),
        "Project OIDC connector provisioning is not allowed.",
        "an OIDC token on `connectors/managed/oauth`",
    ),
    row(Kind::NotOAuth, None, (409, "conflict"), "{} is not an OAuth connector.", "a uid of another kind"),
    row(Kind::Conflict, None, (409, "conflict"), "A connector {} exists already.", "a uid that is taken"),
    row(Kind::BadRequest, None, (400, "bad_request"), "Invalid request: {}", "a body or query of another shape"),
    row(
        Kind::NotFound,
        None,
        (404, "not_found"),
        "The requested resource was not found.",
        "another path, or no such id",
    ),
    row(
        Kind::RateLimited,
        None,
        (429, "rate_limited"),
        "Too many requests: {} a minute are allowed.",
        "more than the limit within a minute",
    ),
    row(
        Kind::AuthorizationPending,
        None,
        (400, "authorization_pending"),
        "The user has not decided yet.",
        "a device code polled before the consent",
    ),
    row(Kind::SlowDown, None, (400, "slow_down"), "Poll less often.", "a device code polled too often"),
    row(Kind::AccessDenied, None, (403, "access_denied"), "The user has denied it.", "a consent that was denied"),
    row(
        Kind::AuthorizationExpired,
        None,
        (400, "expired_token"),
        "The request has expired.",
        "a consent that was not given in time",
    ),
    row(Kind::InvalidGrant, None, (400, "invalid_grant"), "The provider refuses the grant.", "a provider that says so"),
];

/// A request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub kind: Kind,
    /// What it is about, for the message.
    about: String,
    /// `Retry-After`, in seconds.
    pub retry_after: Option<u64>,
}

impl Refusal {
    /// A refusal whose message is about nothing in particular.
    pub fn new(kind: Kind) -> Self {
        Self::about(kind, "")
    }

    /// A refusal that is about something.
    pub fn about(kind: Kind, about: impl Into<String>) -> Self {
        Self { kind, about: about.into(), retry_after: None }
    }

    fn row(&self) -> &'static Row {
        // Every kind has its row, which a test holds.
        TABLE.iter().find(|row| row.kind == self.kind).unwrap_or(&TABLE[0])
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.row().status).unwrap_or(StatusCode::FORBIDDEN)
    }

    /// `error.code`
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// `error.message`
    pub fn message(&self) -> String {
        self.row().message.replace("{}", &self.about)
    }

    /// The body in Vercel's envelope.
    pub fn body(&self) -> Value {
        let mut error = json!({"code": self.code(), "message": self.message()});
        match self.kind {
            Kind::MissingToken => error["missingToken"] = true.into(),
            Kind::InvalidToken => error["invalidToken"] = true.into(),
            _ => {}
        }
        json!({ "error": error })
    }
}

/// The table for people, as Markdown: those with a documented name, or all.
pub fn markdown(all: bool) -> String {
    let mut text = String::from(
        "| documented as | status | `error.code` | `error.message` | when |\n| --- | --- | --- | --- | --- |\n",
    );
    for row in TABLE.iter().filter(|row| all || row.documented.is_some()) {
        let name = row.documented.map_or(String::new(), |name| format!("`{name}`"));
        let message = row.message.replace("{}", "…");
        let _ = writeln!(text, "| {name} | {} | `{}` | {message} | {} |", row.status, row.code, row.cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_one_row() {
        // As many as there are: the last one's number tells.
        let kinds = Kind::InvalidGrant as usize + 1;
        assert_eq!(TABLE.len(), kinds);
        for (i, row) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|other| other.kind != row.kind), "{:?} twice", row.kind);
            assert!((400..500).contains(&row.status), "{row:?}");
        }
    }

    #[test]
    fn the_documented_errors_are_on_the_wire_as_the_clients_know_them() {
        for (kind, status, code) in [
            (Kind::NotLinked, 403, "forbidden"),
            (Kind::NotEnabled, 403, "forbidden"),
            (Kind::InstallationRequired, 422, "client_installation_required"),
            (Kind::UserAuthorizationRequired, 422, "user_authorization_required"),
            (Kind::ConnectorNotFound, 404, "not_found"),
        ] {
            let refusal = Refusal::about(kind, "production");
            assert_eq!((refusal.status().as_u16(), refusal.code()), (status, code), "{kind:?}");
        }
        let message = Refusal::new(Kind::NotLinked).message().to_lowercase();
        assert!(message.contains("connector is not linked to this project"), "what @vercel/connect looks for");
        assert!(Refusal::about(Kind::NotEnabled, "preview").message().contains("the preview environment"));
        let table = markdown(false);
        assert_eq!(table.lines().count(), 2 + 6, "{table}");
        assert!(table.contains("| `ClientNotLinkedToProjectError` | 403 | `forbidden` |"), "{table}");
    }
}
